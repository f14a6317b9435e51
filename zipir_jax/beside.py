"""What image files hold beside pixels, profile, EXIF data and XMP: IPTC data, density, texts, other pictures."""

import io
import re
import struct

import tifffile
from PIL import Image

from zipir_jax.metadata import GAIN_MAP, png_chunks
from zipir_jax.tiff import picture_page

IPTC_OF_TIFF, IPTC_OF_PHOTOSHOP = 33723, 0x0404
# Texts of PNG files that are no texts: XMP, and what ImageMagick puts there of EXIF data, XMP and profiles.
NO_TEXT = re.compile(rb"XML:com\.adobe\.xmp\0|Raw profile type (?:exif|app1|xmp|icc|icm)\0", re.IGNORECASE)


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
            texts = [(b"tEXt", b"Comment\0" + data) for kind, data in image.applist if kind == "COM"]
            if image.format == "MPO":
                lost = [f"other pictures of the file ({image.n_frames - 1}): the first is restored"]
    elif file_format == "PNG":
        for kind, data in png_chunks(file):
            if kind == b"pHYs" and len(data) == 9 and data[8] == 1:  # a metre
                density = tuple(0.0254 * pixels for pixels in struct.unpack(">II", data[:8]))
            elif kind in (b"tEXt", b"zTXt", b"iTXt") and not NO_TEXT.match(data):
                texts.append((kind, data))
    elif file_format == "TIFF":
        with tifffile.TiffFile(file) as tiff:
            found = picture_page(tiff).tags.valueof(IPTC_OF_TIFF)
        iptc = found if isinstance(found, bytes) else None
    elif re.search(rb"hdrgainmap|infe.{8,10}tmap", file.read(2**16), re.DOTALL):  # Apple's, ISO 21496-1's
        lost = [GAIN_MAP]
    density = density if density and min(density) > 0 else None
    return {"iptc": iptc or None, "density": density, "texts": tuple(texts), "lost": tuple(lost)}
