"""What is timed on a GPU is what it is called: one product for each copy of the weight, none merged, nothing copied."""

from collections import Counter
from typing import Any

import pytest
from hlo import parse

from qlora_jax.benchmarks import programs
from qlora_jax.benchmarks.shapes import Size
from qlora_jax.nf4.placement import use_layout

pytestmark = pytest.mark.gpu_compile

COPIES = 3
SHAPE = (1024, 768)
MATMUL = {"forward": "qlora_jax_nf4_matmul", "dx": "qlora_jax_nf4_matmul_dx"}
DEQUANTIZE, CUBLAS = "qlora_jax_nf4_dequantize", "__cublas$lt$matmul"


@pytest.fixture(scope="module")
def weights() -> programs.Weights:
    with use_layout("fragments"):
        return programs.make_weights(SHAPE, "bfloat16", COPIES)


def compile_source(gpu_compile: Any, source: programs.Source) -> tuple[Counter, Counter]:
    """Targets of calls, and opcodes."""
    options = {name: str(value) for name, value in programs.COMPILER_OPTIONS.items()}
    result = gpu_compile(source.jitted, *source.operands, source.results, **options)
    # Results stay where the last ones were; the rest is the table of their addresses.
    assert result.output - result.aliased == 8 * COPIES
    instructions = parse(result.hlo).values()
    return Counter(i.target for i in instructions if i.target), Counter(i.opcode for i in instructions)


@pytest.mark.parametrize("op", programs.OPS)
@pytest.mark.parametrize("way", ["skinny", "tile", "dequantize", "dense"])
@pytest.mark.parametrize("rows", [16, 2048])
def test_a_product_for_each_copy(rows: int, way: str, op: str, weights: programs.Weights, gpu_compile: Any) -> None:
    xs = programs.make_activations(Size(*SHAPE, rows), "bfloat16", COPIES)[op]
    if way == "dense":
        source = programs.dense_product(op, xs, weights)
    else:
        source = programs.packed_product(op, xs, weights, way)
    # The fixture traces again: under the same choice of kernels.
    with programs.use_kernels("auto" if way == "dense" else way):
        targets, opcodes = compile_source(gpu_compile, source)
    expected = {"dense": [CUBLAS], "dequantize": [DEQUANTIZE, CUBLAS]}.get(way, [MATMUL[op]])
    assert targets == dict.fromkeys(expected, COPIES)
    assert not opcodes.keys() & {"copy", "concatenate", "transpose", "dynamic-slice", "while"}


def test_dequantization_and_copies(weights: programs.Weights, gpu_compile: Any) -> None:
    targets, opcodes = compile_source(gpu_compile, programs.dequantized(weights, "auto"))
    assert targets == {DEQUANTIZE: COPIES}
    assert not opcodes.keys() & {"copy", "transpose"}
    for negate, opcode in ((True, "negate"), (False, "copy")):
        targets, opcodes = compile_source(gpu_compile, programs.copied(1 << 20, COPIES, negate=negate))
        assert not targets
        assert opcodes[opcode] == COPIES
