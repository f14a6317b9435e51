import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from zipir_jax.imageio import read_image_uint8, upright_size
from zipir_jax.photograph import read_photograph, write_photograph

EXIF = b"II*\0" + struct.pack("<IHHHIHxxI", 8, 1, 0x0112, 3, 1, 6, 0)
XMP = b'<rdf:Description tiff:Orientation="6"/>'
IPTC = b"\x1c\x02\x78\x00\x05Title"
PHOTOSHOP = b"8BIM\x04\x04\0\0" + struct.pack(">I", len(IPTC)) + IPTC
PICTURE = np.random.default_rng(0).integers(0, 256, (24, 16, 3), np.uint8)
ROWS = b"".join(b"\0" + row.tobytes() for row in PICTURE)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*chunks, late=(), rows=ROWS, width=16, height=24, bits=8, colours=2, interlaced=0):
    header = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, interlaced)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), *late, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def raw_profile(name, data):
    """A text as ImageMagick writes it: lines of a name, a length, and hexadecimal digits, packed."""
    digits = data.hex()
    lines = "\n".join(digits[at : at + 72] for at in range(0, len(digits), 72))
    text = f"\n{name}\n{len(data):8d}\n{lines}\n".encode()
    return b"zTXt", b"Raw profile type " + name.encode() + b"\0\0" + zlib.compress(text)


@pytest.mark.parametrize("place", ["before", "behind"])
@pytest.mark.parametrize(
    ("name", "data", "field", "expected"),
    [
        ("exif", b"Exif\0\0" + EXIF, "exif", EXIF),
        ("APP1", b"Exif\0\0" + EXIF, "exif", EXIF),
        ("APP1", b"http://ns.adobe.com/xap/1.0/\0" + XMP, "xmp", XMP),
        ("xmp", XMP, "xmp", XMP),
        ("iptc", IPTC, "iptc", IPTC),
        ("8bim", PHOTOSHOP, "iptc", IPTC),
    ],
)
def test_metadata_in_hexadecimal_digits_are_read(name, data, field, expected, place):
    texts = [raw_profile(name, data)]
    data = png(*texts) if place == "before" else png(late=texts)
    photo = read_photograph("a.png", data)
    assert getattr(photo, field) == expected and photo.texts == ()
    height, width = (24, 16) if field == "iptc" else (16, 24)  # turned upright
    assert photo.pixels.shape[:2] == upright_size("a.png", data) == (height, width)


def test_metadata_in_hexadecimal_digits_that_make_no_sense_stay_texts():
    texts = (
        (b"tEXt", b"Raw profile type exif\0\nexif\n 4\nzz"),
        (b"zTXt", b"Raw profile type xmp\0\0damaged"),
        (b"tEXt", b"Raw profile type 8bim\0\n8bim\n 2\n0102"),
        (b"tEXt", b"Raw profile type APP1\0"),
    )
    photo = read_photograph("a.png", png(late=texts))
    assert photo.texts == texts and photo.exif is photo.xmp is photo.iptc is None


def test_keywords_that_png_does_not_allow_are_left_out():
    bad = [b"", b"\x1b[2J", b"a" * 80, b"\x9b1m"]
    texts = [(b"tEXt", keyword + b"\0text") for keyword in (*bad, b"Titel \xe4")]
    photo = read_photograph("a.png", png(late=texts))
    assert photo.texts == (texts[-1],)
    assert write_photograph(io.BytesIO(), photo, "PNG") == ["texts without a keyword that PNG allows (4)"]


def test_a_file_whose_rows_end_early_is_refused_not_black():
    for rows in (ROWS[: len(ROWS) // 2], ROWS[:-1]):
        with pytest.raises(ValueError, match=r"a\.png: the image is damaged"):
            read_image_uint8("a.png", png(rows=rows))


def test_pixels_are_read_whatever_else_the_file_holds(capfd):
    """Nor does a library print what it thinks of it."""
    profile = b"x\0\0" + zlib.compress(b"garbage" * 30)
    data = png((b"iCCP", profile), (b"gAMA", bytes(4)), (b"tEXt", b"exif\0text"), late=[(b"gAMA", bytes(4))])
    behind = chunk(b"eXIf", EXIF)  # the file's end
    np.testing.assert_array_equal(read_image_uint8("a.png", data + behind), PICTURE)
    assert capfd.readouterr() == ("", "")


def test_interlaced_files_are_read():
    rows = b""
    for y, x, down, right in [
        (0, 0, 8, 8),
        (0, 4, 8, 8),
        (4, 0, 8, 4),
        (0, 2, 4, 4),
        (2, 0, 4, 2),
        (0, 1, 2, 2),
        (1, 0, 2, 1),
    ]:
        rows += b"".join(b"\0" + row.tobytes() for row in PICTURE[y::down, x::right])
    np.testing.assert_array_equal(read_image_uint8("a.png", png(rows=rows, interlaced=1)), PICTURE)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_transparent_grey_of_few_bits_becomes_alpha(bits):
    rows = bytes([0, 0b00011011, 0b11100100]) * 2
    data = png((b"tRNS", b"\0\1"), rows=rows, width=16 // bits, height=2, bits=bits, colours=0)
    alpha = read_photograph("a.png", data).alpha
    samples = np.unpackbits(np.frombuffer(rows[1:3], np.uint8)).reshape(-1, bits) @ (
        1 << np.arange(bits)[::-1]
    )
    np.testing.assert_array_equal(alpha, np.float32([samples != 1] * 2))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
@pytest.mark.parametrize("transparency", [None, 3])
def test_pixels_of_all_kinds_are_those_that_pillow_reads(mode, transparency):
    image = Image.fromarray(PICTURE).convert(mode)
    options = {} if transparency is None or mode not in "LP" else {"transparency": transparency}
    image.save(file := io.BytesIO(), "PNG", **options)
    np.testing.assert_array_equal(read_image_uint8("a.png", file.getvalue()), image.convert("RGB"))
