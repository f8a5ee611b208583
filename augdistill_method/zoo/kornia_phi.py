"""kornia's augmentations as phis with learned ranges: `phi=kornia:RandomAffine`, and ten more.

kornia samples from fixed ranges, with the global generator. Here a sample is the range times uniform noise from the
phi's generator, so that each range gets its gradient through the augmented images; kornia's functions transform them.
Ranges start small and stay below a limit. What is learned is the range of each transformation.

The rest of `kornia.augmentation` is not here. Where it runs on one image, each parameter that it samples was given a
gradient, compared with a finite difference (float64, kornia 0.9); for RandomRain, RandomRotation90, RandomMotionBlur
and RandomFisheye (which takes tensors only) the reason is what they do:
- no range to learn: flips, RandomFisheye, RandomRotation90, RandomGrayscale, RandomInvert, RandomEqualize,
  RandomAutoContrast, the box and median blurs, RandomChannelDropout and -Shuffle, RandomPlanckianJitter, CenterCrop,
  Resize, PadTo, Normalize;
- the image is a step function of the sample (no gradient, or zero): RandomCrop, RandomResizedCrop, the box of
  RandomErasing, RandomPosterize, the threshold of RandomSolarize, RandomClahe, RandomSaltAndPepperNoise, RandomRain,
  the amount of RandomSnow, the kernel of RandomMotionBlur;
- contained in another: RandomHue, RandomSaturation (ColorJitter; they need three channels, as RandomRGBShift does),
  ColorJiggle (ColorJitter in another order);
- a derivative without bound at black: RandomGamma. Its gradient in the images is infinite there;
- right gradients, but the sample is a whole image times an amount: RandomGaussianNoise, the illuminations, the
  plasmas, RandomElasticTransform; or a table of an encoder: RandomJPEG. A phi with noise learns such images itself.
"""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from augdistill_method.phi import Phi, register_phi
from augdistill_method.random import to_device
from augdistill_method.zoo.policy import PACE


class KorniaPhi(Phi):
    """Random transformations of images `[B, C, H, W]`; `KINDS` gives each kind's initial range and its limit.

    A subclass defines `transformed(images, draw)`. `draw` holds a sample of each kind, `[B]` (or `[B, DRAWS]`), uniform
    in [-range, range]. `kinds` chooses among them. Where a range is not finite, the images are NaN.
    """

    stochastic = True
    KINDS: ClassVar[dict[str, tuple[float, float]]]
    DRAWS = 1  # samples of each kind per image

    def __init__(self, images: Tensor, classes: int, kinds: Sequence[str] = ()):
        super().__init__()
        self.kinds = list(kinds) or self.kinds_for(images.shape[1])
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
        noise = to_device(torch.rand(shape, generator=generator, device=generator.device), images.device).to(images)
        finite = self.ranges.isfinite()  # kornia makes a picture, or an error, of what is not
        draws = (torch.where(finite, self.ranges, 0)[:, None] * (2 * noise - 1)).squeeze(2).unbind(1)
        out = self.transformed(images, dict(zip(self.kinds, draws, strict=True)))
        return torch.where(finite.all(), out, torch.nan)

    def transformed(self, images: Tensor, draw: dict[str, Tensor]) -> Tensor:
        raise NotImplementedError


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

        nothing = images.new_zeros(len(images))
        draw = {kind: draw.get(kind, nothing) for kind in self.KINDS}
        sides = images.new_tensor(images.shape[:1:-1])  # width, height
        shift = torch.stack([draw["translate_x"], draw["translate_y"]], 1) * sides
        size = draw["scale"].exp()[:, None].expand(-1, 2)
        shear = (draw[f"shear_{axis}"] * math.pi / 180 for axis in "xy")
        middle = (sides / 2 - 0.5).expand(len(images), -1)
        matrix = transform.get_affine_matrix2d(shift, middle, size, draw["degrees"], *shear)
        return transform.warp_affine(
            images, matrix[:, :2], tuple(images.shape[2:]), padding_mode="border", align_corners=True
        )


PARTS = {
    "RandomRotation": ("degrees",),
    "RandomShear": ("shear_x", "shear_y"),
    "RandomTranslate": ("translate_x", "translate_y"),
}
for of_kornia in PARTS:
    register_phi(f"kornia:{of_kornia}")(lambda images, classes, n=of_kornia: LearnedAffine(images, classes, PARTS[n]))


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
        return transform.warp_perspective(images, matrix, tuple(images.shape[2:]), align_corners=True)


@register_phi("kornia:RandomThinPlateSpline")
class LearnedSpline(KorniaPhi):
    """kornia's `RandomThinPlateSpline`: corners and middle moved by up to `scale` times half of the side."""

    KINDS: ClassVar = {"scale": (0.05, 0.5)}
    DRAWS = 10  # five points, right and down

    def transformed(self, images, draw):
        from kornia.geometry import transform  # slow to import

        points = images.new_tensor([[-1, -1], [-1, 1], [1, -1], [1, 1], [0, 0]]).expand(len(images), -1, -1)
        spline = transform.get_tps_transform(points + draw["scale"].view(-1, 5, 2), points)
        return transform.warp_image_tps(images, points, *spline, align_corners=True)


@register_phi("kornia:RandomGaussianBlur")
class LearnedBlur(KorniaPhi):
    """kornia's `RandomGaussianBlur`, 5 x 5: `sigma` in pixels, above .1, which changes nothing."""

    KINDS: ClassVar = {"sigma": (0.5, 2.0)}

    def transformed(self, images, draw):
        from kornia import filters  # slow to import

        sigma = 0.1 + draw["sigma"].abs()
        return filters.gaussian_blur2d(images, (5, 5), sigma[:, None].expand(-1, 2))


class LearnedColour(KorniaPhi):
    """What kornia's functions of colour do, by `changed(x, draw)`, on the images put into [0, 1], where they clamp.

    Each channel is put there by the least and the largest value of the base images, and what changed there is added to
    the images, which are never clamped themselves.
    """

    def __init__(self, images: Tensor, classes: int, kinds: Sequence[str] = ()):
        super().__init__(images, classes, kinds)
        low, high = (f(images.detach().transpose(0, 1).flatten(1), 1) for f in (torch.amin, torch.amax))
        self.register_buffer("low", low.view(-1, 1, 1))
        self.register_buffer("span", (high - low).clamp(min=1e-6).view(-1, 1, 1))

    def transformed(self, images, draw):
        before = ((images - self.low) / self.span).clamp(0, 1)
        return images + self.span * (self.changed(before, draw) - before)

    def changed(self, x: Tensor, draw: dict[str, Tensor]) -> Tensor:
        raise NotImplementedError


@register_phi("kornia:ColorJitter")
class LearnedJitter(LearnedColour):
    """kornia's `ColorJitter`: brightness, contrast, saturation (of the factor, around 1) and hue (radians).

    The last two are for three channels.
    """

    KINDS: ClassVar = {
        "brightness": (0.05, 1.0),
        "contrast": (0.05, 1.0),
        "saturation": (0.05, 1.0),
        "hue": (0.05, math.pi),
    }

    def kinds_for(self, channels):
        return list(self.KINDS)[: 4 if channels == 3 else 2]

    def changed(self, x, draw):
        from kornia import enhance  # slow to import

        x = enhance.adjust_brightness_accumulative(x, 1 + draw["brightness"])
        x = enhance.adjust_contrast_with_mean_subtraction(x, 1 + draw["contrast"])
        if "hue" in draw:
            x = enhance.adjust_saturation_with_gray_subtraction(x, 1 + draw["saturation"])
            x = enhance.adjust_hue(x, draw["hue"])
        return x


@register_phi("kornia:RandomBrightness")
class LearnedBrightness(LearnedColour):
    """kornia's `RandomBrightness`: what is added to every pixel, in parts of the range of values."""

    KINDS: ClassVar = {"brightness": (0.05, 1.0)}

    def changed(self, x, draw):
        from kornia import enhance  # slow to import

        return enhance.adjust_brightness(x, draw["brightness"])


@register_phi("kornia:RandomContrast")
class LearnedContrast(LearnedColour):
    """kornia's `RandomContrast`: the factor of every pixel, around 1."""

    KINDS: ClassVar = {"contrast": (0.05, 1.0)}

    def changed(self, x, draw):
        from kornia import enhance  # slow to import

        return enhance.adjust_contrast(x, 1 + draw["contrast"])


@register_phi("kornia:RandomSharpness")
class LearnedSharpness(LearnedColour):
    """kornia's `RandomSharpness`: its factor around 1, which changes nothing (0 blurs, 2 sharpens)."""

    KINDS: ClassVar = {"sharpness": (0.2, 2.0)}

    def changed(self, x, draw):
        from kornia import enhance  # slow to import

        return enhance.sharpness(x, 1 + draw["sharpness"])
