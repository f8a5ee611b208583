"""Data sets: images as tensors, standardised or whitened, in a fixed and seeded split into train, validation and test.

To add one, write a loader `(size, place) -> Dataset`, ending in `standardised`, and register it in `DATASETS`.
A whole set stays as its bytes: floats are made of what is taken from it, a batch or a subset, on its device.
"""

import dataclasses
import functools
import hashlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from augdistill_core import seeded
from augdistill_report.data.sources import PUBLISHED, find, published
from augdistill_report.data.whitening import PIECE, cached_fit

SPLIT_SEED = 20230  # the split is part of the data set, not of a run: it does not change with the run's seed

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")  # torchvision's


@dataclasses.dataclass(frozen=True)
class Split:
    """Images and labels `[n]`: `raw` `[n, C, H, W]` as they are kept (uint8 or float), standardised by channel.

    Or, with `whiten` `[d, d]`, pixels less the mean image, each as one vector of d = C H W values times that matrix.
    """

    raw: Tensor
    labels: Tensor
    zero: Tensor  # `[C, 1, 1]` (whitened: `[C, H, W]`): what stands for 0 in `raw`,
    unit: Tensor  # and how much of it for 1
    whiten: Tensor | None = None

    @property
    def images(self) -> Tensor:
        """Standardised images `[n, C, H, W]`: float32, made anew each time, so take what you need before."""
        images = (self.raw - self.zero).div_(self.unit)
        if self.whiten is not None:
            for part in images.split(PIECE):  # in place: the set is not held twice
                part.copy_(mixed(part, self.whiten))
        return images

    def made(self) -> "Split":
        """The same images, made once: for those who read them many times."""
        nothing = torch.zeros(1, 1, 1, device=self.unit.device)
        return Split(self.images, self.labels, nothing, nothing + 1)

    def __len__(self):
        return len(self.labels)

    def opened(self) -> "Split":
        """What has images to look at: itself, unless it is `Sealed`."""
        return self

    def take(self, index: Tensor | slice) -> "Split":
        return dataclasses.replace(self, raw=self.raw[index], labels=self.labels[index])

    def batches(self, size: int) -> Iterator["Split"]:
        """All of it in order, at most `size` images at a time."""
        return (self.take(slice(i, i + size)) for i in range(0, len(self), size))

    def to(self, device: str) -> "Split":
        return moved_to(self, device)


@dataclasses.dataclass(frozen=True)
class Sealed(Split):
    """The test split: it keeps its images to itself until it is `opened`, which only the last scoring does.

    So no method and no choice can look at a test image and go unnoticed.
    """

    @property
    def images(self) -> Tensor:
        raise ValueError(
            "the test split is sealed: methods and choices see train and validation, only the last scoring opens it"
        )

    def opened(self) -> Split:
        return Split(self.raw, self.labels, self.zero, self.unit, self.whiten)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set of `classes` (names), split, standardised by the training set's `mean` and `std` a channel.

    Whitened (`whitened`), `mean` is the mean image, `std` is 1, and `colour` `[d, d]` undoes what `whiten` does.
    `fingerprint` stands for its images, labels and split, wherever they came from (`where`).
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    validation: Split
    test: Sealed
    mean: Tensor
    std: Tensor
    fingerprint: str
    where: str
    colour: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)"""
        return tuple(self.train.raw.shape[1:])

    def to(self, device: str) -> "Dataset":
        return moved_to(self, device)

    def pixels(self, images: Tensor, clamp: bool = True) -> Tensor:
        """Standardised images back as pixels in [0, 1] (clamped), for pictures and for policies that want them."""
        images = images if self.colour is None else mixed(images, self.colour)
        pixels = images * self.std + self.mean
        return pixels.clamp(0, 1) if clamp else pixels

    def standardise(self, pixels: Tensor) -> Tensor:
        """Pixels `[n, C, H, W]` in [0, 1] as the splits' images are: standardised, or whitened."""
        images = (pixels - self.mean) / self.std
        return images if self.colour is None else mixed(images, self.train.whiten)

    def subset(
        self, seed: int, *, fraction: float | None = None, per_class: int | None = None, skip: float = 0.0
    ) -> Tensor:
        """Indices `[n]` into `train`: a stratified subset, by fraction in (0, 1] or by images a class.

        Nested for one seed: a smaller subset is inside every larger one. With `skip`, the first images of each class
        are left out (this fraction of it), so that nothing of a subset that small is in it. Sorted by class.
        """
        if (fraction is None) == (per_class is None):
            raise ValueError("subset: pass either fraction or per_class")
        if fraction is not None and not 0 < fraction <= 1:
            raise ValueError(f"fraction={fraction}: must be in (0, 1]")
        if not 0 <= skip < 1:
            raise ValueError(f"skip={skip}: must be in [0, 1)")
        picks = []
        for c, name in enumerate(self.classes):
            members = torch.nonzero(self.train.labels == c).flatten().cpu()
            first = round(skip * len(members))
            # so that a part and the part that skips it are the whole, however they are rounded
            count = per_class if fraction is None else round((skip + fraction) * len(members)) - first
            if count < 1:
                raise ValueError(
                    f"{'fraction' if per_class is None else 'per_class'}={fraction or per_class}: leaves class {name} "
                    f"of {self.name} empty; it has {len(members)} images"
                )
            if count > len(members) - first:
                raise ValueError(
                    f"{'fraction' if per_class is None else 'per_class'}={fraction or per_class}: class {name} of "
                    f"{self.name} has {len(members)} training images" + (f", less {first} skipped" if first else "")
                )
            order = torch.randperm(len(members), generator=seeded(seed, "subset", c))
            picks.append(members[order[first : first + count]])
        return torch.cat(picks)


SPLITS = ("train", "validation", "test")


def mixed(images: Tensor, matrix: Tensor) -> Tensor:
    """Images `[n, C, H, W]`, each as one vector times `matrix` `[d, d]`."""
    return (images.flatten(1) @ matrix).view(images.shape)


def moved_to(holder, device: str):
    """A `Split` or a `Dataset` with all that it holds on `device`."""
    held = {field.name: getattr(holder, field.name) for field in dataclasses.fields(holder)}
    return dataclasses.replace(holder, **{k: v.to(device) for k, v in held.items() if isinstance(v, Tensor | Split)})


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


def moments(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation `[C, 1, 1]` of each channel of `raw`, in its own units."""
    if raw.dtype != torch.uint8:
        return raw.mean((0, 2, 3)).view(-1, 1, 1), raw.std((0, 2, 3)).view(-1, 1, 1)
    # of bytes exactly, and without a float copy of the set: from how often each value occurs
    counts = torch.stack([torch.bincount(c.flatten(), minlength=256) for c in raw.unbind(1)]).double()
    values, total = torch.arange(256.0, dtype=torch.float64), counts.sum(1, keepdim=True)
    mean = (counts * values).sum(1, keepdim=True) / total
    variance = (counts * (values - mean) ** 2).sum(1, keepdim=True) / (total - 1)
    return mean.float()[..., None], variance.sqrt().float()[..., None]


def fingerprint(splits: list[Split]) -> str:
    """16 hexadecimal digits of the SHA-256 over every split's images and labels."""
    sha = hashlib.sha256()
    for tensor in (t for split in splits for t in (split.raw, split.labels)):
        sha.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
        sha.update(tensor.contiguous().numpy())
    return sha.hexdigest()[:16]


def standardised(name: str, classes, raw: Tensor, labels: Tensor, indices, where: str = "") -> Dataset:
    """A `Dataset` from images `[n, C, H, W]` (floats in [0, 1], or uint8), labels `[n]` and the splits' indices."""
    classes, full = tuple(classes), 255 if raw.dtype == torch.uint8 else 1
    if not 0 <= int(labels.min()) <= int(labels.max()) < len(classes):
        raise ValueError(f"dataset={name!r}: labels beyond its {len(classes)} classes ({where})")
    zero, unit = moments(raw[indices[0]])
    if not unit.min() > 0:
        raise ValueError(f"dataset={name!r}: a channel of its training images is the same everywhere ({where})")
    kinds = Split, Split, Sealed
    splits = [kind(raw[i], labels[i], zero, unit) for kind, i in zip(kinds, indices, strict=True)]
    return Dataset(name, classes, *splits, zero / full, unit / full, fingerprint(splits), where)


def whitened(data: Dataset) -> Dataset:
    """`data` with ZCA-whitened images in the place of standardised ones, by its training images (MTT's recipe).

    The official code fits on all 50,000 images of CIFAR-10, we on those that are not held out for validation.
    """
    full = 255 if data.train.raw.dtype == torch.uint8 else 1
    found = cached_fit(data.train.raw, data.fingerprint)
    one = torch.ones(1, 1, 1)
    changes = {"zero": full * found["mean"], "unit": full * one, "whiten": found["matrix"]}
    splits = {k: dataclasses.replace(getattr(data, k), **changes) for k in SPLITS}
    return dataclasses.replace(data, **splits, mean=found["mean"], std=one, colour=found["inverse"])


def resized(raw: Tensor, size: int) -> Tensor:
    """uint8 images at `size` x `size`: bilinear, antialiased, rounded to bytes again."""
    if raw.shape[-2:] == (size, size):
        return raw
    options = dict(size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    return torch.cat([F.interpolate(part.float(), **options).round().byte() for part in raw.split(4096)])


# --- the data sets ----------------------------------------------------------------------------------------------------


def load_digits(size: int, place: str = "") -> Dataset:
    """scikit-learn's 1,797 handwritten digits (8x8, grey), resized; 10 % validation and 20 % test of every class."""
    from sklearn.datasets import load_digits as sklearn_digits

    raw, size = sklearn_digits(), size or 8
    pixels = torch.tensor(raw.images, dtype=torch.float32)[:, None] / 16
    pixels = F.interpolate(pixels, size=(size, size), mode="bilinear", align_corners=False)
    labels = torch.tensor(raw.target, dtype=torch.int64)
    indices = split_indices(labels, (0.1, 0.2))
    return standardised("digits", "0123456789", pixels, labels, indices, "scikit-learn")


def load_published(name: str, size: int, data: str = "") -> Dataset:
    """A set that torchvision reads; its test split as published, 10 % of every training class for validation."""
    kind, root = published(name), find(name, data)
    raw, labels = [], []
    with warnings.catch_warnings():
        # CIFAR's pickles are older than numpy's rule
        warnings.filterwarnings("ignore", message=r"dtype\(\): align should be passed as Python or NumPy boolean")
        parts = [kind(root, train=train, download=False) for train in (True, False)]
    for part in parts:
        images = torch.as_tensor(part.data)  # MNIST [n, H, W], CIFAR [n, H, W, C]
        images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
        raw.append(resized(images, size or images.shape[-1]).contiguous())
        labels.append(torch.as_tensor(part.targets, dtype=torch.int64))
        if len(raw[-1]) != len(labels[-1]):
            raise ValueError(f"dataset={name!r}: {len(raw[-1])} images but {len(labels[-1])} labels in {root}")
    classes, count = parts[0].classes, len(labels[0])
    train, validation, _ = split_indices(labels[0], (0.1, 0))
    raw, labels = torch.cat(raw), torch.cat(labels)
    return standardised(name, classes, raw, labels, (train, validation, torch.arange(count, len(labels))), str(root))


def image_files(folder: Path) -> list[Path]:
    """The image files under `folder`, in a fixed order; hidden ones, and those in hidden folders, are passed over."""
    images = (path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    return sorted(path for path in images if not any(p.startswith(".") for p in path.relative_to(folder).parts))


def read_image(path: Path, size: int) -> Tensor:
    """One image file as uint8 `[3, size, size]`, squeezed if it is not square; transparency is dropped."""
    import numpy as np
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":
                raise ValueError(f"mode {image.mode}; must have 8 bits a channel")
            upright = ImageOps.exif_transpose(image)
            if "transparency" in image.info:  # Pillow warns if this goes straight to RGB
                upright = upright.convert("RGBA")
            pixels = np.array(upright.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is no image that can be read ({error})") from None
    return resized(torch.from_numpy(pixels).permute(2, 0, 1)[None], size)[0]


def load_folder(size: int, path: str) -> Dataset:
    """Images in one sub-folder a class (named by it), resized; 10 % validation and 20 % test of every class.

    Grey images make a grey set; one in colour makes all of them RGB.
    """
    name, folder = f"folder:{path}", Path(path).expanduser()
    if not folder.is_dir():
        raise ValueError(f"dataset={name!r}: there is no such folder")
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(classes) < 2:
        raise ValueError(f"dataset={name!r}: must hold a sub-folder for each class, at least two; has {classes}")
    found = [image_files(folder / c) for c in classes]
    held_out = (0.1, 0.2)
    for c, paths in zip(classes, found, strict=True):
        if min(round(f * len(paths)) for f in held_out) < 1:
            raise ValueError(
                f"dataset={name!r}: class {c} has {len(paths)} images ({', '.join(IMAGE_SUFFIXES)}); "
                "must have at least 6, to hold one out for validation and one for the test"
            )
    raw = torch.stack([read_image(p, size or 32) for paths in found for p in paths])
    if (raw == raw[:, :1]).all():
        raw = raw[:, :1]
    labels = torch.repeat_interleave(torch.arange(len(classes)), torch.tensor([len(paths) for paths in found]))
    return standardised(name, classes, raw, labels, split_indices(labels, held_out), str(folder))


# by name: loaders of (size, place); a size of 0 is the set's own, 32 for a folder; place is what follows "folder:", and
# for the others the setting `data`
DATASETS: dict[str, Callable[[int, str], Dataset]] = {
    "digits": load_digits,
    **{name: functools.partial(load_published, name) for name in PUBLISHED},
    "folder": load_folder,
}


def check_name(dataset: str) -> None:
    """A `ValueError` unless this is the name of a data set, or folder:PATH."""
    name, colon, path = dataset.partition(":")
    if name not in DATASETS or (name == "folder") != bool(path) or (colon and not path):
        names = ", ".join(n for n in DATASETS if n != "folder")
        raise ValueError(f"dataset={dataset!r}: must be one of {names}, or folder:PATH (a sub-folder for each class)")


def load(dataset: str, size: int = 0, data: str = "") -> Dataset:
    """The data set of that name with images of `size` x `size` pixels (0: its own), looked for in `data` first."""
    check_name(dataset)
    if size < 0:
        raise ValueError(f"size={size}: must be at least 1, or 0 for the set's own")
    name, _, path = dataset.partition(":")
    return DATASETS[name](size, path or data)


@functools.lru_cache(maxsize=2)
def load_data(dataset: str, size: int, data: str, device: str, zca: bool = False) -> Dataset:
    """`load`, once a process; `whitened` if `zca`."""
    found = load(dataset, size, data)
    return (whitened(found) if zca else found).to(device)


def describe(data: Dataset) -> str:
    """What was found, for a person: where, images by split and class, shape, mean, std, fingerprint."""
    counts = {k: torch.bincount(getattr(data, k).labels, minlength=len(data.classes)).tolist() for k in SPLITS}
    width = max(map(len, data.classes))
    rows = [f"{c:{width}} " + " ".join(f"{counts[k][i]:>10}" for k in SPLITS) for i, c in enumerate(data.classes)]
    facts = {
        "where": data.where,
        "shape": " x ".join(map(str, data.shape)) + " (C, H, W)",
        "images": ", ".join(f"{len(getattr(data, k))} {k}" for k in SPLITS),
        "mean": ", ".join(f"{v:.4f}" for v in data.mean.flatten()),
        "std": ", ".join(f"{v:.4f}" for v in data.std.flatten()),
        "fingerprint": data.fingerprint,
    }
    head = f"{'class':{width}} " + " ".join(f"{k:>10}" for k in SPLITS)
    return "\n".join([data.name, *(f"  {k}: {v}" for k, v in facts.items()), "", head, *rows])
