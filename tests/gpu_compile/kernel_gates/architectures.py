"""What one multiprocessor holds and does, and two GPUs' published peaks.

Limits: CUDA C++ Programming Guide, compute capabilities, technical specifications. Peaks: NVIDIA's data sheets of the
H100 SXM5 80 GB and the A100 SXM4 80 GB, dense. None of this was measured.
"""

from dataclasses import dataclass

_REGISTERS = 65536
_REGISTER_UNIT = 8  # registers of a thread are given in eights, because a warp's are in 256s
_RESERVED_SHARED = 1024  # of each block, by the system, from 8.0 on


@dataclass(frozen=True)
class Limits:
    """Of one multiprocessor."""

    warps: int
    blocks: int
    shared_bytes: int
    block_shared_bytes: int  # a block may ask for


LIMITS = {
    "80": Limits(64, 32, 164 * 1024, 163 * 1024),
    "86": Limits(48, 16, 100 * 1024, 99 * 1024),
    "89": Limits(48, 24, 100 * 1024, 99 * 1024),
    "90a": Limits(64, 32, 228 * 1024, 227 * 1024),
    "100a": Limits(64, 32, 228 * 1024, 227 * 1024),
    "120": Limits(48, 24, 100 * 1024, 99 * 1024),
}


def blocks_per_multiprocessor(architecture: str, threads: int, registers: int, shared_bytes: int) -> int:
    """How many blocks are resident at once; 0 where one alone asks for too much."""
    limits = LIMITS[architecture]
    if shared_bytes > limits.block_shared_bytes:
        return 0
    registers = -(-registers // _REGISTER_UNIT) * _REGISTER_UNIT
    return min(
        limits.blocks,
        limits.warps * 32 // threads,
        _REGISTERS // (registers * threads),
        limits.shared_bytes // (shared_bytes + _RESERVED_SHARED),
    )


@dataclass(frozen=True)
class GPU:
    """Peaks, and the parts of them that well-made programs reach.

    Attributes:
      architecture: whose machine code it runs.
      compute_capability: by which routes are chosen.
      clock: Hz, boost: the peaks below are stated at it.
      bandwidth: bytes per second.
      reached_bandwidth: part of it that long streams get.
      mma_clocks: clocks in which a quarter of a multiprocessor does one mma.sync m16n8k16 of 16-bit operands. On the
        H100 mma.sync reaches 62 % of the peak, which wgmma alone reaches; on the A100 it is what cuBLAS uses, and gets
        the same part of the peak.
      floor: dense 16-bit FLOP/s that no program exceeds, clocks under load considered.
      library: FLOP/s that cuBLAS gets from large products: on the H100 as published (650 to 716 TFLOP/s for 2048 to
        16384 rows), on the A100 an estimate.
    """

    architecture: str
    compute_capability: str
    multiprocessors: int
    clock: float
    bandwidth: float
    reached_bandwidth: float
    mma_clocks: float
    floor: float
    library: float


# m16n8k16 is 2048 multiply-adds; a quarter of an H100's multiprocessor does 512 in a clock, of an A100's 256.
GPUS = {
    "H100": GPU("90a", "9.0", 132, 1.83e9, 3.35e12, 0.87, 2048 / 512 / 0.62, 800e12, 680e12),
    "A100": GPU("80", "8.0", 108, 1.41e9, 2.04e12, 0.87, 2048 / 256 / 0.8, 312e12, 250e12),
}
