"""The paper's DiT of 3.1 billion parameters, with text (paper section 4, supplement A: batch 128, 250K steps).

python -m zipir_jax.prepare embed --encoder T5 --sources DIR --output EMBEDDINGS
python -m zipir_jax.train --config configs/dit_3b.py --data.sources DIR --data.text EMBEDDINGS --resume auto

Crops of 512 to 4096 pixels from 1:4 to 4:1; the paper does not list its buckets. Parameters and optimizer state are
divided over all devices, of which there may be up to 128; fewer need --accumulate: 8 GPUs 16, so that one crop of 4096
pixels a device fits. For NVIDIA GPUs; TPUs take --model.dit.attention splash. What a device holds at 1024, 2048 and
4096 pixels is in docs/results/compile.md; v5e has too little for the last. T5 is a folder that `prepare import-t5`
wrote of google/t5-v1_1-xxl. One crop in twenty is a low-quality image with the negative prompt as its caption; the
paper has such images and does not say how many. Never run at this scale.
"""

import dataclasses

from zipir_jax.config import MODELS, DataConfig, MeshConfig, TrainConfig


def config() -> TrainConfig:
    model = MODELS["paper"]
    return TrainConfig(
        stage="dit",
        model=dataclasses.replace(
            model, dit=dataclasses.replace(model.dit, attention="cudnn", remat="attention")
        ),
        output="runs/paper/dit_3b",
        init_from="runs/paper/lpvae_fine_1k/weights",
        data=DataConfig(
            resolutions=(512, 1024, 2048, 4096),
            aspect_ratios=(1 / 4, 1 / 2, 2 / 3, 3 / 4, 1.0, 4 / 3, 3 / 2, 2.0, 4.0),
            batch_size=128,
            workers=16,
            low_quality_probability=0.05,
        ),
        mesh=MeshConfig(data=1, fsdp=0),
        steps=250_000,
        keep_every=10_000,
    )
