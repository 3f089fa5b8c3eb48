"""A whole QLoRA step beside transformers + PEFT + bitsandbytes, and beside Qwix, each in a Python of its own.

The model is a small LLaMA with random weights: every linear of its blocks in NF4, rank 16 adapters on all of them,
AdamW. All tokens are trained, and no side recomputes activations in the backward pass.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qlora_jax.benchmarks.load import OtherLoad
from qlora_jax.benchmarks.peers import Peer
from qlora_jax.benchmarks.timing import Program, interleave, ratios, spread
from qlora_jax.models.config import BLOCK_LINEARS, LlamaConfig
from qlora_jax.models.llama import Llama
from qlora_jax.nf4 import quantize
from qlora_jax.nn import add_lora
from qlora_jax.optim import paged_jit
from qlora_jax.training.config import OptimSection
from qlora_jax.training.optimizer import learning_rate_schedule, make_optimizer
from qlora_jax.training.step import BATCH_KEYS, init_train_state, make_train_step, split_model

_RANK, _ALPHA = 16, 32.0
_LEARNING_RATE, _CLIP = 2e-4, 1.0
# Threads of the other processes have gone to sleep after so long.
_REST = 0.03


@dataclasses.dataclass(frozen=True)
class Shape:
    """A LLaMA by HF's names, and a batch of `batch` rows of `seq` tokens."""

    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_hidden_layers: int = 8
    num_attention_heads: int = 16
    vocab_size: int = 8192
    batch: int = 4
    seq: int = 512

    @property
    def config(self) -> dict[str, Any]:
        """HF's keys."""
        own = dataclasses.asdict(self)
        del own["batch"], own["seq"]
        return own | {
            "num_key_value_heads": self.num_attention_heads,
            "head_dim": self.hidden_size // self.num_attention_heads,
            "max_position_embeddings": self.seq,
            "tie_word_embeddings": False,
        }

    @property
    def tokens(self) -> int:
        return self.batch * self.seq


SHAPE = Shape()
QUICK = Shape(64, 128, 2, 2, 256, 2, 16)


def time_step(
    shape: Shape,
    peers: Mapping[str, Peer],
    *,
    repeats: int,
    after_each: Callable[[dict[str, Any]], None] = lambda report: None,
) -> dict[str, Any]:
    """Times optimizer steps in turns.

    Args:
      shape: model and batch.
      peers: by name, "peft" (with the calls of peer_peft.py) and "qwix" (of peer_qwix.py), or none.
      repeats: steps of each side that count, after one that compiles and one that does not count.
      after_each: sees the report.

    Returns:
      `shape`; `other_load` (see load.py); `losses` of a first step and numbers of `trained` parameters, by side;
      `results`: for each side `name`, `steps`, `seconds` of a step (median, low, high: quartiles), `ratio` (ours /
      this, from the same turns) and `tokens_per_second`.

    Raises:
      UserError: a peer's process ended.
      PeerError: it cannot make such a step.
    """
    ids = np.random.default_rng(0).integers(0, shape.vocab_size, (shape.batch, shape.seq), np.int32)
    _say("step: ours")
    ours = _OurStep(shape, ids)
    losses, trained = {"ours": ours.loss}, {"ours": ours.trained}
    programs: dict[str, Program] = {"ours": ours}
    for name, peer in peers.items():
        _say(f"step: {name}")
        settings = {"rank": _RANK, "alpha": _ALPHA, "learning_rate": _LEARNING_RATE, "clip": _CLIP}
        trained[name] = peer.call("build", folder=None, config=shape.config, **settings)["trainable"]
        peer.call("load_batch", rows=[(row.tolist(), [True] * shape.seq) for row in ids])
        losses[name] = peer.call("step", name=name)
        programs[name] = _PeerStep(peer, name)
    load = OtherLoad([peer.pid for peer in peers.values()])
    seconds = interleave(programs, repeats=repeats, min_seconds=0.0, rest=_REST)
    gains = {"ours": {"median": 1.0, "low": 1.0, "high": 1.0}} | ratios(seconds, "ours")
    report = {
        "shape": dataclasses.asdict(shape),
        "other_load": load.share(),
        "losses": losses,
        "trained": trained,
        "results": [
            {
                "name": name,
                "steps": len(own),
                "seconds": spread(own),
                "ratio": gains[name],
                "tokens_per_second": shape.tokens / spread(own)["median"],
            }
            for name, own in seconds.items()
        ],
    }
    after_each(report)
    return report


@dataclasses.dataclass
class _PeerStep:
    peer: Peer
    name: str
    calls: int = 1

    def run(self, times: int) -> None:
        self.seconds(times)

    def seconds(self, times: int) -> float:
        return float(self.peer.call("seconds", name=self.name, times=times))


class _OurStep:
    """The training step that `python -m qlora_jax.train` compiles, on one batch again and again."""

    calls = 1

    def __init__(self, shape: Shape, ids: np.ndarray) -> None:
        given = {"learning_rate": _LEARNING_RATE, "clip": _CLIP, "warmup_steps": 0}
        optim = OptimSection.model_validate(given)
        schedule = learning_rate_schedule(optim, 1)
        optimizer = make_optimizer(optim, schedule)
        graphdef, adapters, self._frozen = split_model(_random_model(shape))
        self.trained = sum(leaf.size for leaf in jax.tree.leaves(adapters))
        self._state = init_train_state(adapters, optimizer)
        values = {
            "input_ids": ids,
            "positions": np.broadcast_to(np.arange(shape.seq, dtype=np.int32), ids.shape),
            "segment_ids": np.ones_like(ids),
            "loss_mask": np.broadcast_to(np.arange(shape.seq) > 0, ids.shape),
        }
        self._batch = {key: values[key][None] for key in BATCH_KEYS}
        step = make_train_step(graphdef, optimizer, schedule)
        self._step = paged_jit(step, self._state, self._frozen, self._batch, donate_argnums=0)
        self.run(1)

    def run(self, times: int) -> None:
        for _ in range(times):
            self._state, metrics = self._step(self._state, self._frozen, self._batch)
            self.loss = float(metrics.loss)


def _random_model(shape: Shape) -> Llama:
    config = LlamaConfig.from_dict(shape.config)
    keys = iter(jax.random.split(jax.random.key(0), len(BLOCK_LINEARS) + 2))
    layers: dict[str, Any] = {
        name.removesuffix(".weight"): {"weight": jnp.ones((config.num_hidden_layers, length), jnp.bfloat16)}
        for name, length in config.block_vectors().items()
    }
    for linear in BLOCK_LINEARS:
        out_features, in_features = config.linear_shape(linear)
        kernel = _normal(next(keys), (config.num_hidden_layers, in_features, out_features))
        group, name = linear.split(".")
        layers.setdefault(group, {})[name] = {"kernel": quantize(kernel)}
    table = (config.vocab_size, config.hidden_size)
    model = Llama(
        config,
        {
            "embed_tokens": {"weight": _normal(next(keys), table)},
            "layers": layers,
            "norm": {"weight": jnp.ones((config.hidden_size,), jnp.bfloat16)},
            "lm_head": {"weight": _normal(next(keys), table)},
        },
    )
    add_lora(model, rank=_RANK, alpha=_ALPHA, targets=BLOCK_LINEARS, rngs=nnx.Rngs(0))
    model.remat = False
    return model


@functools.partial(jax.jit, static_argnums=1)
def _normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Of the standard deviation that HF initializes with."""
    return jax.random.normal(key, shape, jnp.bfloat16) * 0.02


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
