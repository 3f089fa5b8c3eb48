"""Peak memory of importing a large checkpoint, and what an interruption leaves.

    python tests/checkpoints/measure_import.py --gigabytes 3

writes a random sharded LLaMA in bfloat16, and in a process each: loads it as NF4; converts it; converts it again,
killed halfway and started anew. Prints one JSON object; exit code 1 where memory went over the bound (what is kept in
4 bits and two of the largest tensors) or the second conversion's files are not those of the first.
"""

import argparse
import json
import math
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np

# What the allocator and buffers of files take beside tensors.
SLACK = 8 * 2**20


def write_checkpoint(folder: Path, gigabytes: float) -> None:
    """A LLaMA of about that size in shards; its largest tensor is a sixtieth of it, or less."""
    from qlora_jax.checkpoints.tensorwriter import TensorSpec, write_shards
    from qlora_jax.models.config import LlamaConfig

    layers = 20
    hidden = 64 * max(2, round(math.sqrt(gigabytes * 1e9 / 2 / layers / 13) / 64))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 2 * hidden,
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "head_dim": 64,
        "torch_dtype": "bfloat16",
    }
    shapes = LlamaConfig.from_dict(config).tensor_shapes()
    groups = [[TensorSpec(name, shape, "bfloat16")] for name, shape in shapes.items()]
    rng = np.random.default_rng(0)

    def make(index: int) -> dict[str, np.ndarray]:
        spec = groups[index][0]
        bits = rng.integers(0x3C00, 0x3D80, spec.shape, np.uint16)  # 0.008 to 0.06, of either sign
        bits |= rng.integers(0, 2, spec.shape, np.uint16) << 15
        return {spec.name: bits.view(ml_dtypes.bfloat16)}

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    write_shards(folder, groups, make, shard_bytes=int(gigabytes * 1e9 / 5))


def peak_bytes(key: str = "VmHWM") -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def measured(work) -> int:
    """Bytes by which resident memory grew at most."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = peak_bytes("VmRSS")
    work()
    return peak_bytes() - before


def child(what: str, source: Path, out: Path) -> None:
    """One import in this process, after a small one that brings in libraries and compiles."""
    import jax

    from qlora_jax.checkpoints import open_checkpoint
    from qlora_jax.checkpoints.conversion import convert
    from qlora_jax.models.loading import load_model

    if what == "stall":

        def progress(done: int, total: int) -> None:
            if done > total / 2:
                print("halfway", flush=True)
                signal.pause()

        convert(open_checkpoint(source), out, progress=progress)
        return
    with tempfile.TemporaryDirectory() as scratch:
        write_checkpoint(Path(scratch) / "small", 0.01)
        small = open_checkpoint(Path(scratch) / "small")
        _ = load_model(small) if what == "load" else convert(small, Path(scratch) / "out")
    checkpoint, kept = open_checkpoint(source), []
    if what == "load":
        peak = measured(lambda: kept.append(load_model(checkpoint)))
        from flax import nnx

        held = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(kept[0])))
    else:
        peak, held = measured(lambda: convert(checkpoint, out)), 0
    largest = max(math.prod(checkpoint.shape(name)) * 2 for name in checkpoint.names())
    print(json.dumps({"peak": peak, "kept": held, "largest": largest, "bound": held + 2 * largest + SLACK}))


def run(what: str, source: Path, out: Path) -> dict:
    command = [sys.executable, __file__, "--child", what, str(source), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return found | {"within": found["peak"] <= found["bound"]}


def interrupted_and_resumed(source: Path, out: Path, whole: Path) -> dict:
    """Kills a conversion in its middle, runs it again, and compares every file with those of an undisturbed one."""
    command = [sys.executable, __file__, "--child", "stall", str(source), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "halfway\n"
        process.kill()
    appeared = out.exists()
    run("convert", source, out)
    files = sorted(path.name for path in whole.iterdir())
    same = files == sorted(path.name for path in out.iterdir()) and all(
        (whole / name).read_bytes() == (out / name).read_bytes() for name in files
    )
    left = [path.name for path in out.parent.iterdir() if path.name.startswith(f".{out.name}")]
    return {"appeared half-written": appeared, "same files": same, "left behind": left}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--child", nargs=3, metavar=("WHAT", "SOURCE", "OUT"))
    options = parser.parse_args()
    if options.child:
        child(options.child[0], *map(Path, options.child[1:]))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "source"
        write_checkpoint(source, options.gigabytes)
        weights = list(source.glob("*.safetensors"))
        report = {
            "checkpoint": sum(file.stat().st_size for file in weights),
            "shards": len(weights),
            "load": run("load", source, Path(scratch)),
            "convert": run("convert", source, Path(scratch) / "whole"),
            "interrupted": interrupted_and_resumed(source, Path(scratch) / "again", Path(scratch) / "whole"),
        }
    print(json.dumps(report, indent=1))
    stopped = report["interrupted"]
    good = stopped["same files"] and not stopped["appeared half-written"] and not stopped["left behind"]
    return 0 if good and report["load"]["within"] and report["convert"]["within"] else 1


if __name__ == "__main__":
    sys.exit(main())
