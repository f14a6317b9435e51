"""LP-VAE of the paper, stage 1 of 3: E_c and D_c (paper section 4: batch 512, 50K steps).

python -m zipir_jax.train --config configs/lpvae_coarse.py --data.sources DIR --resume auto

Learning rates are those that the paper's supplement gives for training as a whole. Never run at this scale.
"""

from zipir_jax.config import MODELS, DataConfig, LossConfig, TrainConfig


def config() -> TrainConfig:
    return TrainConfig(
        stage="coarse",
        model=MODELS["paper"],
        output="runs/paper/lpvae_coarse",
        data=DataConfig(resolutions=(512,), batch_size=512, workers=16),
        loss=LossConfig(lpips_net="vgg16"),
        steps=50_000,
        keep_every=10_000,
    )
