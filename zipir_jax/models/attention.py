"""The one door to attention: which implementation runs is named in the config, never guessed."""

import jax
from jaxtyping import Array, Float, Int


def attention(
    query: Float[Array, "b q n d"],
    key: Float[Array, "b k n d"],
    value: Float[Array, "b k n d"],
    *,
    implementation: str,
    key_lengths: Int[Array, " b"] | None = None,
) -> Float[Array, "b q n d"]:
    """Softmax attention, scaled by 1/sqrt(d), over `n` heads.

    `implementation` is "xla" (any device and dtype) or "cudnn" (NVIDIA, bfloat16 or float16). `key_lengths` counts
    the valid keys of each batch item; the rest are padding. Raises ValueError for another name.
    """
    if implementation not in ("xla", "cudnn"):
        raise ValueError(f"attention implementation {implementation!r} is not one of: xla, cudnn")
    return jax.nn.dot_product_attention(
        query, key, value, key_value_seq_lengths=key_lengths, implementation=implementation
    )
