"""What made a picture: the JSON record beside each result, and what a result and a run differ in.

The record of `NAME.png` is `NAME.png.json`. It names files by what they are called below the folders of the run, never
by where these lie.
"""

import dataclasses
import datetime
import hashlib
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

from zipir_jax.command_line import hardware
from zipir_jax.config import RestorationConfig, TargetConfig
from zipir_jax.photograph import OF_16_BITS, Photograph, output_format

# Settings that change how a result is computed, but not what it shows: it differs by rounding.
HOW = ("attention", "memory")
PARTS = ("input", "output", "settings", "weights", "versions", "seconds")  # of a record, each an object


def settings(
    target: TargetConfig,
    restoration: RestorationConfig,
    seed: int,
    attention: str,
    memory: int | None = None,
    prompt: str | None = None,
    negative_prompt: str | None = None,
) -> dict:
    """The settings of a record. memory: bytes, None where the restorer chose; prompts: None for weights without."""
    return {
        "target": {name: value for name, value in dataclasses.asdict(target).items() if value is not None},
        **dataclasses.asdict(restoration),
        "seed": seed,
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "attention": attention,
        "memory": memory,
    }


def versions() -> dict[str, str]:
    """Of what computes and writes a picture."""
    packages = {package: version(package) for package in ("zipir_jax", "jax", "flax", "pillow")}
    return packages | {"python": platform.python_version()}


def record(
    name: str,
    digest: str,
    photograph: Photograph,
    output: str,
    encoded: bytes,
    result: Photograph,
    settings: dict,
    weights: dict[str, str],
    seconds: dict[str, float],
    not_kept: list[str],
) -> dict:
    """What is written beside a result.

    name, digest, photograph: of the input, its file's sha256 and what was read. output, encoded, result: name, bytes
    and content of the result's file. settings: see `settings`. weights: {"name", "sha256"}. seconds: of each phase.
    not_kept: what the result's file could not hold, as `write_photograph` returns it.
    """
    return {
        "input": {
            "name": name,
            "sha256": digest,
            "format": photograph.file_format,
            **_content(photograph),
            "bits": photograph.bits,
        },
        "output": {
            "name": output,
            "sha256": hashlib.sha256(encoded).hexdigest(),
            "bytes": len(encoded),
            **_content(result),
            "bits": result.bits if output_format(output) in OF_16_BITS else 8,
        },
        "settings": settings,
        "weights": weights,
        "versions": versions(),
        "device": hardware(),
        "seconds": {phase: round(spent, 3) for phase, spent in seconds.items()},
        "not_kept": not_kept,
        "finished": now(),
    }


def now() -> str:
    """The time, in UTC; later ones sort later."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def _content(photograph):
    height, width = photograph.pixels.shape[:2]
    return {"width": width, "height": height}


def as_json(record: dict) -> bytes:
    """In ASCII: names of files need not be Unicode."""
    return (json.dumps(record, indent=2) + "\n").encode()


def record_path(output: Path) -> Path:
    """Where the record of a result stands."""
    return output.with_name(f"{output.name}.json")


def read_record(output: Path) -> dict | None:
    """The record of a result; None where there is none, or another file in its place."""
    try:
        found = json.loads(record_path(output).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    is_record = isinstance(found, dict) and all(isinstance(found.get(part), dict) for part in PARTS)
    if not is_record or not isinstance(found["settings"].get("sampling"), dict):
        return None
    if not isinstance(found.get("finished"), str):
        return None
    if not all(isinstance(spent, int | float) for spent in found["seconds"].values()):
        return None
    sizes = (found[part].get(side) for part in ("input", "output") for side in ("height", "width"))
    return found if all(isinstance(side, int) and side > 0 for side in sizes) else None


def file_digest(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def differences(found: dict, digest: str, settings: dict, weights: dict[str, str], size: tuple) -> list[str]:
    """What a result was made from or with, by its record, where a run has others; [] where it would look alike.

    digest: sha256 of the input. size: (height, width) in pixels of the result that the run would make.
    """
    if found["input"].get("sha256") != digest:
        return ["from another input"]
    if found["weights"].get("sha256") != weights["sha256"]:
        return [f"with other weights ({found['weights'].get('name')})"]
    reasons = []
    there, wanted = _flat(found["settings"]), _flat(settings)
    for name in wanted.keys() & there.keys():  # an older version may not have had them all
        if there[name] != wanted[name]:
            reasons.append(f"with {name.replace('_', ' ')} {_shown(there[name])}, not {_shown(wanted[name])}")
    reasons.sort()
    made = tuple(found["output"].get(side) for side in ("height", "width"))
    if made != size:
        reasons.append(f"with {made[1]} x {made[0]} pixels, not {size[1]} x {size[0]}")
    return reasons


def _flat(settings):
    """What decides how a result looks, by name, as JSON has it; its size is compared in pixels."""
    values = {name: value for name, value in settings.items() if name not in (*HOW, "target", "sampling")}
    return json.loads(json.dumps(values | settings["sampling"]))


def _shown(value):
    return repr(value) if isinstance(value, str | None) else json.dumps(value)


def gives_same_file(found: dict, output: Path, digest: str, settings: dict, weights: dict[str, str]) -> bool:
    """Whether a run would make a result's file anew byte for byte, by its record.

    The file must be the one that the record tells of.
    """
    wanted = {"settings": settings, "weights": weights, "versions": versions()}
    return (
        found["input"].get("sha256") == digest
        and all(found[part] == json.loads(json.dumps(wanted[part])) for part in wanted)
        and found.get("device") == hardware()
        and os.path.isfile(output)
        and found["output"].get("sha256") == file_digest(output)
    )
