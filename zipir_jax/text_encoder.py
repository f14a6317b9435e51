"""TextEncoder: captions to embeddings by an imported T5 (`python -m zipir_jax.prepare import-t5`).

encoder = TextEncoder.load("t5-v1_1-xxl")
(embedding,) = encoder.encode(["a photograph of a harbour"])     # float32 [tokens, width]
"""

import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

# Its first import complains about a missing torch, of which a tokenizer has no need.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
from transformers import AutoTokenizer

from zipir_jax.config import MeshConfig, T5Config
from zipir_jax.models.layers import bind
from zipir_jax.models.t5 import T5Encoder
from zipir_jax.parallel import make_mesh, parameter_shardings, put, replicated
from zipir_jax.weights.foreign import find_model, import_weights, load_imported, read_config

LARGEST_LENGTH = 512  # tokens of a caption, what T5 was trained with; the rest is cut
LENGTH_MULTIPLE = 64  # tokens; captions are padded to multiples of it, so that 8 programs serve them all
LARGEST_BATCH = 16  # captions at a time
TOKENIZER = "tokenizer"  # subfolder of its files
VOCABULARIES = "tokenizer.json", "spiece.model"  # either makes a tokenizer


@dataclasses.dataclass(frozen=True, eq=False)  # arrays do not compare to one truth value
class TextEncoder:
    """A T5 encoder with its weights and its tokenizer. Make one with `TextEncoder.load`."""

    name: str  # of what was imported, as google/t5-v1_1-xxl
    config: T5Config
    params: dict
    tokenizer: Callable
    mesh: Mesh

    @classmethod
    def load(cls, folder: Path | str, mesh: MeshConfig | None = None) -> "TextEncoder":
        """Read a folder that `prepare import-t5` wrote.

        mesh: of the devices, over which parameters and captions are divided as the DiT's; None: parameters over all
        devices. Each device, and each process, reads its part of the parameters alone.

        Raises ValueError, naming folder and tensor, if the weights or the tokenizer cannot be read.
        """
        folder = Path(folder)
        mesh = make_mesh(mesh or MeshConfig(data=1, fsdp=0))
        name, config, params = load_imported(folder, "t5", functools.partial(parameter_shardings, mesh))
        return cls(name, config, params, read_tokenizer(folder / TOKENIZER), mesh)

    @property
    def width(self) -> int:
        """Channels of the embeddings."""
        return self.config.width

    def encode(self, captions: list[str]) -> list[np.ndarray]:
        """Embeddings of captions, float32 [tokens, width] each, without padding; an empty caption has the end token's.

        A caption's embedding depends on no other's; how many are encoded at once may change its last digits.
        """
        if not captions:
            return []
        tokens = self.tokenizer(captions, truncation=True, max_length=LARGEST_LENGTH)["input_ids"]
        by_length = {}
        for index, caption in enumerate(tokens):
            by_length.setdefault(-(-len(caption) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, []).append(index)
        embeddings = [None] * len(captions)
        for length, indices in by_length.items():
            for start in range(0, len(indices), LARGEST_BATCH):
                part = indices[start : start + LARGEST_BATCH]
                for index, embedding in zip(
                    part, self._encode([tokens[i] for i in part], length), strict=True
                ):
                    embeddings[index] = embedding
        return embeddings

    def _encode(self, tokens, length):
        # As many as the next power of two: each other number would be another program. The rest have one token.
        count = 1 << (len(tokens) - 1).bit_length()
        padded, lengths = np.zeros((count, length), np.int32), np.ones(count, np.int32)
        for row, caption in enumerate(tokens):
            padded[row, : len(caption)], lengths[row] = caption, len(caption)
        whole = replicated(self.mesh)  # in the end, too, so that every process has all of it
        with jax.set_mesh(self.mesh):
            result = _run(self.config, whole, self.params, *put((padded, lengths), whole))
        result = np.asarray(result)
        return [result[row, : len(caption)].copy() for row, caption in enumerate(tokens)]


# On a CPU, which has no products in bfloat16, XLA would else have all blocks in float32 at once, beside the parameters
# and twice as large.
ONE_BLOCK_AT_A_TIME = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}


@functools.partial(jax.jit, static_argnums=(0, 1), compiler_options=ONE_BLOCK_AT_A_TIME)
def _run(config, sharding, params, tokens, lengths):
    return jax.lax.with_sharding_constraint(bind(T5Encoder, config, params)(tokens, lengths), sharding)


def read_tokenizer(folder: Path) -> Callable:
    """The tokenizer in a folder in the hub's layout; raises ValueError, with the folder in it, if there is none."""
    # Without them transformers would make one that knows no words.
    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise ValueError(f"{folder}: no tokenizer here ({' or '.join(VOCABULARIES)} is missing)")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # four libraries raise what they like
        raise ValueError(f"{folder}: the tokenizer cannot be read ({error})") from None


def import_encoder(model: str, output: Path, dtype: str) -> T5Config:
    """Write a T5 encoder with its tokenizer, of the hub or of a folder in its layout, for `TextEncoder.load`.

    dtype: "float32" or "bfloat16". Raises ValueError as `import_weights` does, and for a tokenizer that is missing or
    has tokens that the encoder does not know.
    """
    folder, name = find_model("t5", model)
    config = read_config("t5", folder, dtype)
    tokenizer = read_tokenizer(folder)
    if len(tokenizer) > config.vocabulary:
        raise ValueError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, the encoder {config.vocabulary}"
        )
    import_weights("t5", folder, name, config, output)
    # As tokenizer.json, whatever it was: what reads it then needs no sentencepiece.
    tokenizer.save_pretrained(output / TOKENIZER)
    return config
