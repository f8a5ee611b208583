"""Phis for the study only: those of the zoo with one component removed. why_phi_failed.yaml names this file."""

import torch

from augdistill_core import Phi, randn, register_phi
from augdistill_method.zoo.distnets import DistNet
from augdistill_method.zoo.unet import UNet


@register_phi("distnet2_quiet")
def quiet(images, classes):
    """distnet2 without its noise."""
    return DistNet(images, classes, widths=[6, 12], noise="none")


@register_phi("distnet2_bare")
def bare(images, classes):
    """distnet2 without the skip from x to the output."""
    return DistNet(images, classes, widths=[6, 12], skip=False)


@register_phi("distnet2_wide")
def wide(images, classes):
    """distnet2 with about as many parameters as the U-Net."""
    return DistNet(images, classes, widths=[48, 96])


@register_phi("unet_bare")
class BareUNet(UNet):
    """The U-Net with noise, without the skip; its last layer starts at random, since zero would give blank images."""

    starts_as_identity = False

    def __init__(self, images, classes):
        super().__init__(images, classes, noise=1)
        self.last.reset_parameters()

    def forward(self, images, *, generator, **_):
        return self.residual(images, generator)


@register_phi("shake")
class Shake(Phi):
    """x plus white noise with a learned standard deviation: a phi that is nothing but random."""

    stochastic = True

    def __init__(self, images, classes):
        super().__init__()
        self.log_size = torch.nn.Parameter(torch.tensor(0.3).log())

    def forward(self, images, *, generator, **_):
        return images + self.log_size.exp() * randn(images, generator)


class Cut(torch.nn.Module):
    """A phi whose output is detached from the graph, as in the student report's first runs."""

    def __init__(self, phi):
        super().__init__()
        self.phi = phi

    def forward(self, images, **given):
        return self.phi(images, **given).detach()


@register_phi("distnet2_cut")
def distnet2_cut(images, classes):
    return Cut(DistNet(images, classes, widths=[6, 12]))


@register_phi("unet_cut")
def unet_cut(images, classes):
    return Cut(UNet(images, classes, noise=1))
