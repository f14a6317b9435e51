"""Diffusion transformer on LP-VAE latents with the low-quality (LQ) latent in the sequence (paper section 3.2).

Noisy and LQ latents have patch embedders of their own; their tokens stand side by side in one sequence, an LQ token at
the rotary position of the noisy token it describes. Each sublayer is modulated by adaLN-zero (Peebles & Xie 2023):
shift, scale and gate, hence six vectors a block, or nine with the cross-attention to text.

What does not change while an image is sampled is computed once: `DiT.read_text` makes the keys and values of the text,
`DiT.read_lq`, with lq_attention "static", those of the LQ tokens; `DiT.denoise` uses them at every step. `DiT.__call__`
is all of it at once.
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
CLEAN = 0  # timestep of static LQ tokens: like clean latents, they hold no noise
# cuDNN's kernel of attention, whose backward pass reads more than the result: all that it writes is kept.
CUDNN = "dot_product_attention_fwd_wrapper"
REMAT = {  # what is kept of a block for the backward pass, beside its input; all else is computed anew
    # Of the attention, dearest to compute where tokens are many.
    "attention": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.save_only_these_names("attention"),
        lambda primitive, *_, **__: primitive.name == CUDNN,
    ),
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
    """Multi-head attention with RMS-normalised queries and keys; self-attention, or over a context."""

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

    def keys_values(
        self, context: Float[Array, "b k c"], angles: Float[Array, "k a"] | None = None
    ) -> tuple[Float[Array, "b k n d"], Float[Array, "b k n d"]]:
        """Keys, turned by `angles` where positions count, and values of a context."""
        key = self.key_norm(self._split(self.key(context)))
        return key if angles is None else rotate(key, angles), self._split(self.value(context))

    def __call__(
        self,
        x: Float[Array, "b s c"],
        key: Float[Array, "b k n d"],
        value: Float[Array, "b k n d"],
        *,
        angles: Float[Array, "s a"] | None = None,
        key_lengths: Int[Array, " b"] | None = None,
    ) -> Float[Array, "b s c"]:
        query = self.query_norm(self._split(self.query(x)))
        if angles is not None:
            query = rotate(query, angles)
        y = attention(query, key, value, implementation=self.implementation, key_lengths=key_lengths)
        return self.out(y.reshape(x.shape))

    def _split(self, x):
        return x.reshape(*x.shape[:2], self.heads, -1)


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

    def _modulations(self, conditioning):
        """(shift, scale, gate) [b, 1, c] of each sublayer in turn."""
        vectors = self.modulation(nnx.swish(conditioning))[:, None]
        vectors = jnp.split(vectors, vectors.shape[-1] // conditioning.shape[-1], -1)
        return [vectors[i : i + 3] for i in range(0, len(vectors), 3)]

    def read_lq(
        self, lq: Float[Array, "b s c"], conditioning: Float[Array, "1 c"], angles: Float[Array, "s a"]
    ) -> tuple[Float[Array, "b s c"], tuple[Array, Array]]:
        """Static LQ tokens after the block, and their keys and values. They do not attend to the text: the branches of
        the guidance share them."""
        first, *_, last = self._modulations(conditioning)
        h = _modulate(self.attention_norm(lq), first)
        keys_values = self.attention.keys_values(h, angles)
        lq = lq + first[2] * self.attention(h, *keys_values, angles=angles)
        return lq + last[2] * self.mlp(_modulate(self.mlp_norm(lq), last)), keys_values

    def read_text(self, text: Float[Array, "b l c"]) -> tuple[Array, Array]:
        """Keys and values of the text."""
        return self.text_attention.keys_values(text)

    def __call__(
        self,
        x: Float[Array, "b s c"],
        conditioning: Float[Array, "b c"],
        angles: Float[Array, "s a"],
        lq: tuple[Array, Array] | None = None,
        text: tuple[Array, Array] | None = None,
        text_lengths: Int[Array, " b"] | None = None,
    ) -> Float[Array, "b s c"]:
        """The tokens after the block. lq, text: keys and values that they attend to beside their own."""
        first, *between, last = self._modulations(conditioning)
        h = _modulate(self.attention_norm(x), first)
        key, value = self.attention.keys_values(h, angles)
        if lq is not None:
            key, value = (
                jnp.concatenate([own, _repeat(other, x.shape[0])], 1)
                for own, other in zip((key, value), lq, strict=True)
            )
        x = x + first[2] * self.attention(h, key, value, angles=angles)
        if self.text_attention is not None:
            h = _modulate(self.text_norm(x), between[0])
            x = x + between[0][2] * self.text_attention(h, *text, key_lengths=text_lengths)
        return x + last[2] * self.mlp(_modulate(self.mlp_norm(x), last))


def _modulate(x, modulation):
    shift, scale, _ = modulation
    return x * (1 + scale) + shift


def _repeat(x, count):
    """`x` for each branch of the guidance, of which the batch of `count` images holds all, one after the other."""
    return jnp.tile(x, (count // x.shape[0],) + (1,) * (x.ndim - 1))


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
        lq: Float[Array, "b h2 w2 c"],
        text: Float[Array, "b l c2"] | None = None,
        text_lengths: Int[Array, " b"] | None = None,
    ) -> Float[Array, "b h w c"]:
        """Predicted noise or v, float32. `noisy` and `lq` are whitened latents of one shape; `timesteps` in [0, 1000).

        Raises ValueError if text is missing from a model with cross-attention, or given to one without, and for latents
        of different shapes or of sides that are no multiple of the patch.
        """
        self._check_text(text is not None)
        if noisy.shape != lq.shape:
            raise ValueError(f"latents of shapes {noisy.shape} and {lq.shape}: they must agree")
        graphdef, stacked = nnx.split(self.blocks)
        conditioning, clean = self._conditioning(timesteps), self._conditioning(jnp.array([CLEAN]))
        lq_tokens, lq_angles = self._tokens(self.embed_lq, lq), self._angles(lq)
        x, angles = self._sequence(noisy, lq_tokens)

        def body(carry, params):
            (x, lq), block, read = carry, nnx.merge(graphdef, params), {}
            if self.is_static:
                lq, read["lq"] = self._read_lq_layer(block, lq, clean, lq_angles)
            if text is not None:
                read["text"] = block.read_text(text)
            x = constrain(x, "batch", None, None)
            return (block(x, conditioning, angles, **read, text_lengths=text_lengths), lq), None

        if self.config.remat != "none":
            # A scanned body is its own barrier against common subexpressions.
            body = jax.checkpoint(body, policy=REMAT[self.config.remat], prevent_cse=False)
        (x, _), _ = jax.lax.scan(body, (x, lq_tokens if self.is_static else None), stacked)
        return self._prediction(x, conditioning, noisy)

    def read(
        self,
        lq: Float[Array, "b h w c"],
        text: Float[Array, "b2 l c2"] | None = None,
        text_lengths: Int[Array, " b2"] | None = None,
    ) -> dict:
        """What `denoise` needs of the LQ latent and the text, to be computed once an image; raises as `__call__` does.

        There may be a text for each branch of the guidance, b2 = 2 b, those of one branch after those of the other.
        """
        self._check_text(text is not None)
        return self.read_lq(lq) | ({} if text is None else self.read_text(text, text_lengths))

    def read_lq(self, lq: Float[Array, "b h w c"]) -> dict:
        """The part of `read` that the LQ latent has: {"lq": keys and values, [layers, b, s, heads, d] each} where its
        tokens are static, else {"lq_tokens": [b, s, c]}."""
        tokens = self._tokens(self.embed_lq, lq)
        if not self.is_static:
            return {"lq_tokens": tokens}
        graphdef, stacked = nnx.split(self.blocks)
        clean, angles = self._conditioning(jnp.array([CLEAN])), self._angles(lq)

        def body(lq, params):
            return self._read_lq_layer(nnx.merge(graphdef, params), lq, clean, angles)

        return {"lq": jax.lax.scan(body, tokens, stacked)[1]}

    def read_text(self, text: Float[Array, "b l c"], text_lengths: Int[Array, " b"] | None = None) -> dict:
        """The part of `read` that the text has: {"text": keys and values, [layers, b, l, heads, d] each,
        "text_lengths"}."""
        graphdef, stacked = nnx.split(self.blocks)
        _, read = jax.lax.scan(
            lambda _, params: (None, nnx.merge(graphdef, params).read_text(text)), None, stacked
        )
        return {"text": read} | ({} if text_lengths is None else {"text_lengths": text_lengths})

    def denoise(
        self,
        noisy: Float[Array, "b h w c"],
        timesteps: Float[Array, " b"] | Int[Array, " b"],
        condition: dict,
    ) -> Float[Array, "b h w c"]:
        """`__call__` with what `read` made of the LQ latent and the text.

        The batch of `noisy` may be a multiple of the LQ latent's, whose tokens the branches of the guidance then share.
        """
        self._check_text("text" in condition)
        tokens = noisy.shape[1] * noisy.shape[2] // self.config.patch**2
        lq_tokens = condition["lq"][0].shape[2] if self.is_static else condition["lq_tokens"].shape[1]
        if tokens != lq_tokens:
            raise ValueError(f"{tokens} noisy tokens, but {lq_tokens} of the LQ latent")
        graphdef, stacked = nnx.split(self.blocks)
        conditioning = self._conditioning(timesteps)
        x, angles = self._sequence(noisy, condition.get("lq_tokens"))
        by_layer = {name: condition[name] for name in ("lq", "text") if name in condition}

        def body(x, layer):
            params, read = layer
            x, block = constrain(x, "batch", None, None), nnx.merge(graphdef, params)
            return block(x, conditioning, angles, **read, text_lengths=condition.get("text_lengths")), None

        x, _ = jax.lax.scan(body, x, (stacked, by_layer))
        return self._prediction(x, conditioning, noisy)

    @property
    def is_static(self) -> bool:
        return self.config.lq_attention == "static"

    def _read_lq_layer(self, block, lq, clean, angles):
        """Static LQ tokens after a block, and their keys and values."""
        return block.read_lq(constrain(lq, "batch", None, None), clean, angles)

    def _check_text(self, is_given):
        if is_given != bool(self.config.text_width):
            needs = "needs" if self.config.text_width else "has no cross-attention for"
            raise ValueError(f"this DiT {needs} text embeddings")

    def _tokens(self, embedder, latent):
        p = self.config.patch
        b, h, w, _ = latent.shape
        if h % p or w % p:
            raise ValueError(
                f"a latent of shape {latent.shape} has sides that are not multiples of the patch {p}"
            )
        return embedder(space_to_depth(latent, p).reshape(b, h * w // p**2, -1))

    def _angles(self, latent):
        height, width = (side // self.config.patch for side in latent.shape[1:3])
        return rotary_angles(height, width, self.config.width // self.config.heads)

    def _sequence(self, noisy, lq_tokens):
        """The tokens that the blocks change, and their angles: the noisy ones and, unless static, the LQ tokens."""
        x, angles = self._tokens(self.embed_noisy, noisy), self._angles(noisy)
        if self.is_static:
            return x, angles
        return jnp.concatenate([x, _repeat(lq_tokens, x.shape[0])], 1), jnp.concatenate([angles, angles])

    def _conditioning(self, timesteps):
        return self.timestep_out(nnx.swish(self.timestep_in(timestep_embedding(timesteps))))

    def _prediction(self, x, conditioning, noisy):
        p = self.config.patch
        b, h, w = noisy.shape[0], noisy.shape[1] // p, noisy.shape[2] // p
        shift, scale = jnp.split(self.final_modulation(nnx.swish(conditioning))[:, None], 2, -1)
        x = self.head(self.norm(x[:, : h * w]) * (1 + scale) + shift).astype(jnp.float32)
        return depth_to_space(x.reshape(b, h, w, -1), p)
