"""cp.async and cp.async.bulk: data that arrives as late as the rules allow."""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from .lanes import Lanes, LaneSet
from .mbarriers import Mbarriers
from .memory import GlobalMemory
from .reports import Reports
from .shared_memory import SharedMemory


@dataclass(slots=True)
class _Copy:
    """One cp.async of many lanes: what lands where, and in which of its thread's groups."""

    lanes: np.ndarray
    group: np.ndarray
    offsets: np.ndarray
    data: np.ndarray
    granules: np.ndarray
    pc: int

    def only(self, mask: np.ndarray) -> "_Copy":
        parts = (self.lanes, self.group, self.offsets, self.data, self.granules)
        return _Copy(*(part[mask] for part in parts), self.pc)


class AsyncCopies:
    """cp.async: groups are per thread; data is there for its thread after the wait, for others after a barrier too."""

    def __init__(
        self,
        shared: SharedMemory,
        global_memory: GlobalMemory,
        mbarriers: Mbarriers,
        lanes: Lanes,
        reports: Reports,
    ):
        self.shared, self.global_memory, self.mbarriers = shared, global_memory, mbarriers
        self.lanes, self.reports = lanes, reports
        self._group = np.zeros(lanes.count, np.int64)
        self._copies: list[_Copy] = []
        self._arrivals: list[tuple[np.ndarray, np.ndarray, int]] = []

    def copy(self, ix: LaneSet, destination, source, size: int, source_size, pc: int) -> None:
        """`source_size` bytes (None: all) are read, the rest of `size` becomes zero."""
        lanes = self.lanes.indices(ix)
        offsets = self.shared.offsets(lanes, destination, size, pc, True)
        read = np.full(len(lanes), size) if source_size is None else np.broadcast_to(source_size, len(lanes))
        read = read.astype(np.int64)
        if (read > size).any():
            self.reports.fail(pc, "cp.async src-size larger than cp-size")
        data = np.zeros((len(lanes), size), np.uint8)
        reading = read > 0
        if reading.any():
            nbytes = size if (read[reading] == size).all() else read[reading]
            start = self.global_memory.offsets(lanes[reading], source[reading], nbytes, size, pc, False)
            kept = np.arange(size) < read[reading][:, None]
            data[reading] = np.where(kept, self.global_memory.memory.buffer[start[:, None] + np.arange(size)], 0)
        granules = self.shared.check_write(lanes, offsets, size, pc)
        self.shared.note_pending(offsets, size, granules)
        self._copies.append(_Copy(lanes.copy(), self._group[lanes], offsets, data, granules, pc))

    def commit(self, ix: LaneSet) -> None:
        self._group[ix] += 1

    def wait(self, ix: LaneSet, allowed: int | None) -> None:
        """Lands all but the `allowed` newest committed groups; None (wait_all): uncommitted copies as well."""
        waiting = np.zeros(self.lanes.count, np.bool_)
        waiting[ix] = True
        unfinished = []
        for copy in self._copies:
            landing = waiting[copy.lanes]
            if allowed is not None:
                landing = landing & (copy.group < self._group[copy.lanes] - allowed)
            if landing.any():
                done = copy.only(landing)
                self.shared.buffer[done.offsets[:, None] + np.arange(done.data.shape[1])] = done.data
                self.shared.note_write(done.lanes, done.granules, done.pc)
                copy = copy.only(~landing)
            if len(copy.lanes):
                unfinished.append(copy)
        self._copies = unfinished

    def arrive_later(self, ix: LaneSet, address: np.ndarray, noinc: bool, pc: int) -> None:
        """cp.async.mbarrier.arrive: the arrival happens once the thread's earlier copies have landed."""
        lanes = self.lanes.indices(ix)
        offsets = address + self.shared.origin[lanes]
        if not noinc:
            for offset in offsets.tolist():
                self.mbarriers.at(offset, pc).pending += 1
        self._arrivals.append((lanes, offsets, pc))

    def land_one(self) -> bool:
        """Lets one outstanding arrival happen; False where there is none."""
        if not self._arrivals:
            return False
        lanes, offsets, pc = self._arrivals.pop(0)
        self.wait(lanes, None)
        self.mbarriers.arrive_at(lanes, offsets, 1, None, pc)
        return True


@dataclass(slots=True)
class _BulkCopy:
    offset: int
    source: int
    nbytes: int
    barrier: int
    granules: np.ndarray
    pc: int


class BulkCopies:
    """cp.async.bulk: to shared memory with an mbarrier's transaction count, to global memory in bulk groups."""

    def __init__(
        self,
        shared: SharedMemory,
        global_memory: GlobalMemory,
        mbarriers: Mbarriers,
        lanes: Lanes,
        reports: Reports,
        rng: np.random.Generator | None,
    ):
        self.shared, self.global_memory, self.mbarriers = shared, global_memory, mbarriers
        self.lanes, self.reports, self.rng = lanes, reports, rng
        self._incoming: list[_BulkCopy] = []
        self._open: dict[int, list[np.ndarray]] = defaultdict(list)
        self._groups: dict[int, list[list[np.ndarray]]] = defaultdict(list)

    def to_shared(self, ix: LaneSet, destination, source, size, barrier, pc: int) -> None:
        lanes = self.lanes.indices(ix)
        size = np.broadcast_to(size, len(lanes)).tolist()
        for index, nbytes in enumerate(size):
            one = lanes[index : index + 1]
            offset, start, rows, granules = self._ranges(one, destination[index], source[index], nbytes, pc, True)
            self.shared.check_write(np.repeat(one, len(rows)), rows, 16, pc)
            if self.shared.unfenced[granules].any():
                message = "bulk copy overwrites generic-proxy writes without fence.proxy.async"
                self.reports.report("missing-proxy-fence", pc, message)
            self.shared.note_pending(rows, 16, granules)
            place = int(barrier[index] + self.shared.origin[one[0]])
            self.mbarriers.at(place, pc, one)
            self._incoming.append(_BulkCopy(offset, start, nbytes, place, granules, pc))

    def to_global(self, ix: LaneSet, destination, source, size, pc: int) -> None:
        lanes = self.lanes.indices(ix)
        size = np.broadcast_to(size, len(lanes)).tolist()
        for index, nbytes in enumerate(size):
            one = lanes[index : index + 1]
            offset, start, rows, granules = self._ranges(one, source[index], destination[index], nbytes, pc, False)
            self.shared.check_read(np.repeat(one, len(rows)), rows, 16, pc)
            if self.shared.unfenced[granules].any():
                message = "bulk store reads generic-proxy writes without fence.proxy.async"
                self.reports.report("missing-proxy-fence", pc, message)
            self.global_memory.memory.buffer[start : start + nbytes] = self.shared.buffer[offset : offset + nbytes]
            self.shared.start_reading(granules)
            self._open[int(one[0])].append(granules)

    def _ranges(self, lane: np.ndarray, shared_address, global_address, nbytes: int, pc: int, to_shared: bool):
        """Offset in shared memory and in the arena, the 16-byte rows, and the granules of one thread's copy."""
        if nbytes % 16 or nbytes == 0:
            self.reports.fail(pc, "cp.async.bulk size must be a multiple of 16")
        first = np.array([shared_address])
        offset = self.shared.offsets(lane, first, 16, pc, to_shared)
        self.shared.offsets(lane, first + nbytes - 16, 16, pc, to_shared, count=False)
        start = self.global_memory.offsets(lane, np.array([global_address]), nbytes, 16, pc, not to_shared)
        rows = offset + np.arange(0, nbytes, 16)
        return int(offset[0]), int(start[0]), rows, self.shared.granules(rows, 16)

    def commit(self, ix: LaneSet) -> None:
        for lane in self.lanes.indices(ix).tolist():
            self._groups[lane].append(self._open.pop(lane, []))

    def wait(self, ix: LaneSet, allowed: int) -> None:
        for lane in self.lanes.indices(ix).tolist():
            while len(self._groups[lane]) > allowed:
                for granules in self._groups[lane].pop(0):
                    self.shared.stop_reading(granules)

    def land_one(self) -> bool:
        """Lets one copy to shared memory arrive (the oldest, or any under a seed); False where there is none."""
        if not self._incoming:
            return False
        copy = self._incoming.pop(0 if self.rng is None else int(self.rng.integers(len(self._incoming))))
        arrived = self.global_memory.memory.buffer[copy.source : copy.source + copy.nbytes]
        self.shared.buffer[copy.offset : copy.offset + copy.nbytes] = arrived
        self.shared.note_engine_write(copy.granules, copy.pc)
        self.mbarriers.complete_transaction(copy.barrier, copy.nbytes, copy.pc)
        return True
