import io
import os
import struct
import subprocess
import sys
import zlib

import cv2
import imagecodecs
import numpy as np
import pytest
import skimage.data
import tifffile
from PIL import Image, ImageCms
from PIL.IptcImagePlugin import getiptcinfo
from skimage.color import deltaE_ciede2000

from zipir_jax import photograph
from zipir_jax.config import RestorationConfig, SamplingConfig, TargetConfig
from zipir_jax.icc import ADOBE_RGB, coded_profile, rgb_profile
from zipir_jax.imageio import read_image, read_image_uint8, resize, to_float, to_uint8, upright_size
from zipir_jax.metadata import GAIN_MAP
from zipir_jax.photograph import (
    OUTPUT_FORMATS,
    Photograph,
    check_output,
    fill_transparent,
    read_photograph,
    write_photograph,
)
from zipir_jax.restorer import Restorer, restore_photograph

XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6" dc:title="&#228;"/></x:xmpmeta>'
PREFIX = b"Exif\0\0"
SRGB = imagecodecs.cms_profile("srgb")
GREY = imagecodecs.cms_profile("gray", gamma=1.8)
PROFILES = {
    "sRGB": SRGB,
    "Adobe RGB": imagecodecs.cms_profile("adobergb"),
    "Display P3": coded_profile(12, 13),
    "ProPhoto": imagecodecs.cms_profile(
        "rgb",
        whitepoint=(0.3457, 0.3585, 1.0),
        primaries=(0.7347, 0.2653, 1, 0.1596, 0.8404, 1, 0.0366, 0.0001, 1),
        gamma=1.8,
    ),
}
SUFFIXES = ["png", "jpg", "webp", "tif", "avif", "heic"]


@pytest.fixture(scope="module")
def smooth():
    """uint8 [24, 40, 3] without edges: JPEG keeps it, and no symmetry hides a flip."""
    y, x = np.mgrid[0:24, 0:40]
    return np.stack([40 + 5 * x, 220 - 7 * y, 90 + 2 * x + 3 * y], -1).astype(np.uint8)


def exif_data(orientation=1, width=40, height=24):
    """EXIF data, as Pillow writes them, with a maker note and a place."""
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "Camera Inc.", orientation
    exif.get_ifd(0x8769).update({0xA002: width, 0xA003: height, 0x927C: b"note of the maker"})
    exif.get_ifd(0x8825).update({1: "N", 2: (52.0, 31.0, 12.5)})
    return exif.tobytes().removeprefix(PREFIX)


def tags_of(exif):
    """All that Pillow reads in EXIF data, but where the inner directories lie."""
    loaded = Image.Exif()
    loaded.load(exif)
    return {**loaded, 0x8769: loaded.get_ifd(0x8769), 0x8825: loaded.get_ifd(0x8825)}


def stored(upright, orientation):
    """How a camera stores an upright picture [h, w, 3] under an EXIF orientation."""
    turned = upright.swapaxes(0, 1) if orientation >= 5 else upright
    flips = {2: (1, -1), 3: (-1, -1), 4: (-1, 1), 6: (-1, 1), 7: (-1, -1), 8: (1, -1)}.get(
        orientation, (1, 1)
    )
    return np.ascontiguousarray(turned[:: flips[0], :: flips[1]])


def bypassed(photo, factor=2):
    """A photograph whose restoration is its enlargement."""
    height, width = photo.pixels.shape[:2]
    return photo.with_pixels(resize(photo.pixels, factor * height, factor * width))


# --------------------------------------------------------------------------------------------------
# Orientation and metadata
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_come_out_upright(smooth, tmp_path, suffix, orientation):
    turned = Image.fromarray(stored(smooth, orientation))
    exif = PREFIX + exif_data(orientation, turned.width, turned.height)
    source = tmp_path / f"a.{suffix}"
    options = {"jpg": {"quality": 95, "subsampling": 0}, "webp": {"lossless": True}}.get(suffix, {})
    if suffix == "tif":
        turned.getexif()[0x0112] = orientation
        turned.save(source, exif=turned.getexif())
    else:
        turned.save(source, exif=exif, **options)
    assert upright_size(source) == (24, 40)
    photo = read_photograph(source)
    np.testing.assert_allclose(to_uint8(photo.pixels).astype(float), smooth, atol=4 if suffix == "jpg" else 0)
    np.testing.assert_array_equal(read_image_uint8(source), to_uint8(photo.pixels))
    write_photograph(tmp_path / f"b.{suffix}", bypassed(photo))
    with Image.open(tmp_path / f"b.{suffix}") as result:
        assert result.size == (80, 48) and result.getexif().get(0x0112, 1) == 1
        if suffix != "tif":
            inner = result.getexif().get_ifd(0x8769)
            assert (inner[0xA002], inner[0xA003]) == (80, 48)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_metadata_are_written_and_read_byte_for_byte(smooth, tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    profile = PROFILES["Display P3"]
    photo = Photograph(to_float(smooth), icc=profile, exif=exif_data(), xmp=XMP)
    assert write_photograph(path, photo) == []
    read = read_photograph(path)
    assert read.icc == profile and read.xmp == XMP and not read.is_grey
    if suffix == "tif":  # its tags are the file's own
        read_tags, tags = tags_of(read.exif), tags_of(photo.exif)
        assert {tag: tags[tag] for tag in (0x010F, 0x8769, 0x8825)} == {
            tag: read_tags[tag] for tag in (0x010F, 0x8769, 0x8825)
        }
    else:
        assert read.exif == photo.exif


@pytest.mark.parametrize("exif", [exif_data(), exif_data() + b"odd", b"II*\0\x08\0\0\0", None])
@pytest.mark.parametrize("samples", [np.uint8, np.uint16])
def test_a_tiff_file_begins_with_its_exif_data(smooth, tmp_path, exif, samples):
    """Offsets in maker notes count from there. Three other readers find the pixels."""
    photo = Photograph(to_float(smooth), bits=8 * np.dtype(samples).itemsize, exif=exif, xmp=b"<x/>")
    write_photograph(tmp_path / "a.tif", photo)
    data = (tmp_path / "a.tif").read_bytes()
    if exif is not None:
        assert data[:4] == exif[:4] and data[8 : len(exif)] == exif[8:]
    expected = smooth if samples == np.uint8 else smooth.astype(np.uint16) * 257
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "a.tif"), expected)
    np.testing.assert_array_equal(
        cv2.imread(str(tmp_path / "a.tif"), cv2.IMREAD_UNCHANGED)[..., ::-1], expected
    )
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.tif")), smooth)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_a_picture_turned_by_its_xmp_alone_is_turned_once(smooth, tmp_path, suffix, bits):
    path = tmp_path / f"a.{suffix}"
    write_photograph(path, Photograph(to_float(stored(smooth, 6)), bits=bits, xmp=XMP))
    photo = read_photograph(path)
    np.testing.assert_allclose(to_uint8(photo.pixels).astype(int), smooth, atol=4 if suffix == "jpg" else 0)
    assert upright_size(path) == (24, 40)
    write_photograph(path, bypassed(photo))
    assert read_photograph(path).pixels.shape == (48, 80, 3)
    assert read_photograph(path).xmp == XMP.replace(b'"6"', b'"1"')


@pytest.mark.parametrize("orientation", [1, 3, 5, 6, 7, 8])
@pytest.mark.parametrize("suffix", ["avif", "heic"])
def test_what_turns_itself_is_not_turned_twice(tmp_path, suffix, orientation):
    """AVIF and HEIC have an orientation of their own beside EXIF's, written here by both libraries."""
    upright = np.repeat(np.repeat(skimage.data.astronaut()[:64:16, :96:16], 16, 0), 16, 1)
    image = Image.fromarray(stored(upright, orientation))
    path = tmp_path / f"a.{suffix}"
    exif = PREFIX + exif_data(orientation, image.width, image.height)
    if suffix == "avif":
        image.save(path, quality=95, exif=exif)
    else:
        import pillow_heif

        pillow_heif.from_pillow(image).save(path, quality=95, exif=exif)
    photo = read_photograph(path)
    assert upright_size(path) == (64, 96)
    np.testing.assert_allclose(to_uint8(photo.pixels).astype(float), upright, atol=40)
    np.testing.assert_array_equal(read_image_uint8(path), to_uint8(photo.pixels))
    assert tags_of(bypassed(photo).exif)[0x8769][0x927C] == b"note of the maker"
    write_photograph(path, bypassed(photo))
    assert upright_size(path) == (128, 192)


def test_what_jpeg_has_no_room_for_is_named(smooth):
    large = exif_data() + bytes(70_000)
    photo = Photograph(
        to_float(smooth), bits=16, alpha=np.full((24, 40), 0.9, np.float32), exif=large, xmp=XMP * 1000
    )
    file = io.BytesIO()
    not_kept = write_photograph(file, photo, "JPEG")
    assert [sentence.split(":")[0] for sentence in not_kept] == [
        "16 bits a sample",
        "transparency",
        f"the EXIF data, {len(large) + 6} bytes",
        f"the XMP, {len(XMP) * 1000} bytes",
    ]
    read = read_photograph("a.jpg", file.getvalue())
    assert read.exif is read.xmp is None and read.bits == 8
    opaque = np.ones((24, 40), np.float32)
    fits = Photograph(
        to_float(smooth), alpha=opaque, exif=exif_data().ljust(65533 - 6), xmp=XMP.ljust(65533 - 29)
    )
    file = io.BytesIO()
    assert write_photograph(file, fits, "JPEG") == []
    read = read_photograph("a.jpg", file.getvalue())
    assert read.exif == fits.exif and read.xmp == fits.xmp


IPTC = b"\x1c\x02\x50\x00\x06Author" + b"\x1c\x02\x78\x00\x05Title"


def test_iptc_data_density_and_texts_are_kept_where_a_format_has_them(smooth):
    texts = ((b"tEXt", b"Comment\0a harbour"), (b"iTXt", b"Author\0\0\0de\0\0J\xc3\xb6rg"))
    photo = Photograph(to_float(smooth), iptc=IPTC, density=(300.0, 240.0), texts=texts)
    kept = {
        "JPEG": (IPTC, (300, 240), texts[:1], ["the texts of the file (Author)"]),
        "TIFF": (IPTC, (300, 240), (), ["the texts of the file (Comment, Author)"]),
        "PNG": (None, (300, 240), texts, ["the IPTC data"]),
    }
    nowhere = [
        "the IPTC data",
        "the density of 300 x 240 dots per inch",
        "the texts of the file (Comment, Author)",
    ]
    kept |= dict.fromkeys(("WEBP", "AVIF", "HEIF"), (None, None, (), nowhere))
    for file_format, (iptc, density, texts_kept, names) in kept.items():
        not_kept = write_photograph(file := io.BytesIO(), bypassed(photo), file_format)
        assert [sentence.split(":")[0] for sentence in not_kept] == names
        read = read_photograph("a", file.getvalue())
        assert read.iptc == iptc and read.texts == texts_kept and read.lost == ()
        assert read.density == (density and pytest.approx(density, rel=1e-3))
        if file_format not in ("JPEG", "TIFF", "PNG"):
            continue
        with Image.open(io.BytesIO(file.getvalue())) as image:  # as others see it
            assert image.info["dpi"] == pytest.approx(density, rel=1e-3)
            assert (getiptcinfo(image) or {}) == ({(2, 80): b"Author", (2, 120): b"Title"} if iptc else {})
            if file_format == "PNG":
                assert (image.text["Author"], image.text["Comment"]) == ("J\u00f6rg", "a harbour")
            elif file_format == "JPEG":
                assert image.info["comment"] == b"a harbour"


@pytest.mark.parametrize(
    ("comment", "kind"),
    [(b"plain", b"tEXt"), ("Köln".encode(), b"iTXt"), ("Köln".encode("latin-1"), b"tEXt")],
)
def test_comments_of_jpeg_are_text_of_their_encoding(smooth, comment, kind):
    photo = read_photograph("a.jpg", encoded(Image.fromarray(smooth), "JPEG", comment=comment))
    assert [text[0] for text in photo.texts] == [kind]
    not_kept = write_photograph(file := io.BytesIO(), photo, "PNG")
    with Image.open(file) as image:
        assert image.text["Comment"] in ("plain", "Köln")
    photo = read_photograph("a.png", file.getvalue())
    not_kept += write_photograph(file := io.BytesIO(), photo, "JPEG")
    with Image.open(file) as image:
        assert image.info["comment"] == comment and not_kept == []


def test_density_comes_from_exif_data_where_a_file_names_no_other(smooth):
    exif = Image.Exif()
    exif[0x011A] = exif[0x011B] = 240.0
    data = encoded(Image.fromarray(smooth), "WEBP", exif=exif.tobytes())
    photo = read_photograph("a.webp", data)
    assert photo.density == (240, 240)
    assert write_photograph(io.BytesIO(), photo, "AVIF") == []  # it is in the EXIF data
    write_photograph(file := io.BytesIO(), photo, "PNG")
    assert Image.open(io.BytesIO(file.getvalue())).info["dpi"] == pytest.approx((240, 240), rel=1e-3)
    assert (
        read_photograph("a.jpg", encoded(Image.fromarray(smooth), "JPEG", exif=exif_data())).density is None
    )


def test_iptc_data_and_comments_too_large_for_jpeg_are_named(smooth):
    large = IPTC + bytes(66_000)
    photo = Photograph(
        to_float(smooth), iptc=large, density=(7e4, 7e4), texts=((b"tEXt", b"Comment\0" + bytes(66_000)),)
    )
    not_kept = write_photograph(file := io.BytesIO(), photo, "JPEG")
    assert [sentence.split(",")[0] for sentence in not_kept] == ["the IPTC data", "the comment"]
    read = read_photograph("a.jpg", file.getvalue())
    assert (read.iptc, read.texts, read.density) == (None, (), None)
    write_photograph(file := io.BytesIO(), photo, "TIFF")
    assert read_photograph("a.tif", file.getvalue()).iptc == large


def test_what_of_a_file_is_not_read_is_named_with_the_result(smooth):
    """Other pictures of an MPO file, gain maps of JPEG and HEIC; and no XMP announces them in the result."""
    gain_map = b'<x hdrgm:Version="1.0" dc:title="t"/>'
    image = Image.fromarray(smooth)
    photo = read_photograph("a.jpg", encoded(image, "JPEG", xmp=gain_map))
    assert photo.xmp == b'<x dc:title="t"/>'
    assert write_photograph(io.BytesIO(), bypassed(photo), "PNG") == [GAIN_MAP]
    photo = read_photograph("a.jpg", animated("MPO", 3))
    assert photo.lost == ("other pictures of the file (2): the first is restored",)
    assert photo.density is None and photo.texts == ()
    write_photograph(file := io.BytesIO(), Photograph(to_float(smooth)), "HEIF")
    first = Image.fromarray(smooth)
    first.save(several := io.BytesIO(), "HEIF", save_all=True, append_images=[first])
    several = read_photograph("a.heic", several.getvalue())
    assert several.lost == ("other pictures of the file (1): the primary one is restored",)
    write_photograph(turned := io.BytesIO(), Photograph(to_float(smooth), exif=exif_data(6)), "AVIF")
    (lost,) = read_photograph("a.avif", turned.getvalue()).lost  # the file itself says that it is upright
    assert lost == "what the maker note points to: the EXIF data had to be packed anew"
    panorama = b'<x GPano:FullPanoWidthPixels="9" dc:title="t"/>'
    photo = read_photograph("a.jpg", encoded(image, "JPEG", xmp=panorama))
    assert photo.xmp == b'<x dc:title="t"/>' and "panorama" in photo.lost[0]
    announced = file.getvalue() + b"\0\0\0\x2afreeurn:com:apple:photo:2020:aux:hdrgainmap\0"
    assert read_photograph("a.heic", announced).lost == (GAIN_MAP,)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_a_picture_turned_by_xmp_in_single_quotes_is_turned(smooth, tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    xmp = b"<x tiff:Orientation='6'><mwg-rs:Regions>faces</mwg-rs:Regions></x>"
    write_photograph(path, Photograph(to_float(stored(smooth, 6)), xmp=xmp))
    assert upright_size(path) == (24, 40)
    photo = read_photograph(path)
    np.testing.assert_allclose(to_uint8(photo.pixels).astype(int), smooth, atol=4 if suffix == "jpg" else 0)
    assert bypassed(photo).xmp == b"<x tiff:Orientation='1'></x>" and "faces" in photo.lost[0]


@pytest.mark.parametrize("exif", [b"garbage", *(exif_data()[:length] for length in (5, 8, 12, 30, 60, 120))])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_damaged_exif_data_keep_no_picture_from_being_written(smooth, tmp_path, suffix, exif):
    path = tmp_path / f"a.{suffix}"
    photo = Photograph(to_float(smooth), exif=exif)
    not_kept = write_photograph(path, photo.with_pixels(photo.pixels))
    read = read_photograph(path)
    assert read.pixels.shape == photo.pixels.shape
    if suffix in ("png", "jpg", "webp"):
        assert read.exif == exif and not_kept == []


# --------------------------------------------------------------------------------------------------
# Colours
# --------------------------------------------------------------------------------------------------


def lab(pixels, profile):
    """What pixels of a profile, uint8, uint16 or in [0, 1], look like, in CIELAB, by LittleCMS in float32."""
    to_lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    full = 1 if pixels.dtype.kind == "f" else np.iinfo(pixels.dtype).max
    values = (pixels / full).astype(np.float32)
    return imagecodecs.cms_transform(
        values,
        profile,
        to_lab,
        colorspace="rgb",
        outcolorspace="lab",
        intent=imagecodecs.CMS.INTENT.RELATIVE_COLORIMETRIC,
    )


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize(("suffix", "bits"), [("png", 8), ("png", 16), ("tif", 8), ("tif", 16), ("jpg", 8)])
def test_colours_come_back_in_their_profile(tmp_path, name, suffix, bits):
    """Flat patches, the profile's own primaries and darkest colours among them, enlarged without a network."""
    levels = [0, 20, 128, 255]
    patches = np.array([[r, g, b] for r in levels for g in levels for b in levels], np.uint8).reshape(8, 8, 3)
    patches = patches.astype(np.uint16) * 257 if bits == 16 else patches
    pixels = np.repeat(np.repeat(patches, 16, 0), 16, 1)
    path, profile = tmp_path / f"a.{suffix}", PROFILES[name]
    if suffix == "tif":
        tifffile.imwrite(path, pixels, photometric="rgb", iccprofile=profile)
    elif bits == 16:
        _, data = cv2.imencodeWithMetadata(
            ".png", pixels[..., ::-1], [cv2.IMAGE_METADATA_ICCP], [np.frombuffer(profile, np.uint8)]
        )
        path.write_bytes(data.tobytes())
    else:
        Image.fromarray(pixels).save(
            path, icc_profile=profile, **({"quality": 100, "subsampling": 0} if suffix == "jpg" else {})
        )
    photo = read_photograph(path)
    assert (photo.bits, photo.icc) == (bits, profile) and (photo.residual is None) == (name == "sRGB")
    assert photo.pixels.min() >= -1 and photo.pixels.max() <= 1
    assert write_photograph(path, bypassed(photo)) == []
    again = read_photograph(path)
    assert (again.bits, again.icc) == (bits, profile)
    if suffix == "tif":
        written = tifffile.imread(path)
    else:
        written = cv2.imread(str(path), cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION)[..., ::-1]
    assert written.dtype == pixels.dtype
    middles = np.ascontiguousarray(written[16::32, 16::32])
    # ProPhoto's 8 bits are too few for what JPEG does to its darkest colours.
    limit = 3 if (name, suffix) == ("ProPhoto", "jpg") else 1
    assert deltaE_ciede2000(lab(patches, profile), lab(middles, profile)).max() < limit


@pytest.mark.parametrize("name", ["Display P3", "Adobe RGB"])
def test_colours_come_back_from_the_network_in_their_profile(tiny_weights, name):
    """Of random weights, which know no colours: what holds them is fidelity and colour correction."""
    patches = np.array([[[255, 0, 0], [0, 255, 0]], [[200, 60, 40], [90, 120, 140]]], np.uint8)
    pixels = np.repeat(np.repeat(patches, 96, 0), 96, 1)
    data = encoded(Image.fromarray(pixels), "PNG", icc_profile=PROFILES[name])
    restorer, photo = Restorer.load(tiny_weights), read_photograph("a.png", data)
    assert photo.residual is not None

    def difference(colour_correction):
        restored = restore_photograph(
            restorer,
            photo,
            TargetConfig(scale=2.0),
            RestorationConfig(
                sampling=SamplingConfig(steps=2, fidelity=1.0), colour_correction=colour_correction
            ),
        )
        write_photograph(file := io.BytesIO(), restored, "PNG")
        assert read_photograph("b.png", file.getvalue()).icc == PROFILES[name]
        written = imagecodecs.png_decode(file.getvalue()).astype(float)
        # The middle of each patch, out of the reach of the filters, and the mean of it: the weights add noise.
        middles = written.reshape(2, 192, 2, 192, 3)[:, 48:144, :, 48:144].mean((1, 3))
        return deltaE_ciede2000(lab(patches, PROFILES[name]), lab(middles / 255, PROFILES[name]))

    assert difference("wavelet").max() < 1
    assert difference("none").min() > 5


def test_srgb_is_neither_converted_nor_added(smooth, tmp_path):
    for name, options in (("without", {}), ("with", {"icc_profile": SRGB})):
        Image.fromarray(smooth).save(tmp_path / f"{name}.png", **options)
        photo = read_photograph(tmp_path / f"{name}.png")
        np.testing.assert_array_equal(photo.pixels, to_float(smooth))
        write_photograph(tmp_path / f"{name}.png", photo)
        with Image.open(tmp_path / f"{name}.png") as written:
            np.testing.assert_array_equal(np.asarray(written), smooth)
            assert written.info.get("icc_profile") == options.get("icc_profile")


@pytest.mark.parametrize("profile", [b"garbage" * 30, PROFILES["Adobe RGB"][:300], GREY])
def test_a_profile_that_is_damaged_or_of_grey_counts_as_none(smooth, tmp_path, profile):
    Image.fromarray(smooth).save(tmp_path / "a.png", icc_profile=profile)
    photo = read_photograph(tmp_path / "a.png")
    assert photo.icc is None and photo.lost == ("the colour profile: it is damaged, or of other pixels",)
    np.testing.assert_array_equal(photo.pixels, to_float(smooth))


def named_by_code(pixels, kind, primaries, curve):
    """A file whose colours are named by codes of ITU-T H.273, without a profile."""
    if kind == "png":
        data, header = encoded(Image.fromarray(pixels), "PNG"), 8 + 25
        codes = png_chunk(b"cICP", bytes([primaries, curve, 0, 1]))
        return data[:header] + png_chunk(b"iCCP", b"x\0\0" + zlib.compress(GREY)) + codes + data[header:]
    if kind == "avif":
        return imagecodecs.avif_encode(pixels, level=100, primaries=primaries, transfer=curve)
    import pillow_heif

    pillow_heif.from_pillow(Image.fromarray(pixels)).save(
        file := io.BytesIO(),
        quality=-1,
        chroma=444,
        color_primaries=primaries,
        transfer_characteristics=curve,
    )
    return file.getvalue()


@pytest.mark.parametrize("kind", ["png", "avif", "heic"])
def test_colours_named_by_codes_are_those_of_the_profile_that_the_result_has(smooth, kind):
    for primaries, curve in [(12, 13), (9, 1), (12, 6), (9, 4)]:
        photo = read_photograph("a", named_by_code(smooth, kind, primaries, curve))
        assert photo.icc == coded_profile(primaries, curve)
        by_profile = read_photograph("a", encoded(Image.fromarray(smooth), "PNG", icc_profile=photo.icc))
        # Rounding of lossy formats is magnified near black.
        assert np.abs(photo.pixels - by_profile.pixels).mean() <= (0 if kind == "png" else 0.01)
        assert np.abs(photo.pixels - to_float(smooth)).max() > 0.1
        write_photograph(file := io.BytesIO(), photo, "PNG")
        assert read_photograph("b", file.getvalue()).icc == photo.icc
    for primaries, curve in [(1, 13), (1, 1), (2, 2), (5, 13)]:  # sRGB, or nothing that is known
        photo = read_photograph("a", named_by_code(smooth, kind, primaries, curve))
        assert photo.icc is None
        np.testing.assert_allclose(photo.pixels, to_float(smooth), atol=0 if kind == "png" else 0.05)


@pytest.mark.parametrize("kind", ["png", "avif", "heic"])
@pytest.mark.parametrize(("curve", "name"), [(16, "PQ"), (18, "HLG")])
def test_high_dynamic_range_is_refused(smooth, kind, curve, name):
    data = named_by_code(smooth, kind, 9, curve)
    for read in (read_photograph, read_image_uint8):
        with pytest.raises(ValueError, match=rf"^a\.jpg: high dynamic range \({name}\) is not read"):
            read("a.jpg", data)


def test_adobe_rgb_of_cameras_is_named_in_exif_data(smooth):
    def exif_of(index):
        exif = Image.Exif()
        exif.get_ifd(0x8769).update({0xA001: 65535, 0xA005: {1: index, 2: b"0100"}})
        return exif.tobytes()

    image = Image.fromarray(smooth)
    for kind in ("JPEG", "PNG", "WEBP"):
        photo = read_photograph("a", encoded(image, kind, exif=exif_of("R03")))
        assert photo.icc == rgb_profile(*ADOBE_RGB)
        assert read_photograph("a", encoded(image, kind, exif=exif_of("R98"))).icc is None
    # What a profile says counts.
    assert read_photograph("a", encoded(image, "PNG", exif=exif_of("R03"), icc_profile=SRGB)).icc == SRGB


def test_training_sees_the_colours_that_restoring_sees(smooth, tmp_path):
    Image.fromarray(smooth).save(tmp_path / "a.png", icc_profile=PROFILES["Adobe RGB"])
    photo = read_photograph(tmp_path / "a.png")
    assert np.abs(photo.pixels - to_float(smooth)).max() > 0.1
    np.testing.assert_allclose(read_image(tmp_path / "a.png"), photo.pixels, atol=1e-6)
    levels = (photo.pixels.astype(float) + 1) * 127.5
    np.testing.assert_allclose(read_image_uint8(tmp_path / "a.png"), levels, atol=1)


@pytest.mark.parametrize("profile", [None, GREY])
@pytest.mark.parametrize(("suffix", "bits"), [("png", 8), ("png", 16), ("tif", 8), ("tif", 16), ("jpg", 8)])
def test_grey_stays_grey(tmp_path, suffix, bits, profile):
    ramp = np.tile(
        np.linspace(0, 2**bits - 1, 64).round().astype(np.uint8 if bits == 8 else np.uint16), (16, 1)
    )
    path = tmp_path / f"a.{suffix}"
    if suffix == "tif":
        tifffile.imwrite(path, ramp, photometric="minisblack", iccprofile=profile)
    else:
        Image.fromarray(ramp).save(path, icc_profile=profile, **({"quality": 100} if suffix == "jpg" else {}))
    photo = read_photograph(path)
    assert photo.is_grey and photo.bits == bits and photo.icc == profile
    assert (photo.pixels == photo.pixels[..., :1]).all()
    tinted = photo.with_pixels(np.clip(photo.pixels + np.array([0.05, 0, -0.05], np.float32), -1, 1))
    assert (tinted.pixels == tinted.pixels[..., :1]).all()
    write_photograph(path, photo.with_pixels(photo.pixels))
    with Image.open(path) as written:
        assert written.mode == ("L" if bits == 8 else "I;16") and written.info.get("icc_profile") == profile
        tolerance = 1 if suffix == "jpg" or profile else 0
        np.testing.assert_allclose(
            np.asarray(written).astype(int), ramp, atol=tolerance * (2 if bits == 8 else 20)
        )
    for other in ("WEBP", "AVIF"):
        not_kept = write_photograph(file := io.BytesIO(), photo, other)
        assert any("grey ICC profile" in sentence for sentence in not_kept) == (profile is not None)
        assert np.abs(read_photograph("a", file.getvalue()).pixels - photo.pixels).max() < 0.05


def cmyk_profile():
    """An ICC profile by hand (ICC.1:2010, lut8Type): inks of its own on white paper, as Lab of 16 corners."""
    corners = []
    for cyan in (0, 1):
        for magenta in (0, 1):
            for yellow in (0, 1):
                for black in (0, 1):
                    lightness = max(0, 100 - 30 * cyan - 35 * magenta - 8 * yellow - 75 * black)
                    a, b = -30 * cyan + 60 * magenta - 5 * yellow, -40 * cyan - 5 * magenta + 70 * yellow
                    fade = 0.1 if black else 1
                    corners += [round(lightness * 2.55), round(128 + fade * a), round(128 + fade * b)]
    identity = bytes(range(256))
    lut = b"mft1\0\0\0\0" + struct.pack(
        ">BBBx9i", 4, 3, 2, *(65536 if i in (0, 4, 8) else 0 for i in range(9))
    )
    lut += 4 * identity + bytes(corners) + 3 * identity
    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"inks\0" + bytes(78)
    white = b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)
    tags, body = [(b"desc", text), (b"A2B0", lut), (b"A2B1", lut), (b"wtpt", white)], b""
    table = struct.pack(">I", len(tags))
    start = 128 + 4 + 12 * len(tags)
    for name, data in tags:
        data = data.ljust(-(-len(data) // 4) * 4, b"\0")
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data
    header = struct.pack(">I4sI4s4s4s", start + len(body), b"lcms", 0x02400000, b"prtr", b"CMYK", b"Lab ")
    header = (header + bytes(12) + b"acsp").ljust(68, b"\0") + struct.pack(">3i", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + table + body


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_cmyk_goes_through_its_own_profile_to_that_of_srgb(tmp_path, suffix):
    inks = np.zeros((16, 64, 4), np.uint8)
    inks[:, 16:32, 0], inks[:, 32:48, 1], inks[:, 48:, 3] = 255, 255, 255  # paper, cyan, magenta, black
    image = Image.fromarray(inks, mode="CMYK")
    pixels = {}
    for name, options in (
        ("with", {"icc_profile": cmyk_profile()}),
        ("broken", {"icc_profile": b"x" * 200}),
        ("without", {}),
    ):
        image.save(tmp_path / f"{name}.{suffix}", **options, **({"quality": 100} if suffix == "jpg" else {}))
        photo = read_photograph(tmp_path / f"{name}.{suffix}")
        assert photo.icc == (coded_profile(1, 13) if name == "with" else None)
        assert not photo.is_grey and photo.bits == 8
        pixels[name] = to_uint8(photo.pixels)[8, 8::16].astype(int)
    np.testing.assert_array_equal(pixels["broken"], pixels["without"])
    np.testing.assert_allclose(pixels["without"], [[255] * 3, [0, 255, 255], [255, 0, 255], [0] * 3], atol=3)
    assert np.abs(pixels["with"][0] - 255).max() <= 3  # paper
    assert np.abs(pixels["with"][1:] - pixels["without"][1:]).max() > 40
    assert (pixels["with"][3] > 30).all()  # its black is grey


def test_other_kinds_of_pixels_become_srgb(tmp_path):
    colours = np.repeat(np.repeat(skimage.data.astronaut()[:64:16, :64:16], 16, 0), 16, 1)
    image = Image.fromarray(colours)
    lab_image = ImageCms.profileToProfile(
        image, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    lab_image.save(tmp_path / "lab.tif")
    image.convert("YCbCr").save(tmp_path / "ycbcr.tif", compression="jpeg", quality=95)
    image.quantize(16).save(tmp_path / "palette.gif")
    image.save(tmp_path / "a.bmp")
    for name, tolerance in (("lab.tif", 3), ("ycbcr.tif", 8), ("palette.gif", 0), ("a.bmp", 0)):
        photo = read_photograph(tmp_path / name)
        assert not photo.is_grey and photo.icc is None
        assert (
            np.abs(to_uint8(photo.pixels)[8::16, 8::16].astype(int) - colours[8::16, 8::16]).max()
            <= tolerance
        )
    image.convert("1").save(tmp_path / "bits.png")
    photo = read_photograph(tmp_path / "bits.png")
    assert photo.is_grey and set(np.unique(photo.pixels)) == {-1, 1}


# --------------------------------------------------------------------------------------------------
# 16 bits and alpha
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gradient():
    """uint16 [32, 256, 4]: every sample another one, and far more than 256 of them."""
    return np.arange(32 * 256 * 4).reshape(32, 256, 4).astype(np.uint16) * 2


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_survive(gradient, tmp_path, suffix, channels):
    pixels = np.ascontiguousarray(gradient[..., :channels])
    path = tmp_path / f"a.{suffix}"
    if suffix == "png":
        path.write_bytes(imagecodecs.png_encode(pixels[..., 0] if channels == 1 else pixels))
    else:
        photometric = "rgb" if channels > 2 else "minisblack"
        extra = {"extrasamples": ["unassalpha"]} if channels in (2, 4) else {}
        tifffile.imwrite(path, pixels if channels > 1 else pixels[..., 0], photometric=photometric, **extra)
    photo = read_photograph(path)
    assert (
        photo.bits == 16
        and photo.is_grey == (channels < 3)
        and (photo.alpha is not None) == (channels in (2, 4))
    )
    assert write_photograph(path, photo.with_pixels(photo.pixels)) == []
    written = imagecodecs.png_decode(path.read_bytes()) if suffix == "png" else tifffile.imread(path)
    assert written.dtype == np.uint16 and len(np.unique(written)) > 256
    visible = gradient[..., channels - 1] >= 8 * 257 if channels in (2, 4) else np.ones((32, 256), bool)
    np.testing.assert_allclose(
        written.reshape(pixels.shape).astype(int)[visible], pixels[visible], atol=1 if channels < 3 else 0
    )


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "lzw", "predictor": True},
        {"compression": "deflate", "byteorder": ">"},
        {"planarconfig": "separate"},
        {"bigtiff": True, "tile": (16, 16)},
    ],
)
@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_tiff_files_of_all_kinds_are_read(gradient, tmp_path, options, dtype):
    pixels = gradient[..., :3] if dtype == np.uint16 else gradient[..., :3].astype(dtype) / 65535
    planar = options.get("planarconfig") == "separate"
    tifffile.imwrite(
        tmp_path / "a.tif",
        np.ascontiguousarray(np.moveaxis(pixels, -1, 0)) if planar else pixels,
        photometric="rgb",
        **options,
    )
    assert upright_size(tmp_path / "a.tif") == (32, 256)
    read = (read_photograph(tmp_path / "a.tif").pixels.astype(float) + 1) / 2 * 65535
    np.testing.assert_allclose(read, gradient[..., :3], atol=0.02)


@pytest.mark.parametrize("suffix", ["avif", "heic"])
def test_10_bits_are_read_as_16(tmp_path, suffix):
    pixels = np.repeat(np.linspace(0, 1023, 256).round().astype(np.uint16)[None, :, None], 64, 0).repeat(
        3, -1
    )
    path = tmp_path / f"a.{suffix}"
    if suffix == "avif":
        path.write_bytes(imagecodecs.avif_encode(pixels, bitspersample=10, level=100))
    else:
        import pillow_heif

        pillow_heif.from_bytes("RGB;16", (256, 64), (pixels << 6).tobytes()).save(
            path, quality=-1, chroma=444
        )
    photo = read_photograph(path)
    assert photo.bits == 16 and len(np.unique(photo.pixels[..., 1])) > 250
    np.testing.assert_allclose((photo.pixels + 1) / 2 * 1023, pixels, atol=3)


def test_edges_beside_transparency_have_no_fringe(tmp_path):
    """A red disc on what is transparent and black, as files have it, enlarged and laid on white."""
    y, x = np.mgrid[-32:32, -32:32]
    disc = np.zeros((64, 64, 4), np.uint8)
    disc[np.hypot(y, x) < 20] = [255, 0, 0, 255]
    Image.fromarray(disc).save(tmp_path / "a.png")
    photo = bypassed(read_photograph(tmp_path / "a.png"), factor=4)
    assert photo.alpha.min() == 0 and photo.alpha.max() == 1
    write_photograph(tmp_path / "b.png", photo)
    written = np.asarray(Image.open(tmp_path / "b.png")).astype(float)
    alpha = written[..., 3:] / 255
    assert ((alpha > 0.1) & (alpha < 0.9)).any()
    on_white = written[..., :3] * alpha + 255 * (1 - alpha)
    assert on_white[..., 0].min() > 250  # red and white alike have all of it; black would take from it
    write_photograph(tmp_path / "b.jpg", photo)
    assert np.abs(np.asarray(Image.open(tmp_path / "b.jpg")) - on_white).mean() < 3


def test_transparent_pixels_take_the_nearest_colour():
    pixels = np.arange(5 * 7 * 3, dtype=np.float32).reshape(5, 7, 3)
    alpha = np.full((5, 7), 7 / 255, np.float32)
    alpha[0], alpha[2, 1], alpha[2, 5] = 0, 0.5, 1
    filled = fill_transparent(pixels, alpha)
    np.testing.assert_array_equal(filled[:, :3], np.broadcast_to(pixels[2, 1], (5, 3, 3)))
    np.testing.assert_array_equal(filled[:, 4:], np.broadcast_to(pixels[2, 5], (5, 3, 3)))
    assert fill_transparent(pixels, np.zeros_like(alpha)) is pixels  # nothing to take


@pytest.mark.parametrize("suffix", ["png", "webp", "tif", "avif", "heic"])
def test_alpha_is_enlarged_and_kept(smooth, tmp_path, suffix):
    alpha = np.linspace(0, 255, 24 * 40).round().astype(np.uint8).reshape(24, 40)
    Image.fromarray(np.dstack([smooth, alpha])).save(tmp_path / "a.png")
    assert write_photograph(tmp_path / f"b.{suffix}", bypassed(read_photograph(tmp_path / "a.png"))) == []
    read = read_photograph(tmp_path / f"b.{suffix}")
    expected = np.asarray(Image.fromarray(alpha).resize((80, 48), Image.Resampling.BICUBIC))
    np.testing.assert_allclose(read.alpha * 255, expected, atol=6 if suffix in ("avif", "heic") else 1)


def test_a_transparent_colour_of_a_palette_becomes_alpha(tmp_path):
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8).repeat(2, 0))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    for suffix in ("png", "gif"):
        image.save(tmp_path / f"a.{suffix}", transparency=1)
        photo = read_photograph(tmp_path / f"a.{suffix}")
        np.testing.assert_array_equal(photo.alpha, [[1, 0, 1]] * 2)
        np.testing.assert_array_equal(photo.pixels[0, [0, 2]], [[1, -1, -1], [-1, -1, 1]])
        assert (read_image_uint8(tmp_path / f"a.{suffix}")[0, 1] == [0, 255, 0]).all()  # dropped in training


# --------------------------------------------------------------------------------------------------
# What is refused
# --------------------------------------------------------------------------------------------------


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width, height, chunks=(), pixels=b"", bits=8):
    """A PNG file whose header says anything."""
    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    body = b"".join(
        png_chunk(*item) for item in [(b"IHDR", header), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
    )
    return b"\x89PNG\r\n\x1a\n" + body


def animated(file_format, pictures):
    frames = [Image.fromarray(np.full((16, 16, 3), 60 * i, np.uint8)) for i in range(pictures)]
    frames[0].save(file := io.BytesIO(), file_format, save_all=True, append_images=frames[1:], duration=100)
    return file.getvalue()


def encoded(image, file_format, **options):
    image.save(file := io.BytesIO(), file_format, **options)
    return file.getvalue()


def test_animated_pictures_are_counted_and_refused():
    for file_format in ("GIF", "PNG", "WEBP", "AVIF"):
        for read in (upright_size, read_photograph, read_image_uint8):
            with pytest.raises(ValueError) as raised:
                read("a.jpg", animated(file_format, 3))
            assert str(raised.value) == "a.jpg: animated, 3 pictures; only single pictures are read"
        assert read_photograph("a.jpg", animated(file_format, 1)).pixels.shape == (16, 16, 3)
    with pytest.raises(ValueError, match="animated, a sequence"):
        upright_size("a.heic", b"\0\0\0\x18ftypmsf1\0\0\0\0msf1hevc" + bytes(100))


def test_of_several_views_of_one_picture_the_first_is_read():
    picture = read_photograph("a.jpg", animated("MPO", 2))
    assert picture.file_format == "MPO" and (to_uint8(picture.pixels) == 0).all()


def test_tiff_files_of_several_pages_are_refused_but_for_thumbnails(tmp_path):
    path = tmp_path / "a.tif"
    for dtype in (np.uint8, np.uint16):
        tifffile.imwrite(path, np.ones((32, 32, 3), dtype), photometric="rgb")
        tifffile.imwrite(path, np.ones((8, 8, 3), dtype), photometric="rgb", subfiletype=1, append=True)
        assert read_photograph(path).pixels.shape == (32, 32, 3)
        tifffile.imwrite(path, np.ones((8, 8, 3), dtype), photometric="rgb", append=True)
        with pytest.raises(ValueError, match=r"a\.tif: a TIFF file of 2 pages"):
            upright_size(path)
    tifffile.imwrite(path, np.ones((8, 8, 3), np.uint8), photometric="rgb", subfiletype=1)
    with pytest.raises(ValueError, match="camera's raw file"):
        read_photograph(path)
    tifffile.imwrite(path, np.ones((8, 8), np.complex64))
    with pytest.raises(ValueError, match="64 bits and 1 channels, of a kind that is not read"):
        read_photograph(path)


@pytest.mark.parametrize("share", [0.02, 0.2, 0.5, 0.9, 0.99])
def test_truncated_files_are_refused(share):
    image = Image.fromarray(skimage.data.astronaut()[:96, :128])
    files = {
        "JPEG": encoded(image, "JPEG", quality=90),
        "progressive JPEG": encoded(image, "JPEG", quality=90, progressive=True),
        "PNG": encoded(image, "PNG"),
        "PNG of 16 bits": imagecodecs.png_encode(np.asarray(image).astype(np.uint16) * 250),
        "WebP": encoded(image, "WEBP", lossless=True),
        "lossy WebP": encoded(image, "WEBP"),
        "AVIF": encoded(image, "AVIF"),
        "GIF": encoded(image, "GIF"),
        "BMP": encoded(image, "BMP"),
        "TIFF": encoded(image, "TIFF"),
        "LZW": encoded(image, "TIFF", compression="tiff_lzw"),
    }
    write_photograph(file := io.BytesIO(), Photograph(to_float(np.asarray(image)), bits=16), "TIFF")
    files["TIFF of 16 bits"] = file.getvalue()
    write_photograph(file := io.BytesIO(), Photograph(to_float(np.asarray(image))), "HEIF")
    files["HEIC"] = file.getvalue()
    for name, data in files.items():
        for read in (read_photograph, read_image_uint8):
            with pytest.raises(ValueError, match=r"^folder/a\.jpg: (the image is damaged|not an image)"):
                read("folder/a.jpg", data[: int(share * len(data))])
                pytest.fail(name)


def test_a_tiff_file_that_lacks_strips_is_refused_not_black(tmp_path):
    tifffile.imwrite(
        tmp_path / "a.tif", np.full((64, 64, 3), 200, np.uint8), photometric="rgb", rowsperstrip=64
    )
    data = bytearray((tmp_path / "a.tif").read_bytes())
    (start,) = struct.unpack_from("<I", data, 4)
    for at in range(start + 2, start + 2 + 12 * struct.unpack_from("<H", data, start)[0], 12):
        if struct.unpack_from("<H", data, at)[0] == 257:  # ImageLength
            struct.pack_into("<I", data, at + 8, 640)
    with pytest.raises(ValueError, match="lacks a part of its pixels"):
        read_photograph("a.tif", bytes(data))


def test_heic_files_without_their_library_are_refused_in_a_sentence(monkeypatch, smooth):
    write_photograph(file := io.BytesIO(), Photograph(to_float(smooth)), "HEIF")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    for read in (upright_size, read_photograph, read_image_uint8):
        with pytest.raises(
            ValueError, match=r"^a\.heic: HEIC files are read with pillow-heif, which is not installed"
        ):
            read("a.heic", file.getvalue())
    monkeypatch.setattr(photograph, "OUTPUT_FORMATS", {".png": "PNG"})
    with pytest.raises(ValueError, match="HEIC files are written with pillow-heif, which is not installed"):
        check_output("a.heic", (8, 8))


def test_files_that_cannot_be_opened_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "dangling.png").symlink_to("nowhere")
    for name in ("pipe.png", "loop.png", "dangling.png", "x" * 300 + ".png", "a\0.png"):
        for read in (upright_size, read_photograph):
            with pytest.raises(ValueError, match=r"no such file|cannot be read"):
                read(tmp_path / name)


def test_small_files_that_unpack_to_large_ones_are_refused_with_little_memory(tmp_path):
    zeros = zlib.compress(bytes(100_000_000), 1)
    files = {
        "header.png": png_of(30_000, 30_000, pixels=zlib.compress(bytes(1000))),
        "profile.png": png_of(8, 8, [(b"iCCP", b"x\0\0" + zeros)]),
        "text.png": png_of(8, 8, [(b"zTXt", b"x\0\0" + zeros)]),
        "xmp.png": png_of(8, 8, [(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zeros)]),
        "profile16.png": png_of(8, 8, [(b"iCCP", b"x\0\0" + zeros)], bits=16),
        "short16.png": png_of(8, 8, bits=16, pixels=zlib.compress(bytes(10))),
    }
    tifffile.imwrite(tmp_path / "header.tif", np.zeros((8, 8, 3), np.uint16), photometric="rgb")
    data = bytearray((tmp_path / "header.tif").read_bytes())
    (start,) = struct.unpack_from("<I", data, 4)
    for at in range(start + 2, start + 2 + 12 * struct.unpack_from("<H", data, start)[0], 12):
        if struct.unpack_from("<H", data, at)[0] in (256, 257):
            struct.pack_into("<HII", data, at + 2, 4, 1, 60_000)
    files["header.tif"] = bytes(data)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    code = f"""
import resource, sys
from zipir_jax import imageio, photograph, tiff
import imagecodecs
imageio.raise_pixel_limit()
imagecodecs.png_encode
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in {sorted(files)!r}:
    for read in (imageio.upright_size, photograph.read_photograph, imageio.read_image_uint8):
        try:
            read({str(tmp_path)!r} + "/" + name)
        except ValueError as error:
            assert str(error).startswith({str(tmp_path)!r} + "/" + name + ": "), error
        else:
            assert read is imageio.upright_size, name
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100_000  # KiB
    assert done.stderr == ""  # nor does a library print what it thinks of them


@pytest.mark.parametrize("suffix", ["heic", "avif", "gif", "bmp", "tif"])
def test_bytes_that_make_no_sense_are_a_sentence(tmp_path, suffix):
    rng = np.random.default_rng(0)
    photo = Photograph(
        to_float(rng.integers(0, 256, (24, 16, 3), dtype=np.uint8)), exif=exif_data(6), xmp=XMP, bits=16
    )
    file_format = OUTPUT_FORMATS.get(f".{suffix}")
    if file_format is None:
        data = encoded(Image.fromarray(to_uint8(photo.pixels)), suffix.upper())
    else:
        write_photograph(file := io.BytesIO(), photo, file_format)
        data = file.getvalue()
    whole = np.frombuffer(data, np.uint8)
    for _ in range(60):
        changed = whole.copy()
        changed[rng.integers(0, len(whole), rng.integers(1, 6))] = rng.integers(0, 256)
        for read in (upright_size, read_photograph):
            try:
                photo = read("a", changed.tobytes())
            except ValueError as error:
                assert str(error).startswith("a: ")
            else:
                if isinstance(photo, Photograph):
                    photo.with_pixels(photo.pixels)


# --------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------


def test_outputs_that_cannot_be_are_named_before(tmp_path):
    for name, size, reason in [
        ("a.gif", (8, 8), r"must end in one of \.png"),
        ("a", (8, 8), "must end in one of"),
        ("a.webp", (8, 16384), "16384 x 8 pixels, but a side of a WEBP file is at most 16383"),
        ("a.jpg", (65501, 8), "8 x 65501 pixels, but a side of a JPEG file is at most 65500"),
    ]:
        with pytest.raises(ValueError, match=reason) as raised:
            check_output(tmp_path / name, size)
        assert str(raised.value).startswith(f"{tmp_path / name}: ")
        with pytest.raises(ValueError, match=reason):
            write_photograph(tmp_path / "new" / name, Photograph(np.zeros((*size, 3), np.float32)))
    assert os.listdir(tmp_path) == []
    check_output("a.webp", (16383, 16383))
    check_output("a.png", (65501, 8))
    write_photograph(io.BytesIO(), Photograph(np.zeros((65500, 1, 3), np.float32)), "JPEG")


def test_what_is_written_to_a_file_object_is_what_a_file_holds(smooth, tmp_path):
    photo = Photograph(to_float(smooth), exif=exif_data(), xmp=XMP)
    for suffix in SUFFIXES:
        write_photograph(file := io.BytesIO(), photo, OUTPUT_FORMATS[f".{suffix}"])
        write_photograph(tmp_path / f"a.{suffix}", photo)
        assert file.getvalue() == (tmp_path / f"a.{suffix}").read_bytes()


def test_a_photograph_that_cannot_be_written_leaves_the_old_file(smooth, tmp_path):
    write_photograph(tmp_path / "a.tif", Photograph(to_float(smooth)))
    before = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be written to"):
        write_photograph(tmp_path / "file" / "a.tif", Photograph(to_float(smooth)))
    with pytest.raises(TypeError):
        write_photograph(tmp_path / "a.tif", Photograph(to_float(smooth), xmp=7))
    assert (tmp_path / "a.tif").read_bytes() == before and sorted(os.listdir(tmp_path)) == ["a.tif", "file"]
