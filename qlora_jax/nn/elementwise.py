"""Elementwise functions in training: what they compute is computed again in the backward pass rather than kept."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

Operands = ParamSpec("Operands")
Result = TypeVar("Result")


def recomputed(function: Callable[Operands, Result]) -> Callable[Operands, Result]:
    """`function`, for whose derivative its operands alone are kept.

    For norms and activations between products: their intermediate values would be kept for every layer, and reading
    them back takes longer than computing them again.
    """
    # In a scan over layers, or without one, nothing is gained where XLA merges the two computations: nothing is lost.
    return functools.wraps(function)(jax.checkpoint(function, prevent_cse=False))
