"""Loads, stores and atomics."""

import re

from .codegen_operands import OperandCodegen
from .ptx_types import BYTES, CLASS_BYTES

_LOADS = {
    "global": "B.global_memory.load",
    "const": "B.global_memory.load_constant",
    "shared": "B.shared.load",
    "local": "B.local.load",
    "generic": "B.generic.load",
}
_STORES = {
    "global": "B.global_memory.store",
    "shared": "B.shared.store",
    "local": "B.local.store",
    "generic": "B.generic.store",
}
_ATOMICS = ("add", "min", "max", "exch", "cas", "inc", "dec", "and", "or", "xor")


class MemoryCodegen(OperandCodegen):
    """Cache hints and scopes are accepted and mean nothing here; a cache policy is any number."""

    def op_ld(self, parts: list[str], args: list[str]) -> None:
        kind, space, targets = parts[-1], self.space(), self.vector(args[0])
        size = BYTES[kind]
        if space == "param":
            self._load_parameter(kind, targets, args[1])
            return
        address = self.address(args[1], space)
        self.emit(f"v_={_LOADS[space]}(ix,{address},{size},{len(targets)},{self.pc})")
        for index, target in enumerate(targets):
            register = self.register(target)
            widened = register and CLASS_BYTES.get(register[0], 0) > size
            # Raw bits, never a numeric conversion: only integers are widened, by their sign.
            if widened and kind[0] == "s":
                self.store(target, f"s{max(size, 2) * 8}", f"v_[:,{index}].view(np.int{size * 8})")
            else:
                self.store(target, f"u{max(size, 2) * 8}", f"v_[:,{index}]")

    op_ldu = op_ld

    def _load_parameter(self, kind: str, targets: list[str], operand: str) -> None:
        match = re.match(r"\[([\w$]+)(?:\+(\d+))?\]", operand)
        if not match or match[1] not in self.kernel.parameters:
            raise self.unsupported()
        start, size = self.kernel.parameters[match[1]].offset + int(match[2] or 0), BYTES[kind]
        cast = f".view(np.int{size * 8})" if kind[0] == "s" else ""
        for index, target in enumerate(targets):
            stored = f"{'s' if cast else 'u'}{max(size, 2) * 8}"
            self.store(target, stored, f"B.parameter({start + index * size},{size}){cast}")

    def op_st(self, parts: list[str], args: list[str]) -> None:
        space, size, values = self.space(), BYTES[parts[-1]], self.vector(args[1])
        if space not in _STORES:
            raise self.unsupported()
        raw = self.sources(values, f"u{max(size, 2) * 8}")
        self.emit(f"{_STORES[space]}(ix,{self.address(args[0], space)},{size},[{raw}],{self.pc})")

    def op_atom(self, parts: list[str], args: list[str]) -> None:
        """Also red, which has no destination."""
        kind, returns = parts[-1], parts[0] == "atom"
        operands = args[1:] if returns else args
        op = next((part for part in parts[1:] if part in _ATOMICS), None)
        if op is None or kind not in BYTES:
            raise self.unsupported()
        values = self.vector(operands[1]) + ([operands[2]] if op == "cas" else [])
        function = "update" if returns else "reduce"
        space = self.space()
        call = (
            f"ix,{self.address(operands[0], space)},'{space}','{op}','{kind}',[{self.sources(values, kind)}],{self.pc}"
        )
        self.emit(f"v_=B.atomics.{function}({call})")
        if returns:
            for index, target in enumerate(self.vector(args[0])):
                self.store(target, kind, f"v_[{index}]")

    op_red = op_atom

    def _nothing(self, parts: list[str], args: list[str]) -> None:
        pass

    op_prefetch = op_prefetchu = op_applypriority = op_discard = op_membar = op_nanosleep = _nothing

    def op_createpolicy(self, parts: list[str], args: list[str]) -> None:
        self.store(args[0], "u64", self.constant(0, "u64"))
