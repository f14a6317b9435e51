"""Numbered records on disk: ArrayRecord shards of msgpack, beside a JSON file, their index, that is written last.

A folder without its index is not finished. Images (shards.py), latents (latents.py) and text embeddings (text.py) are
stored like this; what must be known of all records at once lies beside them in memory-mapped `.npy` files.
"""

import contextlib
import json
import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from zipir_jax.files import replacing

FORMAT = 1
SHARD_BYTES = 512 * 2**20  # of records, at least; then the next shard begins
OPEN_SHARDS = 128  # at once; each takes a file descriptor, of which a process often has 1024


# --------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------


def shard_name(number: int, stem: str = "shard") -> str:
    """The name of a shard's file."""
    return f"{stem}-{number:05d}.array_record"


class ShardWriter:
    """Writes records, dicts that msgpack knows, into a file that appears, whole, when the writer is closed.

    bytes: of the records so far. Raises ValueError, with the path, for what cannot be written.
    """

    def __init__(self, path: Path):
        from array_record.python.array_record_module import ArrayRecordWriter

        self.path, self.bytes, self._records = path, 0, 0
        self._partial = path.with_name(f".{path.name}.partial")
        with self._errors_named():
            # In groups of one, so that each record can be read by itself.
            self._writer = ArrayRecordWriter(str(self._partial), "group_size:1,zstd:1")

    def write(self, record: dict) -> None:
        # A caption out of a JSON file may hold half a character, which UTF-8 refuses.
        packed = msgpack.packb(record, unicode_errors="surrogatepass")
        with self._errors_named():
            self._writer.write(packed)
        self.bytes += len(packed)
        self._records += 1

    def close(self) -> dict[str, Any]:
        """Returns what an index says of the shard."""
        with self._errors_named():
            self._writer.close()
        open_shard(self._partial, self._records).close()
        with self._partial.open("rb") as file:
            os.fsync(file.fileno())
        self._partial.rename(self.path)
        return shard_entry(self.path, self._records)

    @contextlib.contextmanager
    def _errors_named(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise ValueError(f"{self.path}: cannot be written ({error})") from None


def shard_entry(path: Path, records: int) -> dict[str, Any]:
    """What an index says of a shard."""
    return {"file": path.name, "records": records, "bytes": path.stat().st_size}


def write_index_file(path: Path, description: dict[str, Any], shards: list[dict[str, Any]]) -> None:
    """Write an index: the format, what describes the whole, and what `ShardWriter.close` returned of each shard."""
    with replacing(path) as file:
        file.write(
            json.dumps({"format": FORMAT} | description | {"shards": shards}, indent=1).encode() + b"\n"
        )


def check_new(folder: Path, index: str) -> None:
    """Raises ValueError if the folder holds an index already."""
    if (folder / index).exists():
        raise ValueError(f"{folder} holds {index} already: choose another output")


def write_records(folder: Path, index: str, records: Iterable[dict], description: dict[str, Any]) -> None:
    """Write records in order, and then `index`, a JSON file, with `description` in it.

    Raises ValueError as `check_new`, and for what cannot be written.
    """
    folder = Path(folder)
    check_new(folder, index)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder}: cannot be written to ({error.strerror})") from None
    shards, writer = [], None
    for record in records:
        if writer is None:
            writer = ShardWriter(folder / shard_name(len(shards), Path(index).stem))
        writer.write(record)
        if writer.bytes >= SHARD_BYTES:
            shards.append(writer.close())
            writer = None
    if writer is not None:
        shards.append(writer.close())
    write_index_file(folder / index, description, shards)


def remove_records(folder: Path, index: str) -> None:
    """Remove what `write_records` wrote with this index, or left half written; the index first."""
    (folder / index).unlink(missing_ok=True)
    stem = Path(index).stem
    for path in (*folder.glob(f"{stem}-*.array_record"), *folder.glob(f".{stem}-*.array_record.partial")):
        path.unlink()


# --------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------


class Records:
    """Random access to a folder's records: `len(records)`, `records[i]`; `index` is what the JSON file says.

    fields: what it must say beside the shards.

    Raises ValueError where the folder has no index or one of another format, or where a shard is missing or of another
    size; one with another number of records is named when it is first read. Shards are opened when a record of theirs
    is asked for. Threads may share it; when it is pickled, it opens its files anew.
    """

    def __init__(self, folder: str | Path, index_file: str, fields: tuple[str, ...] = ()):
        self.folder, self._arguments = Path(folder), (folder, index_file, fields)
        self.index = read_index(self.folder / index_file, fields)
        self._shards = self.index["shards"]
        for shard in self._shards:
            path = self.folder / shard["file"]
            if not path.is_file():
                raise ValueError(f"{path}: no such file, but {index_file} names it")
            if path.stat().st_size != shard["bytes"]:
                raise ValueError(
                    f"{path}: holds {path.stat().st_size} bytes instead of the {shard['bytes']} that "
                    f"{index_file} names"
                )
        self._starts = np.cumsum([0] + [shard["records"] for shard in self._shards])
        self._readers = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple:
        return type(self), self._arguments

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} does not lie within 0 to {len(self) - 1}.")
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        reader = self._reader(shard)
        try:
            packed = reader.read([int(index - self._starts[shard])])[0]
            return msgpack.unpackb(packed, unicode_errors="surrogatepass")
        except (RuntimeError, ValueError) as error:
            path = self.folder / self._shards[shard]["file"]
            raise ValueError(f"{path}: record {index - self._starts[shard]} is damaged ({error})") from None

    def column(self, file: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        """The array in a `.npy` file of the folder, memory-mapped. Raises ValueError where it is another."""
        path = self.folder / file
        try:
            array = np.load(path, mmap_mode="r" if 0 not in shape else None)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{path}: cannot be read ({error})") from None
        if array.shape != shape or array.dtype != dtype:
            raise ValueError(
                f"{path}: {array.dtype} {array.shape} instead of the {np.dtype(dtype)} {shape} of its index"
            )
        return array

    def _reader(self, shard):
        with self._lock:
            reader = self._readers.get(shard)
            if reader is None:
                if len(self._readers) == OPEN_SHARDS:
                    # Not closed by hand: another thread may be reading from it.
                    del self._readers[next(iter(self._readers))]
                entry = self._shards[shard]
                reader = self._readers[shard] = open_shard(self.folder / entry["file"], entry["records"])
            return reader


def read_index(path: Path, fields: tuple[str, ...] = ()) -> dict[str, Any]:
    """The contents of an index, `fields` among them. Raises ValueError for one that is missing, damaged or of another
    format.
    """
    try:
        index = json.loads(path.read_bytes())
        found = index["format"]
        if found == FORMAT:
            [(shard["file"], shard["records"], shard["bytes"]) for shard in index["shards"]]
            [index[field] for field in fields]
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: not the index of a folder of shards") from None
    if found != FORMAT:
        raise ValueError(f"{path}: of format {found}, not {FORMAT}; make the folder anew")
    return index


def open_shard(path: Path, records: int) -> Any:
    """An ArrayRecord reader. Raises ValueError where the file does not hold so many records."""
    from array_record.python.array_record_module import ArrayRecordReader

    # Reading ahead is for those who read a shard from front to back.
    reader = ArrayRecordReader(str(path), "readahead_buffer_size:0")
    if reader.num_records() != records:  # 0 for a file that is no shard
        raise ValueError(
            f"{path}: holds {reader.num_records()} records instead of the {records} that its index names"
        )
    return reader
