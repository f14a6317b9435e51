import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece

from tests.conftest import HARBOUR, TINY_T5, foreign_model, spiece_model, write_foreign_model
from zipir_jax import text_encoder
from zipir_jax.config import T5Config
from zipir_jax.models.layers import abstract_params
from zipir_jax.models.t5 import T5Encoder
from zipir_jax.text_encoder import TextEncoder, import_encoder, program


@pytest.fixture(name="encoder", scope="module")
def load_encoder(t5_folder):
    return TextEncoder.load(t5_folder)


def test_an_embedding_for_each_token(encoder):
    assert encoder.name == TINY_T5 and encoder.width == 16
    tokens = sentencepiece.SentencePieceProcessor(model_proto=spiece_model()).encode(HARBOUR)
    empty, caption = encoder.encode(["", HARBOUR])
    assert empty.shape == (1, 16)  # of the end token, which every caption has
    assert caption.shape == (len(tokens) + 1, 16) and caption.dtype == np.float32
    assert encoder.encode([]) == []
    half, question = encoder.encode(["a boat \ud83d", "a boat ?"])
    np.testing.assert_array_equal(half, question)


def test_tokens_are_those_of_sentencepiece(encoder):
    """From the imported tokenizer.json, which was made of spiece.model."""
    reference = sentencepiece.SentencePieceProcessor(model_proto=spiece_model())
    for caption in ("", HARBOUR, "  a  boat ", "The harbour, Ünder 3 stars", "ﬁne"):
        assert encoder.tokenizer(caption)["input_ids"] == [*reference.encode(caption), 1]


def test_neighbours_have_no_influence(encoder):
    """Captions of several lengths, more than a batch, in two orders: each gets what it gets among others."""
    captions = [f"{'boats are ' * (i % 23)} noisy" for i in range(text_encoder.LARGEST_BATCH + 5)]
    found = encoder.encode(captions)
    assert len({-(-len(x) // text_encoder.LENGTH_MULTIPLE) for x in found}) > 2
    for caption, embedding in zip(captions[::-1], encoder.encode(captions[::-1]), strict=True):
        np.testing.assert_allclose(embedding, found[captions.index(caption)], atol=1e-5)
    for index in (0, 5, 20):
        np.testing.assert_allclose(encoder.encode([captions[index]])[0], found[index], atol=1e-5)
    # In a program of the same size, to the last bit.
    first, second = (encoder.encode([captions[1], other])[0] for other in ("a", captions[2]))
    np.testing.assert_array_equal(first, second)


def test_few_programs_serve_all_captions(encoder, monkeypatch):
    shapes = []
    monkeypatch.setattr(
        text_encoder,
        "program",
        lambda platform: (
            lambda config, sharding, params, tokens, lengths: (
                shapes.append(tokens.shape) or np.zeros((*tokens.shape, 16), np.float32)
            )
        ),
    )
    found = encoder.encode(["boat " * i for i in range(300)])
    assert max(len(x) for x in found) == text_encoder.LARGEST_LENGTH
    assert {length for _, length in shapes} <= {64, 128, 192, 256, 320, 384, 448, 512}
    assert {count for count, _ in shapes} <= {1, 2, 4, 8, 16}


def test_the_parameters_are_not_there_a_second_time():
    """In float32, for a CPU's products, of which XLA would make all at once: 19 GB of the XXL."""
    config = T5Config(layers=32, width=128, heads=4, head_width=32, hidden=256, vocabulary=64)
    params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), abstract_params(T5Encoder, config)
    )
    tokens, lengths = jax.ShapeDtypeStruct((1, 64), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    compiled = program("cpu").lower(config, device, params, tokens, lengths).compile()
    used = compiled.memory_analysis()
    assert used.temp_size_in_bytes < 0.5 * used.argument_size_in_bytes


def test_long_captions_are_cut_and_end_as_others_do(encoder):
    (embedding,) = encoder.encode(["night " * 2000])
    assert embedding.shape == (512, 16)
    tokens = encoder.tokenizer("night " * 2000, truncation=True, max_length=512)["input_ids"]
    assert len(tokens) == 512 and tokens[-1] == 1


def test_several_devices_give_what_one_gives(t5_folder):
    result = subprocess.run(
        [sys.executable, "-m", "tests.sharded_text_encoder", t5_folder],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    differences = [float(line) for line in result.stdout.split()]
    assert len(differences) == 3 and max(differences) < 1e-5


def test_a_model_without_a_tokenizer_is_refused_before_anything_is_written(tmp_path):
    config, tensors, _ = foreign_model("t5")
    folder = write_foreign_model(tmp_path / "hub", "t5", config, tensors)
    (folder / "spiece.model").rename(folder / "spiece")
    with pytest.raises(
        ValueError, match=r"hub: no tokenizer here \(tokenizer.json or spiece.model is missing\)"
    ):
        import_encoder(str(folder), tmp_path / "ours", "float32")
    (folder / "spiece.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="hub: the tokenizer cannot be read"):
        import_encoder(str(folder), tmp_path / "ours", "float32")
    (folder / "spiece.model").write_bytes((folder / "spiece").read_bytes())
    (folder / "tokenizer_config.json").unlink()  # 100 further tokens without it
    with pytest.raises(ValueError, match=r"hub: the tokenizer has tokens up to 1\d\d, the encoder up to 63"):
        import_encoder(str(folder), tmp_path / "ours", "float32")
    assert not (tmp_path / "ours").exists()


def test_a_tokenizer_of_another_kind_is_refused(t5_folder, tmp_path):
    """Whose empty text is not the end token alone, as BERT's and CLIP's."""
    hub = t5_folder.parent / "hub" / "tiny-t5"
    shutil.copytree(t5_folder / "tokenizer", tmp_path / "tokenizer")
    settings = json.loads((tmp_path / "tokenizer" / "tokenizer.json").read_text())
    settings["post_processor"] = None
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(json.dumps(settings))
    settings = json.loads((tmp_path / "tokenizer" / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(
        ValueError, match=r"the tokenizer makes \[\] of an empty text, T5's the end token \[1\]"
    ):
        import_encoder(str(hub), tmp_path / "ours", "float32", tokenizer=str(tmp_path / "tokenizer"))
    assert not (tmp_path / "ours").exists()
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "tokenizer").symlink_to(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="ours/tokenizer: is a link; choose another output"):
        import_encoder(str(hub), tmp_path / "ours", "float32")


def test_other_folders_are_refused(tiny_weights, t5_folder, tmp_path):
    with pytest.raises(ValueError, match=r"config.json is missing; `prepare import-t5` writes such a folder"):
        TextEncoder.load(tmp_path)
    with pytest.raises(ValueError, match=r"config.json has no t5; `prepare import-t5` writes such a folder"):
        TextEncoder.load(tiny_weights)
    # The tokenizer first, which is quick: not after minutes of reading tensors.
    shutil.copyfile(t5_folder / "config.json", tmp_path / "config.json")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="tokenizer: no tokenizer here"):
        TextEncoder.load(tmp_path)
