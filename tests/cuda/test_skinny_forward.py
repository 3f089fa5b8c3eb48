"""The skinny kernels, y = x @ w for up to 64 tokens at a time, from nvcc's PTX."""

import pytest
from product_contract import BOTH, ProductContract
from products import Kernel, kernels


@pytest.mark.parametrize("kernel", kernels("forward", 8, 16, 32, 64), ids=str)
class TestSkinnyForward(ProductContract):
    pass


@pytest.mark.parametrize("tokens", [65, 130])
@pytest.mark.parametrize("kernel", kernels("forward", 64), ids=str)
def test_more_tokens_than_a_tile(kernel: Kernel, tokens: int):
    kernel.check_random(tokens, 192, 132, BOTH)
    kernel.check_random(tokens, 192, 133, run={"splits": 2})


@pytest.mark.parametrize("kernel", kernels("forward", 8), ids=str)
def test_one_token(kernel: Kernel):
    kernel.check_random(1, 576, 192, BOTH)
