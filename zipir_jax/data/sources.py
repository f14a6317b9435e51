"""Where training images come from: folders, shards, TFDS data sets and synthetic images behind one interface."""

import bisect
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32, UInt8

from zipir_jax.data.shards import INDEX_FILE, SCAN_FILE, ShardSource
from zipir_jax.imageio import IMAGE_SUFFIXES, list_images, read_image_uint8, upright_size

HEADER_THREADS = 16  # that read headers at the start; most of the time they wait for the disk


@runtime_checkable
class Source(Protocol):
    """Random access to images. Threads may share a source; a pickled one (Grain's workers) opens its files anew."""

    name: str  # what errors and logs call it
    sizes: Int32[
        np.ndarray, "n 2"
    ]  # upright height and width in pixels of each image, known without decoding it
    damaged: list[
        str
    ]  # one sentence for each file that is left out, or used without its caption, as it is damaged

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> UInt8[np.ndarray, "h w 3"]:
        """The image, upright. Raises ValueError, with its path or name, where it cannot be decoded."""
        ...

    def caption(self, index: int) -> str:
        """What the image shows, in words; "" where nobody said."""
        ...

    def __repr__(self) -> str:
        """Changes with the images and their order, not with their place: checkpoints hold it, and compare it."""
        ...


def open_sources(specs: tuple[str, ...], cache_gib: float = 0.0) -> Source:
    """The images that the specs name, one after the other.

    A spec is a folder of images, a folder that `prepare index` wrote, `tfds:NAME[:SPLIT]` (a data set that
    tensorflow-datasets has prepared; the split is "train" by default), or `synthetic:COUNT:SIDE[:SEED]`. Folders of
    images share a cache of `cache_gib` GiB of decoded pixels evenly. Raises ValueError where one cannot be opened.
    """
    if not specs:
        raise ValueError("no images are named; give a folder, tfds:NAME or synthetic:COUNT:SIDE.")
    folders = sum(_is_plain_folder(spec) for spec in specs)
    sources = [_open_source(spec, cache_gib / max(folders, 1)) for spec in specs]
    return sources[0] if len(sources) == 1 else ConcatSource(sources)


def _is_plain_folder(spec):
    return not spec.startswith(("tfds:", "synthetic:")) and not (Path(spec) / INDEX_FILE).is_file()


def _open_source(spec, cache_gib):
    if _is_plain_folder(spec):
        if (Path(spec) / SCAN_FILE).is_file():
            raise ValueError(f"{spec}: its index is not finished; run prepare index again, which goes on")
        return FolderSource(spec, cache_gib)
    if spec.startswith("tfds:"):
        from zipir_jax.data.tfds_source import TfdsSource  # only some need it

        return TfdsSource(spec)
    if spec.startswith("synthetic:"):
        from zipir_jax.data.synthetic import SyntheticSource

        numbers = re.fullmatch(r"synthetic:(\d+):(\d+)(?::(\d+))?", spec)
        if not numbers:
            raise ValueError(f"{spec}: not of the form synthetic:COUNT:SIDE or synthetic:COUNT:SIDE:SEED.")
        return SyntheticSource(*(int(number or 0) for number in numbers.groups()))
    return ShardSource(spec)


class FolderSource:
    """The images of a folder and its subfolders, in the order of their names.

    Captions are files beside the images: `photo.txt`, all of it, or else `photo.json`, its "caption" or else "text".
    Where such a file is damaged, its image has no caption. Decoded images are kept in memory until `cache_gib` GiB are
    full, in each process. Raises ValueError where there is no such folder, or no image in it that can be read.
    """

    def __init__(self, folder: str | Path, cache_gib: float = 0.0):
        self.folder = Path(folder)
        self.name = str(folder)
        paths = list_images(self.folder, recursive=True)
        broken_captions = []

        def size(index):
            height_and_width = upright_size(paths[index])
            try:
                read_caption(paths[index])
            except ValueError as error:
                broken_captions.append(f"{error}; its image is used without a caption")
            return height_and_width

        readable, self.sizes, damaged = read_headers(len(paths), size)
        self.paths = [paths[i] for i in readable]
        self.damaged = damaged + sorted(broken_captions)
        if not self.paths:
            kinds = ", ".join(sorted(IMAGE_SUFFIXES))
            reason = f" that can be read; {len(paths)} are damaged" if paths else ""
            raise ValueError(f"{self.folder}: holds no image ({kinds}){reason}")
        self._digest = file_digest(self.folder, self.paths)
        self._cache_gib = cache_gib
        self._start_cache()

    def _start_cache(self):
        self._room = int(self._cache_gib * 2**30)
        self._cache = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in ("_cache", "_lock", "_room")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start_cache()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> UInt8[np.ndarray, "h w 3"]:
        cached = self._cache.get(index)
        if cached is not None:
            return cached
        pixels = read_image_uint8(self.paths[index])
        with self._lock:
            if index not in self._cache and pixels.nbytes <= self._room:
                self._room -= pixels.nbytes
                self._cache[index] = pixels
        return pixels

    def caption(self, index: int) -> str:
        try:
            return read_caption(self.paths[index])
        except ValueError:  # named in `damaged`
            return ""

    def __repr__(self) -> str:
        return f"FolderSource({len(self)} images, {self._digest})"


class ConcatSource:
    """Several sources, one after the other."""

    def __init__(self, sources: list[Source]):
        self.sources = list(sources)
        self.name = " + ".join(source.name for source in sources)
        self.sizes = np.concatenate([source.sizes for source in sources])
        self.damaged = [sentence for source in sources for sentence in source.damaged]
        self._starts = np.cumsum([0, *map(len, sources)]).tolist()

    def _find(self, index):
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} does not lie within 0 to {len(self) - 1}.")
        which = bisect.bisect(self._starts, index) - 1
        return self.sources[which], index - self._starts[which]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> UInt8[np.ndarray, "h w 3"]:
        source, position = self._find(index)
        return source[position]

    def caption(self, index: int) -> str:
        source, position = self._find(index)
        return source.caption(position)

    def __repr__(self) -> str:
        return f"ConcatSource({', '.join(map(repr, self.sources))})"


def read_headers(
    count: int, size_of: Callable[[int], tuple[int, int]]
) -> tuple[list[int], Int32[np.ndarray, "n 2"], list[str]]:
    """Sizes of `count` images, read by threads; `size_of(i)` returns (height, width) or raises ValueError.

    Returns the numbers of the images whose header could be read, their sizes, and one sentence for each of the others.
    """

    def header(index):
        try:
            return size_of(index)
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor(HEADER_THREADS) as pool:
        found = list(pool.map(header, range(count)))
    readable = [index for index, size in enumerate(found) if not isinstance(size, str)]
    sizes = np.array([found[index] for index in readable], np.int32).reshape(-1, 2)
    return readable, sizes, [size for size in found if isinstance(size, str)]


def read_caption(image: Path) -> str:
    """The caption beside an image file: `.txt`, else `.json`; "" where there is neither.

    Raises ValueError, with the path in it, for text that is no UTF-8, or no JSON object with a "caption" or "text".
    """
    for suffix in (".txt", ".json"):
        path = image.with_suffix(suffix)
        try:
            text = path.read_text(encoding="utf-8-sig")
            if suffix == ".txt":
                return text.strip()
            fields = json.loads(text)
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{path}: the caption cannot be read ({error})") from None
        caption = fields.get("caption", fields.get("text", "")) if isinstance(fields, dict) else None
        if not isinstance(caption, str):
            raise ValueError(f'{path}: the caption cannot be read (no object with a text as its "caption")')
        return caption.strip()
    return ""


def file_digest(folder: Path, paths: list[Path]) -> str:
    """What changes with the files' relative names, order and sizes; to read all their bytes would take too long."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(os.fsencode(path.relative_to(folder).as_posix()) + b"\0%d\0" % path.stat().st_size)
    return digest.hexdigest()[:12]
