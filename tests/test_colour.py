"""Colour correction: what each method brings back, what it leaves, and that it does nothing where nothing is wrong."""

import cv2
import numpy as np
import pytest
import skimage.data
from skimage.color import rgb2lab

from zipir_jax.colour import LEVELS, correct_colour, low_frequencies
from zipir_jax.config import COLOUR_CORRECTIONS


@pytest.fixture(scope="module")
def photograph():
    """float32 [128, 160, 3], clear of black and white, where a shift would be clipped."""
    crop = skimage.data.astronaut()[60:188, 150:310].astype(np.float32)
    return (crop / 127.5 - 1) * 0.6


def shifted(photograph):
    return photograph + np.array([0.15, -0.1, 0.05], np.float32)


@pytest.mark.parametrize("method", COLOUR_CORRECTIONS)
def test_a_picture_of_the_right_colours_stays_as_it_is(photograph, method):
    np.testing.assert_allclose(correct_colour(photograph, photograph, method), photograph, atol=0.005)


@pytest.mark.parametrize("method", ["wavelet", "adain"])
def test_a_constant_shift_is_undone(photograph, method):
    np.testing.assert_allclose(correct_colour(shifted(photograph), photograph, method), photograph, atol=1e-4)


def test_lab_brings_chroma_back_and_leaves_the_lightness(photograph):
    restored = shifted(photograph)
    before, after, wanted = (
        rgb2lab((x + 1) / 2) for x in (restored, correct_colour(restored, photograph, "lab"), photograph)
    )
    np.testing.assert_allclose(after[..., 0], before[..., 0], atol=0.1)  # L*, of 100
    error = [np.abs(low_frequencies(x - wanted)[..., 1:]).mean() for x in (before, after)]
    assert error[0] > 3 and error[1] < error[0] / 10  # a* and b*


def test_wavelet_keeps_the_detail_of_the_result(photograph):
    """Detail: what alternates from pixel to pixel, which every filter of the transform removes."""
    checkered = np.indices(photograph.shape[:2]).sum(0)[..., None] % 2 * 0.2 - 0.1
    restored = (photograph + checkered).astype(np.float32)
    corrected = correct_colour(restored, photograph, "wavelet")
    inside = slice(2**LEVELS, -(2**LEVELS))  # beyond, the mirror turns the pattern around
    np.testing.assert_allclose(corrected[inside, inside], restored[inside, inside], atol=1e-5)


def test_adain_matches_mean_and_deviation(photograph):
    restored = np.clip(photograph[::-1] * 1.3 + 0.1, -1, 1)
    corrected = correct_colour(restored, photograph * 0.5, "adain")
    np.testing.assert_allclose(corrected.mean((0, 1)), (photograph * 0.5).mean((0, 1)), atol=1e-4)
    np.testing.assert_allclose(corrected.std((0, 1)), (photograph * 0.5).std((0, 1)), atol=1e-4)


def test_low_frequencies_pass_what_is_flat_and_stop_what_alternates():
    rows = np.indices((97, 64)).sum(0)[..., None]
    np.testing.assert_allclose(low_frequencies(np.full((97, 64, 3), 0.3, np.float32)), 0.3, atol=1e-6)
    alternating = low_frequencies((rows % 2 - 0.5).astype(np.float32))
    assert np.abs(alternating[LEVELS:-LEVELS, LEVELS:-LEVELS]).max() < 0.02  # the border mirrors it
    assert low_frequencies(rows.astype(np.float32)).shape == rows.shape  # one channel stays one


@pytest.mark.parametrize("method", COLOUR_CORRECTIONS)
@pytest.mark.parametrize("size", [(1, 1), (1, 50), (3, 7)])
def test_any_size(method, size):
    image = np.linspace(-0.9, 0.9, num=size[0] * size[1] * 3, dtype=np.float32).reshape(*size, 3)
    reference = cv2.flip(image, -1).reshape(image.shape)
    corrected = correct_colour(image, reference, method)
    assert corrected.shape == image.shape and corrected.dtype == np.float32
    assert np.abs(corrected).max() <= 1


def test_an_unknown_method_is_named(photograph):
    with pytest.raises(ValueError, match="'histogram' is not one of none, lab"):
        correct_colour(photograph, photograph, "histogram")
