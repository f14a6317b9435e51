import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zipir_jax.models.attention import attention


@pytest.fixture(name="qkv")
def make_qkv():
    keys = jax.random.split(jax.random.key(0), 3)
    lengths = (5, 7, 7)  # queries, keys, values
    return tuple(jax.random.normal(key, (3, n, 2, 8)) for key, n in zip(keys, lengths, strict=True))


def naive(query, key, value):
    """float64 softmax attention of one batch item, head by head."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    heads = []
    for h in range(query.shape[1]):
        weights = np.exp(query[:, h] @ key[:, h].T / np.sqrt(query.shape[-1]))
        heads.append(weights / weights.sum(-1, keepdims=True) @ value[:, h])
    return np.stack(heads, 1)


def test_xla_equals_softmax_written_out(qkv):
    result = attention(*qkv, implementation="xla")
    for item in range(3):
        np.testing.assert_allclose(result[item], naive(*(x[item] for x in qkv)), atol=1e-5)


def test_keys_beyond_the_length_have_no_influence(qkv):
    query, key, value = qkv
    lengths = jnp.array([7, 1, 4])
    result = attention(query, key, value, implementation="xla", key_lengths=lengths)
    for item, n in enumerate(lengths):
        expected = naive(query[item], key[item, :n], value[item, :n])
        np.testing.assert_allclose(result[item], expected, atol=1e-5)


def test_the_result_keeps_the_dtype(qkv):
    half = [x.astype(jnp.bfloat16) for x in qkv]
    result = attention(*half, implementation="xla")
    assert result.dtype == jnp.bfloat16
    exact = attention(*(x.astype(jnp.float32) for x in half), implementation="xla")
    np.testing.assert_allclose(result.astype(jnp.float32), exact, atol=0.03)


@pytest.mark.parametrize("name", ["flash", "XLA", ""])
def test_an_unknown_implementation_is_refused_with_its_name(qkv, name):
    with pytest.raises(ValueError, match=f"attention implementation '{name}' is not one of: xla, cudnn"):
        attention(*qkv, implementation=name)
