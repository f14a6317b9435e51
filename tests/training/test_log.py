import json

import pytest

from zipir_jax.training import log
from zipir_jax.training.log import MetricsLog


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """A clock that goes on by one second whenever it is read."""
    ticks = iter(range(1000))
    monkeypatch.setattr(log.time, "monotonic", lambda: next(ticks))
    monkeypatch.setattr(log, "LOG_EVERY", 3)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_holds_the_means_since_the_line_before(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    writer = MetricsLog(path, 0, batch_size=4)
    for step in range(1, 6):
        writer.add(step, {"loss": float(step**2), **({"weight": 2.0 * step} if step > 2 else {})})
    writer.write()
    writer.write()  # nothing new: no line
    assert read(path) == [
        # 12 images in a second, 8 in the next
        {"step": 3, "loss": 4.66667, "weight": 6.0, "images_per_second": 12.0, "seconds": 1.0},
        {"step": 5, "loss": 20.5, "weight": 9.0, "images_per_second": 8.0, "seconds": 2.0},
    ]


def test_a_resumed_run_drops_the_lines_that_it_will_write_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsLog(path, 0, batch_size=1)
    for step in range(1, 10):
        writer.add(step, {"loss": 1.0})
    with path.open("a") as file:
        file.write('{"step": 9, "lo')  # killed while writing
    writer = MetricsLog(path, 7, batch_size=1)
    assert [line["step"] for line in read(path)] == [3, 6]
    for step in (8, 9):
        writer.add(step, {"loss": 5.0})
    lines = read(path)
    assert [line["step"] for line in lines] == [3, 6, 9]
    assert [line["seconds"] for line in lines] == [1, 2, 3]
    assert lines[-1]["loss"] == 5


def test_a_run_that_starts_anew_starts_the_file_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 20, "seconds": 9.0}\n')
    MetricsLog(path, 0, batch_size=1)
    assert path.read_text() == ""
