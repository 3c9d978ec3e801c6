"""Ratings by attribute: what rows say, what a set keeps of it, what is measured, and what is refused."""

from __future__ import annotations

import contextlib
import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rayrm.config import DataConfig, RewardConfig
from rayrm.data.blocks import RowBlock, index_of, tokenized_tables
from rayrm.data.columns import check_columns
from rayrm.data.inspect import GivenIds
from rayrm.data.labels import USUAL, LabelRules
from rayrm.data.packing import pack_rows
from rayrm.data.pieces import SourceRow
from rayrm.data.preference import parse_row
from rayrm.data.row_index import RowIndex
from rayrm.data.tokenize import TokenizedRow
from rayrm.data.tokenized_set import TokenizedSet
from rayrm.errors import ConfigError, DataError, ModelError, RowError
from rayrm.metrics.evaluation import evaluate_scores
from rayrm.metrics.names import logged_names
from rayrm.model.attribute_head import (
    HEADS_FILE,
    AttributeHead,
    attribute_head_of,
    heads_file,
    own_layer,
    put_reward,
    read_heads,
    reward_of,
)
from rayrm.model.reward_model import load_model
from rayrm.model.saving import save_model
from rayrm.objective import Objective
from rayrm.train.attributes import check_rated, give_attributes
from rayrm.train.build import ModelSource, build_model, check_source
from rayrm.train.optimizer import check_optimizers, make_optimizer
from rayrm.train.run_data import RunData
from rayrm.train.script_words import Rows
from tests.families import ENCODERS, save_base
from tests.tiny import tiny_model, tiny_tokenizer
from tests.unit.test_labels import cache_key

NAMES = ("good", "long")
RULES = LabelRules(attributes=NAMES)
NAN = math.nan
PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
RATED_PAIR = {**PAIR, "chosen_attributes": {"good": 3, "long": 0.5}, "rejected_attributes": {"long": 2}}
ONE = {"prompt": "p", "completion": "a", "attributes": {"good": 4}}
SEVERAL = {"prompt": "p", "completions": ["a", "b"], "attributes": [{"good": 1}, {"good": -2, "long": 1}]}
RANKED = {"prompt": "p", "completions": ["a", "b", "c"], "ranks": [0, 1, 2]}


def test_rows_of_every_form_may_rate_their_completions() -> None:
    pair = parse_row(RATED_PAIR, RULES)
    assert pair.ranks == (0, 1)
    np.testing.assert_array_equal(pair.attributes, [3, 0.5, NAN, 2])
    one = parse_row(ONE, RULES)
    assert (one.ranks, one.ratings) == ((-1,), ())
    np.testing.assert_array_equal(one.attributes, [4, NAN])
    np.testing.assert_array_equal(parse_row(SEVERAL, RULES).attributes, [1, NAN, -2, 1])
    ranked = parse_row({**RANKED, "attributes": [None, {"good": np.float32(2)}, {}]}, RULES)
    assert ranked.ranks == (0, 1, 2)
    np.testing.assert_array_equal(ranked.attributes, [NAN, NAN, 2, NAN, NAN, NAN])
    ids = {"chosen_ids": [1], "rejected_ids": [2], "chosen_attributes": {"good": 1}}
    np.testing.assert_array_equal(parse_row(ids, RULES).attributes, [1, NAN, NAN, NAN])
    both = LabelRules(pointwise="mse", attributes=NAMES)
    scored = parse_row({**ONE, "score": 0.5}, both)
    assert scored.ratings == (0.5,)
    # A score that the run does not learn from waits beside what it does.
    assert parse_row({**ONE, "score": 0.5}, RULES).ratings == ()


def test_what_is_not_rated_may_be_null_as_arrow_fills_it() -> None:
    assert parse_row(PAIR, RULES) == parse_row(PAIR)
    empty = {**PAIR, "chosen_attributes": {"good": None, "other": None}, "rejected_attributes": None}
    assert parse_row(empty, RULES) == parse_row(PAIR)


def test_without_the_setting_a_pair_s_ratings_are_other_columns() -> None:
    assert parse_row(RATED_PAIR) == parse_row(PAIR)
    assert parse_row({**RANKED, "attributes": "any"}) == parse_row(RANKED)


@pytest.mark.parametrize(
    ("row", "rules", "reason", "says"),
    [
        (ONE, USUAL, "no-attributes", '`attributes=["helpfulness"]`'),
        (SEVERAL, USUAL, "no-attributes", "no better or worse"),
        ({**ONE, "score": 1}, USUAL, "not-pointwise", "pointwise_loss=mse"),
        ({**ONE, "attributes": {"goood": 1}}, RULES, "bad-attributes", "Did you mean `good`?"),
        ({**ONE, "attributes": {"good": math.inf}}, RULES, "bad-attributes", "`attributes.good` (inf)"),
        ({**ONE, "attributes": {"good": math.nan}}, RULES, "bad-attributes", "finite"),
        ({**ONE, "attributes": {"good": "3"}}, RULES, "bad-attributes", "'3'"),
        ({**ONE, "attributes": {"good": True}}, RULES, "bad-attributes", "True"),
        ({**ONE, "attributes": {"good": 1e39}}, RULES, "bad-attributes", "1e+39"),
        ({**ONE, "attributes": [{"good": 1}]}, RULES, "bad-attributes", "must be an object"),
        ({**ONE, "attributes": {}}, RULES, "bad-attributes", "rates no completion"),
        ({**SEVERAL, "attributes": [{"good": 1}]}, RULES, "bad-attributes", "a list of 2 objects"),
        ({**SEVERAL, "attributes": [{"good": 1}, 2]}, RULES, "bad-attributes", "`attributes[1]` (2)"),
        ({**PAIR, "attributes": {"good": 1}}, RULES, "bad-attributes", "`chosen_attributes`"),
        ({**RANKED, "chosen_attributes": {"good": 1}}, RULES, "bad-attributes", "`attributes`"),
        ({**RATED_PAIR, "rejected_attributes": 3}, RULES, "bad-attributes", "`rejected_attributes` (3)"),
        ({**ONE, "target": 0.5}, RULES, "bad-target", "`target` (0.5)"),
        ({**ONE, "margin": 1}, RULES, "bad-margin", "`margin` (1)"),
    ],
)
def test_a_rating_that_a_run_cannot_use_is_refused_with_what_to_do(
    row: dict[str, Any], rules: LabelRules, reason: str, says: str
) -> None:
    with pytest.raises(RowError) as refusal:
        parse_row(row, rules)
    assert refusal.value.reason == reason
    assert says in str(refusal.value)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"attributes": ["good", "good"]}, "names one of them twice"),
        ({"attributes": ["a b"]}, "'a b'"),
        ({"attributes": [""]}, "''"),
        ({"attribute_weight": 2}, "`attribute_weight` (2)"),
        ({"attributes": ["good"], "attribute_weight": 0}, "attribute_weight"),
    ],
)
def test_settings_that_make_no_sense_say_what_to_type(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        RewardConfig(**settings)
    assert says in str(refusal.value)


def test_attributes_are_named_in_a_list_or_in_one_word() -> None:
    told = Objective.of(RewardConfig(attributes=["good", "long"], attribute_weight=0.5))
    assert told == Objective(attributes=NAMES, attribute_weight=0.5)
    assert RewardConfig(attributes="good, long").attributes == ["good", "long"]
    assert RewardConfig(attributes="none").attributes == RewardConfig(attributes=None).attributes == []
    assert LabelRules.of(told) == RULES
    assert check_columns({"chosen_attributes": "a", "attributes": "b"})


def test_caches_of_runs_without_attributes_keep_their_names(tmp_path: Path) -> None:
    # What is hashed for them, as it was before there were attributes.
    assert USUAL.named == {}
    plain = LabelRules(ties=True, pointwise="mse")
    assert plain.named == {"labels": "LabelRules(ties=True, listwise=False, pointwise='mse')"}
    turned = LabelRules(attributes=("long", "good"))
    assert len({cache_key(rules, tmp_path) for rules in (USUAL, plain, RULES, turned)}) == 4


GIVEN = [
    {"chosen_ids": [5, 6], "rejected_ids": [5, 7], "chosen_attributes": {"good": 1, "long": 2}},
    {"chosen_ids": [5, 6], "rejected_ids": [5, 7]},
    {"completion_ids": [5, 6, 6], "attributes": {"long": 3}},
    {"completions_ids": [[5, 8], [5, 9]], "scores": [0.5, 0.25], "attributes": [{"good": 4}, None]},
    {"completion_ids": [5, 6, 6], "attributes": {"lang": 3}},
]


def table_of(rows: list[dict[str, Any]]) -> Any:
    numbered = [SourceRow(0, place, f"rows[{place}]", row) for place, row in enumerate(rows)]
    rules = LabelRules(pointwise="mse", attributes=NAMES)
    (table,) = tokenized_tables(numbered, GivenIds(), None, labels=rules)
    return table


def test_tables_and_their_index_keep_what_rows_say() -> None:
    table = table_of(GIVEN)
    index, block = index_of(table), RowBlock(table)
    rows = [block.row(offset) for offset in index.offset.tolist()]
    expected = [(1, 2, NAN, NAN), (), (NAN, 3), (4, NAN, NAN, NAN)]
    for row, wanted in zip(rows, expected, strict=True):
        np.testing.assert_array_equal(row.attributes, wanted)
    assert [row.ratings for row in rows] == [(), (), (), (0.5, 0.25)]
    assert [refusal.reason for refusal in index.refusals] == ["bad-attributes"]
    found = [[1, 2], [NAN] * 2, [NAN] * 2, [NAN] * 2, [NAN, 3], [4, NAN], [NAN] * 2]
    np.testing.assert_array_equal(index.rows.attributes, found)
    np.testing.assert_array_equal(index.rows.ratings, [*[NAN] * 5, 0.5, 0.25])
    assert len({bytes(digest) for digest in index.digest}) == len(rows)
    # Of a block whose rows rate nothing nobody knows how many attributes there are.
    plain = index_of(table_of(GIVEN[1:2])).rows
    assert plain.attributes.shape == (2, 0)
    joined = RowIndex.joined([plain, index.rows.take([2, 0])])
    np.testing.assert_array_equal(joined.attributes, [[NAN] * 2, [NAN] * 2, [NAN, 3], [1, 2], [NAN] * 2])


def row(ranks: tuple[int, ...], attributes: tuple[float, ...] = ()) -> TokenizedRow:
    sequences = [np.array([1, 10 + place], np.int32) for place in range(len(ranks))]
    return TokenizedRow.of(sequences, ranks, attributes=attributes)


ROWS = [row((0, 1), (1, 2, NAN, 5)), row((0, 1)), row((-1,), (NAN, 4)), row((-1, -1), (1, NAN, 3, 0))]
OBJECTIVE = Objective(attributes=NAMES, attribute_weight=0.5)


def test_a_row_weighs_one_shared_by_its_ratings() -> None:
    packed = pack_rows(ROWS, None, weights=[1, 1, 1, 0.5], objective=OBJECTIVE)
    by = packed.attributed
    assert by is not None
    assert by.place.tolist() == [0, 0, 1, 4, 5, 6, 6]
    assert by.column.tolist() == [0, 1, 1, 1, 0, 0, 1]
    assert by.rating.tolist() == [1, 2, 5, 4, 1, 3, 0]
    assert by.weight.tolist() == pytest.approx([*[1 / 3] * 3, 1, *[0.5 / 3] * 3])
    assert by.alone.tolist() == pytest.approx([0, 0, 0, 1, *[0.5 / 3] * 3])
    assert packed.term_rows == [0, 1, 0, 0, 0, 2, 3, 3, 3]
    assert pack_rows(ROWS, None).attributed is None


def test_a_trainer_s_rows_of_ratings_alone_have_no_order() -> None:
    found = Rows(TokenizedSet.from_rows(ROWS))[2]
    said = {name: value for name, value in found.items() if value is not None}
    assert {**said, "attributes": None} == {"completion_ids": [[1, 10]], "attributes": None}
    np.testing.assert_array_equal(found["attributes"], [[NAN, 4]])


def test_metrics_are_of_what_the_heads_foretell() -> None:
    index = TokenizedSet.from_rows(ROWS).index
    scores = np.array([1.0, 0.0, 0.5, 1.0, 2.0, -1.0, 3.0])
    foretold = np.arange(14, dtype=np.float64).reshape(7, 2) / 4
    found = evaluate_scores(np.concatenate([scores[:, None], foretold], axis=1), index, OBJECTIVE)
    assert {f"eval_{name}" for name in found} <= {*logged_names([""], OBJECTIVE.attributes)}
    # Each row: squared errors of its rated entries, their mean.
    errors = [
        ((0 - 1) ** 2 + (0.25 - 2) ** 2 + (0.75 - 5) ** 2) / 3,
        (2.25 - 4) ** 2,
        ((2.5 - 1) ** 2 + (3 - 3) ** 2 + (3.25 - 0) ** 2) / 3,
    ]
    compared = math.log(1 + math.exp(-1)) + math.log(1 + math.exp(0.5))
    assert found["loss"] == pytest.approx((compared + 0.5 * sum(errors)) / 4)
    of_good = ((0 - 1) ** 2 + ((2.5 - 1) ** 2 + 0) / 2) / 2
    of_long = (((0.25 - 2) ** 2 + (0.75 - 5) ** 2) / 2 + (2.25 - 4) ** 2 + 3.25**2) / 3
    assert found["attribute_mse_good"] == pytest.approx(of_good)
    assert found["attribute_mse_long"] == pytest.approx(of_long)
    given, told = [2.0, 5, 4, 0], [0.25, 0.75, 2.25, 3.25]
    assert found["attribute_pearson_long"] == pytest.approx(float(np.corrcoef(given, told)[0, 1]))
    # A row that is only rated counts by its ratings: here by one of the first and two of the second.
    assert found["mean_reward"] == pytest.approx((0.5 + 0.75 + 2 + (-1 + 2 * 3) / 3) / 4)
    assert found["accuracy"] == 0.5
    # Rewards alone are measured as they are without attributes.
    plain = evaluate_scores(scores, index, OBJECTIVE)
    assert plain["loss"] == pytest.approx(compared / 4)
    assert "attribute_mse_good" not in plain


def test_a_set_that_rates_nothing_is_refused_and_an_attribute_without_ratings_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    check_rated(TokenizedSet.from_rows(ROWS).index, NAMES, "train")
    assert not caplog.messages
    with pytest.raises(DataError, match="none of all 1 rows of `train` is rated"):
        check_rated(TokenizedSet.from_rows(ROWS[1:2]).index, NAMES, "train")
    check_rated(TokenizedSet.from_rows(ROWS[2:3]).index, NAMES, "train")
    check_rated(TokenizedSet.from_rows(ROWS[1:2]).index, NAMES, "train", is_sample=True)
    assert "no rating by good," in caplog.messages[0]
    assert "the first 1 rows of `train` have no rating by good, long," in caplog.messages[1]


def test_rated_rows_made_in_memory_are_a_run_s_by_their_number_of_attributes(tmp_path: Path) -> None:
    whole = TokenizedSet.from_rows(ROWS)

    def given(*names: str) -> TokenizedSet:
        args = RewardConfig(attributes=list(names))
        return RunData(tiny_tokenizer(), args, DataConfig(), tmp_path / "q.jsonl").ingest(
            whole, "train", None
        )

    assert given(*NAMES) is whole
    for names in ([], ["good"], ["good", "long", "odd"]):
        with pytest.raises(DataError, match=r"was read for 2 `attributes`"):
            given(*names)


def test_new_heads_differ_and_begin_with_the_model_s_own_reward() -> None:
    model = tiny_model(seed=1)
    give_attributes(model, RewardConfig(attributes=["a", "b", "c"], seed=3), None)
    head = attribute_head_of(model)
    assert head is not None
    own = model.score.weight
    assert head.folded().shape == own.shape
    assert (head.folded() - own).abs().max().item() < 1e-7
    assert 0.01 < (head.weight[0] - head.weight[1]).std().item() < 0.06
    assert not [name for name, _ in model.named_parameters() if "attribute" in name]
    again = tiny_model(seed=1)
    give_attributes(again, RewardConfig(attributes=["a", "b", "c"], seed=3), None)
    other = attribute_head_of(again)
    assert other is not None
    assert torch.equal(head.weight, other.weight)
    give_attributes(model, RewardConfig(), None)
    assert attribute_head_of(model) is None


def save_rated(directory: Path) -> AttributeHead:
    """A model with heads, as training leaves one."""
    model = tiny_model(seed=1)
    give_attributes(model, RewardConfig(attributes=list(NAMES)), None)
    head = attribute_head_of(model)
    assert head is not None
    with torch.no_grad():
        head.gate[0], head.offset[1] = 0.25, -3.0
    put_reward(own_layer(model), reward_of(head))
    save_model(model, tiny_tokenizer(), directory, text_form="standard")
    return head


def same(head: AttributeHead, other: AttributeHead | None) -> bool:
    """Whether they are equal in all that is trained."""
    states = [] if other is None else [head.state_dict(), other.state_dict()]
    return bool(states) and all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_saved_heads_go_on_under_their_names_and_else_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    head, place = save_rated(tmp_path), str(tmp_path)
    file = heads_file(place)
    assert file is not None
    assert read_heads(file).names == NAMES
    again = load_model(place)
    give_attributes(again, RewardConfig(attributes=list(NAMES)), place)
    assert same(head, attribute_head_of(again))
    for names in (["long", "good"], []):
        model = load_model(place)
        own = model.score.weight.clone()
        give_attributes(model, RewardConfig(attributes=names), place)
        named = ", ".join(names) or "none"
        assert f"has heads for good, long, and `attributes` names {named}" in caplog.messages[-1]
        new = attribute_head_of(model)
        assert torch.equal(model.score.weight, own)
        assert new is None if not names else new is not None and not new.gate.any()
    # A plain model saved over it leaves nothing that is another's.
    save_model(tiny_model(), tiny_tokenizer(), tmp_path, text_form="standard")
    assert heads_file(place) is None


def test_a_model_in_memory_keeps_the_reward_that_it_was_given_with(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    head, rated = save_rated(tmp_path), RewardConfig(attributes=list(NAMES), use_cpu=True)
    given = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert same(head, attribute_head_of(build_model(ModelSource(given), rated, tiny_tokenizer())))
    # Trained since, be it a little: neither its directory's heads are its own now, nor those beside it.
    for fresh in (False, True):
        if fresh:
            given = AutoModelForSequenceClassification.from_pretrained(tmp_path)
        with torch.no_grad():
            given.score.weight += 1e-5
        own = given.score.weight.detach().clone()
        found = attribute_head_of(build_model(ModelSource(given), rated, tiny_tokenizer()))
        assert found is not None
        assert (found.folded() - own).abs().max().item() < 1e-7
        assert "they make another reward than its own head: they are left out" in caplog.messages[-1]
        assert torch.equal(given.score.weight, own)


def test_heads_of_a_hub_name_are_taken_from_where_its_weights_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--me--rater"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    head = save_rated(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def built(*names: str) -> AttributeHead | None:
        caplog.clear()
        config = RewardConfig(attributes=list(names), use_cpu=True)
        return attribute_head_of(build_model(ModelSource("me/rater"), config, tiny_tokenizer()))

    assert same(head, built(*NAMES))
    # Whether there are some, nobody can tell of a model that was fetched without them.
    (snapshot / HEADS_FILE).unlink()
    new = built(*NAMES)
    assert new is not None
    assert not new.gate.any()
    assert "whether `me/rater` has heads for attributes" in caplog.text
    assert built() is None
    assert "me/rater" not in caplog.text
    absent = repository / ".no_exist" / commit / HEADS_FILE
    absent.parent.mkdir(parents=True)
    absent.touch()
    assert built(*NAMES) is not None
    assert "whether" not in caplog.text


@pytest.mark.parametrize("family", ["bert", "deberta_v2", "roberta"])
def test_a_head_of_several_layers_is_refused_by_name(family: str) -> None:
    config = copy.deepcopy(ENCODERS[family])
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config)
    if family != "roberta":
        give_attributes(model, RewardConfig(attributes=["a", "b"]), None)
        head = attribute_head_of(model)
        assert head is not None
        assert head.bias is not None
        return
    with pytest.raises(ModelError, match="`classifier` of RobertaForSequenceClassification is a Roberta"):
        give_attributes(model, RewardConfig(attributes=["a", "b"]), None)


def test_such_a_head_is_refused_before_a_worker_starts(tmp_path: Path) -> None:
    names = RewardConfig(attributes=["a", "b"], bf16=False)
    for family, refused in (("roberta", True), ("llama", False)):
        source = ModelSource(str(save_base(family, tmp_path / family, saved_as="body")))
        check_source(source, RewardConfig(bf16=False))
        given = AutoModelForSequenceClassification.from_pretrained(tmp_path / family, num_labels=1)
        for one in (source, ModelSource(given)):
            with pytest.raises(ModelError, match="one linear layer") if refused else contextlib.nullcontext():
                check_source(one, names)
    parts = RewardConfig(attributes=["a"], zero_stage=3, zero_init=True, bf16=False)
    with pytest.raises(ConfigError, match="around its own head"):
        check_source(ModelSource(str(tmp_path / "llama")), parts)


def test_gate_and_offsets_do_not_decay_and_an_optimizer_in_memory_is_refused() -> None:
    beside = torch.nn.Module()
    beside.attributes = AttributeHead(NAMES, torch.zeros(2, 4), None)
    decayed, free = make_optimizer(beside, RewardConfig(weight_decay=0.1, use_cpu=True)).param_groups
    assert [parameter.shape for parameter in decayed["params"]] == [(2, 4)]
    assert free["weight_decay"] == 0.0
    assert len(free["params"]) == 2
    optimizer = torch.optim.SGD(tiny_model().parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="before the heads of `attributes`"):
        check_optimizers(
            (optimizer, None), None, RewardConfig(attributes=["a"]), num_workers=0, has_adapter=False
        )
