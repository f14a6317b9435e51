"""What the tests of the training share: a folder of photographs, and the config of a run that takes seconds."""

import dataclasses
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from zipir_jax.config import (
    AutoencoderConfig,
    DataConfig,
    DiscriminatorConfig,
    LossConfig,
    LPVAEConfig,
    OptimizerConfig,
    TrainConfig,
)

CROPS = {
    "coarse": 128,
    "fine": 64,
    "dit": 64,
    "pixel_decoder": 64,
}  # pixels; coarse sees a quarter, LPIPS needs 31


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """Six pictures of smooth noise, 144 x 160 pixels."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for index in range(6):
        noise = cv2.GaussianBlur(rng.standard_normal((144, 160, 3)), (0, 0), 2.0 + index)
        pixels = 127.5 + 60 * noise / noise.std()
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / f"{index}.png")
    return folder


def shallow_band(latent_channels, decoder_channels, patch):
    """Two scales: a training step compiles the faster the fewer tensors there are."""
    return AutoencoderConfig(
        latent_channels=latent_channels,
        decoder_channels=decoder_channels,
        base_channels=8,
        multipliers=(1, 1),
        blocks_per_scale=1,
        patch=patch,
        unfold=True,
        pixel_channels=2,
        compute_dtype="float32",
    )


@pytest.fixture(scope="session")
def make_config(tiny_model, photos):
    """`make_config(stage, **overrides)`: a TrainConfig of four steps on a model smaller than tiny."""
    lp_vae = LPVAEConfig(coarse=shallow_band(9, 12, 4), fine=shallow_band(52, 64, 16))
    model = dataclasses.replace(tiny_model, lp_vae=lp_vae)

    def make(stage, **overrides):
        config = TrainConfig(
            stage=stage,
            model=model,
            data=DataConfig(sources=(str(photos),), resolutions=(CROPS[stage],), batch_size=2, threads=2),
            optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=1),
            loss=LossConfig(lpips_net="alexnet"),
            discriminator=DiscriminatorConfig(base_channels=4, layers=1, compute_dtype="float32"),
            steps=4,
            ema_decay=0.5,
            checkpoint_minutes=60.0,
            sample_every=100,
            statistics_images=6,
        )
        return dataclasses.replace(config, **overrides)

    return make


@pytest.fixture(scope="session")
def tensorboard_events():
    """`tensorboard_events(folder)`: all events that a run's log wrote for TensorBoard, in their order."""

    def events(folder):
        """All records of all event files: length (8 bytes), its checksum (4), the event, its checksum (4)."""
        found = []
        for path in sorted((folder / "tensorboard").iterdir(), key=lambda path: path.suffix):
            data = path.read_bytes()
            while data:
                (length,) = struct.unpack("<Q", data[:8])
                found.append(Event.FromString(data[12 : 12 + length]))
                data = data[16 + length :]
        return found

    return events
