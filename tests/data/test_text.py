"""Text embeddings: each caption finds its own, and nothing else does."""

import pickle

import numpy as np
import pytest

from zipir_jax.data import text
from zipir_jax.data.text import TextEmbeddings, distinct, write_text

CAPTIONS = ["a lake", "", "zwei Boote, früh am Ufer", "a lake ", "A lake", "湖", "a \ud83d half"]


def embedding(caption, width=6):
    generator = np.random.default_rng(list(caption.encode("utf-8", "surrogatepass")))
    return generator.normal(size=(len(caption) + 1, width)).astype(np.float32)


@pytest.fixture(name="folder")
def make_folder(tmp_path):
    write_text(tmp_path / "out", ((caption, embedding(caption)) for caption in CAPTIONS), "t5")
    return tmp_path / "out"


def test_each_caption_finds_its_embedding_to_the_precision_of_bfloat16(folder):
    embeddings = TextEmbeddings(folder)
    assert embeddings.width == 6
    for caption in CAPTIONS:
        found = embeddings[caption]
        assert found.dtype == np.float32 and found.shape == (len(caption) + 1, 6)
        np.testing.assert_allclose(found, embedding(caption), rtol=2**-8)
        assert not np.array_equal(found, embedding(caption))


def test_what_bfloat16_holds_comes_back_bit_for_bit(tmp_path):
    exact = np.arange(-12, 12, dtype=np.float32).reshape(3, 8) / 4
    write_text(tmp_path / "out", [("", exact)], "t5")
    np.testing.assert_array_equal(TextEmbeddings(tmp_path / "out")[""], exact)


def test_many_captions_are_found_again(tmp_path):
    captions = ["", *map(str, range(3000))]
    write_text(tmp_path / "out", ((c, np.full((1, 2), float(c or -1))) for c in captions), "t5")
    embeddings = TextEmbeddings(tmp_path / "out")
    for caption in captions[::7]:
        assert embeddings[caption][0, 0] == pytest.approx(float(caption or -1), rel=2**-8)


def test_a_caption_may_be_written_twice(tmp_path):
    write_text(tmp_path / "out", [(caption, embedding(caption)) for caption in ("b", "", "b", "")], "t5")
    assert TextEmbeddings(tmp_path / "out")["b"].shape == (2, 6)


def test_captions_that_come_again_are_left_out():
    captions = ["b", "", "a", "b", "B", "", "a \ud83d half", "a \ud83d half", "c"]
    assert list(distinct(iter(captions))) == ["b", "", "a", "B", "a \ud83d half", "c"]


def test_it_tells_which_captions_it_has_and_who_made_them(folder):
    embeddings = TextEmbeddings(folder)
    assert all(caption in embeddings for caption in CAPTIONS)
    assert "a sea" not in embeddings and "a lake  " not in embeddings
    assert embeddings.encoder == "t5"


def test_an_unknown_caption_is_named_and_a_long_one_cut(folder):
    embeddings = TextEmbeddings(folder)
    with pytest.raises(ValueError, match=r"out: no embedding of the caption 'a sea'$"):
        embeddings["a sea"]
    with pytest.raises(ValueError, match=r"no embedding of the caption 'x{60}\.\.\.'$"):
        embeddings["x" * 200]


def test_captions_of_the_same_key_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "_key", lambda caption: np.uint64(len(caption) > 0))
    write_text(tmp_path / "out", [("", embedding("")), ("b", embedding("b"))], "t5")
    embeddings = TextEmbeddings(tmp_path / "out")
    assert embeddings["b"].shape == (2, 6)
    with pytest.raises(ValueError, match="no embedding of the caption 'c'"):
        embeddings["c"]


def test_the_empty_caption_must_be_there(tmp_path):
    with pytest.raises(ValueError, match="the embedding of the empty caption is missing"):
        write_text(tmp_path / "out", [("b", embedding("b"))], "t5")
    with pytest.raises(ValueError, match=r"text\.json: cannot be read"):
        TextEmbeddings(tmp_path / "out")


def test_embeddings_of_two_encoders_do_not_mix(tmp_path):
    items = [("", embedding("")), ("b", embedding("b", width=5))]
    with pytest.raises(ValueError, match="embeddings of 5 and 6 channels do not mix"):
        write_text(tmp_path / "out", iter(items), "t5")
    assert not (tmp_path / "out" / "text.json").exists()


def test_what_is_stored_is_cut_and_says_where_and_what_the_default_prompts_are(tmp_path):
    items = [(caption, embedding(caption)) for caption in ("", "a lake", "b")]
    write_text(tmp_path / "out", items, "t5", 4, "a lake", "b")
    found = TextEmbeddings(tmp_path / "out")
    assert [len(found[caption]) for caption, _ in items] == [1, 4, 2]
    assert (found.tokens, found.positive, found.negative) == (4, "a lake", "b")


def test_keys_stay_on_disk_and_out_of_pickles(folder):
    embeddings = TextEmbeddings(folder)
    assert isinstance(embeddings._keys, np.memmap)
    again = pickle.loads(pickle.dumps(embeddings))
    np.testing.assert_array_equal(again["a lake"], embeddings["a lake"])
    assert len(pickle.dumps(embeddings)) < 500


def test_keys_of_other_records_are_refused(folder):
    np.save(folder / "captions.npy", np.zeros((2, 3), np.uint64))
    with pytest.raises(ValueError, match=r"captions\.npy: uint64 \(2, 3\) instead of the uint64 \(2, 7\)"):
        TextEmbeddings(folder)
    (folder / "captions.npy").unlink()
    with pytest.raises(ValueError, match=r"captions\.npy: cannot be read"):
        TextEmbeddings(folder)
