"""Photographs: what the network sees of an image file, and what is put back into the file of the result.

photograph = read_photograph("a.jpg")
restored = restorer.restore(photograph.pixels, scale=4)
write_photograph("a_x4.jpg", photograph.with_pixels(restored))
"""

import dataclasses
import importlib.util
import io
import re
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Float32, UInt8, UInt16
from PIL import Image, PngImagePlugin, features

from zipir_jax.beside import IPTC_OF_PHOTOSHOP, read_beside
from zipir_jax.files import replacing
from zipir_jax.icc import from_srgb, use_of_profile
from zipir_jax.imageio import (
    HEIF_SUFFIXES,
    check_dtype_and_shape,
    decode,
    in_srgb,
    opened,
    resize_unclipped,
    three_channels,
    to_float,
)
from zipir_jax.metadata import (
    XMP_MARKER,
    byte_order,
    corrected_exif,
    corrected_xmp,
    exif_density,
    hiding_orientation,
    orientation_of,
    xmp_of_the_picture,
)
from zipir_jax.tiff import write_tiff

# Suffixes of what can be written here, with the formats as Pillow names them.
OUTPUT_FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}
if features.check("avif"):
    OUTPUT_FORMATS[".avif"] = "AVIF"
if importlib.util.find_spec("pillow_heif"):
    OUTPUT_FORMATS |= dict.fromkeys(sorted(HEIF_SUFFIXES), "HEIF")
LARGEST_SIDE = {
    "WEBP": 16383,
    "JPEG": 65500,
    "AVIF": 65536,
    "HEIF": 16384,
}  # pixels that a format or its encoder holds
OF_16_BITS = {"PNG", "TIFF"}
OF_GREY = OF_DENSITY = {"PNG", "TIFF", "JPEG"}
OF_IPTC = {"TIFF", "JPEG"}
LARGEST_SEGMENT = 65533  # bytes of a JPEG file's marker
# The head of the one text that JPEG files have, by the kind of its chunk; packed, it is none.
COMMENT = {b"tEXt": re.compile(rb"Comment\0"), b"iTXt": re.compile(rb"Comment\0\0\0[^\0]*\0[^\0]*\0")}
LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32)  # ITU-R BT.709
ROWS = 256  # that are made ready for a file at once
VISIBLE = np.float32(8 / 255)  # alpha, below which a file's colours are anything


@dataclasses.dataclass(frozen=True, eq=False)  # arrays do not compare to one truth value
class Photograph:
    """A picture for the network, and beside it what the network does not see."""

    pixels: Float32[np.ndarray, "h w 3"]  # in [-1, 1], sRGB, upright
    file_format: str = "PNG"  # that it was read from, as Pillow names it
    bits: int = 8  # of a sample, 8 or 16
    is_grey: bool = False
    alpha: Float32[np.ndarray, "h w"] | None = None  # in [0, 1]
    residual: Float32[np.ndarray, "h w 3"] | None = (
        None  # of colours outside sRGB: what `pixels` lack, on their scale
    )
    icc: bytes | None = None
    exif: bytes | None = None  # a TIFF structure, without "Exif\0\0" before it
    xmp: bytes | None = None
    iptc: bytes | None = None  # IIM, as in JPEG and TIFF files
    density: tuple[float, float] | None = None  # dots per inch in x and y
    texts: tuple[tuple[bytes, bytes], ...] = ()  # (kind, data) of PNG's chunks; JPEG's comment is one
    lost: tuple[str, ...] = ()  # what its file held that is not here, one sentence each

    def with_pixels(self, restored: Float32[np.ndarray, "h2 w2 3"]) -> "Photograph":
        """The photograph with other pixels, in [-1, 1] and of any size, and all that belongs to it fitted to them.

        Alpha and the residual are enlarged as `imageio.resize` does it, a grey photograph stays grey, and EXIF data and
        XMP say that the picture is upright and how large it is. Raises ValueError for another dtype or shape.
        """
        check_dtype_and_shape(restored)
        height, width = restored.shape[:2]
        alpha = self.alpha
        if alpha is not None:
            alpha = np.clip(resize_unclipped(alpha[..., None], height, width)[..., 0], 0, 1)
        return dataclasses.replace(
            self,
            pixels=np.repeat(restored @ LUMA[:, None], 3, -1) if self.is_grey else restored,
            alpha=alpha,
            residual=None if self.residual is None else resize_unclipped(self.residual, height, width),
            exif=self.exif and corrected_exif(self.exif, height, width),
            xmp=self.xmp and corrected_xmp(self.xmp, height, width),
        )


def read_photograph(path: str | Path, data: bytes | None = None) -> Photograph:
    """An image file, or its bytes, with what belongs to it. Raises ValueError as `imageio.read_image` does.

    Colours outside sRGB are clipped in the pixels and kept beside them; where the picture is all but transparent, and
    its colours arbitrary, it has those of the nearest pixel that is not.
    """
    with opened(path, data) as file:
        picture = decode(file)
        pixels = in_srgb(picture)
        is_grey = pixels.shape[2] == 1
        pixels, alpha, residual = three_channels(pixels), picture.alpha, None
        if alpha is not None:
            alpha = alpha.astype(np.float32) / 255 if alpha.dtype == np.uint8 else alpha
            pixels = fill_transparent(pixels, alpha)
        if pixels.dtype == np.uint8:
            pixels = to_float(pixels)
        else:
            pixels = pixels * 2 - 1
            clipped = np.clip(pixels, -1, 1)
            if np.abs(pixels - clipped).max() > 1 / 65535:  # else but rounding
                residual = pixels - clipped
            pixels = clipped
        exif, xmp, beside = picture.exif, picture.xmp, read_beside(file, picture.file_format)
        lost = [*beside.pop("lost"), *picture.lost]
        if xmp:
            xmp, sentences = xmp_of_the_picture(xmp, turned=orientation_of(exif, xmp) in range(2, 9))
            lost += sentences
        if exif and beside["density"] is None:
            beside["density"] = exif_density(exif)
        return Photograph(
            pixels=pixels,
            file_format=picture.file_format,
            bits=8 if picture.pixels.dtype == np.uint8 else 16,
            is_grey=is_grey,
            alpha=alpha,
            residual=residual,
            icc=picture.icc,
            exif=exif,
            xmp=xmp,
            lost=tuple(dict.fromkeys(lost)),
            **beside,
        )


def fill_transparent(
    pixels: UInt8[np.ndarray, "h w 3"] | Float32[np.ndarray, "h w 3"], alpha: Float32[np.ndarray, "h w"]
) -> UInt8[np.ndarray, "h w 3"] | Float32[np.ndarray, "h w 3"]:
    """Pixels that have, where alpha is below VISIBLE, the colour of the nearest pixel where it is not; as a new array.

    Files hold black there, or what rounding has left, and a network would let it bleed into the edges.
    """
    transparent = alpha < VISIBLE
    if transparent.all() or not transparent.any():
        return pixels
    # The distance to the nearest zero, and a number for which of the zeros it is.
    _, nearest = cv2.distanceTransformWithLabels(
        transparent.astype(np.uint8), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
    )
    opaque = pixels[~transparent]
    place = np.empty(nearest.max() + 1, np.int64)
    place[nearest[~transparent]] = np.arange(len(opaque))
    filled = pixels.copy()
    filled[transparent] = opaque[place[nearest[transparent]]]
    return filled


def output_format(path: str | Path) -> str:
    """The format of a path's suffix, as Pillow names it; raises ValueError, with the path, for one not written here."""
    suffix = Path(path).suffix.lower()
    if suffix in OUTPUT_FORMATS:
        return OUTPUT_FORMATS[suffix]
    hint = (
        "; HEIC files are written with pillow-heif, which is not installed" if suffix in HEIF_SUFFIXES else ""
    )
    raise ValueError(f"{path}: the output must end in one of {', '.join(OUTPUT_FORMATS)}{hint}")


def check_output(path: str | Path, size: tuple[int, int]) -> None:
    """Raises ValueError where a photograph of this size (height, width) could not be written, with the path in it."""
    check_side(path, output_format(path), size)


def check_side(name: str | Path, file_format: str, size: tuple[int, int]) -> None:
    """Raises ValueError, with a name in it, for a size (height, width) that a format cannot hold."""
    largest = LARGEST_SIDE.get(file_format)
    if largest is not None and max(size) > largest:
        raise ValueError(
            f"{name}: {size[1]} x {size[0]} pixels, but a side of a {file_format} file is at most {largest}; "
            "write a PNG or TIFF file"
        )


def write_photograph(
    file: str | Path | io.BufferedIOBase, photograph: Photograph, file_format: str | None = None
) -> list[str]:
    """Write a photograph by the suffix of its path, or into a binary file in a format of OUTPUT_FORMATS' values.

    PNG and TIFF (deflated) as they are, WebP lossless, JPEG, AVIF and HEIC of quality 95 without subsampled colours;
    EXIF data, ICC profile and XMP in all of them, density in PNG, TIFF and JPEG, IPTC data in the latter two, texts in
    PNG and a comment in JPEG. Returns what was lost as the photograph was read, and what the format could not keep, as
    one sentence each: 16 bits in other formats than PNG and TIFF, alpha in JPEG, where the picture is put on white, and
    what is larger than JPEG's 64 KiB. The file appears whole or not at all. Raises ValueError, with the path in it, for
    another suffix, a size that the format cannot hold, or a folder that cannot be written.
    """
    if not isinstance(file, str | Path):
        return _write(file, photograph, file_format)
    check_output(file, photograph.pixels.shape[:2])
    with replacing(file) as replacement:
        return _write(replacement, photograph, output_format(file))


def write_image(path: Path, image: UInt8[np.ndarray, "h w 3"] | Float32[np.ndarray, "h w 3"]) -> None:
    """Write pixels alone, uint8 or float32 in [-1, 1], as `write_photograph` does. Raises the same."""
    write_photograph(path, Photograph(to_float(image) if image.dtype == np.uint8 else image))


def _write(file, photograph, file_format):
    check_side("the photograph", file_format, photograph.pixels.shape[:2])
    profile, exif, not_kept = photograph.icc, photograph.exif, list(photograph.lost)
    is_grey = photograph.is_grey and file_format in OF_GREY
    if photograph.is_grey and not is_grey and profile is not None:
        profile = None
        not_kept.append(f"the grey ICC profile: {file_format} files have colours, which are in sRGB now")
    bits = photograph.bits if file_format in OF_16_BITS else 8
    if bits < photograph.bits:
        not_kept.append(f"{photograph.bits} bits a sample: {file_format} files have 8")
    if photograph.alpha is not None and file_format == "JPEG" and photograph.alpha.min() < 254.5 / 255:
        not_kept.append("transparency: JPEG files have none, and the picture is put on white")
    if file_format in ("TIFF", "AVIF") and exif and byte_order(exif) is None:
        exif = None
        not_kept.append(f"the EXIF data, which are damaged: {file_format} files hold them only whole")
    written = dataclasses.replace(photograph, icc=profile, exif=exif)
    not_kept += _without_place(written, file_format)
    samples = samples_of(photograph, profile, bits, is_grey, put_on_white=file_format == "JPEG")

    if file_format == "PNG":
        _write_png(file, samples, written)
    elif file_format == "TIFF":
        write_tiff(file, samples, profile, exif, written.xmp, written.iptc, written.density)
    else:
        image = Image.fromarray(samples[..., 0] if samples.shape[2] == 1 else samples)
        metadata = {"icc_profile": profile, "exif": exif and b"Exif\0\0" + exif, "xmp": written.xmp}
        if file_format == "JPEG":
            return not_kept + _write_jpeg(file, image, metadata, written)
        metadata = {key: value for key, value in metadata.items() if value}
        if file_format == "WEBP":
            image.save(file, "WEBP", lossless=True, **metadata)
        elif file_format == "HEIF":
            import pillow_heif

            pillow_heif.from_pillow(image).save(file, quality=95, chroma=444, **metadata)
        else:
            _write_avif(file, image, metadata)
    return not_kept


def _without_place(photograph, file_format):
    """Sentences on IPTC data, density and texts that a format has no place for."""
    sentences = []
    if photograph.iptc and file_format not in OF_IPTC:
        sentences.append(f"the IPTC data: {file_format} files have none")
    named = photograph.exif and exif_density(photograph.exif)
    if photograph.density and file_format not in OF_DENSITY and not named:
        x, y = photograph.density
        sentences.append(f"the density of {x:.4g} x {y:.4g} dots per inch: {file_format} files have none")
    kept = {"PNG": photograph.texts, "JPEG": _comments(photograph)[:1]}.get(file_format, ())
    texts = [data for kind, data in photograph.texts if (kind, data) not in kept]
    if texts:
        names = ", ".join(dict.fromkeys(data.partition(b"\0")[0].decode("latin-1") for data in texts))
        sentences.append(f"the texts of the file ({names}): {file_format} files have no place for them")
    return sentences


def _comments(photograph):
    """The texts that a JPEG file can have, one of them."""
    return [(kind, data) for kind, data in photograph.texts if kind in COMMENT and COMMENT[kind].match(data)]


def samples_of(
    photograph: Photograph, profile: bytes | None, bits: int, is_grey: bool, put_on_white: bool
) -> UInt8[np.ndarray, "h w c"] | UInt16[np.ndarray, "h w c"]:
    """A photograph in whole numbers of 8 or 16 bits and in the colours of a profile; alpha is the last channel.

    put_on_white: where there is alpha, in its place.
    """
    height, width = photograph.pixels.shape[:2]
    channels = 1 if is_grey else 3
    has_alpha = photograph.alpha is not None and not put_on_white
    samples = np.empty((height, width, channels + has_alpha), np.uint8 if bits == 8 else np.uint16)
    has_own_colours = profile is not None and use_of_profile(profile, channels) != "sRGB"
    for start in range(0, height, ROWS):  # what is float32 on the way would be larger than all else
        rows = slice(start, start + ROWS)
        part = photograph.pixels[rows, :, :channels]
        if has_own_colours:
            if photograph.residual is not None:
                part = part + photograph.residual[rows, :, :channels]
            part = from_srgb((part + 1) / 2, profile)
        else:
            part = (part + 1) / 2
        if photograph.alpha is not None:
            alpha = photograph.alpha[rows, :, None]
            part = np.concatenate([part, alpha], -1) if has_alpha else part * alpha + (1 - alpha)
        samples[rows] = np.round(np.clip(part, 0, 1) * (2**bits - 1))
    return samples


def _write_jpeg(file, image, metadata, photograph):
    """JPEG by Pillow, and sentences of what is larger than a marker of the format."""
    iptc = photograph.iptc
    if iptc:  # an image resource of Photoshop (Adobe's file format specification)
        resource = struct.pack(">4sHxxI", b"8BIM", IPTC_OF_PHOTOSHOP, len(iptc)) + iptc + bytes(len(iptc) % 2)
        iptc = b"Photoshop 3.0\0" + resource
    comment = next((COMMENT[kind].sub(b"", data, 1) for kind, data in _comments(photograph)), None)
    not_kept, metadata = [], metadata | {"extra": iptc, "comment": comment}
    for key, name, marker in (
        ("exif", "EXIF data", b""),
        ("xmp", "XMP", XMP_MARKER),
        ("extra", "IPTC data", b""),
        ("comment", "comment", b""),
    ):
        if metadata[key] and len(marker) + len(metadata[key]) > LARGEST_SEGMENT:
            not_kept.append(f"the {name}, {len(metadata[key])} bytes: JPEG files hold {LARGEST_SEGMENT}")
            metadata[key] = None
    if metadata["extra"]:
        metadata["extra"] = struct.pack(">HH", 0xFFED, 2 + len(metadata["extra"])) + metadata["extra"]
    if photograph.density and max(photograph.density) < 65535.5:
        metadata["dpi"] = photograph.density
    metadata = {key: value for key, value in metadata.items() if value}
    image.save(file, "JPEG", quality=95, subsampling=0, **metadata)
    return not_kept


def _write_png(file, samples, photograph):
    """PNG (W3C, third edition), which Pillow writes but for 16 bits of colour; chunks come after the header's."""
    import imagecodecs

    encoded = imagecodecs.png_encode(samples[..., 0] if samples.shape[2] == 1 else samples)
    header = 8 + 25  # bytes: the signature and IHDR
    file.write(encoded[:header])
    chunks = list(photograph.texts)
    if photograph.icc:
        chunks.append((b"iCCP", b"ICC Profile\0\0" + zlib.compress(photograph.icc)))
    if photograph.density:
        metre = (min(round(dots / 0.0254), 2**31 - 1) for dots in photograph.density)
        chunks.append((b"pHYs", struct.pack(">IIB", *metre, 1)))
    if photograph.exif:
        chunks.append((b"eXIf", photograph.exif))
    if photograph.xmp:
        chunks.append((b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + photograph.xmp))
    for kind, data in chunks:
        PngImagePlugin.putchunk(file, kind, data)
    file.write(memoryview(encoded)[header:])


def _write_avif(file, image, metadata):
    """AVIF by Pillow, which packs EXIF data anew where it finds an orientation in them: it is hidden from it."""
    exif = metadata.pop("exif", None)
    hidden = exif and hiding_orientation(exif.removeprefix(b"Exif\0\0"))
    buffer = io.BytesIO()
    options = {"exif": hidden} if hidden else {}
    image.save(buffer, "AVIF", quality=95, subsampling="4:4:4", **options, **metadata)
    data = buffer.getvalue()
    file.write(data.replace(hidden, exif.removeprefix(b"Exif\0\0"), 1) if hidden else data)
