"""What is left when a run ends: report.json, loss.png, and the summary it prints."""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from qlora_jax.training.config import TrainConfig
from qlora_jax.training.progress import clock_face
from qlora_jax.training.result import Result, Sample
from qlora_jax.training.run_folder import RunFolder, write_atomically

SMOOTHING = 0.8  # weight of the past in the smoothed training loss


def write_report(folder: RunFolder, config: TrainConfig, result: Result) -> None:
    """Writes report.json (the result, every evaluation, the samples) and loss.png."""
    metrics = folder.read_metrics()
    report: dict[str, Any] = {"model": config.model.path, "data": config.data.path, **asdict(result)}
    report["eval_loss"] = {line["step"]: line["eval_loss"] for line in metrics if "eval_loss" in line}
    report = {key: value for key, value in report.items() if value is not None}
    write_atomically(folder.report_path, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    plot_losses(folder, title=folder.path.name, metrics=metrics)


def plot_losses(folder: RunFolder, *, title: str, metrics: Sequence[Mapping[str, Any]]) -> None:
    """Draws loss.png: training loss of each step, its smoothed course, and the evaluations."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    trained = [(line["step"], line["loss"]) for line in metrics if "loss" in line]
    evaluated = [(line["step"], line["eval_loss"]) for line in metrics if "eval_loss" in line]
    figure = Figure(figsize=(7.2, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if trained:
        steps, losses = zip(*trained, strict=True)
        axes.plot(steps, losses, ".", color="#9db8d9", markersize=5, label="training loss, each step")
        axes.plot(steps, smooth(losses), color="#2b5f9e", linewidth=2, label="training loss, smoothed")
    if evaluated:
        steps, losses = zip(*evaluated, strict=True)
        axes.plot(steps, losses, "o--", color="#c8501e", linewidth=1.2, markersize=6, label="held-out loss")
        for index in sorted({0, len(steps) - 1}):
            axes.annotate(
                f"{losses[index]:.2f}",
                (steps[index], losses[index]),
                xytext=(0, 8),
                textcoords="offset points",
                color="#c8501e",
                fontweight="bold",
                ha="left" if index == 0 else "right",
            )
    axes.set_title(title, loc="left", fontweight="bold", parse_math=False)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss per trained token (nats)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.03, y=0.12)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if trained or evaluated:
        axes.legend(frameon=False, loc="upper right")
    with warnings.catch_warnings():
        # A folder's name may be written in a script that the font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
        figure.savefig(folder.plot_path)


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average, freed of the pull towards 0 at the start (as Adam's moments are)."""
    average, weight, smoothed = 0.0, 0.0, []
    for value in values:
        average = SMOOTHING * average + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        smoothed.append(average / weight)
    return smoothed


def summary(folder: RunFolder, result: Result) -> str:
    """The last lines of a run: losses before and after, time, and where everything is."""
    lines = []
    first, last = result.first_eval_loss, result.last_eval_loss
    if first is not None and last is not None:
        lines.append(f"held-out loss  {first:.4f} before, {last:.4f} after  ({(last - first) / first:+.1%})")
    pace = f"{result.trained_tokens:,} trained tokens in {clock_face(result.seconds)}"
    steps = f"steps {result.resumed_at + 1} to {result.steps}" if result.resumed_at else f"{result.steps} steps"
    lines.append(f"trained        {steps}, {pace}")
    lines.append(f"adapter        {folder.adapter}   (PEFT format)")
    lines.append(f"loss curve     {folder.plot_path}")
    lines.append(f"all numbers    {folder.report_path}, {folder.metrics_path}")
    return "\n".join(lines)


def sample_table(samples: Sequence[Sample]) -> str:
    """The same held-out prompts before and after, one under the other."""
    blocks = []
    for sample in samples:
        rows = [("prompt", sample.prompt), ("before", sample.before), ("after", sample.after)]
        rows.append(("reference", sample.reference))
        blocks.append("\n".join(f"  {name:<10} {' '.join(text.split())}" for name, text in rows))
    return "\n\n".join(blocks)
