"""The loop around a step that compiles at once: what is saved, logged, refused and resumed."""

import dataclasses
import functools
import json
import shutil
import signal
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file

from zipir_jax.training import loop
from zipir_jax.training.checkpoint import fingerprint
from zipir_jax.training.losses import lpips_net
from zipir_jax.training.stages import STAGES
from zipir_jax.weights import load_weights, save_weights

pytestmark = pytest.mark.usefixtures("quick_compile", "quick_lpips")


def toy_step(bad_step, config, adversarial, state, frozen, batch):
    """The loss is the number of the step; the weights add up all that was seen."""
    step = state["step"] + 1
    seen = {"seen": state["params"]["generator"]["seen"] + batch["image"].sum()}
    loss = jnp.where(step == bad_step, jnp.nan, step)
    params = state["params"] | {"generator": seen}
    return state | {"params": params, "ema": seen, "step": step}, {"loss": loss}


@pytest.fixture(autouse=True)
def toy_stage(monkeypatch):
    stage = types.SimpleNamespace(
        DEGRADED=False,
        MAKES=("toy",),
        needs=lambda config: ("coarse_encoder",) if config.init_from else (),
        start=lambda config, key, pretrained, images: ({"seen": jnp.zeros(())}, {}),
        preview=lambda config, generator, frozen, batch, key: [batch["image"]],
        export=lambda config, generator, frozen, images: {"toy": generator},
    )
    monkeypatch.setitem(STAGES, "coarse", stage)
    monkeypatch.setattr(loop, "train_step", functools.partial(toy_step, -1))


@pytest.fixture(name="config")
def make_toy_config(make_config, tmp_path):
    config = make_config("coarse", output=str(tmp_path / "run"), steps=8, checkpoint_minutes=60.0)
    return dataclasses.replace(config, loss=dataclasses.replace(config.loss, adversarial=0.0))


def checkpoint_steps(config):
    return {int(p.name) for p in (Path(config.output) / "checkpoints").iterdir() if p.name.isdigit()}


def logged(config, name):
    lines = (Path(config.output) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)[name] for line in lines]


def seen(config):
    """What the exported weights of a toy run have added up."""
    return load_file(Path(config.output) / "weights" / "model.safetensors")["toy.seen"]


# --------------------------------------------------------------------------------------------------
# metrics.jsonl
# --------------------------------------------------------------------------------------------------


def test_metrics_are_logged_every_20_steps_and_at_the_end(config):
    config = dataclasses.replace(config, steps=45)
    loop.train(config)
    assert logged(config, "step") == [20, 40, 45]
    assert logged(config, "loss") == [10.5, 30.5, 43.0]
    assert all(rate > 0 for rate in logged(config, "images_per_second"))
    assert np.all(np.diff([0, *logged(config, "seconds")]) > 0)


# --------------------------------------------------------------------------------------------------
# Losses that are not finite
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad_step", "minutes", "saved", "left"),
    [
        (5, 0.0, {3, 4}, "the checkpoint of step 4, the last good one"),
        (1, 0.0, set(), "no checkpoint"),
        (5, 60.0, set(), "no checkpoint"),
        (8, 60.0, set(), "no checkpoint"),  # the last step, after which weights would be written
    ],
)
def test_a_loss_that_is_not_finite_ends_the_run_and_is_not_saved(
    config, monkeypatch, bad_step, minutes, saved, left
):
    config = dataclasses.replace(config, checkpoint_minutes=minutes)
    monkeypatch.setattr(loop, "train_step", functools.partial(toy_step, bad_step))
    with pytest.raises(ValueError, match=f"step {bad_step}: loss is nan; training stopped and left {left}"):
        loop.train(config)
    assert checkpoint_steps(config) == saved
    assert not (Path(config.output) / "weights").exists()
    assert all(np.isfinite(logged(config, "loss")))


# --------------------------------------------------------------------------------------------------
# Signals
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_a_signal_saves_what_was_trained_and_the_run_resumes(
    config, monkeypatch, capsys, tmp_path, number, raised
):
    before = signal.getsignal(number)

    def interrupt(bar, metrics, batch_size):
        if metrics["loss"] == 3:  # fetched during step 4
            signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "report", interrupt)
        with pytest.raises(raised) as stopped:
            loop.train(config)
    assert getattr(stopped.value, "code", 0) == 0
    assert "stopped after step 5, which is saved: --resume goes on from there" in capsys.readouterr().err
    assert signal.getsignal(number) == before
    assert checkpoint_steps(config) == {5}
    assert logged(config, "step") == [5]
    assert not (Path(config.output) / "weights").exists()

    loop.train(config, resume=True)
    assert logged(config, "step") == [5, 8]
    straight = dataclasses.replace(config, output=str(tmp_path / "straight"))
    loop.train(straight)
    assert seen(config) == seen(straight) != 0


# --------------------------------------------------------------------------------------------------
# What a resumed run may change
# --------------------------------------------------------------------------------------------------


@pytest.fixture(name="pretrained")
def make_pretrained(config, tiny_model, tiny_weights):
    """The config of a run that starts from weights."""
    return dataclasses.replace(config, model=tiny_model, init_from=str(tiny_weights), steps=3)


def test_a_resumed_run_may_change_what_no_number_depends_on(pretrained, tmp_path, photos):
    loop.train(pretrained)
    for name, folder in (("photos", photos), ("weights", pretrained.init_from)):
        shutil.copytree(folder, tmp_path / "moved" / name)
    shutil.move(pretrained.output, tmp_path / "moved" / "run")
    moved = dataclasses.replace(
        pretrained,
        output=str(tmp_path / "moved" / "run"),
        init_from=str(tmp_path / "moved" / "weights"),
        data=dataclasses.replace(
            pretrained.data, folder=str(tmp_path / "moved" / "photos"), threads=0, cache_gib=0.1
        ),
        sample_every=2,
        checkpoint_minutes=0.0,
        steps=6,
    )
    loop.train(moved, resume=True)
    straight = dataclasses.replace(pretrained, output=str(tmp_path / "straight"), steps=6)
    loop.train(straight)
    assert logged(moved, "step") == [3, 4, 5, 6]
    assert seen(moved) == seen(straight) != 0


def change_weights(source, target, group):
    """A copy of weights in which one tensor of one group is another."""
    model, weights = load_weights(source, ())
    tensors = flatten_dict(weights)
    path = next(path for path in tensors if path[0] == group)
    save_weights(target, model, unflatten_dict(tensors | {path: tensors[path] + 0.5}))
    return str(target)


def test_a_resumed_run_keeps_the_weights_that_it_started_from(pretrained, tmp_path):
    loop.train(pretrained)
    other = change_weights(pretrained.init_from, tmp_path / "other", "coarse_encoder")
    with pytest.raises(ValueError, match=r"written with init_from = weights [0-9a-f]{16}, not weights "):
        loop.train(dataclasses.replace(pretrained, init_from=other), resume=True)
    # A group that this stage does not read may be another: it is only handed on.
    handed_on = change_weights(pretrained.init_from, tmp_path / "handed on", "dit")
    loop.train(dataclasses.replace(pretrained, init_from=handed_on), resume=True)


@pytest.mark.parametrize(
    ("section", "field", "value", "message"),
    [
        ("optimizer", "beta1", 0.8, "optimizer.beta1 = 0.9, not 0.8"),
        ("data", "batch_size", 3, "data.batch_size = 2, not 3"),
        ("data", "zoom", (0.25, 1.0), r"data.zoom = \[0.5, 1.0\], not \[0.25, 1.0\]"),
        ("loss", "lpips", 0.5, "loss.lpips = 1.0, not 0.5"),
    ],
)
def test_a_resumed_run_keeps_all_other_settings(config, section, field, value, message):
    loop.train(dataclasses.replace(config, steps=1))
    changed = dataclasses.replace(getattr(config, section), **{field: value})
    with pytest.raises(ValueError, match=f"step 1 was written with {message}; use another output folder"):
        loop.train(dataclasses.replace(config, **{section: changed}), resume=True)


def test_auto_is_compared_as_the_network_that_it_means(config):
    def named(net, **changes):
        loss = dataclasses.replace(config.loss, lpips_net=net)
        return fingerprint(dataclasses.replace(config, loss=loss, **changes), {})["loss"]["lpips_net"]

    assert named("auto") == named(lpips_net("auto")) == lpips_net("auto")
    assert named("auto", stage="dit") == "auto"  # which has no LPIPS
