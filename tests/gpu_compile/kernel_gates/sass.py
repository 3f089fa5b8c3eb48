"""Disassembled kernels: instructions, control flow, and the path that a warp takes when nothing is ragged."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

_FUNCTION = re.compile(r"^\s*Function : (\S+)", re.MULTILINE)
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z]\w*)((?:\.\w+)*)([^;]*);")
_ADDRESS = re.compile(r"\b0x([0-9a-f]+)\s*$")
# What a path is preferred for, first things first; of equal paths the shorter one. So it is the path that copies by
# cp.async and stores 16 bytes at a time, not the one for ragged edges; it decodes double-quantized scales and rounds.
_PREFERRED = ("LDGSTS", "HMMA", "wide", "LDS", "F2FP")


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str | None
    opcode: str  # LDG
    modifiers: str  # .E.128
    operands: str

    @property
    def is_conditional(self) -> bool:
        return self.predicate not in (None, "PT", "UPT") or "," in self.operands

    @property
    def target(self) -> int | None:
        found = _ADDRESS.search(self.operands)
        return int(found[1], 16) if found else None

    @property
    def is_wide(self) -> bool:
        """16 bytes to or from global memory."""
        return self.opcode in ("LDG", "STG") and ".128" in self.modifiers


def parse(text: str) -> dict[str, "Kernel"]:
    """Kernels by name, from the output of `cuobjdump -sass`."""
    starts = list(_FUNCTION.finditer(text))
    ends = [start.start() for start in starts[1:]] + [len(text)]
    return {start[1]: Kernel(start[1], text[start.end() : end]) for start, end in zip(starts, ends, strict=True)}


class Kernel:
    """The instructions of one kernel and the paths through them."""

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        self.instructions = [
            Instruction(int(m[1], 16), m[2], m[3], m[4], m[5].strip()) for m in _INSTRUCTION.finditer(text)
        ]
        if not self.instructions:
            raise ValueError(f"no instructions of {name} in the disassembly")
        if jumps := self.opcodes.keys() & {"BRX", "BRXU", "JMX", "JMXU", "JMP"}:
            raise ValueError(f"{name}: {', '.join(jumps)} jumps to a computed address")

    @property
    def opcodes(self) -> Counter[str]:
        return Counter(i.opcode for i in self.instructions)

    def main_path(self) -> list[Instruction]:
        """One turn of the innermost loop around the tensor core's instructions, or, without any, the whole kernel.

        Raises:
          ValueError: control flow that is not understood.
        """
        loops = [body for _, body in self._loops if self._has_tensor_core(body)]
        if not loops:
            if self._has_tensor_core(range(len(self._blocks))):
                raise ValueError(f"{self.name}: tensor core instructions outside of any loop")
            return self._best_path(0, set(range(len(self._blocks))), set())
        body = min(loops, key=len)
        header, latches = next((h, self._latches(h, b)) for h, b in self._loops if b == body)
        return self._best_path(header, body, latches)

    @cached_property
    def _blocks(self) -> list[list[Instruction]]:
        known = {i.address for i in self.instructions}
        starts = {i.target for i in self.instructions if i.opcode in ("BRA", "CALL") and i.target in known}
        blocks: list[list[Instruction]] = [[]]
        for instruction in self.instructions:
            if instruction.address in starts and blocks[-1]:
                blocks.append([])
            blocks[-1].append(instruction)
            if instruction.opcode in ("BRA", "CALL", "EXIT", "RET"):
                blocks.append([])
        return [block for block in blocks if block]

    @cached_property
    def _successors(self) -> list[set[int]]:
        at = {block[0].address: number for number, block in enumerate(self._blocks)}
        result = []
        for number, block in enumerate(self._blocks):
            last, following = block[-1], {number + 1} & set(range(len(self._blocks)))
            target = {at[last.target]} if last.target in at else set()
            if last.opcode == "BRA" and ".DIV" in last.modifiers:
                result.append(following)  # taken by a warp whose lanes have parted, to join them
            elif last.opcode == "BRA" and ".CONV" in last.modifiers:
                result.append(target)  # taken by a warp whose lanes have not
            elif last.opcode == "BRA":
                result.append(target | following if last.is_conditional else target)
            elif last.opcode == "CALL":
                result.append(target | following)  # a jump, or a subroutine, which returns
            elif last.opcode in ("EXIT", "RET"):
                result.append(following if last.is_conditional else set())
            else:
                result.append(following)
        return result

    @cached_property
    def _reachable(self) -> list[int]:
        """Blocks in reverse postorder."""
        order, seen, stack = [], {0}, [(0, iter(sorted(self._successors[0])))]
        while stack:
            block, rest = stack[-1]
            for successor in rest:
                if successor not in seen:
                    seen.add(successor)
                    stack.append((successor, iter(sorted(self._successors[successor]))))
                    break
            else:
                order.append(block)
                stack.pop()
        return order[::-1]

    @cached_property
    def _predecessors(self) -> dict[int, set[int]]:
        result: dict[int, set[int]] = {block: set() for block in self._reachable}
        for block in self._reachable:
            for successor in self._successors[block]:
                result[successor].add(block)
        return result

    @cached_property
    def _dominators(self) -> dict[int, set[int]]:
        everything = set(self._reachable)
        dominators = dict.fromkeys(self._reachable, everything) | {0: {0}}
        changed = True
        while changed:
            changed = False
            for block in self._reachable[1:]:
                new = {block} | set.intersection(*(dominators[p] for p in self._predecessors[block]))
                changed |= new != dominators[block]
                dominators[block] = new
        return dominators

    def _is_back_edge(self, block: int, successor: int) -> bool:
        return successor in self._dominators[block]

    @cached_property
    def _loops(self) -> list[tuple[int, set[int]]]:
        """Natural loops: header and blocks."""
        bodies: dict[int, set[int]] = {}
        for block in self._reachable:
            for header in self._successors[block]:
                if self._is_back_edge(block, header):
                    body, work = bodies.setdefault(header, {header}), [block]
                    while work:
                        if (inner := work.pop()) not in body:
                            body.add(inner)
                            work += self._predecessors[inner]
        return list(bodies.items())

    def _latches(self, header: int, body: set[int]) -> set[int]:
        return {block for block in body if header in self._successors[block]}

    def _has_tensor_core(self, blocks: Iterable[int]) -> bool:
        return any(i.opcode == "HMMA" for block in blocks for i in self._blocks[block])

    def _best_path(self, first: int, body: set[int], last: set[int]) -> list[Instruction]:
        """From `first` to one of `last` (none: to an end), inner loops once."""
        best: dict[int, tuple[tuple[int, ...], list[int]]] = {}
        for block in reversed(self._reachable):
            if block not in body:
                continue
            ways = [
                best[successor]
                for successor in self._successors[block]
                if successor in best and not self._is_back_edge(block, successor)
            ]
            if block in last or (not last and not self._successors[block]):
                ways.append(((0,) * (len(_PREFERRED) + 1), []))
            if ways:
                value, path = max(ways)
                worth = tuple(a + b for a, b in zip(_worth(self._blocks[block]), value, strict=True))
                best[block] = worth, [block, *path]
        if first not in best:
            raise ValueError(f"{self.name}: no path through the loop is understood")
        return [i for block in best[first][1] for i in self._blocks[block]]


def _worth(block: list[Instruction]) -> tuple[int, ...]:
    counts = Counter(i.opcode for i in block) + Counter("wide" for i in block if i.is_wide)
    return (*(counts[name] for name in _PREFERRED), -len(block))
