"""Arithmetic, logic and comparison instructions."""

from .codegen_operands import OperandCodegen
from .parser import number
from .ptx_types import BYTES, HALF_TYPES, VIEW

_BINARY = {
    "add": "{0}+{1}",
    "sub": "{0}-{1}",
    "and": "{0}&{1}",
    "or": "{0}|{1}",
    "xor": "{0}^{1}",
    "min": "np.minimum({0},{1})",
    "max": "np.maximum({0},{1})",
}
_HALF_BINARY = {"add": "np.add", "sub": "np.subtract", "mul": "np.multiply", "min": "np.fmin", "max": "np.fmax"}
_UNARY = {
    "neg": "-{0}",
    "abs": "np.abs({0})",
    "not": "~{0}",
    "cnot": "{0}==0",
    "sqrt": "np.sqrt({0})",
    "rsqrt": "1/np.sqrt({0})",
    "rcp": "1/{0}",
    "ex2": "np.exp2({0})",
    "lg2": "np.log2({0})",
    "sin": "np.sin({0})",
    "cos": "np.cos({0})",
    "tanh": "np.tanh({0})",
    "popc": "np.bitwise_count({0})",
    "clz": "clz({0})",
    "brev": "brev({0})",
}
_COMPARISONS = {
    **{"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="},
    **{"lo": "<", "ls": "<=", "hi": ">", "hs": ">="},
    **{"equ": "==", "neu": "!=", "ltu": "<", "leu": "<=", "gtu": ">", "geu": ">="},
}
_UNORDERED = ("equ", "neu", "ltu", "leu", "gtu", "geu")
_COMBINE = {"and": "&", "or": "|", "xor": "^"}
# lop3 tables that have a short form; the others go through `lop3`.
_TABLES = {
    0x80: "{0}&{1}&{2}",
    0xFE: "{0}|{1}|{2}",
    0x96: "{0}^{1}^{2}",
    0xC0: "{0}&{1}",
    0xEA: "({0}&{1})|{2}",
    0xF8: "{0}|({1}&{2})",
    0xCA: "({0}&{1})|(~{0}&{2})",
    0xD8: "({2}&{1})|(~{2}&{0})",
}


class ArithmeticCodegen(OperandCodegen):
    """Only round-to-nearest float arithmetic is known; .ftz is ignored, .approx is as good as numpy."""

    def _refuse(self, *modifiers: str) -> None:
        if any(modifier in self.instruction.parts for modifier in modifiers):
            raise self.unsupported()

    def _binary(self, parts: list[str], args: list[str]) -> None:
        self._refuse("cc", "rz", "rm", "rp", "xorsign")
        kind = parts[-1]
        x, y = self.source(args[1], kind), self.source(args[2], kind)
        if kind in HALF_TYPES and parts[0] in _HALF_BINARY:
            self._refuse("NaN", "sat")
            self.store(args[0], kind, f"half_op('{kind}',{_HALF_BINARY[parts[0]]},{x},{y})")
            return
        if parts[0] in ("min", "max") and kind[0] == "f":
            self._refuse("NaN")
            expression = f"np.f{parts[0]}({x},{y})"
        elif "sat" in parts and kind == "s32":
            operator = "+" if parts[0] == "add" else "-"
            expression = f"saturate_int(np.asarray({x}).astype(np.int64){operator}{y},np.int32)"
        else:
            expression = _BINARY[parts[0]].format(x, y)
            if "sat" in parts:
                expression = f"np.clip({expression},0,1)"
        self.store(args[0], kind, expression)

    op_add = op_sub = op_and = op_or = op_xor = op_min = op_max = _binary

    def op_mul(self, parts: list[str], args: list[str]) -> None:
        kind = parts[-1]
        if kind in HALF_TYPES:
            self._binary(parts, args)
        elif kind[0] == "f":
            self._refuse("rz", "rm", "rp", "sat")
            self.store(args[0], kind, f"{self.source(args[1], kind)}*{self.source(args[2], kind)}")
        else:
            self.store(args[0], self.wide(kind) if "wide" in parts else kind, self._product(parts, args))

    def _product(self, parts: list[str], args: list[str]) -> str:
        kind = parts[-1]
        x, y = self.source(args[1], kind), self.source(args[2], kind)
        if "wide" in parts:
            dtype = self.dtype_name(self.wide(kind))
            return f"np.asarray({x}).astype({dtype})*np.asarray({y}).astype({dtype})"
        return f"mul_high({x},{y})" if "hi" in parts else f"{x}*{y}"

    def op_mad(self, parts: list[str], args: list[str]) -> None:
        self._refuse("cc", "sat")
        if parts[-1][0] == "f":
            self.op_fma(parts, args)
            return
        kind = self.wide(parts[-1]) if "wide" in parts else parts[-1]
        self.store(args[0], kind, f"{self._product(parts, args)}+{self.source(args[3], kind)}")

    def op_fma(self, parts: list[str], args: list[str]) -> None:
        self._refuse("rz", "rm", "rp", "sat", "oob")
        kind = parts[-1]
        operands = self.sources(args[1:4], kind)
        if kind in HALF_TYPES:
            function = "half_fma_relu" if "relu" in parts else "half_fma"
            self.store(args[0], kind, f"half_op('{kind}',{function},{operands})")
        elif kind in ("f32", "f64"):
            self.store(args[0], kind, f"fma{kind[1:]}({operands})")
        else:
            raise self.unsupported()

    def op_div(self, parts: list[str], args: list[str]) -> None:
        self._refuse("rz", "rm", "rp")
        kind = parts[-1]
        x, y = self.source(args[1], kind), self.source(args[2], kind)
        self.store(args[0], kind, f"{x}/{y}" if kind[0] == "f" else f"divide({x},{y})")

    def op_rem(self, parts: list[str], args: list[str]) -> None:
        kind = parts[-1]
        x, y = self.source(args[1], kind), self.source(args[2], kind)
        self.store(args[0], kind, f"{x}-divide({x},{y})*{y}")

    def _unary(self, parts: list[str], args: list[str]) -> None:
        self._refuse("rz", "rm", "rp")
        name, kind = parts[0], parts[-1]
        x = self.source(args[1], kind)
        if kind in HALF_TYPES and name in ("neg", "abs"):
            sign = 0x80008000 if kind.endswith("x2") else 0x8000
            mask = sign if name == "neg" else ~sign
            self.store(args[0], kind, f"{x}{'^' if name == 'neg' else '&'}{self.constant(mask, VIEW[kind])}")
            return
        if kind in HALF_TYPES:
            raise self.unsupported()
        result = "u32" if name in ("popc", "clz") else kind
        self.store(args[0], result, _UNARY[name].format(x))

    op_neg = op_abs = op_not = op_cnot = op_sqrt = op_rsqrt = op_rcp = _unary
    op_ex2 = op_lg2 = op_sin = op_cos = op_tanh = op_popc = op_clz = op_brev = _unary

    def _shift(self, parts: list[str], args: list[str]) -> None:
        kind = parts[-1]
        x, width = self.source(args[1], kind), BYTES[kind] * 8
        literal = not self.register(args[2]) and not args[2].startswith("%")
        if literal and number(args[2]) < width:
            operator = "<<" if parts[0] == "shl" else ">>"
            self.store(args[0], kind, f"{x}{operator}{self.constant(number(args[2]), VIEW[kind])}")
        else:
            self.store(args[0], kind, f"{parts[0]}({x},{self.source(args[2], 'u32')},{width})")

    op_shl = op_shr = _shift

    def op_shf(self, parts: list[str], args: list[str]) -> None:
        operands = self.sources(args[1:4], "u32")
        self.store(args[0], "b32", f"shf({operands},{parts[1] == 'l'},{'wrap' in parts})")

    def op_lop3(self, parts: list[str], args: list[str]) -> None:
        if len(args) != 5:
            raise self.unsupported()
        a, b, c = (self.source(operand, "u32") for operand in args[1:4])
        table = number(args[4])
        short = _TABLES.get(table)
        self.store(args[0], "b32", short.format(a, b, c) if short else f"lop3({a},{b},{c},{table})")

    def op_prmt(self, parts: list[str], args: list[str]) -> None:
        if len(parts) > 2:
            raise self.unsupported()
        self.store(args[0], "b32", f"prmt({self.sources(args[1:4], 'u32')})")

    def op_bfe(self, parts: list[str], args: list[str]) -> None:
        kind = parts[-1]
        value = self.source(args[1], kind)
        self.store(args[0], kind, f"bfe({value},{self.sources(args[2:4], 'u32')},{kind[0] == 's'})")

    def op_bfi(self, parts: list[str], args: list[str]) -> None:
        if parts[-1] != "b32":
            raise self.unsupported()
        self.store(args[0], "b32", f"bfi({self.sources(args[1:5], 'u32')})")

    def op_copysign(self, parts: list[str], args: list[str]) -> None:
        sign, magnitude = self.source(args[1], parts[-1]), self.source(args[2], parts[-1])
        self.store(args[0], parts[-1], f"np.copysign({magnitude},{sign})")

    def op_selp(self, parts: list[str], args: list[str]) -> None:
        kind = parts[-1]
        chosen, other = self.source(args[1], kind), self.source(args[2], kind)
        self.store(args[0], kind, f"np.where({self.source(args[3], 'pred')},{chosen},{other})")

    def op_setp(self, parts: list[str], args: list[str]) -> None:
        kind, comparison = parts[-1], parts[1]
        if kind.endswith("x2"):
            raise self.unsupported()
        x, y = self.source(args[1], kind), self.source(args[2], kind)
        if kind == "bf16":
            x, y = f"bf16_to_f32({x})", f"bf16_to_f32({y})"
        elif kind == "f16":
            x, y = f"({x}).view(np.float16)", f"({y}).view(np.float16)"
        floating = VIEW[kind][0] == "f" or kind in HALF_TYPES
        unordered = f"(np.isnan({x})|np.isnan({y}))"
        if comparison in ("num", "nan"):
            result = f"~{unordered}" if comparison == "num" else unordered
        else:
            result = f"({x}{_COMPARISONS[comparison]}{y})"
            if floating and comparison in _UNORDERED:
                result = f"({result}|{unordered})"
            elif floating and comparison == "ne":
                result = f"({result}&~{unordered})"
        combine = _COMBINE.get(parts[2])
        third = f"{combine}{self.source(args[3], 'pred')}" if combine else ""
        self.emit(f"c_={result}")
        targets = args[0].split("|")
        if len(targets) > 1:
            self.emit(f"n_=np.logical_not(c_){third}")
        self.store(targets[0], "pred", f"c_{third}")
        if len(targets) > 1:
            self.store(targets[1], "pred", "n_")
