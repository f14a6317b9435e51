import functools
import io
import json
import types

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import SessionLog

from zipir_jax.training import log
from zipir_jax.training.log import MetricsLog

IMAGES, SECONDS = 4, 2.0  # of each step


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """The clock on the wall, which stands still unless a test or `train` moves it."""
    clock = types.SimpleNamespace(seconds=1_700_000_000.0)
    monkeypatch.setattr(log, "now", lambda: clock.seconds)
    monkeypatch.setattr(log, "LOG_EVERY", 3)
    return clock


def train(writer, clock, steps, metrics=None):
    """Steps of SECONDS, half a second of it waiting for data, 3 TFLOP each."""
    for step in steps:
        clock.seconds += SECONDS
        values = {"loss": float(step**2)} if metrics is None else metrics(step)
        writer.add(step, values, images=IMAGES, flops=3 * 10**12, seconds=SECONDS, data_seconds=0.5)


def read(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON")) for line in lines]


def column(folder, name):
    return [line[name] for line in read(folder)]


@pytest.fixture(name="events")
def make_events(tensorboard_events):
    return tensorboard_events


@pytest.fixture(name="scalars")
def make_scalars(events):
    return functools.partial(shown_scalars, events)


def shown_scalars(events, folder, name):
    """(step, value) that TensorBoard shows: a session's start takes away what is there of its step and later ones."""
    shown = []
    for event in events(folder):
        if event.session_log.status == SessionLog.START:
            shown = [(step, value) for step, value in shown if step < event.step]
        shown += [(event.step, value.simple_value) for value in event.summary.value if value.tag == name]
    return shown


def test_a_line_holds_the_means_since_the_line_before(tmp_path, clock):
    folder = tmp_path / "run"
    writer = MetricsLog(folder, 0)
    train(
        writer,
        clock,
        range(1, 6),
        lambda step: {"loss": 1.0 * step**2} | ({"weight": 2.0 * step} if step > 2 else {}),
    )
    writer.write()
    writer.write()  # nothing new: no line
    of_steps = {"images_per_second": 2.0, "step_seconds": 2.0, "data_wait": 0.25, "tflops_per_second": 1.5}
    assert read(folder) == [
        {"step": 3, "loss": 4.66667, "weight": 6.0}
        | of_steps
        | {"seconds": 6.0, "wall_seconds": 6.0, "goodput": 1.0, "time": 1_700_000_006.0},
        {"step": 5, "loss": 20.5, "weight": 9.0}
        | of_steps
        | {"seconds": 10.0, "wall_seconds": 10.0, "goodput": 1.0, "time": 1_700_000_010.0},
    ]


def test_steps_of_different_length_count_by_their_time(tmp_path):
    writer = MetricsLog(tmp_path, 0, peak=10e12)
    sizes = [(1, 1e12, 1.0, 1.0), (7, 7e12, 1.0, 0.0), (8, 2e12, 3.0, 0.0)]
    for step, (images, flops, seconds, data_seconds) in enumerate(sizes, 1):
        writer.add(step, {}, images=images, flops=flops, seconds=seconds, data_seconds=data_seconds)
    (line,) = read(tmp_path)
    assert line["images_per_second"] == 3.2
    assert line["step_seconds"] == 1.66667
    assert line["data_wait"] == 0.2
    assert line["tflops_per_second"] == 2.0
    assert line["mfu"] == 0.2


def test_values_that_are_not_finite_are_left_out(tmp_path, clock, scalars):
    values = {"loss": [1.0, np.nan, 3.0], "norm": [np.inf, 2.0, -np.inf], "never": [np.nan] * 3}
    writer = MetricsLog(tmp_path, 0)
    train(
        writer, clock, range(1, 4), lambda step: {name: column[step - 1] for name, column in values.items()}
    )
    writer.close()
    (line,) = read(tmp_path)
    assert (line["loss"], line["norm"]) == (2.0, 2.0)
    assert "never" not in line
    assert line["images_per_second"] == 2.0  # the steps themselves count
    assert scalars(tmp_path, "loss") == [(3, 2.0)]
    assert scalars(tmp_path, "never") == []


def test_a_resumed_run_drops_the_lines_that_it_will_write_again(tmp_path, clock):
    writer = MetricsLog(tmp_path, 0)
    train(writer, clock, range(1, 10))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')  # killed while writing
    writer = MetricsLog(tmp_path, 7)
    assert column(tmp_path, "step") == [3, 6]
    train(writer, clock, (8, 9), lambda step: {"loss": 5.0})
    assert column(tmp_path, "step") == [3, 6, 9]
    assert column(tmp_path, "loss")[-1] == 5


def test_goodput_is_the_share_of_the_time_whose_training_was_kept(tmp_path, clock):
    writer = MetricsLog(tmp_path, 0)
    clock.seconds += 4  # compiling
    train(writer, clock, range(1, 9))
    writer.write()
    assert column(tmp_path, "goodput") == [0.6, 0.75, 0.8]
    # Killed after the checkpoint of step 6: the four seconds of steps 7 and 8 are lost, a quarter of an hour passes.
    clock.seconds += 900
    writer = MetricsLog(tmp_path, 6)
    train(writer, clock, range(7, 10))
    assert column(tmp_path, "seconds") == [6, 12, 18]
    assert column(tmp_path, "wall_seconds") == [10, 16, 926]
    assert column(tmp_path, "goodput")[-1] == round(18 / 926, 4)
    # And once more: the start is that of the first run, not of the second.
    clock.seconds += 74
    writer = MetricsLog(tmp_path, 9)
    train(writer, clock, range(10, 13))
    assert column(tmp_path, "wall_seconds")[-1] == 1006


def test_a_clock_that_was_set_back_does_no_harm(tmp_path, clock):
    writer = MetricsLog(tmp_path, 0)
    clock.seconds -= 3600
    train(writer, clock, range(1, 4))
    assert column(tmp_path, "goodput") == [1.0]


def test_a_run_that_starts_anew_starts_the_file_anew(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 20, "seconds": 9.0}\n')
    MetricsLog(tmp_path, 0)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


# --------------------------------------------------------------------------------------------------
# TensorBoard
# --------------------------------------------------------------------------------------------------


def test_tensorboard_shows_what_the_lines_hold(tmp_path, clock, events, scalars):
    writer = MetricsLog(tmp_path, 0, peak=2e12)
    train(writer, clock, range(1, 8))
    writer.close()  # with the line of the seventh step
    lines = read(tmp_path)
    assert [line["step"] for line in lines] == [3, 6, 7]
    for name in lines[0].keys() - {"step", "time"}:
        expected = [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines]
        assert scalars(tmp_path, name) == expected
    times = [event.wall_time for event in events(tmp_path) if event.summary.value]
    assert sorted(set(times)) == [line["time"] for line in lines]


def test_tensorboard_shows_a_resumed_run_as_one(tmp_path, clock, scalars):
    # All within one second of the machine's clock, by which the event files are named.
    for start, last in ((0, 9), (6, 9), (9, 12)):
        writer = MetricsLog(tmp_path, start)
        train(
            writer,
            clock,
            range(start + 1, last + 1),
            lambda step, start=start: {"loss": 100.0 * start + step},
        )
        writer.close()
    assert scalars(tmp_path, "loss") == [(3, 2.0), (6, 5.0), (9, 608.0), (12, 911.0)]


def test_tensorboard_shows_grids(tmp_path, clock, events):
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    writer = MetricsLog(tmp_path, 0)
    writer.grid(50, image)
    writer.close()
    ((step, value),) = [(event.step, value) for event in events(tmp_path) for value in event.summary.value]
    assert (step, value.tag) == (50, "samples")
    shown = Image.open(io.BytesIO(value.image.encoded_image_string))
    np.testing.assert_array_equal(np.asarray(shown), image)


def test_what_was_logged_is_there_when_the_run_is_killed(tmp_path, clock):
    writer = MetricsLog(tmp_path, 0)
    train(writer, clock, range(1, 4))
    assert column(tmp_path, "step") == [3]  # without `close`
    writer.close()
