"""What each photograph is restored with, in words, and the embeddings of these words."""

import contextlib
import csv
import os
import posixpath
import sys
from collections.abc import Iterable
from pathlib import Path

import ml_dtypes
import numpy as np
from jaxtyping import BFloat16

from zipir_jax.config import NEGATIVE_PROMPT, POSITIVE_PROMPT, DataConfig, ModelConfig
from zipir_jax.data.sources import read_caption
from zipir_jax.data.text import TextEmbeddings, remove_text, shortened, write_text
from zipir_jax.weights import TEXT, load_text

PROMPTS_AT_ONCE = 64  # that are encoded before they are cut and rounded: the float32 of one may be 8 MiB
COLUMNS = ("file_name", "text")  # of a prompt file, as in the metadata.csv of Hugging Face's imagefolder


def choose_prompts(
    photographs: list[Path],
    prompt: str | None,
    prompt_file: Path | None,
    default: str = POSITIVE_PROMPT,
    stored: TextEmbeddings | None = None,
    folder: Path | None = None,
) -> list[str]:
    """The prompt of each photograph: the file's, else `prompt`, else the caption beside it, else `default`.

    stored: the only captions that can be had, where there is no text encoder. folder: that holds the photographs, and
    that the prompt file's names begin below; not given: the first one's. A caption that cannot be read, or had, is
    named on stderr: unlike a prompt, nobody asked for it. Raises ValueError as `read_prompt_file`.
    """
    folder = photographs[0].parent if folder is None else folder
    named = {} if prompt_file is None else read_prompt_file(prompt_file, folder)

    def caption_of(photograph):
        try:
            caption = read_caption(photograph)
        except ValueError as error:
            print(f"{error}; its photograph is restored with the default prompt", file=sys.stderr)
            return default
        if caption and stored is not None and caption not in stored:
            print(
                f"{photograph}: no embedding of its caption {shortened(caption)!r}; restored with the default prompt: "
                "its own needs --text-encoder FOLDER",
                file=sys.stderr,
            )
            return default
        return caption or default

    names = [path.relative_to(folder).as_posix() for path in photographs]
    return [
        named[name] if name in named else caption_of(path) if prompt is None else prompt
        for name, path in zip(names, photographs, strict=True)
    ]


def read_prompt_file(path: Path, folder: Path) -> dict[str, str]:
    """{file name: prompt} of a CSV file with COLUMNS, and perhaps others, for some files of a folder or below it.

    A file further below has a name such as `holidays/boat.jpg`. An empty text is the empty caption. Raises ValueError,
    with the path and what is wrong, for a file that cannot be read, columns that are missing, a name that is not in the
    folder or there twice, and a row of too few or many cells.
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
    prompts, unknown = {}, []
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
        is_below = name == posixpath.normpath(name) and not name.startswith(("/", "../"))
        if not (is_below and os.path.exists(folder / name)):
            unknown.append(name)
        prompts[name] = text.strip()
    if unknown:
        raise ValueError(f"{path}: {folder} does not hold {', '.join(unknown)}")
    return prompts


def embed_prompts(
    prompts: Iterable[str],
    weights: Path | str,
    config: ModelConfig,
    encoder: Path | None = None,
    dry_run: bool = False,
) -> dict[str, BFloat16[np.ndarray, "_ c"]]:
    """{prompt: embedding} out of what the weights come with, and for all others by a text encoder, if there are others.

    config: of the weights. encoder: folder that `prepare import-t5` wrote; loaded only where it is needed, and given up
    at the end. What it makes is cut as what is stored, or by DataConfig.text_tokens where nothing is. dry_run: do not
    load it, and give zeros of as many tokens as are left uncut, which no embedding exceeds.

    Raises ValueError for prompts that only an encoder could embed where there is none, and for an encoder that does not
    suit the model, or did not make what is stored.
    """
    stored = load_text(weights, config)
    embeddings, new = {}, []
    for prompt in dict.fromkeys(prompts):
        if stored is not None and prompt in stored:
            embeddings[prompt] = stored[prompt].astype(ml_dtypes.bfloat16)
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
    width, tokens = config.dit.text_width, DataConfig.text_tokens if stored is None else stored.tokens
    if dry_run:
        return embeddings | dict.fromkeys(new, np.zeros((tokens, width), ml_dtypes.bfloat16))
    from zipir_jax.text_encoder import TextEncoder  # brings transformers, which takes seconds

    t5 = TextEncoder.load(encoder)
    if t5.width != width:
        raise ValueError(f"{encoder}: its embeddings have {t5.width} channels, the model takes {width}")
    if stored is not None and stored.encoder != t5.name:
        raise ValueError(f"{encoder}: is {t5.name}, but {stored.folder} holds embeddings of {stored.encoder}")
    for start in range(0, len(new), PROMPTS_AT_ONCE):
        part = new[start : start + PROMPTS_AT_ONCE]
        for prompt, embedding in zip(part, t5.encode(part), strict=True):
            # As they are stored: the same prompt gives the same picture.
            embeddings[prompt] = embedding[:tokens].astype(ml_dtypes.bfloat16)
    return embeddings


def prompt_pairs(
    photographs: list[Path],
    folder: Path,
    weights: Path | str,
    config: ModelConfig,
    prompt: str | None = None,
    negative_prompt: str | None = None,
    prompt_file: Path | None = None,
    encoder: Path | None = None,
) -> dict[Path, tuple[str, str] | None]:
    """The prompt and the negative prompt of each photograph, in words; None for weights without text.

    config: of the weights. folder: see `choose_prompts`. Weights without text leave captions beside the photographs
    alone. Raises ValueError, naming what was given, where they are given prompts, and as `choose_prompts`.
    """
    if not config.dit.text_width:
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
        return dict.fromkeys(photographs)
    stored = load_text(weights, config)
    positive, negative = (
        (POSITIVE_PROMPT, NEGATIVE_PROMPT) if stored is None else (stored.positive, stored.negative)
    )
    captions = stored if encoder is None else None
    chosen = choose_prompts(photographs, prompt, prompt_file, positive, captions, folder)
    negative = negative if negative_prompt is None else negative_prompt
    return {path: (words, negative) for path, words in zip(photographs, chosen, strict=True)}


# --------------------------------------------------------------------------------------------------
# The default prompts, which weights come with
# --------------------------------------------------------------------------------------------------


def check_prompts(text: TextEmbeddings) -> None:
    """Raises ValueError where there is no embedding of a default prompt."""
    missing = [prompt for prompt in (text.positive, text.negative) if prompt not in text]
    if missing:
        raise ValueError(
            f"{text.folder}: no embedding of the default prompt {shortened(missing[0])!r}; make the folder with "
            "prepare embed, which adds the default prompts to the captions"
        )


def remove_prompts(weights: Path) -> None:
    """Remove the embeddings that a folder of weights holds; of a link itself, not of what it leads to."""
    folder = weights / TEXT
    if folder.is_symlink():
        folder.unlink()
    elif folder.is_dir():
        remove_text(folder)
        with contextlib.suppress(OSError):  # where it holds something else
            folder.rmdir()


def write_prompts(weights: Path, text: TextEmbeddings, tokens: int) -> None:
    """Write embeddings of no text and of the default prompts, those that there are, into a folder of weights.

    tokens: where they are cut. Raises ValueError as `write_text`.
    """
    found = [(prompt, text[prompt]) for prompt in ("", text.positive, text.negative) if prompt in text]
    write_text(weights / TEXT, found, text.encoder, tokens, text.positive, text.negative)
