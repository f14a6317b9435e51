"""Train one stage: `python -m zipir_jax.train --config configs/NAME.py [--resume auto] [--data.sources DIR ...]`.

A config is a Python file with a function `config() -> TrainConfig`. Every field of it can be overridden by name.
"""

import argparse
from typing import Annotated

import tyro

from zipir_jax.command_line import cache_compiled_programs, load_config, parse, run
from zipir_jax.config import TrainConfig


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
        import jax  # takes seconds; bad arguments should not wait

        from zipir_jax import parallel
        from zipir_jax.training.loop import train

        parallel.start()
        cache_compiled_programs()
        weights = train(config, options.resume)
        if jax.process_index() == 0:
            print(f"weights: {weights}")

    parse(
        train_stage,
        overrides,
        prog="python -m zipir_jax.train --config FILE [--resume auto|STEP] [--debug]",
        description="Train one stage. --resume auto goes on from the newest checkpoint of the output folder, if there "
        "is one; --resume STEP from that step's.",
    )()


if __name__ == "__main__":
    run(main)
