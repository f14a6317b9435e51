"""`metrics.jsonl`: what a run measured of itself, a JSON object a line."""

import json
import time
from pathlib import Path

from zipir_jax.files import replacing

LOG_EVERY = 20  # steps


class MetricsLog:
    """Collects the metrics of each step and writes their means, a line per LOG_EVERY steps.

    A line holds "step" (the last one that it counts), each metric's mean over the steps that have it, the data's
    "images_per_second", and "seconds" of training since step 0, those before a resume included.
    """

    def __init__(self, path: Path, step: int, batch_size: int):
        """Goes on from `step`: lines of later steps, which were never saved, and torn ones are dropped."""
        self._path, self._batch_size, self._seconds = Path(path), batch_size, 0.0
        kept = []
        for line in self._path.read_text().splitlines() if self._path.exists() else ():
            try:
                values = json.loads(line)
            except ValueError:  # the writer was killed
                continue
            if values["step"] <= step:
                kept.append(line + "\n")
                self._seconds = values["seconds"]
        with replacing(self._path) as file:
            file.write("".join(kept).encode())
        self._metrics, self._since = [], time.monotonic()

    def add(self, step: int, metrics: dict[str, float]) -> None:
        """Count the metrics of one step, the one after the last."""
        self._step = step
        self._metrics.append(metrics)
        if step % LOG_EVERY == 0:
            self.write()

    def write(self) -> None:
        """Append the line of the steps since the last one, if there were any."""
        if not self._metrics:
            return
        now = time.monotonic()
        line = {"step": self._step}
        for name in dict.fromkeys(name for metrics in self._metrics for name in metrics):
            values = [metrics[name] for metrics in self._metrics if name in metrics]
            line[name] = float(f"{sum(values) / len(values):.6g}")
        images = len(self._metrics) * self._batch_size
        line["images_per_second"] = round(images / (now - self._since), 2)
        self._seconds += now - self._since
        line["seconds"] = round(self._seconds, 2)
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self._metrics, self._since = [], now
