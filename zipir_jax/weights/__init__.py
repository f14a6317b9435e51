"""Weights on disk: a folder with `config.json` (the ModelConfig) and `model.safetensors`.

A tensor's name is its path in the nested dict, joined by dots: `fine_encoder.blocks.0.conv1.kernel`. The first part is
the group that one stage of training makes: statistics, coarse_encoder, coarse_decoder, fine_encoder, fine_decoder,
dit, pixel_decoder.
"""

import dataclasses
import json
from pathlib import Path

import dacite
import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401 -- with it numpy, and so safetensors, knows bfloat16
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from zipir_jax.config import ModelConfig
from zipir_jax.files import replacing
from zipir_jax.models.dit import DiT
from zipir_jax.models.layers import abstract_params, check_shapes
from zipir_jax.models.lp_vae import MACRO_CHANNELS, Decoder, Encoder
from zipir_jax.models.pixel_decoder import PixelDecoder

DEFAULT = Path(__file__).parent / "default"


def abstract_weights(config: ModelConfig) -> dict:
    """Nested dict of `jax.ShapeDtypeStruct`: every group that a model of this config can have."""
    latent, macro = config.dit.latent_channels, MACRO_CHANNELS
    shapes = {"macro_mean": macro, "macro_std": macro, "latent_mean": latent, "latent_std": latent}
    vae = config.lp_vae
    return {
        "statistics": {k: jax.ShapeDtypeStruct((n,), jnp.float32) for k, n in shapes.items()},
        "coarse_encoder": abstract_params(Encoder, vae.coarse),
        "coarse_decoder": abstract_params(Decoder, vae.coarse),
        "fine_encoder": abstract_params(Encoder, vae.fine),
        "fine_decoder": abstract_params(Decoder, vae.fine),
        "dit": abstract_params(DiT, config.dit),
        "pixel_decoder": abstract_params(PixelDecoder, vae),
    }


def save_weights(folder: Path, config: ModelConfig, weights: dict) -> None:
    """Write a config and its weights; dtypes are kept. A reader finds the old files or the new, never half of one."""
    folder = Path(folder)
    tensors = {".".join(path): np.asarray(leaf) for path, leaf in flatten_dict(weights).items()}
    with replacing(folder / "model.safetensors") as file:
        file.write(save(tensors))  # `save_file` would let nobody but the owner read it
    with replacing(folder / "config.json") as file:
        file.write((json.dumps(dataclasses.asdict(config), indent=2) + "\n").encode())


def load_weights(folder: Path | str, needed: tuple[str, ...]) -> tuple[ModelConfig, dict]:
    """The config and all groups, float32 numpy arrays. "default" means the weights that come with the package.

    Raises ValueError, naming the folder and the tensor, if a file or a needed group is missing or a shape is not the
    config's.
    """
    folder = DEFAULT if folder == "default" else Path(folder)
    for file in ("config.json", "model.safetensors"):
        if not (folder / file).is_file():
            raise ValueError(f"{folder}: no weights here ({file} is missing)")
    try:
        config = dacite.from_dict(
            ModelConfig,
            json.loads((folder / "config.json").read_text()),
            dacite.Config(cast=[tuple], strict=True),
        )
        tensors = load_file(folder / "model.safetensors")
    except (ValueError, TypeError, AttributeError, dacite.DaciteError, SafetensorError, OSError) as error:
        raise ValueError(f"{folder}: the weights cannot be read ({error})") from None
    loaded = unflatten_dict({tuple(name.split(".")): t.astype(np.float32) for name, t in tensors.items()})
    expected = abstract_weights(config)
    for group in needed:
        if group not in loaded:
            raise ValueError(f"{folder}: the weights have no {group}; they hold {', '.join(sorted(loaded))}")
    for group, tree in loaded.items():
        if group not in expected:
            raise ValueError(f"{folder}: unknown group {group}; a model has {', '.join(expected)}")
        wanted = expected[group]
        if group == "statistics":  # those of the whole latent are there from the fine stage on
            wanted = {name: s for name, s in wanted.items() if name in tree or not name.startswith("latent_")}
        check_shapes(f"{folder}: {group}", tree, wanted)
    return config, loaded
