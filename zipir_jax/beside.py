"""What image files hold beside pixels, profile, EXIF data and XMP: IPTC data, density, texts, other pictures."""

import io
import re

import tifffile
from PIL import Image

from zipir_jax.metadata import GAIN_MAP
from zipir_jax.png import read_beside_pixels
from zipir_jax.tiff import bytes_of, picture_page

IPTC_OF_TIFF, IPTC_OF_PHOTOSHOP = 33723, 0x0404


def read_beside(file: io.BufferedIOBase, file_format: str) -> dict:
    """What a file holds beside pixels, profile, EXIF data and XMP, as fields of a `Photograph`.

    "iptc": bytes or None; "density": dots per inch in x and y, or None; "texts": (kind, data) of PNG's chunks, of which
    a JPEG file's comment is made one; "lost": what is not read, as one sentence each.
    """
    iptc, density, texts, lost = None, None, [], []
    file.seek(0)
    if file_format in ("JPEG", "MPO"):
        with Image.open(file, formats=["JPEG"]) as image:
            iptc = image.info.get("photoshop", {}).get(IPTC_OF_PHOTOSHOP)
            if image.info.get("jfif_unit") in (1, 2):  # else Pillow makes one up
                density = tuple(map(float, image.info["dpi"]))
            texts = [_comment(data) for kind, data in image.applist if kind == "COM"]
            if image.format == "MPO":
                lost = [f"other pictures of the file ({image.n_frames - 1}): the first is restored"]
    elif file_format == "PNG":
        found = read_beside_pixels(file)
        iptc, density, texts = found.get("iptc"), found.get("density"), found["texts"]
        if found["unnamed"]:
            lost = [f"texts without a keyword that PNG allows ({found['unnamed']})"]
    elif file_format == "TIFF":
        with tifffile.TiffFile(file) as tiff:
            iptc = bytes_of(picture_page(tiff), IPTC_OF_TIFF)
    elif re.search(rb"hdrgainmap|infe.{8,10}tmap", file.read(2**16), re.DOTALL):  # Apple's, ISO 21496-1's
        lost = [GAIN_MAP]
    density = density if density and min(density) > 0 else None
    return {"iptc": iptc or None, "density": density, "texts": tuple(texts), "lost": tuple(lost)}


def _comment(data):
    """A JPEG file's comment as a chunk of PNG: of UTF-8 where it is that and more than ASCII, else of Latin-1."""
    try:
        is_utf8 = not data.isascii() and bool(data.decode())
    except UnicodeDecodeError:
        is_utf8 = False
    return (b"iTXt", b"Comment\0\0\0\0\0" + data) if is_utf8 else (b"tEXt", b"Comment\0" + data)
