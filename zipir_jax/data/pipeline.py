"""From images to batches: crop, flip, degrade, batch; each item a function of its seed and position alone."""

import functools
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
from jaxtyping import Float32, UInt8

from zipir_jax.config import DataConfig, DegradationConfig, DiTConfig
from zipir_jax.data.buckets import LATENT_PIXEL, Bucket, make_buckets
from zipir_jax.data.degrade import degrade_item
from zipir_jax.data.latents import CachedLatents
from zipir_jax.data.sources import Source
from zipir_jax.data.text import TextEmbeddings
from zipir_jax.imageio import resize, to_float

READ_TRIES = 20  # images, one after the other, that may all be unreadable before the pipeline gives up


def random_crop(
    image: UInt8[np.ndarray, "h w 3"], height: int, width: int, config: DataConfig, rng: np.random.Generator
) -> Float32[np.ndarray, "{height} {width} 3"]:
    """A random region of a uint8 image [h, w, 3], shrunk to a float32 crop [height, width, 3] in [-1, 1].

    The zoom is drawn log-uniformly from `config.zoom`, limited by the image's size; a region is never enlarged.
    """
    h, w, _ = image.shape
    zoom = np.exp(rng.uniform(*np.log(config.zoom)))
    factor = min(1 / zoom, h / height, w / width)
    rows, columns = min(round(height * factor), h), min(round(width * factor), w)
    top, left = rng.integers(h - rows + 1), rng.integers(w - columns + 1)
    crop = to_float(image[top : top + rows, left : left + columns])
    if (rows, columns) != (height, width):
        crop = resize(crop, height, width)
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    if config.rotate:
        crop = np.rot90(crop, rng.integers(4) if height == width else 2 * rng.integers(2))
    return np.ascontiguousarray(crop)


def read_item(source: Source, images: np.ndarray, position: int) -> tuple[Any, int, str]:
    """The source's item at images[position], or the first after it that can be read; its index; what was wrong.

    What was wrong is a line for each item that could not be read. Raises ValueError after READ_TRIES of them.
    """
    unreadable = []
    for attempt in range(READ_TRIES):
        index = int(images[(position + attempt) % len(images)])
        try:
            return source[index], index, "\n".join(unreadable)
        except ValueError as error:
            unreadable.append(" ".join(str(error).split()))
    raise ValueError(f"{READ_TRIES} images in a row cannot be read, from {unreadable[0]} to {unreadable[-1]}")


def image_item(
    position: int,
    rng: np.random.Generator,
    *,
    bucket: Bucket,
    config: DataConfig,
    degradation: DegradationConfig | None,
    source: Source,
    text: TextEmbeddings | None,
) -> dict:
    """{"image", "lq"?, "text"?, "text_lengths"?, "unreadable"} for the image at a position of the bucket."""
    image, index, unreadable = read_item(source, bucket.images, position)
    crop = random_crop(image, bucket.height, bucket.width, config, rng)
    item = {"image": crop, "unreadable": np.array(unreadable)}
    if degradation is not None:
        item["lq"] = degrade_item(crop, degradation, int(rng.integers(2**63)))
    if text is not None:
        item |= text_item(source.caption(index), config, text, rng)
    return item


def latent_item(
    position: int,
    rng: np.random.Generator,
    *,
    bucket: Bucket,
    config: DataConfig,
    source: CachedLatents,
    text: TextEmbeddings | None,
) -> dict:
    """{"latent", "lq_latent", "text"?, "text_lengths"?, "unreadable"} for the crop at a position of the bucket."""
    cached, _, unreadable = read_item(source, bucket.images, position)
    caption = cached.pop("caption")
    item = cached | {"unreadable": np.array(unreadable)}
    if text is not None:
        item |= text_item(caption, config, text, rng)
    return item


def text_item(caption: str, config: DataConfig, text: TextEmbeddings, rng: np.random.Generator) -> dict:
    """{"text": float32 [text_tokens, c], padded with zeros, "text_lengths"} of a caption, or of no text at random."""
    embedding = text["" if rng.random() < config.text_dropout else caption][: config.text_tokens]
    padded = np.zeros((config.text_tokens, embedding.shape[1]), np.float32)
    padded[: len(embedding)] = embedding
    return {"text": padded, "text_lengths": np.int32(len(embedding))}


def batch_shapes(
    config: DataConfig, bucket: Bucket, degraded: bool, dit: DiTConfig
) -> dict[str, tuple[tuple[int, ...], type]]:
    """Shape over all devices, and dtype, of each array of a bucket's batches."""
    b, h, w = bucket.batch_size, bucket.height, bucket.width
    if config.latents:
        latent = (b, h // LATENT_PIXEL, w // LATENT_PIXEL, dit.latent_channels), np.float32
        shapes = {"latent": latent, "lq_latent": latent}
    else:
        image = (b, h, w, 3), np.float32
        shapes = {"image": image, "lq": image} if degraded else {"image": image}
    if config.text:
        text = (b, config.text_tokens, dit.text_width), np.float32
        shapes |= {"text": text, "text_lengths": ((b,), np.int32)}
    return shapes


def crop_size(batch: dict[str, np.ndarray]) -> tuple[int, int]:
    """Height and width in pixels of the crops that a batch holds, or whose latents it holds."""
    if "latent" in batch:
        height, width = batch["latent"].shape[1:3]
        return height * LATENT_PIXEL, width * LATENT_PIXEL
    return batch["image"].shape[1:3]


class Batches(Iterator):
    """Endless iterator over batches, dicts of arrays [b, ...]; what `batches` returns.

    buckets     the buckets that the batches come from
    unreadable  a sentence for each item that could not be read so far, once each; others stood in for them
    The state that is saved and restored is the number of batches that were taken, and what they were taken from.
    """

    def __init__(self, dataset: grain.MapDataset, buckets: list[Bucket], config: DataConfig, contents: str):
        self.buckets, self.unreadable = buckets, []
        self._dataset, self._config, self._contents = dataset, config, contents
        self._taken, self._iterator = 0, None

    def __next__(self) -> dict[str, np.ndarray]:
        if self._iterator is None:
            # Sliced, so that the number of threads or workers is no part of the state.
            options = grain.ReadOptions(num_threads=self._config.threads, prefetch_buffer_size=4)
            dataset = self._dataset[self._taken :].to_iter_dataset(options)
            if self._config.workers:
                workers = grain.MultiprocessingOptions(self._config.workers, per_worker_buffer_size=2)
                dataset = dataset.mp_prefetch(workers)
            self._iterator = iter(dataset)
        batch = next(self._iterator)
        self._taken += 1
        for line in "\n".join(batch.pop("unreadable")).split("\n"):
            if line and line not in self.unreadable:
                self.unreadable.append(line)
        return batch

    def get_state(self) -> dict[str, Any]:
        return {"taken": self._taken, "contents": self._contents}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on after a saved state. Raises ValueError for one that belongs to other images."""
        if state["contents"] != self._contents:
            raise ValueError(
                f"not the images that the run began with: {self._contents}, not {state['contents']}"
            )
        self._taken, self._iterator = state["taken"], None


def batches(
    config: DataConfig,
    source: Source | CachedLatents,
    seed: int,
    degradation: DegradationConfig | None = None,
    text: TextEmbeddings | None = None,
    *,
    divisor: int = 1,
    host: int = 0,
    hosts: int = 1,
) -> Batches:
    """Endless iterator over batches of the source's images, or of its cached latents; float32, images in [-1, 1].

        {"image": [b, h, w, 3], "lq": the same, degraded}     "lq" only with a `degradation`
        {"latent": [b, h/32, w/32, c], "lq_latent": the same} where the source is `CachedLatents`
        and with `text` {"text": [b, text_tokens, c], "text_lengths": int32 [b]}

    A bucket of `config` is drawn for each batch, the same on every host; host i of n gets the i-th of n equal parts of
    the batch's images, so that the batch is the same whatever the number of hosts. divisor: see `make_buckets`. Raises
    ValueError as `make_buckets`.
    """
    cached = isinstance(source, CachedLatents)
    buckets = make_buckets(config, source.sizes, divisor, exact=cached)
    if cached:
        make_item = functools.partial(latent_item, config=config, source=source, text=text)
    else:
        make_item = functools.partial(
            image_item, config=config, degradation=degradation, source=source, text=text
        )
    parts = []
    for number, bucket in enumerate(buckets):
        bucket_seed = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
        part = grain.MapDataset.source(range(len(bucket.images))).seed(bucket_seed).shuffle().repeat(None)
        part = part.random_map(functools.partial(make_item, bucket=bucket))
        parts.append(part.batch(bucket.batch_size // hosts, drop_remainder=True)[host::hosts])
    dataset = grain.MapDataset.mix(parts, [bucket.weight for bucket in buckets])
    return Batches(dataset, buckets, config, repr(source))
