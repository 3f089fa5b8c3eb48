"""QLoRA in a Flax NNX model of your own: quantize what it has learnt, train adapters on something new.

python examples/nf4_dense_in_your_model.py
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from qlora_jax import quantize_model, trainable


class Model(nnx.Module):
    """Your model, written with nnx.Linear as ever."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([nnx.Linear(256, 256, rngs=rngs) for _ in range(4)])
        self.head = nnx.Linear(256, 8, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = x + nnx.gelu(layer(x))
        return self.head(x)


model = Model(nnx.Rngs(0))  # Here one would load a checkpoint.
model, report = quantize_model(model, rank=8, rngs=nnx.Rngs(1))
print(report)

x = jax.random.normal(jax.random.key(2), (64, 256))
labels = jnp.argmax(x[:, :8], axis=1)
graphdef, adapters, frozen = nnx.split(model, trainable(model), ...)
optimizer = optax.adamw(3e-3)
state = optimizer.init(adapters)


@jax.jit
def step(adapters, state, frozen):
    def loss_of(adapters):
        logits = nnx.merge(graphdef, adapters, frozen)(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    loss, gradients = jax.value_and_grad(loss_of)(adapters)
    updates, state = optimizer.update(gradients, state, adapters)
    return optax.apply_updates(adapters, updates), state, loss


for i in range(60):
    adapters, state, loss = step(adapters, state, frozen)
    if i % 10 == 0 or i == 59:
        print(f"step {i:2d}  loss {loss:.4f}")
