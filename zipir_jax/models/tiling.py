"""Exact tiling: the scales of highest resolution run in windows, and the result is that of the whole image.

The networks are strictly local, so what a window lacks beyond its edges spoils no more rows there than the layers
reach. A tile is computed from a window that is wider by so many rows, the halo, and what is spoilt is cut off: there is
no seam, and nothing to blend. At the border of the image a window is shifted inwards instead of padded, so that the
zeros and repeated edges of the layers themselves meet the border, as they do in the whole image, and nothing else.

Where a window ends is counted in cells: the pixels of the highest scale that runs whole.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from zipir_jax.config import AutoencoderConfig


@dataclasses.dataclass(frozen=True)
class Tiling:
    """What of the LP-VAE runs in tiles, and how large these are; in pixels of the image.

    A tile is what a window contributes; windows are wider by the halo. Sides need not divide the image's, and larger
    ones are cut to it.
    """

    cell: int  # scales whose pixels are smaller than this run in tiles, the others whole; a power of two
    height: int  # of a tile, a multiple of the cell
    width: int

    def __post_init__(self):
        if self.cell < 1 or self.cell & (self.cell - 1):
            raise ValueError(f"cell {self.cell} is not a power of two")
        for name in ("height", "width"):
            side = getattr(self, name)
            if side < 1 or side % self.cell:
                raise ValueError(f"tile {name} {side} is not a multiple of the cell {self.cell}")

    @property
    def cells(self) -> tuple[int, int]:
        """Rows and columns of a tile."""
        return self.height // self.cell, self.width // self.cell


def tiled_scales(config: AutoencoderConfig, cell: int) -> int:
    """How many of a network's scales have pixels smaller than `cell`, in pixels of the image that it reads.

    Raises ValueError if no scale has pixels of that size: what remains must run whole.
    """
    if cell > config.factor:
        raise ValueError(f"cell {cell} is larger than the {config.factor} pixels of the lowest scale")
    return max(0, (cell // config.patch).bit_length() - 1)


# --------------------------------------------------------------------------------------------------
# Spoilt rows: how many at the edge of a window depend on what lies beyond it. Where the first and the last edge
# differ, as after a strided convolution, the count is the larger one, the first's.
# --------------------------------------------------------------------------------------------------


def spoilt_by_encoder(config: AutoencoderConfig, scales: int) -> list[int]:
    """Rows of what `Encoder.high_scales` returns for `scales`, each in pixels of its own scale."""
    rows, features = 1, []  # the stem's; folding into patches spoils none
    for scale in range(scales):
        if scale:
            rows = _after_downsample(rows)
        rows += 2 * config.blocks_per_scale
        features.append(rows)
    return features


def spoilt_by_decoder(config: AutoencoderConfig, scales: int, skips: Sequence[int] | None = None) -> int:
    """Rows of the image that the last `scales` of `Decoder` write, given right rows of the scale before.

    skips: of D_f*, the spoilt rows of the features that enter, highest resolution first.
    """
    rows = 0
    for scale in reversed(range(scales)):
        rows = _after_bilinear(rows) if config.unfold else _after_bilinear(rows) + 1
        if skips is not None:
            rows = max(rows, skips[scale]) + 2
        rows += 2 * config.blocks_per_scale
    # Where pixels enter, no more than one row is spoilt by them.
    for _ in range(config.patch.bit_length() - 1):
        rows = _after_bilinear(rows) + 1
    return rows + (
        2 if config.patch > 1 else 1
    )  # the last convolution; with folded pixels it is one of pairs


def encoder_halo(config: AutoencoderConfig, scales: int) -> int:
    """Cells by which the windows of `scales` scales of E_f or E_c are wider on each side than tiles."""
    return _after_downsample(spoilt_by_encoder(config, scales)[-1])


def decoder_halo(config: AutoencoderConfig, scales: int) -> int:
    """The same of D_f."""
    return math.ceil(spoilt_by_decoder(config, scales) / (config.patch * 2**scales))


def pixel_decoder_halo(config: AutoencoderConfig, scales: int) -> int:
    """The same of D_f*, whose extractor runs in the window, too."""
    rows = spoilt_by_decoder(config, scales, spoilt_by_encoder(config, scales))
    return math.ceil(rows / (config.patch * 2**scales))


def _after_downsample(rows):
    """Output j of a strided 3x3 convolution reads rows 2j - 1 to 2j + 1."""
    return rows // 2 + 1


def _after_bilinear(rows):
    """Pixel 2i of a doubled line reads the rows i and i - 1, pixel 2i - 1 the same two."""
    return 2 * rows + 1


# --------------------------------------------------------------------------------------------------
# Windows
# --------------------------------------------------------------------------------------------------


def window_cells(cells: int, tile: int, halo: int) -> tuple[int, int, int]:
    """Along one side of an image of `cells`: the number of tiles, and the cells of a tile and of a window."""
    tile = min(tile, cells)
    return math.ceil(cells / tile), tile, min(tile + 2 * halo, cells)


def map_tiles(
    function: Callable[..., Array],
    arrays: Sequence[Float[Array, "b _h _w _c"]],
    cells: tuple[int, int],
    tile: tuple[int, int],
    halo: int,
) -> Float[Array, "b h2 w2 c2"]:
    """`function(*arrays)` of a strictly local function, computed window by window.

    cells: rows and columns of the image; the sides of all arrays, and of the result, are whole multiples of them.
    tile: rows and columns of a tile, in cells. halo: cells at an edge of a window that are wrong in its result.
    All windows have one size, so the function is compiled once; the last tiles overlap those before. Along a side with
    several tiles the windows' positions are not known to the compiler, so that an array divided along that side over
    devices is gathered: height divided over devices wants one tile along it.
    """
    sides = [window_cells(*side, halo) for side in zip(cells, tile, strict=True)]
    counts, tile, window = zip(*sides, strict=True)

    def place(index, count, cells, tile, window):
        """Where a tile begins, and its window, in cells of the image."""
        if count == 1:  # known to the compiler, so that this side can stay divided over devices
            return 0, 0
        tile_start = jnp.minimum(index * tile, cells - tile)
        return tile_start, jnp.clip(tile_start - halo, 0, cells - window)

    def one_tile(index, result):
        places = zip(divmod(index, counts[1]), counts, cells, tile, window, strict=True)
        tile_start, window_start = zip(*(place(*side) for side in places), strict=True)
        found = function(*(cut(array, cells, window_start, window) for array in arrays))
        inner = [t - w for t, w in zip(tile_start, window_start, strict=True)]
        found = cut(found, window, inner, tile)
        rows, columns = (side // t for side, t in zip(found.shape[1:3], tile, strict=True))
        return lax.dynamic_update_slice(result, found, (0, tile_start[0] * rows, tile_start[1] * columns, 0))

    whole = jax.eval_shape(function, *arrays)
    return lax.fori_loop(0, math.prod(counts), one_tile, jnp.zeros(whole.shape, whole.dtype))


def cut(array, cells, start, size):
    """The part of an array of `cells` rows and columns that begins at `start`, all in cells."""
    b, height, width, c = array.shape
    rows, columns = height // cells[0], width // cells[1]
    return lax.dynamic_slice(
        array, (0, start[0] * rows, start[1] * columns, 0), (b, size[0] * rows, size[1] * columns, c)
    )
