"""A run's loss curves, summed as in UMT's Tables 2 and 3."""

from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

from distill.figures import save_figure
from distill.training.metrics import read_metrics


def plot_losses(folder: Path) -> Path:
    """Draw RUN/plots/losses.png from RUN/metrics.jsonl and return its path."""
    rows = read_metrics(folder / "metrics.jsonl")
    figure, panels = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for panel, kind, title in zip(
        panels,
        ("token", "patches"),
        ("token loss $L^m$ (MSE)", "feature loss $L^f$ (by role)"),
        strict=True,
    ):
        keys = [
            key
            for key in (rows[0] if rows else {})
            if key.startswith("loss.") and key.endswith(kind)
        ]
        for key in sorted(keys, key=lambda key: key.count(".")):
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            if not points:
                continue
            steps, values = zip(*points, strict=True)
            total = key == f"loss.{kind}"
            name = "sum" if total else key.split(".")[1]
            label = f"{name}: {values[0]:.3f} → {values[-1]:.3f}"
            panel.plot(
                steps,
                values,
                label=label,
                color="black" if total else None,
                linewidth=2.2 if total else 1.4,
            )
        panel.set(title=title, xlabel="step", ylabel="loss")
        panel.grid(alpha=0.3)
        if keys:
            panel.legend(frameon=False)
            panel.set_ylim(bottom=0)
    return save_figure(figure, folder / "plots" / "losses.png")
