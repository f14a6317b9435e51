"""Latents encoded once, for a DiT that is trained without the LP-VAE."""

import itertools
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from zipir_jax import parallel
from zipir_jax.config import TrainConfig
from zipir_jax.data.latents import CachedLatents, write_latents
from zipir_jax.training.checkpoint import encoder_digest
from zipir_jax.training.loop import check_low_quality, load_pretrained, open_data, training_batches
from zipir_jax.training.stages.dit import latents


def cache_latents(config: TrainConfig, output: Path, batches: int) -> int:
    """Encode the first batches of a DiT's training, and write them to `output`; the number of crops.

    All devices of this process encode. Raises ValueError for a config of another stage, for weights that cannot
    encode, and as `write_latents`.
    """
    if config.stage != "dit":
        raise ValueError(f"cached latents serve the stage dit, not {config.stage}")
    if not config.init_from:
        raise ValueError("init_from is empty: name the weights of an LP-VAE")
    check_low_quality(config)
    mesh, pretrained = parallel.make_mesh(config.mesh), load_pretrained(config)
    source, _ = open_data(config)
    data = training_batches(config, source, None, mesh)
    names = ("statistics", "coarse_encoder", "fine_encoder")
    weights = parallel.put({name: pretrained[name] for name in names}, parallel.replicated(mesh))
    encoder = jax.jit(lambda weights, images: latents(config, weights, images))

    def items():
        for batch in tqdm(itertools.islice(data, batches), total=batches, unit="batch"):
            arrays = parallel.put_batch(mesh, batch)
            with jax.set_mesh(mesh):
                found = encoder(weights, {name: arrays[name] for name in ("image", "lq")})
            crops = zip(*map(np.asarray, found), data.indices, data.low_quality, strict=True)
            for latent, lq_latent, index, low_quality in crops:
                yield latent, lq_latent, None if low_quality else source.caption(int(index))

    share = config.data.low_quality_probability
    write_latents(output, items(), repr(source), encoder_digest(pretrained), share)
    return len(CachedLatents(output))
