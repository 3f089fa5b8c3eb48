"""QLoRA (arXiv 2305.14314) for JAX and Flax: frozen 4-bit NF4 weights, trainable low-rank adapters.

Names are imported on first use, so that taking `nf4_dense` does not import transformers, grain or orbax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlora_jax.checkpoints.peft import load_adapter
    from qlora_jax.models.loading import load_model
    from qlora_jax.nf4 import NF4Tensor, dequantize, nf4_matmul, quantize
    from qlora_jax.nn import nf4_dense, quantize_model, scan_layers, trainable
    from qlora_jax.optim import paged

__version__ = "0.1.0"

_HOMES = {
    "NF4Tensor": "qlora_jax.nf4",
    "quantize": "qlora_jax.nf4",
    "dequantize": "qlora_jax.nf4",
    "nf4_matmul": "qlora_jax.nf4",
    "nf4_dense": "qlora_jax.nn",
    "quantize_model": "qlora_jax.nn",
    "scan_layers": "qlora_jax.nn",
    "trainable": "qlora_jax.nn",
    "paged": "qlora_jax.optim",
    "load_model": "qlora_jax.models.loading",
    "load_adapter": "qlora_jax.checkpoints.peft",
}

__all__ = [
    "NF4Tensor",
    "dequantize",
    "load_adapter",
    "load_model",
    "nf4_dense",
    "nf4_matmul",
    "paged",
    "quantize",
    "quantize_model",
    "scan_layers",
    "trainable",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
