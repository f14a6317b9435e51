"""Command line that prepares and inspects training data: `python -m zipir_jax.prepare COMMAND --help`."""

import dataclasses
import itertools
import os
import sys
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from zipir_jax import imageio
from zipir_jax.command_line import parse, run
from zipir_jax.config import DataConfig, DegradationConfig, IndexConfig
from zipir_jax.data.degrade import MINIMUM_SIDE, check_image
from zipir_jax.data.preview import contact_sheet
from zipir_jax.photograph import write_image

CAPTIONS_AT_ONCE = 256  # that a text encoder sorts into batches of one length


def preview(
    input: Path,
    output: Path = Path("preview.png"),
    count: int = 12,
    seed: int = 0,
    crop: int = 256,
    columns: int = 2,
    degradation: DegradationConfig = DegradationConfig(),
) -> None:
    """Draw clean images beside their degraded partners on one contact sheet.

    Args:
        input: folder of images; its subfolders are searched as well
        output: image file to write
        count: pairs on the sheet; where the folder holds fewer images, they are shown again with other seeds
        seed: of the choice of images and of their degradations
        crop: side in pixels of the square cut from the middle of each image
        columns: pairs in a row
        degradation: any setting of the degradation, e.g. --degradation.task-probability 0
    """
    if count < 1:
        raise ValueError(f"count is {count}; a contact sheet needs at least 1 pair.")
    if crop < MINIMUM_SIDE:
        raise ValueError(f"crop is {crop} pixels; it must be at least {MINIMUM_SIDE}.")
    if not input.is_dir():
        raise ValueError(f"{input} is not a folder.")
    paths = imageio.list_images(input, recursive=True)  # as training does
    if not paths:
        raise ValueError(f"{input} holds no images.")
    chosen = np.random.default_rng(seed).permutation(len(paths))[:count]
    crops = []
    for index in chosen:
        crops.append(_middle(imageio.read_image(paths[index]), crop))
        try:
            check_image(crops[-1])
        except ValueError as error:
            raise ValueError(f"{paths[index]}: {error}") from None
    sheet = contact_sheet([crops[index % len(crops)] for index in range(count)], degradation, seed, columns)
    write_image(output, sheet)
    print(f"{output}: {count} pairs from {len(crops)} images")


def index(
    input: tuple[str, ...], output: Path, workers: int | None = None, rules: IndexConfig = IndexConfig()
) -> None:
    """Look at every image of a collection, drop what training is better off without, write the rest as shards.

    A run that was interrupted goes on when it is started again. Which images were dropped, and why, is in dropped.csv.

    Args:
        input: folders of images with their subfolders, folders of shards, or tfds:NAME or tfds:NAME:SPLIT
        output: folder to write, a new one or that of an earlier run over the same images
        workers: processes that read and measure; one for each core by default, 0 for none beside this one
        rules: which images are kept, e.g. --rules.shortest-side 1024
    """
    if workers is not None and workers < 0:
        raise ValueError(f"workers is {workers}; it must be at least 0.")
    from zipir_jax.data.index import write_index  # preview and export do without

    print(write_index(input, output, rules, os.cpu_count() if workers is None else workers), end="")


def export(
    weights: Path,
    output: Path,
    step: int | None = None,
    file_format: Literal["safetensors", "orbax"] = "safetensors",
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    text: Path | None = None,
) -> None:
    """Write what restoring needs of a training run's weights.

    Args:
        weights: folder of weights, or of a run, whose newest checkpoint counts, while it goes on or after it was killed
        output: folder to write, another one
        step: of a run's checkpoint, in place of the newest
        file_format: one file, or Orbax's folder of many, which many hosts read at once
        dtype: of the parameters; statistics stay float32
        text: folder that `prepare embed` wrote; its embeddings of the default prompts go with the weights of a model
            with text, which then restores without a text encoder. Not given: those that the weights come with
    """
    if weights.exists() and output.exists() and output.samefile(weights):
        raise ValueError(
            f"{output}: the export would replace the weights that it is made of; choose another output."
        )
    import ml_dtypes
    from jax import tree  # takes seconds, and preview does not need it

    from zipir_jax.data.text import TextEmbeddings
    from zipir_jax.prompts import check_prompts, remove_prompts, write_prompts
    from zipir_jax.restorer import NEEDED
    from zipir_jax.training.export import run_weights, text_tokens
    from zipir_jax.weights import FILES, TEXT, check_groups, check_text, load_text, load_weights, save_weights

    prompts = None if text is None else TextEmbeddings(text)
    if prompts is not None:
        check_prompts(prompts)
        if (output / TEXT).exists() and (output / TEXT).samefile(text):
            raise ValueError(
                f"{output}: the export would replace the embeddings in {text}; choose another output."
            )
    if (weights / "checkpoints").is_dir():
        tokens = None if prompts is None else text_tokens(weights, step, prompts)
        config, groups = run_weights(weights, step)
        check_groups(weights, groups, NEEDED)
    elif step is not None:
        raise ValueError(f"{weights}: no run here, and step {step} names a run's checkpoint")
    else:
        config, groups = load_weights(weights, NEEDED)
        prompts = prompts or load_text(weights, config)
        tokens = None if prompts is None else prompts.tokens
    if text is not None:
        check_text(prompts, config)
    narrow = ml_dtypes.bfloat16 if dtype == "bfloat16" else "float32"
    groups = {
        # Statistics are 134 numbers that scale everything: they stay float32.
        name: groups[name] if name == "statistics" else tree.map(lambda x: x.astype(narrow), groups[name])
        for name in NEEDED
    }
    # Embeddings of before are gone before the weights are new: whenever it is killed, none lie beside others' weights.
    remove_prompts(output)
    save_weights(output, config, groups, file_format)
    if prompts is not None:
        write_prompts(output, prompts, tokens)
    elif config.dit.text_width:
        print(
            f"{output}: without embeddings of the default prompts: restoring needs a text encoder, or --text here",
            file=sys.stderr,
        )
    path = output / FILES[file_format]
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    print(f"{output}: {sum(file.stat().st_size for file in files) / 2**20:.2f} MiB")


def embed(
    encoder: Path,
    output: Path,
    sources: tuple[str, ...] = (),
    tokens: int = DataConfig.text_tokens,
) -> None:
    """Write the text embeddings that training (--data.text OUTPUT) and restoring (export --text OUTPUT) work with.

    They are those of the empty caption, of the default positive and negative prompt, and of every caption of the
    sources. It runs in one process; an interrupted run has to be started again. A caption that cannot be read or
    encoded is named and passed over.

    Args:
        encoder: folder that `prepare import-t5` wrote
        output: folder to write
        sources: images with captions, as data.sources of the training
        tokens: of an embedding; what is longer is cut, as data.text_tokens of the training does, which may be no more
    """
    from zipir_jax.command_line import cache_compiled_programs
    from zipir_jax.config import NEGATIVE_PROMPT, POSITIVE_PROMPT
    from zipir_jax.data.records import check_new
    from zipir_jax.data.sources import open_sources
    from zipir_jax.data.text import INDEX_FILE, TextEmbeddings, distinct, remove_text, shortened, write_text
    from zipir_jax.files import check_writable

    if tokens < 1:
        raise ValueError(f"tokens is {tokens}; it must be at least 1.")
    check_new(output, INDEX_FILE)  # to load an encoder takes minutes
    check_writable(output)
    source = open_sources(sources) if sources else None
    cache_compiled_programs()
    from zipir_jax.text_encoder import TextEncoder

    t5, unreadable = TextEncoder.load(encoder), list(source.damaged if source else ())
    for line in unreadable:
        print(line, file=sys.stderr)
    remove_text(output)  # of a run that was killed, perhaps more shards than this one writes

    def captions():
        yield from ("", POSITIVE_PROMPT, NEGATIVE_PROMPT)
        for index in tqdm(range(len(source) if source else 0), unit="caption", dynamic_ncols=True):
            try:
                yield source.caption(index)
            except ValueError as error:  # training passes over its image as well
                unreadable.append(str(error))
                tqdm.write(unreadable[-1], file=sys.stderr)

    def encode(together):
        try:
            return zip(together, t5.encode(together), strict=True)
        except (TypeError, ValueError) as error:  # what tokenizers raise
            if len(together) > 1:
                return itertools.chain.from_iterable(encode([caption]) for caption in together)
            unreadable.append(f"the caption {shortened(together[0])!r} cannot be encoded ({error})")
            tqdm.write(unreadable[-1], file=sys.stderr)
            return ()

    def embeddings():
        new = distinct(captions())
        while together := list(itertools.islice(new, CAPTIONS_AT_ONCE)):
            yield from encode(together)

    write_text(output, embeddings(), t5.name, tokens)
    print(f"{output}: embeddings of {len(TextEmbeddings(output))} captions")
    if unreadable:
        print(f"{len(unreadable)} images or captions could not be read", file=sys.stderr)


def statistics(
    sources: tuple[str, ...],
    output: Path,
    weights: Path | None = None,
    model: str = "paper",
    resolution: int = 512,
    images: int = 512,
    seed: int = 0,
) -> None:
    """Measure the mean and deviation of the macro band or, with weights that have encoders, of the whole latent.

    Training does so by itself. The macro band's are those that the coarse stage starts from (--init-from OUTPUT); E_c
    was trained with those that its weights hold, so these are kept. The latent's are those that the DiT works with,
    and where it diffuses residuals also their deviation, under the default degradations.

    Args:
        sources: as data.sources of the training
        output: folder of weights to write; with the same folder as weights, these are replaced
        weights: an LP-VAE, whose latent is measured
        model: preset that the macro band's statistics are written for, where there are no weights
        resolution: pixels, side of the crops that are measured
        images: how many of them
        seed: of their choice
    """
    from zipir_jax.config import MODELS, TrainConfig
    from zipir_jax.data.sources import open_sources
    from zipir_jax.training.loop import statistics_images
    from zipir_jax.training.stages import STAGES
    from zipir_jax.training.statistics import macro_statistics
    from zipir_jax.weights import load_weights, save_weights

    if model not in MODELS:
        raise ValueError(f"model {model!r} is not one of {', '.join(MODELS)}")
    data = DataConfig(sources=sources, resolutions=(resolution,))
    config = TrainConfig(data=data, statistics_images=images, seed=seed)
    source = open_sources(sources)
    samples = statistics_images(config, source)
    if weights is None:
        model_config, groups = MODELS[model], {"statistics": macro_statistics(samples)}
    else:
        model_config, groups = load_weights(weights, ("statistics", "coarse_encoder", "fine_encoder"))
        config = dataclasses.replace(config, model=model_config)
        groups["statistics"] = STAGES["fine"].statistics(config, groups, samples)
    save_weights(output, model_config, groups)
    for name, values in groups["statistics"].items():
        print(f"{name}: {np.array2string(values, precision=3, max_line_width=10**6)}")


def latents(config: Path, sources: tuple[str, ...], output: Path, batches: int, init_from: str = "") -> None:
    """Encode crops and their degraded partners for a DiT that is trained without the LP-VAE (--data.latents OUTPUT).

    Args:
        config: config file of the DiT's training, which says how images are cut and degraded, and with which weights
        sources: of the images, in place of the config's
        output: folder to write
        batches: how many of the config's batches
        init_from: weights, in place of the config's
    """
    import dataclasses

    from zipir_jax.command_line import cache_compiled_programs, load_config
    from zipir_jax.training.cache import cache_latents

    cache_compiled_programs()
    loaded = load_config(config)
    data = dataclasses.replace(loaded.data, sources=sources, latents="", text="")
    loaded = dataclasses.replace(loaded, data=data, init_from=init_from or loaded.init_from)
    count = cache_latents(loaded, output, batches)
    print(f"{output}: latents of {count} crops")


def import_t5(
    model: str,
    output: Path,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    revision: str | None = None,
    subfolder: str = "",
    variant: str | None = None,
    tokenizer: str | None = None,
) -> None:
    """Bring a T5 v1.1 text encoder into our layout: what makes the embeddings of captions and prompts.

    Args:
        model: of the Hugging Face hub, NAME/REPOSITORY with safetensors, or a folder in its layout
        output: folder to write; an earlier import there is replaced
        dtype: of the parameters, and what the encoder computes in
        revision: branch, tag or commit of the hub's model
        subfolder: of the model that holds the encoder, as text_encoder_2 of a pipeline of diffusers
        variant: of the files, as fp16 for model.fp16.safetensors
        tokenizer: of the hub, as google/t5-v1_1-xxl, or a folder; where the model's folder has none
    """
    from zipir_jax.models.layers import abstract_params, count_params
    from zipir_jax.models.t5 import T5Encoder
    from zipir_jax.text_encoder import import_encoder

    name, config = import_encoder(model, output, dtype, revision, subfolder, variant, tokenizer)
    count = count_params(abstract_params(T5Encoder, config))
    print(f"{output}: {name}, {count:,} parameters, embeddings of {config.width} channels")


def import_sd_vae(
    model: str,
    output: Path,
    revision: str | None = None,
    subfolder: str = "",
    variant: str | None = None,
) -> None:
    """Bring an autoencoder of Stable Diffusion into our layout, to compare reconstructions with (see evaluate).

    Args:
        model: of the Hugging Face hub, as stabilityai/sd-vae-ft-mse, or a folder in its layout; with safetensors
        output: folder to write; an earlier import there is replaced
        revision: branch, tag or commit of the hub's model
        subfolder: of the model that holds the autoencoder, as vae of a pipeline of diffusers
        variant: of the files, as fp16 for diffusion_pytorch_model.fp16.safetensors
    """
    from zipir_jax.models.layers import abstract_params, count_params
    from zipir_jax.models.sd_vae import SDVAE
    from zipir_jax.weights.foreign import find_model, import_weights, read_config

    folder, name = find_model("sd_vae", model, revision, subfolder, variant)
    config = read_config("sd_vae", folder)
    import_weights("sd_vae", folder, name, config, output, variant=variant)
    count = count_params(abstract_params(SDVAE, config))
    print(f"{output}: {name}, {count:,} parameters, f{config.factor}c{config.latent_channels}")


COMMANDS = {
    "preview": preview,
    "index": index,
    "export": export,
    "embed": embed,
    "statistics": statistics,
    "latents": latents,
    "import-t5": import_t5,
    "import-sd-vae": import_sd_vae,
}


def _middle(image, side):
    top, left = max(0, image.shape[0] - side) // 2, max(0, image.shape[1] - side) // 2
    return image[top : top + side, left : left + side]


def main(arguments: list[str]) -> None:
    description = "Prepare and inspect training data. --debug shows the traceback of an error."
    parse(COMMANDS, arguments, prog="python -m zipir_jax.prepare", description=description)()


if __name__ == "__main__":
    run(main)
