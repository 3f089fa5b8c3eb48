"""Times predicted from counted instructions and published peaks. Nothing here was measured.

A product takes as long as the slowest of five: bytes through memory, issue slots (four warps in a clock), tensor cores,
shared memory (128 bytes in a clock), the library's product where one is used. Latencies are taken as hidden, banks as
free of collisions; blocks are spread evenly, and the multiprocessor with most of them counts.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kernel_gates.architectures import GPU, GPUS
from qlora_jax._lib import _plan
from qlora_jax.nf4 import NF4Tensor
from qlora_jax.nf4.dispatch import choose_route

SHAPES = {  # (in, out)
    "7B": ((4096, 4096), (4096, 11008), (11008, 4096)),
    "13B": ((5120, 5120), (5120, 13824), (13824, 5120)),
    "65B": ((8192, 8192), (8192, 22016), (22016, 8192)),
    "8B": ((4096, 1024), (4096, 14336), (14336, 4096)),
    "70B": ((8192, 1024), (8192, 28672), (28672, 8192)),
}
ROWS = (1, 8, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
ROUTES = ("skinny", "tile", "dequantize")

# Bytes of a weight with double-quantized scales.
_WEIGHT_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# Seconds until a first kernel runs, and between one kernel and the next: an estimate.
_LAUNCH, _NEXT_LAUNCH = 2e-6, 1e-6


@dataclass(frozen=True)
class Prediction:
    """`bound`: what takes longest: "memory", "issue", "tensor", "shared" or "library"."""

    seconds: float
    bound: str
    splits: int = 1


@dataclass(frozen=True)
class Row:
    gpu: str
    in_features: int
    out_features: int
    rows: int
    direction: str
    route: str  # that dispatch picks
    floor: float  # seconds
    times: Mapping[str, Prediction]  # by route


def rows(figures: Mapping[str, Any]) -> Iterator[Row]:
    """Every GPU, shape, number of rows and direction.

    Args:
      figures: `kernels` of sass.json.
    """
    shapes = [shape for model in SHAPES.values() for shape in model]
    for (name, gpu), direction, (k, n), m in itertools.product(GPUS.items(), ("forward", "dx"), shapes, ROWS):
        w = NF4Tensor(None, None, shape=(k, n), layout="fragments")
        capability, back = gpu.compute_capability, direction == "dx"
        route = choose_route(m, w, "bfloat16", input_gradient=back, compute_capability=capability)
        kernels = figures[gpu.architecture]
        times = {route: predict(gpu, kernels, direction, route, m, k, n) for route in ROUTES}
        yield Row(name, k, n, m, direction, route, floor(gpu, m, k, n), times)


def floor(gpu: GPU, m: int, k: int, n: int) -> float:
    """Seconds that no kernel can undercut: every byte once at full bandwidth, every multiply-add at the full rate."""
    return max((_WEIGHT_BYTES * n * k + 2 * m * (k + n)) / gpu.bandwidth, 2 * m * n * k / gpu.floor)


def predict(
    gpu: GPU, figures: Mapping[str, Any], direction: str, route: str, m: int, in_features: int, out_features: int
) -> Prediction:
    """One product of m rows of bfloat16 activations."""
    sizes = {"in_features": in_features, "out_features": out_features}
    if route == "dequantize":
        return _dequantize_and_multiply(gpu, figures, m, **sizes)
    splits = _plan.splits(direction, route=route, tokens=m, multiprocessors=gpu.multiprocessors, **sizes)
    plan = _plan.plan(direction, route=route, tokens=m, splits=splits, **sizes)
    contraction, outputs = (in_features, out_features) if direction == "forward" else (out_features, in_features)
    launch = plan["launches"][0]
    kernel = figures[launch["kernel"]]
    shape = next(s for s in _plan.product_shapes() if launch["kernel"].endswith(f"_t{s['tokens']}"))
    turns = math.ceil(math.ceil(contraction / 64) / splits / shape["k_groups"])
    # Warps of the busiest multiprocessor, each with its turns of the loop and the rest of the kernel once.
    warps = math.ceil(math.prod(launch["grid"]) / gpu.multiprocessors) * kernel["threads"] // 32
    slots = turns * kernel["path"] + kernel["instructions"] - kernel["path"]
    times = {
        "memory": (_WEIGHT_BYTES * in_features * out_features + 2 * m * (contraction + outputs)) / _bandwidth(gpu),
        "issue": warps * slots / 4 / gpu.clock,
        "tensor": warps * turns * kernel["kinds"]["tensor"] * gpu.mma_clocks / 4 / gpu.clock,
        "shared": warps * turns * kernel["shared_clocks"] / gpu.clock,
    }
    bound = max(times, key=lambda name: times[name])
    after = 0.0
    if splits > 1:  # written, read again and added
        after = _NEXT_LAUNCH + 2 * plan["partials_bytes"] / _bandwidth(gpu)
    return Prediction(_LAUNCH + times[bound] + after, bound, splits)


def _dequantize_and_multiply(
    gpu: GPU, figures: Mapping[str, Any], m: int, in_features: int, out_features: int
) -> Prediction:
    weights = in_features * out_features
    kernel = figures["nf4_dequantize_fragments_bf16"]
    launch = _plan.plan("dequantize", in_features=in_features, out_features=out_features)["launches"][0]
    warps = math.ceil(math.prod(launch["grid"]) / gpu.multiprocessors) * kernel["threads"] // 32
    dequantize = max(
        (_WEIGHT_BYTES + 2) * weights / _bandwidth(gpu),
        warps * kernel["path"] / 4 / gpu.clock,
        warps * kernel["shared_clocks"] / gpu.clock,
    )
    memory = (2 * weights + 2 * m * (in_features + out_features)) / _bandwidth(gpu)
    library = 2 * m * weights / gpu.library
    bound = "library" if library > dequantize + memory else "memory"
    return Prediction(_LAUNCH + dequantize + _NEXT_LAUNCH + max(memory, library), bound)


def _bandwidth(gpu: GPU) -> float:
    return gpu.bandwidth * gpu.reached_bandwidth
