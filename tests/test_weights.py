import dataclasses
import json
import os
import stat

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.flax import load_file, save_file

from zipir_jax.config import MODELS
from zipir_jax.models.layers import count_params
from zipir_jax.weights import abstract_weights, load_weights, save_weights

GROUPS = (
    "statistics",
    "coarse_encoder",
    "coarse_decoder",
    "fine_encoder",
    "fine_decoder",
    "dit",
    "pixel_decoder",
)


@pytest.fixture(name="altered")
def make_altered(tiny_weights, tmp_path):
    """`altered(change)`: a copy of the tiny weights after `change(tensors)`, a dict of arrays by name."""

    def alter(change):
        tensors = load_file(tiny_weights / "model.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text((tiny_weights / "config.json").read_text())
        return tmp_path

    return alter


def assert_refused(folder, *words, needed=()):
    with pytest.raises(ValueError, match=r"\S") as caught:
        load_weights(folder, needed)
    for word in (str(folder), *words):
        assert word in str(caught.value)


def test_weights_return_as_they_were_saved(tiny_model, tiny_weights, tmp_path):
    config, weights = load_weights(tiny_weights, GROUPS)
    assert config == tiny_model
    assert weights.keys() == set(GROUPS)
    save_weights(tmp_path / "new" / "folder", config, weights)
    again, loaded = load_weights(str(tmp_path / "new" / "folder"), GROUPS)
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, loaded, weights)
    assert {p.name for p in (tmp_path / "new" / "folder").iterdir()} == {"config.json", "model.safetensors"}


def test_a_model_has_the_groups_of_its_stages(tiny_model, tiny_weights):
    expected = abstract_weights(tiny_model)
    assert tuple(expected) == GROUPS
    _, weights = load_weights(tiny_weights, GROUPS)
    assert count_params(weights) == count_params(expected)
    names = load_file(tiny_weights / "model.safetensors")
    assert "fine_encoder.blocks.0.conv1.kernel" in names


def test_bfloat16_on_disk_is_rounded_float32_in_memory(tiny_model, tiny_weights, tmp_path):
    _, weights = load_weights(tiny_weights, GROUPS)
    save_weights(tmp_path, tiny_model, jax.tree.map(lambda p: p.astype(jnp.bfloat16), weights))
    _, loaded = load_weights(tmp_path, GROUPS)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype("float32")}

    def check(result, original):
        np.testing.assert_array_equal(result, original.astype(jnp.bfloat16).astype(jnp.float32))

    jax.tree.map(check, loaded, weights)
    sizes = [(f / "model.safetensors").stat().st_size for f in (tmp_path, tiny_weights)]
    assert sizes[0] < 0.6 * sizes[1]


def test_the_groups_of_one_stage_can_be_saved_alone(tiny_model, tiny_weights, tmp_path):
    _, weights = load_weights(tiny_weights, GROUPS)
    save_weights(tmp_path, tiny_model, {"statistics": weights["statistics"], "dit": weights["dit"]})
    _, loaded = load_weights(tmp_path, ("dit",))
    assert loaded.keys() == {"statistics", "dit"}
    assert_refused(tmp_path, "no fine_encoder", "dit, statistics", needed=("dit", "fine_encoder"))


def test_statistics_of_the_latent_come_together_or_not_at_all(tiny_model, tmp_path):
    diffusion = dataclasses.replace(tiny_model.diffusion, residual=True)
    config = dataclasses.replace(tiny_model, diffusion=diffusion)
    macro = {"macro_mean": np.zeros(3), "macro_std": np.ones(3)}
    save_weights(tmp_path, config, {"statistics": macro})  # what the coarse stage knows
    load_weights(tmp_path, ("statistics",))
    latent = {"latent_mean": np.zeros(64), "latent_std": np.ones(64)}
    save_weights(tmp_path, config, {"statistics": macro | latent})
    assert_refused(tmp_path, "statistics lacks the tensor residual_std")


@pytest.mark.parametrize("name", MODELS)
def test_the_config_of_every_preset_survives_the_file(name, tmp_path):
    statistics = {
        key: jnp.zeros(shape.shape) for key, shape in abstract_weights(MODELS[name])["statistics"].items()
    }
    save_weights(tmp_path, MODELS[name], {"statistics": statistics})
    config, _ = load_weights(tmp_path, ("statistics",))
    assert config == MODELS[name]
    assert hash(config) == hash(MODELS[name])  # lists in place of tuples would not do as a static argument


def test_saving_again_replaces_the_old_weights(tiny_model, tiny_weights, tmp_path):
    _, weights = load_weights(tiny_weights, GROUPS)
    save_weights(tmp_path, tiny_model, weights)
    doubled = jax.tree.map(lambda p: 2 * p, weights)
    save_weights(tmp_path, tiny_model, doubled)
    jax.tree.map(np.testing.assert_array_equal, load_weights(tmp_path, GROUPS)[1], doubled)


def test_weights_have_ordinary_permissions(tiny_model, tmp_path):
    statistics = {key: jnp.zeros(s.shape) for key, s in abstract_weights(tiny_model)["statistics"].items()}
    previous = os.umask(0o027)
    try:
        save_weights(tmp_path, tiny_model, {"statistics": statistics})
    finally:
        os.umask(previous)
    for file in ("config.json", "model.safetensors"):
        assert stat.S_IMODE((tmp_path / file).stat().st_mode) == 0o640


def test_a_tensor_of_another_shape_is_named(altered):
    def change(tensors):
        tensors["dit.head.kernel"] = jnp.zeros((32, 7))

    assert_refused(altered(change), "dit.head.kernel", "(32, 7)", "(32, 64)")


def test_statistics_of_another_shape_are_named(altered):
    def change(tensors):
        tensors["statistics.latent_std"] = jnp.ones(63)

    assert_refused(altered(change), "statistics.latent_std", "(63,)", "(64,)")


def test_a_missing_tensor_is_named(altered):
    def change(tensors):
        del tensors["fine_decoder.blocks.1.conv2.bias"]

    assert_refused(altered(change), "fine_decoder", "blocks.1.conv2.bias")


def test_a_tensor_that_the_config_does_not_have_is_named(altered):
    def change(tensors):
        tensors["coarse_encoder.blocks.9.conv1.kernel"] = jnp.zeros((3, 3, 4, 4))

    assert_refused(altered(change), "coarse_encoder", "blocks.9.conv1.kernel")


def test_an_unknown_group_is_named(altered):
    def change(tensors):
        tensors["controlnet.kernel"] = jnp.zeros(3)

    assert_refused(altered(change), "unknown group controlnet")


def test_a_missing_group_is_named(altered):
    def change(tensors):
        for name in [name for name in tensors if name.startswith("pixel_decoder.")]:
            del tensors[name]

    assert_refused(altered(change), "no pixel_decoder", needed=("dit", "pixel_decoder"))


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(altered, file):
    folder = altered(lambda tensors: None)
    (folder / file).unlink()
    assert_refused(folder, "no weights here", file, "is missing")


def test_a_folder_that_is_not_there_is_named(tmp_path):
    assert_refused(tmp_path / "nowhere", "no weights here")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_truncated_tensors_are_refused(altered, share):
    folder = altered(lambda tensors: None)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: int(len(data) * share)])
    assert_refused(folder, "cannot be read")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "null", "\xff", '{"dit": 3}', '{"dit": {"layers": "two"}}', '{"colour": 1}']
)
def test_a_config_that_is_none_is_refused(altered, text):
    folder = altered(lambda tensors: None)
    (folder / "config.json").write_text(text, encoding="latin-1")
    assert_refused(folder)


def test_a_config_that_contradicts_itself_is_refused_with_its_numbers(altered):
    folder = altered(lambda tensors: None)
    config = json.loads((folder / "config.json").read_text())
    config["dit"]["heads"] = 5
    (folder / "config.json").write_text(json.dumps(config))
    assert_refused(folder, "width 32 over 5 heads")
