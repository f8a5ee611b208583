"""Learned policies: each transformation against an independent computation, and what their ranges learn from."""

import math

import pytest
import torch
from scipy import ndimage

from augdistill_core import Applied, DistillConfig, distill, make_phi, seeded, train_experts
from augdistill_method import transforms
from augdistill_method.phi import Chain
from augdistill_method.zoo import policy as policies
from augdistill_method.zoo.policy import Policy
from augdistill_method.zoo.unet import UNet
from augdistill_report.data.augmentations import without_flips
from augdistill_report.settings import resolve


def images(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def per_image(*values):
    return torch.tensor(values, dtype=torch.float64)


ZERO = per_image(0.0, 0.0)


def call(phi, x, labels=None, seed=0):
    labels = torch.zeros(len(x), dtype=torch.int64) if labels is None else labels
    return phi(x, labels=labels, index=torch.arange(len(x)), generator=seeded(seed))


# --- the transformations ----------------------------------------------------------------------------------------------


def test_an_affine_is_scipy_s():
    x = images(2, 1, 12, 12)
    angle, size, shear = per_image(0.4, -0.2), per_image(0.3, -0.1), per_image(0.2, -0.3)
    right, down = per_image(0.1, -0.05), per_image(-0.2, 0.15)
    out = policies.affine(x, angle, size, shear, right, down)
    for k in range(2):
        a, s, h = angle[k].item(), math.exp(size[k].item()), shear[k].item()
        # the content is shifted, turned back by -a ... : from output (y, x) to input, about the middle
        turn = torch.tensor([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]], dtype=torch.float64)  # of (y, x)
        slant = torch.tensor([[1.0, 0.0], [h, 1.0]], dtype=torch.float64)
        matrix = turn @ slant / s
        middle = torch.tensor([5.5, 5.5], dtype=torch.float64)
        offset = middle - matrix @ middle - 12 * torch.stack([down[k], right[k]])
        expected = ndimage.affine_transform(x[k, 0].numpy(), matrix.numpy(), offset.numpy(), order=1, mode="nearest")
        torch.testing.assert_close(out[k, 0], torch.from_numpy(expected))


def test_each_part_of_an_affine_does_what_its_name_says():
    x = torch.zeros(2, 1, 9, 9, dtype=torch.float64)
    x[:, :, 4, 6] = 1  # right of the middle
    quarter = per_image(math.pi / 2, math.pi / 2)
    turned = policies.affine(x, quarter, ZERO, ZERO, ZERO, ZERO)
    assert turned[0, 0].argmax() in (2 * 9 + 4, 6 * 9 + 4)
    moved = policies.affine(x, ZERO, ZERO, ZERO, per_image(1 / 9, 0.0), per_image(0.0, -2 / 9))
    assert moved[0, 0].argmax() == 4 * 9 + 7 and moved[1, 0].argmax() == 2 * 9 + 6
    larger = policies.affine(x, ZERO, per_image(math.log(2), 0.0), ZERO, ZERO, ZERO)
    assert larger[0, 0].argmax() == 4 * 9 + 8 and torch.equal(larger[1], x[1])


def test_a_hue_s_third_of_a_turn_permutes_the_channels_and_keeps_grey():
    x = images(2, 3, 4, 4)
    third = per_image(2 * math.pi / 3, -2 * math.pi / 3)
    out = policies.turn_hue(x, third)
    permuted = {tuple(p) for p in ((1, 2, 0), (2, 0, 1)) for k in range(2) if torch.allclose(out[k], x[k, list(p)])}
    assert permuted == {(1, 2, 0), (2, 0, 1)}
    torch.testing.assert_close(policies.turn_hue(x, per_image(0.3, 1.0)).mean(1), x.mean(1))
    torch.testing.assert_close(policies.turn_hue(x, per_image(0.3, 1.0)).norm(dim=1), x.norm(dim=1))
    assert torch.equal(policies.turn_hue(x, ZERO), x.mean(1, keepdim=True) + (x - x.mean(1, keepdim=True)))


@pytest.mark.parametrize("p", [0.01, 0.3, 0.97])
def test_a_flip_is_drawn_as_often_as_it_says_and_learns_by_what_a_whole_flip_does(p):
    n = 20_000
    x, noise = images(1, 1, 3, 4).expand(n, -1, -1, -1), (torch.arange(n, dtype=torch.float64) + 0.5) / n
    logit = torch.full((n,), p, dtype=torch.float64).logit().requires_grad_()
    out, mirrored = policies.drawn_flip(x, logit, noise), x.flip(3)
    none, one = ((out == end).all((1, 2, 3)).double().mean().item() for end in (x, mirrored))
    ramp = min(policies.RAMP, 2 * p, 2 - 2 * p)  # the draws between them
    assert none == pytest.approx(1 - p - ramp / 2, abs=1e-3) and one == pytest.approx(p - ramp / 2, abs=1e-3)
    torch.testing.assert_close(out.mean(0), x[0] + p * (mirrored - x)[0], atol=1e-4, rtol=0)

    def value(images):  # better in the mirror, and worse on the first third of the way there
        way = (images - x).flatten(1).norm(dim=1) / (mirrored - x).flatten(1).norm(dim=1)
        return way * (3 * way - 2)

    value(out).mean().backward()
    assert float(value(mirrored)[0]) == pytest.approx(1) and float(value(x + 0.1 * (mirrored - x))[0]) < 0
    assert logit.grad.sum().item() == pytest.approx(p * (1 - p), rel=0.01)  # d/dlogit of p * 1 + (1 - p) * 0


def test_a_flip_that_is_certain_is_one_and_its_gradient_finite():
    x = images(2, 1, 3, 4)
    certain = torch.tensor([40.0, -40.0], dtype=torch.float64, requires_grad=True)
    out = policies.drawn_flip(x, certain, torch.tensor([0.9, 0.1], dtype=torch.float64))
    assert torch.equal(out[0], x[0].flip(2)) and torch.equal(out[1], x[1])
    out.sum().backward()
    assert certain.grad.isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("padding", ["border", "zeros"])
def test_a_transformation_that_explodes_is_not_a_number_and_no_crash(bad, padding):
    x = images(2, 1, 8, 8).requires_grad_()
    matrix = torch.eye(2, 3, dtype=torch.float64).repeat(2, 1, 1)
    matrix[0, 0, 0] = bad
    out = transforms.warp(x, matrix.requires_grad_(), padding=padding, align_corners=False)
    assert torch.equal(out[1], x[1]) and (math.isfinite(bad) or out[0].isnan().all())
    out[1].sum().backward()
    assert x.grad[1].eq(1).all()


# --- the phi ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["all", "class", "image"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_policy_s_spread_grows_with_its_ranges_and_vanishes_without(by, channels):
    x, labels = images(6, channels, 8, 8), torch.arange(6) % 3
    for start, low, high in ((1e-9, 0.0, 1e-6), (0.03, 1e-3, 0.8)):
        policy = Policy(x, 3, by=by, start=start).double()
        change = (call(policy, x, labels) - x).square().mean().sqrt().item()
        assert low <= change <= high
    assert ("hue" in policy.kinds) == ("saturation" in policy.kinds) == (channels == 3)
    ranges = policy.ranges(x, labels)
    assert list(ranges) == policy.kinds and all(r.shape == (6,) for r in ranges.values())


def test_ranges_belong_to_all_to_a_class_or_to_an_image():
    x, labels = images(6, 1, 8, 8), torch.arange(6) % 3
    generator = torch.Generator().manual_seed(0)
    for by, different in (("all", 1), ("class", 3), ("image", 6)):
        policy = Policy(x, 3, by=by).double()
        with torch.no_grad():
            for p in policy.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
        assert len(policy.ranges(x, labels)["rotation"].unique()) == different
        report = policy.report()
        if by == "image":
            assert report == {}
        else:
            own = policy.ranges(x[:3], labels[:3])
            assert report["scale"] == pytest.approx(own["scale"].log().mean().exp().item())
            assert list(report) == policy.kinds


@pytest.mark.parametrize("by", ["all", "class", "image"])
def test_a_kind_that_is_left_out_changes_nothing_any_more(by):
    x = images(400, 1, 4, 4)
    policy = Policy(x, 2, by=by, start=0.4).double()
    for kind in list(policy.kinds)[:-1]:
        policy.leave_out(kind)
    out, way = call(policy, x).detach(), x.flip(3) - x
    share = ((out - x) * way).sum((1, 2, 3), keepdim=True) / way.square().sum((1, 2, 3), keepdim=True)
    assert policy.kinds == ["flip"] and torch.allclose(out, x + share * way)  # nothing but flips, and blends of two
    assert share.mean() == pytest.approx(0.4, abs=0.1)
    policy.leave_out("flip")
    assert torch.equal(call(policy, x), x)


@pytest.mark.parametrize("name", ["policy", "unet+policy_class", "policy_image"])
def test_no_digit_is_flipped(name):
    x = images(4, 1, 8, 8)
    for dataset, flips in (("digits", False), ("mnist", False), ("fashion", True), ("folder:x", True)):
        phi = without_flips(make_phi(name, x, 3, 0), dataset)
        (policy,) = (m for m in phi.modules() if isinstance(m, Policy))
        assert ("flip" in policy.kinds) == flips
        call(phi, x)


def test_a_chain_is_one_phi_after_the_other_and_claims_what_they_claim():
    x, labels = images(4, 1, 8, 8), torch.arange(4) % 3
    chain = make_phi("unet_class+policy", x, 3, 0)
    assert isinstance(chain, Chain) and chain.stochastic and chain.conditional and not chain.bound
    assert not chain.starts_as_identity and make_phi("unet+identity", x, 3, 0).starts_as_identity
    assert torch.equal(call(chain, x, labels), call(make_phi("policy", x, 3, 0), x, labels))  # the U-Net starts as x
    assert chain.report() == make_phi("policy", x, 3, 0).report()
    assert Chain([Add(), UNet(x, 3)]).report() == {}  # any module may be a phi
    with pytest.raises(ValueError, match="unknown phi 'nonesuch'"):
        make_phi("unet+nonesuch", x, 3, 0)


# --- how strongly and how often ---------------------------------------------------------------------------------------


class Add(torch.nn.Module):
    def forward(self, x, **_):
        return x + 1


def test_strength_and_probability():
    x = images(4000, 1, 2, 2)
    assert torch.equal(call(Applied(Add()), x), x + 1)
    torch.testing.assert_close(call(Applied(Add(), strength=0.25), x), x + 0.25)
    assert torch.equal(call(Applied(Add(), strength=0.0), x), x)
    out = call(Applied(Add(), probability=0.3), x)
    taken = (out != x).all((1, 2, 3))
    assert torch.equal(out[taken], x[taken] + 1) and torch.equal(out[~taken], x[~taken])
    assert taken.double().mean() == pytest.approx(0.3, abs=0.03)
    assert torch.equal(call(Applied(Add(), probability=0.0), x), x)
    assert Applied(UNet(x.repeat(1, 1, 2, 2), 3)).starts_as_identity and Applied(Add(), probability=0.5).stochastic


# --- what they learn --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world():
    settings = resolve("smoke", {"size": 16})
    data = settings.load()
    student = settings.student(data)
    experts = train_experts(student, data.train.images, data.train.labels, settings, 0)
    base = data.train.take(data.subset(0, per_class=2))
    return settings, experts, base


def test_distill_records_the_ranges(world):
    settings, experts, base = world
    config = settings.select(DistillConfig, iterations=3, draws=2)
    phi = make_phi("unet+policy", base.images, 10, 0)
    history = distill(phi, base.images, base.labels, experts, config, seed=0).history
    assert history[0]["phi"]["rotation"] == pytest.approx(0.03) and len(history[0]["phi"]) == 8
    assert history[2]["phi"]["rotation"] != history[0]["phi"]["rotation"]
    plain = distill(make_phi("unet", base.images, 10, 0), base.images, base.labels, experts, config, seed=0)
    assert "phi" not in plain.history[0]


def test_alpha_is_held_while_the_loss_is_not_below_one(world):
    """A phi that blanks its images teaches nothing: the loss is above 1, and a free alpha runs down."""
    settings, experts, base = world

    class Noise(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.size = torch.nn.Parameter(torch.tensor(3.0))

        def forward(self, x, *, generator, **_):
            return self.size * torch.randn(x.shape, generator=generator)

    alphas = {}
    for mode in ("log", "held"):
        config = settings.select(DistillConfig, iterations=25, alpha=0.3, alpha_mode=mode, alpha_lr=0.1)
        result = distill(Noise(), base.images, base.labels, experts, config, seed=0)
        alphas[mode] = [r["alpha"] for r in result.history]
        losses = [r["loss"] for r in result.history]
        if mode == "held":
            held = [sum(losses[max(0, i - 9) : i + 1]) >= min(i + 1, 10) for i in range(len(losses))]
            assert held[0]
            for i in range(len(losses) - 1):
                assert (alphas[mode][i + 1] == alphas[mode][i]) == held[i]
    assert alphas["log"][-1] < 0.5 * alphas["log"][0]
    config, real = settings.select(DistillConfig, alpha_mode="held", objective="real_loss"), (base.images, base.labels)
    with pytest.raises(ValueError, match=r"alpha_mode='held': needs the matching loss"):
        distill(Noise(), base.images, base.labels, experts, config, seed=0, real=real)
    # where the loss is below 1 from the start, the two are the same
    easy = [
        distill(make_phi("unet", base.images, 10, 0), base.images, base.labels, experts, c, seed=0).history
        for c in (settings.select(DistillConfig, iterations=4, alpha_mode=m, alpha=0.01) for m in ("log", "held"))
    ]
    assert easy[0] == easy[1]


@pytest.mark.parametrize("by", ["all", "class", "image"])
def test_a_policy_can_hold_given_ranges(by):
    x, labels = torch.rand(6, 3, 8, 8), torch.arange(6) % 3
    phi = policies.Policy(x, 3, by=by)
    with torch.no_grad():
        for p in phi.parameters():
            p.add_(0.3)
    phi.hold({"rotation": 0.2, "flip": 0.25})
    found = phi.ranges(x, labels)
    for kind, value in found.items():
        expected = {"rotation": 0.2, "flip": 0.25}.get(kind, 0.0)
        torch.testing.assert_close(value, torch.full((6,), expected), atol=2e-6, rtol=1e-5)
    phi.hold({})
    torch.testing.assert_close(call(phi, x, labels), x, atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="range 'zoom': must be among rotation, scale"):
        phi.hold({"zoom": 0.1})
