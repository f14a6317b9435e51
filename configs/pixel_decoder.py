"""The paper's pixel-aware decoder, on the latents of clean images (paper section 3.1).

python -m zipir_jax.train --config configs/pixel_decoder.py --data.sources DIR --resume auto

The paper gives neither batch nor steps: they are those of the LP-VAE's 1024 px adaptation. Never run at this scale.
"""

from zipir_jax.config import MODELS, DataConfig, LossConfig, TrainConfig


def config() -> TrainConfig:
    return TrainConfig(
        stage="pixel_decoder",
        model=MODELS["paper"],
        output="runs/paper/pixel_decoder",
        init_from="runs/paper/dit_3b/weights",  # the LP-VAE's would do as well: the DiT is only handed on
        data=DataConfig(resolutions=(1024,), batch_size=32, workers=16),
        loss=LossConfig(lpips_net="vgg16"),
        steps=50_000,
        keep_every=10_000,
    )
