"""Three of kornia's augmentations as phis with learned ranges: `phi=kornia:RandomAffine`, and two more.

kornia samples from fixed ranges, with the global generator. Here a sample is the range times uniform noise from the
phi's generator, so that each range gets its gradient through the augmented images; kornia's functions transform them.
Ranges start small and stay below a limit. What is learned is the range of each transformation.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from augdistill_method.phi import Phi, register_phi
from augdistill_method.zoo.policy import PACE


class KorniaPhi(Phi):
    """Random transformations of images `[B, C, H, W]`; `KINDS` gives each kind's initial range and its limit.

    A subclass defines `transformed(images, draw)`. `draw` holds a sample of each kind, `[B]` (or `[B, DRAWS]`), uniform
    in [-range, range].
    """

    stochastic = True
    KINDS: ClassVar[dict[str, tuple[float, float]]]
    DRAWS = 1  # samples of each kind per image

    def __init__(self, images: Tensor, classes: int):
        super().__init__()
        self.kinds = self.kinds_for(images.shape[1])
        start, limit = map(torch.tensor, zip(*(self.KINDS[kind] for kind in self.kinds), strict=True))
        self.register_buffer("limit", limit)
        self.register_buffer("first", torch.logit(start / limit))
        self.change = nn.Parameter(torch.zeros(len(self.kinds)))

    def kinds_for(self, channels: int) -> list[str]:
        return list(self.KINDS)

    @property
    def ranges(self) -> Tensor:
        """The range of each kind, `[kinds]`, between 0 and its limit."""
        return self.limit * torch.sigmoid(self.first + PACE * self.change)

    def report(self) -> dict[str, float]:
        return dict(zip(self.kinds, self.ranges.tolist(), strict=True))

    def forward(self, images, *, generator, **_):
        shape = len(images), len(self.kinds), self.DRAWS
        noise = torch.rand(shape, generator=generator, device=generator.device).to(images)
        draws = (self.ranges[:, None] * (2 * noise - 1)).squeeze(2).unbind(1)
        return self.transformed(images, dict(zip(self.kinds, draws, strict=True)))

    def transformed(self, images: Tensor, draw: dict[str, Tensor]) -> Tensor:
        raise NotImplementedError


def warped(warp, images: Tensor, matrix: Tensor, **options) -> Tensor:
    """kornia's `warp` with one matrix per image; NaN where it is not finite (kornia would return a finite image)."""
    finite = matrix.isfinite().all((1, 2)).view(-1, 1, 1)
    eye = torch.eye(*matrix.shape[1:], dtype=matrix.dtype, device=matrix.device)
    out = warp(images, torch.where(finite, matrix, eye), tuple(images.shape[2:]), align_corners=True, **options)
    return torch.where(finite[..., None], out, torch.nan)


@register_phi("kornia:RandomAffine")
class LearnedAffine(KorniaPhi):
    """kornia's `RandomAffine`: rotation and shear (degrees), shift (fraction of the side), scale (of its logarithm).

    Pixels from outside repeat the border (the background, for digits).
    """

    KINDS: ClassVar = {
        "degrees": (2.0, 180.0),
        "translate_x": (0.03, 0.5),
        "translate_y": (0.03, 0.5),
        "scale": (0.03, 1.0),
        "shear_x": (2.0, 60.0),
        "shear_y": (2.0, 60.0),
    }

    def transformed(self, images, draw):
        from kornia.geometry import transform  # slow to import

        sides = images.new_tensor(images.shape[:1:-1])  # width, height
        shift = torch.stack([draw["translate_x"], draw["translate_y"]], 1) * sides
        size = draw["scale"].exp()[:, None].expand(-1, 2)
        shear = (draw[f"shear_{axis}"] * math.pi / 180 for axis in "xy")
        middle = (sides / 2 - 0.5).expand(len(images), -1)
        matrix = transform.get_affine_matrix2d(shift, middle, size, draw["degrees"], *shear)
        return warped(transform.warp_affine, images, matrix[:, :2], padding_mode="border")


@register_phi("kornia:RandomPerspective")
class LearnedPerspective(KorniaPhi):
    """kornia's `RandomPerspective`: each corner moves by up to `distortion` times half the side; zeros come in."""

    KINDS: ClassVar = {"distortion": (0.05, 0.9)}
    DRAWS = 8  # four corners, x and y

    def transformed(self, images, draw):
        from kornia.geometry import transform  # slow to import

        sides = images.new_tensor(images.shape[:1:-1])
        corners = images.new_tensor([[0, 0], [1, 0], [1, 1], [0, 1]]) * (sides - 1)
        moved = draw["distortion"].view(-1, 4, 2) * sides / 2
        matrix = transform.get_perspective_transform(corners.expand(len(images), -1, -1), corners + moved)
        return warped(transform.warp_perspective, images, matrix)


@register_phi("kornia:ColorJitter")
class LearnedColour(KorniaPhi):
    """kornia's `ColorJitter`: brightness, contrast, saturation (of the factor, around 1) and hue (radians).

    kornia's functions take values in [0, 1] and clamp. So each channel is scaled to [0, 1] by the minimum and maximum
    of the base images, and the change there is added to the images. The images themselves are not clamped.
    """

    KINDS: ClassVar = {
        "brightness": (0.05, 1.0),
        "contrast": (0.05, 1.0),
        "saturation": (0.05, 1.0),
        "hue": (0.05, math.pi),
    }

    def __init__(self, images: Tensor, classes: int):
        super().__init__(images, classes)
        low, high = (f(images.detach().transpose(0, 1).flatten(1), 1) for f in (torch.amin, torch.amax))
        self.register_buffer("low", low.view(-1, 1, 1))
        self.register_buffer("span", (high - low).clamp(min=1e-6).view(-1, 1, 1))

    def kinds_for(self, channels):
        return list(self.KINDS)[: 4 if channels == 3 else 2]

    def transformed(self, images, draw):
        from kornia import enhance  # slow to import

        before = out = ((images - self.low) / self.span).clamp(0, 1)
        out = enhance.adjust_brightness_accumulative(out, 1 + draw["brightness"])
        out = enhance.adjust_contrast_with_mean_subtraction(out, 1 + draw["contrast"])
        if "hue" in draw:
            out = enhance.adjust_saturation_with_gray_subtraction(out, 1 + draw["saturation"])
            out = enhance.adjust_hue(out, draw["hue"])
        return images + self.span * (out - before)
