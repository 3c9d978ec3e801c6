"""examples/ppo_actor.py on tiny models: a real service, whose replica is killed and whose version rolls."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray import serve
from ray.util.placement_group import remove_placement_group
from transformers import AutoModelForCausalLM

from examples import ppo_actor
from rayrm.data.tokenize import TextInput
from rayrm.errors import ClusterError, DataError, RayrmError, RunDirectoryError, ScoreError
from rayrm.rl.heldout import Gain, paired_gain
from rayrm.rl.ppo import PPOSettings
from rayrm.rl.ppo_learner import Learner, Rollout
from rayrm.rl.service import SCORED_AT_ONCE, scores_by_one_version
from rayrm.serve.client import RewardClient
from rayrm.serve.registry import PublishedModel, publish
from rayrm.serve.scorer import RewardModel
from tests.served import SAME, replica_pids, served, texts
from tests.tiny import WORDS, save_tiny, write_rows
from tests.unit.test_ppo import Reward, questions, save_policy

pytestmark = pytest.mark.ray
SHORT = ["--prompts-per-step", "8", "--max-completion-length", "4", "--heldout-prompts", "4"]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_policy(tmp_path_factory.mktemp("policy"))


def words(home: Path, policy: Path, reward: str, prompts: list[Any], *more: str) -> list[str]:
    others = [f"{ask} now" if isinstance(ask, str) else [*ask, *ask] for ask in prompts]
    for name, asked in {"train": prompts, "heldout": others}.items():
        write_rows(home / f"{name}.jsonl", [{"prompt": prompt} for prompt in asked])
    return [
        "--policy", str(policy), "--reward", reward, "--prompts", str(home / "train.jsonl"), "--heldout",
        str(home / "heldout.jsonl"), "--output-dir", str(home / "out"), *SHORT, *more,
    ]  # fmt: skip


def read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture(scope="module")
def deployed(ray_cluster: None, published: PublishedModel) -> Iterator[RewardClient]:
    with served(published, f"ppo-{os.getpid()}") as reward:
        yield reward


@pytest.fixture
def service(deployed: RewardClient, published: PublishedModel) -> Iterator[RewardClient]:
    yield deployed
    deployed.roll(published.version)


def test_a_killed_replica_and_a_roll_lose_no_reward_and_each_score_is_its_version_s(
    service: RewardClient,
    published: PublishedModel,
    second: PublishedModel,
    policy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompts = [f"what is the {word}?" for word in WORDS[:12]]
    steps, name = 6, service.name
    plain = ppo_actor.step_prompts

    def disturbed(*given: Any) -> Iterator[Any]:
        for number, taken in enumerate(plain(*given), 1):
            if number == 3:
                os.kill(replica_pids(name)[0], signal.SIGKILL)
            if number == 5:
                service.roll(second.version)
            yield taken

    monkeypatch.setattr(ppo_actor, "step_prompts", disturbed)
    gain = ppo_actor.main(
        words(tmp_path, policy, name, prompts, "--steps", str(steps), "--learning-rate", "1e-3")
    )
    out = tmp_path / "out"
    log, samples = read_lines(out / "metrics.jsonl"), read_lines(out / "samples.jsonl")
    assert [record["step"] for record in log] == list(range(1, steps + 1))
    assert [sample["step"] for sample in samples] == [step for step in range(1, steps + 1) for _ in range(8)]
    assert [record["versions"] for record in log] == [[published.version]] * 4 + [[second.version]] * 2
    for model in (published, second):
        of_it = [sample for sample in samples if sample["version"] == model.version]
        expected = RewardModel.from_pretrained(model.path).score(
            [sample["prompt"] for sample in of_it], [sample["completion"] for sample in of_it]
        )
        assert [sample["score"] for sample in of_it] == pytest.approx(expected, abs=SAME)
    for record in log:
        of_it = [sample for sample in samples if sample["step"] == record["step"]]
        assert record["reward"] == pytest.approx(sum(sample["score"] for sample in of_it) / 8)
        assert {sample["version"] for sample in of_it} == set(record["versions"])
        assert record[f"{name}/version/{record['versions'][0]}"] == 1
    heldout = json.loads((out / "heldout.json").read_text())
    assert heldout["version"] == second.version
    assert heldout["gain"]["gain"] == gain.gain
    assert [len(heldout[side][0]) for side in ("before", "samples_after")] == [2, 2]
    assert "<html" in (out / "report.html").read_text()
    before = AutoModelForCausalLM.from_pretrained(policy).state_dict()
    after = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_the_comparison_is_many_requests_that_one_version_answers(
    service: RewardClient, second: PublishedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the service rolls between two of them: the new version scores all."""
    prompts, completions = texts(150)
    plain, asked = RewardClient.score_inputs, []

    def rolling(client: RewardClient, inputs: list[TextInput], **settings: Any) -> Any:
        asked.append((len(inputs), client.pin_version))
        found = plain(client, inputs, **settings)
        if len(asked) == 1:
            service.roll(second.version)
        return found

    monkeypatch.setattr(RewardClient, "score_inputs", rolling)
    inputs = [TextInput(*pair) for pair in zip(prompts, completions, strict=True)]
    scores, version = scores_by_one_version(service, inputs)
    assert version == second.version
    most = SCORED_AT_ONCE
    assert [count for count, _ in asked[2:]] == [most, most, 150 - 2 * most]
    assert [pinned for _, pinned in asked[2:]] == [None, version, version]
    expected = RewardModel.from_pretrained(second.path).score(prompts, completions)
    assert scores == pytest.approx(expected, abs=SAME)
    assert service.pin_version is None


def planted(policy: Path, output: Path, prompts: list[Any], **fields: Any) -> Gain:
    """A run without a service, whose reward is how many `e` a completion has."""
    settings = PPOSettings(
        prompts_per_step=128, num_ppo_epochs=3, max_completion_length=4, kl_coef=0.0, **fields
    )
    reward = Reward(lambda text: text.count("e"))
    output.mkdir()
    room = ppo_actor.reserve_actors(settings)
    try:
        actors = ppo_actor.start_actors(settings, str(policy), reward, room)
        ppo_actor.train(settings, actors, reward, prompts, output)
        gain = ppo_actor.compare(actors, reward, prompts, 2, output)
    finally:
        remove_placement_group(room)
    kept = json.loads((output / "heldout.json").read_text())
    for side in ("before", "after"):
        said = [[text[0]["content"] for text in row] for row in kept[f"samples_{side}"]]
        assert kept[side] == [[text.count("e") for text in row] for row in said]
    return gain


def test_the_gain_of_a_trained_policy_is_outside_its_interval_and_of_a_frozen_one_inside(
    ray_cluster: None, policy: Path, tmp_path: Path
) -> None:
    prompts = [[{"role": "user", "content": f"{a} {b}"}] for a in WORDS[:16] for b in WORDS[16:24]]
    gain = planted(policy, tmp_path / "run", prompts, steps=6, learning_rate=5e-3, num_actors=2)
    assert (gain.num_prompts, gain.num_samples) == (128, 256)
    assert 0 < gain.low < gain.gain < gain.high
    # A step that float32 does not see. Both policies draw by the same seed, so nothing differs at all.
    frozen = planted(policy, tmp_path / "frozen", prompts, steps=1, learning_rate=1e-12)
    assert (frozen.low, frozen.gain, frozen.high) == (0, 0, 0)
    # Drawn by another seed, the interval of no gain has a width, and holds 0.
    drawn = [Learner(PPOSettings(max_completion_length=4, seed=n), str(policy), Reward()) for n in (0, 1)]
    counts = [
        [[text[0]["content"].count("e") for text in row] for row in one.sample(prompts, 2)[0]]
        for one in drawn
    ]
    nothing = paired_gain(*counts)
    assert nothing.low < 0 < nothing.high
    assert nothing.high < gain.low


def test_two_actors_learn_what_one_learns_from_the_same_rollout(ray_cluster: None, policy: Path) -> None:
    """Up to the order of sums in float32."""
    fields: dict[str, Any] = {"prompts_per_step": 8, "num_mini_batches": 1, "max_completion_length": 6}
    fields["learning_rate"] = 1e-3
    alone = Learner(PPOSettings(**fields), str(policy), Reward())
    rollout, _ = alone.roll_out(questions(8))
    rewards = torch.arange(8.0)
    shares = []
    for rank in range(2):
        of_rank = slice(rank, None, 2)
        kept = {
            name: getattr(rollout, name)[of_rank] for name in ("logprobs", "reference_logprobs", "values")
        }
        generated = rollout.generated
        share = type(generated)(
            generated.tokens[of_rank], generated.attention_mask[of_rank], generated.mask[of_rank],
            generated.ended[of_rank], generated.texts[of_rank],
        )  # fmt: skip
        rest = {"entropy": rollout.entropy[of_rank], "scores": rollout.scores[of_rank]}
        shares.append((Rollout(generated=share, **kept, **rest), rewards[of_rank]))
    means = alone.learn(rollout, rewards)

    settings = PPOSettings(num_actors=2, **fields)
    room = ppo_actor.reserve_actors(settings)
    try:
        actors = ppo_actor.start_actors(settings, str(policy), Reward(), room)
        both = ray.get([actor.learn.remote(*share) for actor, share in zip(actors, shares, strict=True)])
        weights = ray.get(
            [actor.__ray_call__.remote(lambda learner: learner.policy.state_dict()) for actor in actors]
        )
        # A rank that fails ends the step, though the other one waits for its gradients.
        waits = actors[0].step.remote(1, questions(4))
        with pytest.raises(IndexError):
            ppo_actor.gathered([waits, actors[1].step.remote(1, [])])
        # A rank that is lost is named, though the other one fails first, and for want of it.
        killed = actors[1].__ray_call__.remote(lambda learner: os.kill(os.getpid(), signal.SIGKILL))
        ray.wait([waits])
        with pytest.raises(RayrmError, match="the actor of rank 1 is gone"):
            ppo_actor.gathered([waits, killed])
    finally:
        remove_placement_group(room)
    assert both[0] == both[1]
    assert both[0] == pytest.approx(means, abs=1e-5)
    for name, expected in alone.policy.state_dict().items():
        assert torch.equal(weights[0][name], weights[1][name])
        # Adam turns a gradient that is all but zero into a step of the learning rate, whatever its sign.
        far = (weights[0][name] - expected).abs() > 1e-5
        assert far.float().mean() < 0.01


def test_a_signal_ends_the_command_in_one_line_and_the_status_of_the_signal(
    service: RewardClient, policy: Path, tmp_path: Path
) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
        "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
    }
    runs = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        home = tmp_path / number.name
        home.mkdir()
        given = words(home, policy, service.name, ["the cat?"] * 9, "--steps", "100000")
        command = [sys.executable, ppo_actor.__file__, *given]
        runs[number] = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
    try:
        end = time.monotonic() + 120
        while not all(read_lines(tmp_path / number.name / "out" / "metrics.jsonl") for number in runs):
            assert all(run.poll() is None for run in runs.values())
            assert time.monotonic() < end
            time.sleep(0.1)
        for number, run in runs.items():
            run.send_signal(number)
        said = {number: run.communicate(timeout=120)[1].splitlines() for number, run in runs.items()}
    finally:
        for run in runs.values():
            run.kill()
    # Ray tells which cluster it joins, and bitsandbytes (where it is installed) what this CPU could have had.
    others = ("INFO worker.py", "kernels-community")
    told = {
        number: [line for line in lines if line and not any(word in line for word in others)]
        for number, lines in said.items()
    }
    assert told == {
        signal.SIGINT: ["ppo_actor: interrupted"],
        signal.SIGTERM: ["ppo_actor: ended by SIGTERM"],
    }
    assert {number: run.returncode for number, run in runs.items()} == {
        number: 128 + number for number in runs
    }


def test_a_lost_actor_ends_the_command_in_one_line_that_says_what_to_type(
    service: RewardClient,
    policy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain = ppo_actor.start_actors

    def killed(*given: Any) -> list[Any]:
        (actor,) = actors = plain(*given)
        os.kill(ray.get(actor.__ray_call__.remote(lambda learner: os.getpid())), signal.SIGKILL)
        return actors

    monkeypatch.setattr(ppo_actor, "start_actors", killed)
    assert ppo_actor.ended(words(tmp_path, policy, service.name, ["the cat?"] * 9)) == 1
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ppo_actor: ")]
    assert re.search("error: the actor of rank 0 is gone: .* again with a new --output-dir; if memory", said)


def test_what_can_be_mended_ends_in_one_line_before_ray_is_joined(
    policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ppo_actor, "connect", lambda: pytest.fail("Ray was joined"))
    plain = str(save_policy(tmp_path / "plain", chat=False))
    given = words(tmp_path, policy, "reward", questions(9))

    def said(*changed: str) -> str:
        capsys.readouterr()
        assert ppo_actor.ended([*given, *changed]) == 2
        shown = capsys.readouterr()
        assert not shown.out
        assert shown.err.count("\n") == 1
        return shown.err

    assert said("--policy", "nope").startswith("ppo_actor: error: --policy ('nope') is no model")
    write_rows(tmp_path / "asked.jsonl", [{"question": "the cat?"}])
    assert re.match(
        "ppo_actor: error: .*asked.jsonl.*`prompt`", said("--prompts", str(tmp_path / "asked.jsonl"))
    )
    assert re.search(r"of --policy \(.*no `chat_template`.* Type --policy MODEL", said("--policy", plain))
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.toml").touch()
    assert re.match("ppo_actor: error: the output directory .* is not empty", said())


def served_here() -> list[str]:
    """The services that a run of the example began and that are not gone."""
    return [name for name in serve.status().applications if name.startswith(ppo_actor.SERVED_HERE)]


def test_runs_side_by_side_keep_their_services_and_sigterm_after_training_loses_no_policy(
    ray_cluster: None,
    published: PublishedModel,
    policy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompts, reward_model = [f"what is the {word}?" for word in WORDS[:9]], str(published.path)
    plain = ppo_actor.compare
    for name in ("first", "second"):
        (tmp_path / name).mkdir()

    def meanwhile(actors: list[Any], reward: RewardClient, *given: Any) -> Any:
        monkeypatch.setattr(ppo_actor, "compare", plain)
        ppo_actor.main(words(tmp_path / "second", policy, reward_model, prompts, "--steps", "1"))
        assert served_here() == [reward.name]
        assert len(reward.score(prompts, prompts).scores) == 9
        os.kill(os.getpid(), signal.SIGTERM)  # before anything is compared

    def unseen(*_: Any) -> None:
        raise AssertionError("the run did not take SIGTERM")

    monkeypatch.setattr(ppo_actor, "compare", meanwhile)
    before = signal.signal(signal.SIGTERM, unseen)
    try:
        with pytest.raises(SystemExit) as left:
            ppo_actor.main(words(tmp_path / "first", policy, reward_model, prompts, "--steps", "1"))
        assert signal.getsignal(signal.SIGTERM) is unseen
    finally:
        signal.signal(signal.SIGTERM, before)
    assert left.value.code == 128 + signal.SIGTERM
    assert not served_here()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "first" / "out").num_parameters()
    (of_a_step,) = read_lines(tmp_path / "second" / "out" / "metrics.jsonl")
    assert f"rewards/{ppo_actor.SERVED_HERE}/mean" in of_a_step


def test_more_actors_than_there_is_room_for_are_refused_before_anything_starts(
    ray_cluster: None,
    published: PublishedModel,
    policy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rayrm.rl.launch._ROOM_WAIT_S", 1.0)
    monkeypatch.setattr(ppo_actor, "deploy", lambda *_, **__: pytest.fail("a service was started"))
    many = ["--num-actors", "16", "--num-mini-batches", "1", "--prompts-per-step", "16"]
    given = words(tmp_path, policy, str(published.path), ["the cat?"], *many)
    # The 4 CPUs hold the actors alone, and not a replica beside them.
    with pytest.raises(ClusterError, match=r"16 actors of .*0\.25.* and a replica of .* has \{'CPU': 4"):
        ppo_actor.main(given)
    assert not list((tmp_path / "out").iterdir())  # the same command may be typed again
    with pytest.raises(ClusterError, match=r"32 actors of .* do not fit .*free .*Lower --num-actors"):
        ppo_actor.reserve_actors(PPOSettings(num_actors=32, num_mini_batches=1))


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--heldout-prompts", "0"),
        ("--heldout-prompts", "-1"),
        ("--heldout-samples", "0"),
        ("--heldout-samples", "two"),
        ("--steps", "0"),
        ("--num-actors", "0"),
        ("--num-mini-batches", "0.5"),
        ("--prompts-per-step", "7"),
    ],
)
def test_a_count_that_counts_nothing_is_refused_with_its_flag(
    flag: str, value: str, policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        ppo_actor.main(words(tmp_path, policy, "reward", ["the cat?"], flag, value))
    assert re.search(rf"error: .*{flag}\b.*{value}", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_published_model_is_served_for_the_run_and_bad_input_is_named(
    ray_cluster: None, policy: Path, tmp_path: Path
) -> None:
    published = publish(save_tiny(tmp_path / "reward"), tmp_path / "registry", "judge")
    prompts = questions(9)
    given = words(tmp_path, policy, str(published.path.parent), prompts, "--steps", "1", "--num-actors", "2")
    gain = ppo_actor.main(given)
    assert gain.num_prompts == 4
    assert not served_here()
    assert len(read_lines(tmp_path / "out" / "samples.jsonl")) == 8
    with pytest.raises(RunDirectoryError, match="is not empty"):
        ppo_actor.main(given)
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(ScoreError, match=r"plain strings .* given to a model trained on messages"):
        ppo_actor.main(words(other, policy, str(published.path.parent), ["the cat?"], "--steps", "1"))
    assert not served_here()
    (tmp_path / "out2").mkdir()
    with pytest.raises(
        DataError, match=r"heldout.jsonl:2: .* is a message list, and each before it is a string"
    ):
        ppo_actor.main(words(tmp_path / "out2", policy, "reward", ["the cat?", *prompts]))
