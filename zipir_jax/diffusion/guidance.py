"""Classifier-free guidance as one batched call.

    eps = eps_model(z_t, negative) + w (eps_model(z_t, condition) - eps_model(z_t, negative))

Ho & Salimans 2022, "Classifier-Free Diffusion Guidance", eq. 6, with w = 1 + their w, and with the negative
prompt in the place of the empty condition. The paper uses w = 3.5. w = 1 is the conditional model alone.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree


def guided(
    prepare: Callable[[PyTree], Callable[[Array, Array], Array]],
    guidance: float,
    condition: PyTree,
    negative: PyTree | None = None,
) -> Callable[[Array, Array], Array]:
    """The guided `denoise(noisy, timesteps) -> eps`, where `prepare(condition)` returns the one of a condition.

    `condition` and `negative` are pytrees of the same structure whose leaves have a leading batch axis [b, ...]. They
    are joined along it and prepared here, once, not at each step; the model is then called once, on 2b items, the
    negative ones last, and the difference is taken in float32. With guidance 1 (a Python number, known when tracing)
    or without `negative` the model is called on the b items alone.
    """
    if guidance == 1 or negative is None:
        return prepare(condition)

    denoise = prepare(
        jax.tree.map(lambda with_, without: jnp.concatenate([with_, without]), condition, negative)
    )

    def denoise_guided(noisy: Array, timesteps: Array) -> Array:
        eps = denoise(jnp.concatenate([noisy, noisy]), jnp.concatenate([timesteps, timesteps]))
        conditional, unconditional = jnp.split(eps.astype(jnp.float32), 2)
        return unconditional + guidance * (conditional - unconditional)

    return denoise_guided
