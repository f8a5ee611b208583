"""The networks that papers of dataset distillation score with, besides the ConvNet (which is `student.ConvNet`).

As in the official codes of DC and MTT, for small images: every convolution has stride 1, and instance norm (AlexNet:
none) where torchvision's networks have batch norm. So a student sees each image alone, at any batch size.
"""

from torch import nn

from augdistill_core import ConvNet


def convnet3(channels: int, classes: int, size: int) -> nn.Module:
    """ConvNet-3 of the papers: three blocks of width 128, whatever the experts' ConvNet is."""
    return ConvNet(channels, classes, size, width=128, depth=3)


def conv_block(inside: int, outside: int, kernel: int = 3, norm: bool = True) -> list[nn.Module]:
    """A convolution that keeps the size, instance norm without running statistics, ReLU."""
    convolution = nn.Conv2d(inside, outside, kernel, padding=kernel // 2)
    return [convolution, *([nn.GroupNorm(outside, outside)] if norm else []), nn.ReLU()]


def alexnet(channels: int, classes: int, size: int) -> nn.Module:
    """AlexNet of DC's code: five convolutions, three poolings, one linear layer. Images of at least 8x8 pixels."""
    layers = [*conv_block(channels, 128, 5, norm=False), nn.MaxPool2d(2)]
    layers += [*conv_block(128, 192, 5, norm=False), nn.MaxPool2d(2), *conv_block(192, 256, norm=False)]
    layers += [*conv_block(256, 192, norm=False), *conv_block(192, 192, norm=False), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(192 * (size // 8) ** 2, classes))


def vgg11(channels: int, classes: int, size: int) -> nn.Module:
    """VGG-11 of DC's code: eight convolutions, one linear layer; of its five poolings those that leave a pixel."""
    layers, inside, side = [], channels, size
    for stage in ((64,), (128,), (256, 256), (512, 512), (512, 512)):
        for width in stage:
            # instance norm of a single pixel is zero: no norm there
            layers += conv_block(inside, width, norm=side > 1)
            inside = width
        if side > 1:
            layers.append(nn.MaxPool2d(2))
            side //= 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512 * side**2, classes))
