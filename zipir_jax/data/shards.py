"""Images in a few large ArrayRecord files instead of millions of small ones, and an index of them.

A folder of shards holds

    shard-00000.array_record ...   one record an image: {"image": its file's bytes, "caption", "name"}; see records.py
    sizes.npy                      int32 [n, 2], upright height and width of each image; memory-mapped
    index.json                     the shards, with their numbers of images and bytes; written last, so that a folder
                                   without it is not finished

`prepare index` writes it (index.py), beside files of its own.
"""

from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from zipir_jax.data.records import Records
from zipir_jax.imageio import read_image_uint8

INDEX_FILE = "index.json"
SIZES_FILE = "sizes.npy"
SCAN_FILE = "scan.jsonl"  # what `prepare index` begins with


class ShardSource:
    """The images of a folder of shards, in the order of the collection that they were made from.

    Raises ValueError as `Records`, and where the sizes are missing or of other images.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.name = str(folder)
        self.damaged = []
        self._records = Records(folder, INDEX_FILE, ("digest",))
        self._digest = self._records.index["digest"]
        self.sizes = self._records.column(SIZES_FILE, (len(self), 2), np.int32)

    def __reduce__(self) -> tuple:  # a memory-mapped array would be pickled as a whole
        return type(self), (self.folder,)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> UInt8[np.ndarray, "h w 3"]:
        record = self._records[index]
        return read_image_uint8(f"{self.folder}: {record['name']}", record["image"])

    def caption(self, index: int) -> str:
        return self._records[index]["caption"]

    def encoded(self, index: int) -> bytes:
        """The bytes of the image's file."""
        return self._records[index]["image"]

    def image_name(self, index: int) -> str:
        """What the image's file was called, below its folder."""
        return self._records[index]["name"]

    def __repr__(self) -> str:
        return f"ShardSource({len(self)} images, {self._digest})"
