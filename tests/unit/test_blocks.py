"""Tables of tokenized rows: what they hold stays the same, and their index tells the same."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rayrm.data.blocks import SCHEMA, RowBlock, index_of, table_of_rows, tokenized_tables
from rayrm.data.packing import distinct_cost
from rayrm.data.prefix_keys import prefix_keys, text_key
from rayrm.data.sources import Shard, read_work
from rayrm.data.tokenized_set import TokenizedSet, assemble
from tests.tiny import SPECIAL, tiny_rankings, tiny_rows

CHAT = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
)
UNREADABLE = [b"{not json", b'{"chosen": "\xff"}', b"[" * 100_000, b"[]", b"7", b'"chosen"']
REFUSED: list[dict[str, Any]] = [
    {"rejected": "a dog"},
    {"chosen": "a dog"},
    {"chosen": 7, "rejected": "a"},
    {"chosen": " ", "rejected": "a"},
    {"chosen": "a\ud800", "rejected": "a"},
    {"chosen": "the same", "rejected": "the same"},
    {"chosen": "long " * 400, "rejected": "a"},
    {"chosen": "a", "rejected": "b", "margin": "wide"},
    {"chosen": "a", "rejected": "b", "prompt": [{"role": "user", "content": "mixed"}]},
    {"chosen": [{"role": "user", "content": "a"}], "rejected": [{"role": "assistant", "content": "a"}]},
    {"chosen_ids": [1, 400], "rejected_ids": [2]},
    {"chosen_ids": [1, 2]},
    {"completions": ["a", "b"], "ranks": [1, 1]},
    {"completions": ["a", "b"], "ranks": [1]},
    {"completions": ["a"], "ranks": [1]},
    {"prompt": "q", "completions": ["one", "two", "one"], "ranks": [1, 2, 3]},
    {
        "prompt": [{"role": "user", "content": "q"}, {"role": "tool", "content": "refused by the template"}],
        "chosen": [{"role": "assistant", "content": "a"}],
        "rejected": [{"role": "assistant", "content": "b"}],
    },
]
TOKENIZED: list[dict[str, Any]] = [
    {"chosen_ids": [5, 6, 7], "rejected_ids": [5, 6, 8, 9], "margin": 0.5},
    {"chosen_ids": [5], "rejected_ids": [5, 6]},
    {"completions_ids": [[9, 9], [9, 8], [9, 9]], "ranks": [2, 7, 2]},
]
SYSTEM = [{"role": "system", "content": "please sing of the old river and the small green house. " * 4}]


def fixed_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE whose vocabulary is written here, so that its ids do not depend on a trainer."""
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "s"), ("o", "u"), ("Ġ", "b"), ("Ġb", "ou")]
    words = [
        *SPECIAL,
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
        *(left + right for left, right in merges),
    ]
    backend = Tokenizer(models.BPE(vocab={word: place for place, word in enumerate(words)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = CHAT
    return tokenizer


def dialogues() -> list[dict[str, Any]]:
    """Pairs of messages: with a system prompt, with several turns, with special tokens said in a text."""
    rows = tiny_rows(12, seed=1, conversational=True, margin=True)
    rows += [{**row, "prompt": SYSTEM + row["prompt"]} for row in rows[:4]]
    rows += tiny_rows(4, seed=2, conversational=True, explicit_prompt=False)
    for text in ("<|end|>", "<|end|><|user|>", " <s>x", "é ☃ \u2028", "\t\n  ", "<|en", "<|end|"):
        ask = [{"role": "user", "content": text}, {"role": "assistant", "content": f"a {text}"}]
        sides = ([{"role": "assistant", "content": f"{said}{text}"}] for said in ("good", "bad"))
        rows.append({"prompt": ask + SYSTEM, **dict(zip(("chosen", "rejected"), sides, strict=True))})
    return rows


def lines(rows: list[dict[str, Any]]) -> list[bytes]:
    return [json.dumps(row).encode() for row in rows]


SETS = {
    "standard": lines(
        tiny_rows(24, margin=True) + tiny_rows(8, seed=3, explicit_prompt=False) + tiny_rankings(6)
    ),
    "conversational": lines(dialogues() + tiny_rankings(6, seed=4, conversational=True)),
    "tokenized": lines(TOKENIZED),
    "refused": [*UNREADABLE, *lines(REFUSED)],
    "all": [
        *(b"\xef\xbb\xbf" + lines(tiny_rows(1))[0], b" "),
        *(*lines(dialogues()), *lines(REFUSED), *UNREADABLE, *lines(tiny_rankings(3) + TOKENIZED)),
    ],
}
LABELS: dict[str, Any] = {"target": 1.0, "ratings": []}
"""Columns that say nothing of these rows, and of which their fingerprints say nothing."""
UNPINNED = ("message", "prompt", "group")
"""A message may hold Python's own words, which versions change; where a row belongs is none of its text."""
# Of what was made of them first: a change of these numbers is a change of every data set's fingerprint.
PINNED = {
    "standard": "f05c79f5b28794004a9aaad9c68c2e57e79c540f9dbbfeddf3bee3dfadb244db",
    "conversational": "af56a7df37bc577320433c279f9b8124896f6c33899f765ffe641f11a378892b",
    "tokenized": "24dff6e0a1ef2b30fd1d13e3ae51400380015a7787516905c9026784c8b3265e",
    "refused": "202501fc43afa9a5aac31f0866c98a1ef04ce43d16e216d3863e84a30b3bd144",
    "all": "32a83a238efdea4101d9acd6e1db38fba53e33ed73f7de19e919c62d03445667",
}


def tables_of(source: list[bytes], num_rows: int = 16) -> list[pa.Table]:
    Path("rows.jsonl").write_bytes(b"\n".join(source))
    return list(tokenized_tables(read_work(Shard(0, "rows.jsonl")), fixed_tokenizer(), 512, num_rows))


@pytest.fixture(autouse=True)
def in_own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", SETS)
def test_a_source_gives_the_tables_it_always_gave(name: str) -> None:
    tables = tables_of(SETS[name])
    assert all(table.schema.equals(SCHEMA) for table in tables)
    rows = [row for table in tables for row in table.drop_columns([*UNPINNED, *LABELS]).to_pylist()]
    assert all(
        table.column(name).to_pylist() == [LABELS[name]] * len(table) for table in tables for name in LABELS
    )
    content = json.dumps(rows, default=bytes.hex).encode()
    assert hashlib.sha256(content).hexdigest() == PINNED[name]


def test_rows_of_one_prompt_have_one_key_whatever_its_form_and_name_their_group() -> None:
    question, other = "Why is the sky blue?", "Why is the sea salt?"
    answers = [("Air scatters blue most.", "Who knows."), ("Rayleigh scattering.", "It is the sea.")]
    plain = [{"prompt": question, "chosen": a, "rejected": b} for a, b in answers]
    messages = [
        {
            "prompt": [{"role": "user", "content": question}],
            "chosen": [{"role": "assistant", "content": a}],
            "rejected": [{"role": "assistant", "content": b}],
        }
        for a, b in answers
    ]
    rows = [plain[0] | {"source": "one"}, plain[1] | {"subset": "two", "source": "one"}]
    rows += [messages[0] | {"group": "three", "subset": "two"}, messages[1] | {"source": 4}]
    rows.append({**plain[0], "prompt": other})
    labels = assemble_rows(lines(rows)).labels()
    assert labels.groups == ["one", "two", "three", "rows.jsonl", "rows.jsonl"]
    assert len(set(labels.prompts[:4].tolist())) == 1
    assert labels.prompts[4] != labels.prompts[0]


def test_labels_stand_in_the_order_of_the_rows_without_the_refused() -> None:
    rows = [row | {"subset": str(number)} for number, row in enumerate(tiny_rows(12))]
    rows[3:5] = [{"chosen": "no rejected", "subset": "refused"}, {"subset": "refused"}]
    found = assemble_rows(lines(rows), num_rows=5)
    names = [found.name_of(row).rpartition(":")[2] for row in found.fetch(range(found.num_rows))]
    assert found.labels().groups == [str(int(name) - 1) for name in names]
    assert "refused" not in found.labels().groups


def assemble_rows(source: list[bytes], num_rows: int = 16) -> TokenizedSet:
    tables = tables_of(source, num_rows)
    return assemble("rows", ["rows.jsonl"], tables, [index_of(table) for table in tables])


def test_every_row_is_in_its_place_accepted_or_refused_with_its_reason() -> None:
    table = pa.concat_tables(tables_of(SETS["refused"], num_rows=3))
    assert table.column("row").to_pylist() == list(range(len(SETS["refused"])))
    assert table.column("reason").to_pylist() == [
        *("bad-json", "not-utf8", "bad-json", "not-an-object", "not-an-object", "not-an-object"),
        *("missing-chosen", "missing-rejected", "wrong-type", "empty-completion", "not-utf8", "identical"),
        *("too-long", "bad-margin", "mixed-forms", "bad-roles", "bad-ids", "missing-rejected", "all-tied"),
        *("bad-ranks", "too-few-completions", "identical", "template-refused"),
    ]
    for number, message in enumerate(table.column("message").to_pylist(), 1):
        assert message.startswith(f"rows.jsonl:{number}: ")
    index = index_of(table)
    assert (len(index.row), index.rows.num_rows, index.digest.shape) == (0, 0, (0, 16))
    assert [refusal.row for refusal in index.refusals] == table.column("row").to_pylist()
    assert index.num_rows == len(table)
    assert index.forms == {"standard": (0, 11), "tokenized": (0, 16), "conversational": (0, 22)}


@pytest.mark.parametrize("name", SETS)
def test_the_index_tells_of_each_row_what_its_ids_say(name: str) -> None:
    for table in tables_of(SETS[name]):
        index, block = index_of(table), RowBlock(table)
        rows = [block.row(offset) for offset in index.offset.tolist()]
        kept = [row for row in table.to_pylist() if row["reason"] is None]
        assert [(row["source"], row["row"]) for row in kept] == list(
            zip(index.source.tolist(), index.row.tolist(), strict=True)
        )
        assert index.rows.prefix_lengths.tolist() == [row.prefix_length for row in rows]
        assert index.rows.margins.tolist() == [row.margin for row in rows]
        assert index.rows.lengths.tolist() == [length for row in rows for length in row.lengths]
        assert index.rows.ranks.tolist() == [rank for row in rows for rank in row.ranks]
        assert index.rows.num_completions.tolist() == [len(row.lengths) for row in rows]
        assert index.rows.text_keys.tolist() == [text_key(ids) for row in rows for ids in row.sequences]
        assert index.rows.prefix_keys.tolist() == [
            prefix_keys(row.ids, row.prefix_length).tolist() for row in rows
        ]
        costs = [distinct_cost(row.sequences) for row in rows]
        assert list(zip(index.rows.distinct_tokens, index.rows.distinct_attention, strict=True)) == costs
        assert index.digest.tobytes() == b"".join(row["digest"] for row in kept)
        assert len({digest.tobytes() for digest in index.digest}) == len(
            {(row.ids.tobytes(), row.prefix_length, row.lengths, row.ranks, row.margin) for row in rows}
        )


def test_tokenized_rows_given_as_rows_make_the_table_that_their_source_makes() -> None:
    (table,) = tables_of(SETS["tokenized"])
    rows = [RowBlock(table).row(offset) for offset in range(len(table))]
    assert table_of_rows(rows).equals(table)


def test_a_table_without_rows_has_an_index_without_rows() -> None:
    for empty in (table_of_rows([]), SCHEMA.empty_table(), pa.table({})):
        index = index_of(empty)
        assert (index.num_rows, index.rows.num_rows, index.refusals, index.forms) == (0, 0, [], {})
        assert (index.digest.shape, index.rows.prefix_keys.shape) == ((0, 16), (0, 8))
        assert index.source.dtype == index.row.dtype == np.int64
    assert tables_of([]) == tables_of([b" ", b""]) == []
