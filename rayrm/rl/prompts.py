"""What a policy answers: rows with a `prompt`, as sources hold them and as TRL takes them."""

from __future__ import annotations

import json
import logging
from typing import Any

from datasets import Dataset

from rayrm.data.messages import shown
from rayrm.data.selection import prompt_hash, prompt_text
from rayrm.errors import DataError, RowError
from rayrm.serve.score_file import read_rows

logger = logging.getLogger("rayrm.rl")

OF_TEMPLATE = ("tools", "chat_template_kwargs")
Rows = list[dict[str, Any]]


def read_prompts(source: str, most: int | None = None) -> Rows:
    """The rows of a source that have a `prompt`, without the columns of preferences.

    Other columns go to the reward as they are. Raises DataError naming the row that has no prompt.
    """
    rows: Rows = []
    for where, row in read_rows(source):
        prompt = row.get("prompt") if isinstance(row, dict) else None
        if not prompt:
            raise DataError(
                f"{where}: `prompt` ({prompt!r}) must be a string or a message list [{{'role': 'user', "
                "'content': ...}]. Give rows with a prompt, or rename the column that holds it."
            )
        try:
            prompt_text(prompt)
        except RowError as error:
            raise DataError(f"{where}: {error}.") from error
        if rows and isinstance(prompt, str) != isinstance(rows[0]["prompt"], str):
            here, before = ("string", "message list")[:: 1 if isinstance(prompt, str) else -1]
            raise DataError(
                f"{where}: `prompt` ({shown(prompt)}) is a {here}, and each before it is a {before}. Convert "
                "them to what the reward model was trained on."
            )
        rows.append({key: value for key, value in row.items() if key not in ("chosen", "rejected")})
        if most is not None and len(rows) >= most:
            break
    if not rows:
        raise DataError(f"{source} holds no rows. Give rows with a `prompt`.")
    return rows


def without_heldout(rows: Rows, heldout: Rows) -> Rows:
    """The rows whose prompt is not held out; the log counts the others. DataError where none is left.

    Prompts are compared as `exclude_prompts_of` compares them: up to case, space and punctuation.
    """
    if heldout and isinstance(rows[0]["prompt"], str) != isinstance(heldout[0]["prompt"], str):
        raise DataError(
            "of the prompts to train on and those held out, some are strings and others message lists. "
            "Convert them to what the reward model was trained on."
        )
    kept_out = {prompt_hash(prompt_text(row["prompt"])) for row in heldout}
    kept = [row for row in rows if prompt_hash(prompt_text(row["prompt"])) not in kept_out]
    if not kept:
        raise DataError(
            "every prompt to train on is held out too, up to case, space and punctuation, and what is held "
            "out is not trained on. Hold out fewer, or give other prompts."
        )
    if len(kept) < len(rows):
        logger.warning(
            "%d of %d prompts to train on are held out too: left out", len(rows) - len(kept), len(rows)
        )
    return kept


def prompt_set(rows: Rows) -> Dataset:
    """Rows as a data set, with every column that any of them has.

    What the chat template is given differs in shape from row to row, and is JSON text here: a table would
    fill each entry with the keys of all others.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return Dataset.from_list([{name: _cell(name, row.get(name)) for name in columns} for row in rows])


def _cell(name: str, value: Any) -> Any:
    is_open = name in OF_TEMPLATE and value is not None and not isinstance(value, str)
    return json.dumps(value) if is_open else value
