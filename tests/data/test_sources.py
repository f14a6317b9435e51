"""Sources of training images: each kind keeps the interface, names what is wrong, and survives its way to a worker."""

import dataclasses
import io
import json
import os
import pickle
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import cloudpickle
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from zipir_jax.config import IndexConfig
from zipir_jax.data import records
from zipir_jax.data.index import write_index
from zipir_jax.data.shards import ShardSource
from zipir_jax.data.sources import ConcatSource, FolderSource, open_sources
from zipir_jax.data.synthetic import SyntheticSource
from zipir_jax.data.tfds_source import TfdsSource

ORIENTATION = 0x0112  # EXIF tag
# Keeps every image, in shards of one or two of the pictures below.
EVERYTHING = IndexConfig(
    shortest_side=1,
    longest_aspect=9.0,
    contrast=0.0,
    sharpness=0.0,
    compression=0.0,
    near_duplicate_bits=-1,
    shard_mib=0.02,
)


def picture(index, height=40, width=50):
    return np.random.default_rng(index).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(pixels, **options):
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG", **options)
    return file.getvalue()


PICTURES = {
    "a.png": picture(0),
    "b.png": picture(1, 70, 30),
    "deeper/c.png": picture(2, 33, 90),
    "deeper/d.png": picture(3, 64, 64),
    "turned.png": picture(4, 30, 80),
}
CAPTIONS = {"a.png": "a lake", "deeper/c.png": "zwei Boote, früh am Ufer", "turned.png": "on its side"}


@pytest.fixture(name="folder", scope="module")
def make_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    (folder / "deeper").mkdir()
    for name, pixels in PICTURES.items():
        (folder / name).write_bytes(encoded(pixels))
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    (folder / "turned.png").write_bytes(encoded(np.rot90(PICTURES["turned.png"]), exif=exif))
    (folder / "a.txt").write_text(" a lake\n")
    (folder / "a.json").write_text('{"caption": "the text file goes first"}')
    (folder / "deeper" / "c.json").write_text(json.dumps({"caption": CAPTIONS["deeper/c.png"], "text": "no"}))
    (folder / "turned.json").write_text('{"text": "on its side"}')
    (folder / "d.json").write_text('{"caption": "of no image here"}')
    return folder


def build_tfds(folder, name, examples, features, **options):
    """A prepared data set, written by TFDS itself; `examples()` lists them. The files alone are to tell TFDS of it."""

    def info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    methods = {
        "VERSION": tfds.core.Version("1.0.0"),
        "_info": info,
        "_split_generators": lambda self, manager: {
            split: self._generate_examples(split) for split in ("train", "few")
        },
        "_generate_examples": lambda self, split: enumerate(examples()[: 2 if split == "few" else None]),
    }
    with tfds.core.registered.skip_registration():
        builder = type(name, (tfds.core.GeneratorBasedBuilder,), methods)
    builder(data_dir=folder, **options).download_and_prepare()


IMAGE = {"image": tfds.features.Image(shape=(None, None, 3)), "number": np.int64}


@pytest.fixture(name="tfds_folder", scope="module")
def make_tfds_folder(tmp_path_factory, folder):
    place = tmp_path_factory.mktemp("tfds")

    def examples():
        return [
            {"image": folder / name, "caption": CAPTIONS.get(name, ""), "number": number}
            for number, name in enumerate(PICTURES)
        ]

    features = IMAGE | {"caption": tfds.features.Text()}
    build_tfds(place, "Tiny", examples, features, file_format="array_record")
    return place


@pytest.fixture(name="tfds_place")
def use_tfds_folder(tfds_folder, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_folder))
    return tfds_folder


@pytest.fixture(name="shard_folder", scope="module")
def make_shard_folder(tmp_path_factory, folder):
    output = tmp_path_factory.mktemp("shards") / "out"
    write_index((str(folder),), output, EVERYTHING, workers=0)
    assert len(list(output.glob("shard-*"))) > 2
    return output


@pytest.fixture(name="specs")
def make_specs(folder, shard_folder, tfds_place):
    return {
        "folder": (str(folder),),
        "shards": (str(shard_folder),),
        "tfds": ("tfds:tiny",),
        "synthetic": ("synthetic:3:24",),
        "several": (str(folder), "synthetic:2:24:7", "tfds:tiny:few", str(shard_folder)),
    }


KINDS = ["folder", "shards", "tfds", "synthetic", "several"]


# --------------------------------------------------------------------------------------------------
# What all kinds have in common
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_are_those_of_the_upright_images(specs, kind):
    source = open_sources(specs[kind])
    images = [source[index] for index in range(len(source))]
    assert source.sizes.dtype == np.int32 and source.sizes.shape == (len(source), 2)
    assert [tuple(size) for size in source.sizes.tolist()] == [image.shape[:2] for image in images]
    assert all(image.dtype == np.uint8 and image.shape[2] == 3 for image in images)
    assert source.damaged == [] and isinstance(source.name, str)
    with pytest.raises(IndexError):
        source[len(source)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pickler", [pickle, cloudpickle])
def test_a_pickled_source_is_the_same_source(specs, kind, pickler):
    source = open_sources(specs[kind], cache_gib=0.1)
    source[0]  # opens a file, fills the cache
    data = pickler.dumps(source)
    again = pickler.loads(data)
    assert repr(again) == repr(source) and again.name == source.name
    np.testing.assert_array_equal(again.sizes, source.sizes)
    for index in range(len(source)):
        np.testing.assert_array_equal(again[index], source[index])
        assert again.caption(index) == source.caption(index)


def test_a_pickled_source_leaves_its_cache_behind(folder):
    source = FolderSource(folder, cache_gib=1.0)
    for index in range(len(source)):
        source[index]
    pixels = sum(image.nbytes for image in source)
    assert len(pickle.dumps(source)) < pixels / 4
    again = pickle.loads(pickle.dumps(source))
    assert again[0] is again[0]


@pytest.mark.parametrize("kind", KINDS)
def test_threads_may_share_a_source(specs, kind):
    source, alone = open_sources(specs[kind]), open_sources(specs[kind])
    expected = [alone[index] for index in range(len(alone))]
    start = threading.Barrier(8)

    def read(seed):
        start.wait()
        return [
            np.array_equal(source[index], expected[index])
            for index in np.random.default_rng(seed).permutation(len(source)).tolist() * 5
        ]

    with ThreadPoolExecutor(8) as pool:
        assert all(all(same) for same in pool.map(read, range(8)))


@pytest.mark.parametrize("kind", ["folder", "shards", "tfds"])
def test_captions_and_pixels_survive_every_kind_of_storage(specs, kind):
    source = open_sources(specs[kind])
    captions = {source.caption(i): source[i] for i in range(len(source)) if source.caption(i)}
    assert captions.keys() == set(CAPTIONS.values())
    for name, caption in CAPTIONS.items():
        np.testing.assert_array_equal(captions[caption], PICTURES[name])
    assert sum(source.caption(i) == "" for i in range(len(source))) == 2


def test_several_sources_follow_one_another(specs, folder):
    source = open_sources(specs["several"])
    assert isinstance(source, ConcatSource) and len(source) == 5 + 2 + 2 + 5
    np.testing.assert_array_equal(source[1], FolderSource(folder)[1])
    np.testing.assert_array_equal(source[6], SyntheticSource(2, 24, 7)[1])
    np.testing.assert_array_equal(source[9], FolderSource(folder)[0])
    assert source.caption(9) == "a lake" and source.caption(6) == ""
    assert source.name == " + ".join((str(folder), "synthetic images", *specs["several"][2:]))
    for wrong in (-1, 14):
        with pytest.raises(IndexError, match=f"image {wrong} does not lie within 0 to 13"):
            source[wrong]
    swapped = open_sources(specs["several"][1:] + specs["several"][:1])
    assert repr(swapped) != repr(source)


def test_several_sources_name_the_damage_of_each(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(encoded(picture(0)))
        (tmp_path / name / "b.png").write_text("no picture")
    source = open_sources((str(tmp_path / "first"), str(tmp_path / "second")))
    assert source.damaged == [
        f"{tmp_path / name / 'b.png'}: not an image that can be read" for name in ("first", "second")
    ]
    assert len(source) == 2


def test_folders_share_the_cache(folder, tmp_path):
    one = PICTURES["a.png"].nbytes
    (tmp_path / "b.png").write_bytes(encoded(picture(0)))
    source = open_sources((str(folder), "synthetic:1:8", str(tmp_path)), cache_gib=2.5 * one / 2**30)
    assert source[0] is source[0] and source[6] is source[6]  # one each
    assert source[1] is not source[1]


def test_an_unfinished_index_is_not_taken_for_a_folder_of_images(copy):
    (copy / "index.json").unlink()
    with pytest.raises(ValueError, match="its index is not finished; run prepare index again"):
        open_sources((str(copy),))


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ((), "no images are named; give a folder"),
        (("nowhere",), "nowhere: no such folder"),
        (("synthetic:3",), "synthetic:3: not of the form synthetic:COUNT:SIDE or"),
        (("synthetic:3:x",), "synthetic:3:x: not of the form"),
        (("synthetic:0:64",), "count 0 of the synthetic images is not at least 1"),
        (("tfds:",), "tfds:: not of the form tfds:NAME or tfds:NAME:SPLIT"),
    ],
)
def test_a_malformed_spec_is_refused_in_one_sentence(specs, message):
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        open_sources(specs)
    assert "\n" not in str(raised.value)


def test_a_synthetic_spec_has_a_count_a_side_and_a_seed():
    assert repr(open_sources(("synthetic:4:32",))) == repr(SyntheticSource(4, 32, 0))
    assert repr(open_sources(("synthetic:4:32:9",))) == repr(SyntheticSource(4, 32, 9))


def test_importing_the_sources_loads_nothing_that_only_some_need():
    code = "import sys, zipir_jax.data.sources; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    heavy = {"jax", "tensorflow", "tensorflow_datasets", "cv2", "grain", "imagehash", "scipy"}
    assert heavy & set(loaded.split()) == set()


# --------------------------------------------------------------------------------------------------
# Folders
# --------------------------------------------------------------------------------------------------


def test_a_folder_is_searched_in_the_order_of_names(folder):
    source = FolderSource(folder)
    assert [path.relative_to(folder).as_posix() for path in source.paths] == sorted(PICTURES)
    for index, name in enumerate(sorted(PICTURES)):
        np.testing.assert_array_equal(source[index], PICTURES[name])


def test_the_digest_follows_the_images_and_not_their_place(tmp_path):
    def source(name, files):
        for file, width in files:
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(picture(width, 20, width)))
        return FolderSource(tmp_path / name)

    files = [("a.png", 20), ("b.png", 21), ("deeper/c.png", 22)]
    original = repr(source("first", files))
    assert repr(source("moved", files)) == original
    assert str(tmp_path) not in original
    for name, others in {
        "renamed": [("a.png", 20), ("B.png", 21), ("deeper/c.png", 22)],
        "changed": [("a.png", 20), ("b.png", 23), ("deeper/c.png", 22)],
        "fewer": [("a.png", 20), ("b.png", 21)],
        "flat": [("a.png", 20), ("b.png", 21), ("c.png", 22)],
    }.items():
        assert repr(source(name, others)) != original, name


def test_a_damaged_file_is_left_out_and_named(folder, tmp_path):
    whole = encoded(picture(0))
    (tmp_path / "a.png").write_bytes(whole)
    (tmp_path / "b.png").write_text("no picture")
    (tmp_path / "c.png").write_bytes(b"")
    (tmp_path / "d.png").write_bytes(encoded(picture(1))[:-2000])
    source = FolderSource(tmp_path)
    assert [path.name for path in source.paths] == ["a.png", "d.png"]
    assert source.damaged == [
        f"{tmp_path / 'b.png'}: not an image that can be read",
        f"{tmp_path / 'c.png'}: the file is empty",
    ]
    with pytest.raises(ValueError, match=r"d\.png: the image is damaged \(.*cut off"):  # behind its header
        source[1]
    (tmp_path / "b.png").unlink()
    (tmp_path / "c.png").unlink()
    assert repr(FolderSource(tmp_path)) == repr(source)  # what is left out does not count


def test_a_folder_without_a_readable_image_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match=r"holds no image \(.*\.png.*\)$"):
        FolderSource(tmp_path)
    (tmp_path / "a.png").write_text("no picture")
    (tmp_path / "b.jpg").write_text("no picture")
    with pytest.raises(ValueError, match=r"holds no image \(.*\) that can be read; 2 are damaged"):
        FolderSource(tmp_path)


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        ("json", b'{"caption": "cut of'),
        ("json", b'{"caption": 3}'),
        ("json", b'["a caption"]'),
        ("json", b"\xff\xfe\x00"),
        ("txt", b"caf\xe9"),
    ],
)
def test_a_broken_caption_is_named_and_its_image_used(tmp_path, suffix, content):
    (tmp_path / "a.png").write_bytes(encoded(picture(0)))
    (tmp_path / f"a.{suffix}").write_bytes(content)
    source = FolderSource(tmp_path)
    assert len(source) == 1 and source.caption(0) == ""
    (sentence,) = source.damaged
    assert sentence.startswith(f"{tmp_path / f'a.{suffix}'}: the caption cannot be read (")
    assert sentence.endswith("its image is used without a caption")


def test_a_json_file_about_something_else_is_no_caption(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(picture(0)))
    (tmp_path / "a.json").write_text('{"licence": "CC0"}')
    source = FolderSource(tmp_path)
    assert source.caption(0) == "" and source.damaged == []


def test_the_cache_returns_the_pixels_of_the_file_without_reading_it_again(folder):
    cached, plain = FolderSource(folder, cache_gib=1.0), FolderSource(folder)
    for index in range(len(plain)):
        np.testing.assert_array_equal(cached[index], plain[index])
        assert cached[index] is cached[index]
        assert plain[index] is not plain[index]


def test_the_cache_keeps_to_its_memory(tmp_path):
    for index in range(6):
        (tmp_path / f"{index}.png").write_bytes(encoded(picture(index)))
    source = FolderSource(tmp_path, cache_gib=2.5 * picture(0).nbytes / 2**30)
    first = [source[index] for index in range(6)]
    kept = [source[index] is pixels for index, pixels in enumerate(first)]
    assert kept == [True, True, False, False, False, False]


def test_grey_and_transparent_files_become_rgb(tmp_path):
    Image.fromarray(np.full((64, 64), 7, np.uint8)).save(tmp_path / "grey.png")
    Image.fromarray(np.full((64, 64, 4), 9, np.uint8)).save(tmp_path / "transparent.png")
    source = FolderSource(tmp_path)
    assert [source[i].shape for i in range(2)] == [(64, 64, 3)] * 2


# --------------------------------------------------------------------------------------------------
# Shards
# --------------------------------------------------------------------------------------------------


@pytest.fixture(name="copy")
def copy_shards(shard_folder, tmp_path):
    for path in shard_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_the_digest_of_shards_is_that_of_their_images(copy, shard_folder, folder, tmp_path):
    assert repr(ShardSource(copy)) == repr(ShardSource(shard_folder))
    one = dataclasses.replace(EVERYTHING, shard_mib=100.0)
    write_index((str(folder),), tmp_path / "one", one, workers=0)
    assert repr(ShardSource(tmp_path / "one")) == repr(ShardSource(shard_folder))
    fewer = dataclasses.replace(one, shortest_side=33)
    write_index((str(folder),), tmp_path / "fewer", fewer, workers=0)
    assert repr(ShardSource(tmp_path / "fewer")) != repr(ShardSource(shard_folder))


def test_shards_are_opened_when_they_are_read_and_not_too_many_at_once(shard_folder, monkeypatch):
    monkeypatch.setattr(records, "OPEN_SHARDS", 2)
    source = ShardSource(shard_folder)
    assert len(source._records._readers) == 0
    expected = [ShardSource(shard_folder)[index] for index in range(5)]
    for index in [0, 4, 2, 1, 3, 0, 2]:
        np.testing.assert_array_equal(source[index], expected[index])
        assert len(source._records._readers) <= 2


def broken(copy, change):
    """What a ShardSource says of the copy after a change, as soon as it is opened or when all is read."""
    change()
    with pytest.raises(ValueError) as raised:
        source = ShardSource(copy)
        for index in range(len(source)):
            source[index]
    assert "\n" not in str(raised.value)
    return str(raised.value)


def edit_index(copy, **changes):
    index = json.loads((copy / "index.json").read_text())
    (copy / "index.json").write_text(json.dumps(index | changes))


def test_a_missing_or_cut_shard_is_named(copy):
    shard = copy / "shard-00001.array_record"
    whole = shard.read_bytes()
    message = broken(copy, lambda: shard.write_bytes(whole[:-100]))
    assert message == (
        f"{shard}: holds {len(whole) - 100} bytes instead of the {len(whole)} that index.json names"
    )
    assert broken(copy, shard.unlink) == f"{shard}: no such file, but index.json names it"


def test_a_shard_with_another_number_of_records_is_named(copy):
    index = json.loads((copy / "index.json").read_text())["shards"]
    index[0]["records"] += 1
    index[1]["records"] -= 1
    shard = copy / "shard-00000.array_record"
    assert re.fullmatch(
        rf"{re.escape(str(shard))}: holds (\d) records instead of the \d that its index names",
        broken(copy, lambda: edit_index(copy, shards=index)),
    )


def test_a_damaged_record_is_named(copy):
    shard = copy / "shard-00000.array_record"
    data = bytearray(shard.read_bytes())
    data[data.index(b"IDAT") + 500] ^= 255
    message = broken(copy, lambda: shard.write_bytes(data))
    assert message.startswith(f"{shard}: record 0 is damaged (")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda copy: (copy / "index.json").write_text("{"),
            "index.json: not the index of a folder of shards",
        ),
        (lambda copy: (copy / "index.json").write_text('{"format": 1}'), "index.json: not the index of"),
        (lambda copy: edit_index(copy, format=9), "index.json: of format 9, not 1"),
        (lambda copy: (copy / "sizes.npy").unlink(), "sizes.npy: cannot be read"),
        (
            lambda copy: np.save(copy / "sizes.npy", np.zeros((4, 2), np.int32)),
            r"sizes.npy: int32 \(4, 2\) instead",
        ),
    ],
)
def test_a_wrong_index_is_refused(copy, change, message):
    assert re.search(message, broken(copy, lambda: change(copy)))


# --------------------------------------------------------------------------------------------------
# TFDS
# --------------------------------------------------------------------------------------------------


def test_a_split_may_be_any_that_tfds_knows(tfds_place):
    assert len(TfdsSource("tfds:tiny")) == len(TfdsSource("tfds:tiny:train")) == 5
    assert len(TfdsSource("tfds:tiny:few")) == 2
    assert len(TfdsSource("tfds:tiny:1.0.0:train[:60%]")) == 3
    last = TfdsSource("tfds:tiny:train[3:]")
    np.testing.assert_array_equal(last[1], TfdsSource("tfds:tiny")[4])
    assert repr(TfdsSource("tfds:tiny")) == repr(TfdsSource("tfds:tiny:1.0.0:train"))
    assert len({repr(TfdsSource(f"tfds:tiny:{split}")) for split in ("train", "few", "train[3:]")}) == 3


def test_a_tfds_data_set_can_be_indexed(tfds_place, tmp_path):
    write_index(("tfds:tiny",), tmp_path / "out", EVERYTHING, workers=0)
    stored, source = ShardSource(tmp_path / "out"), TfdsSource("tfds:tiny")
    np.testing.assert_array_equal(stored.sizes, source.sizes)
    for index in range(5):
        np.testing.assert_array_equal(stored[index], source[index])
        assert stored.caption(index) == source.caption(index)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tfds:nothing_of_the_kind", "TFDS knows no such data set, and there is none in {place}"),
        ("tfds:tiny:2.0.0", "TFDS knows no such data set, and there is none in {place}"),
        ("tfds:tiny:test", "has no split 'test'; it has train, few"),
        ("tfds:tiny:train[:50%", "TFDS cannot open it (Error parsing split 'train[:50%'"),
        ("tfds:mnist", "not prepared in {place}: run tfds build mnist --file_format=array_record"),
    ],
)
def test_what_tfds_cannot_open_is_refused_in_one_sentence(tfds_place, spec, message):
    with pytest.raises(ValueError, match=re.escape(f"{spec}: {message.format(place=tfds_place)}")) as raised:
        TfdsSource(spec)
    assert "\n" not in str(raised.value)


def test_a_data_set_without_images_is_refused(tmp_path, monkeypatch):
    build_tfds(
        tmp_path,
        "Words",
        lambda: [{"text": "a"}, {"text": "b"}],
        {"text": tfds.features.Text()},
        file_format="array_record",
    )
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(ValueError, match=r"tfds:words: has no image among its features \(text\)"):
        TfdsSource("tfds:words")


def test_an_unreadable_image_of_a_data_set_is_left_out_and_named(tmp_path, monkeypatch):
    images = [encoded(picture(0)), b"no picture", encoded(picture(2))[:-2000], encoded(picture(3))]

    def examples():
        return [{"image": io.BytesIO(image), "number": number} for number, image in enumerate(images)]

    build_tfds(tmp_path, "Damaged", examples, IMAGE, file_format="array_record")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    source = TfdsSource("tfds:damaged")
    assert len(source) == 3
    (sentence,) = source.damaged
    assert re.fullmatch(r"tfds:damaged image \d: not an image that can be read", sentence)
    decoded, errors = [], []
    for index in range(3):
        try:
            decoded.append(source[index])
        except ValueError as error:
            errors.append(str(error))
    assert len(decoded) == 2
    assert len(errors) == 1 and re.match(r"tfds:damaged image \d: the image is damaged", errors[0])


def test_a_missing_tensorflow_datasets_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(
        ValueError, match=r"tfds:tiny: needs tensorflow-datasets: pip install zipir_jax\[tfds\]"
    ):
        open_sources(("tfds:tiny",))


def test_tfds_needs_no_tensorflow(tfds_place):
    code = (
        "import sys; from zipir_jax.data.tfds_source import TfdsSource; "
        "TfdsSource('tfds:tiny')[0]; print('tensorflow' in sys.modules, 'jax' in sys.modules)"
    )
    environment = os.environ | {"TFDS_DATA_DIR": str(tfds_place)}
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert printed.stdout.split() == ["False", "False"]
