"""What encoding and decoding cost, by size and tiling, and the tiling that a memory budget allows.

A cost is (bytes, FLOPs): the temporary arrays that live at once beside arguments, result and weights, and the work,
windows' halos included. At each scale the bytes are those of one array, the widest, times a number of arrays of that
size that live at once. These numbers were measured: they are what XLA (jax 0.10.2, CPU) reports for whole programs
divided by the bytes of the widest array; the tests hold the costs against its reports.
"""

import dataclasses
import itertools
from collections.abc import Callable

import jax.numpy as jnp

from zipir_jax.config import LPVAEConfig
from zipir_jax.models.flops import decoder_flops, encoder_features_flops
from zipir_jax.models.lp_vae import COARSE_FACTOR
from zipir_jax.models.tiling import (
    Tiling,
    decoder_halo,
    encoder_halo,
    pixel_decoder_halo,
    tiled_scales,
    window_cells,
)

# Arrays that live at once, in units of the widest one of a layer: input, normalised input and result of a residual
# block; what goes into Upsample's or Decoder.enlarge's sums. "fusion" is what D_f* holds beside.
LIVE = {"block": 3, "upsample": 3.5, "unfold": 4.5, "enlarge": 1.5, "fusion": 1}
# On CPUs, bfloat16 is convolved in float32: copies twice as large join the arrays.
LIVE_BFLOAT16_ON_CPU = {"block": 7.5, "upsample": 6.5, "unfold": 9, "enlarge": 3, "fusion": 1}
# XLA's report leaves out what YNNPACK, its library for CPUs, allocates by itself: processes grew by 1.3 to 2.4 times
# the report of the same program compiled without it.
CPU_LIBRARY = 2.5
TILES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64)  # along a side, that `choose_tiling` tries

Cost = tuple[int, int]


def encode_cost(
    config: LPVAEConfig, height: int, width: int, tiling: Tiling | None = None, platform: str = "cpu"
) -> Cost:
    """Of `lp_vae.encode` for one image, sides in pixels; platform: as jax names that of a device."""
    fine = _encoder_cost(config.fine, height, width, tiling, 1, platform)
    sides = height // COARSE_FACTOR, width // COARSE_FACTOR
    coarse = _encoder_cost(config.coarse, *sides, tiling, COARSE_FACTOR, platform)
    small_image = 4 * 3 * sides[0] * sides[1]
    return max(fine[0], coarse[0]) + small_image, fine[1] + coarse[1]


def decode_cost(
    config: LPVAEConfig, height: int, width: int, tiling: Tiling | None = None, platform: str = "cpu"
) -> Cost:
    """Of `lp_vae.decode`; arguments as of `encode_cost`."""
    fine, live, pixels = config.fine, _live(config.fine, platform), height * width
    scales = 0 if tiling is None else tiled_scales(fine, tiling.cell)
    flops = decoder_flops(fine, height, width)
    if not scales:
        return _decoder_bytes(fine, live, pixels, 0, len(fine.multipliers)), flops
    windows = _windows(height, width, tiling, decoder_halo(fine, scales))
    low = decoder_flops(_low(fine, scales), height // tiling.cell, width // tiling.cell)
    # Of the window, and what all tiles read.
    high_bytes = _decoder_bytes(fine, live, windows[0], 0, scales) + _array(fine, pixels, scales, scales)
    whole_bytes = _decoder_bytes(fine, live, pixels, scales, len(fine.multipliers))
    return max(whole_bytes, high_bytes), low + (flops - low) * windows[1] // pixels


def pixel_decode_cost(
    config: LPVAEConfig, height: int, width: int, tiling: Tiling | None = None, platform: str = "cpu"
) -> Cost:
    """Of `pixel_decoder.pixel_decode`; arguments as of `encode_cost`. The FLOPs are without those of the fusions."""
    fine, live, pixels = config.fine, _live(config.fine, platform), height * width
    # Skip connections of other scales are small beside the arrays of the highest one.
    live = {name: number + live["fusion"] for name, number in live.items()} | {
        "enlarge": live["enlarge"] + live["fusion"] / 2
    }
    scales = 0 if tiling is None else tiled_scales(fine, tiling.cell)
    flops = decoder_flops(fine, height, width)
    extractor_bytes, extractor_flops = _encoder_cost(fine, height, width, tiling, 1, platform)
    if not scales:
        peak = _decoder_bytes(fine, live, pixels, 0, len(fine.multipliers))
        return max(extractor_bytes, peak), flops + extractor_flops
    windows = _windows(height, width, tiling, pixel_decoder_halo(fine, scales))
    sides = height // tiling.cell, width // tiling.cell
    low = decoder_flops(_low(fine, scales), *sides)
    again = encoder_features_flops(fine, height, width) - encoder_features_flops(_low(fine, scales), *sides)
    # Of the window, and what all tiles read.
    high_bytes = _decoder_bytes(fine, live, windows[0], 0, scales) + _array(fine, pixels, scales, scales)
    whole_bytes = _decoder_bytes(fine, live, pixels, scales, len(fine.multipliers))
    repeated = (flops - low + again) * windows[1] // pixels
    return max(extractor_bytes, whole_bytes, high_bytes), extractor_flops + low + repeated


def resident_bytes(cost: Cost, platform: str = "cpu") -> int:
    """Memory that a program takes while it runs: its temporaries, and what a library allocates beside them."""
    return int(cost[0] * (CPU_LIBRARY if platform == "cpu" else 1))


def choose_tiling(
    cost: Callable[..., Cost],
    config: LPVAEConfig,
    height: int,
    width: int,
    budget: int,
    platform: str = "cpu",
) -> Tiling | None:
    """The tiling with the least work whose `resident_bytes` are within `budget` bytes; None: the whole image is.

    Where none is, the one that needs least. cost: `encode_cost`, `decode_cost` or `pixel_decode_cost`; height and width
    in pixels, multiples of 32.
    """
    tilings = [None]
    for scales in range(1, len(config.fine.multipliers)):
        cell = config.fine.patch * 2**scales
        rows, columns = ({-(-side // (n * cell)) * cell for n in TILES} for side in (height, width))
        tilings += [Tiling(cell, *sides) for sides in itertools.product(sorted(rows), sorted(columns))]
    costs = [cost(config, height, width, tiling, platform) for tiling in tilings]
    needed = [resident_bytes(found, platform) for found in costs]
    fitting = [i for i, size in enumerate(needed) if size <= budget]
    if not fitting:
        return tilings[needed.index(min(needed))]
    return tilings[min(fitting, key=lambda i: (costs[i][1], needed[i]))]


def _live(config, platform):
    return LIVE_BFLOAT16_ON_CPU if platform == "cpu" and config.compute_dtype == "bfloat16" else LIVE


def _low(config, scales):
    """A network like the scales that run whole, on an image with one pixel a cell."""
    return dataclasses.replace(config, multipliers=config.multipliers[scales:], patch=1)


def _windows(height, width, tiling, halo):
    """Pixels of one window, and of all of them."""
    cells = height // tiling.cell, width // tiling.cell
    sides = zip(cells, tiling.cells, strict=True)
    (rows, _, high), (columns, _, wide) = (window_cells(*side, halo) for side in sides)
    window = high * wide * tiling.cell**2
    return window, rows * columns * window


def _array(config, pixels, scale, width_of):
    """Bytes at the resolution of `scale` of an array as wide as those of the scale `width_of`."""
    width = config.base_channels * config.multipliers[width_of]
    return jnp.dtype(config.compute_dtype).itemsize * width * pixels // (config.patch * 2**scale) ** 2


def _encoder_cost(config, height, width, tiling, factor, platform):
    """Of one encoder; height and width of the image that it reads, `factor` times smaller than the tiling's."""
    live, pixels = _live(config, platform), height * width
    scales = 0 if tiling is None else tiled_scales(config, tiling.cell // factor)
    flops, stop = encoder_features_flops(config, height, width), len(config.multipliers)
    if not scales:
        return _encoder_bytes(config, live, pixels, 0, stop), flops
    window, windows = _windows(height * factor, width * factor, tiling, encoder_halo(config, scales))
    cell = config.patch * 2**scales
    low = encoder_features_flops(_low(config, scales), height // cell, width // cell)
    high_bytes = _encoder_bytes(config, live, window // factor**2, 0, scales)
    high_bytes += _array(config, pixels, scales, scales - 1)
    whole_bytes = _encoder_bytes(config, live, pixels, scales, stop)
    return max(whole_bytes, high_bytes), low + (flops - low) * windows // (pixels * factor**2)


def _encoder_bytes(config, live, pixels, start, stop):
    """At most at once, while the scales from `start` to before `stop` run."""
    return int(max(live["block"] * _array(config, pixels, s, s) for s in range(start, stop)))


def _decoder_bytes(config, live, pixels, start, stop):
    """The same of a decoder; scales as the encoder counts them, and the image itself where `start` is 0."""
    last = len(config.multipliers) - 1
    upsample = live["unfold" if config.unfold else "upsample"]
    peaks = [live["block"] * _array(config, pixels, s, s) for s in range(start, stop)]
    peaks += [upsample * _array(config, pixels, s, s + 1) for s in range(start, min(stop, last))]
    if start == 0:
        width, side = config.base_channels * config.multipliers[0], config.patch
        while side > 1:
            side //= 2
            bytes_of_pixel = jnp.dtype(config.compute_dtype).itemsize * width
            peaks.append(live["enlarge"] * bytes_of_pixel * pixels // side**2)
            width = config.pixel_channels * side
    return int(max(peaks))
