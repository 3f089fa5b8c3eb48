"""Batches: nothing lost, nothing mixed up, the same order from anywhere."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_jax.data.loader import PACKING_ROWS, Batch, Loader, drop_long, eval_batches
from qlora_jax.data.rendering import Example
from qlora_jax.errors import UserError

SEQ_LEN = 16
ARRAYS = ("input_ids", "positions", "segment_ids", "loss_mask")


def example(line: int, length: int, *, trained: Iterable[int] = (-1,)) -> Example:
    """Tokens that name their line and place; token 0 (the padding's) occurs too."""
    mask = np.zeros(length, bool)
    mask[list(trained)] = True
    return Example(np.arange(length, dtype=np.int32) + 100 * line, mask, line)


def examples(lengths: Iterable[int]) -> list[Example]:
    return [example(line, length) for line, length in enumerate(lengths)]


def segments(batches: Iterable[Batch]) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """(lines of the row, tokens, loss mask) of every segment; asserts what holds in each row."""
    for batch in batches:
        assert [batch[name].shape for name in ARRAYS] == [batch["input_ids"].shape] * 4
        assert [batch[name].dtype for name in ARRAYS] == [np.int32, np.int32, np.int32, np.bool_]
        for row, lines in enumerate(batch["lines"]):
            ids, positions, segment_ids, mask = (batch[name][row] for name in ARRAYS)
            count = segment_ids.max()
            assert len(lines) == count
            used = np.count_nonzero(segment_ids)
            # Segments 1, 2, ... one after another, then padding.
            assert np.all(np.diff(segment_ids[:used]) >= 0)
            assert set(segment_ids[:used]) == set(range(1, count + 1))
            for array in (ids, positions, segment_ids, mask):
                assert not array[used:].any()
            for segment in range(1, count + 1):
                here = segment_ids == segment
                np.testing.assert_array_equal(positions[here], np.arange(here.sum()))
                yield lines, ids[here], mask[here]


def assert_each_once(batches: Iterable[Batch], rows: list[Example]) -> None:
    found = sorted(segments(batches), key=lambda segment: segment[1][0])
    assert len(found) == len(rows)
    for (lines, ids, mask), row in zip(found, rows, strict=True):
        np.testing.assert_array_equal(ids, row.input_ids)
        np.testing.assert_array_equal(mask[1:], row.loss_mask[1:])
        assert not mask[0]
        assert row.line in lines


def assert_same(left: Iterable[Batch], right: Iterable[Batch]) -> None:
    for a, b in zip(left, right, strict=True):
        assert a["lines"] == b["lines"]
        for name in ARRAYS:
            np.testing.assert_array_equal(a[name], b[name])


# Enough of them that the packer hands out its rows several times within an epoch.
lengths = st.lists(st.integers(2, SEQ_LEN), min_size=1, max_size=3 * PACKING_ROWS)
settled = settings(max_examples=25, deadline=None)


@settled
@given(lengths, st.integers(1, 5), st.booleans(), st.booleans(), st.integers(0, 2**32), st.data())
def test_every_token_once_an_epoch(
    lengths: list[int], batch_size: int, packing: bool, shuffle: bool, seed: int, data: Any
) -> None:
    rows = [
        example(line, length, trained=data.draw(st.sets(st.integers(0, length - 1), min_size=1)))
        for line, length in enumerate(lengths)
    ]
    arguments = {"batch_size": batch_size, "seq_len": SEQ_LEN, "packing": packing, "seed": seed, "shuffle": shuffle}
    epoch = list(Loader(rows, **arguments, repeat=False))
    assert {batch["input_ids"].shape for batch in epoch} == {(batch_size, SEQ_LEN)}
    assert_each_once(epoch, rows)
    assert all(any(batch["lines"]) for batch in epoch)
    if not packing:
        assert all(len(lines) <= 1 for batch in epoch for lines in batch["lines"])
        assert len(epoch) == -(-len(rows) // batch_size)
    # The next epoch has them all again; packed, it may take another number of batches.
    endless = Loader(rows, **arguments)
    assert_same(itertools.islice(endless, len(epoch)), epoch)
    again: list[Batch] = []
    while sum(len(lines) for batch in again for lines in batch["lines"]) < len(rows):
        again.append(next(endless))
    assert_each_once(again, rows)


@settled
@given(lengths, st.integers(1, 5), st.booleans(), st.integers(0, 400), st.integers(0, 2**32))
def test_a_restored_loader_goes_on_exactly(
    lengths: list[int], batch_size: int, packing: bool, taken: int, seed: int
) -> None:
    def loader() -> Loader:
        return Loader(examples(lengths), batch_size=batch_size, seq_len=SEQ_LEN, packing=packing, seed=seed)

    first = loader()
    for _ in itertools.islice(first, taken):
        pass
    state = json.loads(json.dumps(first.get_state()))
    expected = list(itertools.islice(first, 20))
    second = loader()
    second.set_state(state)
    assert_same(itertools.islice(second, 20), expected)
    assert second.get_state() == first.get_state()
    # Backwards too, and a state is not changed by going on.
    first.set_state(state)
    assert_same(itertools.islice(first, 20), expected)
    assert state == json.loads(json.dumps(state))


@pytest.mark.parametrize("packing", [False, True])
def test_every_position_of_two_epochs_can_be_restored(packing: bool) -> None:
    rng = np.random.default_rng(0)
    rows = examples(rng.integers(2, SEQ_LEN, 2 * PACKING_ROWS).tolist())

    def loader() -> Loader:
        return Loader(rows, batch_size=7, seq_len=SEQ_LEN, packing=packing, seed=3)

    source, states, batches = loader(), [], []
    for _ in range(45):
        states.append(source.get_state())
        batches.append(next(source))
    assert source.get_state()["epoch"] >= 1
    restored = loader()
    for state, batch in zip(states, batches, strict=True):
        restored.set_state(state)
        assert_same([next(restored)], [batch])


def order(loader: Loader, count: int) -> list[int]:
    rows = (line for batch in loader for lines in batch["lines"] for line in lines)
    return list(itertools.islice(rows, count))


@pytest.mark.parametrize("packing", [False, True])
def test_orders_differ_between_epochs_and_seeds(packing: bool) -> None:
    rows = examples([5] * 40)

    def lines(seed: int) -> list[int]:
        return order(Loader(rows, batch_size=4, seq_len=SEQ_LEN, packing=packing, seed=seed), 80)

    orders = [tuple(lines(seed)[epoch : epoch + 40]) for seed in range(4) for epoch in (0, 40)]
    assert len(set(orders)) == 8
    assert all(sorted(each) == list(range(40)) for each in orders)
    assert lines(0) == lines(0)


def test_the_order_is_the_same_on_every_machine_and_python() -> None:
    unpacked = Loader(examples([4] * 8), batch_size=2, seq_len=SEQ_LEN, packing=False, seed=0)
    packed = Loader(examples([4, 9, 5, 7, 3, 8, 6, 10]), batch_size=2, seq_len=SEQ_LEN, packing=True, seed=0)
    assert order(unpacked, 8) == [5, 3, 0, 1, 2, 4, 7, 6]
    assert [batch["lines"] for batch in itertools.islice(packed, 2)] == [[[5, 3], [2, 7]], [[0, 1, 4], [6]]]


def test_without_shuffling_the_order_is_kept() -> None:
    rows = examples([4] * 10)
    for packing in (False, True):
        loader = Loader(rows, batch_size=3, seq_len=SEQ_LEN, packing=packing, seed=0, shuffle=False)
        assert order(loader, 20) == [*range(10), *range(10)]


def test_packing_moves_an_example_by_no_more_than_its_rows() -> None:
    rng = np.random.default_rng(1)
    rows = examples(rng.integers(2, SEQ_LEN + 1, 2000).tolist())
    loader = Loader(rows, batch_size=8, seq_len=SEQ_LEN, packing=True, seed=0, shuffle=False, repeat=False)
    batches = list(loader)
    at = np.argsort([line for batch in batches for lines in batch["lines"] for line in lines])
    most = PACKING_ROWS * SEQ_LEN // 2  # examples that the rows can hold
    assert np.abs(at - np.arange(len(rows))).max() < most
    fill = np.mean([(batch["segment_ids"] > 0).mean() for batch in batches])
    assert fill > 0.9


def test_an_epoch_ends_with_empty_rows() -> None:
    batches = list(Loader(examples([3, 3, 3]), batch_size=2, seq_len=8, packing=False, seed=0, repeat=False))
    assert [len(batch["lines"]) for batch in batches] == [2, 2]
    assert batches[1]["lines"][1] == []
    assert not batches[1]["segment_ids"][1].any()


@settled
@given(lengths, st.integers(1, 5))
def test_eval_batches_are_every_example_in_order(lengths: list[int], batch_size: int) -> None:
    rows = examples(lengths)
    batches = list(eval_batches(rows, batch_size=batch_size, seq_len=SEQ_LEN))
    assert_each_once(batches, rows)
    assert {batch["input_ids"].shape for batch in batches} == {(batch_size, SEQ_LEN)}
    lines = [line for batch in batches for line in batch["lines"]]
    assert lines[: len(rows)] == [[row.line] for row in rows]
    assert not any(lines[len(rows) :])
    assert len(batches) == -(-len(rows) // batch_size)


def test_long_examples_are_dropped_with_a_count_and_never_cut() -> None:
    rows = examples([4, 9, 8, 20])
    kept, dropped = drop_long(rows, 8)
    assert ([row.line for row in kept], dropped) == ([0, 2], 2)
    makers: list[Callable[[], Any]] = [
        lambda: Loader(rows, batch_size=2, seq_len=8, packing=True, seed=0),
        lambda: Loader(rows, batch_size=2, seq_len=8, packing=False, seed=0),
        lambda: eval_batches(rows, batch_size=2, seq_len=8),
    ]
    for make in makers:
        with pytest.raises(
            UserError, match=r"2 of 4 examples have more than 8 tokens, first line 1\n(.|\n)*seq_len=20"
        ):
            make()


def test_no_examples_are_an_error() -> None:
    for packing in (False, True):
        with pytest.raises(UserError, match="no examples"):
            Loader([], batch_size=2, seq_len=8, packing=packing, seed=0)
    with pytest.raises(UserError, match="no examples"):
        eval_batches([], batch_size=2, seq_len=8)


pairs = st.lists(st.tuples(st.integers(2, SEQ_LEN), st.integers(1, 2 * SEQ_LEN)), min_size=1, max_size=PACKING_ROWS)


@settled
@given(pairs, st.booleans(), st.integers(0, 2**32))
def test_a_source_has_the_segment_of_its_target(pairs: list[tuple[int, int]], packing: bool, seed: int) -> None:
    rows = [
        dataclasses.replace(example(line, target), source_ids=np.arange(source, dtype=np.int32) - 100 * (line + 1))
        for line, (target, source) in enumerate(pairs)
    ]
    lengths = {"seq_len": SEQ_LEN, "source_len": 2 * SEQ_LEN}
    batches = list(Loader(rows, batch_size=3, packing=packing, seed=seed, repeat=False, **lengths))
    assert_each_once(batches, rows)
    for batch in batches:
        assert batch["source_ids"].shape == batch["source_segment_ids"].shape == (3, 2 * SEQ_LEN)
        for ids, segments_of, source, source_segments in zip(
            *(batch[name] for name in ("input_ids", "segment_ids", "source_ids", "source_segment_ids")), strict=True
        ):
            assert not source[source_segments == 0].any()
            assert source_segments.max() == segments_of.max()
            for segment in range(1, segments_of.max() + 1):
                row = rows[ids[segments_of == segment][0] // 100]
                assert row.source_ids is not None
                np.testing.assert_array_equal(source[source_segments == segment], row.source_ids)


def test_long_sources_are_dropped_too() -> None:
    rows = [dataclasses.replace(row, source_ids=np.ones(row.line, np.int32)) for row in examples([4, 9, 8, 4, 4])]
    kept, dropped = drop_long(rows, 8, 3)
    assert ([row.line for row in kept], dropped) == ([0, 2, 3], 2)
    with pytest.raises(UserError, match=r"(?s)2 of 5 .* 8 tokens, or 3 in.*train.seq_len=4 train.target_len=9"):
        Loader(rows, batch_size=2, seq_len=8, source_len=3, packing=True, seed=0)
