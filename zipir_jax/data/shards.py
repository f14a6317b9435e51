"""Images in a few large ArrayRecord files instead of millions of small ones, and an index of them.

A folder of shards holds

    shard-00000.array_record ...   one record an image: msgpack of {"image": its file's bytes, "caption", "name"}
    sizes.npy                      int32 [n, 2], upright height and width of each image; memory-mapped
    index.json                     the shards, with their numbers of images and bytes; written last, so that a folder
                                   without it is not finished

`prepare index` writes it (index.py), beside files of its own.
"""

import json
import threading
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from jaxtyping import UInt8

from zipir_jax.imageio import read_image_uint8

FORMAT = 1
INDEX_FILE = "index.json"
SIZES_FILE = "sizes.npy"
SCAN_FILE = "scan.jsonl"  # what `prepare index` begins with
OPEN_SHARDS = 128  # at once; each takes a file descriptor, of which a process often has 1024


def shard_name(number: int) -> str:
    """The name of a shard's file."""
    return f"shard-{number:05d}.array_record"


def pack_record(image: bytes, caption: str, name: str) -> bytes:
    """A shard's record of an image file's bytes."""
    return msgpack.packb({"image": image, "caption": caption, "name": name})


class ShardSource:
    """The images of a folder of shards, in the order of the collection that they were made from.

    Raises ValueError where the folder has no index or one of another format, or where a shard is missing or of another
    size; one with another number of records is named when it is first read. Shards are opened when an image of theirs
    is asked for.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.name = str(folder)
        self.damaged = []
        index = read_index(self.folder)
        self._shards = index["shards"]
        self._digest = index["digest"]
        for shard in self._shards:
            path = self.folder / shard["file"]
            if not path.is_file():
                raise ValueError(f"{path}: no such file, but {INDEX_FILE} names it")
            if path.stat().st_size != shard["bytes"]:
                raise ValueError(
                    f"{path}: holds {path.stat().st_size} bytes instead of the {shard['bytes']} that "
                    f"{INDEX_FILE} names"
                )
        self._starts = np.cumsum([0] + [shard["images"] for shard in self._shards])
        self.sizes = _read_sizes(self.folder / SIZES_FILE, int(self._starts[-1]))
        self._readers = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["folder"])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> UInt8[np.ndarray, "h w 3"]:
        record = self._record(index)
        return read_image_uint8(f"{self.folder}: {record['name']}", record["image"])

    def caption(self, index: int) -> str:
        return self._record(index)["caption"]

    def encoded(self, index: int) -> bytes:
        """The bytes of the image's file."""
        return self._record(index)["image"]

    def image_name(self, index: int) -> str:
        """What the image's file was called, below its folder."""
        return self._record(index)["name"]

    def __repr__(self) -> str:
        return f"ShardSource({len(self)} images, {self._digest})"

    def _record(self, index):
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} does not lie within 0 to {len(self) - 1}.")
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        reader = self._reader(shard)
        try:
            return msgpack.unpackb(reader.read([int(index - self._starts[shard])])[0])
        except (RuntimeError, ValueError) as error:
            path = self.folder / self._shards[shard]["file"]
            raise ValueError(f"{path}: record {index - self._starts[shard]} is damaged ({error})") from None

    def _reader(self, shard):
        with self._lock:
            reader = self._readers.get(shard)
            if reader is None:
                if len(self._readers) == OPEN_SHARDS:
                    # Not closed by hand: another thread may be reading from it.
                    del self._readers[next(iter(self._readers))]
                images = self._shards[shard]["images"]
                reader = self._readers[shard] = open_shard(self.folder / self._shards[shard]["file"], images)
            return reader


def read_index(folder: Path) -> dict[str, Any]:
    """The contents of a folder's index.json. Raises ValueError where it is missing, damaged or of another format."""
    path = Path(folder) / INDEX_FILE
    try:
        index = json.loads(path.read_bytes())
        found = index["format"]
        if found == FORMAT:
            index["digest"], [(shard["file"], shard["images"], shard["bytes"]) for shard in index["shards"]]
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: not the index of a folder of shards") from None
    if found != FORMAT:
        raise ValueError(f"{path}: of format {found}, not {FORMAT}; index the images anew")
    return index


def open_shard(path: Path, images: int) -> Any:
    """An ArrayRecord reader. Raises ValueError where the file does not hold so many records."""
    from array_record.python.array_record_module import ArrayRecordReader

    # Reading ahead is for those who read a shard from front to back.
    reader = ArrayRecordReader(str(path), "readahead_buffer_size:0")
    if reader.num_records() != images:  # 0 for a file that is no shard
        raise ValueError(
            f"{path}: holds {reader.num_records()} images instead of the {images} that its index names"
        )
    return reader


def _read_sizes(path, images):
    try:
        sizes = np.load(path, mmap_mode="r" if images else None)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None
    if sizes.shape != (images, 2) or sizes.dtype != np.int32:
        raise ValueError(
            f"{path}: {sizes.dtype} {sizes.shape} instead of the int32 ({images}, 2) of its index"
        )
    return sizes
