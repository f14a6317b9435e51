"""lpvae_coarse in minutes on two CPU cores: 256 px crops, a tiny network, the discriminator from step 100 on.

python -m zipir_jax.train --config configs/lpvae_coarse_tiny.py --data.sources DIR
"""

from zipir_jax.config import MODELS, DataConfig, DiscriminatorConfig, LossConfig, OptimizerConfig, TrainConfig


def config() -> TrainConfig:
    return TrainConfig(
        stage="coarse",
        model=MODELS["tiny"],
        output="runs/tiny/lpvae_coarse",
        data=DataConfig(resolutions=(256,), batch_size=8, zoom=(0.4, 1.0), threads=2, cache_gib=2.0),
        optimizer=OptimizerConfig(
            learning_rate=1e-3, final_learning_rate=1e-4, warmup_steps=20, weight_decay=0.01
        ),
        loss=LossConfig(
            lpips=0.3, lpips_net="alexnet", lpips_crop=48, adversarial=0.1, adversarial_start=100
        ),
        discriminator=DiscriminatorConfig(base_channels=16, layers=2, compute_dtype="float32"),
        steps=150,
        ema_decay=0.98,
        sample_every=75,
        statistics_images=64,
    )
