"""kornia's augmentations as phis: kornia's own pictures for the same draws, and a gradient for each learned range."""

import math

import kornia.augmentation
import pytest
import torch

from augdistill_core import PHIS, ConvNet, DistillConfig, Trajectories, distill, initial_parameters, make_phi, seeded

NAMES = [name for name in PHIS if name.startswith("kornia:")]
names = pytest.mark.parametrize("name", NAMES)


def images(*shape, seed=0):
    return torch.rand(*shape, generator=seeded(seed), dtype=torch.float64)


def call(phi, x, seed=0):
    return phi(x, labels=None, index=None, generator=seeded(seed))


def test_they_are_registered_under_kornia_s_names():
    assert len(NAMES) == 11
    assert all(hasattr(kornia.augmentation, name.removeprefix("kornia:")) for name in NAMES)


@names
@pytest.mark.parametrize("channels", [1, 3])
def test_every_range_has_its_gradient(name, channels):
    """By finite differences in float64, for each learned range, through the images that it made."""
    x = images(3, channels, 7, 6)
    phi = make_phi(name, x, 2, 0)

    def made(change):
        return torch.func.functional_call(phi, {"change": change}, (x,), dict(generator=seeded(1)))

    change = (0.05 + 0.01 * torch.arange(len(phi.kinds), dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(made, change)
    jacobian = torch.autograd.functional.jacobian(made, change).flatten(0, -2)
    assert jacobian.isfinite().all() and (jacobian.abs().amax(0) > 1e-3).all()


@names
@pytest.mark.parametrize("channels", [1, 3])
def test_it_has_a_gradient_in_the_images(name, channels):
    x = images(2, channels, 5, 6)
    phi = make_phi(name, x, 2, 0)
    inside = (0.1 + 0.8 * x).requires_grad_()  # away from the border of the range, where colour is clamped
    assert torch.autograd.gradcheck(lambda x: call(phi, x), inside)


@names
def test_ranges_start_small_stay_below_their_limit_and_are_told(name):
    x = images(200, 3, 8, 8)
    phi = make_phi(name, x, 2, 0)
    assert phi.report() == pytest.approx({kind: phi.KINDS[kind][0] for kind in phi.kinds})
    assert all(t.is_contiguous() for t in phi.state_dict().values())  # or it cannot be stored
    small = (call(phi, x) - x).square().mean().sqrt()
    assert 0 < small < 0.2
    with torch.no_grad():
        phi.change.fill_(100)
    limits = {kind: phi.KINDS[kind][1] for kind in phi.kinds}
    assert phi.report() == pytest.approx(limits)
    assert call(phi, x).isfinite().all() and (call(phi, x) - x).square().mean().sqrt() > 2 * small
    with torch.no_grad():
        phi.change.fill_(-100)
    torch.testing.assert_close(call(phi, x), x, atol=1e-7, rtol=0)
    with torch.no_grad():
        phi.change.fill_(math.nan)
    assert call(phi, x).isnan().all()  # and no crash


def drawn(name, x, *values):
    """A phi of that name on images, with these draws, `[B]` a kind, in the order of its kinds."""
    phi = make_phi(name, x, 2, 0)
    return phi.transformed(x, dict(zip(phi.kinds, map(torch.as_tensor, values), strict=True)))


def test_the_affine_is_kornia_s_random_affine():
    x = images(2, 3, 9, 7)
    angle, right, down = (torch.tensor(v, dtype=x.dtype) for v in ([20.0, -35.0], [0.1, -0.2], [0.05, 0.1]))
    size, shear_x, shear_y = (torch.tensor(v, dtype=x.dtype) for v in ([0.1, -0.2], [10.0, -5.0], [-3.0, 8.0]))
    params = {
        "translations": torch.stack([right * 7, down * 9], 1),
        "center": torch.tensor([[3.0, 4.0]], dtype=x.dtype).expand(2, -1),
        "scale": size.exp()[:, None].expand(-1, 2),
        "angle": angle,
        "shear_x": shear_x,
        "shear_y": shear_y,
        "batch_prob": torch.ones(2),
    }
    theirs = kornia.augmentation.RandomAffine(180, padding_mode="border", align_corners=True, p=1.0)
    ours = drawn("kornia:RandomAffine", x, angle, right, down, size, shear_x, shear_y)
    torch.testing.assert_close(ours, theirs(x, params=params))


def test_the_perspective_is_kornia_s_random_perspective():
    x = images(2, 3, 9, 7)
    offsets = 0.2 * (2 * images(2, 8, seed=1) - 1)
    corners = torch.tensor([[0, 0], [6, 0], [6, 8], [0, 8]], dtype=x.dtype).expand(2, -1, -1)
    moved = corners + offsets.view(2, 4, 2) * torch.tensor([7.0, 9.0], dtype=x.dtype) / 2
    params = {"start_points": corners, "end_points": moved, "batch_prob": torch.ones(2)}
    theirs = kornia.augmentation.RandomPerspective(p=1.0, align_corners=True)
    torch.testing.assert_close(drawn("kornia:RandomPerspective", x, offsets), theirs(x, params=params))


def test_the_colour_is_kornia_s_color_jitter():
    x = images(2, 3, 9, 7)
    x[:, :, 0, 0], x[:, :, 0, 1] = 0, 1  # so that the least and the largest value are those of pixels
    brightness, contrast, saturation, hue = (torch.tensor(v, dtype=x.dtype) for v in ([-0.3, 0.2],) * 4)
    params = {
        "brightness_factor": 1 + brightness,
        "contrast_factor": 1 + contrast,
        "saturation_factor": 1 + saturation,
        "hue_factor": hue / (2 * math.pi),
        "order": torch.arange(4),
        "batch_prob": torch.ones(2),
    }
    theirs = kornia.augmentation.ColorJitter(0.5, 0.5, 0.5, 0.5, p=1.0)
    ours = drawn("kornia:ColorJitter", x, brightness, contrast, saturation, hue)
    torch.testing.assert_close(ours, theirs(x, params=params))
    far = 5 * x - 2  # standardised images: the same pixels, and the same change
    phi = make_phi("kornia:ColorJitter", far, 2, 0)
    draw = dict(zip(phi.kinds, (brightness, contrast, saturation, hue), strict=True))
    torch.testing.assert_close((phi.transformed(far, draw) + 2) / 5, ours)


VALUES = [-0.3, 0.2]  # a draw for each of two images


@pytest.mark.parametrize(
    "name, key, given, options",
    [
        ("RandomGaussianBlur", "sigma", lambda v: 0.1 + v.abs(), dict(kernel_size=5, sigma=(0.1, 2.0))),
        ("RandomBrightness", "brightness_factor", lambda v: 1 + v, {}),
        ("RandomContrast", "contrast_factor", lambda v: 1 + v, {}),
        ("RandomSharpness", "sharpness", lambda v: 1 + v, {}),
    ],
)
def test_one_range_makes_kornia_s_pictures(name, key, given, options):
    x, values = images(2, 3, 9, 7), torch.tensor(VALUES, dtype=torch.float64)
    x[:, :, 0, 0], x[:, :, 0, 1] = 0, 1  # so that the least and the largest value are those of pixels
    theirs = getattr(kornia.augmentation, name)(p=1.0, **options)
    params = {key: given(values), "batch_prob": torch.ones(2)}
    torch.testing.assert_close(drawn(f"kornia:{name}", x, values), theirs(x, params=params))


def test_the_spline_is_kornia_s_random_thin_plate_spline():
    x, moved = images(2, 3, 9, 7), 0.2 * (2 * images(2, 10, seed=1) - 1)
    points = torch.tensor([[-1, -1], [-1, 1], [1, -1], [1, 1], [0, 0]], dtype=x.dtype).expand(2, -1, -1)
    params = {"src": points, "dst": points + moved.view(2, 5, 2), "batch_prob": torch.ones(2)}
    theirs = kornia.augmentation.RandomThinPlateSpline(p=1.0, align_corners=True)
    torch.testing.assert_close(drawn("kornia:RandomThinPlateSpline", x, moved), theirs(x, params=params))


@pytest.mark.parametrize("name", ["RandomRotation", "RandomShear", "RandomTranslate"])
def test_a_part_of_the_affine_is_the_affine_with_nothing_of_the_rest(name):
    x, whole = images(2, 3, 9, 7), make_phi("kornia:RandomAffine", images(2, 3, 9, 7), 2, 0)
    part = make_phi(f"kornia:{name}", x, 2, 0)
    values = {kind: torch.tensor(VALUES, dtype=x.dtype) * whole.KINDS[kind][1] for kind in part.kinds}
    assert 0 < len(values) < len(whole.kinds)
    rest = {kind: torch.zeros(2, dtype=x.dtype) for kind in whole.kinds}
    out = part.transformed(x, values)
    assert torch.equal(out, whole.transformed(x, rest | values)) and (out - x).abs().max() > 0.01


@names
def test_distillation_moves_every_range(name):
    student, x = ConvNet(3, 3, 8, width=4, depth=1), images(6, 3, 8, 8).float()
    theta = torch.stack([initial_parameters(student, k) for k in (1, 2)])[None]
    phi = make_phi(f"{name}+policy", x, 3, 0)
    config = DistillConfig(iterations=2, syn_steps=3, expert_epochs=1, max_start_epoch=0, phi_lr=0.01)
    history = distill(phi, x, torch.arange(6) % 3, Trajectories(student, theta), config, seed=0).history
    kinds = phi.phis[0].kinds
    assert all(math.isfinite(record["loss"]) for record in history)
    assert all(history[0]["phi"][kind] != phi.phis[0].report()[kind] for kind in kinds)
