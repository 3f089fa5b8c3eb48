"""Whether a checkpoint is the model that its configuration describes, told from names, shapes and dtypes alone."""

import difflib
import re
from collections.abc import Sequence

from qlora_jax.checkpoints.bitsandbytes import BitsandbytesCheckpoint
from qlora_jax.checkpoints.source import Checkpoint
from qlora_jax.errors import UserError, UserErrors
from qlora_jax.models.config import DecoderTensors
from qlora_jax.models.t5_config import T5Config
from qlora_jax.nn.traversal import matching

_LAYERS_NAMED = 4
_LAYER = re.compile(r"(?<=layers\.)\d+|(?<=\bblock\.)\d+")


def check_stored(checkpoint: Checkpoint, quant_type: str | None, block_size: int, double_quant: bool) -> None:
    """Whether what was asked for is what a quantized checkpoint holds. Defaults ask for nothing.

    Raises:
      UserError: everything that contradicts it, at once.
    """
    if not isinstance(checkpoint, BitsandbytesCheckpoint):
        return
    forms = [form for name in checkpoint.names() if (form := checkpoint.form(name)) is not None]
    kinds, sizes = {form.quant_type for form in forms}, {form.block_size for form in forms}
    wrong = []
    if quant_type not in (*kinds, "nf4"):
        wrong.append((f"quant.type={quant_type or 'none'}", f"quant.type={min(kinds)}"))
    if block_size not in (*sizes, 64):
        wrong.append((f"quant.block_size={block_size}", f"quant.block_size={min(sizes)}"))
    if not double_quant and all(form.double_quant for form in forms):
        wrong.append(("quant.double_quant=false", "quant.double_quant=true"))
    errors = [
        UserError(
            f"{asked} for {checkpoint.path}, which bitsandbytes has quantized otherwise",
            why="its bytes are taken as they are: to quantize again would add error to error",
            fix=f"{fix}, or model.path=FOLDER of the 16-bit model",
        )
        for asked, fix in wrong
    ]
    if errors:
        raise errors[0] if len(errors) == 1 else UserErrors(errors)


def check_targets(targets: Sequence[str], linears: Sequence[tuple[str, str]]) -> None:
    """Whether each target names some of a model's linears, which are given by stack and name inside a block.

    Raises:
      UserError: one does not.
    """
    paths = [(*stack.split("."), *linear.split(".")) for stack, linear in linears]
    names = list(dict.fromkeys(path[-1] for path in paths))
    for target in targets:
        if not any(matching(path, (target,)) for path in paths):
            close = difflib.get_close_matches(target, names, n=1)
            raise UserError(
                f"unknown LoRA target {target!r}",
                why=f"the linears of a block are {', '.join(names)}",
                fix=f"did you mean {close[0]}?" if close else "",
            )


def check_tensors(checkpoint: Checkpoint, config: DecoderTensors | T5Config) -> None:
    """Compares names, shapes and dtypes with what the configuration asks for; reads no tensor.

    Raises:
      UserError: everything that does not fit, at once.
    """
    expected = config.tensor_shapes()
    names = checkpoint.names()
    errors = []
    missing = [name for name in expected if name not in set(names)]
    unexpected = [name for name in names if name not in expected]
    if missing:
        errors.append(
            UserError(
                f"{len(missing)} tensors are missing in {checkpoint.path}: {_listed(missing, unexpected)}",
                why="the model's configuration asks for them",
                fix="fetch the checkpoint again; config.json and the weights must belong together",
            )
        )
    if unexpected:
        listing = _listed(unexpected, missing or list(expected))
        errors.append(
            UserError(
                f"{len(unexpected)} tensors of {checkpoint.path} have no place in the model: {listing}",
                why="leaving them out would compute something else than the model they belong to",
                fix="config.json and the weights must belong together, and be a plain model of its family",
            )
        )
    there = [name for name in names if name in expected]
    wrong: dict[tuple[tuple[int, ...], tuple[int, ...]], list[str]] = {}
    for name in there:
        if tuple(checkpoint.shape(name)) != expected[name]:
            wrong.setdefault((tuple(checkpoint.shape(name)), expected[name]), []).append(name)
    errors += [
        UserError(
            f"{_subject(alike, checkpoint)} shape {found}, expected {wanted}",
            why=f"that is what the model's configuration says ({_sizes(config)})",
            fix="config.json and the weights must belong together",
        )
        for (found, wanted), alike in wrong.items()
    ]
    errors += _mixed_dtypes(checkpoint, there)
    if errors:
        raise errors[0] if len(errors) == 1 else UserErrors(errors)


def _subject(names: Sequence[str], checkpoint: Checkpoint) -> str:
    if len(names) == 1:
        return f"tensor {names[0]!r} of {checkpoint.path} has"
    return f"tensors {_listed(names)} of {checkpoint.path} have"


def _mixed_dtypes(checkpoint: Checkpoint, names: list[str]) -> list[UserError]:
    """Layers are stacked, so the same tensor has to have one dtype in all of them."""
    first: dict[str, str] = {}
    for name in names:
        number = _LAYER.search(name)
        if number is None:
            continue
        other = first.setdefault(f"{name[: number.start()]}.{name[number.end() :]}", name)
        if checkpoint.dtype(name) != checkpoint.dtype(other):
            found, wanted = checkpoint.dtype(name), checkpoint.dtype(other)
            return [
                UserError(
                    f"tensor {name!r} of {checkpoint.path} is stored as {found}, {other!r} as {wanted}",
                    why="one tensor must have the same dtype in all layers",
                )
            ]
    return []


def _sizes(config: DecoderTensors | T5Config) -> str:
    keys: tuple[str, ...] = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")
    keys += ("num_key_value_heads", "head_dim")
    if isinstance(config, T5Config):
        keys = ("vocab_size", "d_model", "d_ff", "num_heads", "d_kv", "relative_attention_num_buckets")
    return ", ".join(f"{key}={getattr(config, key)}" for key in keys)


def _listed(names: Sequence[str], others: Sequence[str] = ()) -> str:
    """All of some tensors, those of several layers under one name, each with the nearest of others."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_LAYER.sub("{}", name, count=1), []).append(name)
    parts = []
    for pattern, group in groups.items():
        layers = sorted((match[0] for name in group if (match := _LAYER.search(name))), key=int)
        many = f"{{{','.join(layers)}}}" if len(layers) <= _LAYERS_NAMED else f"{{{len(layers)} layers}}"
        shown = group[0] if len(group) == 1 else pattern.replace("{}", many)
        near = difflib.get_close_matches(group[0], others, n=1, cutoff=0.7)
        parts.append(shown + (f" (nearest: {near[0]})" if near else ""))
    return ", ".join(parts)
