"""Whether an exported folder computes what the run computed: both loaded, the same tokens, their logits compared."""

import dataclasses
import functools
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from qlora_jax.checkpoints.peft import load_adapter
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.loading import load_model
from qlora_jax.models.t5 import T5
from qlora_jax.training.exporting import Trained

ROWS, LENGTH = 4, 32


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Largest absolute differences of logits, in float32 activations.

    Attributes:
      difference: between the written folder and the run.
      effect: between the run and its base without the adapter: what a difference is to be measured by.
    """

    difference: float
    effect: float


def compare(trained: Trained, out: Path, *, to: str, original: bool) -> Comparison:
    """Loads the run's model, then the written one; never both at once.

    Args:
      trained: the run.
      out: what was written.
      to: "peft", "merged", "bitsandbytes" or "requantized".
      original: whether the run's base is meant in 16 bits.
    """
    base = functools.partial(
        load_model, trained.checkpoint, **trained.load_arguments(original=original), dtype=jnp.float32
    )
    model = base()
    rows = np.random.default_rng(0).integers(0, model.config.vocab_size, (ROWS, LENGTH), dtype=np.int32)
    before = _logits(model, rows)
    wanted = _logits(load_adapter(model, trained.adapter.folder), rows)
    del model
    if to == "peft":
        model = load_adapter(base(), out)
    elif to == "bitsandbytes":
        model = load_adapter(load_model(out, dtype=jnp.float32), out / "adapter")
    else:
        model = load_model(out, quant_type=None if to == "merged" else "nf4", dtype=jnp.float32)
    written = _logits(model, rows)
    return Comparison(float(np.abs(written - wanted).max()), float(np.abs(wanted - before).max()))


def _logits(model: Decoder | T5, rows: np.ndarray) -> np.ndarray:
    inputs = [jnp.asarray(row[None]) for row in rows]
    if isinstance(model, T5):  # the same tokens, read by the decoder from their end
        return np.concatenate([np.asarray(model(ids, ids[:, ::-1])) for ids in inputs])
    return np.concatenate([np.asarray(model(ids)) for ids in inputs])
