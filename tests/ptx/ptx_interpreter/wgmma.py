"""wgmma: warpgroup products that run behind the warps' back until they are waited for."""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from .lanes import Lanes, LaneSet
from .ptx_types import SHARED_BASE
from .reports import Reports
from .shared_memory import PENDING, UNINITIALISED, SharedMemory
from .tensor_core import fragment_a, to_f32

_SWIZZLE_WIDTH = {0: 16, 1: 128, 2: 64, 3: 32}
_SWIZZLE_MASK = {0: 0, 1: 0x70, 2: 0x30, 3: 0x10}
_PATTERN_MASK = {0: 0, 1: 0x380, 2: 0x180, 3: 0x80}  # the address bits that the swizzle reads


def operand_addresses(descriptor: int, rows: int, transposed: bool) -> np.ndarray:
    """Shared addresses [16 k, rows] of a 16-bit operand that a matrix descriptor describes.

    Bits 0-13 start / 16, 16-29 leading byte offset / 16, 32-45 stride byte offset / 16, 62-63 the swizzle
    (0 none, 1 = 128 B, 2 = 64 B, 3 = 32 B); `transposed` is MN-major. Layouts: CUTLASS, mma_sm90_desc.hpp.
    """
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    mode = descriptor >> 62
    width = _SWIZZLE_WIDTH[mode]
    n, k = np.arange(rows)[None, :], np.arange(16)[:, None]
    if not transposed:
        step = leading if mode == 0 else 16
        address = start + n % 8 * width + n // 8 * stride + k // 8 * step + k % 8 * 2
    elif mode == 0:
        address = start + n % 8 * 2 + n // 8 * stride + k % 8 * 16 + k // 8 * leading
    else:
        columns = width // 2
        address = start + n % columns * 2 + n // columns * leading + k % 8 * width + k // 8 * stride
    return address ^ ((address >> 3) & _SWIZZLE_MASK[mode])


@dataclass(slots=True)
class _Product:
    """A wgmma in flight: its number, result and A registers, lanes, and the granules that it reads."""

    number: int
    result: np.ndarray
    a: np.ndarray | None
    lanes: slice
    granules: list[np.ndarray]


class Wgmma:
    """The accumulators of a product in flight read as NaN; `wait` lets the result appear.

    `results` and `fragments` are the registers that any wgmma of the kernel writes, or reads as A.
    """

    def __init__(
        self,
        words: np.ndarray,
        results: set[int],
        fragments: set[int],
        shared: SharedMemory,
        lanes: Lanes,
        reports: Reports,
    ):
        self.words, self.shared, self.lanes, self.reports = words, shared, lanes, reports
        self.tracked = np.array(sorted(results | fragments), np.int64)
        self.live = False
        self._number = 0
        self._open: dict[int, list[_Product]] = defaultdict(list)
        self._groups: dict[int, list[list[_Product]]] = defaultdict(list)
        if len(self.tracked):
            self._pending_value = np.zeros(words.shape, np.float32)
            self._writer = np.zeros(words.shape, np.int32)
            self._reader = np.zeros(words.shape, np.int32)
            self._unfenced = np.zeros(words.shape, np.bool_)
            self._unfenced[self.tracked] = True

    def _warpgroups(self, ix: LaneSet, pc: int) -> np.ndarray:
        warps = self.lanes.whole_warps(ix, pc)
        lanes = self.lanes.indices(ix)
        first, last = lanes[::128], lanes[127::128]
        if self.lanes.warps_per_block % 4 or warps % 4 or (first % 128).any() or (last != first + 127).any():
            self.reports.fail(pc, "wgmma needs all four warps of an aligned warpgroup together")
        return lanes.reshape(-1, 128)

    def fence(self, ix: LaneSet, pc: int) -> None:
        lanes = self._warpgroups(ix, pc).reshape(-1)
        if len(self.tracked):
            self._unfenced[self.tracked[:, None], lanes] = False

    def note_register_write(self, registers: list[int], ix: LaneSet) -> None:
        for register in registers:
            self._unfenced[register, ix] = True

    def touch(self, pc: int, ix: LaneSet, read: list[int], written: list[int]) -> None:
        """Called before an instruction that uses tracked registers, once a wgmma has been issued."""
        for register in read + written:
            if self._writer[register, ix].any():
                message = "accumulator register accessed while its wgmma is in flight"
                self.reports.report("wgmma-register", pc, message)
        for register in written:
            if self._reader[register, ix].any():
                message = "A-fragment register overwritten while a wgmma in flight reads it"
                self.reports.report("wgmma-register", pc, message)

    def multiply(self, ix: LaneSet, n: int, kind: str, result: list[int], a, b, scale_d, immediates, pc: int) -> None:
        """m64nNk16: `a` is a list of four registers or a descriptor vector, `b` a descriptor vector.

        Register i of the result holds row 16 warp + g + 8 * ((i >> 1) & 1), column 8 * (i >> 2) + 2t + (i & 1).
        """
        from_registers = isinstance(a, list)
        scale_d = np.broadcast_to(scale_d, self.lanes.number(ix))
        b = np.broadcast_to(b, self.lanes.number(ix))
        a = a if from_registers else np.broadcast_to(a, self.lanes.number(ix))
        registers = np.array(result)
        self.live = True
        for group, lanes in enumerate(self._warpgroups(ix, pc)):
            where = slice(int(lanes[0]), int(lanes[-1]) + 1)
            part = slice(group * 128, group * 128 + 128)
            self._number += 1
            unfenced = self._unfenced[registers, where].any()
            if unfenced or (from_registers and self._unfenced[np.array(a), where].any()):
                self.reports.report("missing-wgmma-fence", pc, "registers written since the last wgmma.fence")
            b_values, granules = self._operand(lanes, b[part], n, immediates[-1], kind, pc)
            read = [granules]
            if from_registers:
                a_values = fragment_a([self.words[register, where] for register in a], 4, kind).reshape(64, 16)
                self._reader[np.array(a), where] = self._number
            else:
                a_values, granules = self._operand(lanes, a[part], 64, immediates[-2], kind, pc)
                a_values = a_values.T
                read.append(granules)
            product = (np.float32(immediates[0]) * a_values) @ (np.float32(immediates[1]) * b_values)
            value = product.reshape(4, 2, 8, n // 8, 4, 2).transpose(3, 1, 5, 0, 2, 4).reshape(n // 2, 128)
            if scale_d[part][0]:
                chained = self._writer[registers, where] != 0
                visible = self.words.view(np.float32)[registers, where]
                value = value + np.where(chained, self._pending_value[registers, where], visible)
            self._pending_value[registers, where] = value
            self._writer[registers, where] = self._number
            self.words[registers, where] = 0x7FFFFFFF  # NaN until waited for
            for granules in read:
                self.shared.start_reading(granules)
            in_flight = _Product(self._number, registers, np.array(a) if from_registers else None, where, read)
            self._open[int(lanes[0]) >> 7].append(in_flight)

    def _operand(self, lanes: np.ndarray, descriptors: np.ndarray, rows: int, transposed, kind: str, pc: int):
        """float32 [16 k, rows] and the granules it lies in."""
        descriptor = int(descriptors[0])
        if (descriptors != descriptors[0]).any():
            self.reports.report("wgmma-descriptor", pc, "descriptor differs inside a warpgroup")
        start = (descriptor & 0x3FFF) << 4
        if descriptor >> 49 & 7:
            self.reports.fail(pc, "wgmma descriptor with a base_offset: not supported")
        if start & _PATTERN_MASK[descriptor >> 62]:
            message = f"start address {start:#x} is not on a swizzle-pattern boundary and base_offset is 0"
            self.reports.report("wgmma-descriptor", pc, message)
        inside = operand_addresses(descriptor, rows, bool(transposed)) - SHARED_BASE
        if (inside < 0).any() or (inside + 2 > self.shared.nbytes).any():
            reach = f"offsets {inside.min()}..{inside.max()}"
            self.reports.fail(pc, f"wgmma descriptor {descriptor:#x} reaches outside shared memory ({reach})")
        offsets = inside + int(self.lanes.slot[lanes[0]]) * self.shared.stride
        granules = np.unique(offsets >> self.shared.shift)
        self._check_operand(lanes, granules, pc)
        words = self.shared.views[2][offsets >> 1]
        return to_f32(words, kind), granules

    def _check_operand(self, lanes: np.ndarray, granules: np.ndarray, pc: int) -> None:
        state = self.shared.state[granules]
        if (state == PENDING).any():
            self.reports.report("in-flight-read", pc, "wgmma operand not yet arrived")
        elif (state == UNINITIALISED).any():
            self.reports.report("uninitialised-read", pc, "wgmma operand never written")
        if self.shared.unfenced[granules].any():
            message = "wgmma reads shared memory written through the generic proxy without fence.proxy.async"
            self.reports.report("missing-proxy-fence", pc, message)
        if self.shared.history is not None:
            warps = (lanes[0] >> 5) + np.arange(4)
            self.shared.history.check_operand(warps, granules, pc)

    def commit(self, ix: LaneSet, pc: int) -> None:
        for lanes in self._warpgroups(ix, pc):
            group = int(lanes[0]) >> 7
            self._groups[group].append(self._open.pop(group, []))

    def wait(self, ix: LaneSet, allowed: int, pc: int) -> None:
        for lanes in self._warpgroups(ix, pc):
            groups = self._groups[int(lanes[0]) >> 7]
            while len(groups) > allowed:
                for product in groups.pop(0):
                    self._finish(product)

    def _finish(self, product: _Product) -> None:
        registers, where = product.result, product.lanes
        done = self._writer[registers, where] == product.number
        values = self._pending_value.view(np.uint32)[registers, where]
        self.words[registers, where] = np.where(done, values, self.words[registers, where])
        self._writer[registers, where] = np.where(done, 0, self._writer[registers, where])
        if product.a is not None:
            readers = self._reader[product.a, where]
            self._reader[product.a, where] = np.where(readers == product.number, 0, readers)
        for granules in product.granules:
            self.shared.stop_reading(granules)
            if self.shared.history is not None:
                self.shared.history.note_read(range(where.start >> 5, where.stop >> 5), granules)

    def note_exit(self, lanes: np.ndarray) -> None:
        if self.live and any(self._open[group] or self._groups[group] for group in np.unique(lanes >> 7).tolist()):
            last = len(self.reports.kernel.instructions) - 1
            self.reports.report("exit-in-flight", last, "thread exits with wgmma in flight")
