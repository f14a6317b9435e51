"""Files that appear whole or not at all, and why a file is not used."""

import contextlib
import errno
import glob
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


class RefusedError(ValueError):
    """Why a file is not read, as a sentence without its path; never leaves `imageio.opened`."""


class DiskFullError(ValueError):
    """No space is left for a file, nor for the next."""


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file that takes the place of `path` once the block ends; a reader finds the old file or the new one.

    Missing folders are made; through a link its target is replaced. Raises ValueError, with the path in it, where the
    file or its folder cannot be written, a DiskFullError where no space is left; then, and after any other error within
    the block, `path` is as it was.
    """
    path = Path(path)
    check_replaceable(path)
    if path.is_symlink():
        path = path.resolve()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not by tempfile: its files are their owner's alone, and the umask cannot be asked for without setting it.
        temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}"
        file = temporary.open("xb")
    except OSError as error:
        raise refusal(error)(f"{path.parent}: cannot be written to ({error.strerror})") from None
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave an empty file in the place of the old one
        os.replace(temporary, path)
    except DiskFullError:  # of another file
        raise
    except (OSError, ValueError) as error:  # Pillow's encoders raise either
        reason = getattr(error, "strerror", None) or error
        raise refusal(error)(f"{path}: cannot be written ({reason})") from None
    finally:
        temporary.unlink(missing_ok=True)


def refusal(error: Exception) -> type[ValueError]:
    """The class of what is raised for an error in writing."""
    is_full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    return DiskFullError if is_full else ValueError


def remove_unfinished(path: Path) -> None:
    """Remove what killed processes left that were `replacing` a file; nobody may be at it."""
    path = Path(os.path.realpath(path))
    for unfinished in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 8}"):
        unfinished.unlink(missing_ok=True)


def check_replaceable(path: Path) -> None:
    """Raises ValueError for what exists and is no file (a folder, a device, a pipe), and for what cannot exist."""
    try:
        is_taken = path.exists() and not path.is_file()
    except OSError as error:  # a name that is too long
        raise ValueError(f"{path}: cannot be written ({error.strerror})") from None
    if is_taken:
        raise ValueError(f"{path}: exists and is not a regular file")


def check_writable(folder: Path) -> None:
    """Raises ValueError where `replacing` could not write into a folder, which need not exist; makes nothing."""
    existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise ValueError(f"{folder}: cannot be written to ({existing} is not a folder)")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"{folder}: cannot be written to (no permission to write in {existing})")
