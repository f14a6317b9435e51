import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zipir_jax.config import DiscriminatorConfig
from zipir_jax.models.discriminator import PatchDiscriminator
from zipir_jax.models.layers import abstract_params, bind

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(name="discriminate", scope="module")
def make_discriminate(random_params):
    """`discriminate(layers)(image)`: logits of a small discriminator with random weights."""

    @functools.cache
    def make(layers):
        config = DiscriminatorConfig(base_channels=4, layers=layers, compute_dtype="float32")
        return jax.jit(bind(PatchDiscriminator, config, random_params(PatchDiscriminator, config)).__call__)

    return make


@pytest.mark.parametrize(("layers", "field"), [(1, 16), (2, 34), (3, 70)])  # pixels; 70 is Isola et al.'s
def test_each_logit_sees_a_patch_of_the_image(discriminate, layers, field):
    discriminator = discriminate(layers)
    image = jax.random.uniform(jax.random.key(1), (1, 32, 160, 3), minval=-1.0)
    middle = 160 // 2**layers // 2
    gradient = jax.jit(jax.grad(lambda image: discriminator(image)[0, :, middle].sum()))(image)
    columns = np.nonzero(np.abs(np.asarray(gradient)).sum((0, 1, 3)))[0]
    assert columns.max() - columns.min() + 1 == field


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_map_has_one_logit_per_stride(discriminate, layers):
    logits = jax.eval_shape(discriminate(layers), jnp.zeros((2, 64, 96, 3)))
    stride = 2**layers
    assert logits.shape == (2, 64 // stride - 2, 96 // stride - 2)
    assert logits.dtype == jnp.float32


def test_an_image_is_judged_alone(discriminate):
    discriminator = discriminate(3)
    images = jax.random.uniform(jax.random.key(1), (3, 48, 48, 3), minval=-1.0)
    together = discriminator(images)
    np.testing.assert_allclose(
        discriminator(images.at[0].set(1.0).at[2].set(-1.0))[1], together[1], atol=1e-6
    )
    np.testing.assert_allclose(discriminator(images[::-1]), together[::-1], atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 1e-3


def test_widths_double_up_to_eight_times_the_base():
    config = DiscriminatorConfig(layers=5)
    widths = [p["kernel"].shape[-1] for p in abstract_params(PatchDiscriminator, config)["convs"].values()]
    assert widths == [128, 256, 512, 512, 512]
