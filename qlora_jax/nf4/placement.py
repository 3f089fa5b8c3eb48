"""Which layout a weight gets where it lands: the one that the kernels of that device read fastest."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import jax

from qlora_jax.nf4.codebook import COMPILED_TYPES
from qlora_jax.nf4.kernels import cuda_kernels_loaded, platform_name
from qlora_jax.nf4.layout import check_layout
from qlora_jax.nf4.tensor import NF4Tensor

LAYOUT_VARIABLE = "QLORA_JAX_LAYOUT"

_override = jax.make_user_context(default_value=None)


def place(w: NF4Tensor) -> NF4Tensor:
    """The same weight in the layout for the device that holds it (see device_layout); itself where it has it already.

    While a stack is repacked, both orders of it are in memory.
    """
    return w.to_layout(device_layout(w.shape, w.block_size, platform_of(w.packed), w.quant_type))


def device_layout(shape: tuple[int, int], block_size: int, platform: str, quant_type: str = "nf4") -> str:
    """The layout for a weight that is going to live on a platform.

    Args:
      shape: `(in_features, out_features)`.
      block_size: weights per scale.
      platform: "cpu", "cuda", ... (see platform_of).
      quant_type: the 4-bit type.

    Returns:
      "fragments" on CUDA where its kernels are loaded and multiply such weights (NF4, whole blocks in a row, of 64 or
      more), else "rows". With use_layout or QLORA_JAX_LAYOUT: what that says, "rows" where there are no fragments.

    Raises:
      ValueError: QLORA_JAX_LAYOUT holds another word.
    """
    asked = _override.value or _check(os.environ.get(LAYOUT_VARIABLE) or "auto", LAYOUT_VARIABLE)
    if shape[0] % block_size != 0:
        return "rows"
    if asked != "auto":
        return asked
    multiplied = quant_type in COMPILED_TYPES and block_size >= 64
    return "fragments" if platform == "cuda" and cuda_kernels_loaded() and multiplied else "rows"


def platform_of(array: Any = None) -> str:
    """Where an array is; for one that is not on a device yet (NumPy, traced, abstract), where JAX puts new ones."""
    if isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer):
        return platform_name(next(iter(array.devices())).platform)
    default = jax.config.jax_default_device
    return platform_name(default if isinstance(default, str) else getattr(default, "platform", jax.default_backend()))


@contextlib.contextmanager
def use_layout(layout: str) -> Iterator[None]:
    """Overrides the layout of the weights that are made inside the block.

    Args:
      layout: "rows", "fragments", or "auto".

    Raises:
      ValueError: another word.
    """
    with _override(_check(layout, "use_layout")):
        yield


def _check(layout: str, source: str) -> str:
    if layout == "auto":
        return layout
    try:
        return check_layout(layout)
    except ValueError as error:
        raise ValueError(f"{source}: {error}, or 'auto'") from None
