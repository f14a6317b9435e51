import contextlib
import errno
import io
import os
import stat
import struct
import subprocess
import sys
import zlib

import imagecodecs
import jax
import numpy as np
import pytest
import skimage.data
from PIL import Image, ImageOps, PngImagePlugin

from zipir_jax import imageio
from zipir_jax.imageio import (
    check_dtype_and_shape,
    decode,
    distinct_names,
    list_images,
    opened,
    read_image,
    read_image_uint8,
    resize,
    resize_unclipped,
    to_float,
    to_uint8,
    upright_size,
)
from zipir_jax.photograph import write_image

ORIENTATION = 0x0112  # EXIF tag
# How a camera stores an upright picture [h, w, 3] under each EXIF orientation.
STORED = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: upright[::-1, ::-1].swapaxes(0, 1),
    8: lambda upright: np.rot90(upright, -1),
}


@pytest.fixture(scope="module")
def smooth():
    """uint8 [24, 40, 3] without edges: JPEG keeps it, and no symmetry hides a flip."""
    y, x = np.mgrid[0:24, 0:40]
    channels = [40 + 5 * x, 220 - 7 * y, 90 + 2 * x + 3 * y]
    return np.stack(channels, -1).astype(np.uint8)


def levels(path):
    """What `read_image` makes of a file, on the scale 0..255."""
    return (read_image(path).astype(np.float64) + 1) * 127.5


# --------------------------------------------------------------------------------------------------
# Pixels
# --------------------------------------------------------------------------------------------------


def test_every_8_bit_level_survives():
    ramp = np.arange(256, dtype=np.uint8).reshape(1, 256, 1)
    assert to_float(ramp).min() == -1 and to_float(ramp).max() == 1
    np.testing.assert_array_equal(to_uint8(to_float(ramp)), ramp)


def test_to_uint8_rounds_and_clips():
    values = np.array([-9, -1, 0.4 / 127.5 - 1, 0.6 / 127.5 - 1, 1, 9], np.float32).reshape(1, 6, 1)
    assert to_uint8(values).ravel().tolist() == [0, 0, 0, 1, 255, 255]


@pytest.mark.parametrize("name", ["a.png", "a.PNG", "a.webp", "new/folders/a.png"])
def test_lossless_round_trip(smooth, tmp_path, name):
    write_image(tmp_path / name, to_float(smooth))
    np.testing.assert_allclose(read_image(tmp_path / name), to_float(smooth), atol=1e-6)


@pytest.mark.parametrize("name", ["a.jpg", "a.jpeg"])
def test_jpeg_round_trip(smooth, tmp_path, name):
    write_image(tmp_path / name, to_float(smooth))
    assert Image.open(tmp_path / name).format == "JPEG"
    np.testing.assert_allclose(levels(tmp_path / name), smooth, atol=4)


def test_bytes_and_floats_give_the_same_file(smooth, tmp_path):
    write_image(tmp_path / "bytes.png", smooth)
    write_image(tmp_path / "floats.png", to_float(smooth))
    assert (tmp_path / "bytes.png").read_bytes() == (tmp_path / "floats.png").read_bytes()


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK", "I;16"])
def test_both_readers_read_the_same(smooth, tmp_path, mode):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    image = (
        Image.fromarray(smooth).convert(mode)
        if mode != "I;16"
        else Image.fromarray(257 * smooth[..., 0].astype(np.uint16))
    )
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    image.save(path, exif=exif)
    assert upright_size(path) == (40, 24)
    read = read_image_uint8(path)
    assert read.shape == (40, 24, 3)  # turned upright
    np.testing.assert_array_equal(read, to_uint8(read_image(path)))
    data = path.read_bytes()
    path.unlink()
    assert upright_size(path, data) == (40, 24)
    np.testing.assert_array_equal(read_image_uint8(path, data), read)


def moved_behind_the_pixels(png, kind):
    """The bytes of a PNG file with its chunks of this kind just before the last one, IEND."""
    at, kept, moved = 8, png[:8], b""
    while at < len(png):
        length = struct.unpack(">I", png[at : at + 4])[0] + 12
        chunk = png[at : at + length]
        if chunk[4:8] == kind:
            moved += chunk
        else:
            kept += moved + chunk if chunk[4:8] == b"IEND" else chunk
        at += length
    assert moved
    return kept


def test_the_size_of_a_png_file_is_known_without_its_pixels(smooth, tmp_path, monkeypatch):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    note = PngImagePlugin.PngInfo()
    note.add_text("date:create", "2026-01-01")  # as ImageMagick writes it, behind the pixels
    xmp = PngImagePlugin.PngInfo()
    xmp.add_itxt("XML:com.adobe.xmp", '<rdf:Description tiff:Orientation="6"/>')
    image = Image.fromarray(smooth)
    for name, options, kind in [
        ("plain", {}, b"tEXt"),
        ("first", {"exif": exif}, b"tEXt"),
        ("late", {"exif": exif}, b"eXIf"),
        ("xmp", {"pnginfo": xmp}, b"iTXt"),
    ]:
        image.save(tmp_path / f"{name}.png", **{"pnginfo": note} | options)
        data = moved_behind_the_pixels((tmp_path / f"{name}.png").read_bytes(), kind)
        (tmp_path / f"{name}.png").write_bytes(data)
        assert upright_size(tmp_path / f"{name}.png") == read_image(tmp_path / f"{name}.png").shape[:2]

    def fail(*arguments):
        raise AssertionError("the pixels are decoded")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", fail)
    monkeypatch.setattr(imagecodecs, "png_decode", fail)
    assert upright_size(tmp_path / "plain.png") == (24, 40)
    for name in ("first", "late", "xmp"):
        assert upright_size(tmp_path / f"{name}.png") == (40, 24)


@pytest.mark.parametrize("suffix", ["png", "webp", "jpg"])
def test_a_photograph_whose_exif_data_are_garbage_counts_as_upright(smooth, tmp_path, suffix):
    options = {"quality": 95, "subsampling": 0} if suffix == "jpg" else {"lossless": True}
    for name, header in (("broken", b"II*\0garbage"), ("none", None)):
        exif = {} if header is None else {"exif": b"Exif\0\0" + header}
        Image.fromarray(smooth).save(tmp_path / f"{name}.{suffix}", **options, **exif)
    np.testing.assert_array_equal(
        read_image_uint8(tmp_path / f"broken.{suffix}"), read_image_uint8(tmp_path / f"none.{suffix}")
    )


def test_damage_elsewhere_in_the_exif_data_does_not_hide_the_orientation(smooth, tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    exif[0x010F] = "maker"
    data = bytearray(exif.tobytes())
    data[17] = 0  # an ASCII field becomes one that cannot be written again
    stored = Image.fromarray(np.ascontiguousarray(STORED[6](smooth)))
    stored.save(tmp_path / "a.png", exif=bytes(data))
    with pytest.raises(struct.error):
        ImageOps.exif_transpose(Image.open(tmp_path / "a.png"))
    np.testing.assert_array_equal(read_image_uint8(tmp_path / "a.png"), smooth)


@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation_is_undone(smooth, tmp_path, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](smooth)))
    stored.save(tmp_path / "a.png", exif=exif)
    np.testing.assert_allclose(levels(tmp_path / "a.png"), smooth, atol=1e-4)
    stored.save(tmp_path / "a.jpg", exif=exif, quality=95, subsampling=0)
    np.testing.assert_allclose(levels(tmp_path / "a.jpg"), smooth, atol=4)


def test_grey_becomes_three_equal_channels(smooth, tmp_path):
    Image.fromarray(smooth[..., 0]).save(tmp_path / "a.png")
    np.testing.assert_allclose(levels(tmp_path / "a.png"), smooth[..., :1].repeat(3, -1), atol=1e-4)


@pytest.mark.parametrize(
    ("suffix", "mode", "options"),
    [
        ("gif", "P", {}),
        ("png", "P", {}),
        ("png", "RGBA", {}),
        ("webp", "RGB", {"lossless": True}),
        ("webp", "RGB", {"quality": 80}),  # whose channels differ by a level
        ("avif", "RGB", {}),
        ("jpg", "RGB", {}),
        ("tif", "RGB", {}),
        ("jpg", "CMYK", {}),
    ],
)
@pytest.mark.parametrize("profile", [None, "adobergb"])
def test_colours_that_are_all_grey_are_one_channel(suffix, mode, options, profile):
    grey = np.add.outer(np.arange(96), np.arange(128)).astype(np.uint8)
    image = Image.fromarray(grey).convert("RGB")
    image = image.quantize(256) if mode == "P" else image.convert(mode)
    if profile is not None:
        options = options | {"icc_profile": imagecodecs.cms_profile(profile)}
    image.save(file := io.BytesIO(), Image.registered_extensions()[f".{suffix}"], **options)
    with opened("a", file.getvalue()) as opened_file:
        picture = decode(opened_file)
    assert picture.pixels.shape == (96, 128, 1) and picture.icc is None
    in_profile = profile is not None and suffix != "gif" and mode != "CMYK"
    curve = ((grey / 255) ** 2.2 * 1.055**2.4) ** (1 / 2.4) - 0.055  # of Adobe RGB's, that of sRGB
    expected = 255 * curve if in_profile else grey
    assert np.abs(picture.pixels[..., 0].astype(float) - expected)[grey > 30].max() <= 8


def test_a_trace_of_colour_is_not_grey():
    pixels = skimage.data.camera()[100:196, 100:228, None].repeat(3, -1)
    pixels[90, 100, 2] ^= 1  # a pixel that no look at every 16th finds
    for samples in (pixels, pixels.astype(np.uint16) << 4):
        with opened("a.png", imagecodecs.png_encode(samples)) as file:
            assert decode(file).pixels.shape == (96, 128, 3)


def test_palette_becomes_its_colours(smooth, tmp_path):
    palette = Image.fromarray(smooth).quantize(16)
    palette.save(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").mode == "P"
    np.testing.assert_allclose(levels(tmp_path / "a.png"), np.asarray(palette.convert("RGB")), atol=1e-4)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_dropped(smooth, tmp_path, mode):
    image = Image.fromarray(smooth).convert(mode)
    image.putalpha(Image.fromarray(smooth[..., 1]))
    image.save(tmp_path / "a.png")
    colours = np.asarray(Image.fromarray(smooth).convert(mode[:-1]).convert("RGB"))
    np.testing.assert_allclose(levels(tmp_path / "a.png"), colours, atol=1e-4)


@pytest.mark.parametrize("brightest", [65535, 300, 255, 17])
def test_16_bit_grey_keeps_its_precision(tmp_path, brightest):
    grey = np.linspace(0, brightest, 12).round().astype(np.uint16).reshape(3, 4)
    Image.fromarray(grey).save(tmp_path / "a.png")
    read = (read_image(tmp_path / "a.png").astype(np.float64) + 1) / 2 * 65535
    np.testing.assert_allclose(read, grey[..., None].repeat(3, -1), atol=0.01)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_transparent_colour_of_16_bits_becomes_alpha(channels):
    pixels = np.arange(12 * channels, dtype=np.uint16).reshape(3, 4, channels) * 1000
    png = imagecodecs.png_encode(pixels.squeeze())
    PngImagePlugin.putchunk(chunk := io.BytesIO(), b"tRNS", pixels[1, 2].astype(">u2").tobytes())
    with opened("a.png", png[:33] + chunk.getvalue() + png[33:]) as file:  # behind the header
        picture = decode(file)
    np.testing.assert_array_equal(np.argwhere(picture.alpha == 0), [[1, 2]])
    assert set(np.unique(picture.alpha)) == {0, 1}
    np.testing.assert_allclose(picture.pixels * 65535, pixels, atol=0.01)


def test_cmyk_jpeg_becomes_rgb(smooth, tmp_path):
    Image.fromarray(smooth).convert("CMYK").save(tmp_path / "a.jpg", quality=100)
    assert Image.open(tmp_path / "a.jpg").mode == "CMYK"
    np.testing.assert_allclose(levels(tmp_path / "a.jpg"), smooth, atol=8)


# --------------------------------------------------------------------------------------------------
# Bad files
# --------------------------------------------------------------------------------------------------


def test_bad_inputs_are_named(smooth, tmp_path):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not a picture")
    write_image(tmp_path / "whole.jpg", smooth)
    write_image(tmp_path / "whole.png", smooth)
    for suffix in ("jpg", "png"):
        whole = (tmp_path / f"whole.{suffix}").read_bytes()
        (tmp_path / f"truncated.{suffix}").write_bytes(whole[: len(whole) * 2 // 3])
    for name, reason in {
        "absent.png": "no such file",
        "folder.png": "no such file",
        "empty.png": "the file is empty",
        "text.png": "not an image",
        "truncated.jpg": "damaged",
        "truncated.png": "damaged",
    }.items():
        readers = [read_image, read_image_uint8]
        if reason != "damaged":
            readers.append(upright_size)
        for read in readers:
            with pytest.raises(ValueError, match=reason) as raised:
                read(tmp_path / name)
            assert str(raised.value).startswith(f"{tmp_path / name}: ")


def test_a_png_file_without_pixels_is_refused(smooth, tmp_path):
    write_image(tmp_path / "a.png", smooth)
    data = (tmp_path / "a.png").read_bytes()
    for read in (upright_size, read_image_uint8):
        with pytest.raises(ValueError) as raised:
            read("a.png", data[:33] + data[-12:])  # its header and its end
        assert str(raised.value) == "a.png: the image is damaged (a PNG file without pixels)"


JPEG = [
    {},
    {"subsampling": 0},
    {"restart_marker_blocks": 5},
    {"restart_marker_rows": 1},
    {"progressive": True},
    {"progressive": True, "restart_marker_rows": 1},
]


@pytest.mark.parametrize("options", JPEG, ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_files_that_were_cut_and_then_ended_are_refused(mode, options):
    file = io.BytesIO()
    Image.fromarray(skimage.data.astronaut()[:96, :128]).convert(mode).save(file, "JPEG", **options)
    data = file.getvalue()
    start = data.index(b"\xff\xda") + 20
    cuts = [start + (len(data) - start) * share // 100 for share in (0, 1, 20, 50)]
    cuts.append(data.rfind(b"\xff\xda"))  # the last scan
    if b"\xff\xd3" in data[start:]:
        cuts.append(data.find(b"\xff\xd3", start))  # a restart
    for cut in cuts:
        with pytest.raises(ValueError, match=r"^a\.jpg: the image is damaged"):
            read_image_uint8("a.jpg", data[:cut].removesuffix(b"\xff") + b"\xff\xd9")
            pytest.fail(f"cut at byte {cut} of {len(data)}")
    assert read_image_uint8("a.jpg", data + b"behind its end").shape == (96, 128, 3)


@pytest.mark.parametrize("options", JPEG, ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_files_that_end_in_grey_are_read(mode, options):
    for corner in (127, 128):
        pixels = skimage.data.astronaut()[:96, :128].copy()
        pixels[48:, 64:] = corner
        image = Image.fromarray(pixels).convert(mode)
        image.paste(corner if mode == "L" else (corner,) * len(mode), (64, 48, 128, 96))
        image.save(file := io.BytesIO(), "JPEG", quality=95, **options)
        assert read_image_uint8("a.jpg", file.getvalue()).shape == (96, 128, 3)
        for frames in ([image], [image, image]):
            frames[0].save(file := io.BytesIO(), "MPO", save_all=True, append_images=frames[1:], **options)
            assert read_image_uint8("a.jpg", file.getvalue()).shape == (96, 128, 3)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
def test_a_picture_of_too_many_pixels_is_refused(smooth, tmp_path, monkeypatch, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(smooth).save(path)
    monkeypatch.setattr(imageio, "LARGEST_PIXELS", 960)
    assert read_image(path).shape == (24, 40, 3)
    monkeypatch.setattr(imageio, "LARGEST_PIXELS", 959)
    for read in (read_image, upright_size):
        with pytest.raises(ValueError) as raised:
            read(path)
        assert str(raised.value) == f"{path}: more than 959 pixels, the most that is read (40 x 24 pixels)"
    monkeypatch.setattr(imageio, "LARGEST_PIXELS", 400)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)  # less than half: Pillow itself refuses
    for read in (read_image, upright_size):
        with pytest.raises(
            ValueError, match=r"a\.\w+: more than 400 pixels, the most that is read \(.*(960|40 x 24) pixels"
        ):
            read(path)


def test_the_largest_picture_that_can_be_read_is_as_large_as_a_result():
    assert imageio.LARGEST_PIXELS == 16384**2
    code = """
from PIL import Image
from zipir_jax import command_line
before = Image.MAX_IMAGE_PIXELS
command_line.run(lambda arguments: print(before, Image.MAX_IMAGE_PIXELS))
"""  # in a process of its own: here others may have called it
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    # A library leaves Pillow's limit alone, a program raises it.
    assert list(map(int, printed)) == [89478485, imageio.LARGEST_PIXELS]


def test_a_refused_picture_is_not_warned_of_as_well(smooth, tmp_path):
    write_image(tmp_path / "a.png", smooth)
    data = bytearray((tmp_path / "a.png").read_bytes())
    data[16:24] = struct.pack(">II", 20000, 20000)  # width and height in the header, and its checksum
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    (tmp_path / "a.png").write_bytes(data)
    # In a process of its own: pytest has other filters of warnings.
    code = "import sys; from zipir_jax.imageio import *; raise_pixel_limit(); upright_size(sys.argv[1])"
    command = [sys.executable, "-c", code, str(tmp_path / "a.png")]
    printed = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    assert "a.png: more than 268435456 pixels, the most that is read (20000 x 20000 pixels)" in printed
    assert "Warning" not in printed


def test_a_file_that_may_not_be_read_is_not_called_damaged(smooth, tmp_path, monkeypatch):
    def refuse(*args, **options):  # root may read anything
        raise PermissionError(errno.EACCES, "Permission denied")

    write_image(tmp_path / "a.png", smooth)
    monkeypatch.setattr(Image, "open", refuse)
    for read in (read_image, read_image_uint8, upright_size):
        with pytest.raises(ValueError) as raised:
            read(tmp_path / "a.png")
        assert str(raised.value) == f"{tmp_path / 'a.png'}: cannot be read (no permission)"


def test_a_picture_that_does_not_fit_into_memory_is_named(smooth, tmp_path, monkeypatch):
    def full(*args):
        raise MemoryError

    write_image(tmp_path / "a.png", smooth)
    monkeypatch.setattr(imagecodecs, "png_decode", full)
    with pytest.raises(ValueError, match=r"a\.png: the image does not fit into memory"):
        read_image(tmp_path / "a.png")


def test_an_error_of_ours_is_not_called_damage(smooth, tmp_path, monkeypatch):
    write_image(tmp_path / "a.png", smooth)
    monkeypatch.setattr(imageio, "upright", None)
    monkeypatch.setattr(imageio, "orientation_of", lambda *metadata: 6)
    with pytest.raises(ValueError, match=r"a\.png: cannot be read \(TypeError: .* not callable\)"):
        read_image(tmp_path / "a.png")


# --------------------------------------------------------------------------------------------------
# Resize
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (37, 91), (300, 200), (1000, 700)])
def test_resize_equals_jax_cubic(size):
    image = to_float(skimage.data.astronaut()[:256, :230])
    expected = jax.image.resize(image, (*size, 3), "cubic", antialias=True)
    np.testing.assert_allclose(resize_unclipped(image, *size), expected, atol=1e-4)
    np.testing.assert_allclose(resize(image, *size), np.clip(expected, -1, 1), atol=1e-4)


def test_resize_clips_the_overshoot_at_an_edge():
    edge = np.where(np.arange(16)[None, :, None] < 8, -1, 1) * np.ones((4, 1, 3))
    edge = edge.astype(np.float32)
    assert np.abs(resize_unclipped(edge, 4, 64)).max() > 1.05
    assert np.abs(resize(edge, 4, 64)).max() == 1


def test_resize_does_not_alias():
    """Stripes of one pixel vanish into their mean when the image is halved three times."""
    stripes = np.where(np.arange(256)[None, :, None] % 2 == 0, 1, -1) * np.ones((256, 1, 3))
    small = resize(stripes.astype(np.float32), 32, 32)
    assert np.abs(small).max() < 0.05


def test_resize_names_a_wrong_argument():
    with pytest.raises(ValueError, match="0 x 64"):
        resize(np.zeros((64, 64, 3), np.float32), 0, 64)
    for image, message in [
        (np.zeros((64, 64, 3), np.uint8), "not uint8"),
        ([0.0], "not list"),
        (np.zeros((64, 64), np.float32), r"\(64, 64\) instead of \(height, width, 3\)"),
        (np.zeros((64, 64, 4), np.float32), r"\(64, 64, 4\) instead"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_dtype_and_shape(image)


# --------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "disk full"),
        OSError("disk full"),
        ValueError("disk full"),
        RuntimeError("encoder"),
        KeyboardInterrupt(),
    ],
    ids=repr,
)
def test_a_failed_write_leaves_what_was_there(smooth, tmp_path, monkeypatch, error):
    write_image(tmp_path / "old.jpg", smooth)
    before = (tmp_path / "old.jpg").read_bytes()

    def fail(self, file, *args, **kwargs):
        file.write(b"half a picture")
        raise error

    monkeypatch.setattr(Image.Image, "save", fail)
    expected = ValueError if isinstance(error, OSError | ValueError) else type(error)
    for name in ("old.jpg", "new.jpg"):
        with pytest.raises(expected) as raised:
            write_image(tmp_path / name, smooth)
        if expected is ValueError:
            assert str(raised.value) == f"{tmp_path / name}: cannot be written (disk full)"
    assert os.listdir(tmp_path) == ["old.jpg"]
    assert (tmp_path / "old.jpg").read_bytes() == before


def test_a_written_file_has_ordinary_permissions(smooth, tmp_path):
    previous = os.umask(0o027)
    try:
        write_image(tmp_path / "a.png", smooth)
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "a.png").stat().st_mode) == 0o640


# --------------------------------------------------------------------------------------------------
# Folders
# --------------------------------------------------------------------------------------------------


def test_list_images(tmp_path):
    for name in (
        "b.PNG",
        "a.jpg",
        "notes.txt",
        "below/c.webp",
        "folder.png/d.png",
        "._a.jpg",
        ".cache/e.png",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [path.name for path in list_images(tmp_path)] == ["a.jpg", "b.PNG"]
    assert [path.name for path in list_images(tmp_path, recursive=True)] == [
        "a.jpg",
        "b.PNG",
        "c.webp",
        "d.png",
    ]
    for wrong in (tmp_path / "absent", tmp_path / "a.jpg"):
        with pytest.raises(ValueError, match="no such folder") as raised:
            list_images(wrong)
        assert str(wrong) in str(raised.value)


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (["a.jpg", "b.png"], ["a", "b"]),
        (["a.jpg", "a.png", "b.png"], ["a.jpg", "a.png", "b"]),
        (["a.jpg", "a.jpg.png", "a.png"], ["a.jpg", "a.jpg.png", "a.png"]),
    ],
)
def test_no_two_files_share_a_name(files, names):
    assert distinct_names([imageio.Path("folder") / file for file in files]) == names


@pytest.mark.parametrize("kind", [2, 3, 7])  # ASCII, a number, UNDEFINED
def test_an_orientation_of_the_wrong_type_is_none(tmp_path, kind):
    """EXIF data by hand: one tag, the orientation, of a type that may hold no number."""
    value = {2: b"6\0\0\0", 3: b"\6\0\0\0", 7: b"\6\0\0\0"}[kind]
    entry = struct.pack("<HHI", 0x0112, kind, 1 if kind == 3 else 4) + value
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + entry + struct.pack("<I", 0)
    path = tmp_path / "odd.jpg"
    Image.fromarray(np.zeros((8, 16, 3), np.uint8)).save(path, exif=exif)
    expected = (16, 8) if kind == 3 else (8, 16)
    assert upright_size(path) == read_image_uint8(path).shape[:2] == expected


def test_bytes_that_make_no_sense_are_a_sentence(tmp_path):
    """A few hundred files of each kind with bytes changed at random: they are read, or refused with their path."""
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (24, 16, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    for suffix in ("jpg", "png", "tif", "webp"):
        path = tmp_path / f"picture.{suffix}"
        picture.save(path, exif=exif)
        whole = np.frombuffer(path.read_bytes(), np.uint8)
        for _ in range(300):
            changed = whole.copy()
            changed[rng.integers(0, len(whole), rng.integers(1, 6))] = rng.integers(0, 256)
            path.write_bytes(changed.tobytes())
            for read in (upright_size, read_image_uint8):
                with contextlib.suppress(ValueError):
                    read(path)


def test_links_to_folders_are_followed_once(tmp_path):
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "folder"
    elsewhere.mkdir()
    folder.mkdir()
    for path in (elsewhere / "a.png", folder / "b.png"):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path)
    (folder / "link").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(folder)
    assert list_images(folder, recursive=True) == [folder / "b.png", folder / "link" / "a.png"]
