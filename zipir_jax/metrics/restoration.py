"""Restorations to score: by a restorer in several ways, beside what they are compared with."""

import functools

from zipir_jax.config import SamplingConfig
from zipir_jax.metrics.scoring import BASELINE, UNDIFFUSED, Method, bicubic
from zipir_jax.restorer import Restorer


def restoration_methods(restorer: Restorer, named: dict[str, SamplingConfig], seed: int) -> dict[str, Method]:
    """Methods that restore an LQ picture, by name: the baselines, then those `named`, each with its sampling."""
    restore = functools.partial(restorer.restore, seed=seed)
    methods: dict[str, Method] = {
        BASELINE: bicubic,
        UNDIFFUSED: lambda lq, size: restore(lq, size=size, denoise=False),
    }
    for name, sampling in named.items():
        methods[name] = lambda lq, size, sampling=sampling: restore(lq, size=size, sampling=sampling)
    return methods
