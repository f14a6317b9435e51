import os
import stat

import numpy as np
import pytest
from PIL import Image

from zipir_jax import imageio
from zipir_jax.imageio import distinct_names, list_images, read_image, to_float, to_uint8, write_image

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
        with pytest.raises(ValueError, match=reason) as raised:
            read_image(tmp_path / name)
        assert str(raised.value).startswith(f"{tmp_path / name}: ")


def test_a_picture_beyond_pillows_limit_is_refused(smooth, tmp_path, monkeypatch):
    write_image(tmp_path / "a.png", smooth)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"a\.png: .*960 pixels"):
        read_image(tmp_path / "a.png")


# --------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError("disk full"), RuntimeError("encoder"), KeyboardInterrupt()])
def test_a_failed_write_leaves_what_was_there(smooth, tmp_path, monkeypatch, error):
    write_image(tmp_path / "old.png", smooth)
    before = (tmp_path / "old.png").read_bytes()

    def fail(self, file, *args, **kwargs):
        file.write(b"half a picture")
        raise error

    monkeypatch.setattr(Image.Image, "save", fail)
    expected = ValueError if isinstance(error, OSError) else type(error)
    for name in ("old.png", "new.png"):
        with pytest.raises(expected) as raised:
            write_image(tmp_path / name, smooth)
        if expected is ValueError:
            assert str(raised.value) == f"{tmp_path / name}: cannot be written (disk full)"
    assert os.listdir(tmp_path) == ["old.png"]
    assert (tmp_path / "old.png").read_bytes() == before


def test_unwritable_folder_is_named(smooth, tmp_path):
    (tmp_path / "file").touch()  # root may write anywhere but below a file
    for folder in ("file", "file/below"):
        with pytest.raises(ValueError, match="cannot be written to") as raised:
            write_image(tmp_path / folder / "a.png", smooth)
        assert str(tmp_path / folder) in str(raised.value)


@pytest.mark.parametrize("name", ["a.gif", "a", "a.png.txt"])
def test_unknown_format_is_named(smooth, tmp_path, name):
    with pytest.raises(ValueError, match=r"must end in one of \.png") as raised:
        write_image(tmp_path / name, smooth)
    assert str(tmp_path / name) in str(raised.value)
    assert os.listdir(tmp_path) == []


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
    for name in ("b.PNG", "a.jpg", "notes.txt", "below/c.webp", "folder.png/d.png"):
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
