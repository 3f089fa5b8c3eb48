"""Asynchronous copies, mbarriers, fences and bar.warp.sync. The block barriers end a basic block (compiler.py)."""

from .codegen_operands import OperandCodegen
from .parser import number


class AsyncCodegen(OperandCodegen):
    def op_cp(self, parts: list[str], args: list[str]) -> None:
        if parts[1] != "async" or "tensor" in parts:
            raise self.unsupported()
        if parts[2] == "bulk":
            self._bulk(parts, args)
        elif parts[2] == "commit_group":
            self.emit("B.copies.commit(ix)")
        elif parts[2] == "wait_group":
            self.emit(f"B.copies.wait(ix,{number(args[0])})")
        elif parts[2] == "wait_all":
            self.emit("B.copies.wait(ix,None)")
        elif parts[2] == "mbarrier":
            address = self.address(args[0], "shared")
            self.emit(f"B.copies.arrive_later(ix,{address},{'noinc' in parts},{self.pc})")
        elif parts[2] in ("ca", "cg"):
            self._copy(parts, args)
        else:
            raise self.unsupported()

    def _copy(self, parts: list[str], args: list[str]) -> None:
        """cp.async [dst], [src], size {, src-size or ignore-src} {, cache policy}."""
        size = number(args[2])
        if size not in ((4, 8, 16) if parts[2] == "ca" else (16,)):
            raise self.unsupported()
        rest = args[3:-1] if "L2__cache_hint" in parts else args[3:]
        source_size = "None"
        if rest:
            register = self.register(rest[0].lstrip("!"))
            if register and register[0] == "p":
                ignored = self.source(rest[0], "pred")
                source_size = f"np.where({ignored},np.uint32(0),np.uint32({size}))"
            else:
                source_size = self.source(rest[0], "u32")
        destination, source = self.address(args[0], "shared"), self.address(args[1], "global")
        self.emit(f"B.copies.copy(ix,{destination},{source},{size},{source_size},{self.pc})")

    def _bulk(self, parts: list[str], args: list[str]) -> None:
        if parts[3] == "commit_group":
            self.emit("B.bulk.commit(ix)")
        elif parts[3] == "wait_group":
            self.emit(f"B.bulk.wait(ix,{number(args[0])})")
        elif parts[3].startswith("shared") and parts[4] == "global" and "multicast__cluster" not in parts:
            destination, source = self.address(args[0], "shared"), self.address(args[1], "global")
            size, barrier = self.source(args[2], "u32"), self.address(args[3], "shared")
            self.emit(f"B.bulk.to_shared(ix,{destination},{source},{size},{barrier},{self.pc})")
        elif parts[3] == "global" and parts[4].startswith("shared") and "bulk_group" in parts:
            destination, source = self.address(args[0], "global"), self.address(args[1], "shared")
            self.emit(f"B.bulk.to_global(ix,{destination},{source},{self.source(args[2], 'u32')},{self.pc})")
        else:
            raise self.unsupported()

    def op_mbarrier(self, parts: list[str], args: list[str]) -> None:
        kind = parts[1]
        if "shared__cluster" in parts:
            raise self.unsupported()
        if kind == "init":
            self.emit(f"B.mbarriers.init(ix,{self._mbarrier(args[0])},{self.source(args[1], 'u32')},{self.pc})")
        elif kind == "inval":
            self.emit(f"B.mbarriers.invalidate(ix,{self._mbarrier(args[0])})")
        elif kind == "expect_tx":
            nbytes = self.source(args[1], "u32")
            self.emit(f"B.mbarriers.arrive(ix,{self._mbarrier(args[0])},None,{nbytes},{self.pc})")
        elif kind == "arrive" and "noComplete" not in parts:
            self._arrive(parts, args)
        elif kind in ("try_wait", "test_wait"):
            parity = "parity" in parts
            argument = self.source(args[2], "u32" if parity else "u64")
            call = f"ix,{self._mbarrier(args[1])},{argument},{parity},{self.pc}"
            self.store(args[0], "pred", f"B.mbarriers.test({call})")
        else:
            raise self.unsupported()

    def _arrive(self, parts: list[str], args: list[str]) -> None:
        target, *operands = args if not args[0].startswith("[") else ["_", *args]
        number_or_bytes = self.source(operands[1], "u32") if len(operands) > 1 else "None"
        count, expected = ("1", number_or_bytes) if "expect_tx" in parts else (number_or_bytes, "None")
        count = "1" if count == "None" else count
        self.emit(f"v_=B.mbarriers.arrive(ix,{self._mbarrier(operands[0])},{count},{expected},{self.pc})")
        self.store(target, "u64", "v_")

    def _mbarrier(self, operand: str) -> str:
        return self.address(operand, "shared")

    def wait_operands(self) -> tuple[str, str, bool]:
        """Barrier address, awaited phase, and whether that is a parity, of a try_wait."""
        parts, args = self.instruction.parts, self.instruction.arguments
        parity = "parity" in parts
        return self._mbarrier(args[1]), self.source(args[2], "u32" if parity else "u64"), parity

    def op_fence(self, parts: list[str], args: list[str]) -> None:
        if "proxy" in parts and any(part.startswith("async") for part in parts):
            self.emit("B.shared.fence_proxy(ix)")

    def op_bar(self, parts: list[str], args: list[str]) -> None:
        if "warp" not in parts:
            raise self.unsupported()
        self.emit("B.clocks.warp_sync(ix)")

    def op_trap(self, parts: list[str], args: list[str]) -> None:
        self.emit(f"B.reports.fail({self.pc},'trap executed')")

    op_brkpt = op_trap
