"""What a run measured of itself: `metrics.jsonl`, a JSON object a line, and the same for TensorBoard, with pictures."""

import json
import math
import time
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from tensorboardX import SummaryWriter

from zipir_jax.files import replacing

LOG_EVERY = 20  # steps


def now() -> float:
    """Seconds since 1970 by the clock on the wall, which goes on between the runs that one training is made of."""
    return time.time()


class MetricsLog:
    """Collects the metrics of each step and writes their means, a line per LOG_EVERY steps.

    A line holds "step" (the last one that it counts), each metric's mean over the steps that have it and where it is
    finite (left out if it never is), and of the same steps:

    images_per_second   over all devices
    step_seconds        mean time of a step
    data_wait           share of the time that the loop waited for data; the devices may be at the step before
    tflops_per_second   over all devices
    mfu                 FLOPs done / what the devices could do at their peak, if that is known

    and of the whole training:

    seconds             of training since step 0, those before a resume included; the time of steps that were lost,
                        since no checkpoint holds them, does not count
    wall_seconds        since the very first start by the clock on the wall, the time between two runs included
    goodput             seconds / wall_seconds
    time                when the line was written, seconds since 1970

    In a training of many processes one of them keeps the log.
    """

    def __init__(self, folder: Path, step: int, peak: float | None = None):
        """Goes on from `step` with `folder`/metrics.jsonl and `folder`/tensorboard.

        Lines of later steps, which were never saved, and torn ones are dropped; TensorBoard hides what it has of later
        steps. `peak` is the FLOP/s of all devices together, None where it is not known.
        """
        folder = Path(folder)
        self._path, self._peak, self._seconds, self._start = folder / "metrics.jsonl", peak, 0.0, now()
        kept = []
        for line in self._path.read_text().splitlines() if self._path.exists() else ():
            try:
                values = json.loads(line)
            except ValueError:  # the writer was killed
                continue
            if values["step"] <= step:
                kept.append(line + "\n")
                self._seconds = values["seconds"]
                self._start = values["time"] - values["wall_seconds"]
        with replacing(self._path) as file:
            file.write("".join(kept).encode())
        # The writer names its file after the second, and would replace that of a run that went on within the same one.
        self._tensorboard = SummaryWriter(
            str(folder / "tensorboard"), purge_step=step + 1, flush_secs=10, filename_suffix=f".{step}"
        )
        self._forget()

    def add(
        self,
        step: int,
        metrics: dict[str, float],
        *,
        images: int,
        flops: float | int,
        seconds: float,
        data_seconds: float,
    ) -> None:
        """Count one step, the one after the last: its images and FLOPs over all devices, and how long it took, of which
        `data_seconds` were spent waiting for data."""
        self._step = step
        self._metrics.append(metrics)
        self._since += np.array([images, flops, seconds, data_seconds])
        if step % LOG_EVERY == 0:
            self.write()

    def grid(self, step: int, image: UInt8[np.ndarray, "h w 3"]) -> None:
        """Show sample images, laid out in a grid, in TensorBoard."""
        self._tensorboard.add_image("samples", image, step, walltime=now(), dataformats="HWC")

    def write(self) -> None:
        """Append the line of the steps since the last one, if there were any."""
        if not self._metrics:
            return
        line = {}
        for name in dict.fromkeys(name for metrics in self._metrics for name in metrics):
            values = [
                metrics[name] for metrics in self._metrics if math.isfinite(metrics.get(name, math.nan))
            ]
            if values:
                line[name] = sum(values) / len(values)
        images, flops, seconds, data_seconds = (float(total) for total in self._since)
        line |= {
            "images_per_second": images / seconds,
            "step_seconds": seconds / len(self._metrics),
            "data_wait": data_seconds / seconds,
            "tflops_per_second": flops / seconds / 1e12,
        }
        if self._peak is not None:
            line["mfu"] = flops / seconds / self._peak
        written = now()
        self._seconds += seconds
        # Somebody may have set the clock back; less time than was trained cannot have passed.
        passed = max(written - self._start, self._seconds)
        line = {name: float(f"{value:.6g}") for name, value in line.items()}
        line |= {
            "seconds": round(self._seconds, 2),
            "wall_seconds": round(passed, 2),
            "goodput": round(self._seconds / passed, 4),
        }
        with self._path.open("a") as file:
            file.write(json.dumps({"step": self._step} | line | {"time": round(written, 2)}) + "\n")
        for name, value in line.items():
            self._tensorboard.add_scalar(name, value, self._step, walltime=written)
        self._forget()

    def close(self) -> None:
        """Write what there is to write and wait until it is on disk."""
        self.write()
        self._tensorboard.close()

    def _forget(self):
        self._metrics, self._since = [], np.zeros(4)  # images, FLOPs, seconds, data seconds
