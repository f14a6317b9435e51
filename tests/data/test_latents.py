"""Cached latents: what the encoder gave comes back, to the precision of float16."""

import json
import pickle

import numpy as np
import pytest

from zipir_jax.data.latents import CachedLatents, write_latents

SHAPES = [(2, 4, 7), (4, 2, 7), (2, 4, 7), (6, 6, 7)]


def item(number):
    generator = np.random.default_rng(number)
    latent, lq_latent = generator.normal(0, 30, (2, *SHAPES[number])).astype(np.float32)
    return latent, lq_latent, f"caption {number}" if number else ""


@pytest.fixture(name="folder")
def make_folder(tmp_path):
    write_latents(tmp_path / "out", map(item, range(len(SHAPES))), "four crops", "0123")
    return tmp_path / "out"


def test_latents_come_back_to_the_precision_of_float16(folder):
    cached = CachedLatents(folder)
    assert len(cached) == len(SHAPES)
    for number in range(len(SHAPES)):
        latent, lq_latent, caption = item(number)
        found = cached[number]
        assert found.keys() == {"latent", "lq_latent", "caption"} and found["caption"] == caption
        for name, expected in (("latent", latent), ("lq_latent", lq_latent)):
            assert found[name].dtype == np.float32 and found[name].shape == SHAPES[number]
            np.testing.assert_allclose(found[name], expected, rtol=2**-11, atol=2**-24)
            np.testing.assert_array_equal(found[name], expected.astype(np.float16))


def test_sizes_are_those_of_the_crops_in_pixels(folder):
    cached = CachedLatents(folder)
    assert cached.sizes.dtype == np.int32
    assert cached.sizes.tolist() == [[32 * height, 32 * width] for height, width, _ in SHAPES]


def test_the_representation_names_crops_and_encoder_and_not_the_place(folder, tmp_path):
    assert repr(CachedLatents(folder)) == "CachedLatents(4 of four crops, encoder 0123)"
    folder.rename(tmp_path / "moved")
    assert CachedLatents(tmp_path / "moved").encoder == "0123"
    assert repr(CachedLatents(tmp_path / "moved")) == "CachedLatents(4 of four crops, encoder 0123)"


def test_it_has_what_the_training_loop_asks_of_a_source(folder):
    cached = CachedLatents(folder)
    assert cached.damaged == [] and cached.name == str(folder)


def test_it_tells_the_share_of_low_quality_images(folder, tmp_path):
    assert CachedLatents(folder).low_quality_probability == 0
    write_latents(tmp_path / "some", map(item, range(2)), "two crops", "0123", 0.05)
    assert CachedLatents(tmp_path / "some").low_quality_probability == 0.05
    index = json.loads((tmp_path / "some" / "latents.json").read_text())
    del index["low_quality_probability"]  # as in folders of before
    (tmp_path / "some" / "latents.json").write_text(json.dumps(index))
    assert CachedLatents(tmp_path / "some").low_quality_probability == 0


def test_a_pickled_one_opens_its_files_anew(folder):
    cached = CachedLatents(folder)
    assert isinstance(cached.sizes, np.memmap)
    again = pickle.loads(pickle.dumps(cached))
    assert len(pickle.dumps(cached)) < 500 and repr(again) == repr(cached)
    np.testing.assert_array_equal(again[3]["latent"], cached[3]["latent"])
    np.testing.assert_array_equal(again.sizes, cached.sizes)


@pytest.mark.parametrize("wrong", [7e4, np.nan, np.inf])
def test_a_value_that_float16_has_not_is_refused(tmp_path, wrong):
    broken = item(1)
    broken[1][1, 0, 3] = wrong
    with pytest.raises(ValueError, match=r"latent 1: its values run from .* to .*; float16 ends at 65504"):
        write_latents(tmp_path / "out", iter([item(0), broken]), "crops", "0123")
    assert not (tmp_path / "out" / "latents.json").exists()


def test_two_latents_of_different_shapes_are_refused(tmp_path):
    items = iter([item(0), (item(0)[0], item(1)[1], "")])
    message = r"latent 1 has the shape \(2, 4, 7\), that of its degraded image \(4, 2, 7\)"
    with pytest.raises(ValueError, match=message):
        write_latents(tmp_path / "out", items, "crops", "0123")


def test_latents_are_not_written_over(folder):
    with pytest.raises(ValueError, match=r"holds latents\.json already"):
        write_latents(folder, map(item, range(2)), "crops", "0123")
    assert len(CachedLatents(folder)) == 4


def test_a_folder_without_latents_or_with_the_sizes_of_others_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"latents\.json: cannot be read"):
        CachedLatents(tmp_path)
    np.save(folder / "sizes.npy", np.zeros((3, 2), np.int32))
    with pytest.raises(ValueError, match=r"sizes\.npy: int32 \(3, 2\) instead of the int32 \(4, 2\)"):
        CachedLatents(folder)


def test_no_latents_are_a_folder_as_well(tmp_path):
    write_latents(tmp_path / "out", iter([]), "nothing", "0123")
    assert CachedLatents(tmp_path / "out").sizes.shape == (0, 2)
