"""A step's plan over any rows: each row once, under the budget, on ranks of like cost and equal counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrm.data.blocks import index_of, table_of_rows
from rayrm.data.loads import RowCosts, SharedTexts
from rayrm.data.planning import Microbatch, plan_step
from rayrm.data.prefix_keys import BOUNDARIES
from rayrm.data.tokenize import TokenizedRow
from rayrm.errors import ConfigError

TOKENS = st.lists(st.integers(1, 50), min_size=1, max_size=40)
WEIGHTS = st.sampled_from([0.0, 0.01, 0.3])
Plan = list[list[Microbatch]]


def alone(tokens: list[int]) -> RowCosts:
    """Rows that share nothing with each other, each one causal sequence."""
    counts = np.asarray(tokens, np.int64)
    return RowCosts(counts, counts * (counts + 1) // 2)


@dataclass(frozen=True)
class Step:
    """Rows made of real ids: `sequences[i]` are row i's, and `rows` says what a plan is told of them."""

    sequences: list[list[bytes]]
    rows: RowCosts

    @classmethod
    def of(cls, rows: list[list[npt.NDArray[np.int32]]]) -> Step:
        """As an index tells a plan."""
        made = [TokenizedRow.of(texts, range(len(texts)), 0.0) for texts in rows]
        costs = index_of(table_of_rows(made)).rows.costs(share=True)
        return cls([[ids.tobytes() for ids in texts] for texts in rows], costs)

    @property
    def shared(self) -> SharedTexts:
        assert self.rows.shared is not None
        return self.rows.shared

    def distinct_tokens(self, wanted: tuple[int, ...] | range) -> int:
        """By definition: how many distinct beginnings the rows' sequences have."""
        return len(self._beginnings(wanted))

    def cost(self, wanted: tuple[int, ...], weight: float) -> float:
        """Distinct tokens, and for each the keys it sees: all the tokens before it and itself."""
        return sum(1 + weight * len(head) / 4 for head in self._beginnings(wanted))

    def _beginnings(self, wanted: tuple[int, ...] | range) -> set[bytes]:
        ids = (ids for row in wanted for ids in self.sequences[row])
        return {ids[:end] for ids in ids for end in range(4, len(ids) + 1, 4)}


@st.composite
def steps(draw: st.DrawFn) -> Step:
    """Rows under a few prompts, which may begin alike themselves; rows have two or three sequences."""
    system = draw(st.integers(0, 40))
    prompts = draw(st.lists(st.integers(0, 70), min_size=1, max_size=4))
    kinds = st.tuples(
        st.integers(0, len(prompts) - 1),
        st.lists(st.integers(1, 60), min_size=2, max_size=3),
        st.integers(0, 2**16),
    )
    rows = []
    for prompt, tails, seed in draw(st.lists(kinds, min_size=1, max_size=20)):
        begin = np.arange(system + prompts[prompt], dtype=np.int32)
        begin[system:] += 100_000 * (prompt + 1)
        rng = np.random.default_rng(seed)
        rows.append([np.concatenate([begin, rng.integers(1, 2**20, n, dtype=np.int32)]) for n in tails])
    return Step.of(rows)


@st.composite
def comparisons(draw: st.DrawFn) -> Step:
    """Pairs drawn from the completions of a few prompts, in any order: a completion stands in several."""
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    rows = []
    for prompt in range(draw(st.integers(1, 4))):
        begin = rng.integers(1, 2**20, draw(st.integers(1, 70)), dtype=np.int32)
        lengths = draw(st.lists(st.integers(1, 60), min_size=2, max_size=5))
        texts = [np.concatenate([begin, rng.integers(1, 2**20, n, dtype=np.int32)]) for n in lengths]
        pairs = [[one, other] for i, one in enumerate(texts) for other in texts[:i]]
        rows += draw(st.lists(st.sampled_from(pairs), min_size=1, max_size=8)) if prompt else pairs
    return Step.of(draw(st.permutations(rows)))


def triangle(length: int) -> int:
    return length * (length + 1) // 2


def real(plan: list[Microbatch]) -> list[Microbatch]:
    """A rank's micro-batches without the dummies."""
    return [microbatch for microbatch in plan if microbatch.weights[0]]


def check_every_row_once(plans: Plan, num_rows: int, num_ranks: int) -> None:
    assert len(plans) == num_ranks
    assert len({len(plan) for plan in plans}) == 1
    assert len(plans[0]) >= 1
    weights: Counter[int] = Counter()
    for microbatch in (microbatch for plan in plans for microbatch in plan):
        assert len(microbatch.rows) == len(microbatch.weights) >= 1
        assert list(microbatch.rows) == sorted(set(microbatch.rows))
        # A dummy is a micro-batch of its own: its cost buys nothing.
        assert set(microbatch.weights) in ({1.0}, {0.0})
        for row, weight in zip(microbatch.rows, microbatch.weights, strict=True):
            weights[row] += int(weight)
    assert weights == dict.fromkeys(range(num_rows), 1)


@given(TOKENS, st.integers(1, 5), st.integers(50, 120), WEIGHTS)
def test_every_row_is_planned_once_and_no_microbatch_exceeds_the_budget(
    tokens: list[int], num_ranks: int, max_tokens: int, weight: float
) -> None:
    plans = plan_step(alone(tokens), num_ranks=num_ranks, max_tokens=max_tokens, attention_weight=weight)
    check_every_row_once(plans, len(tokens), num_ranks)
    for microbatch in (microbatch for plan in plans for microbatch in plan):
        assert sum(tokens[row] for row in microbatch.rows) <= max_tokens


@given(st.one_of(steps(), comparisons()), st.integers(1, 4), st.integers(0, 600), WEIGHTS)
def test_with_shared_beginnings_too_the_distinct_tokens_stay_under_the_budget(
    step: Step, num_ranks: int, room: int, weight: float
) -> None:
    max_tokens = int(step.rows.tokens.max()) + room
    plans = plan_step(step.rows, num_ranks=num_ranks, max_tokens=max_tokens, attention_weight=weight)
    check_every_row_once(plans, len(step.sequences), num_ranks)
    for microbatch in (microbatch for plan in plans for microbatch in plan):
        assert step.distinct_tokens(microbatch.rows) <= max_tokens


PADDED = st.lists(st.tuples(st.integers(2, 4), st.integers(1, 50)), min_size=1, max_size=40)


def padded(rows: list[tuple[int, int]]) -> RowCosts:
    """Rows of (number of sequences, length of the longest)."""
    tokens = np.array([count * longest for count, longest in rows])
    return RowCosts(tokens, tokens, padded=np.array(rows))


def padded_tokens(rows: list[tuple[int, int]]) -> int:
    return sum(count for count, _ in rows) * max(longest for _, longest in rows)


@given(PADDED, st.integers(1, 5), st.integers(200, 500), WEIGHTS)
def test_the_budget_counts_padding_where_rows_are_padded(
    rows: list[tuple[int, int]], num_ranks: int, max_tokens: int, weight: float
) -> None:
    plans = plan_step(padded(rows), num_ranks=num_ranks, max_tokens=max_tokens, attention_weight=weight)
    check_every_row_once(plans, len(rows), num_ranks)
    for plan in plans:
        sizes = [padded_tokens([rows[row] for row in part.rows]) for part in real(plan)]
        assert max(sizes, default=0) <= max_tokens
        assert sizes == sorted(sizes, reverse=True)


def test_padded_rows_of_like_length_stand_together() -> None:
    rows = [(2, 10), (2, 100), (2, 12), (2, 90), (2, 11), (2, 95)]
    (plan,) = plan_step(padded(rows), num_ranks=1, max_tokens=600)
    assert [part.rows for part in plan] == [(1, 3, 5), (0, 2, 4)]


@given(TOKENS, st.integers(1, 5), st.integers(50, 120))
def test_ranks_whose_rows_fit_the_budget_have_one_microbatch_and_none_wastes_half_its_budget(
    tokens: list[int], num_ranks: int, max_tokens: int
) -> None:
    plans = plan_step(alone(tokens), num_ranks=num_ranks, max_tokens=max_tokens)
    loads = [sum(tokens[row] for part in real(plan) for row in part.rows) for plan in plans]
    assert (len(plans[0]) == 1) == (max(loads) <= max_tokens)
    # First fit: any two micro-batches of the rank that needs most exceed the budget together.
    assert len(plans[0]) <= 1 + 2 * max(loads) / max_tokens


@given(TOKENS, st.integers(1, 5), WEIGHTS)
def test_no_two_ranks_differ_by_more_than_the_costliest_row(
    tokens: list[int], num_ranks: int, weight: float
) -> None:
    plans = plan_step(alone(tokens), num_ranks=num_ranks, max_tokens=64, attention_weight=weight)
    costs = [count + round(weight * triangle(count)) for count in tokens]
    loads = [sum(costs[row] for part in real(plan) for row in part.rows) for plan in plans]
    assert max(loads) - min(loads) <= max(costs)


def row_counts(plans: Plan) -> list[int]:
    return [sum(len(part.rows) for part in real(plan)) for plan in plans]


def test_balance_is_of_cost_and_attention_is_part_of_it() -> None:
    tokens = [400, *[100] * 12]
    plans = plan_step(alone(tokens), num_ranks=2, max_tokens=2000, attention_weight=0.01)
    # 400 + 802 = 1202 for the long row, 100 + 50 = 150 for each short one: 1502 and 1500.
    assert row_counts(plans) == [1 + 2, 10]
    plans = plan_step(alone(tokens), num_ranks=2, max_tokens=2000)
    assert row_counts(plans) == [1 + 4, 8]


def test_the_costliest_rows_are_placed_first() -> None:
    plans = plan_step(alone([10, 10, 20]), num_ranks=2, max_tokens=100)
    assert [plan[0].rows for plan in plans] == [(2,), (0, 1)]


def test_rows_fill_whatever_microbatch_has_room() -> None:
    (plan,) = plan_step(alone([6, 5, 5, 4]), num_ranks=1, max_tokens=10)
    assert [part.rows for part in plan] == [(0, 3), (1, 2)]


@given(st.one_of(steps(), comparisons()), st.integers(1, 4), WEIGHTS)
def test_sharing_makes_no_rank_heavier_than_the_mean_without_it_and_one_row(
    step: Step, num_ranks: int, weight: float
) -> None:
    """Where every rank has one micro-batch. A group of rows is worth a heavier rank by 2% only."""
    plans = plan_step(step.rows, num_ranks=num_ranks, max_tokens=100_000, attention_weight=weight)
    assert len(plans[0]) == 1
    alone_costs = [step.cost((row,), weight) for row in range(len(step.sequences))]
    mean = sum(alone_costs) / num_ranks
    heaviest = max(sum(step.cost(part.rows, weight) for part in real(plan)) for plan in plans)
    # Costs are rounded to whole tokens, for each row and each beginning.
    assert heaviest <= max(1.02 * mean, mean + max(alone_costs)) + 2 * len(alone_costs)


@given(steps(), st.integers(0, 600))
def test_on_one_rank_a_group_that_fits_the_budget_is_in_one_microbatch(step: Step, room: int) -> None:
    keys, tokens = step.shared.prefix_keys, step.rows.tokens
    max_tokens = int(tokens.max()) + room
    (plan,) = plan_step(step.rows, num_ranks=1, max_tokens=max_tokens)
    for level, boundary in enumerate(BOUNDARIES):
        for key in set(keys[:, level].tolist()) - {0}:
            group = np.flatnonzero(keys[:, level] == key)
            known = boundary * (len(group) - 1)
            worthwhile = 8 * boundary * len(group) >= tokens[group].sum()
            if worthwhile and tokens[group].sum() - known <= max_tokens:
                homes = [part for part in real(plan) if set(part.rows) & set(group.tolist())]
                assert len(homes) == 1


@given(comparisons(), st.integers(0, 200))
def test_on_one_rank_a_completion_is_computed_once_whichever_pairs_it_stands_in(
    step: Step, room: int
) -> None:
    """Where the completions of one prompt fit the budget."""
    prompts: dict[bytes, set[bytes]] = {}
    for texts in step.sequences:
        prompts.setdefault(texts[0][:4], set()).update(texts)  # a prompt is known by its first token
    # A completion counts whole: no more than that is computed for it.
    max_tokens = max(sum(len(ids) // 4 for ids in known) for known in prompts.values()) + room
    (plan,) = plan_step(step.rows, num_ranks=1, max_tokens=max_tokens)
    homes = Counter(text for part in plan for text in {t for row in part.rows for t in step.sequences[row]})
    assert set(homes.values()) == {1}


def test_all_pairs_of_a_step_that_fits_the_budget_compute_its_distinct_tokens() -> None:
    """Eight prompts of 150 tokens, the six pairs of four answers of 250 each: 9200 tokens, not 24 800."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(8):
        prompt = rng.integers(1, 2**20, 150, dtype=np.int32)
        texts = [np.concatenate([prompt, rng.integers(1, 2**20, 250, dtype=np.int32)]) for _ in range(4)]
        rows += [[one, other] for i, one in enumerate(texts) for other in texts[:i]]
    step = Step.of([rows[place] for place in rng.permutation(len(rows))])
    assert step.distinct_tokens(range(48)) == 8 * (150 + 4 * 250)
    for num_ranks, max_tokens in ((1, 9200), (1, 8192), (1, 2048), (2, 8192), (4, 8192)):
        plans = plan_step(step.rows, num_ranks=num_ranks, max_tokens=max_tokens)
        computed = [[step.distinct_tokens(part.rows) for part in real(plan)] for plan in plans]
        assert sum(map(sum, computed)) == 9200
        assert {sum(loads) for loads in computed} == {9200 // num_ranks}


@given(TOKENS, st.integers(1, 4), st.integers(50, 200))
def test_the_microbatches_of_a_rank_are_even_where_there_is_room(
    tokens: list[int], num_ranks: int, max_tokens: int
) -> None:
    plans = plan_step(alone(tokens), num_ranks=num_ranks, max_tokens=max_tokens)
    most = len(plans[0])
    for plan in plans:
        loads = [sum(tokens[row] for row in part.rows) for part in real(plan)]
        largest = max((tokens[row] for part in real(plan) for row in part.rows), default=0)
        # Heaviest first: ranks run in step, and the one that may not fit the memory comes at once.
        assert loads == sorted(loads, reverse=True)
        # Room: the largest row, placed last, still fits into the lightest of `most` micro-batches.
        if sum(loads) / most + largest * (1 - 1 / most) <= max_tokens:
            assert not loads or loads[0] - loads[-1] <= largest


@given(st.one_of(steps(), comparisons()), st.integers(1, 5), WEIGHTS)
def test_the_plan_is_a_function_of_its_arguments(step: Step, num_ranks: int, weight: float) -> None:
    arguments = {"num_ranks": num_ranks, "max_tokens": 300, "attention_weight": weight}
    rows = step.rows
    told = step.shared
    narrow = RowCosts(rows.tokens.astype(np.int32), rows.attention.astype(np.int32), told)
    # Other hashes, one to one and 0 for 0: what counts is which keys are equal.
    hashed = replace(
        told,
        prefix_keys=told.prefix_keys * np.uint32(2654435761),
        text_keys=told.text_keys * np.uint64(0x9E3779B97F4A7C15),
    )
    other = RowCosts(rows.tokens, rows.attention, hashed)
    plans = plan_step(rows, **arguments)
    assert plans == plan_step(rows, **arguments)
    assert plans == plan_step(narrow, **arguments)
    assert plans == plan_step(other, **arguments)


def keys_of(beginnings: list[list[int]]) -> npt.NDArray[np.uint32]:
    """Prefix keys written down: the first few of each row, the rest 0."""
    return np.array([keys + [0] * (len(BOUNDARIES) - len(keys)) for keys in beginnings], np.uint32)


def costs_of(tokens: list[int], beginnings: list[list[int]]) -> RowCosts:
    """Rows of one text each, all of them different."""
    texts, places = np.arange(len(tokens), dtype=np.uint64), np.arange(len(tokens) + 1)
    lengths = np.asarray(tokens)
    shared = SharedTexts(places, lengths, texts, lengths, keys_of(beginnings))
    return RowCosts(alone(tokens).tokens, alone(tokens).attention, shared)


def test_pairs_of_one_prompt_meet_and_the_budget_counts_their_prompt_once() -> None:
    """Four prompts of 64 tokens, three rows each of 100, mixed: a prompt's rows are 172 distinct tokens."""
    beginnings = [[prompt + level for level in (10, 20, 30)] for _ in range(3) for prompt in (1, 2, 3, 4)]
    rows = costs_of([100] * 12, beginnings)
    (plan,) = plan_step(rows, num_ranks=1, max_tokens=172)
    assert sorted(part.rows for part in plan) == [(0, 4, 8), (1, 5, 9), (2, 6, 10), (3, 7, 11)]
    plans = plan_step(rows, num_ranks=4, max_tokens=1000)
    assert sorted(plan[0].rows for plan in plans) == [(0, 4, 8), (1, 5, 9), (2, 6, 10), (3, 7, 11)]


def test_a_system_prompt_that_all_rows_share_is_counted_once_and_does_not_fill_one_rank() -> None:
    for length, keys in ((64, [1, 2, 3]), (16, [1])):
        rows = costs_of([100] * 12, [keys] * 12)
        plans = plan_step(rows, num_ranks=4, max_tokens=100 + 2 * (100 - length))
        assert [[len(part.rows) for part in plan] for plan in plans] == [[3], [3], [3], [3]]


def test_a_group_too_large_for_the_budget_is_cut_where_its_beginnings_branch() -> None:
    """All rows share 32 tokens, and three and three of them 64: cut between those, not through them."""
    beginnings = [[1, 2, 3 + row % 2] for row in range(6)]
    (plan,) = plan_step(costs_of([80] * 6, beginnings), num_ranks=1, max_tokens=150)
    assert sorted(part.rows for part in plan) == [(0, 2, 4), (1, 3, 5)]


@pytest.mark.parametrize(("size", "room"), [(3, 0), (4, 0), (4, 50), (4, 100)])
def test_what_a_text_ties_stays_together_where_all_pairs_of_the_prompt_do_not_fit(
    size: int, room: int
) -> None:
    """Room for a ranking and one or two completions more, which must not part the other ranking."""
    rng = np.random.default_rng(0)
    prompt = rng.integers(1, 2**20, 60, dtype=np.int32)
    texts = [np.concatenate([prompt, rng.integers(1, 2**20, 50, dtype=np.int32)]) for _ in range(2 * size)]
    # Two rankings, whose pairs stand in turns.
    ranking = list(combinations(range(size), 2))
    pairs = [pair for one, other in ranking for pair in ((one, other), (one + size, other + size))]
    step = Step.of([[texts[one], texts[other]] for one, other in pairs])
    (plan,) = plan_step(step.rows, num_ranks=1, max_tokens=60 + size * 50 + room)
    assert sorted(microbatch.rows for microbatch in plan) == [
        tuple(range(0, len(pairs), 2)),
        tuple(range(1, len(pairs), 2)),
    ]


def test_microbatches_are_even_unless_that_computes_much_more() -> None:
    """16 tokens in common make 284 and 180 of what could be 240 twice; of ten times as many they do not."""
    for times, expected in ((1, [(0, 1), (2, 3)]), (10, [(0, 2), (1, 3)])):
        rows = costs_of([150 * times, 150 * times, 90 * times, 90 * times], [[1], [1], [], []])
        (plan,) = plan_step(rows, num_ranks=1, max_tokens=300 * times)
        assert [part.rows for part in plan] == expected


def test_a_short_beginning_does_not_keep_rows_together() -> None:
    """16 tokens of 150: ranks of 240 each, not of 284 and 180."""
    rows = costs_of([150, 150, 90, 90], [[1], [1], [], []])
    plans = plan_step(rows, num_ranks=2, max_tokens=1000)
    assert [plan[0].rows for plan in plans] == [(0, 2), (1, 3)]


def test_a_group_is_cut_as_fine_as_balance_asks() -> None:
    """Pieces of a rank's mean cost, 213 tokens, would be four of four rows, for three ranks."""
    rows = costs_of([100] * 16, [[1, 2, 3]] * 16)
    assert sorted(row_counts(plan_step(rows, num_ranks=3, max_tokens=10_000))) == [5, 5, 6]


def test_a_group_saves_the_attention_within_its_beginning() -> None:
    """At 0.1 a pair: two rows of 100 cost 2 x 605, less 64 + 208 for what they share: 938."""
    rows = costs_of([100, 100, 100, 50, 50, 50], [[1, 2, 3]] * 2 + [[]] * 4)
    plans = plan_step(rows, num_ranks=2, max_tokens=1000, attention_weight=0.1)
    # 605 and two of 178 are 961: more than the group, so the third 178 joins it.
    assert [plan[0].rows for plan in plans] == [(0, 1, 5), (2, 3, 4)]


def test_fewer_rows_than_ranks_leave_dummies_of_weight_zero() -> None:
    plans = plan_step(alone([7, 3]), num_ranks=3, max_tokens=10)
    assert [plan[0].weights for plan in plans] == [(1.0,), (1.0,), (0.0,)]
    assert plans[2][0].rows == (1,)


def test_a_row_above_the_budget_is_refused_with_the_number_to_type() -> None:
    with pytest.raises(ConfigError, match=r"\(63\) is below the longest row \(64 tokens\). Raise it to 64"):
        plan_step(alone([3, 64]), num_ranks=1, max_tokens=63)


def test_a_step_without_rows_is_our_own_mistake() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        plan_step(alone([]), num_ranks=1, max_tokens=10)
