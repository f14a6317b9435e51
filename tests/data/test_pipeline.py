"""Batches: whatever makes them (threads, processes, hosts, a restart), they are the same."""

import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zipir_jax.config import DataConfig, DegradationConfig, DiTConfig
from zipir_jax.data.latents import CachedLatents, write_latents
from zipir_jax.data.pipeline import READ_TRIES, batch_shapes, batches, crop_size, random_crop, read_item
from zipir_jax.data.sources import open_sources
from zipir_jax.data.text import TextEmbeddings, write_text

# (height, width): square ones, wide ones, and ones that are large enough for the second resolution.
SIZES = [(72, 80)] * 5 + [(70, 140)] * 3 + [(150, 140)] * 4
SQUARE, WIDE, LARGE = range(5), range(5, 8), range(8, 12)
LEVEL = 20  # of the blue channel, between one image and the next


@pytest.fixture(name="folder", scope="module")
def make_folder(tmp_path_factory):
    """Noise of which the blue channel says which image it is."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "deeper").mkdir()
    rng = np.random.default_rng(0)
    for index, (height, width) in enumerate(SIZES):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        pixels[..., 2] = LEVEL * index
        # Sorted by name, all files of "deeper" come first: keep the numbers in the names in the order of the source.
        path = folder / "deeper" / f"{index:02d}.png" if index < 4 else folder / f"p{index:02d}.png"
        Image.fromarray(pixels).save(path)
        path.with_suffix(".txt").write_text(f"photo {index}" if index % 2 else "")
    return folder


@pytest.fixture(name="source", scope="module")
def make_source(folder):
    source = open_sources((str(folder),))
    assert source.sizes.tolist() == [list(size) for size in SIZES]
    return source


CONFIG = DataConfig(resolutions=(64,), batch_size=2, threads=2)
BUCKETS = dataclasses.replace(
    CONFIG,
    resolutions=(64, 128),
    resolution_weights=(3.0, 1.0),
    aspect_ratios=(1.0, 3.0),
    batch_size=4,
)


def config(**changes):
    return dataclasses.replace(CONFIG, **changes)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name], b[name])


def shown(batch):
    """The numbers of the images that a batch's crops are cut from."""
    return np.round((batch["image"][:, 0, 0, 2] + 1) * 127.5 / LEVEL).astype(int).tolist()


# --------------------------------------------------------------------------------------------------
# Batches of one bucket
# --------------------------------------------------------------------------------------------------


def test_a_batch_holds_crops_and_their_degraded_partners(source):
    for batch in take(batches(CONFIG, source, 0, DegradationConfig()), 4):
        assert batch.keys() == {"image", "lq"}
        for array in batch.values():
            assert (array.shape, array.dtype) == ((2, 64, 64, 3), np.float32)
            assert np.abs(array).max() <= 1
        assert np.abs(batch["image"] - batch["lq"]).mean() > 0.05
    assert next(batches(CONFIG, source, 0)).keys() == {"image"}


def test_the_seed_decides_the_batches(source):
    first, again, other = (take(batches(CONFIG, source, seed, DegradationConfig()), 4) for seed in (3, 3, 4))
    assert_same(first, again)
    assert not np.array_equal(first[0]["image"], other[0]["image"])


def test_the_degradation_does_not_change_the_crops(source):
    with_lq = take(batches(CONFIG, source, 0, DegradationConfig()), 3)
    assert_same([{"image": batch["image"]} for batch in with_lq], take(batches(CONFIG, source, 0), 3))


@pytest.mark.parametrize("threads", [0, 1, 6])
def test_the_number_of_threads_does_not_change_an_item(source, threads):
    expected = take(batches(config(threads=3), source, 0, DegradationConfig()), 6)
    assert_same(take(batches(config(threads=threads), source, 0, DegradationConfig()), 6), expected)


def test_every_epoch_shows_each_image_once_in_an_order_and_with_crops_of_its_own(source):
    epochs = take(batches(config(batch_size=len(SIZES)), source, 0), 3)
    orders = [shown(epoch) for epoch in epochs]
    assert all(sorted(order) == list(range(len(SIZES))) for order in orders)
    assert len(set(map(tuple, orders))) == 3
    crops = [epoch["image"][order.index(0)] for epoch, order in zip(epochs, orders, strict=True)]
    assert not np.array_equal(crops[0], crops[1])


def test_an_epoch_may_end_within_a_batch(source):
    order = [index for batch in take(batches(config(batch_size=8), source, 0), 6) for index in shown(batch)]
    for epoch in range(4):
        assert sorted(order[12 * epoch : 12 * epoch + 12]) == list(range(12))


def test_a_batch_may_be_larger_than_the_folder(source):
    assert next(batches(config(batch_size=30), source, 0))["image"].shape[0] == 30


# --------------------------------------------------------------------------------------------------
# Several buckets
# --------------------------------------------------------------------------------------------------


def test_each_batch_is_of_one_bucket_and_shows_its_images_alone(source):
    data = batches(BUCKETS, source, 0)
    images = {(bucket.height, bucket.width): set(bucket.images.tolist()) for bucket in data.buckets}
    # The wide images are not high enough for the second resolution, whose wide crop none of the others fills.
    assert images == {(64, 64): {*SQUARE, *LARGE}, (64, 128): {*WIDE}, (128, 128): {*LARGE}}
    seen = {size: set() for size in images}
    for batch in take(data, 60):
        assert batch["image"].shape == (4, *crop_size(batch), 3)
        seen[crop_size(batch)] |= set(shown(batch))
    assert seen == images


@pytest.mark.parametrize("batch_tokens", [0, 32])
def test_the_weights_share_out_the_images_and_each_image_of_a_resolution_comes_as_often(source, batch_tokens):
    # Without zoom nothing is resized, which would take the longest.
    data = batches(dataclasses.replace(BUCKETS, batch_tokens=batch_tokens, zoom=(1.0, 1.0)), source, 0)
    images = {(bucket.height, bucket.width): 0 for bucket in data.buckets}
    sizes = [crop_size(batch) for batch in take(data, 200)]
    for size in sizes:
        images[size] += next(b.batch_size for b in data.buckets if (b.height, b.width) == size)
    low, wide, high = images[64, 64], images[64, 128], images[128, 128]
    assert (low + wide) / high == pytest.approx(3, rel=0.1)
    assert low / wide == pytest.approx(9 / 3, rel=0.1)
    # The buckets take turns: none is long away.
    for bucket in data.buckets:
        places = np.flatnonzero([size == (bucket.height, bucket.width) for size in sizes])
        assert np.diff(places).max() <= 2 / bucket.weight + 2


def test_batch_tokens_gives_smaller_crops_larger_batches(source):
    # 4, 8 and 16 latent pixels a crop.
    tokens = dataclasses.replace(BUCKETS, batch_tokens=50, batch_size=7)
    for divisor, expected in ((1, [12, 6, 3]), (2, [12, 6, 2]), (4, [12, 4, 4]), (5, [10, 5, 5])):
        data = batches(tokens, source, 0, divisor=divisor)
        assert [bucket.batch_size for bucket in data.buckets] == expected
        for batch in take(data, 6):
            height, width = crop_size(batch)
            assert len(batch["image"]) == expected[[4, 8, 16].index(height * width // 1024)]


def test_batch_shapes_are_those_of_the_arrays_that_come(source, embeddings, latents):
    dit = DiTConfig(text_width=5, width=8, heads=2, latent_channels=6)
    with_text = dataclasses.replace(BUCKETS, text="t", text_tokens=4)
    # The cached crops are all of one size.
    from_cache = dataclasses.replace(with_text, latents="l", resolutions=(128,), resolution_weights=())
    for settings, made_of, degradation in (
        (BUCKETS, source, None),
        (with_text, source, DegradationConfig()),
        (from_cache, latents, None),
    ):
        text = embeddings if settings.text else None
        data = batches(settings, made_of, 0, degradation, text)
        sizes = {(bucket.height, bucket.width): bucket for bucket in data.buckets}
        found = set()
        for batch in take(data, 8):
            size = crop_size(batch)
            expected = batch_shapes(settings, sizes[size], degradation is not None, dit)
            assert {name: (array.shape, array.dtype) for name, array in batch.items()} == expected
            found.add(size)
        assert found == sizes.keys()


# --------------------------------------------------------------------------------------------------
# The state
# --------------------------------------------------------------------------------------------------


def test_a_restored_iterator_goes_on_as_if_it_had_never_stopped(source):
    iterator = batches(BUCKETS, source, 0, DegradationConfig())
    take(iterator, 5)  # past the end of an epoch
    state = json.loads(json.dumps(iterator.get_state()))  # as a checkpoint holds it
    expected = take(iterator, 4)
    fresh = batches(dataclasses.replace(BUCKETS, threads=0), source, 0, DegradationConfig())
    take(fresh, 1)
    fresh.set_state(state)
    assert fresh.get_state() == state
    assert_same(take(fresh, 4), expected)
    iterator.set_state(state)  # back
    assert_same(take(iterator, 4), expected)


def test_the_state_is_the_number_of_batches_and_what_they_are_made_of(source):
    iterator = batches(CONFIG, source, 0)
    made_of = {"contents": repr(source), "batch_sizes": [CONFIG.batch_size]}
    assert iterator.get_state() == {"taken": 0} | made_of
    take(iterator, 3)  # and not what threads have made meanwhile
    assert iterator.get_state() == {"taken": 3} | made_of


def test_a_saved_state_is_refused_by_batches_of_other_sizes(source):
    config = dataclasses.replace(CONFIG, batch_tokens=40)
    tokens = CONFIG.resolutions[0] ** 2 // 32**2
    few, many = (batches(config, source, 0, divisor=divisor) for divisor in (1, 3))
    assert [b.batch_size for b in few.buckets] == [40 // tokens] != [b.batch_size for b in many.buckets]
    with pytest.raises(ValueError, match=r"batches of \[\d+\] images, not of \[\d+\] as the run began with"):
        many.set_state(few.get_state())


def test_a_closed_iterator_goes_on_where_it_was(source):
    iterator = batches(CONFIG, source, 0)
    expected = take(batches(CONFIG, source, 0), 4)
    first = take(iterator, 2)
    iterator.close()
    assert_same(first + take(iterator, 2), expected)


def test_a_saved_state_is_refused_by_other_images(tmp_path):
    def make(name, files):
        for file, side in files:
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / file)
        return batches(CONFIG, open_sources((str(tmp_path / name),)), 0)

    files = [("a.png", 64), ("b.png", 65), ("deeper/c.png", 66)]
    iterator = make("first", files)
    take(iterator, 2)
    state = iterator.get_state()
    moved = make("moved", files)
    moved.set_state(state)
    assert_same(take(moved, 2), take(iterator, 2))
    with pytest.raises(
        ValueError, match=r"not the images that the run began with: Folder.*2 images.*, not Fold"
    ):
        make("fewer", files[:2]).set_state(state)


# --------------------------------------------------------------------------------------------------
# Hosts
# --------------------------------------------------------------------------------------------------


def joined(parts):
    return [
        {name: np.concatenate([part[name] for part in step]) for name in step[0]}
        for step in zip(*parts, strict=True)
    ]


@pytest.mark.parametrize("hosts", [2, 4])
def test_the_hosts_parts_are_together_the_batch_of_one_host(source, hosts):
    settings = dataclasses.replace(BUCKETS, batch_tokens=64)  # batches of 16, 8 and 4
    expected = take(batches(settings, source, 0, DegradationConfig(), divisor=4), 12)
    assert len({batch["image"].shape for batch in expected}) == 3
    parts = [
        take(batches(settings, source, 0, DegradationConfig(), divisor=4, host=host, hosts=hosts), 12)
        for host in range(hosts)
    ]
    for step in zip(*parts, strict=True):
        assert len({part["image"].shape for part in step}) == 1  # all of one bucket
    assert_same(joined(parts), expected)


def test_a_state_of_one_host_goes_on_with_two(source):
    one = batches(BUCKETS, source, 0)
    take(one, 5)
    state = one.get_state()
    two = [batches(BUCKETS, source, 0, host=host, hosts=2) for host in range(2)]
    for part in two:
        part.set_state(state)
    assert_same(joined([take(part, 5) for part in two]), take(one, 5))


def test_a_batch_that_the_hosts_cannot_divide_is_refused(source):
    with pytest.raises(ValueError, match="a batch of 4 images does not divide over 3 hosts"):
        batches(BUCKETS, source, 0, hosts=3)


# --------------------------------------------------------------------------------------------------
# Worker processes: they take seconds to start, so that one test looks at all that they do
# --------------------------------------------------------------------------------------------------


def workers():
    return {child.pid for child in multiprocessing.active_children() if "grain" in child.name}


def test_workers_make_the_same_batches_as_threads_and_their_state_goes_on_without_them(
    folder, embeddings, tmp_path
):
    for path in folder.rglob("*.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    damage(tmp_path / "p06.png")
    source = open_sources((str(tmp_path),))
    settings = dataclasses.replace(BUCKETS, text="t", text_tokens=4, threads=1)
    arguments = source, 0, DegradationConfig(), embeddings
    threads = batches(dataclasses.replace(settings, threads=0), *arguments)
    expected = take(threads, 12)
    assert len({batch["image"].shape for batch in expected}) == 3

    before = workers()
    two = batches(dataclasses.replace(settings, workers=2), *arguments)
    assert_same(take(two, 7), expected[:7])
    assert len(workers() - before) == 2
    state = json.loads(json.dumps(two.get_state()))
    two.close()
    assert workers() == before

    none = batches(settings, *arguments)
    none.set_state(state)
    assert_same(take(none, 5), expected[7:])
    one = batches(dataclasses.replace(settings, workers=1), *arguments)
    one.set_state(state)
    assert_same(take(one, 5), expected[7:])
    one.close()
    # The damaged image is among the three of its bucket, of which every batch shows all.
    assert threads.unreadable == two.unreadable == none.unreadable == one.unreadable
    assert len(threads.unreadable) == 1


SCRIPT = """
import multiprocessing, os, signal, sys
from zipir_jax.config import DataConfig
from zipir_jax.data.pipeline import batches
from zipir_jax.data.sources import open_sources

if __name__ == "__main__":
    config = DataConfig(resolutions=(64,), batch_size=2, threads=1, workers=2)
    data = batches(config, open_sources(("synthetic:4:64",)), 0)
    for _ in range(3):
        next(data)
    workers = [child.pid for child in multiprocessing.active_children() if "grain" in child.name]
    print(*workers, flush=True)
    if sys.argv[1] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if sys.argv[1] == "kill a worker":
        os.kill(workers[0], signal.SIGKILL)
        for _ in range(100):
            next(data)
    if sys.argv[1] == "signals":
        for worker in workers:
            os.kill(worker, signal.SIGINT)
            os.kill(worker, signal.SIGTERM)
        for _ in range(20):
            next(data)
"""


@pytest.mark.parametrize(("way", "status"), [("kill", -signal.SIGKILL), ("signals", 0), ("kill a worker", 1)])
def test_workers_end_with_their_parent_and_leave_signals_to_it(tmp_path, way, status):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), way]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == status, done.stderr
    workers = [int(worker) for worker in done.stdout.split()]
    assert len(workers) == 2
    deadline = time.monotonic() + 30
    while any(alive(worker) for worker in workers):
        assert time.monotonic() < deadline, "workers are left"
        time.sleep(0.1)
    if way == "signals":
        assert "Traceback" not in done.stderr  # nor from what Python cleans up when it exits
    if way == "kill a worker":
        assert "ValueError: one of 2 data workers was killed, perhaps for want of memory" in done.stderr


def alive(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# --------------------------------------------------------------------------------------------------
# Unreadable images
# --------------------------------------------------------------------------------------------------


def damage(path):
    """Leave the header, so that the source does not notice."""
    path.write_bytes(path.read_bytes()[:2000])


@pytest.fixture(name="damaged")
def make_damaged(folder, tmp_path):
    """The images, of which 2 and 3 (square) and 9 (large) cannot be read, as a source that believes they can."""
    for path in folder.rglob("*.png"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for name in ("02.png", "03.png", "p09.png"):
        damage(tmp_path / name)
    source = open_sources((str(tmp_path),))
    assert len(source) == len(SIZES) and source.damaged == []
    return source


def test_others_of_the_same_bucket_stand_in_for_what_cannot_be_read(source, damaged):
    intact, data = batches(BUCKETS, source, 0), batches(BUCKETS, damaged, 0)
    members = {(bucket.height, bucket.width): bucket.images.tolist() for bucket in data.buckets}
    for whole, batch in zip(take(intact, 40), take(data, 40), strict=True):
        assert crop_size(batch) == crop_size(whole)
        for index, other, crop, expected in zip(
            shown(whole), shown(batch), batch["image"], whole["image"], strict=True
        ):
            assert np.array_equal(crop, expected) == (index not in (2, 3, 9))
            assert other == index or index in (2, 3, 9)
            assert other in members[crop_size(batch)] and other not in (2, 3, 9)
    # Whatever number of threads makes them, and whenever.
    again = batches(dataclasses.replace(BUCKETS, threads=0), damaged, 0)
    data.set_state(again.get_state())
    assert_same(take(again, 20), take(data, 20))


def test_stand_ins_come_from_all_over_the_bucket():
    """Not from the neighbours, which lie in the same damaged shard."""

    def read(index):
        if 400 <= index < 600:
            raise ValueError(f"{index} is damaged")
        return index

    stand_ins = [read_item(read, np.arange(1000), position)[0] for position in range(400, 600)]
    assert len(set(stand_ins)) > 150
    assert min(stand_ins) < 100 and max(stand_ins) > 900


def test_each_unreadable_image_is_named_once(damaged):
    data = batches(BUCKETS, damaged, 0)
    assert data.unreadable == []
    take(data, 40)
    names = ("02.png", "03.png", "p09.png")
    assert len(data.unreadable) == 3
    for name, line in zip(names, sorted(data.unreadable), strict=True):
        assert line.startswith(f"{damaged.folder / name}: the image is damaged (")
    data.set_state(data.get_state())
    take(data, 10)
    assert len(data.unreadable) == 3


class Unreadable:
    """A source of images of which none can be read."""

    name = "unreadable"

    def __init__(self, count):
        self.sizes, self.damaged = np.full((count, 2), 64, np.int32), []
        self.asked = []

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        self.asked.append(index)
        raise ValueError(f"{index}.png: no image,\nnone at all")

    def caption(self, index):
        return ""


@pytest.mark.parametrize(("count", "tries"), [(1000, READ_TRIES), (3, 3)])
def test_too_many_unreadable_images_in_a_row_end_it_in_one_sentence(count, tries):
    source = Unreadable(count)
    data = batches(config(threads=0, batch_size=1), source, 0)
    for _ in range(2):  # the second time it is the same batch
        source.asked = []
        with pytest.raises(ValueError) as raised:
            next(data)
        assert data.get_state()["taken"] == 0
    first, last = source.asked[0], source.asked[-1]
    assert len(set(source.asked)) == len(source.asked) == tries
    assert str(raised.value) == (
        f"{tries} images in a row cannot be read, from the first ({first}.png: no image, none at all) to "
        f"{last}.png: no image, none at all"
    )


# --------------------------------------------------------------------------------------------------
# Text
# --------------------------------------------------------------------------------------------------


def embedding(caption):
    """Of as many tokens as the caption has characters, 2 for none; its values are exact in bfloat16."""
    length = max(len(caption), 2)
    values = sum(caption.encode()) % 32 + np.arange(length * 5).reshape(length, 5) / 4
    return values.astype(np.float32)


@pytest.fixture(name="embeddings", scope="module")
def make_embeddings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text") / "out"
    captions = ["", *(f"photo {index}" for index in range(1, len(SIZES), 2))]
    write_text(folder, ((caption, embedding(caption)) for caption in captions), "t5-tiny")
    return TextEmbeddings(folder)


def caption_of(index):
    return f"photo {index}" if index % 2 else ""


@pytest.mark.parametrize("tokens", [4, 7, 20])
def test_text_is_padded_with_zeros_or_cut(source, embeddings, tokens):
    settings = config(batch_size=12, text="t", text_tokens=tokens, text_dropout=0.0)
    (batch,) = take(batches(settings, source, 0, None, embeddings), 1)
    assert batch.keys() == {"image", "text", "text_lengths"}
    for index, text, length in zip(shown(batch), batch["text"], batch["text_lengths"], strict=True):
        whole = embedding(caption_of(index))
        assert length == min(len(whole), tokens)
        np.testing.assert_array_equal(text[:length], whole[:length])
        np.testing.assert_array_equal(text[length:], 0)
    assert_same([{"image": batch["image"]}], take(batches(config(batch_size=12), source, 0), 1))


def test_the_empty_text_takes_the_place_of_captions_with_its_probability(source, embeddings):
    def dropped(probability, count=60):
        changes = {"text_tokens": 4, "text_dropout": probability, "zoom": (1.0, 1.0)}
        settings = config(batch_size=12, text="t", **changes)
        with_caption, without = 0, 0
        for batch in take(batches(settings, source, 0, None, embeddings), count):
            captions = np.array([bool(caption_of(index)) for index in shown(batch)])
            empty = batch["text_lengths"] == 2  # of the empty caption; the others are cut to 4
            assert empty[~captions].all()
            np.testing.assert_array_equal(batch["text"][empty][:, :2], [embedding("")] * empty.sum())
            with_caption, without = with_caption + captions.sum(), without + (empty & captions).sum()
        return without / with_caption

    assert dropped(0.0, 5) == 0 and dropped(1.0, 5) == 1
    assert dropped(0.3) == pytest.approx(0.3, abs=4 * np.sqrt(0.3 * 0.7 / 360))  # 4 deviations


def test_an_image_whose_caption_has_no_embedding_counts_as_unreadable(source, embeddings, tmp_path):
    known = [caption for caption in map(caption_of, range(len(SIZES))) if caption != "photo 3"]
    write_text(tmp_path / "fewer", [(caption, embedding(caption)) for caption in known], "t5-tiny")
    # With a dropout of 1 no caption is used, but the images are the same ones.
    for dropout in (0.0, 1.0):
        settings = config(batch_size=12, text="t", text_dropout=dropout)
        data = batches(settings, source, 0, None, TextEmbeddings(tmp_path / "fewer"))
        whole = next(batches(settings, source, 0, None, embeddings))
        batch = next(data)
        assert 3 in shown(whole) and 3 not in shown(batch)
        pairs = zip(shown(batch), shown(whole), strict=True)
        assert all(index == other or other == 3 for index, other in pairs)
        assert data.unreadable == [f"{tmp_path / 'fewer'}: no embedding of the caption 'photo 3'"]


def energy(images):
    """Mean square of the differences of neighbours: what degrading takes from images of noise."""
    return (np.diff(images[..., :2], axis=2) ** 2).mean((1, 2, 3))


@pytest.mark.parametrize("with_text", [True, False], ids=["text", "no text, as for cached latents"])
def test_low_quality_images_are_degraded_ones_with_the_negative_prompt(source, tmp_path, with_text):
    captions = ["poor", *map(caption_of, range(len(SIZES)))]
    items = ((caption, embedding(caption)) for caption in captions)
    write_text(tmp_path / "text", items, "t5-tiny", negative="poor")
    text = TextEmbeddings(tmp_path / "text") if with_text else None

    def batches_of(probability, count=15):
        changes = {"text": "t", "text_tokens": 20, "text_dropout": 0.0} if with_text else {}
        settings = config(batch_size=12, zoom=(1.0, 1.0), low_quality_probability=probability, **changes)
        data = batches(settings, source, 0, DegradationConfig(), text)
        return [(next(data), data.low_quality, data.indices) for _ in range(count)]

    low, without = [], batches_of(0.0)
    for (batch, low_quality, indices), (clean, none, same) in zip(batches_of(0.3), without, strict=True):
        assert not none.any() and np.array_equal(indices, same)
        # The crop is the same one, and what is degraded of it is a pair, as any other.
        np.testing.assert_array_equal(batch["image"][~low_quality], clean["image"][~low_quality])
        share = energy(batch["image"]) / energy(clean["image"])
        assert (share[low_quality] < 0.8).all()
        assert (np.abs(batch["image"] - batch["lq"]).mean((1, 2, 3)) > 1e-3).all()
        low += low_quality.tolist()
        if not with_text:
            continue
        for index, is_low, found in zip(indices, low_quality, batch["text"], strict=True):
            expected = embedding("poor" if is_low else caption_of(index))[:20]
            np.testing.assert_array_equal(found[: len(expected)], expected)
    assert np.mean(low) == pytest.approx(0.3, abs=4 * np.sqrt(0.3 * 0.7 / len(low)))  # 4 deviations
    first, again = (batches_of(1.0, 2) for _ in range(2))
    assert all(low_quality.all() for _, low_quality, _ in first)
    assert_same([batch for batch, _, _ in first], [batch for batch, _, _ in again])


def test_without_a_degradation_no_image_is_a_low_quality_one(source):
    """The statistics of the latent are those of clean images."""
    data = batches(config(low_quality_probability=1.0), source, 0)
    assert_same(take(data, 2), take(batches(CONFIG, source, 0), 2))
    assert not data.low_quality.any()


# --------------------------------------------------------------------------------------------------
# Cached latents
# --------------------------------------------------------------------------------------------------

LATENT_SIZES = [(2, 2)] * 5 + [(4, 4)] * 2 + [(4, 6)]  # of 64, 128 and 128 x 192 pixels


def latent_pair(number):
    """A latent and its degraded image's; the first value says which one it is."""
    generator = np.random.default_rng(number)
    pair = generator.normal(size=(2, *LATENT_SIZES[number], 6)).astype(np.float32)
    pair[:, 0, 0, 0] = number
    return pair


@pytest.fixture(name="latents", scope="module")
def make_latents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents") / "out"
    items = ((*latent_pair(number), caption_of(number)) for number in range(len(LATENT_SIZES)))
    write_latents(folder, items, "some crops", "0123")
    return CachedLatents(folder)


def test_cached_latents_come_as_they_were_written_with_the_text_of_their_captions(latents, embeddings):
    settings = config(batch_size=5, latents="l", text="t", text_tokens=20, text_dropout=0.0)
    for batch in take(batches(settings, latents, 0, None, embeddings), 2):
        assert batch.keys() == {"latent", "lq_latent", "text", "text_lengths"}
        numbers = batch["latent"][:, 0, 0, 0].astype(int)
        assert sorted(numbers.tolist()) == [0, 1, 2, 3, 4]
        for name, member in (("latent", 0), ("lq_latent", 1)):
            expected = [latent_pair(number)[member].astype(np.float16) for number in numbers]
            assert batch[name].dtype == np.float32
            np.testing.assert_array_equal(batch[name], np.array(expected, np.float32))
        for number, length in zip(numbers, batch["text_lengths"], strict=True):
            assert length == len(embedding(caption_of(number)))
    assert crop_size(batch) == (64, 64)


def test_a_cached_low_quality_image_has_the_text_of_the_negative_prompt_however_worded(tmp_path):
    write_latents(tmp_path / "latents", [(*latent_pair(0), None)], "a crop", "0123")
    captions = [(caption, embedding(caption)) for caption in ("", "poor")]
    write_text(tmp_path / "text", captions, "t5-tiny", negative="poor")
    settings = config(batch_size=1, latents="l", text="t", text_tokens=20, text_dropout=0.0)
    sources = CachedLatents(tmp_path / "latents"), 0, None, TextEmbeddings(tmp_path / "text")
    (batch,) = take(batches(settings, *sources), 1)
    np.testing.assert_array_equal(batch["text"][0, :4], embedding("poor"))


def test_only_latents_of_exactly_a_crops_size_are_used(latents):
    both = config(resolutions=(64, 128), latents="l", batch_size=1)
    assert [bucket.images.tolist() for bucket in batches(both, latents, 0).buckets] == [
        [0, 1, 2, 3, 4],
        [5, 6],
    ]
    message = "none of the 8 images is exactly as large as a crop of resolution 192: 192 x 192"
    with pytest.raises(ValueError, match=message):
        batches(config(resolutions=(192,), latents="l"), latents, 0)


def test_a_state_of_cached_latents_is_refused_by_those_of_another_encoder(latents, tmp_path):
    state = batches(config(latents="l"), latents, 0).get_state()
    items = [(*latent_pair(number), "") for number in range(len(LATENT_SIZES))]
    write_latents(tmp_path / "other", items, "some crops", "4567")
    with pytest.raises(ValueError, match=r"not the images that the run began with: .* 4567.*, not .* 0123"):
        batches(config(latents="l"), CachedLatents(tmp_path / "other"), 0).set_state(state)


# --------------------------------------------------------------------------------------------------
# Crops of an image whose red channel counts rows and whose green one counts columns
# --------------------------------------------------------------------------------------------------


@pytest.fixture(name="ruler")
def make_ruler():
    rows, columns = np.mgrid[:150, :200].astype(np.uint8)
    return np.stack([rows, columns, np.zeros_like(rows)], -1)


def crops(image, count=60, height=32, width=32, **changes):
    settings = config(**({"zoom": (1.0, 1.0)} | changes))
    for seed in range(count):
        yield (random_crop(image, height, width, settings, np.random.default_rng(seed)) + 1) * 127.5


def test_a_crop_at_full_size_is_a_window_of_the_image_or_its_mirror_image(ruler):
    mirrored, corners = [], set()
    for crop in crops(ruler, height=32, width=48):
        top, left = round(float(crop[..., 0].min())), round(float(crop[..., 1].min()))
        window = ruler[top : top + 32, left : left + 48]
        mirrored.append(bool(crop[0, 0, 1] > crop[0, 1, 1]))
        np.testing.assert_allclose(crop, window[:, ::-1] if mirrored[-1] else window, atol=1e-3)
        corners.add((top, left))
    assert 15 < sum(mirrored) < 45
    assert len(corners) > 50


def test_windows_reach_all_sides_of_the_image(ruler):
    tops, lefts = set(), set()
    for crop in crops(ruler[:34, :34], 200):
        tops.add(round(float(crop[..., 0].min())))
        lefts.add(round(float(crop[..., 1].min())))
    assert tops == lefts == {0, 1, 2}


def orientations(found):
    def orientation(crop):
        down, right = crop[1, 0] - crop[0, 0], crop[0, 1] - crop[0, 0]
        return tuple(np.round([*down[:2], *right[:2]]).astype(int).tolist())

    return len({orientation(crop) for crop in found})


def test_rotated_crops_take_all_eight_orientations_and_those_that_are_not_square_four(ruler):
    assert orientations(crops(ruler, 200)) == 2
    assert orientations(crops(ruler, 200, rotate=True)) == 8
    wide = list(crops(ruler, 200, height=32, width=64, rotate=True))
    assert {crop.shape for crop in wide} == {(32, 64, 3)}
    assert orientations(wide) == 4


def test_the_zoom_is_the_share_of_a_region_that_is_kept(ruler):
    # A region of 64 pixels whose ruler starts at c reads c + 0.5, c + 2.5 ... when it is shrunk by two.
    for crop in crops(ruler, 20, zoom=(0.5, 0.5)):
        steps = np.abs(np.diff(crop[..., 1], axis=1))[:, 4:-4]
        np.testing.assert_allclose(steps, 2, atol=0.05)
    spans = [np.ptp(crop[16, 4:-4, 1]) / 23 for crop in crops(ruler, 200, zoom=(0.25, 1.0))]
    assert 0.95 < min(spans) < 1.2
    assert 3.3 < max(spans) < 4.1
    assert 0.35 < np.mean(np.array(spans) < 2) < 0.65  # log-uniform: half of the crops within each octave


def test_a_region_is_no_larger_than_the_image_and_keeps_the_crops_shape(ruler):
    small = ruler[:40, :50]
    for crop in crops(small, 20, zoom=(0.1, 0.1)):  # asks for 320 pixels; the image has 40
        for axis, channel in ((0, 0), (1, 1)):
            steps = np.abs(np.diff(crop[..., channel], axis=axis))
            np.testing.assert_allclose(np.moveaxis(steps, axis, 0)[4:-4], 40 / 32, atol=0.05)


def test_an_image_of_the_crops_size_is_taken_whole(ruler):
    whole = ruler[:32, :48]
    for crop in crops(whole, 10, height=32, width=48, zoom=(0.3, 1.0)):
        np.testing.assert_allclose(crop if crop[0, 0, 1] == 0 else crop[:, ::-1], whole, atol=1e-3)
