"""A run's loss curves, summed as in UMT's Tables 2 and 3, and its monitor's scores."""

from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

from distill.figures import save_figure
from distill.training.metrics import read_metrics


def plot_monitor(folder: Path) -> Path | None:
    """Draw RUN/plots/monitor.png, what the monitor scored by step, and return its path; None where
    nothing was.
    """
    rows = read_metrics(folder / "metrics.jsonl")
    names = dict.fromkeys(
        name for row in rows for name in row if name.startswith("monitor.") and name[-4:-1] == "top"
    )
    if not names:
        return None
    figure, axes = plt.subplots(figsize=(6, 4.5), layout="constrained")
    for name in names:
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        steps, values = zip(*points, strict=True)
        best, step = max((value, -step) for step, value in points)
        title = name.removeprefix("monitor.").replace(".", " ")
        axes.plot(steps, values, marker=".", label=f"{title}: best {best:.3f} at step {-step}")
    axes.set(title="scores while training", xlabel="step", ylabel="accuracy")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return save_figure(figure, folder / "plots" / "monitor.png")


def plot_losses(folder: Path) -> Path:
    """Draw RUN/plots/losses.png from RUN/metrics.jsonl and return its path."""
    rows = read_metrics(folder / "metrics.jsonl")
    names = [key for key in (rows[0] if rows else {}) if key.split(".")[0] == "loss"]
    kinds = {
        "token loss $L^m$ (MSE)": [name for name in names if name.endswith(".token")],
        "feature loss $L^f$ (by role)": [name for name in names if name.endswith(".patches")],
    }
    others = [name for name in names if not name.endswith((".token", ".patches"))]
    if others != ["loss"] or not any(kinds.values()):  # a total alone adds nothing to its parts
        kinds["other losses"] = others
    kinds = {title: keys for title, keys in kinds.items() if keys} or {"loss": []}
    figure, panels = plt.subplots(
        1, len(kinds), figsize=(6 * len(kinds), 4.5), squeeze=False, layout="constrained"
    )
    for panel, (title, keys) in zip(panels[0], kinds.items(), strict=True):
        for key in sorted(keys, key=lambda key: key.count(".")):
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            if not points:
                continue
            steps, values = zip(*points, strict=True)
            total = key in ("loss", "loss.token", "loss.patches")
            name = "sum" if total else ".".join(key.split(".")[1:]).removesuffix(".token")
            panel.plot(
                steps,
                values,
                label=f"{name.removesuffix('.patches')}: {values[0]:.3f} → {values[-1]:.3f}",
                color="black" if total else None,
                linewidth=2.2 if total else 1.4,
            )
        panel.set(title=title, xlabel="step", ylabel="loss")
        panel.grid(alpha=0.3)
        if keys:
            panel.legend(frameon=False)
            panel.set_ylim(bottom=0)
    return save_figure(figure, folder / "plots" / "losses.png")
