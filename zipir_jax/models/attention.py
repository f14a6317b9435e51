"""The one door to attention: which implementation runs is named in the config, never guessed.

"xla" runs anywhere. "cudnn" (NVIDIA) and "splash" (TPU) are kernels that never write the logits to memory; for "xla" a
few queries at a time take their place (Rabe & Staats 2021).
"""

import functools

import jax
import jax.numpy as jnp
from jax import P
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask
from jaxtyping import Array, Float, Int

from zipir_jax.parallel import MESH_AXES, mesh_parts
from zipir_jax.parallel import platform as current_platform

# Bytes of float32 logits that one device holds at a time with "xla"; larger ones are further from a CPU's caches.
LARGEST_LOGITS = 64 * 2**20
LANES = 128  # of a TPU: its kernel takes sequences in blocks of multiples of them
LARGEST_BLOCK = 512  # queries or keys of a splash kernel's block: what MaxText ships for all of its TPUs
PLATFORMS = {"cudnn": ("gpu", "cuda"), "splash": ("tpu",)}  # that an implementation needs, as jax names them
CUDNN_DTYPES = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)


def attention(
    query: Float[Array, "b q n d"],
    key: Float[Array, "b k n d"],
    value: Float[Array, "b k n d"],
    *,
    implementation: str,
    key_lengths: Int[Array, " b"] | None = None,
    bias: Float[Array, "n q k"] | None = None,
) -> Float[Array, "b q n d"]:
    """Softmax attention, scaled by 1/sqrt(d), over `n` heads.

    `implementation` is "xla" (any device and dtype), "cudnn" (NVIDIA, bfloat16 or float16) or "splash" (TPU).
    `key_lengths` counts the valid keys of each batch item, at least one; the rest are padding. `bias` is added to the
    scaled logits; "xla" alone takes one. Raises ValueError for another name, and for a kernel with a bias, on devices,
    those of the mesh in effect or else of jax's default backend, or with dtypes that it is not for.
    For policies of `jax.checkpoint`, what the backward pass reads beside query, key and value is named "attention".
    What "cudnn" leaves for it has no name, but its kernel is a primitive of its own.
    """
    check_implementation(implementation, query.dtype)
    if implementation == "xla":
        return checkpoint_name(xla_attention(query, key, value, key_lengths, bias), "attention")
    if bias is not None:
        raise ValueError(f"{implementation} attention takes no bias; xla does")
    if implementation == "splash":
        return splash_attention(query, key, value, key_lengths)
    return jax.nn.dot_product_attention(
        query, key, value, key_value_seq_lengths=key_lengths, implementation="cudnn"
    )


def check_implementation(implementation: str, dtype: jnp.dtype | str) -> None:
    """Raises ValueError for an implementation that is none, or not for this dtype or the devices to compute on."""
    if implementation not in ("xla", *PLATFORMS):
        raise ValueError(
            f"attention implementation {implementation!r} is not one of: {', '.join(('xla', *PLATFORMS))}"
        )
    if implementation == "xla":
        return
    platform = current_platform()
    if platform not in PLATFORMS[implementation]:
        needed = PLATFORMS[implementation][0]
        raise ValueError(f"{implementation} attention runs on {needed}, not on {platform}; xla runs anywhere")
    if implementation == "cudnn" and jnp.dtype(dtype) not in CUDNN_DTYPES:
        raise ValueError(f"cudnn attention computes in bfloat16 or float16, not in {dtype}")


def fastest(platform: str, dtype: jnp.dtype | str) -> str:
    """The implementation to choose for a platform, as jax names it, and a dtype: its kernel if it has one for it."""
    if platform in PLATFORMS["splash"]:
        return "splash"
    return "cudnn" if platform in PLATFORMS["cudnn"] and jnp.dtype(dtype) in CUDNN_DTYPES else "xla"


def xla_attention(
    query: Float[Array, "b q n d"],
    key: Float[Array, "b k n d"],
    value: Float[Array, "b k n d"],
    key_lengths: Int[Array, " b"] | None = None,
    bias: Float[Array, "n q k"] | None = None,
) -> Float[Array, "b q n d"]:
    """`attention` by XLA, exact: as many queries at a time as have LARGEST_LOGITS bytes of logits on a device."""
    attend = functools.partial(
        jax.nn.dot_product_attention, key_value_seq_lengths=key_lengths, implementation="xla"
    )
    bias = None if bias is None else bias[None]
    batch, queries, heads, _ = query.shape
    # Bytes of a query's logits on a device.
    row = 4 * -(-batch // mesh_parts("batch")) * -(-heads // mesh_parts("heads")) * key.shape[1]
    blocks = -(-queries // max(1, LARGEST_LOGITS // row))
    if blocks == 1:
        return attend(query, key, value, bias)
    size = -(-queries // blocks)
    blocks = -(-queries // size)

    def split(x, axis):
        """[blocks, ...], of each the queries along `axis`; zeros fill up the last one."""
        padding = [(0, (blocks * size - queries) * (i == axis)) for i in range(x.ndim)]
        shape = (*x.shape[:axis], blocks, size, *x.shape[axis + 1 :])
        return jnp.moveaxis(jnp.pad(x, padding).reshape(shape), axis, 0)

    # A block's probabilities are computed anew in the backward pass, where all blocks' would be as large as before.
    attend = jax.checkpoint(attend, prevent_cse=False)
    result = jax.lax.map(
        lambda block: attend(block[0], key, value, block[1]),
        (split(query, 1), None if bias is None else split(bias, 2)),
    )
    return result.swapaxes(0, 1).reshape(batch, blocks * size, *query.shape[2:])[:, :queries]


def splash_attention(
    query: Float[Array, "b q n d"],
    key: Float[Array, "b k n d"],
    value: Float[Array, "b k n d"],
    key_lengths: Int[Array, " b"] | None = None,
    *,
    interpret: bool = False,
) -> Float[Array, "b q n d"]:
    """`attention` by jax's TPU kernel. interpret: by the kernel's operations one by one, slowly, on any device.

    On a mesh each device computes its batch items and heads (see parallel.py).
    """
    padding, q_block = _padding(query.shape[1])
    query_padded = jnp.pad(query, ((0, 0), (0, padding), (0, 0), (0, 0)))
    padding, k_block = _padding(key.shape[1])
    key, value = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (key, value))
    if key_lengths is None and padding:
        key_lengths = jnp.full(query.shape[0], key.shape[1] - padding)
    blocks = splash.BlockSizes(
        block_q=q_block,
        block_kv=k_block,
        block_q_dkv=q_block,
        block_kv_dkv=k_block,
        block_q_dq=q_block,
        block_kv_dq=k_block,
    )

    def attend(query, key, value, key_lengths=None):
        """Of one batch item: [n, s, d] each."""
        mask = splash_attention_mask.FullMask((query.shape[1], key.shape[1]))
        kernel = splash.make_splash_mha_single_device(
            splash_attention_mask.MultiHeadMask([mask] * query.shape[0]),
            block_sizes=blocks,
            residual_checkpoint_name="attention",
            interpret=interpret,
        )
        if key_lengths is None:
            return kernel(query, key, value)
        # Padded queries, whose results are cut off, are as good as others: no row of the softmax may be empty.
        valid = (jnp.arange(key.shape[1]) < key_lengths).astype(jnp.int32)
        return kernel(query, key, value, splash.SegmentIds(jnp.ones(query.shape[1], jnp.int32), valid))

    # The kernel does not scale. In float32, as the factor itself would lose digits in bfloat16.
    scaled = (query_padded.astype(jnp.float32) * query.shape[-1] ** -0.5).astype(query.dtype)
    arrays = tuple(x.swapaxes(1, 2) for x in (scaled, key, value))
    attend = jax.vmap(attend)
    batch, heads = _axes("batch", query.shape[0]), _axes("heads", query.shape[2])
    specs = (P(batch, heads),) * 3
    if key_lengths is not None:
        arrays, specs = (*arrays, key_lengths), (*specs, P(batch))
    if not jax.sharding.get_abstract_mesh().empty:  # XLA does not divide kernels by itself
        attend = jax.shard_map(attend, in_specs=specs, out_specs=specs[0], check_vma=False)
    return attend(*arrays).swapaxes(1, 2)[:, : query.shape[1]]


def _padding(length):
    """(tokens to add to a sequence, tokens of each of its blocks)."""
    blocks = -(-length // LARGEST_BLOCK)
    block = -(-length // (blocks * LANES)) * LANES
    return blocks * block - length, block


def _axes(axis, size):
    """The mesh axes that a dimension is divided over; None, whole on every device, if they do not divide it."""
    return MESH_AXES[axis] if size % mesh_parts(axis) == 0 else None
