"""From images to batches: crop, flip, degrade, batch; each item a function of its seed alone."""

from typing import Any

import grain
import numpy as np
from jaxtyping import Float32, UInt8

from zipir_jax.config import DataConfig, DegradationConfig
from zipir_jax.data.degrade import degrade_item
from zipir_jax.data.sources import FolderSource
from zipir_jax.imageio import resize, to_float


def random_crop(
    image: UInt8[np.ndarray, "h w 3"], config: DataConfig, rng: np.random.Generator
) -> Float32[np.ndarray, "{config.crop} {config.crop} 3"]:
    """A random region of a uint8 image [h, w, 3], shrunk to a float32 crop [crop, crop, 3] in [-1, 1].

    The zoom is drawn log-uniformly from `config.zoom`, limited by the image's size; a region is never enlarged.
    """
    h, w, _ = image.shape
    zoom = np.exp(rng.uniform(*np.log(config.zoom)))
    side = min(round(config.crop / zoom), h, w)
    top, left = rng.integers(h - side + 1), rng.integers(w - side + 1)
    crop = to_float(image[top : top + side, left : left + side])
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

    "lq" is there only with a `degradation`. The iterator's state can be saved and restored (Grain); `set_state`
    raises ValueError for a state that belongs to other images.
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
    options = grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=4)
    return _SourceInState(iter(dataset.to_iter_dataset(options)), source)


class _SourceInState(grain.DatasetIterator):
    """An iterator whose state says which images it counts through: Grain's own state is a position alone."""

    def __init__(self, parent: grain.DatasetIterator, source: FolderSource):
        super().__init__(parent)
        self._source = source

    def __next__(self) -> dict[str, Float32[np.ndarray, "b h w 3"]]:
        return next(self._parent)

    def get_state(self) -> dict[str, Any]:
        return self._parent.get_state() | {"source": repr(self._source)}

    def set_state(self, state: dict[str, Any]) -> None:
        position = dict(state)
        saved = position.pop("source")
        if saved != repr(self._source):
            raise ValueError(
                f"{self._source.folder}: not the images that the run began with: {self._source}, not {saved}"
            )
        self._parent.set_state(position)
