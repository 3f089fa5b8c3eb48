"""bar.sync and bar.arrive: the sixteen named barriers of a block."""

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

from .lanes import Lanes
from .races import Clocks
from .reports import Reports
from .scheduler import Group, Scheduler


@dataclass(slots=True)
class _Barrier:
    released: np.ndarray
    pc: int
    count: int | None
    arrived: int = 0
    warps: list[int] = field(default_factory=list)
    waiting: list[tuple[np.ndarray, int]] = field(default_factory=list)


class BlockBarriers:
    """Without a count a barrier wants every warp of its block that is still alive; with one, that many threads."""

    def __init__(self, lanes: Lanes, clocks: Clocks, scheduler: Scheduler, reports: Reports):
        self.lanes, self.clocks, self.scheduler, self.reports = lanes, clocks, scheduler, reports
        self._barriers: dict[tuple[int, int], _Barrier] = {}

    def arrive(self, group: Group, number: int, count: int | None, waits: bool, pc: int) -> None:
        """All lanes of `group` arrive; those that wait go on at the next basic block when the barrier opens."""
        slots = self.lanes.slot[group.lanes]
        for slot in np.unique(slots).tolist():
            lanes = group.lanes[slots == slot]
            key = (slot, number)
            barrier = self._barriers.setdefault(key, _Barrier(self.clocks.empty(), pc, count))
            warps = np.unique(lanes >> 5)
            if set(warps.tolist()) & set(barrier.warps):
                self.reports.fail(pc, f"a warp arrives twice at barrier {number}")
            if count is not None and (count % 32 or barrier.count != count):
                self.reports.fail(pc, "barrier thread count wrong or inconsistent")
            barrier.arrived += 32 * len(warps)
            barrier.warps += warps.tolist()
            barrier.released = np.maximum(barrier.released, self.clocks.vector[warps].max(0))
            self.clocks.tick(warps)
            if waits:
                barrier.waiting.append((lanes, group.block + 1))
            else:
                self.scheduler.groups.append(Group(group.block + 1, lanes))
            self._open_if_full(key)

    def needed(self, key: tuple[int, int]) -> int:
        barrier = self._barriers[key]
        if barrier.count is not None:
            return barrier.count
        threads = self.lanes.warps_per_block * 32
        alive = np.flatnonzero(~self.lanes.exited[key[0] * threads : (key[0] + 1) * threads])
        return 32 * len(np.unique(alive >> 5))

    def check_all(self) -> None:
        """Called when lanes exit: a barrier without a count may need fewer now."""
        for key in list(self._barriers):
            self._open_if_full(key)

    def _open_if_full(self, key: tuple[int, int]) -> None:
        barrier, needed = self._barriers[key], self.needed(key)
        if barrier.count is not None and barrier.arrived > needed:
            self.reports.fail(barrier.pc, f"more threads than the count at barrier {key[1]}")
        if barrier.arrived < needed:
            return
        del self._barriers[key]
        going_on = defaultdict(list)
        for lanes, block in barrier.waiting:
            going_on[block].append(lanes)
            self.clocks.acquire(np.unique(lanes >> 5), barrier.released)
        for block, parts in going_on.items():
            self.scheduler.groups.append(Group(block, np.sort(np.concatenate(parts))))

    def describe_waits(self) -> list[str]:
        return [
            f"barrier {number} of block slot {slot} has {barrier.arrived}/{self.needed((slot, number))} threads"
            for (slot, number), barrier in self._barriers.items()
        ]
