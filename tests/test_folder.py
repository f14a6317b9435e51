"""The queue, with a restorer that only enlarges: nothing is compiled."""

import dataclasses
import errno
import functools
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import skimage.data
from PIL import Image

from tests import folder_of_200
from zipir_jax import comparison, folder, provenance, sample
from zipir_jax.config import RestorationConfig, SamplingConfig, TargetConfig
from zipir_jax.files import DiskFullError, replacing
from zipir_jax.imageio import resize, to_float
from zipir_jax.jobs import check_outputs, plan_jobs
from zipir_jax.photograph import OUTPUT_FORMATS, read_photograph, write_image
from zipir_jax.restorer import PHASES, Restorer
from zipir_jax.summary import check_summary, summarize, summary_lines, write_summary

PICTURE = skimage.data.astronaut()[100:108, 200:210]
SECONDS = 30  # after which a test gives up waiting


class Enlarger:
    """In the place of a Restorer; remembers what it was asked for."""

    config = SimpleNamespace(dit=SimpleNamespace(attention="xla"))

    def __init__(self, during=lambda number: None):
        self.restored, self.during = [], during

    def plan(self, shape, **options):
        return SimpleNamespace(lines=lambda: [f"{shape}"])

    def restore(self, image, *, size, seed, progress, **options):
        self.restored.append(image.shape)
        for phase in PHASES:
            progress(phase, 0.0)
            self.during(len(self.restored))
            progress(phase, 1.0)
        return np.clip(resize(image, *size) + seed / 1000, -1, 1)


def plan(place, restorer=None, samples=1, file_format="png", **fields):
    """(run, jobs) for the folder "in" and the output folder "out" of a place."""
    source, output = place / "in", place / "out"
    jobs, _, _ = plan_jobs(source, output, file_format, samples, fields.get("compare"))
    run = folder.Run(
        restorer=restorer or Enlarger(),
        weights={"name": "none", "sha256": "0" * 64},
        target=TargetConfig(scale=2.0),
        restoration=RestorationConfig(),
        seed=0,
        memory=None,
        compare=None,
        prompts=dict.fromkeys(job.source for job in jobs),
        embeddings={},
        locks=output / folder.LOCKS,
    )
    return dataclasses.replace(run, **fields), jobs


@pytest.fixture
def work(tmp_path):
    """`plan` in this test's own folder."""
    return functools.partial(plan, tmp_path)


@pytest.fixture
def restore(work):
    """`restore(**fields)`: what `restore_all` counts."""

    def restore(*arguments, **fields):
        run, jobs = work(**fields)
        return folder.restore_all(run, jobs, [], *arguments)

    return restore


@pytest.fixture
def stopped():
    """A list that ends a run which would wait for ever."""
    stopped = []
    timer = threading.Timer(SECONDS, stopped.append, [1])
    timer.start()
    yield stopped
    timer.cancel()


@pytest.fixture
def photographs(tmp_path):
    """Five pictures, two of them in subfolders; all differ."""
    names = ["a.png", "b.jpg", "c.webp", "deep/a.png", "deep/er/a.png"]
    for index, name in enumerate(names):
        write_image(tmp_path / "in" / name, np.roll(PICTURE, index, 1))
    return [tmp_path / "in" / name for name in names]


def results(output):
    """The names of the results below a folder."""
    files = [path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()]
    return sorted(name for name in files if not name.endswith(".json"))


def inodes(output):
    return {name: (output / name).stat().st_ino for name in results(output)}


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


# --------------------------------------------------------------------------------------------------
# What is to be made
# --------------------------------------------------------------------------------------------------


def outputs(*arguments, **options):
    jobs, ignored, unreadable = plan_jobs(*arguments, **options)
    assert unreadable == []
    return {job.name: [path.name for path in job.outputs] for job in jobs}, ignored


def test_the_tree_is_mirrored(tmp_path):
    source, output = tmp_path / "in", tmp_path / "out"
    names = ["a.jpg", "a.png", "b.tif", "x/a.jpg", "x/y.z/B.JPG", "z.png", "notes.txt", "x/a.json"]
    hidden = [".DS_Store", "._b.tif", ".b.tif.0123abcd", ".cache/c.png", "x/.hidden.png"]
    touch(*(source / name for name in names + hidden))
    jobs, ignored, _ = plan_jobs(source, output, "webp")
    assert ignored == 2
    made = {job.name: job.outputs[0].relative_to(output).as_posix() for job in jobs}
    assert made == {
        "a.jpg": "a.jpg.webp",
        "a.png": "a.png.webp",
        "b.tif": "b.webp",
        "x/a.jpg": "x/a.webp",
        "x/y.z/B.JPG": "x/y.z/B.webp",
        "z.png": "z.webp",
    }


def test_a_result_is_never_called_like_a_folder_of_results(tmp_path):
    touch(tmp_path / "in" / "a.jpg", tmp_path / "in" / "a.png" / "b.jpg")
    assert outputs(tmp_path / "in", tmp_path / "out", "png")[0] == {
        "a.jpg": ["a.jpg.png"],
        "a.png/b.jpg": ["b.png"],
    }


@pytest.mark.parametrize("place", ["in/out", "in/deep/.out", "in", "."])
def test_results_are_no_photographs(photographs, restore, work, tmp_path, monkeypatch, place):
    """Wherever the output folder lies: inside the input, the same, or around it."""
    place = tmp_path / place
    planned = plan_jobs
    monkeypatch.setitem(globals(), "plan_jobs", lambda source, output, *more: planned(source, place, *more))
    counts = restore(file_format="tif", compare="side-by-side", skip_existing=True)
    assert counts["restored"] == 5
    again = restore(file_format="tif", compare="side-by-side", skip_existing=True)
    assert (again["restored"], again["kept"], again["failed"]) == (0, 5, [])
    _, jobs = work()
    assert [job.source for job in jobs] == sorted(photographs)


def test_links_are_followed_but_not_in_circles(tmp_path):
    touch(tmp_path / "in" / "a.png", tmp_path / "elsewhere" / "b.png")
    (tmp_path / "in" / "other").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "self.png").symlink_to("self.png")
    made, _ = outputs(tmp_path / "in", tmp_path / "out", "png")
    assert sorted(made) == ["a.png", "other/b.png", "self.png"]


def test_the_same_format_where_it_can_be_written(tmp_path):
    touch(*(tmp_path / "in" / name for name in ("a.jpg", "b.JPEG", "c.bmp", "d.tif")))
    made, _ = outputs(tmp_path / "in", tmp_path / "out", "same")
    assert made == {"a.jpg": ["a.jpg"], "b.JPEG": ["b.JPEG"], "c.bmp": ["c.png"], "d.tif": ["d.tif"]}


def test_a_format_that_cannot_be_written_here_is_refused(tmp_path, monkeypatch):
    monkeypatch.delitem(OUTPUT_FORMATS, ".heic")
    touch(tmp_path / "in" / "a.png")
    for source in (tmp_path / "in", tmp_path / "in" / "a.png"):
        with pytest.raises(ValueError, match=r"a\.heic: .* pillow-heif, which is not installed"):
            plan_jobs(source, tmp_path / "out", "heic")


def test_the_format_of_an_output_file_follows_from_its_name(tmp_path):
    touch(tmp_path / "a.png")
    for output, expected in [("b.webp", "b.webp"), ("new", "new/a.jpg")]:
        ((job,), _, _) = plan_jobs(tmp_path / "a.png", tmp_path / output, "jpg")
        assert job.outputs == (tmp_path / expected,)


def test_names_of_samples_and_comparisons(tmp_path):
    touch(tmp_path / "in" / "a.png")
    (job,), _, _ = plan_jobs(tmp_path / "in", tmp_path / "out", "jpg", 2, "side-by-side")
    assert [path.name for path in job.outputs] == ["a_1.jpg", "a_2.jpg"]
    assert [path.name for path in job.comparisons] == ["a_1_compare.jpg", "a_2_compare.jpg"]
    touch(tmp_path / "in" / "a_compare.png")
    jobs, _, _ = plan_jobs(tmp_path / "in", tmp_path / "out", "jpg", 1, "side-by-side")
    with pytest.raises(ValueError, match=r"a_compare\.jpg: would be two results at once"):
        check_outputs(jobs, may_exist=True)


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    touch(tmp_path / "in" / "a.png", tmp_path / "in" / "locked" / "b.png")
    scandir = os.scandir

    def refuse(path):
        if os.path.basename(path) == "locked":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    jobs, _, unreadable = plan_jobs(tmp_path / "in", tmp_path / "out", "png")
    assert len(jobs) == 1
    assert unreadable == [f"{tmp_path / 'in' / 'locked'}: cannot be read (Permission denied)"]


# --------------------------------------------------------------------------------------------------
# Records and results
# --------------------------------------------------------------------------------------------------


def test_a_record_tells_what_made_a_result(photographs, restore, tmp_path):
    restoration = RestorationConfig(SamplingConfig(steps=3, guidance_interval=(0.1, 0.9)), "lab")
    restore(restoration=restoration, seed=7, memory=123, target=TargetConfig(long_side=20))
    output = tmp_path / "out" / "deep" / "a.png"
    found = provenance.read_record(output)
    source = photographs[3]
    assert found["input"] | {"format": ""} == {
        "name": "deep/a.png",
        "sha256": provenance.file_digest(source),
        "bytes": source.stat().st_size,
        "mtime_ns": source.stat().st_mtime_ns,
        "width": 10,
        "height": 8,
        "bits": 8,
        "format": "",
    }
    assert found["output"] == {
        "name": "a.png",
        "sha256": provenance.file_digest(output),
        "bytes": output.stat().st_size,
        "width": 20,
        "height": 16,
        "bits": 8,
    }
    settings = found["settings"]
    assert (settings["sampling"]["steps"], settings["colour_correction"], settings["seed"]) == (3, "lab", 7)
    assert settings["target"] == {"long_side": 20} and settings["memory"] == 123
    assert found["versions"].keys() >= {"zipir_jax", "jax", "flax", "python"}
    assert list(found["seconds"]) == ["read", "encode", "denoise", "decode", "write"]
    assert min(found["seconds"].values()) >= 0 and found["not_kept"] == []
    assert str(tmp_path) not in json.dumps(found)


class KilledError(BaseException):
    """What nothing handles, as nothing handles SIGKILL."""


@pytest.mark.parametrize("flags", [{"overwrite": True}, {"skip_existing": True}], ids=str)
@pytest.mark.parametrize("moment", range(1, 7))
def test_a_result_never_stands_beside_the_record_of_another(
    photographs, restore, tmp_path, monkeypatch, moment, flags
):
    """A run that overwrites is killed as it puts one of its files in place: three of each picture."""
    output, replace, calls = tmp_path / "out", os.replace, []
    restore(compare="slider")

    def replace_until_killed(*arguments):
        calls.append(arguments)
        if len(calls) >= moment:
            raise KilledError
        replace(*arguments)

    monkeypatch.setattr(os, "replace", replace_until_killed)
    with pytest.raises(KilledError):
        restore(compare="slider", seed=1, overwrite=True)
    monkeypatch.setattr(os, "replace", replace)

    def seeds():
        pictures = [output / name for name in results(output) if name.endswith(".png")]
        records = [provenance.read_record(path) for path in pictures]
        made = [record["output"]["sha256"] for record in records]
        assert made == [provenance.file_digest(path) for path in pictures]
        return Counter(record["settings"]["seed"] for record in records)

    whole = (moment - 1) // 3
    assert seeds() == Counter({1: whole, 0: 4 - whole})  # that of the picture in work is gone
    counts = restore(compare="slider", seed=1, **flags)
    if "overwrite" in flags:
        assert (counts["restored"], counts["kept"], seeds()) == (5 - whole, whole, {1: 5})
    else:  # those of the settings before are named
        assert (counts["restored"], counts["kept"], len(counts["failed"])) == (1, whole, 4 - whole)
        assert seeds() == Counter({1: whole + 1, 0: 4 - whole})


def test_a_disk_that_fills_up_leaves_the_result_and_the_record_of_before(
    photographs, restore, tmp_path, monkeypatch
):
    restore()
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}

    def full_at_the_record(path):
        if path.suffix == ".json":
            raise DiskFullError("no space for the record")
        return replacing(path)

    replacing = folder.replacing
    monkeypatch.setattr(folder, "replacing", full_at_the_record)
    assert str(restore(seed=1, overwrite=True)["error"]) == "no space for the record"
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


def test_what_a_result_cannot_keep_is_told(tmp_path, restore, work):
    see_through = Image.fromarray(PICTURE).convert("RGBA")
    see_through.putalpha(100)
    (tmp_path / "in").mkdir()
    see_through.save(tmp_path / "in" / "a.png")
    write_image(tmp_path / "in" / "b.png", PICTURE)
    run, jobs = work(file_format="jpg")
    counts = folder.restore_all(run, jobs, [])
    reason = "transparency: JPEG files have none, and the picture is put on white"
    assert provenance.read_record(tmp_path / "out" / "a.jpg")["not_kept"] == [reason]
    summary = summarize(tmp_path / "out", jobs, counts, 0, [])
    assert summary["not_kept"] == [{"input": "a.png", "output": "a.jpg", "reasons": [reason]}]
    assert summary_lines(summary)[:-1] == [f"not kept of a.png: {reason}"]


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize("method", ["none", "wavelet"])
def test_a_picture_of_a_folder_is_what_the_restorer_makes_of_it(tiny_weights, tmp_path, work, method):
    """Enlarged and corrected in other threads, and nothing else."""
    write_image(tmp_path / "in" / "a.png", PICTURE)
    restorer = Restorer.load(tiny_weights)
    options = {"sampling": SamplingConfig(steps=2), "colour_correction": method}
    target, restoration = TargetConfig(size="64x48"), RestorationConfig(**options)
    folder.restore_all(*work(restorer=restorer, restoration=restoration, target=target), [])
    expected = restorer.restore(PICTURE, size=(48, 64), **options)
    np.testing.assert_array_equal(Image.open(tmp_path / "out" / "a.png"), expected)


def test_samples_of_one_reading(photographs, restore, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(
        folder, "read_photograph", lambda path, data: read.append(path) or read_photograph(path, data)
    )
    counts = restore(samples=3, seed=5)
    assert counts["restored"] == 15 and sorted(read) == sorted(photographs)
    seeds = [provenance.read_record(tmp_path / "out" / f"a_{n}.png")["settings"]["seed"] for n in (1, 2, 3)]
    assert seeds == [5, 6, 7]
    assert len({(tmp_path / "out" / f"a_{n}.png").read_bytes() for n in (1, 2, 3)}) == 3
    # The first of them is what there is without samples; what is missing is made alone.
    (tmp_path / "out" / "b_2.png").unlink()
    again = Enlarger()
    counts = restore(restorer=again, samples=3, seed=5, skip_existing=True)
    assert (counts["restored"], counts["kept"], len(again.restored)) == (1, 14, 1)


# --------------------------------------------------------------------------------------------------
# Results that exist
# --------------------------------------------------------------------------------------------------


def test_what_exists_is_kept_and_reported(photographs, restore, tmp_path):
    touch(tmp_path / "out" / "a.png")
    counts = restore()
    assert counts["restored"] == 4
    assert counts["failed"] == [
        {
            "input": "a.png",
            "output": "a.png",
            "reason": "a.png: exists already; use --overwrite to replace it",
        }
    ]
    assert (tmp_path / "out" / "a.png").stat().st_size == 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"restoration": RestorationConfig(SamplingConfig(steps=4))}, "with steps 25, not 4"),
        (
            {"restoration": RestorationConfig(colour_correction="lab")},
            "with colour correction 'none', not 'lab'",
        ),
        ({"seed": 3}, "with seed 0, not 3"),
        ({"target": TargetConfig(size="30x24")}, "with 20 x 16 pixels, not 30 x 24"),
        ({"weights": {"name": "others", "sha256": "1"}}, "with other weights (none)"),
        ({"target": TargetConfig(long_side=20)}, ""),  # comes to the same
        ({"memory": 5}, ""),
    ],
)
def test_existing_results_of_other_settings_are_named(photographs, restore, tmp_path, change, reason):
    restore()
    before = inodes(tmp_path / "out")
    counts = restore(skip_existing=True, **change)
    assert inodes(tmp_path / "out") == before and counts["restored"] == 0
    reasons = [failure["reason"] for failure in counts["failed"]]
    assert counts["kept"] == (0 if reason else 5)
    assert reasons == [f"{name}.png: made {reason}; --overwrite replaces it" for name in "abcaa" if reason]


def test_existing_results_of_another_photograph_are_named(photographs, restore, tmp_path):
    restore()
    write_image(photographs[0], PICTURE[::-1])
    (tmp_path / "out" / "b.png").write_bytes(b"retouched")
    (tmp_path / "out" / "c.png.json").unlink()  # of unknown origin: a result that exists is done
    counts = restore(skip_existing=True)
    assert (counts["kept"], counts["restored"]) == (3, 0)
    assert [failure["reason"] for failure in counts["failed"]] == [
        "a.png: made from another input; --overwrite replaces it",
        "b.png: made by somebody else since its record was written; --overwrite replaces it",
    ]


def test_an_unchanged_input_is_not_read_again(photographs, restore, monkeypatch):
    """Its size and time of change are those that the record tells of."""
    restore()
    os.utime(photographs[0], ns=(0, 0))
    hashed, digest = [], provenance.file_digest
    monkeypatch.setattr(provenance, "file_digest", lambda path: hashed.append(path) or digest(path))
    assert restore(skip_existing=True)["kept"] == 5
    assert hashed == photographs[:1]


def test_overwriting_leaves_what_would_be_the_same_file(photographs, restore, tmp_path, monkeypatch):
    output = tmp_path / "out"
    restore()
    before = inodes(output)
    assert restore(overwrite=True)["kept"] == 5 and inodes(output) == before
    write_image(photographs[0], PICTURE[::-1])
    (output / "b.png").write_bytes(b"retouched")
    (output / "c.png.json").unlink()
    counts = restore(overwrite=True)
    assert (counts["restored"], counts["kept"], counts["failed"]) == (3, 2, [])
    assert Image.open(output / "b.png").size == (20, 16)
    assert restore(overwrite=True, memory=5)["restored"] == 5  # other tiles, other rounding
    newer = provenance.versions() | {"zipir_jax": "99"}
    monkeypatch.setattr(provenance, "versions", lambda: newer)
    assert restore(overwrite=True, memory=5)["restored"] == 5
    monkeypatch.setattr(provenance, "hardware", lambda: "1 x another device")
    assert restore(overwrite=True, memory=5)["restored"] == 5


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"input": 1}', b"\xff", b'{"a": "\\ud800"}', b"[" * 10**5]
)
def test_a_file_in_the_place_of_a_record_is_none_and_is_kept(photographs, restore, tmp_path, content):
    touch(tmp_path / "out" / "a.png.json")
    (tmp_path / "out" / "a.png.json").write_bytes(content)
    counts = restore(skip_existing=True)
    assert (
        counts["restored"] == 4
        and "a.png.json: exists already and is no record" in counts["failed"][0]["reason"]
    )
    assert (tmp_path / "out" / "a.png.json").read_bytes() == content


@pytest.mark.parametrize("change", [{"seconds": {"read": "long"}}, {"finished": 5}], ids=str)
def test_a_record_of_something_else_is_none(photographs, restore, tmp_path, change):
    restore()
    output = tmp_path / "out" / "a.png"
    record = provenance.read_record(output)
    provenance.record_path(output).write_bytes(provenance.as_json(record | change))
    assert provenance.read_record(output) is None


def test_an_empty_result_is_not_done(photographs, restore, work, tmp_path):
    """As a power cut leaves it."""
    restore()
    (tmp_path / "out" / "a.png").write_bytes(b"")
    run, jobs = work(skip_existing=True)
    assert summarize(tmp_path / "out", jobs, folder.restore_all(run, [], []), 0, [])["folder"]["done"] == 4
    counts = restore(skip_existing=True)
    assert (counts["restored"], counts["kept"]) == (1, 4)


def test_what_is_replaced_is_on_the_disk_before(tmp_path, monkeypatch):
    calls, replace, fsync = [], os.replace, os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: calls.append(os.fstat(file).st_size) or fsync(file))
    monkeypatch.setattr(os, "replace", lambda *paths: calls.append("replace") or replace(*paths))
    with replacing(tmp_path / "a") as file:
        file.write(b"content")
    assert calls == [len(b"content"), "replace"]


# --------------------------------------------------------------------------------------------------
# Pictures that cannot be restored
# --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick_compile")
def test_every_broken_file_is_named_and_every_good_one_restored(call, tiny_weights, tmp_path):
    """tests/folder_of_200.py, smaller: all that is broken, and one of each that is not."""
    good, broken = folder_of_200.write_folder(tmp_path / "in", 90)
    options = "--input", tmp_path / "in", "--output", tmp_path / "out", "--weights", tiny_weights
    status, out, err = call(sample.main, *options, *folder_of_200.OPTIONS)
    summary = json.loads((tmp_path / "out" / "summary.json").read_bytes())
    assert folder_of_200.problems_of(summary, good, broken, tmp_path / "out") == []
    assert (status, summary["restored"], summary["ignored"]) == (1, len(good), 1)
    assert f"restored {len(good)}, kept 0, made by others 0, failed {len(broken)}; " in out
    assert f"failed: {tmp_path / 'in' / 'broken' / '0' / 'empty.png'}: " in err
    reasons = {Path(failure["input"]).name: failure["reason"] for failure in summary["failed"]}
    for name, reason in {
        "link to nothing.png": "a link to nothing",
        "link in a circle.png": "a link to nothing",
        "link to a device.png": "not a regular file",
        "pipe.png": "not a regular file",
        "socket.png": "not a regular file",
        f"{'x' * 246}.png": "its name is 10 bytes too long for a result and its record",
    }.items():
        assert reasons[name] == reason


# Of every process of Python: it ends where it opens a certain photograph.
ENDING = """
import os, sys
def ends(event, arguments):
    if event == "open" and str(arguments[0]).endswith("b.jpg"):
        os.kill(os.getpid(), {:d})
sys.addaudithook(ends)
"""
RUN = """
import sys
from pathlib import Path
from tests import test_folder
from zipir_jax import folder
folder.restore_all(*test_folder.plan(Path(sys.argv[1]), skip_existing=True), [])
"""


@pytest.mark.parametrize("number", [signal.SIGABRT, signal.SIGKILL])
def test_a_photograph_is_refused_for_crashes_and_not_for_kills(
    photographs, restore, tmp_path, monkeypatch, number
):
    """Killed is the first process, as it reads the photograph, and the one that the second lets read it."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "sitecustomize.py").write_text(ENDING.format(number))
    run = [sys.executable, "-W", "ignore", "-c", RUN, tmp_path]
    assert subprocess.run(run, stderr=subprocess.DEVNULL).returncode == -number
    counts = restore(skip_existing=True)
    assert counts["restored"] + counts["kept"] == 4 + (number == signal.SIGKILL)
    if number == signal.SIGABRT:
        reason = "reading it crashes the program (SIGABRT)"
        assert counts["failed"] == [{"input": "b.jpg", "output": "b.png", "reason": reason}]
        (tmp_path / "sitecustomize.py").unlink()  # a decoder that was mended
        assert restore(skip_existing=True)["restored"] == 1
    assert not (tmp_path / "out" / folder.LOCKS).exists()


def test_names_that_are_no_text(tmp_path, restore):
    names = [b"line\nbreak.png", b"\xff\xfe.png", "größe.png".encode(), b" .png", b"-x.png"]
    for index, name in enumerate(names):
        write_image(tmp_path / "in" / os.fsdecode(name), np.roll(PICTURE, index, 1))
    assert restore(compare="slider")["restored"] == 5
    assert restore(compare="slider", skip_existing=True)["kept"] == 5
    made = {os.fsencode(name) for name in results(tmp_path / "out") if name.endswith(".png")}
    assert made == set(names)


@pytest.mark.parametrize(
    ("error", "reason"), [(ValueError("no"), "no"), (OverflowError("too large"), "OverflowError: too large")]
)
def test_an_error_in_writing_belongs_to_its_picture(photographs, restore, monkeypatch, error, reason):
    write = folder.write_output

    def failing(run, taken, *arguments):
        if taken.job.name == "b.jpg":
            raise error
        write(run, taken, *arguments)

    monkeypatch.setattr(folder, "write_output", failing)
    told = []
    counts = restore(lambda *done: None, told.append)
    assert counts["restored"] == 4 and counts["failed"] == [
        {"input": "b.jpg", "output": "b.png", "reason": reason}
    ]
    assert told == [f"{photographs[1]}: {reason}"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("INTERNAL: a kernel failed\nat 0x0"), "RuntimeError: INTERNAL: a kernel failed"),
        (MemoryError(), "the image does not fit into memory"),
    ],
)
def test_an_error_of_the_device_belongs_to_its_picture(photographs, restore, error, reason):
    def fail_once(number):
        if number == 2:
            raise error

    counts = restore(restorer=Enlarger(fail_once))
    assert counts["restored"] == 4
    assert [failure["reason"] for failure in counts["failed"]] == [reason]


@pytest.mark.parametrize("name", ["read_photograph", "write_photograph"])
def test_an_unforeseen_error_belongs_to_its_picture(photographs, restore, monkeypatch, name):
    """Of reading it, and of writing it."""
    function, calls = getattr(folder, name), []

    def fail_once(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyError("no such chunk")
        return function(*arguments)

    monkeypatch.setattr(folder, name, fail_once)
    counts = restore()
    assert (counts["restored"], counts["error"]) == (4, None)
    failure = {"input": "b.jpg", "output": "b.png", "reason": "KeyError: 'no such chunk'"}
    assert counts["failed"] == [failure]


def test_a_full_disk_ends_the_run(photographs, restore, tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    restorer = Enlarger()
    counts = restore(restorer=restorer)
    assert isinstance(counts["error"], DiskFullError)
    assert str(counts["error"]).endswith("cannot be written (No space left on device)")
    assert [failure["reason"] for failure in counts["failed"]] == ["the disk is full"]
    assert len(restorer.restored) <= 2 and results(tmp_path / "out") == []
    assert not list((tmp_path / "out").glob("**/.*.png*"))


def test_a_disk_without_room_for_a_claim_ends_the_run(photographs, restore, monkeypatch):
    def full(lock, **options):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(folder.FileLock, "acquire", full)
    counts = restore()
    assert isinstance(counts["error"], DiskFullError) and counts["failed"] == []


# --------------------------------------------------------------------------------------------------
# Reading, restoring and writing at once
# --------------------------------------------------------------------------------------------------


def test_reading_restoring_and_writing_overlap(photographs, restore, monkeypatch):
    """The write of a picture waits for the next but one to be read, which waits for nothing."""
    has_read, is_restoring = ([threading.Event() for _ in range(6)] for _ in range(2))
    order = {path: number for number, path in enumerate(sorted(photographs))}
    write = folder.write_output

    def read(path, data):
        has_read[order[path]].set()
        return read_photograph(path, data)

    def slow_write(run, taken, *arguments):
        number = order[taken.job.source]
        if number < 3:
            assert is_restoring[number + 1].wait(SECONDS) and has_read[number + 2].wait(SECONDS)
        write(run, taken, *arguments)

    monkeypatch.setattr(folder, "read_photograph", read)
    monkeypatch.setattr(folder, "write_output", slow_write)
    counts = restore(restorer=Enlarger(lambda number: is_restoring[number - 1].set()))
    assert counts["restored"] == 5


@pytest.mark.parametrize("slowest", ["read", "restore", "write"])
def test_three_pictures_are_in_memory_at_most(photographs, restore, monkeypatch, slowest):
    alive, most, lock = [], [], threading.Lock()
    pause = threading.Event()
    write = folder.write_output

    def wait(stage):
        if stage == slowest:
            pause.wait(0.05)

    def read(path, data):
        wait("read")
        with lock:
            alive.append(path)
            most.append(len(alive))
        return read_photograph(path, data)

    def write_and_forget(run, taken, *arguments):
        wait("write")
        write(run, taken, *arguments)
        with lock:
            alive.remove(taken.job.source)

    monkeypatch.setattr(folder, "read_photograph", read)
    monkeypatch.setattr(folder, "write_output", write_and_forget)
    assert restore(restorer=Enlarger(lambda number: wait("restore")))["restored"] == 5
    assert max(most) <= 3


def test_a_stop_drops_the_picture_in_work_and_finishes_what_is_written(photographs, work, tmp_path):
    stopped, told = [], []

    def report(name, done, phase):
        told.append((name, done))
        if name == "b.jpg" and phase == "denoise":
            stopped.append(15)

    run, jobs = work()
    counts = folder.restore_all(run, jobs, stopped, report)
    assert (counts["restored"], counts["failed"]) == (1, [])
    assert results(tmp_path / "out") == ["a.png"]
    assert [done for _, done in told] == sorted(done for _, done in told)
    counts = folder.restore_all(dataclasses.replace(run, skip_existing=True), jobs, [])
    assert (counts["restored"], counts["kept"]) == (4, 1)


# --------------------------------------------------------------------------------------------------
# Several processes
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [{}, {"skip_existing": True}, {"overwrite": True}])
@pytest.mark.parametrize("count", [2, 3])
def test_no_picture_is_restored_twice(work, stopped, tmp_path, count, flags):
    """Locks hold between the open files of threads as between processes."""
    for index in range(12):
        write_image(tmp_path / "in" / f"{index % 3}" / f"{index}.png", np.roll(PICTURE, index, 1))
    (tmp_path / "in" / "broken.png").write_text("no picture")
    start = threading.Barrier(count)
    restorers = [Enlarger(lambda number: threading.Event().wait(0.002)) for _ in range(count)]
    works = [work(restorer=restorer, **flags) for restorer in restorers]
    counts = [None] * count

    def process(number):
        start.wait(SECONDS)
        counts[number] = folder.restore_all(*works[number], stopped)

    threads = [threading.Thread(target=process, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(len(restorer.restored) for restorer in restorers) == 12
    assert sum(each["restored"] for each in counts) == 12
    for each in counts:
        assert each["restored"] + each["made_by_others"] == 12 and each["kept"] == 0
        assert [failure["input"] for failure in each["failed"]] == ["broken.png"]
    assert not (tmp_path / "out" / folder.LOCKS).exists()


HOLDER = """
import sys
from pathlib import Path
from zipir_jax import folder
from zipir_jax.jobs import plan_jobs
jobs, _, _ = plan_jobs(Path(sys.argv[1]), Path(sys.argv[2]), "png")
lock = folder._claim(Path(sys.argv[2]) / folder.LOCKS, jobs[0])
print("holds", jobs[0].name, flush=True)
sys.stdin.read()
"""


def test_the_claim_of_a_killed_process_is_taken_over(photographs, work, stopped, tmp_path):
    command = [sys.executable, "-c", HOLDER, tmp_path / "in", tmp_path / "out"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "holds a.png\n"
    seen = []

    def report(name, done, phase):
        seen.append(name)
        if done == 4 and not phase:  # all others are made
            process.kill()
            process.wait(SECONDS)

    run, jobs = work(skip_existing=True)
    counts = folder.restore_all(run, jobs, stopped, report)
    process.kill()
    assert counts["restored"] == 5 and seen.index("a.png") > seen.index("c.webp")
    process.stdin.close()
    process.stdout.close()


def test_what_a_killed_process_left_is_removed(photographs, restore, work, tmp_path):
    """Its claims, and its files that had not taken their places: of a picture that it had not made, and of one."""
    output = tmp_path / "out"
    run, jobs = work(skip_existing=True)
    folder.restore_all(run, jobs[1:], [])
    left = [output / ".a.png.0123abcd", output / ".a.png.json.0123abcd", output / ".b.png.json.ffffffff"]
    touch(*left, *(folder._lock_file(run.locks, job) for job in jobs[:2]))
    counts = restore(skip_existing=True)
    assert (counts["restored"], counts["kept"]) == (1, 4)
    assert list(output.rglob(".*")) == []
    touch(*left[:1])
    folder.restore_all(dataclasses.replace(run, locks=None, overwrite=True, seed=1), jobs[:1], [])
    assert list(output.rglob(".*")) == []


def test_what_others_hold_to_the_end_is_theirs(photographs, work, stopped, monkeypatch):
    monkeypatch.setattr(folder, "POLL", 0.01)
    run, jobs = work(skip_existing=True)
    lock = folder._claim(run.locks, jobs[0])
    other = Enlarger()

    def report(name, done, phase):
        if done == 4 and not other.restored:  # the other one finishes its own
            mine = dataclasses.replace(run, restorer=other, locks=None)
            folder.restore_all(mine, jobs[:1], [])
            folder._release(folder.Taken(jobs[0], {}, lock))

    counts = folder.restore_all(run, jobs, stopped, report)
    assert (counts["restored"], counts["made_by_others"], counts["kept"]) == (4, 1, 0)


def test_what_another_process_made_after_all_is_no_failure(photographs, work):
    run, jobs = work(skip_existing=True)
    other = dataclasses.replace(run, restorer=Enlarger(), locks=None)

    def fail_at_the_last(number):
        if number == 5:
            folder.restore_all(other, jobs[-1:], [])  # its device has more memory, say
            raise RuntimeError("RESOURCE_EXHAUSTED")

    run = dataclasses.replace(run, restorer=Enlarger(fail_at_the_last))
    counts = folder.restore_all(run, jobs, [])
    assert (counts["restored"], counts["made_by_others"], counts["failed"]) == (4, 1, [])


# --------------------------------------------------------------------------------------------------
# The summary
# --------------------------------------------------------------------------------------------------


def test_the_summary_counts_what_stands_in_the_folder(photographs, work, tmp_path):
    (tmp_path / "in" / "broken.png").write_text("no picture")
    output = tmp_path / "out"
    run, jobs = work(skip_existing=True)
    first = folder.restore_all(run, jobs[:2], [])
    write_summary(output, summarize(output, jobs[:2], first, 0, []))
    counts = folder.restore_all(run, jobs, [])
    check_summary(output)
    summary = summarize(output, jobs, counts, 1, [])
    write_summary(output, summary)
    check_summary(output)
    assert summary == json.loads((output / "summary.json").read_bytes())
    assert (summary["restored"], summary["kept"], summary["ignored"]) == (3, 2, 1)
    numbers = {name: summary["folder"][name] for name in ("expected", "done", "restored")}
    assert numbers == {"expected": 6, "done": 5, "restored": 3}
    assert list(summary["folder"]["seconds"]) == ["read", "encode", "denoise", "decode", "write"]
    lines = summary_lines(summary)
    assert lines[0] == "failed: broken.png: not an image that can be read"
    assert lines[1].startswith("restored 3, kept 2, made by others 0, failed 1; ") and len(lines) == 2
    assert str(tmp_path) not in json.dumps(summary)
    # The same two processes, had they run at the same time.
    same_time = first | {"ended": counts["ended"]}
    write_summary(output, summarize(output, jobs[:2], same_time, 0, []))
    together = summarize(output, jobs, counts, 1, [])["folder"]
    assert (together["started"], together["restored"]) == (first["started"], 5)
    for foreign in ('{"of": "somebody else"}', '{"folder": {}}', '{"ended": 5, "folder": {"started": ""}}'):
        (output / "summary.json").write_text(foreign)
        with pytest.raises(ValueError, match=r"summary\.json: is no summary of restored photographs"):
            check_summary(output)


# --------------------------------------------------------------------------------------------------
# Comparisons
# --------------------------------------------------------------------------------------------------


def test_side_by_side(photographs, restore, tmp_path):
    restore(compare="side-by-side")
    both = np.asarray(Image.open(tmp_path / "out" / "a_compare.png"))
    result = np.asarray(Image.open(tmp_path / "out" / "a.png"))
    assert both.shape == (16, 20 + comparison.GAP + 20, 3)
    np.testing.assert_array_equal(both[:, 20 + comparison.GAP :], result)
    np.testing.assert_array_equal(both[:, 20 : 20 + comparison.GAP], 255)


@pytest.mark.parametrize("flags", [{"skip_existing": True}, {"overwrite": True}], ids=str)
def test_a_comparison_that_results_lack_is_made_of_them(photographs, restore, tmp_path, flags):
    output = tmp_path / "out"
    restore(compare="side-by-side")
    expected = (output / "a_compare.png").read_bytes()
    (output / "a_compare.png").unlink()
    (output / "b_compare.png").unlink()
    (output / "b.png").write_bytes(b"no picture")
    provenance.record_path(output / "b.png").unlink()
    counts = restore(compare="side-by-side", **flags)
    assert (output / "a_compare.png").read_bytes() == expected
    if "overwrite" in flags:
        assert (counts["restored"], counts["kept"], counts["failed"]) == (1, 4, [])
    else:
        (failure,) = counts["failed"]
        assert (counts["kept"], failure["input"]) == (4, "b.jpg")
        assert failure["reason"].startswith("b.png: not an image")


def test_a_comparison_replaces_nobodys_file(photographs, restore, tmp_path):
    foreign = tmp_path / "out" / "a_compare.png"
    touch(foreign)
    counts = restore(compare="side-by-side", skip_existing=True)
    reason = "a_compare.png: exists already; use --overwrite to replace it"
    assert counts["failed"] == [{"input": "a.png", "output": "a.png", "reason": reason}]
    assert foreign.read_bytes() == b"" and counts["restored"] == 4
    assert restore(compare="side-by-side", overwrite=True)["restored"] == 1 and foreign.read_bytes()


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text, self.open = [], Counter(), []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_data(self, data):
        if self.open:
            self.text[self.open[-1], data.strip()] += 1


def test_a_page_with_a_slider_needs_nothing_else(tmp_path):
    import base64
    import io

    before = to_float(PICTURE)
    after = resize(before, 16, 20)
    title = '<script>alert("1")</script> & "2".png \udcff'
    written = comparison.slider_html(before, after, title)
    written.encode()
    page = Page()
    page.feed(written)
    tags = Counter(tag for tag, _ in page.tags)
    assert tags["script"] == 1 and tags["img"] == 2 and tags["link"] == tags["iframe"] == 0
    assert ("title", '<script>alert("1")</script> & "2".png ?') in page.text
    for name, picture in (("before", resize(before, 16, 20)), ("after", after)):
        (attributes,) = [attributes for tag, attributes in page.tags if attributes.get("id") == name]
        head, data = attributes["src"].split(",")
        assert head == "data:image/jpeg;base64" and attributes["alt"] == name
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))), np.float32) / 127.5 - 1
        assert shown.shape == (16, 20, 3) and np.abs(shown - picture).mean() < 0.05
    # No address but the pictures' own, and none may be asked for.
    for _, attributes in page.tags:
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:")
    assert "http" not in written.replace("http-equiv", "") and "default-src 'none'" in written
    # A range input has arrow keys; pointer events are of mouse and finger.
    (slider,) = [attributes for tag, attributes in page.tags if tag == "input"]
    assert slider["type"] == "range" and slider["aria-label"]
    assert "pointerdown" in written and "pointermove" in written


def test_the_page_is_titled_by_its_photograph(photographs, restore, tmp_path):
    restore(compare="slider")
    page = Page()
    page.feed((tmp_path / "out" / "deep" / "a_compare.html").read_text())
    assert ("title", "deep/a.png") in page.text
