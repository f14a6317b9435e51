"""Numbered records on disk: ArrayRecord shards beside a JSON file that names them, which is written last."""

import json
from collections.abc import Iterable
from pathlib import Path

import grain
import msgpack
from array_record.python.array_record_module import ArrayRecordWriter

from zipir_jax.files import replacing

SHARD_BYTES = 512 * 2**20  # of records, at least; then the next shard begins


def write_records(folder: Path, index: str, records: Iterable[dict], description: dict) -> None:
    """Write records (dicts that msgpack knows) in order, then `index`, a JSON file with `description` and the shards.

    Raises ValueError if the folder holds an index already.
    """
    folder = Path(folder)
    if (folder / index).exists():
        raise ValueError(f"{folder} holds {index} already: choose another output")
    folder.mkdir(parents=True, exist_ok=True)
    shards, writer, room, count = [], None, 0, 0
    for record in records:
        if writer is None:
            shards.append(f"{Path(index).stem}-{len(shards):05d}.arrayrecord")
            writer, room = ArrayRecordWriter(str(folder / shards[-1]), "group_size:1"), SHARD_BYTES
        packed = msgpack.packb(record)
        writer.write(packed)
        count, room = count + 1, room - len(packed)
        if room <= 0:
            writer.close()
            writer = None
    if writer is not None:
        writer.close()
    with replacing(folder / index) as file:
        file.write(json.dumps(description | {"records": count, "shards": shards}, indent=2).encode() + b"\n")


class Records:
    """Random access to what `write_records` wrote: `len(records)`, `records[i]`, and `description`.

    Raises ValueError, with the folder, where the index or a shard is missing, or the shards hold other than it says.
    """

    def __init__(self, folder: str | Path, index: str):
        folder = Path(folder)
        if not (folder / index).is_file():
            raise ValueError(f"{folder}: {index} is missing")
        self.description = json.loads((folder / index).read_text())
        paths = [folder / shard for shard in self.description["shards"]]
        for path in paths:
            if not path.is_file():
                raise ValueError(f"{folder}: {path.name} is missing")
        self._source = grain.sources.ArrayRecordDataSource([str(path) for path in paths])
        if len(self._source) != self.description["records"]:
            raise ValueError(
                f"{folder}: the shards hold {len(self._source)} records, not {self.description['records']}"
            )

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict:
        return msgpack.unpackb(self._source[index])
