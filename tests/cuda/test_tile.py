"""The tile kernels, 128 tokens at a time in both directions, from nvcc's PTX."""

import pytest
from product_contract import BOTH, InputGradientContract, ProductContract
from products import Kernel, kernels


@pytest.mark.parametrize("kernel", kernels("forward", 128), ids=str)
class TestTileForward(ProductContract):
    pass


@pytest.mark.parametrize("kernel", kernels("dx", 128), ids=str)
class TestTileInputGradient(InputGradientContract):
    pass


@pytest.mark.parametrize("tokens", [1, 64, 129, 257])
@pytest.mark.parametrize("kernel", [*kernels("forward", 128), *kernels("dx", 128)], ids=str)
def test_any_number_of_tokens(kernel: Kernel, tokens: int):
    kernel.check_random(tokens, 128, 192, BOTH)


@pytest.mark.parametrize("kernel", [*kernels("forward", 128), *kernels("dx", 128)], ids=str)
def test_more_tokens_than_a_tile_in_splits(kernel: Kernel):
    kernel.check_random(140, 192, 64, run={"splits": 2})
