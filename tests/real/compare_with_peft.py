"""Finetunes SmolLM2-135M-Instruct on the same rows here and in transformers + PEFT + bitsandbytes, and compares losses.

    python tests/real/compare_with_peft.py --seeds 0 1 2 --steps 160 --out tests/benchmarks/FILE.json

Needs the `interop` extra. Runs that FILE holds already are not repeated.

Both sides train rank 16, alpha 32 adapters on all seven linears of each block: AdamW at 2e-4 after 10 warm-up steps,
clip 1.0, batches of 8 unpacked rows of at most 96 tokens, loss on the answers. Adapters start from, and batches follow,
each side's own random numbers: compare medians over seeds.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from safetensors.numpy import save_file

from qlora_jax.checkpoints import open_checkpoint
from qlora_jax.data.docstrings import build_docstring_rows
from qlora_jax.data.formats import read_conversations
from qlora_jax.data.rendering import Renderer
from qlora_jax.training.demo import fetch_demo_model

SEQ_LEN = 96
EVAL_ROWS = 256
SETTINGS = {
    "train.packing": "false",
    "train.batch_size": 8,
    "train.seq_len": SEQ_LEN,
    "lora.rank": 16,
    "lora.alpha": 32,
    "optim.learning_rate": 2e-4,
    "optim.warmup_steps": 10,
    "optim.clip": 1.0,
}


def prepare(folder: Path) -> None:
    """Writes `folder/model` (an HF folder) and `folder/rows`, which both sides read."""
    model, rows = folder / "model", folder / "rows"
    model.mkdir(parents=True)
    rows.mkdir()
    source = open_checkpoint(fetch_demo_model(say=lambda line: print(line, file=sys.stderr)))
    tokenizer = source.tokenizer()
    tokenizer.save_pretrained(model)
    config = {**source.config, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (model / "config.json").write_text(json.dumps(config))
    tensors = {name: source.read(name) for name in source.names()}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    renderer = Renderer(tokenizer)
    for name, part in zip(("train", "eval"), build_docstring_rows(), strict=True):
        path = rows / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in part))
        lengths = [len(renderer.render(conversation).input_ids) for conversation in read_conversations(path)]
        fitting = [row for row, length in zip(part, lengths, strict=True) if length <= SEQ_LEN]
        fitting = fitting if name == "train" else fitting[:EVAL_ROWS]
        path.write_text("".join(json.dumps(row) + "\n" for row in fitting))


def train_here(folder: Path, weights: str, seed: int, steps: int, eval_at: list[int]) -> dict[int, float]:
    """Eval losses by step of `python -m qlora_jax.train`; `weights` is "nf4" or "bf16"."""
    run = folder / f"run-{weights}-{seed}-{steps}"
    settings = {
        **SETTINGS,
        "model.path": folder / "model",
        "data.path": folder / "rows" / "train.jsonl",
        "data.eval_path": folder / "rows" / "eval.jsonl",
        "quant.type": "nf4" if weights == "nf4" else "none",
        "train.steps": steps,
        "eval.every": min(step for step in eval_at if step),
        "eval.batch_size": 32,
        "checkpoint.every": steps,
        "seed": seed,
        "output_dir": run,
    }
    command = [sys.executable, "-P", "-m", "qlora_jax.train", *(f"{key}={value}" for key, value in settings.items())]
    _run(command)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["eval_loss"] for line in lines if line.get("eval_loss") and line["step"] in eval_at}


def train_with_peft(folder: Path, weights: str, seed: int, steps: int, eval_at: list[int]) -> dict[int, float]:
    """Eval losses by step of peft_peer.py, in a process of its own: torch and JAX share no threads."""
    command = [sys.executable, Path(__file__).with_name("peft_peer.py"), "--weights", weights, "--seed", seed]
    command += ["--model", folder / "model", "--rows", folder / "rows", "--steps", steps, "--eval-at", *eval_at]
    output = _run([str(word) for word in command])
    result = json.loads(output.splitlines()[-1])
    return {int(step): loss for step, loss in result["eval_loss"].items()}


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(
            f"{' '.join(command)} ended with code {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        )
    return done.stdout


def versions() -> dict[str, str]:
    names = ("jax", "flax", "optax", "torch", "transformers", "peft", "bitsandbytes")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--weights", nargs="+", default=["nf4", "bf16"], choices=["nf4", "bf16"])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    eval_at = sorted({0, min(40, arguments.steps), arguments.steps})
    sides = {"qlora_jax": train_here, "peft": train_with_peft}
    runs: list[dict] = _earlier_runs(arguments.out, arguments.steps)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "both"
        prepare(folder)
        for weights in arguments.weights:
            for seed in arguments.seeds:
                for side, train in sides.items():
                    if any((run["side"], run["weights"], run["seed"]) == (side, weights, seed) for run in runs):
                        continue
                    losses = train(folder, weights, seed, arguments.steps, eval_at)
                    runs.append({"side": side, "weights": weights, "seed": seed, "eval_loss": losses})
                    print(json.dumps(runs[-1]), flush=True)
                    write_report(arguments.out, runs, arguments.steps)


def write_report(path: Path, runs: list[dict], steps: int) -> None:
    """Writes the runs so far with the medians over their seeds, and our losses divided by PEFT's."""
    eval_at = sorted(runs[0]["eval_loss"])
    medians: dict[str, dict[int, float]] = {}
    for run in runs:
        same = [r["eval_loss"] for r in runs if (r["side"], r["weights"]) == (run["side"], run["weights"])]
        medians[f"{run['side']}/{run['weights']}"] = {
            step: statistics.median(losses[step] for losses in same) for step in eval_at
        }
    report = {
        "command": f"python tests/real/compare_with_peft.py --steps {steps} --out {path.name}",
        "settings": {**SETTINGS, "eval_rows": EVAL_ROWS, "steps": steps},
        "versions": versions(),
        "median_eval_loss": medians,
        "ours_over_peft": {
            weights: {
                step: medians[f"qlora_jax/{weights}"][step] / medians[f"peft/{weights}"][step] for step in eval_at
            }
            for weights in ("nf4", "bf16")
            if f"qlora_jax/{weights}" in medians and f"peft/{weights}" in medians
        },
        "runs": runs,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


def _earlier_runs(path: Path, steps: int) -> list[dict]:
    if not path.exists():
        return []
    report = json.loads(path.read_text())
    if report["settings"]["steps"] != steps:
        raise SystemExit(f"{path} holds runs of {report['settings']['steps']} steps, not {steps}")
    for run in report["runs"]:
        run["eval_loss"] = {int(step): loss for step, loss in run["eval_loss"].items()}
    return report["runs"]


if __name__ == "__main__":
    main()
