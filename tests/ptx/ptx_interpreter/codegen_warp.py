"""Instructions of whole warps and warpgroups: exchanges, matrices, wgmma."""

import re

from .codegen_operands import OperandCodegen
from .parser import number


class WarpCodegen(OperandCodegen):
    def op_shfl(self, parts: list[str], args: list[str]) -> None:
        targets = args[0].split("|")
        self.emit(f"v_,q_=B.warp.shfl(ix,'{parts[2]}',{self.sources(args[1:4], 'u32')},{self.pc})")
        self.store(targets[0], "b32", "v_")
        if len(targets) > 1:
            self.store(targets[1], "pred", "q_")

    def op_vote(self, parts: list[str], args: list[str]) -> None:
        mode = parts[2]
        kind = "b32" if mode == "ballot" else "pred"
        self.store(args[0], kind, f"B.warp.vote(ix,'{mode}',{self.source(args[1], 'pred')})")

    def op_activemask(self, parts: list[str], args: list[str]) -> None:
        self.store(args[0], "b32", "B.warp.vote(ix,'ballot',np.True_)")

    def op_redux(self, parts: list[str], args: list[str]) -> None:
        kind = parts[-1]
        if kind[0] == "f":
            raise self.unsupported()
        self.store(args[0], kind, f"B.warp.redux(ix,'{parts[2]}',{self.source(args[1], kind)})")

    def op_elect(self, parts: list[str], args: list[str]) -> None:
        targets = args[0].split("|")
        self.emit("v_,q_=B.warp.elect(ix)")
        self.store(targets[0], "b32", "v_")
        if len(targets) > 1:
            self.store(targets[1], "pred", "q_")

    def op_setmaxnreg(self, parts: list[str], args: list[str]) -> None:
        self.emit(f"B.lanes.whole_warps(ix,{self.pc})")

    def _matrix_type(self, parts: list[str]) -> None:
        if "m8n8" not in parts or parts[-1] != "b16":
            raise self.unsupported()

    def op_ldmatrix(self, parts: list[str], args: list[str]) -> None:
        self._matrix_type(parts)
        targets = self.vector(args[0])
        address = self.address(args[1], "shared")
        self.emit(f"v_=B.tensor.ldmatrix(ix,{address},{len(targets)},{'trans' in parts},{self.pc})")
        for index, target in enumerate(targets):
            self.store(target, "b32", f"v_[{index}]")

    def op_stmatrix(self, parts: list[str], args: list[str]) -> None:
        self._matrix_type(parts)
        values = self.sources(self.vector(args[1]), "u32")
        self.emit(f"B.tensor.stmatrix(ix,{self.address(args[0], 'shared')},[{values}],{'trans' in parts},{self.pc})")

    def op_movmatrix(self, parts: list[str], args: list[str]) -> None:
        self._matrix_type(parts)
        self.store(args[0], "b32", f"B.tensor.movmatrix(ix,{self.source(args[1], 'u32')},{self.pc})")

    def op_mma(self, parts: list[str], args: list[str]) -> None:
        kind = parts[-2]
        known = parts[3] in ("m16n8k16", "m16n8k8") and parts[-1] == parts[-4] == "f32"
        if not (known and kind in ("bf16", "f16") and parts[4:6] == ["row", "col"]):
            raise self.unsupported()
        a, b = (self.sources(self.vector(operand), "u32") for operand in args[1:3])
        c = self.sources(self.vector(args[3]), "f32")
        self.emit(f"v_=B.tensor.mma(ix,'{kind}',[{a}],[{b}],[{c}],{self.pc})")
        for index, target in enumerate(self.vector(args[0])):
            self.store(target, "f32", f"v_[{index}]")

    def op_wgmma(self, parts: list[str], args: list[str]) -> None:
        if parts[1] == "fence":
            self.emit(f"B.wgmma.fence(ix,{self.pc})")
        elif parts[1] == "commit_group":
            self.emit(f"B.wgmma.commit(ix,{self.pc})")
        elif parts[1] == "wait_group":
            self.emit(f"B.wgmma.wait(ix,{number(args[0])},{self.pc})")
        else:
            self._wgmma_product(parts, args)

    def _wgmma_product(self, parts: list[str], args: list[str]) -> None:
        shape = re.fullmatch(r"m64n(\d+)k16", parts[4])
        if not shape or parts[5] != "f32" or parts[6] not in ("bf16", "f16") or len(args) < 6:
            raise self.unsupported()
        result = [self.register(name)[1] for name in self.vector(args[0])]
        if args[1].startswith("{"):
            a = str([self.register(name)[1] for name in self.vector(args[1])])
        else:
            a = self.source(args[1], "u64")
        b, scale_d = self.source(args[2], "u64"), self.source(args[3], "pred")
        immediates = [number(operand) for operand in args[4:]]
        call = f"ix,{shape[1]},'{parts[6]}',{result},{a},{b},{scale_d},{immediates},{self.pc}"
        self.emit(f"B.wgmma.multiply({call})")
