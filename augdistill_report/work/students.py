"""Students of other architectures (`STUDENTS`), to test whether a phi helps them, too.

They are used only for scoring (`eval_student`). Experts and unrolls use the ConvNet.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from augdistill_core import arithmetic, flatten, logits_of, unflatten
from augdistill_report.data.datasets import Split
from augdistill_report.work.networks import alexnet, convnet3, vgg11


@torch.no_grad()
def accuracy(student: nn.Module, theta: Tensor, split: Split) -> float:
    """The fraction of `split`, in [0, 1], that `student` with parameters `theta` `[P]` classifies correctly.

    An image with a logit that is not finite counts as wrong: `argmax` would return the first class.
    """
    pieces = unflatten(student, theta)
    right = 0
    for batch in split.batches(512):
        with arithmetic(student):
            logits = logits_of(student, pieces, batch.images)
        right += int(((logits.argmax(1) == batch.labels) & logits.isfinite().all(1)).sum())
    return right / len(split)


def accuracy_of(model: nn.Module, split: Split) -> float:
    """The `accuracy` of a model with its own parameters, in [0, 1]."""
    return accuracy(model, flatten(model.parameters()).detach(), split)


def mlp(channels: int, classes: int, size: int) -> nn.Module:
    """Two hidden layers of 128, as in MTT's official code."""
    widths = channels * size * size, 128, 128
    hidden = [layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(128, classes))


def lenet(channels: int, classes: int, size: int) -> nn.Module:
    """LeNet-5 with ReLU and max pooling. Both convolutions are padded, so that it takes small images."""
    features = [nn.Conv2d(channels, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
    features += [nn.Conv2d(6, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
    head = [nn.Linear(16 * (size // 4) ** 2, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, classes)]
    return nn.Sequential(*features, nn.Flatten(), *head)


def resnet18(channels: int, classes: int, size: int) -> nn.Module:
    """torchvision's ResNet-18 with the stem for small images: one 3x3 convolution, stride 1, no pooling.

    A stage that would leave a single pixel keeps the size: batch norm of one image needs more than one.
    """
    from torchvision.models import resnet18 as build

    model = build(num_classes=classes)
    model.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    for stage in (model.layer2, model.layer3, model.layer4):
        if size >= 4:
            size //= 2
        else:
            stage[0].conv1.stride = stage[0].downsample[0].stride = (1, 1)
    return model


# by name: builders of (channels, classes, size)
STUDENTS: dict[str, Callable[[int, int, int], nn.Module]] = {
    f.__name__: f for f in (mlp, lenet, resnet18, convnet3, alexnet, vgg11)
}
