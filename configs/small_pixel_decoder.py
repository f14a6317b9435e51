"""Small model, stage 4 of 4: the pixel-aware decoder, on latents that the DiT predicts.

python -m zipir_jax.train --config configs/small_pixel_decoder.py --data.sources PHOTOS

Two CPU cores: 4200 steps in 62 minutes, to an L1 of 0.14 on [-1, 1] and an LPIPS of 0.50.
"""

from zipir_jax.config import MODELS, DataConfig, DegradationConfig, LossConfig, OptimizerConfig, TrainConfig


def config() -> TrainConfig:
    return TrainConfig(
        stage="pixel_decoder",
        model=MODELS["small"],
        output="runs/small/pixel_decoder",
        init_from="runs/small/dit/weights",
        data=DataConfig(
            resolutions=(256,), batch_size=4, zoom=(0.5, 1.0), rotate=True, threads=2, cache_gib=2.0
        ),
        # The mixture is the hardest to learn: noise of sigma 40, and each of its pixels becomes 8 x 8.
        degradation=DegradationConfig(task_probability=0.7, tasks=("sr8", "sr16", "mixture", "mixture")),
        optimizer=OptimizerConfig(
            learning_rate=1e-3, final_learning_rate=5e-5, warmup_steps=100, weight_decay=0.01, beta2=0.99
        ),
        loss=LossConfig(lpips=0.5, lpips_net="vgg16", lpips_crop=96, adversarial=0.0),
        decoder_noise=(0.6, 1.0),
        steps=4200,
        ema_decay=0.998,
        checkpoint_minutes=3.0,
        sample_every=500,
    )
