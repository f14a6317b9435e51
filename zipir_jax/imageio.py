"""Image files to arrays: one decoder, for training and for restoring."""

import contextlib
import dataclasses
import io
import itertools
import logging
import os
import re
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tifffile
from jaxtyping import Float32, UInt8
from PIL import Image, UnidentifiedImageError

from zipir_jax import icc, png, tiff
from zipir_jax.boxes import avif_bits
from zipir_jax.files import RefusedError
from zipir_jax.metadata import has_maker_note, orientation_of

HEIF_SUFFIXES = {".heic", ".heif", ".hif"}  # read with the extra `heif`
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"} | HEIF_SUFFIXES
# What Pillow may take a file for; of its other formats some run programs (EPS), and none is how photographs are kept.
PILLOW_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "AVIF")  # MPO is found as JPEG
HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
HEIF_SEQUENCES = {b"hevc", b"hevx", b"msf1"}
LARGEST_SIDE = 16384  # pixels of a result; beyond any size that the model is made for (8K)
LARGEST_PIXELS = LARGEST_SIDE**2  # of a picture that is read: 268 million, as many as a result can have
JPEG_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # but restarts, which lie within a scan
LOSSY = {"JPEG", "MPO", "WEBP", "AVIF", "HEIF"}  # formats that may be
# What decoders raise where a file's bytes make no sense.
DAMAGE = (ArithmeticError, EOFError, LookupError, RuntimeError, SyntaxError, ValueError)
DAMAGE += (struct.error, zlib.error, tifffile.TiffFileError)
SIGNATURES = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"GIF8", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"BM")


@dataclasses.dataclass(frozen=True, eq=False)  # arrays do not compare to one truth value
class Decoded:
    """What an image file holds, upright and in the file's own colours."""

    # Of 8 bits, or in [0, 1]; c is 1 (grey) or 3, which are not all equal.
    pixels: UInt8[np.ndarray, "h w c"] | Float32[np.ndarray, "h w c"]
    alpha: UInt8[np.ndarray, "h w"] | Float32[np.ndarray, "h w"] | None
    file_format: str
    icc: bytes | None  # a profile that has a way back from sRGB; pixels of others are in sRGB already
    exif: bytes | None  # without "Exif\0\0" before them
    xmp: bytes | None
    lost: tuple[str, ...] = ()  # what the file holds that is not here, one sentence each

    @property
    def has_own_colours(self) -> bool:
        """Whether the pixels are not in sRGB yet."""
        return self.icc is not None and icc.use_of_profile(self.icc, self.pixels.shape[2]) != "sRGB"


def raise_pixel_limit() -> None:
    """Let this process read pictures of up to LARGEST_PIXELS; for a program to call, not for a library.

    Pillow warns above 89 million pixels and refuses twice as many, to guard servers against small files that unpack to
    huge pictures. It leaves the limit to the application; ours is what a result can have. Its warning would only stand
    before our own refusal of the same picture, and so would what it, tifffile and imagecodecs say about damaged files.
    """
    Image.MAX_IMAGE_PIXELS = LARGEST_PIXELS
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    warnings.filterwarnings("ignore", module="PIL")
    for library in ("PIL", "tifffile", "imagecodecs"):
        logging.getLogger(library).setLevel(logging.CRITICAL)


def list_images(folder: Path, recursive: bool = False) -> list[Path]:
    """The image files of a folder by name, sorted. Raises ValueError if there is no such folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    folders = visible_files(folder) if recursive else itertools.islice(visible_files(folder), 1)
    paths = itertools.chain.from_iterable(folders)
    return sorted(p for p in paths if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())


def visible_files(
    folder: Path, left_out: str | None = None, onerror: Callable[[OSError], None] | None = None
) -> Iterator[list[Path]]:
    """The files of a folder, then those of each folder below it.

    Hidden files and folders, those of macOS and our own temporary ones among them, do not count. Links to folders are
    followed, but to each folder once. left_out: the real path of a folder that is not looked into, but where it is
    `folder`. onerror is told of folders that cannot be read.
    """
    seen = {os.path.realpath(folder), left_out}
    for root, folders, files in os.walk(folder, onerror=onerror, followlinks=True):
        targets = {name: os.path.realpath(os.path.join(root, name)) for name in sorted(folders)}
        folders[:] = [n for n, target in targets.items() if not n.startswith(".") and target not in seen]
        seen.update(targets.values())
        yield [Path(root) / name for name in files if not name.startswith(".")]


def distinct_names(paths: list[Path]) -> list[str]:
    """Names for the results of a folder's files: without suffix, but for files that differ in nothing else."""
    stems = Counter(path.stem for path in paths)
    names = [path.stem if stems[path.stem] == 1 else path.name for path in paths]
    if len(set(names)) < len(names):  # a.jpg, a.png and a.jpg.png
        names = [path.name for path in paths]
    return names


def read_image(path: str | Path) -> Float32[np.ndarray, "h w 3"]:
    """An image file as float32 [h, w, 3] in [-1, 1], sRGB, turned upright as its EXIF orientation says.

    Grey and palette images become RGB; alpha is dropped, and so are colours outside sRGB; more than 8 bits keep their
    precision. Colours go through the file's ICC profile, if it has one that works, or one made of its colour codes; the
    gAMA and cHRM chunks of PNG are not looked at. Raises ValueError, with the path in it, for a file that is missing,
    not readable, empty, truncated, no image, animated, of high dynamic range, or of more than `LARGEST_PIXELS` pixels,
    the limit of a process that has called `raise_pixel_limit`.
    """
    with opened(path) as file:
        pixels = in_srgb(decode(file))
        return three_channels(to_float(pixels) if pixels.dtype == np.uint8 else np.clip(pixels, 0, 1) * 2 - 1)


def read_image_uint8(path: str | Path, data: bytes | None = None) -> UInt8[np.ndarray, "h w 3"]:
    """`to_uint8(read_image(path))`, without the detour for the files of 8 bits that most are. Raises the same.

    What goes through a profile may differ by a level. data: the file's bytes where they are at hand; then nothing is
    read, and `path` is their name in errors.
    """
    with opened(path, data) as file:
        picture = decode(file)
        pixels = picture.pixels
        if pixels.dtype == np.uint8:
            pixels = icc.to_srgb_uint8(pixels, picture.icc) if picture.has_own_colours else pixels
        else:
            pixels = to_uint8(in_srgb(picture) * 2 - 1)
        return three_channels(pixels)


def upright_size(path: str | Path, data: bytes | None = None) -> tuple[int, int]:
    """(height, width) in pixels of what `read_image_uint8` returns, out of the file's header.

    Raises ValueError as `read_image`, but sees no damage behind the header.
    """
    with opened(path, data) as file:
        if _is_heif(file):
            return _heif_image(file)[0].size[::-1]
        if _is_tiff(file):
            with _tiff_page(file) as (page, orientation):
                height, width = page.imagelength, page.imagewidth
        else:
            with _pillow_image(file) as image:
                width, height = image.size
                info = _info(image, file)
                orientation = orientation_of(info.get("exif"), info.get("xmp"))
        return (width, height) if orientation in (5, 6, 7, 8) else (height, width)


def in_srgb(picture: Decoded) -> UInt8[np.ndarray, "h w c"] | Float32[np.ndarray, "h w c"]:
    """A picture's pixels in sRGB: as they are, or out of a profile, in float32 and possibly outside [0, 1]."""
    return icc.to_srgb(picture.pixels, picture.icc) if picture.has_own_colours else picture.pixels


def three_channels(pixels: np.ndarray) -> np.ndarray:
    """Grey pixels [h, w, 1] as RGB [h, w, 3]; RGB as they are."""
    return np.repeat(pixels, 3, -1) if pixels.shape[2] == 1 else pixels


# --------------------------------------------------------------------------------------------------
# Decoding
# --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def opened(path: str | Path, data: bytes | None = None) -> Iterator[io.BufferedIOBase]:
    """A file, or its bytes, to be read; what fails within becomes a ValueError of one sentence, with the path."""
    try:
        if data is None and not Path(path).is_file():  # nor a pipe, which could be waited at for ever
            raise RefusedError("no such file")
        with open(path, "rb") if data is None else io.BytesIO(data) as file:
            if not file.read(1):
                raise RefusedError("the file is empty")
            file.seek(0)
            yield file
    except RefusedError as error:
        reason = str(error)
    except UnidentifiedImageError:
        with contextlib.suppress(OSError), open(path, "rb") if data is None else io.BytesIO(data) as file:
            start = file.read(12)
        is_image = start.startswith(SIGNATURES) or start[4:12] in (b"ftypavif", b"ftypavis")
        reason = "the image is damaged (at its beginning)" if is_image else "not an image that can be read"
    except Image.DecompressionBombError as error:
        size = re.search(r"\d+( x \d+)? pixels", str(error))  # Pillow's words name its own limit, twice ours
        reason = f"more than {LARGEST_PIXELS} pixels, the most that is read ({size[0] if size else error})"
    except MemoryError:
        reason = "the image does not fit into memory"
    except PermissionError:
        reason = "cannot be read (no permission)"
    except OSError as error:  # of the file system where it has a number, else of Pillow
        reason = f"cannot be read ({error.strerror})" if error.errno else f"the image is damaged ({error})"
    except DAMAGE as error:
        reason = f"the image is damaged ({error})"
    except Exception as error:  # of a decoder as well, or our own
        reason = f"cannot be read ({type(error).__name__}: {error})"
    else:
        return
    raise ValueError(f"{path}: {' '.join(reason.split())}") from None


class Stored(NamedTuple):
    """What an image file holds, as it is stored: before its profile and its orientation are seen to."""

    pixels: np.ndarray  # [h, w, c] of 8 bits, or float32 in [0, 1]; c is 1 (grey), 3 or 4 (CMYK)
    alpha: np.ndarray | None
    file_format: str
    icc: bytes | None = None
    exif: bytes | None = None
    xmp: bytes | None = None
    orientation: int | None = None  # as EXIF data number it; None where the pixels are upright
    lost: tuple[str, ...] = ()  # as in `Decoded`


def decode(file: io.BufferedIOBase) -> Decoded:
    """The picture in a file: what the content says it is, whatever the file is called. To be called within `opened`.

    Of an MPO file, the first picture; of HEIC, the primary one. A profile that is damaged or of other pixels counts as
    absent; CMYK, and profiles that have no way back, as those of scanners, are converted to sRGB, whose profile stands
    in their place. Colours that are all grey are one channel, in sRGB: palettes and WebP files have no other way to
    hold grey.
    """
    read = _read_heif if _is_heif(file) else _read_tiff if _is_tiff(file) else _read_with_pillow
    pixels, alpha, file_format, profile, exif, xmp, orientation, lost = read(file)
    use = icc.use_of_profile(profile, pixels.shape[2]) if profile else None
    if profile and use is None:
        lost += ("the colour profile: it is damaged, or of other pixels",)
    if use == "to sRGB":
        pixels = _clipped_to_srgb(pixels, profile)
        profile, use = (icc.coded_profile(1, 13), "sRGB") if pixels.shape[2] == 3 else (None, None)
    tolerance = 1 if file_format in LOSSY and pixels.dtype == np.uint8 else 0
    if pixels.shape[2] == 3 and _is_grey(pixels, tolerance):
        if use == "both ways":
            pixels = _clipped_to_srgb(pixels, profile)
        pixels, use = np.ascontiguousarray(pixels[..., 1:2]), None  # a profile of colours is none of grey
    if orientation in range(2, 9):
        pixels = upright(pixels, orientation)
        alpha = None if alpha is None else upright(alpha, orientation)
    return Decoded(
        pixels,
        alpha,
        file_format,
        profile if use in ("sRGB", "both ways") else None,
        exif,
        xmp,
        lost,
    )


def _read_heif(file):
    image, count = _heif_image(file)
    pixels, alpha = _split_alpha(_heif_samples(image))  # upright already
    lost = (f"other pictures of the file ({count - 1}): the primary one is restored",) if count > 1 else ()
    return Stored(pixels, alpha, "HEIF", *_metadata(file, image.info), lost=lost)


def _read_tiff(file):
    with _tiff_page(file) as (page, orientation):
        pixels, alpha = tiff.decode_samples(page)
        info = {"icc_profile": tiff.bytes_of(page, tiff.ICC), "xmp": tiff.bytes_of(page, tiff.XMP)}
        info["exif"] = tiff.exif_of(page, file)
        lost = _lost_of_packed(info["exif"])
        more = page.samplesperpixel - tiff.CHANNELS[page.photometric] - (alpha is not None)
        if more:
            lost += (f"{more} of the channels: neither colours nor transparency, as the file has it",)
        return Stored(pixels, alpha, "TIFF", *_metadata(file, info), orientation, lost)


def _read_with_pillow(file):
    with _pillow_image(file) as image:
        pixels, alpha = _samples_without_pillow(image, file) or _samples(image)
        if image.format in ("JPEG", "MPO"):
            _check_jpeg_is_whole(image, file)
        profile, exif, xmp = _metadata(file, _info(image, file))
        lost = ()
        if image.format == "AVIF" and exif:
            file.seek(0)
            # Pillow packs them anew where the file turns its picture otherwise than they say.
            lost = () if exif in file.read() else _lost_of_packed(exif)
        return Stored(pixels, alpha, image.format, profile, exif, xmp, orientation_of(exif, xmp), lost)


def _lost_of_packed(exif):
    """What is lost of EXIF data that had to be packed anew."""
    if exif and has_maker_note(exif):
        return ("what the maker note points to: the EXIF data had to be packed anew",)
    return ()


def _info(image, file):
    """What a file holds beside its pixels, as Pillow has it; of PNG files also what it does not look for."""
    return png.read_beside_pixels(file) if image.format == "PNG" else image.info


def _metadata(file, info):
    """Profile, EXIF data and XMP of a file, by what a decoder says of it."""
    exif = info.get("exif")
    exif = exif.removeprefix(b"Exif\0\0") if exif else None
    return icc.profile_of(file, info, exif), exif, info.get("xmp") or None


def _clipped_to_srgb(pixels, profile):
    if pixels.dtype == np.uint8:
        return icc.to_srgb_uint8(pixels, profile)
    return np.clip(icc.to_srgb(pixels, profile), 0, 1)


def _is_grey(pixels, tolerance):
    """Whether three channels are equal, or differ by no more than a tolerance: lossy WebP makes such of grey."""
    for part in (pixels[::16, ::16], pixels):  # colours show in few of the pixels
        red, green, blue = np.moveaxis(part, -1, 0)
        for other in (red, blue):
            if (np.maximum(green, other) - np.minimum(green, other)).max() > tolerance:
                return False
    return True


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels [h, w] or [h, w, c] that a camera has stored under an EXIF orientation of 2 to 8, turned upright."""
    import cv2  # four times as fast as to copy numpy's view, and loaded only for these

    turned = cv2.transpose(pixels) if orientation >= 5 else pixels
    axis = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}.get(orientation)  # 1 mirrors, 0 flips, -1 does both
    turned = turned if axis is None else cv2.flip(turned, axis)
    return turned.reshape(*turned.shape[:2], *pixels.shape[2:])  # cv2 drops a last axis of 1


@contextlib.contextmanager
def _pillow_image(file) -> Iterator[Image.Image]:
    """The header of a file, as Pillow reads it, of a picture that may be read."""
    file.seek(0)
    with Image.open(file, formats=PILLOW_FORMATS) as image:
        _check_size(image.width, image.height)
        if image.format == "PNG" and not image.tile:
            raise RefusedError("the image is damaged (a PNG file without pixels)")
        # An MPO file holds other views of its first picture.
        frames = image.n_frames if image.format in ("GIF", "PNG", "WEBP", "AVIF") else 1
        if frames > 1:
            raise RefusedError(f"animated, {frames} pictures; only single pictures are read")
        yield image


def _check_jpeg_is_whole(image, file):
    """Raises RefusedError where there is an end, but not all before it: libjpeg leaves what is missing grey or coarse.

    A component needs its 64 coefficients to their last bits, in one scan or in several (ITU-T T.81, figures B.3 and
    B.4). Of the last scan, only the grey that libjpeg puts for blocks is looked for. A picture may end in it as well,
    but takes nothing from what is added before its end.
    """
    file.seek(0)
    data, at, missing = file.read(), 2, {None}
    while missing:
        found = JPEG_MARKER.search(data, at)
        if found is None or found[0] == b"\xff\xd9":
            raise RefusedError("the image is damaged (a JPEG file that lacks a part of its pixels)")
        at, kind = found.start(), found[0][1]
        segment = data[at + 4 : at + 2 + int.from_bytes(data[at + 2 : at + 4])]
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):  # a frame, not tables
            is_progressive = kind & 3 == 2
            missing = {(component, k) for component in segment[6::3] for k in range(64)}
        elif kind == 0xDA:  # a scan
            first, last, bits = segment[-3:] if is_progressive else (0, 63, 0)
            if bits & 15 == 0:
                missing -= {(component, k) for component in segment[1:-3:2] for k in range(first, last + 1)}
        at += 4 + len(segment)
    if (np.abs(np.array(image.getpixel((image.width - 1, image.height - 1))) - 127.5) < 1).all():
        at = JPEG_MARKER.search(data, at).start()
        # No 255, with which markers begin; and markers of restarts, of which the missing part may begin with any.
        noise = np.random.default_rng(0).integers(0, 255, (17, 256), np.uint8)
        restarts = [b"\xff%c" % (0xD0 + i % 8) for i in range(17)]
        more = b"".join(part for pair in zip(map(bytes, noise), restarts, strict=True) for part in pair)
        with Image.open(io.BytesIO(data[:at] + more + data[at:]), formats=("JPEG",)) as other:
            if other.tobytes() != image.tobytes():
                raise RefusedError("the image is damaged (a JPEG file that lacks a part of its pixels)")


def _check_size(width, height):
    if width * height > LARGEST_PIXELS:
        raise Image.DecompressionBombError(f"{width} x {height} pixels")


def _samples(image):
    """Pixels [h, w, c], grey, RGB or (with a profile that works) CMYK, and alpha, of an image that Pillow decodes."""
    image.load()
    if image.has_transparency_data:
        return _split_alpha(
            np.asarray(image.convert("LA" if image.mode in ("1", "L", "LA", "La") else "RGBA"))
        )
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L"))[..., None], None
    if image.mode == "CMYK" and icc.use_of_profile(image.info.get("icc_profile", b""), 4):
        return np.asarray(image), None
    return np.asarray(image.convert("RGB")), None


def _samples_without_pillow(image, file):
    """What `_samples` returns, of PNG and AVIF files of 10 bits and more; None for others.

    Of more than 8 bits Pillow keeps 8, of PNG files it neither sees that rows are missing nor all transparent colours.
    """
    if image.format not in ("PNG", "AVIF"):
        return None
    import imagecodecs

    if image.format == "PNG":
        samples = imagecodecs.png_decode(png.of_pixels(file))
        if samples.dtype == np.uint8:
            return _split_alpha(samples)
        bits = 16
    else:
        file.seek(0)
        data = file.read()
        bits = avif_bits(data)
        if bits == 8:
            return None
        samples = imagecodecs.avif_decode(data)
    return _split_alpha(np.clip(samples / np.float32(2**bits - 1), 0, 1))


def _split_alpha(samples):
    """Grey or RGB samples and, where there is a channel more, alpha."""
    samples = samples[..., None] if samples.ndim == 2 else samples
    if samples.shape[2] in (1, 3):
        return samples, None
    return np.ascontiguousarray(samples[..., :-1]), np.ascontiguousarray(samples[..., -1])


def _is_tiff(file):
    file.seek(0)
    return file.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


@contextlib.contextmanager
def _tiff_page(file):
    """The page of the picture in a TIFF file, and its orientation."""
    file.seek(0)
    with tifffile.TiffFile(file) as tiff_file:
        page = tiff.picture_page(tiff_file)
        _check_size(page.imagewidth, page.imagelength)
        _check_size(page.tilewidth, page.tilelength)  # a tile may be larger than its picture
        tiff.check_is_whole(page)
        yield page, page.tags.valueof(274) or orientation_of(None, tiff.bytes_of(page, tiff.XMP))


def _is_heif(file):
    """Whether a file is HEIF with anything but AVIF in it, by the brands that it starts with."""
    file.seek(0)
    start = file.read(256)
    if start[4:8] != b"ftyp":
        return False
    brands = {start[i : i + 4] for i in range(8, min(int.from_bytes(start[:4]), len(start)), 4)}
    return bool(brands & HEIF_BRANDS) and not brands & {b"avif", b"avis"}


def _heif_image(file):
    """The primary picture of a HEIF file, its header read, and how many there are; turned upright by the library."""
    try:
        import pillow_heif
    except ImportError:
        raise RefusedError(
            "HEIC files are read with pillow-heif, which is not installed (pip install 'zipir_jax[heif]')"
        ) from None
    file.seek(8)
    if file.read(4) in HEIF_SEQUENCES:
        raise RefusedError("animated, a sequence of pictures; only single pictures are read")
    file.seek(0)
    images = pillow_heif.open_heif(file, convert_hdr_to_8bit=False)
    image = images[images.primary_index]
    _check_size(*image.size)
    return image, len(images)


def _heif_samples(image):
    samples = np.asarray(image)
    if samples.dtype == np.uint8:
        return samples
    bits = image.info["bit_depth"]  # in the upper bits of 16
    return samples / np.float32((2**bits - 1) << (16 - bits))


# --------------------------------------------------------------------------------------------------
# Pixels
# --------------------------------------------------------------------------------------------------


def crop_centre(
    image: UInt8[np.ndarray, "h w c"], height: int, width: int
) -> UInt8[np.ndarray, "height2 width2 c"]:
    """The middle `height` x `width` pixels, or as many as there are."""
    top, left = (max(0, (n - side) // 2) for n, side in zip(image.shape, (height, width), strict=False))
    return image[top : top + height, left : left + width]


def to_uint8(image: Float32[np.ndarray, "*b h w c"]) -> UInt8[np.ndarray, "*b h w c"]:
    """[-1, 1] to 0..255, rounded and clipped."""
    values = np.asarray(image) + 1
    values *= 127.5  # in place, as the image may be most of the memory that there is
    return np.clip(np.round(values, out=values), 0, 255, out=values).astype(np.uint8)


def to_float(image: UInt8[np.ndarray, "*b h w c"]) -> Float32[np.ndarray, "*b h w c"]:
    """0..255 to [-1, 1]."""
    return image.astype(np.float32) / 127.5 - 1


def resize(
    image: Float32[np.ndarray, "h w 3"], height: int, width: int
) -> Float32[np.ndarray, "{height} {width} 3"]:
    """Bicubic resize of an image in [-1, 1], antialiased where it shrinks, clipped to [-1, 1].

    Raises ValueError for another dtype or shape, or a size below 1.
    """
    check_dtype_and_shape(image)
    if height < 1 or width < 1:
        raise ValueError(f"cannot resize to {height} x {width} pixels; both sides must be at least 1.")
    return np.clip(resize_unclipped(image, height, width), -1, 1)


def resize_unclipped(
    image: Float32[np.ndarray, "h w c"], height: int, width: int
) -> Float32[np.ndarray, "{height} {width} c"]:
    """`resize` without its checks, for any range of values, with the overshoot of a cubic filter at edges.

    Pillow's filter: Keys' cubic with a = -0.5, widened by the factor when shrinking, as in MATLAB and
    `jax.image.resize(method="cubic")`; OpenCV's cubic has a = -0.75 and aliases.
    """
    if image.shape[:2] == (height, width):
        return image
    planes = [Image.fromarray(np.ascontiguousarray(image[..., channel])) for channel in range(image.shape[2])]
    return np.stack([plane.resize((width, height), Image.Resampling.BICUBIC) for plane in planes], axis=-1)


def check_dtype_and_shape(image: object) -> None:
    """Raises ValueError unless the image is a float32 array [h, w, 3]."""
    if not isinstance(image, np.ndarray) or image.dtype != np.float32:
        found = getattr(image, "dtype", type(image).__name__)
        raise ValueError(f"the image must be a float32 array in [-1, 1], not {found}.")
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"the image has shape {image.shape} instead of (height, width, 3).")
