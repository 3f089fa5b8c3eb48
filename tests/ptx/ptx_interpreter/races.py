"""Data races. In shared memory: a vector clock per warp (and one for the asynchronous engine), a history per granule.
In global memory: between blocks only, which nothing but atomics orders during a launch."""

import numpy as np

from .lanes import Lanes, LaneSet
from .reports import Reports


class Clocks:
    """`vector[warp, other]`: how much of the other warp's past is ordered before this warp. Column -1: the engine."""

    def __init__(self, lanes: Lanes):
        self.lanes = lanes
        self.width = lanes.warps_per_block + 1
        warps = lanes.warps_per_block * lanes.blocks
        self.local = np.arange(warps) % lanes.warps_per_block
        self.vector = np.zeros((warps, self.width), np.int32)
        self.vector[np.arange(warps), self.local] = 1
        self.engine = 0

    @property
    def engine_column(self) -> int:
        return self.width - 1

    def empty(self) -> np.ndarray:
        return np.zeros(self.width, np.int32)

    def own(self, warps) -> np.ndarray:
        return self.vector[warps, self.local[warps]]

    def tick(self, warps: np.ndarray) -> None:
        self.vector[warps, self.local[warps]] += 1

    def acquire(self, warps: np.ndarray, released: np.ndarray) -> None:
        self.vector[warps] = np.maximum(self.vector[warps], released)

    def warp_sync(self, ix: LaneSet) -> None:
        self.tick(self.lanes.warps(ix))


class AccessHistory:
    """Who last wrote and read each granule of shared memory, and whether the next access is ordered after that."""

    def __init__(self, granules: int, stride: int, lanes: Lanes, clocks: Clocks, reports: Reports):
        self.lanes, self.clocks, self.reports, self.stride = lanes, clocks, reports, stride
        self.writer = np.zeros(granules, np.int16)
        self.writer_clock = np.zeros(granules, np.int32)
        self.writer_lane = np.zeros(granules, np.int8)
        self.writer_pc = np.zeros(granules, np.int32)
        self.read_clock = np.zeros((clocks.width, granules), np.int32)

    def check_read(self, lanes: np.ndarray, offsets: np.ndarray, granules: np.ndarray, pc: int) -> None:
        warps = lanes >> 5
        own = self.clocks.local[warps][:, None]
        now = self.clocks.own(warps)[:, None]
        writer, clock = self.writer[granules], self.writer_clock[granules]
        unordered = self.clocks.vector[warps[:, None], writer] < clock
        if unordered.any():
            self._report("race-read-after-write", pc, unordered, lanes, offsets, granules)
        else:
            other_lane = self.writer_lane[granules] != (lanes & 31)[:, None]
            within = (writer == own) & (clock == now) & other_lane
            if within.any():
                self._report("race-within-warp", pc, within, lanes, offsets, granules)
        self.read_clock[own, granules] = now

    def check_write(self, lanes: np.ndarray, offsets: np.ndarray, granules: np.ndarray, pc: int) -> None:
        warps = lanes >> 5
        unordered = self.clocks.vector[warps[:, None], self.writer[granules]] < self.writer_clock[granules]
        if unordered.any():
            self._report("race-write-after-write", pc, unordered, lanes, offsets, granules)
        late = self.read_clock[:, granules] > self.clocks.vector[warps].T[:, :, None]
        if late.any():
            reader, lane, _ = np.argwhere(late)[0]
            place = f"tid {self.lanes.tid[lanes[lane]]} overwrites shared offset {self._inside(lanes, offsets, lane)}"
            message = f"{place} read by warp {reader} without a barrier in between"
            self.reports.report("race-write-after-read", pc, message)

    def note_write(self, lanes: np.ndarray, granules: np.ndarray, pc: int) -> None:
        warps = lanes >> 5
        own = self.clocks.local[warps][:, None]
        self.writer[granules] = own
        if (self.writer[granules] != own).any():
            self.reports.report("race-write-after-write", pc, "two warps write one place in one instruction")
        self.writer_clock[granules] = self.clocks.own(warps)[:, None]
        self.writer_lane[granules] = (lanes & 31)[:, None]
        self.writer_pc[granules] = pc

    def note_engine_write(self, granules: np.ndarray, pc: int) -> None:
        self.writer[granules] = self.clocks.engine_column
        self.writer_clock[granules] = self.clocks.engine
        self.writer_lane[granules] = -1
        self.writer_pc[granules] = pc

    def note_read(self, warps: range, granules: np.ndarray) -> None:
        """A wgmma that has been waited for has read its operands by then."""
        for warp in warps:
            self.read_clock[self.clocks.local[warp], granules] = self.clocks.own(warp)

    def check_operand(self, warps: np.ndarray, granules: np.ndarray, pc: int) -> None:
        """A wgmma operand: all warps of the warpgroup must be ordered after its writers."""
        unordered = self.clocks.vector[warps][:, self.writer[granules]] < self.writer_clock[granules]
        if unordered.any():
            granule = granules[np.argwhere(unordered)[0][1]]
            self.reports.report("race-read-after-write", pc, f"wgmma operand; {self._last_writer(granule)}")

    def ordered_before(self, warp: int, granules: np.ndarray) -> np.ndarray:
        return self.clocks.vector[warp, self.writer[granules]] >= self.writer_clock[granules]

    def _inside(self, lanes: np.ndarray, offsets: np.ndarray, index: int) -> int:
        return int(offsets[index] - self.lanes.slot[lanes[index]] * self.stride)

    def _last_writer(self, granule: int) -> str:
        pc = self.writer_pc[granule]
        writer, lane = self.writer[granule], self.writer_lane[granule]
        return f"last written by warp {writer} lane {lane} at PTX #{pc} ({self.reports.text(pc)})"

    def _report(self, kind: str, pc: int, bad: np.ndarray, lanes, offsets, granules) -> None:
        where = np.argwhere(bad)[0]
        index = where[0]
        place = f"tid {self.lanes.tid[lanes[index]]}, shared offset {self._inside(lanes, offsets, index)}"
        self.reports.report(kind, pc, f"{place}; {self._last_writer(granules[tuple(where)])}")


class BlockHistory:
    """Which block last wrote and read each granule of the arena during a launch; blocks count from 1, 0 is none.

    A kernel that orders its blocks with flags in global memory would be accused wrongly: none of ours does.
    """

    def __init__(self, nbytes: int, shift: int, reports: Reports):
        self.shift, self.reports = shift, reports
        self._writer = np.zeros((nbytes >> shift) + 1, np.int32)
        self._writer_pc = np.zeros((nbytes >> shift) + 1, np.int32)
        self._reader = np.zeros((nbytes >> shift) + 1, np.int32)

    def note(self, blocks: np.ndarray, offsets: np.ndarray, nbytes, pc: int, write: bool) -> None:
        """Checks and records accesses of `nbytes` (a number, or one per lane)."""
        first, last = offsets >> self.shift, (offsets + nbytes - 1) >> self.shift
        granules = np.minimum(first[:, None] + np.arange((last - first).max() + 1), last[:, None])
        blocks = np.broadcast_to(blocks[:, None], granules.shape)
        writer = self._writer[granules]
        other = (writer != 0) & (writer != blocks)
        if other.any():
            index = tuple(np.argwhere(other)[0])
            pair = f"block {blocks[index] - 1} {'writes' if write else 'reads'} what block {writer[index] - 1} wrote"
            origin = self._writer_pc[granules[index]]
            message = f"{pair} at PTX #{origin} ({self.reports.text(origin)})"
            self.reports.report("race-between-blocks", pc, message)
        if not write:
            self._reader[granules] = blocks
            return
        reader = self._reader[granules]
        other = (reader != 0) & (reader != blocks)
        if other.any():
            index = tuple(np.argwhere(other)[0])
            message = f"block {blocks[index] - 1} writes what block {reader[index] - 1} has read"
            self.reports.report("race-between-blocks", pc, message)
        self._writer[granules] = blocks
        self._writer_pc[granules] = pc
        if (self._writer[granules] != blocks).any():
            self.reports.report("race-between-blocks", pc, "two blocks write one place in one instruction")
