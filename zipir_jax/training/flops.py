"""FLOPs of one training step, counted by hand after what the stages and `losses.image_gradients` run.

A network that is trained counts three times its forward pass: the gradients with respect to its weights and to what it
reads take one each. One that is only read counts once, and twice where the gradient goes through it to the image.
Rematerialised passes, the optimizer and the average of the weights are not counted, as is the custom for MFU.
"""

from zipir_jax.config import TrainConfig
from zipir_jax.models.flops import (
    conv_flops,
    decoder_flops,
    decoder_head_flops,
    discriminator_flops,
    dit_flops,
    encode_flops,
    encoder_flops,
    pixel_decoder_flops,
)
from zipir_jax.models.lp_vae import COARSE_FACTOR, FACTOR
from zipir_jax.training.losses import lpips_net

# The convolutions of the LPIPS backbones (Zhang et al. 2018): (kernel, stride, padding, channels), and the (side,
# stride) of the poolings without padding between them.
LPIPS_LAYERS = {
    "alexnet": [
        (11, 4, 2, 64),
        (3, 2),
        (5, 1, 2, 192),
        (3, 2),
        *((3, 1, 1, channels) for channels in (384, 256, 256)),
    ],
    "vgg16": [
        *[(3, 1, 1, 64)] * 2,
        (2, 2),
        *[(3, 1, 1, 128)] * 2,
        (2, 2),
        *[(3, 1, 1, 256)] * 3,
        (2, 2),
        *[(3, 1, 1, 512)] * 3,
        (2, 2),
        *[(3, 1, 1, 512)] * 3,
    ],
}


def lpips_features_flops(net: str, height: int, width: int) -> int:
    """Of the backbone of LPIPS, "alexnet" or "vgg16", on one image; its sides in pixels."""
    flops, channels = 0, 3
    for kernel, stride, *conv in LPIPS_LAYERS[net]:
        padding, out_channels = conv or (0, channels)
        height, width = ((side + 2 * padding - kernel) // stride + 1 for side in (height, width))
        if conv:
            flops += conv_flops(kernel, channels, out_channels, height * width)
        channels = out_channels
    return flops


def training_flops(config: TrainConfig, height: int, width: int, *, adversarial: bool) -> int:
    """FLOPs of a training step per image; sides of the crop, pixels.

    `adversarial` says whether the discriminator takes part in the step. Raises ValueError if a side is not a multiple
    of 32.
    """
    vae, dit = config.model.lp_vae, config.model.dit
    text_tokens = config.data.text_tokens if config.data.text else 0
    small = height // COARSE_FACTOR, width // COARSE_FACTOR  # what E_c reads and D_c writes
    latent = height // FACTOR, width // FACTOR
    encode = encode_flops(vae, height, width)
    if config.stage == "dit":
        # The clean and the degraded image are encoded once each, however many noises are drawn for them.
        read = 0 if config.data.latents else 2 * encode
        return read + 3 * config.noise_draws * dit_flops(dit, *latent, text_tokens)
    if config.stage == "coarse":
        trained = encoder_flops(vae.coarse, *small) + decoder_flops(vae.coarse, *small)
        return 3 * trained + _image_loss_flops(config, vae.coarse, *small, adversarial)
    if config.stage == "fine":
        trained = encoder_flops(vae.fine, height, width) + decoder_flops(vae.fine, height, width)
        read = encoder_flops(vae.coarse, *small)
    else:  # pixel_decoder
        trained, read = pixel_decoder_flops(vae, height, width), encode
        if config.decoder_noise[
            1
        ]:  # then the latent is the DiT's prediction, for which it reads the degraded image's
            read += encode + dit_flops(dit, *latent, text_tokens)
    return 3 * trained + read + _image_loss_flops(config, vae.fine, height, width, adversarial)


def _image_loss_flops(config, decoder, height, width, adversarial):
    """Of LPIPS and the discriminator, as `losses.image_gradients` runs them, on images of these sides."""
    flops = 0
    if config.loss.lpips:
        side = config.loss.lpips_crop
        sides = (side, side) if side else (height, width)
        # Forward on the image and its target, backward to the image.
        flops += 3 * lpips_features_flops(lpips_net(config.loss.lpips_net), *sides)
    if adversarial:
        # For the generator forward and backward to the image; then trained, on the image and its target.
        flops += (2 + 2 * 3) * discriminator_flops(config.discriminator, height, width)
        # The adaptive weight takes the gradient of the decoder's last layer twice more.
        flops += 2 * decoder_head_flops(decoder, height, width)
    return flops
