"""Makes sd_vae.npz: a tiny AutoencoderKL of diffusers and what it makes of an image, for tests/models/test_sd_vae.py.

How to run it: `pip install -e .[parity]`, then `python tests/parity/make_sd_vae.py`. It takes seconds on a CPU.
The stored file was made with torch 2.13.0+cpu, diffusers 0.42.1 and numpy 2.4.6 (also written in the file).

It holds "config" (the hub's config.json, as text), "weights/NAME" for each tensor of the model's state dict, image
[2, 3, 40, 24], mean and log_variance [2, 3, 10, 6] of its latent, latent (random, of that shape) and decoded, the image
of it: what the decoder makes of latent / scaling_factor. And "six_scales", as text: {"config": of an AutoencoderKL with
six scales, "tensors": {name: shape}}.
"""

import json
import pathlib

import diffusers
import numpy as np
import torch


def main() -> None:
    model = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 8, 8),
        layers_per_block=1,
        latent_channels=3,
        norm_num_groups=2,
        scaling_factor=0.37,
    ).eval()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():  # of such a size that every layer acts
            if tensor.ndim > 1:
                values = rng.standard_normal(tensor.shape) / np.sqrt(np.prod(tensor.shape[1:]))
            elif "norm" in name and name.endswith("weight"):
                values = rng.uniform(0.5, 1.5, tensor.shape)
            else:
                values = 0.1 * rng.standard_normal(tensor.shape)
            tensor.copy_(torch.from_numpy(values.astype(np.float32)))
        image = rng.uniform(-1, 1, (2, 3, 40, 24)).astype(np.float32)
        posterior = model.encode(torch.from_numpy(image)).latent_dist
        latent = rng.standard_normal(posterior.mean.shape).astype(np.float32)
        decoded = model.decode(torch.from_numpy(latent) / model.config.scaling_factor).sample
    with torch.device("meta"):
        six_scales = diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 6,
            up_block_types=("UpDecoderBlock2D",) * 6,
            block_out_channels=(4, 8, 16, 16, 16, 16),
            layers_per_block=1,
            latent_channels=6,
            norm_num_groups=4,
        )
    arrays = {
        "versions": np.array([f"{m.__name__} {m.__version__}" for m in (torch, diffusers, np)]),
        "config": np.array(json.dumps(dict(model.config) | {"_class_name": "AutoencoderKL"})),
        "six_scales": np.array(
            json.dumps(
                {
                    "config": dict(six_scales.config) | {"_class_name": "AutoencoderKL"},
                    "tensors": {name: tensor.shape for name, tensor in six_scales.state_dict().items()},
                }
            )
        ),
        "image": image,
        "mean": posterior.mean.numpy(),
        "log_variance": posterior.logvar.numpy(),
        "latent": latent,
        "decoded": decoded.numpy(),
    }
    arrays |= {f"weights/{name}": tensor.numpy() for name, tensor in model.state_dict().items()}
    np.savez_compressed(pathlib.Path(__file__).with_name("sd_vae.npz"), **arrays)


if __name__ == "__main__":
    main()
