"""Shared memory of the blocks that run together, one after the other, with the state of every granule."""

import numpy as np

from .counters import Counters
from .lanes import Lanes, LaneSet
from .ptx_types import SHARED_BASE, UNSIGNED
from .races import AccessHistory, Clocks
from .reports import Reports

UNINITIALISED, WRITTEN, PENDING = 0, 1, 2


class SharedMemory:
    """`nbytes` per block. Offsets below are into the whole buffer; addresses are what the kernel computes.

    A granule (1 << shift bytes) is uninitialised, written or pending (an asynchronous copy to it is under way), may be
    `unfenced` (written through the generic proxy, no fence.proxy.async since), and counts its asynchronous `readers`.
    """

    def __init__(
        self,
        nbytes: int,
        shift: int,
        lanes: Lanes,
        clocks: Clocks,
        reports: Reports,
        counters: Counters | None,
        races: bool,
    ):
        self.nbytes, self.shift, self.lanes, self.clocks = nbytes, shift, lanes, clocks
        self.reports, self.counters = reports, counters
        self.stride = -(-max(nbytes, 16) // 1024) * 1024
        self.buffer = np.full(self.stride * lanes.blocks, 0xFF, np.uint8)
        self.views = {size: self.buffer.view(dtype) for size, dtype in UNSIGNED.items()}
        self.origin = (lanes.slot * self.stride - SHARED_BASE).astype(np.int64)
        granules = self.buffer.size >> shift
        self.state = np.zeros(granules, np.uint8)
        self.readers = np.zeros(granules, np.uint16)
        self.unfenced = np.zeros(granules, np.bool_)
        self.has_pending = self.has_readers = False
        self.history = AccessHistory(granules, self.stride, lanes, clocks, reports) if races else None

    def preset(self, data: np.ndarray) -> None:
        """Fills every block's shared memory from its start, for kernels that are tested without their producer."""
        for slot in range(self.lanes.blocks):
            start = slot * self.stride
            self.buffer[start : start + len(data)] = data
            self.state[start >> self.shift : (start + len(data)) >> self.shift] = WRITTEN

    def offsets(
        self, lanes: np.ndarray, address: np.ndarray, nbytes: int, pc: int, write: bool, count: bool = True
    ) -> np.ndarray:
        """Buffer offsets of the lanes' accesses. Stops the run where one is out of bounds or misaligned."""
        inside = address - SHARED_BASE
        bad = (inside < 0) | (inside + nbytes > self.nbytes)
        if bad.any():
            index = int(np.argmax(bad))
            where = f"tid {self.lanes.tid[lanes[index]]}, offset {int(inside[index])}, {nbytes} bytes"
            kind = "write" if write else "read"
            self.reports.fail(pc, f"shared {kind} out of bounds: {where}, allocated {self.nbytes}")
        if (inside & (nbytes - 1)).any():
            self.reports.fail(pc, f"misaligned shared access ({nbytes} bytes)")
        if count and self.counters is not None:
            self.counters.count_shared(pc, lanes, inside, nbytes)
        return address + self.origin[lanes]

    def granules(self, offsets: np.ndarray, nbytes: int) -> np.ndarray:
        """Granule numbers [access, granule of the access]."""
        return (offsets >> self.shift)[:, None] + np.arange(max(nbytes >> self.shift, 1))

    def check_read(self, lanes: np.ndarray, offsets: np.ndarray, nbytes: int, pc: int) -> None:
        granules = self.granules(offsets, nbytes)
        self.check_initialised(lanes, offsets, granules, pc)
        if self.history is not None:
            self.history.check_read(lanes, offsets, granules, pc)

    def check_initialised(self, lanes: np.ndarray, offsets: np.ndarray, granules: np.ndarray, pc: int) -> None:
        state = self.state[granules]
        if (state == WRITTEN).all():
            return
        index = tuple(np.argwhere(state != WRITTEN)[0])
        lane = lanes[index[0]]
        inside = int(offsets[index[0]] - self.lanes.slot[lane] * self.stride)
        place = f"tid {self.lanes.tid[lane]} reads shared offset {inside}"
        if state[index] == PENDING:
            self.reports.report("in-flight-read", pc, f"{place} while an asynchronous copy to it is not waited for")
        else:
            self.reports.report("uninitialised-read", pc, f"{place} never written")

    def check_write(self, lanes: np.ndarray, offsets: np.ndarray, nbytes: int, pc: int) -> np.ndarray:
        """Checks a write before it happens and returns its granules."""
        granules = self.granules(offsets, nbytes)
        if self.has_pending and (self.state[granules] == PENDING).any():
            message = "write to shared memory that an unfinished asynchronous copy also writes"
            self.reports.report("in-flight-write", pc, message)
        if self.has_readers and self.readers[granules].any():
            message = "write to shared memory that an unfinished wgmma (or bulk store) still reads"
            self.reports.report("write-under-wgmma", pc, message)
        if self.history is not None:
            self.history.check_write(lanes, offsets, granules, pc)
        return granules

    def note_write(self, lanes: np.ndarray, granules: np.ndarray, pc: int) -> None:
        self.state[granules] = WRITTEN
        self.unfenced[granules] = True
        if self.history is not None:
            self.history.note_write(lanes, granules, pc)

    def note_pending(self, offsets: np.ndarray, nbytes: int, granules: np.ndarray) -> None:
        """The destination of a copy under way reads as NaN until the copy is waited for."""
        self.state[granules] = PENDING
        self.has_pending = True
        self.buffer[offsets[:, None] + np.arange(nbytes)] = 0xFF

    def note_engine_write(self, granules: np.ndarray, pc: int) -> None:
        self.state[granules] = WRITTEN
        self.unfenced[granules] = False
        self.clocks.engine += 1
        if self.history is not None:
            self.history.note_engine_write(granules, pc)

    def start_reading(self, granules: np.ndarray) -> None:
        self.has_readers = True
        self.readers[granules] += 1

    def stop_reading(self, granules: np.ndarray) -> None:
        self.readers[granules] -= 1

    def fence_proxy(self, ix: LaneSet) -> None:
        """fence.proxy.async: makes the generic writes that are ordered before a warp visible to the engine."""
        if not self.unfenced.any():
            return
        granules = np.flatnonzero(self.unfenced)
        if self.history is None:
            self.unfenced[granules] = False
            return
        slot = granules // (self.stride >> self.shift)
        for warp in self.lanes.warps(ix):
            mine = granules[slot == warp // self.lanes.warps_per_block]
            self.unfenced[mine[self.history.ordered_before(warp, mine)]] = False

    def load(self, ix: LaneSet, address: np.ndarray, size: int, number: int, pc: int) -> np.ndarray:
        """Raw values [lane, number]."""
        lanes = self.lanes.indices(ix)
        offsets = self.offsets(lanes, address, size * number, pc, False)
        self.check_read(lanes, offsets, size * number, pc)
        return self.views[size][(offsets // size)[:, None] + np.arange(number)]

    def store(self, ix: LaneSet, address: np.ndarray, size: int, values: list, pc: int) -> None:
        lanes = self.lanes.indices(ix)
        nbytes = size * len(values)
        offsets = self.offsets(lanes, address, nbytes, pc, True)
        granules = self.check_write(lanes, offsets, nbytes, pc)
        for position, value in enumerate(values):
            self.views[size][offsets // size + position] = np.asarray(value).astype(UNSIGNED[size])
        self.note_write(lanes, granules, pc)
