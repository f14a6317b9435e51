import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import skimage.data
from skimage.metrics import peak_signal_noise_ratio

from zipir_jax import evaluate, prepare
from zipir_jax.config import TASKS, SamplingConfig
from zipir_jax.data.degrade import apply_task
from zipir_jax.data.preview import GAP, LABEL_HEIGHT
from zipir_jax.imageio import read_image, resize, to_float, to_uint8
from zipir_jax.metrics.photographs import read_original
from zipir_jax.metrics.restoration import load_plain
from zipir_jax.models import sd_vae
from zipir_jax.models.lp_vae import decode, encode
from zipir_jax.photograph import write_image
from zipir_jax.restorer import Restorer, pad_by_reflection
from zipir_jax.weights import load_weights

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture
def photographs(tmp_path):
    """Folder of two photographs, the second of 70 x 73 pixels, which is no multiple of 16."""
    folder = tmp_path / "photographs"
    write_image(folder / "a.png", skimage.data.astronaut()[100:164, 200:264])
    write_image(folder / "b.png", skimage.data.coffee()[100:170, 200:273])
    return folder


def test_scores_a_folder(photographs, tiny_weights, tmp_path, call):
    status, out, _ = call(
        evaluate.main,
        *(
            "--hq",
            photographs,
            "--task",
            "mixture, sr16",
            "--weights",
            tiny_weights,
            "--steps",
            2,
            "--colour-correction",
            "adain",
            "--seed",
            3,
        ),
        *("--output", tmp_path / "new" / "results.json", "--pictures", tmp_path / "pictures"),
    )
    assert status == 0
    assert "### mixture: 8x smaller, blur sigma 2, noise sigma 40, JPEG quality 50; 2 pictures\n" in out
    assert "### sr16: 16x smaller; 2 pictures\n" in out
    contestants = ["bicubic", "D_f* without diffusion", "zipir_jax, 2 steps, colours by adain"]
    rows = [line.split(" | ")[0] for line in out.splitlines() if line.startswith("| ")]
    assert rows == 2 * ["| ", "| ---", *(f"| {name}" for name in contestants)]
    assert f"`python -m zipir_jax.evaluate --hq {photographs} --task 'mixture, sr16'" in out
    assert "Python 3." in out and "jax " in out

    report = json.loads((tmp_path / "new" / "results.json").read_text())
    assert report["seed"] == 3 and report["sampling"]["steps"] == 2
    assert report["colour_correction"] == "adain"
    assert list(report["tasks"]) == ["mixture", "sr16"]
    restorer = Restorer.load(str(tiny_weights))
    for task, result in report["tasks"].items():
        assert [picture["picture"] for picture in result["pictures"]] == ["a.png", "b.png"]
        assert [picture["size"] for picture in result["pictures"]] == [[64, 64], [64, 64]]
        assert list(result["means"]) == contestants
        for index, picture in enumerate(result["pictures"]):
            original = read_original(photographs / picture["picture"])
            lq = to_uint8(apply_task(to_float(original), TASKS[task], np.random.default_rng((3, index))))
            enlarged = to_uint8(resize(to_float(lq), 64, 64))
            without = restorer.restore(lq, size=(64, 64), denoise=False)
            # What the user finds on disk is what was scored.
            restored = to_uint8(
                read_image(tmp_path / "pictures" / f"{picture['picture'][0]}_{task}_restored.png")
            )
            options = {"sampling": SamplingConfig(steps=2), "colour_correction": "adain", "seed": 3}
            np.testing.assert_array_equal(restored, restorer.restore(lq, size=(64, 64), **options))
            for name, image in zip(contestants, (enlarged, without, restored), strict=True):
                expected = peak_signal_noise_ratio(original, image)
                assert picture["scores"][name]["psnr"] == pytest.approx(expected, abs=1e-3)
            comparison = to_uint8(
                read_image(tmp_path / "pictures" / f"{picture['picture'][0]}_{task}_comparison.png")
            )
            for column, image in enumerate((enlarged, restored, original)):
                left = column * (64 + GAP)
                np.testing.assert_array_equal(comparison[LABEL_HEIGHT:, left : left + 64], image)
                assert comparison[:LABEL_HEIGHT, left : left + 64].max() > 200  # a label
            # On the sheet of the photograph, which is small enough to be there whole, the input comes first.
            sheet = to_uint8(read_image(tmp_path / "pictures" / f"{picture['picture'][0]}_sheet.png"))
            pitch = LABEL_HEIGHT + 64
            row = sheet[list(report["tasks"]).index(task) * pitch :][:pitch]
            np.testing.assert_array_equal(row[LABEL_HEIGHT:, 64 + GAP :], comparison[LABEL_HEIGHT:])
            squares = lq.repeat(64 // len(lq), 0).repeat(64 // len(lq), 1)
            np.testing.assert_array_equal(row[LABEL_HEIGHT:, :64], squares)
    for path in [*(tmp_path / "pictures").iterdir(), tmp_path / "new" / "results.json"]:
        assert f"wrote {path}\n" in out


def test_the_same_command_gives_the_same_numbers(photographs, tiny_weights, tmp_path, call):
    results = []
    for run in ("1", "2"):
        status, out, _ = call(
            evaluate.main,
            *(
                "--hq",
                photographs,
                "--task",
                "sr8,sr8",
                "--weights",
                tiny_weights,
                "--steps",
                2,
                "--limit",
                1,
            ),
            *("--output", tmp_path / run),
        )
        assert status == 0 and out.count("###") == 1 and "1 picture\n" in out
        pictures = json.loads((tmp_path / run).read_text())["tasks"]["sr8"]["pictures"]
        for scores in pictures[0]["scores"].values():
            del scores["seconds"]
        results.append(pictures)
    assert len(results[0]) == 1 and results[0] == results[1]


def test_ablates_what_the_model_is_made_of(photographs, tiny_weights, tmp_path, call):
    arguments = ["--hq", photographs, "--limit", 1, "--task", "sr8", "--weights", tiny_weights, "--steps", 2]
    status, _, err = call(evaluate.main, *arguments, "--ablate", "--output", tmp_path / "results.json")
    assert status == 0, err
    result = json.loads((tmp_path / "results.json").read_text())["tasks"]["sr8"]
    assert list(result["means"]) == [
        "bicubic",
        "D_f without diffusion",
        "D_f, 2 steps",
        "D_f* without diffusion",
        "zipir_jax, 1 step",
        "zipir_jax, 8 steps",
        "zipir_jax, 2 steps",
    ]


def test_the_plain_restorer_decodes_by_d_f(tiny_weights):
    photograph = to_float(skimage.data.astronaut()[100:164, 200:264])
    restored = load_plain(tiny_weights).restore(photograph, scale=1, denoise=False)
    config, groups = load_weights(tiny_weights, ("statistics", "fine_decoder"))
    latent = encode(groups, config.lp_vae, jnp.asarray(pad_by_reflection(photograph[None], 128, 128)))
    decoded = np.asarray(decode(groups, config.lp_vae, latent))[0, 32:-32, 32:-32]
    np.testing.assert_allclose(restored, np.clip(decoded, -1, 1), atol=1e-4)


def test_reconstructs_what_nothing_was_done_to(tiny_weights, sd_vae_folder, tmp_path, call):
    original = skimage.data.astronaut()[100:164, 200:280]  # 80 pixels are padded to 96
    write_image(tmp_path / "hq" / "a.png", original)
    arguments = ["--hq", tmp_path / "hq", "--reconstruct", "--weights", tiny_weights]
    output = ["--output", tmp_path / "results.json", "--pictures", tmp_path / "pictures"]
    status, out, err = call(evaluate.main, *arguments, "--sd-vae", sd_vae_folder, *output)
    assert status == 0, err
    assert "### reconstruction, bicubic from 8x smaller; 1 picture\n" in out
    result = json.loads((tmp_path / "results.json").read_text())["tasks"]["reconstruction"]
    ours, theirs = "LP-VAE f32c64", "tiny-sd-vae f4c3"
    assert list(result["means"]) == ["bicubic", theirs, ours]
    restored = to_uint8(read_image(tmp_path / "pictures" / "a_reconstruction_restored.png"))
    config, weights = load_weights(tiny_weights, ("statistics", "fine_decoder"))
    image = np.pad(to_float(original), [(0, 0), (0, 16), (0, 0)], "symmetric")[None]
    expected = decode(weights, config.lp_vae, encode(weights, config.lp_vae, jnp.asarray(image)))
    expected = to_uint8(np.clip(np.asarray(expected[0, :, :80]), -1, 1))
    difference = np.abs(restored.astype(int) - expected)
    assert difference.max() <= 1  # level, where the two programs round differently
    score = result["pictures"][0]["scores"][ours]["psnr"]
    assert score == pytest.approx(peak_signal_noise_ratio(original, restored), abs=1e-3)


def test_an_sd_vae_reconstructs_alone(sd_vae_folder, tmp_path, call, monkeypatch):
    write_image(tmp_path / "hq" / "a.png", skimage.data.astronaut()[100:148, 200:264])
    arguments = ["--hq", tmp_path / "hq", "--reconstruct", "--sd-vae", sd_vae_folder]
    status, _, err = call(evaluate.main, *arguments, "--output", tmp_path / "results.json")
    assert status == 0, err
    result = json.loads((tmp_path / "results.json").read_text())
    assert list(result["tasks"]["reconstruction"]["means"]) == ["bicubic", "tiny-sd-vae f4c3"]
    assert (result["weights"], result["sd_vae"]) == (None, str(sd_vae_folder))

    def fail(*arguments):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(sd_vae, "decode", fail)
    status, _, err = call(evaluate.main, *arguments)
    assert status == 2 and err.splitlines()[-1].startswith(
        "error: 64 x 48 pixels need more memory than there is"
    )


def test_errors_of_reconstruction_are_one_sentence(photographs, tiny_weights, t5_folder, tmp_path, call):
    export = tmp_path / "export"
    assert call(prepare.main, "export", "--weights", tiny_weights, "--output", export)[0] == 0
    for arguments, message in [
        (["--sd-vae", t5_folder], "--sd-vae restores nothing: it needs --reconstruct"),
        (
            ["--reconstruct", "--sd-vae", t5_folder],
            "config.json has no sd_vae; `prepare import-sd-vae` writes",
        ),
        (
            ["--reconstruct", "--weights", export],
            "the weights have no fine_decoder; they hold coarse_encoder",
        ),
        (
            ["--reconstruct", "--ablate", "--weights", tiny_weights],
            "--ablate is of restorations: leave out --reconstruct",
        ),
        (
            ["--reconstruct"],
            "the default weights were exported without D_f, which --reconstruct decodes with",
        ),
    ]:
        status, out, err = call(evaluate.main, "--hq", photographs, *arguments)
        assert status == 2 and out == "" and message in err and err.count("\n") == 1


def test_errors_are_one_sentence(photographs, tiny_weights, tmp_path, call):
    (tmp_path / "empty").mkdir()
    write_image(tmp_path / "small" / "s.png", np.zeros((31, 40, 3), np.uint8))
    folder = ["--hq", photographs]
    for arguments, message in [
        ([*folder, "--task", "mixture,sr9"], "task 'sr9' is not one of sr8, sr16, mixture, fig4, fig4_x4"),
        ([*folder, "--task", ""], "task '' is not one of"),
        (["--hq", tmp_path / "absent"], "absent: no such folder"),
        (["--hq", tmp_path / "empty"], "empty holds no images"),
        (["--hq", photographs / "a.png"], "a.png: no such folder"),
        (["--photo", "coffee, mona_lisa"], "photo 'mona_lisa' is not one of astronaut, chelsea"),
        ([], "either --hq with a folder of photographs or --photo with a name"),
        (
            [*folder, "--photo", "astronaut"],
            "either --hq with a folder of photographs or --photo with a name",
        ),
        ([*folder, "--limit", "0"], "limit 0 is below 1"),
        ([*folder, "--seed", "4294967296"], "seed 4294967296 does not lie within 0 to 4294967295"),
        ([*folder, "--output", tmp_path], "exists and is not a regular file"),
        ([*folder, "--weights", tmp_path / "empty"], "empty: no weights here (config.json is missing)"),
        ([*folder, "--output", photographs / "a.png" / "results.json"], "a.png"),
    ]:
        status, out, err = call(evaluate.main, *arguments)
        assert status == 2 and out == ""
        assert err.startswith("error: ") and message in err and err.count("\n") == 1
    # Found once the work has begun: the last line, below the progress bar.
    for arguments, message in [
        (["--hq", tmp_path / "small"], "s.png: 40 x 31 pixels; both sides must be at least 32"),
        ([*folder, "--steps", "0"], "steps 0 is not at least 1"),
    ]:
        status, out, err = call(evaluate.main, *arguments, "--weights", tiny_weights)
        assert status == 2 and out == ""
        assert err.splitlines()[-1].startswith("error: ") and message in err.splitlines()[-1]
