"""Rematerialisation: less is kept for the backward pass, and the gradients stay what they were."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zipir_jax.config import AutoencoderConfig, DiTConfig
from zipir_jax.models.dit import DiT
from zipir_jax.models.layers import bind
from zipir_jax.models.lp_vae import Decoder, Encoder

pytestmark = pytest.mark.usefixtures("quick_compile")
BAND = AutoencoderConfig(
    latent_channels=9,
    decoder_channels=12,
    base_channels=8,
    multipliers=(1, 1),
    blocks_per_scale=2,
    compute_dtype="float32",
)


def assert_same_gradients(programs, params):
    """To rounding, relative to each tensor's largest value."""
    plain, *others = (program(params) for program in programs)
    for other in others:
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(plain), jax.tree.leaves(other), strict=True
        ):
            assert np.abs(a).max() > 0, path
            np.testing.assert_allclose(b, a, atol=1e-4 * np.abs(a).max(), err_msg=jax.tree_util.keystr(path))


def test_the_dit_needs_less_memory_for_the_same_gradients(random_params):
    """Layers enough that what they keep, and not what one of them computes, fills the memory."""
    config = DiTConfig(layers=6, width=32, heads=2, text_width=16, compute_dtype="float32")
    params = random_params(DiT, config)
    rng = np.random.default_rng(0)
    noisy, lq = (jnp.asarray(rng.standard_normal((2, 8, 8, 64)), jnp.float32) for _ in range(2))
    text = jnp.asarray(rng.standard_normal((2, 5, 16)), jnp.float32)

    def compiled(remat):
        def loss(params):
            dit = bind(DiT, dataclasses.replace(config, remat=remat), params)
            lengths = jnp.array([5, 2])
            return jnp.square(dit(noisy, jnp.array([3, 700]), lq, text=text, text_lengths=lengths)).mean()

        return jax.jit(jax.grad(loss)).lower(params).compile()

    programs = [compiled(remat) for remat in ("none", "attention", "full")]
    plain, *less = (program.memory_analysis().temp_size_in_bytes for program in programs)
    assert max(less) < plain / 2
    assert_same_gradients(programs, params)


def test_of_a_kernel_of_attention_a_layer_keeps_the_result_and_a_number_a_query(monkeypatch, random_params):
    """With remat "attention", beside its input, which "full" keeps alone. Traced only: the kernel is a TPU's."""
    monkeypatch.setattr("zipir_jax.models.attention.check_implementation", lambda *_: None)
    config = DiTConfig(layers=3, width=128, heads=2, text_width=16, attention="splash")
    params = random_params(DiT, config)
    latent, text = jnp.ones((1, 8, 8, 64)), jnp.ones((1, 128, 16))

    def kept(remat):
        def loss(params):
            dit = bind(DiT, dataclasses.replace(config, remat=remat), params)
            return dit(latent, jnp.array([3]), latent, text).sum()

        _, backward = jax.eval_shape(lambda params: jax.vjp(loss, params), params)
        return sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(backward))

    queries, attentions = 2 * 8 * 8, 2  # to all tokens and to the text
    result, log_sum = 128 * 2, 2 * 4  # bytes of a query: bfloat16 channels, a float32 for each head
    assert kept("attention") - kept("full") == 3 * attentions * queries * (result + log_sum)


@pytest.mark.parametrize(
    ("network", "read"), [(Encoder, (1, 64, 64, 3)), (Decoder, (1, 32, 32, 12))], ids=["encoder", "decoder"]
)
def test_the_lp_vae_keeps_less_for_the_same_gradients(network, read, random_params):
    """What is kept is counted, not measured: XLA for CPU reorders these programs, and computes anew too early."""
    params = random_params(network, BAND)
    x = jax.random.normal(jax.random.key(0), read)

    def loss(remat, params):
        made = bind(network, dataclasses.replace(BAND, remat=remat), params)(x)
        return jnp.square(made[0] if network is Encoder else made).mean()

    def kept(remat):
        _, backward = jax.eval_shape(lambda params: jax.vjp(lambda p: loss(remat, p), params), params)
        return sum(array.size for array in jax.tree.leaves(backward))

    constants = sum(p.size for p in jax.tree.leaves(params))
    assert kept("full") - constants < 0.5 * (kept("none") - constants)
    assert_same_gradients(
        [jax.jit(jax.grad(lambda p, remat=remat: loss(remat, p))) for remat in ("none", "full")], params
    )
