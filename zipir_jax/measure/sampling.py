"""Samplers, numbers of steps and fidelities against each other: what each makes of photographs, and in how long."""

import itertools
import json
import statistics
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from zipir_jax.command_line import machine
from zipir_jax.config import TASKS, RestorationConfig, SamplingConfig
from zipir_jax.metrics.photographs import CROP_MULTIPLE, degrade, read_original
from zipir_jax.metrics.restoration import restoration_methods
from zipir_jax.metrics.scoring import Reference, describe, run_methods, summarise, table
from zipir_jax.restorer import Restorer

NOTE = (
    f"Originals cropped to multiples of {CROP_MULTIPLE} pixels; 8-bit results. PSNR: mean ± standard deviation over "
    "pictures; ratios: of means; s: median over pictures of the wall time of a whole restoration, those that compile "
    "left out."
)


def samplings(
    samplers: tuple[str, ...], steps: tuple[int, ...], fidelities: tuple[float, ...]
) -> dict[str, SamplingConfig]:
    """Every combination, by a name for its row. Raises ValueError for none, and for what SamplingConfig refuses."""
    for name, values in {"samplers": samplers, "steps": steps, "fidelities": fidelities}.items():
        if not values:
            raise ValueError(f"{name} is empty: give one or more")
    named = {}
    for sampler, count, fidelity in itertools.product(samplers, steps, fidelities):
        name = f"{sampler}, {count} step{'s' * (count != 1)}" + (f", fidelity {fidelity}" if fidelity else "")
        named[name] = SamplingConfig(sampler=sampler, steps=count, fidelity=fidelity)
    return named


def settings(weights: str, seed: int, tasks: list[str], named: dict[str, SamplingConfig]) -> dict:
    """All that the numbers follow from but the photographs, as JSON gives it back. named: as of `samplings`."""
    sampling = {name: asdict(config) for name, config in named.items()}
    found = {"weights": weights, "seed": seed, "tasks": tasks, "sampling": sampling, "machine": machine()}
    return json.loads(json.dumps(found))


def begun(output: Path, asked: dict, paths: list[Path]) -> list[dict]:
    """The photographs that an interrupted run has written to `output`, as of `restorations`; [] without such a file.

    asked: the `settings`. Raises ValueError where the file is of other settings or photographs, or no such report.
    """
    if not output.exists():
        return []
    try:
        report = json.loads(output.read_text())
        found, pictures = report["settings"], report["pictures"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{output}: exists and is no report of samplings; name another file") from None
    other = [name for name in asked if found.get(name) != asked[name]]
    if other:
        raise ValueError(f"{output}: was begun with other settings ({', '.join(other)}); name another file")
    names = [picture["picture"] for picture in pictures]
    if names != [path.name for path in paths[: len(names)]]:
        raise ValueError(
            f"{output}: holds {len(names)} photographs, which are not the first of the {len(paths)} to restore; "
            "name another file"
        )
    return pictures


def restorations(
    restorer: Restorer,
    named: dict[str, SamplingConfig],
    paths: list[Path],
    tasks: list[str],
    seed: int,
    done: int,
) -> Iterator[dict]:
    """Restore every photograph after the first `done` in every way: {picture, size, scores: {task: {method: numbers}}}.

    named: as of `samplings`; the baselines come before them. size: (height, width) in pixels. Numbers: those of
    `scoring.Reference.score`, and seconds, None where the size was a method's first in this process.
    """
    restorations = {name: RestorationConfig(sampling) for name, sampling in named.items()}
    methods, warm = restoration_methods(restorer, restorations, seed), set()
    with tqdm(
        total=len(paths) * len(tasks), initial=done * len(tasks), unit="picture", dynamic_ncols=True
    ) as bar:
        for index, path in list(enumerate(paths))[done:]:
            original = read_original(path)
            reference, scores = Reference(original), {}
            for task in tasks:
                bar.set_postfix_str(f"{path.name}, {task}")
                lq = degrade(original, task, seed, index)
                restored, seconds = run_methods(methods, lq, original.shape[:2], warm)
                scores[task] = {m: reference.score(restored[m]) | {"seconds": seconds[m]} for m in methods}
                bar.update()
            yield {"picture": path.name, "size": original.shape[:2], "scores": scores}


def report(asked: dict, pictures: list[dict], named: dict[str, SamplingConfig]) -> dict:
    """What the JSON file holds: the `settings`, the `rows` and the photographs as of `restorations`."""
    return {"settings": asked, "rows": rows(pictures, asked["tasks"], named), "pictures": pictures}


def rows(pictures: list[dict], tasks: list[str], named: dict[str, SamplingConfig]) -> list[dict]:
    """One row a task and method, from what `restorations` gives: {task, method, sampler, steps, fidelity, numbers}.

    Numbers: those of `scoring.summarise`, but with the median of the seconds, as one stall would move the mean of a few
    pictures. sampler, steps and fidelity of a baseline are None.
    """
    found = []
    for task in tasks:
        scores = [picture["scores"][task] for picture in pictures]
        for method, numbers in summarise(scores).items():
            sampling = asdict(named[method]) if method in named else {}
            row = {"task": task, "method": method}
            row |= {field: sampling.get(field) for field in ("sampler", "steps", "fidelity")} | numbers
            seconds = [score[method]["seconds"] for score in scores if score[method]["seconds"] is not None]
            found.append(row | {"seconds": statistics.median(seconds) if seconds else None})
    return found


def tables(rows: list[dict], count: int) -> str:
    """The rows in Markdown, a table a task. count: photographs."""
    by_task = {}
    for row in rows:
        by_task.setdefault(row["task"], {})[row["method"]] = row
    photographs = f"{count} picture{'s' * (count > 1)}"
    return "\n\n".join(
        f"### {task}: {describe(TASKS[task])}; {photographs}\n\n{table(methods)}"
        for task, methods in by_task.items()
    )
