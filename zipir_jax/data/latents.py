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

INDEX = "latents.json"


def write_latents(
    folder: Path,
    items: Iterable[tuple[Float32[np.ndarray, "h w c"], Float32[np.ndarray, "h w c"], str]],
    contents: str,
    encoder: str,
) -> None:
    """Write (latent, degraded image's latent, caption) of each crop.

    contents: what the crops were made of. encoder: a digest of the weights that encoded them, which training compares
    with its own. Raises ValueError if the folder holds latents already.
    """
    sizes = []

    def records():
        for latent, lq_latent, caption in items:
            sizes.append(latent.shape[:2])
            arrays = {"latent": latent, "lq_latent": lq_latent}
            packed = {name: array.astype(np.float16).tobytes() for name, array in arrays.items()}
            yield packed | {"height": latent.shape[0], "width": latent.shape[1], "caption": caption}
        # Before the index, which `write_records` writes last.
        np.save(Path(folder) / "sizes.npy", np.array(sizes, np.int32) * LATENT_PIXEL)

    write_records(folder, INDEX, records(), {"contents": contents, "encoder": encoder})


class CachedLatents:
    """What `write_latents` wrote: `source[i] -> {"latent": float32 [h, w, c], "lq_latent": the same, "caption": str}`.

    sizes: height and width in pixels of each crop. encoder: digest of the weights that encoded them. Raises ValueError
    as `Records`.
    """

    def __init__(self, folder: str | Path):
        self._records = Records(folder, INDEX)
        self.sizes = np.load(Path(folder) / "sizes.npy")
        self.encoder = self._records.description["encoder"]

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
        contents = self._records.description["contents"]
        return f"CachedLatents({len(self)} of {contents}, encoder {self.encoder})"
