"""How pictures are restored within the memory that there is: chosen, or refused, before anything runs.

What a phase needs is estimated by formulas whose factors were measured against XLA's accounts of the compiled programs;
`benchmark memory` measures them again. The weights are on the device already: what is said here comes on top of them.
"""

import bisect
import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import psutil

from zipir_jax.config import DiTConfig, ModelConfig
from zipir_jax.models.attention import LARGEST_LOGITS
from zipir_jax.models.dit import Block
from zipir_jax.models.layers import abstract_params, count_params
from zipir_jax.models.lp_vae import FACTOR
from zipir_jax.models.memory import (
    choose_tiling,
    encode_cost,
    is_too_large,
    pixel_decode_cost,
    resident_bytes,
)
from zipir_jax.models.tiling import Tiling

MARGIN = FACTOR  # pixels; the outermost ones, where convolutions meet their padding of zeros, show a frame
# Tokens; text is padded to a multiple of them, so that another prompt needs no other program.
TEXT_BLOCK = 128
# Of the free memory that restoring takes unless told otherwise: a laptop has other things to do, and a GPU's memory is
# needed for what convolutions try out and for gaps between arrays.
CPU_SHARE, SHARE = 0.5, 0.9
CGROUP = Path("/sys/fs/cgroup")  # of Linux: the memory that a container may use
# Measured on XLA's accounts: arrays of all tokens that are alive at once in a block (9.5 to 12 on an A100 and an H100,
# 12.2 on a v6e), and arrays of the logits of a block of queries.
LIVE_TOKENS = {"cpu": 8, "gpu": 12.5, "tpu": 13}
LIVE_LOGITS = 2
# The latent and the three that a sampler remembers, before and after a step.
SAMPLER_LATENTS = 8
# float32 copies of the picture that a restoration has in a CPU's memory: enlarged, padded, restored.
HOST_IMAGES = 4
GIB = 2**30


class TooLargeError(ValueError):
    """A picture does not fit into the memory, in no tiles."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How pictures of one size are restored."""

    height: int  # of what the networks see, pixels
    width: int
    pictures: int  # at once
    encode: Tiling | None  # None: whole
    decode: Tiling | None
    needs: dict[str, int]  # bytes of each phase
    available: int  # bytes

    def lines(self) -> list[str]:
        """What a person reads: a line for the picture, one for each phase."""
        latent = self.height * self.width // FACTOR**2
        how = {"encode": _how(self.encode), "denoise": f"{latent} latent pixels", "decode": _how(self.decode)}
        first = f"{self.width} x {self.height} pixels with margins, {self.pictures} at once, "
        phases = [f"  {phase}: {_gib(need)}, {how[phase]}" for phase, need in self.needs.items()]
        return [f"{first}{_gib(self.available, math.floor)} to use", *phases]


def _how(tiling):
    if tiling is None:
        return "whole"
    return f"in tiles of {tiling.width} x {tiling.height} pixels, whole from 1/{tiling.cell} of the resolution down"


def _gib(count, rounded=math.ceil):
    return f"{rounded(100 * count / GIB) / 100:.2f} GiB"


def padded_size(config: ModelConfig, height: int, width: int) -> tuple[int, int]:
    """(height, width) of what the networks see of a picture: MARGIN or more beside it, in multiples of a token."""
    multiple = FACTOR * config.dit.patch
    return tuple(math.ceil((side + 2 * MARGIN) / multiple) * multiple for side in (height, width))


def available_memory() -> int:
    """Bytes that may be spent on the device that jax computes on: SHARE of what is free, on a CPU CPU_SHARE of it.

    Raises ValueError for another device that does not tell.
    """
    if jax.default_backend() != "cpu":
        stats = jax.local_devices()[0].memory_stats() or {}
        if "bytes_limit" not in stats:
            raise ValueError(
                f"this {jax.default_backend()} does not tell how much memory it has; say how much to use (--memory-gib)"
            )
        return device_share(stats["bytes_limit"], stats["bytes_in_use"])
    free = psutil.virtual_memory().available
    try:
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        details = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        used -= int(details["inactive_file"])  # of files that were read: given up when memory is short
        free = min(free, max(0, limit - used))
    except (OSError, ValueError, KeyError):  # not on Linux, not in a container, or one without a limit
        pass
    return int(CPU_SHARE * free)


@contextlib.contextmanager
def refusing(sentence: str) -> Iterator[None]:
    """Raises ValueError with the sentence where what runs within needs more memory than there is."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        # jax has one class for all that fails on a device; its text begins with the kind.
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ValueError(sentence) from error


def device_share(limit: int, in_use: int) -> int:
    """Bytes to plan with on an accelerator that has `limit` for arrays, of which some are in use."""
    return int(SHARE * (limit - in_use))


def make_plan(
    config: ModelConfig,
    height: int,
    width: int,
    *,
    available: int,
    pictures: int = 1,
    branches: int = 1,
    weak_lq: bool = False,
    interval: bool = False,
    text_tokens: int = TEXT_BLOCK,
    platform: str | None = None,
) -> Plan:
    """How to restore pictures of (height, width) pixels, without margins, in `available` bytes.

    As many pictures at once as fit whole; where not even one does, one at a time with the LP-VAE in tiles. branches of
    the guidance, each with a text of `text_tokens` and, with weak_lq, an LQ latent of its own; 0: no diffusion.
    interval: the guidance acts at some steps alone, and what the others need is there as well. platform: as jax names
    that of the device; None: of its default one. Raises TooLargeError with what is needed, what there is, and the
    largest size of this shape that fits.
    """
    platform = platform or jax.default_backend()
    asked = branches, weak_lq, interval, text_tokens, platform
    plan = _plan(config, *padded_size(config, height, width), available, pictures, *asked)
    phase, need = max(plan.needs.items(), key=lambda item: item[1])
    if need <= available:
        return plan

    def shape(longest):
        return tuple(round(side * longest / max(height, width)) or 1 for side in (height, width))

    def too_large(longest):
        smaller = _plan(config, *padded_size(config, *shape(longest)), available, 1, *asked)
        return max(smaller.needs.values()) > available

    longest = bisect.bisect_left(range(max(height, width)), True, lo=1, key=too_large) - 1
    there = f"{width} x {height} pixels need {_gib(need)} to {phase}, beside the weights, and "
    there += f"{_gib(available, math.floor)} are free"
    if not longest:
        raise TooLargeError(f"{there}; that is too little for any picture")
    height, width = shape(longest)
    raise TooLargeError(f"{there}; the largest of this shape that fits is {width} x {height}")


@functools.lru_cache  # a folder has many pictures of one size
def _plan(config, height, width, available, pictures, *asked):
    """The plan that fits or, if none does, the one that needs least."""
    platform, costs = asked[-1], (encode_cost, pixel_decode_cost)
    whole = [cost(config.lp_vae, height, width, None, platform) for cost in costs]
    for count in range(pictures, 0, -1):
        needs = needed_bytes(config, height, width, None, None, count, *asked)
        if max(needs.values()) <= available and not any(
            is_too_large(cost, count, platform) for cost in whole
        ):
            count = math.ceil(pictures / math.ceil(pictures / count))  # parts of one size
            needs = needed_bytes(config, height, width, None, None, count, *asked)
            return Plan(height, width, count, None, None, needs, available)
    budget = available - image_bytes(height, width, platform)
    encode, decode = (choose_tiling(cost, config.lp_vae, height, width, budget, platform) for cost in costs)
    needs = needed_bytes(config, height, width, encode, decode, 1, *asked)
    return Plan(height, width, 1, encode, decode, needs, available)


def needed_bytes(
    config: ModelConfig,
    height: int,
    width: int,
    encode: Tiling | None,
    decode: Tiling | None,
    pictures: int,
    branches: int,
    weak_lq: bool,
    interval: bool,
    text_tokens: int,
    platform: str,
) -> dict[str, int]:
    """Bytes of each phase beside the weights; sides of what the networks see, pixels; other arguments as of a plan."""
    vae, images = config.lp_vae, pictures * image_bytes(height, width, platform)
    vae_bytes = {
        phase: images + pictures * resident_bytes(cost(vae, height, width, tiling, platform), platform)
        for phase, cost, tiling in (("encode", encode_cost, encode), ("decode", pixel_decode_cost, decode))
    }
    if not branches:
        return vae_bytes
    latent = height // FACTOR, width // FACTOR
    denoise = denoise_bytes(config.dit, *latent, pictures, branches, weak_lq, interval, text_tokens, platform)
    if platform == "cpu":  # the pictures wait in the same memory
        denoise += images
    return {"encode": vae_bytes["encode"], "denoise": denoise, "decode": vae_bytes["decode"]}


def image_bytes(height: int, width: int, platform: str) -> int:
    """Of a picture as the networks read it; on a CPU of its copies on the host, too."""
    return 3 * 4 * height * width * (HOST_IMAGES if platform == "cpu" else 1)


def denoise_bytes(
    config: DiTConfig,
    height: int,
    width: int,
    pictures: int,
    branches: int,
    weak_lq: bool,
    interval: bool,
    text_tokens: int,
    platform: str,
) -> int:
    """Of denoising, beside the weights; sides of the latent, other arguments as of a plan."""
    noisy = height * width // config.patch**2
    static = config.lq_attention == "static"
    moving = pictures * branches * noisy * (1 if static else 2)  # tokens that the blocks change
    # CPUs have no bfloat16 of their own.
    value = 4 if platform == "cpu" else jnp.dtype(config.compute_dtype).itemsize
    tokens = int(LIVE_TOKENS[platform] * moving * config.width * value)
    logits = 0
    if config.attention == "xla":
        logits = LIVE_LOGITS * min(LARGEST_LOGITS, 4 * config.heads * moving * 2 * noisy)
    layer = count_params(abstract_params(Block, config)) * value  # which a scan copies out of the stack
    latents = SAMPLER_LATENTS * pictures * height * width * config.latent_channels * 4
    text = lq = 0
    # Texts, or LQ latents, whose keys and values are there: with an interval, also those of the steps outside of it.
    read = branches + interval
    if config.text_width:
        keys_values = 2 * config.layers * config.width * value
        text = pictures * read * text_tokens * (keys_values + 4 * config.text_width)
    if static:
        latents_read = pictures * (read if weak_lq else 1)
        lq = latents_read * 2 * config.layers * noisy * config.width * value
    return tokens + logits + layer + latents + text + lq
