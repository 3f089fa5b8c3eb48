"""A model that exists in memory only, behind the interface of a checkpoint."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from qlora_jax.models.loading import read_shape

CONFIG = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
}


class MemoryCheckpoint:
    """Makes each tensor when it is read, seeded by its name; counts how many of them are alive at once."""

    path = Path("memory")

    def __init__(self, dtype: Any = ml_dtypes.bfloat16, **changes: Any) -> None:
        self.config = CONFIG | changes
        self.shapes = read_shape(self).tensor_shapes()
        self.dtypes = dict.fromkeys(self.shapes, np.dtype(dtype))
        self.change: dict[str, Callable[[np.ndarray], np.ndarray]] = {}
        self.reads: list[str] = []
        self.alive: weakref.WeakSet = weakref.WeakSet()
        self.most_alive = 0

    def names(self) -> list[str]:
        return list(self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def dtype(self, name: str) -> np.dtype:
        return self.dtypes[name]

    def values(self, name: str) -> np.ndarray:
        rng = np.random.default_rng(list(name.encode()))
        values = rng.standard_normal(self.shapes[name], np.float32)
        values *= 1.0 if name.endswith("norm.weight") else 0.1
        values = values.astype(self.dtypes[name], copy=False)
        return self.change.get(name, lambda values: values)(values)

    def read(self, name: str) -> np.ndarray:
        values = self.values(name).view(_Tracked)
        self.reads.append(name)
        self.alive.add(values)
        self.most_alive = max(self.most_alive, len(self.alive))
        return values


class _Tracked(np.ndarray):
    """An array that can be weakly referenced and hashed by identity."""

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


@pytest.fixture(scope="session")
def memory_checkpoint() -> type[MemoryCheckpoint]:
    return MemoryCheckpoint
