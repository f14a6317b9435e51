"""What every entry point does alike: errors in one line, compiled programs kept on disk."""

import os
import sys
from collections.abc import Callable

from platformdirs import user_cache_dir


def run(main: Callable[[list[str]], int | None]) -> None:
    """Call `main(arguments)` and exit with what it returns (None is 0).

    A ValueError or OSError becomes one line on stderr and status 2; with --debug, its traceback. Ctrl-C is 130.
    """
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


def cache_compiled_programs() -> None:
    """Keep compiled programs in the user's cache folder, unless JAX_COMPILATION_CACHE_DIR names another."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", user_cache_dir("zipir_jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
