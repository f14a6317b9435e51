"""Figures of what was measured. Needs matplotlib (extra `plots`)."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from zipir_jax.config import TASKS
from zipir_jax.files import replacing
from zipir_jax.measure.curves import LOSSES
from zipir_jax.metrics.scoring import BASELINE, UNDIFFUSED, describe

# What each panel shows: its label, and the least that it spans, so that differences nobody could see look small.
MEASURES = {
    "psnr": ("PSNR, dB (higher is better)", 0.2),
    "lpips_vgg16": ("LPIPS-VGG16 (lower is better)", 0.02),
    "lpips_alexnet": ("LPIPS-AlexNet (lower is better)", 0.02),
}
# Okabe and Ito's colours, which people of any colour vision tell apart; in black and white the markers do.
STYLES = (
    ("#0072B2", "o"),
    ("#D55E00", "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#E69F00", "v"),
    ("#56B4E9", "P"),
)
TASK_WIDTH, HEIGHT = 720, 1440  # pixels
DPI = 150


def plot_samplings(path: Path, rows: list[dict]) -> None:
    """Write `samplings_figure` to a PNG file, 720 pixels wide a task and 1440 high."""
    with replacing(path) as file:
        samplings_figure(rows).savefig(file, format="png")


def plot_curves(path: Path, runs: list[dict]) -> None:
    """Write `curves_figure` to a PNG file, 720 pixels wide a run and 720 high."""
    with replacing(path) as file:
        curves_figure(runs).savefig(file, format="png")


def curves_figure(runs: list[dict]) -> Figure:
    """Runs of `measure.curves.read_run` as a figure: a panel a run, its losses over minutes of training."""
    side = TASK_WIDTH / DPI
    figure = Figure((len(runs) * side, side), dpi=DPI, layout="constrained")
    for panel, run in zip(figure.subplots(1, len(runs), squeeze=False)[0], runs, strict=True):
        panel.set_title(f"{run['run']}: {run['steps']} steps, {run['images']} crops", fontsize=9)
        panel.set_xlabel("minutes")
        panel.set_yscale("log")
        panel.grid(color="0.9", which="both")
        for name, (colour, _) in zip(LOSSES, STYLES, strict=False):
            points = [(point["minutes"], point[name]) for point in run["points"] if point.get(name, 0) > 0]
            if points:
                panel.plot(*zip(*points, strict=True), label=name, color=colour)
        panel.legend(fontsize=8)
    return figure


def samplings_figure(rows: list[dict]) -> Figure:
    """Rows of `measure.sampling.rows` as a figure: a column a task, a panel each for PSNR and both LPIPS.

    A line a sampler over the steps; where the rows have several fidelities, a line a sampler and number of steps over
    the fidelity. Baselines are dashed lines; bicubic, where it is far from everything else, is a number at the edge
    instead, so that the scale is the samplers'.
    """
    sampled = [row for row in rows if row["sampler"] is not None]
    across = "fidelity" if len({row["fidelity"] for row in sampled}) > 1 else "steps"
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure = Figure((len(tasks) * TASK_WIDTH / DPI, HEIGHT / DPI), dpi=DPI, layout="constrained")
    panels = figure.subplots(len(MEASURES), len(tasks), squeeze=False, sharex=True)
    for column, task in zip(panels.T, tasks, strict=True):
        column[0].set_title(f"{task}\n{describe(TASKS[task])}", fontsize=9)
        column[-1].set_xlabel(across)
        column[-1].set_xticks(sorted({row[across] for row in sampled}))
        of_task = [row for row in rows if row["task"] == task]
        for panel, measure in zip(column, MEASURES, strict=True):
            _draw(panel, of_task, measure, across)
    handles = {line.get_label(): line for panel in panels.flat for line in panel.lines}
    figure.legend(
        handles=list(handles.values()), loc="outside lower center", ncols=1 + 2 * len(tasks), fontsize=8
    )
    return figure


def _draw(panel: Axes, rows, measure, across):
    label, span = MEASURES[measure]
    panel.set_ylabel(label, fontsize=9)
    panel.grid(color="0.9")
    lines, baselines = {}, {}
    for row in rows:
        if row["sampler"] is None:
            baselines[row["method"]] = row[measure]
        else:
            lines.setdefault(_label(row, across), []).append((row[across], row[measure]))
    for index, (name, points) in enumerate(lines.items()):
        again, style = divmod(index, len(STYLES))
        colour, marker = STYLES[style]
        dashes = "-." if again else "-"
        x, y = zip(*sorted(points), strict=True)
        panel.plot(x, y, label=name, color=colour, marker=marker, linestyle=dashes, alpha=0.8)
    panel.axhline(baselines[UNDIFFUSED], label=UNDIFFUSED, color="black", linestyle=(0, (2, 2)))
    low, high = panel.get_ylim()
    room = max(0.0, span - (high - low)) / 2
    low, high = low - room, high + room
    height, bicubic = high - low, baselines[BASELINE]
    if low - height < bicubic < high + height:
        panel.axhline(bicubic, label=BASELINE, color="0.45", linestyle=(0, (6, 3)))
        panel.set_ylim(min(low, bicubic - 0.05 * height), max(high, bicubic + 0.05 * height))
        return
    above = bicubic > high
    panel.set_ylim(low - 0.15 * height * (not above), high + 0.15 * height * above)  # a strip for the text
    panel.text(
        0.5,
        0.97 if above else 0.03,
        f"{BASELINE}: {bicubic:.4g} {'↑' if above else '↓'}",
        transform=panel.transAxes,
        horizontalalignment="center",
        verticalalignment="top" if above else "bottom",
        fontsize=9,
        color="0.35",
    )


def _label(row, across):
    """What the line that a row belongs to is called."""
    if across == "fidelity":
        return f"{row['sampler']}, {row['steps']} steps"
    return row["sampler"] + (f", fidelity {row['fidelity']}" if row["fidelity"] else "")
