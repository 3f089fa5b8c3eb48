"""Optimized HLO text as instructions with their operands and users."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_NAMED = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r" ?([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\b([a-z]+\d+(?:e\d\w*)?|pred)\[([\d,]*)\]")


@dataclass
class Instruction:
    """`arrays`: (dtype, dims) of the result, or of each part of a tuple. `rest`: attributes."""

    name: str
    computation: str
    opcode: str
    arrays: list[tuple[str, tuple[int, ...]]]
    operands: list[str]
    rest: str
    users: list["Instruction"] = field(default_factory=list, repr=False)  # a failed test would print the whole graph

    @property
    def target(self) -> str | None:
        found = re.search(r'custom_call_target="([^"]*)"', self.rest)
        return found[1] if found else None

    @property
    def index(self) -> str | None:
        """Of a get-tuple-element."""
        found = re.search(r"\bindex=(\d+)", self.rest)
        return found[1] if found else None

    @property
    def called(self) -> str | None:
        """The computation of a fusion."""
        found = re.search(r"\bcalls=%?([\w.\-]+)", self.rest)
        return found[1] if found else None


def parse(text: str) -> dict[str, Instruction]:
    """Instructions by name (unique in a module)."""
    found: dict[str, Instruction] = {}
    computation = ""
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            computation = re.sub(r"^ENTRY ", "", line).split()[0].lstrip("%")
        elif (named := _NAMED.match(line)) and computation:
            start = named.end()
            end = _closing(line, start) + 1 if line[start] == "(" else line.index(" ", start)
            opcode = _OPCODE.match(line, end)
            if opcode is None:
                continue
            close = _closing(line, opcode.end() - 1)
            arrays = _ARRAY.findall(line[start:end])
            found[named[1]] = Instruction(
                named[1],
                computation,
                opcode[1],
                [(dtype, tuple(int(d) for d in dims.split(",") if d)) for dtype, dims in arrays],
                re.findall(r"%([\w.\-]+)", line[opcode.end() : close]),
                line[close + 1 :],
            )
    for instruction in found.values():
        for operand in instruction.operands:
            if operand in found:
                found[operand].users.append(instruction)
    return found


def readers(instruction: Instruction) -> Iterator[Instruction]:
    """The instructions that read a result, in the same computation, whatever hands it on."""
    for user in instruction.users:
        if user.opcode in ("bitcast", "get-tuple-element"):
            yield from readers(user)
        elif user.opcode == "tuple" and (parts := _parts(user)):
            place = str(user.operands.index(instruction.name))
            for part in parts:
                if part.index == place:
                    yield from readers(part)
        else:
            yield user


def _parts(group: Instruction) -> list[Instruction]:
    """What is taken out of a tuple again, through a barrier or not; nothing where it goes elsewhere as a whole.

    jax 0.10 leaves barriers, or the tuples that they were made of, in the optimized program; they cost nothing.
    """
    users = group.users
    if [user.opcode for user in users] == ["opt-barrier"]:
        users = users[0].users
    return users if all(user.opcode == "get-tuple-element" for user in users) else []


def origin(instructions: dict[str, Instruction], name: str) -> Instruction:
    """The instruction whose result a bitcast, a part of a tuple or of a barrier is."""
    instruction = instructions[name]
    while instruction.opcode in ("bitcast", "get-tuple-element"):
        source = instructions[instruction.operands[0]]
        if source.opcode == "opt-barrier":
            source = instructions[source.operands[0]]
        if source.opcode == "tuple":
            source = instructions[source.operands[int(instruction.index or 0)]]
        instruction = source
    return instruction


def _closing(line: str, opening: int) -> int:
    depth = 0
    for i in range(opening, len(line)):
        depth += (line[i] == "(") - (line[i] == ")")
        if depth == 0:
            return i
    raise ValueError(f"no closing parenthesis in {line[:200]}")
