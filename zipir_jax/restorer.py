"""Restorer: the Python API that every front end calls.

    restorer = Restorer.load("default")
    restored = restorer.restore(photo, scale=4)      # uint8 [h, w, 3] in, uint8 [4h, 4w, 3] out

Behind it: resize to the target and pad, encode with the LP-VAE, sample the DiT, decode with D_f*, crop.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Key, UInt8

from zipir_jax.config import ModelConfig, SamplingConfig, check_seed
from zipir_jax.diffusion.guidance import guided
from zipir_jax.diffusion.objective import predict_eps
from zipir_jax.diffusion.samplers import ddim, initial_noise
from zipir_jax.diffusion.schedule import linear_schedule, spaced_timesteps
from zipir_jax.imageio import LARGEST_SIDE, resize, to_float, to_uint8
from zipir_jax.models.dit import DiT
from zipir_jax.models.layers import bind
from zipir_jax.models.lp_vae import FACTOR, encode, unwhiten, whiten
from zipir_jax.models.pixel_decoder import PixelDecoder
from zipir_jax.weights import load_weights

NEEDED = ("statistics", "coarse_encoder", "fine_encoder", "dit", "pixel_decoder")
MARGIN = FACTOR  # pixels; the outermost ones, where convolutions meet their padding of zeros, show a frame
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
    """Latent of the restored image given the degraded image's, by DDIM (paper section 3.2); one `lax.scan`.

    keys: one a picture. text: for a model with text, {"text": [b, l, c], "text_lengths": [b]}; with `negative_text` of
    the same shapes the guidance acts.
    """
    dit = bind(DiT, config.dit, weights["dit"])
    lq = whiten(lq_latent, weights["statistics"])
    schedule = linear_schedule(config.diffusion)

    def prepare(text):
        condition = dit.read(lq, **text)  # once: every step uses it
        predict = functools.partial(dit.denoise, condition=condition)
        return predict_eps(predict, config.diffusion.prediction, schedule)

    noise = initial_noise(keys, lq_latent.shape[1:])
    latent = ddim(
        guided(prepare, sampling.guidance, text or {}, negative_text),
        keys,
        noise,
        schedule,
        sampling.steps,
        sampling.spacing,
        sampling.eta,
    )
    return unwhiten(latent, weights["statistics"])


@dataclasses.dataclass(frozen=True, eq=False)  # arrays do not compare to one truth value
class Restorer:
    """A model with its weights, ready to restore. Make one with `Restorer.load`."""

    config: ModelConfig
    weights: dict

    @classmethod
    def load(cls, weights: str | Path = "default") -> "Restorer":
        """Read a folder of weights, or the "default" ones of the package.

        Raises ValueError, naming folder and tensor, if they cannot be read or do not fit together.
        """
        config, groups = load_weights(weights, NEEDED)
        return cls(config, jax.device_put({group: groups[group] for group in NEEDED}))

    def restore(
        self,
        image: UInt8[np.ndarray, "*b h w 3"] | Float32[np.ndarray, "*b h w 3"],
        *,
        scale: float | int | None = None,
        size: tuple[int, int] | None = None,
        sampling: SamplingConfig = SamplingConfig(),
        seed: int = 0,
        denoise: bool = True,
        text: Float[np.ndarray, "l c"] | None = None,
        negative_text: Float[np.ndarray, "l2 c"] | None = None,
        progress: Callable[[str], None] = lambda phase: None,
    ) -> np.ndarray:
        """Restore a photograph, or a batch of photographs of one size. No file is read or written.

        image: [h, w, 3] or [b, h, w, 3], uint8, or float32 in [-1, 1]; the result has its dtype. Give `scale`, the
        factor on both sides, or `size`, (height, width) in pixels. Each picture of a batch starts from the noise that
        it would have alone. denoise=False skips the diffusion and decodes the degraded image's latent as it is.
        text, negative_text: embeddings for models trained with text. `progress` is told each of the PHASES before it
        starts.

        Raises ValueError for a wrong shape, dtype, scale or size, for text or sampling that does not suit the model,
        and for a size that needs more memory than there is.
        """
        is_bytes = check_image(image)
        height, width = target_size(image.shape[-3:-1], scale, size)
        batch = image[None] if image.ndim == 3 else image
        texts = self._texts(len(batch), text, negative_text)
        if denoise:
            check_sampling(self.config, sampling, negative_text is not None)
        check_seed(seed)
        keys = jnp.broadcast_to(jax.random.key(seed), (len(batch),))
        try:
            pictures = to_float(batch) if is_bytes else batch
            lq = np.stack([resize(picture, height, width) for picture in pictures])
            lq = pad_by_reflection(lq, FACTOR * self.config.dit.patch)
            progress("encode")
            latent = _encode(self.config, self.weights, lq)
            if denoise:
                progress("denoise")
                latent = _denoise(
                    self.config, sampling, self.weights, jax.block_until_ready(latent), keys, *texts
                )
            progress("decode")
            restored = _decode(self.config, self.weights, jax.block_until_ready(latent), lq)
            restored = np.asarray(restored)[:, MARGIN : MARGIN + height, MARGIN : MARGIN + width]
            restored = np.clip(restored, -1, 1)
            restored = restored[0] if image.ndim == 3 else restored
            return to_uint8(restored) if is_bytes else restored
        except (MemoryError, jax.errors.JaxRuntimeError) as error:
            # jax has one class for all that fails on a device; its text begins with the kind.
            if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise ValueError(
                f"{width} x {height} pixels need more memory than there is; choose a smaller scale or size"
            ) from error

    def _texts(self, count, *texts):
        """Batched embeddings, padded to one length; raises ValueError where they do not suit the model."""
        channels = self.config.dit.text_width
        if not channels:
            if any(text is not None for text in texts):
                raise ValueError("these weights were trained without text: they take no prompt")
            return None, None
        for text in texts:
            if text is not None and (text.ndim != 2 or text.shape[1] != channels):
                raise ValueError(f"text embeddings have shape {text.shape}, not [length, {channels}]")
        if texts[0] is None:
            raise ValueError("these weights were trained with text: give text embeddings")
        longest = max(len(text) for text in texts if text is not None)

        def batched(text):
            padded = np.zeros((longest, channels), np.float32)
            padded[: len(text)] = text
            return {
                "text": jnp.broadcast_to(padded, (count, *padded.shape)),
                "text_lengths": jnp.full(count, len(text), jnp.int32),
            }

        return tuple(None if text is None else batched(text) for text in texts)


@functools.partial(jax.jit, static_argnums=0)
def _encode(config, weights, lq):
    return encode(weights, config.lp_vae, lq)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _denoise(config, sampling, weights, lq_latent, keys, text, negative_text):
    return denoise_latent(weights, config, sampling, lq_latent, keys, text, negative_text)


@functools.partial(jax.jit, static_argnums=0)
def _decode(config, weights, latent, lq):
    return bind(PixelDecoder, config.lp_vae, weights["pixel_decoder"])(latent, lq)


def check_image(image: np.ndarray) -> bool:
    """Whether the image is uint8 and not float32; raises ValueError if it is neither or no RGB image."""
    if image.ndim not in (3, 4) or image.shape[-1] != 3 or 0 in image.shape:
        raise ValueError(f"an image has shape [h, w, 3] or [b, h, w, 3], not {list(image.shape)}")
    if image.dtype not in (np.uint8, np.float32):
        raise ValueError(f"an image is uint8, or float32 in [-1, 1], not {image.dtype}")
    if image.dtype == np.float32 and not np.abs(image).max() <= 1:
        raise ValueError(f"a float32 image lies in [-1, 1]; this one reaches {np.abs(image).max():g}")
    return image.dtype == np.uint8


def check_sampling(config: ModelConfig, sampling: SamplingConfig, has_negative_text: bool = False) -> None:
    """Raises ValueError for steps that the model's schedule does not have, or a guidance that would do nothing.

    The default guidance is no such demand: it waits for the models and texts that it acts on.
    """
    spaced_timesteps(config.diffusion.train_timesteps, sampling.steps, sampling.spacing)
    if sampling.guidance != SamplingConfig.guidance and not has_negative_text:
        reason = (
            "without a negative text"
            if config.dit.text_width
            else "on weights that were trained without text"
        )
        raise ValueError(f"guidance {sampling.guidance:g} has no effect {reason}; leave it out")


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


def pad_by_reflection(
    image: Float32[np.ndarray, "b h w c"], multiple: int
) -> Float32[np.ndarray, "b h2 w2 c"]:
    """Continue an image on all sides by its mirror image, by MARGIN or more, to multiples of `multiple` pixels."""
    rows, columns = ((MARGIN, MARGIN + -(side + 2 * MARGIN) % multiple) for side in image.shape[1:3])
    return np.pad(image, ((0, 0), rows, columns, (0, 0)), "reflect")
