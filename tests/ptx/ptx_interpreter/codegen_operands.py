"""Operands -> Python expressions. `B` is the BlockGroup, `ix` the lanes that run, `u32[7,ix]` a register of theirs."""

import re
import struct

import numpy as np

from .parser import FloatLiteral, Instruction, Kernel, number, split_arguments
from .ptx_types import (
    BYTES,
    CLASS_VIEW,
    UNSIGNED,
    VIEW,
    VIEW_CLASS,
    VIEW_DTYPE,
    PTXError,
)

_SPACES = ("global", "shared", "param", "local", "const")


class OperandCodegen:
    """The instruction at hand, the lines emitted for its basic block, and the constants that they name."""

    def __init__(self, kernel: Kernel, shared_addresses: dict[str, int]):
        self.kernel, self.shared_addresses = kernel, shared_addresses
        self.constants: dict[tuple[type, str], tuple[str, np.generic]] = {}
        self.lines: list[str] = []
        self.pc = 0
        self.instruction: Instruction | None = None
        self.read: set[int] = set()  # wgmma registers that the instruction reads and writes
        self.written: set[int] = set()
        self.global_names = {variable.name for variable in kernel.module.globals}
        self.local_offsets, self.local_bytes = {}, 0
        for variable in kernel.local:
            offset = -(-self.local_bytes // variable.align) * variable.align
            self.local_offsets[variable.name] = offset
            self.local_bytes = offset + variable.nbytes
        self.local_bytes = -(-self.local_bytes // 16) * 16
        self.wgmma_results, self.wgmma_fragments = set(), set()
        for instruction in kernel.instructions:
            if instruction.opcode.startswith("wgmma.mma_async"):
                self.instruction = instruction
                result, a = instruction.arguments[:2]
                self.wgmma_results |= {self.register(name)[1] for name in self.vector(result)}
                if a.startswith("{"):
                    self.wgmma_fragments |= {self.register(name)[1] for name in self.vector(a)}

    def emit(self, line: str) -> None:
        self.lines.append(line)

    def unsupported(self) -> PTXError:
        return PTXError(f"unsupported instruction: {self.instruction.text}")

    def register(self, name: str) -> tuple[str, int] | None:
        """(class, index) of a register in the innermost scope that declares it."""
        for scope in self.instruction.scopes:
            if (scope, name) in self.kernel.registers:
                return self.kernel.registers[scope, name]
        return None

    def constant(self, value: int | float | FloatLiteral, view: str) -> str:
        """The name of a typed constant."""
        dtype = VIEW_DTYPE[view]
        key = (dtype, repr(value))
        if key not in self.constants:
            size = np.dtype(dtype).itemsize
            if isinstance(value, FloatLiteral) and value.size != size:
                value = value.value
            if isinstance(value, FloatLiteral):
                raw = value.bits.to_bytes(size, "little")
            elif view in ("f32", "f64"):
                raw = struct.pack("<f" if size == 4 else "<d", value)
            else:
                raw = (int(value) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
            self.constants[key] = (f"k{len(self.constants)}", np.frombuffer(raw, dtype)[0])
        return self.constants[key][0]

    def source(self, operand: str, kind: str) -> str:
        """An expression for a register, special register, symbol or literal, read as PTX type `kind`."""
        view = VIEW[kind]
        complement = "~" if operand.startswith("!") else ""
        operand = operand.lstrip("!")
        register = self.register(operand)
        if register:
            cls, index = register
            if cls != VIEW_CLASS[view]:  # the operand's width is the register's
                view = CLASS_VIEW[cls] if cls == "p" or view[0] != "s" else "s" + CLASS_VIEW[cls][1:]
            if cls == "w" and index in self.wgmma_results:
                self.read.add(index)
            return f"{complement}{view}[{index},ix]"
        if operand.startswith("%"):
            return f"B.lanes.special('{operand[1:]}',ix)"
        if operand in self.shared_addresses:
            return self.constant(self.shared_addresses[operand], view)
        if operand in self.global_names:
            return f"B.symbols['{operand}']"
        if operand in self.local_offsets:
            return f"B.local.address(ix,{self.local_offsets[operand]})"
        value = number(operand)
        return str(bool(value)) if view == "pr" else self.constant(value, view)

    def sources(self, operands: list[str], kind: str) -> str:
        return ",".join(self.source(operand, kind) for operand in operands)

    def store(self, operand: str, kind: str, expression: str) -> None:
        """Assigns to a register; `_` is the sink."""
        if operand == "_":
            return
        register = self.register(operand)
        if not register:
            raise PTXError(f"unknown destination {operand} in {self.instruction.text}")
        cls, index = register
        view = VIEW[kind]
        if VIEW_CLASS[view] != cls:
            view = CLASS_VIEW[cls] if cls == "p" or view[0] != "s" else "s" + CLASS_VIEW[cls][1:]
        if cls == "w" and (index in self.wgmma_results or index in self.wgmma_fragments):
            self.written.add(index)
        self.emit(f"{view}[{index},ix]={expression}")

    def vector(self, operand: str) -> list[str]:
        return split_arguments(operand.strip("{}")) if operand.startswith("{") else [operand]

    def space(self) -> str:
        """The state space that an opcode names."""
        for part in self.instruction.parts[1:]:
            for space in _SPACES:
                if part == space or part.startswith(space + "__"):
                    return space
        return "generic"

    def address(self, operand: str, space: str) -> str:
        """An expression for [base+offset]: int64 in shared and local memory, uint64 elsewhere."""
        match = re.match(r"([\w$%.]+)\s*(?:([+-])\s*(-?\w+))?$", operand.strip("[]").strip())
        if not match:
            raise self.unsupported()
        base, sign, displacement = match.groups()
        offset = int(displacement, 0) * (-1 if sign == "-" else 1) if displacement else 0
        register = self.register(base)
        if space in ("shared", "local"):
            if register:
                return f"{CLASS_VIEW[register[0]]}[{register[1]},ix].astype(np.int64)+{offset}"
            if base in self.local_offsets:
                return f"B.local.address(ix,{self.local_offsets[base]}).astype(np.int64)+{offset}"
            start = self.shared_addresses[base] if base in self.shared_addresses else number(base)
            return f"B.lanes.full(ix,{start + offset})"
        if register:
            expression = f"u64[{register[1]},ix]"
        elif base in self.global_names:
            expression = f"B.lanes.full(ix,B.symbols['{base}'],np.uint64)"
        else:
            raise self.unsupported()
        return f"{expression}+{self.constant(offset, 'u64')}" if offset else expression

    @staticmethod
    def wide(kind: str) -> str:
        """The type of twice the width."""
        return f"{kind[0]}{BYTES[kind] * 16}"

    @staticmethod
    def dtype_name(kind: str) -> str:
        """The numpy type that an integer of PTX type `kind` really has (8-bit values live in 16-bit registers)."""
        signed = "int" if kind[0] == "s" else UNSIGNED[BYTES[kind]].__name__
        return f"np.{signed}{BYTES[kind] * 8}" if signed == "int" else f"np.{signed}"
