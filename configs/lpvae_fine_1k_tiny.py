"""lpvae_fine_1k in minutes on two CPU cores: lpvae_fine_512_tiny adapted from 128 px to 256 px crops.

python -m zipir_jax.train --config configs/lpvae_fine_1k_tiny.py --data.sources DIR
"""

from zipir_jax.config import MODELS, DataConfig, DiscriminatorConfig, LossConfig, OptimizerConfig, TrainConfig


def config() -> TrainConfig:
    return TrainConfig(
        stage="fine",
        model=MODELS["tiny"],
        output="runs/tiny/lpvae_fine_1k",
        init_from="runs/tiny/lpvae_fine_512/weights",
        data=DataConfig(resolutions=(256,), batch_size=4, zoom=(0.4, 1.0), threads=2, cache_gib=2.0),
        optimizer=OptimizerConfig(
            learning_rate=3e-4, final_learning_rate=3e-5, warmup_steps=10, weight_decay=0.01
        ),
        loss=LossConfig(lpips=0.3, lpips_net="alexnet", lpips_crop=48, adversarial=0.1),
        discriminator=DiscriminatorConfig(base_channels=16, layers=2, compute_dtype="float32"),
        steps=80,
        ema_decay=0.98,
        sample_every=80,
        statistics_images=64,
    )
