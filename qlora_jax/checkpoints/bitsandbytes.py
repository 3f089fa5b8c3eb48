"""HF folders that bitsandbytes has quantized to 4 bits: the stored bytes become NF4Tensors, nothing is requantized.

A linear `P` of `[out, in]` is in 4 bits where `P.weight.quant_state.bitsandbytes__nf4` (or `__fp4`) exists; that tensor
is JSON. Beside it lie

    P.weight                    two codes a byte, of any storage dtype (`quant_storage`)
    P.weight.absmax             float32 scales; with double quantization uint8 codes, and then
    P.weight.nested_absmax      float32 scales of them, `nested_quant_map` their values, `nested_offset` in the JSON
    P.weight.quant_map          the 16 values

What the JSON says counts; of config.json only that the folder is bitsandbytes' and 4-bit. Everything else (the head,
embeddings, modules that were skipped) is plain.
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qlora_jax.checkpoints.hf import HFCheckpoint, read_config
from qlora_jax.checkpoints.tensorfile import first_line, read_metadata, read_tensors
from qlora_jax.errors import UserError
from qlora_jax.nf4.codebook import BLOCK_SIZES, CODEBOOKS, DYNAMIC_MAP, SCALE_GROUP
from qlora_jax.nf4.decode import dequantize
from qlora_jax.nf4.tensor import NF4Tensor, leaf_shapes

# In the header of the weights of folders that `convert` has written; see `quantized_from`.
QUANTIZED_FROM = "quantized_from"
_STATE = ".quant_state.bitsandbytes__"
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_MAPS = ("quant_map", "nested_quant_map")
_QUANT_TYPES = ("nf4", "fp4")
_DTYPES = ("bfloat16", "float16", "float32")


class Form(NamedTuple):
    """How a weight is stored: what weights must agree in to be one stack of layers. `shape` is `(out, in)`."""

    shape: tuple[int, int]
    quant_type: str
    block_size: int
    dtype: str
    double_quant: bool


def open_folder(folder: Path) -> HFCheckpoint:
    """An HF folder, quantized by bitsandbytes or not.

    Raises:
      UserError: see `open_checkpoint`.
    """
    quantized = read_config(folder).get("quantization_config")
    return BitsandbytesCheckpoint(folder) if quantized else HFCheckpoint(folder)


class BitsandbytesCheckpoint(HFCheckpoint):
    """A LLaMA with linears in 4 bits; see `Checkpoint`. `read` gives any tensor dense, `read_packed` its bytes."""

    stored_dtypes = ("U8", "I8", "F64")  # of packed bytes, beside those of plain weights

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        weights = {}
        for name in self._tensors:
            weight, found, quant_type = name.partition(_STATE)
            if found:
                if quant_type not in _QUANT_TYPES:
                    raise self._damaged(weight, f"its quant_state is of type {quant_type!r}", "nf4 and fp4 are read")
                weights[weight] = name
        if not weights:
            raise UserError(
                f"{folder} has no tensor in 4 bits",
                why="config.json says load_in_4bit, but no quant_state.bitsandbytes__nf4 or __fp4 is there",
                fix="model.path=FOLDER of the 16-bit model, or remove quantization_config from config.json",
            )
        self.quantized_from: str | None = read_metadata(min(self._files)).get(QUANTIZED_FROM)
        small = self._read_small([*weights.values(), *(f"{w}.{part}" for w in weights for part in _MAPS)])
        self._offsets: dict[str, np.float32] = {}
        self._maps: dict[str, np.ndarray] = {}
        self._forms: dict[str, Form] = {}
        for weight, state_name in weights.items():
            state = self._parse_state(weight, state_name.partition(_STATE)[2], small[state_name])
            form = self._check_form(weight, state)
            values = small[f"{weight}.quant_map"]
            # bitsandbytes' kernels have this table compiled in, so the stored one is no more than a label.
            if not np.allclose(np.ravel(values), CODEBOOKS[form.quant_type].values, rtol=0, atol=1e-6):
                raise self._damaged(
                    weight, f"its quant_map is not {form.quant_type}'s", "its codes would stand for other values"
                )
            if form.double_quant:
                self._offsets[weight] = np.float32(state["nested_offset"])
                nested_map = small[f"{weight}.nested_quant_map"]
                if not np.array_equal(nested_map, DYNAMIC_MAP):
                    self._maps[weight] = nested_map
                    form = form._replace(double_quant=False)
            self._forms[weight] = form
        companions = {f"{weight}.{part}" for weight in weights for part in _PARTS} | set(weights.values())
        self._names = [name for name in self._names if name not in companions]
        for name in self._names:
            if name not in self._forms and self._tensors[name].dtype.name in ("uint8", "int8", "float64"):
                raise self._damaged(
                    name,
                    f"it is stored as {self._tensors[name].dtype}, without a quant_state",
                    "bytes without block size, shape and type cannot be decoded",
                )

    def form(self, name: str) -> Form | None:
        """How a weight is stored; None: it is dense."""
        return self._forms.get(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._forms[name].shape if name in self._forms else super().shape(name)

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(self._forms[name].dtype) if name in self._forms else super().dtype(name)

    def read(self, name: str) -> np.ndarray:
        if name not in self._forms:
            return super().read(name)
        return np.asarray(dequantize(self.read_packed(name))).T

    def read_packed(self, name: str) -> NF4Tensor:
        """The weight with the bytes that are stored, in NumPy arrays and layout "rows".

        Scales that were quantized with another map than ours (bitsandbytes computes it, and by the processor it differs
        in a last bit) are decoded with it, to float32.

        Args:
          name: of a weight that has a `form`.
        """
        form = self._forms[name]
        leaves: dict[str, Any] = {
            "packed": super().read(name).reshape(-1).view(np.uint8),
            "absmax": super().read(f"{name}.absmax"),
        }
        if name in self._offsets:
            scale, offset = super().read(f"{name}.nested_absmax"), self._offsets[name]
            if form.double_quant:
                leaves |= {"absmax_scale": scale, "absmax_offset": offset}
            else:
                groups = np.arange(leaves["absmax"].size) // SCALE_GROUP
                leaves["absmax"] = self._maps[name][leaves["absmax"]] * scale[groups] + offset
        out_features, in_features = form.shape
        shapes = leaf_shapes((in_features, out_features), form.block_size, form.double_quant)
        arrays: dict[str, Any] = {leaf: np.asarray(value).reshape(shapes[leaf][0]) for leaf, value in leaves.items()}
        return NF4Tensor(
            **arrays,
            shape=(in_features, out_features),
            quant_type=form.quant_type,
            block_size=form.block_size,
            dtype=form.dtype,
        )

    def _read_small(self, names: list[str]) -> dict[str, np.ndarray]:
        """Those of many small tensors that are there, each file opened once."""
        by_file: dict[Path, list[str]] = {}
        for name in filter(self._tensors.__contains__, names):
            by_file.setdefault(self._tensors[name].file, []).append(name)
        return {name: value for file, held in by_file.items() for name, value in read_tensors(file, held).items()}

    def _parse_state(self, weight: str, quant_type: str, raw: np.ndarray) -> dict[str, Any]:
        try:
            state = json.loads(raw.tobytes())
            state["shape"] = tuple(map(int, state["shape"]))
            found = {"quant_type": state["quant_type"], "blocksize": state["blocksize"], "dtype": state["dtype"]}
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(
                weight, "its quant_state is not as bitsandbytes writes it", first_line(error)
            ) from error
        nested = f"{weight}.nested_absmax" in self._tensors or "nested_offset" in state
        allowed: dict[str, tuple[Any, ...]] = {"quant_type": (quant_type,), "blocksize": BLOCK_SIZES, "dtype": _DTYPES}
        if nested:
            keys = ("nested_blocksize", "nested_dtype", "nested_offset")
            found |= {key: state.get(key) for key in keys}
            allowed |= {"nested_blocksize": (SCALE_GROUP,), "nested_dtype": ("float32",)}
        for key, value in found.items():
            if key == "nested_offset":
                if not isinstance(value, int | float) or not math.isfinite(value):
                    raise self._damaged(weight, f"nested_offset={value!r} in its quant_state", "it is a finite number")
            elif value not in allowed[key]:
                wanted = ", ".join(map(str, allowed[key]))
                raise self._damaged(weight, f"{key}={value!r} in its quant_state", f"what is read is {wanted}")
        if len(state["shape"]) != 2 or min(state["shape"]) < 1:
            raise self._damaged(weight, f"shape={state['shape']} in its quant_state", "a linear has [out, in]")
        return state | {"nested": nested}

    def _check_form(self, weight: str, state: dict[str, Any]) -> Form:
        """Compares names, dtypes and sizes of a weight's tensors with what its quant_state asks for."""
        count, nested = math.prod(state["shape"]), state["nested"]
        blocks = math.ceil(count / state["blocksize"])
        expected: dict[str, tuple[str, int]] = {
            "absmax": ("uint8" if nested else "float32", blocks),
            "quant_map": ("float32", 16),
        }
        if nested:
            expected["nested_absmax"] = ("float32", math.ceil(blocks / SCALE_GROUP))
            expected["nested_quant_map"] = ("float32", 256)
        for part, (dtype, size) in expected.items():
            name = f"{weight}.{part}"
            if name not in self._tensors:
                raise self._damaged(weight, f"{name!r} is missing", "without it codes have no value")
            stored = self._tensors[name]
            if (stored.dtype.name, math.prod(stored.shape)) != (dtype, size) or len(stored.shape) > 1:
                raise self._damaged(
                    weight,
                    f"{part} of {stored.dtype}{list(stored.shape)}, not {dtype}[{size}]",
                    "saved after an evaluation on a CPU, bitsandbytes' scales are repacked and cannot be read back",
                )
        packed = self._tensor(weight)
        held, needed = math.prod(packed.shape) * packed.dtype.itemsize, math.ceil(count / 2)
        if held != needed:
            raise self._damaged(weight, f"it has {held} bytes", f"{needed} hold {list(state['shape'])} in 4 bits")
        return Form(state["shape"], state["quant_type"], state["blocksize"], state["dtype"], nested)

    def _damaged(self, weight: str, seen: str, why: str) -> UserError:
        return UserError(
            f"{weight!r} of {self.path} cannot be read: {seen}",
            why=why,
            fix="fetch the folder again, or model.path=FOLDER of the 16-bit model",
        )
