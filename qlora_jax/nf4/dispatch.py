"""Which kernel multiplies on a CUDA GPU: a table by device and number of rows, what the kernels can take, overrides."""

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from qlora_jax.nf4.codebook import COMPILED_TYPES
from qlora_jax.nf4.kernels import ROUTE_CODES, asked_kernels, chosen_kernels, cuda_kernels_loaded, load_module, runs_on
from qlora_jax.nf4.tensor import NF4Tensor

CAPABILITY_VARIABLE = "QLORA_JAX_COMPUTE_CAPABILITY"
# What is assumed where a program is compiled for a GPU that is not there.
DEFAULT_CAPABILITY = "9.0"

# Multiprocessors of such a GPU: an H100 SXM.
DEFAULT_MULTIPROCESSORS = 132

_capability_override = jax.make_user_context(default_value=None)


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """The largest numbers of rows of x (tokens) that go to the "skinny" and to the "tile" kernel."""

    skinny: int
    tile: int


# Predicted, not measured: from counted instructions for each weight and the published rates of each architecture.
# "skinny" serves what is bound by reading the weight, up to 64 rows. "tile" uses mma.sync: on 8.x and 12.0 that is the
# tensor cores' full rate, and it wins until dequantizing is a small part of the product; on 9.0 and 10.0 mma.sync
# reaches about two thirds of what XLA's product does, so that it pays only where dequantizing costs more than a third.
_MMA_SYNC = Thresholds(skinny=64, tile=1536)
_WGMMA = Thresholds(skinny=64, tile=256)
_BOTH = ("forward", "input_gradient")
TABLE: Mapping[str, Mapping[str, Thresholds]] = {
    "8.0": dict.fromkeys(_BOTH, _MMA_SYNC),
    "8.6": dict.fromkeys(_BOTH, _MMA_SYNC),
    "8.9": dict.fromkeys(_BOTH, _MMA_SYNC),
    "9.0": dict.fromkeys(_BOTH, _WGMMA),
    "10.0": dict.fromkeys(_BOTH, _WGMMA),
    "12.0": dict.fromkeys(_BOTH, _MMA_SYNC),
}


def choose_route(rows: int, w: NF4Tensor, dtype: str, *, input_gradient: bool, compute_capability: str) -> str:
    """How a product of `rows` rows of activations with one layer of w runs on a CUDA GPU.

    Args:
      rows: rows of x (of dy), M.
      w: the weight.
      dtype: dtype of the activations.
      input_gradient: the product with the transpose.
      compute_capability: of the device, such as "9.0", at least "8.0".

    Returns:
      "skinny", "tile" or "dequantize"; "xla" for a type that the kernels do not know.

    Raises:
      ValueError: no kernels exist for that compute capability.
    """
    if w.quant_type not in COMPILED_TYPES:
        return "xla"
    if why_not_fused(w, dtype):
        return "dequantize"
    limits = thresholds(compute_capability)["input_gradient" if input_gradient else "forward"]
    if rows <= limits.skinny:
        return "skinny"
    return "tile" if rows <= limits.tile else "dequantize"


def why_not_fused(w: NF4Tensor, dtype: str) -> str | None:
    """Why the kernels that multiply 4-bit weights cannot take these operands; None where they can."""
    if reason := why_not_compiled(w):
        return reason
    if dtype == "float32":
        return "activations are float32, and tensor cores would round them"
    if w.layout != "fragments":
        return f"the weight has layout {w.layout!r}: w.to_layout('fragments')"
    if w.block_size < 64:
        return f"the weight has blocks of {w.block_size}, less than 64"
    if dtype == "float16" and w.dtype == "bfloat16":
        return "activations are float16 and the weight bfloat16, which float16 cannot hold"
    return None


def why_not_compiled(w: NF4Tensor) -> str | None:
    """Why no compiled kernel, on any platform, can take a weight; None where they can."""
    if w.quant_type not in COMPILED_TYPES:
        return f"the weight is {w.quant_type!r}, and the compiled kernels know {', '.join(COMPILED_TYPES)} alone"
    return None


def pure_jax_only(w: NF4Tensor) -> bool:
    """Whether a weight is multiplied in pure JAX on every platform.

    Raises:
      RuntimeError: it is, and compiled kernels were asked for.
    """
    reason = why_not_compiled(w)
    choice, asked_by = asked_kernels()
    if reason and choice not in ("auto", "xla"):
        raise RuntimeError(f"the {choice!r} kernels were asked for ({asked_by}), but {reason}: 'auto' or 'xla' runs it")
    return reason is not None


def thresholds(compute_capability: str) -> Mapping[str, Thresholds]:
    """The entry of the table: of the device, else of the nearest older one.

    Raises:
      ValueError: the device is older than all in the table.
    """
    older = [known for known in TABLE if _version(known) <= _version(compute_capability)]
    if not older:
        raise ValueError(f"no kernels exist for GPUs of compute capability {compute_capability}, only from 8.0 on")
    return TABLE[max(older, key=_version)]


@contextlib.contextmanager
def use_compute_capability(capability: str) -> Iterator[None]:
    """Overrides the GPU that products are planned for, in what is traced inside the block.

    Args:
      capability: such as "8.0"; for programs that are compiled on a machine without that GPU.

    Raises:
      ValueError: not a compute capability.
    """
    with _capability_override(_check_capability(capability, "use_compute_capability")):
        yield


def compute_capability() -> tuple[str, str]:
    """The GPU that products are planned for, and how that is known.

    Returns:
      The capability, and "use_compute_capability", "QLORA_JAX_COMPUTE_CAPABILITY", "device" (the oldest of this
      process's CUDA devices) or "default" ("9.0", where there is none).

    Raises:
      ValueError: the environment variable is not a compute capability.
    """
    if _capability_override.value is not None:
        return _capability_override.value, "use_compute_capability"
    if given := os.environ.get(CAPABILITY_VARIABLE):
        return _check_capability(given, CAPABILITY_VARIABLE), CAPABILITY_VARIABLE
    try:
        devices = jax.local_devices(backend="cuda")
    except RuntimeError:
        return DEFAULT_CAPABILITY, "default"
    return min((str(device.compute_capability) for device in devices), key=_version), "device"


def contraction_splits(route: str, rows: int, in_features: int, out_features: int, *, input_gradient: bool) -> int:
    """In how many parts a product's contraction is summed, so that all multiprocessors have work.

    The sums of the parts are added in order, so results repeat; how many there are depends on the shape and the size
    of the GPU alone (the smallest of this process's, or that of an H100 where there is none).

    Args:
      route: "skinny" or "tile".
      rows: rows of x (of dy).
      in_features, out_features: extents of the (local) weight.
      input_gradient: the product with the transpose.
    """
    return load_module("_plan").splits(
        "dx" if input_gradient else "forward",
        route=route,
        tokens=rows,
        in_features=in_features,
        out_features=out_features,
        multiprocessors=multiprocessors(),
    )


def multiprocessors() -> int:
    """Of the smallest CUDA device of this process; an H100's where there is none."""
    try:
        devices = jax.local_devices(backend="cuda")
    except RuntimeError:
        return DEFAULT_MULTIPROCESSORS
    return min(int(device.core_count) for device in devices)


def cuda_kernel() -> str:
    """What runs on CUDA: "xla", "ffi" (the table decides) or the one route that was asked for.

    Raises:
      RuntimeError: kernels were asked for, and are not loaded or not made for such a GPU.
    """
    choice = chosen_kernels("cuda")
    if choice == "xla" or (missing := _why_no_code()) is None:
        return choice
    if asked_kernels()[0] == "auto":
        return "xla"
    raise RuntimeError(f"the compiled NF4 kernels were asked for, but: {missing}")


def _why_no_code() -> str | None:
    """Why the loaded kernels cannot run on the GPU that programs are compiled for; None where they can."""
    capability, known_by = compute_capability()
    try:
        thresholds(capability)
    except ValueError as too_old:
        return str(too_old)
    if known_by == "device" and not runs_on(capability):
        return (
            f"they were not built for compute capability {capability}: QLORA_CUDA_ARCHITECTURES="
            f"{capability.replace('.', '')}-real pip install --force-reinstall --no-deps ."
        )
    return None


def cuda_route(rows: int, w: NF4Tensor, dtype: str, *, input_gradient: bool) -> str:
    """The route of one product on CUDA, overrides obeyed: "skinny", "tile", "dequantize" or "xla".

    Raises:
      RuntimeError: what was asked for is not there, or cannot take these operands.
    """
    if pure_jax_only(w):
        return "xla"
    choice = cuda_kernel()
    if choice == "ffi":
        capability, _ = compute_capability()
        return choose_route(rows, w, dtype, input_gradient=input_gradient, compute_capability=capability)
    if choice in ROUTE_CODES and (reason := why_not_fused(w, dtype)):
        raise RuntimeError(f"the {choice!r} kernel was asked for, but {reason}")
    return choice


def dispatch_report() -> dict[str, Any]:
    """What decides how products run, for a run's record.

    Returns:
      `asked` and `asked_by` (see use_kernels); `cuda`: None where its kernels are not loaded, else
      `compute_capability`, `known_by`, `multiprocessors` and `thresholds`, the largest numbers of rows by direction
      and kernel (empty for a GPU older than the kernels).
    """
    asked, asked_by = asked_kernels()
    report: dict[str, Any] = {"asked": asked, "asked_by": asked_by, "cuda": None}
    if cuda_kernels_loaded():
        capability, known_by = compute_capability()
        try:
            limits = {name: dataclasses.asdict(entry) for name, entry in thresholds(capability).items()}
        except ValueError:
            limits = {}
        report["cuda"] = {
            "compute_capability": capability,
            "known_by": known_by,
            "multiprocessors": multiprocessors(),
            "thresholds": limits,
        }
    return report


def _version(capability: str) -> tuple[int, ...]:
    return tuple(int(part) for part in capability.split("."))


def _check_capability(capability: str, source: str) -> str:
    if not re.fullmatch(r"\d{1,2}\.\d", capability):
        raise ValueError(f"{source} must be a compute capability such as 9.0, got {capability!r}")
    return capability
