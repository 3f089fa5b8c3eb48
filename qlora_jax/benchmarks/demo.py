"""Times the training step of the demo, with the compiled kernels and without."""

import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_jax.benchmarks.timing import spread
from qlora_jax.nf4 import use_kernels
from qlora_jax.training import demo
from qlora_jax.training.settings import Setting, build_config, find_config, read_yaml

# What the demo is run with: name, kernels, quant.type.
_RUNS = (("ffi", "ffi", "nf4"), ("xla", "xla", "nf4"), ("dense", "auto", "none"))


def time_demo(*, quick: bool = False) -> list[dict[str, Any]]:
    """Times the demo's optimizer step: QLoRA with the compiled kernels, with XLA's, and 16-bit LoRA ("dense").

    The three run one after another (`quick`: ours alone), in folders of their own that are removed. The first step
    compiles and is not counted.

    Returns:
      For each run `name`, `steps` counted, `seconds` of a step (`median`, `low`, `high`), and `ratio`, ours / this one.

    Raises:
      UserError: the demo's model cannot be fetched.
    """
    steps = 3 if quick else 8
    times = {}
    with tempfile.TemporaryDirectory() as scratch:
        rows, _ = demo.write_demo_rows(Path(scratch))
        model = demo.fetch_demo_model(lambda line: print(line, file=sys.stderr))
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
            print(f"demo, {name}: {steps + 1} steps", file=sys.stderr)
            with use_kernels(kernels):
                times[name] = _step_seconds(settings)
    ours = statistics.median(times["ffi"])
    return [
        {"name": name, "steps": len(own), "seconds": spread(own), "ratio": ours / statistics.median(own)}
        for name, own in times.items()
    ]


def _step_seconds(settings: Mapping[str, Any]) -> list[float]:
    """Seconds of each optimizer step after the first, of the demo's configuration with other settings."""
    from rich.console import Console

    from qlora_jax.training.loop import run_training
    from qlora_jax.training.progress import Progress
    from qlora_jax.training.run_folder import RunFolder

    ends: list[float] = []

    class Clock(Progress):
        def step(self, step: int, **values: Any) -> None:
            ends.append(time.perf_counter())
            super().step(step, **values)

    own = {key: Setting(value, "bench") for key, value in settings.items()}
    config = build_config(read_yaml(find_config(demo.CONFIG)) | own)
    folder = RunFolder(config.output_dir)
    folder.create(config)
    run_training(config, folder, progress=Clock(console=Console(file=sys.stderr)))
    return [end - begin for begin, end in itertools.pairwise(ends)]
