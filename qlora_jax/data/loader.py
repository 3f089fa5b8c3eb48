"""Examples as batches of one shape, in an order that depends on the seed alone and can be taken up anywhere.

Each epoch is a grain pipeline of its own, with its own order: every example is in it exactly once, and a pack never
mixes two epochs. An epoch's last batch is filled up with empty rows.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypedDict

import grain
import numpy as np
from jaxtyping import Bool, Int32

from qlora_jax.data.rendering import Example
from qlora_jax.errors import UserError

# Rows that are packed at the same time: an example goes into the first of them with room for it. All are handed out
# when one example finds none, so an example moves by no more than these rows. 1, 8 and 64 rows fill 84, 94 and 97 % of
# a set with instruction-like lengths.
PACKING_ROWS = 64


class Batch(TypedDict):
    """Arrays of shape [batch_size, seq_len], and where they come from.

    Padding has segment 0, position 0, token 0 and no loss. `lines` are the data file's lines, per row; an empty row has
    none. `segment_ids` count the examples of a row from 1; `positions` begin at 0 in each; `loss_mask` is True at
    target tokens, which are never the first of a segment.
    """

    input_ids: Int32[np.ndarray, "batch seq"]
    positions: Int32[np.ndarray, "batch seq"]
    segment_ids: Int32[np.ndarray, "batch seq"]
    loss_mask: Bool[np.ndarray, "batch seq"]
    lines: list[list[int]]


def drop_long(examples: Sequence[Example], seq_len: int) -> tuple[list[Example], int]:
    """Examples of at most `seq_len` tokens, and how many others there were."""
    kept = [example for example in examples if len(example.input_ids) <= seq_len]
    return kept, len(examples) - len(kept)


class Loader(Iterator[Batch]):
    """Iterates over batches, epoch after epoch.

    Args:
      examples: none longer than `seq_len`.
      batch_size, seq_len: shape of every batch.
      packing: put several examples into a row; otherwise one, padded.
      seed: of the order, which differs from epoch to epoch.
      shuffle: False keeps the order of `examples` (packing moves them a little).
      repeat: go on after an epoch, without end.

    Raises:
      UserError: no examples, or too long ones.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        batch_size: int,
        seq_len: int,
        packing: bool,
        seed: int,
        shuffle: bool = True,
        repeat: bool = True,
    ) -> None:
        _check(examples, seq_len)
        self._examples = [_as_element(example) for example in examples]
        self._batch_size, self._seq_len = batch_size, seq_len
        self._packing, self._seed, self._shuffle, self._repeat = packing, seed, shuffle, repeat
        self._start_epoch(0)

    def __next__(self) -> Batch:
        rows = self._take()
        if not rows:
            if not self._repeat:
                raise StopIteration
            self._start_epoch(self._epoch + 1)
            rows = self._take()
        return _stack(rows, self._batch_size, self._seq_len)

    def get_state(self) -> dict[str, Any]:
        """The position after the last batch: plain numbers, for JSON."""
        return {"epoch": self._epoch, "rows": copy.deepcopy(self._rows.get_state())}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on where a loader of the same examples and arguments was when its state was taken."""
        self._start_epoch(state["epoch"])
        self._rows.set_state(copy.deepcopy(state["rows"]))

    def _start_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        order, packing = np.random.SeedSequence([self._seed, epoch]).spawn(2)
        examples = self._examples
        if self._shuffle:
            # Not grain's shuffle: it takes 50 ms an epoch for few rows, and seed 1 begins with seed 0's second epoch.
            examples = [examples[index] for index in np.random.default_rng(order).permutation(len(examples))]
        rows = grain.MapDataset.source(examples).to_iter_dataset(
            grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        )
        if self._packing:
            rows = grain.experimental.FirstFitPackIterDataset(
                rows,
                length_struct={"input_ids": self._seq_len, "loss_mask": self._seq_len},
                num_packing_bins=PACKING_ROWS,
                seed=int(packing.generate_state(1)[0]),
                shuffle_bins=self._shuffle,
                meta_features=("lines",),
            )
        else:
            rows = rows.map(lambda example: _one_in_a_row(example, self._seq_len))
        self._rows = iter(rows)

    def _take(self) -> list[Mapping[str, Any]]:
        rows: list[Mapping[str, Any]] = []
        while len(rows) < self._batch_size and (row := next(self._rows, None)) is not None:
            rows.append(row)
        return rows


def eval_batches(examples: Sequence[Example], *, batch_size: int, seq_len: int) -> Iterator[Batch]:
    """Every example once, in order, one in a row; the last batch is filled up with empty rows.

    Raises:
      UserError: no examples, or too long ones.
    """
    _check(examples, seq_len)
    rows = [_one_in_a_row(_as_element(example), seq_len) for example in examples]
    return (_stack(rows[i : i + batch_size], batch_size, seq_len) for i in range(0, len(rows), batch_size))


def _check(examples: Sequence[Example], seq_len: int) -> None:
    if not examples:
        raise UserError("no examples", why="there is nothing to make batches of", fix="data.path=rows.jsonl")
    long = [example for example in examples if len(example.input_ids) > seq_len]
    if long:
        longest = max(len(example.input_ids) for example in long)
        raise UserError(
            f"{len(long)} of {len(examples)} examples have more than {seq_len} tokens, first line {long[0].line}",
            why="every row of a batch has train.seq_len tokens, and nothing is cut off",
            fix=f"train.seq_len={longest}, or drop_long(examples, {seq_len})",
        )


def _as_element(example: Example) -> dict[str, Any]:
    mask = example.loss_mask.copy()
    mask[:1] = False  # nothing of the segment comes before it, so nothing predicts it
    return {"input_ids": example.input_ids.astype(np.int32, copy=False), "loss_mask": mask, "lines": example.line}


def _one_in_a_row(example: Mapping[str, Any], seq_len: int) -> dict[str, Any]:
    """What the packer would make of a single example."""
    length = len(example["input_ids"])
    row = {name: np.zeros(seq_len, np.int32) for name in ("input_ids", "input_ids_positions", "input_ids_segment_ids")}
    row["loss_mask"] = np.zeros(seq_len, np.bool_)
    row["input_ids"][:length] = example["input_ids"]
    row["input_ids_positions"][:length] = np.arange(length)
    row["input_ids_segment_ids"][:length] = 1
    row["loss_mask"][:length] = example["loss_mask"]
    return {**row, "lines": [example["lines"]]}


def _stack(rows: Sequence[Mapping[str, Any]], batch_size: int, seq_len: int) -> Batch:
    def stacked(name: str, dtype: type) -> np.ndarray:
        array: np.ndarray = np.zeros((batch_size, seq_len), dtype)
        for index, row in enumerate(rows):
            array[index] = row[name]
        return array

    return Batch(
        input_ids=stacked("input_ids", np.int32),
        positions=stacked("input_ids_positions", np.int32),
        segment_ids=stacked("input_ids_segment_ids", np.int32),
        loss_mask=stacked("loss_mask", np.bool_),
        lines=[*(list(row["lines"]) for row in rows), *([] for _ in range(batch_size - len(rows)))],
    )
