"""Building blocks shared by the networks, and the bridge from `flax.nnx` modules to plain dicts of arrays.

Everything here is strictly local: convolutions and norms over the channels of one pixel, never over space, so that
a network can run in tiles or with its height sharded and give the same image.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float


@functools.cache
def _abstract(module_class, config):
    return nnx.split(nnx.eval_shape(lambda: module_class(config, nnx.Rngs(0))))


def abstract_params(module_class, config) -> dict:
    """Nested dict of `jax.ShapeDtypeStruct`, one per parameter of `module_class(config)`; allocates nothing."""
    return _plain(_abstract(module_class, config)[1])


def _plain(state: nnx.State) -> dict:
    """Nested dict with string keys throughout, as files and checkpoints keep them."""

    def stringify(tree):
        return {str(k): stringify(v) for k, v in tree.items()} if isinstance(tree, dict) else tree

    return stringify(nnx.to_pure_dict(state))


def init_params(module_class, config, key) -> dict:
    """Nested dict of freshly initialised parameters of `module_class(config)`."""

    def create(key):
        return _plain(nnx.split(module_class(config, nnx.Rngs(key)))[1])

    return jax.jit(create)(key)


def bind(module_class, config, params: dict):
    """The module `module_class(config)` with these parameters; call it inside any `jax` transform.

    Raises ValueError, naming the tensor, for parameters of another config.
    """
    check_shapes(module_class.__name__, params, abstract_params(module_class, config))
    graphdef, state = _abstract(module_class, config)
    state = jax.tree.map(lambda x: x, state)  # a copy of the structure: the cached one stays abstract
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graphdef, state)


def check_shapes(name: str, tree: dict, expected: dict) -> None:
    """Raises ValueError naming the first tensor that is missing, unknown, or of another shape than expected."""
    tree, expected = flatten_dict(tree, sep="."), flatten_dict(expected, sep=".")
    for path in sorted(tree.keys() | expected.keys()):
        if path not in tree:
            raise ValueError(f"{name} lacks the tensor {path}")
        if path not in expected:
            raise ValueError(f"{name} has a tensor that its config does not: {path}")
        if tree[path].shape != expected[path].shape:
            raise ValueError(f"{name}.{path} has shape {tree[path].shape}, not {expected[path].shape}")


def count_params(params: dict) -> int:
    """Number of scalars in a tree of arrays or of `jax.ShapeDtypeStruct`."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def area_downsample(
    image: Float[Array | np.ndarray, "b h w c"], factor: int
) -> Float[Array | np.ndarray, "b h2 w2 c"]:
    """Mean over `factor` x `factor` pixels; local, so it commutes with tiling.

    Raises ValueError if a side is not a multiple of `factor`.
    """
    b, h, w, c = image.shape
    for name, side in (("height", h), ("width", w)):
        if side % factor:
            raise ValueError(f"{name} {side} is not a multiple of {factor}")
    return image.reshape(b, h // factor, factor, w // factor, factor, c).mean((2, 4))


def space_to_depth(x: Float[Array, "b h w c"], patch: int) -> Float[Array, "b h2 w2 c2"]:
    """Fold every `patch` x `patch` block of pixels into channels."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // patch, patch, w // patch, patch, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h // patch, w // patch, patch * patch * c)


def depth_to_space(x: Float[Array, "b h w c"], patch: int) -> Float[Array, "b h2 w2 c2"]:
    """The inverse of `space_to_depth`."""
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, patch, patch, c // patch**2).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h * patch, w * patch, c // patch**2)


def _neighbours(x: Float[Array, "b h w c"], axis: int) -> tuple[Array, Array]:
    """The pixels before and after each one along `axis`; the edge is its own neighbour."""
    size = x.shape[axis]
    padded = jnp.pad(x, [(int(i == axis),) * 2 for i in range(4)], "edge")
    return (
        jax.lax.slice_in_dim(padded, 0, size, axis=axis),
        jax.lax.slice_in_dim(padded, 2, size + 2, axis=axis),
    )


def bilinear_upsample(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Twice the height and width, pixel centres aligned, edges repeated; reaches one pixel, so it is local."""
    return smooth(nearest_upsample(x))


def nearest_upsample(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Every pixel as 2 x 2 pixels; smoothed, they are the bilinear enlargement."""
    return depth_to_space(jnp.tile(x, 4), 2)


@jax.custom_vjp
def smooth(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """[1 2 1] / 4 along both sides, edges repeated. What alternates from pixel to pixel vanishes, by 1 - 2 + 1 = 0."""
    for axis in (1, 2):
        x = 0.5 * x + 0.25 * sum(_neighbours(x, axis))
    return x


# A symmetric linear map is its own transpose; XLA's of slices and pads took ten times as long on CPUs.
smooth.defvjp(lambda x: (smooth(x), None), lambda _, gradient: (smooth(gradient),))


# Of two pixels that are folded into one (first axis: the folded pixel before, the same, the one after; then what a
# tap reads, folded pixel by folded pixel; then which of the two it belongs to) the part that a tap of a 3x3 kernel
# (last axis) reads: of the pixels themselves, or of the bilinear enlargement of the folded one.
_FOLDED = np.zeros((3, 2, 2, 3), np.float32)
_ENLARGED = np.zeros((3, 1, 2, 3), np.float32)
for _pixel, _tap in np.ndindex(2, 3):
    _place, _half = divmod(_pixel + _tap - 1, 2)
    _FOLDED[_place + 1, _half, _pixel, _tap] = 1
    _ENLARGED[_place + 1, 0, _pixel, _tap] = 0.75
    _ENLARGED[_place + (2 if _half else 0), 0, _pixel, _tap] += 0.25


def folded_conv(layer: nnx.Conv, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c2"]:
    """`layer`, a 3x3 convolution, of a picture whose 2 x 2 pixels are folded into channels; the result is so as well.

    Four times the arithmetic of a convolution that CPUs and GPUs spend most of their time on moving: few channels at
    high resolution.
    """
    return _conv_of_folded(layer, _FOLDED, jnp.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)]))


def enlarging_conv(layer: nnx.Conv, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c2"]:
    """`layer`, a 3x3 convolution, of the bilinear enlargement; the result's 2 x 2 pixels are folded into channels.

    Both are one linear map of 3 x 3 pixels of `x`: the enlargement itself is never made. Beyond its border the picture
    goes on as the pixels there.
    """
    return _conv_of_folded(layer, _ENLARGED, jnp.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)], "edge"))


def _conv_of_folded(layer, taps, x):
    kernel = layer.kernel[...]
    out_channels = kernel.shape[-1]
    kernel = jnp.einsum("aqpu,bQPv,uvio->abqQipPo", taps, taps, kernel)
    kernel = kernel.reshape(3, 3, -1, 4 * out_channels).astype(layer.dtype)
    y = jax.lax.conv_general_dilated(
        x.astype(layer.dtype), kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return y + jnp.tile(layer.bias[...].astype(layer.dtype), 4)


def conv(in_channels, out_channels, rngs, *, dtype, kernel=3, stride=1, zero=False):
    """A convolution, padded by (kernel - 1) // 2 on every side. `zero` starts it at zero: a residual branch that begins
    as the identity."""
    init = nnx.initializers.zeros if zero else nnx.initializers.lecun_normal()
    # Not "SAME": it pads a strided convolution on one side only and so shifts the image.
    pad = (kernel - 1) // 2
    return nnx.Conv(
        in_channels,
        out_channels,
        (kernel, kernel),
        strides=stride,
        padding=((pad, pad), (pad, pad)),
        kernel_init=init,
        dtype=dtype,
        rngs=rngs,
    )


class ResidualBlock(nnx.Module):
    """Two 3x3 convolutions, each after RMS norm over channels and Swish, added to the input.

    remat "full": the backward pass computes the block anew from its input, and nothing else of it is kept.
    """

    def __init__(self, in_channels, out_channels, rngs, *, dtype, remat="none", zero=False):
        self.remat = remat
        self.norm1 = nnx.RMSNorm(in_channels, dtype=dtype, rngs=rngs)
        self.conv1 = conv(in_channels, out_channels, rngs, dtype=dtype)
        self.norm2 = nnx.RMSNorm(out_channels, dtype=dtype, rngs=rngs)
        self.conv2 = conv(out_channels, out_channels, rngs, dtype=dtype, zero=zero)
        same = in_channels == out_channels
        self.skip = None if same else conv(in_channels, out_channels, rngs, dtype=dtype, kernel=1)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c2"]:
        return (jax.checkpoint(self._residual) if self.remat == "full" else self._residual)(x)

    def _residual(self, x):
        h = self.conv1(nnx.swish(self.norm1(x)))
        h = self.conv2(nnx.swish(self.norm2(h)))
        return h + (x if self.skip is None else self.skip(x))


class Downsample(nnx.Module):
    """A 3x3 convolution of stride 2, added to the mean over 2 x 2 pixels.

    The shortcut (as in DC-AE, Chen et al. 2025) hands the coarse picture through all scales from the first step on.
    """

    def __init__(self, channels, rngs, *, dtype):
        self.conv = conv(channels, channels, rngs, dtype=dtype, stride=2)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        return area_downsample(x, 2) + self.conv(x)


class Upsample(nnx.Module):
    """The bilinear enlargement, added to its 3x3 convolution, or to every pixel's channels unfolded into 2 x 2 pixels.

    A convolution of an enlarged picture cannot unfold: where the latent is flat its result is flat, whatever the
    channels say. What is unfolded is smoothed, as nearest neighbours would be to make them bilinear: a pattern that is
    the same in every 2 x 2 pixels, a grid, does not survive it.
    """

    def __init__(self, channels, rngs, *, dtype, unfold):
        self.conv = None if unfold else conv(channels, channels, rngs, dtype=dtype)
        self.unfold = conv(channels, 4 * channels, rngs, dtype=dtype, kernel=1) if unfold else None

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        if self.unfold is not None:  # both enlarged and smoothed as one
            return smooth(depth_to_space(jnp.tile(x, 4) + self.unfold(x), 2))
        enlarged = bilinear_upsample(x)
        return enlarged + self.conv(enlarged)
