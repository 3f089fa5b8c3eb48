"""Finetune a LLaMA with the library's parts and a training step of your own.

python examples/finetune_smollm2.py [STEPS] [MODEL]     MODEL: an HF folder or a .gguf file; SmolLM2-135M without it
"""

import sys

import jax
import numpy as np
import optax
from flax import nnx

from qlora_jax import load_model, paged, trainable
from qlora_jax.checkpoints.peft import save_adapter
from qlora_jax.checkpoints.source import open_checkpoint
from qlora_jax.data.docstrings import build_docstring_rows
from qlora_jax.data.formats import Conversation, Message
from qlora_jax.data.loader import Loader, drop_long
from qlora_jax.data.rendering import Renderer
from qlora_jax.optim import paged_jit
from qlora_jax.training.demo import fetch_demo_model
from qlora_jax.training.loss import trained_token_losses

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 20
checkpoint = open_checkpoint(sys.argv[2] if len(sys.argv) > 2 else fetch_demo_model())
tokenizer = checkpoint.tokenizer()

rows, _ = build_docstring_rows()  # questions about the running Python's functions, answered by their docstrings
turns = [(Message("user", row["instruction"]), Message("assistant", row["output"])) for row in rows]
renderer = Renderer(tokenizer)
examples = [renderer.render(Conversation(turn, line, "docstrings")) for line, turn in enumerate(turns, 1)]
loader = Loader(drop_long(examples, 128)[0], batch_size=6, seq_len=128, packing=True, seed=0)

model = load_model(checkpoint, rank=16, alpha=32)  # the blocks' linears in 4 bits, with adapters
graphdef, adapters, frozen = nnx.split(model, trainable(model), ...)
optimizer = optax.chain(optax.clip_by_global_norm(1.0), paged(optax.adamw(1e-3)))
state = optimizer.init(adapters)


def step(adapters, state, frozen, batch):
    def loss_of(adapters):
        model = nnx.merge(graphdef, adapters, frozen)
        hidden = model.hidden(batch["input_ids"], positions=batch["positions"], segment_ids=batch["segment_ids"])
        losses, counts = trained_token_losses(hidden, batch["input_ids"], batch["loss_mask"], model.head)
        return losses.sum() / counts.sum()

    loss, gradients = jax.value_and_grad(loss_of)(adapters)
    updates, state = optimizer.update(gradients, state, adapters)
    return optax.apply_updates(adapters, updates), state, loss


compiled = None
for i in range(1, steps + 1):
    batch = {name: array for name, array in next(loader).items() if isinstance(array, np.ndarray)}
    compiled = compiled or paged_jit(step, adapters, state, frozen, batch, donate_argnums=(0, 1))
    adapters, state, loss = compiled(adapters, state, frozen, batch)
    print(f"step {i:2d}  loss {loss:.4f}")
nnx.update(model, adapters)
save_adapter(model, "smollm2-adapter", base_model=str(checkpoint.path), base_sha256=checkpoint.fingerprint())
