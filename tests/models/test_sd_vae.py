import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import foreign_model
from zipir_jax.config import SDVAEConfig
from zipir_jax.models.layers import abstract_params, count_params
from zipir_jax.models.sd_vae import SDVAE, decode, encode, moments
from zipir_jax.weights.foreign import imported_config, load_imported

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(name="model", scope="module")
def load_model(sd_vae_folder):
    """(config, params) of diffusers' tiny AutoencoderKL."""
    _, _, config = imported_config(sd_vae_folder, "sd_vae")
    return config, load_imported(sd_vae_folder, "sd_vae", config)


def nhwc(array):
    return jnp.asarray(array.transpose(0, 2, 3, 1))


def assert_agrees(found, expected):
    difference = np.abs(found - nhwc(expected))
    assert difference.max() < 1e-5 * np.abs(expected).max()
    assert np.linalg.norm(difference) < 1e-5 * np.linalg.norm(expected)


def test_it_agrees_with_diffusers(model):
    config, params = model
    _, _, expected = foreign_model("sd_vae")
    mean, log_variance = moments(params, config, nhwc(expected["image"]))
    assert_agrees(mean, expected["mean"])
    assert_agrees(log_variance, expected["log_variance"])
    assert_agrees(decode(params, config, nhwc(expected["latent"])), expected["decoded"])


def test_the_latent_is_the_scaled_mean(model):
    config, params = model
    _, _, expected = foreign_model("sd_vae")
    assert config.scaling == 0.37
    latent = encode(params, config, nhwc(expected["image"]))
    np.testing.assert_allclose(latent, 0.37 * nhwc(expected["mean"]), atol=1e-5)


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (SDVAEConfig(), 83_653_863),  # of stabilityai/sd-vae-ft-mse
        # The paper's f32c64: what diffusers' AutoencoderKL of these scales has.
        (SDVAEConfig(multipliers=(1, 2, 4, 4, 4, 4), latent_channels=64), 141_159_875),
    ],
)
def test_it_has_the_parameters_of_diffusers(config, count):
    assert count_params(abstract_params(SDVAE, config)) == count


def test_the_papers_baseline_shrinks_32_times():
    config = SDVAEConfig(multipliers=(1, 2, 4, 4, 4, 4), latent_channels=64)
    assert config.factor == 32 and SDVAEConfig().factor == 8
    image = jax.ShapeDtypeStruct((1, 64, 96, 3), jnp.float32)
    latent = jax.eval_shape(lambda p, x: encode(p, config, x), abstract_params(SDVAE, config), image)
    assert latent.shape == (1, 2, 3, 64)


def test_sides_that_do_not_divide_are_refused(model):
    config, params = model
    with pytest.raises(ValueError, match="height 42 is not a multiple of 4"):
        moments(params, config, jnp.zeros((1, 42, 40, 3)))


def test_impossible_configs_are_refused():
    with pytest.raises(ValueError, match="24 channels are not a multiple of 32 groups"):
        SDVAEConfig(base_channels=24)
    with pytest.raises(ValueError, match="multipliers"):
        SDVAEConfig(multipliers=())
