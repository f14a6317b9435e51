import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import pytest

from zipir_jax.config import MODELS
from zipir_jax.measure.timing import cheap_params, cheap_weights, median_seconds
from zipir_jax.models.dit import DiT
from zipir_jax.models.layers import abstract_params
from zipir_jax.models.lp_vae import Encoder
from zipir_jax.restorer import NEEDED, in_compute_dtype
from zipir_jax.weights import abstract_weights

TINY = MODELS["tiny"]


def test_the_median_leaves_the_first_call_out(monkeypatch):
    clock = iter([0.0, 1.0, 10.0, 12.0, 20.0, 29.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    steps = []
    assert median_seconds(lambda: steps.append(1), 3) == 2
    assert len(steps) == 4


def test_no_repeats_are_refused():
    with pytest.raises(ValueError, match="repeats 0 is below 1"):
        median_seconds(lambda: None, 0)


@pytest.mark.parametrize(("module_class", "config"), [(DiT, TINY.dit), (Encoder, TINY.lp_vae.fine)])
def test_parameters_have_the_networks_shapes_in_the_dtype_asked_for(module_class, config):
    params = jax.eval_shape(lambda: cheap_params(module_class, config, "bfloat16"))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, abstract_params(module_class, config))
    dtypes = {(path[-1].key, leaf.dtype.name) for path, leaf in jax.tree.leaves_with_path(params)}
    assert dtypes == {("kernel", "bfloat16"), ("bias", "bfloat16"), ("scale", "float32")}


def test_weights_are_those_of_sampling():
    config = dataclasses.replace(TINY, dit=dataclasses.replace(TINY.dit, compute_dtype="bfloat16"))
    groups = abstract_weights(config)
    needed = {group: groups[group] for group in NEEDED}
    expected = jax.eval_shape(functools.partial(in_compute_dtype, config), needed)
    assert jax.eval_shape(lambda: cheap_weights(config)) == expected
