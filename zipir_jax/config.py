"""Every setting of the project, once, with its unit and its source in the paper."""

import dataclasses
import math

LARGEST_SEED = 2**32 - 1  # jax keeps 32 bits: a larger one would repeat the numbers of another

# --------------------------------------------------------------------------------------------------
# Degradation: what turns a clean photograph into the low-quality (LQ) input.
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Task:
    """A degradation with nothing random but its noise: blur, then downscale, then noise, then JPEG.

    The blur acts on the clean image's pixels, the noise on the downscaled image's: the classic order. The
    paper names the four steps without saying in which order they are applied.
    """

    downscale: int = 1  # clean size / LQ size; antialiased bicubic
    blur_sigma: float = 0.0  # standard deviation of the Gaussian blur in clean pixels; 0 = absent
    noise_sigma: float = 0.0  # standard deviation of the Gaussian noise on the scale 0..255; 0 = absent
    jpeg_quality: int | None = None  # 1..100; None = absent

    def __post_init__(self):
        if self.downscale < 1:
            raise ValueError(f"downscale {self.downscale} is below 1.")
        if self.blur_sigma < 0 or self.noise_sigma < 0:
            raise ValueError(f"blur sigma {self.blur_sigma} or noise sigma {self.noise_sigma} is below 0.")
        if self.jpeg_quality is not None and not 1 <= self.jpeg_quality <= 100:
            raise ValueError(f"JPEG quality {self.jpeg_quality} lies outside 1..100.")


TASKS = {
    "sr8": Task(downscale=8),  # paper Table 1
    "sr16": Task(downscale=16),  # paper Table 1
    "mixture": Task(downscale=8, blur_sigma=2.0, noise_sigma=40.0, jpeg_quality=50),  # paper Table 1
    "fig4": Task(downscale=8, blur_sigma=1.0, noise_sigma=15.0, jpeg_quality=65),  # paper Figs. 4, 21, 22
    "fig4_x4": Task(downscale=4, blur_sigma=1.0, noise_sigma=15.0, jpeg_quality=65),  # same, x4
}


def _check_range(name, bounds, lowest, highest=math.inf):
    """Raises ValueError unless lowest <= bounds[0] <= bounds[1] <= highest."""
    if not lowest <= bounds[0] <= bounds[1] <= highest:
        raise ValueError(f"{name} {bounds} is not a rising range within {lowest} to {highest}.")


def _check_probability(name, value):
    if not 0 <= value <= 1:
        raise ValueError(f"{name} {value} is not between 0 and 1.")


def _check_decay(name, value):
    if not 0 <= value < 1:
        raise ValueError(f"{name} {value} is not at least 0 and below 1.")


def _check_at_least(name, value, lowest):
    if not value >= lowest:  # so put, NaN is refused as well
        raise ValueError(f"{name} {value} is not at least {lowest}.")


def _check_one_of(name, value, allowed):
    if value not in allowed:
        raise ValueError(f"{name} {value!r} is not one of {', '.join(allowed)}.")


def check_seed(seed, largest=LARGEST_SEED):
    """Raises ValueError unless 0 <= seed <= largest."""
    if not 0 <= seed <= largest:
        raise ValueError(f"seed {seed} does not lie within 0 to {largest}.")


def _check_positive(name, value):
    if not value > 0:
        raise ValueError(f"{name} {value} is not above 0.")


@dataclasses.dataclass(frozen=True)
class BlurKernels:
    """Probability of each family of blur kernels, given that the blur is not a sinc filter.

    Source: Real-ESRGAN x4plus training options (`kernel_list`, `kernel_prob`), the same in both orders.
    """

    iso: float = 0.45
    aniso: float = 0.25
    generalized_iso: float = 0.12
    generalized_aniso: float = 0.03
    plateau_iso: float = 0.12
    plateau_aniso: float = 0.03

    def __post_init__(self):
        values = dataclasses.astuple(self)
        for field, value in zip(dataclasses.fields(self), values, strict=True):
            _check_probability(f"kernel probability {field.name}", value)
        if abs(sum(values) - 1) > 1e-6:
            raise ValueError(f"the kernel probabilities sum to {sum(values):g} instead of 1.")


@dataclasses.dataclass(frozen=True)
class DegradationOrder:
    """One round of blur, resize, noise and JPEG. A pair is (lowest, highest) of what is drawn uniformly.

    Source: Real-ESRGAN (Wang et al. 2021) section 3 and its x4plus training options; the defaults are the
    first order's.
    """

    blur_probability: float = 1.0
    sinc_probability: float = 0.1  # that the blur is a sinc filter and not one of `kernels`
    kernels: BlurKernels = BlurKernels()
    kernel_size: tuple[int, int] = (7, 21)  # pixels; only odd sizes are drawn
    blur_sigma: tuple[float, float] = (0.2, 3.0)  # pixels of the clean image; along each axis
    generalized_shape: tuple[float, float] = (0.5, 4.0)  # exponent; half below 1, half above
    plateau_shape: tuple[float, float] = (1.0, 2.0)  # exponent; half at 1, half above
    sinc_cutoff_small: tuple[float, float] = (math.pi / 3, math.pi)  # rad / pixel, kernels below 13 pixels
    sinc_cutoff_large: tuple[float, float] = (math.pi / 5, math.pi)  # rad / pixel, the others

    resize_up_probability: float = 0.2
    resize_down_probability: float = 0.7  # the rest keeps the size
    resize_scale: tuple[float, float] = (0.15, 1.5)  # factor; down draws below 1, up above

    gaussian_probability: float = 0.5  # that the noise is Gaussian; otherwise it is Poisson
    gaussian_sigma: tuple[float, float] = (1.0, 30.0)  # standard deviation on the scale 0..255
    poisson_scale: tuple[float, float] = (0.05, 3.0)  # factor on the noise of counting 0..256 photons
    grey_probability: float = 0.4  # that the noise is the same in the three channels

    jpeg_quality: tuple[int, int] = (30, 95)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if field.name.endswith("_probability"):
                _check_probability(field.name, getattr(self, field.name))
        _check_probability(
            "resize_up_probability + resize_down_probability",
            self.resize_up_probability + self.resize_down_probability,
        )
        _check_range("kernel_size", self.kernel_size, 1)
        if self.kernel_size[0] % 2 == 0 or self.kernel_size[1] % 2 == 0:
            raise ValueError(f"kernel_size {self.kernel_size} has an even end; blur kernels are odd.")
        _check_range("blur_sigma", self.blur_sigma, 0.01)
        _check_range("generalized_shape", self.generalized_shape, 0.01)
        _check_range("plateau_shape", self.plateau_shape, 0.01)
        _check_range("sinc_cutoff_small", self.sinc_cutoff_small, 0.01, math.pi)
        _check_range("sinc_cutoff_large", self.sinc_cutoff_large, 0.01, math.pi)
        _check_range("resize_scale", self.resize_scale, 0.01)
        _check_range("gaussian_sigma", self.gaussian_sigma, 0)
        _check_range("poisson_scale", self.poisson_scale, 0)
        _check_range("jpeg_quality", self.jpeg_quality, 1, 100)


@dataclasses.dataclass(frozen=True)
class DegradationConfig:
    """How a clean training image becomes its low-quality (LQ) partner.

    The paper (section 3.2) uses "methods similar to" Real-ESRGAN and resizes the result back to the clean
    size. Every number is Real-ESRGAN's, except where the comment says ours.
    """

    # Ours. The paper trains one model for everything it scores, and the noise of its mixture task (sigma 40)
    # lies outside Real-ESRGAN's range; so half of the items take a task of Table 1, with equal shares.
    task_probability: float = 0.5
    tasks: tuple[str, ...] = ("sr8", "sr16", "mixture")  # keys of TASKS; named twice, twice the share

    # Ours: clean size / LQ size, drawn log-uniformly so that each octave has the same share. Real-ESRGAN
    # fixes 4; the paper's tasks go to 16, and photographs from the wild have been shrunk little or not at all.
    scale: tuple[float, float] = (1.0, 16.0)

    first: DegradationOrder = DegradationOrder()
    second: DegradationOrder = DegradationOrder(
        blur_probability=0.8,
        blur_sigma=(0.2, 1.5),
        resize_up_probability=0.3,
        resize_down_probability=0.4,
        resize_scale=(0.3, 1.2),  # relative to the LQ size, not to the image that the first order left
        gaussian_sigma=(1.0, 25.0),
        poisson_scale=(0.05, 2.5),
    )

    # The second order's JPEG comes before or after the final resize and sinc filter with even odds.
    final_sinc_probability: float = 0.8
    final_sinc_size: tuple[int, int] = (7, 21)  # pixels; only odd sizes are drawn
    final_sinc_cutoff: tuple[float, float] = (math.pi / 3, math.pi)  # rad / pixel

    def __post_init__(self):
        _check_probability("task_probability", self.task_probability)
        _check_probability("final_sinc_probability", self.final_sinc_probability)
        for name in self.tasks:
            if name not in TASKS:
                raise ValueError(f"task {name!r} is not one of {', '.join(TASKS)}.")
        if self.task_probability > 0 and not self.tasks:
            raise ValueError(f"task_probability is {self.task_probability} but tasks is empty.")
        _check_range("scale", self.scale, 1)
        _check_range("final_sinc_size", self.final_sinc_size, 1)
        if self.final_sinc_size[0] % 2 == 0 or self.final_sinc_size[1] % 2 == 0:
            raise ValueError(f"final_sinc_size {self.final_sinc_size} has an even end; kernels are odd.")
        _check_range("final_sinc_cutoff", self.final_sinc_cutoff, 0.01, math.pi)


# --------------------------------------------------------------------------------------------------
# Synthetic images
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SyntheticConfig:
    """Synthetic training images: textured and shaded dead leaves. A pair is (lowest, highest) of what is drawn.

    Radii fall as r^-3, the one law under which dead leaves look alike at all scales (Lee, Mumford and Huang 2001).
    Pixels are those of the finished image. Where the comment names no source, the value is ours, chosen by eye.
    """

    # A leaf's radius is that of the disc of its area. Each image draws its own bounds log-uniformly: a lower one near
    # the pixel fills the image with fine clutter, a higher one leaves plain surfaces.
    smallest_radius: tuple[float, float] = (1.5, 8.0)  # pixels
    largest_radius: tuple[float, float] = (0.25, 0.8)  # of the image's side
    layers: float = 3.0  # leaves over a point of the image, on average; exp(-layers) of the ground stays bare

    # Shares of the shapes; they sum to 1.
    ellipses: float = 0.25
    rectangles: float = 0.2
    polygons: float = 0.25  # straight borders between corners at random angles and distances
    blobs: float = 0.3  # smooth borders, a sum of harmonics
    aspect: tuple[float, float] = (1.0, 4.0)  # length / width, log-uniform; of every shape
    corners: tuple[int, int] = (3, 8)  # of a polygon
    wobble: tuple[float, float] = (0.05, 0.3)  # rms of a polygon's or blob's border around its disc, in radii

    # Colours are normal in the logarithm of linear light, along the axes grey, yellow-blue and red-green (Ruderman,
    # Cronin and Chiao 1998). Moments near those of scikit-image's four colour photographs: deviations 1.1 to 2.6,
    # 0.34 to 0.61 and 0.16 to 0.56, part of which is left to shading and texture; the last two
    # correlate by 0.73 to 0.97, for the world is rather orange and blue than green and purple. Their means there are
    # 0.4 and 0.4; ours are lower, as three of the four are of warm things.
    colour_std: tuple[float, float, float] = (1.1, 0.4, 0.25)  # natural logarithm
    colour_mean: tuple[float, float] = (0.25, 0.12)  # of yellow-blue and red-green, natural logarithm
    colour_correlation: float = 0.75  # of yellow-blue and red-green
    palette: tuple[int, int] = (3, 7)  # colours an image's leaves gather around
    palette_spread: float = 0.35  # deviation of leaves around their palette colour / colour_std
    # How strongly neighbours share a palette colour: deviation of the local log odds.
    palette_patches: float = 1.5

    textures: int = 5  # different ones in an image
    texture_contrast: float = 0.2  # mean over leaves of the deviation of log luminance; exponential
    # alpha of amplitude ~ 1 / f^alpha; whole photographs have 0.8 to 1.5 (Tolhurst, Tadmor and Chao 1992).
    noise_exponent: tuple[float, float] = (0.6, 1.8)
    # Correlation length along the grain / across, log-uniform.
    noise_stretch: tuple[float, float] = (1.0, 6.0)
    gratings: float = 0.2  # share of textures that are warped stripes
    grating_period: tuple[float, float] = (4.0, 40.0)  # pixels, log-uniform
    grating_warp: tuple[float, float] = (0.0, 5.0)  # rms shift of the stripes' phase, radians

    gradient: float = 0.3  # deviation of the change of log luminance from a leaf's middle to its rim
    roundness: tuple[float, float] = (0.0, 0.5)  # fall of log luminance from middle to rim, as of a ball
    lighting: float = 0.4  # deviation of the change of log luminance from the image's middle to its edge
    shadow: tuple[float, float] = (0.0, 1.5)  # fall of log luminance under the highest leaf beside the lowest
    shadow_sigma: tuple[float, float] = (1.5, 8.0)  # pixels, softness and half the length of the shadows

    # Mean of the finished image, linear light, 1 = white; log-uniform.
    exposure: tuple[float, float] = (0.1, 0.3)
    lens_sigma: tuple[float, float] = (0.3, 0.8)  # pixels, Gaussian blur of the finished image

    def __post_init__(self):
        _check_range("smallest_radius", self.smallest_radius, 0.5)
        _check_range("largest_radius", self.largest_radius, 0.01, 4)
        _check_positive("layers", self.layers)
        shapes = (self.ellipses, self.rectangles, self.polygons, self.blobs)
        for name, share in zip(("ellipses", "rectangles", "polygons", "blobs"), shapes, strict=True):
            _check_probability(name, share)
        if abs(sum(shapes) - 1) > 1e-6:
            raise ValueError(f"the shares of the shapes sum to {sum(shapes):g} instead of 1.")
        _check_range("aspect", self.aspect, 1, 16)
        _check_range("corners", self.corners, 3, 12)
        _check_range("wobble", self.wobble, 0, 0.5)
        for value in self.colour_std:
            _check_at_least("colour_std", value, 0)
        if not -1 <= self.colour_correlation <= 1:
            raise ValueError(f"colour_correlation {self.colour_correlation} does not lie within -1 to 1.")
        _check_range("palette", self.palette, 1)
        _check_at_least("palette_spread", self.palette_spread, 0)
        _check_at_least("palette_patches", self.palette_patches, 0)
        _check_at_least("textures", self.textures, 1)
        _check_at_least("texture_contrast", self.texture_contrast, 0)
        _check_range("noise_exponent", self.noise_exponent, 0, 4)
        _check_range("noise_stretch", self.noise_stretch, 1)
        _check_probability("gratings", self.gratings)
        _check_range("grating_period", self.grating_period, 2)  # pixels: Nyquist
        _check_range("grating_warp", self.grating_warp, 0)
        _check_at_least("gradient", self.gradient, 0)
        _check_range("roundness", self.roundness, 0)
        _check_at_least("lighting", self.lighting, 0)
        _check_range("shadow", self.shadow, 0)
        _check_range("shadow_sigma", self.shadow_sigma, 0.1)
        _check_range("exposure", self.exposure, 0.001, 1)
        _check_range("lens_sigma", self.lens_sigma, 0.1, 1)


# --------------------------------------------------------------------------------------------------
# Indexing
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class IndexConfig:
    """Which images of a collection `prepare index` keeps, and how it stores them.

    The paper says of its training images that they are "high-quality"; the rules are ours. Their limits come from 557
    photographs, of which they drop none, and from copies of these that were blurred, enlarged or compressed.
    """

    shortest_side: int = 512  # pixels, at least; the smallest size that the paper trains at
    longest_aspect: float = 4.0  # long side / short side, at most; beyond are banners, strips and borders
    # Deviation of the luma, at least; 0..255. Photographs have 14 to 95; scans of blank pages and error pictures less.
    contrast: float = 5.0
    # Finest detail / next coarser detail where the image is sharpest, at least (`data.quality.sharpness`). Photographs
    # have 0.9 to 4; enlarged twofold or blurred with sigma 1 pixel 0.65 to 1.4, enlarged fourfold or blurred with
    # sigma 2 pixels less than 0.87.
    sharpness: float = 0.87
    # Bytes of the file / bytes of the image as JPEG of quality 50, at least. Photographs have 1.3 to 3.5, JPEG files of
    # quality 10 0.5 to 0.9 and of quality 30 0.75 to 0.9, WebP files of quality 20 0.3 to 0.75. Bytes per pixel, the
    # more common measure, are 0.04 for a clear sky at quality 92 and for a forest at quality 10.
    compression: float = 0.75
    exact_duplicates: bool = True  # of files with the same bytes, drop all but the first
    # Of images whose perceptual hashes differ in at most this many of their 256 bits, drop all but the largest; -1
    # keeps them. Resized and recompressed copies differ in 0 to 14 bits, different photographs in 92 or more.
    near_duplicate_bits: int = 12
    shard_mib: float = (
        1024.0  # MiB of image files in a shard; large enough for a disk, a download or a bucket
    )

    def __post_init__(self):
        _check_at_least("shortest_side", self.shortest_side, 1)
        _check_at_least("longest_aspect", self.longest_aspect, 1)
        for name in ("contrast", "sharpness", "compression"):
            _check_at_least(name, getattr(self, name), 0)
        if not -1 <= self.near_duplicate_bits <= 63:
            raise ValueError(f"near_duplicate_bits {self.near_duplicate_bits} does not lie within -1 to 63.")
        _check_positive("shard_mib", self.shard_mib)


# --------------------------------------------------------------------------------------------------
# Diffusion
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """The noise process of the paper (supplement A)."""

    train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012  # betas are linear between the two
    logit_normal_mean: float = 0.0  # of logit(t / T) when timesteps are drawn for training
    logit_normal_std: float = 1.0
    prediction: str = "eps"  # what the DiT predicts: eps (paper) or v, see diffusion/objective.py
    uniform_share: float = 0.0  # of the timesteps drawn for training, drawn uniformly instead
    # The signal is scaled to end at zero, see diffusion/schedule.py; with v and a uniform_share alone.
    zero_terminal_snr: bool = False
    # What is diffused is the clean latent's difference from the LQ latent, in units of what that is on average (Yue et
    # al. 2023, "ResShift", shift the one into the other), and not the clean latent; see `models.lp_vae.to_diffused`.
    residual: bool = False
    # Probability, in training, that the whitened LQ latent is made weak: multiplied by a number drawn uniformly from
    # the range weak_lq. Weights trained so can be guided away from what a weak LQ latent gives, in the place of no LQ
    # latent at all (VOSR, Wu et al. 2026, whose published configs have 0.1 and this range); 0 = off.
    weak_lq_probability: float = 0.0
    weak_lq: tuple[float, float] = (0.05, 0.25)  # strengths of weak LQ latents

    def __post_init__(self):
        _check_at_least("train_timesteps", self.train_timesteps, 1)
        _check_range("betas", (self.beta_start, self.beta_end), 0, 1)
        _check_one_of("prediction", self.prediction, ("eps", "v"))
        if self.zero_terminal_snr and self.prediction != "v":
            raise ValueError(
                "zero_terminal_snr needs the prediction v: without any signal, the noise says nothing of the image."
            )
        _check_probability("uniform_share", self.uniform_share)
        if self.zero_terminal_snr and not self.uniform_share:
            raise ValueError(
                "zero_terminal_snr needs a uniform_share above 0: logit-normal timesteps never reach the last, which "
                "sampling starts from."
            )
        _check_probability("weak_lq_probability", self.weak_lq_probability)
        _check_range("weak_lq", self.weak_lq, 0, 1)


# --------------------------------------------------------------------------------------------------
# Networks
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Encoder and decoder of one band of the LP-VAE (paper supplement A)."""

    latent_channels: int  # of the band that the encoder writes
    decoder_channels: int  # that the decoder reads: this band and all below it
    base_channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4, 4)  # of base_channels, one per scale, highest resolution first
    blocks_per_scale: int = 2
    patch: int = 1  # pixels; the image is folded into patches before the first scale (1 in the paper)
    # Upsampling unfolds the channels of a pixel into 2 x 2 pixels instead of convolving the enlarged ones: learns far
    # sooner where a latent pixel holds many, see docs/decisions.md.
    unfold: bool = False
    pixel_channels: int = 12  # of the decoder at full resolution, twice as many at half; only where patch > 1
    compute_dtype: str = "bfloat16"
    remat: str = "none"  # what training computes anew instead of keeping: none, or full: each residual block

    def __post_init__(self):
        if self.patch < 1 or self.patch & (self.patch - 1):
            raise ValueError(f"patch {self.patch} is not a power of two")
        _check_one_of("remat", self.remat, ("none", "full"))

    @property
    def factor(self) -> int:
        """Pixels of the image it reads per latent pixel."""
        return self.patch * 2 ** (len(self.multipliers) - 1)


@dataclasses.dataclass(frozen=True)
class LPVAEConfig:
    """Latent Pyramid VAE: macro 3 + coarse 9 + fine 52 = 64 channels, 32x smaller (paper section 3.1)."""

    coarse: AutoencoderConfig = AutoencoderConfig(latent_channels=9, decoder_channels=12)
    fine: AutoencoderConfig = AutoencoderConfig(
        latent_channels=52, decoder_channels=64, multipliers=(1, 2, 4, 4, 4, 4)
    )

    def __post_init__(self):
        for name, band, factor in (("coarse", self.coarse, 8), ("fine", self.fine, 32)):
            if band.factor != factor:
                raise ValueError(
                    f"the {name} band's patch {band.patch} and {len(band.multipliers)} scales shrink "
                    f"{band.factor}x instead of {factor}x"
                )
        bands = (3, self.coarse.latent_channels, self.fine.latent_channels)  # macro is an RGB image
        for name, band, read in (("coarse", self.coarse, sum(bands[:2])), ("fine", self.fine, sum(bands))):
            if band.decoder_channels != read:
                raise ValueError(
                    f"the {name} decoder reads {band.decoder_channels} channels; its bands have {read}"
                )


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Diffusion transformer; the defaults are the paper's 3.12B (section 3.2, supplement A)."""

    layers: int = 24
    width: int = 2048
    heads: int = 16
    mlp_ratio: int = 4  # hidden width of the feed-forward network / width
    swiglu: bool = True  # else the GELU network of DiT
    text_width: int = 4096  # channels of the text embeddings (T5-XXL); 0 = no cross-attention
    patch: int = 1  # latent pixels a token covers on each side
    latent_channels: int = 64
    bias: bool = False  # in the linear layers of attention and feed-forward
    attention: str = "xla"  # implementation: xla, cudnn or splash, see models/attention.py
    # What the LQ tokens attend to: joint, as in the paper, to all tokens; static, to one another and not to the
    # timestep, so that sampling computes their keys and values once per image.
    lq_attention: str = "joint"
    compute_dtype: str = "bfloat16"
    remat: str = "none"  # what training computes anew instead of keeping: see REMAT in models/dit.py

    def __post_init__(self):
        for name in ("layers", "width", "heads", "mlp_ratio", "patch", "latent_channels"):
            _check_at_least(name, getattr(self, name), 1)
        if self.width % self.heads or self.width // self.heads % 4:
            raise ValueError(
                f"width {self.width} over {self.heads} heads is not a multiple of 4 channels a head, "
                "which 2-D rotary positions need"
            )
        _check_one_of("attention", self.attention, ("xla", "cudnn", "splash"))
        _check_one_of("lq_attention", self.lq_attention, ("joint", "static"))
        _check_one_of("remat", self.remat, ("none", "attention", "full"))

    @property
    def modulations(self) -> int:
        """adaLN-zero vectors a block: shift, scale and gate for each sublayer."""
        return 9 if self.text_width else 6


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Encoder of T5 v1.1 (Raffel et al. 2020; Shazeer 2020); the defaults are XXL's 4.76B."""

    layers: int = 24
    width: int = 4096  # channels of the embeddings
    heads: int = 64
    head_width: int = 64  # channels of a head; all heads together may have more or fewer than width
    hidden: int = 10240  # channels within the feed-forward network
    vocabulary: int = 32128  # tokens with an embedding
    # Distances between tokens share as many biases of the attention, half of them for each direction; those of
    # max_distance tokens and more share the last.
    buckets: int = 32
    max_distance: int = 128
    compute_dtype: str = "bfloat16"

    def __post_init__(self):
        for name in ("layers", "width", "heads", "head_width", "hidden", "vocabulary"):
            _check_at_least(name, getattr(self, name), 1)
        if self.buckets < 4 or self.buckets % 4:
            raise ValueError(f"buckets {self.buckets} is not a multiple of 4.")
        # Up to a quarter of the buckets, a distance has one of its own.
        _check_at_least("max_distance", self.max_distance, self.buckets // 4 + 1)


@dataclasses.dataclass(frozen=True)
class SDVAEConfig:
    """Autoencoder of Stable Diffusion (Rombach et al. 2022), the paper's baseline; the defaults are its f8c4.

    The paper's f32c64 (supplement A) has multipliers 1, 2, 4, 4, 4, 4 and 64 channels.
    """

    base_channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4, 4)  # of base_channels, one per scale, highest resolution first
    blocks_per_scale: int = 2  # of the encoder; the decoder has one more
    latent_channels: int = 4
    groups: int = 32  # of channels that a norm looks at together, with all their pixels
    attention: bool = True  # a layer of it at the lowest resolution, in the encoder and in the decoder
    scaling: float = 0.18215  # factor from the posterior's mean to the latent, to about unit variance

    def __post_init__(self):
        for name in ("base_channels", "blocks_per_scale", "latent_channels", "groups"):
            _check_at_least(name, getattr(self, name), 1)
        if not self.multipliers or min(self.multipliers) < 1:
            raise ValueError(f"multipliers {self.multipliers} are not at least one number of at least 1.")
        for multiplier in self.multipliers:
            if self.base_channels * multiplier % self.groups:
                raise ValueError(
                    f"{self.base_channels * multiplier} channels are not a multiple of {self.groups} groups."
                )
        _check_positive("scaling", self.scaling)

    @property
    def factor(self) -> int:
        """Pixels of the image per latent pixel."""
        return 2 ** (len(self.multipliers) - 1)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that defines a set of weights."""

    lp_vae: LPVAEConfig = LPVAEConfig()
    dit: DiTConfig = DiTConfig()
    diffusion: DiffusionConfig = DiffusionConfig()

    def __post_init__(self):
        if self.dit.latent_channels != self.lp_vae.fine.decoder_channels:
            raise ValueError(
                f"the DiT's latent has {self.dit.latent_channels} channels, the LP-VAE's "
                f"{self.lp_vae.fine.decoder_channels}"
            )


MODELS = {
    "paper": ModelConfig(),
    # The paper's smaller DiT: DiT-XL's shape, no text.
    "dit_0p68b": ModelConfig(
        dit=DiTConfig(layers=28, width=1152, swiglu=False, text_width=0, bias=True),
    ),
    # The default weights: trained on two CPU cores, 12 MiB in bfloat16.
    "small": ModelConfig(
        lp_vae=LPVAEConfig(
            coarse=AutoencoderConfig(
                latent_channels=9,
                decoder_channels=12,
                base_channels=24,
                multipliers=(1, 2, 3),
                patch=2,
                unfold=True,
                compute_dtype="float32",
            ),
            fine=AutoencoderConfig(
                latent_channels=52,
                decoder_channels=64,
                base_channels=16,
                multipliers=(3, 4, 6, 6),
                patch=4,
                unfold=True,
                compute_dtype="float32",
            ),
        ),
        dit=DiTConfig(layers=5, width=128, heads=4, text_width=0, compute_dtype="float32"),
        # After a few hundred steps, predicting eps leaves no more than a noise of colours at the start of sampling.
        diffusion=DiffusionConfig(prediction="v"),
    ),
    # To try every stage on two CPU cores within minutes; it restores nothing well.
    "tiny": ModelConfig(
        lp_vae=LPVAEConfig(
            coarse=AutoencoderConfig(
                latent_channels=9,
                decoder_channels=12,
                base_channels=16,
                multipliers=(1, 2, 2),
                blocks_per_scale=1,
                patch=2,
                unfold=True,
                compute_dtype="float32",
            ),
            fine=AutoencoderConfig(
                latent_channels=52,
                decoder_channels=64,
                base_channels=16,
                multipliers=(2, 3, 4, 4),
                blocks_per_scale=1,
                patch=4,
                unfold=True,
                compute_dtype="float32",
            ),
        ),
        dit=DiTConfig(layers=3, width=96, heads=4, text_width=0, compute_dtype="float32"),
        diffusion=DiffusionConfig(prediction="v"),
    ),
}


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
    """Patch discriminator (Isola et al. 2017)."""

    base_channels: int = 64
    layers: int = 3  # convolutions of stride 2; two of stride 1 follow. 3 judges patches of 70 x 70 pixels
    compute_dtype: str = "bfloat16"

    def __post_init__(self):
        _check_at_least("base_channels", self.base_channels, 1)
        _check_at_least("layers", self.layers, 1)


# What a model with text is told where nobody says what a photograph shows: how it should look, which holds for all of
# them. The wording is ours; the paper gives none.
POSITIVE_PROMPT = (
    "A sharp, detailed, high-resolution photograph with natural colours, fine texture and clean edges."
)
# What guidance leads away from, and the caption of low-quality images in training (paper section 3.2): it names what
# the degradations of training do to an image, and nothing that a good photograph may show.
NEGATIVE_PROMPT = (
    "A blurry, noisy, low-resolution photograph with JPEG artifacts, smeared texture and lost detail."
)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Training images, how they are cut, and how many make a batch."""

    # Folders of images (searched with their subfolders), folders that `prepare index` wrote, tfds:NAME[:SPLIT], or
    # synthetic:COUNT:SIDE; an image of any of them is drawn as often as any other.
    sources: tuple[str, ...] = ()
    # A crop has one of the aspect ratios and, up to rounding to multiples of 64, as many pixels as the square of a
    # resolution: a bucket. An image enters, per resolution, the bucket it fits best; see data/buckets.py.
    resolutions: tuple[int, ...] = (512,)  # pixels; multiples of 64
    resolution_weights: tuple[float, ...] = ()  # shares of the images, in any unit; () = equal
    aspect_ratios: tuple[float, ...] = (1.0,)  # width / height
    batch_size: int = 128  # images, over all devices
    # Latent pixels of a batch, in place of batch_size: crops of fewer pixels come in larger batches; 0 = batch_size.
    batch_tokens: int = 0
    zoom: tuple[float, float] = (0.5, 1.0)  # each crop is a region of the crop's sides / zoom, shrunk to it
    rotate: bool = False  # by multiples of 90 degrees (180 unless square); horizontal flips are always on
    threads: int = 4  # that read and degrade, in each process; 0 = the training loop itself does it
    workers: int = 0  # processes that do so in its place, where Python's lock holds threads back
    cache_gib: float = 0.0  # memory of each process for decoded images, so that each is decoded once
    latents: str = ""  # dit: folder that `prepare latents` wrote, in place of images and their encoding
    text: str = ""  # dit: folder of text embeddings, see data/text.py
    text_tokens: int = 128  # of an embedding; what is longer is cut
    text_dropout: float = (
        0.05  # probability that the empty text takes the place of a caption (paper section 3.2)
    )
    # dit with text: probability that a crop is degraded twice: once into what is to be restored, whose caption is then
    # NEGATIVE_PROMPT, and once more into its degraded partner (paper section 3.2, which gives no share).
    low_quality_probability: float = 0.0

    def __post_init__(self):
        if not self.resolutions or not self.aspect_ratios:
            raise ValueError("resolutions or aspect_ratios is empty; a crop needs one of each.")
        for resolution in self.resolutions:
            if resolution < 64 or resolution % 64:
                raise ValueError(f"resolution {resolution} is not a multiple of 64.")
        if len(self.resolution_weights) not in (0, len(self.resolutions)):
            raise ValueError(
                f"{len(self.resolution_weights)} resolution_weights for {len(self.resolutions)} resolutions."
            )
        for weight in self.resolution_weights:
            _check_positive("resolution weight", weight)
        for ratio in self.aspect_ratios:
            _check_range("aspect ratio", (ratio, ratio), 0.25, 4)
        _check_at_least("batch_size", self.batch_size, 1)
        _check_at_least("batch_tokens", self.batch_tokens, 0)
        _check_range("zoom", self.zoom, 0.01, 1)
        _check_at_least("threads", self.threads, 0)
        _check_at_least("workers", self.workers, 0)
        _check_at_least("cache_gib", self.cache_gib, 0)
        _check_at_least("text_tokens", self.text_tokens, 1)
        _check_probability("text_dropout", self.text_dropout)
        _check_probability("low_quality_probability", self.low_quality_probability)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh (see parallel.py); 0 = all that the others leave, for one of data and fsdp.

    The batch is divided over data x fsdp, the DiT's parameters and optimizer state over fsdp and tensor, the height of
    the images that the LP-VAE reads over tensor.
    """

    data: int = 0
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        _check_at_least("data", self.data, 0)
        _check_at_least("fsdp", self.fsdp, 0)
        _check_at_least("tensor", self.tensor, 1)
        if self.data == self.fsdp == 0:
            raise ValueError("data and fsdp are both 0; only one of them can be all devices that are left.")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay (paper supplement A), or Muon with the same schedule."""

    # adamw, as the paper, or muon (Jordan et al. 2024): kernels move by orthogonalised momentum, scaled as large as
    # AdamW's updates are (Liu et al. 2025), all else by NAdam. Learns several times as much from few images, see
    # docs/decisions.md.
    algorithm: str = "adamw"
    learning_rate: float = 5e-5
    final_learning_rate: float = 5e-6
    warmup_steps: int = 1000
    weight_decay: float = 0.05  # of kernels; biases and norm scales are exempt
    beta1: float = 0.9
    beta2: float = 0.95
    momentum: float = 0.95  # of muon's kernels
    clip_norm: float = 1.0  # global norm of the gradient

    def __post_init__(self):
        _check_one_of("algorithm", self.algorithm, ("adamw", "muon"))
        _check_positive("learning_rate", self.learning_rate)
        _check_at_least("final_learning_rate", self.final_learning_rate, 0)
        _check_at_least("warmup_steps", self.warmup_steps, 0)
        _check_at_least("weight_decay", self.weight_decay, 0)
        _check_decay("beta1", self.beta1)
        _check_decay("beta2", self.beta2)
        _check_decay("momentum", self.momentum)
        _check_positive("clip_norm", self.clip_norm)


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights of the image losses of the LP-VAE and pixel-aware decoder stages (paper section 3.1)."""

    l1: float = 1.0  # mean absolute error on [-1, 1]
    lpips: float = 1.0
    lpips_net: str = "auto"  # alexnet | vgg16 | auto: alexnet on CPU, vgg16 elsewhere
    lpips_crop: int = 0  # pixels, side of the random window of each image that LPIPS sees; 0 = whole image
    kl: float = 1e-6  # sum over latent values / number of image values
    adversarial: float = 0.5  # times the adaptive weight of Esser et al. 2021, eq. 7
    adversarial_start: int = 0  # step
    discriminator_learning_rate: float = 5e-5

    def __post_init__(self):
        for name in ("l1", "lpips", "kl", "adversarial"):
            _check_at_least(f"loss weight {name}", getattr(self, name), 0)
        _check_one_of("lpips_net", self.lpips_net, ("alexnet", "vgg16", "auto"))
        _check_at_least("lpips_crop", self.lpips_crop, 0)
        _check_at_least("adversarial_start", self.adversarial_start, 0)
        _check_positive("discriminator_learning_rate", self.discriminator_learning_rate)


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """Weights within the DiT's loss, all beyond the paper; equations and sources: diffusion/objective.py."""

    min_snr_gamma: float = 0.0  # timesteps are weighted by min(SNR, gamma); Hang et al. take 5; 0 = all alike
    macro: float = 0.0  # of an extra loss on the macro band, the latent's first 3 channels
    coarse: float = 0.0  # of an extra loss on macro and coarse band, the first 12

    def __post_init__(self):
        for field in dataclasses.fields(self):
            _check_at_least(f"objective.{field.name}", getattr(self, field.name), 0)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One stage of training, from data to weights."""

    stage: str = "coarse"  # coarse | fine | dit | pixel_decoder
    model: ModelConfig = ModelConfig()
    output: str = ""  # run folder: checkpoints, samples, weights
    # Weights of the stages before, required by all but coarse; this stage's own, where they are among them, go on.
    init_from: str = ""
    data: DataConfig = DataConfig()
    degradation: DegradationConfig = DegradationConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: LossConfig = LossConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    mesh: MeshConfig = MeshConfig()
    steps: int = 50_000
    accumulate: int = (
        1  # micro-batches whose gradients are averaged into a step's; each divides over the mesh
    )
    seed: int = 0
    ema_decay: float = 0.9999
    skip_limit: int = (
        20  # steps in a row that are skipped for a gradient that is not finite, before training stops
    )
    checkpoint_minutes: float = 10.0
    keep_last: int = 2  # checkpoints
    keep_every: int = 0  # steps between checkpoints that are kept for good; 0 = none
    sample_every: int = 1000  # steps between sample grids; 0 = none
    profile: tuple[int, int] = (0, 0)  # steps [first, end) that the profiler records, see `output`/profile
    statistics_images: int = 512  # from which the macro and latent statistics are measured
    noise_draws: int = 1  # dit: timesteps and noises per encoded image; more make one encoding go further
    # pixel_decoder: the latent that it learns to decode is the DiT's prediction of the clean image's, at a noise level
    # (timestep / train_timesteps) drawn uniformly from this range; at 0, the paper's, the clean image's latent itself.
    decoder_noise: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self):
        _check_at_least("steps", self.steps, 1)
        check_seed(self.seed, LARGEST_SEED - 2)  # the data draws from seed + 1 and seed + 2 as well
        _check_decay("ema_decay", self.ema_decay)
        _check_at_least("accumulate", self.accumulate, 1)
        _check_at_least("skip_limit", self.skip_limit, 1)
        _check_at_least("checkpoint_minutes", self.checkpoint_minutes, 0)
        _check_at_least("keep_last", self.keep_last, 1)
        _check_at_least("keep_every", self.keep_every, 0)
        _check_range("profile", self.profile, 0)
        _check_at_least("sample_every", self.sample_every, 0)
        _check_at_least("statistics_images", self.statistics_images, 1)
        _check_at_least("noise_draws", self.noise_draws, 1)
        _check_range("decoder_noise", self.decoder_noise, 0, 1)
        if self.objective.min_snr_gamma and self.model.diffusion.zero_terminal_snr:
            raise ValueError(
                "objective.min_snr_gamma gives no weight to the last level of zero_terminal_snr."
            )


# --------------------------------------------------------------------------------------------------
# Restoring
# --------------------------------------------------------------------------------------------------


SAMPLERS = ("ddim", "dpm-solver++", "unipc")
SPACINGS = ("trailing", "linspace", "leading")
COLOUR_CORRECTIONS = ("none", "lab", "wavelet", "adain")


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How a latent is sampled; the defaults are the paper's (section 4, supplement G).

    A noise level is (timestep + 1) / train_timesteps: 0 would be a clean latent, 1 is the noisiest.
    """

    sampler: str = "ddim"  # ddim, dpm-solver++ or unipc, see diffusion/samplers.py
    steps: int = 25  # evaluations of the DiT
    spacing: str = "trailing"  # of the timesteps: trailing, linspace or leading, see diffusion/schedule.py
    eta: float = 0.0  # of ddim: 0 = deterministic, 1 = DDPM's variance
    # Noise level to start from; below 1, at the LQ latent with that much noise (others call it strength).
    start: float = 1.0
    # Tokens, those of a picture's margins included, at which the timesteps are as spaced; with more (fewer), they move
    # to more (less) noise; 0 = off.
    shift_tokens: int = 0
    # Classifier-free guidance; acts only where there is a negative branch: a negative text, or weak_lq.
    guidance: float = 3.5
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # noise levels at which it acts
    guidance_rescale: float = 0.0  # share of the guided prediction whose contrast is that of the unguided one
    # The LQ latent's strength in the negative branch, for weights trained with weak ones; not given: it is all there.
    weak_lq: float | None = None
    # How far the low frequencies (macro and coarse band) are pulled to the degraded image's at each step; 0 = off.
    fidelity: float = 0.0

    def __post_init__(self):
        _check_one_of("sampler", self.sampler, SAMPLERS)
        _check_at_least("steps", self.steps, 1)
        _check_one_of("spacing", self.spacing, SPACINGS)
        _check_probability("eta", self.eta)
        if self.eta and self.sampler != "ddim":
            raise ValueError(f"eta {self.eta:g} is of ddim alone: {self.sampler} adds no noise.")
        _check_probability("start", self.start)
        _check_positive("start", self.start)
        _check_at_least("shift_tokens", self.shift_tokens, 0)
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance {self.guidance} is not a finite number.")
        _check_range("guidance_interval", self.guidance_interval, 0, 1)
        _check_probability("guidance_rescale", self.guidance_rescale)
        if self.weak_lq is not None:
            _check_probability("weak_lq", self.weak_lq)
        _check_probability("fidelity", self.fidelity)


@dataclasses.dataclass(frozen=True)
class RestorationConfig:
    """How a photograph is restored."""

    sampling: SamplingConfig = SamplingConfig()
    # Brings the colours back to the photograph's: none, lab, wavelet or adain, see colour.py.
    colour_correction: str = "none"

    def __post_init__(self):
        _check_one_of("colour_correction", self.colour_correction, COLOUR_CORRECTIONS)


PRESETS: dict[str, RestorationConfig] = {
    "fast": RestorationConfig(SamplingConfig(steps=4)),
    "paper": RestorationConfig(),
    # What the photograph does show stays as it is: its low frequencies in every step, its colours in the result.
    "faithful": RestorationConfig(SamplingConfig(steps=8, fidelity=1.0), "wavelet"),
}


@dataclasses.dataclass(frozen=True)
class TargetConfig:
    """Size of the result; one of these at most. With none of them it is 4 times as high and wide as the photograph."""

    scale: float | None = None  # output side / input side, any positive number
    size: str | None = None  # pixels, WIDTHxHEIGHT
    short_side: int | None = None  # pixels; the other side follows
    long_side: int | None = None  # pixels; the other side follows
    megapixels: float | None = None  # million pixels in all; both sides follow

    def __post_init__(self):
        given = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} both say how large the result is; give one of them.")
        for name, value in given.items():
            if name != "size":
                _check_positive(name, value)
