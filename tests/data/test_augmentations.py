"""Augmentations: each operation against an independent computation, their draws, their gradients, and who uses them."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage

from augdistill_core import (
    PHIS,
    ConvNet,
    DistillConfig,
    Trajectories,
    distill,
    flatten,
    initial_parameters,
    make_phi,
    seeded,
)
from augdistill_report.data import augmentations, whitening
from augdistill_report.data.augmentations import (
    AUGMENTATIONS,
    DIFFERENTIABLE,
    DSA,
    LIBRARY,
    OPERATIONS,
    RANDOM_POLICY,
    RandomAffine,
    augmentation,
    crop,
)
from augdistill_report.data.datasets import load, standardised
from augdistill_report.files.store import Store
from augdistill_report.settings import Settings
from augdistill_report.work import distillation, experts, scoring
from augdistill_report.work.distillation import Distillation
from augdistill_report.work.experts import Expert, Together
from augdistill_report.work.jobs import Subset
from augdistill_report.work.scoring import EvalConfig, Evaluation, evaluate, train_student
from augdistill_report.work.setup import Setup

SHAPES = [(6, 3, 8, 8), (6, 1, 8, 8), (6, 3, 9, 7), (6, 2, 6, 11)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
operations = pytest.mark.parametrize("name", OPERATIONS)
NO_STRENGTH = dict(brightness=0, saturation=0, contrast=0, crop=0, cutout=0, flip=0, scale=1, rotate=0)
EVERYTHING = [DSA(strategy=(name,)) for name in OPERATIONS] + [RandomAffine()]
everything = pytest.mark.parametrize("augment", EVERYTHING, ids=[*OPERATIONS, "affine"])


def noise(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=seeded(seed, "images"), dtype=dtype)


def some(name, images, seed=1):
    """Parameters of an operation as DSA draws them."""
    return DSA().draw(name, images, seeded(seed))


def resampled(image, matrix, mode):
    """scipy's bilinear resampling of one image [C, H, W] about its middle; `matrix` [2, 3] in pixels, (x, y) order."""
    linear, offset = matrix[::-1, 1::-1], matrix[::-1, 2]  # scipy's order is (y, x)
    middle = (np.array(image.shape[1:]) - 1) / 2
    options = dict(offset=middle - linear @ middle + offset, order=1, mode=mode)
    return np.stack([ndimage.affine_transform(channel, linear, **options) for channel in image.numpy()])


# --- each operation -------------------------------------------------------------------------------------------------


@shapes
def test_flip(shape):
    images, which = noise(*shape), torch.tensor([True, False, True, True, False, False])
    out = OPERATIONS["flip"](images, which)
    for image, result, flipped in zip(images, out, which, strict=True):
        assert torch.equal(result, torch.flip(image, [-1]) if flipped else image)


@shapes
def test_crop(shape):
    images = noise(*shape)
    down, right = torch.tensor([0, 1, -1, 2, -2, 0]), torch.tensor([0, 0, 2, -1, -2, 1])
    out = OPERATIONS["crop"](images, down, right)
    for image, result, d, r in zip(images, out, down.tolist(), right.tolist(), strict=True):
        padded = F.pad(image, (2, 2, 2, 2))
        assert torch.equal(result, padded[:, 2 + d : 2 + d + shape[2], 2 + r : 2 + r + shape[3]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sides", [(8, 8), (16, 12), (28, 28), (64, 64), (200, 256)], ids=str)
def test_crop_copies_pixels_to_the_bit_whatever_the_type_and_the_side(dtype, sides):
    """Each by its own shift, up to a whole side; and so does its gradient."""
    images = noise(20, 2, *sides).to(dtype).requires_grad_()
    down, right = (torch.randint(-side, side + 1, (20,), generator=seeded(k)) for k, side in enumerate(sides))
    down[0] = right[0] = 0
    out = OPERATIONS["crop"](images, down, right)
    height, width = sides
    padded = F.pad(images, (width, width, height, height))
    expected = torch.stack(
        [
            image[:, height + d : 2 * height + d, width + r : 2 * width + r]
            for image, d, r in zip(padded, down.tolist(), right.tolist(), strict=True)
        ]
    )
    assert torch.equal(out, expected)
    weights = noise(*out.shape, seed=1).to(dtype)
    gradients = [
        torch.autograd.grad((x.double() * weights).sum(), images, retain_graph=True)[0] for x in (out, expected)
    ]
    assert torch.equal(*gradients)


@shapes
def test_cutout(shape):
    images = noise(*shape)
    top, left = torch.tensor([0, -2, 3, shape[2] - 1, 1, 4]), torch.tensor([0, 3, -2, 2, shape[3] - 1, 1])
    out = OPERATIONS["cutout"](images, top, left, (4, 3))
    for image, result, row, column in zip(images.numpy(), out.numpy(), top.tolist(), left.tolist(), strict=True):
        mask = np.ones(shape[2:])
        mask[max(row, 0) : row + 4, max(column, 0) : column + 3] = 0
        assert np.array_equal(result, image * mask)


@shapes
def test_color_is_brightness_then_saturation_then_contrast(shape):
    images = noise(*shape)
    parameters = [noise(shape[0], seed=k) for k in (1, 2, 3)]
    out = OPERATIONS["color"](images, *parameters)
    for image, result, b, s, c in zip(images.numpy(), out.numpy(), *(p.tolist() for p in parameters), strict=True):
        expected = image + b
        grey = expected.mean(axis=0)
        expected = grey + (1 + s) * (expected - grey)
        expected = expected.mean() + (1 + c) * (expected - expected.mean())
        np.testing.assert_allclose(result, expected, atol=1e-12)


def test_saturation_leaves_grey_images_alone():
    images, zero = noise(4, 1, 8, 8), torch.zeros(4)
    assert torch.equal(OPERATIONS["color"](images, zero, torch.ones(4), zero), images)


def test_scale_and_rotate_are_the_affine_grids_of_single_images():
    images = noise(5, 3, 8, 8)
    x, y, angle = (0.3 * noise(5, seed=k) + 1 for k in (1, 2, 3))
    scaled, rotated = OPERATIONS["scale"](images, x, y), OPERATIONS["rotate"](images, angle)
    for k in range(5):
        cos, sin = math.cos(angle[k]), math.sin(angle[k])
        for out, theta in (
            (scaled, [[x[k], 0, 0], [0, y[k], 0]]),
            (rotated, [[cos, -sin, 0], [sin, cos, 0]]),
        ):
            grid = F.affine_grid(torch.tensor(theta, dtype=torch.float64)[None], [1, 3, 8, 8], align_corners=True)
            expected = F.grid_sample(images[k : k + 1], grid, align_corners=True)
            torch.testing.assert_close(out[k : k + 1], expected)


@shapes
def test_scale_and_rotate_are_those_of_scipy(shape):
    images = noise(*shape)
    x, y, angle = (0.2 * noise(shape[0], seed=k) + 1 for k in (1, 2, 3))
    scaled, rotated = OPERATIONS["scale"](images, x, y), OPERATIONS["rotate"](images, angle)
    for k, image in enumerate(images):
        matrix = np.array([[x[k], 0, 0], [0, y[k], 0]])
        np.testing.assert_allclose(scaled[k], resampled(image, matrix, "grid-constant"), atol=1e-9)
        cos, sin = math.cos(angle[k]), math.sin(angle[k])
        matrix = np.array([[cos, -sin, 0], [sin, cos, 0]])
        np.testing.assert_allclose(rotated[k], resampled(image, matrix, "grid-constant"), atol=1e-9)


def test_rotate_by_a_right_angle_is_rot90_anticlockwise():
    images = noise(4, 3, 9, 9)
    out = OPERATIONS["rotate"](images, torch.tensor([0, 0.5, 1, -0.5], dtype=torch.float64) * math.pi)
    assert torch.equal(out[0], images[0])
    for k, turns in ((1, 1), (2, 2), (3, -1)):
        torch.testing.assert_close(out[k], torch.rot90(images[k], turns, (1, 2)))
    wide = noise(1, 3, 6, 11)
    half_turn = OPERATIONS["rotate"](wide, torch.tensor([math.pi], dtype=torch.float64))
    torch.testing.assert_close(half_turn, wide.flip(2, 3))


def test_scale_takes_every_second_pixel_at_two():
    images = noise(2, 3, 9, 9)
    two, one = torch.full((2,), 2.0, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    wide = OPERATIONS["scale"](images, two, one)
    expected = F.pad(images[..., ::2], (2, 2))
    torch.testing.assert_close(wide, expected)
    torch.testing.assert_close(OPERATIONS["scale"](images, one, two), F.pad(images[..., ::2, :], (0, 0, 2, 2)))
    assert torch.equal(OPERATIONS["scale"](images, one, one), images)


@operations
@shapes
def test_a_batch_is_its_images_one_by_one(name, shape):
    images = noise(*shape)
    parameters = some(name, images)
    out = OPERATIONS[name](images, *parameters)
    for k in range(len(images)):
        of_one = [p[k : k + 1] if torch.is_tensor(p) else p for p in parameters]
        torch.testing.assert_close(OPERATIONS[name](images[k : k + 1], *of_one), out[k : k + 1])


# --- the random affine ------------------------------------------------------------------------------------------------


@shapes
def test_random_affine_is_that_of_scipy(shape):
    images = noise(*shape)
    out = RandomAffine(0.4, 0.2, 0.1)(images, generator=seeded(3))
    draws = torch.randn(shape[0], 4, generator=seeded(3)).double()
    for image, result, (turn, size, x, y) in zip(images, out, draws.tolist(), strict=True):
        inverse = math.exp(-0.2 * size)
        cos, sin = inverse * math.cos(0.4 * turn), inverse * math.sin(0.4 * turn)
        shift = np.array([0.1 * x * shape[3], 0.1 * y * shape[2]])
        matrix = np.array([[cos, sin, -shift[0]], [-sin, cos, -shift[1]]])
        np.testing.assert_allclose(result, resampled(image, matrix, "nearest"), atol=1e-6)


def blob(side=65, wide=6.0, high=3.0):
    """A smooth blob in the middle, wider than it is high, [1, 1, side, side]."""
    place = torch.arange(side, dtype=torch.float64) - (side - 1) / 2
    return torch.exp(-((place / wide) ** 2)[None] / 2 - ((place / high) ** 2)[:, None] / 2)[None, None]


def moments(image):
    """Middle (x, y), and covariance [2, 2], of an image's brightness, in pixels from the image's middle."""
    place = torch.arange(image.shape[-1], dtype=torch.float64) - (image.shape[-1] - 1) / 2
    y, x = torch.meshgrid(place, place, indexing="ij")
    points, weights = torch.stack([x, y]).flatten(1), image.flatten() / image.sum()
    middle = (points * weights).sum(1)
    return middle, (points * weights) @ points.T - torch.outer(middle, middle)


def test_random_affine_moves_by_its_draw():
    draws = torch.randn(20, 4, generator=seeded(5)).double()
    images = blob().repeat(20, 1, 1, 1)

    shifted = RandomAffine(0, 0, 0.03)(images, generator=seeded(5))
    for image, draw in zip(shifted, draws, strict=True):  # right and down are positive
        torch.testing.assert_close(moments(image)[0], 0.03 * 65 * draw[2:], atol=1e-3, rtol=0)

    scaled = RandomAffine(0, 0.2, 0)(images, generator=seeded(5))
    for image, draw in zip(scaled, draws, strict=True):
        middle, spread = moments(image)
        growth = (spread.diag() / torch.tensor([36.0, 9.0])).sqrt()
        torch.testing.assert_close(growth, torch.exp(0.2 * draw[1]).expand(2).double(), atol=0.03, rtol=0)
        assert middle.norm() < 1e-3

    turned = RandomAffine(0.3, 0, 0)(images, generator=seeded(5))
    for image, draw in zip(turned, draws, strict=True):  # y points down, so clockwise is positive
        middle, ((xx, xy), (_, yy)) = moments(image)
        assert 0.5 * math.atan2(2 * xy, xx - yy) == pytest.approx(0.3 * draw[0].item(), abs=0.01)
        assert middle.norm() < 1e-3


def test_random_affine_repeats_the_border():
    out = RandomAffine(1, 1, 1)(torch.full((50, 1, 8, 8), -0.7), generator=seeded(0))
    torch.testing.assert_close(out, torch.full_like(out, -0.7))


# --- what is drawn ----------------------------------------------------------------------------------------------------


def test_the_operation_is_drawn_uniformly_for_each_batch(monkeypatch):
    called = []
    for name in OPERATIONS:
        monkeypatch.setitem(OPERATIONS, name, lambda images, *_, name=name: called.append(name) or images)
    generator, images = seeded(0), noise(1, 3, 8, 8)
    for _ in range(3000):
        DSA()(images, generator=generator)
    counts = np.array([called.count(name) for name in OPERATIONS])
    assert counts.sum() == 3000
    assert ((counts - 500) ** 2 / 500).sum() < 20.5  # chi-square, 5 degrees of freedom: one seed in a thousand fails
    called.clear()
    for _ in range(100):
        DSA(strategy=("flip", "crop"))(images, generator=generator)
    assert set(called) == {"flip", "crop"}


RANGES = {  # of the parameters, for images of 16 x 24
    "color": [(-0.5, 0.5), (-1, 1), (-0.5, 0.5)],
    "scale": [(1 / 1.2, 1.2), (1 / 1.2, 1.2)],
    "rotate": [(-math.pi / 12, math.pi / 12)],
    "crop": [range(-2, 3), range(-3, 4)],
    "cutout": [range(-4, 13), range(-6, 19)],
}


@operations
def test_parameters_are_each_image_s_own_and_fill_their_range(name):
    images = torch.empty(20000, 1, 16, 24)
    parameters = [p for p in some(name, images) if torch.is_tensor(p)]
    if name == "flip":
        assert parameters[0].float().mean() == pytest.approx(0.5, abs=0.02)
        return
    for values, expected in zip(parameters, RANGES[name], strict=True):
        if isinstance(expected, range):
            counts = torch.bincount(values - expected[0]).double()
            assert len(counts) == len(expected) and values.min() == expected[0]
            assert (counts / counts.mean() - 1).abs().max() < 0.15
        else:
            low, high = expected
            quantiles = torch.quantile(values, torch.tensor([0, 0.25, 0.5, 0.75, 1]))
            assert low <= quantiles[0] + 1e-6 and quantiles[-1] <= high + 1e-6
            assert quantiles.tolist() == pytest.approx(np.linspace(low, high, 5), abs=0.02 * (high - low))
    for a, b in itertools.pairwise(parameters):  # drawn apart from each other
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.03


def test_cutout_takes_half_of_the_side():
    assert some("cutout", torch.empty(1, 1, 16, 24))[2] == (8, 12)
    images = torch.empty(5000, 1, 9, 7)
    top, left, box = some("cutout", images)
    assert box == (5, 4)  # halves are rounded up
    # an odd box has its middle on a pixel; an even one between two, or on the border
    assert sorted(set(top.tolist())) == list(range(-2, 7)) and sorted(set(left.tolist())) == list(range(-2, 6))


@pytest.mark.parametrize("augment", [DSA(), RandomAffine()], ids=["dsa", "affine"])
def test_every_draw_comes_from_the_generator(augment, rng_untouched):
    images = noise(6, 3, 8, 8)
    with rng_untouched():
        first = [augment(images, labels=None, index=None, generator=g) for g in [seeded(0)] for _ in range(12)]
    again = [augment(images, generator=g) for g in [seeded(0)] for _ in range(12)]
    assert all(map(torch.equal, first, again))
    other = [augment(images, generator=g) for g in [seeded(1)] for _ in range(12)]
    assert not any(map(torch.equal, first, other))
    assert not any(map(torch.equal, first, first[1:]))


@everything
def test_images_keep_shape_type_and_device_and_are_not_written_to(augment):
    for shape in SHAPES:
        images = noise(*shape, dtype=torch.float32)
        before = images.clone()
        out = augment(images, generator=seeded(2))
        double = augment(images.double(), generator=seeded(2))
        assert out.shape == images.shape and out.dtype == torch.float32 and double.dtype == torch.float64
        torch.testing.assert_close(out.double(), double, atol=1e-5, rtol=0)
        assert torch.equal(images, before)
        elsewhere = augment(images.to("meta"), generator=seeded(2))  # the generator stays on the CPU
        assert elsewhere.shape == images.shape and elsewhere.device.type == "meta"
        if getattr(augment, "strategy", None) != ("flip",):
            assert not any(map(torch.equal, out, images)), "every image changes"


@operations
@shapes
def test_no_strength_is_exactly_the_identity(name, shape):
    images = noise(*shape, dtype=torch.float32)
    assert torch.equal(DSA(strategy=(name,), **NO_STRENGTH)(images, generator=seeded(0)), images)


def test_a_random_affine_without_strength_is_exactly_the_identity():
    images = noise(4, 3, 9, 9, dtype=torch.float32)
    assert torch.equal(RandomAffine(0, 0, 0)(images, generator=seeded(0)), images)


# --- gradients --------------------------------------------------------------------------------------------------------


@everything
@pytest.mark.parametrize("shape", [(3, 3, 6, 6), (3, 1, 5, 4)], ids=str)
def test_gradient_in_the_images(augment, shape):
    images = noise(*shape).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: augment(x, generator=seeded(1)), images)


def distilled(augment, seed=0):
    """The record, and phi's pixels, after two iterations through an augmentation."""
    student, images, labels = ConvNet(1, 3, 8, width=4, depth=1), noise(6, 1, 8, 8), torch.arange(6) % 3
    theta = torch.stack([initial_parameters(student, k) for k in (1, 2)])[None].double()
    phi = make_phi("pixels", images, 3, 0)
    config = DistillConfig(iterations=2, syn_steps=4, expert_epochs=1, max_start_epoch=0, phi_optimizer="SGD", phi_lr=1)
    experts = Trajectories(student.double(), theta)
    result = distill(phi, images, labels, experts, config, seed=seed, augment=augment)
    return result.history, phi.pixels.detach()


@everything
def test_distillation_goes_through_the_augmentation(augment):
    history, pixels = distilled(augment)
    plain, plain_pixels = distilled(None)
    assert all(math.isfinite(r[key]) for r in history for key in ("loss", "alpha", "grad_norm"))
    assert pixels.isfinite().all()
    assert history[0]["grad_norm"] > 0 and history[0]["grad_norm"] != plain[0]["grad_norm"]
    assert not torch.equal(pixels, plain_pixels)
    assert history == distilled(augment)[0]


def test_without_strength_distillation_is_that_without_augmentation():
    history, pixels = distilled(DSA(**NO_STRENGTH))
    plain, plain_pixels = distilled(None)
    assert history == plain and torch.equal(pixels, plain_pixels)


# --- on pixels: crop and flip, and the policies -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    return load("digits", 16)


@pytest.fixture(scope="module")
def coloured():
    """Random images of three channels as a set, standardised and whitened."""
    raw = torch.randint(0, 256, (40, 3, 8, 8), generator=seeded(0), dtype=torch.uint8)
    parts = torch.arange(40).split([30, 5, 5])
    found = standardised("cifar10", "ab", raw, torch.arange(40) % 2, parts)
    fitted = whitening.fit(found.train.raw)
    changes = {"zero": 255 * fitted["mean"], "unit": torch.full((1, 1, 1), 255.0), "whiten": fitted["matrix"]}
    splits = {k: dataclasses.replace(getattr(found, k), **changes) for k in ("train", "validation", "test")}
    white = dataclasses.replace(found, **splits, mean=fitted["mean"], std=torch.ones(1, 1, 1), colour=fitted["inverse"])
    return {"standardised": found, "whitened": white}


def named(data, name):
    return dataclasses.replace(data, name=name)


kinds = pytest.mark.parametrize("kind", ["standardised", "whitened"])
library = pytest.mark.parametrize("name", LIBRARY)


@kinds
def test_standardise_undoes_pixels(kind, coloured, digits):
    for data in (coloured[kind], digits):
        images = data.train.take(slice(0, 20)).images
        torch.testing.assert_close(data.standardise(data.pixels(images)), images, atol=2e-4, rtol=0)


@kinds
@library
def test_a_policy_sees_and_leaves_bytes(name, kind, coloured, monkeypatch):
    data, seen = coloured[kind], []
    images = data.train.images

    def watched(pixels, down, right):
        seen.append(pixels)
        return crop(pixels, down, right)

    monkeypatch.setattr(augmentations, "crop", watched)
    out = augmentation(name, data)(images, generator=seeded(1))
    torch.testing.assert_close(255 * seen[0], data.train.raw.float(), atol=1e-4, rtol=0)  # whitened or not
    pixels = out if data.colour is None else (out.flatten(1) @ data.colour).view_as(out)
    pixels = pixels * data.std + data.mean  # not `data.pixels`, which clamps
    assert pixels.min() > -1e-4 and pixels.max() < 1 + 1e-4
    torch.testing.assert_close(255 * pixels, (255 * pixels).round(), atol=0.05, rtol=0)
    assert out.shape == images.shape and out.dtype == images.dtype and out.isfinite().all()
    assert sum(not torch.equal(a, b) for a, b in zip(out, images, strict=True)) / len(out) > 0.5
    # a phi before it may leave [0, 1]
    assert augmentation(name, data)(100 * images, generator=seeded(1)).isfinite().all()


@library
def test_a_policy_draws_from_its_generator_alone(name, digits, rng_untouched):
    augment, images = augmentation(name, digits), digits.train.take(slice(0, 30)).images
    before = images.clone()
    with rng_untouched():
        first = [augment(images, labels=None, index=None, generator=g) for g in [seeded(0)] for _ in range(2)]
    again = [augment(images, generator=g) for g in [seeded(0)] for _ in range(2)]
    assert all(map(torch.equal, first, again)) and torch.equal(images, before)
    assert not torch.equal(*first) and not torch.equal(first[0], augment(images, generator=seeded(1)))


def test_crop_and_flip_are_windows_of_the_padded_image_or_its_mirror(digits):
    data = named(digits, "fashion")
    images = data.train.take(slice(0, 200)).images
    pixels, out = (
        (255 * data.pixels(x)).round() for x in (images, augmentation("crop_flip", data)(images, generator=seeded(3)))
    )
    found = []
    for x, y in zip(pixels, out, strict=True):
        windows = F.pad(x, (2, 2, 2, 2)).unfold(1, 16, 1).unfold(2, 16, 1)[0]  # [5, 5, 16, 16]
        sides = [(windows == side).all((-1, -2)).nonzero().tolist() for side in (y[0], y[0].flip(-1))]
        assert sides[0] or sides[1]
        found.append((bool(sides[1]), *(sides[0] or sides[1])[0]))
    flipped, down, right = zip(*found, strict=True)
    assert 0.35 < np.mean(flipped) < 0.65 and set(down) == set(right) == set(range(5))


# --- by name ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", [("flip", "blur"), "color_crop", ("",), ()], ids=str)
def test_an_unknown_operation_is_refused_by_name(strategy):
    with pytest.raises(ValueError, match=r"strategy=.*must be one or more of color, crop, cutout, flip, scale, rotate"):
        DSA(strategy=strategy)


@pytest.mark.parametrize(
    "key, value",
    [("brightness", -1), ("crop", 1.5), ("cutout", 2), ("flip", 1.1), ("scale", 0.9), ("rotate", math.nan)],
)
def test_an_impossible_strength_is_refused_by_name(key, value):
    with pytest.raises(ValueError, match=f"^{key}={value}: must be"):
        DSA(**{key: value})


def test_the_flip_is_left_out_where_a_mirror_image_is_no_digit(digits):
    cifar, fashion = named(digits, "cifar10"), named(digits, "fashion")
    for data in (digits, named(digits, "mnist")):
        assert augmentation("dsa", data) == DSA(strategy=("color", "crop", "cutout", "scale", "rotate"))
        assert augmentation("flip_affine", data) == AUGMENTATIONS["affine"]
        assert {augmentation(name, data).flip for name in LIBRARY} == {0}
    assert augmentation("dsa", cifar) == DSA() == AUGMENTATIONS["dsa"]
    assert augmentation("affine", digits) == AUGMENTATIONS["affine"] == augmentation("affine", fashion)
    assert augmentation("flip_affine", fashion) == RandomAffine(flip=0.5)
    assert {augmentation(name, cifar).flip for name in LIBRARY} == {0.5}
    assert augmentation("none", digits) is None
    assert set(augmentations.NEVER_FLIPPED) <= {"digits", "mnist"}


@pytest.mark.parametrize("key", ["expert_augment", "augment", "eval_augment"])
def test_settings_know_the_augmentations_and_use_none_unless_told(key):
    assert getattr(Settings(), key) == "none"
    known = {"augment": DIFFERENTIABLE, "eval_augment": (*AUGMENTATIONS, RANDOM_POLICY, "instaaug")}
    known = known.get(key, tuple(AUGMENTATIONS))
    for name in known:
        assert getattr(Settings(**{key: name}), key) == name
    for wrong in {"dsa2", *AUGMENTATIONS} - set(known):
        with pytest.raises(ValueError, match=rf"{key}='{wrong}': must be one of {', '.join(known)} \("):
            Settings(**{key: wrong})


# --- who uses them ----------------------------------------------------------------------------------------------------

SMALL = dict(size=8, width=4, depth=1, experts=1, epochs=1)


class Caught(Exception):
    pass


@pytest.mark.parametrize(
    "key, function",
    [
        ("expert_augment", "train_expert"),
        ("expert_augment", "train_together"),
        ("augment", "distill"),
        ("eval_augment", "evaluate"),
    ],
)
def test_every_job_takes_its_own_augmentation_and_no_other(key, function, monkeypatch, tmp_path):
    def catch(*_, augment, **__):
        raise Caught(augment)

    module = {"distill": distillation, "evaluate": scoring}.get(function, experts)
    monkeypatch.setattr(distillation, "load_trajectories", lambda setup, store: None)
    monkeypatch.setattr(module, function, catch)
    subset = Subset(0, per_class=1)
    for chosen in ("none", "dsa"):
        others = dict.fromkeys(("expert_augment", "augment", "eval_augment"), "affine") | {key: chosen}
        settings = Settings(**SMALL, **others)
        setup = settings.select(Setup)
        job = {
            "train_expert": Expert(setup, 0),
            "train_together": Together(setup, (0,)),
            "distill": Distillation(setup, "unet", subset, settings.select(DistillConfig)),
            "evaluate": Evaluation(setup, subset, settings.select(EvalConfig)),
        }[function]
        with pytest.raises(Caught) as caught:
            job.work(Store(tmp_path), lambda done, total: None)
        (found,) = caught.value.args
        assert getattr(found, "phi", found) == augmentation(chosen, load("digits", 8))  # students' is `Applied`


def test_what_depends_on_the_augmentation_is_not_mistaken_for_another():
    def specs(**changes):
        settings, subset = Settings(**SMALL, **changes), Subset(0, per_class=1)
        setup = settings.select(Setup)
        distillation = Distillation(setup, "unet", subset, settings.select(DistillConfig))
        return (
            Expert(setup, 0).spec(),
            distillation.spec(),
            Evaluation(setup, subset, settings.select(EvalConfig), distillation).spec(),
        )

    plain = specs()
    assert [a == b for a, b in zip(plain, specs(expert_augment="dsa"), strict=True)] == [False, False, False]
    assert [a == b for a, b in zip(plain, specs(augment="dsa"), strict=True)] == [True, False, False]
    assert [a == b for a, b in zip(plain, specs(eval_augment="dsa"), strict=True)] == [True, True, False]


def test_evaluation_augments_after_phi_with_draws_of_its_own():
    student, images, labels = ConvNet(1, 3, 8, width=4, depth=1), noise(6, 1, 8, 8).float(), torch.arange(6) % 3
    config = EvalConfig(eval_steps=4, eval_batch=4)
    seen, draws = [], []

    def watch(x, *, labels, index, generator):
        seen.append((x, labels, index))
        draws.append(torch.rand((), generator=generator).item())
        return x

    def black(x, **_):
        return torch.zeros_like(x)

    def trained(phi, **augment):
        return flatten(train_student(student, phi, images, labels, config, 7, **augment).parameters())

    plain = trained(None)
    assert torch.equal(plain, trained(None, augment=watch))
    assert all(torch.equal(x, images[i]) and torch.equal(y, labels[i]) for x, y, i in seen)
    first = draws.copy()
    draws.clear()
    phi = PHIS["distnet2"](images, 3)  # draws noise
    noisy = trained(phi)
    assert torch.equal(noisy, trained(phi, augment=watch))
    assert draws == first  # the same for every phi
    assert not any(torch.equal(x, images[i]) for x, _, i in seen[len(first) :])  # phi came before
    dark = trained(black)
    assert torch.equal(dark, trained(None, augment=black))
    shaken = trained(None, augment=DSA())
    assert shaken.isfinite().all() and not torch.equal(shaken, plain)


def test_evaluation_hands_its_augmentation_to_every_student():
    data = load("digits", 8)
    train = data.train.take(data.subset(0, per_class=1))
    called = []
    evaluate(
        ConvNet(1, 10, 8, width=4, depth=1),
        None,
        train,
        data.validation,
        EvalConfig(eval_students=3, eval_steps=4),
        0,
        augment=lambda images, **_: called.append(len(images)) or images,
    )
    assert called == [10] * 4 * 3
