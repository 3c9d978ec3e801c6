"""Refresh apart from Ray: samples are taken once, judged once, and a new model is measured by the rule."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayrm.data.labels import LabelRules
from rayrm.data.selection import Selection, excluded_prompts
from rayrm.data.tokenize import TokenizedRow
from rayrm.data.tokenized_set import TokenizedSet
from rayrm.errors import ConfigError, DataError, ScoreError
from rayrm.evaluation.evaluate import objective_of
from rayrm.metrics.evaluation import evaluate_scores
from rayrm.model.reward_model import LoadedModel
from rayrm.rl.judge import Judge
from rayrm.rl.refresh_gate import ALIKE, Measured, Share, check_compares, order_agreement, refusal
from rayrm.rl.refresh_pairs import Gathered, gather, last_cursor
from rayrm.rl.refresh_replay import draw_replay, num_replayed
from rayrm.rl.refresh_samples import SampleReader
from rayrm.rl.refresh_settings import Refresh, read_refresh
from tests.tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]


def sample(prompt: str, completion: str, step: int = 1) -> str:
    return json.dumps({"step": step, "prompt": prompt, "completion": completion, "score": 0.5}) + "\n"


def append(file: Path, *lines: str) -> None:
    with file.open("a", encoding="utf-8") as out:
        out.write("".join(lines))


def reader_of(file: Path, **settings: Any) -> SampleReader:
    return SampleReader([str(file)], settings.pop("cursor", {}), text_form="standard", **settings)


def taken_of(reader: SampleReader) -> dict[Any, list[Any]]:
    return {group.prompt: group.completions for group in reader.take().groups}


# --- samples


def test_each_sample_is_taken_once_whatever_readers_come_and_go(tmp_path: Path) -> None:
    file = tmp_path / "samples.jsonl"
    append(
        file, sample("a", "1"), sample("a", "2"), sample("a", "1"), sample("b", "3", 2), '{"step": 2, "pro'
    )
    reader = reader_of(file)
    reader.look()
    first = reader.take()
    assert [(group.prompt, group.completions) for group in first.groups] == [("a", ["1", "2"])]
    assert first.counts == {"samples": 3, "repeated": 1}
    # The rest of the line comes, and then nothing more: the newest step is whole.
    append(file, 'mpt": "b", "completion": "4"}\n')
    later = reader_of(file, cursor=first.cursor)
    later.look()
    assert later.num_ready == 0
    later.look()
    second = later.take()
    assert [(group.prompt, group.completions) for group in second.groups] == [("b", ["3", "4"])]
    assert second.cursor[str(file)].offset == file.stat().st_size
    assert first.counts["samples"] + second.counts["samples"] == 5
    last = reader_of(file, cursor=second.cursor)
    last.look()
    last.look()
    assert last.take().counts == {}


def test_a_prompt_is_judged_with_all_that_its_step_has_in_several_files(tmp_path: Path) -> None:
    append(tmp_path / "samples-0.jsonl", sample("a", "1"), sample("b", "1"))
    append(tmp_path / "samples-1.jsonl", sample("a", "2"), sample("c", "1"))
    reader = reader_of(tmp_path / "samples-*.jsonl")
    for _ in range(2):
        reader.look()
    taken = reader.take()
    assert [(group.prompt, group.completions) for group in taken.groups] == [("a", ["1", "2"])]
    assert taken.counts == {"samples": 4, "alone": 2}
    assert len(taken.cursor) == 2


def test_steps_that_a_resumed_run_does_again_are_not_taken_again(tmp_path: Path) -> None:
    file = tmp_path / "samples-0.jsonl"
    append(file, *(sample(f"p{step}", text, step) for step in (1, 2, 3) for text in "xy"))
    reader = reader_of(file)
    for _ in range(2):
        reader.look()
    first = reader.take()
    assert [group.prompt for group in first.groups] == ["p1", "p2", "p3"]
    # From the checkpoint of step 1: steps 2 (sampled otherwise) and 3 (the same) again, then 4; and a late
    # part of step 4, as gradient accumulation appends.
    append(file, *(sample("p2", text, 2) for text in "uv"), *(sample("p3", text, 3) for text in "xy"))
    append(file, *(sample("p4", text, 4) for text in "xy"))
    kept = json.loads(json.dumps({path: asdict(place) for path, place in first.cursor.items()}))
    later = reader_of(file, cursor=kept)
    for _ in range(2):
        later.look()
    append(file, *(sample("p4", text, 4) for text in "yz"))
    for _ in range(2):
        later.look()
    second = later.take()
    assert [(group.prompt, group.completions) for group in second.groups] == [("p4", ["x", "y", "z"])]
    assert second.counts == {"redone": 5, "samples": 3}


def test_a_rank_that_lags_is_waited_for_and_one_that_is_gone_is_not(tmp_path: Path) -> None:
    first, second = tmp_path / "samples-0.jsonl", tmp_path / "samples-1.jsonl"
    append(first, sample("a", "1"), sample("b", "1", 2), sample("b", "2", 2))
    append(second, sample("a", "2"))
    reader = reader_of(tmp_path / "samples-*.jsonl")
    for _ in range(3):
        reader.look()
    assert reader.num_ready == 1  # of step 1; rank 1 has not reached step 2
    append(second, sample("b", "3", 2))
    for _ in range(2):
        reader.look()
    assert taken_of(reader) == {"a": ["1", "2"], "b": ["1", "2", "3"]}
    append(first, sample("c", "1", 3), sample("c", "2", 3))  # and rank 1 never comes again
    for _ in range(5):
        reader.look()
    assert reader.num_ready == 0
    for _ in range(10):
        reader.look()
    assert taken_of(reader) == {"c": ["1", "2"]}


def test_another_file_under_the_same_name_is_read_from_its_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "samples.jsonl"
    append(file, sample("a", "1"), sample("a", "2"))
    reader = reader_of(file)
    for _ in range(2):
        reader.look()
    cursor = reader.take().cursor
    file.write_text("".join(sample("b", text) for text in ("1", "2", "3", "4")))
    later = reader_of(file, cursor=cursor)
    for _ in range(2):
        later.look()
    assert taken_of(later) == {"b": ["1", "2", "3", "4"]}
    assert "begins otherwise than before" in caplog.text


def test_samples_of_which_no_prompt_has_two_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "samples.jsonl"
    append(file, *(sample(f"p{n}", "x") for n in range(300)))
    reader = reader_of(file)
    for _ in range(3):
        reader.look()
    assert caplog.text.count("300 of 300 prompts have one completion each") == 1


def test_what_cannot_be_trained_on_is_left_out_and_counted(tmp_path: Path) -> None:
    file = tmp_path / "samples.jsonl"
    append(file, sample("a", " "), sample("a", "1"), sample("A?", "1"), sample("b", "1"), sample("b", "2"))
    held_out = Selection(excluded=excluded_prompts([{"prompt": "a!"}]))
    reader = reader_of(file, held_out=held_out)
    for _ in range(2):
        reader.look()
    taken = reader.take()
    assert [group.prompt for group in taken.groups] == ["b"]
    assert taken.counts == {"samples": 5, "empty-completion": 1, "excluded-prompt": 2}


def test_message_lists_are_samples_of_a_conversational_model_only(tmp_path: Path) -> None:
    file = tmp_path / "samples.jsonl"
    talk = {"step": 1, "prompt": [{"role": "user", "content": "a"}]}
    for text in ("1", "2"):
        append(file, json.dumps({**talk, "completion": [{"role": "assistant", "content": text}]}) + "\n")
    reader = SampleReader([str(file)], {}, text_form="conversational")
    for _ in range(2):
        reader.look()
    (group,) = reader.take().groups
    assert [completion[0]["content"] for completion in group.completions] == ["1", "2"]  # type: ignore[index]
    strict = reader_of(file)
    strict.look()
    with pytest.raises(DataError, match=r"sample is conversational .* trained on standard text. Write plain"):
        strict.look()


def test_one_torn_line_is_left_out_and_a_file_of_something_else_is_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "samples.jsonl"
    append(file, sample("a", "1"), '{"prompt": "a', sample("a", "2"), "\n", sample("a", "3"))
    reader = reader_of(file)
    for _ in range(2):
        reader.look()
    taken = reader.take()
    assert [group.completions for group in taken.groups] == [["1", "3"]]
    assert taken.counts["not-json"] == 1
    assert f"{file}, byte {len(sample('a', '1'))}" in caplog.text
    for content, says in [
        ("step prompt\n1 a\n", "two lines that follow one another are not JSON"),
        ('{"chosen": "x"}\n', "must be an object with `prompt` and `completion`"),
    ]:
        file.write_text(content)
        with pytest.raises(DataError, match=says):
            reader_of(file).look()
    with pytest.raises(DataError, match=r"samples.jsonl has 16 bytes, and 900 of it were read before"):
        reader_of(file, cursor={str(file): 900}).look()


# --- a round's pairs


class CountingJudge:
    """By length; `fails_at` is a prompt that it fails on. Prompts with "tie" have no preference."""

    def __init__(self, fails_at: str | None = None) -> None:
        self.calls: list[str] = []
        self.fails_at = fails_at

    def __call__(self, prompt: str, completions: list[str]) -> list[float]:
        if prompt == self.fails_at:
            raise RuntimeError("down")
        self.calls.append(prompt)
        return [0.0 if "tie" in prompt else float(len(text)) for text in completions]


def gathered(directory: Path, file: Path, judge: CountingJudge, min_pairs: int) -> Gathered:
    def wait(standing: str) -> None:
        assert file.stat().st_size, standing

    with Judge(judge, "rule") as asked_judge:
        reader = reader_of(file, cursor=last_cursor(directory))
        return gather(directory, reader, asked_judge, min_pairs=min_pairs, wait=wait)


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_round_that_was_cut_off_in_judging_judges_nothing_twice_and_loses_nothing(tmp_path: Path) -> None:
    file = tmp_path / "samples.jsonl"
    for prompt in "abcd":
        append(file, sample(prompt, "x"), sample(prompt, "xx"))
    first = CountingJudge(fails_at="c")
    with pytest.raises(ScoreError, match=r"failed on the prompt 'c'.*what it has judged is kept"):
        gathered(tmp_path / "round-1", file, first, 3)
    # Half a verdict, as a kill leaves it; and RL goes on meanwhile.
    append(tmp_path / "round-1" / "judged-0.jsonl", '{"place": 2, "sco')
    append(file, sample("e", "x", 2), sample("e", "xx", 2))
    second = CountingJudge()
    found = gathered(tmp_path / "round-1", file, second, 3)
    assert first.calls + second.calls == ["a", "b", "c", "d"]
    assert found.num_rows == 4
    assert rows_of(found.file) == [
        {"prompt": prompt, "completions": ["x", "xx"], "ranks": [2, 1]} for prompt in "abcd"
    ]
    # The round is full, however often it is asked for; the next one begins behind it.
    assert gathered(tmp_path / "round-1", file, CountingJudge("a"), 9) == found
    reader = reader_of(file, cursor=last_cursor(tmp_path / "round-1"))
    for _ in range(2):
        reader.look()
    assert taken_of(reader) == {"e": ["x", "xx"]}


def test_ties_are_counted_and_made_up_for_by_more_samples(tmp_path: Path) -> None:
    file = tmp_path / "samples.jsonl"
    for prompt in ("tie 1", "a"):
        append(file, sample(prompt, "x"), sample(prompt, "xx"))
    more = [sample("tie 2", "x", 2), sample("tie 2", "y", 2), sample("b", "x", 3), sample("b", "xx", 3)]

    def wait(standing: str) -> None:
        if more and standing == "0 of 1 prompts with different completions in 1 files":
            append(file, more.pop(0))

    with Judge(CountingJudge(), "rule") as judge:
        found = gather(tmp_path / "round-1", reader_of(file), judge, min_pairs=2, wait=wait)
    assert [row["prompt"] for row in rows_of(found.file)] == ["a", "b"]
    assert found.counts == {"samples": 8, "judged": 4, "tied": 2}


# --- replay


def test_replayed_rows_are_the_share_that_was_asked_for() -> None:
    assert num_replayed(60, 0.25) == 20
    assert num_replayed(60, 0.5) == 60
    assert num_replayed(60, 0.0) == 0


def test_a_replay_is_a_seeded_draw_of_all_rows_without_held_out_prompts() -> None:
    rows = [{"prompt": f"p{n}", "chosen": "x", "rejected": "y", "note": n} for n in range(40)]
    rows += [{"prompt": "p", "chosen": "x"}]  # no preference
    held_out = Selection(excluded=excluded_prompts([{"prompt": "P0"}]))
    draws = [draw_replay(rows, 10, held_out=held_out, seed=seed) for seed in range(200)]
    assert draws[3] == draw_replay(rows, 10, held_out=held_out, seed=3) != draws[4]
    assert all(len({row["prompt"] for row in draw}) == 10 for draw in draws)
    assert set(draws[0][0]) == {"prompt", "chosen", "rejected"}
    counts = {f"p{n}": sum(row["prompt"] == f"p{n}" for draw in draws for row in draw) for n in range(40)}
    assert counts.pop("p0") == 0
    # Binomial(200, 10/39): mean 51.3, standard deviation 6.2; five of them for 39 counts.
    assert all(20 < count < 83 for count in counts.values())
    assert len(draw_replay(rows[:3], 10, held_out=Selection(), seed=0)) == 3


# --- the gate


def test_agreement_is_the_share_of_pairs_in_the_same_order() -> None:
    assert order_agreement([1, 2, 3], [10, 20, 30]) == 1.0
    assert order_agreement([1, 2, 3], [3, 2, 1]) == 0.0
    assert order_agreement([1, 2, 3], [2, 1, 3]) == pytest.approx(2 / 3)
    assert order_agreement([1, 2, 2], [1, 1, 5]) == pytest.approx((0.5 + 1) / 2)
    assert order_agreement([4, 4], [1, 2]) == 1.0


def measured(before: float, after: float, agreement: float = 1.0) -> Measured:
    return Measured(Share(before, 0.0, 1.0, 90), Share(after, 0.25, 0.75, 90), agreement)


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (measured(0.7, 0.6), None),
        (measured(0.5, 0.9), None),
        (
            measured(0.7, 0.59),
            "accuracy 0.590 [0.250, 0.750] is 0.110 below that of v1, 0.700 [0.000, 1.000], on 90 rows, and "
            "`allowed_drop` is 0.1",
        ),
        (measured(0.7, 0.7, 0.5), None),
        (measured(0.7, 0.7, 0.49), "orders 0.49 of the pairs of probe texts as v1 does"),
        (Measured(Share(0.7, 0.6, 0.8, 9), broken="input 3 got the score nan"), "input 3 got the score nan"),
    ],
)
def test_a_model_is_refused_beyond_each_bound_and_not_at_it(found: Measured, says: str | None) -> None:
    reason = refusal(found, "v1", allowed_drop=0.1, min_probe_agreement=0.5)
    assert reason is None if says is None else says in str(reason)


def test_rounds_that_each_lose_what_one_may_do_not_add_up() -> None:
    found = Measured(Share(0.8, 0.7, 0.9, 10), Share(0.75, 0.7, 0.8, 10), 1.0)
    assert refusal(found, "v2", allowed_drop=0.1, min_probe_agreement=0.5) is None
    best = Share(0.9, 0.8, 1.0, 10)
    said = refusal(found, "v2", allowed_drop=0.1, min_probe_agreement=0.5, best=best)
    assert "0.150 below 0.900 [0.800, 1.000], the best of a version that served" in str(said)


# --- the file


LEAST = ["samples=s.jsonl", "judge=j.py:judge", "output_dir=out", "data.eval=h.jsonl"]


def test_held_out_rows_that_compare_nothing_are_refused_by_name(tmp_path: Path) -> None:
    scored = {"prompt": "a", "completion": "b", "score": 1.0}
    tied = {"prompt": "a", "chosen": "b", "rejected": "c", "tie": True}
    even = {"prompt": "a", "chosen": "b", "rejected": "c", "target": 0.5}
    file, pairs = tmp_path / "scored.jsonl", tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (scored, tied, even, {"prompt": "a"})))
    with pytest.raises(DataError, match=r"`data.eval` \(.*scored\.jsonl\): no row says .* Add pairs"):
        check_compares([str(file)])
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    pairs.write_text("".join(json.dumps(row) + "\n" for row in (scored, pair)))
    check_compares([str(file), str(pairs)])
    with pytest.raises(DataError, match=r"pairs\.jsonl"):
        check_compares([str(pairs)], max_pairs=1)


@pytest.mark.parametrize(
    "trained",
    [
        {},
        {"tie_model": "rao-kupper", "tie_parameter": 3.0, "label_smoothing": 0.1},
        {"ranking_loss": "plackett-luce", "pointwise_loss": "bce", "center_rewards_coefficient": 0.01},
    ],
    ids=str,
)
def test_models_of_any_objective_are_measured_on_the_same_comparisons(trained: dict[str, Any]) -> None:
    loaded = LoadedModel(tiny_model(), tiny_tokenizer(), "standard", 0, None, trained)
    measured = objective_of(loaded, ALIKE)
    assert LabelRules.of(measured) == LabelRules(ties=True, pointwise="mse")
    sequences = [np.array([1, token], np.int32) for token in (5, 6, 7)]
    rows = [TokenizedRow.of(sequences, ranks) for ranks in ((0, 1, 0), (0, 1, 2))]
    found = evaluate_scores([3.0, 1.0, 2.0, 2.0, 3.0, 1.0], TokenizedSet.from_rows(rows).index, measured)
    # Of the first row a third is a tie; of the others all are right, and two of three.
    assert found["accuracy"] == pytest.approx((2 / 3 + 2 / 3) / (2 / 3 + 1))


def test_the_example_reads_and_words_change_it() -> None:
    settings = read_refresh(ROOT / "jobs" / "refresh.toml", ["min_pairs=7", "reward.learning_rate=1e-6"])
    assert isinstance(settings, Refresh)
    assert (settings.refresh.min_pairs, settings.reward.learning_rate) == (7, 1e-6)
    assert settings.refresh.name is None
    assert read_refresh(None, [*LEAST, "lora.r=4"]).refresh.lora is not None
    assert read_refresh(None, [*LEAST, "refresh.calibrate.chat=c.jsonl"]).refresh.calibrate == {
        "chat": "c.jsonl"
    }


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("refresh.min_pair=3", "`min_pair` is no setting of RefreshConfig. Did you mean `min_pairs`?"),
        ("learning_rate=1e-5", "is no [refresh] key. Type `reward.learning_rate=1e-5`"),
        ("data.train=p.jsonl", "`train` is no setting of RefreshData"),
        ("reward.output_dir=runs/x", "each round has its own directory"),
        ("reward.max_bad_row_fraction=0.2", "a round leaves out every row that is refused"),
        ('reward.attributes=["good"]', "what a judge prefers has no ratings"),
        ("judge=judge.py", "must name a file or module and a function in it"),
        ("allowed_drop=2", "`allowed_drop` (2)"),
        ("data.replay_share=1", "`replay_share` (1)"),
        ("data.eval=[]", "`eval` ([]): names no source"),
        ("samples=", "`samples` (''): names no file"),
        ("model.name=x", "[refresh] `model`"),
    ],
)
def test_a_mistake_in_the_file_says_what_to_type(word: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_refresh(None, [*LEAST, word])
    assert says in str(caught.value)
