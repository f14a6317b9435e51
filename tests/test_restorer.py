"""The restorer's sampling, against a sampler that computes everything anew at every step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import TINY, random_params
from zipir_jax.config import SamplingConfig
from zipir_jax.diffusion.objective import predict_clean
from zipir_jax.diffusion.samplers import initial_noise, plan_steps, sample
from zipir_jax.diffusion.schedule import linear_schedule, sampling_timesteps, spaced_timesteps
from zipir_jax.models.dit import DiT
from zipir_jax.models.layers import bind
from zipir_jax.restorer import branches_of, check_sampling, denoise_latent

pytestmark = pytest.mark.usefixtures("quick_compile")
WEAK = dataclasses.replace(
    TINY, diffusion=dataclasses.replace(TINY.diffusion, weak_lq_probability=0.1)
)  # fmt: skip


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
    ],
    ids=["plain", "guided", "interval", "weak", "weak interval", "from the LQ latent"],
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
