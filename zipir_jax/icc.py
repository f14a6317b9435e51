"""ICC profiles: colours of a file to sRGB, which the network knows, and back.

LittleCMS computes in float32 without bounds: a colour that sRGB does not hold becomes values below 0 or above 1, and
comes back exactly. The curve of sRGB is a straight line below 0, of slope 12.92, so that a pure green of Adobe RGB
has a red of -5.1. Here it is mirrored instead, as CSS Color 4 extends sRGB: the red is -0.66, on the scale that the
eye has, and what is enlarged beside an edge stays small.

imagecodecs is imported where it is used, as most pictures need none of this.
"""

import functools
import io
import itertools
import os
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import ImageCms

from zipir_jax.boxes import avif_colour_codes
from zipir_jax.files import RefusedError
from zipir_jax.metadata import exif_names_adobe_rgb

# Header fields, ICC.1:2022 section 7.2.5 and 7.2.6.
CLASSES = {b"mntr", b"scnr", b"prtr", b"spac"}  # not links, abstract or named-colour profiles
SPACES = {1: b"GRAY", 3: b"RGB ", 4: b"CMYK"}
NAMES = {1: "gray", 3: "rgb", 4: "cmyk"}  # of the same, for imagecodecs
ROWS = 64  # that a thread converts at once

# Colours by their codes in ITU-T H.273: x and y of red, green and blue (table 2; the white point of these is D65), and
# the curve Y = (a X + b)^g, below d a straight line of slope c, as (g, a, b, c, d) (table 3). 1, 6, 14 and 15 are
# television's, but what stills have under them was made for sRGB's, and browsers show it so.
PRIMARIES = {
    1: ("sRGB", (0.64, 0.33, 0.3, 0.6, 0.15, 0.06)),
    9: ("BT.2020", (0.708, 0.292, 0.17, 0.797, 0.131, 0.046)),
    12: ("Display P3", (0.68, 0.32, 0.265, 0.69, 0.15, 0.06)),
}
SRGB_CURVE = ("", (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045))
CURVES = dict.fromkeys((1, 6, 13, 14, 15), SRGB_CURVE)
CURVES |= {4: (", gamma 2.2", (2.2, 1.0, 0.0, 0.0, 0.0)), 8: (", linear", (1.0, 1.0, 0.0, 1.0, 0.0))}
PQ, HLG = 16, 18
ADOBE_RGB = "Adobe RGB (compatible)", (0.64, 0.33, 0.21, 0.71, 0.15, 0.06), (563 / 256, 1.0, 0.0, 0.0, 0.0)
D50, D65 = np.array([0.9642, 1, 0.8249]), np.array([0.3127 / 0.329, 1, (1 - 0.3127 - 0.329) / 0.329])
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


def profile_of(file: io.BufferedIOBase, info: dict, exif: bytes | None) -> bytes | None:
    """The profile of a file's colours: its own, or one made of the codes that it names them by; None where it has none.

    Codes are those of PNG's cICP chunk, which count before a profile (W3C, third edition, section 4.3), of AVIF and
    HEIC (a colr box of type nclx), and EXIF's for Adobe RGB. sRGB by code is None. info: {"icc_profile": the file's
    own}, of PNG "cicp", that chunk, and of HEIC its codes, as pillow-heif has them. Raises RefusedError for high
    dynamic range.
    """
    profile, codes = info.get("icc_profile"), None
    file.seek(0)
    start = file.read(8)
    if "cicp" in info:
        codes = info["cicp"][:2]
    elif profile is None and "nclx_profile" in info:
        codes = info["nclx_profile"]["color_primaries"], info["nclx_profile"]["transfer_characteristics"]
    elif profile is None and start[4:8] == b"ftyp":
        file.seek(0)
        codes = avif_colour_codes(file.read())
    if codes:
        primaries, curve = codes
        if curve in (PQ, HLG):
            name = "PQ" if curve == PQ else "HLG"
            raise RefusedError(
                f"high dynamic range ({name}) is not read; convert it to a standard range first"
            )
        if primaries in PRIMARIES and curve in CURVES:
            is_srgb = primaries == 1 and CURVES[curve] == SRGB_CURVE
            return None if is_srgb else coded_profile(primaries, curve)
    if profile is None and exif and exif_names_adobe_rgb(exif):
        return rgb_profile(*ADOBE_RGB)
    return profile


@functools.cache
def coded_profile(primaries: int, curve: int) -> bytes:
    """The profile of colours by their codes in PRIMARIES and CURVES; 1 and 13 are sRGB."""
    (name, xy), (suffix, parameters) = PRIMARIES[primaries], CURVES[curve]
    return rgb_profile(name + suffix, xy, parameters)


def rgb_profile(name: str, xy: tuple[float, ...], curve: tuple[float, ...]) -> bytes:
    """An ICC profile of version 4 (ICC.1:2022) for RGB of a white point D65; the same bytes at any time."""

    def fixed(values):
        return struct.pack(f">{np.size(values)}i", *np.round(65536 * np.ravel(values)).astype(int))

    def text(words):
        return (
            b"mluc\0\0\0\0"
            + struct.pack(">II4sII", 1, 12, b"enUS", 2 * len(words), 28)
            + words.encode("utf-16-be")
        )

    adapted = np.linalg.inv(BRADFORD) @ np.diag((BRADFORD @ D50) / (BRADFORD @ D65)) @ BRADFORD
    xyz = np.array([(x / y, 1, (1 - x - y) / y) for x, y in zip(xy[::2], xy[1::2], strict=True)]).T
    xyz = adapted @ (xyz * np.linalg.solve(xyz, D65))
    tags = {
        b"desc": text(name),
        b"cprt": text("No copyright, use freely"),
        b"wtpt": b"XYZ \0\0\0\0" + fixed(D50),
        b"chad": b"sf32\0\0\0\0" + fixed(adapted),
    }
    for channel, column in zip(b"rgb", xyz.T, strict=True):
        tags[bytes([channel]) + b"XYZ"] = b"XYZ \0\0\0\0" + fixed(column)
        tags[bytes([channel]) + b"TRC"] = b"para\0\0\0\0\0\3\0\0" + fixed(curve)
    table, body = struct.pack(">I", len(tags)), b""
    for tag, data in tags.items():
        table += tag + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    header = struct.pack(
        ">I4xI4s4s4s", 132 + 12 * len(tags) + len(body), 0x04400000, b"mntr", b"RGB ", b"XYZ "
    )
    header += struct.pack(">6H4s28x", 2026, 1, 1, 0, 0, 0, b"acsp") + fixed(D50)
    return header.ljust(128, b"\0") + table + body


@functools.lru_cache(maxsize=16)
def use_of_profile(profile: bytes, channels: int) -> str | None:
    """What a profile does for pixels of 1 (grey), 3 (RGB) or 4 (CMYK) channels: "sRGB", "both ways", "to sRGB" or None.

    By what it does, as a name says little: profiles within 1e-3 of sRGB count as it. None: damaged, or of other pixels.
    """
    if profile[12:16] not in CLASSES or profile[16:20] != SPACES[channels]:
        return None
    values = np.linspace(0, 1, 9, dtype=np.float32)
    grid = np.array(list(itertools.product(values, repeat=channels)), np.float32)[None]
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

    def convert(part):
        part = part if full == 1 else full * part
        srgb = _transform(part, profile, coded_profile(1, 13), NAMES[channels], "rgb", np.float32)
        return _mirrored(srgb[..., 1:2] if channels == 1 else srgb)  # grey: green, as all are equal

    return _in_strips(convert, pixels, 1 if channels == 1 else 3, np.float32)


def to_srgb_uint8(pixels: UInt8[np.ndarray, "h w c"], profile: bytes) -> UInt8[np.ndarray, "h w c2"]:
    """`to_srgb`, clipped and in whole numbers, 20 times as fast and right to a level (0.74 of one, measured)."""
    channels = pixels.shape[2]

    def convert(part):
        srgb = _transform(part, profile, coded_profile(1, 13), NAMES[channels], "rgb", np.uint8)
        return srgb[..., 1:2] if channels == 1 else srgb

    return _in_strips(convert, pixels, 1 if channels == 1 else 3, np.uint8)


def lab_to_srgb(lab: Float32[np.ndarray, "h w 3"]) -> Float32[np.ndarray, "h w 3"]:
    """CIELAB of D50, as TIFF files hold it, L* in 0..100, in sRGB, clipped to [0, 1]."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    srgb = _in_strips(
        lambda part: _transform(part, profile, coded_profile(1, 13), "lab", "rgb", np.float32),
        lab,
        3,
        np.float32,
    )
    return np.clip(srgb, 0, 1, out=srgb)


def from_srgb(pixels: Float32[np.ndarray, "h w c"], profile: bytes) -> Float32[np.ndarray, "h w c"]:
    """What `to_srgb` made of grey or RGB pixels, in their profile again: float32, clipped to [0, 1]."""
    channels = pixels.shape[2]

    def convert(part):
        srgb = _straight(np.repeat(part, 3, -1) if channels == 1 else part)
        return _transform(srgb, coded_profile(1, 13), profile, "rgb", NAMES[channels], np.float32)

    result = _in_strips(convert, pixels, channels, np.float32)
    return np.clip(result, 0, 1, out=result)


def _in_strips(
    convert: Callable[[np.ndarray], np.ndarray], pixels: np.ndarray, channels: int, dtype: type
) -> np.ndarray:
    """Pixels [h, w, channels] that are converted strip by strip, on all cores: LittleCMS lets Python go on."""
    result = np.empty((*pixels.shape[:2], channels), dtype)

    def strip(start):
        result[start : start + ROWS] = convert(pixels[start : start + ROWS])

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(strip, range(0, len(pixels), ROWS)))
    return result


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
