"""Device memory, a block's view of it (bounds, alignment, sectors), and local memory."""

import numpy as np

from .counters import Counters
from .lanes import Lanes, LaneSet
from .parser import Module
from .ptx_types import GENERIC_LOCAL, GENERIC_SHARED, GLOBAL_BASE, UNSIGNED
from .races import BlockHistory
from .reports import Reports


class DeviceMemory:
    """One arena with guard gaps: an access that leaves its buffer by up to a gap is always caught.

    Fresh memory is all ones, which every float format reads as NaN.
    """

    GAP = 1024

    def __init__(self, nbytes: int = 64 << 20):
        self.buffer = np.full(nbytes, 0xFF, np.uint8)
        self.valid = np.zeros(nbytes, np.bool_)
        self.views = {size: self.buffer.view(dtype) for size, dtype in UNSIGNED.items()}
        self._top = self.GAP
        self._symbols: dict[int, tuple[Module, dict[str, np.uint64]]] = {}

    def alloc(self, nbytes: int) -> int:
        """The device address of `nbytes` fresh bytes, a multiple of 256. Raises MemoryError where the arena is full."""
        offset = self._top
        self._top += -(-nbytes // 256) * 256 + self.GAP
        if self._top > self.buffer.size:
            raise MemoryError("device arena too small")
        self.valid[offset : offset + nbytes] = True
        return GLOBAL_BASE + offset

    @property
    def used(self) -> int:
        """How many bytes of the arena lie before its free end."""
        return self._top

    def upload(self, array) -> int:
        """The device address of a copy of `array`."""
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        address = self.alloc(raw.size)
        self.buffer[address - GLOBAL_BASE :][: raw.size] = raw
        return address

    def download(self, address: int, shape, dtype) -> np.ndarray:
        """A copy of the array at `address`."""
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self.buffer[address - GLOBAL_BASE :][:nbytes].view(dtype).reshape(shape).copy()

    def symbols(self, module: Module) -> dict[str, np.uint64]:
        """The addresses of a module's .const and .global variables: laid out once, they live on between launches."""
        if id(module) not in self._symbols:
            addresses = {variable.name: np.uint64(self.upload(variable.data)) for variable in module.globals}
            self._symbols[id(module)] = (module, addresses)
        return self._symbols[id(module)][1]


class GlobalMemory:
    """Global and constant accesses of the lanes that run together."""

    def __init__(
        self,
        memory: DeviceMemory,
        lanes: Lanes,
        reports: Reports,
        counters: Counters | None,
        history: BlockHistory | None,
    ):
        self.memory, self.lanes, self.reports = memory, lanes, reports
        self.counters, self.history = counters, history

    def offsets(
        self,
        ix: LaneSet,
        address: np.ndarray,
        nbytes,
        align: int,
        pc: int,
        write: bool,
        atomic: bool = False,
        constant: bool = False,
    ) -> np.ndarray:
        """Arena offsets of the lanes' accesses of `nbytes` (a number, or one per lane). Stops the run on a bad one.

        Blocks may meet in `atomic` accesses; `constant` ones have no sectors.
        """
        offset = (address - np.uint64(GLOBAL_BASE)).astype(np.int64)
        last = offset + nbytes - 1
        bad = (offset < 0) | (last >= self.memory.buffer.size)
        if not bad.any():
            bad = ~(self.memory.valid[offset] & self.memory.valid[last])
        if bad.any():
            index = int(np.argmax(bad))
            lane = self.lanes.indices(ix)[index]
            size = int(np.broadcast_to(nbytes, offset.shape)[index])
            where = (
                f"tid {self.lanes.tid[lane]} of block slot {self.lanes.slot[lane]}, address {int(address[index]):#x}"
            )
            kind = "write" if write else "read"
            self.reports.fail(pc, f"global {kind} out of bounds: {where}, {size} bytes")
        if (offset & (align - 1)).any():
            self.reports.fail(pc, f"misaligned global access ({align} bytes)")
        if constant:
            return offset
        if self.counters is not None:
            self.counters.count_global(pc, self.lanes.indices(ix) >> 5, offset, nbytes)
        if self.history is not None and not atomic:
            self.history.note(self.lanes.block_number[self.lanes.indices(ix)], offset, nbytes, pc, write)
        return offset

    def load(self, ix: LaneSet, address: np.ndarray, size: int, number: int, pc: int) -> np.ndarray:
        """Raw values [lane, number]."""
        return self._gather(self.offsets(ix, address, size * number, size * number, pc, False), size, number)

    def load_constant(self, ix: LaneSet, address: np.ndarray, size: int, number: int, pc: int) -> np.ndarray:
        """As `load`, without sectors: the constant cache has none."""
        offset = self.offsets(ix, address, size * number, size * number, pc, False, constant=True)
        return self._gather(offset, size, number)

    def _gather(self, offset: np.ndarray, size: int, number: int) -> np.ndarray:
        return self.memory.views[size][(offset // size)[:, None] + np.arange(number)]

    def store(self, ix: LaneSet, address: np.ndarray, size: int, values: list, pc: int) -> None:
        nbytes = size * len(values)
        index = self.offsets(ix, address, nbytes, nbytes, pc, True) // size
        for position, value in enumerate(values):
            self.memory.views[size][index + position] = np.asarray(value).astype(UNSIGNED[size])


class LocalMemory:
    """Per-thread arrays: an address is lane * bytes + offset."""

    def __init__(self, nbytes: int, lanes: Lanes, reports: Reports):
        self.nbytes, self.lanes, self.reports = nbytes, lanes, reports
        size = -(-max(nbytes, 8) * lanes.count // 8) * 8
        self.buffer = np.full(size, 0xFF, np.uint8)

    def address(self, ix: LaneSet, offset: int) -> np.ndarray:
        return self.lanes.indices(ix).astype(np.uint64) * np.uint64(self.nbytes) + np.uint64(offset)

    def _index(self, ix: LaneSet, address: np.ndarray, size: int, number: int, pc: int) -> np.ndarray:
        inside = address.astype(np.int64) - self.lanes.indices(ix) * self.nbytes
        if (inside < 0).any() or (inside + size * number > self.nbytes).any():
            self.reports.fail(pc, f"local access out of bounds: {self.nbytes} bytes per thread")
        if (inside % (size * number)).any():
            self.reports.fail(pc, f"misaligned local access ({size * number} bytes)")
        return address.astype(np.int64)[:, None] // size + np.arange(number)

    def load(self, ix: LaneSet, address: np.ndarray, size: int, number: int, pc: int) -> np.ndarray:
        return self.buffer.view(UNSIGNED[size])[self._index(ix, address, size, number, pc)]

    def store(self, ix: LaneSet, address: np.ndarray, size: int, values: list, pc: int) -> None:
        index = self._index(ix, address, size, len(values), pc)
        view = self.buffer.view(UNSIGNED[size])
        for position, value in enumerate(values):
            view[index[:, position]] = np.asarray(value).astype(UNSIGNED[size])


class GenericMemory:
    """Generic addresses: every lane's access goes to the window that its address lies in."""

    def __init__(self, global_memory: GlobalMemory, shared, local: LocalMemory, lanes: Lanes):
        self.lanes = lanes
        self.rooms = ((shared, GENERIC_SHARED), (local, GENERIC_LOCAL), (global_memory, 0))

    def _parts(self, address: np.ndarray):
        in_shared = address >= np.uint64(GENERIC_SHARED)
        in_local = (address >= np.uint64(GENERIC_LOCAL)) & ~in_shared
        masks = (in_shared, in_local, ~(in_shared | in_local))
        for (room, base), mask in zip(self.rooms, masks, strict=True):
            if mask.any():
                inside = address[mask] - np.uint64(base)
                yield room, mask, inside.astype(np.int64) if base else inside

    def load(self, ix: LaneSet, address: np.ndarray, size: int, number: int, pc: int) -> np.ndarray:
        lanes = self.lanes.indices(ix)
        result = np.zeros((len(lanes), number), UNSIGNED[size])
        for room, mask, inside in self._parts(address):
            result[mask] = room.load(lanes[mask], inside, size, number, pc)
        return result

    def store(self, ix: LaneSet, address: np.ndarray, size: int, values: list, pc: int) -> None:
        lanes = self.lanes.indices(ix)
        for room, mask, inside in self._parts(address):
            chosen = [np.broadcast_to(value, len(lanes))[mask] for value in values]
            room.store(lanes[mask], inside, size, chosen, pc)
