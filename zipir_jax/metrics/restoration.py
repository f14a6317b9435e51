"""Restorations to score: by a restorer in several ways, beside what they are compared with."""

import functools

from zipir_jax.config import RestorationConfig
from zipir_jax.metrics.scoring import BASELINE, UNDIFFUSED, Method, bicubic
from zipir_jax.restorer import Restorer


def restoration_methods(
    restorer: Restorer, named: dict[str, RestorationConfig], seed: int
) -> dict[str, Method]:
    """Methods that restore an LQ picture, by name: the baselines, then those `named`, each in its way."""
    restore = functools.partial(restorer.restore, seed=seed)
    methods: dict[str, Method] = {
        BASELINE: bicubic,
        UNDIFFUSED: lambda lq, size: restore(lq, size=size, denoise=False),
    }
    for name, restoration in named.items():
        options = {"sampling": restoration.sampling, "colour_correction": restoration.colour_correction}
        methods[name] = lambda lq, size, options=options: restore(lq, size=size, **options)
    return methods
