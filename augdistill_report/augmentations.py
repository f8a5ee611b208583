"""Augmentations without anything to learn, called like a phi: `augment(images, labels=, index=, generator=)`.

`AUGMENTATIONS` names those that experts may train with.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class RandomAffine:
    """Each image turned, scaled and shifted by its own normal draw; differentiable in the image.

    `rotation` in radians, `scale` of the logarithm, `shift` as a fraction of the image's side: standard deviations.
    Pixels from outside the image repeat its border (the background, for digits).
    """

    rotation: float = 0.15
    scale: float = 0.10
    shift: float = 0.087

    def __call__(self, images: Tensor, *, generator: torch.Generator, **_) -> Tensor:
        draw = torch.randn(len(images), 4, generator=generator).to(images)
        angle, scale = self.rotation * draw[:, 0], torch.exp(self.scale * draw[:, 1])
        cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
        shift = -2 * self.shift * draw[:, 2:]  # grid coordinates run from -1 to 1, and point from output to input
        matrix = torch.stack([cos, sin, shift[:, 0], -sin, cos, shift[:, 1]], 1).view(-1, 2, 3)
        grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


AUGMENTATIONS = {"none": None, "affine": RandomAffine(rotation=math.radians(8.6))}
