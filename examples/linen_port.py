"""QLoRA in a Flax Linen model: swap nn.Dense for nf4_dense, turn the parameters it had, train the adapters.

python examples/linen_port.py
"""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from qlora_jax.linen import from_params, merge_adapters, nf4_dense, split_adapters


class Model(nn.Module):
    """`port=False`: the model as it was. `port=True`: one line differs."""

    port: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(4):
            dense = (
                nf4_dense(256, rank=8, use_bias=True, name=f"up_{i}") if self.port else nn.Dense(256, name=f"up_{i}")
            )
            x = x + nn.gelu(dense(nn.LayerNorm(name=f"norm_{i}")(x)))
        return nn.Dense(8, name="head")(x)


x = jax.random.normal(jax.random.key(2), (64, 256))
labels = jnp.argmax(x[:, :8], axis=1)
params = Model(port=False).init(jax.random.key(0), x)["params"]  # Here one would load a checkpoint.

model = Model(port=True)
adapters, frozen = split_adapters(from_params(params, rank=8, rngs=jax.random.key(1)))
optimizer = optax.adamw(3e-3)
state = optimizer.init(adapters)


@jax.jit
def step(adapters, state, frozen):
    def loss_of(adapters):
        logits = model.apply(merge_adapters(adapters, frozen), x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    loss, gradients = jax.value_and_grad(loss_of)(adapters)
    updates, state = optimizer.update(gradients, state, adapters)
    return optax.apply_updates(adapters, updates), state, loss


for i in range(60):
    adapters, state, loss = step(adapters, state, frozen)
    if i % 10 == 0 or i == 59:
        print(f"step {i:2d}  loss {loss:.4f}")
