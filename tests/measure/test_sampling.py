import importlib.util
import json

import numpy as np
import pytest
import skimage.data
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

from zipir_jax import benchmark
from zipir_jax.config import SamplingConfig
from zipir_jax.measure import plot, sampling
from zipir_jax.metrics.photographs import degrade, read_original
from zipir_jax.metrics.scoring import BASELINE, UNDIFFUSED
from zipir_jax.photograph import write_image
from zipir_jax.restorer import Restorer


@pytest.fixture
def photographs(tmp_path):
    folder = tmp_path / "photographs"
    write_image(folder / "a.png", skimage.data.astronaut()[100:164, 200:264])
    write_image(folder / "b.png", skimage.data.coffee()[100:164, 200:264])
    return folder


def numbers(value, seconds=None):
    """One method's, for one picture: PSNR and LPIPS have the same value."""
    grids = {f"grid_{period}": 0.0 for period in (2, 4, 8, 16, 32)}
    return {"psnr": value, "lpips_vgg16": value, "lpips_alexnet": value, **grids, "seconds": seconds}


def rows_of(named, values, bicubic, tasks=("sr8",)):
    """`sampling.rows` of one picture. values: one a sampling."""
    scores = {BASELINE: numbers(bicubic), UNDIFFUSED: numbers(1.5)}
    scores |= {name: numbers(value) for name, value in zip(named, values, strict=True)}
    return sampling.rows([{"scores": dict.fromkeys(tasks, scores)}], list(tasks), named)


@pytest.mark.usefixtures("quick_compile")
def test_every_combination_restores_every_photograph(photographs, tiny_weights, tmp_path, call):
    output, picture = tmp_path / "new" / "samplings.json", tmp_path / "plots" / "samplings.png"
    settings = "--samplers", "ddim", "unipc", "--steps", 1, 2, "--task", "mixture,sr8", "--limit", 1
    command = "sampling", "--hq", photographs, *settings, "--weights", tiny_weights
    status, out, err = call(benchmark.main, *command, "--output", output, "--plot", picture)
    assert status == 0, err
    report = json.loads(output.read_text())
    names = ["ddim, 1 step", "ddim, 2 steps", "unipc, 1 step", "unipc, 2 steps"]
    methods = [BASELINE, UNDIFFUSED, *names]
    assert [(row["task"], row["method"]) for row in report["rows"]] == [
        (task, method) for task in ("mixture", "sr8") for method in methods
    ]
    assert [(row["sampler"], row["steps"], row["fidelity"]) for row in report["rows"][:4]] == [
        (None, None, None),
        (None, None, None),
        ("ddim", 1, 0),
        ("ddim", 2, 0),
    ]
    shown = [line.split(" | ")[0] for line in out.splitlines() if line.startswith("| ")]
    assert shown == 2 * ["| ", "| ---", *(f"| {method}" for method in methods)]
    assert "### sr8: 8x smaller; 1 picture\n" in out
    original = read_original(photographs / "a.png")
    restorer = Restorer.load(str(tiny_weights))
    for row in report["rows"]:
        if row["method"] == "unipc, 2 steps":
            lq = degrade(original, row["task"], 0, 0)
            restored = restorer.restore(lq, size=(64, 64), sampling=SamplingConfig(sampler="unipc", steps=2))
            assert row["psnr"] == pytest.approx(peak_signal_noise_ratio(original, restored), abs=1e-3)
    # The first task compiles for the second.
    assert all((row["seconds"] is None) == (row["task"] == "mixture") for row in report["rows"])
    with Image.open(picture) as image:
        assert (image.format, image.size) == ("PNG", (2 * plot.TASK_WIDTH, plot.HEIGHT))


@pytest.mark.usefixtures("quick_compile")
def test_an_interrupted_run_goes_on_where_it_stopped(photographs, tiny_weights, tmp_path, call, monkeypatch):
    command = "sampling", "--hq", photographs, "--samplers", "ddim", "--steps", 2, "--task", "sr8"
    command += "--weights", tiny_weights, "--output"
    output, restored, stops = tmp_path / "samplings.json", [], False

    def interruptible(original, task, seed, index):
        if index == 1 and stops:
            raise KeyboardInterrupt
        restored.append(index)
        return degrade(original, task, seed, index)

    monkeypatch.setattr(sampling, "degrade", interruptible)
    assert call(benchmark.main, *command, tmp_path / "whole.json")[0] == 0
    stops = True
    assert call(benchmark.main, *command, output)[0] == 130
    assert [picture["picture"] for picture in json.loads(output.read_text())["pictures"]] == ["a.png"]
    stops = False
    assert call(benchmark.main, *command, output)[0] == 0
    assert restored == [0, 1, 0, 1]  # the whole run's, the interrupted one's, and what was left
    status, _, _ = call(benchmark.main, *command, output)
    assert status == 0 and len(restored) == 4  # nothing is left, and nothing is lost
    found, whole = (json.loads(path.read_text())["pictures"] for path in (output, tmp_path / "whole.json"))
    for picture in found + whole:
        for scores in picture["scores"]["sr8"].values():
            del scores["seconds"]
    assert found == whole and len(found) == 2

    # Numbers of other settings or photographs are not taken for these.
    before = output.read_bytes()
    for other, message in [
        (["--seed", 1], "was begun with other settings (seed);"),
        (["--task", "sr8,sr16", "--steps", 3], "was begun with other settings (tasks, sampling);"),
        (["--limit", 1], "holds 2 photographs, which are not the first of the 1 to restore"),
    ]:
        status, out, err = call(benchmark.main, *command, output, *other)
        assert status == 2 and out == "" and f"{output}: {message}" in err
    (photographs / "a.png").rename(photographs / "c.png")
    status, _, err = call(benchmark.main, *command, output)
    assert status == 2 and "holds 2 photographs, which are not the first of the 2 to restore" in err
    assert output.read_bytes() == before
    for content in ("{}", "nothing", "[]"):
        output.write_text(content)
        status, _, err = call(benchmark.main, *command, output)
        assert status == 2 and f"{output}: exists and is no report of samplings" in err


def test_seconds_are_the_median_of_those_that_do_not_compile():
    named = sampling.samplings(("ddim",), (4,), (0.0,))
    pictures = [
        {"scores": {"sr8": {BASELINE: numbers(20.0, None), "ddim, 4 steps": numbers(21.0, seconds)}}}
        for seconds in (None, 1.0, 2.0, 30.0)
    ]
    bicubic, ddim = sampling.rows(pictures, ["sr8"], named)
    assert bicubic["seconds"] is None and ddim["seconds"] == 2
    assert ddim["psnr_gain"] == 1 and ddim["psnr_std"] == 0


def test_names_of_combinations_are_distinct():
    named = sampling.samplings(("ddim", "unipc"), (4, 8), (0.0, 0.25, 0.5))
    assert len(named) == 12
    assert named["unipc, 8 steps, fidelity 0.25"] == SamplingConfig(sampler="unipc", steps=8, fidelity=0.25)
    assert named["ddim, 4 steps"] == SamplingConfig(steps=4)
    assert sampling.samplings(("ddim", "ddim"), (4, 4), (0.0,)).keys() == {"ddim, 4 steps"}


def test_errors_are_one_sentence(photographs, tiny_weights, tmp_path, call, monkeypatch):
    folder = ["--hq", photographs]
    for arguments, message in [
        ([*folder, "--samplers", "ddim", "euler"], "sampler 'euler' is not one of"),
        ([*folder, "--samplers"], "samplers is empty: give one or more"),
        ([*folder, "--steps", 0], "steps 0 is not at least 1"),
        ([*folder, "--steps", 1001], "1001"),
        ([*folder, "--fidelities", 0, 1.5], "fidelity 1.5"),
        ([*folder, "--task", "sr9"], "task 'sr9' is not one of sr8, sr16, mixture, fig4, fig4_x4"),
        ([*folder, "--limit", 0], "limit 0 is below 1"),
        ([*folder, "--seed", -1], "seed -1 does not lie within 0 to 4294967295"),
        ([*folder, "--plot", tmp_path / "plot.jpg"], "plot.jpg: the name of a PNG file ends in .png"),
        ([*folder, "--output", tmp_path], "exists and is not a regular file"),
        (["--hq", tmp_path / "absent"], "absent: no such folder"),
    ]:
        status, out, err = call(benchmark.main, "sampling", *arguments, "--weights", tiny_weights)
        assert status == 2 and out == ""
        assert err.startswith("error: ") and message in err and err.count("\n") == 1
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    status, _, err = call(benchmark.main, "sampling", *folder, "--plot", tmp_path / "plot.png")
    assert status == 2 and err.startswith("error: a plot needs matplotlib, which this Python lacks; ")


def test_a_line_a_sampler_over_the_steps():
    named = sampling.samplings(("ddim", "unipc"), (8, 4), (0.0,))
    figure = plot.samplings_figure(rows_of(named, [1.0, 2.0, 3.0, 4.0], bicubic=5.0, tasks=("sr8", "sr16")))
    assert len(figure.axes) == 6
    for panel in figure.axes:
        lines = {line.get_label(): np.asarray(line.get_data(), float).tolist() for line in panel.lines}
        assert lines["ddim"] == [[4, 8], [2, 1]] and lines["unipc"] == [[4, 8], [4, 3]]
        assert lines[BASELINE][1] == [5, 5] and lines[UNDIFFUSED][1] == [1.5, 1.5]
        low, high = panel.get_ylim()
        assert low < 1 and high > 5 and panel.get_xlabel() in ("", "steps")
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["ddim", "unipc", UNDIFFUSED, BASELINE]


def test_a_line_a_sampler_and_steps_over_the_fidelity(tmp_path):
    named = sampling.samplings(("ddim",), (4, 8), (0.0, 0.5))
    rows = rows_of(named, [1.0, 2.0, 3.0, 4.0], bicubic=5.0)
    panel = plot.samplings_figure(rows).axes[0]
    lines = {line.get_label(): np.asarray(line.get_data(), float).tolist() for line in panel.lines}
    assert lines["ddim, 4 steps"] == [[0, 0.5], [1, 2]] and lines["ddim, 8 steps"] == [[0, 0.5], [3, 4]]
    plot.plot_samplings(tmp_path / "plot.png", rows)
    with Image.open(tmp_path / "plot.png") as image:
        assert image.size == (plot.TASK_WIDTH, plot.HEIGHT)


@pytest.mark.parametrize("bicubic", [-300.0, 300.0])
def test_the_scale_is_the_samplers(bicubic):
    """A baseline far away is told as a number, and differences too small to be seen are not blown up."""
    named = sampling.samplings(("ddim",), (4, 8), (0.0,))
    for panel in plot.samplings_figure(rows_of(named, [1.5, 1.5 + 1e-6], bicubic)).axes:
        assert BASELINE not in {line.get_label() for line in panel.lines}
        (text,) = panel.texts
        assert f"{bicubic:g}" in text.get_text()
        low, high = panel.get_ylim()
        assert low < 1.5 < high
    least = plot.MEASURES["psnr"][1]
    psnr = plot.samplings_figure(rows_of(named, [1.5, 1.5 + 1e-6], bicubic)).axes[0]
    assert least <= np.ptp(psnr.get_ylim()) < 1.5 * least


def test_no_two_lines_look_alike():
    named = sampling.samplings(("ddim", "unipc", "dpm-solver++"), (4, 8, 12, 25), (0.0, 0.5))
    panel = plot.samplings_figure(rows_of(named, range(24), bicubic=5.0)).axes[0]
    looks = {(line.get_color(), line.get_marker(), str(line.get_linestyle())) for line in panel.lines}
    assert len(looks) == 12 + 2
