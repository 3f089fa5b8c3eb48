"""Putting adapters on a model that has 4-bit layers, and telling an optimizer which leaves they are."""

from collections.abc import Sequence
from typing import Any, TypeVar

from flax import nnx
from jaxtyping import PRNGKeyArray

from qlora_jax.errors import UserError
from qlora_jax.nn.dense import nf4_dense
from qlora_jax.nn.dora import attach_dora
from qlora_jax.nn.lora import lora_a_init
from qlora_jax.nn.traversal import dotted, matching, require_matches, walk

M = TypeVar("M")


def trainable(model: nnx.Module) -> type[nnx.LoRAParam]:
    """The filter of a model's adapters: the leaves to differentiate, optimize and save.

        adapters = trainable(model)
        optimizer = nnx.Optimizer(model, optax.adamw(1e-4), wrt=adapters)
        graphdef, lora, frozen = nnx.split(model, adapters, ...)

    Asking the model, rather than writing a filter by hand, is what keeps the frozen leaves out: optax makes uint8
    moments for 4-bit weights without a word, and a filter that matches nothing trains nothing.

    Raises:
      UserError: the model has no adapters.
    """
    if not any(isinstance(node, nnx.LoRAParam) for _, node in walk(model)):
        raise UserError(
            f"this {type(model).__name__} has no adapters",
            why="an optimizer built for it would train nothing",
            fix="quantize_model(model, rank=16), or nf4_dense(..., rank=16)",
        )
    return nnx.LoRAParam


def add_lora(
    model: M,
    *,
    rank: int,
    alpha: float = 16.0,
    dropout: float = 0.0,
    dora: bool = False,
    targets: Sequence[str] | None = None,
    rngs: nnx.Rngs | PRNGKeyArray,
    a_init: Any = lora_a_init,
) -> M:
    """Puts a fresh adapter on nf4_dense layers, in place.

    Args:
      model: a model with nf4_dense layers, or one such layer.
      rank: rank of each adapter, > 0.
      alpha: adapters are scaled by `alpha / rank`.
      dropout: probability of dropout on an adapter's input, for calls that get a key.
      dora: train the lengths of the adapted weights' columns too (see dora.py).
      targets: whole dotted components ("q_proj", "self_attn.q_proj") of the layers' paths; None: every nf4_dense.
      rngs: keys for A (stream `params`), or one key.
      a_init: initializer of A, float32 `[in, rank]`; B starts at zero.

    Returns:
      `model`.

    Raises:
      UserError: a target that matches no nf4_dense, no nf4_dense at all, or a layer that has an adapter already.
    """
    layers = [(path, node) for path, node in walk(model) if isinstance(node, nf4_dense)]
    targets = (targets,) if isinstance(targets, str) else targets
    require_matches(targets or (), [path for path, _ in layers], "target")
    chosen = {id(layer): (path, layer) for path, layer in layers if targets is None or matching(path, targets)}
    if not chosen:
        raise UserError(
            f"this {type(model).__name__} has no nf4_dense layer to adapt",
            fix="quantize_model(model) makes them from nnx.Linear",
        )
    if taken := [dotted(path) for path, layer in chosen.values() if layer.rank > 0]:
        raise UserError(f"{len(taken)} layers have an adapter already, the first at {taken[0]}")
    stream = rngs if isinstance(rngs, nnx.Rngs) else nnx.Rngs(rngs)
    for _, layer in chosen.values():
        settings: dict[str, Any] = {"rank": rank, "alpha": alpha, "dropout": dropout, "rngs": stream, "a_init": a_init}
        if dora:
            attach_dora(layer, **settings)
        else:
            layer.attach_adapter(**settings)
    return model
