"""TIFF files: which page is the picture, its samples, and EXIF data that stay where they were."""

import contextlib
import io
import math
import struct

import numpy as np
import tifffile
from jaxtyping import Float32, UInt8, UInt16
from PIL import Image

from zipir_jax.files import RefusedError
from zipir_jax.icc import lab_to_srgb, use_of_profile
from zipir_jax.metadata import byte_order, directory

REDUCED = 1  # bit of NewSubfileType: a smaller copy of another picture of the file
# Tags of an image's data, in which a file's first directory differs from EXIF data (TIFF 6.0; Adobe's technical notes).
OF_THE_IMAGE = {*range(254, 260), 262, 266, 273, 274, *range(277, 280), 284, 288, 289}
OF_THE_IMAGE |= {292, 293, 317, 320, *range(322, 326), 330, *range(332, 335), *range(336, 343), 347}
OF_THE_IMAGE |= {*range(512, 516), *range(517, 522), *range(529, 533), 700, 33723, 34377, 34675, 37724, 50706}
XMP, ICC = 700, 34675
RESOLUTION_UNIT = 296
RESOLUTION = {282, 283, RESOLUTION_UNIT}
PHOTOMETRIC = tifffile.PHOTOMETRIC
CHANNELS = {  # of colour, of the kinds of pixels that are read
    PHOTOMETRIC.MINISWHITE: 1,
    PHOTOMETRIC.MINISBLACK: 1,
    PHOTOMETRIC.PALETTE: 1,
    PHOTOMETRIC.RGB: 3,
    PHOTOMETRIC.SEPARATED: 4,
    PHOTOMETRIC.YCBCR: 3,
    PHOTOMETRIC.CIELAB: 3,
}
MULTIPLIED, ALPHA = 1, 2  # kinds of extra samples: alpha that the colours are multiplied by, and alpha


def picture_page(file: tifffile.TiffFile) -> tifffile.TiffPage:
    """The one page of a TIFF file that is no reduced copy of another.

    Raises RefusedError where there are several or none, as in the raw files of many cameras.
    """
    indices = range(len(file.pages))  # to count them ends at a page that points back; to iterate does not
    pages = [file.pages[index] for index in indices if not file.pages[index].subfiletype & REDUCED]
    if not indices:
        raise RefusedError("the image is damaged (a TIFF file without a page)")
    if len(pages) > 1:
        raise RefusedError(f"a TIFF file of {len(pages)} pages; one picture is restored at a time")
    if not pages or 50706 in pages[0].tags:  # DNGVersion
        raise RefusedError("a camera's raw file; develop it into a TIFF or JPEG file first")
    return pages[0]


def bytes_of(page: tifffile.TiffPage, tag: int) -> bytes | None:
    """What stands under a tag, of bytes or of text; None where it is neither."""
    found = page.tags.valueof(tag)
    return found.encode() if isinstance(found, str) else found if isinstance(found, bytes) else None


def check_is_whole(page: tifffile.TiffPage) -> None:
    """Raises RefusedError where pixels are missing: decoders leave them black."""
    ends = [start + count for start, count in zip(page.dataoffsets, page.databytecounts, strict=True)]
    if len(ends) < math.prod(page.chunked) or max(ends) > page.parent.filehandle.size:
        raise RefusedError("the image is damaged (a TIFF file that lacks a part of its pixels)")


def decode_samples(
    page: tifffile.TiffPage,
) -> tuple[
    UInt8[np.ndarray, "h w c"] | Float32[np.ndarray, "h w c"],
    UInt8[np.ndarray, "h w"] | Float32[np.ndarray, "h w"] | None,
]:
    """Pixels, grey, RGB or CMYK (with a profile that works), and their alpha: of 8 bits, or of more in [0, 1].

    Raises RefusedError for other kinds of pixels, and for a compression that cannot be read.
    """
    kind, samples = page.photometric, _stored_samples(page)
    bits, colours, alpha = page.bitspersample, samples[..., : CHANNELS[kind]], None
    extra = page.extrasamples[0] if page.extrasamples else None
    if extra in (MULTIPLIED, ALPHA):
        alpha = samples[..., CHANNELS[kind]]
    if kind == PHOTOMETRIC.PALETTE:
        bits, colours = 8, (page.colormap.T >> 8).astype(np.uint8)[colours[..., 0].astype(np.intp)]
    has_inks = kind == PHOTOMETRIC.SEPARATED and not use_of_profile(bytes_of(page, ICC) or b"", 4)
    is_converted = kind in (PHOTOMETRIC.MINISWHITE, PHOTOMETRIC.CIELAB) or has_inks or extra == MULTIPLIED
    if bits == 8 and colours.dtype == np.uint8 and not is_converted:
        return np.ascontiguousarray(colours), None if alpha is None else np.ascontiguousarray(alpha)

    white = white_of(colours, bits)
    if alpha is not None:
        alpha = _from_black_to(white, alpha)
    if kind == PHOTOMETRIC.CIELAB:  # L* without a sign, a* and b* with one, in 256ths where there are 16 bits
        lightness = colours[..., 0] / np.float32(white / 100)
        a, b = (colours[..., i].view(f"i{bits // 8}") / np.float32(2 ** (bits - 8)) for i in (1, 2))
        pixels = lab_to_srgb(np.stack([lightness, a, b], -1))
    else:
        pixels = _from_black_to(white, colours)
    if extra == MULTIPLIED:
        pixels = np.clip(pixels / np.maximum(alpha, np.float32(1e-6))[..., None], 0, 1)
    if kind == PHOTOMETRIC.MINISWHITE:
        pixels = 1 - pixels
    if has_inks:
        pixels = (1 - pixels[..., :3]) * (1 - pixels[..., 3:])  # as Pillow converts JPEG files: of ideal inks
    if bits <= 8:
        pixels, alpha = (
            None if values is None else np.round(values * 255).astype(np.uint8) for values in (pixels, alpha)
        )
    return pixels, alpha


def _stored_samples(page):
    """All samples of a page [h, w, c], decompressed."""
    kind, compression = page.photometric, page.compression
    is_complex = page.dtype is None or page.dtype.kind == "c"
    if kind not in CHANNELS or page.samplesperpixel < CHANNELS[kind] or is_complex:
        raise RefusedError(
            f"a TIFF file of {page.bitspersample} bits and {page.samplesperpixel} channels, of a kind that is not read "
            f"(photometric interpretation {int(kind)})"
        )
    if compression != 1 and compression not in tifffile.TIFF.DECOMPRESSORS:
        name = getattr(compression, "name", compression)
        raise RefusedError(f"a TIFF file with compression {name}, which cannot be read")
    if kind == PHOTOMETRIC.YCBCR and compression not in tifffile.TIFF.IMAGE_COMPRESSIONS:
        import imagecodecs

        page.parent.filehandle.seek(0)  # tifffile knows neither subsampling nor the way to RGB, libtiff does
        samples = imagecodecs.tiff_decode(page.parent.filehandle.read(), index=page.index, asrgb=True)
    else:
        _check_streams(page)
        samples = page.asarray()
    if page.axes.startswith("S"):  # planar
        samples = np.moveaxis(samples, 0, -1)
    return samples.reshape(page.imagelength, page.imagewidth, -1)


def _check_streams(page):
    """Raises RefusedError where a JPEG file or the like, as which parts of a page may be kept, is larger than its part.

    Decoders unpack it whole. JPEG XL and JPEG XR, which Pillow does not know, are not looked into.
    """
    if page.compression not in tifffile.TIFF.IMAGE_COMPRESSIONS:
        return
    for start, count in zip(page.dataoffsets, page.databytecounts, strict=True):
        page.parent.filehandle.seek(start)
        head = io.BytesIO(page.parent.filehandle.read(min(count, 2**16)))
        with contextlib.suppress(OSError, SyntaxError), Image.open(head) as image:
            if image.width * image.height > math.prod(page.chunks):
                raise RefusedError(
                    f"the image is damaged (a part of {image.width} x {image.height} pixels is larger than its place)"
                )


def white_of(samples: np.ndarray, bits: int) -> float:
    """The sample that is white: the largest number of up to 16 bits; of others nothing says it.

    Of 1 (in floating point), 255 and 65535 the first that 99 samples of 100 do not pass: lamps and defective pixels are
    fewer. Light may be brighter than white, so that 1 is white up to 16, four stops above it. Of still larger samples,
    the largest whole number that there is, or what those 99 reach.
    """
    kind = samples.dtype.kind
    largest = 2.0 ** (bits - (kind == "i")) - 1
    if kind in "bu" and bits <= 16:
        return largest
    some = samples[:: 1 + len(samples) // 1000, :: 1 + samples.shape[1] // 1000]
    some = some[np.isfinite(some)]
    bright = float(np.percentile(some, 99)) if some.size else 0.0
    if kind == "f":
        largest = max(bright, 65535.0)
        if bright <= 16:
            return 1.0
    return next((white for white in (255.0, 65535.0) if bright <= white <= largest), largest)


def _from_black_to(white, samples):
    return np.clip(np.nan_to_num(samples.astype(np.float32)) / np.float32(white), 0, 1)


def exif_of(page: tifffile.TiffPage, file: io.BufferedIOBase) -> bytes | None:
    """A page's tags but those of its image, as EXIF data; None where there are none or they are damaged.

    Packed anew: what its maker notes point to is not where it was.
    """
    exif = Image.Exif()
    try:
        exif.endian, exif.bigtiff = page.parent.byteorder, page.parent.is_bigtiff
        exif.load_from_fp(file, page.offset)
        exif.bigtiff = False  # as which it is packed
        no_unit = exif.get(RESOLUTION_UNIT) == 1  # as tifffile writes it where nobody has named a resolution
        for tag in OF_THE_IMAGE | (RESOLUTION if no_unit else set()):
            exif.pop(tag, None)
        return exif.tobytes().removeprefix(b"Exif\0\0") if len(exif) else None
    except Exception:  # Pillow's readers of EXIF data raise nearly anything
        return None


def write_tiff(
    file: io.BufferedIOBase,
    samples: UInt8[np.ndarray, "h w c"] | UInt16[np.ndarray, "h w c"],
    icc: bytes | None,
    exif: bytes | None,
    xmp: bytes | None,
    iptc: bytes | None,
    density: tuple[float, float] | None,
) -> None:
    """Write grey or RGB samples, with alpha where there is a channel more, deflated; density in dots per inch.

    EXIF data hold offsets from their own beginning, and in a TIFF file from the file's. So the file begins with the
    EXIF data, byte for byte, and their offsets, maker notes' included, stay right; the pixels come next, and last one
    directory of the image's tags and of EXIF's. EXIF data must be a TIFF structure (`metadata.byte_order`).
    """
    order = byte_order(exif) if exif else "<"
    # An empty directory for tifffile to append to, as long as the EXIF data that will stand there.
    start = struct.pack(order + "2sHIHI", b"II" if order == "<" else b"MM", 42, 8, 0, 0)
    length = max(len(exif or b""), len(start))
    buffer = io.BytesIO(start.ljust(length + length % 2, b"\0"))
    with tifffile.TiffWriter(buffer, append=True) as writer:
        writer.write(
            samples[..., 0] if samples.shape[2] == 1 else samples,
            photometric="rgb" if samples.shape[2] >= 3 else "minisblack",
            planarconfig="contig" if samples.shape[2] > 1 else None,
            extrasamples=["unassalpha"] if samples.shape[2] in (2, 4) else None,
            compression="deflate",
            predictor=True,
            iccprofile=icc,
            resolution=density,
            resolutionunit=2 if density else None,
            extratags=[(tag, 1, len(data), data, True) for tag, data in ((700, xmp), (33723, iptc)) if data],
            metadata=None,
            software=False,
        )
    data = buffer.getvalue()
    (own,) = struct.unpack_from(order + "I", data, 10)
    entries = {tag: data[at : at + 12] for at, tag, *_ in directory(data, order, own)[0]}
    if exif:
        (first,) = struct.unpack_from(order + "I", exif, 4)
        of_exif = {tag: exif[at : at + 12] for at, tag, *_ in directory(exif, order, first)[0]}
        entries |= {tag: entry for tag, entry in of_exif.items() if tag not in OF_THE_IMAGE}
    head = (exif or start)[:4] + struct.pack(order + "I", len(data) + len(data) % 2)
    file.write(head + (exif or start)[8:].ljust(length + length % 2 - 8, b"\0"))
    file.write(memoryview(data)[length + length % 2 :])
    file.write(bytes(len(data) % 2) + struct.pack(order + "H", len(entries)))
    file.write(b"".join(entries[tag] for tag in sorted(entries)) + bytes(4))
