"""EXIF data and XMP packets of a picture whose pixels have been turned upright and resized.

EXIF data are a TIFF structure (TIFF 6.0, section 2): entries of 12 bytes, tag, type, count and value, where a value of
more than 4 bytes is the offset of one. Maker notes, too, hold offsets that nobody knows how to move. So the few entries
that are wrong now are overwritten where they stand, and every other byte stays as it was.
"""

import re
import struct
from collections.abc import Callable

from PIL import ExifTags, Image

ORIENTATION = ExifTags.Base.Orientation
SHORT, LONG = 3, 4  # types of entries
WIDTHS = {ExifTags.Base.ImageWidth, ExifTags.Base.ExifImageWidth, 0x1001}  # the last in the directory of
HEIGHTS = {ExifTags.Base.ImageLength, ExifTags.Base.ExifImageHeight, 0x1002}  # interoperability
SUBJECT = {0x9214, 0xA214}  # its area and place, in pixels of the picture as it lay
MAKER_NOTE = 0x927C
XMP_MARKER = b"http://ns.adobe.com/xap/1.0/\0"  # before XMP in JPEG files
GAIN_MAP = "the gain map: the result has no high dynamic range"
# Properties of XMP that tell of something else in the file, which is not read, or are wrong of the result, and what to
# say of it.
ELSEWHERE = {
    r"hdrgm:\w+|HDRGainMap:\w+": GAIN_MAP,
    r"GCamera:(?:MotionPhoto|MicroVideo)\w*": "the film of the motion photo",
    r"Container:Directory|GContainer:Directory": None,  # the list of either
    r"GPano:\w+Pixels": "the sizes and places of the panorama, in pixels of the photograph",
    r"xmpNote:HasExtendedXMP": "the extended XMP: its first packet alone is read",
}
FACES = r"mwg-rs:Regions"


def exif_density(exif: bytes) -> tuple[float, float] | None:
    """The resolution that EXIF data name, in dots per inch."""

    def density(loaded):
        unit = {2: 1, 3: 2.54}[loaded.get(ExifTags.Base.ResolutionUnit, 2)]
        x, y = (unit * float(loaded[tag]) for tag in (ExifTags.Base.XResolution, ExifTags.Base.YResolution))
        return (x, y) if 0 < x < 2**32 and 0 < y < 2**32 else None  # what other files have room for

    return _found_in(exif, density)


def corrected_exif(exif: bytes, height: int, width: int) -> bytes | None:
    """EXIF data, a TIFF structure, of a picture that is upright now and has this size in pixels.

    A thumbnail of a picture that has been turned would lie on its side: it is cut off. Where the subject is, in pixels,
    is taken out. None where the data are so damaged that they would still turn the picture.
    """
    corrected = bytearray(exif)
    order = byte_order(exif)
    if order is None:
        return exif
    entries, after = directory(exif, order, *struct.unpack_from(order + "I", exif, 4))
    turned = False
    # One of each alone: damaged data may name many, each as long as all.
    inner = [value for _, tag, _, _, value in entries if tag == ExifTags.IFD.Exif][-1:]
    for start in inner:
        entries += directory(exif, order, start)[0]
    for start in [value for _, tag, _, _, value in entries if tag == ExifTags.IFD.Interop][-1:]:
        entries += directory(exif, order, start)[0]
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
    for start in inner:
        _take_out(corrected, order, start, SUBJECT)
    return bytes(corrected) if exif_orientation(bytes(corrected)) in (None, 1) else None


def exif_names_adobe_rgb(exif: bytes) -> bool:
    """Whether EXIF data say that colours are Adobe RGB's, as cameras do: an interoperability index "R03" (DCF 2.0)."""
    index = _found_in(exif, lambda loaded: loaded.get_ifd(ExifTags.IFD.Interop).get(1))
    return str(index).startswith("R03")


def has_maker_note(exif: bytes) -> bool:
    """Whether EXIF data hold what their camera's maker alone can read."""
    return bool(_found_in(exif, lambda loaded: loaded.get_ifd(ExifTags.IFD.Exif).get(MAKER_NOTE)))


def _found_in(exif, find: Callable[[Image.Exif], object]):
    """What a function finds in EXIF data as Pillow reads them; None where they are damaged."""
    loaded = Image.Exif()
    try:
        loaded.load(exif)
        return find(loaded)
    except Exception:  # Pillow's readers of EXIF data raise nearly anything
        return None


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


def _take_out(exif, order, start, tags):
    """Shorten the directory at an offset by entries, in place: what other entries point to stays where it is."""
    entries, after = directory(bytes(exif), order, start)
    kept = [exif[at : at + 12] for at, tag, *_ in entries if tag not in tags]
    if len(kept) < len(entries) and after + 4 <= len(exif):
        shorter = struct.pack(order + "H", len(kept)) + b"".join(kept) + exif[after : after + 4]
        exif[start : after + 4] = shorter.ljust(after + 4 - start, b"\0")


def _entry(order, tag, kind, number):
    """An entry of one number; a SHORT lies in the first half of the four bytes."""
    return struct.pack(order + ("HHIHxx" if kind == SHORT else "HHII"), tag, kind, 1, number)


def exif_orientation(exif: bytes) -> object:
    """What Pillow, and so whoever reads the file with it, takes for the orientation."""
    return _found_in(exif, lambda loaded: loaded.get(ORIENTATION))


def orientation_of(exif: bytes | None, xmp: bytes | None) -> int | None:
    """The orientation that EXIF data name as a number, else that of XMP; None where there is none."""
    orientation = exif_orientation(exif) if exif else None
    return orientation if isinstance(orientation, int) else xmp_orientation(xmp) if xmp else None


def xmp_orientation(xmp: bytes) -> int | None:
    """The orientation that an XMP packet names, which counts where there is none in EXIF data."""
    found = re.search(_property("tiff:Orientation") + "([0-9])", _text(xmp)[0])
    return int(found[1]) if found else None


def corrected_xmp(xmp: bytes, height: int, width: int) -> bytes:
    """An XMP packet of a picture that is upright now and has this size; its properties as attributes or elements.

    Where the subject is, in pixels, is taken out.
    """
    text, encoding = _text(xmp)
    for names, number in [
        ("tiff:Orientation", 1),
        ("tiff:ImageWidth|exif:PixelXDimension|stDim:w", width),
        ("tiff:ImageLength|exif:PixelYDimension|stDim:h", height),
    ]:
        value = f"({_property(names)})" + r"\d+"
        text = re.sub(value, lambda match, number=number: f"{match[1]}{number}", text)
    text = _without_properties(text, "exif:Subject(?:Area|Location)")
    return text.encode(encoding, "surrogatepass")


def xmp_of_the_picture(xmp: bytes, turned: bool) -> tuple[bytes, list[str]]:
    """An XMP packet without what tells of parts of its file that are not read, and a sentence on each of them.

    turned: whether the picture lay on its side; then the places of faces, which are of how it lay, are given up, too.
    """
    text, encoding = _text(xmp)
    sentences = []
    elsewhere = ELSEWHERE | ({FACES: "the places of faces: the picture has been turned"} if turned else {})
    for names, sentence in elsewhere.items():
        shorter = _without_properties(text, names)
        if shorter != text and sentence:
            sentences.append(sentence)
        text = shorter
    return text.encode(encoding, "surrogatepass"), sentences


def _text(xmp):
    """An XMP packet as a string, and its encoding; each byte of UTF-8 is a character here, so that none is changed."""
    little = xmp[:2] == b"\xff\xfe" or xmp[1:2] == b"\0"
    big = xmp[:2] == b"\xfe\xff" or xmp[:1] == b"\0"
    encoding = "latin-1" if len(xmp) % 2 else "utf-16-le" if little else "utf-16-be" if big else "latin-1"
    return xmp.decode(encoding, "surrogatepass"), encoding


def _property(names):
    """Pattern of what stands before the value of a property, an attribute or an element.

    An element is sought from its "<", which `[^<>]` ends at: from its name alone each would be read to the end of all.
    """
    return rf"(?:(?<!\s)\s+(?:{names})\s*=\s*[\"']|<(?:{names})(?:\s[^<>]*)?>)\s*"


def _without_properties(text, names):
    """XMP without attributes and elements of these names, in a time that grows with its length alone."""
    text = re.sub(rf"(?<!\s)\s+(?:{names})\s*=\s*(?:\"[^\"]*\"|'[^']*')", "", text)
    kept, at = [], 0
    for opening in re.finditer(rf"<({names})(?:\s[^<>]*|/)?>", text):
        if opening.start() < at:  # within another one
            continue
        end = opening.end()
        if not opening[0].endswith("/>"):
            closing = f"</{opening[1]}>"
            end = text.find(closing, end) + len(closing)
            if end <= opening.end():  # there is none: damaged
                break
        kept.append(text[at : opening.start()])
        at = end
    return "".join(kept) + text[at:]
