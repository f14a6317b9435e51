"""The web page: what is on it and what its buttons do.

Files come from browsers as bytes. Their names are shown, and become names of results, as `shown_name` leaves them:
without folders, not hidden. Paths that a browser names are those of its own uploads (guard.py).
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import html
import io
import math
import secrets
import shutil
import threading
import time
import traceback
import typing
import unicodedata
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

import gradio as gr
from PIL import Image

from zipir_jax import provenance
from zipir_jax.config import (
    COLOUR_CORRECTIONS,
    LARGEST_SEED,
    PRESETS,
    RestorationConfig,
    SamplingConfig,
    TargetConfig,
    check_seed,
)
from zipir_jax.guard import Visitors
from zipir_jax.imageio import resize, to_uint8, upright_size
from zipir_jax.photograph import (
    OUTPUT_FORMATS,
    Photograph,
    check_output,
    output_format,
    read_photograph,
    write_photograph,
)
from zipir_jax.planner import refusing
from zipir_jax.restorer import PHASES, Restorer, restore_photograph, target_pixels

LARGEST_PREVIEW = 2048  # pixels, the longer side of what a browser shows
MOST_AT_WORK = 16  # pages that restore or wait for it; each holds one of the server's 40 threads
MOST_FILES = 200  # of a folder of photographs
LONGEST_NAME = 80  # characters of a file's name, without its suffix
SIZES = {
    "Scale": "scale",
    "Long side": "long_side",
    "Megapixels": "megapixels",
}  # as shown: field of TargetConfig
NO_MEMORY = "The server has not enough memory for this size; choose a smaller one."
FAILED = "The server could not restore this photograph."
DOING = {"encode": "Reading the photograph", "denoise": "Restoring", "decode": "Drawing the result"}
# One suffix for each format, the one that most files have.
FORMATS = {file_format: suffix.removeprefix(".") for suffix, file_format in reversed(OUTPUT_FORMATS.items())}


class CancelledError(Exception):
    """A person has cancelled a restoration, or closed the page."""


@dataclasses.dataclass(eq=False)
class Desk:
    """What all visitors share: the restorer, and who is at it."""

    restorer: Restorer
    weights: dict[str, str]  # {"name", "sha256"}
    prompts: tuple[str, ...]  # prompt and negative prompt of weights that were trained with text; else ()
    visitors: Visitors
    largest_pixels: int  # of a photograph, and of a result
    # Visitors of whom a photograph waits for the device, in the order in which they came; the first one's is on it.
    queue: collections.deque[str] = dataclasses.field(default_factory=collections.deque)
    next_one: threading.Condition = dataclasses.field(default_factory=threading.Condition)
    cancels: dict[str, threading.Event] = dataclasses.field(default_factory=dict)  # of sessions at work


@dataclasses.dataclass(frozen=True)
class Job:
    """What a press of a button has started."""

    visitor: str
    cancel: threading.Event
    target: TargetConfig
    restoration: RestorationConfig
    seed: int
    file_format: str
    folder: Path  # for its files


@contextlib.contextmanager
def job(desk: Desk, session: str, tab: str, paths: list[str], fields: Sequence) -> Iterator[Job]:
    """Uploads are restored within, with what the tab's fields hold; ValueError with a sentence if they cannot be."""
    if not paths:
        raise ValueError("Drop a photograph first.")
    if len(paths) > MOST_FILES:
        raise ValueError(f"{len(paths)} photographs are more than {MOST_FILES}; give them in parts.")
    *values, file_format = fields
    settings = read_settings(*values)
    if len(desk.cancels) >= MOST_AT_WORK:
        raise ValueError(f"{MOST_AT_WORK} pages are restoring already; try again later.")
    cancel = threading.Event()
    if desk.cancels.setdefault(session, cancel) is not cancel:
        raise ValueError("This page is restoring already; wait for it, or cancel it.")
    try:
        folder = fresh_folder(desk, session, tab)
        yield Job(desk.visitors.sessions[session], cancel, *settings, file_format, folder)
    finally:
        del desk.cancels[session]


def cancel_job(desk: Desk, session: str) -> None:
    """End what the session does, if it does anything."""
    if session in desk.cancels:
        desk.cancels[session].set()


@contextlib.contextmanager
def turn(desk: Desk, visitor: str, waiting: Callable[[int], None]) -> Iterator[None]:
    """The device for one photograph, in turn: whoever has many waits behind the others with each of them.

    A visitor has one place in the queue, for which the visitor's other pages wait. waiting: told again and again how
    many are before this photograph; what it raises ends the wait.
    """
    has_place = False
    try:
        while True:
            with desk.next_one:
                if visitor not in desk.queue:
                    desk.queue.append(visitor)
                    has_place = True
                before = desk.queue.index(visitor) + (not has_place)
            if before == 0:
                break
            waiting(before)
            with desk.next_one:
                desk.next_one.wait(0.5)  # or else a cancelled one would go on waiting
        yield
    finally:
        if has_place:
            with desk.next_one:
                desk.queue.remove(visitor)
                desk.next_one.notify_all()


def fresh_folder(desk: Desk, session: str, purpose: str) -> Path:
    """An empty folder for a page's files of one kind; those that it had before are deleted."""
    folder = desk.visitors.folder_of(session) / purpose
    shutil.rmtree(folder, ignore_errors=True)
    folder = folder / secrets.token_hex(8)  # browsers keep what they had from the same address
    folder.parent.mkdir(exist_ok=True)
    folder.mkdir()
    return folder


def shown_name(name: str) -> str:
    """A file's name as it is shown and downloaded: one line of printable characters, no folder, not hidden."""
    name = unicodedata.normalize("NFC", name).replace("\\", "/").rpartition("/")[2]
    name = "".join(letter for letter in name if letter.isprintable() and letter not in '<>:"|?*').strip(" .")
    stem, dot, suffix = name.rpartition(".")
    stem, suffix = (stem, suffix) if stem else (suffix, "")
    return f"{stem[:LONGEST_NAME] or 'photograph'}{dot and suffix and '.'}{suffix[:8]}"


def distinct(names: list[str]) -> list[str]:
    """Names of which no two are the same in any capitals: the second a.png becomes a_2.png."""
    taken, result = set(), []
    for name in names:
        stem, dot, suffix = name.rpartition(".")
        number, candidate = 1, name
        while candidate.casefold() in taken:
            number += 1
            candidate = f"{stem}_{number}{dot}{suffix}"
        taken.add(candidate.casefold())
        result.append(candidate)
    return result


def read_settings(size, scale, long_side, megapixels, steps, fidelity, colour_correction, seed):
    """(TargetConfig, RestorationConfig, seed) of what the page's fields hold; ValueError for what none can be."""
    name = SIZES[size]
    value = {"scale": scale, "long_side": long_side, "megapixels": megapixels}[name]
    for field, number in ((size, value), ("Steps", steps), ("Fidelity", fidelity), ("Seed", seed)):
        if not isinstance(number, int | float) or not math.isfinite(number):
            raise ValueError(f"{field} is not a number.")
    target = TargetConfig(**{name: int(value) if name == "long_side" else float(value)})
    check_seed(int(seed))
    sampling = SamplingConfig(steps=int(steps), fidelity=float(fidelity))
    return target, RestorationConfig(sampling, colour_correction), int(seed)


def planned_size(desk: Desk, name: str, data: bytes, target, restoration, file_format: str) -> tuple:
    """((height, width) of a photograph, that of its result); ValueError where it could not be restored or written."""
    size = upright_size(name, data)
    check_pixels(desk, "the photograph has", size)
    result = target_pixels(target, size)
    check_pixels(desk, "the result would have", result)
    check_output(f"{name}.{file_format}", result)
    desk.restorer.plan((*size, 3), size=result, sampling=restoration.sampling)
    return size, result


def check_pixels(desk, which, size):
    height, width = size
    if height * width > desk.largest_pixels:
        raise ValueError(
            f"{which} {width} x {height} pixels, {height * width / 1e6:.1f} megapixels; "
            f"this page takes up to {desk.largest_pixels / 1e6:g}"
        )


def output_name(name: str, target: TargetConfig, result: tuple[int, int], file_format: str) -> str:
    stem = name.rpartition(".")[0] or name
    size = f"{result[1]}x{result[0]}" if target.scale is None else f"x{target.scale:g}"
    return f"{stem}_{size}.{file_format}"


def restore_one(
    desk: Desk,
    job: Job,
    path: str,
    name: str,
    tell: Callable[[str, float], None],
    show: Callable | None = None,
) -> tuple:
    """Restore an upload, which is shown and recorded by a name, into a file of the job's folder.

    tell(sentence, done) is told how far it is. Returns the file's path, its record (provenance.py), and what
    show(before=photograph, after=restored) returns. Raises ValueError with a sentence, CancelledError, and whatever
    befalls the device or the server's files; see `reason`.
    """
    seconds, begun = {}, 0.0

    def told(sentence, done=0.0):
        if job.cancel.is_set():
            raise CancelledError
        tell(sentence, done)

    def progress(phase, done):
        nonlocal begun
        if done == 0:
            begun = time.monotonic()
        elif done == 1:
            seconds[phase] = time.monotonic() - begun
        sentence, steps = DOING[phase], job.restoration.sampling.steps
        if phase == "denoise":
            sentence += f", step {min(int(done * steps) + 1, steps)} of {steps}"
        told(sentence, (PHASES.index(phase) + done) / len(PHASES))

    # What cannot be is said at once; while it waits, it holds nothing in memory.
    _, result = planned_size(desk, name, opened(path), job.target, job.restoration, job.file_format)
    desk.visitors.check_room(job.visitor)
    waiting = turn(desk, job.visitor, lambda before: told(f"Waiting, {before} before you"))
    with waiting, refusing(NO_MEMORY):
        told("Opening the photograph")
        begun, data = time.monotonic(), opened(path)
        photograph = read_photograph(name, data)
        seconds["read"] = time.monotonic() - begun
        restored = restore_photograph(
            desk.restorer, photograph, job.target, job.restoration, seed=job.seed, progress=progress
        )
        told("Writing the file", 1.0)
        begun, encoded = time.monotonic(), io.BytesIO()
        written = job.folder / output_name(name, job.target, result, job.file_format)
        not_kept = write_photograph(encoded, restored, output_format(written))
        encoded = encoded.getvalue()
        seconds["write"] = time.monotonic() - begun
        desk.visitors.check_room(job.visitor, len(encoded))
        written.write_bytes(encoded)
        made_with = provenance.settings(
            job.target, job.restoration, job.seed, desk.restorer.config.dit.attention, None, *desk.prompts
        )
        record = provenance.record(
            name,
            hashlib.sha256(data).hexdigest(),
            photograph,
            written.name,
            encoded,
            restored,
            made_with,
            desk.weights,
            seconds,
            not_kept,
        )
        return written, record, show and show(before=photograph, after=restored)


def reason(error: Exception) -> str:
    """What a person is told of an error; the texts of others than ValueErrors tell of the server."""
    if isinstance(error, ValueError):
        return str(error)
    if isinstance(error, OSError):
        return f"The server could not read or write its files: {error.strerror or 'unknown error'}."
    if isinstance(error, MemoryError):
        return NO_MEMORY
    traceback.print_exception(error)
    return FAILED


# --------------------------------------------------------------------------------------------------
# What is shown
# --------------------------------------------------------------------------------------------------

CSS = """
.plain, .plain .html-container { padding: 0 !important; }
.compare, .picture { position: relative; overflow: hidden; margin: 0 auto; border-radius: 6px; background: #0002; }
.compare img, .picture img { display: block; width: 100%; height: 100%; margin: 0; object-fit: fill;
  user-select: none; }
.compare .before { position: absolute; inset: 0; clip-path: inset(0 calc(100% - var(--at)) 0 0); }
.compare::before { content: ""; position: absolute; z-index: 1; top: 0; bottom: 0; left: var(--at); width: 2px;
  margin-left: -1px; background: #fff; box-shadow: 0 0 4px #000a; pointer-events: none; }
.compare::after { content: "\\2194"; position: absolute; z-index: 1; top: 50%; left: var(--at); width: 36px;
  height: 36px; margin: -18px; border-radius: 50%; background: #fff; color: #333; box-shadow: 0 0 4px #000a;
  text-align: center; font: 20px/36px sans-serif; pointer-events: none; }
.compare span { position: absolute; bottom: 8px; padding: 2px 8px; border-radius: 4px; background: #000a; color: #fff;
  font-size: 13px; pointer-events: none; }
.compare .left { left: 8px; } .compare .right { right: 8px; }
.compare input { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; opacity: 0; cursor: ew-resize;
  touch-action: pan-y; }
.compare:has(input:focus-visible) { outline: 3px solid var(--color-accent); outline-offset: 2px; }
.nothing { display: grid; place-items: center; min-height: 320px; border: 2px dashed var(--border-color-primary);
  border-radius: 6px; color: var(--body-text-color-subdued); text-align: center; padding: 1em; }
.status { min-height: 3.5em; }
.status p { margin: 0 0 4px; overflow-wrap: anywhere; }
.status .error { color: #b91c1c; font-weight: 600; } .dark .status .error { color: #fca5a5; }
.record { overflow-x: auto; font-size: 12px; line-height: 1.4; }
.files { width: 100%; border-collapse: collapse; }
.files, .files tr { border: 0 !important; }
.files td, .files th { padding: 4px 8px; border-width: 0 0 1px !important; text-align: left; vertical-align: top;
  border-bottom-color: var(--border-color-primary) !important; overflow-wrap: anywhere; }
.files .failed { color: #b91c1c; } .dark .files .failed { color: #fca5a5; }
"""


def sentence(text: str, is_error: bool = False) -> str:
    text = html.escape(text)
    return f'<p class="error" role="alert">{text}</p>' if is_error else f"<p>{text}</p>"


def preview(desk: Desk, session: str, purpose: str, **pictures: Photograph) -> str:
    """One picture, or the slider between `before` and `after`: HTML with JPEG files of LARGEST_PREVIEW at most."""
    folder = fresh_folder(desk, session, purpose)
    height, width = pictures["after" if "after" in pictures else "before"].pixels.shape[:2]
    factor = min(1.0, LARGEST_PREVIEW / max(height, width))
    height, width = (max(1, round(side * factor)) for side in (height, width))
    urls = {}
    for which, photograph in pictures.items():
        path = folder / f"{which}.jpg"
        Image.fromarray(to_uint8(resize(photograph.pixels, height, width))).save(
            path, quality=90, subsampling=0
        )
        urls[which] = "gradio_api/file=" + quote(str(path))
    shape = f"aspect-ratio: {width} / {height}; max-width: calc(70vh * {width / height:.4f});"
    if "after" not in urls:
        return f'<div class="picture" style="{shape}"><img src="{urls["before"]}" alt="The photograph"></div>'
    return (
        f'<div class="compare" style="{shape} --at: 50%">'
        f'<img src="{urls["after"]}" alt="Restored"><img class="before" src="{urls["before"]}" alt="Before">'
        '<span class="left">before</span><span class="right">restored</span>'
        '<input type="range" min="0" max="100" step="0.5" value="50" aria-label="How much is shown as before" '
        """oninput="this.parentElement.style.setProperty('--at', this.value + '%')"></div>"""
    )


NOTHING = '<div class="nothing">The photograph appears here, and the restored one over it.</div>'


def table(rows: list[tuple[str, str, bool]]) -> str:
    """Of files: name, state, whether it failed."""
    lines = "".join(
        f"<tr><td>{html.escape(name)}</td><td{' class=failed' if failed else ''}>{html.escape(state)}</td></tr>"
        for name, state, failed in rows
    )
    return f'<table class="files"><tr><th>Photograph</th><th>State</th></tr>{lines}</table>'


# --------------------------------------------------------------------------------------------------
# The page
# --------------------------------------------------------------------------------------------------


def build_page(desk: Desk) -> gr.Blocks:
    """The page, to be mounted; see app.py."""
    with gr.Blocks(title="zipir_jax", analytics_enabled=False) as page:
        gr.HTML("<h1>Restore photographs</h1>", elem_classes="plain")
        with gr.Tab("Photograph"):
            photograph_tab(desk)
        with gr.Tab("Folder of photographs"):
            folder_tab(desk)
        page.unload(_cancelling(desk))
    # Turns are taken in `turn`: gradio's own queue would let a folder of photographs hold the device to its end.
    return page.queue(default_concurrency_limit=None, max_size=128, api_open=False)


def _cancelling(desk):
    def cancelling(request: gr.Request):
        cancel_job(desk, request.session_hash)

    return cancelling


def controls(start_label: str):
    """(fields of a tab, in the order in which `job` takes them; its two buttons)"""
    size = gr.Radio(list(SIZES), value="Scale", label="Size of the result by")
    scale = gr.Slider(1, 8, value=4, step=0.5, label="Scale", info="times as wide and as high")
    long_side = gr.Number(value=2048, minimum=1, precision=0, label="Long side", info="pixels", visible=False)
    megapixels = gr.Number(value=4, minimum=0.01, label="Megapixels", visible=False)
    fast = PRESETS["fast"]
    preset = gr.Radio(
        list(PRESETS),
        value="fast",
        label="Preset",
        info="fast: 4 steps. paper: 25 steps. faithful: 8 steps, held to the photograph's colours and coarse shapes.",
    )
    with gr.Accordion("More", open=False):
        fidelity = gr.Slider(
            0,
            1,
            value=fast.sampling.fidelity,
            step=0.05,
            label="Fidelity",
            info="to the photograph's coarse shapes",
        )
        colour = gr.Dropdown(
            list(COLOUR_CORRECTIONS),
            value=fast.colour_correction,
            label="Colour correction",
            filterable=False,
        )
        steps = gr.Slider(1, 100, value=fast.sampling.steps, step=1, label="Steps")
        seed = gr.Number(value=0, minimum=0, maximum=LARGEST_SEED, precision=0, label="Seed")
        file_format = gr.Dropdown(list(FORMATS.values()), value="png", label="Format", filterable=False)
    with gr.Row():
        start = gr.Button(start_label, variant="primary", min_width=100)
        cancel = gr.Button("Cancel", interactive=False, min_width=100)

    def show_size(size):
        return [gr.update(visible=size == shown) for shown in SIZES]

    def apply_preset(name):
        chosen = PRESETS[name]
        return chosen.sampling.steps, chosen.sampling.fidelity, chosen.colour_correction

    quiet = {"show_progress": "hidden", "api_visibility": "private"}
    size.change(show_size, size, [scale, long_side, megapixels], **quiet)
    preset.input(apply_preset, preset, [steps, fidelity, colour], **quiet)
    return [size, scale, long_side, megapixels, steps, fidelity, colour, seed, file_format], start, cancel


def connect(desk, start, cancel, restore, inputs, outputs, status, downloads):
    """`start` runs `restore`; meanwhile `cancel` can be pressed, and `start` cannot."""
    quiet = {"show_progress": "hidden", "api_visibility": "private"}

    def begin():
        return gr.update(interactive=False), gr.update(interactive=True), "", *no_downloads(downloads)

    def end():
        return gr.update(interactive=True), gr.update(interactive=False)

    running = start.click(begin, None, [start, cancel, status, *downloads], **quiet)
    running = running.then(
        restore, inputs, outputs, show_progress="full", show_progress_on=status, api_visibility="private"
    )
    running.then(end, None, [start, cancel], **quiet)
    cancel.click(_cancelling(desk), None, None, **quiet)


def no_downloads(buttons):
    return [gr.update(value=None, interactive=False) for _ in buttons]


def photograph_tab(desk: Desk) -> None:
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            file = gr.File(label="Photograph", file_count="single", height=150)
            fields, start, cancel = controls("Restore")
        with gr.Column(scale=2, min_width=320):
            view = gr.HTML(NOTHING, elem_classes="plain")
            status = gr.HTML(elem_classes=["plain", "status"])
            with gr.Row():
                picture = gr.DownloadButton("Download the photograph", interactive=False)
                record = gr.DownloadButton("Download its settings", interactive=False)
            with gr.Accordion("The settings that made it", open=False):
                made = gr.HTML(elem_classes="plain")

    def look(request: gr.Request, path):
        """The photograph as it was uploaded; what was made of another is gone."""
        shown = NOTHING
        if path is not None:
            with contextlib.suppress(ValueError, OSError):  # `outlook` says what is wrong
                data, name = opened(path), name_of(path)
                check_pixels(desk, "the photograph has", upright_size(name, data))
                shown = preview(desk, request.session_hash, "before", before=read_photograph(name, data))
        return shown, *no_downloads([picture, record]), ""

    def outlook(path, *fields_and_format):
        """What would become of it."""
        if path is None:
            return ""
        *fields, file_format = fields_and_format
        name = name_of(path)
        try:
            target, restoration, _ = read_settings(*fields)
            size, result = planned_size(desk, name, opened(path), target, restoration, file_format)
        except (ValueError, OSError) as error:
            return sentence(reason(error), is_error=True)
        shown = " to ".join(f"{width} x {height}" for height, width in (size, result))
        return sentence(f"{name}: {shown} pixels.")

    def restore(request: gr.Request, path, progress=gr.Progress(), *fields):  # noqa: B008
        session, none = request.session_hash, no_downloads([picture, record])
        try:
            with job(desk, session, "photograph", [path] if path else [], fields) as work:
                written, made, shown = restore_one(
                    desk,
                    work,
                    path,
                    name_of(path),
                    lambda text, done: progress(done, text),
                    functools.partial(preview, desk, session, "slider"),
                )
            beside = provenance.record_path(written)
            beside.write_bytes(provenance.as_json(made))
        except CancelledError:
            return gr.update(), sentence("Cancelled."), *none, ""
        except Exception as error:
            return gr.update(), sentence(reason(error), is_error=True), *none, ""
        told = [
            f"{written.name}: {made['output']['width']} x {made['output']['height']} pixels.",
            *made["not_kept"],
        ]
        downloads = (gr.update(value=path, interactive=True) for path in (written, beside))
        text = f'<pre class="record">{html.escape(beside.read_text())}</pre>'
        return shown, "".join(map(sentence, told)), *downloads, text

    quiet = {"show_progress": "hidden", "api_visibility": "private"}
    inputs = [file, *fields]
    # One at a time: beside the restoration, no more large arrays than those of one preview.
    file.change(look, file, [view, picture, record, made], concurrency_limit=1, **quiet)
    for field in inputs:
        # One at a time, in the order of the changes: the last one is what holds.
        field.change(outlook, inputs, status, concurrency_limit=1, concurrency_id="outlook", **quiet)
    connect(
        desk, start, cancel, restore, inputs, [view, status, picture, record, made], status, [picture, record]
    )


@typing.no_type_check  # which the tests' type checks respect: as they wrap a generator, gradio would see none
def folder_tab(desk: Desk) -> None:
    gr.HTML(
        f"<p>Up to {MOST_FILES} photographs; they come back as one ZIP file, with the settings of each.</p>",
        elem_classes="plain",
    )
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            files = gr.File(label="Photographs", file_count="multiple", height=200)
            fields, start, cancel = controls("Restore all")
        with gr.Column(scale=2, min_width=320):
            status = gr.HTML(elem_classes=["plain", "status"])
            states = gr.HTML(table([]), elem_classes="plain")
            archive = gr.DownloadButton("Download all as ZIP", interactive=False)

    def restore(request: gr.Request, paths, progress=gr.Progress(), *fields):  # noqa: B008
        try:
            with job(desk, request.session_hash, "folder", paths or [], fields) as work:
                yield from restore_all(work, paths, progress)
        except (ValueError, OSError) as error:
            yield sentence(reason(error), is_error=True), gr.update(), *no_downloads([archive])

    def restore_all(work, paths, progress):
        names = distinct(list(map(name_of, paths)))
        rows = [(name, "waiting", False) for name in names]
        taken = []
        with zipfile.ZipFile(work.folder / "restored.zip", "w") as zipped:
            for index, (path, name) in enumerate(zip(paths, names, strict=True)):
                if work.cancel.is_set():
                    rows[index] = (name, "cancelled", False)
                    continue
                rows[index] = (name, "restoring", False)
                yield "", table(rows), *no_downloads([archive])

                def tell(text, done, index=index, name=name):
                    progress((index + done) / len(names), f"{index + 1} of {len(names)}, {name}: {text}")

                try:
                    written, record, _ = restore_one(desk, work, path, name, tell)
                    *_, stored = distinct([*taken, written.name])
                    zipped.write(written, stored)
                    record["output"]["name"] = stored
                    zipped.writestr(f"{stored}.json", provenance.as_json(record))
                    written.unlink()
                    taken.append(stored)
                    rows[index] = (name, " ".join(["restored.", *record["not_kept"]]), False)
                except CancelledError:
                    rows[index] = (name, "cancelled", False)
                except Exception as error:
                    rows[index] = (name, reason(error).removeprefix(f"{name}: "), True)
        told = sentence(f"{len(taken)} of {len(names)} restored." + " Cancelled." * work.cancel.is_set())
        download = [gr.update(value=zipped.filename, interactive=True)] if taken else no_downloads([archive])
        yield told, table(rows), *download

    connect(desk, start, cancel, restore, [files, *fields], [status, states, archive], status, [archive])


def name_of(path: str) -> str:
    """An upload's name as it is shown."""
    return shown_name(Path(path).name)


def opened(path: str) -> bytes:
    """An upload's bytes; ValueError where it is gone."""
    try:
        return Path(path).read_bytes()
    except OSError:
        raise ValueError(f"{name_of(path)}: the server has it no longer; drop it again") from None
