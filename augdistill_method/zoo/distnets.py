"""The student report's DistNets, exactly as it ran them, with their flaws."""

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from augdistill_method.phi import Phi, register_phi
from augdistill_method.random import randn


class DistNet(Phi):
    """The student report's family: valid convolutions, noise on the hidden layer, then transposed convolutions.

    Args:
        widths: channels of the hidden layers; the decoder mirrors them.
        kernel: 3, or 1 (then the decoder is one 1x1 convolution from the hidden layer).
        noise: "blind" is h + s1 Normal(h, 1) without a gradient through the sample, "scaled" is s1 (h + eps), "none" is
            h.
        scales: the initial (s1, s2); `learned` says which of them are parameters.
        skip: the output is s2 out + x if true, else s2 out.
        relu: whether there is a ReLU between the layers.
    """

    def __init__(
        self,
        images: Tensor,
        classes: int,
        *,
        widths: Sequence[int],
        kernel: int = 3,
        noise: str = "scaled",
        scales: tuple[float, float] = (0.1, 0.1),
        learned: tuple[bool, bool] = (True, True),
        skip: bool = True,
        relu: bool = True,
    ):
        super().__init__()
        channels = [images.shape[1], *widths]
        there = list(itertools.pairwise(channels))
        back = [(b, a) for a, b in reversed(there)] if kernel == 3 else [(channels[-1], channels[0])]
        if images.shape[-1] <= (kernel - 1) * len(there):
            raise ValueError(f"images of {images.shape[-1]} pixels: {len(there)} valid convolutions leave no pixel")
        self.there = nn.ModuleList(nn.Conv2d(a, b, kernel) for a, b in there)
        self.back = nn.ModuleList((nn.ConvTranspose2d if kernel == 3 else nn.Conv2d)(a, b, kernel) for a, b in back)
        for name, scale, is_learned in zip(("s1", "s2"), scales, learned, strict=True):
            value = torch.tensor([scale])
            self.register_parameter(name, nn.Parameter(value)) if is_learned else self.register_buffer(name, value)
        self.noise, self.skip, self.stochastic = noise, skip, noise != "none"
        self.activation = F.relu if relu else nn.Identity()

    def forward(self, images, *, generator, **_):
        h = images
        for layer in self.there:
            h = self.activation(layer(h))
        if self.noise == "blind":
            h = h + self.s1 * (h.detach() + randn(h, generator))
        elif self.noise == "scaled":
            h = self.s1 * (h + randn(h, generator))
        for layer in self.back[:-1]:
            h = self.activation(layer(h))
        out = self.s2 * self.back[-1](h)
        return out + images if self.skip else out


# Exactly as the student report ran them, with their flaws; c = image channels. Without s2, the output is not scaled.
_PLAIN = dict(kernel=1, scales=(0.1, 1.0))

_DISTNETS: dict[str, Callable[[int], dict]] = {
    "distnet": lambda c: dict(widths=[6], noise="blind", scales=(1.0, 0.001), learned=(False, False)),
    "distnet1": lambda c: dict(widths=[6], noise="blind", scales=(0.001, 0.001)),
    "distnet2": lambda c: dict(widths=[6, 12]),
    "distnet3": lambda c: dict(widths=[c], skip=False, learned=(True, False), **_PLAIN),
    "distnet4": lambda c: dict(widths=[], skip=False, noise="none", learned=(False, False), **_PLAIN),
    "distnet5": lambda c: dict(widths=[c] * 4, skip=False, noise="none", relu=False, learned=(False, False), **_PLAIN),
    "distnet6": lambda c: dict(widths=[9, 27]),
    "distnet7": lambda c: dict(widths=[c], learned=(False, False), **_PLAIN),
}


for _name, _options in _DISTNETS.items():
    register_phi(_name)(lambda images, classes, o=_options: DistNet(images, classes, **o(images.shape[1])))
