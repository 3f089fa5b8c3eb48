"""QLoRA without a framework: parameters in a dict, their kernels quantized, adapters in another dict.

python examples/plain_jax.py
"""

import jax
import jax.numpy as jnp
import optax

from qlora_jax import nf4_matmul, quantize

LAYERS, WIDTH, CLASSES, RANK, ALPHA = 4, 256, 8, 8, 16.0


def model(params, adapters, x):
    """Your model: where it said `x @ kernel`, it now says `linear(...)`."""

    def linear(x, name):
        y = nf4_matmul(x, params[name]["kernel"]) + params[name]["bias"]
        a, b = adapters[name]["a"], adapters[name]["b"]
        return y + (ALPHA / RANK) * ((x @ a) @ b)

    for i in range(LAYERS):
        x = x + jax.nn.gelu(linear(x, f"up_{i}"))
    return x @ params["head"]["kernel"]


keys = iter(jax.random.split(jax.random.key(0), 2 * LAYERS + 2))
params = {"head": {"kernel": jax.random.normal(next(keys), (WIDTH, CLASSES)) / WIDTH**0.5}}
for i in range(LAYERS):  # Here one would load a checkpoint.
    kernel = jax.random.normal(next(keys), (WIDTH, WIDTH)) / WIDTH**0.5
    params[f"up_{i}"] = {"kernel": kernel, "bias": jnp.zeros(WIDTH)}

names = [name for name in params if name != "head"]  # the head stays as it is
dense = sum(params[name]["kernel"].nbytes for name in names)
for name in names:
    params[name]["kernel"] = quantize(params[name]["kernel"])  # [in, out], as ever; a pytree of packed bytes and scales
packed = sum(leaf.nbytes for name in names for leaf in jax.tree.leaves(params[name]["kernel"]))
print(f"kernels: {dense} bytes were float32, {packed} are left")

adapters = {
    name: {"a": jax.random.normal(next(keys), (WIDTH, RANK)) / WIDTH**0.5, "b": jnp.zeros((RANK, WIDTH))}
    for name in names
}
x = jax.random.normal(jax.random.key(2), (64, WIDTH))
labels = jnp.argmax(x[:, :CLASSES], axis=1)
optimizer = optax.adamw(3e-3)
state = optimizer.init(adapters)


@jax.jit
def step(adapters, state, params):  # params are an argument: closed over, they would become constants
    def loss_of(adapters):
        logits = model(params, adapters, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    loss, gradients = jax.value_and_grad(loss_of)(adapters)
    updates, state = optimizer.update(gradients, state, adapters)
    return optax.apply_updates(adapters, updates), state, loss


for i in range(60):
    adapters, state, loss = step(adapters, state, params)
    if i % 10 == 0 or i == 59:
        print(f"step {i:2d}  loss {loss:.4f}")
