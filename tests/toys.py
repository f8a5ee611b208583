"""Small students and data that several test files share: 8x8 images with one channel, three classes."""

import torch
import torch.nn.functional as F
from torch import nn

from augdistill_core import ConvNet


class Shared(nn.Module):
    """Two hidden layers that are one (under two names), or that share their weights and have a bias each."""

    def __init__(self, weights_only=False):
        super().__init__()
        self.first, self.once, self.last = nn.Linear(64, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        if weights_only:
            self.again = nn.Linear(6, 6)
            self.again.weight = self.once.weight
        else:
            self.again = self.once

    def forward(self, images):
        return self.last(torch.tanh(self.again(torch.tanh(self.once(self.first(images.flatten(1)))))))


class TwoNames(nn.Linear):
    """One weight under two names in the same layer."""

    def __init__(self):
        super().__init__(64, 3)
        self.mirror = self.weight

    def forward(self, images):
        return F.linear(images.flatten(1), torch.tanh(self.weight) + self.mirror, self.bias)


class Unused(nn.Module):
    """A layer that the output does not depend on, between two that it does."""

    def __init__(self):
        super().__init__()
        self.first, self.idle, self.last = nn.Linear(64, 6), nn.Linear(4, 5), nn.Linear(6, 3)

    def forward(self, images):
        return self.last(torch.relu(self.first(images.flatten(1))))


def mlp(inputs=64, hidden=6, classes=3, act=nn.Tanh):
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, hidden), act(), nn.Linear(hidden, classes))


STUDENTS = {
    "convnet": lambda: ConvNet(1, 3, 8, width=4, depth=2),
    "mlp": mlp,
    "max pooling, in-place ReLU": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 3)
    ),
    "shared layer": Shared,
    "shared weights": lambda: Shared(weights_only=True),
    "one weight, two names": TwoNames,
    "unused parameter": Unused,
    "no norm": lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(36, 3)),
}


def built(build, seed=0):
    """A student in double precision, initialised by torch itself."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().double()


def toy(count, seed=0, dtype=torch.float64):
    """Images `[count, 1, 8, 8]` of three classes that differ in their mean image, and labels."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(99), dtype=dtype)
    labels = torch.arange(count) % 3
    return means[labels] + torch.randn(count, 1, 8, 8, generator=generator, dtype=dtype), labels


class StandIn:
    """Records like a CUDA graph: the outputs of the first call are overwritten by those of each replay."""

    def __init__(self):
        self.recordings = 0

    def __call__(self, run):
        self.recordings += 1
        outputs = run()

        def replay():
            for own, new in zip(*(torch.utils._pytree.tree_leaves(out) for out in (outputs, run())), strict=True):
                assert (own is None) == (new is None)
                if own is not None:
                    own.copy_(new)

        return replay, outputs


def assert_near(actual, expected, scale, rel=1e-12):
    """The distance of two vectors, relative to the length of `scale`."""
    assert (actual - expected).norm() <= rel * scale.norm() and scale.norm() > 0
