"""Training images that need no files: textured, shaded dead leaves with the statistics of photographs.

Opaque shapes whose radii fall as r^-3 cover one another (Lee, Mumford and Huang 2001, "Occlusion models for natural
images"): edges, plain surfaces and clutter at every scale. Networks that restore photographs learn nearly as well from
such images (Achddou, Gousseau and Ladjal 2021, "Synthetic images as a regularity prior for image restoration neural
networks"). Mixed shapes and textures as in Baradad et al. 2021, "Learning to see by looking at noise".

An image is drawn as a map of leaf numbers at twice its size. Then everything is one operation over whole arrays: the
leaves' colours are looked up, multiplied by texture, shading and shadow in linear light, and averaged down, which
antialiases the edges. Every range is a field of `zipir_jax.config.SyntheticConfig`.
"""

import hashlib
from itertools import pairwise

import cv2
import numpy as np
from jaxtyping import Float, Float32, Int32, UInt8

from zipir_jax.config import SyntheticConfig

SUPERSAMPLING = 2  # samples of the leaf map per pixel and axis
POINTS = 48  # on a leaf's border: strays 0.2 % of the radius from the curve
SHIFT = 4  # bits after the point of the coordinates that OpenCV draws
# From grey, yellow-blue and red-green to red, green, blue; orthonormal.
OPPONENT = (np.array([[1, 1, 1], [1, 1, -2], [1, -1, 0]]) / np.sqrt([[3], [6], [2]])).astype(np.float32)


class SyntheticSource:
    """Random access to synthetic images: `len(source)`, `source[i] -> uint8 [side, side, 3]`, sRGB.

    An image is a function of seed, index, side and config alone. Raises ValueError for a count or side below 1 or a
    negative seed, IndexError for an index outside of 0 to count - 1.
    """

    name = "synthetic images"

    def __init__(self, count: int, side: int, seed: int, config: SyntheticConfig = SyntheticConfig()):
        for name, value, lowest in (("count", count, 1), ("side", side, 1), ("seed", seed, 0)):
            if value < lowest:
                raise ValueError(f"{name} {value} of the synthetic images is not at least {lowest}.")
        self.count, self.side, self.seed, self.config = count, side, seed, config

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> UInt8[np.ndarray, "{self.side} {self.side} 3"]:
        if not 0 <= index < self.count:
            raise IndexError(f"image {index} does not lie within 0 to {self.count - 1}.")
        return synthetic_image(self.side, self.config, np.random.default_rng((self.seed, int(index))))

    @property
    def sizes(self) -> Int32[np.ndarray, "{self.count} 2"]:
        """Height and width of each image."""
        return np.broadcast_to(np.int32(self.side), (self.count, 2))  # takes no memory

    @property
    def damaged(self) -> list[str]:
        """Files that cannot be read: none."""
        return []

    def caption(self, index: int) -> str:
        """Nobody says what a synthetic image shows: ""."""
        return ""

    def __repr__(self) -> str:  # `pipeline.batches` saves it with an iterator's state, and compares it
        digest = hashlib.sha256(repr(self.config).encode()).hexdigest()[:12]
        return f"SyntheticSource({self.count} images of {self.side} px, seed {self.seed}, {digest})"


def synthetic_image(
    side: int, config: SyntheticConfig, rng: np.random.Generator
) -> UInt8[np.ndarray, "{side} {side} 3"]:
    """One image of leaves on a ground, in sRGB."""
    centres, radii = draw_leaves(side, config, rng)
    leaf_map = draw_leaf_map(side, centres, radii, config, rng)

    # The ground is leaf 0: it has colour and texture, but as it lies flat, no shading of its own.
    colours = _leaf_colours(centres, side, config, rng)
    light = _texture(leaf_map, len(radii) + 1, side, config, rng)
    light += _shading(leaf_map, centres, radii, config, rng)
    light += _lighting_and_shadow(leaf_map, len(radii), side, config, rng)
    linear = np.take(colours, leaf_map, axis=0)
    linear *= cv2.exp(light)[..., None]

    linear = cv2.resize(linear, (side, side), interpolation=cv2.INTER_AREA)
    linear = cv2.GaussianBlur(
        linear, (0, 0), rng.uniform(*config.lens_sigma), borderType=cv2.BORDER_REFLECT_101
    )
    linear *= np.float32(_log_uniform(config.exposure, rng)) / max(linear.mean(), 1e-6)
    return to_srgb(linear)


# --------------------------------------------------------------------------------------------------
# Shapes
# --------------------------------------------------------------------------------------------------


def draw_radii(
    count: int, smallest: float, largest: float, rng: np.random.Generator
) -> Float[np.ndarray, " {count}"]:
    """Radii of density proportional to r^-3 between two bounds in pixels.

    Inverts the distribution function (smallest^-2 - r^-2) / (smallest^-2 - largest^-2).
    """
    return (smallest**-2 - rng.random(count) * (smallest**-2 - largest**-2)) ** -0.5


def draw_leaves(
    side: int, config: SyntheticConfig, rng: np.random.Generator
) -> tuple[Float[np.ndarray, "n 2"], Float[np.ndarray, " n"]]:
    """Centres (x, y) and radii in pixels of the leaves that may reach into the image, undermost first."""
    largest = _log_uniform(config.largest_radius, rng) * side
    smallest = min(_log_uniform(config.smallest_radius, rng), 0.99 * largest)
    reach = _reach(config)
    centres, radii = [], []
    # Leaves are as dense beyond the image as within. Class by class, for small ones need not be drawn far out.
    for low, high in pairwise(np.geomspace(smallest, largest, 9)):
        # Leaves per square pixel: the integral of pi r^2 over all classes is `layers`.
        density = config.layers * (low**-2 - high**-2) / (2 * np.pi * np.log(largest / smallest))
        margin = reach * high
        count = rng.poisson(density * (side + 2 * margin) ** 2)
        radii.append(draw_radii(count, low, high, rng))
        centres.append(rng.uniform(-margin, side + margin, (count, 2)))
    radii, centres = np.concatenate(radii), np.concatenate(centres)
    outside = np.abs(centres - side / 2).max(axis=1) - side / 2
    seen = rng.permutation(np.flatnonzero(outside < reach * radii))
    return centres[seen], radii[seen]


def leaf_borders(
    radii: Float[np.ndarray, " n"], config: SyntheticConfig, rng: np.random.Generator
) -> tuple[Float32[np.ndarray, "n points 2"], np.ndarray]:
    """Points around the origin on each leaf's border, in pixels, and which leaves are convex (bool [n])."""
    n = len(radii)
    kind = rng.choice(4, n, p=(config.ellipses, config.rectangles, config.polygons, config.blobs))
    circle = np.linspace(0, 2 * np.pi, POINTS, endpoint=False)
    angle = np.tile(circle, (n, 1))
    distance = np.ones((n, POINTS))
    wobble = rng.uniform(*config.wobble, (n, 1))

    # A corner is a run of equal points.
    rectangle = kind == 1
    angle[rectangle] = np.pi / 4 + np.pi / 2 * (np.arange(POINTS) * 4 // POINTS)
    distance[rectangle] = np.sqrt(np.pi / 2)

    polygon = kind == 2
    m = np.count_nonzero(polygon)
    corners = rng.integers(config.corners[0], config.corners[1] + 1, (m, 1))
    corner = np.arange(POINTS) * corners // POINTS
    turns = rng.uniform(-0.3, 0.3, (m, POINTS)) + np.arange(POINTS)
    lengths = np.maximum(1 + wobble[polygon] * rng.standard_normal((m, POINTS)), 0.3)
    # The regular polygon of the disc's area has this corner distance.
    lengths *= np.sqrt(2 * np.pi / corners / np.sin(2 * np.pi / corners))
    angle[polygon] = 2 * np.pi / corners * np.take_along_axis(turns, corner, axis=1)
    distance[polygon] = np.take_along_axis(lengths, corner, axis=1)

    blob = kind == 3
    harmonics = np.arange(2, 7)
    waves = np.exp(1j * harmonics[:, None] * circle)
    weights = rng.standard_normal((np.count_nonzero(blob), 5, 2)).view(np.complex128)[..., 0] / harmonics
    # The weights' rms is that of 1 / k over these harmonics, so that `wobble` is the border's.
    weights *= wobble[blob] / np.sqrt((1 / harmonics**2).sum())
    distance[blob] = np.clip(1 + (weights @ waves).real, 0.3, 2)

    root = np.sqrt(_log_uniform(config.aspect, rng, (n, 1)))
    x, y = radii[:, None] * distance * np.cos(angle) * root, radii[:, None] * distance * np.sin(angle) / root
    turn = rng.uniform(0, 2 * np.pi, (n, 1))
    border = np.stack([np.cos(turn) * x - np.sin(turn) * y, np.sin(turn) * x + np.cos(turn) * y], -1)
    return border.astype(np.float32), kind <= 1


def draw_leaf_map(
    side: int,
    centres: Float[np.ndarray, "n 2"],
    radii: Float[np.ndarray, " n"],
    config: SyntheticConfig,
    rng: np.random.Generator,
) -> Int32[np.ndarray, "h w"]:
    """Number of the uppermost leaf at each sample, 1 to n; 0 = the ground. h = w = SUPERSAMPLING * side."""
    borders, convex = leaf_borders(radii, config, rng)
    # OpenCV's integer coordinates are sample centres.
    # It draws the border's own samples too, half a sample beyond; as much is taken off here.
    borders *= np.maximum(1 - 0.5 / SUPERSAMPLING / radii, 0.1)[:, None, None].astype(np.float32)
    points = (borders + centres[:, None].astype(np.float32)) * SUPERSAMPLING - 0.5
    points = np.round(points * 2**SHIFT).astype(np.int32)
    # A small leaf needs no more than a dozen of its points; its corners are among them.
    coarse = np.ascontiguousarray(points[:, ::4])
    leaf_map = np.zeros((SUPERSAMPLING * side,) * 2, np.int32)
    for i, (is_small, is_convex) in enumerate(zip((radii < 6).tolist(), convex.tolist(), strict=True)):
        border = coarse[i] if is_small else points[i]
        if is_convex:
            cv2.fillConvexPoly(leaf_map, border, i + 1, cv2.LINE_8, SHIFT)
        else:
            cv2.fillPoly(leaf_map, [border], i + 1, cv2.LINE_8, SHIFT)
    return leaf_map


def _reach(config):
    """Bound of the distance of a border's points from its centre, in radii."""
    triangle = np.sqrt(2 * np.pi / 3 / np.sin(2 * np.pi / 3))
    return np.sqrt(config.aspect[1]) * max(2, triangle * (1 + 3 * config.wobble[1]))


# --------------------------------------------------------------------------------------------------
# Colour
# --------------------------------------------------------------------------------------------------


def _leaf_colours(centres, side, config, rng):
    """Linear light, around 1, of the ground and the leaves: they gather around few colours, which come in patches."""
    colours = rng.integers(config.palette[0], config.palette[1] + 1)
    palette = rng.standard_normal((colours, 3), np.float32)
    # The log odds of each colour at each place: a share, and waves as long as the image or longer.
    odds = np.log(rng.dirichlet(np.ones(colours)) + 1e-9)[:, None]
    places = np.concatenate([[[side / 2, side / 2]], centres]) / side
    for _ in range(4):
        wave = rng.standard_normal((colours, 2)) * 2.5
        phase = rng.uniform(0, 2 * np.pi, (colours, 1))
        odds = odds + config.palette_patches / np.sqrt(2) * np.cos(wave @ places.T + phase)
    which = np.argmax(odds + rng.gumbel(size=odds.shape), axis=0)  # a draw with these odds

    normal = palette[which] + config.palette_spread * rng.standard_normal((len(places), 3), np.float32)
    rho = config.colour_correlation
    normal[:, 2] = rho * normal[:, 1] + np.sqrt(1 - rho**2) * normal[:, 2]
    logs = normal * np.array(config.colour_std) + np.array((0, *config.colour_mean))
    return np.exp(logs.astype(np.float32) @ OPPONENT)


def to_srgb(linear: Float32[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """Linear light, 1 = white, clipped, to 8-bit sRGB (IEC 61966-2-1)."""
    return _SRGB[(np.clip(linear, 0, 1) * np.float32(len(_SRGB) - 1) + np.float32(0.5)).astype(np.uint16)]


def _srgb_table(steps):
    linear = np.arange(steps) / (steps - 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return (encoded * 255 + 0.5).astype(np.uint8)


_SRGB = _srgb_table(2**14)  # a fifth of a level where the curve is steepest


# --------------------------------------------------------------------------------------------------
# Light, as the natural logarithm of a factor, for each sample of the leaf map
# --------------------------------------------------------------------------------------------------


def _texture(leaf_map, count, side, config, rng):
    # At the image's own resolution: samples of a pixel share a texel. A power of two, so that a mask wraps it round.
    tile = 2 ** int(np.ceil(np.log2(max(side, 32))))
    bank = np.stack([_draw_texture(tile, config, rng) for _ in range(config.textures)])
    # Where in the bank a leaf's texture begins, and how strong it is.
    start = rng.integers(0, tile, (count, 2)).astype(np.int32)
    which = rng.integers(0, config.textures, count).astype(np.int32) * (tile * tile)
    contrast = rng.exponential(config.texture_contrast, count).astype(np.float32)

    at = np.arange(len(leaf_map), dtype=np.int32) // SUPERSAMPLING
    row = (np.take(start[:, 0], leaf_map) + at[:, None]) & (tile - 1)
    column = (np.take(start[:, 1], leaf_map) + at) & (tile - 1)
    row *= tile
    row += column
    row += np.take(which, leaf_map)
    texture = np.take(bank.ravel(), row)
    texture *= np.take(contrast, leaf_map)
    return texture


def _draw_texture(tile, config, rng):
    """A periodic float32 texture [tile, tile] of mean 0 and deviation 1: noise or stripes, patchy or not."""
    if rng.random() < config.gratings:
        cycles = tile / _log_uniform(config.grating_period, rng)
        angle = rng.uniform(0, np.pi)
        # Whole cycles on each axis make it periodic.
        across, down = np.round(cycles * np.cos(angle)), np.round(cycles * np.sin(angle))
        if across == down == 0:
            across = 1
        phase = np.float32(2 * np.pi / tile) * np.arange(tile, dtype=np.float32)
        phase = np.float32(across) * phase + np.float32(down) * phase[:, None]
        phase += np.float32(rng.uniform(*config.grating_warp)) * coloured_noise(tile, 1.8, 1.0, 0.0, rng)
        texture = np.sin(phase)
    else:
        exponent, stretch = rng.uniform(*config.noise_exponent), _log_uniform(config.noise_stretch, rng)
        texture = coloured_noise(tile, exponent, stretch, rng.uniform(0, np.pi), rng)
    if rng.random() < 0.5:  # patches with edges between them
        texture = np.tanh(np.float32(rng.uniform(1, 4)) * (texture - np.float32(rng.uniform(-1, 1))))
    mean, deviation = cv2.meanStdDev(texture)
    return (texture - np.float32(mean.item())) * np.float32(1 / max(deviation.item(), 1e-6))


def coloured_noise(
    tile: int, exponent: float, stretch: float, angle: float, rng: np.random.Generator
) -> Float32[np.ndarray, "{tile} {tile}"]:
    """Periodic normal noise of amplitude 1 / f^exponent, mean 0 and deviation 1.

    Its correlation is `stretch` times as long along the direction `angle` (radians from x towards y) as across it.
    """
    down = np.fft.fftfreq(tile).astype(np.float32)[:, None]
    across = np.fft.rfftfreq(tile).astype(np.float32)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    squared = (cos * across + sin * down) ** 2 * np.float32(stretch)
    squared += (cos * down - sin * across) ** 2 * np.float32(1 / stretch)
    squared[0, 0] = np.inf  # no mean
    noise = rng.standard_normal((*squared.shape, 2), np.float32).view(np.complex64)[..., 0]
    field = np.fft.irfft2(noise * squared ** np.float32(-exponent / 2), (tile, tile))
    return (field / max(field.std(), 1e-12)).astype(np.float32)


def _shading(leaf_map, centres, radii, config, rng):
    """A slope across each leaf and a fall towards its rim."""
    count = len(radii)
    roundness = rng.uniform(*config.roundness, count)
    slope = config.gradient * rng.standard_normal((count, 2))
    # With u the position from the leaf's centre in radii: slope . u - roundness |u|^2. The ground's row is flat.
    table = np.zeros((count + 1, 6), np.float32)
    table[1:] = np.column_stack([centres, 1 / radii, slope, roundness])
    x, y, scale, slope_x, slope_y, fall = (np.take(column, leaf_map) for column in table.T.copy())
    at = (np.arange(len(leaf_map), dtype=np.float32) + np.float32(0.5)) / SUPERSAMPLING
    x, y = (at - x) * scale, (at[:, None] - y) * scale
    return x * (slope_x - fall * x) + y * (slope_y - fall * y)


def _lighting_and_shadow(leaf_map, count, side, config, rng):
    """A slope over the image, and soft shadows on what lies lower than its neighbours on the side of the light.

    The shadow is the positive part of (heights around - own height), with the heights blurred and shifted away from
    the light: Luft, Colditz and Deussen 2006, "Image enhancement by unsharp masking the depth buffer".
    """
    slope = config.lighting * rng.standard_normal(2)
    at = np.linspace(-1, 1, len(leaf_map), dtype=np.float32)
    light = np.float32(slope[0]) * at + np.float32(slope[1]) * at[:, None]

    strength, sigma = rng.uniform(*config.shadow), _log_uniform(config.shadow_sigma, rng)
    direction = rng.uniform(0, 2 * np.pi)
    height = leaf_map.astype(np.float32)
    height *= np.float32(1 / max(count, 1))
    around = cv2.resize(height, (side, side), interpolation=cv2.INTER_AREA)
    around = cv2.GaussianBlur(around, (0, 0), sigma, borderType=cv2.BORDER_REFLECT_101)
    move = np.array(
        [[1, 0, 2 * sigma * np.cos(direction)], [0, 1, 2 * sigma * np.sin(direction)]], np.float32
    )
    around = cv2.warpAffine(
        around, move, (side, side), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101
    )
    around = cv2.resize(around, height.shape[::-1], interpolation=cv2.INTER_LINEAR)
    light -= np.float32(strength) * cv2.max(around - height, 0.0)
    return light


# --------------------------------------------------------------------------------------------------
# Small helpers
# --------------------------------------------------------------------------------------------------


def _log_uniform(bounds, rng, size=None):
    return np.exp(rng.uniform(*np.log(bounds), size))
