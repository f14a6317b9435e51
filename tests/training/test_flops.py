"""FLOPs of a step by hand against XLA's count of the stage's whole `gradients`, which is never compiled or run."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from zipir_jax.config import MODELS, DataConfig, DiscriminatorConfig, DiTConfig, LossConfig, TrainConfig
from zipir_jax.metrics.fidelity import load_lpips
from zipir_jax.models.discriminator import PatchDiscriminator
from zipir_jax.models.flops import encode_flops
from zipir_jax.models.layers import abstract_params
from zipir_jax.training.flops import lpips_features_flops, training_flops
from zipir_jax.training.stages import STAGES
from zipir_jax.weights import abstract_weights

CROP = 512  # pixels
BATCH = 2


@pytest.fixture(autouse=True)
def unrolled_layers(monkeypatch):
    """XLA counts the body of a loop once."""
    scan = functools.partial(jax.lax.scan, unroll=True)
    monkeypatch.setattr(jax.lax, "scan", scan)
    monkeypatch.setattr(jax.lax, "map", lambda f, xs: scan(lambda _, x: (None, f(x)), None, xs)[1])


def narrow(**changes):
    """The paper's shapes with half the width and two layers, without text."""
    vae = MODELS["paper"].lp_vae
    coarse, fine = (dataclasses.replace(band, base_channels=64) for band in (vae.coarse, vae.fine))
    model = dataclasses.replace(
        MODELS["paper"],
        lp_vae=dataclasses.replace(vae, coarse=coarse, fine=fine),
        dit=DiTConfig(layers=2, width=1024, heads=8, text_width=0),
    )
    config = TrainConfig(model=model, loss=LossConfig(lpips_net="alexnet"))
    return dataclasses.replace(config, **changes)


def shaped(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


@functools.cache
def counted(config, adversarial):
    """XLA's FLOPs of the step's gradients, per image."""
    stage, weights = STAGES[config.stage], abstract_weights(config.model)
    generator = {group: weights[group] for group in stage.MAKES if group != "statistics"}
    discriminator = abstract_params(PatchDiscriminator, config.discriminator) if adversarial else {}
    frozen = weights | {"lpips": shaped(load_lpips(config.loss.lpips_net)[0])}
    images = jax.ShapeDtypeStruct((BATCH, CROP, CROP, 3), jnp.float32)
    program = jax.jit(
        lambda params, frozen, batch, key: stage.gradients(config, params, frozen, batch, key, adversarial)
    ).lower(
        {"generator": generator, "discriminator": discriminator},
        frozen,
        {"image": images, "lq": images},
        jax.random.key(0),
    )
    return program.cost_analysis()["flops"] / BATCH


@pytest.mark.parametrize("adversarial", [False, True])
@pytest.mark.parametrize("stage", ["coarse", "fine", "pixel_decoder"])
def test_a_step_that_makes_images_costs_what_xla_counts(stage, adversarial):
    config = narrow(stage=stage)
    by_hand = training_flops(config, CROP, CROP, adversarial=adversarial)
    # By hand more: padding, which the coarse stage's small images have much of, and gradients with respect to images
    # and latents, which nobody asks the first layers for.
    tolerance = 0.03 if stage == "coarse" else 0.01
    assert by_hand == pytest.approx(counted(config, adversarial), rel=tolerance)


@pytest.mark.parametrize("noise_draws", [1, 3])
def test_a_step_of_the_dit_costs_what_xla_counts(noise_draws):
    config = narrow(stage="dit", noise_draws=noise_draws)
    by_hand = training_flops(config, CROP, CROP, adversarial=False)
    assert by_hand == pytest.approx(counted(config, False), rel=0.01)


# A whole step hides its small parts; what a setting adds to it does not.
@pytest.mark.parametrize(
    ("stage", "changes", "adversarial"),
    [
        ("fine", {}, True),
        # So small that the two gradients of the last layer, for its weight, are 15 % of it.
        ("fine", {"discriminator": DiscriminatorConfig(base_channels=16, layers=1)}, True),
        ("fine", {"loss": LossConfig(lpips_net="vgg16")}, False),
        ("fine", {"loss": LossConfig(lpips_net="vgg16", lpips_crop=256)}, False),
        ("dit", {"noise_draws": 2}, False),
        ("pixel_decoder", {"decoder_noise": (0.0, 1.0)}, False),
    ],
)
def test_what_a_setting_adds_is_what_xla_counts(stage, changes, adversarial):
    plain, config = narrow(stage=stage), narrow(stage=stage, **changes)
    by_hand = training_flops(config, CROP, CROP, adversarial=adversarial) - training_flops(
        plain, CROP, CROP, adversarial=False
    )
    xla = counted(config, adversarial) - counted(plain, False)
    assert by_hand == pytest.approx(xla, rel=0.03)


@pytest.mark.parametrize("net", ["alexnet", "vgg16"])
def test_the_backbones_of_lpips_cost_what_xla_counts(net):
    params, distance = load_lpips(net)
    image = jax.ShapeDtypeStruct((1, 1920, 1280, 3), jnp.float32)
    counted = jax.jit(distance).lower(shaped(params), image, image).cost_analysis()["flops"]
    assert 2 * lpips_features_flops(net, 1920, 1280) == pytest.approx(counted, rel=0.02)


def test_a_window_for_lpips_leaves_the_rest_of_the_step_as_it_is():
    whole, window = (
        training_flops(
            narrow(stage="fine", loss=LossConfig(lpips_net="vgg16", lpips_crop=side)),
            256,
            256,
            adversarial=True,
        )
        for side in (0, 64)
    )
    assert whole - window == 3 * (
        lpips_features_flops("vgg16", 256, 256) - lpips_features_flops("vgg16", 64, 64)
    )


def test_the_text_counts_for_every_noise_but_not_for_the_encoders():
    config = TrainConfig(stage="dit", noise_draws=2)
    dit = config.model.dit
    with_text, without = (
        training_flops(dataclasses.replace(config, data=data), CROP, CROP, adversarial=False)
        for data in (DataConfig(text="embeddings", text_tokens=10), DataConfig(text_tokens=10))
    )
    tokens = 2 * (CROP // 32) ** 2
    keys_and_values, attention = 4 * dit.text_width * dit.width, 4 * tokens * dit.width
    assert with_text - without == 3 * 2 * dit.layers * 10 * (keys_and_values + attention)


def test_cached_latents_save_the_encoding():
    read, cached = (
        training_flops(narrow(stage="dit", data=DataConfig(latents=latents)), CROP, CROP, adversarial=False)
        for latents in ("", "folder")
    )
    assert read - cached == 2 * encode_flops(narrow().model.lp_vae, CROP, CROP)


def test_a_crop_that_no_latent_fits_is_refused():
    with pytest.raises(ValueError, match="height 500 is not a multiple of 32"):
        training_flops(narrow(stage="dit"), 500, 512, adversarial=False)
