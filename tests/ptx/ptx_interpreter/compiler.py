"""Kernel -> basic blocks, each a Python function of one numpy statement per PTX instruction."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from . import arithmetic
from .codegen_arithmetic import ArithmeticCodegen
from .codegen_async import AsyncCodegen
from .codegen_conversions import ConversionCodegen
from .codegen_memory import MemoryCodegen
from .codegen_warp import WarpCodegen
from .counters import classify
from .parser import Instruction, Kernel
from .ptx_types import BYTES, END

_ALIGNED = ("ldmatrix", "stmatrix", "movmatrix", "mma", "wgmma", "setmaxnreg", "bar", "barrier")
_MASKED = ("shfl", "vote", "redux", "match", "elect")
_FULL_MASK = ("-1", "0xffffffff", "4294967295")
_PROLOGUE = "u16,s16,u32,s32,f32,u64,s64,f64,pr=B.registers"


@dataclass(slots=True)
class BasicBlock:
    """Instructions [start, end). `terminator`: fall, bra, exit or bar; the function returns bra's and exit's condition
    or a barrier's operands. `wait` gives the mbarrier operands of a try_wait that the block starts with."""

    start: int
    end: int
    classes: Counter[str]
    terminator: str = "fall"
    target: int = END
    waits: bool = True
    whole_warps: bool = False
    wait_parity: bool = False
    function: Callable | None = None
    wait: Callable | None = None

    @property
    def instructions(self) -> int:
        return self.end - self.start


@dataclass(slots=True)
class CompiledKernel:
    """`granule_shift`, `global_shift`: log2 of the granule that the state of shared and of global memory is kept for,
    the kernel's narrowest store or 4 bytes."""

    kernel: Kernel
    blocks: list[BasicBlock]
    source: str
    local_bytes: int
    granule_shift: int
    global_shift: int
    wgmma_results: set[int] = field(default_factory=set)
    wgmma_fragments: set[int] = field(default_factory=set)


def _is_block_barrier(instruction: Instruction) -> bool:
    return instruction.parts[0] in ("bar", "barrier") and not {"warp", "cluster"} & set(instruction.parts)


def _is_wait(instruction: Instruction) -> bool:
    return instruction.opcode.startswith("mbarrier.try_wait") and not instruction.predicate


def _wants_whole_warps(instruction: Instruction) -> bool:
    parts = instruction.parts
    if parts[0] in _ALIGNED:
        return "warp" not in parts
    return parts[0] in _MASKED and instruction.arguments[-1] in _FULL_MASK


def _granule_shift(kernel: Kernel, other_spaces: str) -> int:
    widths = [
        BYTES[instruction.parts[-1]]
        for instruction in kernel.instructions
        if instruction.parts[0] == "st" and not re.search(other_spaces, instruction.opcode)
    ]
    return {1: 0, 2: 1}.get(min(widths, default=4), 2)


class _Compiler(ArithmeticCodegen, ConversionCodegen, MemoryCodegen, WarpCodegen, AsyncCodegen):
    def compile(self) -> CompiledKernel:
        instructions = self.kernel.instructions
        starts = self._leaders(instructions)
        number = {start: index for index, start in enumerate(starts)}
        blocks, functions = [], []
        for index, (start, end) in enumerate(zip(starts, [*starts[1:], len(instructions)], strict=True)):
            block = BasicBlock(start, end, Counter(classify(instruction) for instruction in instructions[start:end]))
            functions += self._function(block, index, number)
            blocks.append(block)
        source = "\n".join(functions)
        namespace = {"np": np} | {name: value for name, value in vars(arithmetic).items() if not name.startswith("_")}
        namespace.update(self.constants.values())
        exec(compile(source, f"<ptx {self.kernel.name}>", "exec"), namespace)
        for index, block in enumerate(blocks):
            block.function = namespace[f"block{index}"]
            block.wait = namespace.get(f"wait{index}")
        return CompiledKernel(
            self.kernel,
            blocks,
            source,
            self.local_bytes,
            _granule_shift(self.kernel, "global|local"),
            _granule_shift(self.kernel, "shared|local"),
            self.wgmma_results,
            self.wgmma_fragments,
        )

    def _leaders(self, instructions: list[Instruction]) -> list[int]:
        leaders = {0, *self.kernel.labels.values()}
        for index, instruction in enumerate(instructions):
            if instruction.parts[0] in ("bra", "ret", "exit") or _is_block_barrier(instruction):
                leaders.add(index + 1)
            if _is_block_barrier(instruction) or _is_wait(instruction):
                leaders.add(index)
        return sorted(leader for leader in leaders if leader < len(instructions))

    def _function(self, block: BasicBlock, index: int, number: dict[int, int]) -> list[str]:
        """The source of block `index`, and of its wait function if it has one."""
        self.lines, result, functions = [], "None", []
        for self.pc in range(block.start, block.end):
            instruction = self.instruction = self.kernel.instructions[self.pc]
            self.read, self.written = set(), set()
            block.whole_warps |= _wants_whole_warps(instruction)
            if _is_block_barrier(instruction):
                result = self._barrier(block, instruction)
            elif instruction.parts[0] in ("bra", "ret", "exit"):
                result = self._jump(block, instruction, number)
            else:
                self._guarded(instruction)
            if _is_wait(instruction) and self.pc == block.start:
                address, argument, block.wait_parity = self.wait_operands()
                functions.append(f"def wait{index}(B,ix):\n {_PROLOGUE}\n return {address},{argument}")
        body = "\n ".join([_PROLOGUE, *self.lines, f"return {result}"])
        return [f"def block{index}(B,ix):\n {body}", *functions]

    def _barrier(self, block: BasicBlock, instruction: Instruction) -> str:
        """Ends a block. Returns the expression of (number, count)."""
        operation = instruction.parts[2 if instruction.parts[1] == "cta" else 1]
        if operation not in ("sync", "arrive") or instruction.predicate:
            raise self.unsupported()
        block.terminator, block.waits = "bar", operation == "sync"
        return "(" + "".join(self.source(operand, "u32") + "," for operand in instruction.arguments) + ")"

    def _jump(self, block: BasicBlock, instruction: Instruction, number: dict[int, int]) -> str:
        """Ends a block. Returns the expression of the condition to jump, None for always."""
        block.terminator = "bra" if instruction.parts[0] == "bra" else "exit"
        if block.terminator == "bra":
            label = instruction.arguments[0]
            scope = next((scope for scope in instruction.scopes if (scope, label) in self.kernel.labels), None)
            if scope is None:
                raise self.unsupported()
            block.target = number.get(self.kernel.labels[scope, label], END)
        return self._guard(instruction) if instruction.predicate else "None"

    def _guard(self, instruction: Instruction) -> str:
        return self.source(("!" if instruction.negated else "") + instruction.predicate, "pred")

    def _guarded(self, instruction: Instruction) -> None:
        """One instruction; under a predicate only for the lanes where that holds."""
        if not instruction.predicate:
            self._generate(instruction)
            return
        self.emit(f"ix0=ix; ix=B.lanes.subset(ix,{self._guard(instruction)})")
        outer, self.lines = self.lines, []
        self._generate(instruction)
        inner = ["    " + line for line in self.lines or ["pass"]]
        self.lines = [*outer, "if ix is not None:", *inner, "ix=ix0"]

    def _generate(self, instruction: Instruction) -> None:
        handler = getattr(self, "op_" + instruction.parts[0], None)
        if handler is None:
            raise self.unsupported()
        mark = len(self.lines)
        handler(instruction.parts, instruction.arguments)
        if instruction.opcode.startswith("wgmma.mma_async"):
            return
        if self.read or self.written:
            touched = f"{sorted(self.read)},{sorted(self.written)}"
            self.lines.insert(mark, f"if B.wgmma.live: B.wgmma.touch({self.pc},ix,{touched})")
        if self.written:
            self.emit(f"B.wgmma.note_register_write({sorted(self.written)},ix)")


def compile_kernel(kernel: Kernel, shared_addresses: dict[str, int]) -> CompiledKernel:
    """Compiles one kernel. Raises PTXError, naming the instruction, on PTX that is not known."""
    return _Compiler(kernel, shared_addresses).compile()
