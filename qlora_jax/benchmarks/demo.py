"""Times the training step of the demo, with the compiled kernels and without, and beside transformers' on its rows."""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_jax.benchmarks.peers import Peer
from qlora_jax.benchmarks.timing import ratios, spread
from qlora_jax.nf4 import use_kernels
from qlora_jax.training import demo
from qlora_jax.training.settings import Setting, build_config, find_config, read_yaml

if TYPE_CHECKING:
    from qlora_jax.checkpoints import Checkpoint
    from qlora_jax.training.config import TrainConfig
    from qlora_jax.training.preparation import Prepared

# What the demo is run with: name, kernels, quant.type.
_RUNS = (("ffi", "ffi", "nf4"), ("xla", "xla", "nf4"), ("dense", "auto", "none"))
# How transformers computes the loss: by itself, and, quicker where few tokens are trained, through the head at those
# alone.
_PEER_WAYS = ("peft", "peft_answers")
# Threads of the other process have gone to sleep after so long.
_REST = 0.03


def time_demo(*, quick: bool = False, peer: Peer | None = None) -> list[dict[str, Any]]:
    """Times the demo's optimizer step: QLoRA with the compiled kernels, with XLA's, and 16-bit LoRA ("dense").

    The three run one after another (`quick`: ours alone), in folders of their own that are removed. The first step
    compiles and is not counted.

    Args:
      quick: ours alone, few steps.
      peer: with the calls of peer_peft.py: after each of our steps it takes its own on the same rows, in both of its
        ways ("peft": the model computes the loss; "peft_answers": the head at the answers' tokens alone).

    Returns:
      For each run `name`, `steps` counted, `seconds` of a step (`median`, `low`, `high`), and `ratio`, ours / this one
      (of a peer's from the same turns, with quartiles).

    Raises:
      UserError: the demo's model cannot be fetched, or the peer's process ended.
      PeerError: the peer cannot take such a step.
    """
    steps = 3 if quick else 8
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        rows, _ = demo.write_demo_rows(Path(scratch))
        model = demo.fetch_demo_model(_say)
        for name, kernels, quant_type in _RUNS[:1] if quick else _RUNS:
            settings = {
                "output_dir": str(Path(scratch) / name),
                "model.path": str(model),
                "quant.type": quant_type,
                "data.path": str(rows),
                "data.eval_split": 0,
                "train.steps": steps + 1,
                "eval.samples": 0,
                "log.tensorboard": False,
            }
            _say(f"demo, {name}: {steps + 1} steps")
            with use_kernels(kernels):
                times |= _step_seconds(name, settings, peer if name == "ffi" else None, Path(scratch))
    ours = statistics.median(times["ffi"])
    gains = ratios(times, "ffi")
    return [
        {
            "name": name,
            "steps": len(own),
            "seconds": spread(own),
            "ratio": gains[name] if name in _PEER_WAYS else {"median": ours / statistics.median(own)},
        }
        for name, own in times.items()
    ]


def _step_seconds(name: str, settings: Mapping[str, Any], peer: Peer | None, scratch: Path) -> dict[str, list[float]]:
    """Seconds of each optimizer step after the first, of the demo's configuration with other settings; the peer's."""
    from rich.console import Console

    from qlora_jax.training.loop import run_training
    from qlora_jax.training.preparation import prepare
    from qlora_jax.training.progress import Progress
    from qlora_jax.training.run_folder import RunFolder

    own = {key: Setting(value, "bench") for key, value in settings.items()}
    config = build_config(read_yaml(find_config(demo.CONFIG)) | own)
    prepared = prepare(config)
    their_step = None if peer is None else _peer_steps(peer, config, prepared, scratch)
    times: dict[str, list[float]] = {name: []}
    began = 0.0

    class Clock(Progress):
        def step(self, step: int, **values: Any) -> None:
            nonlocal began
            if began:
                times[name].append(time.perf_counter() - began)
            super().step(step, **values)
            theirs = {} if their_step is None else their_step()
            if began:
                for way, seconds in theirs.items():
                    times.setdefault(way, []).append(seconds)
            began = time.perf_counter()

    folder = RunFolder(config.output_dir)
    folder.create(config)
    run_training(config, folder, progress=Clock(console=Console(file=sys.stderr)), prepared=prepared)
    return times


def _peer_steps(
    peer: Peer, config: "TrainConfig", prepared: "Prepared", scratch: Path
) -> Callable[[], dict[str, float]]:
    """Gets the peer ready; what is returned makes it take its steps on the next batch and says how long they took."""
    from qlora_jax.data.loader import Loader

    folder = scratch / "hf"
    _write_hf_folder(prepared.checkpoint, folder)
    peer.call(
        "build",
        folder=str(folder),
        config={},
        rank=config.lora.rank,
        alpha=config.lora.alpha,
        learning_rate=config.optim.learning_rate,
        clip=config.optim.clip,
    )
    train = config.train
    # The batches of the run, in its order.
    batches = Loader(
        prepared.dataset.train,
        batch_size=train.batch_size,
        seq_len=train.seq_len,
        packing=train.packing,
        seed=config.seed,
    )

    def step() -> dict[str, float]:
        batch = next(batches)
        lengths = (batch["segment_ids"] > 0).sum(axis=1)
        rows = [
            (batch["input_ids"][i, :length].tolist(), batch["loss_mask"][i, :length].tolist())
            for i, length in enumerate(lengths)
        ]
        peer.call("load_batch", rows=rows)
        seconds = {}
        for way in _PEER_WAYS:
            time.sleep(_REST)
            seconds[way] = float(peer.call("seconds", name=way, times=1))
        time.sleep(_REST)
        return seconds

    return step


def _write_hf_folder(checkpoint: "Checkpoint", folder: Path) -> None:
    """The model as transformers reads it, without a tokenizer."""
    from safetensors.numpy import save_file

    folder.mkdir()
    config = {**checkpoint.config, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: checkpoint.read(name) for name in checkpoint.names()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
