"""Kernels broken on purpose: for every kind of mistake there is a test of this folder that sees it.

Half of these give the right numbers on a GPU most of the time, and are found only because the interpreter reports what
the programming model does not promise.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import replay
from far_corner import check_dequantize, check_product
from packed_weight import make_weight
from product_contract import InputGradientContract, ProductContract
from products import Kernel
from ptx_interpreter import Module, PTXError
from ptx_interpreter.toolchain import compile_ptx

Catcher = Callable[[Kernel], None]


def forward(tokens: int) -> Kernel:
    return Kernel("forward", "bfloat16", tokens)


def dx(tokens: int) -> Kernel:
    return Kernel("dx", "bfloat16", tokens)


def contract(name: str, *arguments) -> Catcher:
    """A test of the product kernels."""

    def run(kernel: Kernel) -> None:
        suite = InputGradientContract if kernel.operation == "dx" else ProductContract
        getattr(suite(), name)(kernel, *arguments)

    return run


def conflicts(kernel: Kernel) -> None:
    rng = np.random.default_rng(0)
    weight = kernel.weight(rng, 256, kernel.rows, double_quantized=False)
    x = kernel.activations(rng, kernel.tokens, weight, "normal")
    assert kernel.run(weight, x, profile=True).launches[0].conflicts() == 0


def dequantize(layout: str, **options) -> Catcher:
    def run(_: Kernel) -> None:
        weight = make_weight(np.random.default_rng(0), 576, 200, **options)
        dense = replay.dequantize(weight, "bfloat16", layout).output
        np.testing.assert_array_equal(dense.view(np.uint16), weight.dense("bfloat16").view(np.uint16))

    return run


SHARD = {"layers": 2, "layer": 1, "shard": (slice(20, 156), slice(3, 7))}
RACE = "race-"
OUT_OF_BOUNDS = "out of bounds"


@dataclasses.dataclass(frozen=True)
class Mutant:
    """Edits [(file, old text, new text)]; the kernel that they break; the test that sees it, and how it shows."""

    name: str
    edits: list[tuple[str, str, str]]
    kernel: Kernel
    catcher: Catcher
    report: str | None = None  # None: wrong numbers

    def __str__(self) -> str:
        return self.name


MUTANTS = [
    Mutant(
        "a_stage_is_read_before_other_warps_copies_are_there",
        [("product.cuh", "SynchronizeGroup<K>();\n    copies.DecodeScales", "copies.DecodeScales")],
        forward(32), contract("test_full_tile"), "race-|in-flight",
    ),
    Mutant(
        "scales_are_read_before_they_are_decoded",
        [("product.cuh", "SynchronizeGroup<K>();\n    view.Multiply", "view.Multiply")],
        dx(64), contract("test_full_tile"), RACE,
    ),
    Mutant(
        "warps_of_a_group_do_not_wait_for_their_lanes",
        [("product.cuh", "__syncwarp();", ";")],
        forward(8), contract("test_full_tile"), "race-|in-flight",
    ),
    Mutant(
        "one_step_too_few_is_waited_for",
        [("product.cuh", "WaitForCopies<K::kStages - 2>", "WaitForCopies<K::kStages - 1>")],
        forward(16), contract("test_full_tile"), "in-flight-read",
    ),
    Mutant(
        "a_stage_is_overwritten_while_it_is_read",
        [("product.cuh", "slot == 0 ? K::kStages - 1 : slot - 1);", "slot);")],
        dx(128), contract("test_full_tile"), "race-|in-flight",
    ),
    Mutant(
        "sums_overwrite_the_last_stage",
        [("product.cuh", "WaitForCopies<0>();\n  __syncthreads();", "WaitForCopies<0>();")],
        forward(32), contract("test_full_tile"), RACE,
    ),
    Mutant(
        "sums_are_stored_before_they_are_complete",
        [("product.cuh", "__syncthreads();\n\n  constexpr int kUnits", "constexpr int kUnits")],
        forward(8), contract("test_full_tile"), RACE,
    ),
    Mutant(
        "tables_are_read_before_they_are_filled",
        [("product.cuh", "(table, dynamic_map);\n  __syncthreads();", "(table, dynamic_map);")],
        forward(8), contract("test_full_tile"), "race-|uninitialised",
    ),
    Mutant(
        "bundles_lie_in_the_order_of_the_lanes",
        [("weight.cuh", "return lane ^ (lane >> 3 & 3) << 1;", "return lane;")],
        forward(16), contract("test_full_tile"),
    ),
    Mutant(
        "registers_1_and_2_keep_their_places_in_the_transpose",
        [("operands.cuh", "i / 2 + i % 2 * 2", "i")],
        dx(8), contract("test_full_tile"),
    ),
    Mutant(
        "even_and_odd_outputs_are_exchanged",
        [("operands.cuh", "odds[s] << (4 - nibble), evens[s] >> nibble",
          "evens[s] << (4 - nibble), odds[s] >> nibble")],
        dx(16), contract("test_full_tile"),
    ),
    Mutant(
        "the_lower_half_of_a_strip_takes_the_scales_of_the_upper",
        [("operands.cuh", "LoadShared(place + 32)", "LoadShared(place)")],
        forward(64), contract("test_full_tile"),
    ),
    Mutant(
        "the_first_row_of_a_shard_is_ignored",
        [("weight.cuh", "w.first_row = where[1];", "w.first_row = 0;")],
        forward(8), contract("test_shard_of_a_layer"),
    ),
    Mutant(
        "the_first_block_of_a_shard_is_ignored",
        [("weight.cuh", "w.first_block = where[2];", "w.first_block = 0;")],
        dx(8), contract("test_shard_of_a_layer"),
    ),
    Mutant(
        "groups_of_scales_are_counted_in_the_shard",
        [("step_copies.cuh", "(w_.first_row + out) * w_.row_blocks + w_.first_block",
          "(w_.first_row + out) * row_blocks_ + w_.first_block")],
        dx(8), contract("test_shard_of_a_layer"),
    ),
    Mutant(
        "later_steps_count_groups_in_the_shard",
        [("step_copies.cuh", "BlocksBefore(step, w_.row_blocks)", "BlocksBefore(step, row_blocks_)")],
        dx(8), contract("test_shard_of_a_layer"),
    ),
    Mutant(
        "the_first_code_of_a_word_is_every_scales",
        [("step_copies.cuh", "word >> 8 * (reinterpret_cast<uintptr_t>(code) & 3) & 255", "word & 255")],
        forward(8), contract("test_full_tile"),
    ),
    Mutant(
        "the_last_word_of_codes_is_read_whole",
        [("step_copies.cuh", "left < 4 ? static_cast<int>(left) : 4", "4")],
        forward(8), contract("test_last_scale_codes_end_their_buffer"), OUT_OF_BOUNDS,
    ),
    Mutant(
        "splits_end_one_step_early",
        [("product.cuh", "steps * (work.split + 1) / splits", "(steps * (work.split + 1) - 1) / splits")],
        forward(8), contract("test_split_contraction", 3),
    ),
    Mutant(
        "one_group_of_warps_is_not_added",
        [("product.cuh", "for (int g = 1; g < K::kGroups; ++g)", "for (int g = 2; g < K::kGroups; ++g)")],
        forward(8), contract("test_full_tile"),
    ),
    Mutant(
        "tokens_that_do_not_exist_are_read",
        [("step_copies.cuh", "row < tokens_ && column_exists", "column_exists")],
        forward(8), contract("test_ragged_tokens"), OUT_OF_BOUNDS,
    ),
    Mutant(
        "tokens_that_do_not_exist_are_written",
        [("product.cuh", "token >= work.tokens || row >= work.outputs", "row >= work.outputs")],
        dx(8), contract("test_ragged_tokens"), OUT_OF_BOUNDS,
    ),
    Mutant(
        "outputs_that_do_not_exist_are_written",
        [("product.cuh", "if (row + e >= work.outputs) continue;", "")],
        forward(8), contract("test_ragged_outputs"), OUT_OF_BOUNDS,
    ),
    Mutant(
        "activations_are_read_beyond_the_contraction",
        [("step_copies.cuh", "!K::kInputGradient || step * int64_t{kTile} + thread_ % 8 * 8 < contraction_", "true")],
        dx(8), contract("test_ragged_contraction", 72), OUT_OF_BOUNDS,
    ),
    Mutant(
        "layers_out_of_range_are_not_clamped",
        [("weight.cuh", "layer = layer < 0 ? 0 : layer >= layers ? layers - 1 : layer;", "")],
        forward(8), contract("test_layer_view", 7), OUT_OF_BOUNDS,
    ),
    Mutant(
        "steps_are_added_in_32_bits",
        [("step_copies.cuh", "step * weights_step_;", "static_cast<int>(step * weights_step_);")],
        dx(8), check_product, OUT_OF_BOUNDS,
    ),
    Mutant(
        "results_are_counted_in_32_bits",
        [("product.cuh", "const int64_t index = token * work.outputs + row;",
          "const int64_t index = static_cast<int>(token * work.outputs + row);")],
        forward(64), check_product, OUT_OF_BOUNDS,
    ),
    Mutant(
        "layers_are_counted_in_32_bits",
        [("weight.cuh", "layer * PackedBytes(layout, in_features, out_features)",
          "static_cast<int>(layer * PackedBytes(layout, in_features, out_features))")],
        forward(8), lambda _: check_dequantize("rows", 1, 8192, "float32"), OUT_OF_BOUNDS,
    ),
    Mutant(
        "activations_lie_in_banks_together",
        [("step_copies.cuh", "((thread_ ^ row) & 7) * 16", "(thread_ & 7) * 16"),
         ("operands.cuh", "(chunk ^ row) * 16", "chunk * 16")],
        forward(8), conflicts,
    ),
    Mutant(
        "dequantize_reads_tables_before_they_are_filled",
        [("dequantize.cu", "kDynamicMap.value[threadIdx.x];\n  __syncthreads();", "kDynamicMap.value[threadIdx.x];")],
        forward(8), dequantize("fragments"), RACE,
    ),
    Mutant(
        "dequantize_takes_the_scales_of_a_shard_from_the_first_rows",
        [("../nf4.h", "(w.first_row + out) * w.row_blocks", "out * w.row_blocks")],
        forward(8), dequantize("rows", **SHARD),
    ),
    Mutant(
        "dequantize_does_not_divide_a_shard_into_rows",
        [("dequantize.cu", "divided ? element / in_features : 0", "0")],
        forward(8), dequantize("rows", **SHARD),
    ),
    Mutant(
        "the_second_part_of_a_sum_is_left_out",
        [("sum_splits.cu", "sum = make_float4(sum.x + part.x", "sum = make_float4(sum.x")],
        forward(8), contract("test_split_contraction_of_normal_numbers"),
    ),
]  # fmt: skip


def product_source(kernel: Kernel) -> str:
    """That entry point alone: it compiles in a second."""
    gradient = "true" if kernel.operation == "dx" else "false"
    scaling = "kWeights" if kernel.operation == "dx" or kernel.route == "tile" else "kSums"
    return (
        f'#include "product.cuh"\nQLORA_JAX_PRODUCT({kernel.entry}, Bfloat16, {gradient}, {kernel.tokens}, {scaling})\n'
    )


def broken_sources(folder: Path, mutant: Mutant) -> Path:
    """A copy of the kernels' sources with the edits; files that are right already are left alone."""
    texts = {Path("cuda") / file.name: file.read_text() for file in replay.KERNELS.glob("*.[ch]*")}
    texts |= {Path(file.name): file.read_text() for file in replay.KERNELS.parent.glob("*.h")}
    texts[Path("cuda/product_bf16.cu")] = product_source(mutant.kernel)
    for name, old, new in mutant.edits:
        file = Path(name[3:]) if name.startswith("../") else Path("cuda") / name
        assert texts[file].count(old) == 1, f"{name} does not hold this text once: {old}"
        texts[file] = texts[file].replace(old, new)
    for file, text in texts.items():
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
    return folder / "cuda"


@pytest.fixture
def use_mutant(monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config) -> Callable[[Mutant], None]:
    """Makes tests run the kernels of a mutant. Its files stay where they are, so that their PTX is found again."""

    def use(mutant: Mutant) -> None:
        folder = broken_sources(pytestconfig.cache.mkdir("cuda_mutants") / mutant.name, mutant)

        def broken_module(source: Path, architecture: str) -> Module:
            return Module(compile_ptx(folder / source.name, architecture, flags=replay.NVCC_FLAGS))

        monkeypatch.setattr(replay, "kernel_module", broken_module)

    return use


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_is_caught(mutant: Mutant, use_mutant: Callable[[Mutant], None]):
    use_mutant(mutant)
    if mutant.report is None:
        with pytest.raises(AssertionError):
            mutant.catcher(mutant.kernel)
    else:
        with pytest.raises(PTXError, match=mutant.report):
            mutant.catcher(mutant.kernel)


@pytest.mark.parametrize("catcher", [conflicts, dequantize("fragments"), dequantize("rows", **SHARD)])
def test_catchers_of_this_file_let_the_kernels_pass(catcher: Catcher):
    catcher(forward(8))
