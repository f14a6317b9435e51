import dataclasses

import cv2
import numpy as np
import pytest
from scipy.stats import kstest, kurtosis

from zipir_jax.config import DataConfig, SyntheticConfig
from zipir_jax.data import synthetic
from zipir_jax.data.pipeline import batches
from zipir_jax.data.sources import open_sources
from zipir_jax.data.synthetic import (
    SyntheticSource,
    coloured_noise,
    draw_leaf_map,
    draw_leaves,
    draw_radii,
    leaf_borders,
    synthetic_image,
    to_srgb,
)

SHAPES = ("ellipses", "rectangles", "polygons", "blobs")
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
# Leaves of plain colours: no texture, shading, shadow or lighting, and a blur that reaches no neighbour.
PLAIN = SyntheticConfig(
    texture_contrast=0.0,
    gradient=0.0,
    roundness=(0.0, 0.0),
    lighting=0.0,
    shadow=(0.0, 0.0),
    lens_sigma=(0.1, 0.1),
)


def only(shape, config=PLAIN):
    return dataclasses.replace(config, **{name: float(name == shape) for name in SHAPES})


# --------------------------------------------------------------------------------------------------
# Source
# --------------------------------------------------------------------------------------------------


def test_an_image_depends_on_its_seed_and_index_alone():
    source = SyntheticSource(5, 64, 0)
    forward = [source[i] for i in range(5)]
    backward = [SyntheticSource(9, 64, 0)[i] for i in reversed(range(5))][::-1]
    for image, again in zip(forward, backward, strict=True):
        assert (image.shape, image.dtype) == ((64, 64, 3), np.uint8)
        np.testing.assert_array_equal(image, again)
    others = [*forward, SyntheticSource(5, 64, 1)[0], SyntheticSource(5, 64, 0, only("blobs"))[0]]
    assert len({image.tobytes() for image in others}) == 7


def test_a_source_says_what_it_holds():
    source = SyntheticSource(5, 64, 0)
    assert len(source) == 5
    assert repr(source) == repr(SyntheticSource(5, 64, 0))
    assert repr(source).startswith("SyntheticSource(5 images of 64 px, seed 0, ")
    others = [(6, 64, 0), (5, 65, 0), (5, 64, 1), (5, 64, 0, only("blobs"))]
    assert len({repr(SyntheticSource(*other)) for other in others} | {repr(source)}) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, 64, 0), "count 0"), ((5, 0, 0), "side 0"), ((5, 64, -1), "seed -1")],
)
def test_a_source_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=f"{message} of the synthetic images is not at least"):
        SyntheticSource(*arguments)


def test_an_index_outside_is_refused():
    for index in (-1, 5):
        with pytest.raises(IndexError, match=f"image {index} does not lie within 0 to 4"):
            SyntheticSource(5, 64, 0)[index]
    assert len(list(SyntheticSource(2, 32, 0))) == 2


@pytest.mark.parametrize("side", [1, 33])
def test_any_side_is_drawn(side):
    assert SyntheticSource(1, side, 0)[0].shape == (side, side, 3)


def test_a_ground_without_leaves_is_an_image_of_one_colour():
    config = dataclasses.replace(PLAIN, layers=1e-9)
    image = synthetic_image(32, config, np.random.default_rng(0))
    np.testing.assert_array_equal(image, np.broadcast_to(image[0, 0], image.shape))


def test_it_feeds_the_loader():
    config = DataConfig(resolutions=(64,), batch_size=3)
    batch = next(batches(config, open_sources(("synthetic:4:80",)), 0))["image"]
    assert (batch.shape, batch.dtype) == ((3, 64, 64, 3), np.float32)
    assert batch.std() > 0.1


# --------------------------------------------------------------------------------------------------
# Leaves
# --------------------------------------------------------------------------------------------------


def distribution(smallest, largest):
    return lambda r: (smallest**-2 - r**-2) / (smallest**-2 - largest**-2)


def test_radii_follow_the_inverse_cube():
    radii = draw_radii(20_000, 2.0, 100.0, np.random.default_rng(0))
    assert radii.min() >= 2 and radii.max() <= 100
    assert kstest(radii, distribution(2, 100)).pvalue > 0.05
    assert kstest(radii, lambda r: (1 / 2 - 1 / r) / (1 / 2 - 1 / 100)).pvalue < 1e-6  # r^-2


def test_leaves_of_an_image_follow_the_law_and_are_as_many_as_asked_for():
    config = dataclasses.replace(PLAIN, smallest_radius=(2.0, 2.0), largest_radius=(0.05, 0.05), layers=2.0)
    centres, radii = draw_leaves(400, config, np.random.default_rng(0))
    inside = ((centres > 0) & (centres < 400)).all(axis=1)
    assert kstest(radii[inside], distribution(2, 20)).pvalue > 0.01
    assert np.pi * (radii[inside] ** 2).sum() / 400**2 == pytest.approx(2, rel=0.1)
    for axis in (0, 1):
        assert kstest(centres[inside, axis] / 400, "uniform").pvalue > 0.05
    # The order in which they fall does not depend on their size.
    assert abs(np.corrcoef(np.arange(len(radii)), np.log(radii))[0, 1]) < 0.05


@pytest.mark.parametrize("shape", SHAPES)
def test_the_ground_stays_bare_where_no_leaf_fell(shape):
    """Boolean model: the bare share is exp(-mean area of leaves over a point); border and middle alike."""
    config = dataclasses.replace(
        only(shape), smallest_radius=(4.0, 4.0), largest_radius=(0.1, 0.1), layers=1.0
    )
    bare = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        bare.append(draw_leaf_map(200, *draw_leaves(200, config, rng), config, rng) == 0)
    assert np.mean(bare) == pytest.approx(np.exp(-1), abs=0.04)
    rim = np.ones((400, 400), bool)
    rim[40:-40, 40:-40] = False
    assert np.mean(bare, axis=0)[rim].mean() == pytest.approx(np.exp(-1), abs=0.08)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("radius", [3.0, 20.0])
def test_a_leaf_has_the_area_of_its_disc_and_stays_within_reach(shape, radius):
    config, rng = only(shape), np.random.default_rng(0)
    areas = []
    for _ in range(60):
        centre = rng.uniform(99, 101, (1, 2))
        areas.append((draw_leaf_map(200, centre, np.array([radius]), config, rng) > 0).sum() / 4)
    assert np.mean(areas) / (np.pi * radius**2) == pytest.approx(1, abs=0.1)
    borders, _ = leaf_borders(np.full(500, radius), config, rng)
    assert np.hypot(*np.moveaxis(borders, -1, 0)).max() < radius * synthetic._reach(config)


@pytest.mark.parametrize("seed", range(4))
def test_borders_are_smooth_or_have_corners_whatever_shapes_mix(seed):
    config = dataclasses.replace(only("blobs"), rectangles=0.5, blobs=0.5, aspect=(1.0, 1.0))
    borders, convex = leaf_borders(np.full(40, 10.0), config, np.random.default_rng(seed))
    corners = np.array([len(np.unique(border.round(3), axis=0)) for border in borders])
    assert 10 < convex.sum() < 30
    assert (corners[convex] == 4).all()
    assert (corners[~convex] == synthetic.POINTS).all()
    turns = np.diff(borders[~convex], axis=1)
    directions = np.arctan2(turns[..., 1], turns[..., 0])
    bends = np.abs(np.angle(np.exp(1j * np.diff(directions))))
    assert np.median(bends.max(axis=1)) < 0.9  # radians between sides; a right angle is 1.6


def test_a_disc_lies_where_its_centre_says():
    config = dataclasses.replace(only("ellipses"), aspect=(1.0, 1.0))
    centre = np.array([[20.3, 41.8]])
    drawn = draw_leaf_map(64, centre, np.array([10.0]), config, np.random.default_rng(0))
    rows, columns = np.nonzero(drawn)
    middle = (np.array([columns.mean(), rows.mean()]) + 0.5) / 2
    np.testing.assert_allclose(middle, centre[0], atol=0.1)


def test_later_leaves_lie_on_earlier_ones():
    config = dataclasses.replace(only("ellipses"), aspect=(1.0, 1.0))
    centres = np.array([[16.0, 16.0], [20.0, 16.0]])
    drawn = draw_leaf_map(32, centres, np.array([6.0, 6.0]), config, np.random.default_rng(0))
    assert drawn[32, 36] == 2  # in both discs
    assert drawn[32, 24] == 1


def between_share(config):
    """Of pixels whose left and right neighbours differ much, the share that lies clearly between the two."""
    between = []
    for seed in range(4):
        image = synthetic_image(128, config, np.random.default_rng(seed)) @ LUMA
        low = np.minimum(image[:, :-2], image[:, 2:])
        high = np.maximum(image[:, :-2], image[:, 2:])
        edge = high - low > 30
        middle = image[:, 1:-1]
        between.append(((middle > low + 3) & (middle < high - 3))[edge])
    return np.concatenate(between).mean()


def test_edges_are_antialiased(monkeypatch):
    config = dataclasses.replace(PLAIN, smallest_radius=(15.0, 15.0))
    assert between_share(config) > 0.25
    monkeypatch.setattr(synthetic, "SUPERSAMPLING", 1)
    assert between_share(config) < 0.05


# --------------------------------------------------------------------------------------------------
# Statistics of photographs
# --------------------------------------------------------------------------------------------------


@pytest.fixture(name="greys", scope="module")
def make_greys():
    source = SyntheticSource(12, 256, 7)
    return [source[i].astype(np.float32) @ LUMA for i in range(12)]


def spectral_slope(image):
    """Slope of log power over log frequency, from 4 cycles an image to 0.35 cycles a pixel."""
    side = len(image)
    window = np.hanning(side)
    power = np.abs(np.fft.fft2((image - image.mean()) * window * window[:, None])) ** 2
    frequency = np.hypot(np.fft.fftfreq(side), np.fft.fftfreq(side)[:, None])
    edges = np.geomspace(4 / side, 0.35, 16)
    rings = np.digitize(frequency, edges)
    means = [power[rings == ring].mean() for ring in range(1, 16)]
    return np.polyfit(np.log(edges[:-1]), np.log(means), 1)[0]


def half(image):
    return cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)


def gradients(image):
    return np.diff(image, axis=1).ravel()


def test_the_power_spectrum_falls_as_that_of_photographs(greys):
    # Amplitude ~ 1 / f^alpha with alpha from 0.8 to 1.5, 1.2 on average (Tolhurst, Tadmor and Chao 1992).
    slopes = [spectral_slope(image) for image in greys]
    assert -2.8 < np.mean(slopes) < -2.0
    assert min(slopes) > -3.6 and max(slopes) < -1.4


def test_gradients_are_heavy_tailed(greys):
    # A normal distribution has 3; scikit-image's four colour photographs 11 to 33.
    values = [kurtosis(gradients(image), fisher=False) for image in greys]
    assert min(values) > 5
    assert 9 < np.mean(values) < 40


def test_half_the_size_has_the_same_statistics(greys):
    slopes, kurtoses, deviations = [], [], []
    for image in greys:
        pair = image, half(image)
        slopes.append([spectral_slope(x) for x in pair])
        kurtoses.append([kurtosis(gradients(x), fisher=False) for x in pair])
        deviations.append([gradients(x).std() for x in pair])
    full, halved = np.mean(slopes, axis=0)
    assert abs(full - halved) < 0.5
    full, halved = np.mean(kurtoses, axis=0)
    assert 0.5 < halved / full < 1.5
    # Scale invariance keeps it; white noise would halve it, a smooth image would double it.
    full, halved = np.mean(deviations, axis=0)
    assert 0.9 < halved / full < 1.6


def test_exposure_and_colours_are_moderate():
    source = SyntheticSource(12, 128, 3)
    images = np.stack([source[i] for i in range(12)]).astype(np.float32)
    assert 60 < images.mean() < 140
    assert (images.min(-1) == 255).mean() < 0.03
    saturation = 1 - images.min(-1) / np.maximum(images.max(-1), 1)
    assert 0.1 < saturation.mean() < 0.5


# --------------------------------------------------------------------------------------------------
# Colours
# --------------------------------------------------------------------------------------------------


def log_colours(centres, config, seed):
    """Grey, yellow-blue and red-green of the leaves at these places of an image of 100 pixels."""
    colours = synthetic._leaf_colours(centres, 100, config, np.random.default_rng(seed))
    return np.log(colours[1:]) @ synthetic.OPPONENT.T


def test_colours_have_the_moments_of_the_config():
    config = SyntheticConfig(palette_spread=0.0)
    centres = np.full((1, 2), 50.0)
    logs = np.concatenate([log_colours(centres, config, seed) for seed in range(3000)])
    np.testing.assert_allclose(logs.mean(axis=0), (0, *config.colour_mean), atol=0.06)
    np.testing.assert_allclose(logs.std(axis=0), config.colour_std, rtol=0.05)
    correlation = np.corrcoef(logs.T)
    assert correlation[1, 2] == pytest.approx(config.colour_correlation, abs=0.04)
    np.testing.assert_allclose(correlation[0, 1:], 0, atol=0.06)


def test_an_image_has_a_palette_and_its_colours_come_in_patches():
    config = SyntheticConfig(palette=(4, 4), palette_spread=0.0)
    centres = np.random.default_rng(0).uniform(0, 100, (400, 2))
    distance = np.hypot(*(centres[:, None] - centres).transpose(2, 0, 1))
    near, far = [], []
    for seed in range(20):
        grey = log_colours(centres, config, seed)[:, 0].round(4)
        assert 1 < len(np.unique(grey)) <= 4
        same = grey[:, None] == grey
        near.append(same[(distance < 10) & (distance > 0)].mean())
        far.append(same[distance > 60].mean())
    assert np.mean(near) > np.mean(far) + 0.1


# --------------------------------------------------------------------------------------------------
# Textures and tone
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.8])
def test_noise_has_the_exponent_it_was_asked_for(exponent):
    noise = coloured_noise(128, exponent, 1.0, 0.0, np.random.default_rng(0))
    assert noise.mean() == pytest.approx(0, abs=1e-4)
    assert noise.std() == pytest.approx(1, abs=1e-4)
    power = np.abs(np.fft.fft2(noise)) ** 2
    frequency = np.hypot(np.fft.fftfreq(128), np.fft.fftfreq(128)[:, None])
    rings = (frequency > 0.02) & (frequency < 0.45)
    slope = np.polyfit(np.log(frequency[rings]), np.log(power[rings]), 1)[0]
    assert slope == pytest.approx(-2 * exponent, abs=0.1)


def test_stretched_noise_is_longer_along_its_angle():
    noise = coloured_noise(128, 1.5, 6.0, 0.0, np.random.default_rng(0))
    assert np.diff(noise, axis=0).std() > 2 * np.diff(noise, axis=1).std()


def test_textures_have_deviation_one_and_no_seam():
    config = SyntheticConfig(gratings=0.5)
    for seed in range(8):
        texture = synthetic._draw_texture(64, config, np.random.default_rng(seed))
        assert texture.dtype == np.float32
        assert texture.mean() == pytest.approx(0, abs=1e-3)
        assert texture.std() == pytest.approx(1, abs=1e-3)
        seam = np.abs(texture[:, 0] - texture[:, -1]).mean()
        assert seam < 2.5 * np.abs(np.diff(texture, axis=1)).mean() + 1e-3


def test_every_srgb_level_comes_back():
    levels = np.arange(256)
    encoded = levels / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    image = np.broadcast_to(linear.astype(np.float32)[:, None], (1, 256, 3))
    np.testing.assert_array_equal(to_srgb(image)[0, :, 0], levels)
    beyond = np.array([[[-1.0, 2.0, 1.0]]], np.float32)
    np.testing.assert_array_equal(to_srgb(beyond), [[[0, 255, 255]]])


def test_shadows_darken_only_what_lies_lower():
    leaf_map = np.zeros((128, 128), np.int32)
    leaf_map[32:96, 32:96] = 1
    config = dataclasses.replace(PLAIN, shadow=(1.0, 1.0), shadow_sigma=(3.0, 3.0))
    light = synthetic._lighting_and_shadow(leaf_map, 1, 64, config, np.random.default_rng(0))
    assert light.max() <= 0
    np.testing.assert_allclose(light[36:92, 36:92], 0, atol=1e-6)
    assert light.min() < -0.4
    np.testing.assert_allclose(light[:4, :4], 0, atol=1e-3)


# --------------------------------------------------------------------------------------------------
# Config
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "wrong", "message"),
    [
        ("smallest_radius", (0.1, 2.0), r"smallest_radius \(0.1, 2.0\) is not a rising range within 0.5"),
        ("largest_radius", (0.5, 0.2), r"largest_radius \(0.5, 0.2\) is not a rising range"),
        ("layers", 0.0, "layers 0.0 is not above 0"),
        ("blobs", 0.5, "the shares of the shapes sum to 1.2 instead of 1"),
        ("ellipses", -0.1, "ellipses -0.1 is not between 0 and 1"),
        ("aspect", (0.5, 2.0), r"aspect \(0.5, 2.0\) is not a rising range within 1"),
        ("corners", (2, 8), r"corners \(2, 8\) is not a rising range within 3"),
        ("colour_std", (1.0, -0.1, 0.2), "colour_std -0.1 is not at least 0"),
        ("colour_correlation", 1.5, "colour_correlation 1.5 does not lie within -1 to 1"),
        ("palette", (0, 3), r"palette \(0, 3\) is not a rising range within 1"),
        ("textures", 0, "textures 0 is not at least 1"),
        ("gratings", 1.5, "gratings 1.5 is not between 0 and 1"),
        ("grating_period", (1.0, 9.0), r"grating_period \(1.0, 9.0\) is not a rising range within 2"),
        ("shadow", (-1.0, 0.0), r"shadow \(-1.0, 0.0\) is not a rising range within 0"),
        ("exposure", (0.0, 0.5), r"exposure \(0.0, 0.5\) is not a rising range within 0.001 to 1"),
        ("lens_sigma", (0.5, 2.0), r"lens_sigma \(0.5, 2.0\) is not a rising range within 0.1 to 1"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(field, wrong, message):
    with pytest.raises(ValueError, match=message):
        SyntheticConfig(**{field: wrong})
