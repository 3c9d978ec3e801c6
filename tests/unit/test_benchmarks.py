"""Each benchmark's numbers, beside a second computation from its definition; how its shape is recognised."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayrm.data.preference import parse_row
from rayrm.data.tokenize import TextForm, TextInput
from rayrm.errors import DataError, ScoreError
from rayrm.evaluation import best_of_n, rewardbench, rewardbench2, rm_bench
from rayrm.evaluation.benchmark_result import BenchmarkResult, printed
from rayrm.evaluation.benchmarks import (
    BENCHMARKS,
    ROWS_PER_CALL,
    parse_entries,
    recognise,
    run_benchmark,
)
from rayrm.evaluation.entries import as_rows
from rayrm.serve.score_file import read_rows
from rayrm.serve.scorer import RewardModel
from tests.tiny import save_tiny, write_rows

REWARDBENCH = {
    "prompt": "q",
    "chosen": "5",
    "rejected": "1",
    "subset": "hep-go",
    "id": 7,
    "chosen_model": "a",
    "rejected_model": "b",
}
REWARDBENCH2 = {
    "id": "1",
    "prompt": "q",
    "chosen": ["5"],
    "rejected": ["1", "2", "3"],
    "num_correct": 1,
    "num_incorrect": 3,
    "total_completions": 4,
    "subset": "Math",
}
RM_BENCH = {
    "id": 1,
    "prompt": "q",
    "chosen": ["5", "6", "7"],
    "rejected": ["1", "2", "3"],
    "domain": "chat",
}
JUDGEBENCH = {
    "pair_id": "p",
    "source": "livebench-math",
    "question": "q",
    "response_A": "1",
    "response_B": "5",
    "label": "B>A",
}
LLMBAR = {"input": "q", "output_1": "5", "output_2": "1", "label": 1}
PPE_HUMAN = {
    "question_id": "x",
    "prompt": "q",
    "response_1": "1",
    "response_2": "5",
    "winner": "model_b",
    "language": "English",
    "is_code": True,
    "hard_prompt": False,
}
PPE_CORRECTNESS = {
    "question_id": "x",
    "prompt": "q",
    "response_1": "1",
    "response_2": "5",
    "response_3": "3",
    "scores": [False, True, False],
    "sampled_conflict_pairs": [[0, 1], [1, 2]],
    "category": "law",
}
BEST_OF_N = {"prompt": "q", "completions": ["1", "5"], "gold": [0.0, 1.0]}
SHAPES: dict[str, dict[str, Any]] = {
    "rewardbench": REWARDBENCH,
    "rewardbench2": REWARDBENCH2,
    "rm_bench": RM_BENCH,
    "judgebench": JUDGEBENCH,
    "llmbar": LLMBAR,
    "ppe_human": PPE_HUMAN,
    "ppe_correctness": PPE_CORRECTNESS,
    "best_of_n": BEST_OF_N,
}


def said(inputs: list[TextInput]) -> list[float]:
    """A stand-in for a model: the number that the completion is."""
    texts = [
        entry.completion if isinstance(entry.completion, str) else entry.completion[-1]["content"]
        for entry in inputs
    ]
    return [float(text) for text in texts]


def run(name: str, *contents: Any) -> BenchmarkResult:
    rows = [(f"rows.jsonl:{number}", content) for number, content in enumerate(contents, start=1)]
    return run_benchmark(name, rows, said, text_form="standard")


def pair_rows(outcomes: dict[str, list[int]]) -> list[dict[str, Any]]:
    """RewardBench's rows, by subset: which of its pairs are right."""
    return [
        {"prompt": "q", "chosen": str(right), "rejected": "0.5", "subset": subset, "id": str(number)}
        for subset, rights in outcomes.items()
        for number, right in enumerate(rights)
    ]


# Shapes


@pytest.mark.parametrize("name", SHAPES)
def test_each_shape_is_recognised_as_itself_and_scored(name: str) -> None:
    assert set(SHAPES) == set(BENCHMARKS)
    assert recognise(SHAPES[name]) == name
    result = run(name, SHAPES[name])
    assert result.name == name
    record = result.as_record()
    assert all(isinstance(value, float) and math.isfinite(value) for value in record["metrics"].values())
    for table in result.tables.values():
        titles, rows = printed(table)
        assert all(len(row) == len(titles) and all(isinstance(cell, str) for cell in row) for row in rows)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": "a", "rejected": "b", "subset": "mine", "id": 1},
        {"prompt": "q", "chosen": "a", "rejected": "b", "domain": "chat"},
        {
            "chosen": [{"role": "user", "content": "q"}] * 3,
            "rejected": [{"role": "user", "content": "q"}] * 3,
        },
        {"prompt": "q", "completions": ["a", "b"], "ranks": [1, 2]},
        {"prompt": "q", "completions": ["a", "b"], "scores": [1, 2]},
    ],
)
def test_a_preference_row_is_no_benchmarks(row: dict[str, Any]) -> None:
    assert recognise(row) is None


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("rewardbench", "subset"),
        ("rewardbench", "rejected"),
        ("rewardbench2", "num_correct"),
        ("rm_bench", "rejected"),
        ("judgebench", "source"),
        ("llmbar", "output_2"),
        ("ppe_human", "winner"),
        ("ppe_correctness", "scores"),
        ("best_of_n", "gold"),
    ],
)
def test_a_missing_column_is_named_with_its_row_and_benchmark(name: str, column: str) -> None:
    broken = {key: value for key, value in SHAPES[name].items() if key != column}
    with pytest.raises(DataError, match=f"rows.jsonl:2: `{column}` .* {name}"):
        run(name, SHAPES[name], broken)


@pytest.mark.parametrize(
    ("name", "changed", "column"),
    [
        ("rewardbench", {"chosen": 3}, "chosen"),
        ("rewardbench2", {"chosen": "5"}, "chosen"),
        ("rewardbench2", {"num_correct": 2}, "num_correct"),
        ("rewardbench2", {"num_correct": 2, "chosen": ["5", "6"]}, "num_correct"),
        ("rewardbench2", {"subset": "Ties", "id": "14"}, "id"),
        ("rewardbench2", {"subset": "Ties", "id": "tied:1"}, "num_correct"),
        ("rm_bench", {"chosen": ["5", "6"]}, "chosen"),
        ("rm_bench", {"domain": "poetry"}, "domain"),
        ("judgebench", {"label": "A=B"}, "label"),
        ("llmbar", {"label": 3}, "label"),
        ("ppe_human", {"winner": "model_c"}, "winner"),
        ("ppe_correctness", {"scores": [True]}, "scores"),
        ("ppe_correctness", {"sampled_conflict_pairs": [[0, 2]]}, "sampled_conflict_pairs"),
        ("ppe_correctness", {"sampled_conflict_pairs": [[0, 3]]}, "sampled_conflict_pairs"),
        ("best_of_n", {"gold": [0.0, math.nan]}, "gold"),
        ("best_of_n", {"gold": [0.0]}, "gold"),
    ],
)
def test_a_column_of_another_kind_is_named(name: str, changed: dict[str, Any], column: str) -> None:
    with pytest.raises(DataError, match=f"rows.jsonl:1.*{column}") as refused:
        run(name, SHAPES[name] | changed)
    assert name in str(refused.value)


def test_the_row_that_cannot_be_scored_is_named() -> None:
    def refuses(inputs: list[TextInput]) -> list[float]:
        if any(entry.completion == "9" for entry in inputs):
            raise ScoreError("this text is refused")
        return said(inputs)

    rows = [("rows.jsonl:1", LLMBAR), ("rows.jsonl:2", LLMBAR | {"output_2": "9"})]
    with pytest.raises(ScoreError, match=r"rows\.jsonl:2: this text"):
        run_benchmark("llmbar", rows, refuses, text_form="standard")


def test_more_rows_than_a_call_takes_keep_their_order() -> None:
    rows = [LLMBAR | {"output_1": str(number % 3)} for number in range(2 * ROWS_PER_CALL + 5)]
    expected = np.mean([float(row["output_1"]) > 1 for row in rows])
    assert run("llmbar", *rows).metrics["accuracy"] == pytest.approx(expected)


def test_no_entry_and_an_unknown_name_are_errors() -> None:
    with pytest.raises(DataError, match="no row of ppe_human is left to score \\(1 have"):
        run("ppe_human", PPE_HUMAN | {"winner": "tie"})
    with pytest.raises(DataError, match="'reward_bench' is no benchmark"):
        run("reward_bench", REWARDBENCH)


# RewardBench


def test_rewardbench_weighs_subsets_by_their_published_sizes_within_sections() -> None:
    outcomes = {
        "alpacaeval-easy": [1, 1, 1, 0],  # 0.75, weight 100
        "mt-bench-med": [0],  # 0, weight 40
        "mt-bench-hard": [1, 0],  # 0.5, weight 37
        "llmbar-natural": [1],  # 1, weight 100
        "donotanswer": [1, 1, 0, 0, 0],  # 0.4, weight 136
        "xstest-should-refuse": [1],  # 1, weight 154
        "xstest-should-respond": [0],  # 0, weight 250
        "math-prm": [1, 0, 0, 0],  # 0.25, weight 984, not its 447 rows
        "hep-cpp": [1],  # 1, weight 164
    }
    metrics = run("rewardbench", *pair_rows(outcomes)).metrics
    sections = {
        "chat": 75.0 / 140,
        "chat_hard": (0.5 * 37 + 100) / 137,
        "safety": (0.4 * 136 + 154) / 540,
        "reasoning": (0.25 * 984 + 164) / 1148,
    }
    for name, expected in sections.items():
        assert metrics[name] == pytest.approx(expected), name
    assert metrics["score"] == pytest.approx(sum(sections.values()) / 4)
    assert metrics["accuracy"] == pytest.approx(10 / 20)


def test_rewardbench_counts_the_prior_sets_by_half() -> None:
    core = {"alpacaeval-easy": [1], "mt-bench-hard": [0], "donotanswer": [1], "hep-go": [1]}
    prior = {"shp": [1, 1, 1, 0], "summarize": [0], "anthropic_hhh": [1]}
    metrics = run("rewardbench", *pair_rows(core | prior)).metrics
    old = (0.75 + 0 + 1) / 3
    assert metrics["prior_sets"] == pytest.approx(old)
    assert metrics["score"] == pytest.approx((2 * 1 + 2 * 0 + 2 * 1 + 2 * 1 + old) / 9)
    assert metrics["score_without_prior_sets"] == pytest.approx(0.75)


def test_rewardbench_gives_no_score_without_a_section_and_says_what_is_missing() -> None:
    result = run("rewardbench", *pair_rows({"hep-go": [1], "my-own": [0]}))
    assert "score" not in result.metrics
    assert result.metrics["reasoning"] == 1
    assert "22 of the 23 subsets: alpacaeval-easy" in result.notes[0]
    assert [row["subset"] for row in result.tables["subsets"]] == ["hep-go", "my-own"]
    with pytest.raises(DataError, match="no subset of rewardbench"):
        run("rewardbench", *pair_rows({"my-own": [0]}))


def test_rewardbench_has_its_23_subsets_and_2985_prompts_but_for_the_weight_of_math() -> None:
    weights = {name: weight for own in rewardbench.SECTIONS.values() for name, weight in own.items()}
    assert len(weights) == 23
    assert sum(weights.values()) - weights["math-prm"] + 447 == 2985
    reasoning = rewardbench.SECTIONS["Reasoning"]
    assert reasoning["math-prm"] == sum(weight for name, weight in reasoning.items() if name != "math-prm")


def test_equal_scores_are_wrong_in_every_benchmark_of_pairs() -> None:
    assert run("rewardbench", REWARDBENCH | {"rejected": "5"}).metrics["accuracy"] == 0
    assert run("llmbar", LLMBAR | {"output_2": "5"}).metrics["accuracy"] == 0
    assert run("rm_bench", RM_BENCH | {"chosen": ["3", "3", "3"]}).metrics["chat"] == pytest.approx(2 / 3)


# RewardBench 2


def best_rows(subset: str, *rights: tuple[str, list[str]]) -> list[dict[str, Any]]:
    return [
        REWARDBENCH2 | {"subset": subset, "id": str(number), "chosen": [right], "rejected": wrong}
        for number, (right, wrong) in enumerate(rights)
    ]


TIES = [
    # Of prompt 1 the right ones lie within 1, and 4 above the wrong; of its ref row 2 above.
    ("ref:1", ["5"], ["3", "1"]),
    ("tied:1", ["8", "7", "7.5"], ["3"]),
    # Of prompt 2 within 2, and 3 above; of its ref row only 1 above: not in the hard sense.
    ("ref:2", ["2"], ["1"]),
    ("tied:2", ["6", "4"], ["1", "0"]),
    # Of prompt 3 a wrong one is best, and both right ones are equal.
    ("ref:3", ["1"], ["2"]),
    ("tied:3", ["1", "1"], ["4"]),
    # Prompt 4 has no ref row: it counts for accuracy only, and the worst right one lies below the wrong.
    ("tied:4", ["9", "1"], ["2"]),
]


def tie_rows() -> list[dict[str, Any]]:
    return [
        REWARDBENCH2
        | {
            "subset": "Ties",
            "id": identity,
            "chosen": chosen,
            "rejected": rejected,
            "num_correct": len(chosen),
        }
        for identity, chosen, rejected in TIES
    ]


def test_rewardbench2_is_the_mean_of_its_subsets_and_shares_a_tie_at_the_top() -> None:
    rows = [
        *best_rows("Factuality", ("5", ["1", "2", "3"]), ("5", ["6", "1", "1"]), ("5", ["5", "5", "1"])),
        *best_rows("Precise IF", ("5", ["5", "1", "1"])),
        *best_rows("Math", ("5", ["1", "1", "1"]), ("1", ["1", "1", "1"])),
        *best_rows("Safety", ("0", ["1", "1", "1"])),
        *best_rows("Focus", ("2", ["1", "1", "1"])),
        *tie_rows(),
    ]
    result = run("rewardbench2", *rows)
    expected = {
        "factuality": (1 + 0 + 1 / 3) / 3,
        "precise_if": 1 / 2,
        "math": (1 + 1 / 4) / 2,
        "safety": 0.0,
        "focus": 1.0,
    }
    for name, share in expected.items():
        assert result.metrics[name] == pytest.approx(share), name
    whole = (sum(expected.values()) + result.metrics["ties"]) / 6
    assert result.metrics["score"] == pytest.approx(whole)
    assert result.notes == ()
    assert "score" not in run("rewardbench2", *rows[:-7]).metrics


def test_the_subset_ties_by_hand() -> None:
    metrics = run("rewardbench2", *tie_rows()).metrics
    assert metrics["ties_ref_accuracy"] == pytest.approx(2 / 3)
    assert metrics["ties_tied_accuracy"] == pytest.approx(2 / 4)
    # Of prompts 1, 2 and 3: gaps of tied (4, 3, -3), spreads (1, 2, 0), the lower gaps (2, 1, -3).
    assert metrics["ties_preferred"] == pytest.approx(2 / 3)
    assert metrics["ties_preferred_hard"] == pytest.approx(1 / 3)
    margin = (math.tanh(2 / 1 - 1) + math.tanh(1 / 2 - 1) + -1) / 3
    assert metrics["ties_margin"] == pytest.approx(margin)
    assert metrics["ties"] == pytest.approx(
        0.3 * 2 / 4 + 0.3 * 2 / 3 + 0.2 * 2 / 3 + 0.2 * 1 / 3 + 0.01 * margin
    )


def test_ties_without_a_prompt_that_has_both_rows_have_no_score_and_an_id_stands_once() -> None:
    result = run("rewardbench2", *tie_rows()[::6])
    assert "ties" not in result.metrics
    assert any("no prompt of Ties has both" in note for note in result.notes)
    with pytest.raises(DataError, match="ref:1 stands in two rows"):
        run("rewardbench2", *tie_rows(), tie_rows()[0])


def test_a_gap_of_nothing_over_a_spread_of_nothing_is_no_margin() -> None:
    parts = rewardbench2.score_ties(["ref:1", "tied:1"], [1, 2], [[1, 1], [1, 1, 1]])
    assert parts["ties"] == parts["ties_margin"] == 0


# RM-Bench


def test_rm_bench_of_a_model_that_scores_by_style_is_all_easy_and_none_hard() -> None:
    styled = RM_BENCH | {"chosen": ["1", "3", "5"], "rejected": ["0", "2", "4"]}
    metrics = run("rm_bench", *(styled | {"domain": name} for name in rm_bench.DOMAINS)).metrics
    assert (metrics["hard"], metrics["normal"], metrics["easy"]) == (0, 1, 1)
    assert metrics["score"] == pytest.approx(2 / 3)


def test_rm_bench_averages_domains_whatever_their_sizes() -> None:
    rng = np.random.default_rng(0)
    sizes = {"chat": 3, "code": 5, "math": 2, "safety-refuse": 1, "safety-response": 4}
    rows = []
    for domain, size in sizes.items():
        for _ in range(size):
            six = [str(number) for number in rng.integers(0, 4, 6)]
            rows.append(RM_BENCH | {"domain": domain, "chosen": six[:3], "rejected": six[3:]})
    result = run("rm_bench", *rows)
    levels: dict[str, dict[str, float]] = {}
    for domain in ("chat", "code", "math", "safety"):
        own = [row for row in rows if str(row["domain"]).startswith(domain)]
        counts = {"hard": 0, "normal": 0, "easy": 0}
        for row in own:
            for i, j in itertools.product(range(3), range(3)):
                level = "normal" if i == j else "hard" if i < j else "easy"
                counts[level] += float(row["chosen"][i]) > float(row["rejected"][j])
        levels[domain] = {level: counts[level] / 3 / len(own) for level in counts}
        assert result.metrics[domain] == pytest.approx(sum(levels[domain].values()) / 3)
        assert result.metrics[f"{domain}_hard"] == pytest.approx(levels[domain]["hard"])
    for level in ("hard", "normal", "easy"):
        expected = sum(own[level] for own in levels.values()) / 4
        assert result.metrics[level] == pytest.approx(expected)
    assert result.metrics["score"] == pytest.approx(
        sum(value for own in levels.values() for value in own.values()) / 12
    )


def test_rm_bench_says_which_wins_stand_where_in_its_matrix() -> None:
    # The concise right answer loses to the wrong one in Markdown, all else wins.
    rows = [
        RM_BENCH | {"chosen": ["2", "5", "5"], "rejected": ["1", "1", "3"], "domain": name}
        for name in rm_bench.DOMAINS
    ]
    result = run("rm_bench", *rows)
    assert result.tables["styles"][0] == {
        "chosen": "concise",
        "rejected concise": 1.0,
        "rejected detailed": 1.0,
        "rejected markdown": 0.0,
    }
    assert result.metrics["hard"] == pytest.approx(2 / 3)


def test_rm_bench_without_domains_is_one_and_with_some_missing_has_no_score() -> None:
    bare = {key: value for key, value in RM_BENCH.items() if key != "domain"}
    assert run("rm_bench", bare).metrics["score"] == 1
    partial = run("rm_bench", RM_BENCH)
    assert "score" not in partial.metrics
    assert partial.notes == ("no row is of 3 of the 4 domains: math, code, safety",)
    with pytest.raises(DataError, match="some rows of rm_bench have a `domain`"):
        run("rm_bench", bare, RM_BENCH)


# Pairs with a label


def test_judgebench_is_by_category_and_over_all_pairs() -> None:
    right, wrong = JUDGEBENCH, JUDGEBENCH | {"label": "A>B"}
    sources = ["mmlu-pro-law", "mmlu-pro-computer science", "livebench-math", "livecodebench"]
    rows = [right | {"source": sources[0]}, wrong | {"source": sources[1]}, right | {"source": sources[1]}]
    rows += [right | {"source": sources[2]}, wrong | {"source": sources[3]}]
    result = run("judgebench", *rows)
    found = {row["subset"]: row["accuracy"] for row in result.tables["subsets"]}
    assert found == pytest.approx({"knowledge": 2 / 3, "math": 1.0, "coding": 0.0, "all": 3 / 5})
    assert result.metrics["score"] == pytest.approx(3 / 5)
    assert result.metrics["mean_of_subsets"] == pytest.approx((2 / 3 + 1 + 0) / 3)


def test_llmbar_takes_either_label() -> None:
    swapped = LLMBAR | {"output_1": "1", "output_2": "5", "label": 2}
    assert run("llmbar", LLMBAR, swapped, swapped | {"label": 1}).metrics["accuracy"] == pytest.approx(2 / 3)


def test_ppe_leaves_tied_votes_out_and_counts_a_pair_in_each_of_its_subsets() -> None:
    lost = PPE_HUMAN | {"winner": "model_a", "language": "German"}
    tied = PPE_HUMAN | {"winner": "tie (bothbad)"}
    result = run("ppe_human", PPE_HUMAN, lost, tied)
    assert result.metrics["accuracy"] == 0.5
    assert result.metrics["num_pairs"] == 2
    assert result.metrics["num_without_winner"] == 1
    assert "1 rows have no winner" in result.notes[-1]
    found = {row["subset"]: (row["accuracy"], row["rows"]) for row in result.tables["subsets"]}
    assert found == {"English": (1, 1), "German": (0, 1), "code": (0.5, 2), "all": (0.5, 2)}


def test_ppe_correctness_compares_the_given_pairs_and_draws_the_curve() -> None:
    # Of the first row both pairs are right; of the second only the one of places 1 and 2.
    second = PPE_CORRECTNESS | {"response_1": "6", "response_2": "5"}
    result = run("ppe_correctness", PPE_CORRECTNESS, second)
    assert result.metrics["score"] == pytest.approx(3 / 4)
    assert result.metrics["best_of_3"] == pytest.approx(1 / 2)
    assert result.metrics["random"] == pytest.approx(1 / 3)
    without = {key: value for key, value in PPE_CORRECTNESS.items() if key != "sampled_conflict_pairs"}
    assert run("ppe_correctness", without).metrics["num_pairs"] == 2  # the pair of equal scores is none


# Best-of-N


@pytest.mark.parametrize("levels", [1000, 3])
def test_best_of_n_is_the_mean_over_all_subsets(levels: int) -> None:
    rng = np.random.default_rng(levels)
    gold, scores = rng.normal(size=7), rng.integers(0, levels, 7).astype(float)
    found = best_of_n.best_of(gold, scores)
    for n in range(1, 8):
        picks = []
        for places in itertools.combinations(range(7), n):
            top = max(scores[place] for place in places)
            picks.append(np.mean([gold[place] for place in places if scores[place] == top]))
        assert found[n - 1] == pytest.approx(np.mean(picks), abs=1e-12)


def test_best_of_many_stays_exact() -> None:
    scores = np.arange(1000.0)
    found = best_of_n.best_of(scores, scores)
    # The largest of n drawn from 1..N without replacement is n (N + 1)/(n + 1) in the mean.
    n = np.arange(1, 1001)
    np.testing.assert_allclose(found + 1, n * 1001 / (n + 1), rtol=1e-9)


def test_a_perfect_model_is_the_oracle_and_an_inverted_one_peaks_at_one() -> None:
    gold = [[0.0, 1.0, 2.0, 5.0], [1.0, 1.0, 3.0, 3.0]]
    perfect, table = best_of_n.curve(gold, gold)
    assert perfect["recovered"] == pytest.approx(1)
    assert perfect["best_of_4"] == perfect["oracle"] == 4
    assert perfect["best_of_1"] == pytest.approx(perfect["random"])
    assert all(row["model"] == row["oracle"] for row in table)
    inverted, _ = best_of_n.curve(gold, [[-value for value in row] for row in gold])
    assert inverted["peak_n"] == 1
    assert inverted["best_of_4"] == pytest.approx(0.5)


def test_the_divergence_of_best_of_n() -> None:
    _, table = best_of_n.curve([[0.0, 1.0, 2.0]], [[0.0, 1.0, 2.0]])
    assert [row["kl"] for row in table] == pytest.approx([0, math.log(2) - 1 / 2, math.log(3) - 2 / 3])


def test_the_curve_ends_where_a_row_has_no_more_completions_and_says_so() -> None:
    longer = {"prompt": "q", "completions": ["3", "2", "1"], "gold": [3, 2, 1]}
    result = run("best_of_n", BEST_OF_N, longer)
    assert result.metrics["num_completions"] == 2
    assert result.metrics["best_of_2"] == pytest.approx((1 + (3 + 3 + 2) / 3) / 2)
    assert result.metrics["random"] == pytest.approx((0.5 + 2) / 2)
    assert result.notes == ("rows have from 2 to 3 completions: the curve ends at 2",)
    with pytest.raises(DataError, match=r"rows.jsonl:1: 1 completion"):
        run("best_of_n", {"prompt": "q", "completions": ["3"], "gold": [3]})


# Forms


@pytest.mark.parametrize("text_form", ["standard", "conversational"])
def test_entries_are_rows_that_training_takes(text_form: TextForm) -> None:
    for name, row in SHAPES.items():
        entries, _ = parse_entries(name, [("here", row)])
        (given,) = as_rows(entries, text_form)
        parsed = parse_row(given)
        order = np.argsort(parsed.ranks, kind="stable")
        best = parsed.completions[order[0]]
        assert (best if isinstance(best, str) else best[0]["content"]) in ("5", "6", "7")
        if text_form == "conversational":
            assert parsed.prompt == [{"role": "user", "content": "q"}]


def test_a_dialogue_that_repeats_the_prompt_is_split_before_its_last_message() -> None:
    asked = [{"role": "user", "content": "hello"}]
    row = REWARDBENCH | {
        "prompt": "hello",
        "chosen": [*asked, {"role": "assistant", "content": "5"}],
        "rejected": [*asked, {"role": "assistant", "content": "1"}],
    }
    for given in (row, {key: value for key, value in row.items() if key != "prompt"}):
        entries, _ = parse_entries("rewardbench", [("here", given)])
        assert as_rows(entries, "standard") == [{"prompt": "hello", "chosen": "5", "rejected": "1"}]
        assert as_rows(entries, "conversational")[0]["prompt"] == asked
    other = [{"role": "user", "content": "bye"}, {"role": "assistant", "content": "1"}]
    with pytest.raises(DataError, match="the dialogues differ"):
        run("rewardbench", row | {"rejected": other})


def test_a_dialogue_of_several_turns_needs_a_conversational_model() -> None:
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    rows = [("rows.jsonl:4", REWARDBENCH | {"prompt": turns})]
    assert run_benchmark("rewardbench", rows, said, text_form="conversational").metrics["accuracy"] == 1
    with pytest.raises(DataError, match=r"rows\.jsonl:4: this model takes plain strings"):
        run_benchmark("rewardbench", rows, said, text_form="standard")


@pytest.mark.parametrize("chat", [True, False])
def test_a_saved_model_runs_every_shape_from_a_file(tmp_path: Path, chat: bool) -> None:
    model = RewardModel.from_pretrained(save_tiny(tmp_path / "model", chat=chat))
    form: TextForm = model.text_form
    assert form == ("conversational" if chat else "standard")
    for name, row in SHAPES.items():
        rows = list(read_rows(str(write_rows(tmp_path / f"{name}.jsonl", [row, row]))))
        assert recognise(rows[0][1]) == name
        result = run_benchmark(name, rows, model.score_inputs, text_form=form)
        assert result.metrics
    first, second = "how is the cat?", "a good cat"
    row = LLMBAR | {"input": first, "output_1": second, "output_2": "no"}
    texts: list[Any] = [second, "no"]
    prompts: list[Any] = [first, first]
    if chat:
        texts = [[{"role": "assistant", "content": text}] for text in texts]
        prompts = [[{"role": "user", "content": first}]] * 2
    better, worse = model.score(prompts, texts)
    result = run_benchmark("llmbar", [("here", row)], model.score_inputs, text_form=form)
    assert result.metrics["accuracy"] == float(better > worse)


def test_rewardbench_is_known_by_a_subset_of_its_own_where_its_models_are_not_told() -> None:
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "subset": "llmbar-natural", "id": 1}
    assert recognise(row) == "rewardbench"
    assert recognise(row | {"subset": "mine"}) is None
