"""Shared checks live beside the tests; their assertions are explained like the tests' own."""

import pytest

pytest.register_assert_rewrite("product_contract", "products", "replay")
