"""The loop around a step that compiles at once: what is saved, logged, skipped, refused and resumed."""

import contextlib
import dataclasses
import functools
import json
import shutil
import signal
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from PIL import Image
from safetensors.numpy import load_file

from zipir_jax.training import checkpoint, log, loop
from zipir_jax.training.checkpoint import fingerprint
from zipir_jax.training.losses import lpips_net
from zipir_jax.training.stages import STAGES
from zipir_jax.training.state import train_step
from zipir_jax.weights import load_weights, save_weights

pytestmark = pytest.mark.usefixtures("quick_compile", "quick_lpips")


def toy_step(config, adversarial, state, frozen, batch):
    """The loss is the number of the step; the weights add up all that was seen."""
    step = state["step"] + 1
    seen = {"toy": {"seen": state["params"]["generator"]["toy"]["seen"] + batch["image"].sum()}}
    params = state["params"] | {"generator": seen}
    metrics = {"loss": step.astype(float), "skipped_in_a_row": jnp.zeros(())}
    return state | {"params": params, "ema": seen, "step": step}, metrics


@pytest.fixture(autouse=True)
def toy_stage(monkeypatch):
    stage = types.SimpleNamespace(
        DEGRADED=False,
        MAKES=("toy",),
        needs=lambda config: ("coarse_encoder",) if config.init_from else (),
        init=lambda config, key, pretrained: {"toy": {"seen": jnp.zeros(())}},
        preview=lambda config, generator, frozen, batch, key: [batch["image"]],
        statistics=lambda config, weights, images: weights["statistics"],
    )
    monkeypatch.setitem(STAGES, "coarse", stage)
    monkeypatch.setattr(loop, "train_step", toy_step)
    return stage


@pytest.fixture(name="config")
def make_toy_config(make_config, tmp_path):
    config = make_config("coarse", output=str(tmp_path / "run"), steps=8)
    return dataclasses.replace(config, loss=dataclasses.replace(config.loss, adversarial=0.0))


def replace_data(config, **changes):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))


def checkpoint_steps(config):
    return {int(p.name) for p in (Path(config.output) / "checkpoints").iterdir() if p.name.isdigit()}


def saved_state(config, step):
    path = Path(config.output) / "checkpoints" / str(step) / "state"
    return ocp.StandardCheckpointer().restore(path.absolute())


def lines(config):
    return [json.loads(line) for line in (Path(config.output) / "metrics.jsonl").read_text().splitlines()]


def logged(config, name):
    return [line[name] for line in lines(config)]


def seen(config):
    """What the exported weights of a toy run have added up."""
    return load_file(Path(config.output) / "weights" / "model.safetensors")["toy.seen"]


# --------------------------------------------------------------------------------------------------
# What a run logs
# --------------------------------------------------------------------------------------------------


def test_metrics_are_logged_every_20_steps_and_at_the_end(config):
    config = dataclasses.replace(config, steps=45)
    loop.train(config)
    assert logged(config, "step") == [20, 40, 45]
    assert logged(config, "loss") == [10.5, 30.5, 43.0]
    assert all(rate > 0 for rate in logged(config, "images_per_second"))
    assert np.all(np.diff([0, *logged(config, "seconds")]) > 0)
    assert all(
        0 <= line["data_wait"] <= 1 and line["seconds"] <= line["wall_seconds"] for line in lines(config)
    )
    assert not {"wish", "mfu"} & lines(config)[0].keys()  # nobody knows the peak of this CPU


def test_rates_count_the_images_of_all_devices_and_the_time_of_their_steps(config, monkeypatch):
    monkeypatch.setattr(loop, "training_flops", lambda config, height, width, adversarial: 10**9 * height)
    monkeypatch.setattr(loop, "peak_flops", lambda kind: 1e12)
    loop.train(config)
    (line,) = lines(config)
    assert line["images_per_second"] * line["step_seconds"] == pytest.approx(2, rel=1e-4)
    assert line["tflops_per_second"] == pytest.approx(line["images_per_second"] * 0.128, rel=1e-4)
    assert line["mfu"] == pytest.approx(line["tflops_per_second"], rel=1e-4)


def test_a_run_says_how_it_ended(config, capsys):
    weights = loop.train(config)
    assert "step 8: loss 8\n" in capsys.readouterr().err
    shutil.rmtree(weights)
    loop.train(config, resume="auto")  # no step is left to do, but the weights are written
    assert "step 8:" not in capsys.readouterr().err
    assert seen(config) != 0


# --------------------------------------------------------------------------------------------------
# Gradients that are not finite
# --------------------------------------------------------------------------------------------------


@pytest.fixture(name="bad_steps")
def make_bad_steps(monkeypatch, toy_stage):
    """`bad_steps(config, 3, 4)`: the real step, on gradients that are NaN in the steps 3 and 4."""

    def gradients(bad, config, params, frozen, batch, key, adversarial):
        is_bad = (frozen["step"] + 1 == jnp.array(bad)).any()
        gradient = jnp.where(is_bad, jnp.nan, 1 + batch["image"].mean())
        gradients = {"generator": {"toy": {"seen": gradient}}, "discriminator": {}}
        return gradients, {"loss": jnp.where(is_bad, jnp.nan, frozen["step"] + 1.0)}

    def set_bad(config, *bad):
        monkeypatch.setattr(toy_stage, "gradients", functools.partial(gradients, bad), raising=False)

        def step(config, adversarial, state, frozen, batch):
            return train_step(config, adversarial, state, frozen | {"step": state["step"]}, batch)

        monkeypatch.setattr(loop, "train_step", step)

    return set_bad


def test_a_bad_batch_is_skipped_and_training_goes_on(config, bad_steps, monkeypatch):
    bad_steps(config, 4, 5)
    monkeypatch.setattr(log, "LOG_EVERY", 1)
    config = dataclasses.replace(config, keep_every=1)
    loop.train(config)
    states = {step: saved_state(config, step) for step in range(1, 9)}
    position = {step: float(state["params"]["generator"]["toy"]["seen"]) for step, state in states.items()}
    # The rate is 0 in the first step of the warm-up.
    moved = {step for step in range(2, 9) if position[step] != position[step - 1]}
    assert moved == {2, 3, 6, 7, 8}
    for step in (4, 5):  # the moments, and the counts that correct them, are those of the last good step
        before, after = (jax.tree.leaves(states[s]["optimizer"]["inner_state"]) for s in (3, step))
        assert before == after and len(before) > 3
    average = [float(state["ema"]["toy"]["seen"]) for state in states.values()]
    assert np.isfinite(average).all()
    assert float(seen(config)) == average[-1]
    assert logged(config, "skipped") == [0, 0, 0, 1, 1, 0, 0, 0]
    assert [line.get("loss") for line in lines(config)] == [1, 2, 3, None, None, 6, 7, 8]


@pytest.mark.parametrize(
    ("bad", "keep_every", "saved", "left"),
    [
        ((5, 6), 1, {1, 2, 3, 4, 5}, "the checkpoint of step 5"),
        ((5, 6), 0, set(), "no checkpoint"),
        ((1, 2), 0, set(), "no checkpoint"),
        ((7, 8), 4, {4}, "the checkpoint of step 4"),  # the last step, after which weights would be written
    ],
)
def test_too_many_bad_batches_in_a_row_end_the_run(config, bad_steps, bad, keep_every, saved, left):
    config = dataclasses.replace(config, keep_every=keep_every, skip_limit=2)
    bad_steps(config, *bad)
    message = (
        f"step {bad[1]}: the gradient of 2 steps in a row is not finite .*; training stopped and left {left}$"
    )
    with pytest.raises(ValueError, match=message):
        loop.train(config)
    assert checkpoint_steps(config) == saved
    assert not (Path(config.output) / "weights").exists()
    if saved:  # without what was wrong the run goes on from what is left
        bad_steps(config)
        loop.train(config, resume="auto")
        assert np.isfinite(seen(config)) and seen(config) != 0
        assert logged(config, "step")[-1] == 8


def test_as_many_bad_batches_that_are_not_in_a_row_do_not(config, bad_steps):
    config = dataclasses.replace(config, skip_limit=2)
    bad_steps(config, 3, 5, 7)
    loop.train(config)
    assert np.isfinite(seen(config))


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

    def interrupt(bar, metrics, counts):
        if metrics["loss"] == 3:  # fetched during step 4: step 5 carries the wish to all processes
            signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "report", interrupt)
        with pytest.raises(raised) as stopped:
            loop.train(config)
    assert getattr(stopped.value, "code", 0) == 0
    assert "stopped after step 6, which is saved: --resume auto goes on from there" in capsys.readouterr().err
    assert signal.getsignal(number) == before
    assert checkpoint_steps(config) == {6}
    assert logged(config, "step") == [6]
    assert not (Path(config.output) / "weights").exists()

    loop.train(config, resume="auto")
    assert logged(config, "step") == [6, 8]
    straight = dataclasses.replace(config, output=str(tmp_path / "straight"))
    loop.train(straight)
    assert seen(config) == seen(straight) != 0


# --------------------------------------------------------------------------------------------------
# Checkpoints
# --------------------------------------------------------------------------------------------------


def test_the_newest_checkpoints_and_those_to_keep_are_kept(config):
    config = dataclasses.replace(config, steps=11, keep_every=3, keep_last=1)
    loop.train(config)
    assert checkpoint_steps(config) == {3, 6, 9, 11}


def test_checkpoints_follow_the_clock(config, monkeypatch):
    """A minute is a step: the wish for a checkpoint is known one step late."""
    clock = types.SimpleNamespace(monotonic=lambda: 60.0 * clock.steps, steps=0)

    class NoLog:
        def __init__(self, *_):
            self.add = self.write = self.grid = self.close = lambda *_, **__: None

    compiled = loop.compile_step

    def counting(*arguments):
        program = compiled(*arguments)

        def run(*arguments):
            clock.steps += 1
            return program(*arguments)

        return run

    monkeypatch.setattr(loop, "time", clock)
    monkeypatch.setattr(loop, "compile_step", counting)
    monkeypatch.setattr(loop, "MetricsLog", NoLog)  # a clock that stands still would divide by zero
    monkeypatch.setattr(loop, "report", lambda *arguments: None)
    saved = []
    monkeypatch.setattr(loop.checkpoint, "save", lambda checkpoints, step, *_: saved.append(step))
    loop.train(dataclasses.replace(config, steps=20, checkpoint_minutes=5.5))
    assert saved == [8, 16, 20]


def test_auto_starts_where_there_is_nothing_to_go_on_from(config):
    loop.train(config, resume="auto")
    assert checkpoint_steps(config) == {8}


def test_a_run_goes_on_from_the_step_that_is_named(config):
    config = dataclasses.replace(config, keep_every=2)
    loop.train(config)
    whole, end = checkpoint_steps(config), seen(config)
    assert whole == {2, 4, 6, 8}
    # What came after is given up: `auto` must not go back to it later.
    loop.train(dataclasses.replace(config, steps=5), resume="4")
    assert checkpoint_steps(config) == {2, 4, 5}
    assert logged(config, "step") == [2, 4, 5]
    loop.train(config, resume="auto")
    assert logged(config, "step") == [2, 4, 5, 6, 8]
    assert seen(config) == end != 0


@pytest.mark.parametrize("step", ["3", "newest", "-1", "²"])
def test_a_checkpoint_that_is_not_there_is_not_gone_on_from(config, step):
    config = dataclasses.replace(config, keep_every=4)
    loop.train(config)
    with pytest.raises(ValueError, match=f"run holds no checkpoint of step {step}; there are: 4, 8"):
        loop.train(config, resume=step)
    with pytest.raises(ValueError, match=r"holds no checkpoint of step 4; there are: none"):
        loop.train(dataclasses.replace(config, output=config.output + "2"), resume="4")
    assert checkpoint_steps(config) == {4, 8}


# --------------------------------------------------------------------------------------------------
# The discriminator's start
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "resume", "phases"),
    [(0, "", [True]), (3, "", [False, True]), (8, "", [False]), (3, "2", [False, True]), (3, "3", [True])],
)
def test_the_phases_that_will_come_are_compiled_and_each_step_takes_its_own(
    config, monkeypatch, start, resume, phases
):
    loss = dataclasses.replace(config.loss, adversarial=0.5, adversarial_start=start)
    config = dataclasses.replace(config, loss=loss, keep_every=1)
    calls, compiled = [], loop.compile_step

    def watched(config, mesh, bucket, adversarial, *rest):
        calls.append(("compiled", adversarial))
        program = compiled(config, mesh, bucket, adversarial, *rest)

        def run(*arguments):
            calls.append(adversarial)
            return program(*arguments)

        return run

    if resume:
        loop.train(config)
    monkeypatch.setattr(loop, "compile_step", watched)
    loop.train(config, resume=resume)
    steps = range(int(resume or 0), 8)
    assert calls == [("compiled", phase) for phase in phases] + [step >= start for step in steps]


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
        sample_every=2,
        keep_every=1,
        keep_last=1,
        profile=(50, 60),
        steps=6,
    )
    moved = replace_data(moved, sources=(str(tmp_path / "moved" / "photos"),), threads=0, cache_gib=0.1)
    loop.train(moved, resume="auto")
    straight = dataclasses.replace(pretrained, output=str(tmp_path / "straight"), steps=6)
    loop.train(straight)
    assert logged(moved, "step") == [3, 4, 5, 6]
    assert seen(moved) == seen(straight) != 0


def test_a_resumed_run_keeps_its_images(config, tmp_path, photos):
    loop.train(config)
    shutil.copytree(photos, tmp_path / "other")
    (tmp_path / "other" / "5.png").unlink()
    fewer = replace_data(config, sources=(str(tmp_path / "other"),))
    with pytest.raises(ValueError, match=r"not the images that the run began with: FolderSource\(5 images, "):
        loop.train(dataclasses.replace(fewer, steps=9), resume="auto")


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
        loop.train(dataclasses.replace(pretrained, init_from=other), resume="auto")
    # A group that this stage does not read may be another: it is only handed on.
    handed_on = change_weights(pretrained.init_from, tmp_path / "handed on", "dit")
    loop.train(dataclasses.replace(pretrained, init_from=handed_on), resume="auto")


@pytest.mark.parametrize(
    ("section", "field", "value", "message"),
    [
        ("optimizer", "beta1", 0.8, "optimizer.beta1 = 0.9, not 0.8"),
        ("data", "batch_size", 3, "data.batch_size = 2, not 3"),
        ("data", "zoom", (0.25, 1.0), r"data.zoom = \[0.5, 1.0\], not \[0.25, 1.0\]"),
        ("data", "aspect_ratios", (1.0, 1.5), r"data.aspect_ratios = \[1.0\], not \[1.0, 1.5\]"),
        ("loss", "lpips", 0.5, "loss.lpips = 1.0, not 0.5"),
        (None, "ema_decay", 0.75, "ema_decay = 0.5, not 0.75"),
    ],
)
def test_a_resumed_run_keeps_all_other_settings(config, section, field, value, message):
    loop.train(dataclasses.replace(config, steps=1))
    changes = {field: value}
    if section:
        changes = {section: dataclasses.replace(getattr(config, section), **changes)}
    with pytest.raises(ValueError, match=f"step 1 was written with {message}; use another output folder"):
        loop.train(dataclasses.replace(config, **changes), resume="auto")


def test_auto_is_compared_as_the_network_that_it_means(config):
    def named(net, **changes):
        loss = dataclasses.replace(config.loss, lpips_net=net)
        return fingerprint(dataclasses.replace(config, loss=loss, **changes), {})["loss"]["lpips_net"]

    assert named("auto") == named(lpips_net("auto")) == lpips_net("auto")
    assert named("auto", stage="dit") == "auto"  # which has no LPIPS


# --------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------


def test_every_bucket_is_compiled_before_the_first_step_and_trained_on(config, monkeypatch, capsys, tmp_path):
    for index, (height, width) in enumerate([(128, 128), (130, 140), (256, 128), (300, 300)]):
        pixels = np.random.default_rng(index).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    calls, compiled = [], loop.compile_step

    def watched(config, mesh, bucket, adversarial, *rest):
        calls.append(("compiled", bucket.batch_size, bucket.height, bucket.width))
        program = compiled(config, mesh, bucket, adversarial, *rest)

        def run(state, frozen, batch, wishes):
            calls.append(("run", *batch["image"].shape[:3]))
            return program(state, frozen, batch, wishes)

        return run

    monkeypatch.setattr(loop, "compile_step", watched)
    config = replace_data(
        config, sources=(str(tmp_path),), resolutions=(192, 128), aspect_ratios=(1.0, 0.6), batch_tokens=72
    )
    loop.train(dataclasses.replace(config, steps=20))
    # 36, 32, 16 and 24 latent pixels a crop.
    shapes = {(2, 192, 192), (2, 256, 128), (4, 128, 128), (3, 192, 128)}
    assert [call[0] for call in calls] == ["compiled"] * len(shapes) + ["run"] * 20
    assert (
        {call[1:] for call in calls[: len(shapes)]} == {call[1:] for call in calls[len(shapes) :]} == shapes
    )
    printed = capsys.readouterr().err
    for count, height, width in shapes:
        assert f"compiled: {count} crops of {width} x {height}, " in printed
    with Image.open(Path(config.output) / "samples" / "0000020.png") as picture:
        assert picture.height in (4 * 128, 4 * 192)  # PREVIEW_IMAGES of the smallest resolution


@pytest.fixture(name="damaged")
def make_damaged(photos, tmp_path):
    """Six photographs, two of which break off, and two more files that are no images at all."""
    folder = tmp_path / "damaged"
    shutil.copytree(photos, folder)
    for name in ("1.png", "4.png"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])
    (folder / "6.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    (folder / "7.jpg").write_bytes(b"")
    return folder


@pytest.mark.parametrize("threads", [0, 2])
def test_images_that_cannot_be_read_are_named_once_and_replaced(config, damaged, capsys, threads):
    config = dataclasses.replace(replace_data(config, sources=(str(damaged),), threads=threads), steps=12)
    loop.train(config)
    printed = capsys.readouterr().err
    for name in ("1.png", "4.png", "6.png", "7.jpg"):
        assert printed.count(str(damaged / name)) == 1, name
    assert "4 images or captions could not be read; others stood in for them\n" in printed
    assert np.isfinite(seen(config)) and seen(config) != 0
    # They are the same images when the run is resumed.
    loop.train(dataclasses.replace(config, steps=14), resume="auto")


def test_a_folder_that_cannot_be_read_at_all_ends_the_run(config, damaged):
    for path in damaged.iterdir():
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="images in a row cannot be read"):
        loop.train(replace_data(config, sources=(str(damaged),)))


# --------------------------------------------------------------------------------------------------
# Profiler
# --------------------------------------------------------------------------------------------------


def traces(config):
    return list((Path(config.output) / "profile").rglob("*.xplane.pb"))


def test_the_profiler_records_the_steps_that_it_is_asked_for(config, monkeypatch):
    calls, trace = [], jax.profiler.trace

    @contextlib.contextmanager
    def watched(folder):
        calls.append("starts")
        with trace(folder):
            yield
        calls.append("ends")

    monkeypatch.setattr(jax.profiler, "trace", watched)
    monkeypatch.setattr(loop, "report", lambda bar, metrics, counts: calls.append(int(metrics["loss"])))
    config = dataclasses.replace(config, profile=(2, 4))
    loop.train(config)
    assert len(traces(config)) == 1 and traces(config)[0].stat().st_size > 0
    # After two steps; and the metrics are fetched a step late.
    assert calls == [1, "starts", 2, 3, "ends", 4, 5, 6, 7, 8]


def test_a_run_that_ends_while_the_profiler_records_keeps_the_trace(config, monkeypatch):
    config = dataclasses.replace(config, profile=(6, 100))
    loop.train(config)
    assert len(traces(config)) == 1
    # And one that goes on in the midst of these steps records the rest of them.
    shutil.rmtree(Path(config.output) / "profile")
    loop.train(dataclasses.replace(config, steps=10, profile=(6, 9)), resume="auto")
    assert len(traces(config)) == 1


def test_without_being_asked_there_is_no_trace(config):
    loop.train(config)
    assert not (Path(config.output) / "profile").exists()


def test_a_resumed_run_may_have_settings_that_its_checkpoint_does_not_know(config, monkeypatch):
    """Those that came into being later; they had their default values."""
    loop.train(dataclasses.replace(config, steps=2))
    read = checkpoint.read_config

    def read_without(checkpoints, step):
        fields = read(checkpoints, step)
        del fields["fingerprint"]["loss"]["kl"]
        return fields

    monkeypatch.setattr(checkpoint, "read_config", read_without)
    loop.train(dataclasses.replace(config, steps=3), resume="auto")
    other = dataclasses.replace(config, steps=4, loss=dataclasses.replace(config.loss, kl=1e-3))
    with pytest.raises(ValueError, match=r"written with loss\.kl = 1e-06, not 0\.001"):
        loop.train(other, resume="auto")


def test_what_fails_while_a_run_trains_is_no_fault_of_its_settings(config, monkeypatch):
    """So that it ends with another status, after which the launch scripts start again."""

    def fail(bar, metrics, counts):
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(loop, "report", fail)
    with pytest.raises(RuntimeError, match=r"training failed: .*Stale file handle"):
        loop.train(config)
