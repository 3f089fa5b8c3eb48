"""What the memory system would have to do: bank conflicts, sectors, instruction classes.

A model, not a measurement: 32 banks of 4 bytes, requests of 8 and 16 bytes per lane in two and four passes, ldmatrix
one 8-row matrix per pass, 32-byte sectors per warp request.
"""

from collections import Counter, defaultdict

import numpy as np

from .parser import Instruction


class Counters:
    """Per instruction: shared [requests, wavefronts, ideal wavefronts], global [requests, sectors, ideal, bytes]."""

    def __init__(self) -> None:
        self.shared: dict[int, list[int]] = defaultdict(lambda: [0, 0, 0])
        self.global_: dict[int, list[int]] = defaultdict(lambda: [0, 0, 0, 0])

    def count_shared(self, pc: int, lanes: np.ndarray, offsets: np.ndarray, nbytes: int) -> None:
        """`offsets` lie inside a block's shared memory; a pass serves 32, 16 or 8 lanes by the width of the access."""
        lanes_per_pass = 32 if nbytes <= 4 else 128 // nbytes
        words = max(nbytes // 4, 1)
        word = ((offsets >> 2)[:, None] + np.arange(words)).reshape(-1)
        serving = np.repeat(lanes // lanes_per_pass, words).astype(np.int64)
        distinct = np.unique((serving << 32) + word)
        bank, per_bank = np.unique((distinct >> 32 << 5) + (distinct & 31), return_counts=True)
        serving = bank >> 5
        starts = np.flatnonzero(np.r_[True, serving[1:] != serving[:-1]])
        self._add_shared(pc, len(np.unique(lanes >> 5)), int(np.maximum.reduceat(per_bank, starts).sum()), len(starts))

    def count_matrix_rows(self, pc: int, warps: int, offsets: np.ndarray) -> None:
        """ldmatrix and stmatrix: one pass per 8 rows of 16 bytes, free of conflicts if the 8 bank quads differ."""
        row = offsets >> 4
        matrix = np.arange(len(offsets)) // 8
        distinct = np.unique((matrix << 40) + row)
        per_quad = np.bincount((distinct >> 40) * 8 + (distinct & 7), minlength=len(offsets)).reshape(-1, 8)
        self._add_shared(pc, warps, int(per_quad.max(1).sum()), len(per_quad))

    def _add_shared(self, pc: int, requests: int, wavefronts: int, ideal: int) -> None:
        statistics = self.shared[pc]
        statistics[0] += requests
        statistics[1] += wavefronts
        statistics[2] += ideal

    def count_global(self, pc: int, warps: np.ndarray, offsets: np.ndarray, nbytes) -> None:
        """`nbytes` is a number, or one per lane. The ideal number of sectors is that of the distinct bytes."""
        nbytes = np.broadcast_to(nbytes, offsets.shape)
        first, last = offsets >> 5, (offsets + nbytes - 1) >> 5
        longest = int((last - first).max())
        sectors = first[:, None] + np.arange(longest + 1) if longest else first[:, None]
        sectors = (warps[:, None] << 40) + np.minimum(sectors, last[:, None])
        _, distinct = np.unique((warps << 40) + offsets, return_index=True)
        statistics = self.global_[pc]
        statistics[0] += len(np.unique(warps))
        statistics[1] += len(np.unique(sectors))
        statistics[2] += -(-int(nbytes[distinct].sum()) // 32)
        statistics[3] += int(nbytes.sum())

    def conflicts(self) -> int:
        return sum(wavefronts - ideal for _, wavefronts, ideal in self.shared.values())

    def traffic(self, instructions: list[Instruction]) -> dict[str, int]:
        total = {"read": 0, "written": 0, "sectors": 0, "ideal_sectors": 0}
        for pc, (_, sectors, ideal, nbytes) in self.global_.items():
            writes = instructions[pc].parts[0] in ("st", "red", "atom")
            total["written" if writes else "read"] += nbytes
            total["sectors"] += sectors
            total["ideal_sectors"] += ideal
        return total

    def worst(self, instructions: list[Instruction], count: int) -> list[str]:
        """The instructions furthest from their ideal, in words."""

        def furthest(table: dict[int, list[int]]) -> list[tuple[int, list[int]]]:
            ranked = sorted(table.items(), key=lambda item: item[1][2] - item[1][1])[:count]
            return [(pc, numbers) for pc, numbers in ranked if numbers[1] > numbers[2]]

        lines = []
        for pc, (requests, wavefronts, ideal) in furthest(self.shared):
            text = instructions[pc].text[:60]
            lines.append(f"  smem #{pc}: {requests} requests, {wavefronts} wavefronts, ideal {ideal}  {text}")
        for pc, (requests, sectors, ideal, nbytes) in furthest(self.global_):
            text = instructions[pc].text[:60]
            lines.append(f"  gmem #{pc}: {requests} requests, {sectors} sectors, ideal {ideal}, {nbytes} bytes  {text}")
        return lines


_OWN_CLASS = ("wgmma", "mma", "ldmatrix", "mbarrier", "shfl", "prmt", "lop3", "cvt", "bar", "bra", "setp", "mov")


def classify(instruction: Instruction) -> str:
    """The class that `Launch.classes` counts an instruction under."""
    parts = instruction.parts
    if parts[0] in ("ld", "st", "red", "atom"):
        spaces = ("shared", "param", "local", "const")
        return f"{parts[0]}." + next((space for space in spaces if space in instruction.opcode), "global")
    if parts[0] == "cp":
        return "cp.async.bulk" if "bulk" in parts else "cp.async"
    if parts[0] in _OWN_CLASS:
        return parts[0]
    if parts[-1] in ("f32", "f64"):
        return "fp"
    if parts[-1] in ("bf16x2", "f16x2", "bf16", "f16"):
        return "half"
    return "int"


def class_totals(runs: np.ndarray, per_block: list[Counter[str]]) -> Counter[str]:
    """Warp instructions by class: how often each basic block ran, times what it holds."""
    total: Counter[str] = Counter()
    for count, classes in zip(runs.tolist(), per_block, strict=True):
        for name, number in classes.items():
            total[name] += count * number
    return total
