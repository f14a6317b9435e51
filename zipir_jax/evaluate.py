"""Score a model on clean photographs: `python -m zipir_jax.evaluate --hq DIR --task mixture,sr8,sr16`.

Each photograph is degraded and restored by bicubic enlargement, by the pixel-aware decoder D_f* without diffusion, and
by the model. `--photo astronaut` takes a photograph that comes with scikit-image instead of a folder. With
`--reconstruct` nothing is degraded: the reconstruction by an LP-VAE (`--weights`), an imported `--sd-vae` or both is
scored.
"""

import dataclasses
import json
import shlex
import sys
from pathlib import Path

import numpy as np
import tyro
from tqdm import tqdm

from zipir_jax.command_line import cache_compiled_programs, machine, parse, run
from zipir_jax.config import TASKS, RestorationConfig, check_seed
from zipir_jax.data.preview import side_by_side
from zipir_jax.files import check_replaceable, check_writable, replacing
from zipir_jax.imageio import crop_centre, distinct_names
from zipir_jax.metrics.photographs import CROP_MULTIPLE, degrade, find_photographs, parse_tasks, read_original
from zipir_jax.photograph import write_image

NOTES = (
    f"Originals cropped to multiples of {CROP_MULTIPLE} pixels; 8-bit results. PSNR: mean ± standard deviation over "
    "pictures; ratios: of means; s: wall time of a picture whose size has been "
    "seen before, without compiling."
)
SHEET_SIDE = 256  # pixels, of the centres on a sheet
RECONSTRUCTION = "reconstruction"  # in the place of a task
PAPER_TASKS = "mixture,sr8,sr16"  # paper Table 1


def evaluate(
    hq: Path | None = None,
    photo: str | None = None,
    task: str = PAPER_TASKS,
    weights: str = "default",
    seed: int = 0,
    limit: int | None = None,
    output: Path | None = None,
    pictures: Path | None = None,
    ablate: bool = False,
    reconstruct: bool = False,
    sd_vae: Path | None = None,
    restoration: tyro.conf.OmitArgPrefixes[RestorationConfig] = RestorationConfig(),
) -> None:
    """Degrade clean photographs, restore them, and compare the results with the originals.

    Args:
        hq: folder of clean photographs; sides are cropped at the centre to multiples of 16 pixels
        photo: photographs of scikit-image instead, separated by commas: astronaut, chelsea, coffee, motorcycle_left,
            page, rocket, text
        task: degradations, separated by commas: sr8, sr16, mixture, fig4, fig4_x4
        weights: folder of weights
        seed: of the degradations' noise and of the noise that the sampler starts from
        limit: use the first photographs of the folder only, this many
        output: JSON file for the numbers of every picture
        pictures: folder for the restored pictures, for comparisons of each with bicubic and original, and for a sheet
            of each photograph: its centre, a row a task, with what was restored
        ablate: score beside the model what it is with fewer steps and with D_f in place of D_f*, for which it needs the
            weights of a run, as the default ones have no D_f
        reconstruct: encode and decode the photographs as they are, by an LP-VAE that still has its D_f (--weights; the
            default ones have none)
        sd_vae: with --reconstruct, a folder that `prepare import-sd-vae` wrote, to compare with, or alone
        restoration: how the model restores them
    """
    tasks = [RECONSTRUCTION] if reconstruct else parse_tasks(task)
    if reconstruct and (task, restoration) != (PAPER_TASKS, RestorationConfig()):
        raise ValueError(
            "--reconstruct degrades and samples nothing: leave out --task and settings of sampling and colours"
        )
    if reconstruct and ablate:
        raise ValueError("--ablate is of restorations: leave out --reconstruct")
    if sd_vae is not None and not reconstruct:
        raise ValueError("--sd-vae restores nothing: it needs --reconstruct")
    if reconstruct and weights == "default" and sd_vae is None:
        raise ValueError(
            "the default weights were exported without D_f, which --reconstruct decodes with: give --weights "
            "RUN/weights of a run that trained it (the fine stage), or --sd-vae alone"
        )
    check_seed(seed)
    paths = find_photographs(hq, photo, limit)
    if output is not None:
        check_replaceable(output)
    for folder in (output and output.parent, pictures):
        if folder is not None:
            check_writable(folder)
    for path in paths:  # a damaged or too small picture ends it now, not after an hour's work
        read_original(path)
    # Importing jax takes seconds; bad arguments should not wait for it.
    from zipir_jax.metrics.scoring import BASELINE, Reference, describe, run_methods, summarise, table

    cache_compiled_programs()
    if reconstruct:
        methods = reconstructions(weights, sd_vae)
        titles = {RECONSTRUCTION: f"{RECONSTRUCTION}, {BASELINE} from {describe(TASKS['sr8'])}"}
    else:
        methods = restorations(weights, restoration, seed, ablate)
        titles = {name: f"{name}: {describe(TASKS[name])}" for name in tasks}
    ours = list(methods)[-1]
    results = {name: [] for name in tasks}
    written, warm = [], set()
    with tqdm(total=len(paths) * len(tasks), unit="picture", dynamic_ncols=True) as bar:
        for index, (path, stem) in enumerate(zip(paths, distinct_names(paths), strict=True)):
            original, rows = read_original(path), []
            reference = Reference(original)
            for name in tasks:
                bar.set_postfix_str(f"{path.name}, {name}")
                lq = original if reconstruct else degrade(original, name, seed, index)
                restored, seconds = run_methods(methods, lq, original.shape[:2], warm)
                scores = {m: reference.score(restored[m]) | {"seconds": seconds[m]} for m in methods}
                results[name].append({"picture": path.name, "size": original.shape[:2], "scores": scores})
                if pictures is not None:
                    shown = {method: restored[method] for method in (BASELINE, ours)}
                    written += write_pictures(pictures / f"{stem}_{name}", shown, original, scores)
                    rows.append(sheet_row(name, lq, shown, original))
                bar.update()
            if rows:
                written.append(pictures / f"{stem}_sheet.png")
                write_image(written[-1], np.concatenate(rows))

    rows = {name: summarise([result["scores"] for result in results[name]]) for name in tasks}
    for name in tasks:
        count = f"{len(paths)} picture{'s' * (len(paths) > 1)}"
        print(f"### {titles[name]}; {count}\n\n{table(rows[name])}\n")
    command = shlex.join(["python", "-m", "zipir_jax.evaluate", *sys.argv[1:]])
    print(f"{NOTES}\n\n`{command}`\n\n{machine()}")
    if output is not None:
        report = {
            "command": command,
            "machine": machine(),
            "weights": None if reconstruct and weights == "default" else weights,
            "sd_vae": sd_vae and str(sd_vae),
            "seed": seed,
            **dataclasses.asdict(restoration),
            "tasks": {},
        }
        for name in tasks:
            settings = None if reconstruct else dataclasses.asdict(TASKS[name])
            report["tasks"][name] = {"task": settings, "means": rows[name], "pictures": results[name]}
        with replacing(output) as file:
            file.write((json.dumps(report, indent=1, allow_nan=False) + "\n").encode())
        written.append(output)
    if written:
        print("\n" + "\n".join(f"wrote {path}" for path in written))


def restorations(weights: str, restoration: RestorationConfig, seed: int, ablate: bool) -> dict:
    """Methods that restore an LQ picture, by name; raises ValueError for weights or sampling that do not do."""
    from zipir_jax.metrics.restoration import ablation_methods, load_plain, named, restoration_methods
    from zipir_jax.restorer import Restorer, check_sampling

    restorer = Restorer.load(weights)
    check_sampling(restorer.config, restoration.sampling, restorer.negative_text is not None)
    if ablate:
        return ablation_methods(restorer, load_plain(weights), restoration, seed)
    return restoration_methods(restorer, named(restoration), seed)


def reconstructions(weights: str, sd_vae: Path | None) -> dict:
    """Methods that encode and decode a picture, by name; raises ValueError for weights that cannot be read.

    weights: "default", which have no D_f, for none. The baseline keeps less of a picture than any method: as many
    pixels as the latent of an f8 has.
    """
    from zipir_jax.metrics.reconstruction import lp_vae_method, sd_vae_method
    from zipir_jax.metrics.scoring import BASELINE, bicubic

    methods = {BASELINE: lambda picture, size: bicubic(degrade(picture, "sr8", 0, 0), size)}
    methods |= {} if sd_vae is None else dict([sd_vae_method(sd_vae)])
    return methods if weights == "default" else methods | dict([lp_vae_method(weights)])


def write_pictures(start: Path, shown: dict, original: np.ndarray, scores: dict) -> list[Path]:
    """Write the last picture of `shown`, and all of them beside the original; returns both paths.

    start: what the paths begin with. shown: {method: picture}; scores: {method: numbers}.
    """
    labels = {
        method: f"{method}: {scores[method]['psnr']:.2f} dB, LPIPS-VGG16 {scores[method]['lpips_vgg16']:.3f}"
        for method in shown
    }
    compared = {labels[method]: picture for method, picture in shown.items()} | {"original": original}
    files = {"restored": list(shown.values())[-1], "comparison": side_by_side(compared)}
    paths = {kind: start.with_name(f"{start.name}_{kind}.png") for kind in files}
    for kind, path in paths.items():
        write_image(path, files[kind])
    return list(paths.values())


def sheet_row(task: str, lq: np.ndarray, shown: dict, original: np.ndarray) -> np.ndarray:
    """The centres of the degraded picture, with its pixels as squares, of those `shown` by method and of the original.

    All uint8 [h, w, 3].
    """
    height, width = original.shape[:2]
    # The pixel that lies over each of the original's; sides need not divide.
    rows, columns = np.arange(height) * len(lq) // height, np.arange(width) * lq.shape[1] // width
    pictures = {f"{task}, {lq.shape[1]} x {len(lq)}": lq[rows][:, columns]} | shown | {"original": original}
    return side_by_side(
        {label: crop_centre(picture, SHEET_SIDE, SHEET_SIDE) for label, picture in pictures.items()}
    )


def main(arguments: list[str]) -> None:
    parse(evaluate, arguments, prog="python -m zipir_jax.evaluate", description=__doc__)()


if __name__ == "__main__":
    run(main)
