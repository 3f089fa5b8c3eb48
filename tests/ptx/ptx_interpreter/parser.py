"""PTX text -> kernels: declarations, labels, and one `Instruction` per statement."""

import re
import struct
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from .ptx_types import BYTES, VIEW, VIEW_CLASS, PTXError


class FloatLiteral(NamedTuple):
    """A 0f... or 0d... literal: its bits, so that a NaN's payload and the sign of zero survive."""

    bits: int
    size: int

    @property
    def value(self) -> float:
        return struct.unpack("<f" if self.size == 4 else "<d", self.bits.to_bytes(self.size, "little"))[0]


def number(text: str) -> int | FloatLiteral:
    """The value of a PTX literal. Raises PTXError if `text` is none."""
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
        return FloatLiteral(int(text[2:], 16), 4)
    if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
        return FloatLiteral(int(text[2:], 16), 8)
    try:
        return int(text.rstrip("U"), 0)
    except ValueError:
        raise PTXError(f"not a literal, register or known symbol: {text}") from None


def split_arguments(text: str) -> list[str]:
    """Splits at the commas that no bracket encloses."""
    parts, depth, current = [], 0, ""
    for char in text:
        depth += (char in "{[(") - (char in "}])")
        if char == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += char
    if current.strip():
        parts.append(current.strip())
    return parts


@dataclass(slots=True)
class Instruction:
    """One statement. `parts` is the opcode split at its dots; `::` inside it is written `__`."""

    predicate: str | None
    negated: bool
    opcode: str
    arguments: list[str]
    text: str
    scopes: tuple[int, ...]
    parts: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.parts = self.opcode.split(".")


class Variable(NamedTuple):
    """A .shared, .local, .const or .global variable; 0 bytes stands for an extern array, data is None without one."""

    name: str
    align: int
    nbytes: int
    data: np.ndarray | None = None


@dataclass(slots=True)
class Parameter:
    offset: int
    nbytes: int
    type: str


class Kernel:
    """One .entry: parameters, registers by (scope, name), labels by (scope, name), instructions."""

    def __init__(self, name: str, parameters: str, directives: str, module: "Module"):
        self.name = name
        self.module = module
        self.instructions: list[Instruction] = []
        self.labels: dict[tuple[int, str], int] = {}
        self.registers: dict[tuple[int, str], tuple[str, int]] = {}
        self.register_count: Counter[str] = Counter()
        self.shared: list[Variable] = []
        self.local: list[Variable] = []
        self.parameters: dict[str, Parameter] = {}
        self.parameter_bytes = 0
        maxntid = re.search(r"\.(?:maxntid|reqntid)([^\n.]*)", directives)
        self.maxntid = [int(size) for size in re.findall(r"\d+", maxntid[1])] if maxntid else []
        self._declare_parameters(parameters)

    def _declare_parameters(self, text: str) -> None:
        pattern = r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr[^,]*?\s)?([\w$%]+)(?:\[(\d+)\])?\s*(?:,|$)"
        for match in re.finditer(pattern, text):
            nbytes = BYTES[match[2]] * int(match[4] or 1)
            align = int(match[1] or BYTES[match[2]])
            offset = -(-self.parameter_bytes // align) * align
            self.parameters[match[3]] = Parameter(offset, nbytes, match[2])
            self.parameter_bytes = offset + nbytes

    def declare_registers(self, statement: str, scope: int) -> None:
        match = re.match(r"\.reg\s+\.(\w+)\s+(.*)", statement)
        kind = VIEW_CLASS[VIEW[match[1]]]
        for name in split_arguments(match[2]):
            array = re.match(r"(.*)<(\d+)>", name)
            names = [f"{array[1]}{index}" for index in range(int(array[2]))] if array else [name]
            for one in names:
                self.registers[scope, one] = (kind, self.register_count[kind])
                self.register_count[kind] += 1


class Module:
    """A parsed PTX text: `kernels` by name, and the variables outside of them.

    Raises PTXError on an initialiser that is no list of numbers, or on two different variables of one name.
    """

    _ENTRY = re.compile(r"(?:\.visible\s+|\.weak\s+)*\.entry\s+([\w$]+)\s*\((.*?)\)([^{;]*)\{", re.S)
    _LABEL = re.compile(r"([A-Za-z_$%][\w$]*)\s*:(?!:)")
    _STATEMENT = re.compile(r"(?:@(!?)\s*([\w$%]+)\s+)?([\w.:]+)\s*(.*)")
    _VARIABLE = re.compile(
        r"\.(shared|global|const|local)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)((?:\[\d*\])*)\s*(?:=\s*(.*))?$",
        re.S,
    )

    def __init__(self, text: str):
        text = re.sub(r"/\*.*?\*/", " ", text, flags=re.S)
        text = re.sub(r"//[^\n]*", "", text)
        target = re.search(r"\.target\s+(\w+)", text)
        self.target = target[1] if target else ""
        self.shared: list[Variable] = []
        self.globals: list[Variable] = []
        self.kernels: dict[str, Kernel] = {}
        self.compiled: dict = {}  # (kernel, shared addresses) -> compiled kernel, filled by Launch
        position, outside = 0, ""
        while match := self._ENTRY.search(text, position):
            outside += text[position : match.start()]
            kernel = Kernel(match[1], " ".join(match[2].split()), match[3], self)
            position = self._body(kernel, text, match.end())
            self.kernels[kernel.name] = kernel
        for statement in (outside + text[position:]).split(";"):
            self._declare(statement.strip(), self.shared, [])

    def _declare(self, statement: str, shared: list[Variable], local: list[Variable]) -> None:
        match = self._VARIABLE.search(statement)
        if not match:
            return
        count = 1
        for size in re.findall(r"\[(\d*)\]", match[5]):
            count *= int(size or 0)
        width = BYTES[match[3]]
        variable = Variable(match[4], int(match[2] or width), count * width)
        if match[1] == "shared":
            shared.append(variable)
        elif match[1] == "local":
            local.append(variable)
        else:
            self._declare_global(variable._replace(data=self._initial(match[6], count, width, statement)))

    def _declare_global(self, variable: Variable) -> None:
        for other in self.globals:
            if other.name == variable.name:
                if not np.array_equal(other.data, variable.data):
                    raise PTXError(f"two variables are called {variable.name}")
                return
        self.globals.append(variable)

    @staticmethod
    def _initial(text: str | None, count: int, width: int, statement: str) -> np.ndarray:
        data = np.zeros(count * width, np.uint8)
        raw = b""
        for item in split_arguments((text or "").replace("{", "").replace("}", "")):
            if not re.fullmatch(r"-?\w+", item):
                raise PTXError(f"unsupported initialiser: {statement[:100]}")
            value = number(item)
            bits = value.bits if isinstance(value, FloatLiteral) else value
            raw += (bits & ((1 << 8 * width) - 1)).to_bytes(width, "little")
        data[: len(raw)] = np.frombuffer(raw, np.uint8)
        return data

    def _body(self, kernel: Kernel, text: str, position: int) -> int:
        """Parses up to the kernel's closing brace and returns the position behind it."""
        scopes, opened = (0,), 0
        while True:
            while text[position].isspace():
                position += 1
            if text[position] == "{":
                opened += 1
                scopes = (opened, *scopes)
                position += 1
            elif text[position] == "}":
                position += 1
                scopes = scopes[1:]
                if not scopes:
                    return position
            elif match := self._LABEL.match(text, position):
                kernel.labels[scopes[0], match[1]] = len(kernel.instructions)
                position = match.end()
            else:
                end = text.index(";", position)
                self._add(kernel, " ".join(text[position:end].split()), scopes)
                position = end + 1

    def _add(self, kernel: Kernel, statement: str, scopes: tuple[int, ...]) -> None:
        if statement.startswith(".reg"):
            kernel.declare_registers(statement, scopes[0])
        elif statement.startswith((".shared", ".local", ".const", ".global")):
            self._declare(statement, kernel.shared, kernel.local)
        elif statement and not statement.startswith((".loc", ".file", ".pragma")):
            match = self._STATEMENT.match(statement)
            arguments = split_arguments(match[4])
            opcode = match[3].replace("::", "__")
            kernel.instructions.append(Instruction(match[2], match[1] == "!", opcode, arguments, statement, scopes))
