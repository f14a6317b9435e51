"""Which words a photograph is restored with, and where their embeddings come from; a T5 only where it has to."""

import dataclasses
import json
import re
import shutil
import sys

import ml_dtypes
import numpy as np
import pytest
import skimage.data
from safetensors.numpy import load_file, save_file

from tests.conftest import TINY, save_random_weights
from zipir_jax import prepare, restorer, sample
from zipir_jax.config import NEGATIVE_PROMPT, POSITIVE_PROMPT, DataConfig, SamplingConfig
from zipir_jax.data.text import TextEmbeddings, write_text
from zipir_jax.imageio import read_image_uint8
from zipir_jax.photograph import write_image
from zipir_jax.prompts import choose_prompts, embed_prompts, read_prompt_file
from zipir_jax.restorer import Restorer
from zipir_jax.weights import TEXT, load_config

pytestmark = pytest.mark.usefixtures("quick_compile")
FAST = SamplingConfig(steps=1)
DEFAULT_PROMPTS = ("", POSITIVE_PROMPT, NEGATIVE_PROMPT)


@pytest.fixture(scope="module")
def embedded(t5_folder, tmp_path_factory):
    """What `prepare embed` writes, of a folder with two captions."""
    folder = tmp_path_factory.mktemp("embedded")
    for name, caption in (("a", "a lake"), ("b", ""), ("c", "a lake"), ("d", "two boats " * 40)):
        write_image(folder / "photos" / f"{name}.png", skimage.data.astronaut()[:40, :40])
        (folder / "photos" / f"{name}.txt").write_text(caption)
    options = "--encoder", t5_folder, "--output", folder / "text", "--sources", folder / "photos"
    prepare.main([str(option) for option in ("embed", *options, "--tokens", 20)])
    return folder / "text"


@pytest.fixture(scope="module")
def bare_weights(tmp_path_factory):
    """A model with text, without any embedding."""
    dit = dataclasses.replace(TINY.dit, text_width=16)
    return save_random_weights(
        tmp_path_factory.mktemp("weights") / "bare", dataclasses.replace(TINY, dit=dit)
    )


@pytest.fixture(scope="module")
def text_weights(bare_weights, embedded, tmp_path_factory):
    """The same, exported with the embeddings of the default prompts."""
    folder = tmp_path_factory.mktemp("weights") / "exported"
    arguments = ("--weights", bare_weights, "--output", folder, "--text", embedded, "--dtype", "float32")
    prepare.main(["export", *map(str, arguments)])
    return folder


@pytest.fixture
def photo(tmp_path):
    write_image(tmp_path / "in" / "photo.png", skimage.data.astronaut()[100:124, 200:230])
    return tmp_path / "in" / "photo.png"


@pytest.fixture
def restore(call, text_weights, photo, tmp_path):
    """`restore(*options)` of the photograph or, with input, of others: (picture or None, stdout, stderr)."""

    def restore(*options, weights=text_weights, input=photo):
        output = tmp_path / "out.png" if input.suffix else tmp_path / "out"
        arguments = ("--input", input, "--output", output, "--weights", weights, "--scale", 1)
        status, out, err = call(sample.main, *arguments, "--steps", FAST.steps, "--overwrite", *options)
        assert (status == 0) == (not err.startswith("error:")), err
        return read_image_uint8(output) if status == 0 and output.is_file() else None, out, err

    return restore


@pytest.fixture
def no_encoder(monkeypatch):
    """The rest of the test does without text encoder and transformers."""
    for name in ("zipir_jax.text_encoder", "transformers", "tokenizers"):
        monkeypatch.setitem(sys.modules, name, None)


# --------------------------------------------------------------------------------------------------
# Embeddings made once
# --------------------------------------------------------------------------------------------------


def test_embed_writes_the_default_prompts_and_each_caption_once(embedded, t5_folder):
    from zipir_jax.text_encoder import TextEncoder

    text, t5 = TextEmbeddings(embedded), TextEncoder.load(t5_folder)
    captions = [*DEFAULT_PROMPTS, "a lake", ("two boats " * 40).strip()]
    assert len(text) == len(captions) and (text.width, text.encoder) == (16, t5.name)
    for caption, expected in zip(captions, t5.encode(captions), strict=True):
        assert len(text[caption]) == min(len(expected), 20)
        np.testing.assert_allclose(text[caption], expected[:20], rtol=2**-7, atol=1e-4)
    assert len(text[""]) == 1 and len(text[captions[-1]]) == text.tokens == 20
    assert (text.positive, text.negative) == (POSITIVE_PROMPT, NEGATIVE_PROMPT)


def test_embed_names_captions_that_it_cannot_use_and_goes_on(t5_folder, call, tmp_path, monkeypatch):
    from zipir_jax.text_encoder import TextEncoder

    encode = TextEncoder.encode

    def picky(self, captions):
        if "two boats" in captions:
            raise TypeError("no words")
        return encode(self, [caption.encode("utf-8", "replace").decode() for caption in captions])

    monkeypatch.setattr(TextEncoder, "encode", picky)
    half = "half \ud83d a character"
    for name, caption in (
        ("a.txt", b"a lake"),
        ("b.txt", b"\xff"),
        ("c.txt", b"two boats"),
        ("d.json", json.dumps({"caption": half}).encode()),
    ):
        write_image(tmp_path / "photos" / f"{name[0]}.png", skimage.data.astronaut()[:40, :40])
        (tmp_path / "photos" / name).write_bytes(caption)
    options = "--encoder", t5_folder, "--output", tmp_path / "text", "--sources", tmp_path / "photos"
    status, out, err = call(prepare.main, "embed", *options)
    assert (status, out) == (0, f"{tmp_path / 'text'}: embeddings of 5 captions\n")
    assert "b.txt: the caption cannot be read" in err and "2 images or captions could not be read" in err
    assert "the caption 'two boats' cannot be encoded (no words)" in err
    text = TextEmbeddings(tmp_path / "text")
    assert "a lake" in text and half in text and "two boats" not in text


def test_embed_refuses_what_cannot_work_before_it_loads_an_encoder(embedded, call, tmp_path, no_encoder):
    (tmp_path / "file").write_text("")
    for options, message in (
        (("--output", embedded), "holds text.json already"),
        (("--output", tmp_path / "file" / "out"), "cannot be written to"),
        (("--output", tmp_path / "out", "--tokens", 0), "tokens is 0"),
        (("--output", tmp_path / "out", "--sources", tmp_path / "none"), "none: no such folder"),
    ):
        status, _, err = call(prepare.main, "embed", "--encoder", tmp_path, *options)
        assert status == 2 and message in err and err.count("\n") == 1


def test_what_a_killed_embed_leaves_is_not_finished(t5_folder, monkeypatch, tmp_path):
    from zipir_jax.text_encoder import TextEncoder

    encode, calls = TextEncoder.encode, []

    def killed(self, captions):
        calls.append(captions)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(self, captions)

    options = ["embed", "--encoder", str(t5_folder), "--output", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(TextEncoder, "encode", killed)
        patch.setattr(prepare, "CAPTIONS_AT_ONCE", 1)
        with pytest.raises(KeyboardInterrupt):
            prepare.main(options)
    with pytest.raises(ValueError, match=r"text\.json: cannot be read"):
        TextEmbeddings(tmp_path)
    for left in ("text-00007.array_record", ".text-00007.array_record.partial"):
        (tmp_path / left).touch()
    prepare.main(options)  # and is written over
    assert len(TextEmbeddings(tmp_path)) == 3
    assert {path.name for path in tmp_path.iterdir()} == {
        "captions.npy",
        "text-00000.array_record",
        "text.json",
    }


def test_export_takes_the_default_prompts_along(text_weights, embedded, call, tmp_path):
    stored, made = TextEmbeddings(text_weights / TEXT), TextEmbeddings(embedded)
    assert len(stored) == 3 and stored.encoder == made.encoder
    for prompt in DEFAULT_PROMPTS:
        np.testing.assert_array_equal(stored[prompt], made[prompt])
    # Again, and from weights that have them.
    for _ in range(2):
        status, _, err = call(
            prepare.main, "export", "--weights", text_weights, "--output", tmp_path / "again"
        )
        assert (status, err) == (0, "")
    np.testing.assert_array_equal(Restorer.load(tmp_path / "again").text, made[POSITIVE_PROMPT])
    assert TextEmbeddings(tmp_path / "again" / TEXT).tokens == 20


def test_prompts_of_before_never_lie_beside_other_weights(
    bare_weights, tiny_weights, text_weights, embedded, call, tmp_path, monkeypatch
):
    def export(weights, *options):
        return call(prepare.main, "export", "--weights", weights, "--output", tmp_path / "out", *options)

    # A textless model, one without prompts, and an export that is killed between weights and text.
    for weights in (tiny_weights, bare_weights):
        assert export(text_weights)[0] == 0 and (tmp_path / "out" / TEXT).is_dir()
        assert export(weights)[0] == 0 and not (tmp_path / "out" / TEXT).exists()
    assert export(text_weights)[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr("zipir_jax.prompts.write_text", None)
        with pytest.raises(TypeError):
            export(text_weights)
    assert Restorer.load(tmp_path / "out").text is None
    # Embeddings of hours are not taken for an older export's; where they are linked to, the link alone goes.
    shutil.copytree(embedded, tmp_path / "out" / TEXT)
    status, _, err = export(bare_weights, "--text", tmp_path / "out" / TEXT)
    assert status == 2 and "would replace the embeddings" in err
    shutil.rmtree(tmp_path / "out" / TEXT)
    (tmp_path / "out" / TEXT).symlink_to(embedded)
    assert export(tiny_weights)[0] == 0
    assert len(TextEmbeddings(embedded)) == 5 and not (tmp_path / "out" / TEXT).exists()


def test_stored_prompts_outlive_a_change_of_their_wording(restore, bare_weights, no_encoder, tmp_path):
    rng = np.random.default_rng(0)
    prompts = [(text, rng.standard_normal((3, 16)).astype(np.float32)) for text in ("", "fine", "poor")]
    shutil.copytree(bare_weights, tmp_path / "weights")
    write_text(tmp_path / "weights" / TEXT, prompts, "t5", positive="fine", negative="poor")
    prepare.main(
        ["export", "--weights", str(tmp_path / "weights"), "--output", str(tmp_path / "exported")]
        + ["--dtype", "float32"]
    )
    default = restore(weights=tmp_path / "exported")[0]
    named = restore("--prompt", "fine", "--negative-prompt", "poor", weights=tmp_path / "exported")[0]
    np.testing.assert_array_equal(default, named)
    assert restore("--prompt", POSITIVE_PROMPT, weights=tmp_path / "exported")[0] is None


def test_export_refuses_embeddings_that_the_model_does_not_take(
    tiny_weights, bare_weights, embedded, call, tmp_path
):
    write_text(tmp_path / "narrow", [(p, np.zeros((1, 8), np.float32)) for p in DEFAULT_PROMPTS], "t5")
    write_text(tmp_path / "empty", [("", np.zeros((1, 16), np.float32))], "t5")
    for weights, text, message in (
        (tiny_weights, embedded, "text: the embeddings have 16 channels, the model takes no text"),
        (bare_weights, tmp_path / "narrow", "narrow: the embeddings have 8 channels, the model takes 16"),
        (bare_weights, tmp_path / "empty", "empty: no embedding of the default prompt 'A sharp"),
    ):
        output = tmp_path / "out"
        status, _, err = call(
            prepare.main, "export", "--weights", weights, "--output", output, "--text", text
        )
        assert status == 2 and message in err and not output.exists()
    status, _, err = call(prepare.main, "export", "--weights", bare_weights, "--output", tmp_path / "out")
    assert status == 0 and "without embeddings of the default prompts" in err


# --------------------------------------------------------------------------------------------------
# The prompt of each photograph
# --------------------------------------------------------------------------------------------------


def test_the_file_comes_before_the_prompt_before_the_caption_before_the_default(tmp_path, capsys):
    photographs = [tmp_path / f"{name}.png" for name in "abcd"]
    for path in photographs:
        path.touch()
    (tmp_path / "b.txt").write_text("caption of b\n")
    (tmp_path / "c.json").write_text('{"caption": "caption of c"}')
    (tmp_path / "d.txt").write_text("")
    file = tmp_path / "metadata.csv"
    file.write_text('file_name,text,score\nb.png,"b, from the file",1\nd.png,,2\n')
    captions = [POSITIVE_PROMPT, "caption of b", "caption of c", POSITIVE_PROMPT]
    assert choose_prompts(photographs, None, None) == captions
    assert choose_prompts(photographs, "all", None) == ["all"] * 4
    assert choose_prompts(photographs, "", None) == [""] * 4
    assert choose_prompts(photographs, "all", file) == ["all", "b, from the file", "all", ""]
    assert choose_prompts(photographs, None, file) == [captions[0], "b, from the file", captions[2], ""]
    assert choose_prompts(photographs[1:2], None, file) == [
        "b, from the file"
    ]  # a folder's file serves one of it
    assert capsys.readouterr().err == ""

    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xff")
    assert choose_prompts(photographs, None, None) == captions
    assert re.match(r".*a\.txt: the caption cannot be read .* default prompt\n$", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no column file_name and text; it has none"),
        ("file_name,caption\na.png,x\n", "no column text; it has file_name, caption"),
        ("file_name,text\na.png,x\na.png,y\n", "a.png is there twice, the second time in line 3"),
        ("file_name,text\nx.png,x\na.png,y\n./a.png,y\n", r"does not hold x\.png, \./a\.png$"),
        ("file_name,text\na.png\n", "line 2 has no text"),
        ("file_name,text\n,x\n", "line 2 has no file name"),
        ("file_name,text\na.png,a lake, at night\n", "line 2 has more cells than the first; .* quotes"),
        (b"file_name,text\na.png,\xff\n", "the prompts cannot be read"),
        (b'file_name,text\n"a.png,x\n', "the prompts cannot be read"),
    ],
)
def test_what_is_wrong_with_a_prompt_file_is_named(tmp_path, content, message):
    (tmp_path / "a.png").touch()
    (tmp_path / "p.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=rf"p\.csv: .*{message}"):
        read_prompt_file(tmp_path / "p.csv", tmp_path)
    with pytest.raises(ValueError, match=r"none\.csv: the prompts cannot be read"):
        read_prompt_file(tmp_path / "none.csv", tmp_path)


# --------------------------------------------------------------------------------------------------
# Restoring
# --------------------------------------------------------------------------------------------------


def test_a_model_with_text_restores_without_a_text_encoder(restore, photo, text_weights, no_encoder):
    restorer, image = Restorer.load(text_weights), read_image_uint8(photo)
    text = TextEmbeddings(text_weights / TEXT)
    default = restorer.restore(image, scale=1, sampling=FAST)
    explicit = {"text": text[POSITIVE_PROMPT], "negative_text": text[NEGATIVE_PROMPT]}
    np.testing.assert_array_equal(default, restorer.restore(image, scale=1, sampling=FAST, **explicit))
    np.testing.assert_array_equal(default, restore()[0])
    # The guidance acts, and so does either prompt.
    assert np.abs(default - restore("--guidance", 1)[0].astype(int)).max() > 1
    assert np.abs(default - restore("--negative-prompt", "")[0].astype(int)).max() > 1
    assert np.abs(default - restore("--prompt", "")[0].astype(int)).max() > 1
    np.testing.assert_array_equal(default, restore("--prompt", POSITIVE_PROMPT)[0])


def test_a_new_prompt_loads_the_encoder_once_for_all_photographs(restore, photo, t5_folder, monkeypatch):
    from zipir_jax.text_encoder import TextEncoder

    calls, encode = [], TextEncoder.encode
    monkeypatch.setattr(
        TextEncoder, "encode", lambda self, captions: (calls.append(captions), encode(self, captions))[1]
    )
    default, lake = (
        restore("--text-encoder", t5_folder)[0],
        restore("--text-encoder", t5_folder, "--prompt", "a lake")[0],
    )
    assert calls == [["a lake"]]
    assert np.abs(lake - default.astype(int)).max() > 1
    for name in "ab":
        shutil.copy(photo, photo.with_name(f"{name}.png"))
    photo.with_name("a.txt").write_text("a lake")
    prompts = photo.with_name("prompts.csv")
    prompts.write_text("file_name,text\nb.png,two boats\n")
    calls.clear()
    restore(
        "--text-encoder", t5_folder, "--prompt-file", prompts, "--negative-prompt", "fog", input=photo.parent
    )
    assert calls == [["a lake", "two boats", "fog"]]
    out = photo.parent.parent / "out"
    pictures = [read_image_uint8(out / f"{name}.png") for name in ("a", "b", "photo")]
    assert all(np.abs(pictures[i] - pictures[i - 1].astype(int)).max() > 1 for i in range(3))
    # A caption in a file and one on the command line are the same prompt.
    alone = restore("--text-encoder", t5_folder, "--prompt", "a lake", "--negative-prompt", "fog")[0]
    np.testing.assert_array_equal(alone, pictures[0])


def test_a_prompt_is_the_same_embedded_beforehand_or_now(embedded, bare_weights, t5_folder, tmp_path):
    shutil.copytree(bare_weights, tmp_path / "weights")
    config, long = (
        load_config(bare_weights),
        ("two boats " * 40).strip(),
    )  # of 121 tokens, cut at 20 when embedded
    now = embed_prompts(["a lake", "", long * 2], tmp_path / "weights", config, t5_folder)
    assert len(now.pop(long * 2)) == DataConfig.text_tokens
    shutil.copytree(embedded, tmp_path / "weights" / TEXT)
    before = embed_prompts(["a lake", "", long, long + "."], tmp_path / "weights", config, t5_folder)
    # The same words with a full stop, which only the encoder can embed, are cut where the others were.
    assert len(before.pop(long)) == len(before.pop(long + ".")) == 20
    assert now.keys() == before.keys()
    for prompt in now:  # to the last digit of bfloat16: other captions were encoded beside it
        assert now[prompt].dtype == before[prompt].dtype == ml_dtypes.bfloat16
        found, expected = (x[prompt].astype(np.float32) for x in (now, before))
        np.testing.assert_allclose(found, expected, rtol=2**-7, atol=1e-4)


def test_a_prompt_that_nobody_can_embed_is_one_sentence(
    restore, bare_weights, tiny_weights, photo, no_encoder
):
    for options, weights, message in (
        (
            ("--prompt", "a lake"),
            {},
            r"no embedding of the prompt 'a lake', which .* give --text-encoder FOLDER",
        ),
        (
            ("--prompt", "a lake", "--negative-prompt", "fog"),
            {},
            r"no embedding of the prompt 'a lake' and of 1 others, which",
        ),
        ((), {"weights": bare_weights}, r"come without embeddings of prompts; give --text-encoder .* export"),
        (
            ("--negative-prompt", "fog", "--guidance", 1),
            {},
            "a negative prompt has no effect with guidance 1",
        ),
        (
            ("--prompt", "a lake", "--prompt-file", "x.csv"),
            {"weights": tiny_weights},
            "trained without text: leave out --prompt, --prompt-file$",
        ),
        (
            ("--negative-prompt", ""),
            {"weights": tiny_weights},
            "trained without text: leave out --negative-prompt$",
        ),
    ):
        picture, out, err = restore(*options, **weights)
        assert picture is None and out == "" and err.count("\n") == 1
        assert re.search(message, err.strip()), err
    with pytest.raises(
        ValueError, match=r"come with no embedding of the default prompt: give text embeddings"
    ):
        Restorer.load(bare_weights).restore(read_image_uint8(photo), scale=1)


def test_the_prompts_of_a_tree_of_photographs(tmp_path):
    for name in ("a.png", "b/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "p.csv").write_text("file_name,text\nb/a.png,a lake\n")
    photographs = [tmp_path / "a.png", tmp_path / "b" / "a.png"]
    assert choose_prompts(photographs, "all", tmp_path / "p.csv", folder=tmp_path) == ["all", "a lake"]
    (tmp_path / "p.csv").write_text("file_name,text\nb/../a.png,a lake\n")
    with pytest.raises(ValueError, match=r"does not hold b/\.\./a\.png"):
        choose_prompts(photographs, "all", tmp_path / "p.csv", folder=tmp_path)


def test_a_caption_that_nobody_can_embed_does_not_end_a_folder(restore, photo, no_encoder):
    default = restore()[0]
    shutil.copy(photo, photo.with_name("b.png"))
    photo.with_suffix(".txt").write_text("a lake")
    _, out, err = restore(input=photo.parent)
    assert out.startswith("restored 2, kept 0, made by others 0, failed 0; ")
    assert err.count("--text-encoder") == 1 and f"{photo}: no embedding of its caption 'a lake'" in err
    np.testing.assert_array_equal(read_image_uint8(photo.parent.parent / "out" / "photo.png"), default)
    # A prompt that somebody gave is another matter.
    prompts = photo.with_name("prompts.csv")
    prompts.write_text("file_name,text\nb.png,two boats\n")
    photo.with_suffix(".txt").unlink()
    _, out, err = restore("--prompt-file", prompts, input=photo.parent)
    assert out == "" and "no embedding of the prompt 'two boats'" in err and err.count("\n") == 1


def test_what_is_cheap_to_refuse_is_refused_before_an_encoder_is_loaded(
    restore, text_weights, no_encoder, tmp_path
):
    shutil.copytree(text_weights, tmp_path / "broken")
    tensors = load_file(text_weights / "model.safetensors")
    tensors["dit.head.kernel"] = tensors["dit.head.kernel"][:7]
    save_file(tensors, tmp_path / "broken" / "model.safetensors")
    for weights, options, message in (
        (text_weights, ("--attention", "cudnn"), "cudnn"),
        (tmp_path / "broken", (), r"dit\.head\.kernel has shape \(7, 64\), not \(32, 64\)"),
    ):
        picture, _, err = restore(*options, "--prompt", "a lake", "--text-encoder", tmp_path, weights=weights)
        assert picture is None and re.search(message, err) and err.count("\n") == 1


def test_weights_without_text_leave_captions_alone(restore, tiny_weights, photo):
    photo.with_suffix(".txt").write_bytes(b"\xff no text")
    picture, _, err = restore(weights=tiny_weights)
    assert picture is not None and "caption" not in err


def test_another_encoder_is_refused(bare_weights, t5_folder, tmp_path):
    shutil.copytree(bare_weights, tmp_path / "weights")
    write_text(tmp_path / "weights" / TEXT, [("", np.zeros((1, 16), np.float32))], "other-t5")
    with pytest.raises(ValueError, match=r": is .*, but .*text holds embeddings of other-t5"):
        embed_prompts(["a lake"], tmp_path / "weights", load_config(bare_weights), t5_folder)


def test_a_dry_run_plans_what_the_restoration_does(
    restore, bare_weights, embedded, t5_folder, monkeypatch, tmp_path
):
    plans, make_plan = [], restorer.make_plan

    def recorded(*arguments, branches, text_tokens, **options):
        plans.append((branches, text_tokens))
        return make_plan(*arguments, branches=branches, text_tokens=text_tokens, **options)

    monkeypatch.setattr(restorer, "make_plan", recorded)
    zeros = [(prompt, np.zeros((1, 16), np.float32)) for prompt in DEFAULT_PROMPTS]
    shutil.copytree(bare_weights, tmp_path / "weights")
    write_text(tmp_path / "weights" / TEXT, zeros, TextEmbeddings(embedded).encoder, tokens=200)
    long = "a lake and two boats " * 60  # more tokens than are left uncut
    for options, expected in (
        ((), (2, 128)),
        (("--guidance", 1), (1, 128)),
        (("--prompt", long), (2, 256)),
        (("--prompt", "a lake"), (2, 256)),  # how long it is, only the tokenizer knows
    ):
        plans.clear()
        if "--prompt" in options:
            options = *options, "--text-encoder", t5_folder
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "zipir_jax.text_encoder", None)
            assert "denoise" in restore("--dry-run", *options, weights=tmp_path / "weights")[1]
        if "a lake" not in options:
            restore(*options, weights=tmp_path / "weights")
        assert set(plans) == {expected}
