"""The training step as XLA compiles it for an H100: what is copied, what is kept between layers, what is folded.

Routes are forced, so that the table of dispatch may change. Nothing is executed, and no weight exists.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import pytest
from abstract_llama import RANK, SMOLLM2_135M, TrainingStep, linear_shapes, llama_7b, nbytes, training_step
from hlo import Instruction, origin, parse, readers

from qlora_jax.nf4 import use_kernels

pytestmark = pytest.mark.gpu_compile

MIB = 2**20
# What XLA times against its own kernels where there is a GPU; alone, it shows which additions cuBLAS takes over.
CUBLAS = {"xla_gpu_enable_triton_gemm": False}
# jax 0.10's XLA does not update a state in place that goes through a conditional: it copies adapters and moments, once.
STATE_IS_COPIED = jax.__version_info__ < (0, 11)
# Nor do its Triton products add anything as they write; its cuBLAS products do.
TRITON_ADDS = jax.__version_info__ >= (0, 11)
TARGETS = {
    "skinny": ("qlora_jax_nf4_matmul", "qlora_jax_nf4_matmul_dx"),
    "tile": ("qlora_jax_nf4_matmul", "qlora_jax_nf4_matmul_dx"),
    "dequantize": ("qlora_jax_nf4_dequantize",),
}
CONFIGS = {"7B, 3 layers": llama_7b(3), "7B, 5 layers": llama_7b(5), "SmolLM2": SMOLLM2_135M}
# Rows short enough that attention's scores, which grow with their square, are a small part of the memory.
CASES = {
    ("7B, 3 layers", "skinny"): (1, 64, {}),
    ("7B, 5 layers", "skinny"): (1, 64, {}),
    ("7B, 3 layers", "tile"): (4, 64, {}),
    ("7B, 3 layers", "dequantize"): (16, 64, CUBLAS),
    ("7B, 5 layers", "dequantize"): (16, 64, CUBLAS),
    ("SmolLM2", "skinny"): (1, 64, {}),
    ("SmolLM2", "dequantize"): (32, 64, {}),
}
each = pytest.mark.parametrize(("name", "route"), CASES)


@pytest.fixture(scope="module")
def compiled(gpu_compile: Any) -> Callable[[str, str], tuple[TrainingStep, Any, dict[str, Instruction]]]:
    @functools.cache
    def attempt(name: str, route: str) -> Any:
        batch, seq, options = CASES[name, route]
        try:
            with use_kernels(route):
                step = training_step(CONFIGS[name], batch, seq)
                result = gpu_compile(jax.jit(step.function, donate_argnums=0), *step.arguments, **options)
        except Exception as error:  # kept as well: every test of this case asks for it
            return error
        return step, result, parse(result.hlo)

    def compile_case(name: str, route: str) -> tuple[TrainingStep, Any, dict[str, Instruction]]:
        outcome = attempt(name, route)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return compile_case


def kernel_calls(instructions: dict[str, Instruction], route: str) -> list[Instruction]:
    return [i for i in instructions.values() if i.target in TARGETS[route]]


@each
def test_every_product_runs_by_the_route(name: str, route: str, compiled: Any) -> None:
    _, _, instructions = compiled(name, route)
    calls = kernel_calls(instructions, route)
    # 7 products forward, 7 for dx, and 6 or 7 forward again: of the last only the input matters, not its result.
    assert len(calls) in (20, 21)
    ours = {i.target for i in instructions.values() if i.target and "nf4" in i.target}
    assert ours <= set(TARGETS[route])
    if route != "dequantize":
        assert all(f"route = {('skinny', 'tile').index(route)} : i64" in i.rest for i in calls)
    assert all("layout = 1 : i64" in i.rest for i in calls)


@each
def test_packed_weights_are_never_copied(name: str, route: str, compiled: Any) -> None:
    _, _, instructions = compiled(name, route)
    handed_on = {"parameter", "get-tuple-element", "bitcast", "tuple", "while", "conditional", "call", "opt-barrier"}
    made = [i for i in instructions.values() if any(dtype == "u8" and dims for dtype, dims in i.arrays)]
    assert made
    assert not [(i.opcode, i.arrays) for i in made if i.opcode not in handed_on]


@each
def test_kernels_read_the_whole_stack(name: str, route: str, compiled: Any) -> None:
    step, _, instructions = compiled(name, route)
    packed = {(step.config.num_hidden_layers, k * n // 2) for k, n in linear_shapes(step.config).values()}
    for call in kernel_calls(instructions, route):
        operands = [array for operand in call.operands for array in instructions[operand].arrays]
        assert packed & {dims for dtype, dims in operands if dtype == "u8"}, call.rest


@each
def test_no_dense_weight_outlives_its_layer(name: str, route: str, compiled: Any) -> None:
    step, _, instructions = compiled(name, route)
    shapes = {dims for k, n in linear_shapes(step.config).values() for dims in ((k, n), (n, k))}
    loops = [i for i in instructions.values() if i.opcode == "while"]
    assert len(loops) >= 2
    for loop in loops:
        carried = {dims[-2:] for dtype, dims in loop.arrays if dtype in ("bf16", "f32", "f16") and len(dims) > 1}
        assert not carried & shapes
    if route != "dequantize":
        dense = [i for i in instructions.values() if any(dims in shapes for _, dims in i.arrays)]
        assert not dense, dense


@each
def test_state_is_updated_in_place(name: str, route: str, compiled: Any) -> None:
    step, result, _ = compiled(name, route)
    assert result.aliased == nbytes(step.arguments[0])  # adapters, both moments, counts
    assert result.output - result.aliased < 8192  # metrics


@each
def test_temporary_memory_is_as_predicted(name: str, route: str, compiled: Any) -> None:
    step, result, _ = compiled(name, route)
    c, layers = step.config, step.config.num_hidden_layers
    adapters = layers * step.layer_adapter_bytes
    kept = layers * step.layer_activation_bytes + adapters  # inputs of layers, gradients of adapters
    # In one layer's backward pass: some activations of each width, and, on the dense route, the weight that is being
    # multiplied and the next one.
    wide, narrow = step.rows * c.intermediate_size * 2, step.rows * c.hidden_size * 2
    dense = 2 * max(2 * k * n for k, n in linear_shapes(c).values()) if route == "dequantize" else 0
    batch, seq, _ = CASES[name, route]
    scores = 3 * batch * c.num_attention_heads * seq * seq * 4
    logits = 2 * min(step.rows, 128) * c.vocab_size * 4
    backward = kept + 6 * wide + 12 * narrow + dense + scores + logits
    assert adapters < result.temp < max(backward, _update_bytes(step)) + 8 * MIB


def _update_bytes(step: TrainingStep) -> int:
    """Temporaries of the optimizer's update: gradients, and a copy of the state where XLA makes one."""
    gradients = step.config.num_hidden_layers * step.layer_adapter_bytes
    return gradients + (nbytes(step.arguments[0]) if STATE_IS_COPIED else 0)


@pytest.mark.parametrize("route", ["skinny", "dequantize"])
def test_a_layer_costs_its_input_and_its_adapters(route: str, compiled: Any) -> None:
    (step, three, _), (larger, five, _) = compiled("7B, 3 layers", route), compiled("7B, 5 layers", route)
    slope = (five.temp - three.temp) / 2
    backward = step.layer_activation_bytes + step.layer_adapter_bytes
    update = (_update_bytes(larger) - _update_bytes(step)) / 2
    # Few rows keep so little for the backward pass that the copy of the state is the peak.
    peak = update if STATE_IS_COPIED and route == "skinny" else backward
    assert slope == pytest.approx(peak, rel=0.02)
    assert slope < 0.05 * step.layer_dense_bytes


def _beta(call: Instruction) -> float:
    found = re.search(r'"beta":([\d.]+)', call.rest)
    assert found, call.rest
    return float(found[1])


def test_cublas_adds_the_adapters_products(compiled: Any) -> None:
    _, _, instructions = compiled("7B, 3 layers", "dequantize")
    products = {i.name: i for i in instructions.values() if i.target in ("__cublas$lt$matmul", "__cublas$gemm")}
    forward = 0
    for dense in kernel_calls(instructions, "dequantize"):
        (product,) = readers(dense)  # one, and not a copy beside another weight
        assert product.name in products, (product.opcode, product.rest)
        if _contracts(product, dense) == "in":
            forward += 1
            # It starts from the adapter's product, which has contracted the rank.
            assert _beta(product) == 1, product.rest
            adapter = origin(instructions, product.operands[2])
            assert adapter.name in products
            assert min(min(dims) for name in adapter.operands for _, dims in instructions[name].arrays) == RANK
    assert forward == 13
    # Of each linear's two gradients of x, one starts from the other.
    assert sum(_beta(product) for product in products.values()) == forward + 7
    # Linears that share their input (q, k, v; gate, up) leave one addition each: XLA looks at the wrong operand.
    alone = [
        i
        for i in instructions.values()
        if i.called
        and {j.opcode for j in instructions.values() if j.computation == i.called} == {"parameter", "add"}
        and all(origin(instructions, name).name in products for name in i.operands)
    ]
    assert len(alone) <= 3, alone


def _contracts(product: Instruction, dense: Instruction) -> str:
    """Which axis of the dense weight [out, in] a product contracts."""
    width = product.arrays[0][1][1]
    out_features, in_features = dense.arrays[0][1]
    if out_features != in_features:
        return "in" if width == out_features else "out"
    found = re.search(r'"rhs_contracting_dimensions":\["(\d)"\]', product.rest)
    assert found, product.rest
    return "in" if found[1] == "1" else "out"


def test_triton_adds_the_adapters_products(gpu_compile: Any) -> None:
    with use_kernels("dequantize"):
        step = training_step(llama_7b(2), 16, 64)
        instructions = parse(gpu_compile(jax.jit(step.function, donate_argnums=0), *step.arguments).hlo)
    bodies: dict[str, set[str]] = {}
    for instruction in instructions.values():
        bodies.setdefault(instruction.computation, set()).add(instruction.opcode)
    fused = 0
    for dense in kernel_calls(instructions, "dequantize"):
        (product,) = readers(dense)
        assert product.called is not None
        assert "dot" in bodies[product.called], product.rest
        fused += "add" in bodies[product.called]
    assert fused >= 13 + 4 or not TRITON_ADDS
