"""Rotary embeddings against their definition by complex numbers, stretched frequencies against Llama 3.1's code."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.errors import UserError
from qlora_jax.models.config import LlamaConfig, RopeScaling
from qlora_jax.models.rope import inverse_frequencies, rotate, rotations


def config(**changes) -> LlamaConfig:
    shape = {"vocab_size": 8, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    return LlamaConfig(**shape | heads | changes)


def test_pairs_turn_like_complex_numbers() -> None:
    x = np.random.default_rng(0).normal(size=(2, 5, 3, 16)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3, 4], [7, 0, 1000, 3, 3]], np.int32)
    got = np.asarray(rotate(jnp.asarray(x), *rotations(jnp.asarray(positions), config(rope_theta=500.0))))
    for pair in range(8):
        angle = positions * 500.0 ** (-pair / 8)
        turned = (x[..., pair] + 1j * x[..., pair + 8]) * np.exp(1j * angle)[:, :, None]
        np.testing.assert_allclose(got[..., pair], turned.real, atol=2e-4)
        np.testing.assert_allclose(got[..., pair + 8], turned.imag, atol=2e-4)


def test_products_depend_on_distance_only() -> None:
    rng = np.random.default_rng(1)
    query, key = (jnp.asarray(rng.normal(size=(1, 1, 1, 16)), jnp.float32) for _ in range(2))

    def product(at: int, other: int) -> float:
        turned = [rotate(x, *rotations(jnp.full((1, 1), p), config())) for x, p in ((query, at), (key, other))]
        return float(jnp.sum(turned[0] * turned[1]))

    assert product(9, 4) == pytest.approx(product(105, 100), abs=1e-4)
    assert product(9, 4) != pytest.approx(product(9, 5), abs=1e-2)


def test_llama3_scaling_matches_metas_loop() -> None:
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    got = inverse_frequencies(config(head_dim=128, rope_theta=500000.0, rope_scaling=scaling))
    expected = []
    for i in range(0, 128, 2):  # apply_scaling of meta-llama/llama-models
        frequency = 1.0 / 500000.0 ** (i / 128)
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4.0:
            expected.append(frequency)
        elif wavelength > 8192 / 1.0:
            expected.append(frequency / 8.0)
        else:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            expected.append((1 - smooth) * frequency / 8.0 + smooth * frequency)
    np.testing.assert_allclose(got, np.asarray(expected, np.float32), rtol=1e-6)
    assert got.dtype == np.float32


def test_linear_scaling_stretches_positions() -> None:
    plain, stretched = config(), config(rope_scaling=RopeScaling("linear", 4.0))
    np.testing.assert_allclose(inverse_frequencies(stretched) * 4, inverse_frequencies(plain), rtol=1e-6)


def test_configurations_that_would_compute_something_else_are_refused() -> None:
    def read(**changes) -> LlamaConfig:
        plain = {field: getattr(config(), field) for field in LlamaConfig.__dataclass_fields__}
        return LlamaConfig.from_dict(plain | {"rope_scaling": None} | changes)

    assert read(attention_dropout=0.0, torch_dtype="bfloat16") == config()
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    expected = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    assert read(rope_scaling={"rope_type": "llama3"} | llama3).rope_scaling == expected
    yarn = read(rope_scaling={"rope_type": "yarn", "factor": 4.0}, max_position_embeddings=128).rope_scaling
    assert yarn == RopeScaling(
        "yarn", 4.0, original_max_position_embeddings=128, attention_factor=yarn.attention_factor
    )
    assert yarn.attention_factor == pytest.approx(1 + 0.1 * np.log(4.0))
    for kind in ("dynamic", "longrope"):
        with pytest.raises(UserError, match=f"(?s){kind!r} of the model.*change with the length of the text"):
            read(rope_scaling={"rope_type": kind, "factor": 4.0})
    with pytest.raises(UserError, match="'proportional'"):
        read(rope_scaling={"rope_type": "proportional", "factor": 4.0})
    with pytest.raises(UserError, match="lacks low_freq_factor"):
        read(rope_scaling={"rope_type": "llama3"} | llama3 | {"low_freq_factor": None})
    with pytest.raises(UserError, match="hidden_act='relu2'"):
        read(hidden_act="relu2")
    with pytest.raises(UserError, match="layer_types of the model names 2 layers"):
        read(layer_types=["full_attention"] * 2)
    with pytest.raises(UserError, match="num_key_value_heads=3"):
        read(num_key_value_heads=3)
    with pytest.raises(UserError, match="head_dim=15"):
        read(head_dim=15)
    with pytest.raises(UserError, match="partial_rotary_factor"):
        read(partial_rotary_factor=0.5)
