"""dit_3b in minutes on two CPU cores: a tiny network without text, six buckets of 128 and 256 px from 1:2 to 2:1.

python -m zipir_jax.train --config configs/dit_3b_tiny.py --data.sources DIR
"""

from zipir_jax.config import MODELS, DataConfig, OptimizerConfig, TrainConfig


def config() -> TrainConfig:
    return TrainConfig(
        stage="dit",
        model=MODELS["tiny"],
        output="runs/tiny/dit_3b",
        init_from="runs/tiny/lpvae_fine_1k/weights",
        data=DataConfig(
            resolutions=(128, 256),
            aspect_ratios=(1 / 2, 1.0, 2.0),
            batch_tokens=8 * 64,
            zoom=(0.4, 1.0),
            threads=2,
            cache_gib=2.0,
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-3, final_learning_rate=1e-4, warmup_steps=20, weight_decay=0.01
        ),
        noise_draws=4,
        steps=300,
        ema_decay=0.98,
        sample_every=300,
    )
