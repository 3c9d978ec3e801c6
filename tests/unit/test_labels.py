"""What rows say beside an order: probabilities, ties, scores; who may say what, and what comes of it."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayrm.config import DataConfig, RewardConfig
from rayrm.data.blocks import RowBlock, index_of, tokenized_tables
from rayrm.data.inspect import GivenIds, figures_by_source, gather
from rayrm.data.inspect_text import report
from rayrm.data.labels import ANY_LABELS, USUAL, LabelRules
from rayrm.data.pieces import SourceRow
from rayrm.data.preference import parse_row
from rayrm.data.reading import Reading
from rayrm.data.row_index import RowIndex
from rayrm.data.tokenize import TokenizedRow
from rayrm.data.tokenized_set import TokenizedSet
from rayrm.errors import ConfigError, DataError, RowError
from rayrm.metrics.evaluation import evaluate_scores
from rayrm.metrics.intervals import wilson_interval
from rayrm.objective import Objective
from rayrm.train.run_data import RunData
from rayrm.train.script_words import Rows
from rayrm.train.user_metrics import UserMetrics
from tests.tiny import tiny_tokenizer

PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
RANKED = {"prompt": "p", "completions": ["a", "b", "c"], "ranks": [0, 1, 1]}
SCORED = {"prompt": "p", "completion": "a", "score": 3}
SEVERAL = {"prompt": "p", "completions": ["a", "b"], "scores": [1, -0.5]}
LISTWISE, BCE = LabelRules(listwise=True), LabelRules(pointwise="bce")


def test_a_pair_may_say_how_likely_it_is_or_that_it_is_a_tie() -> None:
    assert parse_row({**PAIR, "target": 0.25}).target == 0.25
    assert parse_row({**PAIR, "target": None}) == parse_row({**PAIR, "target": 1}) == parse_row(PAIR)
    assert parse_row({**PAIR, "tie": True}, ANY_LABELS).ranks == (0, 0)
    assert parse_row({**PAIR, "tie": np.False_}) == parse_row({**PAIR, "tie": None}) == parse_row(PAIR)
    ids = {"chosen_ids": [1], "rejected_ids": [2], "target": 0.5}
    assert parse_row(ids).target == 0.5
    assert parse_row({**RANKED, "target": 0.9}).target == 0.9
    assert parse_row({**RANKED, "ranks": [4, 4, 4]}, ANY_LABELS).ranks == (0, 0, 0)


def test_a_row_may_score_one_completion_or_several_as_text_messages_or_ids() -> None:
    one = parse_row(SCORED, ANY_LABELS)
    assert (one.prompt, one.completions, one.ranks, one.ratings) == ("p", ("a",), (-1,), (3.0,))
    several = parse_row(SEVERAL, ANY_LABELS)
    assert (several.completions, several.ranks, several.ratings) == (("a", "b"), (-1, -1), (1.0, -0.5))
    answer = [{"role": "assistant", "content": "a"}]
    told = parse_row({"prompt": [{"role": "user", "content": "q"}], "completion": answer, "score": 0.5}, BCE)
    assert told.completions == (answer,)
    ids = parse_row({"completion_ids": [4, 5], "score": -1.5}, ANY_LABELS)
    assert (ids.ids, ids.ratings, ids.names) == (([4, 5],), (-1.5,), ("completion_ids",))
    ids = parse_row({"completions_ids": [[4], [5]], "scores": np.array([1.0, 2.0])}, ANY_LABELS)
    assert (ids.ids, ids.ratings) == (([4], [5]), (1.0, 2.0))


def test_scores_beside_an_order_are_another_column() -> None:
    assert parse_row({**PAIR, "score": 3, "completion": "x", "scores": [1]}) == parse_row(PAIR)
    assert parse_row({**RANKED, "scores": [1, 2, 3]}) == parse_row(RANKED)


@pytest.mark.parametrize(
    ("row", "rules", "reason", "says"),
    [
        ({**PAIR, "target": 1.5}, USUAL, "bad-target", "`target` (1.5)"),
        ({**PAIR, "target": "likely"}, USUAL, "bad-target", "from 0 to 1"),
        ({**PAIR, "target": math.nan}, USUAL, "bad-target", "nan"),
        ({**PAIR, "target": True}, USUAL, "bad-target", "True"),
        ({**PAIR, "target": 0.5, "tie": True}, ANY_LABELS, "bad-target", "none that is won"),
        ({**RANKED, "target": 0.5}, LISTWISE, "bad-target", "ranking_loss=pairwise"),
        ({**SCORED, "target": 0.5}, ANY_LABELS, "bad-target", "name the column `score`"),
        ({**PAIR, "tie": 1}, USUAL, "bad-tie", "`tie` (1)"),
        ({**RANKED, "tie": True}, ANY_LABELS, "bad-tie", "equal ranks"),
        ({**PAIR, "tie": True}, USUAL, "all-tied", "set `tie_model=davidson`"),
        ({**RANKED, "ranks": [1, 1, 1]}, USUAL, "all-tied", "`ranks` ([1, 1, 1]) are all equal"),
        ({**PAIR, "tie": True, "margin": 1}, ANY_LABELS, "bad-margin", "`margin` (1)"),
        ({**SCORED, "margin": 1}, ANY_LABELS, "bad-margin", "scores each"),
        (SCORED, USUAL, "not-pointwise", "set `pointwise_loss=mse`"),
        (SEVERAL, LISTWISE, "not-pointwise", "`scores` ([1, -0.5])"),
        (SCORED, BCE, "bad-score", "from 0 to 1"),
        ({**SCORED, "score": "high"}, ANY_LABELS, "bad-score", "'high'"),
        ({**SCORED, "score": math.inf}, ANY_LABELS, "bad-score", "inf"),
        ({**SCORED, "score": 1e39}, ANY_LABELS, "bad-score", "1e+39"),
        ({**SCORED, "score": False}, ANY_LABELS, "bad-score", "False"),
        ({**SEVERAL, "scores": [1]}, ANY_LABELS, "bad-score", "2 numbers"),
        ({**SEVERAL, "scores": 1}, ANY_LABELS, "bad-score", "`scores` (1)"),
        ({**SEVERAL, "scores": [1, None]}, ANY_LABELS, "bad-score", "None"),
        ({**SEVERAL, "completions": []}, ANY_LABELS, "too-few-completions", "has 0"),
        ({**SEVERAL, "completions": "ab"}, ANY_LABELS, "wrong-type", "`completions` ('ab')"),
        ({**SCORED, "completion": " "}, ANY_LABELS, "empty-completion", "`completion`"),
    ],
)
def test_a_label_that_a_run_cannot_use_is_refused_with_what_to_do(
    row: dict[str, Any], rules: LabelRules, reason: str, says: str
) -> None:
    with pytest.raises(RowError) as refusal:
        parse_row(row, rules)
    assert refusal.value.reason == reason
    assert says in str(refusal.value)
    assert ";" in str(refusal.value)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"label_smoothing": 0.5}, "label_smoothing"),
        ({"tie_parameter": 2}, '`tie_model`, which is "none"'),
        ({"tie_model": "rao-kupper", "tie_parameter": 1}, "Type `tie_parameter=3`"),
        ({"tie_model": "davidson", "tie_parameter": 0}, "tie_parameter"),
        ({"tie_model": "elo"}, "tie_model"),
        ({"tie_model": "davidson", "ranking_loss": "plackett-luce"}, "Plackett-Luce has no ties"),
        ({"label_smoothing": 0.1, "ranking_loss": "plackett-luce"}, "Type `ranking_loss=pairwise`"),
        ({"label_smoothing_factor": 0.1}, "Set `label_smoothing`"),
        ({"pointwise_loss": "mae"}, "pointwise_loss"),
    ],
)
def test_settings_that_contradict_each_other_say_what_to_type(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        RewardConfig(**settings)
    assert says in str(refusal.value)


def test_the_usual_objective_is_bradley_and_terry_s() -> None:
    assert Objective.of(RewardConfig()) == Objective()
    told = Objective.of(RewardConfig(tie_model="rao-kupper", tie_parameter="1.5", pointwise_loss="bce"))
    assert told == Objective(tie_model="rao-kupper", tie_parameter=1.5, pointwise_loss="bce")
    assert LabelRules.of(told) == LabelRules(ties=True, pointwise="bce")
    assert LabelRules.of(Objective()).named == {}


LABELLED = [
    {"chosen_ids": [5, 6], "rejected_ids": [5, 7], "target": 0.25},
    {"completions_ids": [[5, 8], [5, 9, 9]], "scores": [2.5, -1]},
    {"chosen_ids": [5, 6], "rejected_ids": [5, 7], "tie": True},
    {"completion_ids": [5, 6, 6], "score": 4},
    {"completions_ids": [[4, 4], [4, 5], [4, 6]], "ranks": [1, 1, 0], "margin": 0.5},
    {"chosen_ids": [5, 6], "rejected_ids": [5, 7]},
    {"chosen_ids": [5, 6], "rejected_ids": [5, 7], "target": 2},
]


def table_of(rows: list[dict[str, Any]], labels: LabelRules = ANY_LABELS) -> Any:
    numbered = [SourceRow(0, place, f"rows[{place}]", row) for place, row in enumerate(rows)]
    (table,) = tokenized_tables(numbered, GivenIds(), None, labels=labels)
    return table


def test_tables_and_their_index_keep_what_rows_say() -> None:
    table = table_of(LABELLED)
    index, block = index_of(table), RowBlock(table)
    rows = [block.row(offset) for offset in index.offset.tolist()]
    assert [row.target for row in rows] == [0.25, 1, 1, 1, 1, 1]
    assert [row.ratings for row in rows] == [(), (2.5, -1.0), (), (4.0,), (), ()]
    assert [row.ranks for row in rows] == [(0, 1), (-1, -1), (0, 0), (-1,), (1, 1, 0), (0, 1)]
    assert [refusal.reason for refusal in index.refusals] == ["bad-target"]
    assert index.rows.targets.tolist() == [0.25, 1, 1, 1, 1, 1]
    np.testing.assert_array_equal(
        index.rows.ratings, [np.nan] * 2 + [2.5, -1] + [np.nan] * 2 + [4] + [np.nan] * 5
    )
    # The same pair, as likely, as a tie and as sure, is three rows.
    digests = {bytes(digest) for digest in index.digest}
    assert len(digests) == len(rows)
    both = RowIndex.joined([index.rows, index.rows.take([3, 0])])
    assert both.targets.tolist() == [0.25, 1, 1, 1, 1, 1, 1, 0.25]
    assert both.ratings[-3] == 4


def test_a_usual_run_refuses_ties_and_scores_by_name() -> None:
    table = table_of(LABELLED, USUAL)
    assert [reason for reason in table.column("reason").to_pylist() if reason] == [
        "not-pointwise",
        "all-tied",
        "not-pointwise",
        "bad-target",
    ]


def test_equal_ranks_are_compared_where_ties_are() -> None:
    index = index_of(table_of(LABELLED)).rows
    plain, tied = index.comparisons(), index.comparisons(ties=True)
    assert list(zip(plain.better.tolist(), plain.worse.tolist(), strict=True)) == [
        (0, 1),
        (9, 7),
        (9, 8),
        (10, 11),
    ]
    assert list(zip(tied.better.tolist(), tied.worse.tolist(), tied.tie.tolist(), strict=True)) == [
        (0, 1, False),
        (4, 5, True),
        (7, 8, True),
        (9, 7, False),
        (9, 8, False),
        (10, 11, False),
    ]
    assert tied.weight.tolist() == pytest.approx([1, 1, 1 / 3, 1 / 3, 1 / 3, 1])
    assert tied.margin.tolist() == [0, 0, 0, 0.5, 0.5, 0]
    assert tied.direction.tolist() == [-1, 0, 0, 1, 1, 1]
    of_rows = [
        (first + i, first + j)
        for first, row in zip(
            index.first, TokenizedSet.of_table(table_of(LABELLED)).fetch(range(6)), strict=False
        )
        for i, j in row.compared(ties=True)
    ]
    assert of_rows == list(zip(tied.better.tolist(), tied.worse.tolist(), strict=True))


def cache_key(labels: LabelRules, directory: Path) -> str:
    """By which a token cache in `directory` knows rows that were read with these rules."""
    tokenizer = tiny_tokenizer()
    reading = Reading.of(
        tokenizer, pickle.dumps(tokenizer), max_length=9, token_cache=str(directory), labels=labels
    )
    assert reading.cache is not None
    return reading.cache.rules


def test_a_cache_is_found_by_rules_that_make_other_rows(tmp_path: Path) -> None:
    assert cache_key(USUAL, tmp_path) == cache_key(LabelRules(), tmp_path)
    assert len({cache_key(rules, tmp_path) for rules in (USUAL, ANY_LABELS, BCE, LISTWISE)}) == 4


def rows_index(*rows: tuple[tuple[int, ...], dict[str, Any]]) -> RowIndex:
    made = [
        TokenizedRow.of([np.array([1, 2 + place], np.int32) for place in range(len(ranks))], ranks, **labels)
        for ranks, labels in rows
    ]
    return TokenizedSet.from_rows(made).index


def test_metrics_of_soft_labels_count_the_likelier_side() -> None:
    index = rows_index(((0, 1), {"target": 0.2}), ((0, 1), {"target": 0.5}), ((0, 1), {"target": 1.0}))
    found = evaluate_scores([0.0, 2.0, 5.0, 1.0, 1.0, 4.0], index)
    low, high = wilson_interval(1, 2)
    assert (found["accuracy"], found["accuracy_low"], found["accuracy_high"]) == (0.5, low, high)
    assert found["margin"] == pytest.approx((2 - 3) / 2)
    foretold = [1 / (1 + math.exp(-d)) for d in (-2, 4, -3)]
    squares = [(p - t) ** 2 for p, t in zip(foretold, (0.2, 0.5, 1), strict=True)]
    assert found["brier"] == pytest.approx(sum(squares) / 3, rel=1e-6)
    loss = [
        -t * math.log(p) - (1 - t) * math.log(1 - p) for p, t in zip(foretold, (0.2, 0.5, 1), strict=True)
    ]
    assert found["loss"] == pytest.approx(sum(loss) / 3, rel=1e-6)


def test_metrics_set_ties_apart() -> None:
    index = rows_index(((0, 1), {}), ((0, 0), {}), ((0, 0), {}))
    objective = Objective(tie_model="davidson", tie_parameter=1.0)
    # With nu = 1 a tie is likeliest only where exp(|d| / 2) < 1: never but at d = 0; with 2 up to 2 log 2.
    scores = [1.0, 0.0, 0.3, 0.0, 3.0, 0.0]
    assert evaluate_scores(scores, index, objective)["tie_accuracy"] == 0.0
    found = evaluate_scores(scores, index, Objective(tie_model="davidson", tie_parameter=2.0))
    assert (found["tie_accuracy"], found["num_ties"], found["num_pairs"]) == (0.5, 2.0, 3.0)
    assert (found["accuracy"], found["ties"], found["margin"]) == (1.0, 0.0, 1.0)
    # Where nothing is said of ties, they are not compared.
    assert "num_ties" not in evaluate_scores(scores, index)


def test_metrics_of_scored_completions_are_their_error_and_correlation() -> None:
    index = rows_index(((-1,), {"ratings": (1.0,)}), ((-1, -1), {"ratings": (0.0, 2.0)}))
    found = evaluate_scores([2.0, 0.5, 3.0], index, Objective(pointwise_loss="mse"))
    assert found["loss"] == pytest.approx((1 + (0.25 + 1) / 2) / 2)
    assert found["mse"] == pytest.approx(found["loss"])
    assert found["pearson"] == pytest.approx(float(np.corrcoef([2, 0.5, 3], [1, 0, 2])[0, 1]))
    assert found["mean_reward"] == pytest.approx((2 + 1.75) / 2)
    assert (found["num_rated"], found["num_pairs"], found["num_rows"]) == (3.0, 0.0, 2.0)
    assert "accuracy" not in found
    # Numbers that do not vary have no correlation, though their deviation may be 1e-16.
    for ratings, scores in (((0.1,) * 3, [2.0, 0.5, 3.0]), ((0.1, 0.2, 0.4), [0.7] * 3)):
        assert "pearson" not in evaluate_scores(scores, rows_index(((-1,) * 3, {"ratings": ratings})))
    sure = rows_index(((-1,), {"ratings": (1.0,)}), ((-1,), {"ratings": (0.0,)}))
    found = evaluate_scores([0.4, -1.0], sure, Objective(pointwise_loss="bce"))
    p, q = (1 / (1 + math.exp(-s)) for s in (0.4, -1.0))
    assert found["loss"] == pytest.approx(-(math.log(p) + math.log(1 - q)) / 2)
    assert found["mse"] == pytest.approx(((1 - p) ** 2 + q**2) / 2)


def test_metrics_of_rankings_as_wholes() -> None:
    index = rows_index(((0, 1, 2), {}), ((1, 0, 2), {}), ((0, 1), {}))
    scores = [3.0, 1.0, 0.0, 3.0, 1.0, 0.0, 1.0, 2.0]
    found = evaluate_scores(scores, index, Objective(ranking_loss="plackett-luce"))
    assert found["top_accuracy"] == 0.5
    assert found["num_pairs"] == 7


def test_a_tie_at_the_top_is_not_right() -> None:
    objective = Objective(ranking_loss="plackett-luce")
    index = rows_index(((0, 1, 2), {}), ((0, 0, 1), {}))
    # A model that tells nothing apart is right nowhere, as its accuracy is 0.
    flat = evaluate_scores(np.ones(6), index, objective)
    assert (flat["top_accuracy"], flat["accuracy"]) == (0.0, 0.0)
    # Which of two best ones is on top does not matter, and both may be.
    assert evaluate_scores([2.0, 1.0, 1.0, 1.0, 2.0, 1.5], index, objective)["top_accuracy"] == 1.0
    assert evaluate_scores([2.0, 2.0, 1.0, 2.0, 2.0, 1.5], index, objective)["top_accuracy"] == 0.5


def test_compute_metrics_is_for_rows_with_two_sides() -> None:
    with pytest.raises(ConfigError, match="scored completions"):
        UserMetrics(lambda told: {}, None, 8).of(np.zeros(2), rows_index(((-1, -1), {"ratings": (1.0, 2.0)})))


def test_a_trainer_s_rows_say_what_the_source_said() -> None:
    rows = Rows(TokenizedSet.of_table(table_of(LABELLED)))
    said = [{name: value for name, value in row.items() if value is not None} for row in rows]
    assert said[0] == {"chosen_ids": [5, 6], "rejected_ids": [5, 7], "margin": 0.0, "target": 0.25}
    assert said[1] == {"completion_ids": [[5, 8], [5, 9, 9]], "scores": [2.5, -1.0]}
    assert said[2] == {"completion_ids": [[5, 6], [5, 7]], "ranks": [0, 0], "margin": 0.0, "target": 1.0}


def test_inspect_tells_what_rows_say_and_what_a_run_needs_for_it(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [*LABELLED, {"chosen_ids": [5, 7], "rejected_ids": [5, 6], "target": 0.75}, LABELLED[3]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (found,) = figures_by_source(gather([str(path)], GivenIds()), None)
    assert (found.num_soft, found.num_all_tied, found.num_scored) == (2, 1, 3)
    assert found.targets == {"min": 0.25, "mean": 0.5, "max": 0.75}
    assert found.scores == {"min": -1.0, "mean": pytest.approx(9.5 / 4), "max": 4.0}
    assert (found.num_rankings, found.num_tied) == (1, 2)
    # What is only likely contradicts nothing; a text scored twice alike is a repeated row.
    assert (found.num_conflicts, found.num_duplicates) == (0, 1)
    # Of the pair that is a tie nothing is better.
    assert found.num_comparisons == 5
    text = " ".join(report([found]).split())
    for words in ("soft labels", "`tie_model` is set", "`pointwise_loss` is set", "min -1", "bad-target"):
        assert words in text


def test_inspect_reads_a_source_of_scores_alone(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"completion_ids": [1, n], "score": n}) + "\n" for n in range(2, 6)))
    (found,) = figures_by_source(gather([str(path)], GivenIds()), None)
    assert (found.num_scored, found.num_comparisons, found.better_is_longer) == (4, 0, 0.0)
    assert "label balance" not in report([found])


def test_a_set_read_under_other_settings_is_refused_where_the_loss_has_no_term_for_it(tmp_path: Path) -> None:
    whole = TokenizedSet.of_table(table_of(LABELLED))

    def given(**settings: Any) -> TokenizedSet:
        data = RunData(tiny_tokenizer(), RewardConfig(**settings), DataConfig(), tmp_path / "q.jsonl")
        return data.ingest(whole, "train", None)

    assert given(tie_model="davidson", pointwise_loss="mse") is whole
    with pytest.raises(DataError, match="has 3 rows without better and worse"):
        given()
    with pytest.raises(DataError, match="has 1 rows without"):
        given(pointwise_loss="mse")
    with pytest.raises(DataError, match="pointwise_loss=mse"):
        given(tie_model="davidson", pointwise_loss="bce")


def test_a_set_of_soft_rankings_is_refused_where_they_would_be_trained_as_sure(tmp_path: Path) -> None:
    sequences = [np.array([1, token], np.int32) for token in (5, 6, 7)]
    soft_pair = TokenizedRow.of(sequences[:2], (0, 1), target=0.75)
    soft_ranking = TokenizedRow.of(sequences, (0, 1, 2), target=0.75)
    ranking = TokenizedRow.of(sequences, (0, 1, 2))

    def given(*rows: TokenizedRow, **settings: Any) -> TokenizedSet:
        data = RunData(tiny_tokenizer(), RewardConfig(**settings), DataConfig(), tmp_path / "q.jsonl")
        return data.ingest(TokenizedSet.from_rows(rows), "train", None)

    wholes = {"ranking_loss": "plackett-luce"}
    with pytest.raises(DataError, match=r"has 1 rankings with a `target`.*`ranking_loss=pairwise`"):
        given(soft_pair, soft_ranking, ranking, **wholes)
    # A pair is a comparison under either loss, and a ranking's comparisons may be soft.
    assert given(soft_pair, ranking, **wholes).num_rows == 2
    assert given(soft_pair, soft_ranking, ranking).num_rows == 3
