"""AutoAugment, RandAugment, TrivialAugment, AugMix: torchvision's pictures, spaces and chances, image by image."""

import collections

import pytest
import torch
from torchvision.transforms import v2

from augdistill_core import seeded
from augdistill_report.data import policies_by_kornia as policies
from augdistill_report.data.policies_by_kornia import ORDER, SIGNED, Draws, done, space

THEIRS = {v2.AutoAugment: "autoaugment", v2.RandAugment: "randaugment", v2.TrivialAugmentWide: "trivialaugment"}
SPACES = {  # of images of 32 pixels
    v2.AutoAugment: (space(0.3, 150 / 331 * 32, 30, 0.9, 4), 10),
    v2.RandAugment: (space(0.3, 150 / 331 * 32, 30, 0.9, 4), 31),
    v2.TrivialAugmentWide: (space(0.99, 32, 135, 0.99, 6), 31),
    v2.AugMix: (space(0.3, 32 / 3, 30, 0.9, 4, most=4), 10),
}


def theirs(name):
    """torchvision's name of an operation: "shear_x" is its "ShearX"."""
    return "".join(part.capitalize() for part in name.split("_"))


def blobs(count, channels, side):
    """Smooth colours with some noise, as bytes: all levels, no flat channel."""
    coarse = torch.rand(count, channels, 4, 4, generator=seeded(0, side))
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic")
    noise = 0.05 * torch.randn(smooth.shape, generator=seeded(1, side))
    return ((smooth + noise).clamp(0, 1) * 255).byte()


@pytest.mark.parametrize("level", [3, 15, 30])
@pytest.mark.parametrize("name", ORDER)
def test_every_operation_makes_torchvision_s_picture(name, level):
    """To one byte (two for "color", in fewer than one pixel of a thousand): floats do not round as bytes do."""
    low, high = (end[ORDER.index(name)] for end in SPACES[v2.TrivialAugmentWide][0])
    for sign in (1, -1) if SIGNED[ORDER.index(name)] else (1,):
        magnitude = sign * (low + level / 30 * (high - low))
        for raw in (blobs(8, 3, 32), blobs(8, 1, 15)):
            for mode in ("nearest", "bilinear"):
                which = torch.full((8,), ORDER.index(name))
                out = 255 * done(raw / 255, which, magnitude.expand(8), mode)
                policy, given = v2.RandAugment(interpolation=mode), float(magnitude)
                given = round(given) if name == "posterize" else given
                options = dict(interpolation=policy.interpolation, fill=policy._fill)
                expected = policy._apply_image_or_video_transform(raw, theirs(name), given, **options).float()
                difference = (out - expected).abs()
                torch.testing.assert_close(out, out.round(), atol=1e-3, rtol=0)  # bytes
                assert difference.max() < 2.01 and (difference > 1.01).float().mean() < 1e-3
                geometry = name.startswith(("shear", "translate", "rotate"))
                assert difference.max() < 0.01 or not geometry or mode == "bilinear"


def test_a_flat_channel_stays_as_it_is():
    flat = torch.full((2, 3, 8, 8), 100 / 255)
    for name in ("auto_contrast", "equalize"):
        assert torch.equal(done(flat, torch.full((2,), ORDER.index(name)), torch.zeros(2)), flat)


@pytest.mark.parametrize("policy", SPACES, ids=lambda policy: policy.__name__)
def test_spaces_are_torchvision_s(policy):
    (low, high), bins = SPACES[policy]
    for name in ORDER:
        if theirs(name) in policy._AUGMENTATION_SPACE:
            values, signed = policy._AUGMENTATION_SPACE[theirs(name)]
            k, values = ORDER.index(name), values(bins, 32, 32)
            assert signed == bool(SIGNED[k])
            if values is not None:
                ours = low[k] + torch.arange(bins) / (bins - 1) * (high[k] - low[k])
                ours = ours.round() if name == "posterize" else ours
                torch.testing.assert_close(ours, values.float())
    drawn = set(map(theirs, ORDER)) - {"Invert"} - ({"Identity"} if policy is v2.AugMix else set())
    drawn = drawn - {"Identity"} | {"Invert"} if policy is v2.AutoAugment else drawn
    assert set(policy._AUGMENTATION_SPACE) == drawn


def test_autoaugment_s_pairs_are_torchvision_s():
    pairs = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)._policies
    assert len(pairs) == len(policies.cifar10_policy) == 25
    for a, b in zip(pairs, policies.cifar10_policy, strict=True):
        assert [(name, *rest) for name, *rest in a] == [(theirs(name), *rest) for name, *rest in b]


def watched(monkeypatch, name, count=20_000, magnitude=9):
    """What a policy hands to `done`, call after call: operations, magnitudes and how it reads between pixels."""
    calls = []
    monkeypatch.setattr(policies, "done", lambda x, *given: calls.append(given) or x)
    policies.PIXEL_POLICIES[name](torch.zeros(count, 1, 32, 32), Draws(count, seeded(0)), magnitude)
    return calls


def part(which, name):
    return float((which == ORDER.index(name)).float().mean())


def test_randaugment_draws_two_operations_evenly_at_one_magnitude(monkeypatch):
    calls = watched(monkeypatch, "randaugment", magnitude=12)
    (low, high), _ = SPACES[v2.RandAugment]
    assert len(calls) == 2
    for which, magnitude in calls:
        assert all(part(which, name) == pytest.approx(1 / 14, abs=0.01) for name in ORDER[:-1])
        assert part(which, "invert") == 0
        torch.testing.assert_close(magnitude.abs(), (low + 12 / 30 * (high - low))[which])
        assert (magnitude[SIGNED[which]] < 0).float().mean() == pytest.approx(0.5, abs=0.02)
        assert (magnitude[~SIGNED[which]] >= 0).all()
    assert abs(torch.corrcoef(torch.stack([calls[0][0], calls[1][0]]).double())[0, 1]) < 0.03


def test_trivialaugment_draws_one_operation_and_one_of_31_levels(monkeypatch):
    ((which, magnitude),) = watched(monkeypatch, "trivialaugment")
    assert all(part(which, name) == pytest.approx(1 / 14, abs=0.01) for name in ORDER[:-1])
    angles = magnitude[which == ORDER.index("rotate")]
    levels = collections.Counter((angles.abs() / 4.5).round().int().tolist())
    assert set(levels) == set(range(31)) and angles.abs().max() == 135 and max(levels.values()) < 2 * 1500 / 31


def test_autoaugment_does_each_half_of_a_pair_with_its_own_probability(monkeypatch):
    calls = watched(monkeypatch, "autoaugment")
    for step, (which, magnitude) in enumerate(calls):
        expected = collections.Counter()
        for pair in policies.cifar10_policy:
            name, chance, _ = pair[step]
            expected[name] += chance / 25
        assert all(part(which, name) == pytest.approx(expected[name], abs=0.015) for name in ORDER[1:])
        posterize = magnitude[which == ORDER.index("posterize")]
        assert set(posterize.round().tolist()) <= {5.0}  # level 7 of 9
    assert len(calls) == 2


def test_augmix_is_a_mixture_of_weak_chains(monkeypatch):
    calls = watched(monkeypatch, "augmix")
    assert len(calls) == 9 and all(mode == "bilinear" for *_, mode in calls)
    for step, (which, magnitude, _) in enumerate(calls):
        assert part(which, "identity") == pytest.approx((step % 3) / 3, abs=0.015)  # one to three operations
        assert part(which, "invert") == 0
        angles = set((3 * magnitude[which == ORDER.index("rotate")]).round().abs().int().tolist())
        assert angles <= {0, 10, 20}  # levels 0 to 2 of 9, of 30 degrees
    monkeypatch.undo()
    x = blobs(300, 3, 16) / 255
    out = policies.augmix(x, Draws(300, seeded(0)), 0)
    assert (out != x).any((1, 2, 3)).float().mean() > 0.9 and (out - x).abs().mean() < 0.1
    monkeypatch.setattr(policies, "done", lambda x, *_: torch.ones_like(x))
    own = policies.augmix(torch.zeros(20_000, 1, 1, 1), Draws(20_000, seeded(0)), 0).flatten()
    quantiles = torch.quantile(own, torch.tensor([0.1, 0.5, 0.9]))  # Beta(1, 1) is uniform
    torch.testing.assert_close(quantiles, torch.tensor([0.1, 0.5, 0.9]), atol=0.02, rtol=0)


def test_each_image_has_an_operation_of_its_own_and_its_place():
    x = blobs(64, 3, 16) / 255
    which, magnitude = torch.arange(64) % len(ORDER), torch.linspace(0, 0.5, 64)
    out = done(x, which, magnitude)
    for k in range(64):
        one = done(x[k : k + 1], which[k : k + 1], magnitude[k : k + 1])
        torch.testing.assert_close(out[k : k + 1], one, atol=1.01 / 255, rtol=0)
    assert torch.equal(x, blobs(64, 3, 16) / 255)  # not written to
