"""AutoAugment, RandAugment, TrivialAugment and AugMix on the images' device, sampled for each image.

kornia's own policies sample one operation for a whole batch, from the global generator. Here each image has its own
operation and magnitude from the caller's generator, and kornia's functions process all images of one operation
together. Operations, ranges and order are torchvision's (`torchvision.transforms.v2`), and so are the results: see
`tests/data/test_policies_by_kornia.py`. Input and output images are floats `[B, C, H, W]` with values bytes / 255.
"""

from collections.abc import Callable

import torch
from kornia import enhance
from kornia.augmentation.auto.autoaugment.autoaugment import cifar10_policy
from kornia.geometry import transform
from torch import Tensor

from augdistill_core import to_device

BINS = 30  # a level in [0, 1] has 31 values, except in AutoAugment and AugMix, where it has 10


def as_bytes(images: Tensor) -> Tensor:
    """Values rounded down to bytes / 255, like torchvision's operations on bytes; up to 1e-3 of a byte is rounding."""
    return (images * 255 + 1e-3).floor() / 255


def moved(images: Tensor, rows: list, mode: str) -> Tensor:
    """Affine map: pixel (x, y) moves to `rows` (two rows of three numbers or `[B]`) times (x, y, 1); black outside."""
    like = images.new_zeros(len(images))
    matrix = torch.stack([torch.stack([like + entry for entry in row], 1) for row in rows], 1)
    return (transform.affine(images, matrix, mode, align_corners=True) * 255).round() / 255


def turned(images: Tensor, degrees: Tensor, mode: str) -> Tensor:
    middle = torch.tensor([[(side - 1) / 2 for side in images.shape[:1:-1]]], dtype=images.dtype)
    middle = to_device(middle, images.device).expand(len(images), 2)
    matrix = transform.get_rotation_matrix2d(middle, degrees, torch.ones_like(middle))
    return moved(images, [row.unbind(1) for row in matrix.unbind(1)], mode)


def stretched(images: Tensor) -> Tensor:
    """Each channel's values stretched to [0, 1]; a constant channel stays."""
    flat = images.amax((2, 3), keepdim=True) == images.amin((2, 3), keepdim=True)
    return torch.where(flat, images, as_bytes(enhance.normalize_min_max(images, eps=1e-12)))


# (images, magnitude [B], interpolation mode of geometry) -> images
PIXEL_OPERATIONS: dict[str, Callable[[Tensor, Tensor, str], Tensor]] = {
    "identity": lambda x, m, mode: x,
    "shear_x": lambda x, m, mode: moved(x, [[1, -m, -m / 2], [0, 1, 0]], mode),  # the image's corner is fixed
    "shear_y": lambda x, m, mode: moved(x, [[1, 0, 0], [-m, 1, -m / 2]], mode),
    "translate_x": lambda x, m, mode: moved(x, [[1, 0, m.trunc()], [0, 1, 0]], mode),
    "translate_y": lambda x, m, mode: moved(x, [[1, 0, 0], [0, 1, m.trunc()]], mode),
    "rotate": turned,
    "brightness": lambda x, m, mode: as_bytes(enhance.adjust_brightness_accumulative(x, 1 + m)),
    "color": lambda x, m, mode: as_bytes(enhance.adjust_saturation_with_gray_subtraction(x, 1 + m)),
    "contrast": lambda x, m, mode: as_bytes(enhance.adjust_contrast_with_mean_subtraction(x, 1 + m)),
    "sharpness": lambda x, m, mode: as_bytes(enhance.sharpness(x, 1 + m)),
    "posterize": lambda x, m, mode: as_bytes(enhance.posterize(x, m.round().int())),
    "solarize": lambda x, m, mode: as_bytes(enhance.solarize(x, m)),
    "auto_contrast": lambda x, m, mode: stretched(x),
    "equalize": lambda x, m, mode: as_bytes(enhance.equalize(x)),
    "invert": lambda x, m, mode: enhance.invert(x),
}

ORDER = list(PIXEL_OPERATIONS)
COLOUR = ("brightness", "color", "contrast", "sharpness")
SIGNED = torch.tensor([name.startswith(("shear", "translate", "rotate")) or name in COLOUR for name in ORDER])


def space(shear: float, shift: float, rotate: float, colour: float, bits: int, most: int = 8) -> tuple[Tensor, Tensor]:
    """Each operation's magnitude at the levels 0 and 1, both `[operations]`; `bits` and `most` are for posterize."""
    ends = {"posterize": (most, most - bits), "solarize": (1.0, 0.0), "rotate": (0, rotate)}
    ends |= {f"{kind}_{axis}": (0, end) for kind, end in (("shear", shear), ("translate", shift)) for axis in "xy"}
    ends |= dict.fromkeys(COLOUR, (0, colour))
    low, high = zip(*(ends.get(name, (0, 0)) for name in ORDER), strict=True)
    return torch.tensor(low, dtype=torch.float32), torch.tensor(high, dtype=torch.float32)


def done(images: Tensor, which: Tensor, magnitude: Tensor, mode: str = "nearest") -> Tensor:
    """Each image after its own operation: `which` `[B]` are indices in `ORDER`, `magnitude` `[B]`; both on the CPU."""
    out = images.clone()
    for k in which.unique().tolist():
        mine = (which == k).nonzero()[:, 0]
        given = to_device(magnitude[mine], images.device).to(images)
        mine = to_device(mine, images.device)
        out[mine] = PIXEL_OPERATIONS[ORDER[k]](images[mine], given, mode)
    return out


class Draws:
    """The samples of a policy for `count` images, from the generator only; on the CPU, not to wait for a device."""

    def __init__(self, count: int, generator: torch.Generator):
        self.count, self.options = count, dict(generator=generator, device=generator.device)

    def whole(self, high: int) -> Tensor:
        """Uniform integers in 0 .. high - 1, `[count]`."""
        return torch.randint(high, (self.count,), **self.options).cpu()

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(self.count, *shape, **self.options).cpu()

    def magnitude(self, which: Tensor, level: Tensor | float, ends: tuple[Tensor, Tensor]) -> Tensor:
        """The magnitude at a level in [0, 1], with a random sign where the operation has one, `[count]`."""
        low, high = (end[which] for end in ends)
        sign = torch.where(SIGNED[which] & (self.uniform() < 0.5), -1, 1)
        return sign * (low + level * (high - low))


def randaugment(images: Tensor, draws: Draws, magnitude: int) -> Tensor:
    """Two of 14 operations, both at `magnitude` in [0, 30] (Cubuk et al. 2020)."""
    ends = space(0.3, 150 / 331 * images.shape[-1], 30, 0.9, 4)
    for _ in range(2):
        which = draws.whole(len(ORDER) - 1)
        images = done(images, which, draws.magnitude(which, magnitude / BINS, ends))
    return images


def trivialaugment(images: Tensor, draws: Draws, magnitude: int) -> Tensor:
    """One of 14 operations at one of 31 levels, shifts by up to a whole side (Müller & Hutter 2021)."""
    ends = space(0.99, images.shape[-1], 135, 0.99, 6)
    which = draws.whole(len(ORDER) - 1)
    return done(images, which, draws.magnitude(which, draws.whole(BINS + 1) / BINS, ends))


def autoaugment(images: Tensor, draws: Draws, magnitude: int) -> Tensor:
    """One of the 25 operation pairs found for CIFAR-10, with their probabilities (Cubuk et al. 2019)."""
    ends = space(0.3, 150 / 331 * images.shape[-1], 30, 0.9, 4)
    pair = draws.whole(len(cifar10_policy))
    for step in range(2):
        names, chances, levels = zip(*(sub[step] for sub in cifar10_policy), strict=True)
        which = torch.tensor([ORDER.index(name) for name in names])[pair]
        which = torch.where(draws.uniform() < torch.tensor(chances)[pair], which, 0)
        level = torch.tensor([level or 0 for level in levels])[pair] / 9
        images = done(images, which, draws.magnitude(which, level, ends))
    return images


def augmix(images: Tensor, draws: Draws, magnitude: int) -> Tensor:
    """The image mixed with three chains of one to three weak operations of 13 (Hendrycks et al. 2020)."""
    ends = space(0.3, images.shape[-1] / 3, 30, 0.9, 4, most=4)
    weights = -torch.log1p(-draws.uniform(3))  # exponential, so after the division uniform on the simplex
    own, weights = draws.uniform(), weights / weights.sum(1, keepdim=True)
    weights = torch.cat([own[:, None], (1 - own[:, None]) * weights], 1)
    weights = to_device(weights, images.device).to(images)
    mixed = weights[:, 0].view(-1, 1, 1, 1) * images
    for chain in range(3):
        out, depth = images, draws.whole(3)
        for step in range(3):
            which = torch.where(step <= depth, 1 + draws.whole(len(ORDER) - 2), 0)
            out = done(out, which, draws.magnitude(which, draws.whole(3) / 9, ends), "bilinear")
        mixed = mixed + weights[:, 1 + chain].view(-1, 1, 1, 1) * out
    return as_bytes(mixed)


PIXEL_POLICIES = {f.__name__: f for f in (autoaugment, randaugment, trivialaugment, augmix)}
