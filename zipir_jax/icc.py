"""ICC profiles: colours of a file to sRGB, which the network knows, and back.

LittleCMS computes in float32 without bounds: a colour that sRGB does not hold becomes values below 0 or above 1, and
comes back exactly. The curve of sRGB is a straight line below 0, of slope 12.92, so that a pure green of Adobe RGB
has a red of -5.1. Here it is mirrored instead, as CSS Color 4 extends sRGB: the red is -0.66, on the scale that the
eye has, and what is enlarged beside an edge stays small.

imagecodecs is imported where it is used, as most pictures need none of this.
"""

import functools
import itertools

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import ImageCms

# Header fields, ICC.1:2022 section 7.2.5 and 7.2.6.
CLASSES = {b"mntr", b"scnr", b"prtr", b"spac"}  # not links, abstract or named-colour profiles
SPACES = {1: b"GRAY", 3: b"RGB ", 4: b"CMYK"}
NAMES = {1: "gray", 3: "rgb", 4: "cmyk"}  # of the same, for imagecodecs
ROWS = 256  # that are converted at once


@functools.lru_cache(maxsize=16)
def use_of_profile(profile: bytes, channels: int) -> str | None:
    """What a profile does for pixels of 1 (grey), 3 (RGB) or 4 (CMYK) channels: "sRGB", "both ways", "to sRGB" or None.

    By what it does, as a name says little: profiles within 1e-3 of sRGB count as it. None: damaged, or of other pixels.
    """
    if profile[12:16] not in CLASSES or profile[16:20] != SPACES[channels]:
        return None
    values = np.linspace(0, 1, 9, dtype=np.float32)
    grid = np.array(list(itertools.product(values, repeat=channels)), np.float32)[:, None]
    try:
        if channels == 4:
            to_srgb(grid, profile)
            return "to sRGB"
        srgb = to_srgb(grid, profile)
        if not np.isfinite(srgb).all():
            return None
        if np.abs(srgb - grid).max() < 1e-3:
            return "sRGB"
    except RuntimeError:  # imagecodecs.CmsError
        return None
    try:
        # Profiles of tables are inverted by other tables, and not exactly.
        return "both ways" if np.abs(from_srgb(srgb, profile) - grid).mean() < 0.02 else "to sRGB"
    except RuntimeError:  # there is no way back in profiles of scanners
        return "to sRGB"


def to_srgb(
    pixels: Float32[np.ndarray, "h w c"] | UInt8[np.ndarray, "h w c"], profile: bytes
) -> Float32[np.ndarray, "h w c2"]:
    """Pixels of a profile, float32 in [0, 1] or uint8, in sRGB: grey stays one channel, else there are three.

    What sRGB does not hold is below 0 or above 1. Raises RuntimeError for a profile that
    `use_of_profile` has no use for.
    """
    channels = pixels.shape[2]
    full = np.float32(
        100 if channels == 4 and pixels.dtype != np.uint8 else 1
    )  # LittleCMS has ink in percent
    result = np.empty((*pixels.shape[:2], 1 if channels == 1 else 3), np.float32)
    for start in range(0, len(pixels), ROWS):
        rows = slice(start, start + ROWS)
        part = pixels[rows] if full == 1 else full * pixels[rows]
        srgb = _transform(part, profile, _srgb(), NAMES[channels], "rgb", np.float32)
        result[rows] = _mirrored(srgb[..., 1:2] if channels == 1 else srgb)  # grey: green, as all are equal
    return result


def to_srgb_uint8(pixels: UInt8[np.ndarray, "h w c"], profile: bytes) -> UInt8[np.ndarray, "h w c2"]:
    """`to_srgb`, clipped and in whole numbers, 20 times as fast and right to a level (0.74 of one, measured)."""
    channels = pixels.shape[2]
    srgb = _transform(pixels, profile, _srgb(), NAMES[channels], "rgb", np.uint8)
    return srgb[..., 1:2] if channels == 1 else srgb


def lab_to_srgb(lab: Float32[np.ndarray, "h w 3"]) -> Float32[np.ndarray, "h w 3"]:
    """CIELAB of D50, as TIFF files hold it, L* in 0..100, in sRGB, clipped to [0, 1]."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    result = np.empty_like(lab)
    for start in range(0, len(lab), ROWS):
        rows = slice(start, start + ROWS)
        result[rows] = _transform(lab[rows], profile, _srgb(), "lab", "rgb", np.float32)
    return np.clip(result, 0, 1, out=result)


def from_srgb(pixels: Float32[np.ndarray, "h w c"], profile: bytes) -> Float32[np.ndarray, "h w c"]:
    """What `to_srgb` made of grey or RGB pixels, in their profile again: float32, clipped to [0, 1]."""
    channels = pixels.shape[2]
    result = np.empty_like(pixels)
    for start in range(0, len(pixels), ROWS):
        rows = slice(start, start + ROWS)
        srgb = np.repeat(pixels[rows], 3, -1) if channels == 1 else pixels[rows]
        result[rows] = _transform(_straight(srgb), _srgb(), profile, "rgb", NAMES[channels], np.float32)
    return np.clip(result, 0, 1, out=result)


def _transform(pixels, profile, to_profile, space, to_space, dtype):
    import imagecodecs

    transformed = imagecodecs.cms_transform(
        np.ascontiguousarray(pixels),
        profile,
        to_profile,
        colorspace=space,
        outcolorspace=to_space,
        outdtype=dtype,
        # White stays white, and black-point compensation, which would move all colours, is off.
        intent=imagecodecs.CMS.INTENT.RELATIVE_COLORIMETRIC,
    )
    return transformed.reshape(*pixels.shape[:2], -1)


@functools.cache
def _srgb():
    import imagecodecs

    return imagecodecs.cms_profile("srgb")


def _mirrored(srgb):
    """sRGB values below 0, on the straight line, put on the mirrored curve; in place."""
    below = srgb < -0.04045  # as far the curve is a straight line itself
    srgb[below] = 0.055 - 1.055 * (srgb[below] / -12.92) ** (1 / 2.4)
    return srgb


def _straight(srgb):
    """The inverse of `_mirrored`, as a new array."""
    below = srgb < -0.04045
    srgb = srgb.copy()
    srgb[below] = -12.92 * ((0.055 - srgb[below]) / 1.055) ** 2.4
    return srgb
