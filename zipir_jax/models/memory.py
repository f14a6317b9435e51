"""What encoding and decoding cost, by size and tiling, and the tiling that a memory budget allows.

At each scale the bytes are those of one array, the widest, times a number of arrays of that size that live at once.
These numbers were measured: they are what XLA (jax 0.10.2, CPU) reports for whole programs divided by the bytes of the
widest array; the tests hold the costs against its reports, `benchmark compile` against those for GPUs and TPUs.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from zipir_jax.config import LPVAEConfig
from zipir_jax.models.flops import decoder_flops, encoder_features_flops, fusions_flops
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
# block; what goes into Upsample's sums; of Decoder.enlarge, an enlargement, which is never made itself.
LIVE = {"block": 3, "upsample": 3.5, "unfold": 4.5, "enlarge": 0.75}
# On CPUs, bfloat16 is convolved in float32: copies twice as large join the arrays.
LIVE_BFLOAT16_ON_CPU = {"block": 7.5, "upsample": 6.5, "unfold": 9, "enlarge": 1.5}
# What a platform takes / what is counted here. On CPUs XLA's report leaves out what YNNPACK, its library for them,
# allocates by itself: processes grew by 1.3 to 2.4 times the report of the same program compiled without it. For TPUs
# XLA cuts an image into strips, a batch of padded ones, before it convolves them: reports for a v6e were 3.3 times as
# large.
PLATFORM_FACTOR = {"cpu": 2.5, "gpu": 1.0, "tpu": 3.5}
TILES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64)  # along a side, that `choose_tiling` tries
# Elements of an array: what convolutions on accelerators may read or write, whose libraries count in 32 bits.
LARGEST_ARRAY = 2**31 - 1


class Cost(NamedTuple):
    """What a network costs for one image."""

    temporaries: int  # bytes of arrays that live at once beside arguments, result and weights
    flops: int  # windows' halos included
    largest: int  # elements of the largest array


class _Peak(NamedTuple):
    """Of some scales of a network."""

    temporaries: int  # bytes
    largest: int  # bytes of the largest array


def encode_cost(
    config: LPVAEConfig, height: int, width: int, tiling: Tiling | None = None, platform: str = "cpu"
) -> Cost:
    """Of `lp_vae.encode` for one image, sides in pixels; platform: as jax names that of a device."""
    fine = _encoder_cost(config.fine, height, width, tiling, 1, platform)
    sides = height // COARSE_FACTOR, width // COARSE_FACTOR
    coarse = _encoder_cost(config.coarse, *sides, tiling, COARSE_FACTOR, platform)
    small_image = 4 * 3 * sides[0] * sides[1]
    # XLA interleaves the two encoders, which do not depend on each other.
    temporaries = fine.temporaries + coarse.temporaries + small_image
    return Cost(temporaries, fine.flops + coarse.flops, max(fine.largest, coarse.largest))


def decode_cost(
    config: LPVAEConfig, height: int, width: int, tiling: Tiling | None = None, platform: str = "cpu"
) -> Cost:
    """Of `lp_vae.decode`; arguments as of `encode_cost`."""
    fine, live, pixels = config.fine, _live(config.fine, platform), height * width
    scales = 0 if tiling is None else tiled_scales(fine, tiling.cell)
    flops = decoder_flops(fine, height, width)
    if not scales:
        return _cost(fine, flops, _decoder_peak(fine, live, pixels, 0, len(fine.multipliers)))
    windows = _windows(height, width, tiling, decoder_halo(fine, scales))
    low = decoder_flops(_low(fine, scales), height // tiling.cell, width // tiling.cell)
    peaks = _tiled_decoder_peaks(fine, live, pixels, windows[0], scales)
    return _cost(fine, low + (flops - low) * windows[1] // pixels, *peaks)


def pixel_decode_cost(
    config: LPVAEConfig, height: int, width: int, tiling: Tiling | None = None, platform: str = "cpu"
) -> Cost:
    """Of `pixel_decoder.pixel_decode`; arguments as of `encode_cost`."""
    fine, live, pixels = config.fine, _live(config.fine, platform), height * width
    scales = 0 if tiling is None else tiled_scales(fine, tiling.cell)
    flops = decoder_flops(fine, height, width) + fusions_flops(fine, height, width)
    extractor, extractor_flops = _encoder_peak_and_flops(fine, height, width, tiling, 1, platform)
    if not scales:
        peak = _decoder_peak(fine, live, pixels, 0, len(fine.multipliers), fused=True)
        return _cost(fine, flops + extractor_flops, extractor, peak)
    windows = _windows(height, width, tiling, pixel_decoder_halo(fine, scales))
    low, sides = _low(fine, scales), (height // tiling.cell, width // tiling.cell)
    low_flops = decoder_flops(low, *sides) + fusions_flops(low, *sides)
    again = encoder_features_flops(fine, height, width) - encoder_features_flops(low, *sides)
    repeated = (flops - low_flops + again) * windows[1] // pixels
    peaks = _tiled_decoder_peaks(fine, live, pixels, windows[0], scales, fused=True)
    return _cost(fine, extractor_flops + low_flops + repeated, extractor, *peaks)


def resident_bytes(cost: Cost, platform: str = "cpu") -> int:
    """Memory that a program takes while it runs: its temporaries, and what a platform holds beside them."""
    return int(cost.temporaries * PLATFORM_FACTOR[platform])


def is_too_large(cost: Cost, images: int, platform: str) -> bool:
    """Whether a batch of `images` has an array of more than LARGEST_ARRAY elements, which a CPU does not mind."""
    return platform != "cpu" and images * cost.largest > LARGEST_ARRAY


def choose_tiling(
    cost: Callable[..., Cost],
    config: LPVAEConfig,
    height: int,
    width: int,
    budget: int,
    platform: str = "cpu",
) -> Tiling | None:
    """The tiling with the least work within `budget` bytes (`resident_bytes`); None: the whole image at once.

    No array may be too large for the platform (`is_too_large`).

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
    fitting = [
        i for i, size in enumerate(needed) if size <= budget and not is_too_large(costs[i], 1, platform)
    ]
    if not fitting:
        return tilings[needed.index(min(needed))]
    return tilings[min(fitting, key=lambda i: (costs[i].flops, needed[i]))]


def _cost(config, flops, *peaks):
    """Of a network whose parts run one after the other."""
    largest = max(peak.largest for peak in peaks) // jnp.dtype(config.compute_dtype).itemsize
    return Cost(max(peak.temporaries for peak in peaks), flops, largest)


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


def _encoder_cost(*arguments):
    peak, flops = _encoder_peak_and_flops(*arguments)
    return _cost(arguments[0], flops, peak)


def _encoder_peak_and_flops(config, height, width, tiling, factor, platform):
    """Of one encoder; height and width of the image that it reads, `factor` times smaller than the tiling's."""
    live, pixels = _live(config, platform), height * width
    scales = 0 if tiling is None else tiled_scales(config, tiling.cell // factor)
    flops, stop = encoder_features_flops(config, height, width), len(config.multipliers)
    if not scales:
        return _encoder_peak(config, live, pixels, 0, stop), flops
    window, windows = _windows(height * factor, width * factor, tiling, encoder_halo(config, scales))
    cell = config.patch * 2**scales
    low = encoder_features_flops(_low(config, scales), height // cell, width // cell)
    # Beside a window, what all tiles write.
    high = _beside(
        _encoder_peak(config, live, window // factor**2, 0, scales),
        _array(config, pixels, scales, scales - 1),
    )
    whole = _encoder_peak(config, live, pixels, scales, stop)
    peak = _Peak(*map(max, high, whole))
    return peak, low + (flops - low) * windows // (pixels * factor**2)


def _encoder_peak(config, live, pixels, start, stop):
    """At most at once, while the scales from `start` to before `stop` run."""
    return _peak((live["block"], _array(config, pixels, s, s)) for s in range(start, stop))


def _decoder_peak(config, live, pixels, start, stop, fused=False):
    """The same of a decoder; scales as the encoder counts them, and the image itself where `start` is 0.

    fused: of D_f*, which holds what it has yet to fuse beside.
    """
    last = len(config.multipliers) - 1
    upsample = live["unfold" if config.unfold else "upsample"]
    arrays, beside = [], 0  # (how many live at once, bytes of one, bytes that D_f* holds beside)
    if start == 0:
        sides = [config.patch >> n for n in range(1, config.patch.bit_length())]
        made = [config.pixel_channels * side for side in sides]
        read = [config.base_channels * config.multipliers[0], *made[:-1]]

        def size(channels, side):
            return jnp.dtype(config.compute_dtype).itemsize * channels * pixels // side**2

        # What the low-quality pixels add within a patch XLA makes before it runs the scales.
        beside = sum(map(size, made, sides))
        arrays = [(live["enlarge"], bytes_read, beside) for bytes_read in map(size, read, sides)]
    for s in range(start, stop):
        skip = _array(config, pixels, s, s)
        beside += skip
        arrays.append((live["block"], skip, beside + skip))  # itself and its projection
        if s < last:
            arrays.append((upsample, _array(config, pixels, s, s + 1), beside + skip))
    peak = max(number * size + fused * held for number, size, held in arrays)
    return _Peak(int(peak), max(size for _, size, _ in arrays))


def _tiled_decoder_peaks(config, live, pixels, window, scales, fused=False):
    """Of the scales that run in windows of so many pixels, beside what all tiles read, and of the others."""
    high = _beside(
        _decoder_peak(config, live, window, 0, scales, fused), _array(config, pixels, scales, scales)
    )
    return high, _decoder_peak(config, live, pixels, scales, len(config.multipliers), fused)


def _peak(arrays):
    """Of (how many live at once, bytes of one) at each scale in turn."""
    arrays = list(arrays)
    return _Peak(int(max(live * size for live, size in arrays)), max(size for _, size in arrays))


def _beside(peak, size):
    """With an array of `size` bytes that lives all the while."""
    return _Peak(peak.temporaries + size, max(peak.largest, size))
