"""A multilayer perceptron (MLP) that predicts a residual: x + mlp(x)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from augdistill_method.phi import Phi, register_phi
from augdistill_method.random import randn


class MLP(Phi):
    """An MLP with two hidden layers that predicts a residual, x + out. The last layer starts at zero: the identity.

    It has weights for every pixel position. Without labels it learns to recognise the class of an image, sooner than a
    U-Net's 3x3 convolutions do (notebook 07). The input is the pixels and `noise` standard normal numbers per image.
    Mind what it stores: the last layer holds one image for every hidden unit.
    """

    starts_as_identity = True
    positional = True

    def __init__(self, images: Tensor, classes: int, *, width: int = 256, noise: int = 0):
        super().__init__()
        pixels = images[0].numel()
        self.noise, self.stochastic = noise, noise > 0
        self.first, self.second = nn.Linear(pixels + noise, width), nn.Linear(width, width)
        self.last = nn.Linear(width, pixels)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, images, *, generator, **_):
        x = images.flatten(1)
        if self.noise:
            x = torch.cat([x, randn(x, generator, (len(x), self.noise))], 1)
        out = self.last(F.silu(self.second(F.silu(self.first(x)))))
        return images + out.view_as(images)


register_phi("mlp")(MLP)

register_phi("mlp_noise")(lambda images, classes: MLP(images, classes, noise=16))
