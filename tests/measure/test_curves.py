import json

import pytest
from PIL import Image

from zipir_jax import benchmark
from zipir_jax.measure import plot
from zipir_jax.measure.curves import read_run

LINES = [
    {"step": 20, "l1": 0.4, "loss": 0.5, "lpips": 0.1, "images_per_second": 10.0, "seconds": 60.0, "kl": 3.0},
    {"step": 30, "l1": 0.2, "loss": 0.3, "lpips": 0.1, "images_per_second": 20.0, "seconds": 90.0},
]


@pytest.fixture(name="run")
def make_run(tmp_path):
    folder = tmp_path / "runs" / "fine"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return folder


def test_a_run_tells_its_losses_over_time(run):
    assert read_run(run) == {
        "run": "fine",
        "steps": 30,
        "images": 60 * 10 + 30 * 20,
        "minutes": 1.5,
        "points": [
            {"step": 20, "minutes": 1.0, "loss": 0.5, "l1": 0.4, "lpips": 0.1},
            {"step": 30, "minutes": 1.5, "loss": 0.3, "l1": 0.2, "lpips": 0.1},
        ],
    }


def test_the_command_writes_table_numbers_and_plot(run, tmp_path, call):
    pytest.importorskip("matplotlib")
    files = ["--output", tmp_path / "new" / "curves.json", "--plot", tmp_path / "curves.png"]
    status, out, err = call(benchmark.main, "curves", "--runs", run, run, *files)
    assert status == 0, err
    assert out.count("| fine | 30 | 1200 | 2 | loss 0.3, l1 0.2, lpips 0.1 |\n") == 2
    assert json.loads((tmp_path / "new" / "curves.json").read_text())["runs"] == 2 * [read_run(run)]
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size == (2 * plot.TASK_WIDTH, plot.TASK_WIDTH)
    panel = plot.curves_figure([read_run(run)]).axes[0]
    assert {line.get_label(): line.get_xydata().tolist() for line in panel.lines} == {
        "loss": [[1.0, 0.5], [1.5, 0.3]],
        "l1": [[1.0, 0.4], [1.5, 0.2]],
        "lpips": [[1.0, 0.1], [1.5, 0.1]],
    }


def test_errors_are_one_sentence(run, tmp_path, call):
    (tmp_path / "empty").mkdir()
    (run.parent / "torn").mkdir()
    (run.parent / "torn" / "metrics.jsonl").write_text("")
    for arguments, message in [
        ([tmp_path / "empty"], "empty: no training ran here (metrics.jsonl is missing)"),
        ([run.parent / "torn"], "metrics.jsonl holds no step"),
        ([run, "--plot", tmp_path / "curves.jpg"], "curves.jpg: the name of a PNG file ends in .png"),
    ]:
        status, out, err = call(benchmark.main, "curves", "--runs", *arguments)
        assert status == 2 and out == ""
        assert err.startswith("error: ") and message in err and err.count("\n") == 1
