"""dit_0p68b in minutes on two CPU cores: GELU, biases and no text, as DiT-XL has them, on 256 px crops.

python -m zipir_jax.train --config configs/dit_0p68b_tiny.py --data.sources DIR
"""

import dataclasses

from zipir_jax.config import MODELS, DataConfig, OptimizerConfig, TrainConfig


def config() -> TrainConfig:
    tiny = MODELS["tiny"]
    return TrainConfig(
        stage="dit",
        model=dataclasses.replace(tiny, dit=dataclasses.replace(tiny.dit, swiglu=False, bias=True)),
        output="runs/tiny/dit_0p68b",
        init_from="runs/tiny/lpvae_fine_1k/weights",
        data=DataConfig(resolutions=(256,), batch_size=8, zoom=(0.4, 1.0), threads=2, cache_gib=2.0),
        optimizer=OptimizerConfig(
            learning_rate=1e-3, final_learning_rate=1e-4, warmup_steps=20, weight_decay=0.01
        ),
        noise_draws=4,
        steps=200,
        ema_decay=0.98,
        sample_every=200,
    )
