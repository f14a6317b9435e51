"""Weights of other projects, in files made here in the hub's own layout."""

import json
import shutil
import tracemalloc

import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from tests.conftest import foreign_model, write_foreign_model
from zipir_jax import prepare
from zipir_jax.weights.foreign import (
    KINDS,
    find_model,
    import_weights,
    imported_config,
    load_imported,
    read_config,
    write_safetensors,
)

STEMS = {"t5": "model", "sd_vae": "diffusion_pytorch_model"}


def do_import(kind, folder, output, *options):
    import_weights(kind, folder, "name", read_config(kind, folder), output, *options)


def tensors_of(folder):
    return load_file(folder / "model.safetensors")


@pytest.fixture(name="hub", params=["t5", "sd_vae"])
def make_hub(request, tmp_path):
    """(kind, folder in the hub's layout, its tensors, what is imported from it)."""
    config, tensors, _ = foreign_model(request.param)
    folder = write_foreign_model(tmp_path / "hub", request.param, config, tensors)
    ours = request.getfixturevalue(f"{request.param}_folder")
    return request.param, folder, tensors, tensors_of(ours)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], strict=True, err_msg=name)


# That the imported weights give the reference's numbers is in models/test_t5.py and models/test_sd_vae.py.


def test_sharded_files_are_read_by_their_index(hub, tmp_path):
    kind, folder, tensors, expected = hub
    stem = STEMS[kind]
    (folder / f"{stem}.safetensors").unlink()
    weight_map = {}
    for i in range(3):
        file = f"{stem}-{i + 1:05}-of-00003.safetensors"
        save_file({name: tensors[name] for name in sorted(tensors)[i::3]}, folder / file)
        weight_map |= dict.fromkeys(sorted(tensors)[i::3], file)
    (folder / f"{stem}.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    do_import(kind, folder, tmp_path / "ours")
    assert_same(tensors_of(tmp_path / "ours"), expected)
    (folder / f"{stem}-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match=r"00002-of-00003.safetensors: cannot be read"):
        do_import(kind, folder, tmp_path / "again")


def test_every_tensor_that_is_wrong_is_named(hub, tmp_path):
    """One of another shape, one that is missing and one too many: each with its shapes, and nothing is written."""
    kind, folder, tensors, _ = hub
    wrong, missing = {
        "t5": (
            "encoder.block.1.layer.1.DenseReluDense.wi_0.weight",
            "encoder.block.2.layer.0.layer_norm.weight",
        ),
        "sd_vae": (
            "decoder.mid_block.resnets.0.conv1.weight",
            "encoder.down_blocks.1.downsamplers.0.conv.bias",
        ),
    }[kind]
    tensors[wrong] = np.ascontiguousarray(tensors[wrong][:, :5])
    shape = tensors.pop(missing).shape
    tensors["encoder.extra"] = np.zeros((2, 3), np.float32)
    double = "encoder.final_layer_norm.weight" if kind == "t5" else "encoder.conv_in.bias"
    tensors[double] = tensors[double].astype(np.float64)
    save_file(tensors, folder / f"{STEMS[kind]}.safetensors")
    with pytest.raises(ValueError) as raised:
        do_import(kind, folder, tmp_path / "ours")
    right = {"t5": (24, 16), "sd_vae": (8, 8, 3, 3)}[kind]
    problems = {
        f"{missing} of shape {shape} is missing",
        "encoder.extra of shape (2, 3) is unknown",
        f"{wrong} has shape {tensors[wrong].shape}, not {right}",
        f"{double} has dtype F64, not one of F32, F16, BF16",
    }
    start, _, found = str(raised.value).partition(": ")
    assert start == str(folder) and set(found.split("; ")) == problems
    assert not (tmp_path / "ours").exists()


def test_values_that_are_not_finite_are_refused(hub, tmp_path):
    kind, folder, tensors, _ = hub
    broken = sorted(tensors)[3]
    for value in (np.nan, np.inf):
        tensors[broken].flat[-1] = value
        save_file(tensors, folder / f"{STEMS[kind]}.safetensors")
        with pytest.raises(ValueError, match=f"{broken} holds values that are not finite"):
            do_import(kind, folder, tmp_path / "ours")
        assert list((tmp_path / "ours").iterdir()) == []


def test_all_tensors_of_an_empty_file_are_missing(hub, tmp_path):
    kind, folder, tensors, _ = hub
    save_file({}, folder / f"{STEMS[kind]}.safetensors")
    with pytest.raises(ValueError) as raised:
        do_import(kind, folder, tmp_path / "ours")
    assert {line.split(" of shape ")[0] for line in str(raised.value).partition(": ")[2].split("; ")} == set(
        tensors
    )


def test_a_whole_t5_has_tensors_that_an_encoder_does_without(t5_folder, tmp_path):
    """T5ForConditionalGeneration, whose file may hold the token embedding under two names, or the other one."""
    config, tensors, _ = foreign_model("t5")
    embedding = tensors["shared.weight"]
    for i, names in enumerate(
        (["shared.weight", "encoder.embed_tokens.weight"], ["encoder.embed_tokens.weight"])
    ):
        del tensors[next(name for name in tensors if tensors[name] is embedding)]
        tensors |= dict.fromkeys(names, embedding)
        tensors |= {"decoder.embed_tokens.weight": embedding.copy(), "lm_head.weight": embedding.copy()}
        folder = write_foreign_model(tmp_path / f"hub{i}", "t5", config, tensors)
        do_import("t5", folder, tmp_path / f"ours{i}")
        assert_same(tensors_of(tmp_path / f"ours{i}"), tensors_of(t5_folder))
        tensors.pop("shared.weight", None)


def test_old_files_of_the_sd_vae_call_its_attention_otherwise(sd_vae_folder, tmp_path):
    config, tensors, _ = foreign_model("sd_vae")
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        tensors = {name.replace(f".{new}.", f".{old}."): tensor for name, tensor in tensors.items()}
    assert "encoder.mid_block.attentions.0.proj_attn.bias" in tensors
    do_import("sd_vae", write_foreign_model(tmp_path / "hub", "sd_vae", config, tensors), tmp_path / "ours")
    assert_same(tensors_of(tmp_path / "ours"), tensors_of(sd_vae_folder))


@pytest.mark.parametrize("source", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_dtype_is_rounded_once(hub, tmp_path, source, dtype):
    kind, folder, tensors, expected = hub
    save_file({name: x.astype(source) for name, x in tensors.items()}, folder / f"{STEMS[kind]}.safetensors")
    do_import(kind, folder, tmp_path / "ours", dtype)
    expected = {name: x.astype(source).astype(dtype) for name, x in expected.items()}
    assert_same(tensors_of(tmp_path / "ours"), expected)
    name, _, config = imported_config(tmp_path / "ours", kind)
    params = flatten_dict(load_imported(tmp_path / "ours", kind, config), sep=".")
    assert name == "name"
    assert_same({name: np.asarray(leaf) for name, leaf in params.items()}, expected)


def test_the_digest_is_that_of_the_parameters(hub, tmp_path):
    """Not of their dtype, nor of the name; and one number that differs makes another."""
    kind, folder, tensors, _ = hub
    digests = []
    for i, dtype in enumerate(("float32", "bfloat16", "float32")):
        if i == 2:
            last = sorted(tensors)[-1]
            tensors[last].flat[-1] *= 1.5
            save_file(tensors, folder / f"{STEMS[kind]}.safetensors")
        do_import(kind, folder, tmp_path / str(i), dtype)
        digests.append(imported_config(tmp_path / str(i), kind)[1])
    assert digests[0] == digests[1] != digests[2]


def test_a_variant_is_read_where_it_is_asked_for(hub, tmp_path):
    kind, folder, _, expected = hub
    stem = STEMS[kind]
    (folder / f"{stem}.safetensors").rename(folder / f"{stem}.fp16.safetensors")
    with pytest.raises(ValueError, match=rf"it holds {stem}.fp16.safetensors \(--variant and --subfolder"):
        do_import(kind, folder, tmp_path / "ours")
    do_import(kind, folder, tmp_path / "ours", "float32", "fp16")
    assert_same(tensors_of(tmp_path / "ours"), expected)


def test_attention_may_be_of_convolutions(sd_vae_folder, tmp_path):
    config, tensors, _ = foreign_model("sd_vae")
    tensors = {
        n: x[..., None, None] if ".attentions.0.to_" in n and x.ndim == 2 else x for n, x in tensors.items()
    }
    do_import("sd_vae", write_foreign_model(tmp_path / "hub", "sd_vae", config, tensors), tmp_path / "ours")
    assert_same(tensors_of(tmp_path / "ours"), tensors_of(sd_vae_folder))


def test_six_scales_have_the_names_and_shapes_of_diffusers(tmp_path):
    """As many as the paper's f32c64 has, of 4 channels."""
    config, _, arrays = foreign_model("sd_vae")
    theirs = json.loads(str(arrays["six_scales"]))
    generator = np.random.default_rng(0)
    tensors = {
        name: generator.standard_normal(shape).astype(np.float32) for name, shape in theirs["tensors"].items()
    }
    folder = write_foreign_model(tmp_path / "hub", "sd_vae", theirs["config"], tensors)
    do_import("sd_vae", folder, tmp_path / "ours")
    ours = tensors_of(tmp_path / "ours")
    assert sum(x.size for x in ours.values()) == sum(x.size for x in tensors.values())
    config = imported_config(tmp_path / "ours", "sd_vae")[2]
    assert (config.factor, config.latent_channels) == (32, 6)


def test_files_are_written_in_parts(tmp_path):
    """32 MiB from 64 parts: never more than a few parts in memory."""
    generator = np.random.default_rng(0)
    shapes = {name: np.empty((16, 512, 64), np.float32) for name in "abcdefghijklmnop"}
    tracemalloc.start()

    def parts(name):
        return (generator.standard_normal((4, 512, 64)).astype(np.float32) for _ in range(4))

    write_safetensors(tmp_path / "x.safetensors", shapes, "float32", parts)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / "x.safetensors").stat().st_size > 32 * 2**20 > 5 * peak
    generator = np.random.default_rng(0)
    expected = generator.standard_normal((4, 4, 512, 64)).astype(np.float32).reshape(16, 512, 64)
    np.testing.assert_array_equal(load_file(tmp_path / "x.safetensors")["a"], expected, strict=True)


# --------------------------------------------------------------------------------------------------
# What is refused
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("t5", {"model_type": "umt5"}, "model_type is 'umt5', not 't5'"),
        ("t5", {"feed_forward_proj": "relu"}, "feed_forward_proj is 'relu', as in T5 v1.0; only T5 v1.1"),
        ("t5", {"feed_forward_proj": None}, "feed_forward_proj is 'relu', as in T5 v1.0; only T5 v1.1"),
        ("t5", {"layer_norm_epsilon": 1e-5}, "layer_norm_epsilon is 1e-05, not 1e-06"),
        ("t5", {"d_kv": None}, "lacks 'd_kv'"),
        ("t5", {"num_layers": 0}, "layers 0 is not at least 1"),
        ("sd_vae", {"_class_name": "AutoencoderDC"}, "_class_name is 'AutoencoderDC', not 'AutoencoderKL'"),
        ("sd_vae", {"shift_factor": 0.1159}, "shift_factor is 0.1159, not None"),
        ("sd_vae", {"use_quant_conv": False}, "use_quant_conv is False, not True"),
        (
            "sd_vae",
            {"block_out_channels": [4, 6, 8]},
            "block_out_channels [4, 6, 8] are not multiples of the first",
        ),
        ("sd_vae", {"block_out_channels": None}, "lacks 'block_out_channels'"),
        ("sd_vae", {"norm_num_groups": 8}, "4 channels are not a multiple of 8 groups"),
    ],
)
def test_other_models_are_refused(kind, change, message, tmp_path):
    config = foreign_model(kind)[0] | change  # None: without it
    config = {name: value for name, value in config.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError) as raised:
        read_config(kind, tmp_path)
    assert str(raised.value).startswith(f"{tmp_path}/config.json: {message}")


def test_a_config_that_is_none_is_refused(tmp_path):
    for text in ("", "[]", "{", '{"model_type": "t5", "feed_forward_proj": "gated-gelu", "num_layers": []}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config.json: "):
            read_config("t5", tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config.json: cannot be read \(No such file or directory\)"):
        read_config("t5", tmp_path)


def test_pickles_and_damaged_files_are_refused(tmp_path):
    config, tensors, _ = foreign_model("t5")
    folder = write_foreign_model(tmp_path / "hub", "t5", config, tensors)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"holds neither model.safetensors nor .*; pickled weights"):
        do_import("t5", folder, tmp_path / "ours")
    (folder / "model.safetensors").write_bytes((folder / "pytorch_model.bin").read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model.safetensors: cannot be read"):
        do_import("t5", folder, tmp_path / "ours")
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ValueError, match=r"index.json: is no index of safetensors files"):
        do_import("t5", folder, tmp_path / "ours")


def test_only_an_earlier_import_is_replaced(hub, tiny_weights, tmp_path):
    """Not weights of a restorer, nor what is to be imported, nor another kind, nor what a link leads to."""
    kind, folder, tensors, expected = hub
    output = tmp_path / "ours"
    do_import(kind, folder, output)
    do_import(kind, folder, output)
    assert_same(tensors_of(output), expected)
    other = tmp_path / "other"
    shutil.copytree(tiny_weights, other)
    (tmp_path / "tensors").mkdir()
    save_file(tensors, tmp_path / "tensors" / "model.safetensors")
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "config.json").symlink_to(output / "config.json")
    for taken, message in (
        (other, "holds config.json and model.safetensors of something else than an imported"),
        (folder, r"holds config.json .*of something else"),
        (tmp_path / "tensors", "holds model.safetensors of something else"),
        (linked, "linked/config.json: is a link"),
    ):
        before = {path: path.read_bytes() for path in taken.iterdir()}
        with pytest.raises(ValueError, match=message):
            do_import(kind, folder, taken)
        assert {path: path.read_bytes() for path in taken.iterdir()} == before


def test_what_was_imported_can_not_be_read_as_another_kind(sd_vae_folder, tmp_path):
    with pytest.raises(ValueError, match=r"config.json has no t5; `prepare import-t5` writes such a folder"):
        imported_config(sd_vae_folder, "t5")
    config = imported_config(sd_vae_folder, "sd_vae")[2]
    save_file({"encoder.stem.kernel": np.zeros((3, 3, 3, 4), np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"decoder.blocks.0.conv1.bias of shape \(8,\) is missing; "):
        load_imported(tmp_path, "sd_vae", config)
    saved = json.loads((sd_vae_folder / "config.json").read_text())
    for key in ("name", "digest"):
        (tmp_path / "config.json").write_text(json.dumps({k: x for k, x in saved.items() if k != key}))
        with pytest.raises(
            ValueError, match=rf"cannot be read \(config.json has no {key}; `prepare import-sd"
        ):
            imported_config(tmp_path, "sd_vae")


# --------------------------------------------------------------------------------------------------
# The hub, and the command line
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({}, ["config.json", "model.safetensors", "model-00001-of-00002.safetensors"]),
        (
            {"variant": "fp16"},
            ["config.json", "model.fp16.safetensors", "model-00001-of-00002.fp16.safetensors"],
        ),
        ({"subfolder": "text_encoder_2"}, ["text_encoder_2/config.json", "text_encoder_2/model.safetensors"]),
    ],
)
def test_of_a_model_of_the_hub_is_downloaded_what_is_read(tmp_path, monkeypatch, options, found):
    """Neither pickles nor other variants; where there are no tensors, those that there are are named."""
    there = ["config.json", "model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin"]
    there += ["model.fp16.safetensors", "model-00001-of-00002.fp16.safetensors"]
    there += ["text_encoder_2/config.json", "text_encoder_2/model.safetensors", "unet/model.safetensors"]

    def snapshot_download(model, revision, allow_patterns):
        assert (model, revision) == ("google/t5-v1_1-xxl", "refs/pr/2")
        for name in huggingface_hub.utils.filter_repo_objects(there, allow_patterns=allow_patterns):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda model, revision: there)
    model = "google/t5-v1_1-xxl"
    folder = tmp_path / options.get("subfolder", "")
    assert find_model("t5", model, "refs/pr/2", **options) == (folder, model)
    downloaded = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert downloaded == set(found)
    assert find_model("t5", str(tmp_path)) == (tmp_path, tmp_path.name)
    there = ["config.json", "pytorch_model.bin", "model.fp32.safetensors"]
    for path in list(tmp_path.rglob("*.safetensors")):
        path.unlink()
    with pytest.raises(ValueError, match=rf"^{model}: holds neither .*; it holds model.fp32.safetensors \("):
        find_model("t5", model, "refs/pr/2", **options)


def test_what_names_no_folder_is_refused(tmp_path, call):
    (tmp_path / "model.safetensors").touch()
    for model, options, message in (
        (
            tmp_path / "model.safetensors",
            (),
            "is a file; give the folder that holds it, with its config.json",
        ),
        (tmp_path, ("--revision", "main"), "is a folder, which has no revision 'main'"),
    ):
        arguments = "--model", model, "--output", tmp_path / "ours", *options
        for command in ("import-t5", "import-sd-vae"):
            assert call(prepare.main, command, *arguments) == (2, "", f"error: {model}: {message}\n")


def test_errors_of_the_network_are_one_sentence(monkeypatch, call, tmp_path):
    def fail(*arguments, **options):
        raise huggingface_hub.errors.HTTPError("server disconnected\nwithout a word")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    status, _, err = call(prepare.main, "import-t5", "--model", "a/b", "--output", tmp_path / "ours")
    assert status == 2
    assert err == "error: a/b: no such folder, and no such model from the hub (server disconnected)\n"


def test_a_hub_out_of_reach_is_one_sentence(monkeypatch, call, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for command in ("import-t5", "import-sd-vae"):
        for model in ("google/no-such-model", "no/such/folder", "?"):
            status, printed, err = call(
                prepare.main, command, "--model", model, "--output", tmp_path / "ours"
            )
            assert status == 2 and printed == "" and err.count("\n") == 1
            assert err.startswith(f"error: {model}: no such folder, and no such model from the hub (")


def test_both_are_imported_by_command(call, tmp_path, t5_folder, sd_vae_folder):
    for kind, command, expected, said in (
        ("t5", "import-t5", t5_folder, "10,800 parameters, embeddings of 16 channels"),
        ("sd_vae", "import-sd-vae", sd_vae_folder, "parameters, f4c3"),
    ):
        config, tensors, _ = foreign_model(kind)
        folder = write_foreign_model(tmp_path / kind, kind, config, tensors)
        output = tmp_path / "ours" / kind
        # As a pipeline of diffusers has them: each part in a folder of its own.
        pipeline = folder.parent / "pipeline"
        pipeline.mkdir(exist_ok=True)
        folder = folder.rename(pipeline / kind)
        arguments = "--model", pipeline, "--subfolder", kind, "--output", output
        if kind == "t5":
            (pipeline / "tokenizer_2").mkdir()
            for file in ("spiece.model", "tokenizer_config.json"):
                (folder / file).rename(pipeline / "tokenizer_2" / file)
            of_t5 = {"tokenizer_class": "T5Tokenizer", "extra_ids": 4}
            (pipeline / "tokenizer_2" / "tokenizer_config.json").write_text(json.dumps(of_t5))
            arguments += "--tokenizer", pipeline / "tokenizer_2", "--dtype", "float32"
        status, printed, err = call(prepare.main, command, *arguments)
        assert status == 0, err
        assert printed.startswith(f"{output}: pipeline, ") and printed.rstrip().endswith(said), printed
        assert_same(tensors_of(output), tensors_of(expected))
        saved = json.loads((output / "config.json").read_text())
        assert saved.keys() == {"name", "digest", kind} and saved["name"] == "pipeline"
        tensors.pop(next(iter(tensors)))
        save_file(tensors, folder / f"{KINDS[kind].stem}.safetensors")
        status, printed, err = call(prepare.main, command, *arguments)
        assert status == 2 and "is missing" in err and err.count("\n") == 1
