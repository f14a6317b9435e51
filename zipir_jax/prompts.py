"""What each photograph is restored with, in words, and the embeddings of these words."""

import csv
import sys
from collections.abc import Iterable
from pathlib import Path

import ml_dtypes
import numpy as np
from jaxtyping import Float32

from zipir_jax.config import NEGATIVE_PROMPT, POSITIVE_PROMPT
from zipir_jax.data.sources import read_caption
from zipir_jax.data.text import INDEX_FILE, TextEmbeddings, shortened, write_text
from zipir_jax.weights import TEXT, load_config, load_text

# That weights come with; the empty caption stands for no text.
DEFAULT_PROMPTS = ("", POSITIVE_PROMPT, NEGATIVE_PROMPT)
COLUMNS = ("file_name", "text")  # of a prompt file, as in the metadata.csv of Hugging Face's imagefolder


def choose_prompts(photographs: list[Path], prompt: str | None, prompt_file: Path | None) -> list[str]:
    """The prompt of each photograph: the file's, else `prompt`, else the caption beside it, else POSITIVE_PROMPT.

    photographs: of one folder. A caption that cannot be read is named on stderr. Raises ValueError as
    `read_prompt_file`.
    """
    named = {} if prompt_file is None else read_prompt_file(prompt_file, photographs[0].parent)
    return [named.get(path.name, prompt if prompt is not None else _caption(path)) for path in photographs]


def _caption(photograph):
    try:
        return read_caption(photograph) or POSITIVE_PROMPT
    except ValueError as error:
        print(f"{error}; its photograph is restored with the default prompt", file=sys.stderr)
        return POSITIVE_PROMPT


def read_prompt_file(path: Path, folder: Path) -> dict[str, str]:
    """{file name: prompt} of a CSV file with COLUMNS, and perhaps others, for some files of a folder.

    An empty text is the empty caption. Raises ValueError, with the path and what is wrong, for a file that cannot be
    read, columns that are missing, a name that is not in the folder or there twice, and a row of too few or many cells.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            columns, rows = reader.fieldnames or [], [(reader.line_num, row) for row in reader]
    except OSError as error:
        raise ValueError(f"{path}: the prompts cannot be read ({error.strerror})") from None
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}: the prompts cannot be read ({error})") from None
    missing = [column for column in COLUMNS if column not in columns]
    if missing:
        raise ValueError(f"{path}: no column {' and '.join(missing)}; it has {', '.join(columns) or 'none'}")
    names, prompts, unknown = {file.name for file in folder.iterdir()}, {}, []
    for line, row in rows:
        name, text = (row[column] for column in COLUMNS)
        if not name or text is None:
            raise ValueError(f"{path}: line {line} has no {'text' if name else 'file name'}")
        if None in row:  # csv's key for what is left over
            raise ValueError(
                f"{path}: line {line} has more cells than the first; a text with commas needs quotes"
            )
        if name in prompts:
            raise ValueError(f"{path}: {name} is there twice, the second time in line {line}")
        if name not in names:
            unknown.append(name)
        prompts[name] = text.strip()
    if unknown:
        raise ValueError(f"{path}: {folder} does not hold {', '.join(unknown)}")
    return prompts


def embed_prompts(
    prompts: Iterable[str], weights: Path | str, encoder: Path | None = None
) -> dict[str, Float32[np.ndarray, "_ c"]]:
    """{prompt: embedding} out of what the weights come with, and for all others by a text encoder, if there are others.

    encoder: folder that `prepare import-t5` wrote; loaded only where it is needed, and given up at the end. Raises
    ValueError for prompts that only an encoder could embed where there is none, and for an encoder that the weights
    were not trained with.
    """
    stored, width = load_text(weights), load_config(weights).dit.text_width
    embeddings, new = {}, []
    for prompt in dict.fromkeys(prompts):
        if stored is not None and prompt in stored:
            embeddings[prompt] = stored[prompt]
        else:
            new.append(prompt)
    if not new:
        return embeddings
    if encoder is None:
        if stored is None:
            raise ValueError(
                f"{weights}: these weights come without embeddings of prompts; give --text-encoder FOLDER (see prepare "
                "import-t5), or export them with those of the default prompts (prepare export --text)"
            )
        others = f" and of {len(new) - 1} others" if len(new) > 1 else ""
        raise ValueError(
            f"{weights}: no embedding of the prompt {shortened(new[0])!r}{others}, which only a text encoder can make; "
            "give --text-encoder FOLDER (see prepare import-t5)"
        )
    from zipir_jax.text_encoder import TextEncoder  # brings transformers, which takes seconds

    t5 = TextEncoder.load(encoder)
    if t5.width != width:
        raise ValueError(f"{encoder}: its embeddings have {t5.width} channels, the model takes {width}")
    if stored is not None and stored.encoder != t5.name:
        raise ValueError(f"{encoder}: is {t5.name}, the model was trained with {stored.encoder}")
    # As they are stored: the same prompt gives the same picture.
    found = (embedding.astype(ml_dtypes.bfloat16).astype(np.float32) for embedding in t5.encode(new))
    return embeddings | dict(zip(new, found, strict=True))


def prompt_texts(
    photographs: list[Path],
    weights: Path | str,
    prompt: str | None = None,
    negative_prompt: str | None = None,
    prompt_file: Path | None = None,
    encoder: Path | None = None,
) -> dict[Path, dict]:
    """What `Restorer.restore` takes as {"text", "negative_text"} of each photograph; {} for weights without text.

    Weights without text leave captions beside the photographs alone. Raises ValueError, naming what was given, where
    they are given prompts, and as `choose_prompts` and `embed_prompts`.
    """
    if not load_config(weights).dit.text_width:
        given = {
            "prompt": prompt,
            "negative-prompt": negative_prompt,
            "prompt-file": prompt_file,
            "text-encoder": encoder,
        }
        useless = [f"--{name}" for name, value in given.items() if value is not None]
        if useless:
            raise ValueError(
                f"{weights}: these weights were trained without text: leave out {', '.join(useless)}"
            )
        return {photograph: {} for photograph in photographs}
    if not photographs:
        return {}
    chosen = choose_prompts(photographs, prompt, prompt_file)
    negative = NEGATIVE_PROMPT if negative_prompt is None else negative_prompt
    embeddings = embed_prompts([*chosen, negative], weights, encoder)
    return {
        photograph: {"text": embeddings[prompt], "negative_text": embeddings[negative]}
        for photograph, prompt in zip(photographs, chosen, strict=True)
    }


def check_prompts(text: TextEmbeddings) -> None:
    """Raises ValueError where there is no embedding of one of DEFAULT_PROMPTS."""
    missing = [prompt for prompt in DEFAULT_PROMPTS if prompt not in text]
    if missing:
        raise ValueError(
            f"{text.folder}: no embedding of the default prompt {shortened(missing[0])!r}; make the folder with "
            "prepare embed, which adds the default prompts to the captions"
        )


def write_prompts(weights: Path, text: TextEmbeddings) -> None:
    """Write those of DEFAULT_PROMPTS that have an embedding into a folder of weights, in the place of what is there."""
    found = [(prompt, text[prompt]) for prompt in DEFAULT_PROMPTS if prompt in text]
    (weights / TEXT / INDEX_FILE).unlink(missing_ok=True)
    write_text(weights / TEXT, found, text.encoder)
