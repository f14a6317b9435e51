"""Restore a folder of 200 files of all kinds, of which 50 are broken; kill that, resume it, compare.

python tests/folder_of_200.py [--files 200] [--kills 10] [--processes 1 3] [--seed 0]

First runs that are left alone: every broken file must be named with its reason, every good one restored, and memory the
same for 50 files as for all of them, with photographs of 12 megapixels among both. Then, for each number of processes
that share the folder, runs that are killed with SIGKILL at random moments, at work, and resumed with --skip-existing:
nothing is restored to its end twice, and all results are those of the first run, byte for byte.
"""

import argparse
import io
import json
import os
import random
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pillow_heif
import skimage.data
from PIL import Image, ImageCms, features

from zipir_jax import provenance

TIMEOUT = 900  # seconds for a run
SIDES = (33, 64)  # pixels
# The networks see 128 x 128 pixels of all of them: one program is compiled.
OPTIONS = ("--long-side", "64", "--steps", "1")
LARGE = (3000, 4000)  # pixels of the photographs that memory is judged by
SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "TIFF": ".tif", "BMP": ".bmp", "GIF": ".gif"}
if features.check("avif"):
    SUFFIXES["AVIF"] = ".avif"
SUFFIXES["HEIF"] = ".heic"


def encoded(image: Image.Image, file_format: str, **options) -> bytes:
    file = io.BytesIO()
    if file_format == "HEIF":
        pillow_heif.from_pillow(image).save(file, **options)
    else:
        image.save(file, file_format, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    """Of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunk(png: bytes, kind: bytes, data: bytes) -> bytes:
    """A PNG file with one more chunk behind its header."""
    return png[:33] + chunk(kind, data) + png[33:]


def crop(rng: random.Random) -> Image.Image:
    photograph = rng.choice((skimage.data.astronaut, skimage.data.chelsea, skimage.data.coffee))()
    height, width = rng.randint(*SIDES), rng.randint(*SIDES)
    top, left = rng.randrange(photograph.shape[0] - height), rng.randrange(photograph.shape[1] - width)
    return Image.fromarray(photograph[top : top + height, left : left + width])


def good_files(rng: random.Random) -> dict[str, bytes]:
    """One of each kind that can be restored, by name."""
    image = crop(rng)
    grey, alpha = image.convert("L"), image.convert("RGBA")
    alpha.putalpha(grey)
    turned = Image.Exif()
    turned[0x0112] = 6
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    png, jpeg = encoded(image, "PNG"), encoded(image, "JPEG")
    sixteen = (np.asarray(image)[..., ::-1].astype(np.uint16) * 257).copy()
    files = {f"as it is{suffix}": encoded(image, name) for name, suffix in SUFFIXES.items()}
    return files | {
        "grey.jpg": encoded(grey, "JPEG"),
        "progressive.jpg": encoded(image, "JPEG", progressive=True),
        "cmyk.jpg": encoded(image.convert("CMYK"), "JPEG"),
        "cmyk of a damaged profile.jpg": encoded(image.convert("CMYK"), "JPEG", icc_profile=b"x" * 200),
        "cmyk of an RGB profile.jpg": encoded(image.convert("CMYK"), "JPEG", icc_profile=srgb),
        "turned.jpg": encoded(image, "JPEG", exif=turned),
        "damaged exif.jpg": encoded(image, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + b"\xff" * 40),
        "exif in a circle.jpg": encoded(image, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0\x08\0\0\0"),
        "damaged icc.jpg": encoded(image, "JPEG", icc_profile=srgb[:100] + b"\xff" * 100),
        "empty icc.png": with_chunk(png, b"iCCP", b"icc\0\0" + zlib.compress(b"")),
        "rubbish behind.jpg": jpeg + os.urandom(500),
        "a png.jpg": png,
        "a jpeg.png": jpeg,
        "a webp.tif": encoded(image, "WEBP"),
        "alpha.png": encoded(alpha, "PNG"),
        "grey alpha.png": encoded(alpha.convert("LA"), "PNG"),
        "palette.png": encoded(image.quantize(16), "PNG"),
        "see-through palette.png": encoded(image.quantize(16), "PNG", transparency=3),
        "one bit.png": encoded(image.convert("1"), "PNG"),
        "sixteen bits.png": cv2.imencode(".png", sixteen)[1].tobytes(),
        "sixteen grey.png": encoded(Image.fromarray(np.asarray(grey, np.uint16) * 257), "PNG"),
        "sixteen bits.tif": cv2.imencode(".tif", sixteen)[1].tobytes(),
        "lzw.tif": encoded(image, "TIFF", compression="tiff_lzw"),
        "cmyk.tif": encoded(image.convert("CMYK"), "TIFF", compression="tiff_deflate"),
        "lossless alpha.webp": encoded(alpha, "WEBP", lossless=True),
        "one pixel.png": encoded(image.crop((0, 0, 1, 1)), "PNG"),
        "line.png": encoded(image.resize((64, 1)), "PNG"),
        "wide.png": encoded(Image.new("RGB", (20_000, 2)), "PNG"),
        "tall.jpg": encoded(Image.new("RGB", (2, 20_000)), "JPEG"),
        "line\nbreak.png": png,
        os.fsdecode(b"no \xff\xfe text.png"): png,
        "größe.png": png,
        "-x.PNG": png,
        f"{'long ' * 40}.png": png,
    }


def broken_files(rng: random.Random) -> dict[str, bytes | Callable[[Path], object]]:
    """What cannot be restored, by name: the file's bytes, or what makes it."""
    image = crop(rng)
    others = [crop(rng).resize(image.size) for _ in range(2)]
    png, jpeg = encoded(image, "PNG"), encoded(image, "JPEG")
    header, end = b"\x89PNG\r\n\x1a\n", chunk(b"IEND", b"")
    huge = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    damaged = bytearray(png)
    damaged[len(damaged) // 2] ^= 0xFF
    tiff = encoded(image, "TIFF")
    files = {}
    for name, suffix in SUFFIXES.items():
        whole = encoded(image, name)
        for share in (0.1, 0.5, 0.9):
            files[f"{share:.0%} of it{suffix}"] = whole[: int(share * len(whole))]
    frames = {"save_all": True, "append_images": others}

    def listen(path):
        """A socket; its path may be too long for one, so it is made beside and moved."""
        with socket.socket(socket.AF_UNIX) as unix, tempfile.TemporaryDirectory() as folder:
            unix.bind(f"{folder}/s")
            Path(folder, "s").rename(path)

    return files | {
        "empty.png": b"",
        "zeros.jpg": bytes(1000),
        "noise.tif": rng.randbytes(1000),
        "text.jpg": b"no picture\n" * 50,
        "page.png": b"<!doctype html><title>404</title>",
        "document.webp": b"%PDF-1.7\n" + bytes(200),
        "film.avif": b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41" + bytes(500),
        "magic alone.png": header,
        "magic alone.bmp": b"BM",
        "no pixels.png": header + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)) + end,
        "no size.png": header + chunk(b"IHDR", struct.pack(">IIBBBBB", 0, 0, 8, 2, 0, 0, 0)) + png[33:],
        "wrong checksum.png": png[:29] + b"\0\0\0\0" + png[33:],
        "flipped bits.png": bytes(damaged),
        "huge.png": header + chunk(b"IHDR", huge) + chunk(b"IDAT", zlib.compress(bytes(10**6), 9)) + end,
        "huge.bmp": encoded(image, "BMP")[:18]
        + struct.pack("<ii", 60_000, 60_000)
        + encoded(image, "BMP")[26:],
        "huge.tif": tiff.replace(
            struct.pack("<HHII", 256, 4, 1, image.width), struct.pack("<HHII", 256, 4, 1, 60_000)
        )
        .replace(struct.pack("<HHII", 257, 4, 1, image.height), struct.pack("<HHII", 257, 4, 1, 60_000))
        .replace(
            struct.pack("<HHIHH", 256, 3, 1, image.width, 0), struct.pack("<HHIHH", 256, 3, 1, 60_000, 0)
        )
        .replace(
            struct.pack("<HHIHH", 257, 3, 1, image.height, 0), struct.pack("<HHIHH", 257, 3, 1, 60_000, 0)
        ),
        "animated.gif": encoded(image, "GIF", **frames),
        "animated.webp": encoded(image, "WEBP", **frames),
        "animated.png": encoded(image, "PNG", **frames),
        "pages.tif": encoded(image, "TIFF", **frames),
        "half a header.jpg": jpeg[:2],
        "link to nothing.png": lambda path: path.symlink_to("nowhere"),
        "link in a circle.png": lambda path: path.symlink_to(path.name),
        "link to a device.png": lambda path: path.symlink_to("/dev/zero"),
        "pipe.png": os.mkfifo,
        "socket.png": listen,
        f"{'x' * 246}.png": png,
        **(
            {}
            if os.geteuid() == 0
            else {"no permission.png": lambda path: (path.write_bytes(png), path.chmod(0))}
        ),
    }


def write_folder(
    folder: Path, files: int, seed: int = 0, large: int = 0, with_broken: bool = True
) -> tuple[set[str], set[str]]:
    """The names, below the folder, of what can be restored and of what cannot. large: photographs of 12 megapixels."""
    rng = random.Random(seed)
    broken = broken_files(rng) if with_broken else {}
    photograph = encoded(crop(rng).resize(LARGE[::-1]), "JPEG")
    contents, number = {f"large/{i}.jpg": photograph for i in range(large)}, 0
    while len(contents) < files - len(broken):
        for name, data in good_files(rng).items():
            place = ("", f"{number}/", f"{number}.jpg/deep/")[
                number % 3
            ]  # a folder may be called like a picture
            contents[f"{place}{name}"] = data
            if len(contents) == files - len(broken):
                break
        number += 1
    good = set(contents)
    for index, (name, data) in enumerate(broken.items()):
        contents[f"broken/{index % 2}/{name}"] = data
    for name, data in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data(path) if callable(data) else path.write_bytes(data)
    for name in (".DS_Store", "._as it is.jpg", "notes.txt"):
        (folder / name).write_bytes(b"no picture")
    return good, set(contents) - good


# --------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------

# The command line; each photograph that is begun with, and each that is done, is a line in a file.
WORKER = """
import json, os, sys
from zipir_jax import folder, sample
from zipir_jax.command_line import run

log = os.open(sys.argv.pop(1), os.O_WRONLY | os.O_APPEND | os.O_CREAT)

def note(what, job):
    os.write(log, (json.dumps([os.getpid(), what, job.name]) + chr(10)).encode())

read, write = folder._read, folder.write_output

def read_and_note(run, job, *more):
    note("begun", job)
    return read(run, job, *more)

def write_and_note(run, taken, *more):
    written = write(run, taken, *more)
    note("done", taken.job)
    return written

folder._read, folder.write_output = read_and_note, write_and_note
run(sample.main)
"""


def start(source: Path, output: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-c", WORKER, log_of(output), "--input", source, "--output", output, *OPTIONS]
    with (output.parent / f"{output.name}.err").open("ab") as errors:
        return subprocess.Popen([*map(str, command), *more], stdout=errors, stderr=errors)


def log_of(output: Path) -> Path:
    return output.parent / f"{output.name}.log"


def noted(output: Path) -> list[tuple[int, str, str]]:
    """(process, "begun" or "done", name of the photograph), in this order in time."""
    log = log_of(output)
    return [tuple(json.loads(line)) for line in log.read_text().splitlines()] if log.exists() else []


def results(output: Path) -> dict[str, tuple[int, int]]:
    """(inode, time of change in ns) of each result that stands, by name."""
    found = {}
    for path in output.rglob("*.png"):
        if not path.name.startswith("."):
            status = path.stat()
            found[path.relative_to(output).as_posix()] = status.st_ino, status.st_mtime_ns
    return found


def summary_of(output: Path) -> dict:
    return json.loads((output / "summary.json").read_bytes())


def left_alone(source: Path, output: Path) -> tuple[int, int]:
    """The exit status of a run, and the most memory in bytes that it had."""
    running = start(source, output)
    deadline = threading.Timer(TIMEOUT, running.kill)
    deadline.start()
    _, status, usage = os.wait4(running.pid, 0)
    deadline.cancel()
    running.returncode = os.waitstatus_to_exitcode(status)
    if running.returncode not in (0, 1):
        errors = (output.parent / f"{output.name}.err").read_text(errors="replace")
        raise RuntimeError(f"exit status {running.returncode}: {errors[-5000:]}")
    return running.returncode, usage.ru_maxrss * 1024


def problems_of(summary: dict, good: set[str], broken: set[str], output: Path) -> list[str]:
    """What is wrong with a run that went to its end, in sentences."""
    failed = {failure["input"]: failure["reason"] for failure in summary["failed"]}
    problems = [f"{name!r} is not named" for name in sorted(broken - failed.keys())]
    problems += [f"{name!r}: {failed[name]}" for name in sorted(good & failed.keys())]
    problems += [f"{name!r} fails without a reason" for name, reason in failed.items() if len(reason) < 8]
    made = results(output)
    records = {path.relative_to(output).as_posix() for path in output.rglob("*.json")} - {"summary.json"}
    if records != {f"{name}.json" for name in made}:
        problems.append(f"{len(records)} records of {len(made)} results")
    for name in made:
        record = provenance.read_record(output / name)
        if record is None or record["output"]["sha256"] != provenance.file_digest(output / name):
            problems.append(f"{name!r} is not what its record tells of")
    counted = {"expected": len(good) + len(broken), "done": len(good)}
    for name, number in counted.items():
        if summary["folder"][name] != number:
            problems.append(f"{name} {summary['folder'][name]} instead of {number}")
    if len(made) != len(good):
        problems.append(f"{len(made)} results of {len(good)} good files")
    return problems + [f"{path} was left" for path in output.rglob(".*")]


def killed_and_resumed(
    source: Path, output: Path, good: set[str], broken: set[str], kills: int, processes: int, seed: int
) -> list[str]:
    """What is wrong with runs that are killed `kills` times and then left alone, in sentences; see `main`."""
    rng, problems, seen, moments = random.Random(seed), [], {}, []
    reference = output.parent / "alone"

    def look():
        now = results(output)
        problems.extend(f"{name!r} was lost" for name in seen.keys() - now.keys())
        problems.extend(
            f"{name!r} was replaced" for name in seen.keys() & now.keys() if seen[name] != now[name]
        )
        for name in now.keys() - seen.keys():
            if (output / name).read_bytes() != (reference / name).read_bytes():
                problems.append(f"{name!r} is not what a run makes that is left alone")
            if not (output / f"{name}.json").is_file():
                problems.append(f"{name!r} has no record")
        seen.update(now)

    def done():
        return sum(what == "done" for _, what, _ in noted(output))

    def at_work(processes):
        """Those that have begun with a good photograph and not ended."""
        begun, ended = (
            {(pid, name) for pid, what, name in noted(output) if what == kind and name in good}
            for kind in ("begun", "done")
        )
        return {pid for pid, _ in begun - ended} & {process.pid for process in processes}

    for kill in range(kills):
        running = [start(source, output, "--skip-existing") for _ in range(processes)]
        left, shares = len(good) - len(seen), kills - kill + 1
        until = done() + rng.randint(1, max(1, min(2 * left // shares, left - 4 * processes) - 1))
        deadline = time.monotonic() + TIMEOUT
        while done() < until and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))  # so that it may be in the middle of anything
        alive = [process for process in running if process.poll() is None]
        while not at_work(alive) and time.monotonic() < deadline:  # but not between two photographs
            time.sleep(0.01)
        for process in alive:
            process.kill()
        for process in running:
            process.wait()
        met = at_work(alive)
        if not met:
            problems.append(f"kill {kill + 1} met nobody at work")
        look()
        moments.append((len(seen), len(met)))
    print(f"  results after each kill, and killed processes that were at work: {moments}", flush=True)
    running = [start(source, output, "--skip-existing") for _ in range(processes)]
    problems += [f"exit status {status}" for process in running if (status := process.wait(TIMEOUT)) != 1]
    before = len(seen)
    look()
    names = Counter(name for _, what, name in noted(output) if what == "done")
    problems += [f"{name!r} was restored {count} times" for name, count in names.items() if count > 1]
    summary = summary_of(output)
    if summary["folder"]["restored"] != len(seen) - before:
        problems.append(f"{summary['folder']['restored']} restored instead of {len(seen) - before}")
    return problems + problems_of(summary, good, broken, output)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=200)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 3])
    parser.add_argument("--seed", type=int, default=0, help="of the pictures and of the random moments")
    options = parser.parse_args()
    problems = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_folder(folder / "few", 50, options.seed, large=4, with_broken=False)
        status, of_few = left_alone(folder / "few", folder / "of few")
        if (status, summary_of(folder / "of few")["restored"]) != (0, 50):
            problems.append("not all of 50 good files are restored")
        good, broken = write_folder(folder / "in", options.files, options.seed, large=16)
        print(f"{len(good)} good files, {len(broken)} broken ones", flush=True)
        status, of_all = left_alone(folder / "in", folder / "alone")
        summary = summary_of(folder / "alone")
        for failure in summary["failed"]:
            print(f"  {failure['input']!r}: {failure['reason']}")
        problems += problems_of(summary, good, broken, folder / "alone")
        if status != 1:
            problems.append(f"exit status {status}")
        print(
            f"restored {summary['restored']}, failed {len(summary['failed'])} in {summary['seconds']} s; "
            f"seconds of phases: {summary['folder']['seconds']}\n"
            f"memory at most: {of_few / 2**20:.0f} MiB for 50 files, 4 of them large; {of_all / 2**20:.0f} MiB for "
            f"{options.files}, 16 of them large",
            flush=True,
        )
        if of_all > of_few + 2 * LARGE[0] * LARGE[1] * 3 * 4:  # two of them in float32: by chance they meet
            problems.append("memory grows with the number of files")
        for processes in options.processes:
            print(f"{options.kills} kills of {processes} at once", flush=True)
            problems += killed_and_resumed(
                folder / "in",
                folder / f"killed{processes}",
                good,
                broken,
                options.kills,
                processes,
                options.seed,
            )
    print(*problems, f"{len(problems)} problems", sep="\n")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
