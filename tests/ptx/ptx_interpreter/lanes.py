"""The lanes that run together: several thread blocks side by side, each padded to whole warps."""

import time
from collections.abc import Sequence

import numpy as np

from .ptx_types import PTXError
from .reports import Reports

# A set of lanes: a slice where they are contiguous (numpy views), else an index array.
LaneSet = slice | np.ndarray


class Lanes:
    """Where each lane sits: block slot, thread, lane of its warp; and the special registers that follow from that."""

    def __init__(
        self,
        block: tuple[int, int, int],
        grid: tuple[int, int, int],
        blocks: Sequence[tuple[int, int, int]],
        dynamic_bytes: int,
        shared_bytes: int,
        reports: Reports,
    ):
        threads = int(np.prod(block))
        self.reports = reports
        self.warps_per_block = -(-threads // 32)
        self.blocks = len(blocks)
        padded = self.warps_per_block * 32
        self.count = padded * self.blocks
        lane = np.arange(self.count)
        self.tid = lane % padded
        self.slot = lane // padded
        self.lane = lane & 31
        self.exited = self.tid >= threads
        width, height, _ = block
        position = np.array(blocks)
        self.block_number = (1 + position @ np.array([1, grid[0], grid[0] * grid[1]]))[self.slot]
        varying = {
            "tid.x": self.tid % width,
            "tid.y": self.tid // width % height,
            "tid.z": self.tid // (width * height),
            "laneid": self.lane,
            "warpid": self.tid >> 5,
        }
        varying |= {f"ctaid.{axis}": position[self.slot, index] for index, axis in enumerate("xyz")}
        self._varying = {name: values.astype(np.uint32) for name, values in varying.items()}
        self._uniform = {f"ntid.{axis}": size for axis, size in zip("xyz", block, strict=True)}
        self._uniform |= {f"nctaid.{axis}": size for axis, size in zip("xyz", grid, strict=True)}
        self._uniform |= {"dynamic_smem_size": dynamic_bytes, "total_smem_size": shared_bytes}
        self._uniform |= {"cluster_ctarank": 0, "cluster_nctarank": 1, "nwarpid": self.warps_per_block}
        self._uniform |= {f"cluster_ctaid.{axis}": 0 for axis in "xyz"}
        self._uniform |= {f"cluster_nctaid.{axis}": 1 for axis in "xyz"}
        self._uniform |= {"smid": 0, "is_explicit_cluster": 0}

    def indices(self, ix: LaneSet) -> np.ndarray:
        return np.arange(ix.start, ix.stop) if isinstance(ix, slice) else ix

    def number(self, ix: LaneSet) -> int:
        return ix.stop - ix.start if isinstance(ix, slice) else len(ix)

    def warps(self, ix: LaneSet) -> np.ndarray:
        if isinstance(ix, slice):
            return np.arange(ix.start >> 5, (ix.stop + 31) >> 5)
        return np.unique(ix >> 5)

    def subset(self, ix: LaneSet, keep) -> LaneSet | None:
        """The lanes of `ix` where the predicate `keep` holds; None where it holds nowhere."""
        keep = np.broadcast_to(keep, (self.number(ix),))
        if keep.all():
            return ix
        if not keep.any():
            return None
        return np.flatnonzero(keep) + ix.start if isinstance(ix, slice) else ix[keep]

    def full(self, ix: LaneSet, value, dtype=np.int64) -> np.ndarray:
        return np.full(self.number(ix), value, dtype)

    def whole_warps(self, ix: LaneSet, pc: int) -> int:
        """How many warps `ix` is made of; stops the run if one of them is not complete."""
        lanes = self.indices(ix)
        first, last = lanes[::32], lanes[31::32]
        if len(lanes) % 32 or (first & 31).any() or (last != first + 31).any():
            self.reports.fail(pc, ".aligned instruction without all 32 lanes")
        return len(lanes) // 32

    def special(self, name: str, ix: LaneSet):
        """The value of the special register %name."""
        if name in self._varying:
            return self._varying[name][ix]
        if name in self._uniform:
            return np.uint32(self._uniform[name])
        if name.startswith("lanemask"):
            equal = np.uint64(1) << self.lane[ix].astype(np.uint64)
            below = equal - np.uint64(1)
            masks = {"lt": below, "le": below | equal, "eq": equal, "ge": ~below, "gt": ~(below | equal)}
            return masks[name[-2:]].astype(np.uint32)
        if name.startswith(("clock", "globaltimer")):
            return np.uint64(time.perf_counter_ns())
        raise PTXError(f"unsupported special register %{name}")
