"""LP-VAE of the paper, stage 3 of 3: E_f and D_f adapted to 1024 px crops (paper section 4: batch 32, 50K steps).

python -m zipir_jax.train --config configs/lpvae_fine_1k.py --data.sources DIR --resume auto

With --mesh.tensor 2 each image is divided by its height over two devices. Never run at this scale.
"""

from zipir_jax.config import MODELS, DataConfig, LossConfig, TrainConfig


def config() -> TrainConfig:
    return TrainConfig(
        stage="fine",
        model=MODELS["paper"],
        output="runs/paper/lpvae_fine_1k",
        init_from="runs/paper/lpvae_fine_512/weights",
        data=DataConfig(resolutions=(1024,), batch_size=32, workers=16),
        loss=LossConfig(lpips_net="vgg16"),
        steps=50_000,
        keep_every=10_000,
    )
