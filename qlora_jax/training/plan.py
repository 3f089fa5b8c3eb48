"""What a run will do and hold, known before any weight is loaded: the start-up lines, and `--dry-run`."""

import difflib
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_jax.errors import UserError
from qlora_jax.training.config import TrainConfig
from qlora_jax.training.dataset import Dataset, row_lengths
from qlora_jax.training.meter import in_bytes

if TYPE_CHECKING:
    from qlora_jax.checkpoints.source import Checkpoint
    from qlora_jax.data.loader import Batch
    from qlora_jax.data.rendering import Example

_IN_BLOCK = re.compile(r"\.(?:layers|block)\.\d+\.")
_SCALE_GROUP = 256  # scales that share one second-level scale under double quantization
_PROBED_BATCHES = 200


@dataclass(frozen=True)
class Sizes:
    """Counts and bytes of a model about to be trained."""

    parameters: int
    trained: int
    weight_bytes: int
    adapter_bytes: int
    optimizer_bytes: int


@dataclass(frozen=True)
class Epoch:
    """One pass over the rows: batches, and the share of their tokens that is not padding."""

    batches: int
    fill: float


def measure_model(checkpoint: "Checkpoint", config: TrainConfig) -> Sizes:
    """Sizes from the shapes in the checkpoint's headers.

    Raises:
      UserError: lora.targets names something that is no linear of a block.
    """
    from qlora_jax.checkpoints.conversion import block_linears

    targets = config.lora.targets
    in_blocks = set(block_linears(checkpoint))
    parameters = trained = weight_bytes = 0
    linears: set[str] = set()
    for name in checkpoint.names():
        shape = checkpoint.shape(name)
        count = math.prod(shape)
        parameters += count
        if name not in in_blocks:
            weight_bytes += count * checkpoint.dtype(name).itemsize
            continue
        linear = _IN_BLOCK.split(name)[1].removesuffix(".weight")
        linears.add(linear)
        weight_bytes += _linear_bytes(checkpoint, name, count, config)
        if targets is None or set(linear.split(".")) & set(targets):
            trained += config.lora.rank * sum(shape) + config.lora.dora * shape[0]
    known = sorted({part for linear in linears for part in linear.split(".")})
    unknown = [target for target in targets or () if target not in known]
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        names = ", ".join(sorted({linear.rpartition(".")[2] for linear in linears}))
        raise UserError(
            f"lora.targets names {', '.join(unknown)}, which {checkpoint.path} does not have",
            why=f"its blocks' linears are {names}",
            fix=f"did you mean {near[0]}?" if near else "lora.targets=null   (all of them)",
        )
    if config.lora.adapter is not None:
        from qlora_jax.checkpoints.merging import adapter_for

        adapter = adapter_for(checkpoint, Path(config.lora.adapter))
        trained = sum(linear.a.size + linear.b.size for linear in adapter.linears.values())
        trained += sum(linear.magnitude.size for linear in adapter.linears.values() if linear.magnitude is not None)
    # Adapters and both moments of Adam are float32.
    return Sizes(parameters, trained, weight_bytes, adapter_bytes=4 * trained, optimizer_bytes=8 * trained)


def measure_epoch(config: TrainConfig, examples: Sequence["Example"]) -> Epoch:
    """Batches in a pass; with packing and many rows, from the fill of the first ones."""
    train = config.train
    lengths = row_lengths(train, has_sources=examples[0].source_ids is not None)
    slots = train.batch_size * lengths.tokens
    tokens = sum(example.tokens for example in examples)
    if not train.packing:
        batches = math.ceil(len(examples) / train.batch_size)
        return Epoch(batches, tokens / (len(examples) * lengths.tokens))
    from qlora_jax.data.loader import Loader

    loader = Loader(
        examples,
        batch_size=train.batch_size,
        seq_len=lengths.seq_len,
        source_len=lengths.source_len,
        packing=True,
        seed=config.seed,
        repeat=False,
    )
    used = [_used_slots(batch) for batch in itertools.islice(loader, _PROBED_BATCHES)]
    if len(used) < _PROBED_BATCHES:
        return Epoch(max(len(used), 1), sum(used) / (max(len(used), 1) * slots))
    fill = sum(used) / (len(used) * slots)
    return Epoch(math.ceil(tokens / (fill * slots)), fill)


def _used_slots(batch: "Batch") -> int:
    used = int((batch["segment_ids"] > 0).sum())
    return used + int((batch["source_segment_ids"] > 0).sum()) if "source_segment_ids" in batch else used


def planned_steps(config: TrainConfig, epoch: Epoch) -> int:
    """train.steps, or the optimizer steps that train.epochs takes, rounded up."""
    if config.train.steps is not None:
        return config.train.steps
    assert config.train.epochs is not None
    return math.ceil(config.train.epochs * epoch.batches / config.train.accumulation)


def describe_plan(
    config: TrainConfig, sizes: Sizes, dataset: Dataset, epoch: Epoch, positions: int | None = None
) -> str:
    """The start-up lines: model, memory, data, tokens, steps, output.

    Args:
      positions: what the model was pretrained with; rows that are longer get a line of their own.
    """
    train = config.train
    steps = planned_steps(config, epoch)
    passes = steps * train.accumulation / epoch.batches
    linears = "linears in 4 bits" if config.quant.type != "none" else "16 bits"
    placed = " (paged)" if config.optim.paged else ""
    rows = len(dataset.train) + dataset.train_too_long
    counted = f"{steps:,} step{'s' * (steps != 1)} of {_rows(train.batch_size * train.accumulation)}"
    longest = f"train.seq_len={train.seq_len}"
    if dataset.has_sources:
        longest += f" or train.target_len={row_lengths(train, has_sources=True).seq_len}"
    held_out = f"{_rows(len(dataset.evaluation))} evaluated"
    if dataset.eval_too_long:
        held_out += f" ({dataset.eval_too_long:,} too long)"
    lines = {
        "model": f"{Path(config.model.path or '').name}: {_millions(sizes.parameters)} parameters, "
        f"{_millions(sizes.trained)} trained in adapters ({sizes.trained / (sizes.parameters + sizes.trained):.1%})",
        "memory": f"weights {in_bytes(sizes.weight_bytes)} ({linears}), adapters {in_bytes(sizes.adapter_bytes)}, "
        f"optimizer {in_bytes(sizes.optimizer_bytes)}{placed}",
        "data": f"{Path(config.data.path or '').name}: {len(dataset.train):,} of {rows:,} rows kept, "
        f"{dataset.train_too_long:,} dropped (longer than {longest}); {held_out}",
        "tokens": f"{dataset.tokens:,} per epoch, {dataset.trained_tokens / dataset.tokens:.1%} of them trained; "
        f"{'packed' if train.packing else 'unpacked'} batches are {epoch.fill:.0%} full",
        "steps": f"{counted} (batch_size {train.batch_size} x accumulation {train.accumulation}), {passes:.2g} epochs",
        "output": config.output_dir,
    }
    if config.lora.adapter is not None:
        lines["adapter"] = f"goes on from {config.lora.adapter}"
    beyond = sum(len(example.input_ids) > positions for example in dataset.train) if positions else 0
    if beyond:
        lines["caution"] = (
            f"{_rows(beyond)} longer than the {positions:,} positions the model was pretrained with; "
            f"train.seq_len={positions} drops {'it' if beyond == 1 else 'them'}"
        )
    return "\n".join(f"{name:<8} {text}" for name, text in lines.items())


def _rows(count: int) -> str:
    return f"{count:,} row{'s' * (count != 1)}"


def _linear_bytes(checkpoint: "Checkpoint", name: str, count: int, config: TrainConfig) -> int:
    from qlora_jax.checkpoints.bitsandbytes import BitsandbytesCheckpoint

    block_size: int = config.quant.block_size
    double_quant = config.quant.double_quant
    dense = config.quant.type == "none"
    if isinstance(checkpoint, BitsandbytesCheckpoint):
        form = checkpoint.form(name)
        dense = form is None
        if form is not None:
            block_size, double_quant = form.block_size, form.double_quant
    if dense:
        return 2 * count
    blocks = math.ceil(count / block_size)
    scales = blocks + 4 * math.ceil(blocks / _SCALE_GROUP) + 4 if double_quant else 4 * blocks
    return math.ceil(count / 2) + scales


def _millions(count: int) -> str:
    if count < 1e5:
        return f"{count:,}"
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"
