"""How the images of a distilled set are normalised: found from the images themselves, or named.

Students must be trained and tested on images in one and the same normalisation, and a file of tensors does not say
which. `Normalisation` is one candidate. It is plausible if the set's values are spread as those of real images in it
(`Distance`). Which of the plausible ones is right is decided on the validation split (`studies.subjects`).
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from augdistill_report.data.datasets import SPLITS, Dataset, whitened

# mean and std by channel, as in the official codes of DC, DSA, DM and MTT; "imagenet" as in torchvision's models
CONSTANTS = {
    "mnist": ((0.1307,), (0.3081,)),
    "fashion": ((0.2861,), (0.3530,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}

WHITE = ("zca", "zca-own")  # fitted on all training images as the official codes do, or without the validation images

NORMALISATIONS = ("pixels", "own", *WHITE, *CONSTANTS)

SHIFT, RATIO, BELOW = 1.0, 3.0, 0.25  # the largest `Distance` that is plausible

WIDEST = 4096  # values in an image up to which whitening is tried without being named (it takes minutes beyond)

LOOKED_AT = 2000  # real images whose mean and deviation are compared


@dataclasses.dataclass(frozen=True)
class Normalisation:
    """A name in `NORMALISATIONS`; with `mean` and `std` (by channel, for pixels in [0, 1]) those constants instead.

    "pixels": values in [0, 1], or bytes; students are trained on them standardised by the data's own constants.
    "own": standardised by the mean and std of the data set's own training images.
    """

    name: str = "own"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "mean", tuple(map(float, self.mean)))
        object.__setattr__(self, "std", tuple(map(float, self.std)))
        if self.name not in NORMALISATIONS and not self.mean:
            raise ValueError(f"normalisation={self.name!r}: must be one of {', '.join(NORMALISATIONS)}")
        if (
            len(self.mean) != len(self.std)
            or not all(map(math.isfinite, self.mean + self.std))
            or not all(s > 0 for s in self.std)
        ):
            raise ValueError(
                f"normalisation={self.name!r}: mean={self.mean}, std={self.std}: must be finite, std above 0"
            )

    def constants(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Its mean and std by channel; None if the data determine them."""
        return (self.mean, self.std) if self.mean else CONSTANTS.get(self.name)

    def of(self, data: Dataset) -> Dataset:
        """`data` (standardised by its own constants) with its images in this normalisation.

        A `ValueError` if the constants are for another number of channels.
        """
        device = data.mean.device
        if self.name in WHITE:
            return whitened(data.to("cpu"), as_official=self.name == "zca").to(device)
        found = self.constants()
        if found is None:
            return data
        if len(found[0]) != data.shape[0]:
            raise ValueError(
                f"normalisation={self.name!r}: is for {len(found[0])} channels, the images have {data.shape[0]}"
            )
        mean, std = (torch.tensor(values, device=device).view(-1, 1, 1) for values in found)
        if torch.equal(mean, data.mean) and torch.equal(std, data.std):
            return data  # the same bits: its bytes were not standardised by these floats
        full = 255 if data.train.raw.dtype == torch.uint8 else 1
        splits = {k: dataclasses.replace(getattr(data, k), zero=full * mean, unit=full * std) for k in SPLITS}
        return dataclasses.replace(data, **splits, mean=mean, std=std)

    def trained_on(self, images: Tensor, data: Dataset) -> Tensor:
        """What students are trained on, `[n, C, H, W]`, for a set's `images` as stored; `data` is `of` this one."""
        if self.name != "pixels":
            return images.float()
        if images.dtype == data.train.raw.dtype == torch.uint8:
            return dataclasses.replace(data.train, raw=images, labels=None).images  # with the bits of real images
        return data.standardise(images.float() / 255 if images.dtype == torch.uint8 else images.float())

    def pixels_of(self, images: Tensor, data: Dataset) -> Tensor:
        """Pixels of a set's `images`, not clamped; `data` is `of` this one."""
        if self.name == "pixels":
            return images.float() / 255 if images.dtype == torch.uint8 else images.float()
        return data.pixels(images.float(), clamp=False)


def of_card(values: dict) -> Normalisation:
    """The normalisation that a card names; a `ValueError` if it is none."""
    try:
        return Normalisation(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"its card has no valid normalisation ({error})") from None


@functools.lru_cache(maxsize=4)
def data_in(dataset_of, normalisation: Normalisation) -> Dataset:
    """`normalisation.of` the data set that a `Setup` loads, computed once in each process."""
    return normalisation.of(dataset_of.load(whiten=False))


def candidates(data: Dataset) -> list[Normalisation]:
    """What the images of a file may be in: pixels, standardised, whitened. CIFAR-100 is met in CIFAR-10's constants.

    The official code's constants, where there are some, else the data's own. Its own are left out otherwise, since
    only our files are in them, and they say so.
    """
    names = ["pixels", data.name if data.name in CONSTANTS else "own"]
    names += ["cifar10"] if data.name == "cifar100" else []
    names += ["zca"] if math.prod(data.shape) <= WIDEST else []
    return [Normalisation(name) for name in names]


class Distance(NamedTuple):
    """How unlike real images a set's are in a normalisation; of `shift` and `ratio` the largest of all channels.

    shift: between the means, in real standard deviations; ratio: the larger deviation over the smaller (at least 1);
    below: between the shares of values below zero, in [0, 1]
    """

    shift: float
    ratio: float
    below: float

    @property
    def plausible(self) -> bool:
        return self.shift <= SHIFT and self.ratio <= RATIO and self.below <= BELOW

    def __str__(self):
        return (
            f"means {self.shift:.1f} deviations apart, deviations x{self.ratio:.1f}, below zero {self.below:.0%} apart"
        )


def distance_to_real(images: Tensor, normalisation: Normalisation, data: Dataset) -> Distance:
    """The distance of a set's `images` as stored from real ones in a normalisation; `data` is `of` that."""
    real = data.train.take(slice(LOOKED_AT))
    like = normalisation.pixels_of(real.raw, data) if normalisation.name == "pixels" else real.images
    found = []
    for x in (like.cpu().double(), images.double()):
        found.append((x.mean((0, 2, 3)), x.std((0, 2, 3)), float((x < 0).double().mean())))
    (mean, std, below), (its_mean, its_std, its_below) = found
    ratio = torch.maximum(its_std / std, std / its_std)
    return Distance(float(((its_mean - mean).abs() / std).max()), float(ratio.max()), abs(its_below - below))
