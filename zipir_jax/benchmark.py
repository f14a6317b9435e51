"""Measure what training and restoring cost: `python -m zipir_jax.benchmark COMMAND --help`."""

import dataclasses
import importlib.util
import itertools
import os
from pathlib import Path

from zipir_jax.command_line import cache_compiled_programs, load_config, memory_bytes, parse, run
from zipir_jax.config import MODELS, DegradationConfig, LossConfig, TrainConfig, check_seed
from zipir_jax.files import check_replaceable, check_writable

# Trainings of the paper whose appetite for data is stated: stage, preset of the model.
TRAININGS = {
    "lpvae_fine": ("fine", "paper"),
    "pixel_decoder": ("pixel_decoder", "paper"),
    "dit_3b": ("dit", "paper"),
    "dit_0p68b": ("dit", "dit_0p68b"),
}
DEVICE = "NVIDIA H100 80GB HBM3"
UTILISATION = 0.4  # of the device's peak, at which it is assumed to train


def pipeline(
    sources: tuple[str, ...] = (),
    resolutions: tuple[int, ...] = (512, 1024, 2048),
    seconds: float = 20.0,
    threads: int = 2,
    output: Path | None = None,
) -> None:
    """Images a second of the data pipeline alone, with and without degradation, and the cores that a device needs.

    Args:
        sources: as data.sources of a training; () = synthetic images as JPEG files of 1.5 times the resolution
        resolutions: pixels, sides of the crops
        seconds: of each measurement, at least
        threads: of the pipeline
        output: JSON file to write
    """
    from zipir_jax.data.speed import pipeline_speed
    from zipir_jax.measure.report import finish, table

    if output is not None:
        check_writable(output.parent)
    print(f"| crop, px | degraded | images/s, {threads} threads | images/s a core |\n|---|---|---|---|")
    rows = []
    for resolution in resolutions:
        for degradation in (None, DegradationConfig()):
            speed = pipeline_speed(resolution, degradation, sources, seconds, threads)
            rows.append({"resolution": resolution, "degraded": degradation is not None} | speed)
            numbers = f"{speed['images_per_second']:.2f} | {speed['images_per_core_second']:.2f}"
            print(f"| {resolution} | {'yes' if degradation else 'no'} | {numbers} |", flush=True)
    needs = cores_needed(rows)
    print(
        f"\nImages a second that one {DEVICE} takes at {UTILISATION:.0%} of its peak, and the cores that make them:\n"
    )
    columns = {"training": "{training}", "crop, px": "{resolution}"}
    columns |= {"images/s": "{images_per_second:.1f}", "cores": "{cores:.1f}"}
    print(table(needs, columns))
    finish(output, {"speeds": rows, "device": DEVICE, "utilisation": UTILISATION, "needs": needs})


def cores_needed(speeds: list[dict]) -> list[dict]:
    """For each of TRAININGS and each resolution of `speeds`: images/s that a device takes, and cores that make them."""
    from zipir_jax.models.flops import peak_flops
    from zipir_jax.training.flops import training_flops
    from zipir_jax.training.stages import STAGES

    needs = []
    for training, (stage, model) in TRAININGS.items():
        config = TrainConfig(stage=stage, model=MODELS[model], loss=LossConfig(lpips_net="vgg16"))
        for speed in speeds:
            if speed["degraded"] == STAGES[stage].DEGRADED:
                side = speed["resolution"]
                flops = training_flops(config, side, side, adversarial=True)
                rate = UTILISATION * peak_flops(DEVICE) / flops
                cores = rate / speed["images_per_core_second"]
                needs.append(
                    {"training": training, "resolution": side, "images_per_second": rate, "cores": cores}
                )
    return needs


def latency(
    model: str = "",
    settings: tuple[str, ...] = (),
    sizes: tuple[int, ...] = (),
    repeats: int = 3,
    profile: Path | None = None,
    output: Path | None = None,
) -> None:
    """Seconds of a denoising step, of encoding, denoising and decoding, and of a whole image, with random weights.

    Args:
        model: preset of config.py; not given: small on a CPU, else paper
        settings: paper (25 steps), fast (8 steps, static LQ tokens), either with ", guided"; () = all that suit the
            model
        sizes: pixels, sides of the image; () = 1024 and 2048 and, where there is an accelerator, 4096 and 8192
        repeats: of each measurement, of which the median counts
        profile: folder for a profile of a restoration of each row, for xprof (TensorBoard) or Perfetto
        output: JSON file to write
    """
    import jax

    from zipir_jax.measure import latency as measure
    from zipir_jax.measure.report import check_any, finish, table

    model, settings, sizes = _asked(model, settings, sizes, jax.default_backend(), (1024, 2048), output)
    if profile is not None:
        check_writable(profile)
    jax.config.update("jax_enable_compilation_cache", False)  # the time to compile is measured, too
    rows, found = [], measure.latency(MODELS[model], settings, sizes, repeats, profile)
    print(f"{model}, {MODELS[model].dit.compute_dtype}\n\n{table([], measure.PHASE_COLUMNS)}")
    for row in found:
        rows.append(row)
        print(measure.phases_line(row), flush=True)
    check_any(rows)
    print(f"\nProducts of large matrices: {rows[0]['matmul_flops_per_second'] / 1e12:.4g} TFLOP/s")
    print(f"\nTable 3 of the paper:\n\n{measure.papers_table(rows, model)}")
    finish(output, {"model": model, "rows": rows})


def train(
    config: Path = Path("configs/dit_3b.py"),
    sizes: tuple[int, ...] = (1024,),
    batch_size: int | None = None,
    accumulate: int | None = None,
    attention: str = "",
    repeats: int = 3,
    output: Path | None = None,
) -> None:
    """Seconds of a training step on this machine's devices, images a second and MFU; random weights, no data.

    Args:
        config: Python file of the training
        sizes: pixels, sides of the crops
        batch_size: images, over all devices; not given: the config's
        accumulate: micro-batches; not given: the config's
        attention: xla, cudnn or splash; not given: the fastest on this platform
        repeats: steps after the first, of which the median counts
        output: JSON file to write
    """
    from zipir_jax.measure import training as measure
    from zipir_jax.measure.programs import square_crops
    from zipir_jax.measure.report import check_any, finish
    from zipir_jax.measure.timing import check_repeats, default_platform, in_own_process
    from zipir_jax.models.attention import fastest

    if output is not None:
        check_writable(output.parent)
    check_repeats(repeats)
    asked = load_config(config)
    dit = asked.model.dit
    attention = attention or fastest(default_platform(), dit.compute_dtype)
    asked = dataclasses.replace(
        asked,
        model=dataclasses.replace(asked.model, dit=dataclasses.replace(dit, attention=attention)),
        data=dataclasses.replace(asked.data, batch_size=batch_size or asked.data.batch_size),
        accumulate=accumulate or asked.accumulate,
    )
    for side in sizes:
        square_crops(asked, side)  # refuses what cannot be trained
    # Each size in a process of its own: what one needed does not count for the next.
    rows = [{"side": side} | in_own_process(measure.training_seconds, asked, side, repeats) for side in sizes]
    check_any(rows)
    print(measure.training_table(rows))
    finish(output, {"config": str(config), "attention": attention, "rows": rows})


def memory(
    model: str = "",
    settings: tuple[str, ...] = (),
    sizes: tuple[int, ...] = (),
    memory_gib: float | None = None,
    output: Path | None = None,
) -> None:
    """Memory of restoring: as planned, as XLA accounts for the compiled programs, and as used, with random weights.

    Args:
        model: preset of config.py; not given: small on a CPU, else paper
        settings: as of `latency`
        sizes: pixels, sides of the image; () = 1024, 2048, 4096 and, where there is an accelerator, 8192
        memory_gib: as of `sample`
        output: JSON file to write
    """
    from zipir_jax.measure import memory as measure
    from zipir_jax.measure.report import check_any, finish
    from zipir_jax.measure.timing import default_platform, in_own_process

    model, settings, sizes = _asked(model, settings, sizes, default_platform(), (1024, 2048, 4096), output)
    limit = memory_bytes(memory_gib)
    rows = []
    for setting, size in itertools.product(settings, sizes):
        row = in_own_process(measure.restore_memory, model, setting, size, limit)
        rows.append({"setting": setting, "side": size} | row)
        how = [f"did not run: {row['error']}"] if "error" in row else row["plan"]
        print("\n".join([f"{size} x {size} pixels, {setting}:", *how]), flush=True)
    check_any(rows)
    print(f"\n{model}; of each phase planned / compiled, beside the weights:\n\n{measure.memory_table(rows)}")
    finish(output, {"model": model, "rows": rows})


def _asked(model, settings, sizes, platform, cpu_sizes, output):
    """The model, settings and sizes to measure, with what is not given filled in."""
    from zipir_jax.measure.latency import settings_of
    from zipir_jax.measure.programs import check_side

    if output is not None:
        check_writable(output.parent)
    on_cpu = platform == "cpu"
    model = model or ("small" if on_cpu else "paper")
    if model not in MODELS:
        raise ValueError(f"model {model!r} is not one of: {', '.join(MODELS)}")
    sizes = sizes or (cpu_sizes if on_cpu else (1024, 2048, 4096, 8192))
    for size in sizes:
        check_side(size)
    return model, settings or settings_of(MODELS[model]), sizes


def peers(sizes: tuple[int, ...] = (), repeats: int = 3, output: Path | None = None) -> None:
    """Our DiTs beside the UNets of SeeSR, StableSR, DiffBIR and SUPIR: seconds a step and an image, random weights.

    Args:
        sizes: pixels, sides of the image; () = 512 on a CPU, 1024 and 2048 on a GPU
        repeats: steps of each network, of which the median counts
        output: JSON file to write
    """
    from zipir_jax.measure import peers as measure
    from zipir_jax.measure.report import finish

    if output is not None:
        check_writable(output.parent)
    for size in sizes:
        measure.check_size(size)
    device, libraries = measure.shared_device()
    precision = measure.PRECISIONS[device]
    report = {"libraries": libraries, "precision": precision, "note": measure.NOTE, "steps": []}
    print(measure.NOTE)
    for size in sizes or ((1024, 2048) if device == "gpu" else (512,)):
        rows = measure.compare(size, repeats, device)
        report["steps"] += rows
        print(f"\n{size} x {size} pixels, {precision}:\n\n{measure.steps_table(rows)}", flush=True)
    report["image_flops"] = measure.image_flops(measure.FLOPS_SIZES)
    print(f"\nTFLOP of an image, all steps (ratio):\n\n{measure.flops_table(report['image_flops'])}")
    print(f"\n{libraries}")
    finish(output, report)


def stem(size: int = 512, repeats: int = 3, output: Path | None = None) -> None:
    """The paper's LP-VAE with patches of 1, 2 and 4 pixels in its fine band: FLOPs at 2048 px, and seconds.

    Args:
        size: pixels, side of the image that is timed
        repeats: passes of each network, of which the median counts
        output: JSON file to write
    """
    from zipir_jax.measure.report import finish, table
    from zipir_jax.measure.stem import FLOPS_SIZE, stem_costs

    if output is not None:
        check_writable(output.parent)
    rows = stem_costs(size, repeats)
    columns = {"network": "{network}", "patch": "{patch}", "parameters": "{parameters:,}"}
    columns |= {f"TFLOP at {FLOPS_SIZE} px": "{teraflop:.2f}", "ratio": "{flops_ratio:.2f}"}
    columns |= {f"s at {size} px": "{seconds:.3g}", "ratio of s": "{seconds_ratio:.2f}"}
    print(table([row | {"teraflop": row["flops"] / 1e12} for row in rows], columns))
    finish(output, {"size": size, "flops_size": FLOPS_SIZE, "rows": rows})


def sampling(
    hq: Path,
    task: str = "mixture,sr8",
    samplers: tuple[str, ...] = ("ddim", "dpm-solver++", "unipc"),
    steps: tuple[int, ...] = (4, 8, 12, 25),
    fidelities: tuple[float, ...] = (0.0,),
    weights: str = "default",
    seed: int = 0,
    limit: int | None = None,
    output: Path | None = None,
    plot: Path | None = None,
) -> None:
    """Samplers x steps x fidelities on clean photographs, degraded and restored: PSNR, LPIPS and seconds a picture.

    A run that was interrupted goes on from its output when it is started with the same arguments.

    Args:
        hq: folder of clean photographs; sides are cropped at the centre to multiples of 16 pixels
        task: degradations, separated by commas, as of `evaluate`
        samplers: ddim, dpm-solver++, unipc
        steps: evaluations of the DiT
        fidelities: 0 (off) to 1
        weights: folder of weights
        seed: of the degradations' noise and of the noise that the samplers start from
        limit: use the first photographs of the folder only, this many
        output: JSON file for the numbers of every picture, written after each
        plot: PNG file for a plot over the steps, or over the fidelity where there are several; needs matplotlib
    """
    from zipir_jax.metrics.photographs import find_photographs, parse_tasks, read_original

    tasks, paths = parse_tasks(task), find_photographs(hq, None, limit)
    check_seed(seed)
    check_files(output, plot)
    for path in paths:  # a damaged or too small picture ends it now, not after an hour's work
        read_original(path)
    from zipir_jax.measure import sampling as measure
    from zipir_jax.measure.report import finish, write
    from zipir_jax.restorer import Restorer, check_sampling

    named = measure.samplings(samplers, steps, fidelities)
    cache_compiled_programs()
    restorer = Restorer.load(weights)
    for config in named.values():
        check_sampling(restorer.config, config)
    settings = measure.settings(weights, seed, tasks, named)
    pictures = [] if output is None else measure.begun(output, settings, paths)
    for picture in measure.restorations(restorer, named, paths, tasks, seed, len(pictures)):
        pictures.append(picture)
        if output is not None:
            write(output, measure.report(settings, pictures, named))
    report = measure.report(settings, pictures, named)
    print(f"{measure.tables(report['rows'], len(pictures))}\n\n{measure.NOTE}")
    finish(output, report)
    if plot is not None:
        from zipir_jax.measure.plot import plot_samplings

        plot_samplings(plot, report["rows"])


def curves(runs: tuple[Path, ...], output: Path | None = None, plot: Path | None = None) -> None:
    """Losses of trainings that were run, over the minutes that they took.

    Args:
        runs: their folders
        output: JSON file to write
        plot: PNG file for a plot; needs matplotlib
    """
    check_files(output, plot)
    from zipir_jax.measure.curves import cells, read_run
    from zipir_jax.measure.report import finish, table

    found = [read_run(run) for run in runs]
    columns = {"run": "{run}", "steps": "{steps}", "images": "{images}", "minutes": "{minutes:.0f}"}
    print(table([cells(run) for run in found], columns | {"means of the last steps": "{last}"}))
    finish(output, {"runs": found})
    if plot is not None:
        from zipir_jax.measure.plot import plot_curves

        plot_curves(plot, found)


def check_files(output: Path | None, plot: Path | None) -> None:
    """Raises ValueError where one of the two that is given could not be written."""
    for file in (output, plot):
        if file is not None:
            check_replaceable(file)
            check_writable(file.parent)
    if plot is None:
        return
    if plot.suffix.lower() != ".png":
        raise ValueError(f"plot {plot}: the name of a PNG file ends in .png")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            'a plot needs matplotlib, which this Python lacks; pip install -e ".[plots]" installs it'
        )


def compile_programs(
    hardware: tuple[str, ...] = (),
    training_sizes: tuple[int, ...] = (1024, 2048, 4096),
    sizes: tuple[int, ...] = (2048, 4096, 8192),
    config: Path = Path("configs/dit_3b.py"),
    output: Path | None = None,
) -> None:
    """Compile the training step and the programs of restoring for absent devices: bytes a device needs and has.

    Args:
        hardware: names of measure/topologies.py; () = all. What has several devices trains, what has one restores
        training_sizes: pixels, sides of the crops
        sizes: pixels, sides of the restored image
        config: Python file of the training, whose model restores too
        output: JSON file to write
    """
    from zipir_jax.measure import topologies

    topologies.check_hardware(hardware)
    os.environ |= topologies.ENVIRONMENT  # before jax is imported
    from zipir_jax.measure import compile as measure
    from zipir_jax.measure.programs import check_side, square_crops
    from zipir_jax.measure.report import finish, line, table

    if output is not None:
        check_writable(output.parent)
    loaded, rows = load_config(config), []
    for side in training_sizes:
        square_crops(loaded, side)  # refuses what cannot be trained
    for side in sizes:
        check_side(side)
    print(f"{measure.NOTE}\n\n{table([], measure.COLUMNS)}")
    for name in hardware or topologies.HARDWARE:
        several = topologies.device_count(name) > 1
        for program in ("train",) if several else measure.RESTORING:
            for side in training_sizes if several else sizes:
                rows.append(measure.measure(program, loaded, name, side))
                print(line(measure.cells(rows[-1]), measure.COLUMNS), flush=True)
    for row in rows:
        if row["refusal"]:
            print(f"\n{row['program']} at {row['side']} pixels on {row['hardware']}: {row['refusal']}")
    finish(output, {"note": measure.NOTE, "programs": rows})


COMMANDS = {
    "pipeline": pipeline,
    "latency": latency,
    "train": train,
    "memory": memory,
    "peers": peers,
    "compile": compile_programs,
    "stem": stem,
    "sampling": sampling,
    "curves": curves,
}


def main(arguments: list[str]) -> None:
    description = "Measure what training and restoring cost. --debug shows the traceback of an error."
    parse(COMMANDS, arguments, prog="python -m zipir_jax.benchmark", description=description)()


if __name__ == "__main__":
    run(main)
