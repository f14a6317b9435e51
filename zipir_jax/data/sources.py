"""Where training images come from."""

import threading
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from zipir_jax.imageio import IMAGE_SUFFIXES, list_images


class FolderSource:
    """Random access to the images of a folder and its subfolders: `len(source)`, `source[i] -> uint8 [h, w, 3]`.

    Decoded images are kept in memory until `cache_gib` GiB are full. Images smaller than `smallest_side` pixels on
    either side are left out. Raises ValueError if none is left.
    """

    def __init__(self, folder: str | Path, smallest_side: int, cache_gib: float = 0.0):
        self.folder = Path(folder)
        self.paths = []
        for path in list_images(self.folder, recursive=True):
            with Image.open(path) as image:  # reads the header only
                if min(image.size) >= smallest_side:
                    self.paths.append(path)
        if not self.paths:
            kinds = ", ".join(sorted(IMAGE_SUFFIXES))
            raise ValueError(
                f"{self.folder} holds no image ({kinds}) with both sides of at least {smallest_side} pixels"
            )
        self._room = int(cache_gib * 2**30)
        self._cache = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> UInt8[np.ndarray, "h w 3"]:
        cached = self._cache.get(index)
        if cached is not None:
            return cached
        with Image.open(self.paths[index]) as image:
            pixels = np.asarray(image.convert("RGB"))
        with self._lock:
            if index not in self._cache and pixels.nbytes <= self._room:
                self._room -= pixels.nbytes
                self._cache[index] = pixels
        return pixels

    def __repr__(self) -> str:  # Grain writes it into its iterator's state and compares it on restore
        return f"FolderSource({len(self)} images)"
