"""Cached latents: crops that the LP-VAE has encoded, so that the DiT can be trained without it.

Every record holds the latents of one crop and of its degraded partner, float16, as the encoder gives them: they are
whitened when they are used. Crops and degradations are as many as were written, not drawn anew.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from zipir_jax.data.buckets import LATENT_PIXEL
from zipir_jax.data.records import Records, write_records

INDEX_FILE = "latents.json"
SIZES_FILE = "sizes.npy"


def write_latents(
    folder: Path,
    items: Iterable[tuple[Float32[np.ndarray, "_ _ c"], Float32[np.ndarray, "_ _ c"], str | None]],
    contents: str,
    encoder: str,
    low_quality_probability: float = 0.0,
) -> None:
    """Write (latent, degraded image's latent, caption) of each crop; None is the caption of a low-quality one.

    contents: what the crops were made of. encoder: a digest of the weights that encoded them. low_quality_probability:
    see DataConfig; training compares both with its own. Raises ValueError as `write_records`, for two latents of
    different shapes, and for a value that float16 has not.
    """
    folder, sizes = Path(folder), []

    def records():
        for latent, lq_latent, caption in items:
            if latent.shape != lq_latent.shape:
                raise ValueError(
                    f"latent {len(sizes)} has the shape {latent.shape}, that of its degraded image {lq_latent.shape}"
                )
            arrays = {
                "latent": _to_float16(latent, len(sizes)),
                "lq_latent": _to_float16(lq_latent, len(sizes)),
            }
            height, width, _ = latent.shape
            sizes.append((height, width))
            packed = {name: array.tobytes() for name, array in arrays.items()}
            yield packed | {"height": height, "width": width, "caption": caption}
        # Here, as `write_records` writes the index when this returns.
        np.save(folder / SIZES_FILE, np.array(sizes, np.int32).reshape(-1, 2) * LATENT_PIXEL)

    description = {
        "contents": contents,
        "encoder": encoder,
        "low_quality_probability": low_quality_probability,
    }
    write_records(folder, INDEX_FILE, records(), description)


def _to_float16(array, number):
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    if not np.isfinite(half).all():
        raise ValueError(
            f"latent {number}: its values run from {array.min():g} to {array.max():g}; float16 ends at 65504"
        )
    return half


class CachedLatents:
    """What `write_latents` wrote: `source[i] -> {"latent": float32 [h, w, c], "lq_latent": the same, "caption"}`.

    caption: None for a low-quality image, whose text is the negative prompt, however it is worded. sizes: height and
    width in pixels of each crop. encoder: digest of the weights that encoded them. low_quality_probability: that of
    low-quality images among them. Raises ValueError as `Records`.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.name = str(folder)
        self.damaged = []  # as a Source has it; what is damaged is named when it is read
        self._records = Records(folder, INDEX_FILE, ("contents", "encoder"))
        self.sizes = self._records.column(SIZES_FILE, (len(self), 2), np.int32)
        self.encoder = self._records.index["encoder"]
        # Folders that were written before there were any do not name it.
        self.low_quality_probability = self._records.index.get("low_quality_probability", 0.0)

    def __reduce__(self) -> tuple:  # a memory-mapped array would be pickled as a whole
        return type(self), (self.folder,)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict:
        record = self._records[index]
        shape = record["height"], record["width"], -1
        arrays = {
            name: np.frombuffer(record[name], np.float16).reshape(shape).astype(np.float32)
            for name in ("latent", "lq_latent")
        }
        return arrays | {"caption": record["caption"]}

    def __repr__(self) -> str:
        contents = self._records.index["contents"]
        return f"CachedLatents({len(self)} of {contents}, encoder {self.encoder})"
