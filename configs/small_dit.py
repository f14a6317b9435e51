"""Small model, stage 3 of 4: the DiT, on the frozen LP-VAE's latents.

python -m zipir_jax.train --config configs/small_dit.py --data.sources PHOTOS

Two CPU cores: 900 steps in 16 minutes, to a loss of 0.33.
"""

from zipir_jax.config import MODELS, DataConfig, DegradationConfig, OptimizerConfig, TrainConfig


def config() -> TrainConfig:
    return TrainConfig(
        stage="dit",
        model=MODELS["small"],
        output="runs/small/dit",
        init_from="runs/small/fine/weights",
        data=DataConfig(
            resolutions=(512,), batch_size=4, zoom=(0.4, 1.0), rotate=True, threads=2, cache_gib=2.0
        ),
        degradation=DegradationConfig(task_probability=0.7, tasks=("sr8", "sr16", "mixture", "mixture")),
        optimizer=OptimizerConfig(
            learning_rate=1e-3, final_learning_rate=5e-5, warmup_steps=100, weight_decay=0.01, beta2=0.99
        ),
        noise_draws=2,
        steps=900,
        ema_decay=0.998,
        checkpoint_minutes=3.0,
        sample_every=300,
    )
