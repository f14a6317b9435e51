"""What timing a network takes: weights of which only the shape matters, and a clock."""

import math
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import jax
import jax.numpy as jnp

from zipir_jax.config import DataConfig, DiTConfig, ModelConfig
from zipir_jax.models.dit import DiT
from zipir_jax.models.layers import abstract_params, bind
from zipir_jax.models.lp_vae import Encoder
from zipir_jax.models.pixel_decoder import PixelDecoder
from zipir_jax.weights import abstract_weights


def cheap_params(module_class, config, dtype: str) -> dict:
    """Parameters of `module_class(config)`: random kernels and biases of 0 in `dtype`, scales of 1 in float32.

    Stacked layers share one kernel, and so do the pixels of a convolution's window: to draw the 3.12 billion numbers of
    the paper's DiT would take minutes on a CPU, and memory for each in float32.
    """

    def draw(path, leaf):
        if path[-1].key == "kernel":
            # Of a convolution, else of a linear layer.
            inputs = math.prod(leaf.shape[:-1]) if leaf.ndim == 4 else leaf.shape[-2]
            values = (jax.random.normal(jax.random.key(0), leaf.shape[-2:]) / inputs**0.5).astype(dtype)
        else:
            values = jnp.float32(1) if path[-1].key == "scale" else jnp.zeros((), dtype)
        return jnp.broadcast_to(values, leaf.shape)

    abstract = abstract_params(module_class, config)
    return jax.jit(lambda: jax.tree_util.tree_map_with_path(draw, abstract))()


def cheap_weights(config: ModelConfig) -> dict:
    """The groups that restoring needs, in the dtypes of `restorer.in_compute_dtype`."""
    vae, statistics = config.lp_vae, abstract_weights(config)["statistics"]
    return {
        "statistics": {
            name: jnp.full(x.shape, name.endswith("std"), x.dtype) for name, x in statistics.items()
        },
        "coarse_encoder": cheap_params(Encoder, vae.coarse, vae.coarse.compute_dtype),
        "fine_encoder": cheap_params(Encoder, vae.fine, vae.fine.compute_dtype),
        "dit": cheap_params(DiT, config.dit, config.dit.compute_dtype),
        "pixel_decoder": cheap_params(PixelDecoder, vae, vae.fine.compute_dtype),
    }


def denoise_seconds(
    config: DiTConfig, params: dict, height: int, width: int, branches: int, repeats: int
) -> dict:
    """{"compile_seconds", "seconds"} of one denoising step, the median of `repeats`; sides of the latent.

    What a step needs of the LQ latent and the texts, one for each of the `branches` of the guidance, is computed once
    an image, and so before.
    """

    @jax.jit
    def read(params, latent, text):
        return bind(DiT, config, params).read(latent, **text)

    @jax.jit
    def step(params, noisy, timesteps, condition):
        return bind(DiT, config, params).denoise(noisy, timesteps, condition)

    # Not constant: a GPU computes faster where few bits change.
    latent, noisy = (
        jax.random.normal(jax.random.key(0), (count, height, width, config.latent_channels))
        for count in (1, branches)
    )
    text = {}
    if config.text_width:
        shape = branches, DataConfig.text_tokens, config.text_width
        text["text"] = jax.random.normal(jax.random.key(1), shape)
        text["text_lengths"] = jnp.full(branches, DataConfig.text_tokens)
    inputs = params, noisy, jnp.full(branches, 500), read(params, latent, text)
    began = time.perf_counter()
    step = step.lower(*inputs).compile()
    compile_seconds = time.perf_counter() - began
    seconds = median_seconds(lambda: jax.block_until_ready(step(*inputs)), repeats)
    return {"compile_seconds": compile_seconds, "seconds": seconds}


def default_platform() -> str:
    """What jax computes on by default, "cpu", "gpu" or "tpu", asked in a process of its own.

    So the caller takes no device and none of its memory from the processes that measure.
    """
    with _own_process() as pool:
        return pool.submit(jax.default_backend).result()


def in_own_process(function: Callable[..., dict], *arguments) -> dict:
    """What the function returns, called in a process of its own: its memory is free again afterwards.

    Where it fails on the device, is killed or refuses, as for want of memory, {"error": one line}.
    """
    with _own_process() as pool:
        try:
            return pool.submit(function, *arguments).result()
        # torch's, jax's and the pool's errors are RuntimeErrors, the planner's are ValueErrors.
        except (RuntimeError, MemoryError, ValueError) as error:
            return {"error": str(error).partition("\n")[0] or type(error).__name__}


def _own_process():
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"))


def median_seconds(step: Callable[[], object], repeats: int) -> float:
    """Median of the seconds that `step` takes, after one call that does not count: it loads and tunes kernels.

    `step` has to wait for the device. Raises ValueError for fewer than one repeat.
    """
    check_repeats(repeats)
    step()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def check_repeats(repeats: int) -> None:
    """Raises ValueError for fewer than one repeat."""
    if repeats < 1:
        raise ValueError(f"repeats {repeats} is below 1")
