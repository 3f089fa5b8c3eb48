"""mbarrier objects: arrivals, transaction bytes, phases, and the lanes that wait for them."""

from dataclasses import dataclass, field

import numpy as np

from .lanes import Lanes, LaneSet
from .races import Clocks
from .reports import Reports
from .scheduler import Group, Scheduler
from .shared_memory import SharedMemory


@dataclass(slots=True)
class _Mbarrier:
    """A phase ends when `pending` arrivals and `bytes_due` are both used up. Clocks: collecting, and last completed."""

    count: int
    released: np.ndarray
    initialised_by: tuple[int, int]
    pending: int = field(init=False)
    bytes_due: int = 0
    phase: int = 0
    completed: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.pending = self.count
        self.completed = self.released.copy()


class Mbarriers:
    """By offset in shared memory. A phase completes with release, a successful wait acquires."""

    def __init__(
        self,
        shared: SharedMemory,
        lanes: Lanes,
        clocks: Clocks,
        scheduler: Scheduler,
        reports: Reports,
        races: bool,
    ):
        self.shared, self.lanes, self.clocks = shared, lanes, clocks
        self.scheduler, self.reports, self.races = scheduler, reports, races
        self._barriers: dict[int, _Mbarrier] = {}
        self._waiting: list[tuple[np.ndarray, int, np.ndarray]] = []

    def preset(self, offset: int, count: int, phase: int) -> None:
        """An initialised barrier in every block, for kernels that are tested without their producer."""
        for slot in range(self.lanes.blocks):
            barrier = _Mbarrier(count, self.clocks.empty(), (0, 0))
            barrier.phase = phase
            self._barriers[slot * self.shared.stride + offset] = barrier

    def at(self, offset: int, pc: int, lanes: np.ndarray | None = None) -> _Mbarrier:
        """The barrier at `offset`; `lanes` are those that use it, and must be ordered after its init."""
        barrier = self._barriers.get(offset)
        if barrier is None:
            self.reports.fail(pc, f"mbarrier at shared offset {offset % self.shared.stride} was not initialised")
        if lanes is not None and self.races:
            warp, clock = barrier.initialised_by
            if (self.clocks.vector[lanes >> 5, warp] < clock).any():
                message = "mbarrier used by a warp that is not ordered after its init"
                self.reports.report("race-mbarrier-init", pc, message)
        return barrier

    def init(self, ix: LaneSet, address: np.ndarray, count, pc: int) -> None:
        lanes = self.lanes.indices(ix)
        offsets = self.shared.offsets(lanes, address, 8, pc, True)
        counts = np.broadcast_to(count, len(lanes))
        for lane, offset, number in zip(lanes.tolist(), offsets.tolist(), counts.tolist(), strict=True):
            warp = lane >> 5
            initialised_by = (int(self.clocks.local[warp]), int(self.clocks.own(warp)))
            self._barriers[offset] = _Mbarrier(number, self.clocks.empty(), initialised_by)

    def invalidate(self, ix: LaneSet, address: np.ndarray) -> None:
        for offset in (address + self.shared.origin[self.lanes.indices(ix)]).tolist():
            self._barriers.pop(offset, None)

    def arrive(self, ix: LaneSet, address: np.ndarray, count, expected, pc: int) -> np.ndarray:
        """Arrives `count` times (None: not at all) and expects `expected` more bytes (None: no more).

        Returns the phase before, which is the state token.
        """
        lanes = self.lanes.indices(ix)
        return self.arrive_at(lanes, address + self.shared.origin[lanes], count, expected, pc)

    def arrive_at(self, lanes: np.ndarray, offsets: np.ndarray, count, expected, pc: int) -> np.ndarray:
        token = np.zeros(len(lanes), np.uint64)
        counts = None if count is None else np.broadcast_to(count, len(lanes))
        nbytes = None if expected is None else np.broadcast_to(expected, len(lanes))
        for index, offset in enumerate(offsets.tolist()):
            barrier = self.at(offset, pc, lanes[index : index + 1])
            token[index] = barrier.phase
            if nbytes is not None:
                barrier.bytes_due += int(nbytes[index])
            if counts is not None:
                barrier.released = np.maximum(barrier.released, self.clocks.vector[lanes[index] >> 5])
                barrier.pending -= int(counts[index])
                if barrier.pending < 0:
                    self.reports.fail(pc, f"mbarrier: more arrivals than its count ({barrier.count})")
                self._complete(barrier)
        self.clocks.tick(np.unique(lanes >> 5))
        return token

    def complete_transaction(self, offset: int, nbytes: int, pc: int) -> None:
        barrier = self.at(offset, pc)
        barrier.bytes_due -= nbytes
        engine = self.clocks.engine_column
        barrier.released[engine] = max(barrier.released[engine], self.clocks.engine)
        self._complete(barrier)

    def _complete(self, barrier: _Mbarrier) -> None:
        if barrier.pending or barrier.bytes_due:
            return
        barrier.phase += 1
        barrier.pending = barrier.count
        barrier.completed = barrier.released.copy()
        for lanes, block, _ in self._waiting:
            self.scheduler.groups.append(Group(block, lanes))
        self._waiting = []

    def _ready(self, ix: LaneSet, address: np.ndarray, argument, parity: bool, pc: int):
        """Lanes, their barriers' offsets, and whether the awaited phase is over: another parity, or another token."""
        lanes = self.lanes.indices(ix)
        offsets = address + self.shared.origin[lanes]
        argument = np.broadcast_to(argument, len(lanes)).astype(np.int64)
        ready = np.zeros(len(lanes), np.bool_)
        for offset in np.unique(offsets).tolist():
            here = offsets == offset
            phase = self.at(offset, pc, lanes[here]).phase
            ready[here] = (phase & 1) != (argument[here] & 1) if parity else phase != argument[here]
        return lanes, offsets, ready

    def park(self, group: Group, address: np.ndarray, argument, parity: bool, pc: int) -> Group | None:
        """Keeps the lanes that a try_wait would turn away until some phase completes; the others go on."""
        _, offsets, ready = self._ready(group.ix, address, argument, parity, pc)
        if ready.all():
            return group
        self._waiting.append((group.lanes[~ready], group.block, offsets[~ready]))
        return Group(group.block, group.lanes[ready]) if ready.any() else None

    def test(self, ix: LaneSet, address: np.ndarray, argument, parity: bool, pc: int) -> np.ndarray:
        lanes, offsets, ready = self._ready(ix, address, argument, parity, pc)
        for offset in np.unique(offsets[ready]).tolist():
            warps = np.unique(lanes[ready & (offsets == offset)] >> 5)
            self.clocks.acquire(warps, self._barriers[offset].completed)
        return ready

    def describe_waits(self) -> list[str]:
        lines = []
        for lanes, block, offsets in self._waiting:
            places = sorted({offset % self.shared.stride for offset in offsets.tolist()})[:4]
            pc = self.scheduler.blocks[block].start
            lines.append(f"{len(lanes)} threads wait on mbarrier(s) at shared offset {places} at PTX #{pc}")
        return lines
