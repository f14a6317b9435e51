"""Where training images come from."""

import hashlib
import os
import threading
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from zipir_jax.imageio import IMAGE_SUFFIXES, list_images, read_image_uint8, stored_size


class FolderSource:
    """Random access to the images of a folder and its subfolders: `len(source)`, `source[i] -> uint8 [h, w, 3]`.

    Decoded images are kept in memory until `cache_gib` GiB are full. Images smaller than `smallest_side` pixels on
    either side are left out. Raises ValueError if none is left, and with the path for a file that cannot be read, here
    where its header is damaged, or when its pixels are asked for.
    """

    def __init__(self, folder: str | Path, smallest_side: int, cache_gib: float = 0.0):
        self.folder = Path(folder)
        self.paths = []
        for path in list_images(self.folder, recursive=True):
            if min(stored_size(path)) >= smallest_side:
                self.paths.append(path)
        if not self.paths:
            kinds = ", ".join(sorted(IMAGE_SUFFIXES))
            raise ValueError(
                f"{self.folder} holds no image ({kinds}) with both sides of at least {smallest_side} pixels"
            )
        self._digest = _digest(self.folder, self.paths)
        self._room = int(cache_gib * 2**30)
        self._cache = {}
        self._lock = threading.Lock()

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

    def __repr__(self) -> str:  # `pipeline.batches` saves it with an iterator's state, and compares it
        return f"FolderSource({len(self)} images, {self._digest})"


def _digest(folder, paths):
    """What changes with the files' relative names, order and sizes; to read all their bytes would take too long."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(os.fsencode(path.relative_to(folder).as_posix()) + b"\0%d\0" % path.stat().st_size)
    return digest.hexdigest()[:12]
