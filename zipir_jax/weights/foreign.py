"""Weights of other projects (T5, the SD-VAE): from safetensors in the hub's layout to a folder of ours, and from there.

A table says for each of our parameters which of their tensors it is made of. Everything is looked at before anything is
written, and then copied tensor by tensor: the weights need not fit into memory.

A folder of ours holds `config.json`, {"name": of what was imported, "digest": of its parameters, "t5" or "sd_vae": its
config}, and `model.safetensors`, where a tensor's name is its path, as in weights/__init__.py.
"""

import dataclasses
import hashlib
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
DTYPES = "F32", "F16", "BF16"  # of their tensors, as safetensors names them


class Source(NamedTuple):
    """Their tensor that one of our parameters is made of."""

    # The first that is there counts; {} stands for the number of the layer in a stack of them.
    names: tuple[str, ...]
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


def t5_config(theirs: dict) -> T5Config:
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
    )


def sd_vae_config(theirs: dict) -> SDVAEConfig:
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
    )


class Kind(NamedTuple):
    """What is to know of a model of other projects."""

    config_class: type
    module_class: type
    read_config: Callable  # from the hub's config.json
    table: Callable  # from the config: parameter -> Source
    stem: str  # of the names of their files of tensors
    ignored: tuple[str, ...] = ()  # what the names of tensors begin with that are not needed


KINDS = {
    "t5": Kind(
        T5Config,
        T5Encoder,
        t5_config,
        lambda config: T5_TABLE,
        "model",
        ("decoder.", "lm_head."),  # of a T5ForConditionalGeneration
    ),
    "sd_vae": Kind(SDVAEConfig, SDVAE, sd_vae_config, sd_vae_table, "diffusion_pytorch_model"),
}


# --------------------------------------------------------------------------------------------------
# From the hub's layout
# --------------------------------------------------------------------------------------------------


def model_files(kind: str, variant: str | None = None) -> tuple[str, ...]:
    """Names in the hub's layout: all tensors in one file, the index of several, and two patterns of these.

    variant: of the tensors, as fp16, which the names then tell.
    """
    stem, dotted = KINDS[kind].stem, f".{variant}" if variant else ""
    return (
        f"{stem}{dotted}.safetensors",
        f"{stem}.safetensors.index{dotted}.json",
        f"{stem}{dotted}-?????-of-?????.safetensors",
        f"{stem}-?????-of-?????{dotted}.safetensors",  # as older versions of diffusers wrote them
    )


def find_folder(model: str, files: tuple[str, ...], revision: str | None = None, subfolder: str = "") -> Path:
    """The folder that `model` names or, of a model of the hub, one into which `files` were downloaded.

    files: names or patterns. revision: of the hub's model, a branch, a tag or a commit. subfolder: of either.
    Raises ValueError where there is neither.
    """
    path = Path(model)
    if path.is_file():
        raise ValueError(f"{model}: is a file; give the folder that holds it, with its config.json")
    if path.is_dir():
        if revision is not None:
            raise ValueError(f"{model}: is a folder, which has no revision {revision!r}")
        return path / subfolder
    import huggingface_hub  # not needed to read what was imported

    patterns = [f"{subfolder}/{name}" if subfolder else name for name in files]
    try:
        found = huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=patterns)
    except (
        Exception
    ) as error:  # no connection, no such name, or no name at all: four libraries raise what they like
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"{model}: no such folder, and no such model from the hub ({reason})") from None
    return Path(found) / subfolder


def find_model(
    kind: str,
    model: str,
    revision: str | None = None,
    subfolder: str = "",
    variant: str | None = None,
    other_files: tuple[str, ...] = (),
) -> tuple[Path, str]:
    """(folder in the hub's layout, name) of a model; arguments and ValueError as of `find_folder`.

    other_files: to download beside its config and tensors.
    """
    files = model_files(kind, variant)
    folder = find_folder(model, ("config.json", *files, *other_files), revision, subfolder)
    if Path(model).is_dir():
        return folder, Path(model).resolve().name
    if not any((folder / name).is_file() for name in files[:2]):
        import huggingface_hub

        try:
            listed = huggingface_hub.list_repo_files(model, revision=revision)
        except Exception:  # as in `find_folder`: then the message is without them
            listed = []
        raise no_tensors(model, files, [name for name in listed if name.endswith(".safetensors")])
    return folder, model


def read_config(kind: str, folder: Path) -> T5Config | SDVAEConfig:
    """Our config of a folder in the hub's layout; raises ValueError, with the file in it, for another model."""
    path = folder / "config.json"
    try:
        return KINDS[kind].read_config(json.loads(path.read_text()))
    except KeyError as error:
        raise ValueError(f"{path}: lacks {error}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None


def check_output(kind: str, output: Path) -> None:
    """Raises ValueError where an import would replace anything but an earlier one of the same kind, or a link."""
    config, tensors = output / "config.json", output / FILE
    for path in (config, tensors):
        if path.is_symlink():
            raise ValueError(f"{path}: is a link; choose another output")
    there = [path.name for path in (config, tensors) if path.exists()]
    try:
        is_earlier = kind in json.loads(config.read_text())
    except (ValueError, TypeError, OSError):
        is_earlier = False
    if there and not is_earlier:
        raise ValueError(
            f"{output}: holds {' and '.join(there)} of something else than an imported {kind}; choose another output"
        )


def import_weights(
    kind: str,
    folder: Path,
    name: str,
    config: T5Config | SDVAEConfig,
    output: Path,
    dtype: str = "float32",
    variant: str | None = None,
    write_first: Callable[[], None] = lambda: None,
) -> None:
    """Write the weights of a folder in the hub's layout into `output`.

    name: of the model. dtype: "float32" or "bfloat16". write_first: called before anything else is written, after all
    has been looked at. An earlier import in `output` is given up first; config.json comes last, so that what is there
    belongs together or is not read.

    Raises ValueError with every tensor that is missing, unknown, or of a wrong shape or dtype, with the first whose
    values are not finite, and as `check_output`.
    """
    check_output(kind, output)
    of_kind = KINDS[kind]
    ours = flatten_dict(abstract_params(of_kind.module_class, config), sep=".")
    table = of_kind.table(config)
    tensors = open_tensors(folder, model_files(kind, variant))
    sources, expected, known = {}, {}, set()
    for path, abstract in ours.items():
        names, axes = table[path]
        is_stacked = "{}" in names[0]
        layers = [[n.format(i) for n in names] for i in range(abstract.shape[0] if is_stacked else 1)]
        sources[path] = [next((n for n in names if n in tensors), names[0]) for names in layers]
        shape = abstract.shape[is_stacked:]
        expected |= dict.fromkeys(sources[path], tuple(shape[i] for i in np.argsort(axes)) if axes else shape)
        known |= {n for names in layers for n in names}  # a tensor may be there under two names
    needless = {n for n in tensors if n not in expected and (n in known or n.startswith(of_kind.ignored))}
    # A linear layer may be stored as a convolution of 1 x 1.
    stored = {
        n: (*shape, 1, 1) if len(shape) == 2 and n in tensors and len(tensors[n].get_shape()) == 4 else shape
        for n, shape in expected.items()
    }
    check_tensors(str(folder), {n: tensors[n] for n in tensors if n not in needless}, stored)
    digest = hashlib.sha256()

    def read(path):
        for theirs in sources[path]:
            tensor, axes = tensors[theirs][:].reshape(expected[theirs]), table[path].axes
            values = np.ascontiguousarray((tensor.transpose(axes) if axes else tensor).astype(dtype))
            if not np.isfinite(values).all():
                raise ValueError(f"{folder}: {theirs} holds values that are not finite")
            digest.update(values.astype("bfloat16", copy=False).view(np.uint8))
            yield values

    for earlier in (FILE, "config.json"):  # in this order: tensors without a config would be something else's
        (output / earlier).unlink(missing_ok=True)
    write_first()
    write_safetensors(output / FILE, ours, dtype, read)
    with replacing(output / "config.json") as file:
        saved = {"name": name, "digest": digest.hexdigest(), kind: dataclasses.asdict(config)}
        file.write((json.dumps(saved, indent=2) + "\n").encode())


def no_tensors(where: Path | str, names: tuple[str, ...], others: list[str]) -> ValueError:
    """The error of a model without tensors of these names, as of `model_files`, but with other files of tensors."""
    found = f"; it holds {', '.join(sorted(others))} (--variant and --subfolder choose)" if others else ""
    return ValueError(
        f"{where}: holds neither {names[0]} nor {names[1]}{found}; pickled weights (.bin, .pt, .ckpt) are programs and "
        "are not read"
    )


def open_tensors(folder: Path, names: tuple[str, ...]) -> dict:
    """Their tensors by name, not yet read: of one file, or of those that an index names.

    names: as of `model_files`. Raises ValueError, with the file in it, for those that are missing or damaged.
    """
    single, index = (folder / name for name in names[:2])
    if not index.is_file() and not single.is_file():
        raise no_tensors(folder, names, [path.name for path in folder.glob("*.safetensors")])
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


def check_tensors(name: str, tensors: dict, expected: dict[str, tuple]) -> None:
    """Raises ValueError with all tensors, as `open_tensors` gives them, that are not as expected.

    expected: {name: shape}. They are missing, unknown, or of another shape or of a dtype that is not read.
    """
    problems = []
    for tensor in sorted(tensors.keys() | expected.keys()):
        if tensor not in tensors:
            problems.append(f"{tensor} of shape {expected[tensor]} is missing")
            continue
        shape, dtype = tuple(tensors[tensor].get_shape()), tensors[tensor].get_dtype()
        if tensor not in expected:
            problems.append(f"{tensor} of shape {shape} is unknown")
        elif shape != expected[tensor]:
            problems.append(f"{tensor} has shape {shape}, not {expected[tensor]}")
        elif dtype not in DTYPES:
            problems.append(f"{tensor} has dtype {dtype}, not one of {', '.join(DTYPES)}")
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


def imported_config(folder: Path, kind: str) -> tuple[str, str, T5Config | SDVAEConfig]:
    """(name of what was imported, digest of its parameters, config) of a folder that `import_weights` wrote.

    The digest is sha256, in hexadecimal, of all parameters rounded to bfloat16: the same for an import in float32 and
    in bfloat16. Raises ValueError, with the folder in it, for files that are missing or of another kind.
    """
    folder = Path(folder)
    command = f"`prepare import-{kind.replace('_', '-')}` writes such a folder"
    for path in (folder / "config.json", folder / FILE):
        if not path.is_file():
            raise ValueError(f"{folder}: {path.name} is missing; {command}")
    try:
        saved = json.loads((folder / "config.json").read_text())
        for key, value_type in ((kind, dict), ("name", str), ("digest", str)):
            if not isinstance(saved, dict) or not isinstance(saved.get(key), value_type):
                raise ValueError(f"config.json has no {key}; {command}")
        options = dacite.Config(cast=[tuple], strict=True)
        config = dacite.from_dict(KINDS[kind].config_class, saved[kind], options)
    except (ValueError, TypeError, dacite.DaciteError, OSError) as error:
        raise ValueError(f"{folder}: the weights cannot be read ({error})") from None
    return saved["name"], saved["digest"], config


def load_imported(
    folder: Path, kind: str, config: T5Config | SDVAEConfig, shardings: Callable | None = None
) -> dict:
    """Parameters of a folder that `import_weights` wrote, of the config that `imported_config` gives.

    shardings: from the abstract parameters to a tree of shardings; every device reads its part alone. None: all on
    one device. Raises ValueError, with the folder in it, for tensors of another config or that cannot be read.
    """
    tensors = open_tensors(Path(folder), (FILE, f"{FILE}.index.json"))
    expected = abstract_params(KINDS[kind].module_class, config)
    shapes = {name: leaf.shape for name, leaf in flatten_dict(expected, sep=".").items()}
    check_tensors(str(folder), tensors, shapes)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    of_devices = flatten_dict(shardings(expected), sep=".") if shardings else dict.fromkeys(shapes, device)
    params = {
        name: jax.make_array_from_callback(
            shape, of_devices[name], lambda index, tensor=tensors[name]: tensor[index]
        )
        for name, shape in shapes.items()
    }
    return unflatten_dict(params, sep=".")
