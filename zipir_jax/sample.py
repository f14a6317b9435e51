"""Restore photographs: `python -m zipir_jax.sample --input PATH --output PATH [--scale 4] [--preset fast]`."""

import argparse
import functools
import inspect
import sys
from pathlib import Path
from typing import Literal

import tyro
from tqdm import tqdm

from zipir_jax import folder
from zipir_jax.command_line import cache_compiled_programs, memory_bytes, parse, run
from zipir_jax.config import PRESETS, RestorationConfig, TargetConfig, check_seed
from zipir_jax.jobs import Job, check_outputs, is_there, plan_jobs
from zipir_jax.signals import delayed_signals
from zipir_jax.summary import check_summary, not_kept_lines, summarize, summary_lines, write_summary


def restore_files(
    input: Path,
    output: Path,
    target: tyro.conf.OmitArgPrefixes[TargetConfig] = TargetConfig(),
    format: Literal["png", "jpg", "webp", "tif", "avif", "heic", "same"] = "png",
    n_samples: int = 1,
    compare: Literal["side-by-side", "slider"] | None = None,
    skip_existing: bool = False,
    overwrite: bool = False,
    weights: str = "default",
    attention: Literal["xla", "cudnn", "splash"] | None = None,
    seed: int = 0,
    memory_gib: float | None = None,
    dry_run: bool = False,
    prompt: str | None = None,
    negative_prompt: str | None = None,
    prompt_file: Path | None = None,
    text_encoder: Path | None = None,
    restoration: tyro.conf.OmitArgPrefixes[RestorationConfig] = RestorationConfig(),
) -> int:
    """Restore a photograph, or every photograph of a folder and of those below it.

    Args:
        input: image file or folder
        output: image file or folder; a folder's tree is mirrored in it
        target: size of the result
        format: of results that go into a folder, same: that of their photograph; an output file's follows from its name
        n_samples: results of each photograph, of the seeds from --seed on; several are called NAME_1, NAME_2, ...
        compare: write NAME_compare as well, a picture of both side by side or a page of HTML with a slider between them
        skip_existing: results that exist are done, unless their record tells of another photograph or other settings;
            so a run goes on that was interrupted, and several processes or hosts share a folder
        overwrite: replace results that exist, but for those that would become the same file again
        weights: folder of weights
        attention: implementation: xla runs anywhere, cudnn on NVIDIA's GPUs, splash on TPUs; not given: the one that
            the weights were trained with
        seed: of the noise that the sampler starts from; the same seed gives the same picture, and with the same
            memory_gib the same bytes
        memory_gib: memory of the device to spend beside the weights; what does not fit whole runs in tiles, with the
            same result. Not given: nine tenths of what is free, on a CPU half of it
        dry_run: restore nothing; print how each picture would be restored and the memory that it needs. A new prompt
            counts as the longest that is not cut, as no text encoder is loaded
        prompt: what the photographs show, for weights trained with text; not given: of each what NAME.txt or NAME.json
            beside it says, where that can be embedded, else the default prompt
        negative_prompt: what the guidance leads away from; not given: the default negative prompt; "" is no text
        prompt_file: CSV file with the columns file_name and text: prompts of single photographs, before all others
        text_encoder: folder that `prepare import-t5` wrote; loaded only for prompts that the weights do not come with
        restoration: how a photograph is restored; the defaults are the preset's
    """
    sampling = restoration.sampling
    if n_samples < 1:
        raise ValueError(f"{n_samples} samples of a picture are not at least 1")
    check_seed(seed)
    check_seed(seed + n_samples - 1)
    if skip_existing and overwrite:
        raise ValueError("--skip-existing keeps what exists and --overwrite replaces it; give one of them")
    jobs, ignored, unreadable = plan_jobs(input, output, format, n_samples, compare)
    # In a folder, and with --skip-existing, what exists is told of when its turn comes.
    check_outputs(jobs, may_exist=overwrite or skip_existing or input.is_dir())
    if input.is_dir():
        check_summary(output)
    if negative_prompt is not None and sampling.guidance == 1:
        raise ValueError("a negative prompt has no effect with guidance 1; leave one of them out")
    # Importing jax takes seconds; bad arguments should not wait for it.
    from zipir_jax.models.attention import check_implementation
    from zipir_jax.prompts import embed_prompts, prompt_pairs
    from zipir_jax.restorer import NEEDED, PHASES, Restorer, check_sampling, target_pixels
    from zipir_jax.weights import check_weights, weights_digest, weights_folder

    target_pixels(target, (1, 1))  # a scale or size that no image can have
    memory = memory_bytes(memory_gib)
    cache_compiled_programs()
    config = check_weights(weights, NEEDED)
    check_implementation(attention or config.dit.attention, config.dit.compute_dtype)
    check_sampling(config, sampling, has_negative_text=config.dit.text_width > 0)
    # Before the weights are loaded, so that a text encoder has the memory for itself.
    below = input if input.is_dir() else input.parent
    sources = [job.source for job in jobs]
    prompts = prompt_pairs(
        sources, below, weights, config, prompt, negative_prompt, prompt_file, text_encoder
    )
    to_restore = [job for job in jobs if overwrite or not all(map(is_there, job.outputs))]
    pairs = [prompts[job.source] for job in to_restore if prompts[job.source] is not None]
    words = [pair[0] for pair in pairs] + [pair[1] for pair in pairs]
    embeddings = embed_prompts(words, weights, config, text_encoder, dry_run)
    work = folder.Run(
        restorer=Restorer.load(weights, attention),
        weights={"name": weights_folder(weights).name, "sha256": weights_digest(weights)},
        target=target,
        restoration=restoration,
        seed=seed,
        memory=memory,
        compare=compare,
        prompts=prompts,
        embeddings=embeddings,
        skip_existing=skip_existing,
        overwrite=overwrite,
        locks=output / folder.LOCKS if input.is_dir() else None,
    )
    if dry_run:
        return describe(work, jobs)
    total = len(PHASES) * sum(len(job.outputs) for job in jobs)
    with (
        delayed_signals() as stopped,
        tqdm(total=total, unit="phase", dynamic_ncols=True) as bar,
    ):

        def report(name, done, phase):
            bar.set_description(printable(name)[-40:], refresh=False)
            bar.set_postfix_str(phase, refresh=False)
            bar.update(int(len(PHASES) * done) - bar.n)

        def complain(sentence):
            if input.is_dir():
                bar.write(f"failed: {printable(sentence)}", file=sys.stderr)

        counts = folder.restore_all(work, jobs, stopped, report, complain)
    failed = counts["failed"]
    if input.is_dir():
        summary = summarize(output, jobs, counts, ignored, unreadable)
        # Before it is written, for which there may be no space.
        print(*map(printable, summary_lines(summary)), sep="\n", flush=True)
        write_summary(output, summary)
    else:
        for path in jobs[0].outputs:
            if path.name not in [failure["output"] for failure in failed] and path.exists():
                print(path)
        for line in not_kept_lines(counts):
            print(printable(line), file=sys.stderr)
    if counts["error"] is not None:
        raise counts["error"]
    if failed and not input.is_dir():
        raise ValueError(f"{input}: {failed[0]['reason']}")
    if stopped:
        return 128 + stopped[0]
    return 1 if failed or unreadable else 0


def describe(work: folder.Run, jobs: list[Job]) -> int:
    """Print how each picture would be restored."""
    failures = 0
    for job in jobs:
        try:
            lines = folder.plan_lines(work, job)
        except ValueError as error:
            if len(jobs) == 1:
                raise
            failures += 1
            print(f"failed: {printable(str(error))}", file=sys.stderr)
        else:
            print(printable(f"{job.source}:"), *lines, sep="\n")
    return 1 if failures else 0


def printable(text: str) -> str:
    """Escaped where a terminal could not show it: names of files may hold line breaks, or be no Unicode."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--preset", default="paper")
    try:
        options, others = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from None
    if options.preset not in PRESETS:
        raise ValueError(f"preset {options.preset!r} is not one of {', '.join(PRESETS)}")

    # With the preset's settings as defaults, --help shows them and single options replace them.
    @functools.wraps(restore_files)
    def restore_with_preset(*arguments, **options):
        return restore_files(*arguments, **options)

    signature = inspect.signature(restore_files)
    parameters = signature.parameters | {
        "restoration": signature.parameters["restoration"].replace(default=PRESETS[options.preset])
    }
    restore_with_preset.__signature__ = signature.replace(parameters=parameters.values())
    return parse(
        restore_with_preset,
        others,
        prog=f"python -m zipir_jax.sample [--preset {'|'.join(PRESETS)}]",
        description=f"{__doc__} What a preset sets is shown below as defaults; the one not named is paper.",
    )()


if __name__ == "__main__":
    run(main)
