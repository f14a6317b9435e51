"""What the tests of the networks share."""

import math
from collections.abc import Callable

import jax
import numpy as np
import pytest

from zipir_jax.models.layers import abstract_params


@pytest.fixture(scope="session")
def random_params() -> Callable[..., dict]:
    """`random_params(module_class, config, seed=0)`: no tensor is left at zero, so that every layer acts.

    Drawn by numpy: compiling `init_params` takes longer than most tests.
    """

    def draw(module_class, config, seed=0):
        rng = np.random.default_rng(seed)

        def leaf(path, shape):
            if path[-1].key == "scale":  # of a norm
                return rng.uniform(0.5, 1.5, shape.shape).astype(np.float32)
            deviation = 0.1 if path[-1].key == "bias" else 1 / math.sqrt(math.prod(shape.shape[:-1]))
            return (deviation * rng.standard_normal(shape.shape)).astype(np.float32)

        return jax.tree_util.tree_map_with_path(leaf, abstract_params(module_class, config))

    return draw
