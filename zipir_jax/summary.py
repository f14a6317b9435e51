"""What became of a folder's photographs: for a person, and for programs in SUMMARY in the output folder."""

import json
import os
from collections import Counter
from pathlib import Path

from zipir_jax import provenance
from zipir_jax.files import replacing
from zipir_jax.jobs import Job, is_there

SUMMARY = "summary.json"


def check_summary(folder: Path) -> None:
    """Raises ValueError where something else stands in the place of the summary."""
    path = folder / SUMMARY
    if os.path.lexists(path) and _read_summary(path) is None:
        raise ValueError(f"{path}: is no summary of restored photographs; choose another output")


def _read_summary(path):
    """None where there is none, or another file in its place."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("folder"), dict):
        return None
    times = found.get("ended"), found["folder"].get("started")
    return found if all(isinstance(time, str) for time in times) else None


def summarize(folder: Path, jobs: list[Job], counts: dict, ignored: int, unreadable: list[str]) -> dict:
    """What this process did, and what stands in the folder, whoever made it, by its records.

    counts: of `restore_all`. Of processes that shared the folder the last one has seen what became of every picture.
    """
    started = counts["started"]
    earlier = _read_summary(folder / SUMMARY) or {}
    if earlier.get("ended", "") > started:  # of a process that ran at the same time
        started = min(started, earlier["folder"]["started"])
    seconds, done, restored = Counter(), 0, 0
    for output in (output for job in jobs for output in job.outputs):
        if is_there(output):
            done += 1
            found = provenance.read_record(output) or {}
            restored += found.get("finished", "") >= started
            seconds.update(found.get("seconds", {}))
    return {
        **{name: count for name, count in counts.items() if name != "error"},
        "ignored": ignored,
        "unreadable_folders": unreadable,
        "folder": {
            "started": started,  # the first of the processes
            "expected": sum(len(job.outputs) for job in jobs),
            "done": done,
            "restored": restored,  # since then, by all of them
            "seconds": {phase: round(spent, 1) for phase, spent in seconds.items()},
        },
    }


def write_summary(folder: Path, summary: dict) -> None:
    """Raises ValueError as `replacing`."""
    with replacing(folder / SUMMARY) as file:
        file.write(provenance.as_json(summary))


def not_kept_lines(counts: dict) -> list[str]:
    """One for each result of `restore_all` that lacks something of its photograph."""
    return [f"not kept of {each['input']}: {'; '.join(each['reasons'])}" for each in counts["not_kept"]]


def summary_lines(summary: dict) -> list[str]:
    """What a person reads."""
    failed = [f"failed: {each['input']}: {each['reason']}" for each in summary["failed"]]
    failed += [f"failed: {sentence}" for sentence in summary["unreadable_folders"]]
    counts = ", ".join(
        f"{name.replace('_', ' ')} {summary[name]}" for name in ("restored", "kept", "made_by_others")
    )
    return [
        *not_kept_lines(summary),
        *failed,
        f"{counts}, failed {len(failed)}; {summary['seconds']:.1f} s, {summary['pictures_per_minute']:.1f} pictures a "
        f"minute; {summary['folder']['done']} of {summary['folder']['expected']} are there",
    ]
