"""The table and the picture of a benchmark."""

from pathlib import Path

import matplotlib
from rich.text import Text

from contract.tables import print_table
from distill.figures import save_figure
from export.agreement import TOLERANCE

matplotlib.use("agg")
import matplotlib.pyplot as plt


def show(rows: list[dict]) -> None:
    """Print a row for each graph, batch and runtime."""
    heads = (
        "graph",
        "batch",
        "runtime",
        "p50 ms",
        "p99 ms",
        "images/s",
        "over torch eager",
        "least cosine",
    )
    table = []
    for row in rows:
        speedup = f"{row['speedup']:.2f}x" if row["speedup"] else ""
        cosine = "" if row["cosine"] is None else f"{row['cosine']:.6f}"
        remark = ()
        if row["agrees"] is False:
            remark = (Text(f"BELOW {TOLERANCE[row['precision']]}: cosine {cosine}", "red"),)
        cells = (
            row["graph"],
            str(row["batch"]),
            row["runtime"],
            f"{row['p50_ms']:.2f}",
            f"{row['p99_ms']:.2f}",
            f"{row['images_per_second']:.1f}",
            speedup,
            cosine,
            *remark,
        )
        table.append(cells)
    print_table(heads, table, left=("runtime",))


def draw(path: Path, rows: list[dict]) -> Path:
    """Draw images per second by batch, one panel per graph and one line per runtime."""
    graphs = list(dict.fromkeys(row["graph"] for row in rows))
    columns = min(3, len(graphs))
    lines = -(-len(graphs) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(6.5 * columns, 4.2 * lines), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(graphs) :]:
        axis.set_axis_off()
    for axis, graph in zip(axes.flat, graphs, strict=False):
        for runtime in dict.fromkeys(row["runtime"] for row in rows):
            points = [
                (r["batch"], r["images_per_second"])
                for r in rows
                if (r["graph"], r["runtime"]) == (graph, runtime)
            ]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=runtime)
        axis.set(title=graph, xlabel="batch", ylabel="images/s", xscale="log")
        axis.set_xticks(
            sorted({r["batch"] for r in rows}), [str(b) for b in sorted({r["batch"] for r in rows})]
        )
        axis.minorticks_off()  # on a logarithmic axis they are labelled too
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=8)
    return save_figure(figure, path)
