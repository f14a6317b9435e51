"""The paper's smaller DiT of 0.68 billion parameters, without text; batch and steps as the larger one's.

python -m zipir_jax.train --config configs/dit_0p68b.py --data.sources DIR --resume auto

Crops of 512 to 4096 pixels from 1:4 to 4:1; the paper does not list its buckets. Fewer than 128 devices need
--accumulate, so that one crop of 4096 pixels a device fits. For NVIDIA GPUs: XLA's own attention would need 64 GiB for
such a crop. Never run at this scale.
"""

import dataclasses

from zipir_jax.config import MODELS, DataConfig, MeshConfig, TrainConfig


def config() -> TrainConfig:
    model = MODELS["dit_0p68b"]
    return TrainConfig(
        stage="dit",
        model=dataclasses.replace(
            model, dit=dataclasses.replace(model.dit, attention="cudnn", remat="attention")
        ),
        output="runs/paper/dit_0p68b",
        init_from="runs/paper/lpvae_fine_1k/weights",
        data=DataConfig(
            resolutions=(512, 1024, 2048, 4096),
            aspect_ratios=(1 / 4, 1 / 2, 2 / 3, 3 / 4, 1.0, 4 / 3, 3 / 2, 2.0, 4.0),
            batch_size=128,
            workers=16,
        ),
        mesh=MeshConfig(data=1, fsdp=0),
        steps=250_000,
        keep_every=10_000,
    )
