"""From images to batches: crop, flip, degrade, batch; each item a function of its seed and position alone."""

import functools
import random
import signal
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np
from absl import flags
from jaxtyping import Float32, UInt8

from zipir_jax.config import DataConfig, DegradationConfig, DiTConfig
from zipir_jax.data.buckets import LATENT_PIXEL, Bucket, make_buckets
from zipir_jax.data.degrade import degrade_item
from zipir_jax.data.latents import CachedLatents
from zipir_jax.data.sources import Source
from zipir_jax.data.text import TextEmbeddings
from zipir_jax.data.workers import start_worker
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


def read_item(read: Callable[[int], Any], images: np.ndarray, position: int) -> tuple[Any, str]:
    """`read(images[position])`, or of the first of some others that can be read, and what was wrong with the rest.

    The others are drawn from all of `images`, the same ones for a position whenever it is asked for: neighbours often
    lie in one damaged shard. What was wrong is a line for each image for which `read` raised ValueError. Raises
    ValueError after READ_TRIES of them, or after all.
    """
    unreadable = []
    for place in _places(position, len(images)):
        try:
            return read(int(images[place])), "\n".join(unreadable)
        except ValueError as error:
            unreadable.append(" ".join(str(error).split()))
    first, last = unreadable[0], unreadable[-1]
    raise ValueError(f"{len(unreadable)} images in a row cannot be read, from the first ({first}) to {last}")


def _places(position, count):
    yield position
    drawn = random.Random(position).sample(range(count), min(READ_TRIES, count))
    yield from [place for place in drawn if place != position][: READ_TRIES - 1]


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
    """{"image", "lq"?, "text"?, "text_lengths"?, "index", "low_quality", "unreadable"} for a position of the bucket.

    With a degradation, the image is a low-quality one at random: what "lq" is of others, with the text of the
    negative prompt. An image whose caption has no embedding counts as unreadable: some that were added later should not
    end a run, and each is named; where it is all of them, READ_TRIES ends the run at once.
    """

    def read(index):
        return index, None if text is None else text[source.caption(index)], source[index]

    (index, embedding, image), unreadable = read_item(read, bucket.images, position)
    crop = random_crop(image, bucket.height, bucket.width, config, rng)
    # Nothing is drawn where the probability is 0: items are then those of a config without it.
    probability = 0.0 if degradation is None else config.low_quality_probability
    low_quality = probability > 0 and rng.random() < probability
    if low_quality:
        crop = degrade_item(crop, degradation, int(rng.integers(2**63)))
        embedding = None if text is None else text[text.negative]
    item = {"image": crop, "index": np.int64(index), "unreadable": np.array(unreadable)}
    item["low_quality"] = np.bool_(low_quality)
    if degradation is not None:
        item["lq"] = degrade_item(crop, degradation, int(rng.integers(2**63)))
    if text is not None:
        item |= text_item(embedding, config, text, rng)
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
    """{"latent", "lq_latent", "text"?, "text_lengths"?, "unreadable"} for the crop at a position of the bucket.

    Captions without an embedding: see `image_item`.
    """

    def read(index):
        cached = source[index]
        caption = cached.pop("caption")
        if text is None:
            return None, cached
        return text[text.negative if caption is None else caption], cached

    (embedding, item), unreadable = read_item(read, bucket.images, position)
    item["unreadable"] = np.array(unreadable)
    if text is not None:
        item |= text_item(embedding, config, text, rng)
    return item


def text_item(
    embedding: Float32[np.ndarray, "l c"], config: DataConfig, text: TextEmbeddings, rng: np.random.Generator
) -> dict:
    """{"text": float32 [text_tokens, c], padded with zeros, "text_lengths"} of an embedding, at random of no text's."""
    if rng.random() < config.text_dropout:
        embedding = text[""]
    embedding = embedding[: config.text_tokens]
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
    indices     where in the source the last batch's images are, int64 [b]; None for cached latents
    low_quality which of them were degraded into low-quality ones, bool [b]; None for cached latents
    unreadable  a sentence for each item that could not be read so far, once each; others stood in for them
    The state that is saved and restored is the number of batches that were taken, and what they were made of.
    """

    def __init__(self, dataset: grain.MapDataset, buckets: list[Bucket], config: DataConfig, contents: str):
        self.buckets, self.indices, self.low_quality, self.unreadable = buckets, None, None, []
        self._dataset, self._config, self._contents = dataset, config, contents
        self._taken, self._named = 0, set()
        self._iterators = []  # Grain's, once it is needed
        # When Python exits, Grain's own clean-up runs so late that modules which it needs are gone.
        weakref.finalize(self, _close, self._iterators)

    def __next__(self) -> dict[str, np.ndarray]:
        if not self._iterators:
            self._iterators.append(self._start())
        try:
            batch = next(self._iterators[0])
        except BaseException as error:
            self.close()  # else Grain would go on behind the batch that failed
            if isinstance(error, RuntimeError) and "Worker process" in str(error):
                raise ValueError(
                    f"one of {self._config.workers} data workers was killed, perhaps for want of memory; run again, "
                    "with fewer data.workers"
                ) from error
            raise
        self._taken += 1
        # Copied: what a worker sent lies in shared memory, which should not be held on to.
        self.indices, self.low_quality = (
            np.array(batch.pop(name)) if name in batch else None for name in ("index", "low_quality")
        )
        for line in "\n".join(batch.pop("unreadable")).split("\n"):
            if line and line not in self._named:
                self._named.add(line)
                self.unreadable.append(line)
        return batch

    def _start(self):
        # Each thread makes a whole batch; none has to wait for another's to be taken. A worker is one thread and keeps
        # one batch ready: batches of large crops fill gigabytes.
        threads = 1 if self._config.workers else self._config.threads
        ahead = 1 if self._config.workers else max(4, threads)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
        # Sliced, so that the number of threads or workers is no part of the state.
        dataset = self._dataset[self._taken :].to_iter_dataset(options)
        if self._config.workers:
            # Grain looks at flags of its own before it starts processes, which absl lets nobody do until its own
            # entry point has parsed the command line. Ours does not use it.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            workers = grain.MultiprocessingOptions(self._config.workers, per_worker_buffer_size=1)
            dataset = dataset.mp_prefetch(workers, _start_worker)
        return iter(dataset)

    def close(self) -> None:
        """End the threads or workers; the next batch starts new ones. What is deleted is closed as well."""
        _close(self._iterators)

    def get_state(self) -> dict[str, Any]:
        return {"taken": self._taken, "contents": self._contents, "batch_sizes": self._batch_sizes()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on after a saved state. Raises ValueError for one that belongs to other images or batches."""
        if state["contents"] != self._contents:
            raise ValueError(
                f"not the images that the run began with: {self._contents}, not {state['contents']}"
            )
        if state["batch_sizes"] != self._batch_sizes():
            raise ValueError(
                f"batches of {self._batch_sizes()} images, not of {state['batch_sizes']} as the run began with; with "
                "data.batch_tokens they follow from the mesh"
            )
        self.close()
        self._taken = state["taken"]

    def _batch_sizes(self):
        return [bucket.batch_size for bucket in self.buckets]


def _close(iterators):
    while iterators:
        iterators.pop().close()


def _start_worker(number, workers):
    # A scheduler's SIGTERM reaches all processes of a job; the training loop takes more batches before it stops.
    start_worker((signal.SIGINT, signal.SIGTERM))


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

    The buckets take turns as often as their weights say, the same one on every host; host i of n gets the i-th of n
    equal parts of the batch's images, so that the batch is the same whatever the number of hosts, and their images are
    others but where one round through the bucket ends and the next begins. divisor: see
    `make_buckets`. Raises ValueError as `make_buckets`, and for a batch that the hosts cannot divide.
    """
    cached = isinstance(source, CachedLatents)
    buckets = make_buckets(config, source.sizes, divisor, exact=cached)
    for bucket in buckets:
        if bucket.batch_size % hosts:
            raise ValueError(f"a batch of {bucket.batch_size} images does not divide over {hosts} hosts")
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
    contents = repr(source) if text is None else f"{source!r} with {text!r}"
    return Batches(dataset, buckets, config, contents)
