"""Small U-Nets that predict a residual: class-blind, with noise, or conditioned on class and position."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from augdistill_method.phi import Phi, register_phi
from augdistill_method.random import randn


class UNet(Phi):
    """A small U-Net (two halvings) that predicts a residual, x + out. Its last layer starts at zero: the identity.

    With `noise` > 0 the input has that many more channels of standard normal noise, redrawn in each call.
    """

    starts_as_identity = True

    def __init__(self, images: Tensor, classes: int, *, width: int = 16, noise: int = 0):
        super().__init__()
        channels, size = images.shape[1], images.shape[-1]
        if size < 4:
            raise ValueError(f"images of {size}x{size} pixels: a U-Net with two halvings needs at least 4x4")
        self.noise, self.stochastic = noise, noise > 0

        def block(a, b):
            return nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.SiLU(), nn.Conv2d(b, b, 3, padding=1), nn.SiLU())

        self.down1, self.down2 = block(channels + noise, width), block(width, 2 * width)
        self.middle = block(2 * width, 2 * width)
        self.up2, self.up1 = block(4 * width, width), block(2 * width, width)
        self.last = nn.Conv2d(width, channels, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def residual(self, images: Tensor, generator: torch.Generator) -> Tensor:
        x = images
        if self.noise:
            batch, _, height, width = images.shape
            x = torch.cat([x, randn(x, generator, (batch, self.noise, height, width))], 1)
        fine = self.down1(x)
        middle = self.down2(F.avg_pool2d(fine, 2))
        coarse = self.middle(F.avg_pool2d(middle, 2))
        up = self.up2(torch.cat([F.interpolate(coarse, size=middle.shape[-2:]), middle], 1))
        up = self.up1(torch.cat([F.interpolate(up, size=fine.shape[-2:]), fine], 1))
        return self.last(up)

    def forward(self, images, *, generator, **_):
        return images + self.residual(images, generator)


class ConditionalUNet(UNet):
    """A U-Net conditioned on class and position: x + gain[y] unet(x) + bias[y], gain and bias `[classes, C, H, W]`.

    Mind what it stores: the bias is one free image per class, so it can distil pixels without using x.
    """

    conditional = True
    positional = True

    def __init__(self, images: Tensor, classes: int, *, width: int = 16, noise: int = 0):
        super().__init__(images, classes, width=width, noise=noise)
        self.gain = nn.Parameter(torch.ones(classes, *images.shape[1:]))
        self.bias = nn.Parameter(torch.zeros(classes, *images.shape[1:]))

    def forward(self, images, *, labels, generator, **_):
        return images + self.gain[labels] * self.residual(images, generator) + self.bias[labels]


register_phi("unet")(UNet)

register_phi("unet_noise")(lambda images, classes: UNet(images, classes, noise=1))

register_phi("unet_class")(ConditionalUNet)

register_phi("unet_class_noise")(lambda images, classes: ConditionalUNet(images, classes, noise=1))
