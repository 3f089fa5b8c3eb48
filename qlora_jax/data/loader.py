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


class _Tokens(TypedDict):
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


class Batch(_Tokens, total=False):
    """Of an encoder-decoder also arrays of shape [batch_size, source_len], with the same numbers of segments."""

    source_ids: Int32[np.ndarray, "batch source"]
    source_segment_ids: Int32[np.ndarray, "batch source"]


def drop_long(examples: Sequence[Example], seq_len: int, source_len: int | None = None) -> tuple[list[Example], int]:
    """Examples of at most `seq_len` tokens, and `source_len` for an encoder, and how many others there were."""
    kept = [example for example in examples if _fits(example, seq_len, source_len)]
    return kept, len(examples) - len(kept)


class Loader(Iterator[Batch]):
    """Iterates over batches, epoch after epoch.

    Args:
      examples: none longer than `seq_len`, or `source_len`.
      batch_size, seq_len: shape of every batch.
      source_len: tokens of a row for an encoder, where the examples have such; each row then has room for both.
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
        source_len: int | None = None,
    ) -> None:
        _check(examples, seq_len, source_len)
        self._examples = [_as_element(example) for example in examples]
        self._batch_size, self._lengths = batch_size, _lengths(seq_len, source_len)
        self._packing, self._seed, self._shuffle, self._repeat = packing, seed, shuffle, repeat
        self._start_epoch(0)

    def __next__(self) -> Batch:
        rows = self._take()
        if not rows:
            if not self._repeat:
                raise StopIteration
            self._start_epoch(self._epoch + 1)
            rows = self._take()
        return _stack(rows, self._batch_size, self._lengths)

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
                length_struct=self._lengths,
                num_packing_bins=PACKING_ROWS,
                seed=int(packing.generate_state(1)[0]),
                shuffle_bins=self._shuffle,
                meta_features=("lines",),
            )
        else:
            rows = rows.map(lambda example: _one_in_a_row(example, self._lengths))
        self._rows = iter(rows)

    def _take(self) -> list[Mapping[str, Any]]:
        rows: list[Mapping[str, Any]] = []
        while len(rows) < self._batch_size and (row := next(self._rows, None)) is not None:
            rows.append(row)
        return rows


def eval_batches(
    examples: Sequence[Example], *, batch_size: int, seq_len: int, source_len: int | None = None
) -> Iterator[Batch]:
    """Every example once, in order, one in a row; the last batch is filled up with empty rows.

    Raises:
      UserError: no examples, or too long ones.
    """
    _check(examples, seq_len, source_len)
    lengths = _lengths(seq_len, source_len)
    rows = [_one_in_a_row(_as_element(example), lengths) for example in examples]
    return (_stack(rows[i : i + batch_size], batch_size, lengths) for i in range(0, len(rows), batch_size))


def _lengths(seq_len: int, source_len: int | None) -> dict[str, int]:
    """Length of each array of an example in a row."""
    return {"input_ids": seq_len, "loss_mask": seq_len} | ({} if source_len is None else {"source_ids": source_len})


def _fits(example: Example, seq_len: int, source_len: int | None) -> bool:
    source = 0 if example.source_ids is None else len(example.source_ids)
    return len(example.input_ids) <= seq_len and (source_len is None or source <= source_len)


def _check(examples: Sequence[Example], seq_len: int, source_len: int | None) -> None:
    if not examples:
        raise UserError("no examples", why="there is nothing to make batches of", fix="data.path=rows.jsonl")
    long = [example for example in examples if not _fits(example, seq_len, source_len)]
    if long:
        longest = max(len(example.input_ids) for example in long)
        given, fix, dropping = f"{seq_len} tokens", f"train.seq_len={longest}", f"drop_long(examples, {seq_len})"
        if source_len is not None:
            sources = [len(example.source_ids) for example in examples if example.source_ids is not None]
            given += f", or {source_len} in their source"
            fix = f"train.seq_len={max(sources)} train.target_len={longest}"
            dropping = f"drop_long(examples, {seq_len}, {source_len})"
        raise UserError(
            f"{len(long)} of {len(examples)} examples have more than {given}, first line {long[0].line}",
            why="every row of a batch has train.seq_len tokens, and nothing is cut off",
            fix=f"{fix}, or {dropping}",
        )


def _as_element(example: Example) -> dict[str, Any]:
    mask = example.loss_mask.copy()
    mask[:1] = False  # nothing of the segment comes before it, so nothing predicts it
    element = {"input_ids": example.input_ids.astype(np.int32, copy=False), "loss_mask": mask, "lines": example.line}
    if example.source_ids is not None:
        element["source_ids"] = example.source_ids.astype(np.int32, copy=False)
    return element


def _one_in_a_row(example: Mapping[str, Any], lengths: Mapping[str, int]) -> dict[str, Any]:
    """What the packer would make of a single example."""
    row: dict[str, Any] = {"lines": [example["lines"]]}
    for name, seq_len in lengths.items():
        values = example[name]
        positions = {f"{name}_positions": np.arange(len(values)), f"{name}_segment_ids": np.ones(len(values))}
        for key, content in {name: values, **positions}.items():
            row[key] = np.zeros(seq_len, values.dtype if key == name else np.int32)
            row[key][: len(values)] = content
    return row


def _stack(rows: Sequence[Mapping[str, Any]], batch_size: int, lengths: Mapping[str, int]) -> Batch:
    def stacked(key: str, dtype: type, name: str = "input_ids") -> np.ndarray:
        array: np.ndarray = np.zeros((batch_size, lengths[name]), dtype)
        for index, row in enumerate(rows):
            array[index] = row[key]
        return array

    batch = Batch(
        input_ids=stacked("input_ids", np.int32),
        positions=stacked("input_ids_positions", np.int32),
        segment_ids=stacked("input_ids_segment_ids", np.int32),
        loss_mask=stacked("loss_mask", np.bool_),
        lines=[*(list(row["lines"]) for row in rows), *([] for _ in range(batch_size - len(rows)))],
    )
    if "source_ids" in lengths:
        batch["source_ids"] = stacked("source_ids", np.int32, "source_ids")
        batch["source_segment_ids"] = stacked("source_ids_segment_ids", np.int32, "source_ids")
    return batch
