"""Boxes of AVIF files (ISO/IEC 14496-12, section 4.2), for what Pillow does not say about them."""

import struct
from collections.abc import Iterator


def boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The type and the content of one box after the other."""
    at = 0
    while at + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        head = 8
        if size == 1 and at + 16 <= len(data):
            (size,), head = struct.unpack_from(">Q", data, at + 8), 16
        size = size or len(data) - at  # 0: to the end
        if size < head:
            return
        yield kind, data[at + head : at + size]
        at += size


def primary_properties(data: bytes) -> dict[bytes, bytes]:
    """The properties of a file's primary picture, not of its thumbnail or alpha: their types and contents.

    ISO/IEC 23008-12, section 9.3. Raises KeyError, IndexError or struct.error for a damaged file.
    """
    meta = dict(boxes(dict(boxes(data))[b"meta"][4:]))  # behind its version and flags, as in all below
    primary = int.from_bytes(meta[b"pitm"][4:])
    of_items = dict(boxes(meta[b"iprp"]))
    properties, found = list(boxes(of_items[b"ipco"])), {}
    associations = of_items[b"ipma"]
    item_format = ">I" if associations[0] else ">H"
    index_format, index_bits = (">H", 0x7FFF) if associations[3] & 1 else (">B", 0x7F)
    (count,), at = struct.unpack_from(">I", associations, 4), 8
    for _ in range(count):
        (item,) = struct.unpack_from(item_format, associations, at)
        at += struct.calcsize(item_format)
        (length,), at = struct.unpack_from(">B", associations, at), at + 1
        for _ in range(length):
            (index,) = struct.unpack_from(index_format, associations, at)
            at += struct.calcsize(index_format)
            if item == primary:
                kind, content = properties[(index & index_bits) - 1]
                found[kind] = content
    return found


def avif_bits(data: bytes) -> int:
    """Bits of a sample of an AVIF file's primary picture; 8 where the file does not say it."""
    properties = primary_properties(data)
    if b"pixi" in properties:
        return properties[b"pixi"][5]
    depth = properties.get(b"av1C", bytes(4))[2]  # AV1-ISOBMFF, section 2.3.3: high_bitdepth, twelve_bit
    return 8 + 2 * bool(depth & 0x40) + 2 * bool(depth & 0x20)


def avif_colour_codes(data: bytes) -> tuple[int, int] | None:
    """Codes of primaries and curve (ITU-T H.273) of an AVIF file's primary picture; None where it names none."""
    try:
        colours = primary_properties(data).get(b"colr", b"")
    except (KeyError, IndexError, struct.error):
        return None
    return struct.unpack_from(">HH", colours, 4) if colours[:4] == b"nclx" and len(colours) >= 8 else None
