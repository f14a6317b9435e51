"""Pictures to judge by eye: clean images beside their degraded partners, results beside originals."""

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from zipir_jax.config import DegradationConfig
from zipir_jax.data.degrade import draw_lq
from zipir_jax.imageio import resize, to_uint8

LABEL_HEIGHT = 20  # pixels of the line of text above a pair
GAP = 8  # pixels between pairs


def contact_sheet(
    images: list[np.ndarray], config: DegradationConfig, seed: int, columns: int = 2
) -> UInt8[np.ndarray, "height width 3"]:
    """Pairs of clean image and LQ image resized back to its size, `columns` pairs to a row.

    images: float32 [h, w, 3] in [-1, 1], sizes may differ. The i-th pair shows what
    `degrade_item(images[i], config, seed + i)` returns; its label gives that seed, what made the LQ image
    ("random" or a task's name) and the LQ image's own size. Raises ValueError for an empty list, `columns`
    below 1, or an image that `degrade.check_image` refuses.
    """
    if not images:
        raise ValueError("a contact sheet needs at least one image, and the list is empty.")
    if columns < 1:
        raise ValueError(f"columns is {columns}; a contact sheet needs at least 1.")
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    pair_height = LABEL_HEIGHT + max(image.shape[0] for image in images)
    pair_width = 2 * max(image.shape[1] for image in images)
    sheet = Image.new(
        "RGB", (columns * (pair_width + GAP) - GAP, rows * (pair_height + GAP) - GAP), color=(32, 32, 32)
    )
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=LABEL_HEIGHT - 8)
    for index, image in enumerate(images):
        height, width = image.shape[:2]
        lq, name = draw_lq(image, config, np.random.default_rng(seed + index))
        left = (index % columns) * (pair_width + GAP)
        top = (index // columns) * (pair_height + GAP)
        label = f"seed {seed + index}: {name}, {lq.shape[0]} x {lq.shape[1]} px"
        draw.text((left + 4, top + 2), label, fill=(255, 255, 255), font=font)
        sheet.paste(Image.fromarray(to_uint8(image)), (left, top + LABEL_HEIGHT))
        enlarged = to_uint8(resize(lq, height, width))
        sheet.paste(Image.fromarray(enlarged), (left + width, top + LABEL_HEIGHT))
    return np.asarray(sheet)


def side_by_side(pictures: dict[str, np.ndarray]) -> UInt8[np.ndarray, "height width 3"]:
    """Pictures of one size in a row, each below its label. pictures: {label: uint8 [h, w, 3]}."""
    height, width = next(iter(pictures.values())).shape[:2]
    pitch = width + GAP
    sheet = Image.new("RGB", (len(pictures) * pitch - GAP, LABEL_HEIGHT + height), color=(32, 32, 32))
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=LABEL_HEIGHT - 8)
    for index, (label, picture) in enumerate(pictures.items()):
        draw.text((index * pitch + 4, 2), label, fill=(255, 255, 255), font=font)
        sheet.paste(Image.fromarray(picture), (index * pitch, LABEL_HEIGHT))
    return np.asarray(sheet)
