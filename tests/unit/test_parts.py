"""A mixture's sources as parts of a set: a source's weight holds for all its files together."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from rayrm.data.blocks import index_of, table_of_rows
from rayrm.data.order import Part
from rayrm.data.tokenize import TokenizedRow
from rayrm.data.tokenized_set import TokenizedSet, assemble
from rayrm.data_settings import DataConfig
from rayrm.errors import DataError
from rayrm.train.train_data import identity_of_data


def set_of(files: list[int], group_of: list[int], weights: list[float]) -> TokenizedSet:
    """A set of files with so many rows each."""
    tables = []
    for source, num_rows in enumerate(files):
        table = table_of_rows([TokenizedRow.pair(np.array([1, 2]), np.array([1, 3]))] * num_rows)
        place = pa.array([source] * num_rows, pa.int32())
        tables.append(table.set_column(table.schema.get_field_index("source"), "source", place))
    names = [f"{source}.jsonl" for source in range(len(files))]
    return assemble("train", names, tables, [index_of(table) for table in tables], group_of, weights)


def test_a_weight_holds_for_all_files_of_its_source_together() -> None:
    mixture = set_of([3] * 10 + [4], [0] * 10 + [1], [0.1, 2.0])
    assert mixture.parts == (Part(30, 0.1), Part(4, 2.0))
    assert mixture.rows_per_epoch == 3 + 8
    assert mixture.shares(["a", "b"]) == [
        "  an epoch shows 3 of a's 30 rows",
        "  an epoch shows 8 of b's 4 rows",
    ]


def test_sources_that_all_weigh_one_are_one_order() -> None:
    assert set_of([3, 4], [0, 1], [1.0, 1.0]).parts == ()


def test_weights_that_leave_no_row_are_refused() -> None:
    with pytest.raises(DataError, match="raise `weight`"):
        set_of([3], [0], [0.1])


def test_a_run_with_other_weights_is_another_run() -> None:
    told = {
        identity_of_data(set_of([4, 4], [0, 1], weights), DataConfig())
        for weights in ([1.0, 1.0], [2.0, 1.0], [1.0, 2.0])
    }
    assert len(told) == 3
