"""Photographs of a folder, one after the other: who makes what, and what stands on the disk meanwhile.

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
import os
import signal
import subprocess
import sys
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
from zipir_jax.files import (
    DiskFullError,
    check_replaceable,
    refusal,
    remove_unfinished,
    replacing,
)
from zipir_jax.imageio import resize, upright_size
from zipir_jax.jobs import EXISTS, Job, is_there
from zipir_jax.photograph import (
    Photograph,
    check_output,
    output_format,
    read_photograph,
    write_photograph,
)

LOCKS = ".zipir_jax"
LONGEST_NAME = 255  # bytes, of nearly all file systems
# That records, and the temporary files of `files.replacing`, add to a result's name.
LONGEST_ENDING = len(".") + len(".json") + len(".12345678")
CRASHES = ("SIGABRT", "SIGBUS", "SIGFPE", "SIGILL", "SIGSEGV")  # SIGKILL has other causes than a photograph
# A program that reads one.
READ = """
import sys
from zipir_jax.imageio import raise_pixel_limit
from zipir_jax.photograph import read_photograph
raise_pixel_limit()
read_photograph(sys.argv[1])
"""
POLL = 0.5  # seconds between looks at pictures that other processes hold


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
    failure. "error" is the exception that ended the run early, as a DiskFullError where no further picture could be
    written, or None.
    """
    from zipir_jax.restorer import PHASES

    counts = Counter()
    failed, not_kept, reached = [], [], 0
    before = {path: _state(path) for job in jobs for path in job.outputs}
    over, ended_by = threading.Event(), None
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
            except Exception as error:
                settle(job, index, "failed", _reason(error))
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
                        except StoppedError:
                            raise
                        except Exception as error:  # the device's too, of this picture
                            settle(taken.job, index, "failed", _reason(error))
                            continue
                        settle_written()
                        future = writer.submit(write_output, run, taken, index, restored, seconds)
                        writing.append((taken.job, index, future))
                        del restored
                finally:
                    writer.submit(_release, taken)  # after what is being written of it
                del taken
        except StoppedError:
            pass
        except Exception as error:
            ended_by = error
        finally:
            over.set()
            with contextlib.suppress(Exception):
                _release(ahead.result())
    try:
        settle_written()
    except DiskFullError as error:
        ended_by = error
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
        "error": ended_by,
        "started": started,
        "ended": provenance.now(),
        "seconds": round(seconds, 1),
        "pictures_per_minute": round(60 * counts["restored"] / seconds, 2),
    }


def take_all(
    run: Run, jobs: list[Job], before: dict[Path, object], is_over: Callable[[], object]
) -> Iterator[Taken]:
    """The jobs, as far as this process gets hold of them; at last those that other processes leave undone.

    before: `_state` of all outputs as the run began. Photographs at which a process ended come last: should one of them
    end this process as well, all others are made.
    """
    remaining = sorted(jobs, key=lambda job: _is_claimed(run, job))
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
    except Exception as error:
        return _failed(job, error)
    was_claimed = _is_claimed(run, job)
    if len(settled) == len(job.outputs) and not was_claimed and not _uncompared(job, settled):
        return Taken(job, settled)
    if run.locks is not None and (lock := _claim(run.locks, job)) is None:
        return None
    try:
        if was_claimed or lock is None:  # by a process that was killed, as a release removes the file
            for path in (*job.outputs, *job.comparisons, *map(provenance.record_path, job.outputs)):
                remove_unfinished(path)
        # Again: another process may have made it between the look and the claim.
        settled = _settled(run, job, before)
        compared = {index: settled.pop(index) for index in _uncompared(job, settled)}
        if len(settled) == len(job.outputs):
            return Taken(job, settled, lock)
        if was_claimed and (crash := _crash(job)):
            lock.release()  # its file stays: in the next run this is asked again
            return _failed(job, ValueError(f"reading it crashes the program ({crash})"), settled)
        for index in compared:
            _compare(run, job, index)
        settled |= compared
        if len(settled) == len(job.outputs):
            return Taken(job, settled, lock)
        return _read(run, job, settled, lock)
    except DiskFullError:
        _release(Taken(job, settled, lock))
        raise
    except Exception as error:
        return _failed(job, error, settled, lock)


def _reason(error):
    """What is said of a picture's failure."""
    if isinstance(error, MemoryError):
        return "the image does not fit into memory"
    if isinstance(error, ValueError):
        return str(error)
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def _failed(job, error, settled=None, lock=None):
    reason = f"cannot be read ({error.strerror or error})" if isinstance(error, OSError) else _reason(error)
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
        if state is None or (run.skip_existing and not is_there(output)):
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


def _is_claimed(run, job):
    return run.locks is not None and _lock_file(run.locks, job).exists()


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
            raise refusal(error)(f"{locks}: files cannot be locked here ({error.strerror})") from None
        return lock


def _release(taken):
    """Give a claim up, and its file with it: FileLock takes no lock on a file that has lost its name meanwhile."""
    if taken is None or taken.lock is None:
        return
    Path(taken.lock.lock_file).unlink(missing_ok=True)
    taken.lock.release()


def _crash(job):
    """The signal of a crash by which a process ends that reads the photograph; None where it does not.

    A decoder that crashes takes the process along, and would do so in each run.
    """
    reading = subprocess.run(
        [sys.executable, "-c", READ, job.source], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    return next((name for name in CRASHES if -reading.returncode == getattr(signal, name)), None)


def _uncompared(job, settled):
    """Outputs that stand, but not their comparisons."""
    if not job.comparisons:
        return []
    return [i for i, (kind, _) in settled.items() if kind != "failed" and not is_there(job.comparisons[i])]


def _compare(run, job, index):
    """Write the comparison of an output that stands."""
    before, after = (read_photograph(path).pixels for path in (job.source, job.outputs[index]))
    with replacing(job.comparisons[index]) as file:
        file.write(_comparison(run, job, index, resize(before, *after.shape[:2]), after))


def _read(run, job, settled, lock):
    """Whether it can be restored is known from the header: nobody waits for pixels that are then refused."""
    start = time.monotonic()
    size = upright_size(job.source)
    target = target_of(run, size)
    for index, output in enumerate(job.outputs):
        if index not in settled:
            check_output(output, target)
            check_replaceable(output)
            if run.overwrite or provenance.read_record(output) is not None:
                continue
            record = provenance.record_path(output)
            if os.path.lexists(record):
                raise ValueError(f"{record.name}: exists already and is no record of a result")
            if job.comparisons and os.path.lexists(comparison := job.comparisons[index]):
                raise ValueError(f"{comparison.name}: {EXISTS}")
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
    # Not `getbuffer`: where the garbage collector meets it in a cycle, as of a traceback, Python 3.12.1 crashes.
    encoded = encoded.getvalue()
    seconds = seconds | {"write": time.monotonic() - start}
    record = provenance.record(
        job.name,
        taken.source["sha256"],
        photograph,
        output.name,
        encoded,
        result,
        run.settings(job, index),
        run.weights,
        seconds,
        not_kept,
    )
    record["input"] |= taken.source
    contents = {output: encoded}
    if run.compare is not None:
        contents[job.comparisons[index]] = _comparison(run, job, index, taken.enlarged, result.pixels)
    contents[provenance.record_path(output)] = provenance.as_json(record)
    with contextlib.ExitStack() as stack:
        for path, content in contents.items():
            file = stack.enter_context(replacing(path))
            file.write(content)
            file.flush()  # what the disk does not hold is known before the old result goes
        # All is written, and takes its place in reverse order: the result, whose being there says that all is done,
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
    return encoded.getvalue()


def _state(path):
    """Changes when a file is replaced; None where there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns
