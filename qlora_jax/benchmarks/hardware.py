"""Published limits of GPUs, and the shortest time that a product can take on them."""

import math
from dataclasses import dataclass

# 4-bit codes, an 8-bit scale for 64 of them, and a float32 scale for 256 of those.
PACKED_BYTES_PER_WEIGHT = 0.5 + 1 / 64 + 4 / (64 * 256)
# Rotated over where a GPU's cache is not known.
_LARGE_CACHE = 128 * 2**20


@dataclass(frozen=True)
class Published:
    """What a GPU's data sheet says; nothing here is measured.

    Attributes:
      bandwidth: of its memory, bytes per second.
      flops: dense bfloat16 products with float32 sums on tensor cores, per second.
      cache: bytes of its L2 cache.
    """

    bandwidth: float
    flops: float
    cache: int


_MB = 10**6
# By a part of the name that the driver gives; the first that fits. From NVIDIA's data sheets and architecture papers.
_GPUS = {
    "H100 PCIe": Published(2.0e12, 756e12, 50 * _MB),
    "H100 NVL": Published(3.9e12, 835e12, 50 * _MB),
    "H100": Published(3.35e12, 989.4e12, 50 * _MB),
    "H200": Published(4.8e12, 989.4e12, 50 * _MB),
    "B200": Published(8.0e12, 2250e12, 126 * _MB),
    "A100-SXM4-80GB": Published(2.039e12, 312e12, 40 * _MB),
    "A100 80GB PCIe": Published(1.935e12, 312e12, 40 * _MB),
    "A100": Published(1.555e12, 312e12, 40 * _MB),
    "RTX 4090": Published(1.008e12, 165.2e12, 72 * _MB),
    "RTX 5090": Published(1.792e12, 209.5e12, 96 * _MB),
}


def published(device_kind: str) -> Published | None:
    """The data sheet of a device; None where it is not known."""
    return next((sheet for name, sheet in _GPUS.items() if name in device_kind), None)


def product_bytes(rows: int, in_features: int, out_features: int, *, item_bytes: int = 2) -> float:
    """Bytes that a product with a packed weight must move: the weight once, activations and result once."""
    activations = item_bytes * rows * (in_features + out_features)
    return PACKED_BYTES_PER_WEIGHT * in_features * out_features + activations


def product_flops(rows: int, in_features: int, out_features: int) -> float:
    return 2.0 * rows * in_features * out_features


def floor_seconds(rows: int, in_features: int, out_features: int, sheet: Published) -> float:
    """No product can be shorter: its bytes at the published bandwidth, or its operations at the published rate."""
    by_memory = product_bytes(rows, in_features, out_features) / sheet.bandwidth
    return max(by_memory, product_flops(rows, in_features, out_features) / sheet.flops)


def rotated_copies(
    call_bytes: float, floor: float | None, *, on_gpu: bool, sheet: Published | None, most: int = 64
) -> int:
    """How many copies of a weight one program takes in turn.

    On a GPU as many as overflow its cache twice, so that every call finds its weight in memory as a layer of a large
    model does, and enough for a program of 0.2 ms, which is started in less time than it runs. Elsewhere two.
    """
    if not on_gpu:
        return 2
    cache = sheet.cache if sheet else _LARGE_CACHE
    longest = max(2 * cache / call_bytes, 2e-4 / floor if floor else 1.0)
    return min(most, max(1, math.ceil(longest)))
