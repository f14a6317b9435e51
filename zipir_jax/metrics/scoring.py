"""Contestants against originals: numbers for one picture, means over many, a table to print.

Everything is scored on 8-bit pictures, as a user gets them.
"""

import time
from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8

from zipir_jax.config import Task
from zipir_jax.imageio import to_float
from zipir_jax.metrics.fidelity import LPIPS_NETS, grid_energy, lpips_to, psnr

BASELINE = "bicubic"  # the contestant that the others are compared with
GRID_PERIOD = 4  # pixels; the patch of the default weights
COLUMNS = (
    "PSNR, dB",
    f"vs {BASELINE}, dB",
    f"LPIPS-VGG16 (/ {BASELINE})",
    f"LPIPS-AlexNet (/ {BASELINE})",
    "grid / original",
    "s / picture",
)

# From an LQ picture, uint8 [h, w, 3], and (height, width) in pixels to a picture of that size.
Contestant = Callable[[np.ndarray, tuple[int, int]], np.ndarray]


class Reference:
    """An original to score restorations of; what does not depend on them is computed once."""

    def __init__(self, original: UInt8[np.ndarray, "h w 3"]):
        self._original = to_float(original)
        self._distances = {f"lpips_{net}": lpips_to(self._original, net) for net in LPIPS_NETS}
        self._grid = grid_energy(self._original, self._original, GRID_PERIOD)

    def score(self, restored: UInt8[np.ndarray, "h w 3"]) -> dict[str, float]:
        """{psnr (dB), lpips_alexnet, lpips_vgg16, grid, grid_original}; see `metrics.fidelity`.

        Raises ValueError if the picture does not have the original's size.
        """
        if restored.shape != self._original.shape:
            raise ValueError(f"a picture of shape {restored.shape} has an original of {self._original.shape}")
        picture = to_float(restored)
        return {
            "psnr": float(psnr(picture[None], self._original[None])[0]),
            **{name: distance(picture) for name, distance in self._distances.items()},
            "grid": grid_energy(picture, self._original, GRID_PERIOD),
            "grid_original": self._grid,
        }


class Contest:
    """Lets every contestant restore a picture and takes the time, without that of compiling."""

    def __init__(self, contestants: dict[str, Contestant]):
        self._contestants = contestants
        self._compiled = set()

    def run(
        self, lq: UInt8[np.ndarray, "h w 3"], size: tuple[int, int]
    ) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """(pictures, seconds) by contestant. The first picture of a size is restored twice and timed once."""
        pictures, seconds = {}, {}
        for name, restore in self._contestants.items():
            if (name, size) not in self._compiled:
                restore(lq, size)
                self._compiled.add((name, size))
            start = time.perf_counter()
            pictures[name] = restore(lq, size)
            seconds[name] = time.perf_counter() - start
        return pictures, seconds


def summarise(scores: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float | None]]:
    """One row per contestant from one `{contestant: numbers}` per picture; numbers as in `Reference.score`, + seconds.

    A row holds means over pictures, and psnr_std (of a sample; None for one picture), psnr_gain (dB over the baseline),
    lpips_*_ratio (ratio to the baseline's mean) and grid_ratio (ratio to the originals' mean); None where undefined.
    """
    rows = {}
    for contestant in scores[0]:
        own = [score[contestant] for score in scores]
        mean = {key: float(np.mean([numbers[key] for numbers in own])) for key in own[0]}
        base = {key: float(np.mean([score[BASELINE][key] for score in scores])) for key in own[0]}
        rows[contestant] = {
            "psnr": mean["psnr"],
            "psnr_std": float(np.std([n["psnr"] for n in own], ddof=1)) if len(own) > 1 else None,
            "psnr_gain": mean["psnr"] - base["psnr"],
            "lpips_vgg16": mean["lpips_vgg16"],
            "lpips_vgg16_ratio": _ratio(mean["lpips_vgg16"], base["lpips_vgg16"]),
            "lpips_alexnet": mean["lpips_alexnet"],
            "lpips_alexnet_ratio": _ratio(mean["lpips_alexnet"], base["lpips_alexnet"]),
            "grid_ratio": _ratio(mean["grid"], mean["grid_original"]),
            "seconds": mean["seconds"],
        }
    return rows


def table(rows: dict[str, dict[str, float | None]]) -> str:
    """The rows of `summarise` as a Markdown table."""
    lines = [["", *COLUMNS], ["---"] * (1 + len(COLUMNS))]
    for contestant, row in rows.items():
        spread = "" if row["psnr_std"] is None else f" ± {row['psnr_std']:.2f}"
        lines.append(
            [
                contestant,
                f"{row['psnr']:.2f}{spread}",
                f"{row['psnr_gain']:+.2f}",
                f"{row['lpips_vgg16']:.4f} ({_show(row['lpips_vgg16_ratio'])})",
                f"{row['lpips_alexnet']:.4f} ({_show(row['lpips_alexnet_ratio'])})",
                _show(row["grid_ratio"]),
                f"{row['seconds']:.2f}",
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def describe(task: Task) -> str:
    """What a task does to a picture, in words."""
    parts = [f"{task.downscale}x smaller"]
    if task.blur_sigma:
        parts.append(f"blur sigma {task.blur_sigma:g}")
    if task.noise_sigma:
        parts.append(f"noise sigma {task.noise_sigma:g}")
    if task.jpeg_quality is not None:
        parts.append(f"JPEG quality {task.jpeg_quality}")
    return ", ".join(parts)


def _ratio(a, b):
    return a / b if b else None


def _show(ratio):
    return "-" if ratio is None else f"{ratio:.2f}"
