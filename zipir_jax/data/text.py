"""Text embeddings on disk, one per caption, so that training needs no text encoder."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import ml_dtypes
import numpy as np
from jaxtyping import Float, Float32

from zipir_jax.data.records import Records, write_records

INDEX = "text.json"


def write_text(
    folder: Path, embeddings: Iterable[tuple[str, Float[np.ndarray, "l c"]]], encoder: str
) -> None:
    """Write each caption's embedding in bfloat16; the empty caption's must be among them. encoder: its name."""
    keys = []

    def records():
        for caption, embedding in embeddings:
            keys.append(_key(caption))
            array = np.asarray(embedding).astype(ml_dtypes.bfloat16)
            yield {"caption": caption, "width": array.shape[1], "embedding": array.tobytes()}
        np.save(Path(folder) / "captions.npy", np.array(keys, np.uint64))

    write_records(folder, INDEX, records(), {"encoder": encoder})


class TextEmbeddings:
    """`embeddings[caption] -> float32 [l, c]` of what `write_text` wrote; `width` is c.

    Raises ValueError as `Records`, if the empty caption, which stands for no text, is missing, and when a caption is
    asked for that has no embedding.
    """

    def __init__(self, folder: str | Path):
        self._folder = Path(folder)
        self._records = Records(folder, INDEX)
        keys = np.load(self._folder / "captions.npy")
        self._order = np.argsort(keys)
        self._keys = keys[self._order]
        self.width = self[""].shape[1]

    def __getitem__(self, caption: str) -> Float32[np.ndarray, "l c"]:
        place = np.searchsorted(self._keys, _key(caption))
        if place < len(self._keys) and self._keys[place] == _key(caption):
            record = self._records[int(self._order[place])]
            if record["caption"] == caption:  # and not another one of the same key
                embedding = np.frombuffer(record["embedding"], ml_dtypes.bfloat16)
                return embedding.reshape(-1, record["width"]).astype(np.float32)
        shown = caption if len(caption) <= 60 else caption[:60] + "..."
        raise ValueError(f"{self._folder}: no embedding of the caption {shown!r}")


def _key(caption):
    return np.uint64(int.from_bytes(hashlib.sha256(caption.encode()).digest()[:8], "little"))
