"""LP-VAE of the paper, stage 2 of 3: E_f and D_f on 512 px crops, E_c frozen (paper section 4: batch 160, 100K steps).

python -m zipir_jax.train --config configs/lpvae_fine_512.py --data.sources DIR --resume auto

Learning rates are those that the paper's supplement gives for training as a whole. Never run at this scale.
"""

from zipir_jax.config import MODELS, DataConfig, LossConfig, TrainConfig


def config() -> TrainConfig:
    return TrainConfig(
        stage="fine",
        model=MODELS["paper"],
        output="runs/paper/lpvae_fine_512",
        init_from="runs/paper/lpvae_coarse/weights",
        data=DataConfig(resolutions=(512,), batch_size=160, workers=16),
        loss=LossConfig(lpips_net="vgg16"),
        steps=100_000,
        keep_every=10_000,
    )
