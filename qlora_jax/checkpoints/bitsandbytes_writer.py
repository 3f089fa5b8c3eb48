"""Writes 4-bit weights as folders that transformers, vLLM and bitsandbytes load (keys: see bitsandbytes.py)."""

import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from qlora_jax.checkpoints.atomic import whole_folder
from qlora_jax.checkpoints.bitsandbytes import Form
from qlora_jax.checkpoints.companions import config_of, copy_companions, write_config
from qlora_jax.checkpoints.source import Checkpoint, open_checkpoint
from qlora_jax.checkpoints.t5 import is_t5
from qlora_jax.checkpoints.tensorwriter import TensorSpec, write_shards
from qlora_jax.errors import UserError
from qlora_jax.nf4.codebook import CODEBOOKS, DYNAMIC_MAP, SCALE_GROUP
from qlora_jax.nf4.tensor import NF4Tensor

if TYPE_CHECKING:
    from qlora_jax.models.decoder import Decoder

QUANT_TYPES = ("nf4", "fp4")
SHARD_BYTES = 5 * 10**9
# Longest JSON of a float32: sign, 17 digits, point, exponent.
_LONGEST_OFFSET = -1.2345678901234567e-100


def save_bitsandbytes(
    model: "Decoder", folder: str | Path, *, source: str | Path | Checkpoint, shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes the base of a model, without adapters (see save_adapter), as a `*-bnb-4bit` folder.

    Bytes are written as they are, weight by weight. The folder appears whole or not at all, and replaces an older one
    of that name.

    Args:
      model: with linears in "nf4" or "fp4"; those that are dense are written dense, and named as skipped.
      folder: where to.
      source: what the model was loaded from, for its configuration and, where it has one, its tokenizer.
      shard_bytes: largest size of a file.

    Raises:
      UserError: a T5; no linear in 4 bits; another 4-bit type; a path that is a file; a source that cannot be read.
    """
    checkpoint = open_checkpoint(source) if isinstance(source, str | Path) else source
    if is_t5(checkpoint.config):
        raise UserError(
            f"{checkpoint.path} is a T5",
            why="save_bitsandbytes writes decoders",
            fix="python -m qlora_jax.convert FOLDER OUT writes a T5's 4 bits",
        )
    names = checkpoint.names()
    values = {name: _value(model, name) for name in names}
    stored = {name: stack for name, (stack, _) in values.items() if isinstance(stack, NF4Tensor)}
    if not stored:
        raise UserError(
            "no linear of the model is in 4 bits",
            why="a folder of bitsandbytes holds nf4 or fp4",
            fix="load_model(path, quant_type='nf4')",
        )
    forms = {name: form_of(name, stack) for name, stack in stored.items()}
    dense = {name for name in names if name not in stored and _is_kernel(model, name)}

    def as_array(name: str) -> np.ndarray:
        value, layer = values[name]
        array = np.asarray(value if layer is None else value[layer])
        return np.ascontiguousarray(array.T) if name in dense else array

    def make(index: int) -> dict[str, np.ndarray]:
        name = names[index]
        if name not in stored:
            return {name: as_array(name)}
        stack, layer = values[name]
        return packed_tensors(name, jax.tree.map(lambda leaf: leaf[layer], stack))

    groups = [
        packed_specs(name, forms[name]) if name in forms else [_dense_spec(name, *values[name], name in dense)]
        for name in names
    ]
    with whole_folder(Path(folder)) as filled:
        write_shards(filled, groups, make, shard_bytes=shard_bytes)
        config = config_of(checkpoint)
        skipped = sorted({name.split(".")[-2] for name in dense})
        config["quantization_config"] = quantization_config(next(iter(forms.values())), skipped)
        write_config(filled, config)
        copy_companions(checkpoint, filled)


def quantization_config(form: Form, skipped: Sequence[str] = ()) -> dict[str, Any]:
    """What config.json says of a folder whose linears have a form, but for those that were skipped."""
    return {
        "bnb_4bit_compute_dtype": form.dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": form.quant_type,
        "bnb_4bit_use_double_quant": form.double_quant,
        "llm_int8_skip_modules": ["lm_head", *skipped] if skipped else None,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }


def form_of(name: str, w: NF4Tensor) -> Form:
    """How a weight is to be stored.

    Raises:
      UserError: of a 4-bit type that bitsandbytes does not have.
    """
    if w.quant_type not in QUANT_TYPES:
        raise UserError(
            f"{name!r} is of type {w.quant_type}",
            why=f"bitsandbytes has {' and '.join(QUANT_TYPES)} alone",
            fix="load_model(path, quant_type='nf4')",
        )
    return Form((w.out_features, w.in_features), w.quant_type, w.block_size, w.dtype, w.absmax_scale is not None)


def packed_specs(name: str, form: Form) -> list[TensorSpec]:
    """The tensors that bitsandbytes stores of one weight.

    Floats come first and sizes add up to a multiple of 8, so that every tensor of a file lies aligned.
    """
    count = math.prod(form.shape)
    blocks = math.ceil(count / form.block_size)
    specs = [TensorSpec(f"{name}.quant_map", (16,), "float32")]
    if form.double_quant:
        specs.append(TensorSpec(f"{name}.nested_absmax", (math.ceil(blocks / SCALE_GROUP),), "float32"))
        specs.append(TensorSpec(f"{name}.nested_quant_map", (256,), "float32"))
    specs.append(TensorSpec(f"{name}.absmax", (blocks,), "uint8" if form.double_quant else "float32"))
    specs.append(TensorSpec(name, (math.ceil(count / 2), 1), "uint8"))
    size = len(_state(form, _LONGEST_OFFSET if form.double_quant else None))
    size += -(sum(spec.nbytes for spec in specs) + size) % 8
    return [*specs, TensorSpec(f"{name}.quant_state.bitsandbytes__{form.quant_type}", (size,), "uint8")]


def packed_tensors(name: str, w: NF4Tensor) -> dict[str, np.ndarray]:
    """The arrays of `packed_specs`, of one layer in either layout, in JAX's or NumPy's arrays."""
    form = form_of(name, w)
    w = w.to_layout("rows")
    tensors = {
        name: np.asarray(w.packed).reshape(-1, 1),
        f"{name}.absmax": np.asarray(w.absmax).reshape(-1),
        f"{name}.quant_map": CODEBOOKS[w.quant_type].values,
    }
    if form.double_quant:
        tensors[f"{name}.nested_absmax"] = np.asarray(w.absmax_scale)
        tensors[f"{name}.nested_quant_map"] = DYNAMIC_MAP
    state = packed_specs(name, form)[-1]
    encoded = _state(form, float(w.absmax_offset) if form.double_quant else None)
    # JSON may end in spaces: its size has to be known before the offset is.
    return tensors | {state.name: np.frombuffer(encoded.ljust(state.shape[0]), np.uint8)}


def _state(form: Form, offset: float | None) -> bytes:
    state: dict[str, Any] = {
        "quant_type": form.quant_type,
        "blocksize": form.block_size,
        "dtype": form.dtype,
        "shape": list(form.shape),
    }
    if offset is not None:
        state |= {"nested_blocksize": SCALE_GROUP, "nested_dtype": "float32", "nested_offset": offset}
    return json.dumps(state).encode()


def _module(model: "Decoder", name: str) -> tuple[Any, str, int | None]:
    """The module that holds a tensor, the tensor's name in it, and its layer in a stack."""
    inner = name.removeprefix("model.").split(".")
    layer = int(inner.pop(inner.index("layers") + 1)) if "layers" in inner else None
    *path, leaf = inner
    return functools.reduce(getattr, path, model), leaf, layer


def _is_kernel(model: "Decoder", name: str) -> bool:
    module, leaf, _ = _module(model, name)
    return leaf == "weight" and hasattr(module, "kernel")


def _value(model: "Decoder", name: str) -> tuple[Any, int | None]:
    module, leaf, layer = _module(model, name)
    variable = module.kernel if leaf == "weight" and hasattr(module, "kernel") else getattr(module, leaf)
    return variable.get_value(), layer


def _dense_spec(name: str, value: Any, layer: int | None, is_kernel: bool) -> TensorSpec:
    shape = tuple(value.shape if layer is None else value.shape[1:])
    return TensorSpec(name, shape[::-1] if is_kernel else shape, str(value.dtype))
