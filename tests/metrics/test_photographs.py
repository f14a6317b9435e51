import numpy as np
import skimage.data

from zipir_jax.config import TASKS
from zipir_jax.metrics import photographs
from zipir_jax.photograph import write_image


def test_a_photograph_by_name():
    for name in photographs.PHOTOS:
        (path,) = photographs.find_photographs(None, name, None)
        image = photographs.read_original(path)
        assert image.shape[0] % 16 == 0 and image.shape[1] % 16 == 0 and min(image.shape[:2]) >= 160
    np.testing.assert_array_equal(
        photographs.read_original(photographs.find_photographs(None, "astronaut", None)[0]),
        skimage.data.astronaut(),
    )


def test_the_middle_is_kept_and_suits_every_task(tmp_path):
    write_image(tmp_path / "b.png", skimage.data.coffee()[100:170, 200:273])
    assert all(photographs.CROP_MULTIPLE % task.downscale == 0 for task in TASKS.values())
    np.testing.assert_array_equal(
        photographs.read_original(tmp_path / "b.png"), skimage.data.coffee()[103:167, 204:268]
    )
