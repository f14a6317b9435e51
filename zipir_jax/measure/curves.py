"""What trainings logged of themselves: their losses over the time that they took."""

import json
from pathlib import Path

LOSSES = ("loss", "l1", "lpips", "adversarial", "discriminator")  # of the metrics, those to look at


def read_run(folder: Path) -> dict:
    """{"run": its name, "steps", "images", "minutes" of training, "points": [{"step", "minutes", losses}]} of a run.

    A point is the mean over the steps since the one before. Raises ValueError for a folder without a log.
    """
    path = Path(folder) / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{folder}: no training ran here (metrics.jsonl is missing)")
    points, images, before = [], 0.0, 0.0
    for line in path.read_text().splitlines():
        values = json.loads(line)
        images += values["images_per_second"] * (values["seconds"] - before)
        before = values["seconds"]
        losses = {name: values[name] for name in LOSSES if name in values}
        points.append({"step": values["step"], "minutes": round(before / 60, 2)} | losses)
    if not points:
        raise ValueError(f"{path} holds no step")
    last = points[-1]
    return {
        "run": Path(folder).name,
        "steps": last["step"],
        "images": round(images),
        "minutes": last["minutes"],
        "points": points,
    }


def cells(run: dict) -> dict:
    """A row of the table: the run, and its losses at the end."""
    last = {name: value for name, value in run["points"][-1].items() if name in LOSSES}
    return run | {"last": ", ".join(f"{name} {value:.3g}" for name, value in last.items())}
