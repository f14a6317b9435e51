"""The weights of a run, finished or not: the average that a checkpoint holds, with all that it was built on."""

import functools
from pathlib import Path

import dacite
import jax

from zipir_jax.config import ModelConfig, TrainConfig
from zipir_jax.data.text import TextEmbeddings
from zipir_jax.training import checkpoint
from zipir_jax.training.loop import load_pretrained, open_data, starting_groups, whole_weights
from zipir_jax.training.state import create_state


def run_weights(run: Path, step: int | None = None) -> tuple[ModelConfig, dict]:
    """The config and the groups of weights of a run's newest checkpoint, or of that of a step; on the host.

    Reads the weights that the run started from and, for the statistics, its images. Raises ValueError where they, or
    the checkpoint, are not there any more.
    """
    checkpoints, step, config = _open(run, step)
    pretrained = load_pretrained(config)
    source, _ = open_data(config)
    groups = starting_groups(config, pretrained, source, checkpoint.macro_of(checkpoints, step))
    state = jax.eval_shape(functools.partial(create_state, config), jax.random.key(0), groups)
    ema = checkpoint.restore_ema(checkpoints, step, state["ema"])
    return config.model, whole_weights(config, pretrained | groups, ema, source)


def text_tokens(run: Path, step: int | None, text: TextEmbeddings) -> int:
    """The tokens that a run cuts embeddings at; those of `text` for one that reads no text.

    step: as in `run_weights`. Raises ValueError where the run was trained with the embeddings of another encoder.
    """
    checkpoints, step, config = _open(run, step)
    if not config.data.text:
        return text.tokens
    _, _, trained_with = checkpoint.data_contents(checkpoints, step).rpartition(" with ")
    if trained_with != repr(text):
        raise ValueError(f"{text.folder}: holds {text!r}, but {run} was trained with {trained_with}")
    return min(config.data.text_tokens, text.tokens)


def _open(run, step):
    checkpoints = checkpoint.reader(run)
    step = checkpoint.find(checkpoints, "auto" if step is None else str(step))
    if step is None:
        raise ValueError(f"{run} holds no checkpoint")
    fields = checkpoint.read_config(checkpoints, step)["config"]
    return checkpoints, step, dacite.from_dict(TrainConfig, fields, dacite.Config(cast=[tuple], strict=True))
