import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from zipir_jax.config import DataConfig, DegradationConfig
from zipir_jax.data.pipeline import batches, random_crop

IMAGES = 6


@pytest.fixture(name="folder", scope="module")
def make_folder(tmp_path_factory):
    """Noise of which the blue channel says which image it is."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "deeper").mkdir()
    rng = np.random.default_rng(0)
    for index in range(IMAGES):
        pixels = rng.integers(0, 256, (72, 80, 3), dtype=np.uint8)
        pixels[..., 2] = 40 * index
        Image.fromarray(pixels).save(folder / ("deeper" if index % 2 else "") / f"{index}.png")
    return folder


@pytest.fixture(name="config", scope="module")
def make_config(folder):
    return DataConfig(folder=str(folder), crop=64, batch_size=2, threads=2)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


# --------------------------------------------------------------------------------------------------
# Batches
# --------------------------------------------------------------------------------------------------


def test_a_batch_holds_crops_and_their_degraded_partners(config):
    for batch in take(batches(config, DegradationConfig(), 0), 4):
        assert batch.keys() == {"image", "lq"}
        for array in batch.values():
            assert (array.shape, array.dtype) == ((2, 64, 64, 3), np.float32)
            assert np.abs(array).max() <= 1
        assert np.abs(batch["image"] - batch["lq"]).mean() > 0.05
    assert next(batches(config, None, 0)).keys() == {"image"}


def test_the_seed_decides_the_batches(config):
    first, again, other = (take(batches(config, DegradationConfig(), seed), 4) for seed in (3, 3, 4))
    assert_same(first, again)
    assert not np.array_equal(first[0]["image"], other[0]["image"])


def test_the_number_of_threads_does_not_change_an_item(config):
    results = [
        take(batches(dataclasses.replace(config, threads=threads), DegradationConfig(), 0), 6)
        for threads in (1, 4)
    ]
    assert_same(*results)


def test_a_restored_iterator_goes_on_as_if_it_had_never_stopped(config):
    iterator = batches(config, DegradationConfig(), 0)
    take(iterator, 4)  # past the end of the first epoch
    state = iterator.get_state()
    expected = take(iterator, 3)
    fresh = batches(config, DegradationConfig(), 0)
    fresh.set_state(state)
    assert_same(take(fresh, 3), expected)


def test_a_saved_state_is_refused_by_other_images(config, tmp_path):
    def folder(name, files):
        for file, side in files:
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / file)
        return batches(dataclasses.replace(config, folder=str(tmp_path / name)), None, 0)

    files = [("a.png", 64), ("b.png", 65), ("deeper/c.png", 66)]
    iterator = folder("first", files)
    take(iterator, 2)
    state = json.loads(json.dumps(iterator.get_state()))  # as a checkpoint holds it
    moved = folder("moved", files)
    moved.set_state(state)
    assert_same(take(moved, 2), take(iterator, 2))
    for name, others in {
        "renamed": [("a.png", 64), ("B.png", 65), ("deeper/c.png", 66)],
        "changed": [("a.png", 64), ("b.png", 67), ("deeper/c.png", 66)],
        "fewer": [("a.png", 64), ("b.png", 65)],
        "flat": [("a.png", 64), ("b.png", 65), ("c.png", 66)],
    }.items():
        with pytest.raises(
            ValueError, match=f"{name}: not the images that the run began with: .*, not Folder"
        ):
            folder(name, others).set_state(state)


def test_every_epoch_shows_each_image_once_in_an_order_and_with_crops_of_its_own(config):
    iterator = batches(dataclasses.replace(config, batch_size=IMAGES), None, 0)
    epochs = [batch["image"] for batch in take(iterator, 3)]
    orders = [np.round((epoch[:, 0, 0, 2] + 1) * 127.5 / 40).astype(int).tolist() for epoch in epochs]
    assert all(sorted(order) == list(range(IMAGES)) for order in orders)
    assert len(set(map(tuple, orders))) > 1
    crops = [epoch[order.index(0)] for epoch, order in zip(epochs, orders, strict=True)]
    assert not np.array_equal(crops[0], crops[1])


def test_a_batch_may_be_larger_than_the_folder(config):
    batch = next(batches(dataclasses.replace(config, batch_size=10), None, 0))
    assert batch["image"].shape[0] == 10


# --------------------------------------------------------------------------------------------------
# Crops of an image whose red channel counts rows and whose green one counts columns
# --------------------------------------------------------------------------------------------------


@pytest.fixture(name="ruler")
def make_ruler():
    rows, columns = np.mgrid[:150, :200].astype(np.uint8)
    return np.stack([rows, columns, np.zeros_like(rows)], -1)


def crops(image, count=60, **changes):
    config = dataclasses.replace(DataConfig(crop=32, zoom=(1.0, 1.0)), **changes)
    for seed in range(count):
        yield (random_crop(image, config, np.random.default_rng(seed)) + 1) * 127.5


def test_a_crop_at_full_size_is_a_window_of_the_image_or_its_mirror_image(ruler):
    mirrored, corners = [], set()
    for crop in crops(ruler):
        top, left = round(float(crop[..., 0].min())), round(float(crop[..., 1].min()))
        window = ruler[top : top + 32, left : left + 32]
        mirrored.append(bool(crop[0, 0, 1] > crop[0, 1, 1]))
        np.testing.assert_allclose(crop, window[:, ::-1] if mirrored[-1] else window, atol=1e-3)
        corners.add((top, left))
    assert 15 < sum(mirrored) < 45
    assert len(corners) > 50


def test_rotated_crops_take_all_eight_orientations(ruler):
    def orientation(crop):
        down, right = crop[1, 0] - crop[0, 0], crop[0, 1] - crop[0, 0]
        return tuple(np.round([*down[:2], *right[:2]]).astype(int).tolist())

    assert len({orientation(crop) for crop in crops(ruler, 200, rotate=True)}) == 8
    assert len({orientation(crop) for crop in crops(ruler, 200)}) == 2


def test_the_zoom_is_the_share_of_a_region_that_is_kept(ruler):
    # A region of 64 pixels whose ruler starts at c reads c + 0.5, c + 2.5 ... when it is shrunk by two.
    for crop in crops(ruler, 20, zoom=(0.5, 0.5)):
        steps = np.abs(np.diff(crop[..., 1], axis=1))[:, 4:-4]
        np.testing.assert_allclose(steps, 2, atol=0.05)
    spans = [np.ptp(crop[16, 4:-4, 1]) / 23 for crop in crops(ruler, 200, zoom=(0.25, 1.0))]
    assert 0.95 < min(spans) < 1.2
    assert 3.3 < max(spans) < 4.1
    assert 0.35 < np.mean(np.array(spans) < 2) < 0.65  # log-uniform: half of the crops within each octave


def test_a_region_is_never_enlarged(ruler):
    small = ruler[:40, :50]
    for crop in crops(small, 20, zoom=(0.1, 0.1)):  # asks for 320 pixels; the image has 40
        steps = np.abs(np.diff(crop[..., 0], axis=0))[4:-4]
        np.testing.assert_allclose(steps, 40 / 32, atol=0.05)
