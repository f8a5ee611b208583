"""HaBa's hallucinator (Liu et al., NeurIPS 2022)."""

import torch
from torch import Tensor, nn

from augdistill_method.phi import Phi, register_phi


@register_phi("hallucinator")
class Hallucinator(Phi):
    """HaBa's hallucinator (Liu et al. 2022): a valid 3x3 convolution, a scale and shift per location, and a decoder.

    It has no nonlinearity, no skip connection and no noise.
    """

    stochastic = False
    positional = True

    def __init__(self, images: Tensor, classes: int):
        super().__init__()
        channels, height, width = images.shape[1:]
        self.encoder, self.decoder = nn.Conv2d(channels, channels, 3), nn.ConvTranspose2d(channels, channels, 3)
        self.scale = nn.Parameter(torch.ones(channels, height - 2, width - 2))
        self.shift = nn.Parameter(torch.zeros(channels, height - 2, width - 2))

    def forward(self, images, **_):
        return self.decoder(self.scale * self.encoder(images) + self.shift)
