"""Pixel-aware decoder stage: D_f* learns the clean image from a latent and the degraded image (paper section 3.1).

E_f stays frozen, its trainable copy and all of D_f learn. The paper notes that this stage may follow the DiT's, since
the latent space does not change; with `decoder_latent="sampled"` the decoder then sees what the DiT makes.
"""

import jax
import jax.numpy as jnp

from zipir_jax.config import SamplingConfig
from zipir_jax.models.layers import bind, init_params
from zipir_jax.models.lp_vae import encode
from zipir_jax.models.pixel_decoder import PixelDecoder, from_lp_vae
from zipir_jax.restorer import denoise_latent
from zipir_jax.training.losses import image_gradients

DEGRADED = True


def needs(config):
    lp_vae = ("statistics", "coarse_encoder", "fine_encoder", "fine_decoder")
    return (*lp_vae, "dit") if config.decoder_latent == "sampled" else lp_vae


def start(config, key, pretrained, images):
    params = init_params(PixelDecoder, config.model.lp_vae, key)
    return from_lp_vae(params, pretrained), pretrained


def _latent(config, frozen, batch, key):
    if config.decoder_latent == "clean":
        return encode(frozen, config.model.lp_vae, batch["image"])
    keys = jax.random.split(key, batch["lq"].shape[0])
    sampling = SamplingConfig(steps=config.decoder_sampling_steps)
    lq_latent = encode(frozen, config.model.lp_vae, batch["lq"])
    return denoise_latent(frozen, config.model, sampling, lq_latent, keys)


def gradients(config, params, frozen, batch, key, adversarial):
    latent_key, loss_key = jax.random.split(key)
    latent = _latent(config, frozen, batch, latent_key)

    def features(generator):
        decoder = bind(PixelDecoder, config.model.lp_vae, generator)
        return decoder.features(latent, batch["lq"]), jnp.zeros(())  # no KL: the latent is given

    def head(generator, hidden):
        return bind(PixelDecoder, config.model.lp_vae, generator).head(hidden)

    return image_gradients(
        config, features, head, params, frozen["lpips"], batch["image"], loss_key, adversarial
    )


def preview(config, generator, frozen, batch, key):
    """Degraded image, D_f* from the training latent, from the degraded image's latent; clean image."""
    decoder = bind(PixelDecoder, config.model.lp_vae, generator)
    latents = [_latent(config, frozen, batch, key), encode(frozen, config.model.lp_vae, batch["lq"])]
    return [batch["lq"], *(decoder(latent, batch["lq"]) for latent in latents), batch["image"]]


def export(config, generator, frozen, images):
    return {"pixel_decoder": generator}
