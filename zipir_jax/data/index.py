"""`prepare index`: look at every image of a collection once, drop those that training is better off without, and
write the others as shards (shards.py).

The output folder holds, beside the shards and their index,

    scan.jsonl     a line for the collection and one for each of its images, in order: what was measured. Only ever
                   appended to, so that a run that was killed goes on behind its last whole line
    plan.json      says which images the shards that are already there hold
    dropped.csv    each image that was dropped, the rule, what was measured, the limit, and of what it is a duplicate
    report.txt     how many were dropped by which rule

What is written depends on the images and the rules alone: not on the number of processes, nor on how often the run was
killed. Other rules on the same output use its scan and write its shards anew.
"""

import collections
import contextlib
import csv
import dataclasses
import hashlib
import io
import json
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float32, Int64, UInt8, UInt64
from PIL import Image
from tqdm import tqdm

from zipir_jax.config import IndexConfig
from zipir_jax.data.shards import (
    FORMAT,
    INDEX_FILE,
    SCAN_FILE,
    SIZES_FILE,
    ShardSource,
    open_shard,
    pack_record,
    read_index,
    shard_name,
)
from zipir_jax.data.sources import file_digest, read_caption
from zipir_jax.files import replacing
from zipir_jax.imageio import list_images, raise_pixel_limit, read_image_uint8

PLAN_FILE, DROPPED_FILE, REPORT_FILE = "plan.json", "dropped.csv", "report.txt"
OWN_FILES = re.compile(
    r"(index\.json|sizes\.npy|scan\.jsonl|plan\.json|dropped\.csv|report\.txt|shard-\d{5,}\.array_record)"
)
# What a killed run leaves: files that `replacing` had not put in their place yet, and unfinished shards.
TEMPORARY_FILES = re.compile(rf"\.{OWN_FILES.pattern}\.([0-9a-f]{{8}}|partial)")

CHUNK = 8  # images that a process scans at a time
HASH_SIDE = 16  # the perceptual hash has HASH_SIDE^2 bits
HASH_WORDS = HASH_SIDE**2 // 64
SHARPNESS_SIDE = 1024  # pixels; a larger image is judged at this short side: the pixels of cameras are soft
TILE = 64  # pixels; a photograph with a shallow depth of field is sharp in some of these only
REFERENCE_QUALITY = 50  # of the JPEG file that a file is compared with

KEPT, DAMAGED, SMALL, ELONGATED, FLAT, BLURRED, COMPRESSED, EXACT, NEAR = range(9)


def write_index(specs: tuple[str, ...], output: Path, rules: IndexConfig, workers: int) -> str:
    """Scan the collection that the specs name, drop what the rules say, and write the rest as shards into `output`.

    specs: folders of images, folders of shards, `tfds:NAME[:SPLIT]`. workers: processes; 0 = this one. Returns the
    report. Raises ValueError for a spec that cannot be opened, an output folder that holds something else or is being
    written by another run, images that change meanwhile, or where no image is kept.
    """
    collection = Collection(specs)
    output = Path(output)
    with _locked(output):
        _check_output(output)
        _scan(collection, output, workers)
        scan = Scan(output / SCAN_FILE, len(collection))
        choice = choose(scan, rules)
        if not (choice.reason == KEPT).any():
            (output / INDEX_FILE).unlink(missing_ok=True)  # of other rules
            _write_dropped(output, scan, choice, rules)
            raise ValueError(
                f"{output}: the rules drop all {len(collection)} images; see {DROPPED_FILE} there"
            )
        shards = _plan(scan, choice, rules)
        plan = _plan_digest(scan, shards)
        if _finished(output, plan, rules):
            return (output / REPORT_FILE).read_text()
        _start_plan(output, plan)
        _write_shards(collection, output, scan, shards, workers)
        _write_dropped(output, scan, choice, rules)
        report = _report(specs, scan, choice, rules, shards)
        with replacing(output / REPORT_FILE) as file:
            file.write(report.encode())
        _write_index_files(output, scan, shards, rules)
    return report


# --------------------------------------------------------------------------------------------------
# Collections: images as the bytes of their files
# --------------------------------------------------------------------------------------------------


class FolderFiles:
    """The image files of a folder and its subfolders, none of which has been looked into."""

    def __init__(self, folder: str):
        self.folder = Path(folder)
        self.paths = list_images(self.folder, recursive=True)

    def __len__(self) -> int:
        return len(self.paths)

    def encoded(self, index: int) -> bytes:
        try:
            return self.paths[index].read_bytes()
        except OSError as error:
            raise ValueError(f"{self.paths[index]}: cannot be read ({error.strerror})") from None

    def caption(self, index: int) -> str:
        return read_caption(self.paths[index])

    def image_name(self, index: int) -> str:
        name = self.paths[index].relative_to(self.folder).as_posix()
        return os.fsencode(name).decode("utf-8", "backslashreplace")  # names of files may be any bytes

    def __repr__(self) -> str:
        return f"{len(self)} files, {file_digest(self.folder, self.paths)}"


class Collection:
    """The encoded images that several specs name, one after the other."""

    def __init__(self, specs: tuple[str, ...]):
        if not specs:
            raise ValueError("no images are named; give a folder or tfds:NAME.")
        self.specs = specs
        self.parts = [_open_part(spec) for spec in specs]
        self.starts = np.cumsum([0, *map(len, self.parts)])
        if not len(self):
            raise ValueError(f"{' and '.join(specs)}: no image")

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _find(self, index):
        which = int(np.searchsorted(self.starts, index, side="right")) - 1
        return which, int(index - self.starts[which])

    def encoded(self, index: int) -> bytes:
        """The bytes of an image's file. Raises ValueError where they cannot be read."""
        which, position = self._find(index)
        return self.parts[which].encoded(position)

    def caption(self, index: int) -> str:
        """Raises ValueError where it cannot be read."""
        which, position = self._find(index)
        return self.parts[which].caption(position)

    def image_name(self, index: int) -> str:
        """Where several specs are given, they tell files of the same name apart."""
        which, position = self._find(index)
        name = self.parts[which].image_name(position)
        return name if len(self.parts) == 1 else f"{self.specs[which]}: {name}"

    def __repr__(self) -> str:  # the scan holds it, and compares it
        return "; ".join(map(repr, self.parts))


def _open_part(spec):
    if spec.startswith("synthetic:"):
        raise ValueError(f"{spec}: synthetic images are no files; there is nothing to index")
    if spec.startswith("tfds:"):
        from zipir_jax.data.tfds_source import TfdsRecords  # only some need it

        return TfdsRecords(spec)
    return ShardSource(spec) if (Path(spec) / INDEX_FILE).is_file() else FolderFiles(spec)


# --------------------------------------------------------------------------------------------------
# Measures of an image
# --------------------------------------------------------------------------------------------------


def measure(collection: Collection, index: int) -> dict[str, Any]:
    """What the scan says of an image: its name, and either why it cannot be decoded or all that the rules look at."""
    line = {"name": collection.image_name(index), "caption": ""}
    try:
        line["caption"] = collection.caption(index)
    except ValueError as error:
        line["caption_error"] = str(error)
    try:
        data = collection.encoded(index)
        line |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        pixels = read_image_uint8(line["name"], data)
    except ValueError as error:
        return line | {"error": str(error)}
    height, width, _ = pixels.shape
    luma = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    return line | {
        "height": height,
        "width": width,
        "contrast": round(float(luma.std()), 3),
        "sharpness": round(sharpness(luma.astype(np.float32)), 4),
        "compression": round(len(data) / jpeg_bytes(pixels), 4),
        "hash": perceptual_hash(pixels),
    }


def sharpness(luma: Float32[np.ndarray, "h w"]) -> float:
    """Finest detail / next coarser detail in the sharpest tenth of the image, at most `SHARPNESS_SIDE` pixels high.

    The bands are the image less itself blurred with sigma 1, and that less the image blurred with sigma 2; their ratio
    does not change with contrast. Photographs have detail at every scale; what was blurred, or enlarged, lacks the
    finest. luma: 0..255.
    """
    shrink = SHARPNESS_SIDE / min(luma.shape)
    if shrink < 1:
        luma = cv2.resize(luma, None, fx=shrink, fy=shrink, interpolation=cv2.INTER_AREA)
    once, twice = cv2.GaussianBlur(luma, (0, 0), 1.0), cv2.GaussianBlur(luma, (0, 0), 2.0)
    fine, coarse = _tile_energy(luma - once), _tile_energy(once - twice)
    # 0.1: below the noise of rounding to whole levels.
    return float(np.quantile(np.sqrt(fine / (coarse + 0.1)), 0.9))


def _tile_energy(band):
    """Mean square of each tile."""
    rows, columns = (max(1, side // TILE) for side in band.shape)
    height, width = band.shape[0] // rows, band.shape[1] // columns
    tiles = band[: rows * height, : columns * width].reshape(rows, height, columns, width)
    return np.square(tiles).mean(axis=(1, 3))


def jpeg_bytes(pixels: UInt8[np.ndarray, "h w 3"]) -> int:
    """Bytes of the image as a JPEG file of `REFERENCE_QUALITY`: how much there is to compress in it."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=REFERENCE_QUALITY)
    return file.tell()


def perceptual_hash(pixels: UInt8[np.ndarray, "h w 3"]) -> str:
    """Signs of the image's low frequencies, less their median: 256 bits as 64 hexadecimal digits."""
    import imagehash

    return str(imagehash.phash(Image.fromarray(pixels), hash_size=HASH_SIDE))


# --------------------------------------------------------------------------------------------------
# The scan
# --------------------------------------------------------------------------------------------------


def _scan(collection, output, workers):
    """Bring scan.jsonl up to the last image."""
    path = output / SCAN_FILE
    header = {"format": FORMAT, "images": repr(collection)}
    if not path.exists():
        with replacing(path) as file:
            file.write(_json_line(header))
    done, whole = _intact_lines(path)
    with path.open("r+b") as file:
        try:
            found = json.loads(file.readline())
            found["format"], found["images"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}: not the scan of a collection; choose another output") from None
        if found != header:
            raise ValueError(
                f"{output}: holds the scan of other images ({found['images']}, not {header['images']}); "
                "choose another output, or delete it"
            )
        file.truncate(whole)
        file.seek(whole)
        chunks = (
            (start, min(start + CHUNK, len(collection))) for start in range(done, len(collection), CHUNK)
        )
        options = {"total": len(collection), "initial": done, "dynamic_ncols": True}
        with tqdm(desc="scan", unit="image", **options) as progress:
            for lines in _in_order(_scan_chunk, chunks, collection, workers):
                file.write(b"".join(lines))
                file.flush()
                progress.update(len(lines))
        os.fsync(file.fileno())


def _scan_chunk(collection, start, stop):
    return [_json_line(measure(collection, index)) for index in range(start, stop)]


def _json_line(fields):
    return json.dumps(fields).encode() + b"\n"


def _intact_lines(path):
    """How many images the lines before the first torn one describe, and how many bytes these lines take."""
    lines, whole = 0, 0
    with path.open("rb") as file:
        for line in file:
            try:
                json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n"):
                break
            lines, whole = lines + 1, whole + len(line)
    return lines - 1, whole


class Scan:
    """The scan of n images as arrays; names, captions and errors stay in the file until `line(i)` asks for them.

    Where an image could not be decoded, `decoded` is False and the rest 0.
    """

    def __init__(self, path: Path, images: int):
        self.path = path
        self.decoded = np.zeros(images, bool)
        self.sizes = np.zeros((images, 2), np.int32)  # height, width
        self.bytes = np.zeros(images, np.int64)
        self.sha256 = np.zeros((images, 4), np.uint64)
        self.hashes = np.zeros((images, HASH_WORDS), np.uint64)
        self.contrast, self.sharpness, self.compression = np.zeros((3, images), np.float32)
        self.broken_captions = []  # sentences
        self._offsets = np.zeros(images, np.int64)
        with path.open("rb") as file:
            offset = len(file.readline())
            for index, text in enumerate(file):
                self._offsets[index] = offset
                offset += len(text)
                self._add(index, json.loads(text))
        self._file = None

    def _add(self, index, line):
        if "caption_error" in line:
            self.broken_captions.append(line["caption_error"])
        if "error" in line:
            return
        self.decoded[index] = True
        self.sizes[index] = line["height"], line["width"]
        self.bytes[index] = line["bytes"]
        self.sha256[index] = np.frombuffer(bytes.fromhex(line["sha256"]), np.uint64)
        self.hashes[index] = np.frombuffer(bytes.fromhex(line["hash"]), np.uint64)
        self.contrast[index] = line["contrast"]
        self.sharpness[index] = line["sharpness"]
        self.compression[index] = line["compression"]

    def __len__(self) -> int:
        return len(self.decoded)

    def line(self, index: int) -> dict[str, Any]:
        """What `measure` returned for an image."""
        if self._file is None:
            self._file = self.path.open("rb")
        self._file.seek(self._offsets[index])
        return json.loads(self._file.readline())


# --------------------------------------------------------------------------------------------------
# The rules
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which rule drops each of n images: the first of those that would.

    reason: KEPT or another of the constants. measured: the number that was wrong; NaN for what is kept or damaged. of:
    the image that a duplicate is one of; -1 for the others.
    """

    reason: UInt8[np.ndarray, " n"]
    measured: Float32[np.ndarray, " n"]
    of: Int64[np.ndarray, " n"]


def choose(scan: Scan, rules: IndexConfig) -> Choice:
    """Apply the rules: first those that look at one image, then the two that compare it with what these have left."""
    short, long = scan.sizes.min(axis=1), scan.sizes.max(axis=1)
    aspect = long / np.maximum(short, 1)
    reason = np.zeros(len(scan), np.uint8)
    measured = np.full(len(scan), np.nan, np.float32)
    of = np.full(len(scan), -1)
    for rule, wrong, number in [
        (DAMAGED, ~scan.decoded, measured),
        (SMALL, short < rules.shortest_side, short),
        (ELONGATED, aspect > rules.longest_aspect, aspect),
        (FLAT, scan.contrast < rules.contrast, scan.contrast),
        (BLURRED, scan.sharpness < rules.sharpness, scan.sharpness),
        (COMPRESSED, scan.compression < rules.compression, scan.compression),
    ]:
        new = wrong & (reason == KEPT)
        reason[new], measured[new] = rule, number[new]

    if rules.exact_duplicates:
        left = np.flatnonzero(reason == KEPT)
        first = left[_first_of_equals(scan.sha256[left])]
        copies = left[first != left]
        reason[copies], measured[copies], of[copies] = EXACT, 0, first[first != left]
    if rules.near_duplicate_bits >= 0:
        left = np.flatnonzero(reason == KEPT)
        pixels = scan.sizes[left].astype(np.int64).prod(axis=1)
        best_first = np.lexsort(
            (left, -scan.bytes[left], -pixels)
        )  # most pixels, then most bytes, then the first
        rank = np.empty(len(left), np.int64)
        rank[best_first] = np.arange(len(left))
        near, distance = near_duplicates(scan.hashes[left], rank, rules.near_duplicate_bits)
        copies = near >= 0
        reason[left[copies]], measured[left[copies]] = NEAR, distance[copies]
        of[left[copies]] = left[near[copies]]
        # An exact duplicate of what has just been dropped is a near duplicate of the same image.
        chained = np.flatnonzero((reason == EXACT) & (reason[of] == NEAR))
        reason[chained], measured[chained], of[chained] = NEAR, measured[of[chained]], of[of[chained]]
    return Choice(reason, measured, of)


def near_duplicates(
    hashes: UInt64[np.ndarray, "n words"], rank: Int64[np.ndarray, " n"], limit: int
) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
    """For each hash the kept one that it is a near duplicate of, or -1 where it is kept; and how many bits differ.

    In order of rank, each is kept unless one that is kept already differs from it in at most `limit` bits. So no two
    that are kept are so close, and nothing is dropped for what it resembles only by way of others.
    """
    equal_order = np.lexsort((rank, *hashes.T))
    equal = np.empty(len(hashes), np.int64)  # the best of those with the same hash
    equal[equal_order] = equal_order[_first_of_equals(hashes[equal_order])]
    unique = np.flatnonzero(equal == np.arange(len(hashes)))
    of, distance = np.full(len(hashes), -1), np.zeros(len(hashes), np.int64)

    first, second, apart = close_pairs(hashes[unique], limit)
    first, second = unique[first], unique[second]
    swapped = rank[first] > rank[second]
    better, worse = np.where(swapped, second, first), np.where(swapped, first, second)
    # Of the kept ones that an image is close to, it counts as a duplicate of the closest.
    for pair in np.lexsort((rank[better], apart, rank[worse])):
        if of[worse[pair]] < 0 and of[better[pair]] < 0:
            of[worse[pair]], distance[worse[pair]] = better[pair], apart[pair]

    copies = equal != np.arange(len(hashes))
    dropped_too = copies & (of[equal] >= 0)
    distance[dropped_too] = distance[equal[dropped_too]]
    of[copies] = np.where(of[equal] >= 0, of[equal], equal)[copies]
    return of, distance


def close_pairs(
    hashes: UInt64[np.ndarray, "n words"], limit: int
) -> tuple[Int64[np.ndarray, " p"], Int64[np.ndarray, " p"], Int64[np.ndarray, " p"]]:
    """All pairs of hashes that differ in at most `limit` bits: (first, second, bits that differ), first < second.

    Cut into limit + 1 bands of bits, two such hashes agree in at least one band (pigeonhole principle). So only those
    with an equal band are compared: with 13 bands of 20 bits, of 10^8 unrelated hashes about 100 with each.
    """
    octets = hashes.view(np.uint8)
    edges = np.linspace(0, 8 * octets.shape[1], limit + 2).round().astype(int)
    found = [np.zeros((0, 3), np.int64)]
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        bits = np.unpackbits(octets[:, start // 8 : -(-stop // 8)], axis=1)
        keys = np.packbits(bits[:, start % 8 :][:, : stop - start], axis=1)
        keys = np.ascontiguousarray(np.pad(keys, ((0, 0), (0, -keys.shape[1] % 8)))).view(np.uint64)
        order = np.lexsort(keys.T)
        group = _group_numbers(keys[order])
        end = np.searchsorted(group, group, side="right")
        left = np.arange(len(order))
        for step in range(1, len(order)):  # as often as the largest group has members
            left = left[left + step < end[left]]
            if not len(left):
                break
            one, other = order[left], order[left + step]
            apart = np.bitwise_count(hashes[one] ^ hashes[other]).sum(axis=1, dtype=np.int64)
            close = apart <= limit
            pair = np.sort(np.stack([one[close], other[close]], axis=1), axis=1)
            found.append(np.column_stack([pair, apart[close]]))
    return tuple(np.unique(np.concatenate(found), axis=0).T)  # a pair may agree in several bands


def _group_numbers(sorted_keys):
    """0 for the first rows of a sorted [n, words], and one more wherever a row differs from the one before."""
    new = (sorted_keys[1:] != sorted_keys[:-1]).any(axis=1)
    return np.concatenate([[0], np.cumsum(new)])[: len(sorted_keys)]


def _first_of_equals(keys):
    """For each row of [n, words] the number of the first row that is the same."""
    order = np.lexsort(keys.T)  # stable: among equals the first comes first
    group = _group_numbers(keys[order])
    first = np.empty(len(keys), np.int64)
    first[order] = order[np.searchsorted(group, group, side="left")]
    return first


# --------------------------------------------------------------------------------------------------
# What is written
# --------------------------------------------------------------------------------------------------


def _plan(scan, choice, rules):
    """The numbers of the images in each shard."""
    shards, room = [], 0
    for index in np.flatnonzero(choice.reason == KEPT).tolist():
        size = int(scan.bytes[index])
        if not shards or size > room:
            shards.append([])
            room = rules.shard_mib * 2**20
        shards[-1].append(index)
        room -= size
    return shards


def _plan_digest(scan, shards):
    digest = hashlib.sha256(repr((FORMAT, list(map(len, shards)))).encode())
    for shard in shards:
        digest.update(scan.sha256[shard].tobytes())
        digest.update(np.array(shard, np.int64).tobytes())
    return digest.hexdigest()


def _has_plan(output, plan):
    try:
        return json.loads((output / PLAN_FILE).read_bytes()) == {"plan": plan}
    except (OSError, ValueError):
        return False


def _finished(output, plan, rules):
    """Whether the output is whole, and of this plan and these rules."""
    try:
        ShardSource(output)
        same_rules = read_index(output)["rules"] == dataclasses.asdict(rules)
    except ValueError:
        return False
    there = all((output / name).is_file() for name in (REPORT_FILE, DROPPED_FILE))
    return there and same_rules and _has_plan(output, plan)


def _start_plan(output, plan):
    """Delete the shards of another plan. Without an index, nobody takes what is left for a finished one."""
    (output / INDEX_FILE).unlink(missing_ok=True)
    if _has_plan(output, plan):
        return
    for path in output.glob("shard-*.array_record"):
        path.unlink()
    with replacing(output / PLAN_FILE) as file:
        file.write(_json_line({"plan": plan}))


def _write_shards(collection, output, scan, shards, workers):
    def missing():
        for number, shard in enumerate(shards):
            if not (output / shard_name(number)).exists():
                lines = [scan.line(index) for index in shard]
                entries = [
                    (index, line["sha256"], line["caption"], line["name"])
                    for index, line in zip(shard, lines, strict=True)
                ]
                yield output / shard_name(number), entries

    there = sum((output / shard_name(number)).exists() for number in range(len(shards)))
    with tqdm(desc="write", unit="shard", total=len(shards), initial=there, dynamic_ncols=True) as progress:
        for _ in _in_order(_write_shard, missing(), collection, workers):
            progress.update()


def _write_shard(collection, path, entries):
    from array_record.python.array_record_module import ArrayRecordWriter

    partial = path.with_name(f".{path.name}.partial")
    try:
        writer = ArrayRecordWriter(str(partial), "group_size:1,zstd:1")  # each record can be read by itself
        for index, sha256, caption, name in entries:
            data = collection.encoded(index)
            if hashlib.sha256(data).hexdigest() != sha256:
                raise ValueError(
                    f"{name}: has changed since it was scanned; delete {path.parent} and index the images anew"
                )
            writer.write(pack_record(data, caption, name))
        writer.close()
    except RuntimeError as error:
        raise ValueError(f"{path}: cannot be written ({error})") from None
    open_shard(partial, len(entries)).close()
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.rename(path)


def _write_index_files(output, scan, shards, rules):
    kept = np.concatenate(shards)
    with replacing(output / SIZES_FILE) as file:
        np.save(file, scan.sizes[kept])
    files = [output / shard_name(number) for number in range(len(shards))]
    index = {
        "format": FORMAT,
        "images": len(kept),
        "digest": hashlib.sha256(scan.sha256[kept].tobytes()).hexdigest()[:12],
        "rules": dataclasses.asdict(rules),
        "shards": [
            {"file": file.name, "images": len(shard), "bytes": file.stat().st_size}
            for file, shard in zip(files, shards, strict=True)
        ],
    }
    with replacing(output / INDEX_FILE) as file:
        file.write(json.dumps(index, indent=1).encode() + b"\n")


def _rule_texts(rules):
    """For each reason its name and its limit."""
    return {
        DAMAGED: ("undecodable", ""),
        SMALL: ("short side too short", f"at least {rules.shortest_side} pixels"),
        ELONGATED: ("too elongated", f"at most {rules.longest_aspect:g} : 1"),
        FLAT: ("too little contrast", f"at least {rules.contrast:g} levels"),
        BLURRED: ("too blurred", f"at least {rules.sharpness:g}"),
        COMPRESSED: (
            "too strongly compressed",
            f"at least {rules.compression:g} of JPEG quality {REFERENCE_QUALITY}",
        ),
        EXACT: ("exact duplicate", ""),
        NEAR: ("near duplicate", f"at most {rules.near_duplicate_bits} of {HASH_SIDE**2} bits"),
    }


def _write_dropped(output, scan, choice, rules):
    texts = _rule_texts(rules)
    with replacing(output / DROPPED_FILE) as file:
        text = io.TextIOWrapper(file, "utf-8", newline="")
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["image", "rule", "measured", "limit", "duplicate of"])
        for index in np.flatnonzero(choice.reason != KEPT).tolist():
            line, number = scan.line(index), choice.measured[index]
            rule, limit = texts[choice.reason[index]]
            measured = line["error"] if choice.reason[index] == DAMAGED else f"{number:.4g}"
            of = int(choice.of[index])
            of = scan.line(of)["name"] if of >= 0 else ""
            table.writerow([line["name"], rule, measured, limit, of])
        text.flush()
        text.detach()


def _report(specs, scan, choice, rules, shards):
    kept = np.concatenate(shards)
    lines = [
        f"{len(scan)} images of {', '.join(specs)}",
        f"{len(kept):8d} kept: {scan.bytes[kept].sum() / 2**20:.1f} MiB in {len(shards)} "
        f"shard{'s' * (len(shards) > 1)}",
    ]
    for reason, (rule, limit) in _rule_texts(rules).items():
        count = np.count_nonzero(choice.reason == reason)
        lines.append(f"{count:8d} dropped: {rule}" + (f" (limit: {limit})" if limit else ""))
    if scan.broken_captions:
        lines.append(
            f"{len(scan.broken_captions)} captions cannot be read, the first: {scan.broken_captions[0]}"
        )
    return "\n".join(lines) + "\n"


# --------------------------------------------------------------------------------------------------
# The output folder, and processes
# --------------------------------------------------------------------------------------------------


def _check_output(output):
    """Delete what a killed run left half written; refuse a folder that holds anything that is not ours."""
    names = sorted(os.listdir(output))
    temporary = [name for name in names if TEMPORARY_FILES.fullmatch(name)]
    own = [name for name in names if OWN_FILES.fullmatch(name)] if SCAN_FILE in names else []
    strange = sorted(set(names) - set(temporary) - set(own))
    if strange:
        raise ValueError(f"{output}: holds {strange[0]}, which no indexing left there; choose another output")
    for name in temporary:
        (output / name).unlink()


@contextlib.contextmanager
def _locked(output) -> Iterator[None]:
    """Make the folder, and let no other run write into it."""
    import fcntl  # absent on Windows, where the rest of prepare should go on working

    try:
        output.mkdir(parents=True, exist_ok=True)
        folder = os.open(output, os.O_RDONLY)
    except OSError as error:
        raise ValueError(f"{output}: cannot be written to ({error.strerror})") from None
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ValueError(f"{output}: another run is writing there") from None
    finally:
        os.close(folder)


def _in_order(
    function: Callable[..., Any], arguments: Iterable[tuple], collection: Collection, workers: int
) -> Iterator[Any]:
    """function(collection, *arguments) for each of the arguments, in order, computed by processes; 0 = by this one."""
    if workers == 0:
        yield from (function(collection, *some) for some in arguments)
        return
    # Not forked: the threads of this process (numpy's, OpenCV's) would be missing in the children.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start_worker, (collection,))
    waiting = collections.deque()
    try:
        for some in arguments:
            waiting.append(pool.submit(_call, function, some))
            if len(waiting) >= 4 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise ValueError(
            f"one of {workers} processes was killed, perhaps for want of memory; run again, with fewer workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_collection = None  # of this process, where it is a worker


def _start_worker(collection):
    global _collection
    _collection = collection
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent as well, which ends this process
    raise_pixel_limit()
    cv2.setNumThreads(1)
    # Without this, the workers of a run that is killed would wait for work for ever.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def _call(function, arguments):
    return function(_collection, *arguments)
