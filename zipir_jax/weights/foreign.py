"""Weights of other projects (T5, the SD-VAE): from safetensors in the hub's layout to a folder of ours, and from there.

A table says for each of our parameters which of their tensors it is made of. Everything is looked at before anything is
written, and then copied tensor by tensor: the weights need not fit into memory.

A folder of ours holds `config.json`, {"name": of what was imported, "t5" or "sd_vae": its config}, and
`model.safetensors`, where a tensor's name is its path, as in weights/__init__.py.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import dacite
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open

from zipir_jax.config import SDVAEConfig, T5Config
from zipir_jax.files import replacing
from zipir_jax.models.layers import abstract_params
from zipir_jax.models.sd_vae import SDVAE
from zipir_jax.models.t5 import EPSILON, T5Encoder

FILE = "model.safetensors"


class Source(NamedTuple):
    """Their tensor that one of our parameters is made of."""

    names: tuple[
        str, ...
    ]  # the first that is there counts; {} stands for the number of the layer in a stack of them
    axes: tuple[int, ...] = ()  # the order that our parameter has their axes in; () = theirs


# --------------------------------------------------------------------------------------------------
# What T5 and the SD-VAE are called elsewhere
# --------------------------------------------------------------------------------------------------

LINEAR, CONVOLUTION = (1, 0), (2, 3, 1, 0)  # from torch's [out, in] and [out, in, height, width]
SELF_ATTENTION = "encoder.block.{}.layer.0.SelfAttention"
FEED_FORWARD = "encoder.block.{}.layer.1.DenseReluDense"
T5_TABLE = {
    "token_embedding.embedding": Source(("shared.weight", "encoder.embed_tokens.weight")),
    "relative_bias.embedding": Source((f"{SELF_ATTENTION}.relative_attention_bias.weight".format(0),)),
    "blocks.attention_norm.scale": Source(("encoder.block.{}.layer.0.layer_norm.weight",)),
    "blocks.attention.query.kernel": Source((f"{SELF_ATTENTION}.q.weight",), LINEAR),
    "blocks.attention.key.kernel": Source((f"{SELF_ATTENTION}.k.weight",), LINEAR),
    "blocks.attention.value.kernel": Source((f"{SELF_ATTENTION}.v.weight",), LINEAR),
    "blocks.attention.out.kernel": Source((f"{SELF_ATTENTION}.o.weight",), LINEAR),
    "blocks.mlp_norm.scale": Source(("encoder.block.{}.layer.1.layer_norm.weight",)),
    "blocks.mlp.gate.kernel": Source((f"{FEED_FORWARD}.wi_0.weight",), LINEAR),
    "blocks.mlp.up.kernel": Source((f"{FEED_FORWARD}.wi_1.weight",), LINEAR),
    "blocks.mlp.down.kernel": Source((f"{FEED_FORWARD}.wo.weight",), LINEAR),
    "norm.scale": Source(("encoder.final_layer_norm.weight",)),
}


def sd_vae_table(config: SDVAEConfig) -> dict[str, Source]:
    """The table of diffusers' AutoencoderKL."""
    table = {}

    def add(ours, *theirs, axes=CONVOLUTION):
        kernel = "scale" if len(axes) == 0 else "kernel"
        table[f"{ours}.{kernel}"] = Source(tuple(f"{name}.weight" for name in theirs), axes)
        table[f"{ours}.bias"] = Source(tuple(f"{name}.bias" for name in theirs))

    def add_block(ours, theirs, has_skip):
        for i in (1, 2):
            add(f"{ours}.norm{i}", f"{theirs}.norm{i}", axes=())
            add(f"{ours}.conv{i}", f"{theirs}.conv{i}")
        if has_skip:
            add(f"{ours}.skip", f"{theirs}.conv_shortcut")

    scales = len(config.multipliers)
    for coder, direction, blocks, multipliers in (
        ("encoder", "down", config.blocks_per_scale, config.multipliers),
        ("decoder", "up", config.blocks_per_scale + 1, config.multipliers[::-1]),
    ):
        add(f"{coder}.stem", f"{coder}.conv_in")
        previous = multipliers[0]
        for scale, multiplier in enumerate(multipliers):
            theirs = f"{coder}.{direction}_blocks.{scale}"
            for i in range(blocks):
                block = f"{coder}.blocks.{scale * blocks + i}"
                add_block(block, f"{theirs}.resnets.{i}", has_skip=previous != multiplier)
                previous = multiplier
            if scale < scales - 1:
                add(f"{coder}.{direction}s.{scale}", f"{theirs}.{direction}samplers.0.conv")
        for i in (0, 1):
            add_block(f"{coder}.middle.block{i + 1}", f"{coder}.mid_block.resnets.{i}", has_skip=False)
        if config.attention:
            ours, theirs = f"{coder}.middle.attention", f"{coder}.mid_block.attentions.0"
            add(f"{ours}.norm", f"{theirs}.group_norm", axes=())
            # The second names are those of files that older versions of diffusers wrote.
            for name, new, old in (
                ("query", "to_q", "query"),
                ("key", "to_k", "key"),
                ("value", "to_v", "value"),
                ("out", "to_out.0", "proj_attn"),
            ):
                add(f"{ours}.{name}", f"{theirs}.{new}", f"{theirs}.{old}", axes=LINEAR)
        add(f"{coder}.norm", f"{coder}.conv_norm_out", axes=())
        add(f"{coder}.head", f"{coder}.conv_out")
    add("encoder.posterior", "quant_conv")
    add("decoder.entry", "post_quant_conv")
    return table


def t5_config(theirs: dict, compute_dtype: str) -> T5Config:
    """From the hub's config.json; raises ValueError for another model than T5 v1.1."""
    if theirs.get("model_type") != "t5":
        raise ValueError(f"model_type is {theirs.get('model_type')!r}, not 't5'")
    form = theirs.get("feed_forward_proj", "relu")
    if form != "gated-gelu":
        raise ValueError(f"feed_forward_proj is {form!r}, as in T5 v1.0; only T5 v1.1 ('gated-gelu') is read")
    if theirs.get("layer_norm_epsilon", EPSILON) != EPSILON:
        raise ValueError(f"layer_norm_epsilon is {theirs['layer_norm_epsilon']}, not {EPSILON}")
    return T5Config(
        layers=theirs["num_layers"],
        width=theirs["d_model"],
        heads=theirs["num_heads"],
        head_width=theirs["d_kv"],
        hidden=theirs["d_ff"],
        vocabulary=theirs["vocab_size"],
        buckets=theirs["relative_attention_num_buckets"],
        max_distance=theirs.get("relative_attention_max_distance", 128),
        compute_dtype=compute_dtype,
    )


def sd_vae_config(theirs: dict, compute_dtype: str) -> SDVAEConfig:
    """From the hub's config.json; raises ValueError for another model than AutoencoderKL, or other parts in it."""
    if theirs.get("_class_name") != "AutoencoderKL":
        raise ValueError(f"_class_name is {theirs.get('_class_name')!r}, not 'AutoencoderKL'")
    scales = len(theirs["block_out_channels"])
    for name, expected in (
        ("down_block_types", ["DownEncoderBlock2D"] * scales),
        ("up_block_types", ["UpDecoderBlock2D"] * scales),
        ("act_fn", "silu"),
        ("in_channels", 3),
        ("out_channels", 3),
        ("use_quant_conv", True),
        ("use_post_quant_conv", True),
        ("shift_factor", None),
        ("latents_mean", None),
        ("latents_std", None),
    ):
        if theirs.get(name, expected) != expected:
            raise ValueError(f"{name} is {theirs[name]!r}, not {expected!r}")
    channels = theirs["block_out_channels"]
    for width in channels:
        if width % channels[0]:
            raise ValueError(f"block_out_channels {channels} are not multiples of the first")
    return SDVAEConfig(
        base_channels=channels[0],
        multipliers=tuple(width // channels[0] for width in channels),
        blocks_per_scale=theirs["layers_per_block"],
        latent_channels=theirs["latent_channels"],
        groups=theirs.get("norm_num_groups", 32),
        attention=theirs.get("mid_block_add_attention", True),
        scaling=theirs.get("scaling_factor", SDVAEConfig.scaling),  # older files do not say it
        compute_dtype=compute_dtype,
    )


class Kind(NamedTuple):
    """What is to know of a model of other projects."""

    config_class: type
    module_class: type
    read_config: Callable  # from the hub's config.json and a compute dtype
    table: Callable  # from the config: parameter -> Source
    stem: str  # of the names of their files of tensors
    other_files: tuple[str, ...] = ()  # beside config.json
    ignored: tuple[str, ...] = ()  # what the names of tensors begin with that are not needed


KINDS = {
    "t5": Kind(
        T5Config,
        T5Encoder,
        t5_config,
        lambda config: T5_TABLE,
        "model",
        # The first two are enough, either of them; the others, where they are there, add to it.
        (
            "spiece.model",
            "tokenizer.json",
            "tokenizer_config.json",
            "special_tokens_map.json",
            "added_tokens.json",
        ),
        ("decoder.", "lm_head."),  # of a T5ForConditionalGeneration
    ),
    "sd_vae": Kind(SDVAEConfig, SDVAE, sd_vae_config, sd_vae_table, "diffusion_pytorch_model"),
}


# --------------------------------------------------------------------------------------------------
# From the hub's layout
# --------------------------------------------------------------------------------------------------


def find_model(kind: str, model: str) -> tuple[Path, str]:
    """(folder, name) of a model: of the folder that `model` names, or else of the hub's model, downloaded.

    Raises ValueError where there is neither.
    """
    if Path(model).is_dir():
        return Path(model), Path(model).resolve().name
    from huggingface_hub import snapshot_download  # not needed to read what was imported

    stem = KINDS[kind].stem
    files = (f"{stem}.safetensors", f"{stem}.safetensors.index.json", f"{stem}-*-of-*.safetensors")
    patterns = ["config.json", *files, *KINDS[kind].other_files]
    try:
        return Path(snapshot_download(model, allow_patterns=patterns)), model
    except (OSError, ValueError, RuntimeError) as error:  # no connection, no such name, or no name at all
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{model}: no such folder, and no such model from the hub ({reason})") from None


def read_config(kind: str, folder: Path, compute_dtype: str) -> T5Config | SDVAEConfig:
    """Our config of a folder in the hub's layout; raises ValueError, with the file in it, for another model."""
    path = folder / "config.json"
    try:
        return KINDS[kind].read_config(json.loads(path.read_text()), compute_dtype)
    except KeyError as error:
        raise ValueError(f"{path}: lacks {error}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None


def import_weights(kind: str, folder: Path, name: str, config: T5Config | SDVAEConfig, output: Path) -> None:
    """Write the weights of a folder in the hub's layout into `output`, in the dtype that the config computes in.

    name: of the model. Raises ValueError with every tensor that is missing, unknown or of a wrong shape.
    """
    if output.exists() and output.samefile(folder):
        raise ValueError(f"{output}: holds what is to be imported; choose another output")
    of_kind, dtype = KINDS[kind], config.compute_dtype
    ours = flatten_dict(abstract_params(of_kind.module_class, config), sep=".")
    table = of_kind.table(config)
    tensors = open_tensors(folder, of_kind.stem)
    sources, expected, known = {}, {}, set()
    for path, abstract in ours.items():
        names, axes = table[path]
        is_stacked = "{}" in names[0]
        layers = [[n.format(i) for n in names] for i in range(abstract.shape[0] if is_stacked else 1)]
        sources[path] = [next((n for n in names if n in tensors), names[0]) for names in layers]
        shape = abstract.shape[is_stacked:]
        expected |= dict.fromkeys(sources[path], tuple(shape[i] for i in np.argsort(axes)) if axes else shape)
        known |= {n for names in layers for n in names}  # a tensor may be there under two names
    found = {
        name: tuple(tensor.get_shape())
        for name, tensor in tensors.items()
        if name in expected or not (name in known or name.startswith(of_kind.ignored))
    }
    check_tensors(str(folder), found, expected)

    def read(path):
        for theirs in sources[path]:
            tensor, axes = tensors[theirs][:], table[path].axes
            yield (tensor.transpose(axes) if axes else tensor).astype(dtype)

    write_safetensors(output / FILE, ours, dtype, read)
    with replacing(output / "config.json") as file:
        saved = {"name": name, kind: dataclasses.asdict(config)}
        file.write((json.dumps(saved, indent=2) + "\n").encode())


def open_tensors(folder: Path, stem: str) -> dict:
    """Their tensors by name, not yet read: of one file, or of those that an index names.

    Raises ValueError, with the file in it, for those that are missing or damaged.
    """
    index = folder / f"{stem}.safetensors.index.json"
    single = folder / f"{stem}.safetensors"
    if not index.is_file() and not single.is_file():
        raise ValueError(
            f"{folder}: holds neither {single.name} nor {index.name}; pickled weights (.bin, .pt, .ckpt) are programs "
            "and are not read"
        )
    try:
        files = [single]
        if index.is_file():
            files = [
                folder / file for file in sorted(set(json.loads(index.read_text())["weight_map"].values()))
            ]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{index}: is no index of safetensors files") from None
    tensors = {}
    for path in files:
        try:
            file = safe_open(path, framework="numpy")
            tensors |= {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 -- no dict
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: cannot be read ({error})") from None
    return tensors


def check_tensors(name: str, found: dict[str, tuple], expected: dict[str, tuple]) -> None:
    """Raises ValueError with all tensors whose shapes, by name, are not as expected: missing, unknown or different."""
    problems = []
    for tensor in sorted(found.keys() | expected.keys()):
        if tensor not in found:
            problems.append(f"{tensor} of shape {expected[tensor]} is missing")
        elif tensor not in expected:
            problems.append(f"{tensor} of shape {found[tensor]} is unknown")
        elif found[tensor] != expected[tensor]:
            problems.append(f"{tensor} has shape {found[tensor]}, not {expected[tensor]}")
    if problems:
        raise ValueError(f"{name}: {'; '.join(problems)}")


def write_safetensors(
    path: Path, shapes: dict, dtype: str, read: Callable[[str], Iterator[np.ndarray]]
) -> None:
    """Write tensors as `read` gives them, by name and in parts of rising first index: none has to be whole in memory.

    shapes: {name: what has a shape}. safetensors itself writes only what is there all at once. The format is the
    length of a JSON header, the header, and the tensors' bytes.
    """
    header, end = {}, 0
    for name, tensor in shapes.items():
        start, end = end, end + int(np.prod(tensor.shape)) * jnp.dtype(dtype).itemsize
        header[name] = {
            "dtype": {"float32": "F32", "bfloat16": "BF16"}[dtype],
            "shape": tensor.shape,
            "data_offsets": (start, end),
        }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # so that the tensors are aligned
    with replacing(path) as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in shapes:
            for part in read(name):
                file.write(part.tobytes())


# --------------------------------------------------------------------------------------------------
# From a folder of ours
# --------------------------------------------------------------------------------------------------


def load_imported(folder: Path, kind: str, shardings: Callable) -> tuple[str, T5Config | SDVAEConfig, dict]:
    """(name of what was imported, config, parameters) of a folder that `import_weights` wrote.

    shardings: from the abstract parameters to a tree of shardings; every device reads its part alone. Raises
    ValueError, with the folder in it, for files that are missing or of another kind, or tensors of another config.
    """
    folder = Path(folder)
    command = f"`prepare import-{kind.replace('_', '-')}` writes such a folder"
    for path in (folder / "config.json", folder / FILE):
        if not path.is_file():
            raise ValueError(f"{folder}: {path.name} is missing; {command}")
    try:
        saved = json.loads((folder / "config.json").read_text())
        if not isinstance(saved, dict) or kind not in saved:
            raise ValueError(f"config.json has no {kind}; {command}")
        options = dacite.Config(cast=[tuple], strict=True)
        config = dacite.from_dict(KINDS[kind].config_class, saved[kind], options)
    except (ValueError, TypeError, AttributeError, dacite.DaciteError, OSError) as error:
        raise ValueError(f"{folder}: the weights cannot be read ({error})") from None
    tensors = open_tensors(folder, "model")
    expected = abstract_params(KINDS[kind].module_class, config)
    shapes = {name: leaf.shape for name, leaf in flatten_dict(expected, sep=".").items()}
    check_tensors(str(folder), {name: tuple(part.get_shape()) for name, part in tensors.items()}, shapes)
    of_devices = flatten_dict(shardings(expected), sep=".")
    params = {
        name: jax.make_array_from_callback(
            shape, of_devices[name], lambda index, tensor=tensors[name]: tensor[index]
        )
        for name, shape in shapes.items()
    }
    return saved["name"], config, unflatten_dict(params, sep=".")
