"""The first half of `prepare index`: look at every image of a collection once, by several processes.

What is measured goes into scan.jsonl: a line for the collection and one for each of its images, in order. It is only
ever appended to, so that a run that was killed goes on behind its last whole line.
"""

import collections
import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from zipir_jax.data.quality import HASH_SIDE, jpeg_bytes, perceptual_hash, sharpness
from zipir_jax.data.records import FORMAT
from zipir_jax.data.shards import INDEX_FILE, SCAN_FILE, ShardSource
from zipir_jax.data.sources import file_digest, read_caption
from zipir_jax.data.workers import start_worker
from zipir_jax.files import replacing
from zipir_jax.imageio import list_images, read_image_uint8

CHUNK = 8  # images that a process scans at a time
HASH_WORDS = HASH_SIDE**2 // 64


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
# The scan
# --------------------------------------------------------------------------------------------------


def scan_collection(collection: Collection, output: Path, workers: int) -> None:
    """Bring the output's scan.jsonl up to the collection's last image. Raises ValueError for that of other images."""
    path = output / SCAN_FILE
    header = {"format": FORMAT, "images": repr(collection)}
    if not path.exists():
        with replacing(path) as file:
            file.write(json_line(header))
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
            for lines in in_order(_scan_chunk, chunks, collection, workers):
                file.write(b"".join(lines))
                file.flush()
                progress.update(len(lines))
        os.fsync(file.fileno())


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


def _scan_chunk(collection, start, stop):
    return [json_line(measure(collection, index)) for index in range(start, stop)]


def json_line(fields: dict[str, Any]) -> bytes:
    """A line of a .jsonl file."""
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
# Processes
# --------------------------------------------------------------------------------------------------


def in_order(
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
    start_worker()


def _call(function, arguments):
    return function(_collection, *arguments)
