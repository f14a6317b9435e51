"""Train one stage: `python -m zipir_jax.train --config configs/NAME.py [--resume auto] [--data.sources DIR ...]`.

A config is a Python file with a function `config() -> TrainConfig`. Every field of it can be overridden by name.
"""

import argparse
import runpy
from pathlib import Path
from typing import Annotated

import tyro

from zipir_jax.command_line import cache_compiled_programs, parse, run
from zipir_jax.config import TrainConfig


def load_config(path: str) -> TrainConfig:
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


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config")
    parser.add_argument("--resume", default="")
    try:
        options, overrides = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from None
    if not options.config and "--help" not in overrides:
        raise ValueError("--config is missing: name a config file, such as configs/small_coarse.py")
    default = load_config(options.config) if options.config else TrainConfig()

    def train_stage(config: Annotated[TrainConfig, tyro.conf.arg(name="")] = default) -> None:
        from zipir_jax import parallel  # importing jax takes seconds; bad arguments should not wait
        from zipir_jax.training.loop import train

        parallel.start()
        cache_compiled_programs()
        print(f"weights: {train(config, options.resume)}")

    parse(
        train_stage,
        overrides,
        prog="python -m zipir_jax.train --config FILE [--resume auto|STEP] [--debug]",
        description="Train one stage. --resume auto goes on from the newest checkpoint of the output folder, if there "
        "is one; --resume STEP from that step's.",
    )()


if __name__ == "__main__":
    run(main)
