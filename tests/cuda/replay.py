"""Executes launch plans of the CUDA kernels in the PTX interpreter: the data that the handlers execute on a GPU."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from packed_weight import DTYPES, PackedWeight
from ptx_interpreter import DeviceMemory, Launch, Module
from ptx_interpreter.toolchain import compile_ptx

from qlora_jax._lib import _plan

KERNELS = Path(__file__).parents[2] / "xla_ffi" / "cuda"
NVCC_FLAGS = ("--expt-relaxed-constexpr",)
# Lanes that run side by side in the interpreter, a matter of speed alone.
_LANES = 4096


@functools.cache
def kernel_module(source: Path, architecture: str = "sm_80") -> Module:
    """The PTX of a source file; it is compiled once for all tests."""
    return Module(compile_ptx(source, architecture, flags=NVCC_FLAGS))


def source_of(kernel: str) -> Path:
    """The file that defines an entry point."""
    for start, name in (("nf4_dequantize", "dequantize.cu"), ("nf4_sum_splits", "sum_splits.cu")):
        if kernel.startswith(start):
            return KERNELS / name
    return KERNELS / ("product_bf16.cu" if "_bf16_" in kernel else "product_f16.cu")


@dataclasses.dataclass
class Result:
    """What a plan left behind: the output, where every byte that nobody wrote is 0xFF, and the launches."""

    output: np.ndarray
    launches: list[Launch]


def memory_for(weight: PackedWeight, *sizes: int) -> DeviceMemory:
    """Room for the weight's operands, buffers of these sizes, the kernels' tables, and the gaps between them all."""
    group_scales = 0 if weight.group_scales is None else weight.group_scales.nbytes
    padded = weight.layers * (weight.out_features + 63) * (weight.in_features + 63) // 2
    return DeviceMemory((padded + weight.absmax.nbytes + group_scales + sum(sizes) + 65536) // 4096 * 4096)


def upload_weight(memory: DeviceMemory, weight: PackedWeight, layout: str, packed: np.ndarray | None) -> dict[str, int]:
    """Addresses of the weight's operands. What kernels must not read is at address 0."""
    addresses = {
        "packed": memory.upload(weight.packed(layout) if packed is None else packed),
        "absmax": memory.upload(weight.absmax),
        "group_scales": 0,
        "offsets": 0,
        "where": memory.upload(np.array(weight.where, np.int32)),
    }
    if weight.group_scales is not None and weight.offsets is not None:
        addresses["group_scales"] = memory.upload(weight.group_scales)
        addresses["offsets"] = memory.upload(weight.offsets)
    return addresses


def weight_problem(weight: PackedWeight) -> dict[str, Any]:
    """What a plan needs to know of a weight."""
    return {
        "weight_dtype": weight.dtype,
        "in_features": weight.in_features,
        "out_features": weight.out_features,
        "layers": weight.layers,
        "layer_groups": weight.layer_groups,
        "row_blocks": weight.row_blocks,
        "block_size": weight.block_size,
        "double_quantized": weight.double_quantized,
    }


def execute(
    plan: dict[str, Any],
    addresses: dict[str, int],
    memory: DeviceMemory,
    *,
    architecture: str = "sm_80",
    blocks: Sequence[tuple[int, int, int]] | None = None,
    **options: Any,
) -> list[Launch]:
    """Runs a plan's launches in order. Raises PTXError at the first report of any kind.

    Args:
      plan: as `_plan.plan` returns it.
      addresses: of the buffers that it names.
      memory: where those lie.
      architecture: whose PTX runs.
      blocks: run only these blocks of the first launch, and nothing else.
      options: of `Launch`, such as `seed`.
    """
    launches = []
    for launch in plan["launches"]:
        arguments = [
            addresses[argument[1]] + argument[2] if argument[0] == "pointer" else argument[1]
            for argument in launch["arguments"]
        ]
        name = launch["kernel"]
        module = kernel_module(source_of(name), architecture)
        options = {"fatal": "all", "lanes": _LANES, "profile": False, **options}
        launches.append(
            Launch(
                module, name, launch["grid"], launch["block"], arguments, launch["shared_bytes"], memory,
                blocks=blocks, **options,
            )
        )  # fmt: skip
        assert launches[-1].reports == {}
        if blocks is not None:
            break
    return launches


def multiply(
    operation: str,
    weight: PackedWeight,
    x: np.ndarray,
    *,
    route: str,
    splits: int = 1,
    packed: np.ndarray | None = None,
    x_offset: int = 0,
    **options: Any,
) -> Result:
    """Runs the plan of a product.

    Args:
      operation: "forward", or "dx", whose x is the output's gradient.
      weight: in the layout "fragments".
      x: [tokens, contraction], bfloat16 or float16.
      route: "skinny" or "tile".
      splits: parts of the contraction.
      packed: bytes in place of the weight's own.
      x_offset: numbers before x in its buffer.
      options: of `execute`.
    """
    outputs = weight.in_features if operation == "dx" else weight.out_features
    plan = _plan.plan(
        operation, route=route, layout="fragments", dtype=x.dtype.name, tokens=len(x), splits=splits,
        **weight_problem(weight),
    )  # fmt: skip
    memory = memory_for(weight, x.nbytes, len(x) * outputs * 2, plan["partials_bytes"])
    addresses = upload_weight(memory, weight, "fragments", packed)
    buffer = np.concatenate([np.full(x_offset, np.nan, x.dtype), x.reshape(-1)])
    addresses["x"] = memory.upload(buffer.view(np.uint16)) + 2 * x_offset
    addresses["y"] = memory.alloc(len(x) * outputs * 2)
    if plan["partials_bytes"]:
        addresses["partials"] = memory.alloc(plan["partials_bytes"])
    launches = execute(plan, addresses, memory, **options)
    y = memory.download(addresses["y"], (len(x), outputs), np.uint16).view(x.dtype)
    return Result(y, launches)


def dequantize(
    weight: PackedWeight, dtype: str, layout: str, packed: np.ndarray | None = None, **options: Any
) -> Result:
    """Runs the plan that makes a dense [out, in] of `dtype`; `packed` and `options` as for `multiply`."""
    plan = _plan.plan("dequantize", layout=layout, dtype=dtype, **weight_problem(weight))
    shape = weight.out_features, weight.in_features
    storage = np.dtype(f"u{DTYPES[dtype].itemsize}")
    memory = memory_for(weight, shape[0] * shape[1] * storage.itemsize)
    addresses = upload_weight(memory, weight, layout, packed)
    addresses["dense"] = memory.alloc(shape[0] * shape[1] * storage.itemsize)
    launches = execute(plan, addresses, memory, **options)
    return Result(memory.download(addresses["dense"], shape, storage).view(DTYPES[dtype]), launches)
