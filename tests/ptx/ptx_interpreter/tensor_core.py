"""ldmatrix, stmatrix, movmatrix and mma.sync, in the fragment layouts of the PTX ISA (g = lane / 4, t = lane % 4)."""

import numpy as np

from .arithmetic import bf16_to_f32
from .counters import Counters
from .lanes import Lanes, LaneSet
from .ptx_types import SHARED_BASE
from .shared_memory import SharedMemory


def to_f32(words: np.ndarray, kind: str) -> np.ndarray:
    """32-bit words of two 16-bit floats -> float32, the last axis twice as long."""
    bits = np.ascontiguousarray(words).view(np.uint16)
    return bf16_to_f32(bits) if kind == "bf16" else bits.view(np.float16).astype(np.float32)


def fragment_a(registers: list, warps: int, kind: str) -> np.ndarray:
    """float32 [warp, 16 rows, 16 or 8 columns] from an A fragment's four or two registers.

    Register r holds row g + 8 * (r & 1), columns 2t + 8 * (r >> 1) (low half) and one more (high half).
    """
    values = to_f32(np.stack([np.asarray(register).reshape(warps, 32) for register in registers], 1), kind)
    columns = len(registers) // 2
    values = values.reshape(warps, columns, 2, 8, 4, 2)
    return values.transpose(0, 2, 3, 1, 4, 5).reshape(warps, 16, 8 * columns)


def fragment_b(registers: list, warps: int, kind: str) -> np.ndarray:
    """float32 [warp, 16 or 8 k, 8 n]: register r holds k = 2t + 8r (low half) and one more, n = g."""
    values = to_f32(np.stack([np.asarray(register).reshape(warps, 32) for register in registers], 1), kind)
    values = values.reshape(warps, len(registers), 8, 4, 2)
    return values.transpose(0, 1, 3, 4, 2).reshape(warps, -1, 8)


def _transposed(matrices: np.ndarray) -> np.ndarray:
    """8x8 matrices of 16-bit elements, transposed; uint32 [..., 8, 4] in and out."""
    elements = np.ascontiguousarray(matrices).view(np.uint16)
    return np.ascontiguousarray(elements.swapaxes(-1, -2)).view(np.uint32)


class TensorCore:
    """Warp-wide matrix instructions. Products are exact and summed in float32, not in the hardware's own order."""

    def __init__(self, shared: SharedMemory, lanes: Lanes, counters: Counters | None):
        self.shared, self.lanes, self.counters = shared, lanes, counters

    def _rows(self, ix: LaneSet, address: np.ndarray, number: int, pc: int, write: bool):
        """Warps, and the row-giving lanes with their offsets: lanes 8i .. 8i+7 address matrix i's rows."""
        warps = self.lanes.whole_warps(ix, pc)
        lanes = self.lanes.indices(ix).reshape(warps, 32)[:, : 8 * number].reshape(-1)
        rows = address.reshape(warps, 32)[:, : 8 * number].reshape(-1)
        offsets = self.shared.offsets(lanes, rows, 16, pc, write, count=False)
        if self.counters is not None:
            self.counters.count_matrix_rows(pc, warps, rows - SHARED_BASE)
        return warps, lanes, offsets

    def ldmatrix(self, ix: LaneSet, address: np.ndarray, number: int, transpose: bool, pc: int) -> list[np.ndarray]:
        warps, lanes, offsets = self._rows(ix, address, number, pc, False)
        self.shared.check_read(lanes, offsets, 16, pc)
        words = self.shared.views[4][(offsets >> 2)[:, None] + np.arange(4)].reshape(warps, number, 8, 4)
        words = (_transposed(words) if transpose else words).reshape(warps, number, 32)
        return [words[:, matrix].reshape(-1) for matrix in range(number)]

    def stmatrix(self, ix: LaneSet, address: np.ndarray, values: list, transpose: bool, pc: int) -> None:
        number = len(values)
        warps, lanes, offsets = self._rows(ix, address, number, pc, True)
        granules = self.shared.check_write(lanes, offsets, 16, pc)
        words = np.stack([np.ascontiguousarray(value).reshape(warps, 32) for value in values], 1)
        words = words.reshape(warps, number, 8, 4)
        words = _transposed(words) if transpose else words
        self.shared.views[4][(offsets >> 2)[:, None] + np.arange(4)] = words.reshape(-1, 4)
        self.shared.note_write(lanes, granules, pc)

    def movmatrix(self, ix: LaneSet, values, pc: int) -> np.ndarray:
        warps = self.lanes.whole_warps(ix, pc)
        return _transposed(np.asarray(values).reshape(warps, 8, 4)).reshape(-1)

    def mma(self, ix: LaneSet, kind: str, a: list, b: list, c: list, pc: int) -> list[np.ndarray]:
        """D = A B + C of m16n8k16 or m16n8k8: D's register i holds row g + 8 * (i >> 1), column 2t + (i & 1)."""
        warps = self.lanes.whole_warps(ix, pc)
        product = np.matmul(fragment_a(a, warps, kind), fragment_b(b, warps, kind))
        product = product.reshape(warps, 2, 8, 4, 2)
        return [c[2 * half + pair] + product[:, half, :, :, pair].reshape(-1) for half in range(2) for pair in range(2)]
