import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zipir_jax.config import MODELS
from zipir_jax.models.layers import abstract_params, bind, init_params
from zipir_jax.models.lp_vae import Decoder, Encoder
from zipir_jax.models.pixel_decoder import PixelDecoder, from_lp_vae

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(name="config", scope="module")
def make_config(tiny_model):
    return tiny_model.lp_vae


@pytest.fixture(name="lp_vae", scope="module")
def make_lp_vae(config, random_params):
    return {
        "fine_encoder": random_params(Encoder, config.fine, 0),
        "fine_decoder": random_params(Decoder, config.fine, 1),
    }


@pytest.fixture(name="params", scope="module")
def make_params(config, lp_vae):
    return from_lp_vae(init_params(PixelDecoder, config, jax.random.key(1)), lp_vae)


@pytest.fixture(name="run", scope="module")
def make_run(config):
    return jax.jit(lambda params, latent, lq: bind(PixelDecoder, config, params)(latent, lq))


@pytest.fixture(name="inputs", scope="module")
def make_inputs():
    keys = jax.random.split(jax.random.key(2))
    latent = jax.random.normal(keys[0], (2, 1, 2, 64))
    return latent, jax.random.uniform(keys[1], (2, 32, 64, 3), minval=-1.0)


def test_it_starts_as_the_plain_decoder(config, lp_vae, params, inputs, run):
    latent, lq = inputs
    plain = jax.jit(lambda params: bind(Decoder, config.fine, params)(latent))(lp_vae["fine_decoder"])
    np.testing.assert_allclose(run(params, latent, lq), plain, atol=1e-5, rtol=1e-5)
    np.testing.assert_array_equal(run(params, latent, -lq), run(params, latent, lq))
    assert np.abs(plain).max() > 0.01


def test_its_extractor_is_a_copy_of_the_fine_encoder(config, lp_vae, params, inputs):
    assert params["extractor"].keys() == lp_vae["fine_encoder"].keys() - {"head", "norm"}

    @jax.jit
    def both(extractor, encoder, lq):
        copy = bind(PixelDecoder, config, params | {"extractor": extractor}).extractor.features(lq)
        return copy, bind(Encoder, config.fine, encoder).features(lq)

    copies, features = both(params["extractor"], lp_vae["fine_encoder"], inputs[1])
    assert len(copies) == len(features) == len(config.fine.multipliers)
    for copy, feature in zip(copies, features, strict=True):
        np.testing.assert_allclose(copy, feature, atol=1e-6)


def test_there_is_a_fusion_at_every_scale_of_the_decoder(config, params):
    widths = [config.fine.base_channels * m for m in config.fine.multipliers][::-1]
    entering = [widths[0], *widths[:-1]]
    kernels = [params["fusions"][str(i)]["project"]["kernel"] for i in range(len(params["fusions"]))]
    assert [k.shape[2:] for k in kernels] == list(zip(widths, entering, strict=True))
    assert not any(np.asarray(k).any() for k in kernels)


def test_pixels_enter_at_the_scales_that_patches_hide(config, params):
    enlarging = [params["decoder"]["enlarge"][str(i)]["kernel"].shape[-1] for i in range(2)]  # patches of 4
    kernels = [params["pixel_fusions"][str(i)]["kernel"] for i in range(2)]
    assert [k.shape for k in kernels] == [(3, 3, 3, channels) for channels in enlarging]
    assert not any(np.asarray(k).any() for k in kernels)
    assert "pixel_fusions" not in abstract_params(PixelDecoder, MODELS["paper"].lp_vae)


def test_a_linear_path_hands_sharp_pixels_through(config, params, inputs, run):
    """Whatever the features can hold: a change of one pixel is a change of that pixel in the result."""
    latent, lq = inputs
    fusion = params["pixel_fusions"] | {
        "1": params["pixel_fusions"]["1"] | {"kernel": jnp.ones((3, 3, 3, 4))}
    }
    changed = params | {"pixel_fusions": fusion}
    difference = run(changed, latent, lq.at[0, 9, 9].add(-1.0)) - run(changed, latent, lq)
    touched = np.argwhere(np.abs(difference[0]).max(-1) > 1e-6)
    assert touched.min(0).tolist() == [7, 7] and touched.max(0).tolist() == [11, 11]  # two 3x3 convolutions


def test_the_gradient_reaches_every_tensor_after_one_step(params, inputs, run):
    latent, lq = inputs
    target = jax.random.uniform(jax.random.key(3), lq.shape, minval=-1.0)
    gradient = jax.jit(jax.grad(lambda p: jnp.square(run(p, latent, lq) - target).mean()))

    first = gradient(params)
    for fusion in first["fusions"].values():
        assert np.asarray(fusion["project"]["kernel"]).any()
        assert np.asarray(fusion["block"]["conv2"]["kernel"]).any()
    for fusion in first["pixel_fusions"].values():
        assert np.asarray(fusion["kernel"]).any()
    # As long as the projections are zero, nothing passes them.
    assert not any(np.asarray(g).any() for g in jax.tree.leaves(first["extractor"]))

    second = gradient(jax.tree.map(lambda p, g: p - 0.1 * g, params, first))
    paths, _ = jax.tree_util.tree_flatten_with_path(second)
    assert [jax.tree_util.keystr(path) for path, g in paths if not np.asarray(g).any()] == []


def test_the_degraded_image_acts_on_its_own_place_and_picture(config, random_params, inputs, run):
    latent, lq = inputs
    params = random_params(PixelDecoder, config)
    difference = run(params, latent, lq.at[0, 4, 4].add(-1.0)) - run(params, latent, lq)
    assert np.abs(difference[0, 4, 4]).max() > 1e-3
    assert np.abs(difference[1]).max() == 0


def test_it_has_no_parameters_that_nothing_uses(config):
    groups = abstract_params(PixelDecoder, config)
    assert groups.keys() == {"extractor", "decoder", "fusions", "pixel_fusions"}
    assert not {"head", "norm"} & groups["extractor"].keys()
