"""Restore photographs: `python -m zipir_jax.sample --input PATH --output PATH [--scale 4] [--prompt TEXT]`."""

import os
import sys
from pathlib import Path
from typing import Literal

import tyro
from tqdm import tqdm

from zipir_jax.command_line import cache_compiled_programs, parse, run
from zipir_jax.config import SamplingConfig, check_seed
from zipir_jax.files import check_writable
from zipir_jax.imageio import (
    OUTPUT_FORMATS,
    distinct_names,
    list_images,
    read_image,
    write_image,
)

EXISTS = "exists already; use --overwrite to replace it"


def restore_files(
    input: Path,
    output: Path,
    scale: float | None = None,
    size: str | None = None,
    format: Literal["png", "jpg", "webp"] = "png",
    weights: str = "default",
    attention: Literal["xla", "cudnn", "splash"] | None = None,
    seed: int = 0,
    overwrite: bool = False,
    memory_gib: float | None = None,
    dry_run: bool = False,
    prompt: str | None = None,
    negative_prompt: str | None = None,
    prompt_file: Path | None = None,
    text_encoder: Path | None = None,
    sampling: tyro.conf.OmitArgPrefixes[SamplingConfig] = SamplingConfig(),
) -> int:
    """Restore a photograph, or every photograph of a folder.

    Args:
        input: image file or folder
        output: image file (.png, .jpg, .webp) or folder
        scale: output size / input size, any positive number; 4 if no size is given
        size: output size in pixels, WIDTHxHEIGHT
        format: of results that go into a folder; an output file's follows from its name
        weights: folder of weights
        attention: implementation: xla runs anywhere, cudnn on NVIDIA's GPUs, splash on TPUs; not given: the one that
            the weights were trained with
        seed: of the noise that the sampler starts from; the same seed gives the same picture, and with the same
            memory_gib the same bytes
        overwrite: replace output files that exist
        memory_gib: memory of the device to spend beside the weights; what does not fit whole runs in tiles, with the
            same result. Not given: nine tenths of what is free, on a CPU half of it
        dry_run: restore nothing; print how each picture would be restored and the memory that it needs. A new prompt
            counts as the longest that is not cut, as no text encoder is loaded
        prompt: what the photographs show, for weights trained with text; not given: of each what NAME.txt or NAME.json
            beside it says, where that can be embedded, else the default prompt
        negative_prompt: what the guidance leads away from; not given: the default negative prompt; "" is no text
        prompt_file: CSV file with the columns file_name and text: prompts of single photographs, before all others
        text_encoder: folder that `prepare import-t5` wrote; loaded only for prompts that the weights do not come with
        sampling: how the latent is sampled
    """
    target = None if size is None else parse_size(size)
    check_seed(seed)
    if scale is None and target is None:
        scale = 4.0
    jobs = plan(input, output, format)
    check_outputs(jobs, may_exist=overwrite or input.is_dir())  # in a folder, what exists is skipped below
    if negative_prompt is not None and sampling.guidance == 1:
        raise ValueError("a negative prompt has no effect with guidance 1; leave one of them out")
    # Importing jax takes seconds; bad arguments should not wait for it.
    from zipir_jax.models.attention import check_implementation
    from zipir_jax.prompts import prompt_texts
    from zipir_jax.restorer import NEEDED, PHASES, Restorer, check_sampling, target_size
    from zipir_jax.weights import check_weights

    target_size((1, 1), scale, target)  # a scale or size that no image can have
    if memory_gib is not None and not memory_gib > 0:
        raise ValueError(f"memory of {memory_gib:g} GiB is not above 0")
    memory = None if memory_gib is None else int(memory_gib * 2**30)
    cache_compiled_programs()
    config = check_weights(weights, NEEDED)
    check_implementation(attention or config.dit.attention, config.dit.compute_dtype)
    check_sampling(config, sampling, has_negative_text=config.dit.text_width > 0)
    # Before the weights are loaded, so that a text encoder has the memory for itself.
    to_restore = [source for source, destination in jobs if overwrite or not destination.exists()]
    texts = prompt_texts(
        to_restore, weights, config, prompt, negative_prompt, prompt_file, text_encoder, dry_run
    )
    restorer = Restorer.load(weights, attention)
    failures = 0
    with tqdm(total=len(PHASES) * len(jobs), unit="phase", dynamic_ncols=True, disable=dry_run) as bar:

        def progress(phase, done):
            """Of a phase that begins, the phases before it are done."""
            if done == 0:
                bar.update(PHASES.index(phase) - bar.n % len(PHASES))
                bar.set_postfix_str(phase)

        for index, (source, destination) in enumerate(jobs):
            bar.set_description(source.name)
            try:
                if source not in texts or (destination.exists() and not overwrite):
                    raise ValueError(f"{destination}: {EXISTS}")
                image = read_image(source)
                options = {"scale": scale, "size": target, "memory": memory, "sampling": sampling}
                options |= texts[source]
                try:
                    if dry_run:
                        print(f"{source}:", *restorer.plan(image.shape, **options).lines(), sep="\n")
                        continue
                    restored = restorer.restore(image, **options, seed=seed, progress=progress)
                except ValueError as error:  # the restorer knows no files; reading and writing name theirs
                    raise ValueError(f"{source}: {error}") from error
                write_image(destination, restored)
            except ValueError as error:
                if not input.is_dir():
                    raise
                failures += 1
                bar.write(f"skipped: {error}", file=sys.stderr)
            finally:  # a skipped file fills its share of the bar as well
                bar.update(len(PHASES) * (index + 1) - bar.n)
    if not dry_run:
        print(f"restored {len(jobs) - failures}, skipped {failures}" if input.is_dir() else jobs[0][1])
    return 1 if failures else 0


def plan(input: Path, output: Path, format: str) -> list[tuple[Path, Path]]:
    """(source, destination) of every picture. Raises ValueError if there is none, or the output cannot be.

    format: suffix, without its dot, of destinations that the output does not name.
    """
    if not input.is_dir():
        if not input.exists():
            raise ValueError(f"{input}: no such file or folder")
        if output.is_dir() or not output.suffix:
            return [(input, output / f"{input.stem}.{format}")]
        if output.suffix.lower() not in OUTPUT_FORMATS:
            raise ValueError(f"{output}: the output must end in one of {', '.join(OUTPUT_FORMATS)}")
        return [(input, output)]
    if output.is_file():
        raise ValueError(f"{output} is a file, but {input} is a folder: its results need a folder")
    sources = list_images(input)
    if not sources:
        raise ValueError(f"{input} holds no images")
    return [
        (source, output / f"{name}.{format}")
        for source, name in zip(sources, distinct_names(sources), strict=True)
    ]


def check_outputs(jobs: list[tuple[Path, Path]], may_exist: bool) -> None:
    """Raises ValueError for an output that is an input, that exists and may not, or whose folder cannot be written.

    jobs: (source, destination) of every picture. Nothing is written: a refused run leaves no folders behind.
    """
    inputs = {_identity(source) for source, _ in jobs}
    for _, destination in jobs:
        if not destination.exists():
            continue
        # With --overwrite as well: a photograph that its restoration replaced could not be had again.
        if _identity(destination) in inputs:
            raise ValueError(f"{destination}: the output would replace an input; choose another output")
        if not may_exist:
            raise ValueError(f"{destination}: {EXISTS}")
    for folder in {destination.parent for _, destination in jobs}:
        check_writable(folder)


def _identity(path):
    """Equal for two paths of the same file, through links and any spelling of the name."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) of "WIDTHxHEIGHT"; raises ValueError for anything else."""
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise ValueError(f"size {text!r} is not WIDTHxHEIGHT, such as 2048x1536")
    return int(height), int(width)


def main(arguments: list[str]) -> int:
    return parse(restore_files, arguments, prog="python -m zipir_jax.sample", description=__doc__)()


if __name__ == "__main__":
    run(main)
