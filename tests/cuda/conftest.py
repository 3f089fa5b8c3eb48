"""Shared checks live beside the tests; their assertions are explained like the tests' own."""

import pytest

pytest.register_assert_rewrite("far_corner", "product_contract", "products", "replay")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record-budgets",
        action="store_true",
        help="write what test_budgets.py counts to budgets.json, instead of comparing with it",
    )
