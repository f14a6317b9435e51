import io

import imagecodecs
import numpy as np
import pytest
from PIL import ImageCms
from skimage.color import deltaE_ciede2000, rgb2lab

from zipir_jax.icc import (
    ADOBE_RGB,
    coded_profile,
    from_srgb,
    lab_to_srgb,
    rgb_profile,
    to_srgb,
    to_srgb_uint8,
    use_of_profile,
)

PRIMARIES = {  # white point, and the chromaticities of red, green and blue
    "Display P3": ((0.3127, 0.329, 1.0), (0.68, 0.32, 1.0, 0.265, 0.69, 1.0, 0.15, 0.06, 1.0), 2.2),
    "ProPhoto": ((0.3457, 0.3585, 1.0), (0.7347, 0.2653, 1.0, 0.1596, 0.8404, 1.0, 0.0366, 0.0001, 1.0), 1.8),
}


def rgb_profile_of_littlecms(name):
    if name == "Adobe RGB":
        return imagecodecs.cms_profile("adobergb")
    white, primaries, gamma = PRIMARIES[name]
    return imagecodecs.cms_profile("rgb", whitepoint=white, primaries=primaries, gamma=gamma)


SRGB = imagecodecs.cms_profile("srgb")
GREY = imagecodecs.cms_profile("gray", gamma=1.8)
WIDE = ["Adobe RGB", "Display P3", "ProPhoto"]


@pytest.fixture(scope="module")
def colours():
    """float32 [9, 81, 3]: a grid of the cube, its corners included."""
    levels = np.linspace(0, 1, 9, dtype=np.float32)
    return np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(9, 81, 3)


@pytest.mark.parametrize("name", WIDE)
def test_colours_outside_srgb_come_back(colours, name):
    profile = rgb_profile_of_littlecms(name)
    assert use_of_profile(profile, 3) == "both ways"
    srgb = to_srgb(colours, profile)
    assert srgb.min() < -0.1 and srgb.max() > 1.05
    np.testing.assert_allclose(from_srgb(srgb, profile), colours, atol=1e-3)


@pytest.mark.parametrize("name", WIDE)
def test_colours_within_srgb_are_those_of_the_profile(name):
    """Lab through the profile, by Pillow's LittleCMS, and through sRGB, by scikit-image, are one colour."""
    profile = rgb_profile_of_littlecms(name)
    patches = np.array([[[90, 120, 140], [200, 190, 60], [128, 128, 128], [30, 40, 35]]], np.uint8)
    to_lab = ImageCms.buildTransform(
        ImageCms.ImageCmsProfile(ImageCms.core.profile_frombytes(profile)),
        ImageCms.createProfile("LAB"),
        "RGB",
        "LAB",
        ImageCms.Intent.ABSOLUTE_COLORIMETRIC,
    )
    lab = np.asarray(ImageCms.applyTransform(ImageCms.Image.fromarray(patches), to_lab))
    expected = np.stack([lab[..., 0] / 2.55, *(lab[..., i].view(np.int8) for i in (1, 2))], -1)
    srgb = to_srgb(patches.astype(np.float32) / 255, profile)
    # Of D50, as the profile's: relative to white.
    difference = deltaE_ciede2000(rgb2lab(lab_to_srgb(expected.astype(np.float32))), rgb2lab(srgb))
    assert difference.max() < 1  # Pillow's Lab has 8 bits


@pytest.mark.parametrize("name", WIDE)
def test_8_bits_are_converted_as_float32_is(colours, name):
    pixels = np.round(colours * 255).astype(np.uint8)
    expected = np.clip(to_srgb(pixels.astype(np.float32) / 255, rgb_profile_of_littlecms(name)), 0, 1) * 255
    np.testing.assert_allclose(to_srgb_uint8(pixels, rgb_profile_of_littlecms(name)), expected, atol=1)


def test_a_profile_is_srgb_by_what_it_does():
    assert use_of_profile(SRGB, 3) == "sRGB"
    described_otherwise = SRGB.replace("sRGB".encode("utf-16-be"), "mine".encode("utf-16-be"))
    assert described_otherwise != SRGB and use_of_profile(described_otherwise, 3) == "sRGB"
    assert use_of_profile(imagecodecs.cms_profile("rgb", gamma=2.2), 3) != "sRGB"


def test_profiles_of_codes_are_those_of_their_colours(colours):
    """LittleCMS's own, of the same primaries; Display P3 as it is published, with the curve of sRGB."""
    linear = imagecodecs.cms_profile(
        "rgb", whitepoint=(0.3127, 0.329, 1.0), primaries=PRIMARIES["Display P3"][1], gamma=1.0
    )
    for made, other in [
        (coded_profile(1, 13), SRGB),
        (rgb_profile(*ADOBE_RGB), rgb_profile_of_littlecms("Adobe RGB")),
        (coded_profile(12, 8), linear),
    ]:
        np.testing.assert_allclose(to_srgb(colours, made), to_srgb(colours, other), atol=2e-3)
    decoded = np.where(colours < 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    np.testing.assert_allclose(to_srgb(colours, coded_profile(12, 13)), to_srgb(decoded, linear), atol=1e-3)
    assert use_of_profile(coded_profile(1, 1), 3) == "sRGB"
    assert ImageCms.getProfileDescription(
        ImageCms.ImageCmsProfile(io.BytesIO(coded_profile(12, 8)))
    ).startswith("Display P3, linear")


def test_grey_stays_grey_and_comes_back():
    assert use_of_profile(GREY, 1) == "both ways"
    ramp = np.linspace(0, 1, 200, dtype=np.float32).reshape(1, 200, 1)
    srgb = to_srgb(ramp, GREY)
    linear = np.where(srgb < 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    assert srgb.shape == ramp.shape
    np.testing.assert_allclose(linear, ramp**1.8, atol=1e-3)
    np.testing.assert_allclose(from_srgb(srgb, GREY), ramp, atol=1e-4)


def test_profiles_that_are_damaged_or_of_other_pixels_are_none():
    adobe = rgb_profile_of_littlecms("Adobe RGB")
    assert use_of_profile(adobe, 1) is use_of_profile(adobe, 4) is use_of_profile(GREY, 3) is None
    for damaged in (
        b"",
        b"garbage",
        adobe[:200],
        adobe[:-20],
        bytes(1000),
        adobe[:128] + bytes(len(adobe) - 128),
    ):
        assert use_of_profile(damaged, 3) is None
    link = adobe[:12] + b"link" + adobe[16:]
    assert use_of_profile(link, 3) is None


def test_any_change_of_a_profile_is_a_use_or_none():
    """Bytes changed at random: nothing raises, and what is used gives numbers."""
    rng = np.random.default_rng(0)
    adobe = np.frombuffer(rgb_profile_of_littlecms("Adobe RGB"), np.uint8)
    for _ in range(200):
        changed = adobe.copy()
        changed[rng.integers(128, len(adobe), 3)] = rng.integers(0, 256, 3)
        assert use_of_profile(changed.tobytes(), 3) in ("sRGB", "both ways", "to sRGB", None)


def test_lab_is_of_d50():
    lab = np.array([[[100, 0, 0], [0, 0, 0], [53.39, 0, 0]]], np.float32)
    np.testing.assert_allclose(lab_to_srgb(lab), np.array([[[1] * 3, [0] * 3, [0.5] * 3]]), atol=2e-3)
