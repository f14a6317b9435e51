"""The restorer's sampling, against a sampler that computes everything anew at every step; progress, colours."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import skimage.data

from tests.conftest import TINY, random_params
from zipir_jax import restorer as restorer_module
from zipir_jax.colour import correct_colour
from zipir_jax.config import COLOUR_CORRECTIONS, SamplingConfig
from zipir_jax.diffusion.objective import predict_clean
from zipir_jax.diffusion.samplers import initial_noise, plan_steps, sample
from zipir_jax.diffusion.schedule import linear_schedule, sampling_timesteps, spaced_timesteps
from zipir_jax.imageio import resize, to_float, to_uint8
from zipir_jax.models.dit import DiT
from zipir_jax.models.layers import bind
from zipir_jax.models.lp_vae import whiten
from zipir_jax.restorer import PHASES, Restorer, branches_of, check_sampling, denoise_latent

pytestmark = pytest.mark.usefixtures("quick_compile")
WEAK = dataclasses.replace(
    TINY, diffusion=dataclasses.replace(TINY.diffusion, weak_lq_probability=0.1)
)  # fmt: skip
FAST = SamplingConfig(steps=3)


@pytest.fixture(name="restorer", scope="module")
def make_restorer(tiny_weights):
    return Restorer.load(tiny_weights)


@pytest.fixture(name="photograph", scope="module")
def make_photograph():
    """uint8 [24, 30, 3]."""
    return skimage.data.astronaut()[100:124, 200:230]


def ignore(phase, done):
    """Progress that nobody looks at."""


def by_hand(dit, config, sampling, lq, keys, text, negative_text):
    """`denoise_latent` by DDIM in a Python loop; the whole DiT, keys and values included, at every step and branch."""
    schedule = linear_schedule(config.diffusion)
    weak = lq if sampling.weak_lq is None else sampling.weak_lq * lq
    is_guided = negative_text is not None or sampling.weak_lq is not None
    timesteps = spaced_timesteps(round(1000 * sampling.start), sampling.steps)
    z = initial_noise(keys, lq.shape[1:])
    if sampling.start < 1:
        z = schedule.signal[timesteps[0]] * lq + schedule.noise[timesteps[0]] * z
    for t, following in zip(timesteps, [*timesteps[1:], None], strict=True):
        now = jnp.full(len(lq), t)
        v = dit(z, now, lq, **text)
        low, high = sampling.guidance_interval
        if is_guided and low <= (t + 1) / 1000 <= high:
            v_negative = dit(z, now, weak, **(text if negative_text is None else negative_text))
            v = v_negative + sampling.guidance * (v - v_negative)
        clean = schedule.signal[t] * z - schedule.noise[t] * v
        eps = schedule.noise[t] * z + schedule.signal[t] * v
        pulled = clean[..., :12] + sampling.fidelity * (lq - clean)[..., :12]
        pulled = jnp.concatenate([pulled, clean[..., 12:]], -1)
        eps += schedule.signal[t] / schedule.noise[t] * (clean - pulled)
        z = (
            pulled
            if following is None
            else schedule.signal[following] * pulled + schedule.noise[following] * eps
        )
    return z


@pytest.mark.parametrize("lq_attention", ["joint", "static"])
@pytest.mark.parametrize(
    ("with_negative", "options"),
    [
        (False, {}),
        (True, {}),
        (True, {"guidance_interval": (0.5, 0.9)}),
        (False, {"weak_lq": 0.1, "guidance": 2.0}),
        (True, {"weak_lq": 0.1, "guidance_interval": (0.3, 0.7)}),
        (False, {"start": 0.5, "fidelity": 0.6}),
        (True, {"guidance": 1.0}),
    ],
    ids=["plain", "guided", "interval", "weak", "weak interval", "from the LQ latent", "guidance 1"],
)
def test_the_cached_sampler_equals_one_by_hand(lq_attention, with_negative, options):
    dit = dataclasses.replace(TINY.dit, text_width=16, lq_attention=lq_attention)
    config, sampling = dataclasses.replace(WEAK, dit=dit), SamplingConfig(steps=3, **options)
    params, rng = random_params(DiT, dit), np.random.default_rng(0)
    mean, std = rng.normal(size=64).astype(np.float32), rng.uniform(0.5, 2, 64).astype(np.float32)
    weights = {"statistics": {"latent_mean": mean, "latent_std": std}, "dit": params}
    latent = rng.normal(size=(2, 3, 4, 64)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 2)
    text, negative = (
        {"text": rng.normal(size=(2, 5, 16)).astype(np.float32), "text_lengths": np.array(lengths)}
        for lengths in ((5, 2), (1, 4))
    )
    negative = negative if with_negative else None
    found = jax.jit(lambda *arrays: denoise_latent(weights, config, sampling, *arrays))(
        latent, keys, text, negative
    )
    bound, lq = bind(DiT, dit, params), (latent - mean) / std
    expected = jax.jit(lambda *arrays: by_hand(bound, config, sampling, *arrays))(lq, keys, text, negative)
    np.testing.assert_allclose((found - mean) / std, expected, rtol=1e-4, atol=2e-4)
    assert np.std(expected) > 0.1
    stepwise = restorer_module._denoise(config, sampling, weights, latent, keys, text, negative, ignore)
    np.testing.assert_allclose(stepwise, found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize(
    "options",
    [
        {"sampler": "unipc"},
        {"sampler": "dpm-solver++"},
        {"eta": 0.5},
        {"spacing": "linspace"},
        {"shift_tokens": 3},
    ],
    ids=str,
)
def test_every_setting_reaches_the_sampler(prediction, options):
    diffusion = dataclasses.replace(TINY.diffusion, prediction=prediction)
    config, sampling = dataclasses.replace(TINY, diffusion=diffusion), SamplingConfig(steps=5, **options)
    params, lq = random_params(DiT, TINY.dit), jax.random.normal(jax.random.key(1), (1, 3, 4, 64))
    weights = {"statistics": {"latent_mean": np.zeros(64), "latent_std": np.ones(64)}, "dit": params}
    keys, schedule, dit = (
        jax.random.split(jax.random.key(0), 1),
        linear_schedule(diffusion),
        bind(DiT, TINY.dit, params),
    )
    found = jax.jit(lambda sampling: denoise_latent(weights, config, sampling, lq, keys), static_argnums=0)
    expected = jax.jit(
        lambda: sample(
            predict_clean(lambda noisy, t: dit(noisy, t, lq), prediction, schedule),
            keys,
            initial_noise(keys, lq.shape[1:]),
            plan_steps(schedule, sampling_timesteps(schedule, sampling, 12), sampling.sampler, sampling.eta),
        )
    )()
    np.testing.assert_allclose(found(sampling), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    plain = found(SamplingConfig(steps=5))
    assert np.abs(plain - expected).max() > 1e-3 * np.abs(expected).max()


def test_a_residual_is_sampled_and_added_to_the_lq_latent():
    diffusion = dataclasses.replace(TINY.diffusion, residual=True)
    config, params = dataclasses.replace(TINY, diffusion=diffusion), random_params(DiT, TINY.dit)
    rng = np.random.default_rng(0)
    statistics = {name: rng.uniform(0.5, 2, 64).astype(np.float32) for name in ("latent_mean", "latent_std")}
    plain = {"statistics": statistics, "dit": params}
    residual = plain | {
        "statistics": statistics | {"residual_std": np.linspace(0.1, 2, 64, dtype=np.float32)}
    }
    latent, keys = rng.standard_normal((1, 3, 4, 64), np.float32), jax.random.split(jax.random.key(0), 1)
    white = functools.partial(whiten, statistics=statistics)
    latent = jnp.asarray(latent)

    def sampled(weights, **options):
        sampling = SamplingConfig(steps=3, **options)
        found = denoise_latent(weights, config, sampling, latent, keys)
        stepwise = restorer_module._denoise(config, sampling, weights, latent, keys, None, None, ignore)
        np.testing.assert_allclose(stepwise, found, rtol=1e-4, atol=1e-4)
        return white(found)

    # The DiT sees the same noise and the same LQ latent: what it makes of them is another thing.
    expected = white(latent) + residual["statistics"]["residual_std"] * sampled(plain)
    np.testing.assert_allclose(sampled(residual), expected, rtol=1e-4, atol=1e-4)
    held = sampled(residual, fidelity=1.0)
    np.testing.assert_allclose(held[..., :12], white(latent)[..., :12], atol=1e-4)
    assert jnp.abs(held - white(latent))[..., 12:].min(-1).max() > 1e-3
    # From a low level of noise the sampler cannot go far from the LQ latent.
    near, far = (jnp.abs(sampled(residual, start=start) - white(latent)).mean() for start in (0.02, 1.0))
    assert near < 0.3 * far


@pytest.mark.parametrize(
    ("config", "options", "sentence"),
    [
        (
            TINY,
            {"weak_lq": 0.1},
            "weak_lq 0.1 is for weights that were trained with weak LQ latents; these were not",
        ),
        (
            WEAK,
            {"weak_lq": 0.5},
            "weak_lq 0.5 lies outside of 0.05 to 0.25, which the weights were trained with",
        ),
        (TINY, {"guidance": 2.0}, "guidance 2 has no effect on weights that were trained without text"),
        (WEAK, {"guidance": 2.0}, "guidance 2 has no effect without a weak LQ latent; leave it out"),
        (WEAK, {"guidance": 1.0, "weak_lq": 0.1}, "weak_lq 0.1 has no effect with guidance 1"),
        (
            WEAK,
            {"weak_lq": 0.1, "guidance_interval": (0.97, 0.99)},
            "0.97 to 0.99 holds none of the 25 noise levels",
        ),
        (TINY, {"guidance_interval": (0.1, 0.5)}, "guidance_interval 0.1 to 0.5 has no effect"),
        (TINY, {"guidance_rescale": 0.7}, "guidance_rescale 0.7 has no effect"),
        (TINY, {"start": 0.01}, "25 sampling steps, and 10 noise levels up to start 0.01"),
    ],
)
def test_sampling_that_does_not_suit_the_weights_is_refused(config, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_sampling(config, SamplingConfig(**options))


def test_a_weak_lq_latent_makes_a_second_branch():
    check_sampling(WEAK, SamplingConfig(weak_lq=0.1, guidance=2.0, guidance_rescale=0.5))
    check_sampling(TINY, SamplingConfig(guidance=1.0))  # none, said aloud
    assert branches_of(SamplingConfig(weak_lq=0.1), has_negative_text=False) == 2
    assert branches_of(SamplingConfig(weak_lq=0.1, guidance=1.0), has_negative_text=True) == 1
    assert branches_of(SamplingConfig(), has_negative_text=False) == 1


# --------------------------------------------------------------------------------------------------
# Step by step
# --------------------------------------------------------------------------------------------------


def test_another_number_of_what_acts_is_no_other_program():
    """What acts or does not is one; how much of it, in how many steps of which sampler, is not."""
    dit = dataclasses.replace(TINY.dit, text_width=16, lq_attention="static")
    config, rng = dataclasses.replace(WEAK, dit=dit), np.random.default_rng(0)
    weights = {
        "statistics": {"latent_mean": np.zeros(64, np.float32), "latent_std": np.ones(64, np.float32)},
        "dit": random_params(DiT, dit),
    }
    latent, keys = rng.standard_normal((1, 3, 5, 64), np.float32), jax.random.split(jax.random.key(0), 1)
    text, negative = (
        {"text": rng.standard_normal((1, 5, 16), np.float32), "text_lengths": np.full(1, 5)} for _ in "ab"
    )

    def programs(**options):
        before = restorer_module._take_step._cache_size(), restorer_module._read._cache_size()
        sampling = SamplingConfig(**{"steps": 2} | options)
        arrays = latent, keys, text, negative
        results.append(restorer_module._denoise(config, sampling, weights, *arrays, ignore))
        after = restorer_module._take_step._cache_size(), restorer_module._read._cache_size()
        return tuple(np.subtract(after, before).tolist())

    results = []
    assert programs() == (1, 1)
    for options in (
        {"steps": 3},
        {"guidance": 2.0},
        {"sampler": "unipc", "steps": 4},
        {"sampler": "dpm-solver++", "spacing": "linspace"},
        {"shift_tokens": 3},
    ):
        assert programs(**options) == (0, 0), options
    for first, second in (
        ({"fidelity": 0.3}, {"fidelity": 0.7}),
        ({"eta": 0.5}, {"eta": 1.0}),
        ({"guidance_rescale": 0.3}, {"guidance_rescale": 0.7}),
        ({"weak_lq": 0.1}, {"weak_lq": 0.2}),
        ({"guidance_interval": (0.1, 0.6)}, {"guidance_interval": (0.6, 1.0)}),
        ({"start": 0.5}, {"start": 0.8}),
    ):
        assert sum(programs(**first)) > 0, first
        assert programs(**second) == (0, 0), second
    for i, result in enumerate(results):
        assert all(np.abs(result - other).max() > 1e-4 for other in results[:i])


@pytest.mark.parametrize("denoise", [True, False])
@pytest.mark.parametrize("pictures", [1, 2, 3])
@pytest.mark.parametrize("tiled", [False, True])
def test_progress_goes_from_0_to_1_in_every_phase(restorer, photograph, denoise, pictures, tiled):
    """Whatever is restored at once: 3 pictures in the memory of 2 are two parts, and in that of less than 1 tiles."""
    batch = np.stack([photograph] * pictures)
    options = {"scale": 10, "sampling": SamplingConfig(steps=4)}
    need = max(restorer.plan(photograph.shape, **options).needs.values())
    memory = need // 2 if tiled else 2 * need
    plan = restorer.plan(batch.shape, memory=memory, **options)
    assert (plan.pictures, plan.decode is None) == (1 if tiled else min(2, pictures), not tiled)
    told = []
    options |= {"memory": memory, "denoise": denoise, "progress": lambda *said: told.append(said)}
    restorer.restore(batch, **options)
    phases = PHASES if denoise else ("encode", "decode")
    assert list(dict(told)) == list(phases)  # in the order in which they begin
    for phase in phases:
        done = [share for name, share in told if name == phase]
        assert done == sorted(done) and (done[0], done[-1]) == (0, 1)
        parts = -(-pictures // plan.pictures)
        assert len(done) == parts * (5 if phase == "denoise" else 2)
    if denoise and pictures == 1:
        assert [share for name, share in told if name == "denoise"] == [0, 0.25, 0.5, 0.75, 1]


def test_what_progress_raises_ends_the_restoration_and_nothing_else(restorer, photograph, monkeypatch):
    begun, take_step = [], restorer_module._take_step
    sampling = SamplingConfig(steps=6)
    expected = restorer.restore(photograph, scale=1, sampling=sampling)

    def counted(*arguments):
        begun.append(arguments)
        return take_step(*arguments)

    def cancel(phase, done):
        if (phase, done) == ("denoise", 2 / 6):
            raise InterruptedError

    monkeypatch.setattr(restorer_module, "_take_step", counted)
    with pytest.raises(InterruptedError):
        restorer.restore(photograph, scale=1, sampling=sampling, progress=cancel)
    assert len(begun) == 3  # two whose end was waited for, and the next
    np.testing.assert_array_equal(restorer.restore(photograph, scale=1, sampling=sampling), expected)
    assert len(begun) == 3 + 6


# --------------------------------------------------------------------------------------------------
# Colours
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [method for method in COLOUR_CORRECTIONS if method != "none"])
@pytest.mark.parametrize("denoise", [True, False])
def test_colours_are_corrected_to_the_enlarged_photograph(restorer, photograph, method, denoise):
    options = {"size": (50, 61), "sampling": FAST, "denoise": denoise}
    picture = to_float(photograph)
    plain = restorer.restore(picture, **options)
    expected = correct_colour(plain, resize(picture, 50, 61), method)
    assert np.abs(expected - plain).max() > 0.05
    found = restorer.restore(picture, **options, colour_correction=method)
    np.testing.assert_array_equal(found, expected)
    as_bytes = restorer.restore(np.stack([photograph[::-1], photograph]), **options, colour_correction=method)
    difference = as_bytes[1].astype(int) - to_uint8(expected)  # of a batch, which may round otherwise
    assert as_bytes.dtype == np.uint8 and np.abs(difference).max() <= 1


def test_an_unknown_colour_correction_is_refused_before_anything_runs(restorer, photograph):
    told = []
    with pytest.raises(ValueError, match="colour correction 'sepia' is not one of none, lab, wavelet, adain"):
        options = {"colour_correction": "sepia", "progress": lambda *said: told.append(said)}
        restorer.restore(photograph, scale=1, **options)
    assert not told
