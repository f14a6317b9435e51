import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zipir_jax import planner
from zipir_jax.config import MODELS, SamplingConfig
from zipir_jax.measure.memory import compiled_bytes
from zipir_jax.measure.programs import denoising_programs
from zipir_jax.models.dit import DiT
from zipir_jax.models.lp_vae import FACTOR
from zipir_jax.planner import GIB, available_memory, denoise_bytes, make_plan, needed_bytes
from zipir_jax.restorer import Restorer, denoise_latent, in_compute_dtype

MIB = 2**20
SMALL = MODELS["small"]
# Wide enough for its weights to count, and with text.
WIDE = dataclasses.replace(
    MODELS["paper"],
    dit=dataclasses.replace(MODELS["paper"].dit, layers=2, width=512, heads=4, text_width=768),
)


@pytest.fixture(name="restorer", scope="module")
def make_restorer(tiny_weights):
    return Restorer.load(tiny_weights)


@pytest.fixture(name="photograph", scope="module")
def make_photograph():
    return np.random.default_rng(0).integers(0, 256, (60, 100, 3), np.uint8)


def needs(config, height, width, encode=None, decode=None, pictures=1, branches=1):
    size = planner.padded_size(config, height, width)
    return needed_bytes(
        config, *size, encode, decode, pictures, branches, False, False, planner.TEXT_BLOCK, "cpu"
    )


# --------------------------------------------------------------------------------------------------
# The choice
# --------------------------------------------------------------------------------------------------


def test_what_fits_runs_whole_and_as_many_as_fit_run_at_once():
    need = max(needs(SMALL, 1000, 700).values())
    plan = make_plan(SMALL, 1000, 700, available=need)
    assert (plan.encode, plan.decode, plan.pictures) == (None, None, 1)
    assert (plan.height, plan.width) == (1088, 768)  # a margin of 32 pixels, then multiples of 32
    assert make_plan(SMALL, 1000, 700, available=3 * need + 1, pictures=8).pictures == 3
    assert make_plan(SMALL, 1000, 700, available=3 * need + 1, pictures=4).pictures == 2  # and not 3 and 1
    assert make_plan(SMALL, 1000, 700, available=30 * need, pictures=8).pictures == 8


def test_what_does_not_fit_whole_runs_in_tiles_that_fit():
    whole = needs(SMALL, 2048, 2048)
    available = whole["decode"] // 2
    plan = make_plan(SMALL, 2048, 2048, available=available, pictures=4)
    assert plan.pictures == 1
    assert plan.decode is not None
    assert max(plan.needs.values()) <= available < whole["decode"]


def test_an_accelerators_convolutions_bound_what_runs_at_once_however_much_memory_there_is():
    paper, memory = MODELS["paper"], 2**45
    for platform in ("gpu", "tpu"):
        plan = make_plan(paper, 2048, 2048, available=memory, pictures=4, platform=platform)
        assert (plan.pictures, plan.encode, plan.decode) == (
            1,
            None,
            None,
        )  # two have more than 2^31 elements
        plan = make_plan(paper, 4096, 4096, available=memory, platform=platform)
        assert plan.encode is not None and plan.decode is not None
    assert make_plan(paper, 4096, 4096, available=memory, pictures=4, platform="cpu").pictures == 4


def test_a_tpu_needs_more_than_a_gpu_for_the_same():
    on_gpu, on_tpu = (
        make_plan(MODELS["paper"], 1024, 1024, available=2**45, platform=platform).needs
        for platform in ("gpu", "tpu")
    )
    assert all(on_tpu[phase] > need for phase, need in on_gpu.items())


def test_what_fits_in_no_way_is_refused_with_the_largest_size_that_fits():
    available = 100 * MIB
    with pytest.raises(ValueError) as refused:
        make_plan(SMALL, 2000, 4000, available=available)
    message = str(refused.value)
    assert re.match(
        r"4000 x 2000 pixels need \d+\.\d\d GiB to \w+, beside the weights, and 0\.09 GiB are free", message
    )
    width, height = (int(side) for side in re.search(r"that fits is (\d+) x (\d+)", message).groups())
    assert width == 2 * height
    make_plan(SMALL, height, width, available=available)
    step = FACTOR  # what is padded to the same size needs the same
    with pytest.raises(ValueError, match="the largest of this shape"):
        make_plan(SMALL, height + step, width + 2 * step, available=available)
    with pytest.raises(ValueError, match="too little for any picture"):
        make_plan(SMALL, 100, 200, available=MIB)


def test_the_free_memory_is_that_of_the_container_or_the_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(planner, "CGROUP", tmp_path)  # no container
    free = planner.psutil.virtual_memory().available
    assert 0.8 * free < available_memory() / planner.CPU_SHARE < 1.2 * free
    (tmp_path / "memory.max").write_text(f"{3 * GIB}\n")
    (tmp_path / "memory.current").write_text(f"{5 * GIB // 2}\n")
    # Half a GiB of it are pages of files, which make room when it is needed.
    (tmp_path / "memory.stat").write_text(f"anon {2 * GIB}\ninactive_file {GIB // 2}\n")
    assert available_memory() == planner.CPU_SHARE * GIB
    (tmp_path / "memory.current").write_text(f"{4 * GIB}\n")
    assert available_memory() == 0
    (tmp_path / "memory.max").write_text("max\n")  # a container without a limit
    assert available_memory() > GIB


# --------------------------------------------------------------------------------------------------
# The estimates, against XLA's accounts
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lq_attention", ["joint", "static"])
@pytest.mark.parametrize(
    ("model", "height", "width", "branches", "dtype"),
    [
        (SMALL, 34, 40, 1, "float32"),
        (SMALL, 66, 66, 1, "float32"),
        (SMALL, 98, 130, 1, "float32"),
        (WIDE, 34, 34, 1, "float32"),
        (WIDE, 66, 50, 2, "float32"),
        (WIDE, 66, 50, 1, "bfloat16"),
        (SMALL, 66, 66, 2, "float32"),
    ],
)
def test_denoising_needs_what_is_estimated(model, height, width, branches, dtype, lq_attention):
    # Weights without text have two branches only with a weak LQ latent; here, guided at some of the steps alone.
    weak_lq = 0.1 if branches == 2 and not model.dit.text_width else None
    interval = (0.2, 0.8) if weak_lq else (0.0, 1.0)
    dit = dataclasses.replace(model.dit, lq_attention=lq_attention, compute_dtype=dtype)
    config = dataclasses.replace(model, dit=dit)
    sampling = SamplingConfig(weak_lq=weak_lq, guidance_interval=interval)
    latent = jax.ShapeDtypeStruct((1, height, width, 64), jnp.float32)
    used = compiled_bytes(config, denoising_programs(config, sampling, latent, branches))["denoise"]
    weak = weak_lq is not None
    estimated = denoise_bytes(dit, height, width, 1, branches, weak, weak, planner.TEXT_BLOCK, "cpu")
    # In bfloat16, of which CPUs make float32 copies, jax 0.12 needs less than 0.10.
    assert (0.9 if dtype == "bfloat16" else 0.95) < estimated / used < 2


# --------------------------------------------------------------------------------------------------
# The result
# --------------------------------------------------------------------------------------------------


def test_tiles_and_parts_of_a_batch_change_nothing(restorer, photograph):
    batch = np.stack([photograph, photograph[::-1], photograph[:, ::-1]])
    fast = SamplingConfig(steps=2)
    whole = restorer.restore(batch, scale=5, sampling=fast)
    need = max(needs(restorer.config, 300, 500).values())
    for memory in (2 * need, need, need // 2):
        plan = restorer.plan(batch.shape, scale=5, memory=memory)
        assert (plan.pictures, plan.decode is None) == (memory // need or 1, memory >= need)
        restored = restorer.restore(batch, scale=5, sampling=fast, memory=memory)
        assert np.abs(restored.astype(int) - whole).max() <= 1


def test_weights_in_bfloat16_give_the_same_bits(random_params):
    dit = dataclasses.replace(
        WIDE.dit, width=64, heads=2, text_width=0, latent_channels=8, compute_dtype="bfloat16"
    )
    config = dataclasses.replace(SMALL, dit=dataclasses.replace(dit, latent_channels=64))
    params = random_params(DiT, config.dit)
    half = in_compute_dtype(config, {"dit": params})["dit"]
    kinds = {(leaf.dtype.name, path[-1].key) for path, leaf in jax.tree.leaves_with_path(half)}
    assert kinds == {("bfloat16", "kernel"), ("bfloat16", "bias"), ("float32", "scale")}
    statistics = {"latent_mean": jnp.zeros(64), "latent_std": jnp.ones(64)}
    latent = jax.random.normal(jax.random.key(0), (1, 5, 7, 64))

    @jax.jit
    def sample(params):
        weights = {"statistics": statistics, "dit": params}
        return denoise_latent(weights, config, SamplingConfig(steps=3), latent, jax.random.key(0)[None])

    np.testing.assert_array_equal(sample(half), sample(params))


def test_other_seeds_photographs_and_prompts_compile_nothing(restorer, photograph, random_params):
    compiled = []
    dit = dataclasses.replace(restorer.config.dit, text_width=24)
    config = dataclasses.replace(restorer.config, dit=dit)
    with_text = Restorer(config, restorer.weights | {"dit": random_params(DiT, dit)})
    rng = np.random.default_rng(0)

    def restore(seed, prompt, negative):
        text, negative_text = (rng.standard_normal((length, 24), np.float32) for length in (prompt, negative))
        return with_text.restore(
            photograph ^ seed,
            scale=1,
            seed=seed,
            sampling=SamplingConfig(steps=2),
            text=text,
            negative_text=negative_text,
        )

    def listen(event, duration, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(kwargs)

    first = restore(0, 5, 9)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        second = restore(1, 77, 3)
        assert not compiled
        assert np.abs(second.astype(int) - first).max() > 0
        restore(1, 200, 3)  # more than a block of tokens
        assert compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
