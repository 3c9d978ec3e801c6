"""Rewards shaped on several ranks, in real processes; and by the calibration of the version that answered."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from rayrm.errors import ConfigError, PeerFailedError, RayrmError, ScoreError
from rayrm.rl import moments
from rayrm.rl.moments import RunningMoments
from rayrm.rl.shaping import Shaper, Shaping
from rayrm.serve.client import RewardClient
from rayrm.serve.registry import publish
from rayrm.serve.request import ScoreResult
from rayrm.serve.scorer import RewardModel
from rayrm.serve_settings import Ensemble
from tests.served import SAME, free_port, post, served, texts
from tests.tiny import save_tiny

NUM_RANKS = 2
SIZES = ((3, 8), (0, 5), (1, 0), (0, 0), (7, 2))
"""Of each call's batch, on each rank."""


def batches(seed: int) -> list[list[list[float]]]:
    """`[call][rank][scores]`, far from zero: what a sum of squares would lose, shows."""
    rng = np.random.default_rng(seed)
    return [[(1e4 + rng.normal(size=size)).tolist() for size in sizes] for sizes in SIZES]


def shaper() -> Shaper:
    return Shaper(Shaping(normalize=True))


def answer(scores: list[float]) -> ScoreResult:
    return ScoreResult(scores, "v1", "reward")


def bits(one: Shaper) -> list[Any]:
    assert one.moments is not None
    return [one.moments.count, one.moments.mean.hex(), one.moments.squares.hex()]


def calls_in_turn(rank: int, root: Path) -> Any:
    one = shaper()
    found = []
    for call in batches(0):
        rewards = one.shape(answer(call[rank]))
        found.append({"rewards": rewards, "bits": bits(one)})
    EARLIER.append(one)
    return found


def calls_of_an_event_loop(rank: int, root: Path) -> Any:
    """Two rewards at once, as TRL asks async ones; on each rank another comes first."""
    ones = [shaper(), shaper()]

    async def shape(number: int, call: int) -> list[float]:
        for _ in range(5 * (number == rank)):
            await asyncio.sleep(0.01)
        return await ones[number].shape_async(answer(batches(number)[call][rank]))

    async def both() -> list[Any]:
        found = []
        for call in range(len(SIZES)):
            rewards = await asyncio.gather(shape(0, call), shape(1, call))
            found.append({"rewards": rewards, "bits": [bits(one) for one in ones]})
        return found

    return in_a_loop_of_a_thread(both)


def the_loop_stays_free(rank: int, root: Path) -> Any:
    """Rank 1 comes only when rank 0's loop has done something else while it waited."""
    flag, one = root / "free", shaper()

    async def waits() -> list[float]:
        call = asyncio.create_task(one.shape_async(answer([1.0])))
        await asyncio.sleep(0.05)
        assert not call.done()
        flag.touch()
        return await call

    if rank == 0:
        return in_a_loop_of_a_thread(waits)
    while not flag.exists():
        time.sleep(0.01)
    return one.shape(answer([3.0]))


def a_rank_that_has_no_scores(rank: int, root: Path) -> Any:
    one = shaper()
    one.shape(answer([float(rank)]))
    if rank == 1:
        one.give_up()
        said = "gave up"
    else:
        said = error_of(lambda: one.shape(answer([100.0])))
    one.shape(answer([2.0]))
    return {"said": said, "bits": bits(one)}


def a_rank_whose_score_is_nan(rank: int, root: Path) -> Any:
    one = shaper()
    scores = [float("nan")] if rank == 0 else [100.0]

    async def shape() -> None:
        await one.shape_async(answer(scores))

    said = error_of(lambda: in_a_loop_of_a_thread(shape))
    one.shape(answer([2.0 + rank]))
    return {"said": said, "bits": bits(one)}


def a_rank_that_resumed_alone(rank: int, root: Path) -> Any:
    one, other = shaper(), shaper()
    one.shape(answer([1.0 + rank]))
    if rank == 0:
        other.load_state_dict(one.state_dict())
    said = error_of(lambda: other.shape(answer([5.0])))
    other.load_state_dict(one.state_dict())
    other.shape(answer([3.0]))
    return {"said": said, "bits": bits(other)}


def a_rank_that_hangs(rank: int, root: Path) -> Any:
    before, moments.WAIT_S = moments.WAIT_S, 1.0
    one = shaper()
    one.shape(answer([1.0]))
    moments.WAIT_S = before
    return error_of(lambda: one.shape(answer([2.0]))) if rank == 0 else "hung"


def a_rank_that_had_another_life(rank: int, root: Path) -> Any:
    """As a process that Ray gave to other work before."""
    for _ in range(3 * rank):
        shaper()
    one = shaper()
    one.shape(answer([1.0 + rank]))
    return bits(one)


def a_rank_that_made_one_more(rank: int, root: Path) -> Any:
    """Rank 1's reward is then the counterpart of none: both wait, but not for ever."""
    more = shaper() if rank == 1 else None
    before, moments.WAIT_S = moments.WAIT_S, 1.0
    one = shaper()
    said = error_of(lambda: one.shape(answer([1.0])))
    moments.WAIT_S = before
    del more
    return {"said": said, "bits": bits(one)}


def a_rank_that_dies(rank: int, root: Path) -> Any:
    return "died" if rank == 1 else error_of(lambda: EARLIER[0].shape(answer([2.0])))


EARLIER: list[Shaper] = []
"""A reward of this process that has worked."""

SCENES: list[Callable[[int, Path], Any]] = [
    calls_in_turn,
    calls_of_an_event_loop,
    the_loop_stays_free,
    a_rank_that_has_no_scores,
    a_rank_whose_score_is_nan,
    a_rank_that_resumed_alone,
    a_rank_that_had_another_life,
    a_rank_that_hangs,
    a_rank_that_made_one_more,
    a_rank_that_dies,
]
"""Each on all ranks, in this order; the last one's rank 1 leaves."""


def error_of(act: Callable[[], Any]) -> str:
    try:
        act()
    except RayrmError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def in_a_loop_of_a_thread(work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """As TRL runs async rewards: by an event loop in a daemon thread, while this one waits."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        return asyncio.run_coroutine_threadsafe(work(), loop).result()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def _rank_main(rank: int, root: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(root / "store"), NUM_RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=NUM_RANKS)
    found = {}
    for scene in SCENES:
        found[scene.__name__] = scene(rank, root)
    (root / f"rank-{rank}.json").write_text(json.dumps(found))
    os._exit(0)  # as a rank that dies: nothing is said to the other


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found in each scene."""
    root = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(_rank_main, (root,), nprocs=NUM_RANKS)
    return [json.loads((root / f"rank-{rank}.json").read_text()) for rank in range(NUM_RANKS)]


def check_single_stream(calls: list[list[list[float]]], states: list[list[Any]], rewards: Any) -> None:
    """`states` `[call]`, `rewards` `[call][rank]` are those of all scores so far as one stream."""
    stream = RunningMoments()
    seen: list[float] = []
    for call, state, own in zip(calls, states, rewards, strict=True):
        for scores in call:
            for score in scores:
                stream.update([score])
                seen.append(score)
        count, mean, squares = state[0], float.fromhex(state[1]), float.fromhex(state[2])
        assert count == len(seen)
        assert mean == pytest.approx(stream.current.mean, rel=0, abs=1e-6)
        assert mean == pytest.approx(np.mean(seen), rel=0, abs=1e-6)
        std = (squares / count) ** 0.5
        assert std == pytest.approx(stream.current.std, rel=0, abs=1e-6)
        assert std == pytest.approx(np.std(seen), rel=0, abs=1e-6)
        assert std > 0.3
        for scores, shaped in zip(call, own, strict=True):
            expected = [(score - np.mean(seen)) / np.std(seen) for score in scores]
            assert shaped == pytest.approx(expected, rel=0, abs=1e-6)


def test_ranks_with_unequal_batches_hold_the_statistics_of_one_stream(found: list[dict[str, Any]]) -> None:
    first, second = (rank["calls_in_turn"] for rank in found)
    assert [one["bits"] for one in first] == [one["bits"] for one in second]
    rewards = [[one["rewards"], other["rewards"]] for one, other in zip(first, second, strict=True)]
    check_single_stream(batches(0), [one["bits"] for one in first], rewards)


@pytest.mark.parametrize("number", [0, 1])
def test_async_rewards_that_come_in_another_order_on_each_rank_do_not_meet(
    found: list[dict[str, Any]], number: int
) -> None:
    first, second = (rank["calls_of_an_event_loop"] for rank in found)
    assert [one["bits"] for one in first] == [one["bits"] for one in second]
    rewards = [
        [one["rewards"][number], other["rewards"][number]] for one, other in zip(first, second, strict=True)
    ]
    check_single_stream(batches(number), [one["bits"][number] for one in first], rewards)


def test_the_event_loop_is_free_while_ranks_are_waited_for(found: list[dict[str, Any]]) -> None:
    assert [rank["the_loop_stays_free"] for rank in found] == [[-1.0], [1.0]]


def test_a_rank_without_scores_ends_the_others_call_and_nothing_is_counted(
    found: list[dict[str, Any]],
) -> None:
    first, second = (rank["a_rank_that_has_no_scores"] for rank in found)
    assert first["said"].startswith(f"{PeerFailedError.__name__}: the scores of rank 1 failed")
    # 0 and 1, then 2 and 2: mean 1.25.
    assert first["bits"] == second["bits"]
    assert first["bits"][:2] == [4, (1.25).hex()]


def test_what_one_rank_refuses_ends_the_others_call_too(found: list[dict[str, Any]]) -> None:
    first, second = (rank["a_rank_whose_score_is_nan"] for rank in found)
    assert first["said"].startswith(f"{ScoreError.__name__}: score 0 of 1 is nan")
    assert second["said"].startswith(f"{PeerFailedError.__name__}: the scores of rank 0 failed")
    assert first["bits"] == second["bits"] == [2, (2.5).hex(), (0.5).hex()]


def test_ranks_that_hold_different_states_are_told_apart(found: list[dict[str, Any]]) -> None:
    for rank in found:
        scene = rank["a_rank_that_resumed_alone"]
        assert scene["said"].startswith(f"{ConfigError.__name__}: rank 1 normalizes by other statistics")
        assert scene["bits"] == [4, (2.25).hex(), (2.75).hex()]


def test_rewards_that_are_gone_do_not_part_the_ranks(found: list[dict[str, Any]]) -> None:
    assert [rank["a_rank_that_had_another_life"] for rank in found] == [[2, (1.5).hex(), (0.5).hex()]] * 2


def test_a_rank_that_hangs_or_dies_ends_the_waiting_as_an_error(found: list[dict[str, Any]]) -> None:
    said = f"{PeerFailedError.__name__}: the ranks could not exchange the moments"
    assert found[0]["a_rank_that_hangs"].startswith(said)
    assert found[0]["a_rank_that_dies"].startswith(said)
    for rank in found:
        assert rank["a_rank_that_made_one_more"]["said"].startswith(said)
        assert rank["a_rank_that_made_one_more"]["bits"][0] == 0


def text_file(path: Path, prompts: list[str], completions: list[str]) -> Path:
    rows = [
        {"prompt": prompt, "completion": completion}
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.ray
def test_rewards_are_calibrated_by_the_version_that_answered(ray_cluster: None, tmp_path: Path) -> None:
    prompts, completions = texts(24)
    kinds = {
        "long": text_file(tmp_path / "long.jsonl", prompts[:16], completions[:16]),
        "short": text_file(tmp_path / "short.jsonl", prompts[16:], completions[16:]),
    }
    models = [
        publish(
            save_tiny(tmp_path / f"run-{seed}", seed=seed, chat=False),
            tmp_path / "registry",
            "calibrated",
            calibrate=kinds,
            make_current=seed == 0,
        )
        for seed in (0, 1)
    ]
    datasets = ["long"] * 16 + ["short"] * 8
    expected = []
    for model in models:
        scores = np.array(RewardModel.from_pretrained(model.path).score(prompts, completions))
        one, other = scores[:16], scores[16:]
        expected.append(
            [*((one - one.mean()) / one.std()), *((other - other.mean()) / other.std())],
        )
    assert np.abs(np.subtract(*expected)).max() > 0.5
    shaper, port = Shaper(Shaping(calibrate_column="kind")), free_port()
    with served(models[0], "calibrated", http_port=port) as client:
        for model, rewards in zip(models, expected, strict=True):
            client.roll(model.version)
            result = client.score(prompts, completions)
            assert result.version == model.version
            # In other batches scores differ by some 1e-6, and the spread of this tiny model's is 3e-3.
            assert shaper.shape(result, datasets=datasets) == pytest.approx(rewards, abs=0.01)
            body = {"prompts": prompts, "completions": completions, "details": True}
            code, found = post(f"http://127.0.0.1:{port}/v1/score", body)
            told = {name: (one["mean"], one["std"]) for name, one in found["calibration"].items()}
            assert (code, told) == (200, dict(result.calibration))
            assert (
                "calibration" not in post(f"http://127.0.0.1:{port}/v1/score", {**body, "details": False})[1]
            )
        # A request that nothing of is left to compute: the calibration comes all the same.
        assert client.score([], []).calibration == result.calibration


@pytest.mark.ray
def test_an_ensemble_has_a_spread_and_no_calibration(ray_cluster: None, tmp_path: Path) -> None:
    prompts, completions = texts(8)
    file = text_file(tmp_path / "texts.jsonl", prompts, completions)
    members = {}
    for seed, name in enumerate(("one", "two")):
        run = save_tiny(tmp_path / f"run-{name}", seed=seed, chat=False)
        members[name] = publish(run, tmp_path / "registry", name, calibrate={"all": file})
    ensembles = {"both": Ensemble(members=["one", "two"])}
    with served(members, "members", ensembles=ensembles):
        alone = [RewardClient("members", model=name).score(prompts, completions) for name in members]
        both = RewardClient("members", model="both").score(prompts, completions)
    assert [list(result.calibration) for result in (*alone, both)] == [["all"], ["all"], []]
    with pytest.raises(ConfigError, match="'both' is an ensemble"):
        Shaper(Shaping(calibrate="all")).shape(both)
    # Of two members the spread is half their distance, so that one spread below the mean is the lower one.
    lower = [min(pair) for pair in zip(*(result.scores for result in alone), strict=True)]
    assert Shaper(Shaping(pessimism=1)).shape(both) == pytest.approx(lower, abs=SAME)
