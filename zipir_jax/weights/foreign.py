"""Weights of other projects, brought into a folder of ours, and read from there."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import dacite
import jax
import ml_dtypes  # noqa: F401 -- with it numpy, and so safetensors, knows bfloat16
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open

from zipir_jax.models.layers import abstract_params

FILE = "model.safetensors"


def load_imported(folder: Path, kind: str, config_class, module_class, shardings: Callable) -> tuple:
    """(name of what was imported, config, parameters) of a folder that `save_imported` wrote.

    kind: "t5" or "sd_vae". shardings: from the config to a tree of them, one for each parameter, of which every device
    reads its part. Raises ValueError, with the folder in it, for files that are missing or of another kind, or tensors
    that are not the config's.
    """
    for file in (folder / "config.json", folder / FILE):
        if not file.is_file():
            raise ValueError(f"{folder}: no weights here ({file.name} is missing)")
    try:
        saved = json.loads((folder / "config.json").read_text())
        if not isinstance(saved, dict) or kind not in saved:
            command = f"prepare import-{kind.replace('_', '-')}"
            raise ValueError(f"config.json has no {kind}: `{command}` writes such a folder")
        config = dacite.from_dict(config_class, saved[kind], dacite.Config(cast=[tuple], strict=True))
        expected = flatten_dict(abstract_params(module_class, config), sep=".")
        of_devices = flatten_dict(shardings(config), sep=".")
        params = {}
        with safe_open(folder / FILE, framework="numpy") as file:
            names = set(file.keys())
            for name in sorted(names ^ expected.keys()):
                raise ValueError(f"{FILE} {'lacks' if name in expected else 'has an unknown'} tensor {name}")
            for name, abstract in expected.items():
                part = file.get_slice(name)
                if tuple(part.get_shape()) != abstract.shape:
                    raise ValueError(f"{name} has shape {tuple(part.get_shape())}, not {abstract.shape}")
                params[name] = jax.make_array_from_callback(
                    abstract.shape, of_devices[name], lambda index, part=part: part[index]
                )
    except (ValueError, TypeError, AttributeError, dacite.DaciteError, SafetensorError, OSError) as error:
        raise ValueError(f"{folder}: the weights cannot be read ({error})") from None
    return saved["name"], config, unflatten_dict(params, sep=".")
