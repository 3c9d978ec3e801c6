"""One text has one sequence of ids, TRL's, and a pair is cut at its longest common token prefix."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrm.data.preference import PreferenceRow, parse_row
from rayrm.data.tokenize import TextInput, TokenizedRow, encode, prepare_tokenizer, tokenize_rows
from rayrm.errors import ConfigError, RowError, ScoreError
from tests.tiny import CHAT_TEMPLATE, tiny_rows, tiny_tokenizer

BOS_TEMPLATE = "{{ bos_token }}" + CHAT_TEMPLATE
STYLED_TEMPLATE = "{{ style | default('plain') }}" + CHAT_TEMPLATE


def trl_ids(
    tokenizer: Any, rows: list[dict[str, Any]], max_length: int | None = None
) -> list[tuple[list[int], list[int]]]:
    """What the installed TRL makes of these rows before its collator sees them."""
    from trl.trainer.reward_trainer import RewardTrainer

    args = SimpleNamespace(dataset_num_proc=None, max_length=max_length)
    made = RewardTrainer._prepare_dataset(None, datasets.Dataset.from_list(rows), tokenizer, args, "train")
    return [(row["chosen_ids"], row["rejected_ids"]) for row in made]


def our_ids(
    tokenizer: Any, rows: list[dict[str, Any]], max_length: int | None = None
) -> list[tuple[list[int], list[int]]]:
    pairs = tokenize_rows(tokenizer, [parse_row(row) for row in rows], max_length)
    kept = [pair for pair in pairs if isinstance(pair, TokenizedRow)]
    return [tuple(ids.tolist() for ids in pair.sequences) for pair in kept]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("conversational", [False, True])
@pytest.mark.parametrize("explicit_prompt", [False, True])
def test_ids_are_those_of_trl_for_every_text_form(
    bos: bool, conversational: bool, explicit_prompt: bool
) -> None:
    rows = tiny_rows(12, conversational=conversational, explicit_prompt=explicit_prompt)
    tokenizer = tiny_tokenizer(bos=bos)
    assert our_ids(tokenizer, rows) == trl_ids(tokenizer, rows)


def test_ids_are_those_of_trl_where_a_completion_ends_in_eos_already() -> None:
    rows = [
        {"prompt": "the cat", "chosen": " runs</s>", "rejected": " sits"},
        {"prompt": "the dog</s>", "chosen": " runs", "rejected": " sits</s>"},
    ]
    tokenizer = tiny_tokenizer(bos=True)
    ids = our_ids(tokenizer, rows)
    assert ids == trl_ids(tokenizer, rows)
    for side in (side for pair in ids for side in pair):
        assert side[-1] == tokenizer.eos_token_id
        assert side[-2] != tokenizer.eos_token_id


def test_ids_are_those_of_trl_with_tools_and_template_kwargs() -> None:
    tokenizer = tiny_tokenizer(bos=True)
    tokenizer.chat_template = STYLED_TEMPLATE
    rows = tiny_rows(4, conversational=True)
    rows = [
        {**row, "tools": '[{"name": "look"}]', "chat_template_kwargs": {"style": f"style {number}"}}
        for number, row in enumerate(rows)
    ]
    ids = our_ids(tokenizer, rows)
    assert ids == trl_ids(tokenizer, rows)
    shown = tokenizer.decode(ids[3][0])
    assert "style 3" in shown
    assert "look" in shown


def test_ids_are_those_of_trl_where_the_template_writes_bos() -> None:
    tokenizer = tiny_tokenizer(bos=True)
    tokenizer.chat_template = BOS_TEMPLATE
    rows = tiny_rows(4, conversational=True)
    ids = our_ids(tokenizer, rows)
    assert ids == trl_ids(tokenizer, rows)
    assert [side.count(tokenizer.bos_token_id) for pair in ids for side in pair] == [1] * 8


def test_pairs_above_max_length_go_where_trl_filters_them() -> None:
    rows, tokenizer = tiny_rows(40), tiny_tokenizer()
    kept = our_ids(tokenizer, rows, max_length=25)
    assert 0 < len(kept) < 40
    assert kept == trl_ids(tokenizer, rows, max_length=25)


def test_a_side_of_exactly_max_length_is_kept() -> None:
    pair = PreferenceRow((), ids=([5] * 4, [6] * 3))
    kept, dropped = (tokenize_rows(tiny_tokenizer(), [pair], limit)[0] for limit in (4, 3))
    assert isinstance(kept, TokenizedRow)
    assert isinstance(dropped, RowError)
    assert dropped.reason == "too-long"


def test_a_ranking_has_the_ids_of_its_completions_pair_by_pair() -> None:
    pairs, tokenizer = tiny_rows(2), tiny_tokenizer()
    prompt = pairs[0]["prompt"]
    completions = [pairs[0]["chosen"], pairs[0]["rejected"], pairs[1]["chosen"]]
    ranking = {"prompt": prompt, "completions": completions, "ranks": [1, 2, 0], "margin": 0.25}
    (row,) = tokenize_rows(tokenizer, [parse_row(ranking)], None)
    assert isinstance(row, TokenizedRow)
    alone = [{"prompt": prompt, "chosen": one, "rejected": "else"} for one in completions]
    assert [ids.tolist() for ids in row.sequences] == [chosen for chosen, _ in our_ids(tokenizer, alone)]
    assert row.compared() == [(0, 1), (2, 0), (2, 1)]
    assert (row.ranks, row.margin) == ((1, 2, 0), 0.25)


def test_a_ranking_with_one_completion_above_max_length_is_left_out_whole() -> None:
    ranking = PreferenceRow((), (0, 1, 2), ids=([5], [6], [7] * 4), names=("a", "b", "c"))
    kept, dropped = (tokenize_rows(tiny_tokenizer(), [ranking], limit)[0] for limit in (4, 3))
    assert isinstance(kept, TokenizedRow)
    assert isinstance(dropped, RowError)
    assert (dropped.reason, "`c` has 4 tokens" in str(dropped)) == ("too-long", True)


def test_equal_completions_may_be_tied_but_not_ranked() -> None:
    ids = ([5, 6], [7], [5, 6])
    tied, ranked = (
        tokenize_rows(tiny_tokenizer(), [PreferenceRow((), ranks, ids=ids, names=("a", "b", "c"))], None)[0]
        for ranks in ((0, 1, 0), (0, 1, 2))
    )
    assert isinstance(tied, TokenizedRow)
    assert tied.compared() == [(0, 1), (2, 1)]
    assert isinstance(ranked, RowError)
    assert (ranked.reason, "`a` and `c`" in str(ranked)) == ("identical", True)


@pytest.mark.parametrize("conversational", [False, True])
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("template", [CHAT_TEMPLATE, BOS_TEMPLATE])
def test_rendered_text_has_the_ids_of_what_it_was_rendered_from(
    conversational: bool, bos: bool, template: str
) -> None:
    tokenizer = tiny_tokenizer(bos=bos)
    tokenizer.chat_template = template
    form = "conversational" if conversational else "standard"
    for row in tiny_rows(4, conversational=conversational):
        if conversational:
            text = tokenizer.apply_chat_template(row["prompt"] + row["chosen"], tokenize=False)
        else:
            text = row["prompt"] + row["chosen"]
        # With the template's BOS, without it, and with BOS and EOS as a decoded rollout has them.
        variants = [text, text.removeprefix("<s>")]
        if bos and not conversational:
            variants += ["<s>" + text, "<s>" + text + "</s>"]
        inputs = [TextInput(row["prompt"], row["chosen"])]
        inputs += [TextInput(None, variant, rendered=True) for variant in variants]
        inputs += [TextInput(variant[:5], variant[5:], rendered=True) for variant in variants]
        first, *others = (ids.tolist() for ids in encode(tokenizer, form, inputs))
        assert all(ids == first for ids in others)


def test_ids_do_not_depend_on_what_else_is_encoded() -> None:
    tokenizer = tiny_tokenizer(bos=True)
    inputs = [TextInput(row["prompt"], row["chosen"]) for row in tiny_rows(9)]
    together = encode(tokenizer, "standard", inputs)
    for entry, ids in zip(inputs, together, strict=True):
        alone = encode(tokenizer, "standard", [entry])[0]
        assert alone.dtype == ids.dtype == np.int32
        assert alone.tolist() == ids.tolist()
    assert encode(tokenizer, "standard", []) == []


def test_an_empty_completion_can_be_scored() -> None:
    tokenizer = tiny_tokenizer()
    assert encode(tokenizer, "standard", [TextInput("", "")])[0].tolist() == [tokenizer.eos_token_id]


MESSAGES: Any = [{"role": "user", "content": "why"}]
ANSWER: Any = [{"role": "assistant", "content": "no"}]


@pytest.mark.parametrize(
    ("form", "entry", "says"),
    [
        ("conversational", TextInput("why", "no"), "pass message lists .* or rendered=True"),
        ("standard", TextInput(MESSAGES, MESSAGES), "pass strings"),
        ("conversational", TextInput("why", MESSAGES), "both must be"),
        ("conversational", TextInput(None, MESSAGES, rendered=True), "rendered=False"),
        ("conversational", TextInput(None, [{"role": "robot", "content": "x"}]), "'robot'"),
        ("standard", TextInput("why", "\ud800"), "UTF-8"),
        ("standard", TextInput("why", None), "`completion` .None. is NoneType"),  # type: ignore[arg-type]
        ("conversational", TextInput(None, MESSAGES), "`completion` ends with a message of role 'user'"),
        ("conversational", TextInput(MESSAGES, MESSAGES + ANSWER), "`completion` starts with"),
        ("conversational", TextInput(MESSAGES, []), "has no message"),
        ("standard", TextInput("why", "no", [{"name": "add"}]), "`tools` beside a string"),
    ],
)
def test_an_input_of_the_other_form_is_refused_with_the_fix(form: Any, entry: TextInput, says: str) -> None:
    with pytest.raises(ScoreError, match=says):
        encode(tiny_tokenizer(), form, [entry])


def test_an_empty_answer_of_the_assistant_can_be_scored() -> None:
    empty: Any = [{"role": "assistant", "content": ""}]
    (ids,) = encode(tiny_tokenizer(), "conversational", [TextInput(MESSAGES, empty)])
    assert len(ids) > 0


@pytest.mark.parametrize("tools", [None, [{"name": "add"}]])
def test_parts_that_the_template_prints_as_they_are_are_refused(tools: Any) -> None:
    """In scoring and in training: it would be a Python list that is scored, and not the text."""
    parts: Any = [{"role": "assistant", "content": [{"type": "text", "text": "it's so"}]}]
    tokenizer = tiny_tokenizer()
    entry = TextInput(MESSAGES, parts, tools)
    with pytest.raises(ScoreError, match=r"prints content as it is.*pass the text as one string"):
        encode(tokenizer, "conversational", [entry])
    rows = [{"prompt": MESSAGES, "chosen": chosen, "rejected": ANSWER, "tools": tools} for chosen in (
        parts, [{"role": "assistant", "content": "it is"}]
    )]  # fmt: skip
    refused, kept = tokenize_rows(tokenizer, [parse_row(row) for row in rows], None)
    assert isinstance(kept, TokenizedRow)
    assert isinstance(refused, RowError)
    assert refused.reason == "template-refused"
    assert "prints content as it is" in str(refused)
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>"
        "{% if m['content'] is string %}{{ m['content'] }}"
        "{% else %}{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endif %}<|end|>{% endfor %}"
    )
    string: Any = [{"role": "assistant", "content": "it's so"}]
    in_parts, in_one = encode(tokenizer, "conversational", [entry, TextInput(MESSAGES, string, tools)])
    assert in_parts.tolist() == in_one.tolist()


def test_messages_without_a_chat_template_name_the_setting() -> None:
    with pytest.raises(ConfigError, match="chat_template_path"):
        encode(tiny_tokenizer(chat=False), "conversational", [TextInput(None, MESSAGES)])


def test_a_row_that_the_template_refuses_does_not_take_its_neighbours_along() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% if 'blue 2?' in messages[0]['content'] %}{{ raise_exception('not blue') }}{% endif %}"
        + CHAT_TEMPLATE
    )
    rows = tiny_rows(5, conversational=True)
    rows[2]["prompt"][0]["content"] = "blue 2?"
    outcomes = tokenize_rows(tokenizer, [parse_row(row) for row in rows], None)
    assert [isinstance(outcome, TokenizedRow) for outcome in outcomes] == [True, True, False, True, True]
    assert isinstance(outcomes[2], RowError)
    assert outcomes[2].reason == "template-refused"
    assert "not blue" in str(outcomes[2])


def test_ids_outside_the_vocabulary_are_refused() -> None:
    outcome = tokenize_rows(tiny_tokenizer(), [PreferenceRow((), ids=([400], [1]))], None)[0]
    assert isinstance(outcome, RowError)
    assert (outcome.reason, "400" in str(outcome)) == ("bad-ids", True)


SIDES = st.lists(st.integers(0, 3), min_size=1, max_size=8)


@given(SIDES, SIDES)
def test_a_pair_is_cut_at_the_longest_common_prefix_and_gives_its_sides_back(
    chosen: list[int], rejected: list[int]
) -> None:
    given_ids = PreferenceRow((), margin=0.5, ids=(chosen, rejected))
    outcome = tokenize_rows(_TOKENIZER, [given_ids], None)[0]
    if chosen == rejected:
        assert isinstance(outcome, RowError)
        assert outcome.reason == "identical"
        return
    assert isinstance(outcome, TokenizedRow)
    assert outcome.ids.dtype == np.int32
    assert [ids.tolist() for ids in outcome.sequences] == [chosen, rejected]
    assert outcome.lengths == (len(chosen), len(rejected))
    assert (outcome.compared(), outcome.margin) == ([(0, 1)], 0.5)
    prefix = outcome.prefix_length
    assert chosen[:prefix] == rejected[:prefix]
    assert chosen[: prefix + 1] != rejected[: prefix + 1]
    assert len(outcome.ids) == len(chosen) + len(rejected) - prefix


_TOKENIZER = tiny_tokenizer()


def test_pad_falls_back_to_the_tokenizers_then_to_eos() -> None:
    def pad_after(pad: str | None, setting: str | None) -> str:
        tokenizer = tiny_tokenizer()
        tokenizer.pad_token = pad
        prepared = prepare_tokenizer(
            tokenizer, eos_token="<|end|>", pad_token=setting, chat_template_path=None
        )
        assert prepared.eos_token == "<|end|>"
        return str(prepared.pad_token)

    assert pad_after("<pad>", "<s>") == "<s>"
    assert pad_after("<pad>", None) == "<pad>"
    assert pad_after(None, None) == "<|end|>"


@pytest.mark.parametrize("setting", ["eos_token", "pad_token"])
def test_a_special_token_outside_the_vocabulary_is_an_error_that_names_it(setting: str) -> None:
    settings = {"eos_token": None, "pad_token": None, setting: "<nowhere>"}
    with pytest.raises(ConfigError, match=f"`{setting}` \\('<nowhere>'\\)"):
        prepare_tokenizer(tiny_tokenizer(), chat_template_path=None, **settings)


def test_a_tokenizer_without_pad_and_eos_needs_the_setting() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="`pad_token`"):
        prepare_tokenizer(tokenizer, eos_token=None, pad_token=None, chat_template_path=None)


@pytest.mark.parametrize("suffix", [".jinja", ".j2"])
def test_a_template_file_is_taken_verbatim(tmp_path: Path, suffix: str) -> None:
    text = "{# é #}\n" + CHAT_TEMPLATE + "\n\n"
    path = tmp_path / f"chat{suffix}"
    path.write_text(text, encoding="utf-8")
    tokenizer = tiny_tokenizer(chat=False)
    prepare_tokenizer(tokenizer, eos_token=None, pad_token=None, chat_template_path=path)
    assert tokenizer.chat_template == text


def test_a_template_is_taken_from_another_tokenizer_with_its_eos_and_tokens(tmp_path: Path) -> None:
    other = tiny_tokenizer()
    other.add_special_tokens({"eos_token": "<|over|>"})
    other.save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer(chat=False)
    prepare_tokenizer(tokenizer, eos_token=None, pad_token=None, chat_template_path=tmp_path)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|over|>", 400)


@pytest.mark.parametrize("name", ["missing.jinja", "missing"])
def test_a_template_that_cannot_be_had_names_the_setting(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="`chat_template_path`"):
        prepare_tokenizer(
            tiny_tokenizer(), eos_token=None, pad_token=None, chat_template_path=tmp_path / name
        )


def test_a_tokenizer_without_a_template_gives_none(tmp_path: Path) -> None:
    tiny_tokenizer(chat=False).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="gives no chat template"):
        prepare_tokenizer(tiny_tokenizer(), eos_token=None, pad_token=None, chat_template_path=tmp_path)


@given(st.lists(st.tuples(SIDES, st.integers(0, 3)), min_size=2, max_size=6))
def test_a_row_gives_its_sequences_back_and_compares_what_its_ranks_tell_apart(
    completions: list[tuple[list[int], int]],
) -> None:
    sequences = [np.array(ids, np.int32) for ids, _ in completions]
    ranks = [rank for _, rank in completions]
    row = TokenizedRow.of(sequences, ranks)
    assert [ids.tolist() for ids in row.sequences] == [ids for ids, _ in completions]
    beginnings = {tuple(ids[: row.prefix_length]) for ids, _ in completions}
    assert len(beginnings) == 1
    longer = {tuple(ids[: row.prefix_length + 1]) for ids, _ in completions}
    assert len(longer) > 1 or row.prefix_length == min(row.lengths)
    told = {(i, j) for i in range(len(ranks)) for j in range(len(ranks)) if ranks[i] < ranks[j]}
    assert set(row.compared()) == told
    assert len(row.compared()) == len(told)
