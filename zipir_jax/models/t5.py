"""Encoder of T5 v1.1 (Raffel et al. 2020, with the gated feed-forward network of Shazeer 2020): text to embeddings.

Pre-norm blocks of self-attention and gated GELU, no biases anywhere. Positions enter as a bias of the attention alone:
one number for each head and each bucket of distances, the same in all blocks. Parameters have the DiT's names, so that
the same rules divide them over devices.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from zipir_jax.config import T5Config
from zipir_jax.models.attention import attention
from zipir_jax.parallel import constrain

EPSILON = 1e-6  # of the norms, in all sizes


def distance_buckets(length: int, buckets: int, max_distance: int) -> Int[np.ndarray, "q k"]:
    """The bucket of the distance from each query to each key, of `length` each (Raffel et al. 2020, section 2.1).

    The first half is for keys that do not come after the query, the second for those that do. Within a half, the first
    half are distances one by one; the others grow by a constant factor up to `max_distance`.
    """
    distance = np.arange(length)[None, :] - np.arange(length)[:, None]
    half = buckets // 2
    single = half // 2
    size = np.abs(distance)
    # In float32, as T5 was trained: whether log(2) / log(16) * 8 is 2 or slightly less moves a distance of 16.
    octaves = np.log(np.maximum(size, 1).astype(np.float32) / np.float32(single))
    coarse = octaves / np.float32(np.log(max_distance / single)) * np.float32(half - single)
    coarse = np.minimum(single + coarse.astype(np.int32), half - 1)
    return np.where(distance > 0, half, 0) + np.where(size < single, size, coarse)


def _linear(in_features, out_features, rngs, config):
    return nnx.Linear(in_features, out_features, use_bias=False, dtype=config.compute_dtype, rngs=rngs)


def _norm(config, rngs):
    return nnx.RMSNorm(config.width, epsilon=EPSILON, dtype=jnp.float32, rngs=rngs)


class Attention(nnx.Module):
    """Multi-head self-attention with a bias for positions and without a scale."""

    def __init__(self, config: T5Config, rngs: nnx.Rngs):
        inner = config.heads * config.head_width
        self.heads = config.heads
        self.query = _linear(config.width, inner, rngs, config)
        self.key = _linear(config.width, inner, rngs, config)
        self.value = _linear(config.width, inner, rngs, config)
        self.out = _linear(inner, config.width, rngs, config)

    def __call__(
        self, x: Float[Array, "b s c"], bias: Float[Array, "n s s"], lengths: Int[Array, " b"]
    ) -> Float[Array, "b s c"]:
        query, key, value = (
            layer(x).reshape(*x.shape[:2], self.heads, -1) for layer in (self.query, self.key, self.value)
        )
        # T5 has no 1/sqrt(d): its initialisation holds it. Undone here, by 8 for all published sizes, which is exact.
        query = query * query.shape[-1] ** 0.5
        y = attention(query, key, value, implementation="xla", key_lengths=lengths, bias=bias)
        return self.out(y.reshape(*x.shape[:2], -1))


class FeedForward(nnx.Module):
    """Gated GELU (Shazeer 2020), by its tanh approximation."""

    def __init__(self, config: T5Config, rngs: nnx.Rngs):
        self.up = _linear(config.width, config.hidden, rngs, config)
        self.gate = _linear(config.width, config.hidden, rngs, config)
        self.down = _linear(config.hidden, config.width, rngs, config)

    def __call__(self, x: Float[Array, "b s c"]) -> Float[Array, "b s c"]:
        return self.down(nnx.gelu(self.gate(x), approximate=True) * self.up(x))


class Block(nnx.Module):
    """Self-attention and feed-forward network, each after a norm, added to their input."""

    def __init__(self, config: T5Config, rngs: nnx.Rngs):
        self.attention_norm, self.mlp_norm = _norm(config, rngs), _norm(config, rngs)
        self.attention = Attention(config, rngs)
        self.mlp = FeedForward(config, rngs)

    def __call__(
        self, x: Float32[Array, "b s c"], bias: Float[Array, "n s s"], lengths: Int[Array, " b"]
    ) -> Float32[Array, "b s c"]:
        x = x + self.attention(self.attention_norm(x), bias, lengths)
        return x + self.mlp(self.mlp_norm(x))


class T5Encoder(nnx.Module):
    """Embeddings of tokens, each of which has seen all others. The blocks are stacked and scanned."""

    def __init__(self, config: T5Config, rngs: nnx.Rngs):
        self.config = config
        self.token_embedding = nnx.Embed(config.vocabulary, config.width, rngs=rngs)
        self.relative_bias = nnx.Embed(config.buckets, config.heads, rngs=rngs)
        self.blocks = nnx.vmap(lambda r: Block(config, r))(rngs.split(config.layers))
        self.norm = _norm(config, rngs)

    def __call__(self, tokens: Int[Array, "b s"], lengths: Int[Array, " b"]) -> Float32[Array, "b s c"]:
        """float32. lengths: tokens of each text, at least one; what comes after them is padding, and zero here."""
        size = tokens.shape[1]
        buckets = distance_buckets(size, self.config.buckets, self.config.max_distance)
        bias = self.relative_bias(jnp.asarray(buckets)).astype(jnp.float32).transpose(2, 0, 1)
        graphdef, stacked = nnx.split(self.blocks)

        def body(x, params):
            x = constrain(x, "batch", None, None)
            return nnx.merge(graphdef, params)(x, bias, lengths), None

        # The sum of all blocks stays float32. Trained, it grows large: float16 is known to overflow, and in
        # bfloat16, with 8 bits, what a late block adds would be rounded away.
        x = self.token_embedding(tokens).astype(jnp.float32)
        x, _ = jax.lax.scan(body, x, stacked)
        is_token = jnp.arange(size) < lengths[:, None]
        return jnp.where(is_token[..., None], self.norm(x), 0)
