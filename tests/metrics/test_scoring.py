import numpy as np
import pytest
import skimage.data
from skimage.metrics import peak_signal_noise_ratio

from zipir_jax.config import TASKS, RestorationConfig, SamplingConfig
from zipir_jax.metrics.fidelity import GRID_PERIODS, LPIPS_NETS, grid_energy, lpips_to
from zipir_jax.metrics.scoring import Reference, describe, describe_restoration, run_methods, summarise, table


def numbers(psnr, lpips_vgg16=0.5, lpips_alexnet=0.4, grid=1.0, seconds=1.0):
    """`grid` is the energy at a period of 8 pixels; elsewhere there is none."""
    values = {"psnr": psnr, "lpips_vgg16": lpips_vgg16, "lpips_alexnet": lpips_alexnet}
    for period in GRID_PERIODS:
        values |= {f"grid_{period}": -0.5}
    values = {name: float(value) for name, value in (values | {"grid_8": grid}).items()}
    return values | {"seconds": seconds if seconds is None else float(seconds)}


def test_scores_are_those_of_the_8_bit_picture():
    original = skimage.data.astronaut()[100:164, 200:264]
    noise = np.random.default_rng(0).normal(0, 20, original.shape)
    restored = np.clip(original + noise, 0, 255).astype(np.uint8)
    score = Reference(original).score(restored)
    assert score["psnr"] == pytest.approx(peak_signal_noise_ratio(original, restored), abs=1e-4)
    a, b = (picture.astype(np.float32) / 127.5 - 1 for picture in (original, restored))
    for net in LPIPS_NETS:
        assert score[f"lpips_{net}"] == pytest.approx(lpips_to(a, net)(b), rel=1e-3)
    for period in GRID_PERIODS:
        assert score[f"grid_{period}"] == grid_energy(b, a)[period]
    with pytest.raises(ValueError, match=r"\(32, 64, 3\)"):
        Reference(original).score(restored[:32])


def test_rows_are_means_gains_and_ratios_of_means():
    scores = [
        {"bicubic": numbers(20, 0.6, 0.8, 0, None), "ours": numbers(22, 0.3, 0.2, 6, 2)},
        {"bicubic": numbers(26, 0.2, 0.4, 0, 0.3), "ours": numbers(25, 0.1, 0.1, 2, 4)},
    ]
    rows = summarise(scores)
    assert list(rows) == ["bicubic", "ours"]
    assert rows["ours"] == pytest.approx(
        {
            "psnr": 23.5,
            "psnr_std": 1.5 * 2**0.5,
            "psnr_gain": 0.5,
            "lpips_vgg16": 0.2,
            "lpips_vgg16_ratio": 0.5,
            "lpips_alexnet": 0.15,
            "lpips_alexnet_ratio": 0.25,
            "grid": 2,
            "grid_period": 8,
            "seconds": 3,
        }
    )
    assert rows["bicubic"]["psnr_gain"] == 0 and rows["bicubic"]["lpips_vgg16_ratio"] == 1


def test_a_sampling_is_told_by_its_steps_and_what_is_not_as_by_default():
    assert describe_restoration(RestorationConfig()) == "25 steps"
    sampling = SamplingConfig(sampler="unipc", steps=8, fidelity=0.5)
    shown = describe_restoration(RestorationConfig(sampling, "lab"))
    assert shown == "8 steps, sampler unipc, fidelity 0.5, colours by lab"


def test_table_from_known_numbers():
    rows = summarise(
        [
            {"bicubic": numbers(20, 0.6, 0.8, 1, 0.01), "ours": numbers(22, 0.3, 0.2, 6, 2)},
            {"bicubic": numbers(26, 0.2, 0.4, 1, 0.01), "ours": numbers(23, 0.1, 0.1, 2, 4)},
        ]
    )
    assert table(rows).splitlines() == [
        "|  | PSNR, dB | vs bicubic, dB | LPIPS-VGG16 (/ bicubic) | LPIPS-AlexNet (/ bicubic) "
        "| grid, levels (period) | s / picture |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| bicubic | 23.00 ± 4.24 | +0.00 | 0.4000 (1.00) | 0.6000 (1.00) | 1.00 (8) | 0.01 |",
        "| ours | 22.50 ± 0.71 | -0.50 | 0.2000 (0.50) | 0.1500 (0.25) | 2.00 (8) | 3.00 |",
    ]


def test_one_flat_picture_has_neither_spread_nor_ratios():
    flat = numbers(200, 0, 0, 0, None)
    rows = summarise([{"bicubic": flat}])
    undefined = {key for key, value in rows["bicubic"].items() if value is None}
    assert undefined == {"psnr_std", "lpips_vgg16_ratio", "lpips_alexnet_ratio", "seconds"}
    assert "| 200.00 | +0.00 | 0.0000 (-) | 0.0000 (-) | 0.00 (8) | - |" in table(rows)


def test_compiling_is_not_timed(monkeypatch):
    """The first call of each size takes 100 s, others 1 s."""
    clock, seen, calls = [0.0], set(), []
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def restore(lq, size):
        clock[0] += 1 if size in seen else 100
        seen.add(size)
        calls.append(size)
        return np.zeros((*size, 3), np.uint8)

    lq, warm = np.zeros((2, 2, 3), np.uint8), set()
    timed = []
    for size in [(4, 4), (4, 4), (8, 4), (4, 4)]:
        pictures, seconds = run_methods({"ours": restore}, lq, size, warm)
        assert pictures["ours"].shape == (*size, 3)
        timed.append(seconds["ours"])
    assert timed == [None, 1, None, 1]
    assert len(calls) == 4  # nothing is restored for the clock alone


def test_tasks_in_words():
    assert describe(TASKS["mixture"]) == "8x smaller, blur sigma 2, noise sigma 40, JPEG quality 50"
    assert describe(TASKS["sr16"]) == "16x smaller"
