"""Rewrites sass.json, the figures of every compiled kernel that test_sass.py holds later builds against.

python tests/gpu_compile/record_sass.py    (in an environment of .ci/gpu_compile's; then run predict.py)
"""

import json
from pathlib import Path

from kernel_gates.compilation import compile_kernels, compiler_version
from kernel_gates.counts import measure

RECORD = Path(__file__).parent / "sass.json"


def main() -> None:
    compiled = compile_kernels()
    opcodes = {
        architecture: sorted({i.opcode for built in kernels.values() for i in built.kernel.instructions})
        for architecture, kernels in compiled.items()
    }
    kernels = {
        architecture: {name: measure(name, built, architecture) for name, built in sorted(kernels.items())}
        for architecture, kernels in compiled.items()
    }
    RECORD.write_text(_one_line_each({"nvcc": compiler_version(), "opcodes": opcodes, "kernels": kernels}))


def _one_line_each(record: dict) -> str:
    """JSON with a line for each kernel."""
    lines = [f'{{"nvcc": {json.dumps(record["nvcc"])},', '"opcodes": {']
    lines.append(",\n".join(f" {json.dumps(a)}: {json.dumps(names)}" for a, names in record["opcodes"].items()))
    lines.append('},\n"kernels": {')
    blocks = []
    for architecture, kernels in record["kernels"].items():
        rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(figures)}" for name, figures in kernels.items())
        blocks.append(f" {json.dumps(architecture)}: {{\n{rows}\n }}")
    lines.append(",\n".join(blocks))
    return "\n".join(lines) + "\n}}\n"


if __name__ == "__main__":
    main()
