"""Figures of a compiled kernel: registers, shared memory, occupancy, instructions on its main path by kind."""

import re
from collections import Counter
from typing import Any

from kernel_gates.architectures import blocks_per_multiprocessor
from kernel_gates.compilation import Built
from kernel_gates.sass import Instruction
from qlora_jax._lib import _plan

_KINDS = {
    "tensor": {"HMMA"},
    "matrix_loads": {"LDSM"},
    "shared_loads": {"LDS"},
    "shared_stores": {"STS"},
    "async_copies": {"LDGSTS"},
    "global_loads": {"LDG"},
    "global_stores": {"STG"},
    "float": {
        "FFMA",
        "FMUL",
        "FADD",
        "FSEL",
        "FSETP",
        "HMUL2",
        "HFMA2",
        "HADD2",
        "F2FP",
        "F2F",
        "FFMA2",
        "FMUL2",
        "FADD2",
    },
    "shuffles": {"SHFL"},
    "control": {
        *("BRA", "BSSY", "BSYNC", "BAR", "DEPBAR", "LDGDEPBAR", "WARPSYNC", "CALL", "EXIT", "RET", "NOP", "YIELD"),
        *("BREAK", "ENDCOLLECTIVE", "ELECT", "NANOSLEEP"),
    },
}
_ELEMENTWISE_THREADS = 256
# Weights of a thread of the dequantizing kernels (dequantize.cu).
_PER_THREAD = {"nf4_dequantize_rows": 32, "nf4_dequantize_fragments": 128}


def kind(opcode: str) -> str:
    """A name of _KINDS, or "integer": all that computes indices and addresses, on either path."""
    return next((name for name, opcodes in _KINDS.items() if opcode in opcodes), "integer")


def shared_clocks(instruction: Instruction) -> int:
    """Clocks of shared memory, 128 bytes each, that an instruction of a whole warp takes if no banks collide."""
    if instruction.opcode == "LDSM":
        return int(re.search(r"M88\.(\d)", instruction.modifiers + ".M88.1")[1])
    if instruction.opcode in ("LDS", "STS", "LDGSTS"):
        return 4 if ".128" in instruction.modifiers else 2 if ".64" in instruction.modifiers else 1
    return 0


def product_shape(name: str) -> dict[str, int] | None:
    """Sizes of a fused product's blocks, as the launch plans know them; None for another kernel."""
    found = re.search(r"_t(\d+)$", name)
    if not found:
        return None
    return next(shape for shape in _plan.product_shapes() if shape["tokens"] == int(found[1]))


def measure(name: str, built: Built, architecture: str) -> dict[str, Any]:
    """The figures that sass.json keeps.

    Returns:
      registers; shared (bytes, static and dynamic); threads; blocks: resident on a multiprocessor at once;
      instructions: of the whole kernel; path: on the main path (see Kernel.main_path); per_weight: those that a lane
      issues for each weight (0: no weights); shared_clocks: of path, by one warp; kinds: path by kind.
    """
    shape = product_shape(name)
    path = built.kernel.main_path()
    threads = shape["threads"] if shape else _ELEMENTWISE_THREADS
    shared = built.resources.shared + (shape["shared_bytes"] if shape else 0)
    if shape:
        weights = shape["rows"] * 64 / (shape["threads"] / shape["k_groups"])
    else:
        weights = next((count for start, count in _PER_THREAD.items() if name.startswith(start)), 0)
    counts = Counter(kind(instruction.opcode) for instruction in path)
    return {
        "registers": built.resources.registers,
        "shared": shared,
        "threads": threads,
        "blocks": blocks_per_multiprocessor(architecture, threads, built.resources.registers, shared),
        "instructions": len(built.kernel.instructions),
        "path": len(path),
        "per_weight": round(len(path) / weights, 2) if weights else 0,
        "shared_clocks": sum(map(shared_clocks, path)),
        "kinds": dict(sorted(counts.items())),
    }
