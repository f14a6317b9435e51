"""Restorer: the Python API that every front end calls.

    restorer = Restorer.load("default")
    restored = restorer.restore(photo, scale=4)      # uint8 [h, w, 3] in, uint8 [4h, 4w, 3] out

Behind it: resize to the target and pad, encode with the LP-VAE, sample the DiT, decode with D_f*, crop.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Key, UInt8

from zipir_jax.colour import correct_colour
from zipir_jax.config import (
    COLOUR_CORRECTIONS,
    ModelConfig,
    RestorationConfig,
    SamplingConfig,
    TargetConfig,
    check_seed,
)
from zipir_jax.diffusion.guidance import (
    classifier_free_guidance,
    conditions,
    guided_timesteps,
    restoration_guidance,
)
from zipir_jax.diffusion.objective import add_noise, predict_clean
from zipir_jax.diffusion.samplers import Step, begin, initial_noise, plan_steps, sample, take_step
from zipir_jax.diffusion.schedule import linear_schedule, sampling_timesteps
from zipir_jax.imageio import LARGEST_SIDE, resize, to_float, to_uint8
from zipir_jax.models.attention import check_implementation
from zipir_jax.models.dit import DiT
from zipir_jax.models.layers import bind
from zipir_jax.models.lp_vae import FACTOR, decode, encode, from_diffused, to_diffused, unwhiten, whiten
from zipir_jax.models.pixel_decoder import pixel_decode
from zipir_jax.photograph import Photograph
from zipir_jax.planner import MARGIN, TEXT_BLOCK, Plan, available_memory, make_plan, padded_size, refusing
from zipir_jax.weights import load_text, load_weights

NEEDED = ("statistics", "coarse_encoder", "fine_encoder", "dit", "pixel_decoder")
PHASES = ("encode", "denoise", "decode")  # that `Restorer.restore` reports, in this order


def denoise_latent(
    weights: dict,
    config: ModelConfig,
    sampling: SamplingConfig,
    lq_latent: Float[Array, "b h w c"],
    keys: Key[Array, " b"],
    text: dict | None = None,
    negative_text: dict | None = None,
) -> Float32[Array, "b h w c"]:
    """Latent of the restored image given the degraded image's (paper section 3.2); the sampler is one `lax.scan`.

    keys: one a picture. text: for a model with text, {"text": [b, l, c], "text_lengths": [b]}. The guidance acts with
    `negative_text`, of the same shapes, and with `sampling.weak_lq`; with both the negative branch has both. Raises
    ValueError for more steps than the shifted schedule has.
    """
    steps, numbers = sampling_numbers(config, sampling, lq_latent.shape)
    read, start = read_conditions(weights, config, numbers, lq_latent, keys, text, negative_text)
    diffused = sample(denoiser(weights, config, numbers, read), keys, start, steps)
    return _latent(weights, diffused, read)


def _latent(weights, diffused, read):
    """The latent that a sampler's result stands for."""
    statistics = weights["statistics"]
    return unwhiten(from_diffused(diffused, read["lq"], statistics), statistics)


def sampling_numbers(
    config: ModelConfig, sampling: SamplingConfig, shape: tuple[int, ...]
) -> tuple[Step, dict]:
    """The steps for latents of a shape [b, h, w, c], and {field of SamplingConfig: number} of what acts beside them.

    As numpy arrays: a compiled program is given them, so that it does for all values. What does not act is None, and no
    part of the program. Raises ValueError for more steps than the shifted schedule has.
    """
    schedule, diffusion = linear_schedule(config.diffusion), config.diffusion
    timesteps = sampling_timesteps(schedule, sampling, math.prod(shape[1:3]) // config.dit.patch**2)
    interval = tuple(np.int32(bound) for bound in guided_timesteps(sampling, diffusion.train_timesteps))
    numbers = {
        "guidance": None if sampling.guidance == 1 else np.float32(sampling.guidance),
        "guidance_interval": None if sampling.guidance_interval == (0, 1) else interval,
        "guidance_rescale": np.float32(sampling.guidance_rescale) if sampling.guidance_rescale else None,
        "weak_lq": None if sampling.weak_lq is None else np.float32(sampling.weak_lq),
        "start": np.int32(timesteps[0]) if sampling.start < 1 else None,  # the timestep
        "fidelity": np.float32(sampling.fidelity) if sampling.fidelity else None,
    }
    return plan_steps(schedule, timesteps, sampling.sampler, sampling.eta), numbers


def read_conditions(
    weights: dict,
    config: ModelConfig,
    numbers: dict,
    lq_latent: Float[Array, "b h w c"],
    keys: Key[Array, " b"],
    text: dict | None = None,
    negative_text: dict | None = None,
) -> tuple[dict, Float32[Array, "b h w c"]]:
    """What does not change from step to step, read once, and the latent that sampling starts from.

    numbers: of `sampling_numbers`; other arguments as of `denoise_latent`. The first is {"lq": the whitened latent,
    "conditions": {name in `guidance.conditions`: what the DiT read of it}, "shared": what it read for all of them}.
    """
    dit, lq = bind(DiT, config.dit, weights["dit"]), whiten(lq_latent, weights["statistics"])
    condition, negative, shared = text or {}, negative_text, {}
    if numbers["guidance"] is None:
        negative = None
    if numbers["guidance"] is None or numbers["weak_lq"] is None:
        shared = dit.read_lq(lq)
    else:
        negative = {"lq": numbers["weak_lq"] * lq} | (condition if negative is None else negative)
        condition = {"lq": lq} | condition

    def read(condition):
        found = dit.read_lq(condition["lq"]) if "lq" in condition else {}
        if "text" in condition:
            found |= dit.read_text(condition["text"], condition["text_lengths"])
        return found

    given = conditions(condition, negative, numbers["guidance_interval"] is not None)
    found = {"lq": lq, "shared": shared, "conditions": {name: read(given[name]) for name in given}}
    start = initial_noise(keys, lq.shape[1:])
    if numbers["start"] is not None:
        least = to_diffused(lq, lq, weights["statistics"])
        start = add_noise(
            least, start, jnp.full(len(lq), numbers["start"]), linear_schedule(config.diffusion)
        )
    return found, start


def denoiser(
    weights: dict, config: ModelConfig, numbers: dict, read: dict
) -> Callable[[Array, Array], Array]:
    """`denoise(noisy, timesteps) -> z_0`, what is diffused without noise, guided as the numbers say.

    read: the first of `read_conditions`.
    """
    dit = bind(DiT, config.dit, weights["dit"])
    predicts = {
        name: functools.partial(dit.denoise, condition=read["shared"] | condition)
        for name, condition in read["conditions"].items()
    }
    predict = classifier_free_guidance(
        predicts, numbers["guidance"], numbers["guidance_rescale"], numbers["guidance_interval"]
    )
    denoise = predict_clean(predict, config.diffusion.prediction, linear_schedule(config.diffusion))
    if numbers["fidelity"] is None:
        return denoise
    channels = config.lp_vae.coarse.decoder_channels
    faithful = to_diffused(read["lq"], read["lq"], weights["statistics"])
    return restoration_guidance(denoise, numbers["fidelity"], faithful, channels)


def branches_of(sampling: SamplingConfig, has_negative_text: bool) -> int:
    """How often a step evaluates the DiT: twice where the guidance acts."""
    return 2 if sampling.guidance != 1 and (has_negative_text or sampling.weak_lq is not None) else 1


@dataclasses.dataclass(frozen=True, eq=False)  # arrays do not compare to one truth value
class Restorer:
    """A model with its weights, ready to restore. Make one with `Restorer.load`."""

    config: ModelConfig
    weights: dict
    # What a model with text restores with where it is given no other: embeddings of the default prompts.
    text: Float[np.ndarray, "l c"] | None = None
    negative_text: Float[np.ndarray, "l2 c"] | None = None

    @classmethod
    def load(cls, weights: str | Path = "default", attention: str | None = None) -> "Restorer":
        """Read a folder of weights, or the "default" ones of the package.

        attention: implementation, see models/attention.py; None: the one that the weights were trained with. The
        default prompts' embeddings are read where the folder has some (`prepare export --text`).

        Raises ValueError, naming folder and tensor, if they cannot be read or do not fit together, and for attention
        that does not run here.
        """
        config, groups = load_weights(weights, NEEDED)
        stored = load_text(weights, config)
        if attention is not None:
            config = dataclasses.replace(config, dit=dataclasses.replace(config.dit, attention=attention))
        check_implementation(config.dit.attention, config.dit.compute_dtype)
        groups = in_compute_dtype(config, {group: groups[group] for group in NEEDED})
        prompts = (None, None) if stored is None else (stored.positive, stored.negative)
        texts = [stored[prompt] if stored is not None and prompt in stored else None for prompt in prompts]
        return cls(config, jax.device_put(groups), *texts)

    def restore(
        self,
        image: UInt8[np.ndarray, "*b h w 3"] | Float32[np.ndarray, "*b h w 3"],
        *,
        scale: float | int | None = None,
        size: tuple[int, int] | None = None,
        sampling: SamplingConfig = SamplingConfig(),
        colour_correction: str = "none",
        seed: int = 0,
        denoise: bool = True,
        text: Float[np.ndarray, "l c"] | None = None,
        negative_text: Float[np.ndarray, "l2 c"] | None = None,
        memory: int | None = None,
        progress: Callable[[str, float], None] = lambda phase, done: None,
    ) -> np.ndarray:
        """Restore a photograph, or a batch of photographs of one size. No file is read or written.

        image: [h, w, 3] or [b, h, w, 3], uint8, or float32 in [-1, 1]; the result has its dtype. Give `scale`, the
        factor on both sides, or `size`, (height, width) in pixels. Each picture of a batch starts from the noise that
        it would have alone. colour_correction: of config.COLOUR_CORRECTIONS, see colour.py. denoise=False skips the
        diffusion and decodes the degraded image's latent as it is.
        text, negative_text: embeddings for models trained with text; None: those of the default prompts, if the weights
        came with them. memory: bytes that the device may spend beside the weights; None: `self.memory`. What does not
        fit whole runs in tiles, with the same result, and a batch in parts.

        progress: called with one of the PHASES and how much of it is done, for all pictures, from 0 to 1: as it starts,
        after each step of the sampler, as it ends. What it raises ends the restoration before the next but one step,
        and the Restorer can be used again.

        Raises ValueError for a wrong shape, dtype, scale, size or colour correction, for text or sampling that does not
        suit the model, and for a size that needs more memory than there is.
        """
        is_bytes = check_image(image)
        if colour_correction not in COLOUR_CORRECTIONS:
            raise ValueError(
                f"colour correction {colour_correction!r} is not one of {', '.join(COLOUR_CORRECTIONS)}"
            )
        height, width = target_size(image.shape[-3:-1], scale, size)
        batch = image[None] if image.ndim == 3 else image
        texts = self._texts(len(batch), text, negative_text) if denoise else (None, None)
        check_seed(seed)
        keys = jnp.broadcast_to(jax.random.key(seed), (len(batch),))
        plan = self.plan(
            image.shape,
            scale=scale,
            size=size,
            sampling=sampling if denoise else None,
            text=text,
            negative_text=negative_text,
            memory=memory,
        )
        too_large = (
            f"{width} x {height} pixels need more memory than there is; choose a smaller scale or size, or "
            "give less memory to plan with, for smaller tiles"
        )
        with refusing(too_large):
            restored = np.empty((len(batch), height, width, 3), batch.dtype)
            for start in range(0, len(batch), plan.pictures):
                # The last part is filled up with its last picture: parts of another size would be other programs.
                part = np.minimum(np.arange(start, start + plan.pictures), len(batch) - 1)
                count = min(plan.pictures, len(batch) - start)

                def of_batch(phase, done, start=start, count=count):
                    progress(phase, (start + count * done) / len(batch))

                pictures = [to_float(batch[i]) if is_bytes else batch[i] for i in part]
                of_part = [text and jax.tree.map(lambda x, part=part: x[part], text) for text in texts]
                pictures = self._restore_part(
                    pictures,
                    plan,
                    height,
                    width,
                    keys[part],
                    sampling if denoise else None,
                    of_part,
                    colour_correction,
                    of_batch,
                )[:count]
                restored[start : start + count] = to_uint8(pictures) if is_bytes else pictures
            return restored[0] if image.ndim == 3 else restored

    @functools.cached_property
    def memory(self) -> int:
        """Bytes to plan with unless told otherwise: found once, so that pictures of one size are restored alike."""
        return available_memory()

    def plan(
        self,
        shape: tuple[int, ...],
        *,
        scale: float | int | None = None,
        size: tuple[int, int] | None = None,
        sampling: SamplingConfig | None = SamplingConfig(),
        text: Float[np.ndarray, "l c"] | None = None,
        negative_text: Float[np.ndarray, "l2 c"] | None = None,
        memory: int | None = None,
    ) -> Plan:
        """How `restore` would make a picture, or a batch, of this shape; arguments as there.

        sampling: None for no diffusion. Raises ValueError, with the numbers and the largest size that fits, for what
        does not fit into the memory, and as `check_sampling`.
        """
        height, width = target_size(shape[-3:-1], scale, size)
        cost = {"branches": 0}
        if sampling is not None:
            text, negative_text = self._given_or_default(text, negative_text)
            padded = math.prod(padded_size(self.config, height, width))
            check_sampling(
                self.config,
                sampling,
                negative_text is not None,
                tokens=padded // (FACTOR * self.config.dit.patch) ** 2,
            )
            branches = branches_of(sampling, negative_text is not None)
            cost = {
                "branches": branches,
                "weak_lq": sampling.weak_lq is not None,
                "interval": branches == 2 and sampling.guidance_interval != (0, 1),
                "text_tokens": padded_tokens(text, negative_text),
            }
        return make_plan(
            self.config,
            height,
            width,
            available=self.memory if memory is None else memory,
            pictures=shape[0] if len(shape) == 4 else 1,
            **cost,
        )

    def _given_or_default(self, text, negative_text):
        if not self.config.dit.text_width:
            return text, negative_text
        return (
            self.text if text is None else text,
            self.negative_text if negative_text is None else negative_text,
        )

    def _restore_part(
        self, pictures, plan, height, width, keys, sampling, texts, colour_correction, progress
    ):
        """float32 pictures [b, h, w, 3] of as many as run at once; without sampling their latents are decoded as they
        are."""
        enlarged = np.stack([resize(picture, height, width) for picture in pictures])
        lq = pad_by_reflection(enlarged, plan.height, plan.width)
        progress("encode", 0.0)
        latent = jax.block_until_ready(_encode(self.config, plan.encode, self.weights, lq))
        progress("encode", 1.0)
        if sampling is not None:
            progress("denoise", 0.0)
            latent = _denoise(self.config, sampling, self.weights, latent, keys, *texts, progress)
        progress("decode", 0.0)
        restored = np.asarray(_decode(self.config, plan.decode, self.weights, latent, lq))
        restored = restored[:, MARGIN : MARGIN + height, MARGIN : MARGIN + width]
        restored = np.stack(
            [correct_colour(*pair, colour_correction) for pair in zip(restored, enlarged, strict=True)]
        )
        progress("decode", 1.0)
        return restored

    def _texts(self, count, text, negative_text):
        """Batched embeddings, padded to one length; raises ValueError where they do not suit the model."""
        channels, texts = self.config.dit.text_width, self._given_or_default(text, negative_text)
        if not channels:
            if any(text is not None for text in texts):
                raise ValueError("these weights were trained without text: they take no prompt")
            return None, None
        for text in texts:
            if text is not None and (text.ndim != 2 or text.shape[1] != channels):
                raise ValueError(f"text embeddings have shape {text.shape}, not [length, {channels}]")
        if texts[0] is None:
            raise ValueError(
                "these weights were trained with text and come with no embedding of the default prompt: give text "
                "embeddings, or store it with the weights (prepare export --text)"
            )
        longest = padded_tokens(*texts)

        def batched(text):
            padded = np.zeros((longest, channels), np.float32)
            padded[: len(text)] = text
            return {
                "text": jnp.broadcast_to(padded, (count, *padded.shape)),
                "text_lengths": jnp.full(count, len(text), jnp.int32),
            }

        return tuple(None if text is None else batched(text) for text in texts)


def padded_tokens(*texts: Float[np.ndarray, "_ c"] | None) -> int:
    """Tokens that text embeddings, or None in the place of one, are padded to; 0 where there are none."""
    longest = max((len(text) for text in texts if text is not None), default=0)
    return math.ceil(longest / TEXT_BLOCK) * TEXT_BLOCK


@functools.partial(jax.jit, static_argnums=(0, 1))
def _encode(config, tiling, weights, lq):
    return encode(weights, config.lp_vae, lq, tiling)


def _denoise(config, sampling, weights, lq_latent, keys, text, negative_text, progress):
    """`denoise_latent` step by step, in programs that serve any number of steps and any strength of what acts."""
    steps, numbers = sampling_numbers(config, sampling, lq_latent.shape)
    read, carry = _read(config, weights, numbers, lq_latent, keys, text, negative_text)
    latent = None
    for index in range(sampling.steps):
        step, before = jax.tree.map(operator.itemgetter(index), steps), latent
        carry, latent = _take_step(config, weights, numbers, read, keys, carry, step)
        if before is not None:  # waited for while the next one runs already: the device never waits
            jax.block_until_ready(before)
            progress("denoise", index / sampling.steps)
    jax.block_until_ready(latent)
    progress("denoise", 1.0)
    return latent


@functools.partial(jax.jit, static_argnums=0)
def _read(config, weights, numbers, lq_latent, keys, text, negative_text):
    read, start = read_conditions(weights, config, numbers, lq_latent, keys, text, negative_text)
    return read, begin(start)


@functools.partial(jax.jit, static_argnums=0, donate_argnames="carry")
def _take_step(config, weights, numbers, read, keys, carry, step):
    """The carry after a step, and the latent that it ends with, which is there when the next step has the carry."""
    carry = take_step(denoiser(weights, config, numbers, read), keys, carry, step)
    return carry, _latent(weights, carry[0], read)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnames="lq")  # the result takes its place
def _decode(config, tiling, weights, latent, lq):
    if "pixel_decoder" in weights:
        restored = pixel_decode(weights["pixel_decoder"], config.lp_vae, latent, lq, tiling)
    else:  # D_f, to see what the pixels add
        restored = decode(weights, config.lp_vae, latent, tiling)
    return jnp.clip(restored, -1, 1)


def in_compute_dtype(config: ModelConfig, weights: dict) -> dict:
    """Weights to sample with: kernels and biases in the dtype that each network computes in.

    The layers would cast them at every use: the results are the same, bit for bit, from half the memory where that is
    bfloat16. Norms and statistics stay float32.
    """
    vae = config.lp_vae
    dtypes = dict.fromkeys(("fine_encoder", "fine_decoder", "pixel_decoder"), vae.fine.compute_dtype)
    dtypes |= dict.fromkeys(("coarse_encoder", "coarse_decoder"), vae.coarse.compute_dtype)
    dtypes["dit"] = config.dit.compute_dtype

    def cast(path, leaf):
        group, name = path[0].key, path[-1].key
        return leaf.astype(dtypes[group]) if name in ("kernel", "bias") else leaf

    return jax.tree.map_with_path(cast, weights)


def check_image(image: np.ndarray) -> bool:
    """Whether the image is uint8 and not float32; raises ValueError if it is neither or no RGB image."""
    if image.ndim not in (3, 4) or image.shape[-1] != 3 or 0 in image.shape:
        raise ValueError(f"an image has shape [h, w, 3] or [b, h, w, 3], not {list(image.shape)}")
    if image.dtype not in (np.uint8, np.float32):
        raise ValueError(f"an image is uint8, or float32 in [-1, 1], not {image.dtype}")
    if image.dtype == np.float32 and not np.abs(image).max() <= 1:
        raise ValueError(f"a float32 image lies in [-1, 1]; this one reaches {np.abs(image).max():g}")
    return image.dtype == np.uint8


def check_sampling(
    config: ModelConfig, sampling: SamplingConfig, has_negative_text: bool = False, tokens: int = 0
) -> None:
    """Raises ValueError for sampling that does not suit the model, or has settings that would do nothing.

    That is for steps that the model's schedule does not have, for a latent of `tokens` where they are known, for a weak
    LQ latent that it was not trained with, and for settings of a guidance that does not act. The default guidance is no
    such demand: it waits for the models and texts that it acts on. Neither is 1, which is none.
    """
    diffusion, weak_lq = config.diffusion, sampling.weak_lq
    timesteps = sampling_timesteps(linear_schedule(diffusion), sampling, tokens)
    if weak_lq is not None:
        if not diffusion.weak_lq_probability:
            raise ValueError(
                f"weak_lq {weak_lq:g} is for weights that were trained with weak LQ latents; these were not"
            )
        low, high = diffusion.weak_lq
        if not low <= weak_lq <= high:
            raise ValueError(
                f"weak_lq {weak_lq:g} lies outside of {low:g} to {high:g}, which the weights were trained with"
            )
    if branches_of(sampling, has_negative_text) == 2:
        first, last = guided_timesteps(sampling, diffusion.train_timesteps)
        if not any(first <= timestep <= last for timestep in timesteps):
            low, high = sampling.guidance_interval
            raise ValueError(
                f"guidance_interval {low:g} to {high:g} holds none of the {len(timesteps)} noise levels of the steps"
            )
        return
    if sampling.guidance == 1:
        reason, names = "with guidance 1", ("guidance_interval", "guidance_rescale", "weak_lq")
    else:
        names = ("guidance", "guidance_interval", "guidance_rescale")
        if diffusion.weak_lq_probability:
            reason = "without a weak LQ latent" + " or a negative text" * bool(config.dit.text_width)
        elif config.dit.text_width:
            reason = "without a negative text"
        else:
            reason = "on weights that were trained without text"
    for name in names:
        value = getattr(sampling, name)
        if value != getattr(SamplingConfig, name):
            shown = " to ".join(f"{number:g}" for number in np.atleast_1d(value))
            raise ValueError(f"{name} {shown} has no effect {reason}; leave it out")


def target_size(
    size: tuple[int, int], scale: float | int | None, target: tuple[int, int] | None
) -> tuple[int, int]:
    """(height, width) of the result in pixels; raises ValueError for a target that is not a size."""
    if (scale is None) == (target is None):
        raise ValueError("give either a scale or a size")
    if scale is not None:
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"scale {scale:g} is not a positive number")
        target = tuple(max(1, side * scale) for side in size)
    if min(target) < 1 or max(target) >= LARGEST_SIDE + 0.5:  # rounded below: a side can be infinite
        raise ValueError(
            f"{target[1]:.0f} x {target[0]:.0f} pixels: a side must lie within 1 to {LARGEST_SIDE}"
        )
    return round(target[0]), round(target[1])


def target_pixels(target: TargetConfig, size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) in pixels of the result for a photograph of a size, (height, width).

    Raises ValueError for a size that is not WIDTHxHEIGHT, and as `target_size`.
    """
    height, width = size
    if target.size is not None:
        return target_size(size, None, parse_size(target.size))
    scale = 4.0 if target.scale is None else target.scale
    if target.short_side is not None:
        scale = target.short_side / min(size)
    if target.long_side is not None:
        scale = target.long_side / max(size)
    if target.megapixels is not None:
        scale = math.sqrt(target.megapixels * 1e6 / (height * width))
    return target_size(size, scale, None)


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) of "WIDTHxHEIGHT"; raises ValueError for anything else."""
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise ValueError(f"size {text!r} is not WIDTHxHEIGHT, such as 2048x1536")
    return int(height), int(width)


def restore_photograph(
    restorer: Restorer,
    photograph: Photograph,
    target: TargetConfig = TargetConfig(),
    restoration: RestorationConfig = RestorationConfig(),
    *,
    seed: int = 0,
    text: Float[np.ndarray, "l c"] | None = None,
    negative_text: Float[np.ndarray, "l2 c"] | None = None,
    memory: int | None = None,
    progress: Callable[[str, float], None] = lambda phase, done: None,
) -> Photograph:
    """A photograph with restored pixels, and all that its file had beside them; arguments as of `Restorer.restore`.

    Raises ValueError as `target_pixels` and `Restorer.restore`.
    """
    restored = restorer.restore(
        photograph.pixels,
        size=target_pixels(target, photograph.pixels.shape[:2]),
        sampling=restoration.sampling,
        colour_correction=restoration.colour_correction,
        seed=seed,
        text=text,
        negative_text=negative_text,
        memory=memory,
        progress=progress,
    )
    return photograph.with_pixels(restored)


def pad_by_reflection(
    image: Float32[np.ndarray, "b h w c"], height: int, width: int
) -> Float32[np.ndarray, "b h2 w2 c"]:
    """Continue an image on all sides by its mirror image, by MARGIN above and to the left, to (height, width)."""
    rows, columns = (
        (MARGIN, after - before - MARGIN)
        for before, after in zip(image.shape[1:3], (height, width), strict=True)
    )
    return np.pad(image, ((0, 0), rows, columns, (0, 0)), "reflect")
