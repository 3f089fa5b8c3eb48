"""Writes a model's frozen weights as a folder that transformers and bitsandbytes load (keys: see bitsandbytes.py)."""

import contextlib
import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from safetensors.numpy import save_file

from qlora_jax.checkpoints.atomic import whole_folder
from qlora_jax.checkpoints.source import Checkpoint, open_checkpoint
from qlora_jax.errors import UserError
from qlora_jax.nf4.codebook import CODEBOOKS, DYNAMIC_MAP, SCALE_GROUP
from qlora_jax.nf4.tensor import NF4Tensor

if TYPE_CHECKING:
    from qlora_jax.models.llama import Llama

_QUANT_TYPES = ("nf4", "fp4")


def save_bitsandbytes(model: "Llama", folder: str | Path, *, source: str | Path | Checkpoint) -> None:
    """Writes the base of a model, without adapters (see save_adapter), as a `*-bnb-4bit` folder.

    Bytes are written as they are. The folder appears whole or not at all, and replaces an older one of that name; host
    memory holds a copy of the base's 4 bits meanwhile.

    Args:
      model: with linears in "nf4" or "fp4"; those that are dense are written dense, and named as skipped.
      folder: where to.
      source: what the model was loaded from, for its configuration and, where it has one, its tokenizer.

    Raises:
      UserError: no linear in 4 bits; another 4-bit type; a path that is a file; a source that cannot be read.
    """
    checkpoint = open_checkpoint(source) if isinstance(source, str | Path) else source
    tensors: dict[str, np.ndarray] = {}
    stored: dict[str, NF4Tensor] = {}
    dense = set()
    for name in checkpoint.names():
        inner = name.removeprefix("model.").split(".")
        layer = int(inner.pop(1)) if inner[0] == "layers" else None
        *path, leaf = inner
        module = functools.reduce(getattr, path, model)
        if leaf == "weight" and hasattr(module, "kernel"):
            kernel = module.kernel.get_value()
            if isinstance(kernel, NF4Tensor):
                stored[name] = kernel
                tensors |= _packed_tensors(name, kernel, layer)
            else:
                dense.add(path[-1])
                tensors[name] = np.ascontiguousarray(np.asarray(kernel[layer]).T)
        else:
            value = getattr(module, leaf).get_value()
            tensors[name] = np.asarray(value if layer is None else value[layer])
    if not stored:
        raise UserError(
            "no linear of the model is in 4 bits",
            why="a folder of bitsandbytes holds nf4 or fp4",
            fix="load_model(path, quant_type='nf4')",
        )
    first = next(iter(stored.values()))
    config = {key: value for key, value in checkpoint.config.items() if value is not None}
    config["quantization_config"] = {
        "bnb_4bit_compute_dtype": first.dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": first.quant_type,
        "bnb_4bit_use_double_quant": first.absmax_scale is not None,
        "llm_int8_skip_modules": ["lm_head", *sorted(dense)] if dense else None,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }
    with whole_folder(Path(folder)) as filled:
        save_file(tensors, filled / "model.safetensors", metadata={"format": "pt"})
        (filled / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        tokenizer = None
        with contextlib.suppress(UserError):  # not every checkpoint has one
            tokenizer = checkpoint.tokenizer()
        if tokenizer is not None:
            tokenizer.save_pretrained(filled)


def _packed_tensors(name: str, stack: NF4Tensor, layer: int | None) -> dict[str, np.ndarray]:
    """What bitsandbytes stores of one layer."""
    if stack.quant_type not in _QUANT_TYPES:
        raise UserError(
            f"{name!r} is of type {stack.quant_type}",
            why=f"bitsandbytes has {' and '.join(_QUANT_TYPES)} alone",
            fix="load_model(path, quant_type='nf4')",
        )
    w = jax.tree.map(lambda leaf: leaf[layer], stack).to_layout("rows")
    in_features, out_features = w.shape
    state: dict[str, Any] = {
        "quant_type": w.quant_type,
        "blocksize": w.block_size,
        "dtype": w.dtype,
        "shape": [out_features, in_features],
    }
    tensors = {
        name: np.asarray(w.packed).reshape(-1, 1),
        f"{name}.absmax": np.asarray(w.absmax).reshape(-1),
        f"{name}.quant_map": CODEBOOKS[w.quant_type].values,
    }
    if w.absmax_scale is not None:
        state |= {"nested_blocksize": SCALE_GROUP, "nested_dtype": "float32", "nested_offset": float(w.absmax_offset)}
        tensors[f"{name}.nested_absmax"] = np.asarray(w.absmax_scale)
        tensors[f"{name}.nested_quant_map"] = DYNAMIC_MAP
    encoded = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return tensors | {f"{name}.quant_state.bitsandbytes__{w.quant_type}": encoded}
