"""Settings that no model or run could work with."""

import math

import pytest

from zipir_jax.config import (
    AutoencoderConfig,
    DataConfig,
    DiffusionConfig,
    DiscriminatorConfig,
    DiTConfig,
    LossConfig,
    LPVAEConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)


@pytest.mark.parametrize(
    ("section", "field", "wrong", "message"),
    [
        (DiTConfig, "layers", 0, "layers 0 is not at least 1"),
        (DiTConfig, "patch", 0, "patch 0 is not at least 1"),
        (DiffusionConfig, "train_timesteps", 0, "train_timesteps 0 is not at least 1"),
        (DiffusionConfig, "beta_end", 2.0, r"betas \(0.00085, 2.0\) is not a rising range within 0 to 1"),
        (
            ModelConfig,
            "dit",
            DiTConfig(latent_channels=16),
            "the DiT's latent has 16 channels, the LP-VAE's 64",
        ),
        (
            LPVAEConfig,
            "fine",
            AutoencoderConfig(20, 64, multipliers=(1, 2, 4, 4, 4, 4)),
            "the fine decoder reads 64 channels; its bands have 32",
        ),
        (DataConfig, "resolutions", (512, 500), "resolution 500 is not a multiple of 64"),
        (DataConfig, "resolutions", (), "resolutions or aspect_ratios is empty"),
        (DataConfig, "resolution_weights", (1.0, 2.0), "2 resolution_weights for 1 resolutions"),
        (DataConfig, "resolution_weights", (0.0,), "resolution weight 0.0 is not above 0"),
        (DataConfig, "aspect_ratios", (5.0,), r"aspect ratio \(5.0, 5.0\) is not .* within 0.25 to 4"),
        (DataConfig, "batch_tokens", -1, "batch_tokens -1 is not at least 0"),
        (DataConfig, "text_dropout", 1.5, "text_dropout 1.5 is not between 0 and 1"),
        (DataConfig, "low_quality_probability", -0.1, "low_quality_probability -0.1 is not between 0 and 1"),
        (DataConfig, "workers", -1, "workers -1 is not at least 0"),
        (MeshConfig, "tensor", 0, "tensor 0 is not at least 1"),
        (MeshConfig, "fsdp", 0, "data and fsdp are both 0"),
        (TrainConfig, "accumulate", 0, "accumulate 0 is not at least 1"),
        (TrainConfig, "skip_limit", 0, "skip_limit 0 is not at least 1"),
        (TrainConfig, "keep_last", 0, "keep_last 0 is not at least 1"),
        (TrainConfig, "profile", (5, 2), r"profile \(5, 2\) is not a rising range"),
        (DiTConfig, "remat", "some", "remat 'some' is not one of none, attention, full"),
        (DataConfig, "batch_size", 0, "batch_size 0 is not at least 1"),
        (DataConfig, "zoom", (0.0, 1.0), r"zoom \(0.0, 1.0\) is not a rising range within 0.01 to 1"),
        (DataConfig, "zoom", (0.5, 1.5), r"zoom \(0.5, 1.5\) is not a rising range"),
        (DataConfig, "zoom", (1.0, 0.5), r"zoom \(1.0, 0.5\) is not a rising range"),
        (DataConfig, "threads", -1, "threads -1 is not at least 0"),
        (DataConfig, "cache_gib", -0.5, "cache_gib -0.5 is not at least 0"),
        (OptimizerConfig, "learning_rate", 0.0, "learning_rate 0.0 is not above 0"),
        (OptimizerConfig, "learning_rate", math.nan, "learning_rate nan is not above 0"),
        (OptimizerConfig, "final_learning_rate", -1e-6, "final_learning_rate -1e-06 is not at least 0"),
        (OptimizerConfig, "warmup_steps", -1, "warmup_steps -1 is not at least 0"),
        (OptimizerConfig, "weight_decay", -0.1, "weight_decay -0.1 is not at least 0"),
        (OptimizerConfig, "beta1", 1.0, "beta1 1.0 is not at least 0 and below 1"),
        (OptimizerConfig, "beta2", -0.1, "beta2 -0.1 is not at least 0 and below 1"),
        (OptimizerConfig, "clip_norm", 0.0, "clip_norm 0.0 is not above 0"),
        (LossConfig, "l1", -1.0, "loss weight l1 -1.0 is not at least 0"),
        (LossConfig, "lpips", -1.0, "loss weight lpips -1.0 is not at least 0"),
        (LossConfig, "kl", math.nan, "loss weight kl nan is not at least 0"),
        (LossConfig, "adversarial", -0.5, "loss weight adversarial -0.5 is not at least 0"),
        (LossConfig, "lpips_net", "resnet", "lpips_net 'resnet' is not one of alexnet, vgg16, auto"),
        (LossConfig, "lpips_crop", -48, "lpips_crop -48 is not at least 0"),
        (LossConfig, "adversarial_start", -1, "adversarial_start -1 is not at least 0"),
        (LossConfig, "discriminator_learning_rate", 0.0, "discriminator_learning_rate 0.0 is not above 0"),
        (DiscriminatorConfig, "base_channels", 0, "base_channels 0 is not at least 1"),
        (DiscriminatorConfig, "layers", 0, "layers 0 is not at least 1"),
        (TrainConfig, "steps", 0, "steps 0 is not at least 1"),
        (TrainConfig, "seed", -1, "seed -1 does not lie within 0 to 4294967293"),
        (TrainConfig, "seed", 2**32 - 2, "seed 4294967294 does not lie within 0 to 4294967293"),
        (TrainConfig, "ema_decay", 1.0, "ema_decay 1.0 is not at least 0 and below 1"),
        (TrainConfig, "checkpoint_minutes", -1.0, "checkpoint_minutes -1.0 is not at least 0"),
        (TrainConfig, "sample_every", -1, "sample_every -1 is not at least 0"),
        (TrainConfig, "statistics_images", 0, "statistics_images 0 is not at least 1"),
        (TrainConfig, "noise_draws", 0, "noise_draws 0 is not at least 1"),
        (TrainConfig, "decoder_noise", (0.5, 1.5), r"decoder_noise \(0.5, 1.5\) is not a rising range"),
    ],
)
def test_a_setting_out_of_range_is_refused_with_its_name_and_value(section, field, wrong, message):
    with pytest.raises(ValueError, match=message):
        section(**{field: wrong})


def test_settings_at_the_ends_of_their_ranges_are_accepted():
    DataConfig(
        resolutions=(64,), aspect_ratios=(0.25, 4.0), batch_size=1, zoom=(1.0, 1.0), threads=0, cache_gib=0.0
    )
    OptimizerConfig(final_learning_rate=0.0, warmup_steps=0, weight_decay=0.0, beta1=0.0, beta2=0.0)
    LossConfig(l1=0.0, lpips=0.0, kl=0.0, adversarial=0.0, lpips_net="alexnet", lpips_crop=0)
    DiscriminatorConfig(base_channels=1, layers=1)
    TrainConfig(
        steps=1, seed=0, ema_decay=0.0, checkpoint_minutes=0.0, sample_every=0, decoder_noise=(1.0, 1.0)
    )
