"""Perplexity of a real model for each 4-bit type: QLoRA's table 2 (arXiv 2305.14314) on SmolLM2-135M-Instruct.

Each type quantizes the 210 linears of the blocks; embedding, head and norms stay as they are. What is evaluated is the
16-bit model with kernels that were quantized and dequantized, so that one compiled program serves every type: by the
contract of nf4_matmul, `x @ dequantize(w)` summed in float32, a model of 4-bit kernels computes the same product.
"""

import dataclasses
import functools
import hashlib
import math
import platform
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from qlora_jax.benchmarks.text import MIN_CHARACTERS, long_docstrings
from qlora_jax.errors import UserError
from qlora_jax.models.config import BLOCK_LINEARS
from qlora_jax.nf4 import dequantize, quantize
from qlora_jax.training import demo
from qlora_jax.training.loss import trained_token_losses

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_jax.models.llama import Llama

CONTEXT = 512  # tokens of a window
WINDOWS = 128
_BATCH = 4  # windows evaluated together


@dataclasses.dataclass(frozen=True)
class Datatype:
    """How kernels are stored; `quant_type` None: in 16 bits, as they come."""

    quant_type: str | None
    block_size: int = 64
    double_quant: bool = False

    @property
    def name(self) -> str:
        if self.quant_type is None:
            return "16-bit"
        return f"{self.quant_type}{'+dq' * self.double_quant}/{self.block_size}"


BASELINE = Datatype(None)
DATATYPES = (
    Datatype("nf4"),
    Datatype("nf4", double_quant=True),
    Datatype("fp4"),
    Datatype("fp4", double_quant=True),
    Datatype("int4"),
    Datatype("e2m1"),
    Datatype("e3m0"),
    Datatype("nf4", 32),
    Datatype("nf4", 128),
    Datatype("nf4", 256),
    Datatype("nf4", 4096),
    Datatype("e2m1", 32),
    Datatype("int4", 32),
)
QUICK = (Datatype("nf4", double_quant=True), Datatype("fp4", double_quant=True))


def run_study(
    datatypes: Sequence[Datatype] = DATATYPES,
    *,
    windows: int = WINDOWS,
    after_each: Callable[[dict[str, Any]], None] = lambda study: None,
) -> dict[str, Any]:
    """Measures the 16-bit model, then each type.

    Args:
      datatypes: the types.
      windows: of CONTEXT tokens each, from the beginning of the text.
      after_each: sees what there is so far, after each type.

    Returns:
      `model`; `text`: what the windows are made of; `results`, the 16-bit model first: `name`, `quant_type`,
      `block_size`, `double_quant`, `relative_squared_error` of the kernels, `loss` (nats, mean over windows),
      `perplexity`, `difference` (loss less the 16-bit one's), `standard_error` of the difference (paired, over the
      windows), `seconds`.

    Raises:
      UserError: the demo's model cannot be fetched, or the text has fewer windows.
    """
    from qlora_jax.checkpoints import open_checkpoint
    from qlora_jax.models.llama import Llama
    from qlora_jax.models.loading import load_model

    checkpoint = open_checkpoint(demo.fetch_demo_model(_say))
    ids, text = _windows(checkpoint.tokenizer(), windows)
    study: dict[str, Any] = {"model": demo.MODEL, "text": text, "results": []}
    model = load_model(checkpoint, quant_type=None)
    assert isinstance(model, Llama)  # the demo's is one
    originals = {linear: _kernel(model, linear).get_value() for linear in BLOCK_LINEARS}
    base: np.ndarray | None = None
    for datatype in (BASELINE, *datatypes):
        _say(f"{datatype.name}: {windows} windows of {CONTEXT} tokens")
        began = time.perf_counter()
        error = _store(model, originals, datatype)
        losses = window_losses(model, ids)
        base = losses if base is None else base
        seconds = time.perf_counter() - began
        study["results"].append(_line(datatype, losses, base) | {"relative_squared_error": error, "seconds": seconds})
        after_each(study)
    return study


def window_losses(model: "Llama", ids: Int[np.ndarray, "windows context"]) -> Float[np.ndarray, " windows"]:
    """Mean loss (nats) of each window's tokens but the first."""
    graphdef, state = nnx.split(model)
    batches = [ids[start : start + _BATCH] for start in range(0, len(ids), _BATCH)]
    return np.concatenate([np.asarray(_mean_losses(graphdef, state, batch), np.float64) for batch in batches])


@functools.partial(jax.jit, static_argnums=0)
def _mean_losses(graphdef: Any, state: Any, ids: Int[Array, "batch context"]) -> Float[Array, " batch"]:
    model = nnx.merge(graphdef, state)
    losses, counts = trained_token_losses(model.hidden(ids), ids, jnp.ones(ids.shape, bool), model.head)
    return losses / counts


def _store(model: "Llama", originals: dict[str, Array], datatype: Datatype) -> float:
    """Puts rounded kernels into the model; returns their squared error relative to the squares of the originals."""
    errors, squares = 0.0, 0.0
    for linear, kernel in originals.items():
        rounded, error, square = kernel, np.zeros(1), np.ones(1)
        if datatype.quant_type is not None:
            rounded, error, square = _round_trip(
                kernel, datatype.quant_type, datatype.block_size, datatype.double_quant
            )
        _kernel(model, linear).set_value(rounded)
        errors += math.fsum(np.asarray(error).tolist())
        squares += math.fsum(np.asarray(square).tolist())
    return errors / squares


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _round_trip(
    stack: Float[Array, "layers in out"], quant_type: str, block_size: int, double_quant: bool
) -> tuple[Array, Float[Array, " layers"], Float[Array, " layers"]]:
    """The stack quantized and dequantized, each layer's squared error, and its sum of squares."""

    def one(kernel: Float[Array, "in out"]) -> tuple[Array, Array, Array]:
        rounded = dequantize(quantize(kernel, quant_type, block_size, double_quant))
        exact = kernel.astype(jnp.float32)
        return rounded, jnp.sum((rounded.astype(jnp.float32) - exact) ** 2), jnp.sum(exact**2)

    return jax.lax.map(one, stack)


def _kernel(model: "Llama", linear: str) -> Any:
    group, name = linear.split(".")
    return getattr(getattr(model.layers, group), name).kernel


def _line(datatype: Datatype, losses: np.ndarray, base: np.ndarray) -> dict[str, Any]:
    loss, difference = float(losses.mean()), losses - base
    return {
        "name": datatype.name,
        **dataclasses.asdict(datatype),
        "loss": loss,
        "perplexity": math.exp(loss),
        "difference": float(difference.mean()),
        "standard_error": float(difference.std(ddof=1) / math.sqrt(len(difference))),
    }


def _windows(tokenizer: "PreTrainedTokenizerBase", windows: int) -> tuple[Int[np.ndarray, "windows context"], Any]:
    documents = long_docstrings()
    ids = np.asarray(tokenizer("\n\n".join(documents))["input_ids"], np.int32)
    if len(ids) < windows * CONTEXT:
        raise UserError(
            f"the docstrings of this Python give {len(ids)} tokens, {windows} windows need {windows * CONTEXT}",
            fix=f"--windows {len(ids) // CONTEXT}",
        )
    ids = ids[: windows * CONTEXT]
    text = {
        "source": f"docstrings of {MIN_CHARACTERS} characters and more in the standard library",
        "python": platform.python_version(),
        "docstrings": len(documents),
        "windows": windows,
        "context": CONTEXT,
        "sha256": hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest(),
    }
    return ids.reshape(windows, CONTEXT), text


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
