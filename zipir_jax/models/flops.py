"""FLOPs of the networks, counted by hand from their configs, and the peak rates of accelerators to hold them against.

XLA's own count visits the body of a scan once and counts rematerialised work; a utilisation (MFU) wants what the
mathematics needs. Here a multiply-add is 2 FLOPs, a convolution pays for its padding too, and biases, norms,
activations, resizing and softmax are not counted. All counts are of one forward pass of one image.
"""

from zipir_jax.config import AutoencoderConfig, DiscriminatorConfig, DiTConfig, LPVAEConfig
from zipir_jax.models.dit import FREQUENCY_EMBEDDING
from zipir_jax.models.lp_vae import COARSE_FACTOR

# FLOP/s of dense bfloat16 matrix products of one device, as jax names its kind (`jax.devices()[0].device_kind`), from
# the makers' data sheets. Where NVIDIA gives the rate with structured sparsity, the dense one is half of it.
PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,  # A100 data sheet, all models
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989.5e12,  # H100 data sheet, SXM: 1979 with sparsity
    "NVIDIA H100 PCIe": 756.5e12,  # H100 data sheet, PCIe: 1513 with sparsity
    "NVIDIA H100 NVL": 835.5e12,  # H100 data sheet, NVL: 1671 with sparsity
    "NVIDIA H200": 989.5e12,  # H200 data sheet, SXM: 1979 with sparsity
    "NVIDIA H200 NVL": 835.5e12,  # H200 data sheet, NVL: 1671 with sparsity
    "NVIDIA B200": 2250e12,  # HGX B200 data sheet: 36 PFLOP/s of 8 with sparsity
    "NVIDIA L4": 121e12,  # L4 data sheet: 242 with sparsity
    "TPU v4": 275e12,  # Cloud TPU documentation; both cores of a chip are one device
    "TPU v5 lite": 197e12,  # v5e
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # v5p
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,  # v6e
    "TPU v6e": 918e12,
}


def peak_flops(device_kind: str) -> float | None:
    """FLOP/s of dense bfloat16 matrix products of one device; None where it is not known, as of a CPU."""
    return PEAK_FLOPS.get(device_kind)


def conv_flops(kernel: int, in_channels: int, out_channels: int, pixels: int) -> int:
    """Of a `kernel` x `kernel` convolution that writes `pixels`."""
    return 2 * kernel**2 * in_channels * out_channels * pixels


def encoder_flops(config: AutoencoderConfig, height: int, width: int) -> int:
    """Of `lp_vae.Encoder`; height and width of the image that it reads, pixels.

    Raises ValueError if a side is not a multiple of the config's factor.
    """
    last = _scales(config, height, width)[-1]
    head = conv_flops(3, last[0], 2 * config.latent_channels, last[1])
    return encoder_features_flops(config, height, width) + head


def encoder_features_flops(config: AutoencoderConfig, height: int, width: int) -> int:
    """Of `lp_vae.Encoder.features`: everything before the last convolution. Arguments as of `encoder_flops`."""
    scales = _scales(config, height, width)
    previous, pixels = scales[0]
    flops = conv_flops(3, 3 * config.patch**2, previous, pixels)
    for scale, (channels, pixels) in enumerate(scales):
        if scale:
            flops += conv_flops(3, previous, previous, pixels)  # Downsample
        flops += _blocks_flops(config, previous, channels, pixels)
        previous = channels
    return flops


def decoder_flops(config: AutoencoderConfig, height: int, width: int) -> int:
    """Of `lp_vae.Decoder`; height and width of the image that it writes, pixels.

    Raises ValueError if a side is not a multiple of the config's factor.
    """
    scales = _scales(config, height, width)[::-1]
    previous, pixels = scales[0]
    flops = conv_flops(3, config.decoder_channels, previous, pixels)
    for scale, (channels, pixels) in enumerate(scales):
        if scale and config.unfold:
            flops += conv_flops(1, previous, 4 * previous, pixels // 4)  # at the lower resolution
        elif scale:
            flops += conv_flops(3, previous, previous, pixels)
        flops += _blocks_flops(config, previous, channels, pixels)
        previous = channels
    for channels, pixels in _enlargements(config, height, width):
        flops += conv_flops(3, previous, channels, pixels)
        previous = channels
    return flops + decoder_head_flops(config, height, width)


def decoder_head_flops(config: AutoencoderConfig, height: int, width: int) -> int:
    """Of `lp_vae.Decoder.head`, the last convolution; arguments as of `decoder_flops`."""
    enlargements = _enlargements(config, height, width)
    channels = enlargements[-1][0] if enlargements else _scales(config, height, width)[0][0]
    return conv_flops(3, channels, 3, height * width)


def pixel_decoder_flops(config: LPVAEConfig, height: int, width: int) -> int:
    """Of `pixel_decoder.PixelDecoder`: extractor, decoder and what fuses the two; sides of the image, pixels.

    Raises ValueError if a side is not a multiple of 32.
    """
    parts = encoder_features_flops, decoder_flops, fusions_flops
    return sum(part(config.fine, height, width) for part in parts)


def fusions_flops(config: AutoencoderConfig, height: int, width: int) -> int:
    """Of what fuses extractor and decoder in `pixel_decoder.PixelDecoder`; arguments as of `decoder_flops`."""
    scales = _scales(config, height, width)[::-1]
    flops, entering = 0, scales[0][0]
    for channels, pixels in scales:
        flops += conv_flops(1, channels, entering, pixels) + 2 * conv_flops(3, entering, entering, pixels)
        entering = channels
    return flops + sum(conv_flops(3, 3, *enlarged) for enlarged in _enlargements(config, height, width))


def encode_flops(config: LPVAEConfig, height: int, width: int) -> int:
    """Of `lp_vae.encode`: E_f on the image, E_c on the 4x smaller one; sides of the image, pixels.

    Raises ValueError if a side is not a multiple of 32.
    """
    fine = encoder_flops(config.fine, height, width)
    return fine + encoder_flops(config.coarse, height // COARSE_FACTOR, width // COARSE_FACTOR)


def dit_flops(config: DiTConfig, height: int, width: int, text_tokens: int = 0) -> int:
    """Of `dit.DiT`, as training runs it; height and width of the latent, latent pixels.

    `text_tokens` are those of the text embeddings as they are given, padding included; the keys and values that are
    made of them are counted. They count only where the config has text. Raises ValueError if a side is not a multiple
    of the patch.
    """
    return dit_read_flops(config, height, width, text_tokens) + dit_step_flops(
        config, height, width, text_tokens
    )


def dit_read_flops(config: DiTConfig, height: int, width: int, text_tokens: int = 0) -> int:
    """Of `dit.DiT.read`, once an image: LQ tokens and keys and values of the text. Arguments as of `dit_flops`."""
    lq, d = _tokens(config, height, width), config.width
    flops = 2 * lq * config.latent_channels * config.patch**2 * d
    if config.text_width:
        flops += config.layers * 2 * text_tokens * 2 * config.text_width * d  # k and v
    if config.lq_attention == "static":
        layer = 2 * lq * _weights(config) * d**2 + 4 * lq**2 * d + 2 * config.modulations * d**2
        flops += config.layers * layer + _timestep_flops(config)
    return flops


def dit_step_flops(config: DiTConfig, height: int, width: int, text_tokens: int = 0) -> int:
    """Of `dit.DiT.denoise`, attention full over noisy and LQ tokens. Arguments as of `dit_flops`."""
    noisy, d = _tokens(config, height, width), config.width
    moving = noisy if config.lq_attention == "static" else 2 * noisy  # tokens that the blocks change
    layer = 2 * moving * _weights(config) * d**2 + 4 * moving * 2 * noisy * d
    layer += 2 * config.modulations * d**2  # once an image
    if config.text_width:
        layer += 2 * moving * 2 * d**2  # q and o
        layer += 4 * moving * text_tokens * d
    embedder_and_head = 2 * 2 * noisy * config.latent_channels * config.patch**2 * d
    final_modulation = 2 * 2 * d**2
    return config.layers * layer + embedder_and_head + _timestep_flops(config) + final_modulation


def _tokens(config, height, width):
    """Of one latent."""
    for name, side in (("height", height), ("width", width)):
        if side % config.patch:
            raise ValueError(f"latent {name} {side} is not a multiple of the patch {config.patch}")
    return height * width // config.patch**2


def _weights(config):
    """Of a layer that each token meets, in units of width squared, without the cross-attention."""
    return 4 + (3 if config.swiglu else 2) * config.mlp_ratio


def _timestep_flops(config):
    return 2 * (FREQUENCY_EMBEDDING + config.width) * config.width


def discriminator_flops(config: DiscriminatorConfig, height: int, width: int) -> int:
    """Of `discriminator.PatchDiscriminator`; height and width of the image, pixels."""
    flops, channels = 0, 3
    for layer in range(config.layers + 1):
        stride = 2 if layer < config.layers else 1
        height, width = ((side + 2 - 4) // stride + 1 for side in (height, width))
        out_channels = config.base_channels * min(2**layer, 8)
        flops += conv_flops(4, channels, out_channels, height * width)
        channels = out_channels
    return flops + conv_flops(4, channels, 1, (height - 1) * (width - 1))


def _scales(config, height, width):
    """(channels, pixels) of each scale, highest resolution first."""
    for name, side in (("height", height), ("width", width)):
        if side % config.factor:
            raise ValueError(f"{name} {side} is not a multiple of {config.factor}")
    pixels = height * width // config.patch**2
    return [(config.base_channels * m, pixels // 4**scale) for scale, m in enumerate(config.multipliers)]


def _blocks_flops(config, in_channels, channels, pixels):
    """Of the residual blocks of one scale; where the channels change, the first has a 1x1 shortcut."""
    convs = 2 * config.blocks_per_scale - 1
    flops = conv_flops(3, in_channels, channels, pixels) + convs * conv_flops(3, channels, channels, pixels)
    return flops + (conv_flops(1, in_channels, channels, pixels) if in_channels != channels else 0)


def _enlargements(config, height, width):
    """(channels, pixels) after each doubling within the decoder's patches, lowest resolution first."""
    doublings = range(config.patch.bit_length() - 1)
    return [(config.pixel_channels * 2**i, height * width // 4**i) for i in reversed(doublings)]
