"""EXIF data and XMP packets of a picture whose pixels have been turned upright and resized.

EXIF data are a TIFF structure (TIFF 6.0, section 2): entries of 12 bytes, tag, type, count and value, where a value of
more than 4 bytes is the offset of one. Maker notes, too, hold offsets that nobody knows how to move. So the few entries
that are wrong now are overwritten where they stand, and every other byte stays as it was.
"""

import io
import re
import struct
from collections.abc import Iterator

from PIL import ExifTags, Image

ORIENTATION = ExifTags.Base.Orientation
SHORT, LONG = 3, 4  # types of entries
LARGEST_CHUNK = 2**20  # bytes of a PNG file's chunk; as much as Pillow takes of a text
WIDTHS = {ExifTags.Base.ImageWidth, ExifTags.Base.ExifImageWidth}
HEIGHTS = {ExifTags.Base.ImageLength, ExifTags.Base.ExifImageHeight}


def corrected_exif(exif: bytes, height: int, width: int) -> bytes | None:
    """EXIF data, a TIFF structure, of a picture that is upright now and has this size in pixels.

    A thumbnail of a picture that has been turned would lie on its side: it is cut off. None where the data are so
    damaged that they would still turn the picture.
    """
    corrected = bytearray(exif)
    order = byte_order(exif)
    if order is None:
        return exif
    entries, after = directory(exif, order, *struct.unpack_from(order + "I", exif, 4))
    turned = False
    for _, tag, _, _, value in list(entries):
        if tag == ExifTags.IFD.Exif:
            entries += directory(exif, order, value)[0]
    for at, tag, kind, _, _ in entries:
        number = width if tag in WIDTHS else height if tag in HEIGHTS else 1 if tag == ORIENTATION else None
        if number is None:
            continue
        if tag == ORIENTATION:
            turned |= exif[at + 2 : at + 12] != _entry(order, tag, SHORT, 1)[2:]
        kind = SHORT if number < 65536 and kind != LONG else LONG
        corrected[at : at + 12] = _entry(order, tag, kind, number)
    if turned and after + 4 <= len(corrected):
        corrected[after : after + 4] = bytes(4)
    return bytes(corrected) if exif_orientation(bytes(corrected)) in (None, 1) else None


def exif_names_adobe_rgb(exif: bytes) -> bool:
    """Whether EXIF data say that colours are Adobe RGB's, as cameras do: an interoperability index "R03" (DCF 2.0)."""
    loaded = Image.Exif()
    try:
        loaded.load(exif)
        return str(loaded.get_ifd(ExifTags.IFD.Interop).get(1, "")).startswith("R03")
    except Exception:  # Pillow's readers of EXIF data raise nearly anything
        return False


def png_chunks(file: io.BufferedIOBase) -> Iterator[tuple[bytes, bytes]]:
    """(kind, data) of a PNG file's chunks but those of its pixels and of more than LARGEST_CHUNK, to a damaged one."""
    at, size = 8, file.seek(0, io.SEEK_END)  # the signature
    while at + 12 <= size:
        file.seek(at)
        length, kind = struct.unpack(">I4s", file.read(8))
        at += length + 12  # and the checksum
        if kind not in (b"IDAT", b"fdAT") and length <= LARGEST_CHUNK and at <= size:
            yield kind, file.read(length)


def hiding_orientation(exif: bytes) -> bytes:
    """EXIF data of the same length in which no reader finds an orientation: its tag is one that nobody uses."""
    hidden, order = bytearray(exif), byte_order(exif)
    for at, tag, *_ in directory(exif, order, *struct.unpack_from(order + "I", exif, 4))[0]:
        if tag == ORIENTATION:
            struct.pack_into(order + "H", hidden, at, 0xFFFF)
    return bytes(hidden)


def byte_order(exif: bytes) -> str | None:
    """ "<" or ">", as `struct` names it, of a TIFF structure; None for anything else."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    return order if len(exif) >= 8 else None


def directory(exif: bytes, order: str, at: int) -> tuple[list[tuple[int, int, int, int, int]], int]:
    """The entries (their offset, tag, type, count, value) of the directory at an offset, and the offset behind them.

    Of a damaged directory, the entries that lie within the data.
    """
    if at + 2 > len(exif):
        return [], len(exif)
    (count,) = struct.unpack_from(order + "H", exif, at)
    places = range(at + 2, min(at + 2 + 12 * count, len(exif) - 11), 12)
    return [
        (place, *struct.unpack_from(order + "HHII", exif, place)) for place in places
    ], at + 2 + 12 * count


def _entry(order, tag, kind, number):
    """An entry of one number; a SHORT lies in the first half of the four bytes."""
    return struct.pack(order + ("HHIHxx" if kind == SHORT else "HHII"), tag, kind, 1, number)


def exif_orientation(exif: bytes) -> int | None:
    """What Pillow, and so whoever reads the file with it, takes for the orientation."""
    loaded = Image.Exif()
    try:
        loaded.load(exif)
        return loaded.get(ORIENTATION)
    except Exception:  # Pillow's readers of EXIF data raise nearly anything
        return None


def xmp_orientation(xmp: bytes) -> int | None:
    """The orientation that an XMP packet names, which counts where there is none in EXIF data; found as by Pillow."""
    found = re.search(rb"tiff:Orientation(?:=\"|>)([0-9])", xmp)
    return int(found[1]) if found else None


def corrected_xmp(xmp: bytes, height: int, width: int) -> bytes:
    """An XMP packet of a picture that is upright now and has this size; its properties as attributes or elements."""
    for name, number in [
        (rb"tiff:Orientation", 1),
        (rb"(?:tiff:ImageWidth|exif:PixelXDimension)", width),
        (rb"(?:tiff:ImageLength|exif:PixelYDimension)", height),
    ]:
        value = rb"(" + name + rb"(?:\s*=\s*[\"']|\s*>)\s*)\d+"
        xmp = re.sub(value, lambda match, number=number: match[1] + str(number).encode(), xmp)
    return xmp
