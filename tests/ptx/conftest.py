"""Kernels from tests/ptx/kernels, and a harness for a few instructions of handwritten PTX."""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ptx_interpreter import DeviceMemory, Launch, Module
from ptx_interpreter.toolchain import compile_ptx

KERNELS = Path(__file__).parent / "kernels"


@functools.cache
def _module(name: str, arch: str, defines: tuple[str, ...]) -> Module:
    return Module(compile_ptx(KERNELS / name, arch, defines))


@pytest.fixture(scope="session")
def build() -> Callable[..., Module]:
    """build("name.cu", "sm_80", "DEFINE", ...) -> Module, compiled once."""
    return lambda name, arch="sm_80", *defines: _module(name, arch, defines)


def handwritten(body: str, inputs: dict, outputs: dict, shared: int = 0, declarations: str = "") -> Module:
    """A kernel k(inputs..., outputs...): every thread loads its element of each input into the register %name, runs
    `body`, and stores each output's register %name. `shared` bytes are called `smem`."""
    kinds = {name: f"b{np.dtype(dtype).itemsize * 8}" for name, dtype in (inputs | outputs).items()}
    parameters = ",".join(f".param .u64 p_{name}" for name in kinds)
    lines = [f".reg .{kind} %{name};" for name, kind in kinds.items()]
    lines += [".reg .b64 %address, %offset;", ".reg .b32 %thread, %number;", ".reg .pred %p<8>;"]
    lines += [".reg .b32 %x<16>;", ".reg .b64 %y<16>;"]
    if shared:
        lines.append(f".shared .align 1024 .b8 smem[{shared}];")
    lines += ["mov.u32 %thread, %tid.x;", "mov.u32 %number, %ctaid.x;", "mov.u32 %x0, %ntid.x;"]
    lines += ["mad.lo.u32 %number, %number, %x0, %thread;"]
    for name in inputs:
        size = np.dtype(inputs[name]).itemsize
        lines += [f"ld.param.u64 %address, [p_{name}];", f"mul.wide.u32 %offset, %number, {size};"]
        lines += ["add.s64 %address, %address, %offset;", f"ld.global.{kinds[name]} %{name}, [%address];"]
    lines.append("{" + body + "}")
    for name in outputs:
        size = np.dtype(outputs[name]).itemsize
        lines += [f"ld.param.u64 %address, [p_{name}];", f"mul.wide.u32 %offset, %number, {size};"]
        lines += ["add.s64 %address, %address, %offset;", f"st.global.{kinds[name]} [%address], %{name};"]
    text = "\n".join(lines)
    head = f".version 9.0\n.target sm_90a\n.address_size 64\n{declarations}\n"
    return Module(f"{head}.visible .entry k({parameters})\n{{\n{text}\nret;\n}}\n")


@pytest.fixture(scope="session")
def lanewise() -> Callable[..., tuple]:
    """lanewise(body, {output: dtype}, threads=, shared=, blocks=, ..., input=array, ...) -> (outputs..., launch)."""

    def run(body, outputs, *, threads=None, blocks=1, shared=0, declarations="", options=None, **inputs):
        arrays = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
        count = threads * blocks if threads else max((array.size for array in arrays.values()), default=32)
        threads = threads or count // blocks
        dtypes = {name: array.dtype for name, array in arrays.items()}
        module = handwritten(body, dtypes, outputs, shared, declarations)
        memory = DeviceMemory(4 << 20)
        places = {name: memory.alloc(count * np.dtype(dtype).itemsize) for name, dtype in outputs.items()}
        arguments = [memory.upload(array) for array in arrays.values()] + list(places.values())
        options = {"fatal": "all"} | (options or {})
        launch = Launch(module, "k", blocks, threads, arguments, 0, memory, **options)
        return *(memory.download(places[name], count, dtype) for name, dtype in outputs.items()), launch

    return run
