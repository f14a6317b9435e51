import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from zipir_jax.config import AutoencoderConfig
from zipir_jax.models.layers import (
    Downsample,
    ResidualBlock,
    Upsample,
    abstract_params,
    area_downsample,
    bilinear_upsample,
    bind,
    conv,
    count_params,
    depth_to_space,
    enlarging_conv,
    folded_conv,
    init_params,
    smooth,
    space_to_depth,
)
from zipir_jax.models.lp_vae import Encoder

pytestmark = pytest.mark.usefixtures("quick_compile")
CONFIG = AutoencoderConfig(
    latent_channels=3,
    decoder_channels=4,
    base_channels=4,
    multipliers=(1, 2),
    blocks_per_scale=1,
    compute_dtype="float32",
)


@pytest.fixture(name="image")
def make_image():
    return jax.random.uniform(jax.random.key(0), (2, 12, 20, 3), minval=-1.0)


def test_parameters_of_another_config_are_refused_by_name():
    params = init_params(Encoder, CONFIG, jax.random.key(0))
    wider = dataclasses.replace(CONFIG, base_channels=8)
    with pytest.raises(ValueError, match=r"Encoder\.blocks\.0\.conv1\.bias has shape \(4,\), not \(8,\)"):
        bind(Encoder, wider, params)
    del params["head"]
    with pytest.raises(ValueError, match=r"Encoder lacks the tensor head\.bias"):
        bind(Encoder, CONFIG, params)


def test_space_to_depth_puts_each_patch_into_the_channels_of_one_pixel(image):
    folded = space_to_depth(image, 4)
    assert folded.shape == (2, 3, 5, 48)
    np.testing.assert_array_equal(folded[1, 2, 3], image[1, 8:12, 12:16].ravel())


def test_bilinear_upsample_is_the_textbook_one(image):
    expected = jax.image.resize(image, (2, 24, 40, 3), "bilinear")
    np.testing.assert_allclose(bilinear_upsample(image), expected, atol=1e-6)


def test_area_downsample_is_the_mean_of_each_block(image):
    small = area_downsample(image, 4)
    assert small.shape == (2, 3, 5, 3)
    for row in range(3):
        for column in range(5):
            block = np.asarray(image, np.float64)[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            np.testing.assert_allclose(small[:, row, column], block.mean((1, 2)), atol=1e-6)


def test_area_downsample_names_the_side_that_does_not_fit(image):
    with pytest.raises(ValueError, match="height 12 is not a multiple of 5"):
        area_downsample(image, 5)
    with pytest.raises(ValueError, match="width 20 is not a multiple of 6"):
        area_downsample(image, 6)


def test_a_residual_block_that_starts_at_zero_is_the_identity(image):
    x = jnp.concatenate([image, image[..., :1]], -1)
    block = ResidualBlock(4, 4, nnx.Rngs(0), dtype="float32", zero=True)
    np.testing.assert_array_equal(block(x), x)
    other = ResidualBlock(4, 4, nnx.Rngs(0), dtype="float32")
    assert np.abs(other(x) - x).max() > 0.1


def test_a_residual_block_that_changes_the_width_adds_to_a_projection(image):
    block = ResidualBlock(3, 6, nnx.Rngs(0), dtype="float32", zero=True)
    kernel = np.asarray(block.skip.kernel[...])
    assert kernel.shape == (1, 1, 3, 6)
    np.testing.assert_allclose(jax.jit(block.__call__)(image), np.asarray(image) @ kernel[0, 0], atol=1e-6)


def test_norms_and_convolutions_see_no_statistics_of_the_whole_image(image):
    block = jax.jit(ResidualBlock(3, 3, nnx.Rngs(0), dtype="float32").__call__)
    changed = block(image.at[:, 0, 0].set(100.0)) != block(image)
    rows, columns = np.nonzero(np.asarray(changed).any((0, 3)))
    assert (rows.max(), columns.max()) == (2, 2)  # two 3x3 convolutions


def test_a_strided_convolution_samples_the_unstrided_one_from_the_first_pixel_on(image):
    strided = conv(3, 5, nnx.Rngs(0), dtype="float32", stride=2)
    dense = conv(3, 5, nnx.Rngs(0), dtype="float32")
    np.testing.assert_allclose(strided(image), dense(image)[:, ::2, ::2], atol=1e-6)


def test_a_strided_convolution_with_an_even_kernel_does_not_shift(image):
    layer = conv(3, 5, nnx.Rngs(0), dtype="float32", kernel=4, stride=2)
    kernel = layer.kernel[...]
    layer.kernel[...] = (kernel + kernel[::-1] + kernel[:, ::-1] + kernel[::-1, ::-1]) / 4
    result = layer(image)
    assert result.shape == (2, 6, 10, 5)
    np.testing.assert_allclose(layer(image[:, ::-1, ::-1])[:, ::-1, ::-1], result, atol=1e-6)


def test_downsample_adds_its_convolution_to_the_mean(image):
    layer = Downsample(3, nnx.Rngs(0), dtype="float32")
    expected = image.reshape(2, 6, 2, 10, 2, 3).mean((2, 4)) + layer.conv(image)
    np.testing.assert_allclose(layer(image), expected, atol=1e-6)


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_depth_to_space_is_the_inverse_of_space_to_depth(image, patch):
    np.testing.assert_array_equal(depth_to_space(space_to_depth(image, patch), patch), image)


def test_upsample_adds_what_it_unfolds_to_the_bilinear_picture(image):
    layer = Upsample(3, nnx.Rngs(0), dtype="float32", unfold=True)
    unfolded = np.asarray(layer.unfold(image)).reshape(2, 12, 20, 2, 2, 3)
    pixels = np.zeros((2, 24, 40, 3), np.float32)
    for row in (0, 1):
        for column in (0, 1):
            pixels[:, row::2, column::2] = unfolded[..., row, column, :]
    expected = bilinear_upsample(image) + smooth(jnp.asarray(pixels))
    np.testing.assert_allclose(layer(image), expected, atol=1e-6)
    # Nearest neighbours, smoothed, are the bilinear enlargement: the two summands share one filter.
    np.testing.assert_allclose(smooth(image.repeat(2, 1).repeat(2, 2)), bilinear_upsample(image), atol=1e-6)


def test_a_convolution_of_folded_pixels_is_the_convolution(image):
    layer = conv(3, 5, nnx.Rngs(0), dtype="float32")
    layer.bias[...] = jax.random.normal(jax.random.key(1), (5,))
    folded = folded_conv(layer, space_to_depth(image, 2))
    np.testing.assert_allclose(depth_to_space(folded, 2), layer(image), atol=1e-5)


def test_an_enlarging_convolution_is_that_of_the_bilinear_enlargement(image):
    layer = conv(3, 5, nnx.Rngs(0), dtype="float32")
    layer.bias[...] = jax.random.normal(jax.random.key(1), (5,))
    beyond = jnp.pad(image, [(0, 0), (2, 2), (2, 2), (0, 0)], "edge")
    expected = layer(bilinear_upsample(beyond))[:, 4:-4, 4:-4]
    np.testing.assert_allclose(depth_to_space(enlarging_conv(layer, image), 2), expected, atol=1e-5)


def test_the_gradient_of_smoothing_is_its_transpose(image):
    weights = jax.random.normal(jax.random.key(2), (5, *image.shape))
    for weight in weights:
        value, gradient = jax.value_and_grad(lambda x, weight=weight: (smooth(x) * weight).sum())(image)
        np.testing.assert_allclose((image * gradient).sum(), value, rtol=1e-4, atol=1e-4)


def test_upsample_without_unfolding_is_a_convolution_of_the_enlargement(image):
    layer = Upsample(3, nnx.Rngs(0), dtype="float32", unfold=False)
    enlarged = bilinear_upsample(image)
    np.testing.assert_allclose(layer(image), enlarged + layer.conv(enlarged), atol=1e-6)


@pytest.mark.parametrize("unfold", [False, True])
def test_upsample_leaves_what_is_flat_flat(unfold):
    """Whatever its weights and biases: no grid."""
    layer = Upsample(3, nnx.Rngs(0), dtype="float32", unfold=unfold)
    learned = layer.unfold if unfold else layer.conv
    learned.bias[...] = jax.random.normal(jax.random.key(0), learned.bias.shape)
    flat = layer(jnp.broadcast_to(jnp.array([0.3, -0.5, 0.9]), (1, 6, 6, 3)))[:, 2:-2, 2:-2]
    np.testing.assert_allclose(flat, np.broadcast_to(flat[:, :1, :1], flat.shape), atol=1e-6)


@pytest.fixture(name="params", scope="module")
def make_params():
    return init_params(Encoder, CONFIG, jax.random.key(3))


def test_abstract_params_have_the_shapes_of_initialised_ones(params):
    abstract = abstract_params(Encoder, CONFIG)
    assert all(isinstance(p, jax.ShapeDtypeStruct) for p in jax.tree.leaves(abstract))

    def signatures(tree):
        return jax.tree.map(lambda p: (p.shape, p.dtype), tree)

    assert signatures(params) == signatures(abstract)
    assert count_params(abstract) == sum(np.prod(p.shape) for p in jax.tree.leaves(params))


def test_params_have_string_keys_throughout(params):
    paths, _ = jax.tree_util.tree_flatten_with_path(params)
    keys = [key.key for path, _ in paths for key in path]
    assert all(isinstance(key, str) for key in keys)
    assert "1" in keys  # of the list of blocks


def test_the_key_decides_the_initial_params_and_no_two_layers_share_them(params):
    other = init_params(Encoder, CONFIG, jax.random.key(1))
    kernels = [tree["stem"]["kernel"] for tree in (params, other)]
    kernels += [params["blocks"]["0"][name]["kernel"] for name in ("conv1", "conv2")]
    moments = [(float(jnp.mean(k)), float(jnp.std(k))) for k in kernels]
    assert len(set(moments)) == len(moments)


def test_bind_inside_jit_grad_and_scan_gives_the_numbers_of_the_module_itself(params, image):
    module = Encoder(CONFIG, nnx.Rngs(jax.random.key(3)))
    expected = jax.jit(lambda image: module(image)[0])(image)

    def latent(params, image):
        return bind(Encoder, CONFIG, params)(image)[0]

    np.testing.assert_allclose(jax.jit(latent)(params, image), expected, atol=1e-5)

    gradient = jax.jit(jax.grad(lambda params: latent(params, image).sum()))(params)
    assert jax.tree.structure(gradient) == jax.tree.structure(params)
    # The mean half of the head's bias is added to every one of the 2 * 6 * 10 latent pixels; the other half to none.
    np.testing.assert_allclose(gradient["head"]["bias"], [120, 120, 120, 0, 0, 0], rtol=1e-5)

    @jax.jit
    def scanned(stacked):
        return jax.lax.scan(lambda carry, params: (carry, latent(params, image)), 0, stacked)[1]

    head = params["head"] | {"bias": params["head"]["bias"] + 1}
    stacked = jax.tree.map(lambda *p: jnp.stack(p), params, params | {"head": head})
    np.testing.assert_allclose(scanned(stacked), [expected, expected + 1], atol=1e-5)


def test_binding_other_params_leaves_the_first_module_as_it_was(params):
    first = bind(Encoder, CONFIG, params)
    bind(Encoder, CONFIG, jax.tree.map(jnp.zeros_like, params))
    np.testing.assert_array_equal(first.stem.kernel[...], params["stem"]["kernel"])
    assert all(isinstance(p, jax.ShapeDtypeStruct) for p in jax.tree.leaves(abstract_params(Encoder, CONFIG)))
