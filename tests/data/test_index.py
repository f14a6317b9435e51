"""`prepare index`: what it drops and says of it, that it is exact at any number of processes, and after any kill."""

import csv
import dataclasses
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.data
from PIL import Image, ImageFilter

from zipir_jax import prepare
from zipir_jax.config import IndexConfig
from zipir_jax.data import index, scan
from zipir_jax.data.duplicates import close_pairs, near_duplicates
from zipir_jax.data.index import write_index
from zipir_jax.data.quality import perceptual_hash, sharpness
from zipir_jax.data.shards import ShardSource
from zipir_jax.data.sources import FolderSource

PHOTOGRAPHS = {
    name: np.asarray(Image.fromarray(getattr(skimage.data, name)()).convert("RGB"))
    for name in (
        "astronaut",
        "camera",
        "chelsea",
        "coffee",
        "grass",
        "gravel",
        "hubble_deep_field",
        "moon",
        "rocket",
    )
}
RULES = IndexConfig(shortest_side=200)  # chelsea is 300 pixels high


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def scaled(name, factor):
    image = Image.fromarray(PHOTOGRAPHS[name])
    return image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.LANCZOS)


def write(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def build(folder, output, rules=RULES, workers=0):
    return write_index((str(folder),), output, rules, workers)


def dropped(output):
    """{image: (rule, measured, duplicate of)}"""
    with (output / "dropped.csv").open(encoding="utf-8", newline="") as file:
        return {
            row["image"]: (row["rule"], row["measured"], row["duplicate of"]) for row in csv.DictReader(file)
        }


def contents(output):
    return {path.name: path.read_bytes() for path in output.iterdir()}


def kept(output):
    source = ShardSource(output)
    return [source.image_name(i) for i in range(len(source))]


# --------------------------------------------------------------------------------------------------
# Rules
# --------------------------------------------------------------------------------------------------


def test_photographs_are_kept_with_their_bytes_names_and_captions(tmp_path):
    files = {f"deeper/{name}.png": encoded(image) for name, image in PHOTOGRAPHS.items()}
    folder = write(tmp_path / "in", files)
    (folder / "deeper" / "coffee.txt").write_text("a cup of coffee")
    (folder / "deeper" / "camera.json").write_text('{"caption": "a man with a camera"}')
    (folder / "deeper" / "rocket.json").write_text('{"caption": ')
    report = build(folder, tmp_path / "out")
    assert report.startswith(f"9 images of {folder}\n       9 kept: ") and "1 shard\n" in report
    assert report.count("       0 dropped: ") == 8
    assert "1 captions cannot be read, the first: " in report and "rocket.json" in report
    assert (tmp_path / "out" / "report.txt").read_text() == report
    assert dropped(tmp_path / "out") == {}
    source, original = ShardSource(tmp_path / "out"), FolderSource(folder)
    np.testing.assert_array_equal(source.sizes, original.sizes)
    captions = {"deeper/coffee.png": "a cup of coffee", "deeper/camera.png": "a man with a camera"}
    for number, name in enumerate(sorted(files)):
        assert source.image_name(number) == name and source.encoded(number) == files[name]
        assert source.caption(number) == original.caption(number) == captions.get(name, "")
        np.testing.assert_array_equal(source[number], original[number])


def test_each_rule_drops_what_it_is_for_and_says_why(tmp_path):
    astronaut = Image.fromarray(PHOTOGRAPHS["astronaut"])
    coffee = encoded(PHOTOGRAPHS["coffee"], "JPEG", quality=90)
    hazy = np.clip(PHOTOGRAPHS["grass"] * 0.02 + 90, 0, 255).astype(np.uint8)
    folder = write(
        tmp_path / "in",
        {
            "good.jpg": coffee,
            "text.jpg": b"no picture",
            "truncated.jpg": coffee[: len(coffee) // 2],
            "empty.png": b"",
            "low.png": encoded(PHOTOGRAPHS["coffee"][:199, :400]),
            "long.png": encoded(np.tile(PHOTOGRAPHS["gravel"][:201], (1, 2, 1))),
            "flat.png": encoded(hazy),
            "blurred.png": encoded(astronaut.filter(ImageFilter.GaussianBlur(2))),
            "enlarged.png": encoded(scaled("chelsea", 1 / 3).resize((900, 600), Image.Resampling.BICUBIC)),
            "compressed.jpg": encoded(astronaut, "JPEG", quality=10),
            "strip.png": encoded(np.zeros((1, 70_000, 3), np.uint8)),
            "dot.png": encoded(np.zeros((1, 1, 3), np.uint8)),
            "z copy.jpg": coffee,
        },
    )
    report = build(folder, tmp_path / "out")
    assert kept(tmp_path / "out") == ["good.jpg"]
    found = dropped(tmp_path / "out")
    assert {name: rule for name, (rule, _, _) in found.items()} == {
        "text.jpg": "undecodable",
        "truncated.jpg": "undecodable",
        "empty.png": "undecodable",
        "low.png": "short side too short",
        "strip.png": "short side too short",
        "dot.png": "short side too short",
        "long.png": "too elongated",
        "flat.png": "too little contrast",
        "blurred.png": "too blurred",
        "enlarged.png": "too blurred",
        "compressed.jpg": "too strongly compressed",
        "z copy.jpg": "exact duplicate",
    }
    assert found["text.jpg"][1] == "text.jpg: not an image that can be read"
    assert found["low.png"][1] == "199"
    assert found["long.png"][1] == f"{1024 / 201:.4g}"
    assert found["z copy.jpg"][1:] == ("0", "good.jpg")
    assert 0.3 < float(found["blurred.png"][1]) < 0.87
    assert 0.3 < float(found["compressed.jpg"][1]) < 0.75
    for line in (
        "13 images",
        "1 kept",
        "3 dropped: undecodable",
        "2 dropped: too blurred (limit: at least 0.87)",
    ):
        assert line in report


def test_every_rule_can_be_switched_off(tmp_path):
    test_each_rule_drops_what_it_is_for_and_says_why(tmp_path)
    everything = IndexConfig(
        shortest_side=1,
        longest_aspect=float("inf"),
        contrast=0.0,
        sharpness=0.0,
        compression=0.0,
        exact_duplicates=False,
        near_duplicate_bits=-1,
    )
    build(tmp_path / "in", tmp_path / "out", everything)
    assert len(kept(tmp_path / "out")) == 10 and len(dropped(tmp_path / "out")) == 3


def test_sharpness_falls_with_blur_and_not_with_contrast_or_size():
    def measured(image):
        return sharpness(cv2.cvtColor(np.asarray(image), cv2.COLOR_RGB2GRAY).astype(np.float32))

    for name in ("astronaut", "coffee", "gravel"):
        image = Image.fromarray(PHOTOGRAPHS[name])
        values = [measured(image)] + [
            measured(image.filter(ImageFilter.GaussianBlur(s))) for s in (0.7, 1, 2)
        ]
        assert values == sorted(values, reverse=True) and values[0] > 1 and values[-1] < 0.87
        luma = cv2.cvtColor(PHOTOGRAPHS[name], cv2.COLOR_RGB2GRAY).astype(np.float32)
        assert sharpness(luma / 2) == pytest.approx(sharpness(luma), rel=0.06)
    large = Image.fromarray(
        np.tile(PHOTOGRAPHS["grass"], (4, 4, 1))
    )  # 2048 pixels: looked at from further off
    assert measured(large.filter(ImageFilter.GaussianBlur(1))) > measured(
        Image.fromarray(PHOTOGRAPHS["grass"]).filter(ImageFilter.GaussianBlur(1))
    )


# --------------------------------------------------------------------------------------------------
# Near duplicates
# --------------------------------------------------------------------------------------------------


def test_resized_and_recompressed_copies_go_and_the_largest_stays(tmp_path):
    copies = {}
    for name, image in PHOTOGRAPHS.items():
        copies |= {
            f"{name}/a half.png": encoded(scaled(name, 0.5 if min(image.shape[:2]) > 400 else 0.8)),
            f"{name}/b recompressed.jpg": encoded(image, "JPEG", quality=60),
            f"{name}/c large.png": encoded(image),
            f"{name}/d nine tenths.webp": encoded(scaled(name, 0.9), "WEBP", quality=85),
        }
    folder = write(tmp_path / "in", copies)
    build(folder, tmp_path / "out", dataclasses.replace(RULES, sharpness=0.0, compression=0.0))
    assert kept(tmp_path / "out") == [f"{name}/c large.png" for name in sorted(PHOTOGRAPHS)]
    for name, (rule, measured, of) in dropped(tmp_path / "out").items():
        assert rule == "near duplicate" and int(measured) <= 12
        assert of == f"{name.partition('/')[0]}/c large.png"


def test_different_photographs_are_far_apart():
    hashes = [
        np.frombuffer(bytes.fromhex(perceptual_hash(image)), np.uint64) for image in PHOTOGRAPHS.values()
    ]
    for one, other in itertools.combinations(hashes, 2):
        assert np.bitwise_count(one ^ other).sum() > 60


def random_hashes(rng, unrelated, families, members, flips):
    """Unrelated hashes, and families around a hash of which each member differs from it in up to `flips` bits."""
    bits = rng.integers(0, 2, (unrelated, 256), dtype=np.uint8)
    for _ in range(families):
        centre = rng.integers(0, 2, 256, dtype=np.uint8)
        for _ in range(members):
            member = centre.copy()
            member[rng.choice(256, rng.integers(flips + 1), replace=False)] ^= 1
            bits = np.concatenate([bits, member[None]])
    return np.packbits(rng.permutation(bits), axis=1).view(np.uint64)


def distances(hashes):
    return np.bitwise_count(hashes[:, None] ^ hashes).sum(axis=2, dtype=np.int64)


@pytest.mark.parametrize("limit", [0, 1, 5, 12, 40])
def test_bands_find_every_pair(limit):
    hashes = random_hashes(np.random.default_rng(limit), 200, 30, 5, max(limit, 2))
    first, second, apart = close_pairs(hashes, limit)
    apart_all = distances(hashes)
    expected = np.argwhere(np.triu(apart_all <= limit, 1))
    np.testing.assert_array_equal(np.stack([first, second], axis=1), expected)
    np.testing.assert_array_equal(apart, apart_all[first, second])
    assert len(expected) > 5


@pytest.mark.parametrize("limit", [0, 4, 12])
def test_what_is_kept_is_far_apart_and_what_is_dropped_is_close_to_something_better(limit):
    rng = np.random.default_rng(limit)
    hashes = random_hashes(rng, 100, 40, 6, 10)
    rank = rng.permutation(len(hashes))
    of, apart = near_duplicates(hashes, rank, limit)
    everywhere = distances(hashes)
    stays = np.flatnonzero(of < 0)
    assert (everywhere[np.ix_(stays, stays)] + 999 * np.eye(len(stays)) > limit).all()
    goes = np.flatnonzero(of >= 0)
    assert len(goes) > 5
    for image in goes:
        assert of[of[image]] < 0 and rank[of[image]] < rank[image]
        assert apart[image] == everywhere[image, of[image]] <= limit
        better = stays[rank[stays] < rank[image]]
        assert apart[image] == everywhere[image, better].min()


def test_pairs_are_found_without_comparing_all(monkeypatch):
    hashes = np.random.default_rng(0).integers(0, 2**64, (50_000, 4), dtype=np.uint64)
    hashes[7] = hashes[40_000] ^ np.uint64(3)
    compared, count = [0], np.bitwise_count
    monkeypatch.setattr(np, "bitwise_count", lambda x: (compared.append(len(x)), count(x))[1])
    first, second, apart = close_pairs(hashes, 12)
    assert (first.tolist(), second.tolist(), apart.tolist()) == ([7], [40_000], [8])
    assert sum(compared) < 50_000 * 25  # all pairs: 25 000 for each image


def test_a_copy_of_what_is_dropped_is_a_duplicate_of_what_is_kept(tmp_path):
    small, large = encoded(scaled("coffee", 0.7)), encoded(PHOTOGRAPHS["coffee"])
    folder = write(tmp_path / "in", {"a.png": small, "b.png": small, "c.png": large})
    build(folder, tmp_path / "out", dataclasses.replace(RULES, sharpness=0.0))
    found = dropped(tmp_path / "out")
    assert kept(tmp_path / "out") == ["c.png"]
    assert found["a.png"] == found["b.png"] == ("near duplicate", found["a.png"][1], "c.png")


# --------------------------------------------------------------------------------------------------
# Going on after a kill, at any number of processes
# --------------------------------------------------------------------------------------------------

SMALL = dataclasses.replace(RULES, shortest_side=90, sharpness=0.5, shard_mib=0.1)
OTHER = dataclasses.replace(SMALL, exact_duplicates=False, near_duplicate_bits=-1, shard_mib=0.2)


@pytest.fixture(name="many", scope="module")
def make_many(tmp_path_factory):
    """33 small pictures, of which some are dropped, for more than 5 shards."""
    folder = tmp_path_factory.mktemp("many")
    for name, image in PHOTOGRAPHS.items():
        for part in range(4):
            row, column = divmod(part, 2)
            crop = image[40 + 120 * row :, 30 + 140 * column :][:110, :130]
            (folder / f"{name} {part}.png").write_bytes(encoded(crop))
    (folder / "astronaut 4.png").write_bytes(b"no picture")
    (folder / "moon 4.png").write_bytes((folder / "moon 1.png").read_bytes())
    (folder / "coffee 0.txt").write_text("crème")
    return folder


@pytest.fixture(name="expected", scope="module")
def make_expected(many, tmp_path_factory):
    output = tmp_path_factory.mktemp("expected") / "out"
    build(many, output, SMALL)
    found = contents(output)
    assert len([name for name in found if name.startswith("shard")]) > 5
    assert len(dropped(output)) >= 2
    return found


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_processes_changes_nothing(many, expected, tmp_path, workers):
    build(many, tmp_path / "out", SMALL, workers)
    assert contents(tmp_path / "out") == expected


# Kills itself at the n-th call of a function.
KILLED = """
import os, signal, sys
from pathlib import Path
from zipir_jax.config import IndexConfig
from zipir_jax.data import index, scan
from zipir_jax import files
folder, output, where, count, rules = sys.argv[1:]
owner, name = {
    "measure": (scan, "measure"),
    "write": (index.ShardWriter, "write"),
    "rename": (Path, "rename"),
    "unlink": (Path, "unlink"),
    "replace": (os, "replace"),
    "fsync": (os, "fsync"),
}[where]
calls, original = [], getattr(owner, name)
def killing(*args, **kwargs):
    calls.append(0)
    if len(calls) == int(count):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)
setattr(owner, name, killing)
index.write_index((folder,), Path(output), IndexConfig(**eval(rules)), 0)
"""


def killed(folder, output, where, count, rules=SMALL):
    arguments = [folder, output, where, count, dataclasses.asdict(rules)]
    command = [sys.executable, "-c", KILLED, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


@pytest.mark.parametrize(
    ("where", "count"),
    [
        ("replace", 1),  # before the scan has its first line
        ("measure", 1),
        ("measure", 21),  # within a chunk
        ("fsync", 2),  # the scan is whole
        ("write", 3),  # within a shard
        ("rename", 3),  # between shards
        ("replace", 3),  # before dropped.csv
        ("replace", 5),  # before the sizes
        ("replace", 6),  # before the index
    ],
)
def test_a_run_goes_on_after_a_kill_and_ends_alike(many, expected, tmp_path, where, count):
    output = tmp_path / "out"
    killed(many, output, where, count)
    assert not (output / "index.json").exists()
    before = {path: path.stat().st_mtime_ns for path in output.glob("shard-*")}
    build(many, output, SMALL)
    assert contents(output) == expected
    assert {path: path.stat().st_mtime_ns for path in before} == before  # finished shards are left alone


def test_killed_again_and_again(many, expected, tmp_path):
    output = tmp_path / "out"
    for where, count in [("measure", 9), ("measure", 10), ("rename", 2), ("rename", 2), ("replace", 2)]:
        killed(many, output, where, count)
    build(many, output, SMALL)
    assert contents(output) == expected


def test_a_torn_line_of_the_scan_is_dropped(many, expected, tmp_path, monkeypatch):
    whole = expected["scan.jsonl"]
    lines = whole.splitlines(keepends=True)
    cuts = [len(b"".join(lines[:12])) + extra for extra in (0, 1, len(lines[12]) // 2, len(lines[12]) - 1)]
    measured, original = [], scan.measure
    monkeypatch.setattr(scan, "measure", lambda *args: (measured.append(args[1]), original(*args))[1])
    for number, cut in enumerate(cuts):
        output = tmp_path / str(number)
        write(output, {"scan.jsonl": whole[:cut]})
        measured.clear()
        build(many, output, SMALL)
        assert measured == list(range(11, 38))  # a line for the collection, and 11 images
        assert contents(output) == expected
    # A lost block within, as after a power failure: what follows is scanned again.
    damaged = whole[: cuts[2]] + bytes(4096) + whole[cuts[2] + 4096 :]
    write(tmp_path / "block", {"scan.jsonl": damaged})
    build(many, tmp_path / "block", SMALL)
    assert contents(tmp_path / "block") == expected


def workers_of(process):
    """Process ids of the workers that a process has started."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [child for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def alive(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(name="running")
def start_long_run(tmp_path):
    """A run by two workers that has scanned some of its images and would take many seconds more."""
    folder = write(tmp_path / "in", {"0.png": encoded(PHOTOGRAPHS["hubble_deep_field"])})
    for number in range(1, 500):
        (folder / f"{number}.png").hardlink_to(folder / "0.png")
    output = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "zipir_jax.prepare",
        "index",
        "--input",
        str(folder),
        "--output",
        str(output),
    ]
    run = subprocess.Popen(
        [*command, "--workers", "2"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not (output / "scan.jsonl").exists() or (output / "scan.jsonl").read_bytes().count(b"\n") < 3:
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    yield run
    run.kill()
    run.communicate()


def test_the_workers_of_a_killed_run_end_with_it(running):
    workers = workers_of(running.pid)
    assert len(workers) == 2
    running.kill()
    running.wait()
    deadline = time.monotonic() + 60
    while any(map(alive, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_run_whose_worker_is_killed_says_so(running):
    os.kill(int(workers_of(running.pid)[0]), signal.SIGKILL)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 2
    assert err.strip().splitlines()[-1] == (
        "error: one of 2 processes was killed, perhaps for want of memory; run again, with fewer workers"
    )


# --------------------------------------------------------------------------------------------------
# Running again
# --------------------------------------------------------------------------------------------------


def forbid(monkeypatch, *names):
    """Fail where the indexing calls one of these functions."""

    def fail(*args):
        raise AssertionError("called")

    for name in names:
        monkeypatch.setattr(scan if name == "measure" else index, name, fail)


@pytest.fixture(name="finished")
def copy_of_finished(expected, tmp_path):
    return write(tmp_path / "finished", expected)


def test_a_finished_index_is_left_alone(many, expected, finished, monkeypatch):
    forbid(monkeypatch, "measure", "_write_shard")
    before = {path: path.stat().st_mtime_ns for path in finished.iterdir() if path.name != "scan.jsonl"}
    report = build(many, finished, SMALL)
    assert report == expected["report.txt"].decode()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert contents(finished) == expected


def test_other_rules_use_the_scan_and_write_the_shards_anew(many, expected, finished, monkeypatch, tmp_path):
    other = dataclasses.replace(OTHER, contrast=0.0, sharpness=0.0, compression=0.0)
    build(many, tmp_path / "fresh", other)
    forbid(monkeypatch, "measure")
    build(many, finished, other)
    assert contents(finished) == contents(tmp_path / "fresh")
    assert len(kept(finished)) == 37 > json.loads(expected["index.json"])["images"]
    build(many, finished, SMALL)
    assert contents(finished) == expected


def test_other_rules_that_change_nothing_keep_the_shards(many, finished, monkeypatch):
    forbid(monkeypatch, "_write_shard")
    build(many, finished, dataclasses.replace(SMALL, shortest_side=91))
    assert json.loads((finished / "index.json").read_text())["rules"]["shortest_side"] == 91


def test_a_kill_while_old_shards_are_deleted_leaves_no_index_of_them(many, finished, tmp_path):
    killed(many, finished, "unlink", 4, OTHER)
    with pytest.raises(ValueError, match=r"index\.json: cannot be read"):
        ShardSource(finished)
    build(many, tmp_path / "fresh", OTHER)
    build(many, finished, OTHER)
    assert contents(finished) == contents(tmp_path / "fresh")


def test_a_lost_shard_is_written_again(many, expected, finished):
    (finished / "shard-00002.array_record").unlink()
    build(many, finished, SMALL)
    assert contents(finished) == expected


def test_shards_and_several_folders_can_be_indexed(many, expected, finished, tmp_path):
    folder = write(tmp_path / "more", {"coffee 0.png": encoded(scaled("coffee", 0.5))})
    output = tmp_path / "out"
    write_index((str(finished), str(folder)), output, SMALL, 0)
    first, second = ShardSource(finished), ShardSource(output)
    assert len(second) == len(first) + 1
    for number in (0, 7, len(first) - 1):
        assert second.encoded(number) == first.encoded(number)
        assert second.caption(number) == first.caption(number)
        assert second.image_name(number) == f"{finished}: {first.image_name(number)}"
    assert "crème" in [second.caption(number) for number in range(len(second))]
    with pytest.raises(ValueError, match="holds the scan of other images"):
        build(finished, output, SMALL)


# --------------------------------------------------------------------------------------------------
# Refusals
# --------------------------------------------------------------------------------------------------


def index_command(call, *arguments):
    return call(prepare.main, "index", "--workers", 0, *arguments)


def test_the_command_prints_the_report(many, expected, call, tmp_path):
    rules = ["--rules.shortest-side", 90, "--rules.sharpness", 0.5, "--rules.shard-mib", 0.1]
    status, printed, err = index_command(call, "--input", many, "--output", tmp_path / "out", *rules)
    assert status == 0 and printed == expected["report.txt"].decode()
    assert "scan: 100%" in err and "write: 100%" in err
    assert contents(tmp_path / "out") == expected


def refused(call, output, *arguments):
    """The sentence, and that nothing in the output has changed."""
    before = contents(output) if output.is_dir() else None
    status, printed, err = index_command(call, "--output", output, *arguments)
    assert status == 2 and printed == ""
    assert (contents(output) if output.is_dir() else None) == before
    return err.strip().splitlines()[-1]


def test_an_output_that_holds_something_else_is_refused(call, many, tmp_path, finished):
    other = write(tmp_path / "other", {"thesis.txt": b"years of work"})
    assert refused(call, other, "--input", many) == (
        f"error: {other}: holds thesis.txt, which no indexing left there; choose another output"
    )
    assert "holds thesis.txt" in refused(call, write(finished, {"thesis.txt": b""}), "--input", many)
    (finished / "thesis.txt").unlink()
    (finished / "scan.jsonl").write_text("3\n")
    assert refused(call, finished, "--input", many) == (
        f"error: {finished}: scan.jsonl: not the scan of a collection; choose another output".replace(
            ": scan", "/scan"
        )
    )


def test_the_output_of_other_images_is_refused(call, many, tmp_path, finished):
    changed = tmp_path / "changed"
    shutil.copytree(many, changed)
    (changed / "coffee 0.png").write_bytes(encoded(PHOTOGRAPHS["coffee"]))
    sentence = refused(call, finished, "--input", changed, "--rules.shortest-side", 90)
    assert sentence.startswith(f"error: {finished}: holds the scan of other images (38 files, ")
    assert sentence.endswith("choose another output, or delete it")


def test_an_image_that_changes_between_scan_and_shards_is_named(many, tmp_path):
    folder, output = tmp_path / "in", tmp_path / "out"
    shutil.copytree(many, folder)
    killed(folder, output, "fsync", 2)  # the scan is whole
    data = bytearray((folder / "coffee 0.png").read_bytes())
    data[-20] ^= 1  # as many bytes as before
    (folder / "coffee 0.png").write_bytes(data)
    with pytest.raises(
        ValueError, match=r"coffee 0\.png: has changed since it was scanned; delete .*out and"
    ):
        build(folder, output, SMALL)


def test_two_runs_do_not_write_into_one_folder(many, tmp_path, call):
    output = tmp_path / "out"
    with index._locked(output):
        assert refused(call, output, "--input", many) == f"error: {output}: another run is writing there"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "nowhere"], "nowhere: no such folder"),
        (
            ["--input", "synthetic:3:64"],
            "synthetic:3:64: synthetic images are no files; there is nothing to index",
        ),
        (["--input", "tfds:"], "tfds:: not of the form tfds:NAME"),
        (["--input", "{empty}"], "{empty}: no image"),
        (["--input", "{many}", "--rules.shortest-side", "0"], "shortest_side 0 is not at least 1"),
        (
            ["--input", "{many}", "--rules.near-duplicate-bits", "64"],
            "near_duplicate_bits 64 does not lie within -1 to",
        ),
        (["--input", "{many}", "--workers", "-1"], "workers is -1; it must be at least 0"),
        (
            ["--input", "{many}", "--rules.shortest-side", "5000"],
            "the rules drop all 38 images; see dropped.csv there",
        ),
    ],
)
def test_what_cannot_be_indexed_is_refused_in_one_line(call, many, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    places = {"many": many, "empty": tmp_path / "empty"}
    arguments = [argument.format(**places) for argument in arguments]
    status, printed, err = call(
        prepare.main, "index", "--output", tmp_path / "out", "--workers", 0, *arguments
    )
    assert status == 2 and printed == ""
    assert err.strip().splitlines()[-1].startswith("error: ")
    assert message.format(**places) in err
    assert not (tmp_path / "out" / "index.json").exists()


def test_names_that_are_no_text_are_kept_readable(tmp_path):
    folder = write(tmp_path / "in", {"good.png": encoded(PHOTOGRAPHS["coffee"])})
    (folder / os.fsdecode(b"caf\xe9.png")).write_bytes(encoded(PHOTOGRAPHS["rocket"]))
    build(folder, tmp_path / "out")
    assert kept(tmp_path / "out") == ["caf\\xe9.png", "good.png"]
