"""What every entry point does alike: errors in one line, compiled programs kept on disk, the machine named."""

import contextlib
import functools
import io
import math
import os
import platform
import re
import runpy
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import tyro
from platformdirs import user_cache_dir

from zipir_jax.config import TrainConfig
from zipir_jax.imageio import raise_pixel_limit


def run(main: Callable[[list[str]], int | None]) -> None:
    """Call `main(arguments)` and exit with what it returns (None is 0).

    A ValueError or OSError becomes one line on stderr and status 2; with --debug, its traceback. Ctrl-C is 130.
    """
    raise_pixel_limit()
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    try:
        sys.exit(main([argument for argument in arguments if argument != "--debug"]))
    except (ValueError, OSError) as error:
        if debug:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def parse(command: Callable | dict[str, Callable], arguments: list[str], **options) -> Callable:
    """What the arguments ask for: `command`, or the one they name, with its parameters bound, yet to be called.

    Raises ValueError, in one line, where tyro would print a box and exit. `options` go to tyro.
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            if isinstance(command, dict):
                commands = {name: _deferred(function) for name, function in command.items()}
                return tyro.extras.subcommand_cli_from_dict(commands, args=arguments, **options)
            return tyro.cli(_deferred(command), args=arguments, **options)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        # The box is drawn with these, or with "+", "|" and "-" where the terminal knows no others.
        text = re.sub(r"^[╭╰│+|][─-]*|[─-]*[╮╯│+|]$|[─-]{3,}", "", printed.getvalue(), flags=re.MULTILINE)
        message = " ".join(text.split()).partition("For full helptext")[0]
        raise ValueError(f"{message.strip()} (--help lists the options)") from None


def _deferred(function):
    @functools.wraps(function)
    def bind(*args, **kwargs):
        return functools.partial(function, *args, **kwargs)

    return bind


def memory_bytes(gib: float | None) -> int | None:
    """Bytes of what --memory-gib gives. Raises ValueError for what is no amount of memory."""
    if gib is not None and not 0 < gib < math.inf:
        raise ValueError(f"memory of {gib:g} GiB is not a positive number")
    return None if gib is None else int(gib * 2**30)


def load_config(path: str | Path) -> TrainConfig:
    """What `config()` in a Python file returns.

    Raises ValueError, with the path, if there is no such file or function, if either fails, or for another result.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such config")
    try:
        function = runpy.run_path(path).get("config")
        config = function() if callable(function) else None
    except Exception as error:  # the file is a program: anything can happen in it
        raise ValueError(f"{path}: the config file fails with {type(error).__name__}: {error}") from error
    if not callable(function):
        raise ValueError(f"{path}: a config file needs a function named config")
    if not isinstance(config, TrainConfig):
        raise ValueError(f"{path}: config() returns {type(config).__name__}, not a TrainConfig")
    return config


def cache_compiled_programs() -> None:
    """Keep compiled programs in the user's cache folder, unless JAX_COMPILATION_CACHE_DIR names another.

    Not where several processes compute on CPUs: programs that XLA reads back then run collectives in another order than
    those that a process has just compiled (jax 0.10.2), and gloo ends them.
    """
    import jax

    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", user_cache_dir("zipir_jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def machine() -> str:
    """The hardware that jax computes on, and the versions of what computes, in one line for a report."""
    packages = ", ".join(f"{package} {version(package)}" for package in ("jax", "flax"))
    return f"{hardware()}; Python {platform.python_version()}, {packages}"


def hardware() -> str:
    """The hardware that jax computes on, in a few words."""
    import jax

    devices = jax.devices()
    if devices[0].platform == "cpu":
        return f"{_cpu_model()}, {os.cpu_count()} cores"
    return f"{len(devices)} x {devices[0].device_kind}"


def _cpu_model():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()  # Linux only
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
