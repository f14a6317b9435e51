"""Whole runs of the four stages, a few steps each; and the command line."""

import contextlib
import dataclasses
import functools
import io
import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from zipir_jax import prepare
from zipir_jax.command_line import run
from zipir_jax.config import DataConfig, SamplingConfig
from zipir_jax.data.latents import CachedLatents, write_latents
from zipir_jax.data.pipeline import batches
from zipir_jax.data.sources import FolderSource, open_sources
from zipir_jax.data.text import write_text
from zipir_jax.models.lp_vae import encode, whiten
from zipir_jax.restorer import NEEDED, Restorer
from zipir_jax.train import main
from zipir_jax.training import losses
from zipir_jax.training.cache import cache_latents
from zipir_jax.training.checkpoint import encoder_digest
from zipir_jax.training.export import run_weights
from zipir_jax.training.loop import PREVIEW_IMAGES, check, load_pretrained, statistics_images, train
from zipir_jax.training.stages import STAGES
from zipir_jax.training.state import create_state, train_step
from zipir_jax.weights import abstract_weights, load_weights

pytestmark = pytest.mark.usefixtures("quick_compile", "quick_lpips")
ORDER = ("coarse", "fine", "dit", "pixel_decoder")  # each starts from the weights of the one before
MADE = {
    "coarse": {"statistics", "coarse_encoder", "coarse_decoder"},
    "fine": {"fine_encoder", "fine_decoder"},
    "dit": {"dit"},
    "pixel_decoder": {"pixel_decoder"},
}
CROPS = {"coarse": 128, "fine": 64, "dit": 64, "pixel_decoder": 64}  # pixels
each_stage = pytest.mark.parametrize("stage", ORDER)


# What the clock says of a run, and not its training.
CLOCK = (
    "images_per_second",
    "step_seconds",
    "data_wait",
    "tflops_per_second",
    "seconds",
    "wall_seconds",
    "goodput",
    "time",
)


@pytest.fixture(name="trained", scope="module")
def make_trained(make_config, tmp_path_factory):
    """`trained(stage)`: config and weights of four steps straight after the stages before; all checkpoints kept."""
    folder = tmp_path_factory.mktemp("runs")

    @functools.cache
    def trained(stage):
        before = ORDER[ORDER.index(stage) - 1] if stage != "coarse" else None
        init_from = str(trained(before)[1]) if before else ""
        config = make_config(
            stage, output=str(folder / stage), init_from=init_from, accumulate=2, keep_every=1, skip_limit=1
        )
        # The discriminator joins the first stage on the way; the others compile faster without.
        adversarial = {"adversarial_start": 1} if stage == "coarse" else {"adversarial": 0.0}
        config = dataclasses.replace(config, loss=dataclasses.replace(config.loss, **adversarial))
        return config, train(config)

    return trained


def saved_state(config, step):
    path = Path(config.output) / "checkpoints" / str(step) / "state"
    return ocp.StandardCheckpointer().restore(path.absolute())


def lines(config):
    return [json.loads(line) for line in (Path(config.output) / "metrics.jsonl").read_text().splitlines()]


def measured(config):
    """The lines of metrics.jsonl without what the clock says."""
    return [{name: value for name, value in line.items() if name not in CLOCK} for line in lines(config)]


def shaped_leaves(tree):
    return [(jax.tree_util.keystr(p), leaf) for p, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]


def leaves(tree):
    return [(name, np.asarray(leaf)) for name, leaf in shaped_leaves(tree)]


def assert_same(first, second):
    for (name, a), (other, b) in zip(leaves(first), leaves(second), strict=True):
        assert name == other
        np.testing.assert_array_equal(a, b, err_msg=name)


# --------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------


@each_stage
def test_a_run_that_stops_and_resumes_equals_one_that_does_not(trained, tmp_path, stage):
    config, weights = trained(stage)
    stopped = dataclasses.replace(config, output=str(tmp_path / "run"))
    shutil.copytree(
        config.output, stopped.output, ignore=shutil.ignore_patterns("3", "4", "weights", "samples")
    )
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdigit()].count("2") == 1
    resumed = train(stopped, resume="auto")

    straight = saved_state(config, 4)
    assert straight.keys() == {"params", "ema", "optimizer", "step"}
    assert straight["step"] == 4
    assert_same(saved_state(stopped, 4), straight)
    assert_same(load_weights(resumed, ())[1], load_weights(weights, ())[1])
    assert measured(stopped) == measured(config)


@each_stage
def test_a_run_moves_what_it_trains_and_nothing_else(trained, stage):
    config, weights = trained(stage)
    _, made = load_weights(weights, ())
    earlier = ORDER[: ORDER.index(stage)]
    thrown_away = {"coarse_decoder"} if earlier else set()
    assert made.keys() == set().union(*(MADE[s] for s in (*earlier, stage))) - thrown_away
    if earlier:
        _, before = load_weights(config.init_from, ())
        for group in before.keys() - {"statistics"} - thrown_away:
            assert_same(made[group], before[group])
        for name, value in before["statistics"].items():
            np.testing.assert_array_equal(made["statistics"][name], value)

    first, last = (leaves(saved_state(config, step)["params"]["generator"]) for step in (2, 4))
    moved = [not np.array_equal(a, b) for (_, a), (_, b) in zip(first, last, strict=True)]
    assert np.mean(moved) > 0.9
    # What is exported is the average, not the last step's parameters.
    average = saved_state(config, 4)["ema"]
    assert average.keys() == MADE[stage] - {"statistics"}
    assert_same({group: made[group] for group in average}, average)
    assert (
        np.mean([not np.array_equal(a, b) for (_, a), (_, b) in zip(leaves(average), last, strict=True)])
        > 0.9
    )


@each_stage
def test_only_what_is_trained_has_gradients_and_moments(make_config, stage):
    config = make_config(stage, init_from="weights", decoder_noise=(0.0, 0.5))
    weights = abstract_weights(config.model)
    state = jax.eval_shape(functools.partial(create_state, config), jax.random.key(0), weights)
    trained, read = state["params"]["generator"], STAGES[stage].needs(config)
    assert trained.keys() == MADE[stage] - {"statistics"}
    assert not trained.keys() & set(read)
    frozen = {group: weights[group] for group in {"statistics", *read}}
    frozen["lpips"] = {"factor": jax.ShapeDtypeStruct((), np.float32)}
    images = jax.ShapeDtypeStruct((2, CROPS[stage], CROPS[stage], 3), np.float32)
    gradients, _ = jax.eval_shape(
        lambda *arrays: STAGES[stage].gradients(config, *arrays, jax.random.key(0), True),
        state["params"],
        frozen,
        {"image": images, "lq": images},
    )
    shapes = [(name, leaf.shape) for name, leaf in shaped_leaves(state["params"])]
    assert [(name, leaf.shape) for name, leaf in shaped_leaves(gradients)] == shapes
    moments = [leaf.shape for _, leaf in shaped_leaves(state["optimizer"]) if leaf.shape]
    assert sorted(moments) == sorted(2 * [shape for _, shape in shapes if shape])


def test_the_discriminator_waits_for_its_start(trained):
    config, _ = trained("coarse")
    states = [saved_state(config, step)["params"]["discriminator"] for step in (1, 2)]
    key = jax.random.split(jax.random.key(config.seed))[0]
    start = jax.jit(functools.partial(create_state, config))(key, {})
    assert_same(states[0], start["params"]["discriminator"])
    assert any(
        not np.array_equal(a, b) for (_, a), (_, b) in zip(leaves(states[0]), leaves(states[1]), strict=True)
    )
    with_it = {"adversarial", "discriminator", "weight"}
    assert [with_it & line.keys() for line in lines(config)] == [set(), with_it, with_it, with_it]


def test_the_statistics_are_those_of_the_training_images(trained):
    config, weights = trained("fine")
    _, groups = load_weights(weights, ())
    (images,) = statistics_images(config, open_sources(config.data.sources))
    encoded = jax.jit(lambda groups, images: encode(groups, config.model.lp_vae, images))(groups, images)
    white = whiten(encoded, groups["statistics"])
    np.testing.assert_allclose(white.mean((0, 1, 2)), 0, atol=1e-3)
    np.testing.assert_allclose(white.std((0, 1, 2)), 1, atol=1e-3)
    # The macro band was normalised by what the coarse stage measured, on crops of its own.
    np.testing.assert_allclose(encoded[..., :3].mean((0, 1, 2)), 0, atol=0.5)


@each_stage
def test_the_sample_grid_has_a_row_per_picture_and_a_column_per_kind(trained, stage):
    config, _ = trained(stage)
    side = CROPS[stage] // (4 if stage == "coarse" else 1)
    columns = {"coarse": 2, "fine": 2, "dit": 5, "pixel_decoder": 4}[stage]
    with Image.open(Path(config.output) / "samples" / "0000004.png") as grid:
        assert grid.size == (columns * side, PREVIEW_IMAGES * side)
        assert np.asarray(grid).std() > 5


@each_stage
def test_tensorboard_shows_what_the_run_logged(trained, stage, tensorboard_events):
    config, _ = trained(stage)
    shown = {}
    for event in tensorboard_events(Path(config.output)):
        for value in event.summary.value:
            shown[event.step, value.tag] = value
    assert [line["step"] for line in lines(config)] == [1, 2, 3, 4]  # one for each checkpoint
    for line in lines(config):
        assert {"loss", "gradient_norm", "learning_rate", "skipped", *CLOCK} <= line.keys()
        assert line["skipped"] == 0
        for name in line.keys() - {"step", "time"}:
            assert shown[line["step"], name].simple_value == pytest.approx(line[name], rel=1e-5)
    png = io.BytesIO(shown[4, "samples"].image.encoded_image_string)
    with Image.open(png) as grid, Image.open(Path(config.output) / "samples" / "0000004.png") as written:
        np.testing.assert_array_equal(np.asarray(grid), np.asarray(written))


def test_the_four_stages_make_weights_that_restore(trained):
    restorer = Restorer.load(str(trained("pixel_decoder")[1]))
    photo = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    restored = restorer.restore(photo, scale=1.5, sampling=SamplingConfig(steps=2))
    assert (restored.shape, restored.dtype) == ((60, 75, 3), np.uint8)
    assert restored.std() > 1


def test_a_decoder_can_learn_from_predicted_latents(trained, make_config):
    config = make_config("pixel_decoder", decoder_noise=(0.2, 0.5), init_from=str(trained("dit")[1]))
    stage = STAGES["pixel_decoder"]
    assert set(stage.needs(config)) == {"statistics", "coarse_encoder", "fine_encoder", "fine_decoder", "dit"}
    _, groups = load_weights(config.init_from, stage.needs(config))
    lpips = {"lpips": losses.load_lpips("alexnet")[0]}
    batch = {name: jnp.zeros((2, 64, 64, 3)) for name in ("image", "lq")}

    def step(key):
        state = create_state(config, key, groups)
        return state, train_step(config, True, state, groups | lpips, batch)[0]

    before, after = jax.eval_shape(step, jax.random.key(0))
    assert jax.tree.map(lambda p: (p.shape, p.dtype), before) == jax.tree.map(
        lambda p: (p.shape, p.dtype), after
    )


# --------------------------------------------------------------------------------------------------
# Refusals
# --------------------------------------------------------------------------------------------------


def replace_data(config, **changes):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": "medium"}, "stage 'medium' is not one of coarse, fine, dit, pixel_decoder"),
        ({"stage": "fine"}, "stage fine needs init_from"),
        ({"stage": "dit"}, "stage dit needs init_from"),
        ({"stage": "pixel_decoder"}, "stage pixel_decoder needs init_from"),
        ({"output": ""}, "output .. is no folder"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(make_config, tmp_path, changes, message):
    config = dataclasses.replace(make_config("coarse", output=str(tmp_path)), **changes)
    with pytest.raises(ValueError, match=message):
        train(config)


def with_text(config, width):
    model = dataclasses.replace(config.model, dit=dataclasses.replace(config.model.dit, text_width=width))
    return dataclasses.replace(config, model=model)


@pytest.mark.parametrize(
    ("stage", "changes", "reads_text"),
    [
        ("dit", {}, True),
        ("pixel_decoder", {"decoder_noise": (0.0, 0.5)}, True),
        ("pixel_decoder", {}, False),
        ("fine", {}, False),
    ],
)
def test_text_is_there_where_a_dit_reads_it_and_nowhere_else(make_config, stage, changes, reads_text):
    without = with_text(make_config(stage, output="run", init_from="weights", **changes), 64)
    config = replace_data(without, text="embeddings")
    missing = pytest.raises(ValueError, match=rf"text_width is 64: stage {stage} needs data\.text")
    useless = pytest.raises(ValueError, match=rf"data\.text is of no use to stage {stage} with this model")
    with missing if reads_text else contextlib.nullcontext():
        check(without)
    with contextlib.nullcontext() if reads_text else useless:
        check(config)
    with useless:
        check(with_text(config, 0))


def write_embeddings(folder, width):
    rng = np.random.default_rng(0)
    write_text(folder, [("", rng.standard_normal((3, width)).astype(np.float32))], "none")
    return str(folder)


def test_text_of_another_width_is_refused(make_config, trained, tmp_path):
    config = make_config("dit", output=str(tmp_path / "run"), init_from=str(trained("fine")[1]))
    config = replace_data(with_text(config, 64), text=write_embeddings(tmp_path / "text", 8))
    with pytest.raises(ValueError, match=r"text: the embeddings have 8 channels, model.dit.text_width is 64"):
        train(config)
    with pytest.raises(ValueError, match=r"text: the embeddings are cut at 128 tokens, .* --tokens 129$"):
        train(replace_data(with_text(config, 8), text_tokens=129))


@pytest.mark.parametrize("stage", ["coarse", "fine", "pixel_decoder"])
def test_cached_latents_serve_the_dit_alone(make_config, stage):
    config = replace_data(make_config(stage, output="run", init_from="weights"), latents="latents")
    with pytest.raises(ValueError, match=rf"data\.latents serves the stage dit; {stage} needs images"):
        check(config)


def write_random_latents(folder, encoder):
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((6, 2, 2, 2, 64)).astype(np.float32)
    write_latents(folder, [(clean, lq, "") for clean, lq in latents], "random", encoder)
    return str(folder)


def test_latents_of_other_encoders_are_refused(make_config, trained, tmp_path):
    config = make_config("dit", output=str(tmp_path / "run"), init_from=str(trained("fine")[1]))
    config = replace_data(
        config, sources=(), latents=write_random_latents(tmp_path / "latents", "0123456789abcdef")
    )
    with pytest.raises(ValueError, match=r"latents: other encoders made these latents than .* holds"):
        train(config)


@pytest.mark.parametrize(
    ("stage", "changes", "width"),
    [("dit", {}, 0), ("pixel_decoder", {"decoder_noise": (0.0, 0.5)}, 64), ("fine", {}, 64)],
)
def test_low_quality_images_need_a_dit_that_reads_what_they_are(make_config, stage, changes, width):
    config = with_text(make_config(stage, output="run", init_from="weights", **changes), width)
    text = "embeddings" if width and stage != "fine" else ""
    check(replace_data(config, text=text))
    with pytest.raises(
        ValueError, match=r"low_quality_probability 0\.05 needs stage dit and a DiT with text"
    ):
        check(replace_data(config, text=text, low_quality_probability=0.05))
    reads = with_text(make_config("dit", output="run", init_from="weights"), 64)
    check(replace_data(reads, text="embeddings", low_quality_probability=0.05))


def test_what_low_quality_images_need_is_asked_for_at_the_start(make_config, trained, tmp_path):
    _, weights = trained("fine")
    config = with_text(make_config("dit", output=str(tmp_path / "run"), init_from=str(weights)), 8)
    config = replace_data(config, text=write_embeddings(tmp_path / "text", 8), low_quality_probability=0.05)
    with pytest.raises(
        ValueError, match=r"text: no embedding of the default negative prompt, .* prepare embed"
    ):
        train(config)
    latents = write_random_latents(tmp_path / "latents", encoder_digest(load_weights(weights, ())[1]))
    with pytest.raises(ValueError, match=r"latents: made with data\.low_quality_probability 0, not 0\.05"):
        train(replace_data(config, sources=(), latents=latents))


def test_cached_low_quality_images_keep_their_caption(make_config, trained, photos, tmp_path):
    data = DataConfig(sources=(str(photos),), resolutions=(64,), batch_size=2, low_quality_probability=0.5)
    config = make_config("dit", init_from=str(trained("fine")[1]), data=data)
    with pytest.raises(ValueError, match="needs stage dit and a DiT with text"):
        cache_latents(config, tmp_path / "none", 1)
    config = with_text(config, 8)
    cache_latents(config, tmp_path / "latents", 8)
    cached = CachedLatents(tmp_path / "latents")
    made_of = batches(config.data, FolderSource(photos), config.seed, config.degradation)
    low_quality = [low for _ in range(8) for low in (next(made_of), made_of.low_quality.tolist())[1]]
    assert [cached[number]["caption"] for number in range(16)] == [None if low else "" for low in low_quality]
    assert 0 < sum(low_quality) < 16 and cached.low_quality_probability == 0.5


def test_a_dit_learns_from_cached_latents_and_text(make_config, trained, tmp_path):
    _, groups = load_weights(trained("fine")[1], ())
    latents = write_random_latents(tmp_path / "latents", encoder_digest(groups))
    config = make_config("dit", output=str(tmp_path / "run"), init_from=str(trained("fine")[1]), steps=2)
    config = replace_data(
        with_text(config, 8),
        sources=(),
        latents=latents,
        text=write_embeddings(tmp_path / "text", 8),
        text_tokens=4,
    )
    _, groups = load_weights(train(config), ("dit", "fine_decoder"))
    assert groups["dit"]["blocks"]["text_attention"]["key"]["kernel"].shape == (2, 8, 32)
    assert all(np.isfinite(leaf).all() for _, leaf in leaves(groups["dit"]))
    with Image.open(tmp_path / "run" / "samples" / "0000002.png") as grid:
        assert grid.size == (3 * 64, PREVIEW_IMAGES * 64)  # of cached crops nobody has the images


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolutions": (64,)}, "a crop's side of 64 pixels gives the losses 16; they need 31"),
        ({"aspect_ratios": (1.0, 4.0)}, "a crop's side of 64 pixels gives the losses 16; they need 31"),
        ({"resolutions": (256,)}, r"none of the 6 images has the pixels of .*resolution 256: 256 x 256"),
        ({"sources": ()}, r"data\.sources is empty"),
        ({"sources": ("/nowhere/at/all",)}, "/nowhere/at/all: no such folder"),
        ({"batch_size": 3}, r"data\.batch_size 3 is not a multiple of 2"),
    ],
)
def test_data_that_does_not_suit_is_refused(make_config, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train(replace_data(make_config("coarse", output=str(tmp_path), accumulate=2), **changes))


@pytest.mark.parametrize(
    ("stage", "part", "changes", "message"),
    [
        ("coarse", "loss", {"lpips_crop": 30}, r"loss\.lpips_crop 30 is below 31 pixels"),
        ("coarse", "loss", {"lpips_crop": 40}, "gives the losses 32; they need 40"),
        ("fine", "discriminator", {"layers": 5}, "gives the losses 64; they need 96"),
        ("dit", "model", {"patch": 4}, "a crop's side of 64 pixels is not a multiple of 128"),
    ],
)
def test_crops_that_are_too_small_for_the_networks_are_refused(make_config, stage, part, changes, message):
    config = make_config(stage, output="run", init_from="weights")
    settings = config.model.dit if part == "model" else getattr(config, part)
    changed = dataclasses.replace(settings, **changes)
    if part == "model":
        changed = dataclasses.replace(config.model, dit=changed)
    with pytest.raises(ValueError, match=message):
        check(dataclasses.replace(config, **{part: changed}))


def test_a_loss_without_lpips_neither_reads_its_network_nor_needs_its_crops(make_config, monkeypatch):
    config = make_config("coarse", output="run", init_from="weights")
    config = replace_data(config, resolutions=(64,))  # 16 pixels to the losses
    loss = dataclasses.replace(config.loss, lpips=0.0, lpips_crop=40, adversarial=0.0)
    check(dataclasses.replace(config, loss=loss))
    assert set(losses.lpips_group(config)) == {"lpips"}
    monkeypatch.setattr(losses, "load_lpips", None)
    assert losses.lpips_group(dataclasses.replace(config, loss=loss)) == {}
    assert losses.lpips_group(make_config("dit")) == {}
    assert losses.lpips_group(make_config("pixel_decoder", loss=loss)) == {}


def test_an_existing_checkpoint_is_neither_overwritten_nor_mixed_with_another_config(trained):
    config, weights = trained("coarse")
    before = (weights / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="holds a checkpoint of step 4: --resume auto, or move it"):
        train(config)
    with pytest.raises(
        ValueError, match="step 4 was written with seed = 0, not 1; use another output folder"
    ):
        train(dataclasses.replace(config, seed=1), resume="auto")
    assert (weights / "model.safetensors").read_bytes() == before


def test_weights_that_do_not_fit_are_refused(trained, make_config, tmp_path, tiny_weights):
    coarse = str(trained("coarse")[1])
    config = make_config("dit", output=str(tmp_path / "run"), init_from=coarse)
    with pytest.raises(ValueError, match="the weights have no fine_encoder"):
        train(config)
    with pytest.raises(ValueError, match="nowhere: no weights here"):
        train(dataclasses.replace(config, init_from=str(tmp_path / "nowhere")))
    config = make_config("fine", output=str(tmp_path / "run"), init_from=str(tiny_weights))
    with pytest.raises(ValueError, match="tiny: these weights have another lp_vae than the config"):
        train(config)


@pytest.fixture(scope="module")
def trained_dit(trained):
    """`trained("dit")` for tests with idle steps: were it called in one of them, it would keep what they train."""
    return trained("dit")


def test_an_lp_vae_serves_any_dit_but_hands_none_on_to_a_new_latent_space(
    trained_dit, make_config, tmp_path, idle_steps, capsys
):
    config, weights = trained_dit

    def run(stage, name, model, **changes):
        other = make_config(stage, output=str(tmp_path / name), init_from=str(weights), steps=1, **changes)
        return load_weights(train(dataclasses.replace(other, model=model)), ())

    def changed(part, **changes):
        part_of_it = dataclasses.replace(getattr(config.model, part), **changes)
        return dataclasses.replace(config.model, **{part: part_of_it})

    model = changed("dit", layers=3)
    saved, groups = run("dit", "deeper", model)
    assert saved == model
    assert groups["dit"]["blocks"]["attention"]["key"]["kernel"].shape[0] == 3
    assert "these weights have another dit than the config; their DiT is not used" in capsys.readouterr().err
    # Where only the computing or the timesteps to train on differ, it is the same DiT, and is gone on from.
    before = load_weights(weights, ())[1]["dit"]
    for number, model in enumerate(
        [changed("diffusion", logit_normal_mean=0.5), changed("dit", remat="full", compute_dtype="bfloat16")]
    ):
        assert_same(run("dit", f"on{number}", model)[1]["dit"], before)
    # What a DiT learns to be guided by says what the one that is trained on has learned, not what is handed on.
    for stage, changes, is_used in (
        ("dit", {"uniform_share": 0.3, "weak_lq_probability": 0.5, "weak_lq": (0.1, 0.2)}, True),
        ("pixel_decoder", {"uniform_share": 0.3}, True),
        ("pixel_decoder", {"weak_lq_probability": 0.5}, False),
    ):
        other = make_config(stage, output=str(tmp_path / "unused"), init_from=str(weights))
        other = dataclasses.replace(other, model=changed("diffusion", **changes))
        assert ("dit" in load_pretrained(other)) == is_used
    model = changed("diffusion", prediction="eps")
    with pytest.raises(ValueError, match="these weights have another diffusion than the config"):
        run("pixel_decoder", "noise", model, decoder_noise=(0.0, 0.5))
    assert "dit" not in run("pixel_decoder", "decoder", model)[1]
    assert "dit" in run("pixel_decoder", "same", config.model)[1]
    groups = run("fine", "fine", config.model)[1]
    assert set(groups) == {"statistics", "coarse_encoder", "fine_encoder", "fine_decoder"}


@each_stage
def test_a_stage_goes_on_from_its_own_weights(stage, trained, make_config):
    """What it starts from is what it made before; the paper's fine stage does so for its 1K adaptation."""
    config, weights = trained(stage)
    groups = load_weights(weights, ())[1]
    start_from = {
        group: groups[group] for group in groups.keys() & MADE[stage] | set(STAGES[stage].needs(config))
    }
    state = jax.jit(functools.partial(create_state, config))(jax.random.key(1), start_from)
    expected = {group: groups[group] for group in MADE[stage] - {"statistics"}}
    assert_same(state["params"]["generator"], expected)
    assert_same(state["ema"], expected)


def test_a_run_with_fewer_steps_than_it_has_had_is_refused(trained):
    config, _ = trained("coarse")
    with pytest.raises(ValueError, match="the checkpoint of step 4 is beyond steps 2"):
        train(dataclasses.replace(config, steps=2), resume="auto")


# --------------------------------------------------------------------------------------------------
# What is made of a run, and before one
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["coarse", "fine", "pixel_decoder"])
def test_the_weights_of_a_checkpoint_are_those_that_its_run_writes(trained, stage):
    config, weights = trained(stage)
    model, groups = run_weights(Path(config.output))
    written_model, written = load_weights(weights, ())
    assert model == written_model
    assert_same(groups, written)
    earlier = run_weights(Path(config.output), 2)[1]
    assert earlier.keys() == groups.keys()
    made = next(iter(MADE[stage] - {"statistics"}))
    assert not all(
        np.array_equal(a, b)
        for (_, a), (_, b) in zip(leaves(earlier[made]), leaves(groups[made]), strict=True)
    )
    with pytest.raises(ValueError, match="holds no checkpoint of step 9; there are: 1, 2, 3, 4"):
        run_weights(Path(config.output), 9)


def test_a_run_is_exported_as_its_weights_are(trained, call, tmp_path):
    config, weights = trained("pixel_decoder")
    for number, (source, options) in enumerate(
        [
            (weights, ()),
            (config.output, ()),
            (config.output, ("--file-format", "orbax", "--dtype", "float32")),
        ]
    ):
        arguments = ("export", "--weights", source, "--output", tmp_path / str(number), *options)
        status, _, err = call(prepare.main, *arguments)
        assert status == 0, err
    files = [tmp_path / number / "model.safetensors" for number in ("0", "1")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert not (tmp_path / "2" / "model.safetensors").exists()
    _, groups = load_weights(tmp_path / "2", NEEDED)
    written = load_weights(weights, NEEDED)[1]
    assert_same(groups, {name: written[name] for name in NEEDED})
    photo = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    assert Restorer.load(tmp_path / "2").restore(photo, scale=1, denoise=False).std() > 1
    status, _, err = call(
        prepare.main, "export", "--weights", weights, "--output", tmp_path / "3", "--step", 2
    )
    assert (status, err) == (2, f"error: {weights}: no run here, and step 2 names a run's checkpoint\n")


def test_statistics_are_measured_before_and_after_there_are_weights(trained, photos, call, tmp_path):
    config, weights = trained("fine")
    common = "--sources", photos, "--resolution", 64, "--images", 16
    status, out, err = call(
        prepare.main, "statistics", *common, "--output", tmp_path / "macro", "--model", "tiny"
    )
    assert status == 0 and out.count("\n") == 2, err
    _, macro = load_weights(tmp_path / "macro", ("statistics",))
    assert macro.keys() == {"statistics"}
    images = [next(batches(DataConfig(resolutions=(64,), batch_size=64), FolderSource(photos), 5))["image"]]
    np.testing.assert_allclose(macro["statistics"]["macro_mean"], np.mean(images, (0, 1, 2, 3)), atol=0.15)

    arguments = "statistics", *common, "--weights", weights, "--output", tmp_path / "latent"
    status, out, err = call(prepare.main, *arguments)
    assert status == 0 and out.count("\n") == 4 + config.model.diffusion.residual, err
    before, after = load_weights(weights, ())[1], load_weights(tmp_path / "latent", ())[1]
    old, new = before.pop("statistics"), after.pop("statistics")
    for name in old:  # E_c was trained with the macro band's
        assert np.array_equal(old[name], new[name]) == name.startswith("macro_")
    assert_same(before, after)


def test_latents_are_cached_by_a_command_and_trained_on(
    trained, config_file, make_config, photos, call, tmp_path
):
    _, weights = trained("fine")
    config = make_config("dit", output=str(tmp_path / "run"), init_from=str(weights))
    config_file.write_text(f"from zipir_jax.config import *\n\ndef config():\n    return {config!r}\n")
    arguments = (
        "latents",
        "--config",
        config_file,
        "--sources",
        photos,
        "--batches",
        3,
        "--output",
        tmp_path / "l",
    )
    status, out, err = call(prepare.main, *arguments)
    assert (status, out) == (0, f"{tmp_path / 'l'}: latents of 6 crops\n"), err
    # What is cached is what the stage would encode.
    batch = next(batches(config.data, FolderSource(photos), config.seed, config.degradation))
    groups = load_weights(weights, ())[1]
    cached = CachedLatents(tmp_path / "l")
    for name, image in (("latent", "image"), ("lq_latent", "lq")):
        encoded = encode(groups, config.model.lp_vae, jnp.asarray(batch[image]))
        np.testing.assert_allclose(cached[0][name], encoded[0], atol=5e-3)
    status, _, err = call(prepare.main, *arguments)
    assert status == 2 and "latents.json" in err and err.count("\n") == 1
    status, _, err = call(main, "--config", config_file, "--data.latents", tmp_path / "l", "--steps", 2)
    assert status == 0, err
    assert len(json.loads((tmp_path / "run" / "metrics.jsonl").read_text())) > 5


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------


@pytest.fixture(name="config_file")
def make_config_file(make_config, tmp_path):
    config = make_config("coarse", output=str(tmp_path / "run"))
    path = tmp_path / "config.py"
    path.write_text(f"from zipir_jax.config import *\n\ndef config():\n    return {config!r}\n")
    return path


def test_the_command_line_trains_what_the_config_and_the_overrides_say(
    config_file, tmp_path, call, idle_steps
):
    output = tmp_path / "elsewhere"
    overrides = ("--steps", 1, "--output", output, "--optimizer.warmup-steps", 0, "--mesh.data", 1)
    status, out, err = call(main, "--config", config_file, *overrides)
    assert status == 0, err
    assert out == f"weights: {output / 'weights'}\n"
    model, groups = load_weights(output / "weights", ())
    assert groups.keys() == MADE["coarse"]
    assert model.dit.width == 32
    assert not (tmp_path / "run").exists()


def test_images_that_cannot_be_read_leave_the_exit_status_at_0(
    config_file, tmp_path, call, idle_steps, photos
):
    shutil.copytree(photos, tmp_path / "photos")
    whole = (photos / "1.png").read_bytes()
    (tmp_path / "photos" / "1.png").write_bytes(whole[:10])
    (tmp_path / "photos" / "2.png").write_bytes(whole[: len(whole) // 2])
    status, _, err = call(main, "--config", config_file, "--data.sources", tmp_path / "photos")
    assert status == 0
    assert "2 images or captions could not be read; others stood in for them\n" in err


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--data.nonsense", "3"), "nonsense"),
        (("--nonsense",), "nonsense"),
        (("--steps", "many"), "many"),
        (("--steps", "0"), "steps 0 is not at least 1"),
        (("--data.threads", "-1"), "threads -1 is not at least 0"),
        (("--data.resolutions", "100"), "resolution 100 is not a multiple of 64"),
        (
            ("--data.resolutions", "64"),
            "error: a crop's side of 64 pixels gives the losses 16; they need 31\n",
        ),
        (("--resume", "7"), "run holds no checkpoint of step 7; there are: none\n"),
        (("--stage", "medium"), "error: stage 'medium' is not one of"),
        (("--data.sources", "/nowhere"), "error: /nowhere: no such folder\n"),
    ],
)
def test_the_command_line_refuses_with_status_2(config_file, call, arguments, word):
    status, out, err = call(main, "--config", config_file, *arguments)
    assert status == 2
    assert word in out + err
    assert "Traceback" not in out + err


def test_the_command_line_says_what_is_wrong_with_the_config_file(tmp_path, call):
    empty = tmp_path / "empty.py"
    empty.write_text("")
    for arguments, message in (
        ((), "--config is missing"),
        (("--config",), "argument --config: expected one argument"),
        (("--config", tmp_path / "nowhere.py"), "nowhere.py: no such config"),
        (("--config", empty), "empty.py: a config file needs a function named config"),
    ):
        status, _, err = call(main, *arguments)
        assert status == 2
        assert message in err
        assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message", "cause"),
    [
        ("def config(:", "config.py: the config file fails with SyntaxError: ", SyntaxError),
        ("{}['stage']", "config.py: the config file fails with KeyError: 'stage'", KeyError),
        ("def config(): return {}['config']", "fails with KeyError: 'config'", KeyError),
        ("open('/nowhere')", "fails with FileNotFoundError: [Errno 2]", FileNotFoundError),
        ("def config(): return {}", "config.py: config() returns dict, not a TrainConfig", None),
        ("config = 3", "config.py: a config file needs a function named config", None),
    ],
)
def test_a_config_file_that_fails_is_named(tmp_path, call, text, message, cause):
    path = tmp_path / "config.py"
    path.write_text(text)
    status, out, err = call(main, "--config", path)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {path}: ") and message in err
    with pytest.raises(ValueError) as raised:
        call(main, "--config", path, "--debug")
    assert type(raised.value.__cause__) is (cause or type(None))  # for the traceback


def test_options_are_not_guessed_from_their_beginning(config_file, tmp_path, call):
    for arguments in (("--conf", config_file), ("--config", config_file, "--res")):
        status, _, err = call(main, *arguments)
        assert status == 2 and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_help_lists_the_settings(call):
    status, out, _ = call(main, "--help")
    assert status == 0
    for option in ("--data.sources", "--optimizer.learning-rate", "--steps", "--resume"):
        assert option in out


def test_debug_shows_the_traceback(config_file, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["train", "--debug", "--config", str(config_file), "--data.sources", "/nowhere"]
    )
    with pytest.raises(ValueError, match="/nowhere: no such folder"):
        run(main)
