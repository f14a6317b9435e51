"""Restorations to score: by a restorer in several ways, beside what they are compared with."""

import dataclasses
import functools
from pathlib import Path

import jax

from zipir_jax.config import RestorationConfig
from zipir_jax.metrics.scoring import BASELINE, UNDIFFUSED, Method, bicubic, describe_restoration
from zipir_jax.restorer import NEEDED, Restorer, in_compute_dtype
from zipir_jax.weights import load_weights


def ablation_methods(
    restorer: Restorer, plain: Restorer, restoration: RestorationConfig, seed: int
) -> dict[str, Method]:
    """`restoration_methods`, with 1 and 8 steps as well, and before them what D_f makes of the same latents.

    plain: of the same weights, by `load_plain`.
    """

    def with_steps(count):
        changed = dataclasses.replace(restoration.sampling, steps=count)
        return named(dataclasses.replace(restoration, sampling=changed))

    ((full, _),) = named(restoration).items()
    sampled = with_steps(1) | with_steps(8) | named(restoration)
    methods = restoration_methods(restorer, sampled, seed)
    of_latent = restoration_methods(plain, {full: restoration}, seed)
    decoded = {
        "D_f without diffusion": of_latent[UNDIFFUSED],
        f"D_f, {describe_restoration(restoration)}": of_latent[full],
    }
    return {BASELINE: methods.pop(BASELINE)} | decoded | methods | {full: methods.pop(full)}


def named(restoration: RestorationConfig) -> dict[str, RestorationConfig]:
    """A restoration by the name that it has in tables."""
    return {f"zipir_jax, {describe_restoration(restoration)}": restoration}


def load_plain(weights: Path | str) -> Restorer:
    """A restorer that decodes by D_f, which sees the latent alone, in place of D_f*.

    Raises ValueError for weights that lack D_f, as those for restoring alone do, or cannot be read.
    """
    groups = (*(group for group in NEEDED if group != "pixel_decoder"), "fine_decoder")
    config, groups = load_weights(weights, groups, groups)
    return Restorer(config, jax.device_put(in_compute_dtype(config, groups)))


def restoration_methods(
    restorer: Restorer, restorations: dict[str, RestorationConfig], seed: int
) -> dict[str, Method]:
    """Methods that restore an LQ picture, by name: the baselines, then the `restorations`."""
    restore = functools.partial(restorer.restore, seed=seed)
    methods: dict[str, Method] = {
        BASELINE: bicubic,
        UNDIFFUSED: lambda lq, size: restore(lq, size=size, denoise=False),
    }
    for name, restoration in restorations.items():
        options = {"sampling": restoration.sampling, "colour_correction": restoration.colour_correction}
        methods[name] = lambda lq, size, options=options: restore(lq, size=size, **options)
    return methods
