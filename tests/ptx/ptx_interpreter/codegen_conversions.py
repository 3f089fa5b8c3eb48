"""mov, cvt and cvta."""

from .codegen_operands import OperandCodegen
from .ptx_types import BYTES, GENERIC_LOCAL, GENERIC_SHARED, UNSIGNED

_ROUNDINGS = {"rzi": "np.trunc", "rni": "np.rint", "rmi": "np.floor", "rpi": "np.ceil"}
_FLOATS = ("f16", "bf16", "f32", "f64")


class ConversionCodegen(OperandCodegen):
    def op_mov(self, parts: list[str], args: list[str]) -> None:
        size = BYTES[parts[-1]]
        if args[0].startswith("{"):
            targets = self.vector(args[0])
            width = size // len(targets)
            whole = self.source(args[1], f"u{size * 8}")
            self.emit(f"v_=np.ascontiguousarray({whole}).view(np.uint{width * 8}).reshape(-1,{len(targets)})")
            for index, target in enumerate(targets):
                self.store(target, f"u{width * 8}", f"v_[:,{index}]")
        elif args[1].startswith("{"):
            pieces = self.vector(args[1])
            width = size // len(pieces) * 8
            dtype = f"np.{UNSIGNED[size].__name__}"
            terms = [
                f"(np.asarray({self.source(piece, f'u{width}')}).astype({dtype})<<{dtype}({width * index}))"
                for index, piece in enumerate(pieces)
            ]
            self.store(args[0], f"u{size * 8}", "|".join(terms))
        else:
            self.store(args[0], parts[-1], self.source(args[1], parts[-1]))

    def op_cvta(self, parts: list[str], args: list[str]) -> None:
        base = {"shared": GENERIC_SHARED, "local": GENERIC_LOCAL}.get(self.space(), 0)
        address = self.source(args[1], "u64")
        if base:
            address += ("-" if "to" in parts else "+") + self.constant(base, "u64")
        self.store(args[0], "u64", address)

    def op_cvt(self, parts: list[str], args: list[str]) -> None:
        to, source = parts[-2], parts[-1]
        if any(modifier in parts for modifier in ("rz", "rm", "rp", "rna", "rs", "satfinite")):
            raise self.unsupported()
        if to in ("bf16x2", "f16x2") and source == "f32":
            self._pack(parts, args)
            return
        if source not in BYTES or to not in BYTES or source.endswith("x2") or to.endswith("x2"):
            raise self.unsupported()
        value = self._typed_source(args[1], source)
        if to in ("bf16", "f16"):
            if "relu" in parts:
                value = f"np.maximum({value},0)"
            narrow = "f32_to_bf16({0})" if source in ("f32", "f16") else "f64_to_bf16({0}.astype(np.float64))"
            expression = (narrow if to == "bf16" else "({0}).astype(np.float16).view(np.uint16)").format(value)
        elif to in ("f32", "f64"):
            rounding = next((_ROUNDINGS[mode] for mode in _ROUNDINGS if mode in parts), None)
            if rounding and source in _FLOATS:
                value = f"{rounding}({value})"
            expression = f"({value}).astype(np.float{BYTES[to] * 8})"
            if "sat" in parts:
                expression = f"np.clip({expression},0,1)"
        else:
            expression = self._to_integer(parts, value, to, source)
        self.store(args[0], to, expression)

    def _pack(self, parts: list[str], args: list[str]) -> None:
        """Two float32 into one register, the first one high."""
        halves = []
        for operand in args[1:3]:
            value = f"np.asarray({self.source(operand, 'f32')})"
            if "relu" in parts:
                value = f"np.maximum({value},0)"
            narrow = "f32_to_bf16({0})" if parts[-2] == "bf16x2" else "{0}.astype(np.float16).view(np.uint16)"
            halves.append(f"{narrow.format(value)}.astype(np.uint32)")
        self.store(args[0], "b32", f"({halves[0]}<<np.uint32(16))|{halves[1]}")

    def _typed_source(self, operand: str, kind: str) -> str:
        """The operand as a numpy array of the number that it stands for."""
        value = f"np.asarray({self.source(operand, kind)})"
        if kind == "bf16":
            return f"bf16_to_f32({value})"
        if kind == "f16":
            return f"{value}.view(np.float16)"
        return value if kind[0] == "f" else f"{value}.astype({self.dtype_name(kind)})"

    def _to_integer(self, parts: list[str], value: str, to: str, source: str) -> str:
        dtype = self.dtype_name(to)
        if source in _FLOATS:
            mode = next((mode for mode in _ROUNDINGS if mode in parts), None)
            if mode is None:
                raise self.unsupported()
            return f"float_to_int({value},{dtype},'{mode}')"
        if "sat" in parts:
            return f"saturate_int({value},{dtype})"
        return f"({value}).astype({dtype})"
