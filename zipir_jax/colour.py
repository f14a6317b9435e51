"""Colour correction: the colours of a restored picture brought back to those of the photograph.

Diffusion models drift in colour; the photograph, enlarged, has no detail but the right colours. `lab` and `wavelet`
trust its low frequencies, `adain` its mean and contrast:

    wavelet   low frequencies of the photograph, high ones of the result (J. Wang et al. 2024, "StableSR", section 3.4)
    adain     mean and deviation of each channel, of the photograph (StableSR, ibid.; Huang & Belongie 2017, eq. 8)
    lab       as wavelet, but of a* and b* of CIELAB alone: the lightness, where the eye sees detail, is the result's

The wavelet transform is the a trous one (Starck et al. 2007, "The Undecimated Wavelet Decomposition", eq. 12): its low
frequencies are the image after LEVELS binomial filters [1 2 1] / 4 with holes of 1, 2, 4, ... pixels.
"""

import warnings

import cv2
import numpy as np
from jaxtyping import Float32
from skimage.color import lab2rgb, rgb2lab

LEVELS = 5  # as StableSR's: what is trusted is larger than about 2^5 pixels of the result


def correct_colour(
    restored: Float32[np.ndarray, "h w 3"], photograph: Float32[np.ndarray, "h w 3"], method: str
) -> Float32[np.ndarray, "h w 3"]:
    """A restored picture with the colours of its photograph, both in [-1, 1] and of one size; as a new array.

    method: of config.COLOUR_CORRECTIONS. Raises ValueError for another one.
    """
    if method == "none":
        corrected = restored
    elif method == "wavelet":
        corrected = restored + low_frequencies(photograph - restored)
    elif method == "adain":
        corrected = match_moments(restored, photograph)
    elif method == "lab":
        lab = rgb2lab((restored + 1) / 2)
        lab[..., 1:] += low_frequencies(rgb2lab((photograph + 1) / 2)[..., 1:] - lab[..., 1:])
        with warnings.catch_warnings(action="ignore"):  # about colours that no screen has; they are clipped
            corrected = lab2rgb(lab) * 2 - 1
    else:
        raise ValueError(f"colour correction {method!r} is not one of none, lab, wavelet, adain")
    return np.clip(corrected, -1, 1)


def low_frequencies(image: Float32[np.ndarray, "h w c"]) -> Float32[np.ndarray, "h w c"]:
    """What LEVELS of the a trous wavelet transform leave of an image, mirrored at its borders."""
    height, width = image.shape[:2]
    for level in range(LEVELS):
        hole = 2**level
        kernel = np.zeros(2 * hole + 1, np.float32)
        kernel[[0, hole, 2 * hole]] = 0.25, 0.5, 0.25
        image = cv2.sepFilter2D(image, -1, kernel, kernel, borderType=cv2.BORDER_REFLECT)
    return image.reshape(height, width, -1)


def match_moments(
    image: Float32[np.ndarray, "h w c"], reference: Float32[np.ndarray, "h w c"]
) -> Float32[np.ndarray, "h w c"]:
    """An image whose channels have the means and standard deviations of another's (Huang & Belongie 2017, eq. 8)."""
    # In float64, and many times as fast as numpy's.
    (mean, deviation), (wanted, contrast) = (
        np.float32(cv2.meanStdDev(each))[..., 0] for each in (image, reference)
    )
    gain = contrast / np.maximum(deviation, np.finfo(np.float32).eps)  # a flat channel stays flat
    return (image - mean) * gain + wanted
