"""Command line that prepares and inspects training data: `python -m zipir_jax.prepare COMMAND --help`."""

import os
from pathlib import Path

import numpy as np

from zipir_jax import imageio
from zipir_jax.command_line import parse, run
from zipir_jax.config import DegradationConfig, IndexConfig
from zipir_jax.data.degrade import MINIMUM_SIDE, check_image
from zipir_jax.data.preview import contact_sheet


def preview(
    input: Path,
    output: Path = Path("preview.png"),
    count: int = 12,
    seed: int = 0,
    crop: int = 256,
    columns: int = 2,
    degradation: DegradationConfig = DegradationConfig(),
) -> None:
    """Draw clean images beside their degraded partners on one contact sheet.

    Args:
        input: folder of images; its subfolders are searched as well
        output: image file to write
        count: pairs on the sheet; where the folder holds fewer images, they are shown again with other seeds
        seed: of the choice of images and of their degradations
        crop: side in pixels of the square cut from the middle of each image
        columns: pairs in a row
        degradation: any setting of the degradation, e.g. --degradation.task-probability 0
    """
    if count < 1:
        raise ValueError(f"count is {count}; a contact sheet needs at least 1 pair.")
    if crop < MINIMUM_SIDE:
        raise ValueError(f"crop is {crop} pixels; it must be at least {MINIMUM_SIDE}.")
    if not input.is_dir():
        raise ValueError(f"{input} is not a folder.")
    paths = imageio.list_images(input, recursive=True)  # as training does
    if not paths:
        raise ValueError(f"{input} holds no images.")
    chosen = np.random.default_rng(seed).permutation(len(paths))[:count]
    crops = []
    for index in chosen:
        crops.append(_middle(imageio.read_image(paths[index]), crop))
        try:
            check_image(crops[-1])
        except ValueError as error:
            raise ValueError(f"{paths[index]}: {error}") from None
    sheet = contact_sheet([crops[index % len(crops)] for index in range(count)], degradation, seed, columns)
    imageio.write_image(output, sheet)
    print(f"{output}: {count} pairs from {len(crops)} images")


def index(
    input: tuple[str, ...], output: Path, workers: int | None = None, rules: IndexConfig = IndexConfig()
) -> None:
    """Look at every image of a collection, drop what training is better off without, write the rest as shards.

    A run that was interrupted goes on when it is started again. Which images were dropped, and why, is in dropped.csv.

    Args:
        input: folders of images with their subfolders, folders of shards, or tfds:NAME or tfds:NAME:SPLIT
        output: folder to write, a new one or that of an earlier run over the same images
        workers: processes that read and measure; one for each core by default, 0 for none beside this one
        rules: which images are kept, e.g. --rules.shortest-side 1024
    """
    if workers is not None and workers < 0:
        raise ValueError(f"workers is {workers}; it must be at least 0.")
    from zipir_jax.data.index import write_index  # preview and export do without

    print(write_index(input, output, rules, os.cpu_count() if workers is None else workers), end="")


def export(weights: Path, output: Path) -> None:
    """Write what restoring needs of a training run's weights, in bfloat16.

    Args:
        weights: folder of weights, as training leaves them
        output: folder to write, another one
    """
    if weights.exists() and output.exists() and output.samefile(weights):
        raise ValueError(
            f"{output}: the export would replace the weights that it is made of; choose another output."
        )
    import jax.numpy as jnp  # takes seconds, and preview does not need it
    from jax import tree

    from zipir_jax.restorer import NEEDED
    from zipir_jax.weights import load_weights, save_weights

    config, groups = load_weights(weights, NEEDED)
    groups = {
        # Statistics are 134 numbers that scale everything: they stay float32.
        name: groups[name]
        if name == "statistics"
        else tree.map(lambda x: x.astype(jnp.bfloat16), groups[name])
        for name in NEEDED
    }
    save_weights(output, config, groups)
    print(f"{output}: {(output / 'model.safetensors').stat().st_size / 2**20:.2f} MiB")


COMMANDS = {
    "preview": preview,
    "index": index,
    "export": export,
}


def _middle(image, side):
    top, left = max(0, image.shape[0] - side) // 2, max(0, image.shape[1] - side) // 2
    return image[top : top + side, left : left + side]


def main(arguments: list[str]) -> None:
    description = "Prepare and inspect training data. --debug shows the traceback of an error."
    parse(COMMANDS, arguments, prog="python -m zipir_jax.prepare", description=description)()


if __name__ == "__main__":
    run(main)
