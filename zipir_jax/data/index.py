"""`prepare index`: look at every image of a collection once (scan.py), drop those that training is better off without,
and write the others as shards (shards.py).

The output folder holds, beside the shards and their index,

    scan.jsonl     what was measured of each image
    plan.json      says which images the shards that are already there hold
    dropped.csv    each image that was dropped, the rule, what was measured, the limit, and of what it is a duplicate
    report.txt     how many were dropped by which rule

What is written depends on the images and the rules alone: not on the number of processes, nor on how often the run was
killed. Other rules on the same output use its scan and write its shards anew.
"""

import contextlib
import csv
import dataclasses
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int64, UInt8
from tqdm import tqdm

from zipir_jax.config import IndexConfig
from zipir_jax.data.duplicates import first_of_equals, near_duplicates
from zipir_jax.data.quality import HASH_SIDE, REFERENCE_QUALITY
from zipir_jax.data.records import FORMAT, ShardWriter, read_index, shard_entry, shard_name, write_index_file
from zipir_jax.data.scan import Collection, Scan, in_order, json_line, scan_collection
from zipir_jax.data.shards import INDEX_FILE, SCAN_FILE, SIZES_FILE, ShardSource
from zipir_jax.files import replacing

PLAN_FILE, DROPPED_FILE, REPORT_FILE = "plan.json", "dropped.csv", "report.txt"
OWN_FILES = re.compile(
    r"(index\.json|sizes\.npy|scan\.jsonl|plan\.json|dropped\.csv|report\.txt|shard-\d{5,}\.array_record)"
)
# What a killed run leaves: files that `replacing` had not put in their place yet, and unfinished shards.
TEMPORARY_FILES = re.compile(rf"\.{OWN_FILES.pattern}\.([0-9a-f]{{8}}|partial)")

KEPT, DAMAGED, SMALL, ELONGATED, FLAT, BLURRED, COMPRESSED, EXACT, NEAR = range(9)


def write_index(specs: tuple[str, ...], output: Path, rules: IndexConfig, workers: int) -> str:
    """Scan the collection that the specs name, drop what the rules say, and write the rest as shards into `output`.

    specs: folders of images, folders of shards, `tfds:NAME[:SPLIT]`. workers: processes; 0 = this one. Returns the
    report. Raises ValueError for a spec that cannot be opened, an output folder that holds something else or is being
    written by another run, images that change meanwhile, or where no image is kept.
    """
    collection = Collection(specs)
    output = Path(output)
    with _locked(output):
        _check_output(output)
        scan_collection(collection, output, workers)
        scan = Scan(output / SCAN_FILE, len(collection))
        choice = choose(scan, rules)
        if not (choice.reason == KEPT).any():
            (output / INDEX_FILE).unlink(missing_ok=True)  # of other rules
            _write_dropped(output, scan, choice, rules)
            raise ValueError(
                f"{output}: the rules drop all {len(collection)} images; see {DROPPED_FILE} there"
            )
        shards = _plan(scan, choice, rules)
        plan = _plan_digest(scan, shards)
        if _finished(output, plan, rules):
            return (output / REPORT_FILE).read_text()
        _start_plan(output, plan)
        _write_shards(collection, output, scan, shards, workers)
        _write_dropped(output, scan, choice, rules)
        report = _report(specs, scan, choice, rules, shards)
        with replacing(output / REPORT_FILE) as file:
            file.write(report.encode())
        _write_index_files(output, scan, shards, rules)
    return report


# --------------------------------------------------------------------------------------------------
# The rules
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which rule drops each of n images: the first of those that would.

    reason: KEPT or another of the constants. measured: the number that was wrong; NaN for what is kept or damaged. of:
    the image that a duplicate is one of; -1 for the others.
    """

    reason: UInt8[np.ndarray, " n"]
    measured: Float32[np.ndarray, " n"]
    of: Int64[np.ndarray, " n"]


def choose(scan: Scan, rules: IndexConfig) -> Choice:
    """Apply the rules: first those that look at one image, then the two that compare it with what these have left."""
    short, long = scan.sizes.min(axis=1), scan.sizes.max(axis=1)
    aspect = long / np.maximum(short, 1)
    reason = np.zeros(len(scan), np.uint8)
    measured = np.full(len(scan), np.nan, np.float32)
    of = np.full(len(scan), -1)
    for rule, wrong, number in [
        (DAMAGED, ~scan.decoded, measured),
        (SMALL, short < rules.shortest_side, short),
        (ELONGATED, aspect > rules.longest_aspect, aspect),
        (FLAT, scan.contrast < rules.contrast, scan.contrast),
        (BLURRED, scan.sharpness < rules.sharpness, scan.sharpness),
        (COMPRESSED, scan.compression < rules.compression, scan.compression),
    ]:
        new = wrong & (reason == KEPT)
        reason[new], measured[new] = rule, number[new]

    if rules.exact_duplicates:
        left = np.flatnonzero(reason == KEPT)
        first = left[first_of_equals(scan.sha256[left])]
        copies = left[first != left]
        reason[copies], measured[copies], of[copies] = EXACT, 0, first[first != left]
    if rules.near_duplicate_bits >= 0:
        left = np.flatnonzero(reason == KEPT)
        pixels = scan.sizes[left].astype(np.int64).prod(axis=1)
        best_first = np.lexsort(
            (left, -scan.bytes[left], -pixels)
        )  # most pixels, then most bytes, then the first
        rank = np.empty(len(left), np.int64)
        rank[best_first] = np.arange(len(left))
        near, distance = near_duplicates(scan.hashes[left], rank, rules.near_duplicate_bits)
        copies = near >= 0
        reason[left[copies]], measured[left[copies]] = NEAR, distance[copies]
        of[left[copies]] = left[near[copies]]
        # An exact duplicate of what has just been dropped is a near duplicate of the same image.
        chained = np.flatnonzero((reason == EXACT) & (reason[of] == NEAR))
        reason[chained], measured[chained], of[chained] = NEAR, measured[of[chained]], of[of[chained]]
    return Choice(reason, measured, of)


# --------------------------------------------------------------------------------------------------
# What is written
# --------------------------------------------------------------------------------------------------


def _plan(scan, choice, rules):
    """The numbers of the images in each shard."""
    shards, room = [], 0
    for index in np.flatnonzero(choice.reason == KEPT).tolist():
        size = int(scan.bytes[index])
        if not shards or size > room:
            shards.append([])
            room = rules.shard_mib * 2**20
        shards[-1].append(index)
        room -= size
    return shards


def _plan_digest(scan, shards):
    digest = hashlib.sha256(repr((FORMAT, list(map(len, shards)))).encode())
    for shard in shards:
        digest.update(scan.sha256[shard].tobytes())
        digest.update(np.array(shard, np.int64).tobytes())
    return digest.hexdigest()


def _has_plan(output, plan):
    try:
        return json.loads((output / PLAN_FILE).read_bytes()) == {"plan": plan}
    except (OSError, ValueError):
        return False


def _finished(output, plan, rules):
    """Whether the output is whole, and of this plan and these rules."""
    try:
        ShardSource(output)
        same_rules = read_index(output / INDEX_FILE)["rules"] == dataclasses.asdict(rules)
    except ValueError:
        return False
    there = all((output / name).is_file() for name in (REPORT_FILE, DROPPED_FILE))
    return there and same_rules and _has_plan(output, plan)


def _start_plan(output, plan):
    """Delete the shards of another plan. Without an index, nobody takes what is left for a finished one."""
    (output / INDEX_FILE).unlink(missing_ok=True)
    if _has_plan(output, plan):
        return
    for path in output.glob("shard-*.array_record"):
        path.unlink()
    with replacing(output / PLAN_FILE) as file:
        file.write(json_line({"plan": plan}))


def _write_shards(collection, output, scan, shards, workers):
    def missing():
        for number, shard in enumerate(shards):
            if not (output / shard_name(number)).exists():
                lines = [scan.line(index) for index in shard]
                entries = [
                    (index, line["sha256"], line["caption"], line["name"])
                    for index, line in zip(shard, lines, strict=True)
                ]
                yield output / shard_name(number), entries

    there = sum((output / shard_name(number)).exists() for number in range(len(shards)))
    with tqdm(desc="write", unit="shard", total=len(shards), initial=there, dynamic_ncols=True) as progress:
        for _ in in_order(_write_shard, missing(), collection, workers):
            progress.update()


def _write_shard(collection, path, entries):
    writer = ShardWriter(path)
    for index, sha256, caption, name in entries:
        data = collection.encoded(index)
        if hashlib.sha256(data).hexdigest() != sha256:
            raise ValueError(
                f"{name}: has changed since it was scanned; delete {path.parent} and index the images anew"
            )
        writer.write({"image": data, "caption": caption, "name": name})
    writer.close()


def _write_index_files(output, scan, shards, rules):
    kept = np.concatenate(shards)
    with replacing(output / SIZES_FILE) as file:
        np.save(file, scan.sizes[kept])
    files = [output / shard_name(number) for number in range(len(shards))]
    description = {
        "images": len(kept),
        "digest": hashlib.sha256(scan.sha256[kept].tobytes()).hexdigest()[:12],
        "rules": dataclasses.asdict(rules),
    }
    entries = [shard_entry(file, len(shard)) for file, shard in zip(files, shards, strict=True)]
    write_index_file(output / INDEX_FILE, description, entries)


def _rule_texts(rules):
    """For each reason its name and its limit."""
    return {
        DAMAGED: ("undecodable", ""),
        SMALL: ("short side too short", f"at least {rules.shortest_side} pixels"),
        ELONGATED: ("too elongated", f"at most {rules.longest_aspect:g} : 1"),
        FLAT: ("too little contrast", f"at least {rules.contrast:g} levels"),
        BLURRED: ("too blurred", f"at least {rules.sharpness:g}"),
        COMPRESSED: (
            "too strongly compressed",
            f"at least {rules.compression:g} of JPEG quality {REFERENCE_QUALITY}",
        ),
        EXACT: ("exact duplicate", ""),
        NEAR: ("near duplicate", f"at most {rules.near_duplicate_bits} of {HASH_SIDE**2} bits"),
    }


def _write_dropped(output, scan, choice, rules):
    texts = _rule_texts(rules)
    with replacing(output / DROPPED_FILE) as file:
        text = io.TextIOWrapper(file, "utf-8", newline="")
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["image", "rule", "measured", "limit", "duplicate of"])
        for index in np.flatnonzero(choice.reason != KEPT).tolist():
            line, number = scan.line(index), choice.measured[index]
            rule, limit = texts[choice.reason[index]]
            measured = line["error"] if choice.reason[index] == DAMAGED else f"{number:.4g}"
            of = int(choice.of[index])
            of = scan.line(of)["name"] if of >= 0 else ""
            table.writerow([line["name"], rule, measured, limit, of])
        text.flush()
        text.detach()


def _report(specs, scan, choice, rules, shards):
    kept = np.concatenate(shards)
    lines = [
        f"{len(scan)} images of {', '.join(specs)}",
        f"{len(kept):8d} kept: {scan.bytes[kept].sum() / 2**20:.1f} MiB in {len(shards)} "
        f"shard{'s' * (len(shards) > 1)}",
    ]
    for reason, (rule, limit) in _rule_texts(rules).items():
        count = np.count_nonzero(choice.reason == reason)
        lines.append(f"{count:8d} dropped: {rule}" + (f" (limit: {limit})" if limit else ""))
    if scan.broken_captions:
        lines.append(
            f"{len(scan.broken_captions)} captions cannot be read, the first: {scan.broken_captions[0]}"
        )
    return "\n".join(lines) + "\n"


# --------------------------------------------------------------------------------------------------
# The output folder
# --------------------------------------------------------------------------------------------------


def _check_output(output):
    """Delete what a killed run left half written; refuse a folder that holds anything that is not ours."""
    names = sorted(os.listdir(output))
    temporary = [name for name in names if TEMPORARY_FILES.fullmatch(name)]
    own = [name for name in names if OWN_FILES.fullmatch(name)] if SCAN_FILE in names else []
    strange = sorted(set(names) - set(temporary) - set(own))
    if strange:
        raise ValueError(f"{output}: holds {strange[0]}, which no indexing left there; choose another output")
    for name in temporary:
        (output / name).unlink()


@contextlib.contextmanager
def _locked(output) -> Iterator[None]:
    """Make the folder, and let no other run write into it."""
    import fcntl  # absent on Windows, where the rest of prepare should go on working

    try:
        output.mkdir(parents=True, exist_ok=True)
        folder = os.open(output, os.O_RDONLY)
    except OSError as error:
        raise ValueError(f"{output}: cannot be written to ({error.strerror})") from None
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ValueError(f"{output}: another run is writing there") from None
    finally:
        os.close(folder)
