"""Weights on disk: a folder with `config.json` (the ModelConfig) and `model.safetensors`, or `params`, by Orbax.

Orbax keeps large weights in many files, which many hosts read and write at once. In `model.safetensors` a tensor's name
is its path in the nested dict, joined by dots: `fine_encoder.blocks.0.conv1.kernel`. The first part is the group that
one stage of training makes: statistics, coarse_encoder, coarse_decoder, fine_encoder, fine_decoder, dit, pixel_decoder.
A folder `text` beside them has the embeddings of prompts that a DiT with text restores with (data/text.py).
"""

import dataclasses
import hashlib
import json
from pathlib import Path

import dacite
import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401 -- with it numpy, and so safetensors, knows bfloat16
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from zipir_jax.config import ModelConfig
from zipir_jax.data.text import INDEX_FILE, TextEmbeddings
from zipir_jax.files import replacing
from zipir_jax.models.dit import DiT
from zipir_jax.models.layers import abstract_params, check_shapes
from zipir_jax.models.lp_vae import MACRO_CHANNELS, Decoder, Encoder
from zipir_jax.models.pixel_decoder import PixelDecoder

DEFAULT = Path(__file__).parent / "default"
FILES = {"safetensors": "model.safetensors", "orbax": "params"}  # format -> what holds the tensors
TEXT = "text"  # folder of the prompts' embeddings


def abstract_weights(config: ModelConfig) -> dict:
    """Nested dict of `jax.ShapeDtypeStruct`: every group that a model of this config can have."""
    latent, macro = config.dit.latent_channels, MACRO_CHANNELS
    shapes = {"macro_mean": macro, "macro_std": macro, "latent_mean": latent, "latent_std": latent}
    if config.diffusion.residual:
        shapes["residual_std"] = latent
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


def save_weights(folder: Path, config: ModelConfig, weights: dict, file_format: str = "safetensors") -> None:
    """Write a config and its weights as "safetensors" or "orbax"; dtypes are kept.

    A reader of safetensors finds the old files or the new, never half of one. Raises ValueError for another format,
    and for one where the folder holds the other.
    """
    folder = Path(folder)
    if file_format not in FILES:
        raise ValueError(f"file format {file_format!r} is not one of {', '.join(FILES)}")
    for other, name in FILES.items():
        if other != file_format and (folder / name).exists():
            raise ValueError(f"{folder} holds {name}: weights in the format {other}; choose another folder")
    if file_format == "orbax":
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save((folder / FILES["orbax"]).absolute(), weights, force=True)
    else:
        _save_safetensors(folder, weights)
    with replacing(folder / "config.json") as file:
        file.write((json.dumps(dataclasses.asdict(config), indent=2) + "\n").encode())


def _save_safetensors(folder, weights):
    tensors = {".".join(path): np.asarray(leaf) for path, leaf in flatten_dict(weights).items()}
    with replacing(folder / "model.safetensors") as file:
        file.write(save(tensors))  # `save_file` would let nobody but the owner read it


def weights_folder(weights: Path | str) -> Path:
    """The folder of weights that are named by it, or as the "default" ones, which come with the package."""
    return DEFAULT if weights == "default" else Path(weights)


def weights_digest(weights: Path | str) -> str:
    """sha256, in hexadecimal, of the file that holds the tensors; of Orbax's many, of their names and contents."""
    folder = weights_folder(weights)
    path = folder / FILES["safetensors"]
    if path.exists():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for path in sorted((folder / FILES["orbax"]).rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                contents = hashlib.file_digest(file, "sha256").digest()
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + contents)
    return digest.hexdigest()


def load_config(weights: Path | str) -> ModelConfig:
    """The config of a folder of weights, or of the "default" ones. Raises ValueError if it cannot be read."""
    folder = weights_folder(weights)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no weights here (config.json is missing)")
    try:
        fields = json.loads((folder / "config.json").read_text())
        return dacite.from_dict(ModelConfig, fields, dacite.Config(cast=[tuple], strict=True))
    except (ValueError, TypeError, AttributeError, dacite.DaciteError, OSError) as error:
        raise ValueError(f"{folder}: the weights cannot be read ({error})") from None


def load_text(weights: Path | str, config: ModelConfig) -> TextEmbeddings | None:
    """The prompts' embeddings that weights of this config come with, if any, for a model with text.

    Raises ValueError as `TextEmbeddings` and `check_text`.
    """
    folder = weights_folder(weights) / TEXT
    if not config.dit.text_width or not (folder / INDEX_FILE).is_file():
        return None
    text = TextEmbeddings(folder)
    check_text(text, config)
    return text


def check_text(text: TextEmbeddings, config: ModelConfig) -> None:
    """Raises ValueError where the embeddings are not what the model takes."""
    takes = config.dit.text_width or "no text"
    if text.width != takes:
        raise ValueError(f"{text.folder}: the embeddings have {text.width} channels, the model takes {takes}")


def load_weights(
    folder: Path | str, needed: tuple[str, ...], wanted: tuple[str, ...] | None = None
) -> tuple[ModelConfig, dict]:
    """The config and the groups that are there, float32 numpy arrays; of them only `wanted`, if given.

    "default" means the weights that come with the package. Raises ValueError, naming the folder and the tensor, if a
    file or a needed group is missing or a shape is not the config's.
    """
    folder = weights_folder(folder)
    config = check_weights(folder, needed, wanted)
    loaded = _read(folder, _load_safetensors, _load_orbax, wanted)
    return config, jax.tree.map(lambda tensor: np.asarray(tensor, np.float32), loaded)


def check_weights(
    folder: Path | str, needed: tuple[str, ...], wanted: tuple[str, ...] | None = None
) -> ModelConfig:
    """The config of weights. Raises ValueError as `load_weights`; reads no tensor, but its shape alone."""
    folder = weights_folder(folder)
    config = load_config(folder)
    if not any((folder / name).exists() for name in FILES.values()):
        raise ValueError(f"{folder}: no weights here ({' or '.join(FILES.values())} is missing)")
    there, expected = _read(folder, _safetensors_shapes, _orbax_shapes, wanted), abstract_weights(config)
    check_groups(folder, there, needed)
    for group, tree in there.items():
        if group not in expected:
            raise ValueError(f"{folder}: unknown group {group}; a model has {', '.join(expected)}")
        shapes = expected[group]
        if group == "statistics":  # those of the whole latent are there from the fine stage on
            shapes = {
                name: s for name, s in shapes.items() if "latent_mean" in tree or name.startswith("macro_")
            }
        check_shapes(f"{folder}: {group}", tree, shapes)
    return config


def _read(folder, safetensors, orbax, wanted):
    try:
        return (safetensors if (folder / FILES["safetensors"]).exists() else orbax)(folder, wanted)
    except (ValueError, TypeError, AttributeError, SafetensorError, OSError) as error:
        raise ValueError(f"{folder}: the weights cannot be read ({error})") from None


def check_groups(folder: Path, weights: dict, needed: tuple[str, ...]) -> None:
    """Raises ValueError naming the first needed group that weights, of a folder, do not have."""
    for group in needed:
        if group not in weights:
            raise ValueError(f"{folder}: the weights have no {group}; they hold {', '.join(sorted(weights))}")


def _load_safetensors(folder, wanted):
    return _from_safetensors(folder, wanted, lambda file, name: file.get_tensor(name))


def _safetensors_shapes(folder, wanted):
    def shape(file, name):
        return jax.ShapeDtypeStruct(file.get_slice(name).get_shape(), jnp.float32)

    return _from_safetensors(folder, wanted, shape)


def _from_safetensors(folder, wanted, get):
    with safe_open(folder / FILES["safetensors"], framework="numpy") as file:
        paths = {name: tuple(name.split(".")) for name in file.keys()}  # noqa: SIM118 -- no dict
        return unflatten_dict(
            {path: get(file, name) for name, path in paths.items() if wanted is None or path[0] in wanted}
        )


def _orbax_shapes(folder, wanted):
    with ocp.PyTreeCheckpointer() as checkpointer:
        groups = checkpointer.metadata((folder / FILES["orbax"]).absolute()).item_metadata.tree
    return {name: group for name, group in groups.items() if wanted is None or name in wanted}


def _load_orbax(folder, wanted):
    path = (folder / FILES["orbax"]).absolute()
    with ocp.PyTreeCheckpointer() as checkpointer:
        # As numpy arrays: the devices that wrote them may not be here.
        tree = checkpointer.metadata(path).item_metadata.tree
        arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        groups = checkpointer.restore(path, restore_args=arguments)
    return {name: group for name, group in groups.items() if wanted is None or name in wanted}
