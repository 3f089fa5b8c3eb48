"""Instructions in which the lanes of one warp exchange values through registers."""

import numpy as np

from .lanes import Lanes, LaneSet
from .reports import Reports


class WarpCollectives:
    """shfl, vote, redux and elect. None of them orders memory."""

    def __init__(self, lanes: Lanes, reports: Reports):
        self.lanes, self.reports = lanes, reports

    def shfl(self, ix: LaneSet, mode: str, values, b, c, pc: int) -> tuple[np.ndarray, np.ndarray]:
        """(value, whether the source lane was in range) per lane."""
        lanes = self.lanes.indices(ix)
        source = np.zeros(self.lanes.count, np.uint32)
        present = np.zeros(self.lanes.count, np.bool_)
        source[lanes] = values
        present[lanes] = True
        lane = lanes & 31
        b = np.broadcast_to(b, len(lanes)).astype(np.int64) & 31
        c = np.broadcast_to(c, len(lanes)).astype(np.int64)
        segment, clamp = c >> 8 & 31, c & 31
        low = lane & segment
        high = low | (clamp & ~segment)
        other = {"idx": low | (b & ~segment), "up": lane - b, "down": lane + b, "bfly": lane ^ b}[mode]
        inside = other >= low if mode == "up" else other <= high
        other = (lanes & ~31) + np.where(inside, other, lane)
        if not present[other].all():
            self.reports.fail(pc, "shfl.sync reads a lane that does not take part")
        return source[other], inside

    def vote(self, ix: LaneSet, mode: str, predicate) -> np.ndarray:
        lanes = self.lanes.indices(ix)
        warp, bit = lanes >> 5, (lanes & 31).astype(np.uint32)
        bits = np.zeros(self.lanes.count >> 5, np.uint32)
        active = np.zeros_like(bits)
        np.bitwise_or.at(bits, warp, np.broadcast_to(predicate, len(lanes)).astype(np.uint32) << bit)
        np.bitwise_or.at(active, warp, np.uint32(1) << bit)
        bits, active = bits[warp], active[warp]
        if mode == "ballot":
            return bits
        if mode == "any":
            return bits != 0
        return bits == active if mode == "all" else (bits == active) | (bits == 0)

    def redux(self, ix: LaneSet, mode: str, values) -> np.ndarray:
        functions = {"add": np.add, "min": np.minimum, "max": np.maximum}
        functions |= {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
        lanes = self.lanes.indices(ix)
        starts, counts = self._runs(lanes)
        reduced = functions[mode].reduceat(np.broadcast_to(values, len(lanes)), starts)
        return np.repeat(reduced, counts)

    def elect(self, ix: LaneSet) -> tuple[np.ndarray, np.ndarray]:
        """(the elected lane, whether it is this one) per lane: the first of each warp."""
        lanes = self.lanes.indices(ix)
        starts, counts = self._runs(lanes)
        elected = np.repeat(lanes[starts] & 31, counts)
        return elected.astype(np.uint32), elected == (lanes & 31)

    @staticmethod
    def _runs(lanes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where each warp's lanes start, and how many there are."""
        warp = lanes >> 5
        starts = np.flatnonzero(np.r_[True, warp[1:] != warp[:-1]])
        return starts, np.diff(np.r_[starts, len(lanes)])
