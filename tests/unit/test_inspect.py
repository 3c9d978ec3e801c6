"""What `rayrm data inspect` tells: every figure against rows made by hand, or counted one by one."""

from __future__ import annotations

import dataclasses
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayrm import cli
from rayrm.data.inspect import Figures, GivenIds, figures_by_source, gather
from rayrm.data.inspect_text import report, warnings
from rayrm.data.packing import distinct_cost
from rayrm.errors import ConfigError, DataError
from rayrm.inspect_command import columns_of
from rayrm.metrics.evaluation import evaluate_scores
from tests.tiny import tiny_rankings, tiny_rows, tiny_tokenizer

BY_HAND: list[Any] = [
    {"chosen_ids": [1, 2, 3, 4], "rejected_ids": [1, 2, 5]},
    {"chosen_ids": [1, 2, 3, 4], "rejected_ids": [1, 2, 5]},  # once more
    {"chosen_ids": [1, 2, 5], "rejected_ids": [1, 2, 3, 4]},  # the other way
    {"completions_ids": [[1, 2, 6], [1, 2, 7, 7], [1, 2, 8, 8, 8]], "ranks": [2, 1, 1]},
    {"chosen_ids": [9] * 20, "rejected_ids": [9] * 19 + [3]},  # too long
    {"chosen_ids": [4, 4], "rejected_ids": [5, 5], "margin": 0.5},
    {"chosen_ids": [4, 4]},
]


def write(path: Path, rows: list[Any], more: str = "") -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + more)
    return str(path)


def figures_of_rows(path: Path, rows: list[Any], max_length: int | None = None) -> Figures:
    (found,) = figures_by_source(gather([write(path, rows)], GivenIds()), max_length)
    return found


@pytest.fixture
def by_hand(tmp_path: Path) -> str:
    return write(tmp_path / "hand.jsonl", BY_HAND, more="{\n")


def test_every_figure_of_rows_made_by_hand(by_hand: str) -> None:
    (found,) = figures_by_source(gather([by_hand], GivenIds()), 10)
    figures = dataclasses.asdict(found)
    examples = figures.pop("examples")
    assert examples["missing-rejected"].startswith(f"{by_hand}:7: ")
    assert examples["bad-json"].startswith(f"{by_hand}:8: ")
    bins = {low: (high, count) for low, high, count in figures.pop("histogram")}
    assert {low: entry for low, entry in bins.items() if entry[1]} == {2: (3, 6), 4: (5, 5), 20: (21, 2)}
    assert list(bins) == list(range(0, 21, 2))
    assert figures == {
        "name": by_hand,
        "num_rows": 8,
        "num_accepted": 6,
        "refused": {"missing-rejected": 1, "bad-json": 1},
        "forms": {"tokenized": 6},
        "max_length": 10,
        "num_dropped": 1,
        "max_length_for_99_percent": 20,
        "max_length_for_all": 20,
        "lengths": {"min": 2, "median": 4, "mean": 77 / 13, "p90": 20, "p99": 20, "max": 20},
        "num_kept": 5,
        "num_completions": 11,
        "num_comparisons": 6,
        "completions_per_row": {2: 4, 3: 1},
        "num_rankings": 1,
        "num_tied": 1,
        "best_position": {0: 0.0, 1: 0.5, 2: 0.5},
        "num_without_prompt": 0,
        "num_margins": 1,
        "margins": {"min": 0.5, "mean": 0.5, "max": 0.5},
        "num_soft": 0,
        "targets": {},
        "num_all_tied": 0,
        "num_scored": 0,
        "scores": {},
        "attributes": {},
        "num_only_rated": 0,
        "num_unread": 0,
        "unread": "",
        "tokens_unshared": 37,
        "tokens_shared_in_rows": 27,
        "tokens_prompts_once": 15,
        "num_prompts": 2,
        "most_rows_of_a_prompt": 4,
        "prompts_in_common": {},
        "num_duplicates": 1,
        "duplicate": (f"{by_hand}:2", f"{by_hand}:1"),
        "num_conflicts": 1,
        "num_conflicting": 3,
        "conflict": (f"{by_hand}:1", f"{by_hand}:3"),
        "better_is_longer": pytest.approx(0.6),
        "better_is_shorter": pytest.approx(0.2),
        "longer_wins": pytest.approx(0.7),
    }


RATED: list[Any] = [
    {"completions_ids": [[1, 2], [1, 3], [1, 4]], "attributes": [{"good": 1}, None, {"good": 4, "long": -2}]},
    {"completion_ids": [1, 2, 3], "attributes": {"long": 0.5}},
    {"completion_ids": [1, 2, 3], "attributes": {"long": 1.5}},  # another's judgement of it
    {"completion_ids": [1, 2, 3], "attributes": {"long": 0.5}},  # once more
    {"completion_ids": [1, 5], "score": 3, "attributes": {"good": 2}},
    {"chosen_ids": [1, 6], "rejected_ids": [1, 7], "rejected_attributes": {"good": 0, "tone": None}},
    # A pair without them is one to every run, and a text whose ratings nobody can read is none to any.
    {"chosen_ids": [1, 6], "rejected_ids": [1, 8], "chosen_attributes": {"good": 1, "language": "en"}},
    {"chosen_ids": [1, 6], "rejected_ids": [1, 9], "attributes": {"good": 1}},
    {"completion_ids": [1, 2], "attributes": {"language": "en"}},
]


@pytest.mark.parametrize("batch", [512, 2])
def test_ratings_by_attribute_are_counted_and_shown(
    tmp_path: Path, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # However the rows fall into tables, of which each names its own attributes.
    monkeypatch.setattr("rayrm.data.inspect.ROWS_PER_TABLE", batch)
    found = figures_of_rows(tmp_path / "rows.jsonl", RATED)
    assert found.attributes == {
        "good": {"count": 4, "min": 0, "mean": 7 / 4, "max": 4},
        "long": {"count": 4, "min": -2, "mean": pytest.approx(0.5 / 4), "max": 1.5},
    }
    assert (found.num_only_rated, found.num_scored, found.num_rankings) == (4, 1, 0)
    assert (found.num_accepted, found.num_comparisons, found.num_duplicates) == (8, 3, 1)
    assert found.unread.startswith(f"{tmp_path / 'rows.jsonl'}:7: `chosen_attributes.language`")
    assert found.num_unread == 2
    assert list(found.refused.values()) == [1]
    text = " ".join(report([found]).split())
    for words in ("by good: of 4 texts, min 0", "by long: of 4 texts", 'attributes=["good", "long"]'):
        assert words in text
    assert "4 rows with ratings in the place of better and worse" in text
    assert "2 rows with ratings by attribute that cannot be read" in text


def random_rows(seed: int, count: int = 400) -> list[Any]:
    """Rows over few ids, so that texts, rows and conflicts repeat."""
    rng = random.Random(seed)
    rows: list[Any] = []
    while len(rows) < count:
        texts = [[1, *rng.choices(range(2, 5), k=rng.randint(1, 4))] for _ in range(rng.choice((2, 2, 3)))]
        ranks = [rng.randint(0, 2) for _ in texts]
        if len({tuple(text) for text in texts}) == len(texts) and len(set(ranks)) > 1:
            rows.append({"completions_ids": texts, "ranks": ranks})
    return rows


@pytest.mark.parametrize("seed", range(4))
def test_repeats_and_conflicts_are_those_counted_one_by_one(tmp_path: Path, seed: int) -> None:
    rows = random_rows(seed)
    found = figures_of_rows(tmp_path / "rows.jsonl", rows)
    seen: Counter[Any] = Counter()
    preferred: dict[Any, set[int]] = {}
    for number, row in enumerate(rows):
        order = sorted(set(row["ranks"]))
        ranked = [
            (tuple(ids), order.index(rank))
            for ids, rank in zip(row["completions_ids"], row["ranks"], strict=True)
        ]
        seen[frozenset(ranked)] += 1
        for better, high in ranked:
            for worse, low in ranked:
                if high < low:
                    preferred.setdefault((better, worse), set()).add(number)
    both = [pair for pair in preferred if pair[::-1] in preferred]
    assert found.num_duplicates == len(rows) - len(seen) > 0
    assert found.num_conflicts == len(both) // 2 > 0
    assert found.num_conflicting == len(set().union(*(preferred[pair] for pair in both)))
    one, other = (int(place.rpartition(":")[2]) - 1 for place in found.conflict or ())
    assert any(one in preferred[pair] and other in preferred[pair[::-1]] for pair in both)


def test_length_is_judged_as_evaluation_judges_it(tmp_path: Path) -> None:
    gathered = gather([write(tmp_path / "rows.jsonl", random_rows(7))], GivenIds())
    (found,) = figures_by_source(gathered, None)
    scores = np.zeros(found.num_completions)
    metrics = evaluate_scores(scores, gathered.index)
    assert found.longer_wins == pytest.approx(metrics["length_baseline_accuracy"])
    assert found.num_comparisons == metrics["num_pairs"]


def test_tokens_with_prompts_met_are_those_of_their_forest(tmp_path: Path) -> None:
    """Where answers begin apart, a prompt's rows share the prompt, and equal answers, and nothing else."""
    rng = random.Random(0)
    rows, sequences = [], []
    for number in range(60):
        prompt = [1000 + number] * rng.randint(1, 60)
        answers = [[answer] * rng.randint(1, 9) for answer in range(5)]
        for _ in range(rng.randint(1, 4)):
            chosen, rejected = rng.sample(answers, 2)
            rows.append({"chosen_ids": prompt + chosen, "rejected_ids": prompt + rejected})
            sequences += [np.array(prompt + side, np.int32) for side in (chosen, rejected)]
    found = figures_of_rows(tmp_path / "rows.jsonl", rows)
    assert found.tokens_prompts_once == distinct_cost(sequences)[0]
    assert found.tokens_unshared == sum(map(len, sequences))
    assert found.num_prompts == 60


def test_sources_are_told_apart_and_together(tmp_path: Path) -> None:
    """Text of both forms, a directory of two files, a repeat and a conflict that only both sources show."""
    rows = tiny_rows(30)
    (tmp_path / "many").mkdir()
    write(tmp_path / "many" / "1.jsonl", rows[:10])
    write(tmp_path / "many" / "2.jsonl", [*rows[10:20], *tiny_rankings(5)])
    turned = {**rows[11], "chosen": rows[11]["rejected"], "rejected": rows[11]["chosen"]}
    other = write(tmp_path / "other.jsonl", [*tiny_rows(6, seed=5, conversational=True), rows[3], turned])
    many = str(tmp_path / "many")
    gathered = gather([many, other], tiny_tokenizer())
    first, second, whole = figures_by_source(gathered, 1024)
    assert [one.name for one in (first, second, whole)] == [many, other, "all sources"]
    assert (first.num_rows, second.num_rows, whole.num_rows) == (25, 8, 33)
    assert (first.num_rankings, whole.num_rankings) == (5, 5)
    assert whole.tokens_unshared == first.tokens_unshared + second.tokens_unshared
    assert first.forms == {"standard": 25}
    assert whole.forms == {"standard": 27, "conversational": 6}
    assert (first.num_duplicates, second.num_duplicates, whole.num_duplicates) == (0, 0, 1)
    assert whole.duplicate == (f"{other}:7", f"{many}/1.jsonl:4")
    assert (first.num_conflicts, second.num_conflicts, whole.num_conflicts) == (0, 0, 1)
    assert whole.conflict == (f"{many}/2.jsonl:2", f"{other}:8")
    assert first.prompts_in_common == {other: 2}
    assert second.prompts_in_common == {many: 2}
    assert any("text forms" in warning for warning in warnings(whole))
    assert any("exclude_prompts_of" in warning for warning in warnings(second))


def test_rows_are_limited_in_each_source_and_columns_are_renamed(tmp_path: Path) -> None:
    rows = [
        {"question": row["prompt"], "good": row["chosen"], "rejected": row["rejected"]}
        for row in tiny_rows(9)
    ]
    paths = [write(tmp_path / f"{name}.jsonl", rows) for name in "ab"]
    columns = columns_of("prompt=question,chosen=good")
    gathered = gather(paths, tiny_tokenizer(), columns=columns, max_rows=4)
    assert [one.num_accepted for one in figures_by_source(gathered, None)] == [4, 4, 8]
    plain = gather([write(tmp_path / "plain.jsonl", tiny_rows(4))], tiny_tokenizer())
    assert gathered.of_source(paths[0]).index.text_keys.tolist() == plain.index.text_keys.tolist()


def test_each_warning_says_what_to_do_and_clean_data_has_none(by_hand: str, tmp_path: Path) -> None:
    (found,) = figures_by_source(gather([by_hand], GivenIds()), 10)
    said = warnings(found)
    for words in (
        ("25.0%", "max_bad_row_fraction"),
        ("16.7%", "max_length=20"),
        ("1 pair of texts preferred both ways, in 3 rows", f"{by_hand}:1 and {by_hand}:3"),
        ("1 repeated row (20.0%)", f"{by_hand}:2 and {by_hand}:1"),
    ):
        assert any(all(word in warning for word in words) for warning in said), (words, said)
    assert len(said) == 4
    clean = [{"chosen_ids": [n, 1, 1], "rejected_ids": [n, 2, *[2] * (n % 3)]} for n in range(3, 90)]
    assert warnings(figures_of_rows(tmp_path / "clean.jsonl", clean, 10)) == []
    biased = [{"chosen_ids": [n, 1, 1], "rejected_ids": [n, 2, *[2] * (n % 2)]} for n in range(3, 90)]
    assert warnings(figures_of_rows(tmp_path / "even.jsonl", biased, 10)) == []
    biased += [{"chosen_ids": [n, 1, 1], "rejected_ids": [n, 2]} for n in range(100, 200)]
    (warning,) = warnings(figures_of_rows(tmp_path / "biased.jsonl", biased, 10))
    assert "longer" in warning
    assert "88.2%" in warning  # 143 of 187 longer, the others as long
    worse = [{"chosen_ids": row["rejected_ids"], "rejected_ids": row["chosen_ids"]} for row in biased]
    (warning,) = warnings(figures_of_rows(tmp_path / "worse.jsonl", worse, 10))
    assert "shorter" in warning
    assert "88.2%" in warning


def test_rows_without_a_prompt_among_others_are_told_of(tmp_path: Path) -> None:
    asked = [{"prompt": f"{n}?", "chosen": f"a{n}", "rejected": f"b{n}"} for n in range(9)]
    mute = [{**asked[0], "prompt": None, "chosen": "c"}, {"prompt": "", "chosen": "d", "rejected": "e"}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in asked + mute))
    (found,) = figures_by_source(gather([str(file)], tiny_tokenizer()), 10)
    assert found.num_without_prompt == 2
    assert any("2 rows of 11 have no prompt" in warning for warning in warnings(found))


def test_the_text_fits_a_hundred_columns_and_names_every_source(tmp_path: Path) -> None:
    directory = tmp_path / ("long" * 8)
    directory.mkdir()
    mixed = [*tiny_rows(40, margin=True), *tiny_rankings(20), {"chosen": "x" * 300}]
    paths = [write(directory / f"{name}.jsonl", mixed) for name in "ab"]
    text = report(figures_by_source(gather(paths, tiny_tokenizer()), 20))
    lines = text.splitlines()
    assert all(path in lines for path in paths)
    long = [line for line in lines if len(line) > 100]
    assert all(any(path in line for path in paths) for line in long)  # a path is not broken in two
    table = [line for line in lines if line.startswith(("a.jsonl", "b.jsonl", "all sources   "))]
    assert [line.split()[-7] for line in table] == ["61", "61", "122"]
    for words in ('"longer wins"', "missing-rejected", "above 20", "rankings", "margins"):
        assert text.count(words) == 3, words


def test_data_of_which_nothing_is_left_is_still_told_of(tmp_path: Path) -> None:
    refused = figures_of_rows(tmp_path / "bad.jsonl", [{"chosen": "x"}] * 3)
    assert "refused" in report([refused])
    dropped = figures_of_rows(tmp_path / "long.jsonl", BY_HAND[:3], 2)
    assert (dropped.num_dropped, dropped.num_kept) == (3, 0)
    assert "3 rows (100.0%)" in report([dropped])
    with pytest.raises(DataError, match="no rows"):
        figures_of_rows(tmp_path / "empty.jsonl", [])


def test_text_without_a_model_is_an_error_that_says_what_to_type(tmp_path: Path) -> None:
    for conversational in (False, True):
        path = write(tmp_path / "rows.jsonl", tiny_rows(3, conversational=conversational))
        with pytest.raises(ConfigError, match=r"rows\.jsonl:1 is text.*--model "):
            gather([path], GivenIds())


def test_the_command_prints_the_text_and_writes_all_figures(tmp_path: Path) -> None:
    """Also: rows tokenized beforehand need neither torch nor ray."""
    path = write(tmp_path / "rows.jsonl", BY_HAND[:6])
    code = (
        "import sys; from rayrm.cli import main; status = main(sys.argv[1:]);"
        "print(*sorted({'torch', 'ray'} & set(sys.modules)), file=sys.stderr); sys.exit(status)"
    )
    words = ["data", "inspect", path, "--max-length", "10", "--json", str(tmp_path / "figures.json")]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.split()) == (0, [])
    (found,) = figures_by_source(gather([path], GivenIds()), 10)
    assert done.stdout == report([found])
    told = {**dataclasses.asdict(found), "warnings": warnings(found)}
    assert json.loads((tmp_path / "figures.json").read_text()) == [json.loads(json.dumps(told))]


def test_the_command_takes_a_models_tokenizer_and_a_chat_template(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "rows.jsonl", tiny_rows(5, conversational=True))
    tiny_tokenizer(chat=False).save_pretrained(tmp_path / "model")
    words = ["data", "inspect", path, "--model", str(tmp_path / "model")]
    assert cli.main(words) == 2
    assert "chat_template_path" in capsys.readouterr().err
    (tmp_path / "chat.jinja").write_text(str(tiny_tokenizer().chat_template))
    assert cli.main([*words, "--chat-template-path", str(tmp_path / "chat.jinja")]) == 0
    (found,) = figures_by_source(gather([path], tiny_tokenizer()), 1024)
    assert capsys.readouterr().out == report([found])


@pytest.mark.parametrize(
    ("words", "named", "fix"),
    [
        (["rows.jsonl"], "is text", "--model"),
        (["absent.jsonl"], "absent.jsonl does not exist", "correct the path"),
        (["rows.jsonl", "--columns", "question"], "--columns", "prompt=question"),
        (["rows.jsonl", "--max-length", "0"], "(0)", "--max-length 1024"),
        (["rows.jsonl", "--model", "no/such-model-here"], "no/such-model-here", "directory that holds one"),
    ],
)
def test_each_mistake_is_one_message_and_status_two(
    words: list[str],
    named: str,
    fix: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.jsonl", tiny_rows(3))
    assert cli.main(["data", "inspect", *words]) == 2
    said = capsys.readouterr().err
    assert named in said
    assert fix in said
