"""Buckets: which crops there are, which images they are cut from, and how many make a batch."""

import itertools
import re

import numpy as np
import pytest

from zipir_jax.config import DataConfig
from zipir_jax.data.buckets import MULTIPLE, batch_size, crop_sides, make_buckets

RATIOS = [0.25, 4 / 9, 0.5, 9 / 16, 2 / 3, 0.75, 1.0, 4 / 3, 1.5, 16 / 9, 2.0, 9 / 4, 4.0]
RESOLUTIONS = range(64, 4097, 64)


def make(sizes, divisor=1, exact=False, **settings):
    return make_buckets(DataConfig(**settings), np.array(sizes, np.int32).reshape(-1, 2), divisor, exact)


# --------------------------------------------------------------------------------------------------
# Sides
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", RATIOS)
def test_a_crops_sides_are_the_nearest_multiples_of_64(ratio):
    for resolution in RESOLUTIONS:
        height, width = crop_sides(resolution, ratio)
        assert height % 64 == width % 64 == 0 and height > 0 and width > 0
        exact = np.array([resolution / ratio**0.5, resolution * ratio**0.5])
        assert np.abs(np.array([height, width]) - exact).max() <= MULTIPLE / 2 + 1e-6
        # So the area is off by (1 + 32 / height) (1 + 32 / width) at most: 2 % at 4096, 15 % at 512 and 2 : 1.
        off = height * width / resolution**2
        assert max(off, 1 / off) <= np.prod(1 + 32 / (exact - 32).clip(32))


def test_a_square_crop_is_as_wide_as_its_resolution():
    assert all(crop_sides(resolution, 1.0) == (resolution, resolution) for resolution in RESOLUTIONS)


def test_known_crops():
    assert crop_sides(512, 16 / 9) == (384, 704)
    assert crop_sides(1024, 1.5) == (832, 1280)
    assert crop_sides(64, 4.0) == (64, 128)


def test_wider_crops_are_no_narrower_and_no_higher():
    for resolution in RESOLUTIONS:
        heights, widths = np.transpose([crop_sides(resolution, r) for r in np.geomspace(0.25, 4, 200)])
        assert (np.diff(heights) <= 0).all() and (np.diff(widths) >= 0).all()


def test_the_inverse_ratio_gives_the_crop_on_its_side():
    # Sides halfway between two multiples are the hard ones: 64 x 3 / 2 = 96 for 4 : 9.
    for resolution, (a, b) in itertools.product(RESOLUTIONS, itertools.product(range(1, 17), repeat=2)):
        if 0.25 <= a / b <= 4:
            assert crop_sides(resolution, a / b) == crop_sides(resolution, b / a)[::-1]


# --------------------------------------------------------------------------------------------------
# Images
# --------------------------------------------------------------------------------------------------


def random_sizes(count=400, seed=0):
    return np.random.default_rng(seed).integers(40, 1200, (count, 2)).astype(np.int32)


def test_an_image_enters_the_bucket_of_the_nearest_aspect_ratio_that_it_fills():
    ratios = (0.5, 0.75, 1.0, 4 / 3, 2.0)
    sizes = random_sizes()
    buckets = make(sizes, resolutions=(384,), aspect_ratios=ratios)
    of = {int(image): (b.height, b.width) for b in buckets for image in b.images}
    assert sum(len(bucket.images) for bucket in buckets) == len(of)  # none is in two
    crops = [crop_sides(384, ratio) for ratio in ratios]
    for image, (height, width) in enumerate(sizes.tolist()):
        filled = [(h, w) for h, w in crops if h <= height and w <= width]
        if not filled:
            assert image not in of
        else:
            ratio = width / height
            factors = {(h, w): max(w / h / ratio, ratio / (w / h)) for h, w in filled}
            assert factors[of[image]] == min(factors.values())
    assert 0 < len(of) < len(sizes)


def test_nearness_of_aspect_ratios_is_a_factor():
    # 1.42 lies nearer to 1 than to 2 in difference, but nearer to 2 in proportion, as 1 / 1.42 lies nearer to 1 / 2.
    sizes = [(1000, 1420), (1420, 1000), (1000, 1400), (1400, 1000)]
    buckets = make(sizes, resolutions=(512,), aspect_ratios=(0.5, 1.0, 2.0))
    square = crop_sides(512, 1.0)
    # The crops' own ratios count, after rounding: 704 x 384 is 1.83, and sqrt(1.83) = 1.354.
    assert all((b.height, b.width) != square for b in buckets)
    sizes = [(1000, 1340), (1340, 1000)]
    (bucket,) = make(sizes, resolutions=(512,), aspect_ratios=(0.5, 1.0, 2.0))
    assert (bucket.height, bucket.width) == square and bucket.images.tolist() == [0, 1]


def test_images_on_their_side_enter_the_buckets_on_their_side():
    settings = {"resolutions": (256, 384), "aspect_ratios": (0.5, 0.75, 1.0, 4 / 3, 2.0)}
    upright, turned = make(random_sizes(), **settings), make(random_sizes()[:, ::-1], **settings)
    assert {(b.height, b.width): b.images.tolist() for b in upright} == {
        (b.width, b.height): b.images.tolist() for b in turned
    }


def test_an_image_enters_a_bucket_of_every_resolution_that_it_has():
    buckets = make([(64, 64), (127, 500), (128, 128), (192, 200)], resolutions=(64, 128, 192))
    assert [b.images.tolist() for b in buckets] == [[0, 1, 2, 3], [2, 3], [3]]


def test_ratios_that_round_to_one_crop_are_one_bucket():
    buckets = make([(64, 64)] * 3, resolutions=(64,), aspect_ratios=(0.9, 1.0, 1.1))
    assert [(b.height, b.width, b.weight) for b in buckets] == [(64, 64, 1.0)]


def test_exact_takes_images_of_the_crops_own_size_alone():
    sizes = [(64, 64), (64, 128), (65, 64), (128, 64), (64, 128)]
    buckets = make(sizes, exact=True, resolutions=(64,), aspect_ratios=(1.0, 4.0))
    assert [(b.height, b.width, b.images.tolist()) for b in buckets] == [(64, 64, [0]), (64, 128, [1, 4])]


@pytest.mark.parametrize(
    ("exact", "message"),
    [
        (False, "none of the 2 images has the pixels of a crop of resolution 128: 128 x 128, 64 x 256"),
        (True, "none of the 2 images is exactly as large as a crop of resolution 128: 128 x 128, 64 x 256"),
    ],
)
def test_a_resolution_that_no_image_has_is_refused(exact, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make([(64, 64), (127, 300)], exact=exact, resolutions=(64, 128), aspect_ratios=(0.25, 1.0))


def test_no_image_at_all_is_refused():
    with pytest.raises(ValueError, match="none of the 0 images has the pixels of a crop of resolution 64"):
        make([], resolutions=(64,))


# --------------------------------------------------------------------------------------------------
# Batches
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_tokens", [0, 500])
@pytest.mark.parametrize("weights", [(), (1.0, 2.0, 5.0)])
def test_weights_share_the_images_out_over_resolutions_and_evenly_within_them(batch_tokens, weights):
    buckets = make(
        random_sizes(),
        resolutions=(128, 256, 448),
        resolution_weights=weights,
        aspect_ratios=(0.5, 1.0, 2.0),
        batch_tokens=batch_tokens,
    )
    assert sum(bucket.weight for bucket in buckets) == pytest.approx(1)
    shown = np.array([bucket.weight * bucket.batch_size for bucket in buckets])
    images = np.array([len(bucket.images) for bucket in buckets])
    crops = [{crop_sides(r, ratio) for ratio in (0.5, 1.0, 2.0)} for r in (128, 256, 448)]
    of = np.array([[(b.height, b.width) in sides for b in buckets] for sides in crops])
    assert (of.sum(0) == 1).all()
    shares = of @ shown / shown.sum()
    np.testing.assert_allclose(shares, np.array(weights or (1, 1, 1)) / sum(weights or (1, 1, 1)))
    for members in of:  # each image of a resolution comes as often
        np.testing.assert_allclose(shown[members] / images[members], (shown[members] / images[members])[0])


def test_a_batch_has_as_many_latent_pixels_as_it_may():
    config = DataConfig(batch_tokens=4096)
    for height, width, divisor in itertools.product((64, 192, 512, 2048), (64, 448, 1024), (1, 2, 8, 24)):
        images = batch_size(config, height, width, divisor)
        tokens = height * width // 32**2
        assert images % divisor == 0 and images > 0
        assert images == divisor or images * tokens <= 4096
        assert (images + divisor) * tokens > 4096


def test_batch_size_holds_for_every_crop_and_must_be_a_multiple_of_the_divisor():
    buckets = make([(256, 256)], divisor=6, resolutions=(64, 128, 256), batch_size=12)
    assert [bucket.batch_size for bucket in buckets] == [12, 12, 12]
    with pytest.raises(ValueError, match=r"data.batch_size 12 is not a multiple of 8"):
        make([(256, 256)], divisor=8, resolutions=(64,), batch_size=12)
    make([(256, 256)], divisor=8, resolutions=(64,), batch_size=12, batch_tokens=100)  # which takes its place
