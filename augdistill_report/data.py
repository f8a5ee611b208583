"""Data sets: images as tensors, standardised, in a fixed and seeded split into train, validation and test.

To add one, write a loader that returns pixels in [0, 1] and labels, and register it in `DATASETS`.
"""

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from augdistill_core import seeded

SPLIT_SEED = 20230  # the split is part of the data set, not of a run: it does not change with the run's seed


@dataclasses.dataclass(frozen=True)
class Split:
    """Standardised images `[n, C, H, W]` and labels `[n]`."""

    images: Tensor
    labels: Tensor

    def __len__(self):
        return len(self.labels)

    def take(self, index: Tensor) -> "Split":
        return Split(self.images[index], self.labels[index])


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set of `classes` (names), split, standardised by the training set's `mean` and `std` a channel."""

    name: str
    classes: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    mean: Tensor
    std: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)"""
        return tuple(self.train.images.shape[1:])

    def to(self, device: str) -> "Dataset":
        splits = {k: Split(*(t.to(device) for t in dataclasses.astuple(getattr(self, k)))) for k in SPLITS}
        return dataclasses.replace(self, mean=self.mean.to(device), std=self.std.to(device), **splits)

    def pixels(self, images: Tensor) -> Tensor:
        """Standardised images back as pixels in [0, 1] (clamped), for pictures and for policies that want them."""
        return (images * self.std + self.mean).clamp(0, 1)

    def subset(self, seed: int, *, fraction: float | None = None, per_class: int | None = None) -> Tensor:
        """Indices `[n]` into `train`: a stratified subset, by fraction in (0, 1] or by images a class.

        Nested for one seed: a smaller subset is inside every larger one. Sorted by class.
        """
        if (fraction is None) == (per_class is None):
            raise ValueError("subset: pass either fraction or per_class")
        if fraction is not None and not 0 < fraction <= 1:
            raise ValueError(f"fraction={fraction}: must be in (0, 1]")
        picks = []
        for c, name in enumerate(self.classes):
            members = torch.nonzero(self.train.labels == c).flatten().cpu()
            count = per_class if fraction is None else round(fraction * len(members))
            if count < 1:
                raise ValueError(
                    f"{'fraction' if per_class is None else 'per_class'}={fraction or per_class}: leaves class {name} "
                    f"of {self.name} empty; it has {len(members)} images"
                )
            if count > len(members):
                raise ValueError(
                    f"per_class={per_class}: class {name} of {self.name} has {len(members)} training images"
                )
            order = torch.randperm(len(members), generator=seeded(seed, "subset", c))
            picks.append(members[order[:count]])
        return torch.cat(picks)


SPLITS = ("train", "validation", "test")


def split_indices(labels: Tensor, held_out: tuple[float, float]) -> tuple[Tensor, Tensor, Tensor]:
    """Stratified train, validation and test indices; `held_out` are the fractions of the last two."""
    parts = ([], [], [])
    for c in labels.unique():
        members = torch.nonzero(labels == c).flatten()
        members = members[torch.randperm(len(members), generator=seeded(SPLIT_SEED, "split", int(c)))]
        validation, test = (round(f * len(members)) for f in held_out)
        sizes = [len(members) - validation - test, validation, test]
        for part, piece in zip(parts, members.split(sizes), strict=True):
            part.append(piece)
    return tuple(torch.cat(part).sort().values for part in parts)


def standardised(name: str, classes, pixels: Tensor, labels: Tensor, indices) -> Dataset:
    """A `Dataset` from pixels `[n, C, H, W]` in [0, 1], labels `[n]` and the three splits' indices."""
    train = pixels[indices[0]]
    mean, std = train.mean((0, 2, 3)).view(-1, 1, 1), train.std((0, 2, 3)).view(-1, 1, 1)
    splits = [Split((pixels[i] - mean) / std, labels[i]) for i in indices]
    return Dataset(name, tuple(classes), *splits, mean, std)


def load_digits(size: int) -> Dataset:
    """scikit-learn's 1,797 handwritten digits (8x8, grey), resized; 10 % validation and 20 % test of every class."""
    from sklearn.datasets import load_digits as sklearn_digits

    raw = sklearn_digits()
    pixels = torch.tensor(raw.images, dtype=torch.float32)[:, None] / 16
    pixels = F.interpolate(pixels, size=(size, size), mode="bilinear", align_corners=False)
    labels = torch.tensor(raw.target, dtype=torch.int64)
    return standardised("digits", "0123456789", pixels, labels, split_indices(labels, (0.1, 0.2)))


DATASETS: dict[str, Callable[[int], Dataset]] = {"digits": load_digits}


def load(name: str, size: int) -> Dataset:
    """The data set of that name with images of `size` x `size` pixels."""
    if name not in DATASETS:
        raise ValueError(f"dataset={name!r}: must be one of {', '.join(DATASETS)}")
    return DATASETS[name](size)
