"""What every product kernel must do, in either direction: a suite for test files to inherit."""

import numpy as np
import pytest
from packed_weight import pack_fragments
from products import Kernel

BOTH = ("exact", "normal")
# (in, out) of SmolLM2-135M's linear layers.
SMOLLM2 = [(576, 576), (576, 192), (576, 1536), (1536, 576)]


def some_weight(kernel: Kernel, rng: np.random.Generator, **options):
    """A weight of a few tiles, ragged in outputs (forward) or in the contraction (dx)."""
    return kernel.weight(rng, *((140, 192) if kernel.operation == "dx" else (192, 140)), **options)


class ProductContract:
    """Subclasses are parametrized with `kernel`."""

    def test_full_tile(self, kernel: Kernel):
        kernel.check_random(kernel.tokens, kernel.long_contraction, kernel.rows, BOTH)

    def test_ragged_tokens(self, kernel: Kernel):
        kernel.check_random(kernel.tokens - 3, 192, kernel.rows, BOTH)
        kernel.check_random(kernel.tokens - 1, 64, 64)

    def test_ragged_outputs(self, kernel: Kernel):
        if kernel.operation == "dx":  # whole steps of 64: half a block of outputs where it has 128
            kernel.check_random(kernel.tokens, 128, kernel.rows + 64, BOTH)
        else:
            kernel.check_random(kernel.tokens, 128, kernel.rows + 36, BOTH)
            kernel.check_random(kernel.tokens, 128, kernel.rows - 27)  # stored one by one

    def test_activations_at_odd_addresses(self, kernel: Kernel):
        for offset in (1, 4):
            kernel.check_random(kernel.tokens - 1, 128, 64, run={"x_offset": offset})

    @pytest.mark.parametrize("where", [1, 7, -3])
    def test_layer_view(self, kernel: Kernel, where: int):
        rng = np.random.default_rng(where + 9)
        stack = some_weight(kernel, rng, layers=3, layer=where, values="exact")
        kernel.check(stack, kernel.activations(rng, kernel.tokens, stack, "exact"), "exact")

    def test_layer_view_has_the_bits_of_the_layer(self, kernel: Kernel):
        rng = np.random.default_rng(10)
        stack = some_weight(kernel, rng, layers=3, layer=1)
        x = kernel.activations(rng, kernel.tokens, stack, "normal")
        viewed = kernel.check(stack, x, "normal")
        alone = kernel.run(stack.only_layer(1), x).output
        np.testing.assert_array_equal(viewed.view(np.uint16), alone.view(np.uint16))

    def test_shard_of_a_layer(self, kernel: Kernel):
        # Nine blocks in a row: groups of 256 scales end within rows, and within this shard's rows.
        for values in BOTH:
            rng = np.random.default_rng(5)
            whole = (200, 576) if kernel.operation == "dx" else (576, 200)
            shard = slice(20, 156), slice(3, 7)
            weight = kernel.weight(rng, *whole, layers=2, layer=1, shard=shard, values=values)
            assert weight.where == (1, 20, 3)
            assert weight.codes.shape == (2, 136, 256)
            kernel.check(weight, kernel.activations(rng, kernel.tokens, weight, values), values)

    def test_float32_scales(self, kernel: Kernel):
        extents = (140, 192) if kernel.operation == "dx" else (192, 140)
        options = {"double_quantized": False, "layers": 2, "layer": 1, "dtype": "float32"}
        kernel.check_random(kernel.tokens, *extents, BOTH, **options)

    @pytest.mark.parametrize("block_size", [128, 256])
    def test_block_sizes(self, kernel: Kernel, block_size: int):
        extents = (72, 512) if kernel.operation == "dx" else (512, 72)
        kernel.check_random(kernel.tokens, *extents, block_size=block_size)

    def test_blocks_of_4096(self, kernel: Kernel):
        if kernel.operation == "dx":
            self.check_some_blocks(kernel, 4096, 72, block_size=4096)
        else:
            kernel.check_random(kernel.tokens, 4096, 40, block_size=4096)

    @pytest.mark.parametrize(("in_features", "out_features"), SMOLLM2)
    def test_smollm2_shapes(self, kernel: Kernel, in_features: int, out_features: int):
        self.check_some_blocks(kernel, in_features, out_features)

    def check_some_blocks(self, kernel: Kernel, in_features: int, out_features: int, **options):
        """The first and the last block of the outputs, each over the whole contraction."""
        extents = (in_features, out_features) if kernel.operation == "forward" else (out_features, in_features)
        last = -(-extents[1] // kernel.rows) - 1
        numbers = sorted({0, last})
        rng = np.random.default_rng(last)
        weight = kernel.weight(rng, *extents, values="exact", **options)
        x = kernel.activations(rng, kernel.tokens - 1, weight, "exact")
        y = kernel.run(weight, x, blocks=[(number, 0, 0) for number in numbers]).output
        expected = kernel.expected(x, weight).astype(y.dtype)
        written = np.isin(np.arange(extents[1]) // kernel.rows, numbers)
        np.testing.assert_array_equal(y[:, written].astype(np.float32), expected[:, written].astype(np.float32))
        assert (y[:, ~written].view(np.uint16) == 0xFFFF).all()

    @pytest.mark.parametrize("splits", [3, 7])
    def test_split_contraction(self, kernel: Kernel, splits: int):
        outputs = 64 if kernel.operation == "dx" else 101
        kernel.check_random(kernel.tokens - 1, 7 * 64, outputs, run={"splits": splits})

    def test_split_contraction_of_normal_numbers(self, kernel: Kernel):
        kernel.check_random(kernel.tokens, 9 * 64, 128, ("normal",), run={"splits": 4})

    def test_last_scale_codes_end_their_buffer(self, kernel: Kernel):
        extents = (67, 192) if kernel.operation == "dx" else (192, 67)
        rng = np.random.default_rng(8)
        weight = kernel.weight(rng, *extents, layers=3, layer=2, values="exact")
        assert weight.absmax.size % 4 == 3  # the last word of codes is not whole
        kernel.check(weight, kernel.activations(rng, kernel.tokens, weight, "exact"), "exact")

    def test_any_schedule_gives_the_same_bits(self, kernel: Kernel):
        rng = np.random.default_rng(3)
        weight = kernel.weight(rng, kernel.long_contraction, 64)
        x = kernel.activations(rng, kernel.tokens - 1, weight, "normal")
        y = kernel.check(weight, x, "normal")
        for seed in (1, 2, 3):
            scheduled = kernel.run(weight, x, seed=seed).output
            np.testing.assert_array_equal(scheduled.view(np.uint16), y.view(np.uint16))

    def test_padding_is_not_used(self, kernel: Kernel):
        rng = np.random.default_rng(11)
        weight = some_weight(kernel, rng)
        x = kernel.activations(rng, kernel.tokens, weight, "normal")
        y = kernel.check(weight, x, "normal")
        other = kernel.run(weight, x, packed=pack_fragments(weight.codes, padding=15)).output
        np.testing.assert_array_equal(other.view(np.uint16), y.view(np.uint16))

    def test_a_bad_token_spoils_itself_alone(self, kernel: Kernel):
        rng = np.random.default_rng(12)
        weight = some_weight(kernel, rng, values="exact")
        x = kernel.activations(rng, kernel.tokens, weight, "exact")
        expected = kernel.expected(x, weight).astype(x.dtype).astype(np.float32)
        x[2, 70], x[5, 3] = np.nan, np.inf
        y = kernel.run(weight, x).output.astype(np.float32)
        spoilt = np.isin(np.arange(len(x)), (2, 5))
        assert not np.isfinite(y[spoilt]).any()
        np.testing.assert_array_equal(y[~spoilt], expected[~spoilt])

    def test_a_bad_scale_spoils_its_block_alone(self, kernel: Kernel):
        rng = np.random.default_rng(13)
        weight = some_weight(kernel, rng, values="exact", double_quantized=False)
        x = kernel.activations(rng, kernel.tokens, weight, "exact")
        expected = kernel.expected(x, weight).astype(x.dtype).astype(np.float32)
        scales = weight.absmax.reshape(weight.out_features, -1)
        scales[66, 1], scales[9, 2] = np.nan, np.inf
        y = kernel.run(weight, x).output.astype(np.float32)
        spoilt = np.zeros(y.shape[1], bool)
        spoilt[slice(64, 192) if kernel.operation == "dx" else [9, 66]] = True
        assert not np.isfinite(y[:, spoilt]).any()
        np.testing.assert_array_equal(y[:, ~spoilt], expected[:, ~spoilt])


class InputGradientContract(ProductContract):
    """What only dx can meet: a contraction that ends within a step, and rows that begin anywhere."""

    @pytest.mark.parametrize("contraction", [72, 100, 67])
    def test_ragged_contraction(self, kernel: Kernel, contraction: int):
        kernel.check_random(kernel.tokens - 1, contraction, 128, BOTH)

    def test_ragged_contraction_of_the_last_split(self, kernel: Kernel):
        kernel.check_random(kernel.tokens, 5 * 64 + 9, 64, run={"splits": 3})
