import time

import jax
import jax.numpy as jnp
import pytest

from zipir_jax.config import MODELS
from zipir_jax.measure.timing import cheap_params, median_seconds
from zipir_jax.models.dit import DiT
from zipir_jax.models.layers import abstract_params
from zipir_jax.models.lp_vae import Encoder

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
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
