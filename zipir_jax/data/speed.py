"""How fast the pipeline makes batches, alone."""

import tempfile
import time
from pathlib import Path

import cv2

from zipir_jax.config import DataConfig, DegradationConfig
from zipir_jax.data.pipeline import batches
from zipir_jax.data.sources import open_sources
from zipir_jax.data.synthetic import SyntheticSource
from zipir_jax.photograph import write_image

PHOTOGRAPHS = 8  # that are written where none are given
PHOTOGRAPH_SIDE = 1.5  # of theirs / the crop's: what a zoom of 0.5 to 1 asks for on average
BATCH = 4  # images


def pipeline_speed(
    resolution: int,
    degradation: DegradationConfig | None,
    sources: tuple[str, ...],
    seconds: float,
    threads: int,
) -> dict[str, float]:
    """{"images_per_second", "images_per_core_second"} of square crops, read from disk, cut, and degraded.

    The first is by the clock on the wall, with `threads` of them at work; the second counts the time that the cores
    of this machine spent on it, so that other programs do not matter. Without `sources` they are synthetic images,
    written as JPEG files of 1.5 times the resolution. Raises ValueError as `open_sources` and `make_buckets`.
    """
    cv2.setNumThreads(1)  # the pipeline's own threads and workers are what keeps the cores busy
    with tempfile.TemporaryDirectory() as folder:
        if not sources:
            source = SyntheticSource(PHOTOGRAPHS, round(PHOTOGRAPH_SIDE * resolution), 0)
            for index in range(PHOTOGRAPHS):
                write_image(Path(folder) / f"{index}.jpg", source[index])
        config = DataConfig(
            sources=sources or (folder,), resolutions=(resolution,), batch_size=BATCH, threads=threads
        )
        iterator = batches(config, open_sources(config.sources), 0, degradation)
        for _ in range(threads + 4):  # fills the buffer of finished batches
            next(iterator)
        wall, cores, count = time.perf_counter(), time.process_time(), 0
        while count == 0 or time.perf_counter() - wall < seconds:
            next(iterator)
            count += BATCH
        wall, cores = time.perf_counter() - wall, time.process_time() - cores
    return {"images_per_second": count / wall, "images_per_core_second": count / cores}
