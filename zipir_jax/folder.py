"""Photographs of a folder, one after the other: what is to be made, who makes it, what stands on the disk meanwhile.

A result stands there whole or not at all, and never without its own record (provenance.py), which takes its place just
before it, when the result of an earlier run is gone already: a run that is killed leaves at most a record alone, which
the next run writes again. So a result that exists is done.

Processes, on one host or several, that are given the same folders share the work. Each picture is claimed by a lock on
a file in LOCKS in the output folder, which the kernel releases when its holder ends, however it ends. This needs a file
system with flock: any local one, NFS 4, and most cluster file systems.

Three pictures are in memory at most: one is read ahead and enlarged while another is restored, and a third gets its
colours and is written. The device waits for neither.
"""

import concurrent.futures
import contextlib
import dataclasses
import errno
import hashlib
import io
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from zipir_jax import comparison, provenance
from zipir_jax.colour import correct_colour
from zipir_jax.config import RestorationConfig, TargetConfig
from zipir_jax.files import DiskFullError, check_replaceable, check_writable, remove_unfinished, replacing
from zipir_jax.imageio import IMAGE_SUFFIXES, distinct_names, resize, upright_size, visible_files
from zipir_jax.photograph import (
    OUTPUT_FORMATS,
    Photograph,
    check_output,
    output_format,
    read_photograph,
    write_photograph,
)

EXISTS = "exists already; use --overwrite to replace it"
LOCKS = ".zipir_jax"
SUMMARY = "summary.json"
LONGEST_NAME = 255  # bytes, of nearly all file systems
# That records, and the temporary files of `files.replacing`, add to a result's name.
LONGEST_ENDING = len(".") + len(".json") + len(".12345678")
CRASHES = 2  # of processes that read a photograph, after which it is read no more
POLL = 0.5  # seconds between looks at pictures that other processes hold


@dataclasses.dataclass(frozen=True)
class Job:
    """A photograph, and the files that are made of it."""

    source: Path
    name: str  # of the source, below the input folder
    outputs: tuple[Path, ...]  # one for each seed
    comparisons: tuple[Path, ...] = ()  # one for each output, or none


# --------------------------------------------------------------------------------------------------
# What is to be made
# --------------------------------------------------------------------------------------------------


def plan_jobs(
    input: Path, output: Path, file_format: str, samples: int = 1, compare: str | None = None
) -> tuple[list[Job], int, list[str]]:
    """A job for each picture, the number of files that are none, and a sentence for each folder that cannot be read.

    file_format: suffix, without its dot, of outputs that `output` does not name, or "same" for the input's where it can
    be written. samples: outputs of each picture. compare: see `comparison_path`. Raises ValueError if there is no
    picture, or the output cannot be.
    """
    if input.is_dir():
        if output.is_file():
            raise ValueError(f"{output} is a file, but {input} is a folder: its results need a folder")
        sources, ignored, unreadable = find_photographs(input, output)
        if not sources:
            raise ValueError(f"{input} holds no images")
        outputs = _mirrored(sources, input, output, file_format)
    else:
        if not input.exists():
            raise ValueError(f"{input}: no such file or folder")
        sources, ignored, unreadable = [input], 0, []
        if output.is_dir() or not output.suffix:
            outputs = [output / f"{input.stem}{_suffix(input, file_format)}"]
        else:
            outputs = [output]
    for path in outputs:
        output_format(path)  # refused here where it cannot be written
    jobs = []
    for source, path in zip(sources, outputs, strict=True):
        numbered = [path]
        if samples > 1:
            numbered = [path.with_name(f"{path.stem}_{i}{path.suffix}") for i in range(1, samples + 1)]
        comparisons = () if compare is None else tuple(comparison_path(each, compare) for each in numbered)
        name = source.relative_to(input).as_posix() if input.is_dir() else source.name
        jobs.append(Job(source, name, tuple(numbered), comparisons))
    return jobs, ignored, unreadable


def find_photographs(folder: Path, output: Path) -> tuple[list[Path], int, list[str]]:
    """The pictures, by suffix, of a folder and those below it, sorted; how many files are none; what cannot be read.

    Of the files that `imageio.visible_files` finds, what lies in the output folder is no input; where the input folder
    lies in the output folder, this is said of results alone, which have records.
    """
    results = os.path.realpath(output)
    is_within = Path(os.path.realpath(folder)).is_relative_to(results)
    paths, ignored, unreadable = [], 0, []

    def complain(error):
        unreadable.append(f"{error.filename}: cannot be read ({error.strerror})")

    for visible in visible_files(folder, results, complain):
        made = _made_files(visible) if is_within else set()
        pictures = [path for path in visible if path.suffix.lower() in IMAGE_SUFFIXES]
        ignored += len(visible) - len(pictures)
        paths += [path for path in pictures if path not in made]
    return sorted(paths), ignored, unreadable


def _made_files(files):
    """Those of the files of one folder that are results, or comparisons of them."""
    made = set()
    for path in files:
        if path.suffix == ".json" and provenance.read_record(result := path.with_suffix("")) is not None:
            made |= {result, *(comparison_path(result, compare) for compare in comparison.ENDINGS)}
    return made


def _mirrored(sources, input, output, file_format):
    """An output for each source, in the place that the source has in its folder."""
    by_folder, outputs = {}, {}
    for source in sources:
        by_folder.setdefault(source.parent, []).append(source)
    for folder, paths in by_folder.items():
        for source, name in zip(paths, distinct_names(paths), strict=True):
            outputs[source] = output / folder.relative_to(input) / f"{name}{_suffix(source, file_format)}"
    folders = {parent for path in outputs.values() for parent in path.parents}
    for source, path in outputs.items():
        if path in folders:  # beside a.jpg is a folder a.png
            outputs[source] = path.with_name(f"{source.name}{path.suffix}")
    return [outputs[source] for source in sources]


def _suffix(source, file_format):
    if file_format != "same":
        return f".{file_format}"
    return source.suffix if source.suffix.lower() in OUTPUT_FORMATS else ".png"


def comparison_path(output: Path, compare: str) -> Path:
    """Where the comparison of a result stands; compare: "side-by-side" for a picture, "slider" for a page of HTML."""
    ending = comparison.ENDINGS[compare]
    if ending == ".png" and output.suffix.lower() in (".jpg", ".jpeg"):
        ending = ".jpg"
    return output.with_name(f"{output.stem}_compare{ending}")


def check_outputs(jobs: list[Job], may_exist: bool) -> None:
    """Raises ValueError for a file that would be an input or two results, exists and may not, or cannot be written.

    Nothing is written: a refused run leaves no folders behind.
    """
    inputs = {_identity(job.source) for job in jobs if os.path.exists(job.source)}
    written = Counter(path for job in jobs for path in (*job.outputs, *job.comparisons))
    for path, count in written.items():
        if count > 1:
            raise ValueError(f"{path}: would be two results at once; rename the input that is called like it")
        if not os.path.exists(path):
            continue
        # With --overwrite as well: a photograph that its restoration replaced could not be had again.
        if _identity(path) in inputs:
            raise ValueError(f"{path}: the output would replace an input; choose another output")
        if not may_exist:
            raise ValueError(f"{path}: {EXISTS}")
    for folder in {path.parent for path in written}:
        check_writable(folder)


def _identity(path):
    """Equal for two paths of the same file, through links and any spelling of the name."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


# --------------------------------------------------------------------------------------------------
# The queue
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """What the pictures of a run share."""

    restorer: object  # Restorer; not by name, as importing jax takes seconds that planning need not wait
    weights: dict[str, str]  # {"name", "sha256"}
    target: TargetConfig
    restoration: RestorationConfig
    seed: int  # of the first output of each picture; the next has the next
    memory: int | None  # bytes; None: the restorer's own choice
    compare: str | None
    prompts: dict[Path, tuple[str, str] | None]  # of each source, prompt and negative prompt
    embeddings: dict[str, np.ndarray]  # of the prompts of all sources that may have to be restored
    skip_existing: bool = False
    overwrite: bool = False
    locks: Path | None = None  # folder; None: nobody shares the work

    def settings(self, job: Job, index: int) -> dict:
        """As in the record of an output."""
        return provenance.settings(
            self.target,
            self.restoration,
            self.seed + index,
            self.restorer.config.dit.attention,
            self.memory,
            *(self.prompts[job.source] or ()),
        )

    def texts(self, job: Job) -> dict:
        """What `Restorer.restore` takes as {"text", "negative_text"}; {} for weights without text."""
        words = self.prompts[job.source] or ()
        if not all(prompt in self.embeddings for prompt in words):
            raise ValueError("its result was there when the run began and is gone; run again")
        return dict(zip(("text", "negative_text"), map(self.embeddings.get, words), strict=False))


@dataclasses.dataclass(frozen=True, eq=False)
class Taken:
    """A job that this process has taken, with the photograph, where one of its outputs is to be made."""

    job: Job
    settled: dict[int, tuple[str, str]]  # outputs that are not to be made: index -> (what they count as, why)
    lock: FileLock | None = None
    photograph: Photograph | None = None
    enlarged: np.ndarray | None = None  # float32 [h, w, 3], its pixels in the size of the result
    source: dict = dataclasses.field(default_factory=dict)  # the file: {"sha256", "bytes", "mtime_ns"}
    seconds: float = 0.0  # that reading and enlarging took


class StoppedError(Exception):
    """Ends a restoration that is not wanted any more."""


def restore_all(
    run: Run,
    jobs: list[Job],
    stopped: list,
    report: Callable[[str, float, str], None] = lambda name, done, phase: None,
    complain: Callable[[str], None] = lambda sentence: None,
) -> dict:
    """Make the outputs of all jobs that do not stand; what was restored, kept, failed and made by others, and when.

    stopped: ends the run once it is not empty; what is being written is finished, the picture in work dropped. report
    is told a picture's name, how many outputs are done, the parts of one among them, and the phase; complain, each
    failure. Raises DiskFullError where no further picture could be written.
    """
    from zipir_jax.restorer import PHASES

    counts = Counter()
    failed, not_kept, reached = [], [], 0
    before = {path: _state(path) for job in jobs for path in job.outputs}
    over = threading.Event()
    start, started = time.monotonic(), provenance.now()

    def tell(name, done, phase):
        """A picture that waits to be written is done already: it does not count less when another is settled."""
        nonlocal reached
        reached = max(reached, done)
        report(name, reached, phase)

    def settle(job, index, kind, reason=""):
        counts[kind] += 1
        if kind == "failed":
            # The summary does not say where the folders lie.
            folder = job.outputs[index].parent
            reason = reason.removeprefix(f"{job.source}: ").replace(f"{folder}{os.sep}", "")
            failed.append((job, index, reason))
            complain(f"{job.source}: {reason}")
        tell(job.name, counts.total(), "")

    def settle_written():
        """Wait for what is being written."""
        while writing:
            job, index, future = writing.pop()
            try:
                lost = future.result()
            except DiskFullError:
                settle(job, index, "failed", "the disk is full")
                raise
            except (ValueError, OSError, MemoryError) as error:
                settle(job, index, "failed", str(error) or "the memory does not hold it")
            except Exception as error:  # an encoder's; the others go on
                settle(job, index, "failed", f"{type(error).__name__}: {error}".partition("\n")[0])
            else:
                settle(job, index, "restored")
                if lost:
                    not_kept.append({"input": job.name, "output": job.outputs[index].name, "reasons": lost})

    def arrived():
        """The picture that was read ahead; nobody is told late of one that was written while it is waited for."""
        if writing:
            futures = (ahead, writing[0][2])
            concurrent.futures.wait(futures, return_when=concurrent.futures.FIRST_COMPLETED)
            if not ahead.done():
                settle_written()
        return ahead.result()

    def restore(taken, index):
        """float32 pixels, their colours not corrected, and the seconds of each phase."""
        began, seconds = {}, {}

        def progress(phase, done):
            if stopped:
                raise StoppedError
            now = time.monotonic()
            began.setdefault(phase, now)
            seconds[phase] = now - began[phase]
            share = (PHASES.index(phase) + done) / len(PHASES)
            tell(taken.job.name, counts.total() + len(writing) + share, phase)

        restored = run.restorer.restore(
            taken.enlarged,
            size=taken.enlarged.shape[:2],
            sampling=run.restoration.sampling,
            seed=run.seed + index,
            memory=run.memory,
            progress=progress,
            **run.texts(taken.job),
        )
        return restored, {"read": taken.seconds, **seconds}

    writing = []  # (job, index, future) of what is being written, one at most
    with (
        concurrent.futures.ThreadPoolExecutor(1, "read") as reader,
        concurrent.futures.ThreadPoolExecutor(1, "write") as writer,
    ):
        queue = take_all(run, jobs, before, lambda: over.is_set() or stopped)
        ahead = reader.submit(next, queue, None)
        try:
            while (taken := arrived()) is not None:
                ahead = reader.submit(next, queue, None)
                try:
                    for index, (kind, reason) in taken.settled.items():
                        settle(taken.job, index, kind, reason)
                    for index in range(len(taken.job.outputs)):
                        if index in taken.settled:
                            continue
                        try:
                            restored, seconds = restore(taken, index)
                        except ValueError as error:
                            settle(taken.job, index, "failed", str(error))
                            continue
                        except (RuntimeError, MemoryError) as error:  # the device's, of this picture
                            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
                            settle(taken.job, index, "failed", reason)
                            continue
                        settle_written()
                        future = writer.submit(write_output, run, taken, index, restored, seconds)
                        writing.append((taken.job, index, future))
                        del restored
                finally:
                    writer.submit(_release, taken)  # after what is being written of it
                del taken
            settle_written()
        except StoppedError:
            settle_written()
        finally:
            over.set()
            with contextlib.suppress(Exception):
                _release(ahead.result())
    if run.locks is not None:
        with contextlib.suppress(OSError):  # where others hold some
            run.locks.rmdir()
    remaining = [each for each in failed if not _made_meanwhile(run, *each[:2], before)]
    seconds = time.monotonic() - start
    return {
        "restored": counts["restored"],
        "kept": counts["kept"],
        "made_by_others": counts["made_by_others"] + len(failed) - len(remaining),
        "failed": [
            {"input": job.name, "output": job.outputs[index].name, "reason": reason}
            for job, index, reason in remaining
        ],
        "not_kept": not_kept,
        "started": started,
        "ended": provenance.now(),
        "seconds": round(seconds, 1),
        "pictures_per_minute": round(60 * counts["restored"] / seconds, 2),
    }


def take_all(
    run: Run, jobs: list[Job], before: dict[Path, object], is_over: Callable[[], object]
) -> Iterator[Taken]:
    """The jobs, as far as this process gets hold of them; at last those that other processes leave undone.

    before: `_state` of all outputs as the run began.
    """
    remaining = jobs
    while remaining:
        held = []
        for job in remaining:
            if is_over():
                return
            taken = _take(run, job, before)
            if taken is None:
                held.append(job)
            else:
                yield taken
                del taken
        if len(held) == len(remaining):
            time.sleep(POLL)
        remaining = held


def _take(run, job, before):
    """A Taken; None for a job that another process holds."""
    settled, lock = {}, None
    try:
        _check_source(job)
        if not run.overwrite:
            settled = _settled(run, job, before)
    except (ValueError, OSError) as error:
        return _failed(job, error)
    was_claimed = run.locks is not None and _lock_file(run.locks, job).exists()
    if len(settled) == len(job.outputs) and not was_claimed:
        return Taken(job, settled)
    if run.locks is not None and (lock := _claim(run.locks, job)) is None:
        return None
    try:
        if was_claimed:  # by a process that was killed, as a release removes the file
            for path in (*job.outputs, *job.comparisons, *map(provenance.record_path, job.outputs)):
                remove_unfinished(path)
        # Again: another process may have made it between the look and the claim.
        settled = _settled(run, job, before)
        if len(settled) == len(job.outputs):
            return Taken(job, settled, lock)
        with _attempt(job, lock):
            return _read(run, job, settled, lock)
    except (ValueError, OSError, MemoryError) as error:
        return _failed(job, error, settled, lock)


def _failed(job, error, settled=None, lock=None):
    if isinstance(error, OSError):
        reason = f"cannot be read ({error.strerror})"
    else:
        reason = str(error) or "the image does not fit into memory"
    return Taken(job, dict.fromkeys(range(len(job.outputs)), ("failed", reason)) | (settled or {}), lock)


def _check_source(job):
    if not job.source.is_file():  # a pipe would be waited for
        kind = "a link to nothing" if os.path.lexists(job.source) else "no such file"
        raise ValueError(f"{job.source}: {'not a regular file' if os.path.exists(job.source) else kind}")
    for path in (*job.outputs, *job.comparisons):
        excess = len(os.fsencode(path.name)) + LONGEST_ENDING - LONGEST_NAME
        if excess > 0:
            raise ValueError(f"{job.source}: its name is {excess} bytes too long for a result and its record")


def _settled(run, job, before):
    """What outputs that stand count as: index -> (kind, reason); an output that is not in it is to be made."""
    settled = {}
    for index, output in enumerate(job.outputs):
        state = _state(output)
        if state is None:
            continue
        is_new = state != before[output]
        found = provenance.read_record(output)
        settings = run.settings(job, index)
        if run.overwrite and not is_new:
            if found and provenance.gives_same_file(
                found, output, _source_digest(job, found), settings, run.weights
            ):
                settled[index] = "kept", ""
        elif not (run.skip_existing or is_new):
            settled[index] = "failed", f"{output.name}: {EXISTS}"
        elif found is None:
            settled[index] = "made_by_others" if is_new else "kept", ""
        else:
            size = target_of(run, (found["input"]["height"], found["input"]["width"]))
            reasons = provenance.differences(found, _source_digest(job, found), settings, run.weights, size)
            if not reasons and found["output"].get("bytes") != os.path.getsize(output):
                reasons = ["by somebody else since its record was written"]
            if reasons:
                settled[index] = (
                    "failed",
                    f"{output.name}: made {', '.join(reasons)}; --overwrite replaces it",
                )
            else:
                settled[index] = "made_by_others" if is_new else "kept", ""
    return settled


def _made_meanwhile(run, job, index, before):
    """Whether an output that this process failed at was made by another one."""
    try:
        return _settled(run, job, before).get(index) == ("made_by_others", "")
    except (ValueError, OSError):  # the photograph is gone
        return False


def _source_digest(job, found):
    """sha256 of the source; a file of the size and time of change that a record tells of is not read again for it."""
    there, status = found["input"], os.stat(job.source)
    if (there.get("bytes"), there.get("mtime_ns")) == (status.st_size, status.st_mtime_ns):
        return there.get("sha256")
    return provenance.file_digest(job.source)


def target_of(run: Run, size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of the result of a photograph of this size. Raises ValueError as `target_pixels`."""
    from zipir_jax.restorer import target_pixels

    return target_pixels(run.target, size)


def _lock_file(locks, job):
    return locks / f"{hashlib.sha256(os.fsencode(job.name)).hexdigest()[:32]}.lock"


def _claim(locks, job):
    """A lock that this process holds, or None where another does."""
    # Without flock a lock would be a file that a killed process leaves behind for good.
    lock = FileLock(_lock_file(locks, job), thread_local=False, fallback_to_soft=False)
    while True:
        try:
            locks.mkdir(parents=True, exist_ok=True)
            lock.acquire(blocking=False)
        except Timeout:
            return None
        except OSError as error:
            # Another process was through and removed the folder, between two system calls; or, on NFS, the file.
            if error.errno in (errno.ENOENT, errno.EEXIST, errno.ESTALE) and not locks.is_file():
                continue
            raise ValueError(f"{locks}: files cannot be locked here ({error.strerror})") from None
        return lock


def _release(taken):
    """Give a claim up, and its file with it: FileLock takes no lock on a file that has lost its name meanwhile."""
    if taken is None or taken.lock is None:
        return
    Path(taken.lock.lock_file).unlink(missing_ok=True)
    taken.lock.release()


@contextlib.contextmanager
def _attempt(job, lock):
    """Within it, a photograph is read. Raises ValueError where that ended CRASHES processes before.

    A decoder that crashes takes the process along, and would do so in each run. What stays is the file beside the
    claim, with a line for each time that the photograph, as it is now, was begun with.
    """
    if lock is None:
        yield
        return
    begun, status = Path(lock.lock_file).with_suffix(".begun"), os.stat(job.source)
    photograph = f"{status.st_size} bytes, changed at {status.st_mtime_ns}"
    lines = begun.read_text().splitlines() if begun.exists() else []
    if lines.count(photograph) >= CRASHES:
        raise ValueError(
            f"{job.source}: reading it ended the program {CRASHES} times; it is tried again once {LOCKS} is deleted"
        )
    begun.write_text("\n".join([*lines, photograph]))
    try:
        yield
    finally:
        begun.unlink()


def _read(run, job, settled, lock):
    """Whether it can be restored is known from the header: nobody waits for pixels that are then refused."""
    start = time.monotonic()
    size = upright_size(job.source)
    target = target_of(run, size)
    for index, output in enumerate(job.outputs):
        if index not in settled:
            check_output(output, target)
            check_replaceable(output)
            record = provenance.record_path(output)
            if os.path.lexists(record) and not run.overwrite and provenance.read_record(output) is None:
                raise ValueError(f"{record.name}: exists already and is no record of a result")
    _plan(run, job, size, target)
    with job.source.open("rb") as file:
        changed, data = os.fstat(file.fileno()).st_mtime_ns, file.read()
    photograph = read_photograph(job.source, data)
    # The file may have been replaced since its header was read.
    enlarged = resize(photograph.pixels, *target_of(run, photograph.pixels.shape[:2]))
    source = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data), "mtime_ns": changed}
    return Taken(job, settled, lock, photograph, enlarged, source, time.monotonic() - start)


def plan_lines(run: Run, job: Job) -> list[str]:
    """How `restore_all` would make the outputs of a job that do not stand. Raises ValueError where it would not."""
    _check_source(job)
    before = {path: _state(path) for path in job.outputs}
    settled = _settled(run, job, before)
    kinds = dict(settled.values())
    if "failed" in kinds:
        raise ValueError(f"{job.source}: {kinds['failed']}")
    if len(settled) == len(job.outputs):
        return ["is kept"]
    size = upright_size(job.source)
    target = target_of(run, size)
    for output in job.outputs:
        check_output(output, target)
    return _plan(run, job, size, target).lines()


def _plan(run, job, size, target):
    sampling, memory = run.restoration.sampling, run.memory
    try:
        return run.restorer.plan((*size, 3), size=target, sampling=sampling, memory=memory, **run.texts(job))
    except ValueError as error:  # the restorer knows no files
        raise ValueError(f"{job.source}: {error}") from None


def write_output(
    run: Run, taken: Taken, index: int, restored: np.ndarray, seconds: dict[str, float]
) -> list[str]:
    """Write result, comparison and record; what the result's file could not keep, as `write_photograph` says it."""
    job, photograph, output = taken.job, taken.photograph, taken.job.outputs[index]
    start = time.monotonic()
    restored = correct_colour(restored, taken.enlarged, run.restoration.colour_correction)
    result = photograph.with_pixels(restored)
    encoded = io.BytesIO()
    not_kept = write_photograph(encoded, result, output_format(output))
    seconds = seconds | {"write": time.monotonic() - start}
    record = provenance.record(
        job.name,
        taken.source["sha256"],
        photograph,
        output.name,
        encoded.getbuffer(),
        result,
        run.settings(job, index),
        run.weights,
        seconds,
        not_kept,
    )
    record["input"] |= taken.source
    contents = {output: encoded.getbuffer()}
    if run.compare is not None:
        contents[job.comparisons[index]] = _comparison(run, job, index, taken.enlarged, result.pixels)
    contents[provenance.record_path(output)] = provenance.as_json(record)
    with contextlib.ExitStack() as stack:
        for path, content in contents.items():
            file = stack.enter_context(replacing(path))
            file.write(content)
            file.flush()
        # All is on the disk, and takes its place in reverse order: the result, whose being there says that all is done,
        # comes last. One that stood there goes first: it never stands beside the record of another.
        Path(os.path.realpath(output)).unlink(missing_ok=True)
    return not_kept


def _comparison(run, job, index, before, after):
    """The bytes of its file."""
    if run.compare == "slider":
        return comparison.slider_html(before, after, job.name).encode()
    encoded = io.BytesIO()
    both = Photograph(comparison.side_by_side(before, after))
    write_photograph(encoded, both, output_format(job.comparisons[index]))
    return encoded.getbuffer()


def _state(path):
    """Changes when a file is replaced; None where there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns


# --------------------------------------------------------------------------------------------------
# The summary
# --------------------------------------------------------------------------------------------------


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
    return found if isinstance(found, dict) and isinstance(found.get("folder"), dict) else None


def write_summary(folder: Path, jobs: list[Job], counts: dict, ignored: int, unreadable: list[str]) -> dict:
    """Write what this process did, and what stands in the folder, whoever made it, by its records; returns it.

    counts: of `restore_all`. Of processes that shared the folder the last one has seen what became of every picture.
    """
    path = folder / SUMMARY
    started = counts["started"]
    earlier = _read_summary(path) or {}
    if earlier.get("ended", "") > started:  # of a process that ran at the same time
        started = min(started, earlier["folder"]["started"])
    seconds, done, restored = Counter(), 0, 0
    for output in (output for job in jobs for output in job.outputs):
        if os.path.exists(output):
            done += 1
            found = provenance.read_record(output) or {}
            restored += found.get("finished", "") >= started
            seconds.update(found.get("seconds", {}))
    summary = {
        **counts,
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
    with replacing(path) as file:
        file.write(provenance.as_json(summary))
    return summary


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
