import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from zipir_jax.models.discriminator import PatchDiscriminator
from zipir_jax.models.layers import bind
from zipir_jax.models.lp_vae import Decoder
from zipir_jax.training import losses
from zipir_jax.training.losses import (
    image_gradients,
    kl_divergence,
    lpips_net,
    random_windows,
)

pytestmark = pytest.mark.usefixtures("quick_compile", "quick_lpips")
KEY = jax.random.key(7)
LAST_LAYER = "head_conv"


# --------------------------------------------------------------------------------------------------
# Small parts
# --------------------------------------------------------------------------------------------------


def test_kl_is_that_of_a_monte_carlo_estimate():
    mean = jnp.array([0.0, 1.5, -0.5, 2.0]).reshape(1, 1, 2, 2)
    log_variance = jnp.log(jnp.array([1.0, 0.25, 4.0, 0.1])).reshape(1, 1, 2, 2)
    draws = np.random.default_rng(0).standard_normal((200_000, 1, 2, 2))
    values = np.asarray(mean) + np.exp(0.5 * np.asarray(log_variance)) * draws
    # log q - log p; the normalising constants cancel.
    log_ratio = 0.5 * (values**2 - draws**2 - np.asarray(log_variance))
    assert abs(kl_divergence(mean, log_variance) - log_ratio.sum((1, 2, 3)).mean()) < 0.05
    assert kl_divergence(jnp.zeros((2, 3, 3, 4)), jnp.zeros((2, 3, 3, 4))) == 0
    batch = [jnp.concatenate([x, x]) for x in (mean, log_variance)]
    np.testing.assert_allclose(kl_divergence(*batch), kl_divergence(mean, log_variance), rtol=1e-6)


def test_random_windows_are_the_same_of_both_and_anywhere_in_each_image():
    image = jnp.arange(2 * 7 * 6 * 3, dtype=jnp.float32).reshape(2, 7, 6, 3)
    windows = jax.jit(lambda key: random_windows(key, 4, image, image + 1000))
    corners = [set(), set()]
    for seed in range(200):
        a, b = windows(jax.random.key(seed))
        np.testing.assert_array_equal(b, a + 1000)
        for i in range(2):
            y, x = divmod(int(a[i, 0, 0, 0] - image[i, 0, 0, 0]) // 3, 6)
            corners[i].add((y, x))
            np.testing.assert_array_equal(a[i], image[i, y : y + 4, x : x + 4])
    assert corners[0] == corners[1] == {(y, x) for y in range(4) for x in range(3)}
    whole = random_windows(jax.random.key(0), 0, image, image + 1000)
    np.testing.assert_array_equal(whole[0], image)


def test_the_lpips_network_follows_the_backend_only_where_it_is_left_open():
    assert lpips_net("auto") == ("alexnet" if jax.default_backend() == "cpu" else "vgg16")
    assert lpips_net("vgg16") == "vgg16"
    assert lpips_net("alexnet") == "alexnet"


# --------------------------------------------------------------------------------------------------
# image_gradients against jax.grad of the loss written out
# --------------------------------------------------------------------------------------------------


@pytest.fixture(name="case", scope="module")
def make_case(make_config, random_params, quick_lpips):
    """A decoder that makes an image from a fixed latent, and a KL that depends on one of its tensors."""
    config = make_config("fine")
    config = dataclasses.replace(
        config, loss=dataclasses.replace(config.loss, lpips=0.7, lpips_crop=40, l1=1.3, kl=0.5)
    )
    params = {
        "generator": random_params(Decoder, config.model.lp_vae.fine, 0),
        "discriminator": random_params(PatchDiscriminator, config.discriminator, 1),
    }
    latent = jax.random.normal(jax.random.key(0), (2, 2, 2, 64))
    target = jax.random.uniform(jax.random.key(1), (2, 64, 64, 3), minval=-1.0)
    lpips_params, distance = losses.load_lpips("alexnet")

    def decoder(generator):
        return bind(Decoder, config.model.lp_vae.fine, generator)

    def kl(generator):
        return jnp.square(generator["stem"]["kernel"]).sum()

    def logits(discriminator, image):
        return bind(PatchDiscriminator, config.discriminator, discriminator)(image)

    def reconstruction(generator):
        image = decoder(generator)(latent)
        lpips = distance(lpips_params, *random_windows(KEY, config.loss.lpips_crop, image, target)).mean()
        return 1.3 * jnp.abs(image - target).mean() + 0.7 * lpips

    def adversarial(generator):
        return -logits(params["discriminator"], decoder(generator)(latent)).mean()

    def run(adversarial, params):
        return image_gradients(
            config,
            params,
            inputs=lambda generator: ((latent,), kl(generator)),
            decoder=decoder,
            target=target,
            lpips_params=lpips_params,
            key=KEY,
            adversarial=adversarial,
        )

    return types.SimpleNamespace(
        config=config,
        params=params,
        latent=latent,
        target=target,
        decoder=decoder,
        logits=logits,
        kl=lambda generator: 0.5 * kl(generator) / target[0].size,
        reconstruction=jax.jit(jax.value_and_grad(reconstruction))(params["generator"]),
        adversarial=jax.jit(jax.value_and_grad(adversarial))(params["generator"]),
        run=functools.cache(lambda adversarial: jax.jit(functools.partial(run, adversarial))(params)),
    )


def assert_trees_close(result, expected, tolerance=1e-4):
    """Each tensor, relative to its own largest value."""
    assert jax.tree.structure(result) == jax.tree.structure(expected)
    for (path, a), b in zip(
        jax.tree_util.tree_flatten_with_path(result)[0], jax.tree.leaves(expected), strict=True
    ):
        scale = max(np.abs(b).max(), 1e-12)
        np.testing.assert_allclose(a / scale, b / scale, atol=tolerance, err_msg=jax.tree_util.keystr(path))


def naive_weight(case):
    """|dL_rec / dlast layer| / |dL_adv / dlast layer|, from two whole backward passes."""
    norms = [optax.tree.norm(gradient[LAST_LAYER]) for _, gradient in (case.reconstruction, case.adversarial)]
    return norms[0] / (norms[1] + 1e-4)


def test_without_the_discriminator_it_is_the_gradient_of_reconstruction_and_kl(case):
    gradients, metrics = case.run(False)
    kl, kl_gradient = jax.value_and_grad(case.kl)(case.params["generator"])
    assert_trees_close(gradients["generator"], jax.tree.map(jnp.add, case.reconstruction[1], kl_gradient))
    np.testing.assert_allclose(metrics["loss"], case.reconstruction[0] + kl, rtol=1e-5)
    assert jax.tree.structure(gradients["discriminator"]) == jax.tree.structure(case.params["discriminator"])
    assert not any(np.asarray(g).any() for g in jax.tree.leaves(gradients["discriminator"]))
    assert "weight" not in metrics


def test_the_adaptive_weight_is_the_ratio_of_gradient_norms_at_the_last_layer(case):
    _, metrics = case.run(True)
    expected = case.config.loss.adversarial * naive_weight(case)
    np.testing.assert_allclose(metrics["weight"], expected, rtol=1e-4)
    assert 0.01 < metrics["weight"] < 1e3


def test_with_the_discriminator_the_weight_is_a_constant_in_the_gradient(case):
    gradients, metrics = case.run(True)
    weight = case.config.loss.adversarial * naive_weight(case)
    kl, kl_gradient = jax.value_and_grad(case.kl)(case.params["generator"])
    expected = jax.tree.map(
        lambda r, a, k: r + weight * a + k, case.reconstruction[1], case.adversarial[1], kl_gradient
    )
    assert_trees_close(gradients["generator"], expected)
    total = case.reconstruction[0] + weight * case.adversarial[0] + kl
    np.testing.assert_allclose(metrics["loss"], total, rtol=1e-4)
    np.testing.assert_allclose(metrics["adversarial"], case.adversarial[0], rtol=1e-4, atol=1e-6)


def test_the_discriminator_learns_by_the_hinge_loss(case):
    gradients, metrics = case.run(True)

    @jax.jit
    def both_logits(discriminator):
        fake = case.decoder(case.params["generator"])(case.latent)
        return case.logits(discriminator, case.target), case.logits(discriminator, fake)

    real, fake = (np.asarray(x, np.float64) for x in both_logits(case.params["discriminator"]))
    expected = 0.5 * (np.maximum(1 - real, 0).mean() + np.maximum(1 + fake, 0).mean())
    np.testing.assert_allclose(metrics["discriminator"], expected, rtol=1e-5)
    assert (np.abs(real) < 1).any()
    assert (np.abs(fake) < 1).any()

    def hinge(discriminator):
        real, fake = both_logits(discriminator)
        return 0.5 * (jnp.maximum(1 - real, 0).mean() + jnp.maximum(1 + fake, 0).mean())

    assert_trees_close(gradients["discriminator"], jax.jit(jax.grad(hinge))(case.params["discriminator"]))
