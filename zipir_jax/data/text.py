"""Text embeddings on disk, one per caption, so that training needs no text encoder."""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
from jaxtyping import Float, Float32

from zipir_jax.config import NEGATIVE_PROMPT, POSITIVE_PROMPT, DataConfig
from zipir_jax.data.records import Records, remove_records, write_records

INDEX_FILE = "text.json"
CAPTIONS_FILE = "captions.npy"  # uint64 [2, n]: the captions' keys, rising, and the numbers of their records


def write_text(
    folder: Path,
    embeddings: Iterable[tuple[str, Float[np.ndarray, "_ c"]]],
    encoder: str,
    tokens: int = DataConfig.text_tokens,
    positive: str = POSITIVE_PROMPT,
    negative: str = NEGATIVE_PROMPT,
) -> None:
    """Write each caption's embedding in bfloat16, cut at `tokens`. encoder: its name.

    positive, negative: the default prompts, which need not be among the captions.

    Raises ValueError as `write_records`, for embeddings of different widths, and unless the empty caption, which stands
    for no text, is among them.
    """
    folder, keys, widths = Path(folder), [], set()

    def records():
        for caption, embedding in embeddings:
            keys.append(_key(caption))
            array = np.asarray(embedding)[:tokens].astype(ml_dtypes.bfloat16)
            widths.add(array.shape[1])
            if len(widths) > 1:
                raise ValueError(
                    f"embeddings of {' and '.join(map(str, sorted(widths)))} channels do not mix"
                )
            yield {"caption": caption, "width": array.shape[1], "embedding": array.tobytes()}
        if _key("") not in keys:
            raise ValueError("the embedding of the empty caption is missing")
        # Here, as `write_records` writes the index when this returns.
        order = np.argsort(np.array(keys, np.uint64)).astype(np.uint64)
        np.save(folder / CAPTIONS_FILE, np.stack([np.array(keys, np.uint64)[order], order]))

    description = {"encoder": encoder, "tokens": tokens, "positive": positive, "negative": negative}
    write_records(folder, INDEX_FILE, records(), description)


def remove_text(folder: Path) -> None:
    """Remove what `write_text` wrote, or left half written; the index first."""
    remove_records(folder, INDEX_FILE)
    (folder / CAPTIONS_FILE).unlink(missing_ok=True)


def distinct(captions: Iterable[str]) -> Iterator[str]:
    """Each caption once, in order; of millions of them it keeps the keys alone."""
    seen = set()
    for caption in captions:
        key = _key(caption)
        if key not in seen:
            seen.add(key)
            yield caption


class TextEmbeddings:
    """`embeddings[caption] -> float32 [l, c]` of what `write_text` wrote; `caption in embeddings`.

    width: c. encoder: the name of what made them. tokens: l is no more. positive, negative: the default prompts when
    they were made, by which a model trained with them is still to be asked after config.py words them otherwise. Raises
    ValueError as `Records`, and when a caption is asked for that has no embedding.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._records = Records(folder, INDEX_FILE)
        self._keys, self._numbers = self._records.column(CAPTIONS_FILE, (2, len(self._records)), np.uint64)
        self.width = self[""].shape[1]
        index = self._records.index
        self.encoder = index["encoder"]
        # Folders that were written before they named the rest were made with these.
        self.tokens = index.get("tokens", DataConfig.text_tokens)
        self.positive = index.get("positive", POSITIVE_PROMPT)
        self.negative = index.get("negative", NEGATIVE_PROMPT)

    def __repr__(
        self,
    ) -> str:  # a checkpoint holds it: a folder's captions may grow, their encoder may not change
        return f"TextEmbeddings({self.encoder}, {self.width} channels)"

    def __reduce__(self) -> tuple:  # a memory-mapped array would be pickled as a whole
        return type(self), (self.folder,)

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, caption: str) -> bool:
        return self._find(caption) is not None

    def __getitem__(self, caption: str) -> Float32[np.ndarray, "l c"]:
        record = self._find(caption)
        if record is None:
            raise ValueError(f"{self.folder}: no embedding of the caption {shortened(caption)!r}")
        embedding = np.frombuffer(record["embedding"], ml_dtypes.bfloat16)
        return embedding.reshape(-1, record["width"]).astype(np.float32)

    def _find(self, caption):
        key = _key(caption)
        place = np.searchsorted(self._keys, key)
        if place < len(self._keys) and self._keys[place] == key:
            record = self._records[int(self._numbers[place])]
            if record["caption"] == caption:  # and not another one of the same key
                return record
        return None


def shortened(caption: str) -> str:
    """A caption for an error of one line."""
    return caption if len(caption) <= 60 else caption[:60] + "..."


def _key(caption):
    # A caption out of a JSON file may hold half a character, which UTF-8 refuses.
    data = caption.encode("utf-8", "surrogatepass")
    return np.uint64(int.from_bytes(hashlib.sha256(data).digest()[:8], "little"))
