"""From images to batches: crop, flip, degrade, batch; each item a function of its seed alone."""

import grain
import numpy as np

from zipir_jax.config import DataConfig, DegradationConfig
from zipir_jax.data.degrade import degrade_item, resize
from zipir_jax.data.sources import FolderSource


def random_crop(image: np.ndarray, config: DataConfig, rng: np.random.Generator) -> np.ndarray:
    """A random region of a uint8 image [h, w, 3], shrunk to a float32 crop [crop, crop, 3] in [-1, 1].

    The zoom is drawn log-uniformly from `config.zoom`, limited by the image's size; a region is never enlarged.
    """
    h, w, _ = image.shape
    zoom = np.exp(rng.uniform(*np.log(config.zoom)))
    side = min(round(config.crop / zoom), h, w)
    top, left = rng.integers(h - side + 1), rng.integers(w - side + 1)
    crop = image[top : top + side, left : left + side].astype(np.float32) / 127.5 - 1
    if side != config.crop:
        crop = resize(crop, config.crop, config.crop)
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    if config.rotate:
        crop = np.rot90(crop, rng.integers(4))
    return np.ascontiguousarray(crop)


def batches(
    config: DataConfig, degradation: DegradationConfig | None, seed: int, source: FolderSource | None = None
) -> grain.DatasetIterator:
    """Endless iterator over {"image": [b, crop, crop, 3], "lq": the same, degraded}, float32 in [-1, 1].

    "lq" is there only with a `degradation`. The iterator's state can be saved and restored (Grain).
    """
    if source is None:
        source = FolderSource(config.folder, config.crop, config.cache_gib)

    def item(image, rng):
        crop = random_crop(image, config, rng)
        if degradation is None:
            return {"image": crop}
        return {"image": crop, "lq": degrade_item(crop, degradation, int(rng.integers(2**63)))}

    dataset = grain.MapDataset.source(source).seed(seed).shuffle().repeat(None)
    dataset = dataset.random_map(item).batch(config.batch_size, drop_remainder=True)
    return iter(
        dataset.to_iter_dataset(grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=4))
    )
