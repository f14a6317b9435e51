"""Diffusion transformer on LP-VAE latents with the low-quality (LQ) latent in the sequence (paper section 3.2).

Noisy and LQ latents have patch embedders of their own; their tokens stand side by side in one sequence, an LQ token at
the rotary position of the noisy token it describes. Each sublayer is modulated by adaLN-zero (Peebles & Xie 2023):
shift, scale and gate, hence six vectors a block, or nine with the cross-attention to text.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from zipir_jax.config import DiTConfig
from zipir_jax.models.attention import attention
from zipir_jax.models.layers import depth_to_space, space_to_depth
from zipir_jax.parallel import constrain

ROTARY_BASE = 10_000.0  # longest wavelength of a rotary frequency, in tokens / (2 pi) (Su et al. 2021)
FREQUENCY_EMBEDDING = 256  # channels of the sinusoidal timestep embedding (Peebles & Xie 2023)
REMAT = {  # what is kept of a block for the backward pass, beside its input; all else is computed anew
    "attention": jax.checkpoint_policies.save_only_these_names(
        "attention"
    ),  # dearest to compute where tokens are many
    "full": jax.checkpoint_policies.nothing_saveable,
}


def timestep_embedding(timesteps: Float[Array, " b"] | Int[Array, " b"]) -> Float[Array, "b c"]:
    """Sinusoidal embedding of timesteps in [0, 1000) (Vaswani et al. 2017)."""
    half = FREQUENCY_EMBEDDING // 2
    frequencies = jnp.exp(-np.log(10_000.0) * jnp.arange(half) / half)
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


def rotary_angles(height: int, width: int, head_dim: int) -> Float[Array, "n c"]:
    """Angles of the 2-D rotary embedding for a grid of tokens in row-major order.

    Half of the head's channel pairs turn with the row, half with the column; shape [height * width, head_dim / 2].
    """
    pairs = head_dim // 4
    frequencies = ROTARY_BASE ** (-np.arange(pairs) / pairs)
    rows = np.arange(height)[:, None] * frequencies
    columns = np.arange(width)[:, None] * frequencies
    rows = np.broadcast_to(rows[:, None], (height, width, pairs))
    columns = np.broadcast_to(columns[None], (height, width, pairs))
    return jnp.asarray(np.concatenate([rows, columns], -1).reshape(height * width, 2 * pairs), jnp.float32)


def rotate(x: Float[Array, "b s n d"], angles: Float[Array, "s c"]) -> Float[Array, "b s n d"]:
    """Turn channel pairs (i, i + d/2) of each head by the position's angles; float32 inside."""
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1).astype(x.dtype)


def _linear(in_features, out_features, rngs, dtype, *, bias=True, zero=False):
    init = nnx.initializers.zeros if zero else nnx.initializers.xavier_uniform()
    return nnx.Linear(in_features, out_features, use_bias=bias, kernel_init=init, dtype=dtype, rngs=rngs)


class Attention(nnx.Module):
    """Multi-head attention with RMS-normalised queries and keys; self-attention, or over `context`."""

    def __init__(self, config: DiTConfig, rngs: nnx.Rngs, *, context_width: int | None = None):
        width, dtype = config.width, config.compute_dtype
        self.heads = config.heads
        self.implementation = config.attention
        self.query = _linear(width, width, rngs, dtype, bias=config.bias)
        self.key = _linear(context_width or width, width, rngs, dtype, bias=config.bias)
        self.value = _linear(context_width or width, width, rngs, dtype, bias=config.bias)
        self.out = _linear(width, width, rngs, dtype, bias=config.bias)
        self.query_norm = nnx.RMSNorm(width // config.heads, dtype=dtype, rngs=rngs)
        self.key_norm = nnx.RMSNorm(width // config.heads, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b s c"],
        context: Float[Array, "b k c2"],
        *,
        angles: Float[Array, "s a"] | None = None,
        key_lengths: Int[Array, " b"] | None = None,
    ) -> Float[Array, "b s c"]:
        def split(y):
            return y.reshape(*y.shape[:2], self.heads, -1)

        query = self.query_norm(split(self.query(x)))
        key = self.key_norm(split(self.key(context)))
        if angles is not None:
            query, key = rotate(query, angles), rotate(key, angles)
        y = attention(
            query,
            key,
            split(self.value(context)),
            implementation=self.implementation,
            key_lengths=key_lengths,
        )
        return self.out(y.reshape(x.shape))


class FeedForward(nnx.Module):
    """SwiGLU (Shazeer 2020), or the GELU network of DiT."""

    def __init__(self, config: DiTConfig, rngs: nnx.Rngs):
        width, hidden, dtype = config.width, config.width * config.mlp_ratio, config.compute_dtype
        self.up = _linear(width, hidden, rngs, dtype, bias=config.bias)
        self.gate = _linear(width, hidden, rngs, dtype, bias=config.bias) if config.swiglu else None
        self.down = _linear(hidden, width, rngs, dtype, bias=config.bias)

    def __call__(self, x: Float[Array, "b s c"]) -> Float[Array, "b s c"]:
        h = self.up(x)
        h = nnx.gelu(h, approximate=True) if self.gate is None else nnx.swish(self.gate(x)) * h
        return self.down(h)


class Block(nnx.Module):
    """Self-attention, optional cross-attention to text, feed-forward; each modulated by adaLN-zero."""

    def __init__(self, config: DiTConfig, rngs: nnx.Rngs):
        def norm():
            return nnx.LayerNorm(
                config.width,
                use_bias=False,
                use_scale=False,
                epsilon=1e-6,
                dtype=config.compute_dtype,
                rngs=rngs,
            )

        self.attention_norm, self.mlp_norm = norm(), norm()
        self.attention = Attention(config, rngs)
        self.mlp = FeedForward(config, rngs)
        text = config.text_width
        self.text_norm = norm() if text else None
        self.text_attention = Attention(config, rngs, context_width=text) if text else None
        self.modulation = _linear(
            config.width, config.width * config.modulations, rngs, config.compute_dtype, zero=True
        )

    def __call__(self, x, conditioning, angles, text=None, text_lengths=None) -> Float[Array, "b s c"]:
        modulation = self.modulation(nnx.swish(conditioning))[:, None]
        modulation = iter(jnp.split(modulation, modulation.shape[-1] // x.shape[-1], -1))

        def residual(x, norm, sublayer):
            shift, scale, gate = next(modulation), next(modulation), next(modulation)
            return x + gate * sublayer(norm(x) * (1 + scale) + shift)

        x = residual(x, self.attention_norm, lambda h: self.attention(h, h, angles=angles))
        if self.text_attention is not None:
            x = residual(x, self.text_norm, lambda h: self.text_attention(h, text, key_lengths=text_lengths))
        return residual(x, self.mlp_norm, self.mlp)


class DiT(nnx.Module):
    """The noise, or v (diffusion/objective.py), of (z_t, t, LQ latent, text). The blocks are stacked and scanned."""

    def __init__(self, config: DiTConfig, rngs: nnx.Rngs):
        width, dtype = config.width, config.compute_dtype
        patch_values = config.latent_channels * config.patch**2
        self.config = config
        # The bias of each embedder is the learned type embedding that tells the two kinds of token apart.
        self.embed_noisy = _linear(patch_values, width, rngs, dtype)
        self.embed_lq = _linear(patch_values, width, rngs, dtype)
        self.timestep_in = _linear(FREQUENCY_EMBEDDING, width, rngs, dtype)
        self.timestep_out = _linear(width, width, rngs, dtype)
        self.blocks = nnx.vmap(lambda r: Block(config, r))(rngs.split(config.layers))
        self.norm = nnx.LayerNorm(
            width, use_bias=False, use_scale=False, epsilon=1e-6, dtype=dtype, rngs=rngs
        )
        self.final_modulation = _linear(width, 2 * width, rngs, dtype, zero=True)
        self.head = _linear(width, patch_values, rngs, dtype, zero=True)

    def __call__(
        self,
        noisy: Float[Array, "b h w c"],
        timesteps: Float[Array, " b"] | Int[Array, " b"],
        lq: Float[Array, "b h w c"],
        text: Float[Array, "b l c2"] | None = None,
        text_lengths: Int[Array, " b"] | None = None,
    ) -> Float[Array, "b h w c"]:
        """Predicted noise or v, float32. `noisy` and `lq` are whitened latents of one shape; `timesteps` in [0, 1000).

        Raises ValueError if text is missing from a model with cross-attention, or given to one without, and for latents
        of different shapes or of sides that are no multiple of the patch.
        """
        if (text is not None) != bool(self.config.text_width):
            needs = "needs" if self.config.text_width else "has no cross-attention for"
            raise ValueError(f"this DiT {needs} text embeddings")
        p = self.config.patch
        if noisy.shape != lq.shape or noisy.shape[1] % p or noisy.shape[2] % p:
            raise ValueError(
                f"latents of shapes {noisy.shape} and {lq.shape}: they must agree, with sides in multiples of {p}"
            )
        b, h, w = noisy.shape[0], noisy.shape[1] // p, noisy.shape[2] // p

        def tokens(latent):
            return space_to_depth(latent, p).reshape(b, h * w, -1)

        x = jnp.concatenate([self.embed_noisy(tokens(noisy)), self.embed_lq(tokens(lq))], 1)
        angles = rotary_angles(h, w, self.config.width // self.config.heads)
        angles = jnp.concatenate([angles, angles])
        conditioning = self.timestep_out(nnx.swish(self.timestep_in(timestep_embedding(timesteps))))

        graphdef, stacked = nnx.split(self.blocks)

        def body(x, block):
            x = constrain(x, "batch", None, None)
            return nnx.merge(graphdef, block)(x, conditioning, angles, text, text_lengths), None

        if self.config.remat != "none":
            # A scanned body is its own barrier against common subexpressions.
            body = jax.checkpoint(body, policy=REMAT[self.config.remat], prevent_cse=False)
        x, _ = jax.lax.scan(body, x, stacked)

        shift, scale = jnp.split(self.final_modulation(nnx.swish(conditioning))[:, None], 2, -1)
        x = self.head(self.norm(x[:, : h * w]) * (1 + scale) + shift).astype(jnp.float32)
        return depth_to_space(x.reshape(b, h, w, -1), p)
