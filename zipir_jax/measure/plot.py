"""Figures of what was measured. Needs matplotlib (extra `plots`)."""

from pathlib import Path

from matplotlib.figure import Figure

from zipir_jax.config import TASKS
from zipir_jax.files import replacing
from zipir_jax.metrics.scoring import BASELINE, UNDIFFUSED, describe

MEASURES = {
    "psnr": "PSNR, dB (higher is better)",
    "lpips_vgg16": "LPIPS-VGG16 (lower is better)",
    "lpips_alexnet": "LPIPS-AlexNet (lower is better)",
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
BASELINE_STYLES = {BASELINE: ("0.45", (0, (6, 3))), UNDIFFUSED: ("black", (0, (2, 2)))}
TASK_WIDTH, HEIGHT = 720, 1440  # pixels
DPI = 150


def plot_samplings(path: Path, rows: list[dict]) -> None:
    """Draw rows of `measure.sampling.rows` into a PNG file, 720 pixels wide a task and 1440 high.

    A column a task, a panel each for PSNR and both LPIPS, a line a sampler over the steps, or, where the rows have
    several fidelities, a line a sampler and number of steps over the fidelity. Baselines are dashed lines; one that
    is far from everything else is named with its number, so that the scale is the samplers'.
    """
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    sampled = [row for row in rows if row["sampler"] is not None]
    across = "fidelity" if len({row["fidelity"] for row in sampled}) > 1 else "steps"
    lines = list(dict.fromkeys(_line(row, across) for row in sampled))
    figure = Figure((len(tasks) * TASK_WIDTH / DPI, HEIGHT / DPI), dpi=DPI, layout="constrained")
    panels = figure.subplots(len(MEASURES), len(tasks), squeeze=False, sharex=True)
    handles = {}
    for column, task in enumerate(tasks):
        panels[0, column].set_title(f"{task}\n{describe(TASKS[task])}", fontsize=9)
        panels[-1, column].set_xlabel(across)
        panels[-1, column].set_xticks(sorted({row[across] for row in sampled}))
        of_task = [row for row in rows if row["task"] == task]
        for panel, (measure, label) in zip(panels[:, column], MEASURES.items(), strict=True):
            panel.set_ylabel(label, fontsize=9)
            panel.grid(color="0.9")
            for index, line in enumerate(lines):
                points = sorted((row[across], row[measure]) for row in of_task if _line(row, across) == line)
                colour, marker = STYLES[index % len(STYLES)]
                (handles[line],) = panel.plot(
                    *zip(*points, strict=True), color=colour, marker=marker, alpha=0.85
                )
            low, high = panel.get_ylim()
            for method, (colour, dashes) in BASELINE_STYLES.items():
                (value,) = (row[measure] for row in of_task if row["method"] == method)
                if 2 * low - high < value < 2 * high - low:
                    handles[method] = panel.axhline(value, color=colour, linestyle=dashes)
                else:
                    above = value > high
                    where = {
                        "x": 0.98,
                        "y": 0.96 if above else 0.04,
                        "va": "top" if above else "bottom",
                        "ha": "right",
                    }
                    text = f"{method}: {value:.4g} {'↑' if above else '↓'}"
                    panel.text(**where, s=text, color=colour, fontsize=8, transform=panel.transAxes)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=1 + 2 * len(tasks), fontsize=8)
    with replacing(path) as file:
        figure.savefig(file, format="png")


def _line(row, across):
    """What a row's line in the plot is called; None for a baseline."""
    if row["sampler"] is None:
        return None
    if across == "fidelity":
        return f"{row['sampler']}, {row['steps']} steps"
    return row["sampler"] + (f", fidelity {row['fidelity']}" if row["fidelity"] else "")
