"""Methods against originals: numbers for one picture, means over many, a table to print.

Everything is scored on 8-bit pictures, as a user gets them.
"""

import dataclasses
import time
from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8

from zipir_jax.config import RestorationConfig, SamplingConfig, Task
from zipir_jax.imageio import resize, to_float, to_uint8
from zipir_jax.metrics.fidelity import GRID_PERIODS, LPIPS_NETS, grid_energy, lpips_to, psnr

BASELINE = "bicubic"  # the method that the others are compared with
UNDIFFUSED = "D_f* without diffusion"  # the degraded picture's latent, decoded as it is
COLUMNS = (
    "PSNR, dB",
    f"vs {BASELINE}, dB",
    f"LPIPS-VGG16 (/ {BASELINE})",
    f"LPIPS-AlexNet (/ {BASELINE})",
    "grid, levels (period)",
    "s / picture",
)

# From an LQ picture, uint8 [h, w, 3], and (height, width) in pixels to a picture of that size.
Method = Callable[[np.ndarray, tuple[int, int]], np.ndarray]


class Reference:
    """An original to score restorations of; what does not depend on them is computed once."""

    def __init__(self, original: UInt8[np.ndarray, "h w 3"]):
        self._original = to_float(original)
        self._distances = {f"lpips_{net}": lpips_to(self._original, net) for net in LPIPS_NETS}

    def score(self, restored: UInt8[np.ndarray, "h w 3"]) -> dict[str, float]:
        """{psnr (dB), lpips_alexnet, lpips_vgg16, grid_PERIOD}; see `metrics.fidelity`.

        Raises ValueError if the picture does not have the original's size.
        """
        if restored.shape != self._original.shape:
            raise ValueError(f"a picture of shape {restored.shape} has an original of {self._original.shape}")
        picture = to_float(restored)
        return {
            "psnr": float(psnr(picture[None], self._original[None])[0]),
            **{name: distance(picture) for name, distance in self._distances.items()},
            **{f"grid_{period}": energy for period, energy in grid_energy(picture, self._original).items()},
        }


def bicubic(lq: UInt8[np.ndarray, "h w 3"], size: tuple[int, int]) -> np.ndarray:
    """The LQ picture enlarged: what any viewer shows."""
    return to_uint8(resize(to_float(lq), *size))


def run_methods(
    methods: dict[str, Method], lq: UInt8[np.ndarray, "h w 3"], size: tuple[int, int], warm: set
) -> tuple[dict[str, np.ndarray], dict[str, float | None]]:
    """(pictures, seconds) by method. The first picture of a size, while programs are compiled, has no seconds (None).

    warm: the methods and sizes that have run; start with an empty set and hand it in again.
    """
    pictures, seconds = {}, {}
    for name, restore in methods.items():
        start = time.perf_counter()
        pictures[name] = restore(lq, size)
        seconds[name] = time.perf_counter() - start if (name, size) in warm else None
        warm.add((name, size))
    return pictures, seconds


def summarise(scores: list[dict[str, dict[str, float | None]]]) -> dict[str, dict[str, float | None]]:
    """One row per method from one `{method: numbers}` per picture: those of `Reference.score`, and seconds or None.

    A row holds means over pictures, and psnr_std (of a sample; None for one picture), psnr_gain (dB over the baseline),
    lpips_*_ratio (ratio to the baseline's mean), grid (root of the largest mean energy over periods, in 8-bit levels of
    the Laplacian) and grid_period (where it is); None where undefined.
    """
    rows = {}
    for method in scores[0]:
        own = [score[method] for score in scores]
        mean = {key: _mean([numbers[key] for numbers in own]) for key in own[0]}
        base = {key: _mean([score[BASELINE][key] for score in scores]) for key in own[0]}
        period = max(GRID_PERIODS, key=lambda period, mean=mean: mean[f"grid_{period}"])
        rows[method] = {
            "psnr": mean["psnr"],
            "psnr_std": float(np.std([n["psnr"] for n in own], ddof=1)) if len(own) > 1 else None,
            "psnr_gain": mean["psnr"] - base["psnr"],
            "lpips_vgg16": mean["lpips_vgg16"],
            "lpips_vgg16_ratio": _ratio(mean["lpips_vgg16"], base["lpips_vgg16"]),
            "lpips_alexnet": mean["lpips_alexnet"],
            "lpips_alexnet_ratio": _ratio(mean["lpips_alexnet"], base["lpips_alexnet"]),
            "grid": max(0.0, mean[f"grid_{period}"]) ** 0.5,
            "grid_period": period,
            "seconds": mean["seconds"],
        }
    return rows


def table(rows: dict[str, dict]) -> str:
    """The rows of `summarise` as a Markdown table; what else is in a row is not shown."""
    lines = [["", *COLUMNS], ["---"] * (1 + len(COLUMNS))]
    for method, row in rows.items():
        spread = "" if row["psnr_std"] is None else f" ± {row['psnr_std']:.2f}"
        lines.append(
            [
                method,
                f"{row['psnr']:.2f}{spread}",
                f"{row['psnr_gain']:+.2f}",
                f"{row['lpips_vgg16']:.4f} ({_show(row['lpips_vgg16_ratio'])})",
                f"{row['lpips_alexnet']:.4f} ({_show(row['lpips_alexnet_ratio'])})",
                f"{row['grid']:.2f} ({row['grid_period']})",
                _show(row["seconds"]),
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


def describe_restoration(restoration: RestorationConfig) -> str:
    """The steps, and what is not as by default."""
    sampling = restoration.sampling
    shown = [f"{sampling.steps} step{'s' * (sampling.steps != 1)}"]
    for name, value in dataclasses.asdict(sampling).items():
        if name != "steps" and value != getattr(SamplingConfig, name):
            shown.append(f"{name} {value}")
    if restoration.colour_correction != "none":
        shown.append(f"colours by {restoration.colour_correction}")
    return ", ".join(shown)


def _mean(values):
    """Of the values that are there; None if none is."""
    values = [value for value in values if value is not None]
    return float(np.mean(values)) if values else None


def _ratio(a, b):
    return a / b if b else None


def _show(value):
    return "-" if value is None else f"{value:.2f}"
