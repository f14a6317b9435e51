import dataclasses
import errno
import json
import math
import os
import re
import shutil
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import skimage.data
from PIL import Image
from safetensors.numpy import load_file, save_file

from zipir_jax import provenance, sample
from zipir_jax import restorer as restorer_module
from zipir_jax.config import MODELS, SamplingConfig, TargetConfig
from zipir_jax.imageio import read_image, to_float, to_uint8
from zipir_jax.models.dit import DiT
from zipir_jax.models.layers import abstract_params, bind
from zipir_jax.models.lp_vae import encode
from zipir_jax.models.pixel_decoder import PixelDecoder
from zipir_jax.photograph import write_image
from zipir_jax.planner import padded_size
from zipir_jax.restorer import Restorer, check_image, pad_by_reflection, target_pixels, target_size
from zipir_jax.weights import save_weights

pytestmark = pytest.mark.usefixtures("quick_compile")
FAST = SamplingConfig(steps=2)


@pytest.fixture(scope="module")
def restorer(tiny_weights):
    return Restorer.load(tiny_weights)


@pytest.fixture(scope="module")
def photograph():
    """uint8 [24, 30, 3]."""
    return skimage.data.astronaut()[100:124, 200:230]


@pytest.fixture
def photo(photograph, tmp_path):
    """The photograph as a file."""
    write_image(tmp_path / "photo.png", photograph)
    return tmp_path / "photo.png"


@pytest.fixture
def restore(call, tiny_weights):
    """`restore(*arguments)` runs the command line with few steps: (exit status, stdout, last line of stderr)."""

    def restore(*arguments, weights=tiny_weights):
        status, out, err = call(sample.main, "--weights", weights, "--steps", FAST.steps, *arguments)
        return status, out, (err.splitlines() or [""])[-1]

    return restore


def pictures(folder):
    """The names of the results in a folder, each of which has its record."""
    records = {path.name.removesuffix(".json") for path in folder.glob("*.json")} - {"summary"}
    assert not list(folder.glob(".zipir_jax")) and records <= {path.name for path in folder.iterdir()}
    return sorted(records)


# --------------------------------------------------------------------------------------------------
# The command line: what it writes
# --------------------------------------------------------------------------------------------------


def test_file_to_file(photo, photograph, restorer, restore, tmp_path):
    status, out, _ = restore(
        "--input", photo, "--output", tmp_path / "new" / "restored.png", "--scale", "1.5"
    )
    assert status == 0 and out == f"{tmp_path / 'new' / 'restored.png'}\n"
    written = np.asarray(Image.open(tmp_path / "new" / "restored.png"))
    expected = restorer.restore(to_float(photograph), scale=1.5, sampling=FAST)
    assert written.shape == (36, 45, 3) and written.std() > 5
    np.testing.assert_array_equal(written, to_uint8(expected))


@pytest.mark.parametrize(
    ("size", "options", "result"),
    [
        ((33, 51), [], (132, 204)),  # 4x if nothing is said
        ((33, 51), ["--scale", "0.7"], (23, 36)),
        ((24, 30), ["--size", "61x40"], (40, 61)),
        ((1, 1), ["--scale", "4"], (4, 4)),
        ((1, 9), ["--scale", "0.1"], (1, 1)),
    ],
)
def test_size_of_the_result(restore, tmp_path, size, options, result):
    write_image(tmp_path / "a.png", skimage.data.astronaut()[: size[0], : size[1]])
    status, _, err = restore("--input", tmp_path / "a.png", "--output", tmp_path / "b.png", *options)
    assert status == 0, err
    assert Image.open(tmp_path / "b.png").size == (result[1], result[0])


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_output_format_is_that_of_the_suffix(photo, restore, tmp_path, suffix):
    output = tmp_path / f"restored{suffix}"
    assert restore("--input", photo, "--output", output, "--scale", "1")[0] == 0
    assert Image.open(output).format == {".jpg": "JPEG", ".webp": "WEBP"}[suffix]


def test_what_the_result_cannot_keep_is_said(photograph, call, tiny_weights, tmp_path):
    see_through = Image.fromarray(photograph).convert("RGBA")
    see_through.putalpha(100)
    see_through.save(tmp_path / "a.png")
    options = "--input", tmp_path / "a.png", "--output", tmp_path / "b.jpg", "--scale", 1, "--steps", 2
    status, out, err = call(sample.main, *options, "--weights", tiny_weights)
    assert (status, out) == (0, f"{tmp_path / 'b.jpg'}\n")
    assert "\nnot kept of a.png: transparency: JPEG files have none, and the picture is put on white\n" in err


def test_what_goes_into_a_folder_has_the_format_that_is_asked_for(photo, photograph, restore, tmp_path):
    for name in ("a.png", "a.jpg"):
        write_image(tmp_path / "in" / name, photograph)
    arguments = ["--output", tmp_path / "out", "--scale", "1", "--format"]
    assert restore("--input", tmp_path / "in", *arguments, "webp")[0] == 0
    assert restore("--input", photo, *arguments, "jpg")[0] == 0
    formats = {name: Image.open(tmp_path / "out" / name).format for name in pictures(tmp_path / "out")}
    assert formats == {"a.jpg.webp": "WEBP", "a.png.webp": "WEBP", "photo.jpg": "JPEG"}


def test_an_unknown_format_is_refused(photo, restore, tmp_path):
    status, out, err = restore("--input", photo, "--output", tmp_path / "out", "--format", "gif")
    assert status == 2 and out == "" and "gif" in err and "png" in err


def test_a_file_goes_into_a_folder_under_its_name(photo, restore, tmp_path):
    status, out, _ = restore("--input", photo, "--output", tmp_path / "folder", "--scale", "1")
    assert status == 0 and out == f"{tmp_path / 'folder' / 'photo.png'}\n"
    assert (tmp_path / "folder" / "photo.png").is_file()


def test_a_seed_fixes_the_bytes(photo, restore, tmp_path):
    results = []
    for name, seed in [("a", 0), ("b", 0), ("c", 1)]:
        output = tmp_path / f"{name}.png"
        assert restore("--input", photo, "--output", output, "--scale", "1", "--seed", seed)[0] == 0
        results.append(output.read_bytes())
    assert results[0] == results[1] != results[2]


def test_an_upright_result_of_a_turned_photograph(photograph, restore, tmp_path):
    """Orientation 6: the camera lay on its side. The result is upright and does not ask to be turned again."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.ascontiguousarray(np.rot90(photograph, 1))).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(photograph).save(tmp_path / "upright.png")
    for name in ("turned", "upright"):
        output = tmp_path / "out" / f"{name}.png"
        assert restore("--input", tmp_path / f"{name}.png", "--output", output, "--scale", "1")[0] == 0
    turned, upright = (Image.open(tmp_path / "out" / f"{name}.png") for name in ("turned", "upright"))
    assert turned.getexif()[0x0112] == 1
    np.testing.assert_array_equal(np.asarray(turned), np.asarray(upright))


# --------------------------------------------------------------------------------------------------
# Folders
# --------------------------------------------------------------------------------------------------


def test_a_seed_that_is_none_is_one_error_and_not_one_for_each_file(photograph, restore, tmp_path):
    write_image(tmp_path / "in" / "a.png", photograph)
    status, out, err = restore("--input", tmp_path / "in", "--output", tmp_path / "out", "--seed", "-1")
    assert (status, out) == (2, "")
    assert err.strip() == "error: seed -1 does not lie within 0 to 4294967295."


def test_each_file_of_a_folder_is_restored_as_if_alone(photo, photograph, restore, tmp_path):
    write_image(tmp_path / "in" / "before.png", photograph[::-1])
    write_image(tmp_path / "in" / "photo.png", photograph)
    assert restore("--input", tmp_path / "in", "--output", tmp_path / "out", "--scale", "1")[0] == 0
    assert restore("--input", photo, "--output", tmp_path / "alone.png", "--scale", "1")[0] == 0
    assert (tmp_path / "out" / "photo.png").read_bytes() == (tmp_path / "alone.png").read_bytes()


def test_the_bar_moves_when_a_phase_is_done(photograph, restore, tmp_path, monkeypatch):
    seen = []

    class Bar(sample.tqdm):
        def update(self, n):
            super().update(n)
            if not seen or seen[-1] != self.n:
                seen.append(self.n)

        def close(self):
            if not self.disable:
                seen.append(self.total)
            super().close()

    monkeypatch.setattr(sample, "tqdm", Bar)
    for name in ("a.png", "c.png"):
        write_image(tmp_path / "in" / name, photograph)
    (tmp_path / "in" / "b.png").write_text("no picture")
    assert restore("--input", tmp_path / "in", "--output", tmp_path / "out", "--scale", "1")[0] == 1
    assert seen[:4] == [0, 1, 2, 3] and seen == sorted(seen) and seen[-2:] == [9, 9]


def test_an_existing_output_is_kept_unless_told(photo, restore, tmp_path):
    output = tmp_path / "out.png"
    output.write_bytes(b"precious")
    status, _, err = restore("--input", photo, "--output", output, "--scale", "1")
    assert status == 2 and output.read_bytes() == b"precious"
    assert err == f"error: {output}: exists already; use --overwrite to replace it"
    status, _, _ = restore("--input", photo, "--output", output, "--scale", "1", "--overwrite")
    assert status == 0 and Image.open(output).size == (30, 24)

    folder = tmp_path / "in"
    write_image(folder / "out.png", read_image(photo))
    before = output.read_bytes()
    status, out, err = restore("--input", folder, "--output", tmp_path, "--scale", "2")
    assert status == 1 and output.read_bytes() == before
    assert out.startswith(
        "failed: out.png: out.png: exists already; use --overwrite to replace it\nrestored 0, "
    )


def test_a_preset_sets_what_single_options_replace(photo, call, tiny_weights, tmp_path):
    arguments = "--input", photo, "--weights", tiny_weights, "--scale", 1, "--preset", "faithful"
    for name, more, steps in [("a", [], 8), ("b", ["--steps", 2, "--colour-correction", "lab"], 2)]:
        output = tmp_path / f"{name}.png"
        assert call(sample.main, *arguments, "--output", output, *more)[0] == 0
        settings = provenance.read_record(output)["settings"]
        assert (settings["sampling"]["steps"], settings["sampling"]["fidelity"]) == (steps, 1.0)
        assert settings["colour_correction"] == ("lab" if more else "wavelet")
    status, _, err = call(sample.main, *arguments[:-1], "best", "--output", tmp_path / "c.png")
    assert (status, err) == (2, "error: preset 'best' is not one of fast, paper, faithful\n")


def test_samples_and_comparisons_of_one_photograph(photo, restore, tmp_path):
    arguments = "--input", photo, "--scale", "1"
    options = "--seed", 3, "--n-samples", 2, "--compare", "slider"
    status, out, _ = restore(*arguments, "--output", tmp_path / "out" / "a.png", *options)
    assert status == 0 and out.splitlines() == [str(tmp_path / "out" / f"a_{n}.png") for n in (1, 2)]
    assert (tmp_path / "out" / "a_2_compare.html").is_file()
    assert restore(*arguments, "--output", tmp_path / "b.png", "--seed", 4)[0] == 0
    assert (tmp_path / "out" / "a_2.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    # A second run with the same settings has nothing to do, one with others says so.
    status, again, _ = restore(
        *arguments, "--output", tmp_path / "out" / "a.png", *options, "--skip-existing"
    )
    assert (status, again) == (0, out)
    status, _, err = restore(
        *arguments, "--output", tmp_path / "b.png", "--seed", 4, "--eta", 1, "--skip-existing"
    )
    assert status == 2
    assert err == f"error: {photo}: b.png: made with eta 0.0, not 1.0; --overwrite replaces it"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_with_its_summary(photograph, restore, tmp_path, monkeypatch, number):
    for name in ("a.png", "b.png", "c.png"):
        write_image(tmp_path / "in" / name, photograph)
    decode = restorer_module._decode
    decoded = []

    def decode_and_signal(*arguments):
        decoded.append(1)
        if len(decoded) == 2:
            signal.raise_signal(number)
        return decode(*arguments)

    monkeypatch.setattr(restorer_module, "_decode", decode_and_signal)
    status, out, _ = restore("--input", tmp_path / "in", "--output", tmp_path / "out", "--scale", "1")
    assert status == 128 + number and out.startswith("restored 1, kept 0, made by others 0, failed 0; ")
    assert pictures(tmp_path / "out") == ["a.png"]
    assert json.loads((tmp_path / "out" / "summary.json").read_bytes())["folder"]["done"] == 1


def test_a_full_disk_ends_a_run_with_its_counts(photograph, restore, tmp_path, monkeypatch):
    """The summary has no room either; its lines are printed."""
    for name in ("a.png", "b.png", "c.png"):
        write_image(tmp_path / "in" / name, photograph)
    replace, output = os.replace, tmp_path / "out"

    def replace_until_full(source, target):
        if (output / "a.png").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_until_full)
    status, out, err = restore("--input", tmp_path / "in", "--output", output, "--scale", "1")
    assert status == 2 and err.endswith("cannot be written (No space left on device)")
    told = out.splitlines()
    assert told[0] == "failed: b.png: the disk is full"
    assert told[1].startswith("restored 1, kept 0, made by others 0, failed 1; ")
    assert pictures(output) == ["a.png"]


# --------------------------------------------------------------------------------------------------
# The command line: what it refuses, in one line, with status 2
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scale", "0"], "scale 0.0 is not above 0"),
        (["--scale", "-2"], "scale -2.0 is not above 0"),
        (["--scale", "nan"], "scale nan is not above 0"),
        (["--scale", "inf"], "scale inf is not a positive number"),
        (["--scale", "20000"], "must lie within 1 to 16384"),
        (["--scale", "2", "--size", "64x64"], "scale and size both say how large the result is"),
        (["--short-side", "16385"], "16385 x 16385 pixels: a side must lie within 1 to 16384"),
        (["--long-side", "0"], "long_side 0 is not above 0"),
        (["--megapixels", "269"], "a side must lie within 1 to 16384"),
        (["--megapixels", "1", "--long-side", "64"], "long_side and megapixels both say how large"),
        (["--size", "2048"], "size '2048' is not WIDTHxHEIGHT"),
        (["--size", "2048x"], "size '2048x' is not WIDTHxHEIGHT"),
        (["--size", "x64"], "size 'x64' is not WIDTHxHEIGHT"),
        (["--size", "64x64x3"], "size '64x64x3' is not WIDTHxHEIGHT"),
        (["--size=-64x64"], "size '-64x64' is not WIDTHxHEIGHT"),
        (["--size", "6.4x64"], "size '6.4x64' is not WIDTHxHEIGHT"),
        (["--size", "0x64"], "0 x 64 pixels: a side must lie within 1 to 16384"),
        (["--size", "64x99999"], "64 x 99999 pixels: a side must lie within 1 to 16384"),
    ],
)
def test_impossible_sizes(photo, call, tiny_weights, tmp_path, options, message):
    arguments = ["--input", photo, "--output", tmp_path / "out.png", "--weights", tiny_weights, *options]
    status, out, err = call(sample.main, *arguments)
    assert status == 2 and out == "" and not (tmp_path / "out.png").exists()
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
    with pytest.raises(ValueError, match=re.escape(message)):
        call(sample.main, *arguments, "--debug")


def test_impossible_files(photo, call, tmp_path, tiny_weights):
    (tmp_path / "empty").mkdir()
    for source, output, message in [
        (tmp_path / "absent.png", tmp_path / "out.png", "absent.png: no such file or folder"),
        (tmp_path / "empty", tmp_path / "out", "empty holds no images"),
        (photo, tmp_path / "out.gif", "out.gif: the output must end in one of .png, .jpg"),
        (tmp_path, photo, "photo.png is a file, but"),
    ]:
        status, out, err = call(sample.main, "--input", source, "--output", output, "--weights", tiny_weights)
        assert status == 2 and out == ""
        assert err.startswith("error: ") and message in err and err.count("\n") == 1


def test_impossible_outputs_are_found_before_jax_is_imported(photo, call, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zipir_jax.restorer", None)  # importing it fails
    before = photo.read_bytes()
    (tmp_path / "old.png").write_bytes(b"precious")
    (tmp_path / "link.png").hardlink_to(photo)
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.jpg", "a.png", "a.jpg.png"):  # in place, a.jpg would become a.jpg.png
        write_image(folder / name, read_image(photo))
    for source, output, options, message in [
        (photo, tmp_path / "old.png", [], "old.png: exists already; use --overwrite to replace it"),
        (photo, photo, [], "photo.png: the output would replace an input"),
        (photo, photo, ["--overwrite"], "photo.png: the output would replace an input"),
        (photo, tmp_path, ["--overwrite"], "photo.png: the output would replace an input"),
        (photo, tmp_path / "link.png", ["--overwrite"], "link.png: the output would replace an input"),
        (folder, folder, ["--overwrite"], "a.jpg.png: the output would replace an input"),
        (photo, photo / "below" / "out.png", [], f"{photo / 'below'}: cannot be written to"),
        (folder, photo / "below", [], f"{photo / 'below'}: cannot be written to"),
    ]:
        status, out, err = call(sample.main, "--input", source, "--output", output, *options)
        assert status == 2 and out == ""
        assert err.startswith("error: ") and message in err and err.count("\n") == 1, err
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    status, _, err = call(sample.main, "--input", photo, "--output", tmp_path / "new" / "deep" / "out.png")
    assert status == 2 and f"{tmp_path / 'new' / 'deep'}: cannot be written to" in err
    assert not (tmp_path / "new").exists()
    assert photo.read_bytes() == before and (tmp_path / "old.png").read_bytes() == b"precious"


def test_a_folder_may_be_restored_into_itself_where_no_name_collides(photograph, restore, tmp_path):
    write_image(tmp_path / "in" / "a.jpg", photograph)
    assert restore("--input", tmp_path / "in", "--output", tmp_path / "in", "--scale", "1")[0] == 0
    results = ["a.jpg", "a.png", "a.png.json", "summary.json"]
    assert sorted(path.name for path in (tmp_path / "in").iterdir()) == results
    # A result is no photograph to restore again.
    arguments = "--input", tmp_path / "in", "--output", tmp_path / "in", "--scale", "1", "--skip-existing"
    status, out, _ = restore(*arguments)
    assert status == 0 and out.startswith("restored 0, kept 1, made by others 0, failed 0; ")


def test_impossible_pictures(photo, restore, tmp_path):
    """Found when the file is read or written: the last line, below the progress bar."""
    (tmp_path / "text.png").write_text("no picture")
    status, out, err = restore("--input", tmp_path / "text.png", "--output", tmp_path / "out.png")
    assert status == 2 and out == ""
    assert err == f"error: {tmp_path / 'text.png'}: not an image that can be read"
    status, out, err = restore("--input", photo, "--output", tmp_path / "out.png", "--scale", "600")
    assert status == 2 and err == f"error: {photo}: 18000 x 14400 pixels: a side must lie within 1 to 16384"


def test_impossible_weights(photo, restore, tiny_weights, tmp_path):
    def altered(name, change=lambda tensors: tensors, config=None):
        folder = tmp_path / name
        shutil.copytree(tiny_weights, folder)
        save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")
        if config is not None:
            (folder / "config.json").write_text(json.dumps(config))
        return folder

    def without(prefix):
        return lambda tensors: {name: t for name, t in tensors.items() if not name.startswith(prefix)}

    (tmp_path / "empty").mkdir()
    save_weights(tmp_path / "config of another", MODELS["small"], {})
    another = json.loads((tmp_path / "config of another" / "config.json").read_text())
    own = json.loads((tiny_weights / "config.json").read_text())
    broken = altered("broken")
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:1000])
    not_json = altered("not json")
    (not_json / "config.json").write_text("{")
    for folder, message in [
        (tmp_path / "absent", "no weights here (config.json is missing)"),
        (tmp_path / "empty", "no weights here (config.json is missing)"),
        (photo, "no weights here (config.json is missing)"),
        (broken, "the weights cannot be read"),
        (not_json, "the weights cannot be read"),
        (altered("newer", config=own | {"colour": 1}), "colour"),
        (altered("another", config=another), "coarse_decoder.blocks.0.conv1.bias has shape (8,), not (72,)"),
        (altered("no dit", without("dit.")), "the weights have no dit; they hold coarse_decoder"),
        (altered("no head", without("dit.head.bias")), "dit lacks the tensor head.bias"),
        (altered("foreign", lambda t: t | {"dit.x": np.zeros(1)}), "a tensor that its config does not: x"),
    ]:
        status, out, err = restore("--input", photo, "--output", tmp_path / "out.png", weights=folder)
        assert status == 2 and out == ""
        assert err.startswith(f"error: {folder}") and message in err, err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "steps 0 is not at least 1"),
        (["--steps", "1001"], "1001 sampling steps are not between 1 and 1000"),
        (["--spacing", "even"], "spacing 'even' is not one of trailing, linspace, leading"),
        (["--eta", "1.5"], "eta 1.5 is not between 0 and 1"),
        (["--guidance", "5"], "guidance 5 has no effect on weights that were trained without text"),
        (["--stepps", "3"], "Unrecognized options: --stepps"),
        (["--n-samples", "0"], "0 samples of a picture are not at least 1"),
        (["--n-samples", "2", "--seed", "4294967295"], "seed 4294967296 does not lie within 0 to 4294967295"),
        (["--skip-existing", "--overwrite"], "give one of them"),
        (
            ["--colour-correction", "sepia"],
            "colour_correction 'sepia' is not one of none, lab, wavelet, adain",
        ),
        (["--compare", "flicker"], "flicker"),
    ],
)
def test_impossible_sampling(photo, restore, tmp_path, options, message):
    status, out, err = restore("--input", photo, "--output", tmp_path / "out.png", "--scale", "1", *options)
    assert status == 2 and out == ""
    assert err.startswith("error: ") and message in err and "\n" not in err


# --------------------------------------------------------------------------------------------------
# Restorer
# --------------------------------------------------------------------------------------------------


def test_dtype_in_is_dtype_out(restorer, photograph):
    as_bytes = restorer.restore(photograph, scale=1, sampling=FAST)
    as_floats = restorer.restore(to_float(photograph), scale=1, sampling=FAST)
    assert as_bytes.dtype == np.uint8 and as_floats.dtype == np.float32
    assert as_bytes.shape == as_floats.shape == photograph.shape
    assert np.abs(as_floats).max() <= 1
    np.testing.assert_array_equal(as_bytes, to_uint8(as_floats))


def test_a_picture_of_a_batch_is_restored_as_with_any_neighbour(restorer, photograph):
    picture, turned = to_float(photograph), to_float(photograph[::-1])
    batches = [[picture, turned], [picture, -picture], [turned, picture]]
    results = [restorer.restore(np.stack(batch), scale=1, sampling=FAST, seed=5) for batch in batches]
    assert results[0].shape == (2, *photograph.shape)
    np.testing.assert_array_equal(results[0][0], results[1][0])
    assert np.abs(results[0][1] - results[1][1]).max() > 1e-3
    # Another place in the batch, or another batch size, may round otherwise but changes nothing else.
    np.testing.assert_allclose(results[2][::-1], results[0], atol=1e-4)
    alone = restorer.restore(picture, scale=1, sampling=FAST, seed=5)
    np.testing.assert_allclose(results[0][0], alone, atol=1e-4)


def test_the_seed_and_the_diffusion_matter(restorer, photograph):
    picture = to_float(photograph)
    results = [
        restorer.restore(picture, scale=1, sampling=FAST, seed=0),
        restorer.restore(picture, scale=1, sampling=FAST, seed=1),
        restorer.restore(picture, scale=1, denoise=False, seed=0),
    ]
    for i in range(3):
        assert np.abs(results[i] - results[i - 1]).mean() > 0.01
    np.testing.assert_array_equal(results[2], restorer.restore(picture, scale=1, denoise=False, seed=1))


def test_phases_without_diffusion(restorer, photograph):
    told = []
    restorer.restore(photograph, scale=1, denoise=False, progress=lambda *said: told.append(said))
    assert told == [("encode", 0), ("encode", 1), ("decode", 0), ("decode", 1)]


def test_a_seed_that_would_repeat_another_is_refused(restorer, photograph):
    for seed in (-1, 2**32, 2**63):
        with pytest.raises(ValueError, match=f"seed {seed} does not lie within 0 to 4294967295"):
            restorer.restore(photograph, scale=1, seed=seed)


@pytest.mark.parametrize("size", [(24, 30), (32, 64), (33, 65)])
def test_sides_become_multiples_of_the_pixels_of_a_token(tiny_model, size):
    """A DiT whose tokens cover 2 x 2 latent pixels needs multiples of 64."""
    config = dataclasses.replace(tiny_model, dit=dataclasses.replace(tiny_model.dit, patch=2))
    for side, padded in zip(size, padded_size(config, *size), strict=True):
        assert padded % 64 == 0
        assert 64 <= padded - side < 128


def test_the_padding_does_not_reach_the_result(restorer, photograph):
    """24 x 30 pixels get 32 and more on all sides; what is cropped out is what the networks made of them."""
    padded = pad_by_reflection(to_float(photograph)[None], 96, 96)
    assert padded.shape == (1, *padded_size(restorer.config, 24, 30), 3) == (1, 96, 96, 3)
    inner = padded[0, 32:64, 32:64]
    np.testing.assert_array_equal(inner[:24, :30], to_float(photograph))
    np.testing.assert_array_equal(inner[24:], inner[22:14:-1])
    np.testing.assert_array_equal(inner[:, 30:], inner[:, 28:26:-1])
    np.testing.assert_array_equal(padded[0, 31:9:-1, 32:62], padded[0, 33:55, 32:62])
    weights, lp_vae = restorer.weights, restorer.config.lp_vae
    padded = jnp.asarray(padded)
    whole = bind(PixelDecoder, lp_vae, weights["pixel_decoder"])(encode(weights, lp_vae, padded), padded)
    restored = restorer.restore(to_float(photograph), scale=1, denoise=False)
    np.testing.assert_allclose(restored[None], np.clip(whole, -1, 1)[:, 32:56, 32:62], atol=1e-4)


def out_of_memory():
    return jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 68719476736 bytes.")


@pytest.mark.parametrize("step", ["resize", "_encode", "_denoise", "_decode"])
@pytest.mark.parametrize("error", [MemoryError("numpy"), out_of_memory()], ids=["numpy", "jax"])
def test_too_little_memory_is_one_sentence(restorer, photograph, monkeypatch, step, error):
    for name in ("resize", "_encode", "_denoise", "_decode"):
        monkeypatch.setattr(restorer_module, name, lambda *args: np.zeros((24, 30, 3), np.float32))

    def fail(*args):
        raise error

    monkeypatch.setattr(restorer_module, step, fail)
    with pytest.raises(ValueError) as raised:
        restorer.restore(photograph, scale=2, sampling=FAST)
    assert str(raised.value) == (
        "60 x 48 pixels need more memory than there is; choose a smaller scale or size, or give less memory to plan "
        "with, for smaller tiles"
    )
    assert raised.value.__cause__ is error


def test_other_errors_of_jax_are_not_taken_for_memory(restorer, photograph, monkeypatch):
    def fail(*args):
        raise jax.errors.JaxRuntimeError("INTERNAL: a defect")

    monkeypatch.setattr(restorer_module, "_encode", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        restorer.restore(photograph, scale=1, sampling=FAST)


def test_a_dry_run_says_how_and_writes_nothing(photo, restore, tmp_path):
    options = "--input", photo, "--output", tmp_path / "out" / "a.png", "--scale", 20
    status, out, err = restore(*options, "--dry-run")
    assert status == 0, err
    assert f"{photo}:\n672 x 544 pixels with margins, 1 at once" in out
    assert re.findall(r"^  (\w+): \d+\.\d\d GiB, (\w+)", out, re.MULTILINE) == [
        ("encode", "whole"),
        ("denoise", "357"),  # 21 x 17 latent pixels
        ("decode", "whole"),
    ]
    assert "in tiles of" in restore(*options, "--dry-run", "--memory-gib", 0.05)[1]
    assert not (tmp_path / "out").exists()


def test_what_the_memory_does_not_hold_is_refused_before_it_starts(photo, restore, tmp_path):
    output = tmp_path / "a.png"
    for memory, message in (
        (
            0.01,
            r"600 x 480 pixels need \S+ GiB to \w+, beside the weights, and 0\.0[01] GiB are free; the largest .* is",
        ),
        (0, "memory of 0 GiB is not a positive number"),
        ("inf", "memory of inf GiB is not a positive number"),
    ):
        status, _, err = restore("--input", photo, "--output", output, "--scale", 20, "--memory-gib", memory)
        assert status == 2
        assert re.search(message, err), err
    assert not output.exists()


def test_a_folder_goes_on_after_a_picture_too_large_for_the_memory(
    photograph, call, tiny_weights, tmp_path, monkeypatch
):
    decode = restorer_module._decode

    def fail_if_tall(config, tiling, weights, latent, lq):
        if lq.shape[1] > lq.shape[2]:
            raise out_of_memory()
        return decode(config, tiling, weights, latent, lq)

    monkeypatch.setattr(restorer_module, "_decode", fail_if_tall)
    write_image(tmp_path / "in" / "a.png", np.tile(photograph, (2, 1, 1)))
    write_image(tmp_path / "in" / "b.png", photograph)
    status, out, err = call(
        sample.main,
        *("--input", tmp_path / "in", "--output", tmp_path / "out", "--scale", 1),
        *("--weights", tiny_weights, "--steps", 2),
    )
    assert status == 1 and "restored 1, kept 0, made by others 0, failed 1; " in out
    assert f"failed: {tmp_path / 'in' / 'a.png'}: 30 x 48 pixels need more memory than there is" in err
    assert pictures(tmp_path / "out") == ["b.png"]


def test_a_guidance_without_effect_is_refused(restorer, photograph):
    guided = dataclasses.replace(FAST, guidance=5.0)
    with pytest.raises(ValueError, match=r"guidance 5 has no effect on weights .* without text"):
        restorer.restore(photograph, scale=1, sampling=guided)
    restorer.restore(photograph, scale=1, sampling=guided, denoise=False)  # no sampling at all


def test_restorers_do_not_compare_their_arrays(restorer):
    assert restorer == restorer
    assert restorer != dataclasses.replace(restorer)
    assert len({restorer, dataclasses.replace(restorer)}) == 2


def test_the_attention_of_other_hardware_is_refused_and_can_be_replaced(
    photo, restore, tiny_weights, tmp_path
):
    """Weights that were trained on a GPU name its kernel."""
    folder = tmp_path / "weights"
    shutil.copytree(tiny_weights, folder)
    config = json.loads((folder / "config.json").read_text())
    config["dit"] |= {"attention": "cudnn", "compute_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    options = "--input", photo, "--output", tmp_path / "a.png", "--scale", 1
    status, _, err = restore(*options, weights=folder)
    assert (status, err) == (2, "error: cudnn attention runs on gpu, not on cpu; xla runs anywhere")
    assert restore(*options, "--attention", "xla", weights=folder)[0] == 0


def test_weights_without_text_take_no_prompt(restorer, photograph):
    for name in ("text", "negative_text"):
        with pytest.raises(ValueError, match="trained without text"):
            restorer.restore(photograph, scale=1, **{name: np.zeros((3, 8), np.float32)})


def test_weights_with_text_need_it_and_read_it(restorer, photograph):
    config = dataclasses.replace(restorer.config, dit=dataclasses.replace(restorer.config.dit, text_width=8))
    generator = np.random.default_rng(0)
    dit = jax.tree.map(
        lambda leaf: 0.2 * generator.standard_normal(leaf.shape, np.float32), abstract_params(DiT, config.dit)
    )
    restorer = Restorer(config, restorer.weights | {"dit": dit})
    words, others = generator.standard_normal((2, 3, 8), np.float32)
    picture = to_float(photograph)
    with pytest.raises(ValueError, match="give text embeddings"):
        restorer.restore(picture, scale=1)
    with pytest.raises(ValueError, match="give text embeddings"):
        restorer.restore(picture, scale=1, negative_text=words)
    with pytest.raises(ValueError, match=r"text embeddings have shape \(3, 4\), not \[length, 8\]"):
        restorer.restore(picture, scale=1, text=words[:, :4])

    with pytest.raises(ValueError, match="guidance 0 has no effect without a negative text"):
        restorer.restore(picture, scale=1, sampling=dataclasses.replace(FAST, guidance=0.0), text=words)

    first, second = (
        restorer.restore(picture, scale=1, sampling=FAST, text=text[:2]) for text in (words, others)
    )
    assert np.abs(first - second).max() > 5e-3
    # With guidance 0 the negative text alone acts; it is the shorter one, and its padding is not read.
    negative_only = dataclasses.replace(FAST, guidance=0.0)
    guided = restorer.restore(picture, scale=1, sampling=negative_only, text=words, negative_text=others[:2])
    np.testing.assert_allclose(guided, second, atol=1e-4)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((8, 8), np.uint8), r"not \[8, 8\]"),
        (np.zeros((8, 8, 4), np.uint8), r"not \[8, 8, 4\]"),
        (np.zeros((0, 8, 3), np.uint8), r"not \[0, 8, 3\]"),
        (np.zeros((1, 1, 8, 8, 3), np.uint8), r"not \[1, 1, 8, 8, 3\]"),
        (np.zeros((8, 8, 3)), "not float64"),
        (np.full((8, 8, 3), 255, np.float32), "reaches 255"),
        (np.full((8, 8, 3), np.nan, np.float32), "reaches nan"),
    ],
)
def test_unusable_images_are_named(image, message):
    with pytest.raises(ValueError, match=message):
        check_image(image)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ({}, (1600, 2400)),
        ({"scale": 0.5}, (200, 300)),
        ({"size": "7x9"}, (9, 7)),
        ({"short_side": 1000}, (1000, 1500)),
        ({"long_side": 1000}, (667, 1000)),
        ({"megapixels": 0.06}, (200, 300)),
        ({"megapixels": 24.0}, (4000, 6000)),
    ],
)
def test_target_pixels(target, expected):
    target = TargetConfig(**target)
    assert target_pixels(target, (400, 600)) == expected
    if target.size is None:  # a picture that lies on its side gets the same, lying on its side
        assert target_pixels(target, (600, 400)) == expected[::-1]


def test_a_side_is_never_lost():
    assert target_pixels(TargetConfig(long_side=100), (1, 1000)) == (1, 100)
    assert target_pixels(TargetConfig(megapixels=0.0001), (1, 10000)) == (1, 1000)


def test_target_size():
    assert target_size((33, 51), 4, None) == (132, 204)
    assert target_size((33, 51), 1.5, None) == (50, 76)
    assert target_size((1, 9), 0.1, None) == (1, 1)
    assert target_size((33, 51), None, (7, 9)) == (7, 9)
    for scale, size in [(None, None), (2.0, (4, 4))]:
        with pytest.raises(ValueError, match="either a scale or a size"):
            target_size((33, 51), scale, size)
    for scale in (0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="is not a positive number"):
            target_size((33, 51), scale, None)
    with pytest.raises(ValueError, match="inf x inf pixels: a side must lie within 1 to 16384"):
        target_size((33, 51), 1e308, None)
    for size in [(0, 5), (5, 16385)]:
        with pytest.raises(ValueError, match=f"{size[1]} x {size[0]} pixels"):
            target_size((33, 51), None, size)
