"""Phi models: one harness that every registered phi passes, and the networks against their formulas written out.

The harness reads the class attributes (stochastic, conditional, bound, starts_as_identity) as claims and tests each.
"""

import pytest
import torch
import torch.nn.functional as F

from augdistill_core import (
    PHIS,
    Added,
    Applied,
    ConvNet,
    DistillConfig,
    ExpertConfig,
    Phi,
    Stored,
    distill,
    labels_under,
    make_phi,
    register_phi,
    seeded,
    train_experts,
)
from augdistill_method import phi as phi_module
from augdistill_method.zoo.distnets import DistNet
from augdistill_method.zoo.mlp import MLP
from augdistill_method.zoo.unet import UNet

SHAPES = [(10, 1, 16, 16), (6, 3, 32, 32), (5, 1, 28, 28), (4, 3, 8, 8)]
every_phi = pytest.mark.parametrize("name", sorted(PHIS))
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))


def base(shape, dtype=torch.float32):
    """Base images of that shape with their labels (3 classes) and indices."""
    images = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return images, torch.arange(len(images)) % 3, torch.arange(len(images))


def jittered(phi, scale=0.05):
    """`phi` with noise on all its parameters: a layer that starts at zero hides what lies behind it."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in phi.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return phi


def call(phi, images, labels, index, seed=0):
    return phi(images, labels=labels, index=index, generator=seeded(seed))


@every_phi
@every_shape
def test_shape_is_kept_and_every_parameter_gets_a_gradient(name, shape):
    images, labels, index = base(shape)
    phi = make_phi(name, images, 3, seed=0)
    assert torch.equal(call(phi, images, labels, index), images) == phi.starts_as_identity
    out = call(jittered(phi), images, labels, index)
    assert out.shape == images.shape and out.dtype == images.dtype and out.isfinite().all()
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    given = labels_under(phi, labels, index)
    loss = (out * weights + out.square()).sum() + (given.float() ** 2).sum()
    if loss.requires_grad:
        loss.backward()
    for key, p in phi.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), f"{key} gets no gradient"


@every_phi
def test_noise_comes_from_the_generator_alone(name, rng_untouched):
    images, labels, index = base(SHAPES[0])
    phi = jittered(make_phi(name, images, 3, seed=0))
    with torch.no_grad(), rng_untouched():
        first, again, other = (call(phi, images, labels, index, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert torch.equal(first, other) != phi.stochastic


@every_phi
def test_labels_matter_where_it_says_so(name):
    images, labels, index = base(SHAPES[0])
    phi = jittered(make_phi(name, images, 3, seed=0))
    with torch.no_grad():
        same = torch.equal(call(phi, images, labels, index), call(phi, images, (labels + 1) % 3, index))
    assert same != phi.conditional


@every_phi
def test_images_are_told_apart_by_their_index(name):
    """A batch in another order, with its index, gives the same images in that order; a bound phi reads that index, for
    its images or for its labels."""
    images, labels, index = base(SHAPES[0])
    phi = jittered(make_phi(name, images, 3, seed=0))
    pick = torch.tensor([7, 0, 3, 3])
    with torch.no_grad():
        part = call(phi, images[pick], labels[pick], index[pick])
        if not phi.stochastic:
            torch.testing.assert_close(part, call(phi, images, labels, index)[pick])
        same = torch.equal(part, call(phi, images[pick], labels[pick], index[pick] * 0))
        for module in phi.modules():
            if hasattr(module, "soft"):  # labels that a start has given
                module.soft.copy_(torch.rand(module.soft.shape, generator=seeded(0)) / 3)
        given = [labels_under(phi, labels[pick], i) for i in (index[pick], index[pick] * 0)]
        assert (same and torch.equal(*given)) != phi.bound


@every_phi
def test_the_seed_makes_the_initialisation(name, rng_untouched):
    images, _, _ = base(SHAPES[3], torch.float64)
    with rng_untouched():
        one = make_phi(name, images, 3, seed=5)
    torch.manual_seed(123)
    two = make_phi(name, images, 3, seed=5)
    assert type(one) is type(two) and one.state_dict().keys() == two.state_dict().keys()
    for key, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[key]) and value.dtype == images.dtype


@pytest.mark.parametrize("name", ["distnet", "distnet2", "unet", "unet_noise"])
def test_another_seed_makes_another_initialisation(name):
    images, _, _ = base(SHAPES[3])
    one, two = (torch.cat([p.flatten() for p in make_phi(name, images, 3, seed).parameters()]) for seed in (0, 1))
    assert (one != two).float().mean() > 0.5


@every_shape
def test_distnet_is_the_report_s_formula(shape):
    images, labels, index = base(shape, torch.float64)
    phi = make_phi("distnet", images, 3, seed=0)
    weight, bias, back_weight, back_bias = phi.parameters()  # nothing else is learned
    assert weight.shape == (6, shape[1], 3, 3) and back_weight.shape == (6, shape[1], 3, 3)
    ours = call(phi, images, labels, index)
    theirs = torch.autograd.grad(ours.square().sum(), list(phi.parameters()))

    h = F.relu(F.conv2d(images, weight, bias))
    h = h + (h.detach() + torch.randn(h.shape, generator=seeded(0), dtype=h.dtype))  # Normal(h, 1), gradient stopped
    scale = torch.tensor(0.001).double()  # phis start in single precision
    expected = scale * F.conv_transpose2d(h, back_weight, back_bias) + images
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    expected = torch.autograd.grad(expected.square().sum(), list(phi.parameters()))
    torch.testing.assert_close(theirs, expected, rtol=1e-10, atol=1e-10)


@every_shape
def test_distnet2_is_the_report_s_formula(shape):
    images, labels, index = base(shape, torch.float64)
    phi = jittered(make_phi("distnet2", images, 3, seed=0))
    learned = dict(phi.named_parameters())
    s1, s2 = learned.pop("s1"), learned.pop("s2")
    w1, b1, w2, b2, w3, b3, w4, b4 = learned.values()
    ours = call(phi, images, labels, index)
    h = F.relu(F.conv2d(F.relu(F.conv2d(images, w1, b1)), w2, b2))
    h = s1 * (h + torch.randn(h.shape, generator=seeded(0), dtype=h.dtype))
    expected = s2 * F.conv_transpose2d(F.relu(F.conv_transpose2d(h, w3, b3)), w4, b4) + images
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    assert [tuple(w.shape[:2]) for w in (w1, w2, w3, w4)] == [(6, shape[1]), (12, 6), (12, 6), (6, shape[1])]


def test_distnet2_starts_with_both_scales_at_a_tenth():
    phi = make_phi("distnet2", base(SHAPES[0])[0], 3, seed=0)
    assert phi.s1.item() == phi.s2.item() == pytest.approx(0.1)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("noise", ["blind", "scaled", "none"])
def test_distnet_with_kernel_1(noise, relu, skip):
    images, labels, index = base(SHAPES[0], torch.float64)
    options = dict(widths=[4, 5], kernel=1, noise=noise, scales=(0.5, 0.25), learned=(True, False))
    phi = DistNet(images, 3, **options, skip=skip, relu=relu).double()
    s1, w1, b1, w2, b2, w3, b3 = phi.parameters()  # s2 is fixed, and one layer leads back
    act = F.relu if relu else lambda x: x
    h = act(F.conv2d(act(F.conv2d(images, w1, b1)), w2, b2))
    eps = torch.randn(h.shape, generator=seeded(0), dtype=h.dtype)
    h = {"blind": h + s1 * (h + eps), "scaled": s1 * (h + eps), "none": h}[noise]
    expected = 0.25 * F.conv2d(h, w3, b3) + (images if skip else 0)
    torch.testing.assert_close(call(phi, images, labels, index), expected, rtol=1e-12, atol=1e-12)
    assert phi.stochastic == (noise != "none")


def test_pixels_are_the_base_images_and_not_an_alias_of_them():
    images, labels, index = base(SHAPES[0])
    phi = make_phi("pixels", images, 3, seed=0)
    before = images.clone()
    with torch.no_grad():
        phi.pixels.add_(1)
    assert torch.equal(images, before)
    assert torch.equal(call(phi, images, labels, index[[2, 5]]), before[[2, 5]] + 1)


def test_unet_refuses_images_that_it_cannot_halve_twice():
    with pytest.raises(ValueError, match=r"3x3.*at least 4x4"):
        make_phi("unet", torch.zeros(2, 1, 3, 3), 3, seed=0)


@pytest.mark.parametrize("size", [4, 5, 6, 7, 9])
def test_unet_takes_sizes_that_do_not_divide_by_4(size):
    images, labels, index = base((2, 1, size, size))
    assert call(jittered(UNet(images, 3, noise=2)), images, labels, index).shape == images.shape


def test_mlp_is_its_formula_and_sees_all_of_the_image():
    images, labels, index = base(SHAPES[1], torch.float64)
    phi = jittered(MLP(images, 3, width=7, noise=2).double())
    (w1, b1), (w2, b2), (w3, b3) = ((m.weight, m.bias) for m in (phi.first, phi.second, phi.last))
    eps = torch.randn((len(images), 2), generator=seeded(0), dtype=torch.float64)
    h = torch.cat([images.reshape(len(images), -1), eps], 1) @ w1.T + b1
    h = (h * h.sigmoid()) @ w2.T + b2
    expected = images + ((h * h.sigmoid()) @ w3.T + b3).reshape(images.shape)
    torch.testing.assert_close(call(phi, images, labels, index), expected, rtol=1e-12, atol=1e-12)

    corner = images.clone().requires_grad_()
    call(phi, corner, labels, index)[:, :, 0, 0].sum().backward()
    assert corner.grad[:, :, -1, -1].abs().min() > 0


def test_a_taken_name_is_refused_and_keeps_its_phi():
    before = dict(PHIS)
    with pytest.raises(ValueError, match="'pixels' is registered already"):
        register_phi("pixels")(UNet)
    assert dict(PHIS) == before


def test_phis_is_read_only():
    with pytest.raises(TypeError):
        PHIS["mine"] = UNet
    with pytest.raises(TypeError):
        del PHIS["pixels"]
    assert "mine" not in PHIS and "pixels" in PHIS


def test_an_unknown_phi_is_refused_with_the_names_there_are():
    with pytest.raises(ValueError, match=r"'nosuch'.*identity.*pixels"):
        make_phi("nosuch", torch.zeros(2, 1, 8, 8), 3, seed=0)


def test_a_phi_of_one_s_own_is_distilled_by_its_name():
    try:

        @register_phi("brightness")
        class Brightness(Phi):
            stochastic = True

            def __init__(self, images, classes):
                super().__init__()
                self.spread = torch.nn.Parameter(torch.ones(1))

            def forward(self, images, *, generator, **_):
                return images + self.spread * torch.randn(len(images), 1, 1, 1, generator=generator)

        images, labels, _ = base((6, 1, 8, 8))
        student = ConvNet(1, 3, 8, width=4, depth=1)
        experts = train_experts(student, images, labels, ExpertConfig(experts=1, epochs=2, expert_batch=3), seed=0)
        config = DistillConfig(iterations=2, syn_steps=2, expert_epochs=1, max_start_epoch=1)
        phi = make_phi("brightness", images, 3, seed=0)
        result = distill(phi, images, labels, experts, config, seed=0)
        assert result.phi is phi and phi.spread.item() != 1 and len(result.history) == 2 and not result.stopped
    finally:
        phi_module._REGISTRY.pop("brightness", None)
    assert "brightness" not in PHIS


def by_hand(name, x, p, eps):
    """The rest of the student report's family, and HaBa's hallucinator, from their own code's formulas.

    `p` are the weights, in their order; `eps` draws standard normal noise of a shape.
    """

    def conv(h, k):
        return F.conv2d(h, p[2 * k], p[2 * k + 1])

    def back(h, k):
        return F.conv_transpose2d(h, p[2 * k], p[2 * k + 1])

    if name == "distnet1":
        h = F.relu(conv(x, 0))
        return p[-1] * back(h + p[-2] * (h.detach() + eps(h)), 1) + x
    if name == "distnet3":
        h = F.relu(conv(x, 0))
        return conv(p[-1] * (h + eps(h)), 1)
    if name == "distnet4":
        return conv(x, 0)
    if name == "distnet5":
        return conv(conv(conv(conv(conv(x, 0), 1), 2), 3), 4)
    if name == "distnet6":
        h = F.relu(conv(F.relu(conv(x, 0)), 1))
        return p[-1] * back(F.relu(back(p[-2] * (h + eps(h)), 2)), 3) + x
    if name == "distnet7":
        h = F.relu(conv(x, 0))
        return conv(0.1 * (h + eps(h)), 1) + x
    weight, bias, back_weight, back_bias, scale, shift = p
    return F.conv_transpose2d(scale * F.conv2d(x, weight, bias) + shift, back_weight, back_bias)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["distnet1", *(f"distnet{k}" for k in range(3, 8)), "hallucinator"])
def test_the_other_networks_are_their_formulas(name, channels):
    images, labels, index = base((4, channels, 8, 8), torch.float64)
    phi = make_phi(name, images, 3, seed=0)
    parameters = dict(phi.named_parameters())
    order = sorted(parameters, key=lambda key: key in ("s1", "s2", "scale", "shift"))  # weights first; stable
    ours = call(phi, images, labels, index)
    generator = seeded(0)
    expected = by_hand(
        name,
        images,
        [parameters[key] for key in order],
        lambda h: torch.randn(h.shape, generator=generator, dtype=h.dtype),
    )
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-8)  # fixed scales start in single precision
    grads = torch.autograd.grad(ours.square().sum(), list(parameters.values()))
    theirs = torch.autograd.grad(expected.square().sum(), list(parameters.values()))
    torch.testing.assert_close(grads, theirs, rtol=1e-5, atol=1e-7)


def test_the_family_s_learned_scales_start_where_the_report_started_them():
    images, _, _ = base(SHAPES[1])
    scales = {
        name: {k: round(v.item(), 6) for k, v in make_phi(name, images, 3, 0).named_parameters() if k in ("s1", "s2")}
        for name in PHIS
        if name.startswith("distnet")
    }
    tenth = {"s1": 0.1, "s2": 0.1}
    assert {k: v for k, v in scales.items() if v} == {
        "distnet1": {"s1": 0.001, "s2": 0.001},
        "distnet2": tenth,
        "distnet3": {"s1": 0.1},
        "distnet6": tenth,
    }


def test_the_conditional_unet_sees_the_class_and_the_place():
    images, labels, index = base(SHAPES[3], torch.float64)
    phi = make_phi("unet_class", images, 3, seed=0)
    with torch.no_grad():
        phi.bias[1] += 1
        phi.last.bias += 1  # the plain U-Net adds one everywhere
        phi.gain[2, :, 0, 0] = 5
    moved = call(phi, images, labels, index) - images
    expected = torch.ones_like(images)
    expected[labels == 1] += 1
    expected[labels == 2, :, 0, 0] = 5
    torch.testing.assert_close(moved, expected)


def test_the_same_definition_may_be_registered_again_and_another_may_not():
    def define():
        class Mine(UNet):
            pass

        return Mine

    first, again = define(), define()
    try:
        register_phi("mine")(first)
        register_phi("mine")(again)
        assert PHIS["mine"] is again
        with pytest.raises(ValueError, match="'mine' is registered already"):
            register_phi("mine")(DistNet)
    finally:
        phi_module._REGISTRY.pop("mine", None)


def test_what_wraps_phis_claims_what_they_claim():
    images = torch.zeros(3, 1, 8, 8)
    claims = ("stochastic", "conditional", "positional", "bound", "starts_as_identity")
    noisy, stored, plain = make_phi("unet_noise", images, 3, 0), make_phi("pixels", images, 3, 0), torch.nn.Identity()

    def claimed(phi):
        return {claim for claim in claims if getattr(phi, claim)}

    for phi, expected in {
        phi_module.Chain([noisy, stored]): {"stochastic", "positional", "bound", "starts_as_identity"},
        phi_module.Chain([noisy, plain]): {"stochastic"},
        Applied(stored): {"positional", "bound", "starts_as_identity"},
        Applied(stored, probability=0.5): {"stochastic", "positional", "bound", "starts_as_identity"},
        Applied(plain): {"stochastic"},  # as long as it does not say that it is not
        Stored(noisy): {"stochastic"},  # a blank image is not x
        Added(make_phi("unet_class_noise", images, 3, 0)): {"stochastic", "conditional", "positional"},
    }.items():
        assert claimed(phi) == expected, phi
