"""How what was measured is told: a Markdown table and a JSON file, with the command, the hardware and the versions."""

import contextlib
import json
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from zipir_jax.command_line import machine
from zipir_jax.files import replacing


def table(rows: list[dict], columns: dict[str, str]) -> str:
    """A Markdown table. columns: the heading of each, and how a row (a dict) fills it, as `str.format` takes it."""
    head = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return "\n".join(head + [line(row, columns) for row in rows])


def line(row: dict, columns: dict[str, str]) -> str:
    """A row of `table`."""
    return f"| {' | '.join(pattern.format(**row) for pattern in columns.values())} |"


def check_any(rows: list[dict]) -> None:
    """Raises ValueError where every row has an "error" in place of figures."""
    if all("error" in row for row in rows):
        raise ValueError(f"nothing could be measured: {rows[0]['error']}")


def command() -> str:
    """The command line of this process, as a user would type it."""
    return " ".join(["python -m zipir_jax.benchmark", *sys.argv[1:]])


def versions() -> dict[str, str]:
    """Of jaxlib and of the compilers and libraries beside it that are installed."""
    found = {}
    cuda = (package for n in (12, 13) for package in (f"jax-cuda{n}-plugin", f"nvidia-cudnn-cu{n}"))
    for package in ("jaxlib", "libtpu", *cuda):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def write(output: Path, content: dict) -> None:
    """Write `content` to a JSON file, with the command, the machine and the versions."""
    report = {"command": command(), "machine": machine(), "versions": versions()} | content
    with replacing(output) as file:
        file.write((json.dumps(report, indent=1) + "\n").encode())


def finish(output: Path | None, content: dict) -> None:
    """Print the command and the machine; `write` `content` to the file `output`, if there is one."""
    print(f"\n`{command()}`\n\n{machine()}")
    if output is not None:
        write(output, content)
