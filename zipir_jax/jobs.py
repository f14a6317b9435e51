"""What is to be made of a photograph, or of those of a folder, whose tree the outputs mirror: a job for each."""

import dataclasses
import os
from collections import Counter
from pathlib import Path

from zipir_jax import comparison, provenance
from zipir_jax.files import check_writable
from zipir_jax.imageio import IMAGE_SUFFIXES, distinct_names, visible_files
from zipir_jax.photograph import OUTPUT_FORMATS, output_format

EXISTS = "exists already; use --overwrite to replace it"


@dataclasses.dataclass(frozen=True)
class Job:
    """A photograph, and the files that are made of it."""

    source: Path
    name: str  # of the source, below the input folder
    outputs: tuple[Path, ...]  # one for each seed
    comparisons: tuple[Path, ...] = ()  # one for each output, or none


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


def is_there(path: Path) -> bool:
    """Whether a result, or a comparison, stands; an empty file, as power cuts leave them, is none."""
    return os.path.isfile(path) and os.path.getsize(path) > 0


def _identity(path):
    """Equal for two paths of the same file, through links and any spelling of the name."""
    status = os.stat(path)
    return status.st_dev, status.st_ino
