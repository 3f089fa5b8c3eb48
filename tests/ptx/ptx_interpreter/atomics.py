"""atom and red on global and shared memory, lane after lane."""

from collections.abc import Callable

import numpy as np

from .arithmetic import half_op
from .lanes import Lanes, LaneSet
from .memory import GlobalMemory
from .ptx_types import BYTES, GENERIC_SHARED, HALF_TYPES, UNSIGNED, VIEW, VIEW_DTYPE
from .shared_memory import SharedMemory

_UPDATES: dict[str, Callable] = {
    "add": lambda old, value: old + value,
    "min": min,
    "max": max,
    "exch": lambda old, value: value,
    "and": lambda old, value: old & value,
    "or": lambda old, value: old | value,
    "xor": lambda old, value: old ^ value,
    "inc": lambda old, value: 0 if old >= value else old + 1,
    "dec": lambda old, value: value if old == 0 or old > value else old - 1,
}


class Atomics:
    def __init__(self, global_memory: GlobalMemory, shared: SharedMemory, lanes: Lanes):
        self.global_memory, self.shared, self.lanes = global_memory, shared, lanes

    def update(self, ix: LaneSet, address, space: str, op: str, kind: str, values: list, pc: int) -> list[np.ndarray]:
        """Applies `op` and returns the old values; `values` are vector elements, or (compare, new) of a cas."""
        lanes = self.lanes.indices(ix)
        size = BYTES[kind]
        number = 1 if op == "cas" else len(values)
        index, views = self._place(ix, lanes, address, space, size * number, pc)
        raw = views[size]
        typed = raw if kind in HALF_TYPES else raw.view(VIEW_DTYPE[VIEW[kind]])
        index = index // size
        values = [np.broadcast_to(value, len(lanes)) for value in values]
        old = np.zeros((number, len(lanes)), UNSIGNED[size])
        for lane, place in enumerate(index.tolist()):
            for element in range(number):
                now = typed[place + element]
                old[element, lane] = raw[place + element]
                if op == "cas":
                    new = values[1][lane] if now == values[0][lane] else now
                elif kind in HALF_TYPES:
                    operands = (np.array([now]), np.array([values[element][lane]]))
                    new = half_op(kind, {"add": np.add, "min": np.fmin, "max": np.fmax}[op], *operands)[0]
                else:
                    new = _UPDATES[op](now, values[element][lane])
                typed[place + element] = new
        return [column if kind in HALF_TYPES else column.view(typed.dtype) for column in old]

    def reduce(self, ix: LaneSet, address, space: str, op: str, kind: str, values: list, pc: int) -> None:
        """As `update` where nobody asks for the old values."""
        if op != "add" or kind in HALF_TYPES:
            self.update(ix, address, space, op, kind, values, pc)
            return
        lanes = self.lanes.indices(ix)
        size = BYTES[kind]
        index, views = self._place(ix, lanes, address, space, size * len(values), pc)
        typed = views[size].view(VIEW_DTYPE[VIEW[kind]])
        for element, value in enumerate(values):
            np.add.at(typed, index // size + element, np.broadcast_to(value, len(lanes)))

    def _place(self, ix: LaneSet, lanes: np.ndarray, address, space: str, nbytes: int, pc: int):
        if space == "generic":
            inside = address >= np.uint64(GENERIC_SHARED)
            if inside.any() and not inside.all():
                self.global_memory.reports.fail(pc, "one atomic on shared and on global memory")
            space = "shared" if inside.all() else "global"
            if space == "shared":
                address = (address - np.uint64(GENERIC_SHARED)).astype(np.int64)
        if space == "global":
            offsets = self.global_memory.offsets(ix, address, nbytes, nbytes, pc, True, atomic=True)
            return offsets, self.global_memory.memory.views
        offsets = self.shared.offsets(lanes, address, nbytes, pc, True)
        self.shared.check_initialised(lanes, offsets, self.shared.granules(offsets, nbytes), pc)
        return offsets, self.shared.views
