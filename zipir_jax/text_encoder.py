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
from zipir_jax.weights.foreign import (
    find_folder,
    find_model,
    import_weights,
    imported_config,
    load_imported,
    read_config,
)

LARGEST_LENGTH = 512  # tokens of a caption, what T5 was trained with; the rest is cut
LENGTH_MULTIPLE = 64  # tokens; captions are padded to multiples of it, so that 8 programs serve them all
LARGEST_BATCH = 16  # captions at a time
TOKENIZER = "tokenizer"  # subfolder of its files
VOCABULARIES = "tokenizer.json", "spiece.model"  # either makes a tokenizer
# What adds to it, where it is there.
TOKENIZER_FILES = (*VOCABULARIES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


@dataclasses.dataclass(frozen=True, eq=False)  # arrays do not compare to one truth value
class TextEncoder:
    """A T5 encoder with its weights and its tokenizer. Make one with `TextEncoder.load`."""

    # Says which encoder it is, wherever it lies: t5-LAYERSxWIDTH- and twelve digits of the digest of its parameters
    # (`imported_config`). Embeddings of another name are none that a model trained with this one understands.
    name: str
    config: T5Config
    params: dict
    tokenizer: Callable
    mesh: Mesh

    @classmethod
    def load(cls, folder: Path | str, mesh: MeshConfig | None = None) -> "TextEncoder":
        """Read a folder that `prepare import-t5` wrote.

        mesh: of all devices, over which parameters and captions are divided as the DiT's; None: parameters over as
        many devices of this process as are a power of two, as the sizes of T5 are multiples of one. Each device, and
        each process, reads its part of the parameters alone.

        Raises ValueError, naming folder and tensor, if the weights or the tokenizer cannot be read.
        """
        folder = Path(folder)
        _, digest, config = imported_config(folder, "t5")
        tokenizer = read_tokenizer(folder / TOKENIZER)
        if mesh is None:
            local = jax.local_devices()
            devices = make_mesh(MeshConfig(data=1, fsdp=0), local[: 1 << (len(local).bit_length() - 1)])
        else:
            devices = make_mesh(mesh)
        params = load_imported(folder, "t5", config, functools.partial(parameter_shardings, devices))
        name = f"t5-{config.layers}x{config.width}-{digest[:12]}"
        return cls(name, config, params, tokenizer, devices)

    @property
    def width(self) -> int:
        """Channels of the embeddings."""
        return self.config.width

    def encode(self, captions: list[str]) -> list[np.ndarray]:
        """Embeddings of captions, float32 [tokens, width] each, without padding; an empty caption has the end token's.

        A caption's embedding depends on no other's; how many are encoded at once may change its last digits. Half a
        surrogate pair, which is no character, counts as a question mark.
        """
        if not captions:
            return []
        captions = [caption.encode("utf-8", "replace").decode() for caption in captions]
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
            run = program(self.mesh.devices.flat[0].platform)
            result = run(self.config, whole, self.params, *put((padded, lengths), whole))
        result = np.asarray(result)
        return [result[row, : len(caption)].copy() for row, caption in enumerate(tokens)]


@functools.cache
def program(platform: str) -> Callable:
    """The compiled function (config, sharding of the result, parameters, tokens, lengths) -> embeddings."""
    # On a CPU, which has no products in bfloat16, XLA would else have all blocks in float32 at once, beside the
    # parameters and twice as large. Elsewhere nothing is to be gained.
    one_block_at_a_time = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
    options = one_block_at_a_time if platform == "cpu" else None

    @functools.partial(jax.jit, static_argnums=(0, 1), compiler_options=options)
    def run(config, sharding, params, tokens, lengths):
        return jax.lax.with_sharding_constraint(bind(T5Encoder, config, params)(tokens, lengths), sharding)

    return run


def read_tokenizer(folder: Path) -> Callable:
    """The tokenizer in a folder in the hub's layout; raises ValueError, with the folder in it, if there is none."""
    # Without them transformers would make one that knows no words.
    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise ValueError(f"{folder}: no tokenizer here ({' or '.join(VOCABULARIES)} is missing)")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # four libraries raise what they like
        raise ValueError(f"{folder}: the tokenizer cannot be read ({error})") from None


def import_encoder(
    model: str,
    output: Path,
    dtype: str,
    revision: str | None = None,
    subfolder: str = "",
    variant: str | None = None,
    tokenizer: str | None = None,
) -> tuple[str, T5Config]:
    """Write a T5 encoder with its tokenizer, for `TextEncoder.load`; returns (name of the model, config).

    model, and tokenizer if it is not in the model's folder: of the hub, or folders in its layout. dtype: "float32" or
    "bfloat16". The others as of `find_model`, for the model alone.

    Raises ValueError as `find_model` and `import_weights` do, for a tokenizer that is missing or not T5's, and where
    its folder in `output` is a link.
    """
    if (output / TOKENIZER).is_symlink():
        raise ValueError(f"{output / TOKENIZER}: is a link; choose another output")
    folder, name = find_model("t5", model, revision, subfolder, variant, TOKENIZER_FILES)
    config = dataclasses.replace(read_config("t5", folder), compute_dtype=dtype)
    vocabulary = folder
    if tokenizer is not None:  # with config.json, which says whose it is where tokenizer_config.json does not
        vocabulary = find_folder(tokenizer, ("config.json", *TOKENIZER_FILES))
    read = read_tokenizer(vocabulary)
    check_tokenizer(vocabulary, read, config)

    def write_tokenizer():
        # As tokenizer.json, whatever it was: what reads it then needs no sentencepiece. New files, not through links.
        for name in TOKENIZER_FILES:
            (output / TOKENIZER / name).unlink(missing_ok=True)
        read.save_pretrained(output / TOKENIZER)

    import_weights("t5", folder, name, config, output, dtype, variant, write_tokenizer)
    return name, config


def check_tokenizer(folder: Path, tokenizer: Callable, config: T5Config) -> None:
    """Raises ValueError, with the folder in it, for a tokenizer that is not one of the encoder's kind."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= config.vocabulary:
        raise ValueError(
            f"{folder}: the tokenizer has tokens up to {largest}, the encoder up to {config.vocabulary - 1}"
        )
    empty, end = tokenizer("")["input_ids"], [tokenizer.eos_token_id]
    if empty != end:
        raise ValueError(
            f"{folder}: the tokenizer makes {empty} of an empty text, T5's the end token {end} alone"
        )
