"""PNG files (W3C, third edition): what stands in them beside the pixels, and what the pixels are decoded from."""

import io
import re
import struct
import zlib
from collections.abc import Iterator

from zipir_jax.files import RefusedError
from zipir_jax.metadata import XMP_MARKER

SIGNATURE = b"\x89PNG\r\n\x1a\n"
OF_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
KEYWORD = re.compile(rb"[\x20-\x7e\xa1-\xff]{1,79}\0")  # of a text
RAW_PROFILE = re.compile(rb"Raw profile type (?:exif|app1|xmp|iptc|8bim|icc|icm)", re.IGNORECASE)
# The head of an image resource of Photoshop, of which the length and the IPTC data follow.
IPTC_OF_PHOTOSHOP = b"8BIM\x04\x04\0\0"
LARGEST_UNPACKED = 2**25  # bytes of XMP or a profile


def read_beside_pixels(file: io.BufferedIOBase) -> dict:
    """What a PNG file holds beside its pixels, wherever it stands.

    "exif", "xmp", "iptc", "icc_profile" and "cicp" (four codes): bytes, where there are any, from chunks of their own
    or texts of hexadecimal digits, as ImageMagick writes them; "density": dots per inch in x and y; "texts": the
    others, as (kind, data) of chunks; "unnamed": how many lack a keyword as the format wants it, and are left out.
    """
    raw, found, texts, unnamed = {}, {}, [], 0
    for kind, at, length in _chunks(file):
        if kind in OF_PIXELS:
            continue
        file.seek(at)
        data = file.read(length)
        if len(data) < length:
            break
        if kind == b"eXIf":
            found["exif"] = data
        elif kind == b"cICP":
            found["cicp"] = data
        elif kind == b"iCCP":
            found["icc_profile"] = _unpacked(data.partition(b"\0")[2][1:]) or b"damaged"  # as which it counts
        elif kind == b"pHYs" and len(data) == 9 and data[8] == 1:  # a metre
            found["density"] = tuple(0.0254 * pixels for pixels in struct.unpack(">II", data[:8]))
        elif kind in (b"tEXt", b"zTXt", b"iTXt"):
            keyword = data.partition(b"\0")[0]
            if keyword == b"XML:com.adobe.xmp" and (xmp := _text(kind, data)) is not None:
                found["xmp"] = xmp
            elif RAW_PROFILE.fullmatch(keyword) and (profile := _raw_profile(keyword, _text(kind, data))):
                raw.setdefault(*profile)
            elif KEYWORD.match(data):
                texts.append((kind, data))
            else:
                unnamed += 1
    return raw | found | {"texts": tuple(texts), "unnamed": unnamed}


def of_pixels(file: io.BufferedIOBase) -> bytes:
    """A PNG file of the chunks alone that its pixels are decoded from: libpng prints what it thinks of others.

    Raises RefusedError for a file that ends within one of these.
    """
    parts = [SIGNATURE]
    for kind, at, length in _chunks(file):
        if kind in OF_PIXELS:
            file.seek(at - 8)
            parts.append(file.read(length + 12))
            if len(parts[-1]) < length + 12:
                raise RefusedError("the image is damaged (a PNG file that is cut off)")
    return b"".join(parts)


def _chunks(file) -> Iterator[tuple[bytes, int, int]]:
    """(kind, offset of its data, their length) of the chunks, of which the file may not hold the last one whole."""
    at, size, kind = len(SIGNATURE), file.seek(0, io.SEEK_END), b""
    while at + 12 <= size and kind != b"IEND":
        file.seek(at)
        length, kind = struct.unpack(">I4s", file.read(8))
        yield kind, at + 8, length
        at += length + 12  # and the checksum


def _unpacked(data):
    """None where the data are damaged or larger than LARGEST_UNPACKED."""
    unpacking = zlib.decompressobj()
    try:
        unpacked = unpacking.decompress(data, LARGEST_UNPACKED)
    except zlib.error:
        return None
    return unpacked if unpacking.eof else None


def _text(kind, data):
    """The text of a chunk, in bytes; None where it is damaged."""
    text = data.partition(b"\0")[2]
    if kind == b"tEXt":
        return text
    if kind == b"zTXt":
        return _unpacked(text[1:])
    parts = text[2:].split(b"\0", 2)  # language, keyword in it, text
    return None if len(parts) < 3 else _unpacked(parts[2]) if text[:1] == b"\1" else parts[2]


def _raw_profile(keyword, text):
    """("exif", "xmp", "iptc" or "icc_profile", bytes) of a text that ImageMagick has made; None where it is damaged.

    Lines of a name, a length, and hexadecimal digits.
    """
    try:
        content = bytes.fromhex((text or b"").split(maxsplit=2)[2].decode("ascii"))
    except (ValueError, IndexError):
        return None
    kind = keyword.split()[-1].lower()
    if kind in (b"icc", b"icm"):
        return "icc_profile", content
    if kind == b"xmp" or content.startswith(XMP_MARKER):
        return "xmp", content.removeprefix(XMP_MARKER)
    if kind in (b"exif", b"app1"):
        return "exif", content.removeprefix(b"Exif\0\0")
    if content[:1] == b"\x1c":
        return "iptc", content
    _, _, resource = content.partition(IPTC_OF_PHOTOSHOP)
    return ("iptc", resource[4 : 4 + int.from_bytes(resource[:4])]) if resource else None
