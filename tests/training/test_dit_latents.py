"""The DiT stage encodes images in turn; which of them at a time must change nothing, nor mix them up."""

import functools
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.conftest import TINY, random_params
from zipir_jax import parallel
from zipir_jax.config import MeshConfig, TrainConfig
from zipir_jax.models.lp_vae import Encoder, encode
from zipir_jax.training.stages import dit

pytestmark = pytest.mark.usefixtures("quick_compile")

HEIGHT, WIDTH = 2 * parallel.SMALLEST_ROWS, 32  # of the images, in pixels; two devices can divide the height
COUNTS = (1, 6, 8)  # four devices divide the last, and two of them the second
AT_A_TIME = (0.5, 1, 2)  # half an image: encoded in tiles, where one device has all of its height


@functools.cache
def encoders():
    return {
        "statistics": {"macro_mean": np.zeros(3, np.float32), "macro_std": np.ones(3, np.float32)},
        "coarse_encoder": random_params(Encoder, TINY.lp_vae.coarse, 0),
        "fine_encoder": random_params(Encoder, TINY.lp_vae.fine, 1),
    }


@functools.cache
def whole(count):
    """Clean and degraded images, and the latents of all of them, encoded at once."""
    images = np.random.default_rng(0).uniform(-1, 1, (2, count, HEIGHT, WIDTH, 3)).astype(np.float32)
    run = jax.jit(lambda params, x: encode(params, TINY.lp_vae, x))
    latents = np.asarray(run(encoders(), images.reshape(2 * count, HEIGHT, WIDTH, 3)))
    # Each differs from every other, so that one in another's place would show.
    flat = latents.reshape(2 * count, -1)
    apart = np.abs(flat[:, None] - flat).max(-1) + np.eye(2 * count)
    assert apart.min() > 0.1
    return dict(zip(("image", "lq"), images, strict=True)), latents.reshape(2, count, *latents.shape[1:])


def in_turn(frozen, batch, *axes):
    """The latents, in the order of `whole`. axes: by which the images are divided over devices."""
    batch = {name: parallel.constrain(x, *axes) for name, x in batch.items()}
    return dit.latents(TrainConfig(stage="dit", model=TINY), frozen, batch)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("at_a_time", AT_A_TIME)
def test_images_in_turn_have_the_latents_of_the_whole_batch(monkeypatch, count, at_a_time):
    monkeypatch.setattr(dit, "ENCODED_PIXELS", int(at_a_time * HEIGHT * WIDTH))
    batch, expected = whole(count)
    # A jit of its own: a program that was traced before would not see the number of pixels.
    found = jax.jit(lambda *arrays: in_turn(*arrays))(encoders(), batch)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_larger_images_are_encoded_in_tiles(monkeypatch):
    monkeypatch.setattr(dit, "ENCODED_PIXELS", HEIGHT * WIDTH // 2)
    assert dit._tiling(TINY.lp_vae, HEIGHT // 2, WIDTH) is None
    assert dit._tiling(TINY.lp_vae, HEIGHT, WIDTH).height < HEIGHT


def divided_over_four_devices():
    """What a process with four devices runs for the test below: the largest difference of each case."""
    jax.config.update("jax_disable_most_optimizations", True)  # compiles faster
    for config, axes in (
        (MeshConfig(data=2, fsdp=2), ("batch",)),
        (MeshConfig(data=1, fsdp=2, tensor=2), ("batch", "height")),
    ):
        mesh = parallel.make_mesh(config)
        for count in COUNTS:
            batch, expected = whole(count)
            arrays = parallel.put((encoders(), batch), parallel.replicated(mesh))
            for at_a_time in AT_A_TIME:
                dit.ENCODED_PIXELS = int(at_a_time * HEIGHT * WIDTH)
                with jax.set_mesh(mesh):
                    found = jax.jit(lambda *arrays, axes=axes: in_turn(*arrays, *axes))(*arrays)
                print(np.abs(np.stack([np.asarray(x) for x in found]) - expected).max())


def test_images_in_turn_on_each_of_four_devices():
    program = "from tests.training.test_dit_latents import divided_over_four_devices as run; run()"
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "4", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    differences = [float(line) for line in done.stdout.split()]
    assert len(differences) == 2 * len(COUNTS) * len(AT_A_TIME)
    assert all(difference < 1e-5 for difference in differences)  # a NaN is not
