import struct
import time

import numpy as np
import pytest
from PIL import Image

from zipir_jax.metadata import (
    GAIN_MAP,
    byte_order,
    corrected_exif,
    corrected_xmp,
    directory,
    exif_density,
    exif_orientation,
    xmp_of_the_picture,
    xmp_orientation,
)

SHORT, LONG, ASCII, UNDEFINED = 3, 4, 2, 7
# Where the parts of `camera_exif` begin.
IFD0, EXIF_IFD, GPS_IFD, IFD1, MAKE, NOTE, THUMBNAIL, END = 8, 100, 150, 180, 220, 240, 280, 300


def camera_exif(order, orientation=6, width=(SHORT, 300), height=(SHORT, 200)):
    """EXIF data as a camera writes them: maker note, GPS and thumbnail, each with offsets from the beginning."""

    def entry(tag, kind, count, value):
        packed = struct.pack(order + "HH", value, 0) if kind == SHORT else struct.pack(order + "I", value)
        return struct.pack(order + "HHI", tag, kind, count) + packed

    def ifd(*entries, following=0):
        return (
            struct.pack(order + "H", len(entries)) + b"".join(entries) + struct.pack(order + "I", following)
        )

    exif = bytearray(END)
    for at, part in {
        0: (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", IFD0),
        IFD0: ifd(
            entry(0x0100, *[width[0], 1, width[1]]),
            entry(0x010F, ASCII, 12, MAKE),
            entry(0x0112, SHORT, 1, orientation),
            entry(0x8769, LONG, 1, EXIF_IFD),
            entry(0x8825, LONG, 1, GPS_IFD),
            following=IFD1,
        ),
        EXIF_IFD: ifd(
            entry(0x927C, UNDEFINED, 40, NOTE),
            entry(0xA002, *[width[0], 1, width[1]]),
            entry(0xA003, *[height[0], 1, height[1]]),
        ),
        GPS_IFD: ifd(struct.pack(order + "HHI", 1, ASCII, 2) + b"N\0\0\0"),
        IFD1: ifd(entry(0x0201, LONG, 1, THUMBNAIL), entry(0x0202, LONG, 1, 20)),
        MAKE: b"Camera Inc.\0",
        NOTE: struct.pack(order + "8sII", b"NOTE\0\0\0\1", NOTE + 16, THUMBNAIL).ljust(40, b"\xaa"),
        THUMBNAIL: bytes(range(20)),
    }.items():
        exif[at : at + len(part)] = part
    return bytes(exif)


def changed(before, after):
    return {at for at, (old, new) in enumerate(zip(before, after, strict=True)) if old != new}


@pytest.mark.parametrize("order", ["<", ">"])
def test_exif_data_are_the_same_but_for_orientation_and_size(order):
    exif = camera_exif(order)
    corrected = corrected_exif(exif, height=1200, width=800)
    loaded = Image.Exif()
    loaded.load(corrected)
    assert loaded[0x0112] == 1 and loaded[0x0100] == 800 and loaded[0x010F] == "Camera Inc."
    inner = loaded.get_ifd(0x8769)
    assert inner[0xA002] == 800 and inner[0xA003] == 1200 and inner[0x927C] == exif[NOTE : NOTE + 40]
    # The values of four entries, and of a turned picture the way to its thumbnail.
    entries = [IFD0 + 2 + 12 * i for i in (0, 2)] + [EXIF_IFD + 2 + 12 * i for i in (1, 2)]
    allowed = {at + 8 + i for at in entries for i in range(4)} | {IFD0 + 2 + 5 * 12 + i for i in range(4)}
    assert changed(exif, corrected) <= allowed
    assert corrected_exif(corrected, 1200, 800) == corrected


def test_an_upright_picture_keeps_its_thumbnail():
    exif = camera_exif("<", orientation=1)
    assert corrected_exif(exif, height=200, width=300) == exif
    turned = corrected_exif(camera_exif("<", orientation=3), height=200, width=300)
    assert struct.unpack_from("<I", turned, IFD0 + 2 + 5 * 12) == (0,)


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_size_too_large_for_its_field_gets_a_wider_one(order):
    corrected = corrected_exif(camera_exif(order, height=(LONG, 200)), height=70_000, width=65_536)
    found = {tag: (kind, value) for _, tag, kind, _, value in directory(corrected, order, EXIF_IFD)[0]}
    assert found[0xA002] == (LONG, 65_536) and found[0xA003] == (LONG, 70_000)
    # A field that was wide stays so, as nothing else is changed.
    corrected = corrected_exif(camera_exif(order, height=(LONG, 200)), height=800, width=800)
    assert {tag: kind for _, tag, kind, *_ in directory(corrected, order, EXIF_IFD)[0]}[0xA003] == LONG


def test_where_the_subject_is_leaves_exif_data():
    """In pixels of another picture: the entry goes, those behind it move up, and nothing else does."""
    exif = Image.Exif()
    exif[0x011A], exif[0x0128] = 118.11, 3
    tags = {0x9214: (150, 100, 30, 20), 0x927C: b"note of the maker", 0xA214: (150, 100), 0xA420: "id"}
    exif.get_ifd(0x8769).update(tags)
    before = exif.tobytes().removeprefix(b"Exif\0\0")
    corrected = corrected_exif(before, 1200, 800)
    loaded = Image.Exif()
    loaded.load(corrected)
    assert loaded.get_ifd(0x8769) == {0x927C: b"note of the maker", 0xA420: "id"}
    assert len(corrected) == len(before) and corrected_exif(corrected, 1200, 800) == corrected
    (start,) = [value for _, tag, *_, value in directory(before, ">", 8)[0] if tag == 0x8769]
    places = directory(before, ">", start)[1] + 4
    assert corrected[:start] == before[:start] and corrected[places:] == before[places:]


def test_the_size_is_corrected_in_the_interoperability_directory():
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA005] = {1: "R98", 0x1001: 40, 0x1002: 24}
    loaded = Image.Exif()
    loaded.load(corrected_exif(exif.tobytes().removeprefix(b"Exif\0\0"), height=1200, width=800))
    assert loaded.get_ifd(0xA005) == {1: "R98", 0x1001: 800, 0x1002: 1200}


def test_the_density_of_exif_data_is_in_inches():
    for unit, x, expected in [
        (2, 300.0, 300),
        (3, 118.11, 300),
        (None, 72.0, 72),
        (1, 300.0, None),
        (2, 0.0, None),
    ]:
        exif = Image.Exif()
        exif[0x011A] = exif[0x011B] = x
        if unit is not None:
            exif[0x0128] = unit
        found = exif_density(exif.tobytes())
        assert found == (None if expected is None else pytest.approx((expected, expected), rel=1e-3))
    assert exif_density(camera_exif("<")) is exif_density(b"garbage") is None
    for number in (np.inf, np.nan, 1e38):  # in floating point, which no camera writes
        entries = b"".join(struct.pack("<HHIf", tag, 11, 1, number) for tag in (0x011A, 0x011B))
        assert exif_density(b"II*\0\x08\0\0\0\2\0" + entries + bytes(4)) is None


@pytest.mark.parametrize("order", ["<", ">"])
def test_damaged_exif_data_neither_turn_the_picture_nor_hang(order):
    exif = camera_exif(order)
    for length in range(len(exif)):
        corrected = corrected_exif(exif[:length], 1200, 800)
        assert len(corrected) == length and exif_orientation(corrected) in (None, 1)
    for at in range(0, len(exif), 2):
        for value in (b"\xff\xff", b"\0\0", b"\0\x08"):  # 8: directories that point back to the first one
            damaged = exif[:at] + value + exif[at + 2 :]
            corrected = corrected_exif(damaged, 1200, 800)
            assert corrected is None or exif_orientation(corrected) in (None, 1)
    assert corrected_exif(b"", 1, 1) == b"" and corrected_exif(b"garbage", 1, 1) == b"garbage"
    assert byte_order(b"garbage") is None


def test_the_time_of_damaged_metadata_grows_with_their_length_alone():
    started = time.process_time()
    inner = struct.pack("<HHII", 0x8769, LONG, 1, 8) * 20_000  # each of them the first directory again
    exif = b"II*\0\x08\0\0\0" + struct.pack("<H", 20_000) + inner + bytes(4)
    assert corrected_exif(exif, 1200, 800) == exif
    for part in (b"tiff:Orientation ", b"<tiff:Orientation ", b" \n", b"<hdrgm:Version>"):
        packet = part * (300_000 // len(part))
        assert corrected_xmp(packet, 1200, 800) == packet and xmp_orientation(packet) is None
        assert xmp_of_the_picture(packet, turned=True) == (packet, [])
    assert time.process_time() - started < 5  # seconds: in squares of the length, minutes


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            b'<a tiff:Orientation="6" tiff:ImageWidth="3"/>',
            b'<a tiff:Orientation="1" tiff:ImageWidth="800"/>',
        ),
        (b"<a tiff:Orientation = '8'\n/>", b"<a tiff:Orientation = '1'\n/>"),
        (
            b"<tiff:Orientation rdf:datatype='xsd:int'> 6 </tiff:Orientation>",
            b"<tiff:Orientation rdf:datatype='xsd:int'> 1 </tiff:Orientation>",
        ),
        (
            b"<a><exif:SubjectArea><rdf:Seq><rdf:li>9</rdf:li></rdf:Seq></exif:SubjectArea><b/></a>",
            b"<a><b/></a>",
        ),
        (
            b"<mwg-rs:AppliedToDimensions stDim:w='300' stDim:h='200' stDim:unit='pixel'/>",
            b"<mwg-rs:AppliedToDimensions stDim:w='800' stDim:h='1200' stDim:unit='pixel'/>",
        ),
        (b"<tiff:ImageLength>3</tiff:ImageLength>", b"<tiff:ImageLength>1200</tiff:ImageLength>"),
        (
            b'<a exif:PixelXDimension="3" exif:PixelYDimension="4" exif:ExposureTime="1/60"/>',
            b'<a exif:PixelXDimension="800" exif:PixelYDimension="1200" exif:ExposureTime="1/60"/>',
        ),
        (
            b"<dc:title>tiff:Orientation 6 \xff\0</dc:title>",
            b"<dc:title>tiff:Orientation 6 \xff\0</dc:title>",
        ),
        (b"", b""),
    ],
)
def test_xmp_is_the_same_but_for_orientation_and_size(before, after):
    assert corrected_xmp(before, height=1200, width=800) == after


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-le", "utf-16-be"])
def test_xmp_is_read_and_corrected_in_its_encoding(encoding):
    packet = "<a tiff:Orientation='6' dc:title='\u00e4\u6f22\U0001f600'/>"
    assert xmp_orientation(packet.encode(encoding)) == 6
    corrected = corrected_xmp(packet.encode(encoding), height=1200, width=800)
    assert corrected == packet.replace("6", "1", 1).encode(encoding)


def test_xmp_of_what_the_result_has_not_is_taken_out_and_named():
    before = (
        b'<rdf:Description rdf:about="" hdrgm:Version="1.0"\n xmpNote:HasExtendedXMP="5A" dc:title="t">'
        b"<Container:Directory><rdf:Seq><rdf:li><Container:Item Item:Semantic='GainMap'/></rdf:li></rdf:Seq>"
        b"</Container:Directory><GCamera:MotionPhoto>1</GCamera:MotionPhoto>"
        b"<mwg-rs:Regions rdf:parseType='Resource'><mwg-rs:Name>A</mwg-rs:Name></mwg-rs:Regions></rdf:Description>"
    )
    kept = b'<rdf:Description rdf:about="" dc:title="t">'
    faces = b"<mwg-rs:Regions rdf:parseType='Resource'><mwg-rs:Name>A</mwg-rs:Name></mwg-rs:Regions>"
    after, sentences = xmp_of_the_picture(before, turned=False)
    assert after == kept + faces + b"</rdf:Description>"
    assert [sentence.split(":")[0] for sentence in sentences] == [
        GAIN_MAP.split(":")[0],
        "the film of the motion photo",
        "the extended XMP",
    ]
    after, sentences = xmp_of_the_picture(before, turned=True)
    assert after == kept + b"</rdf:Description>" and "faces" in sentences[-1]
    for whole in (kept, b"<hdrgm:Version>", kept + 30_000 * b"\n" + b"</rdf:Description>"):
        assert xmp_of_the_picture(whole, turned=True) == (whole, [])
    assert xmp_of_the_picture(b"<a><hdrgm:Version/></a>", turned=False) == (b"<a></a>", [GAIN_MAP])
