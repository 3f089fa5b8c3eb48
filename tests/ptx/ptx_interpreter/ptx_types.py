"""What the parser, the compiler and the runtime share: type sizes, register files, address windows, the error."""

import numpy as np

SHARED_BASE = 0x400  # .shared offset of a block's first byte; offset 0 stays invalid
GLOBAL_BASE = 0x10_0000_0000
GENERIC_LOCAL = 0x7E00_0000_0000
GENERIC_SHARED = 0x7F00_0000_0000
END = 1 << 60  # a program counter behind every basic block
# The most shared memory that a block may have, by target (CUDA C++ programming guide, compute capabilities).
SHARED_LIMIT = {
    **dict.fromkeys(("sm_86", "sm_89", "sm_120"), 99 * 1024),
    **dict.fromkeys(("sm_80", "sm_87"), 163 * 1024),
    **dict.fromkeys(("sm_90", "sm_100", "sm_103"), 227 * 1024),
}

BYTES = {
    "pred": 1,
    **dict.fromkeys(("b8", "u8", "s8"), 1),
    **dict.fromkeys(("b16", "u16", "s16", "f16", "bf16"), 2),
    **dict.fromkeys(("b32", "u32", "s32", "f32", "f16x2", "bf16x2"), 4),
    **dict.fromkeys(("b64", "u64", "s64", "f64"), 8),
}
HALF_TYPES = ("f16", "bf16", "f16x2", "bf16x2")

# The typed view of the register file that an operand of a PTX type is read through. 8-bit values live in 16-bit
# registers, half-precision values stay raw bits.
VIEW = {
    "pred": "pr",
    **dict.fromkeys(("b8", "u8", "b16", "u16", "f16", "bf16"), "u16"),
    **dict.fromkeys(("s8", "s16"), "s16"),
    **dict.fromkeys(("b32", "u32", "f16x2", "bf16x2"), "u32"),
    "s32": "s32",
    "f32": "f32",
    **dict.fromkeys(("b64", "u64"), "u64"),
    "s64": "s64",
    "f64": "f64",
}
VIEW_DTYPE = {
    "pr": np.bool_,
    "u16": np.uint16,
    "s16": np.int16,
    "u32": np.uint32,
    "s32": np.int32,
    "f32": np.float32,
    "u64": np.uint64,
    "s64": np.int64,
    "f64": np.float64,
}
# Register classes, by width: predicates, 16, 32 and 64 bits.
VIEW_CLASS = {view: {"pr": "p", "16": "h", "32": "w", "64": "d"}[view[-2:]] for view in VIEW_DTYPE}
CLASS_VIEW = {"p": "pr", "h": "u16", "w": "u32", "d": "u64"}
CLASS_BYTES = {"h": 2, "w": 4, "d": 8}
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class PTXError(Exception):
    """The text uses something the interpreter does not know, or a run did what a GPU must never do."""
