import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P
from jax.sharding import AbstractMesh

from tests.conftest import foreign_model
from zipir_jax import parallel
from zipir_jax.config import T5Config
from zipir_jax.models.layers import abstract_params, bind, count_params
from zipir_jax.models.t5 import T5Encoder, distance_buckets
from zipir_jax.weights.foreign import imported_config, load_imported

TINY = T5Config(layers=2, width=32, heads=2, head_width=16, hidden=48, vocabulary=50, compute_dtype="float32")


pytestmark = pytest.mark.usefixtures("quick_compile")


@functools.partial(jax.jit, static_argnums=0)
def run(config, params, tokens, lengths):
    return bind(T5Encoder, config, params)(tokens, lengths)


def encode(config, params, tokens, lengths):
    return np.asarray(run(config, params, jnp.asarray(tokens), jnp.asarray(lengths)))


def test_it_agrees_with_transformers(t5_folder):
    """Texts of 300, 1 and 37 tokens in one batch; 300 is beyond the distance from which all share a bucket."""
    _, _, config = imported_config(t5_folder, "t5")
    params = load_imported(t5_folder, "t5", config)
    _, _, expected = foreign_model("t5")
    found = encode(config, params, expected["tokens"], expected["lengths"])
    is_token = np.arange(found.shape[1]) < expected["lengths"][:, None]
    difference = np.abs(found[is_token] - expected["embeddings"])
    assert difference.max() < 1e-5 * np.abs(expected["embeddings"]).max()
    assert np.linalg.norm(difference) < 1e-5 * np.linalg.norm(expected["embeddings"])
    assert (found[~is_token] == 0).all()


def test_buckets_of_distances_are_those_that_t5_was_trained_with():
    _, _, expected = foreign_model("t5")
    farthest = len(expected["buckets"]) // 2
    buckets = distance_buckets(farthest + 1, 32, 128)
    np.testing.assert_array_equal(buckets[0], expected["buckets"][farthest:])  # keys after the query
    np.testing.assert_array_equal(buckets[-1], expected["buckets"][: farthest + 1])
    # 16 would be of distance 0 after the query, which there is not.
    assert set(buckets.flat) == set(range(32)) - {16}


def test_padding_has_no_influence(random_params):
    params = random_params(T5Encoder, TINY)
    tokens = np.random.default_rng(0).integers(0, 50, (2, 9))
    expected = encode(TINY, params, tokens[:1, :5], [5])
    found = encode(TINY, params, tokens, [5, 9])
    np.testing.assert_allclose(found[:1, :5], expected, atol=1e-5)
    assert (found[0, 5:] == 0).all() and (found[1] != 0).all()


def test_positions_enter_by_the_bias_of_the_attention_alone(random_params):
    """Without it the order of the tokens is nothing to them."""
    params = random_params(T5Encoder, TINY)
    tokens = np.random.default_rng(0).integers(0, 50, (1, 40))
    order = np.random.default_rng(1).permutation(40)

    def change():
        return np.abs(
            encode(TINY, params, tokens[:, order], [40]) - encode(TINY, params, tokens, [40])[:, order]
        )

    assert change().max() > 0.1
    params["relative_bias"]["embedding"][:] = params["relative_bias"]["embedding"][0]
    assert change().max() < 1e-4


def test_bfloat16_is_near_float32(random_params):
    params = random_params(T5Encoder, TINY)
    tokens = np.random.default_rng(0).integers(0, 50, (2, 30))
    exact = encode(TINY, params, tokens, [30, 30])
    found = encode(dataclasses.replace(TINY, compute_dtype="bfloat16"), params, tokens, [30, 30])
    assert found.dtype == np.float32
    assert 1e-4 < np.linalg.norm(found - exact) / np.linalg.norm(exact) < 0.05


def test_what_late_blocks_add_to_a_large_sum_is_not_lost(random_params):
    """Of thousands, where bfloat16 has steps of 8 and more."""
    params = random_params(T5Encoder, TINY)
    params["token_embedding"]["embedding"] *= 3000
    params["token_embedding"]["embedding"] = params["token_embedding"]["embedding"].astype(jnp.bfloat16)
    tokens = np.random.default_rng(0).integers(0, 50, (1, 12))

    def contribution(compute_dtype):
        config = dataclasses.replace(TINY, compute_dtype=compute_dtype)
        silent = jax.tree.map(lambda x: x, params)
        silent["blocks"] = jax.tree.map(jnp.zeros_like, params["blocks"])
        return encode(config, params, tokens, [12]) - encode(config, silent, tokens, [12])

    exact = contribution("float32")
    assert np.linalg.norm(contribution("bfloat16") - exact) < 0.1 * np.linalg.norm(exact)


# --------------------------------------------------------------------------------------------------
# XXL, without its memory
# --------------------------------------------------------------------------------------------------


def test_xxl_has_the_parameters_of_the_published_encoder():
    assert count_params(abstract_params(T5Encoder, T5Config())) == 4_762_310_656


@pytest.mark.parametrize("shape", [(1, 8, 1), (4, 64, 1), (1, 8, 4), (2, 16, 8)])
def test_xxl_is_divided_over_fsdp_and_tensor(shape):
    mesh = AbstractMesh(shape, ("data", "fsdp", "tensor"))
    abstract = abstract_params(T5Encoder, T5Config())
    shardings = parallel.parameter_shardings(mesh, abstract)  # raises for a large one without a rule
    assert shardings["blocks"]["attention"]["out"]["kernel"].spec == P(None, "tensor", "fsdp")
    assert shardings["token_embedding"]["embedding"].spec == P(None, "fsdp")
    part = sum(
        np.prod(sharding.shard_shape(leaf.shape))
        for sharding, leaf in zip(jax.tree.leaves(shardings), jax.tree.leaves(abstract), strict=True)
    )
    # The token embedding is divided over fsdp alone: a 36th of all.
    share = part / count_params(abstract) * shape[1] * shape[2]
    assert 1 <= share < 1.01 + (shape[2] - 1) / 36


def test_impossible_configs_are_refused():
    with pytest.raises(ValueError, match=r"buckets 30 is not a multiple of 4"):
        T5Config(buckets=30)
    with pytest.raises(ValueError, match="max_distance 8 is not at least 9"):
        T5Config(max_distance=8)
