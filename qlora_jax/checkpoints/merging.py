"""A checkpoint with an adapter merged into it, tensor by tensor as it is read: W + scaling * B @ A, in float32.

Of DoRA the rows of that are scaled to the magnitudes that were trained.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qlora_jax.checkpoints.conversion import block_linears, decoded
from qlora_jax.checkpoints.peft_reader import WHOLE_MODULES, PeftAdapter, read_adapter
from qlora_jax.checkpoints.source import Checkpoint
from qlora_jax.nf4.streaming import quantize_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class MergedCheckpoint:
    """See `Checkpoint`. Its tensors have the base's names, shapes and dtypes, but for `dtype`.

    Args:
      base: a checkpoint; of one in bitsandbytes' 4 bits the values that the bytes stand for are merged into.
      adapter: of the base's linears.
      quantized: `quant_type`, `block_size` and `double_quant` of the linears in training: merged into are then the
        values that training multiplied by, 4 bits decoded. None: the values that are stored.
      dtype: of all tensors of the result; None: each keeps its own.
    """

    def __init__(
        self,
        base: Checkpoint,
        adapter: PeftAdapter,
        *,
        quantized: Mapping[str, Any] | None = None,
        dtype: str | None = None,
    ) -> None:
        self.path: Path = base.path
        self.config = base.config
        self._base, self._adapter, self._dtype = base, adapter, dtype
        self._quantized = quantized
        self._linears = set(block_linears(base))

    def names(self) -> list[str]:
        return self._base.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._base.shape(name)

    def dtype(self, name: str) -> np.dtype:
        return self._base.dtype(name) if self._dtype is None else np.dtype(self._dtype)

    def read(self, name: str) -> np.ndarray:
        return self._merged(name).astype(self.dtype(name), copy=False)

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        return self._base.tokenizer()

    def fingerprint(self) -> str:
        return self._base.fingerprint()

    def _merged(self, name: str) -> np.ndarray:
        if name in self._adapter.whole:
            return self._adapter.whole[name]
        value = self._base.read(name)
        if name in self._linears and self._quantized is not None:
            value = decoded(quantize_rows(value, **self._quantized)[0])
        linear = self._adapter.linears.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if linear is None:
            return value
        merged = linear.b @ (np.float32(linear.scaling) * linear.a)
        merged += value.astype(np.float32)
        if linear.magnitude is not None:
            merged *= (linear.magnitude / np.maximum(np.linalg.norm(merged, axis=1), 1e-15))[:, None]
        return merged


def adapter_for(checkpoint: Checkpoint, folder: Path) -> PeftAdapter:
    """An adapter, read for the linears of a checkpoint.

    Raises:
      UserError: see `read_adapter`.
    """
    shapes = {name.removesuffix(".weight"): checkpoint.shape(name) for name in block_linears(checkpoint)}
    linears = {name: (shape[0], shape[1]) for name, shape in shapes.items()}
    whole = {name: checkpoint.shape(name) for name in WHOLE_MODULES.values() if name in checkpoint.names()}
    return read_adapter(folder, linears, whole if len(whole) == len(WHOLE_MODULES) else {})
