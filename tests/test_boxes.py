import struct

import imagecodecs
import numpy as np
import pytest

from zipir_jax.boxes import avif_bits, boxes
from zipir_jax.photograph import read_photograph


@pytest.mark.parametrize("channels", [1, 3, 4])  # the fourth is alpha, a picture of its own
@pytest.mark.parametrize("bits", [8, 10, 12])
def test_bits_of_avif_files(bits, channels):
    pixels = np.full((32, 48, channels), 2**bits // 2, np.uint8 if bits == 8 else np.uint16)
    data = imagecodecs.avif_encode(pixels.squeeze(), bitspersample=bits)
    assert avif_bits(data) == bits
    # Older files lack the property that names the bits, but for those of the codec.
    assert avif_bits(data.replace(b"pixi", b"none")) == bits


def box(kind, content):
    return struct.pack(">I4s", 8 + len(content), kind) + content


@pytest.mark.parametrize("wide", [False, True])  # numbers of items and properties
def test_the_bits_of_the_picture_are_not_those_of_its_thumbnail(wide):
    """A file's head by hand: a thumbnail, item 1, before the picture, item 2."""
    item, index = (">I", ">H") if wide else (">H", ">B")
    associations = bytes([wide, 0, 0, wide]) + struct.pack(">I", 2)
    for number, properties in ((1, (1, 2)), (2, (3, 4))):
        associations += struct.pack(item, number) + bytes([len(properties)])
        associations += b"".join(struct.pack(index, p | (0x8000 if wide else 0x80)) for p in properties)
    pixi = [box(b"pixi", bytes(4) + bytes([3, bits, bits, bits])) for bits in (8, 10)]
    av1c = [box(b"av1C", bytes([0x81, 0, flags, 0])) for flags in (0, 0x40)]
    container = box(b"ipco", av1c[0] + pixi[0] + av1c[1] + pixi[1])
    primary = box(b"pitm", bytes([wide, 0, 0, 0]) + struct.pack(item, 2))
    data = box(b"meta", bytes(4) + primary + box(b"iprp", container + box(b"ipma", associations)))
    assert avif_bits(data) == 10


def test_boxes_of_all_kinds_of_sizes():
    large = struct.pack(">I4sQ", 1, b"abcd", 19) + b"123"
    last = struct.pack(">I4s", 0, b"last") + b"to the end"
    assert list(boxes(large + last)) == [(b"abcd", b"123"), (b"last", b"to the end")]
    assert list(boxes(struct.pack(">I4s", 4, b"abcd") + last)) == []  # less than its own head


def test_a_picture_of_10_bits_is_read_so_whatever_comes_before_it():
    pixels = np.linspace(0, 1023, 48).round().astype(np.uint16)[None, :, None].repeat(32, 0).repeat(3, -1)
    data = imagecodecs.avif_encode(pixels, bitspersample=10, level=100)
    before = box(b"free", b"av1C\x81\0\0\0")  # as of 8 bits
    place = data.index(b"mdat") + 4
    data = data.replace(struct.pack(">I", place), struct.pack(">I", place + len(before)))
    at = data.index(b"meta") - 4
    photo = read_photograph("a.avif", data[:at] + before + data[at:])
    assert photo.bits == 16
    np.testing.assert_allclose((photo.pixels + 1) / 2 * 1023, pixels, atol=3)
