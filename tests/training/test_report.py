"""What is left when a run ends."""

import itertools
import json

import numpy as np
import pytest
from matplotlib.image import imread

from qlora_jax.training.config import TrainConfig
from qlora_jax.training.report import plot_losses, sample_table, smooth, summary, write_report
from qlora_jax.training.result import Result, Sample
from qlora_jax.training.run_folder import RunFolder

SAMPLE = Sample(prompt="What does\n`x` do?", reference="Return x.", before="The function\nx ...", after="Return é.")
RESULT = Result(steps=4, seconds=75.2, trained_tokens=4567, first_eval_loss=4.0, last_eval_loss=3.0, samples=[SAMPLE])


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "a-run")
    folder.path.mkdir()
    folder.append_metrics({"step": 0, "eval_loss": 4.0})
    for step in range(1, 5):
        folder.append_metrics({"step": step, "loss": 4.0 - step / 5, "eval_loss": 3.0 if step == 4 else None})
    return folder


def colours(path) -> np.ndarray:
    image = imread(path)
    assert image.shape[0] > 400
    assert image.shape[1] > 800
    return image[..., :3]


def has_colour(path, colour: str) -> bool:
    wanted = np.array([int(colour[index : index + 2], 16) for index in (1, 3, 5)]) / 255
    return bool((np.abs(colours(path) - wanted).max(axis=-1) < 0.02).any())


def test_the_report_holds_the_numbers_and_the_answers(folder):
    write_report(folder, TrainConfig(model={"path": "base"}), RESULT)
    report = json.loads(folder.report_path.read_text())
    assert report["model"] == "base"
    assert (report["steps"], report["trained_tokens"], report["seconds"]) == (4, 4567, 75.2)
    assert report["eval_loss"] == {"0": 4.0, "4": 3.0}
    assert report["samples"][0]["after"] == "Return é."
    assert None not in report.values()


def test_the_plot_shows_training_and_held_out_loss(folder):
    write_report(folder, TrainConfig(), RESULT)
    assert has_colour(folder.plot_path, "#2b5f9e")
    assert has_colour(folder.plot_path, "#c8501e")


def test_a_run_without_evaluation_or_with_one_step_is_drawn_too(tmp_path):
    folder = RunFolder(tmp_path)
    plot_losses(folder, title="nothing", metrics=[])
    plot_losses(folder, title="one", metrics=[{"step": 1, "loss": 2.0}])
    assert not has_colour(folder.plot_path, "#c8501e")
    plot_losses(folder, title="evaluated only", metrics=[{"step": 0, "eval_loss": 2.0}])
    assert has_colour(folder.plot_path, "#c8501e")


@pytest.mark.parametrize("title", ["日本", "cost$_{$", "a\\b"])
def test_any_folder_name_is_a_title(folder, title):
    plot_losses(folder, title=title, metrics=[{"step": 0, "eval_loss": 2.0}])
    assert has_colour(folder.plot_path, "#c8501e")


def test_smoothing_is_unbiased_at_the_start():
    assert smooth([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    assert smooth([5.0]) == [5.0]
    rising = smooth([0.0, 1.0, 1.0, 1.0])
    assert all(a < b < 1 for a, b in itertools.pairwise(rising))


def test_the_summary_compares_before_and_after_and_says_where_things_are(folder):
    text = summary(folder, RESULT)
    assert "4.0000 before, 3.0000 after  (-25.0%)" in text
    assert "4 steps, 4,567 trained tokens in 1:15" in text
    for path in (folder.plot_path, folder.adapter, folder.report_path):
        assert str(path) in text
    assert "held-out" not in summary(folder, Result(steps=1))
    # Tokens and time are this session's.
    resumed = summary(folder, Result(steps=9, resumed_at=4, trained_tokens=70, seconds=5.0))
    assert "trained        steps 5 to 9, 70 trained tokens in 0:05" in resumed


def test_answers_are_shown_one_under_the_other():
    lines = sample_table([SAMPLE, SAMPLE]).splitlines()
    assert lines[:4] == [
        "  prompt     What does `x` do?",
        "  before     The function x ...",
        "  after      Return é.",
        "  reference  Return x.",
    ]
    assert len(lines) == 9
