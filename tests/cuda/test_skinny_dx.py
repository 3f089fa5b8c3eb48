"""The skinny kernels, dx = dy @ w^T for up to 64 tokens at a time, from nvcc's PTX."""

import pytest
from product_contract import BOTH, InputGradientContract
from products import Kernel, kernels


@pytest.mark.parametrize("kernel", kernels("dx", 8, 16, 32, 64), ids=str)
class TestSkinnyInputGradient(InputGradientContract):
    pass


@pytest.mark.parametrize("tokens", [65, 130])
@pytest.mark.parametrize("kernel", kernels("dx", 64), ids=str)
def test_more_tokens_than_a_tile(kernel: Kernel, tokens: int):
    kernel.check_random(tokens, 140, 192, BOTH)
    kernel.check_random(tokens, 141, 192, run={"splits": 2})


@pytest.mark.parametrize("kernel", kernels("dx", 8), ids=str)
def test_one_token(kernel: Kernel):
    kernel.check_random(1, 192, 576, BOTH)
