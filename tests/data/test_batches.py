"""Order and batches: a pure function of (store, plan, step) that shows every row once an epoch, however it is split."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.batches import EOS, all_ranks, make_plan, make_schedule, make_store, rows_of
from support.plans import many

from finetuner.data.batch_sampler import evaluation_batches, step_batches
from finetuner.data.batches import FILLER_ROW, collate
from finetuner.data.shuffling import derive_seed, held_out_rows, row_order
from finetuner.data.token_store import IGNORE_INDEX, TokenStore

# --- order ---


@many
@given(seed=st.integers(0, 2**63), epoch=st.integers(0, 10**6), rows=st.integers(0, 300))
def test_an_order_is_a_permutation(seed: int, epoch: int, rows: int) -> None:
    assert sorted(row_order(seed, epoch, rows)) == list(range(rows))


def test_orders_differ_by_seed_and_epoch_and_are_mixed() -> None:
    orders = {(seed, epoch): tuple(row_order(seed, epoch, 1000)) for seed in range(5) for epoch in range(5)}
    assert len(set(orders.values())) == 25
    for order in orders.values():
        fixed = sum(i == row for i, row in enumerate(order))
        assert fixed < 10
        assert abs(np.corrcoef(np.arange(1000), order)[0, 1]) < 0.15
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.15


def test_the_order_never_changes() -> None:
    """Pinned: a resumed run, and a run of another version, must see the same rows."""
    assert list(row_order(42, 0, 10)) == [8, 9, 2, 3, 5, 6, 0, 7, 4, 1]
    assert list(row_order(42, 1, 10)) == [6, 1, 3, 7, 5, 2, 9, 4, 0, 8]
    assert list(row_order(0, 0, 5)) == [4, 2, 1, 3, 0]
    assert list(np.flatnonzero(held_out_rows(42, 20, 0.2))) == [2, 4, 11, 19]
    assert derive_seed(1, 2, 3) == 15020427595393229491


def test_the_cached_order_cannot_be_written_to() -> None:
    with pytest.raises(ValueError, match="read-only"):
        row_order(1, 2, 3)[0] = 0


# --- the rows of a step ---

SPLITS = [(1, 1, 12), (1, 4, 3), (1, 12, 1), (2, 2, 3), (3, 4, 1), (4, 1, 3), (12, 1, 1), (5, 3, 2)]


@pytest.mark.parametrize(("ranks", "micro", "accum"), SPLITS)
@pytest.mark.parametrize("rows", [1, 11, 12, 13, 29])
def test_ranks_and_micro_batches_share_each_row_of_an_epoch_exactly_once(
    ranks: int, micro: int, accum: int, rows: int
) -> None:
    store, plan = make_store(rows), make_plan(ranks, micro, accum)
    schedule = make_schedule(rows, plan, epochs=2)
    for epoch in range(2):
        seen: Counter[int] = Counter()
        for nth in range(schedule.steps_per_epoch):
            step = epoch * schedule.steps_per_epoch + nth
            batches = [batch for mine in all_ranks(plan) for batch in step_batches(store, mine, schedule, step)]
            assert len(batches) == ranks * accum
            assert all(len(batch.input_ids) <= micro for batch in batches)
            _, start, stop = schedule.rows_at(step)
            of_step = Counter(row for batch in batches for row in rows_of(batch) if row != FILLER_ROW)
            assert of_step == Counter(int(row) for row in row_order(plan.seed, epoch, rows)[start:stop])
            seen += of_step
        assert seen == Counter(range(rows))


@pytest.mark.parametrize("rows", [12, 13, 29])
def test_every_split_of_a_batch_trains_the_same_tokens(rows: int) -> None:
    store = make_store(rows)
    for step in range(3):
        trained = set()
        for split in SPLITS[:-1]:  # global batch 12, all of them
            plan = make_plan(*split)
            schedule = make_schedule(rows, plan, epochs=3)
            batches = [batch for mine in all_ranks(plan) for batch in step_batches(store, mine, schedule, step)]
            targets = np.sort(np.concatenate([batch.targets.numpy() for batch in batches]))
            trained.add((targets.tobytes(), sum(batch.num_tokens for batch in batches)))
        assert len(trained) == 1


def test_every_rank_gets_grad_accum_batches_and_fillers_teach_nothing() -> None:
    store, plan = make_store(1), make_plan(ranks=3, micro=2, accum=2)
    schedule = make_schedule(1, plan)
    by_rank = [step_batches(store, mine, schedule, 0) for mine in all_ranks(plan)]
    assert [len(batches) for batches in by_rank] == [2, 2, 2]
    real, *fillers = [batch for batches in by_rank for batch in batches]
    assert rows_of(real) == [0]
    assert real.num_tokens == store.length(0)
    for filler in fillers:
        assert rows_of(filler) == [FILLER_ROW]
        assert (filler.num_trained, filler.num_tokens) == (0, 0)
        assert filler.attention_mask.all(), "a row that is masked throughout would be NaN in attention"


def test_the_micro_batches_of_a_pass_are_of_nearly_one_length() -> None:
    store, plan = make_store(64), make_plan(ranks=4, micro=4, accum=4)
    schedule = make_schedule(64, plan)
    by_rank = [step_batches(store, mine, schedule, 0) for mine in all_ranks(plan)]
    lengths = np.array([[batch.input_ids.shape[1] for batch in batches] for batches in by_rank])
    assert (lengths.max(axis=0) - lengths.min(axis=0)).max() <= 1
    assert (np.diff(lengths, axis=1) <= 0).all(), "longest first: what does not fit fails in the first step"


def test_a_step_needs_no_step_before_it() -> None:
    store, plan = make_store(29), make_plan(ranks=2, micro=3, accum=2, rank=1)
    schedule = make_schedule(29, plan, epochs=2)
    walked = [step_batches(store, plan, schedule, step) for step in range(schedule.total_steps)]
    for step in (5, 0, 3):
        for ours, theirs in zip(step_batches(store, plan, schedule, step), walked[step], strict=True):
            assert torch.equal(ours.input_ids, theirs.input_ids)
            assert torch.equal(ours.targets, theirs.targets)


@many
@given(rows=st.integers(1, 40), ranks=st.integers(1, 5), size=st.integers(1, 9))
def test_evaluation_covers_all_rows_once_with_as_many_batches_on_each_rank(rows: int, ranks: int, size: int) -> None:
    store, plan = make_store(rows), make_plan(ranks, eval_batch=size)
    by_rank = [list(evaluation_batches(store, mine)) for mine in all_ranks(plan)]
    assert len({len(batches) for batches in by_rank}) == 1
    batches = [batch for batches in by_rank for batch in batches]
    assert Counter(row for batch in batches for row in rows_of(batch) if row != FILLER_ROW) == Counter(range(rows))
    assert sum(batch.num_trained for batch in batches) == store.num_trained
    assert sum(batch.num_tokens for batch in batches) == store.num_tokens


# --- collate ---


def naive_targets(store: TokenStore, rows: list[int]) -> tuple[list[int], list[int]]:
    """Shift by hand: the hidden state at t predicts the label at t + 1 of its own row."""
    length = max(store.length(row) for row in rows)
    positions, targets = [], []
    for nth, row in enumerate(rows):
        labels = store.document(row)[1]
        for t in range(len(labels) - 1):
            if labels[t + 1] != IGNORE_INDEX:
                positions.append(nth * length + t)
                targets.append(int(labels[t + 1]))
    return positions, targets


@many
@given(rows=st.lists(st.integers(0, 19), min_size=1, max_size=6))
def test_positions_and_targets_are_a_shift_of_the_labels(rows: list[int]) -> None:
    store = make_store(20)
    batch = collate(store, rows)
    assert (batch.positions.tolist(), batch.targets.tolist()) == naive_targets(store, rows)
    assert batch.num_trained == len(batch.targets)
    assert batch.num_tokens == sum(store.length(row) for row in rows) == int(batch.attention_mask.sum())
    for nth, row in enumerate(rows):
        length = store.length(row)
        assert batch.input_ids[nth, :length].tolist() == store.document(row)[0].tolist()
        assert batch.attention_mask[nth].tolist() == [1] * length + [0] * (batch.input_ids.shape[1] - length)


def test_the_end_is_learned_and_padding_of_the_same_number_is_not() -> None:
    store = make_store(20)
    rows = list(range(20))
    batch = collate(store, rows)
    assert (batch.input_ids == EOS).sum() > 20, "padding and end are one number here"
    assert (batch.targets == EOS).sum() == 20
    under_mask = batch.attention_mask.flatten()[batch.positions + 1]  # the token that each position predicts
    assert under_mask.all()
    assert (batch.input_ids.flatten()[batch.positions + 1] == batch.targets).all()


def test_the_first_token_of_a_row_is_never_a_target_of_the_row_before() -> None:
    ids = np.array([5, 6], dtype=np.int32)
    store = TokenStore.of([(ids, ids), (ids, ids)])  # every token has a label, first ones too
    batch = collate(store, [0, 1])
    assert batch.positions.tolist() == [0, 2]
    assert batch.targets.tolist() == [6, 6]
    assert store.num_trained == 2
