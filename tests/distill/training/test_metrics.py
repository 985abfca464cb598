"""What a run writes about itself."""

import json

import pytest

from distill.training.metrics import MetricsLog, read_metrics
from distill.training.plots import plot_losses


def row(step: int, **more: float) -> dict:
    losses = {"loss": 2.0 / step, "loss.token": 1.0 / step, "loss.patches": 1.0 / step}
    return {
        "step": step,
        "epoch": step / 10,
        "lr": 0.1,
        "images_per_second": 50.0,
        **losses,
        **more,
    }


def write(folder, start: int, steps: list[int], **more: float) -> None:
    with MetricsLog(folder, 100, start) as log:
        for step in steps:
            log.write(row(step, **more))


def test_every_line_is_one_json_object_and_values_that_json_cannot_hold_are_null(tmp_path):
    write(tmp_path, 0, [1, 2], grad_norm=float("nan"))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert json.loads(lines[0])["grad_norm"] is None and "NaN" not in lines[0]


def test_resuming_drops_lines_after_the_checkpoint_and_a_half_written_one(tmp_path):
    write(tmp_path, 0, [1, 2, 3, 4])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "los')
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    write(tmp_path, 2, [3, 4, 5])
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_a_console_line_names_each_teachers_losses(tmp_path):
    with MetricsLog(tmp_path, 100, 0) as log:
        line = log.line(
            row(10) | {"loss.clip.token": 0.25, "loss.clip.patches": 0.5, "loss.mae.patches": 0.125}
        )
    assert (
        "step 10/100" in line
        and "clip 0.250+0.500" in line
        and "mae 0.125" in line
        and "50 images/s" in line
    )


@pytest.mark.parametrize("rows", [0, 1, 30])
def test_the_loss_plot_is_drawn_for_any_number_of_lines(tmp_path, rows):
    parts = {"loss.clip.token": 0.3, "loss.clip.patches": 0.2}
    write(tmp_path, 0, list(range(1, rows + 1)), **parts)
    path = plot_losses(tmp_path)
    assert path == tmp_path / "plots" / "losses.png" and path.stat().st_size > 5000
