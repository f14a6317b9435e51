"""What several test files share: a model of some thousand random weights on disk, entry points run in process."""

import dataclasses
import functools
import os
import sys
from pathlib import Path

# Before jax is imported: programs that took long to compile are kept from one run of the tests to the next, and the
# cache of the user who runs them is left alone.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "jax"))

import pytest

from zipir_jax.command_line import run
from zipir_jax.config import MODELS, AutoencoderConfig, DiTConfig, LPVAEConfig, ModelConfig

TINY = dataclasses.replace(
    MODELS["small"],
    lp_vae=LPVAEConfig(
        coarse=AutoencoderConfig(
            latent_channels=9,
            decoder_channels=12,
            base_channels=4,
            multipliers=(1, 1, 2),
            blocks_per_scale=1,
            patch=2,
            unfold=True,
            pixel_channels=4,
            compute_dtype="float32",
        ),
        fine=AutoencoderConfig(
            latent_channels=52,
            decoder_channels=64,
            base_channels=4,
            multipliers=(1, 1, 2, 2),
            blocks_per_scale=1,
            patch=4,
            unfold=True,
            pixel_channels=4,
            compute_dtype="float32",
        ),
    ),
    dit=DiTConfig(layers=2, width=32, heads=2, text_width=0, compute_dtype="float32"),
)


@pytest.fixture(scope="session")
def tiny_model() -> ModelConfig:
    """The shape of the default weights (patches, no text), as small as it can be."""
    return TINY


def save_random_weights(folder: Path, model: ModelConfig) -> Path:
    """All groups; no layer is left at zero, so everything acts."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from zipir_jax.weights import abstract_weights, save_weights

    generator = np.random.default_rng(0)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        if "std" in name or "scale" in name:  # statistics and norms
            return jnp.ones(leaf.shape, leaf.dtype)
        if len(leaf.shape) == 1 or "mean" in name:
            return jnp.zeros(leaf.shape, leaf.dtype)
        # Small enough that a restored image keeps clear of black and white, where differences would be clipped.
        inputs = np.prod(leaf.shape[-len(leaf.shape) : -1])
        return jnp.asarray(generator.normal(0, 0.7 / np.sqrt(inputs), leaf.shape), leaf.dtype)

    save_weights(folder, model, jax.tree_util.tree_map_with_path(draw, abstract_weights(model)))
    return folder


@pytest.fixture(scope="session")
def tiny_weights(tiny_model, tmp_path_factory) -> Path:
    """Folder with random weights of `tiny_model`."""
    return save_random_weights(tmp_path_factory.mktemp("weights") / "tiny", tiny_model)


@pytest.fixture
def call(monkeypatch, capsys):
    """`call(main, *arguments)` runs an entry point in this process: (exit status, stdout, stderr)."""

    def call(main, *arguments):
        monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            run(main)
        printed = capsys.readouterr()
        return stopped.value.code or 0, printed.out, printed.err

    return call


def random_params(module_class, config, seed=0):
    """Parameters of which none is zero, so that every layer acts.

    Drawn by numpy: compiling `init_params` takes longer than most tests.
    """
    import jax
    import numpy as np

    from zipir_jax.models.layers import abstract_params

    generator = np.random.default_rng(seed)

    def leaf(path, abstract):
        if path[-1].key == "scale":  # of a norm
            return generator.uniform(0.5, 1.5, abstract.shape).astype(np.float32)
        deviation = 0.1 if path[-1].key == "bias" else 1 / np.sqrt(np.prod(abstract.shape[:-1]))
        return generator.normal(0, deviation, abstract.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(leaf, abstract_params(module_class, config))


@pytest.fixture(name="random_params", scope="session")
def give_random_params():
    """`random_params(module_class, config, seed=0)`, as above."""
    return random_params


@pytest.fixture(scope="module")
def quick_compile():
    """Programs compile several times faster, once each, and run slower: for tests that compile much, compute little.

    In this process and in those that it starts.
    """
    import jax

    quick = {"jax_disable_most_optimizations": True, "jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: jax.config.values[name] for name in quick}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in quick.items():
            jax.config.update(name, value)
            patch.setenv(name.upper(), str(value))
        yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def quick_lpips():
    """A distance that compiles at once in place of LPIPS; tests/training/test_coarse.py trains with the real one."""
    import numpy as np

    stand_in = (
        {"factor": np.float32(1.5)},
        lambda params, a, b: params["factor"] * ((a - b) ** 2).mean((1, 2, 3)),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zipir_jax.training.losses.load_lpips", lambda net: stand_in)
        yield


@pytest.fixture(name="idle_steps")
def make_idle_steps(monkeypatch):
    """Steps that change no parameter and grids that show the data: nothing takes long to compile."""
    import numpy as np

    from zipir_jax.training import loop
    from zipir_jax.training.stages import STAGES

    def step(config, adversarial, state, frozen, batch):
        metrics = {"loss": np.float32(1.0), "skipped_in_a_row": np.int32(0)}
        return state | {"step": state["step"] + 1}, metrics

    monkeypatch.setattr(loop, "train_step", step)
    for stage in STAGES.values():
        monkeypatch.setattr(stage, "preview", lambda config, generator, frozen, batch, key: [batch["image"]])


def foreign_model(kind):
    """Another project's tiny model, "t5" or "sd_vae", in tests/parity: (config.json, tensors by name, other arrays)."""
    import json

    import numpy as np

    with np.load(Path(__file__).parent / "parity" / f"{kind}.npz") as file:
        arrays = dict(file)
    tensors = {name[8:]: arrays.pop(name) for name in list(arrays) if name.startswith("weights/")}
    if kind == "t5":
        del tensors["encoder.embed_tokens.weight"]  # is shared.weight, and stands in no file a second time
    return json.loads(str(arrays.pop("config"))), tensors, arrays


def write_foreign_model(folder, kind, config, tensors):
    """A folder in the hub's layout, T5 with a tokenizer of 34 tokens that knows the small letters of HARBOUR."""
    import json

    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    stem = {"t5": "model", "sd_vae": "diffusion_pytorch_model"}[kind]
    save_file(tensors, folder / f"{stem}.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    if kind == "t5":
        (folder / "spiece.model").write_bytes(spiece_model())
        (folder / "tokenizer_config.json").write_text(json.dumps({"extra_ids": 4}))
    return folder


HARBOUR = "a photograph of a harbour at night, the boats are blurry and noisy"


@functools.cache
def spiece_model():
    """A tokenizer of T5's kind and token numbers, as sentencepiece writes it."""
    import io

    import sentencepiece

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([HARBOUR] * 8),
        model_writer=written,
        vocab_size=60,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return written.getvalue()


TINY_T5 = "t5-3x16-4cfc5c61e294"  # `TextEncoder.name` of the tiny T5 of tests/parity, in any dtype


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory):
    """The tiny T5 of tests/parity with a tokenizer, as `prepare import-t5` writes it, float32."""
    from zipir_jax.text_encoder import import_encoder

    config, tensors, _ = foreign_model("t5")
    folder = tmp_path_factory.mktemp("t5")
    hub = write_foreign_model(folder / "hub" / "tiny-t5", "t5", config, tensors)
    import_encoder(str(hub), folder / "ours", "float32")
    return folder / "ours"


@pytest.fixture(scope="session")
def sd_vae_folder(tmp_path_factory):
    """The tiny AutoencoderKL of tests/parity, as `prepare import-sd-vae` writes it, float32."""
    from zipir_jax.weights.foreign import import_weights, read_config

    config, tensors, _ = foreign_model("sd_vae")
    folder = tmp_path_factory.mktemp("sd_vae")
    hub = write_foreign_model(folder / "hub", "sd_vae", config, tensors)
    import_weights("sd_vae", hub, "tiny-sd-vae", read_config("sd_vae", hub), folder / "ours")
    return folder / "ours"
