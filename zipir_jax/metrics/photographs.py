"""The photographs that methods are scored on, and what is made of them: the same for every command."""

from importlib.resources import files
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from zipir_jax.config import TASKS
from zipir_jax.data.degrade import MINIMUM_SIDE, apply_task
from zipir_jax.imageio import crop_centre, list_images, read_image_uint8, to_float, to_uint8

# Part of scikit-image's wheel: nothing is downloaded.
PHOTOS = {
    "astronaut": "astronaut.png",  # 512 x 512
    "chelsea": "chelsea.png",  # 451 x 300
    "coffee": "coffee.png",  # 600 x 400
    "motorcycle_left": "motorcycle_left.png",  # 741 x 497
    "page": "page.png",  # 384 x 191, printed writing
    "rocket": "rocket.jpg",  # 640 x 427
    "text": "text.png",  # 448 x 172, handwriting
}
CROP_MULTIPLE = 16  # pixels; a multiple of every task's downscale, so that all tasks see the same original


def parse_tasks(text: str) -> list[str]:
    """The names in "mixture,sr8", each once; raises ValueError for a task that does not exist."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in TASKS:
            raise ValueError(f"task {name!r} is not one of {', '.join(TASKS)}")
    return names


def find_photographs(hq: Path | None, photo: str | None, limit: int | None) -> list[Path]:
    """The image files to score: of a folder, or of scikit-image by their names, separated by commas.

    Raises ValueError for none, for both of `hq` and `photo`, or for neither.
    """
    if (hq is None) == (photo is None):
        raise ValueError("give either --hq with a folder of photographs or --photo with a name")
    if limit is not None and limit < 1:
        raise ValueError(f"limit {limit} is below 1")
    if photo is not None:
        names = [name.strip() for name in photo.split(",")]
        for name in names:
            if name not in PHOTOS:
                raise ValueError(f"photo {name!r} is not one of {', '.join(PHOTOS)}")
        return [Path(str(files("skimage") / "data" / PHOTOS[name])) for name in names][:limit]
    paths = list_images(hq)[:limit]
    if not paths:
        raise ValueError(f"{hq} holds no images")
    return paths


def read_original(path: Path) -> np.ndarray:
    """An image file as uint8 [h, w, 3], cropped at the centre; raises ValueError, with the path, if it is too small."""
    image = read_image_uint8(path)
    height, width = (side // CROP_MULTIPLE * CROP_MULTIPLE for side in image.shape[:2])
    if min(height, width) < MINIMUM_SIDE:
        raise ValueError(
            f"{path}: {image.shape[1]} x {image.shape[0]} pixels; both sides must be at least {MINIMUM_SIDE}"
        )
    return crop_centre(image, height, width)


def degrade(
    original: UInt8[np.ndarray, "h w 3"], task: str, seed: int, index: int
) -> UInt8[np.ndarray, "h2 w2 3"]:
    """The LQ picture that a task of config.TASKS makes of the photograph at a place of the list, in its own noise."""
    return to_uint8(apply_task(to_float(original), TASKS[task], np.random.default_rng((seed, index))))
