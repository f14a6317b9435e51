"""Text from its captions to a picture: import, embed, train, export, restore; each by its command."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from tests.conftest import save_random_weights
from zipir_jax import prepare, sample, train
from zipir_jax.config import NEGATIVE_PROMPT, POSITIVE_PROMPT, ObjectiveConfig
from zipir_jax.data.text import TextEmbeddings, write_text
from zipir_jax.imageio import read_image_uint8
from zipir_jax.text_encoder import TextEncoder

pytestmark = pytest.mark.usefixtures("quick_compile")


def test_from_captions_to_a_picture_that_follows_its_prompt(
    make_config, photos, t5_folder, call, tmp_path, monkeypatch
):
    def run(main, *arguments):
        status, _, err = call(main, *arguments)
        assert status == 0, err

    folder, t5, text, output = (tmp_path / name for name in ("photos", "t5", "text", "run"))
    shutil.copytree(photos, folder)
    for index in range(4):  # the last two have none
        (folder / f"{index}.txt").write_text(f"smooth noise {index}")
    run(prepare.main, "import-t5", "--model", t5_folder.parent / "hub" / "tiny-t5", "--output", t5)
    run(prepare.main, "embed", "--encoder", t5, "--sources", folder, "--output", text)
    assert len(TextEmbeddings(text)) == 3 + 4

    # A DiT that goes on from random weights: a new one starts with gates of zero, and is deaf for some hundred steps.
    config = make_config("dit", output=str(output), steps=3, sample_every=0)
    model = dataclasses.replace(
        config.model,
        dit=dataclasses.replace(config.model.dit, text_width=16),
        diffusion=dataclasses.replace(config.model.diffusion, weak_lq_probability=0.5),
    )
    config = dataclasses.replace(
        config,
        model=model,
        init_from=str(save_random_weights(tmp_path / "start", model)),
        objective=ObjectiveConfig(min_snr_gamma=5.0, macro=0.5, coarse=0.5),
    )
    (tmp_path / "config.py").write_text(
        f"from zipir_jax.config import *\n\ndef config():\n    return {config!r}\n"
    )
    options = "--data.sources", folder, "--data.text", text, "--data.low-quality-probability", 0.3
    options = *options, "--data.text-tokens", 100
    run(train.main, "--config", tmp_path / "config.py", *options)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["loss"]) for line in lines)

    weights = tmp_path / "weights"
    made_up = [(prompt, np.zeros((1, 16))) for prompt in ("", POSITIVE_PROMPT, NEGATIVE_PROMPT)]
    write_text(tmp_path / "other", made_up, "other-t5")
    options = "--weights", output, "--text", tmp_path / "other", "--output", weights
    status, _, err = call(prepare.main, "export", *options)
    assert status == 2 and "holds TextEmbeddings(other-t5, 16 channels), but" in err
    assert f"was trained with {TextEmbeddings(text)!r}\n" in err
    run(prepare.main, "export", "--weights", output, "--text", text, "--output", weights)
    assert TextEmbeddings(weights / "text").tokens == 100  # where longer prompts are to be cut
    loaded, load = [], TextEncoder.load
    monkeypatch.setattr(
        TextEncoder, "load", lambda *arguments: (loaded.append(arguments), load(*arguments))[1]
    )

    def restored(*options):
        picture = tmp_path / "restored.png"
        arguments = ("--input", photos / "0.png", "--output", picture, "--size", "40x40", "--overwrite")
        run(sample.main, *arguments, "--weights", weights, "--steps", 1, "--guidance", 50, *options)
        return read_image_uint8(picture).astype(int)

    default = restored()
    np.testing.assert_array_equal(default, restored("--prompt", POSITIVE_PROMPT, "--text-encoder", t5))
    np.testing.assert_array_equal(default, restored("--negative-prompt", NEGATIVE_PROMPT))
    other_negative, weak = restored("--negative-prompt", ""), restored("--weak-lq", 0.1)
    assert not loaded  # these are with the weights
    prompted = restored("--prompt", "smooth noise", "--text-encoder", t5)
    assert len(loaded) == 1
    # Random decoders believe the degraded image more than the latent: by a level, but in many pixels.
    for other in (other_negative, weak, prompted):
        assert (default != other).mean() > 0.05
