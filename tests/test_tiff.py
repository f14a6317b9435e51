import io
import struct

import cv2
import imagecodecs
import numpy as np
import pytest
import skimage.data
import tifffile
from PIL import Image

from zipir_jax.imageio import read_image_uint8, to_uint8
from zipir_jax.photograph import read_photograph

COLOURS = skimage.data.astronaut()[:96, :128]
GREY = np.ascontiguousarray(COLOURS[..., 0])
ALPHA = np.ascontiguousarray(COLOURS[..., 1])
COMPRESSION = 259  # tag


def tiff_of(samples, **options):
    tifffile.imwrite(file := io.BytesIO(), samples, **options)
    return file.getvalue()


def patched(data, tag, value):
    """A little-endian TIFF file with another SHORT in a tag of its first page."""
    data = bytearray(data)
    (start,) = struct.unpack_from("<I", data, 4)
    for at in range(start + 2, start + 2 + 12 * struct.unpack_from("<H", data, start)[0], 12):
        if struct.unpack_from("<H", data, at)[0] == tag:
            struct.pack_into("<HIH", data, at + 2, 3, 1, value)
            return bytes(data)
    raise AssertionError(f"no tag {tag}")


# --------------------------------------------------------------------------------------------------
# White
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "white"),
    [
        (np.float16, 1),
        (np.float32, 1),
        (np.float32, 255),
        (np.float32, 65535),
        (np.float64, 65535),
        (np.uint32, 255),
        (np.uint32, 65535),
        (np.uint32, 2**32 - 1),
        (np.int16, 255),
        (np.int16, 2**15 - 1),
    ],
)
def test_white_is_what_most_samples_stay_below(dtype, white):
    samples = (COLOURS / 255 * white).astype(dtype)
    limits = np.iinfo(dtype) if np.issubdtype(dtype, np.integer) else np.finfo(dtype)
    samples[4, 4] = min(limits.max, 10**10)  # a defective pixel
    read = read_image_uint8("a.tif", tiff_of(samples, photometric="rgb")).astype(int)
    assert (read[4, 4] == 255).all()
    read[4, 4] = COLOURS[4, 4]
    np.testing.assert_allclose(read, COLOURS, atol=1)


def test_light_brighter_than_white_is_white_and_darkens_nothing():
    light = np.full((64, 64, 3), 0.5, np.float32)
    light[:24] = 6.0  # a sky, of more than a third of the picture
    light[0, 0] = np.nan
    read = read_image_uint8("a.tif", tiff_of(light, photometric="rgb"))
    assert set(np.unique(read[24:])) == {128} and set(np.unique(read[1:24])) == {255}


# --------------------------------------------------------------------------------------------------
# Kinds of files
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [{}, {"tile": (32, 48)}, {"planarconfig": "separate"}], ids=str)
@pytest.mark.parametrize("compression", ["jpegxl", "jpeg2000", "lerc", "webp", "png", "jpegxr", "zstd"])
def test_compressions_of_8_bits_are_read(compression, layout):
    planar = "planarconfig" in layout
    if planar and compression == "webp":
        return  # WebP pictures have no single channels
    samples = np.ascontiguousarray(np.moveaxis(COLOURS, -1, 0)) if planar else COLOURS
    photo = read_photograph("a.tif", tiff_of(samples, photometric="rgb", compression=compression, **layout))
    assert photo.bits == 8
    np.testing.assert_array_equal(to_uint8(photo.pixels), COLOURS)


def inks(colours):
    return np.dstack([255 - colours, np.zeros(colours.shape[:2], np.uint8)])


def test_cmyk_with_alpha_is_read():
    samples = np.dstack([inks(COLOURS), ALPHA])
    photo = read_photograph("a.tif", tiff_of(samples, photometric="separated", extrasamples=["unassalpha"]))
    assert photo.bits == 8
    np.testing.assert_array_equal(np.round(photo.alpha * 255), ALPHA)
    visible = ALPHA >= 8  # the colours of what is nearly transparent are filled
    np.testing.assert_array_equal(to_uint8(photo.pixels)[visible], COLOURS[visible])


def test_jpeg_of_12_bits_is_read_as_16():
    data = tiff_of(
        COLOURS.astype(np.uint16) << 4,
        photometric="rgb",
        compression="jpeg",
        compressionargs={"bitspersample": 12},
    )
    photo = read_photograph("a.tif", data)
    assert photo.bits == 16
    assert np.abs((photo.pixels + 1) / 2 * 255 - COLOURS).mean() < 3


PILLOW = {  # what Pillow can write and read
    "palette": (Image.fromarray(COLOURS).quantize(200), {"compression": "tiff_lzw"}),
    "palette with alpha": (Image.fromarray(COLOURS).convert("PA"), {}),
    "YCbCr": (Image.fromarray(COLOURS).convert("YCbCr"), {"compression": "tiff_lzw"}),
    "JPEG": (Image.fromarray(COLOURS), {"compression": "jpeg"}),
    "fax": (Image.fromarray(GREY > 100), {"compression": "group4"}),
    "1 bit": (Image.fromarray(GREY > 100), {}),
    "CMYK": (Image.fromarray(COLOURS).convert("CMYK"), {"compression": "tiff_adobe_deflate"}),
    "CMYK in JPEG": (Image.fromarray(COLOURS).convert("CMYK"), {"compression": "jpeg"}),
    "unused channel": (Image.fromarray(COLOURS).convert("RGBX"), {}),
}


@pytest.mark.parametrize("name", PILLOW)
def test_pictures_look_as_pillow_shows_them(name):
    image, options = PILLOW[name]
    image.save(file := io.BytesIO(), "TIFF", **options)
    with Image.open(file) as read:
        expected = np.asarray(read.convert("RGB")).astype(int)
    np.testing.assert_allclose(read_image_uint8("a.tif", file.getvalue()), expected, atol=1)


@pytest.mark.parametrize("compression", [1, 5])  # none, LZW
def test_subsampled_colours_are_read_without_jpeg(compression):
    """A file by hand, in one strip of 2 x 2 pixels after the other: four of Y, and one of Cb and Cr each."""
    smooth = np.stack(np.broadcast_arrays(*np.mgrid[0:96, 0:128], 128), -1).astype(np.uint8)
    lightness, red, blue = np.moveaxis(cv2.cvtColor(smooth, cv2.COLOR_RGB2YCrCb), -1, 0)
    four = lightness.reshape(48, 2, 64, 2).transpose(0, 2, 1, 3).reshape(48, 64, 4)
    strip = np.dstack([four, blue[::2, ::2], red[::2, ::2]]).tobytes()
    strip = imagecodecs.lzw_encode(strip) if compression == 5 else strip
    tags = [
        (256, 3, 1, 128),
        (257, 3, 1, 96),
        (258, 3, 1, 8),
        (COMPRESSION, 3, 1, compression),
        (262, 3, 1, 6),
    ]
    tags += [(273, 4, 1, 8 + 2 + 12 * 10 + 4), (277, 3, 1, 3), (278, 3, 1, 96), (279, 4, 1, len(strip))]
    tags += [(530, 3, 2, 2 | 2 << 16)]
    head = struct.pack("<2sHIH", b"II", 42, 8, len(tags))
    data = head + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4) + strip
    assert np.abs(read_image_uint8("a.tif", data).astype(int) - smooth).max() <= 3


@pytest.mark.parametrize("bits", [2, 4, 6])
def test_grey_of_few_bits_reaches_from_black_to_white(bits):
    data = tiff_of(GREY >> (8 - bits), photometric="minisblack", bitspersample=bits)
    expected = np.round((GREY >> (8 - bits)) * (255 / (2**bits - 1)))
    np.testing.assert_array_equal(read_image_uint8("a.tif", data)[..., 0], expected)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_white_may_be_zero_and_colours_multiplied_by_alpha(dtype):
    one = np.iinfo(dtype).max // 255
    data = tiff_of(one * (255 - GREY).astype(dtype), photometric="miniswhite")
    np.testing.assert_array_equal(read_image_uint8("a.tif", data)[..., 0], GREY)
    colours = np.broadcast_to(np.array([200, 100, 50]), (8, 8, 3))
    samples = one * np.dstack([colours // 2, np.full((8, 8), 127)]).astype(dtype)
    photo = read_photograph("a.tif", tiff_of(samples, photometric="rgb", extrasamples=["assocalpha"]))
    np.testing.assert_allclose(to_uint8(photo.pixels).astype(int), colours, atol=1)
    np.testing.assert_allclose(photo.alpha, 127 / 255, atol=1e-6)


def test_what_cannot_be_read_is_named():
    data = tiff_of(COLOURS, photometric="rgb")
    for compression, name in ((32809, "THUNDERSCAN"), (54321, "54321")):
        with pytest.raises(ValueError) as raised:
            read_image_uint8("a.tif", patched(data, COMPRESSION, compression))
        assert str(raised.value) == f"a.tif: a TIFF file with compression {name}, which cannot be read"


def test_a_picture_is_too_large_before_it_lacks_pixels():
    data = patched(patched(tiff_of(COLOURS, photometric="rgb"), 256, 60_000), 257, 60_000)
    with pytest.raises(ValueError, match=r"the most that is read \(60000 x 60000 pixels\)"):
        read_image_uint8("a.tif", data)


@pytest.mark.parametrize("compression", ["jpeg", "jpeg2000", "png", "webp"])
def test_a_large_picture_in_the_place_of_a_small_one_is_not_unpacked(compression):
    data = tiff_of(COLOURS, photometric="rgb", compression=compression)
    data = patched(patched(data, 256, 16), 257, 16)
    with pytest.raises(ValueError, match=r"a part of 128 x 96 pixels is larger than its place"):
        read_image_uint8("a.tif", data)


# --------------------------------------------------------------------------------------------------
# EXIF data
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bigtiff", [False, True])
def test_exif_data_are_read(bigtiff):
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "Camera Inc.", 6
    exif.get_ifd(0x8769).update({0x9003: "2026:01:01 00:00:00"})
    exif.get_ifd(0x8825).update({2: (52.0, 31.0, 12.5)})
    Image.fromarray(COLOURS).save(file := io.BytesIO(), "TIFF", exif=exif.tobytes(), big_tiff=bigtiff)
    assert file.getvalue()[2] == (43 if bigtiff else 42)
    photo = read_photograph("a.tif", file.getvalue())
    assert photo.pixels.shape == (128, 96, 3)
    read = Image.Exif()
    read.load(photo.exif)
    assert read[0x010F] == "Camera Inc."
    assert read.get_ifd(0x8769)[0x9003] == "2026:01:01 00:00:00"
    assert read.get_ifd(0x8825)[2] == (52.0, 31.0, 12.5)
    assert photo.lost == ()


def test_what_a_tiff_file_loses_is_named():
    exif = Image.Exif()
    exif.get_ifd(0x8769).update({0x927C: b"offsets"})
    Image.fromarray(COLOURS).save(file := io.BytesIO(), "TIFF", exif=exif.tobytes())
    (lost,) = read_photograph("a.tif", file.getvalue()).lost
    assert lost.startswith("what the maker note points to")
    four = np.concatenate([COLOURS, COLOURS[..., :1]], -1)
    photo = read_photograph("a.tif", tiff_of(four, photometric="rgb", extrasamples=[0]))
    assert photo.alpha is None and photo.lost[0].startswith("1 of the channels")


@pytest.mark.parametrize(("kind", "value"), [(2, "<a/>"), (4, 7)])  # ASCII, LONG
def test_xmp_of_an_odd_type_is_no_damage(kind, value):
    data = tiff_of(COLOURS, photometric="rgb", extratags=[(700, kind, 1 if kind == 4 else 0, value, True)])
    assert read_photograph("a.tif", data).xmp == (b"<a/>" if kind == 2 else None)


def test_a_palette_of_two_colours_is_read():
    bits = COLOURS[..., 0] > 100
    palette = (0, 0xFFFF, 0, 0x8000, 0, 0)  # the reds, the greens, the blues
    grey = tiff_of(bits, photometric="minisblack", extratags=[(320, 3, 6, palette, True)])
    data = patched(grey, 262, tifffile.PHOTOMETRIC.PALETTE)
    expected = np.where(bits[..., None], (255, 128, 0), 0)
    np.testing.assert_array_equal(read_image_uint8("a.tif", data), expected)
