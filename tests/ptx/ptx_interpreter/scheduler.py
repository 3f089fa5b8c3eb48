"""Which lanes run next: groups of lanes with one program counter, merged where they meet."""

from collections import defaultdict
from collections.abc import Callable

import numpy as np

from .lanes import Lanes, LaneSet
from .ptx_types import END, PTXError
from .reports import Reports

_TURN = 3000  # basic blocks that a group may run before others that wait get their turn


class Group:
    """Lanes that stand at the same basic block (`block`), sorted."""

    __slots__ = ("block", "ix", "lanes", "penalty", "size", "warps")

    def __init__(self, block: int, lanes: np.ndarray):
        self.block, self.lanes, self.penalty = block, lanes, 0
        self.size = len(lanes)
        contiguous = lanes[-1] - lanes[0] + 1 == len(lanes)
        self.ix: LaneSet = slice(int(lanes[0]), int(lanes[-1]) + 1) if contiguous else lanes
        self.warps = len(np.unique(lanes >> 5))


class Scheduler:
    """Runs the group at the smallest block (or a random one under a seed) until it meets another, waits or splits.

    Lanes of a warp that is not complete are parked before a block that wants whole warps. Where nothing can run, one
    outstanding asynchronous operation is allowed to finish; where there is none either, that is a deadlock.
    """

    def __init__(self, blocks: list, lanes: Lanes, reports: Reports, rng: np.random.Generator | None, max_steps: int):
        self.blocks, self.lanes, self.reports, self.rng = blocks, lanes, reports, rng
        self.groups = [Group(0, np.flatnonzero(~lanes.exited))]
        self.warp_runs = np.zeros(len(blocks), np.int64)
        self.lane_runs = np.zeros(len(blocks), np.int64)
        self._steps_left = max_steps
        self._parked: dict[int, list[np.ndarray]] = defaultdict(list)

    def run(
        self,
        runtime,
        barriers,
        mbarriers,
        land_one: list[Callable[[], bool]],
        at_exit: Callable[[np.ndarray], None],
    ) -> None:
        """Runs everything to its end. `land_one` let asynchronous operations finish, `at_exit` gets exiting lanes.

        Raises PTXError on a deadlock, an endless loop, or a warp that never comes together.
        """
        while True:
            if not self.groups:
                if any(land() for land in land_one):
                    continue
                self._check_finished(barriers, mbarriers)
                return
            group, limit = self._next_group()
            turn = _TURN
            while group is not None:
                if group.block >= len(self.blocks):
                    self._exit(group.lanes, barriers, at_exit)
                    break
                group = self._ready(runtime, group, mbarriers)
                if group is None:
                    break
                turn -= 1
                if not self._step(runtime, group, barriers):
                    break
                if self.groups and (group.block >= limit or turn < 0 or self.rng is not None):
                    group.penalty += turn < 0
                    self.groups.append(group)
                    break

    def _next_group(self) -> tuple[Group, int]:
        """The group to run, all that stand at its block merged into it, and the next block where others stand."""
        if len(self.groups) == 1:
            return self.groups.pop(), END
        if self.rng is None:
            block = min(self.groups, key=lambda group: (group.penalty, group.block)).block
        else:
            block = self.groups[self.rng.integers(len(self.groups))].block
        same = [group for group in self.groups if group.block == block]
        self.groups = [group for group in self.groups if group.block != block]
        merged = same[0] if len(same) == 1 else Group(block, np.sort(np.concatenate([group.lanes for group in same])))
        return merged, min((group.block for group in self.groups), default=END)

    def _ready(self, runtime, group: Group, mbarriers) -> Group | None:
        """The lanes of `group` that may run its block now; the others are parked."""
        block = self.blocks[group.block]
        if block.whole_warps:
            group = self._whole_warps(group)
        if group is not None and block.wait is not None:
            address, argument = block.wait(runtime, group.ix)
            group = mbarriers.park(group, address, argument, block.wait_parity, block.start)
        return group

    def _whole_warps(self, group: Group) -> Group | None:
        lanes = group.lanes
        if self._parked.get(group.block):
            lanes = np.sort(np.concatenate([lanes, *self._parked.pop(group.block)]))
        warps = self.lanes.count >> 5
        present = np.bincount(lanes >> 5, minlength=warps)
        alive = np.bincount(np.flatnonzero(~self.lanes.exited) >> 5, minlength=warps)
        complete = (present == alive)[lanes >> 5]
        if complete.all():
            return group if len(lanes) == group.size else Group(group.block, lanes)
        self._parked[group.block].append(lanes[~complete])
        return Group(group.block, lanes[complete]) if complete.any() else None

    def _step(self, runtime, group: Group, barriers) -> bool:
        """Runs one basic block. False where the group ended there: it waits, or it split."""
        block = self.blocks[group.block]
        result = block.function(runtime, group.ix)
        self.warp_runs[group.block] += group.warps
        self.lane_runs[group.block] += group.size
        self._steps_left -= 1
        if self._steps_left < 0:
            self.reports.fail(block.start, "step budget used up (endless loop?)")
        if block.terminator == "fall":
            group.block += 1
            return True
        if block.terminator == "bar":
            number, count = ([int(np.reshape(value, -1)[0]) for value in result] + [None, None])[:2]
            pc = block.end - 1
            barriers.arrive(group, number or 0, count, block.waits, pc)
            return False
        target = block.target if block.terminator == "bra" else END
        taken = None if result is None else np.broadcast_to(np.asarray(result), (group.size,))
        if taken is None or taken.all():
            group.block = target
        elif not taken.any():
            group.block += 1
        else:
            self.groups += [Group(target, group.lanes[taken]), Group(group.block + 1, group.lanes[~taken])]
            return False
        return True

    def _exit(self, lanes: np.ndarray, barriers, at_exit: Callable[[np.ndarray], None]) -> None:
        self.lanes.exited[lanes] = True
        at_exit(lanes)
        barriers.check_all()
        # A warp may be complete now that some of its lanes are gone.
        for block, parts in list(self._parked.items()):
            if parts:
                self.groups.append(Group(block, np.sort(np.concatenate(self._parked.pop(block)))))

    def _check_finished(self, barriers, mbarriers) -> None:
        for block, parts in self._parked.items():
            if parts:
                lanes = np.concatenate(parts)
                message = "warp-synchronous code reached by only part of a warp"
                start = self.blocks[block].start
                self.reports.fail(start, f"{message} (lanes {lanes[:8]}...): the other lanes never arrive")
        waits = barriers.describe_waits() + mbarriers.describe_waits()
        if waits:
            raise PTXError(f"{self.reports.kernel.name}: DEADLOCK: " + "; ".join(waits))
