"""Data sets: images as tensors, standardised or whitened, with a fixed split into train, validation and test.

To add one, write a loader `(size, place) -> Dataset` that ends in `standardised`, and register it in `DATASETS`.
Images are stored as bytes (uint8); a batch or a subset is converted to floats on its device when it is read.
"""

import dataclasses
import functools
import hashlib
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from augdistill_core import seeded
from augdistill_report.data.folders import IMAGE_SUFFIXES, FolderContents, read_images, resized, scan_folder
from augdistill_report.data.sources import PUBLISHED, find, published
from augdistill_report.data.whitening import PIECE, cached_fit

SPLIT_SEED = 20230  # the split is fixed for a data set: it does not depend on the run's seed


@dataclasses.dataclass(frozen=True)
class Split:
    """Images and labels `[n]` (int64). `raw` `[n, C, H, W]` are the stored images: uint8, or floats in [0, 1].

    `images` are standardised per channel. With `whiten` `[d, d]`, d = C H W, they are whitened: each image minus the
    mean image is flattened and multiplied by that matrix.
    """

    raw: Tensor
    labels: Tensor
    zero: Tensor  # `[C, 1, 1]` (whitened: `[C, H, W]`): the value of `raw` that becomes 0
    unit: Tensor  # `[C, 1, 1]`: the difference in `raw` that becomes 1
    whiten: Tensor | None = None

    @property
    def images(self) -> Tensor:
        """Standardised (or whitened) images `[n, C, H, W]`, float32; computed at every access, so `take` first."""
        images = (self.raw - self.zero).div_(self.unit)
        if self.whiten is not None:
            for chunk in images.split(PIECE):  # in place: no second copy of the images
                chunk.copy_(mixed(chunk, self.whiten))
        return images

    def made(self) -> "Split":
        """The same split with its images computed once, for repeated access."""
        nothing = torch.zeros(1, 1, 1, device=self.unit.device)
        return Split(self.images, self.labels, nothing, nothing + 1)

    def __len__(self):
        return len(self.labels)

    def opened(self) -> "Split":
        """A split whose images can be read: this one, unless it is `Sealed`."""
        return self

    def take(self, index: Tensor | slice) -> "Split":
        return dataclasses.replace(self, raw=self.raw[index], labels=self.labels[index])

    def batches(self, size: int) -> Iterator["Split"]:
        """The whole split in order, in batches of at most `size` images."""
        return (self.take(slice(i, i + size)) for i in range(0, len(self), size))

    def to(self, device: str) -> "Split":
        return moved_to(self, device)


@dataclasses.dataclass(frozen=True)
class Sealed(Split):
    """The test split. Its images can be read only after `opened()`, which only the final scoring calls.

    So no method and no model selection can use a test image by mistake: `images` raises a `ValueError`.
    """

    @property
    def images(self) -> Tensor:
        raise ValueError(
            "the test split is sealed: model selection uses train and validation, only the final scoring opens it"
        )

    def opened(self) -> Split:
        return Split(self.raw, self.labels, self.zero, self.unit, self.whiten)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set with its split. `mean` and `std` `[C, 1, 1]`, for pixels in [0, 1], are those of the training images.

    If it is whitened (`whitened`), `mean` `[C, H, W]` is the mean image, `std` is 1, and `colour` `[d, d]` inverts
    `whiten`. `fingerprint` identifies images, labels and split. `where` says where the images were found and, for a
    folder, how it was split and which files were skipped. `order` `[train + validation]` are the positions of the
    training images, then of the validation images, in the source: CIFAR-10's own training images are cut into both.
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
    order: Tensor
    colour: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)"""
        return tuple(self.train.raw.shape[1:])

    def to(self, device: str) -> "Dataset":
        return moved_to(self, device)

    def pixels(self, images: Tensor, clamp: bool = True) -> Tensor:
        """Pixels in [0, 1] (clamped) from standardised or whitened images `[n, C, H, W]`; inverts `standardise`."""
        images = images if self.colour is None else mixed(images, self.colour)
        pixels = images * self.std + self.mean
        return pixels.clamp(0, 1) if clamp else pixels

    def standardise(self, pixels: Tensor) -> Tensor:
        """Pixels `[n, C, H, W]` in [0, 1], standardised or whitened like the images of the splits."""
        images = (pixels - self.mean) / self.std
        return images if self.colour is None else mixed(images, self.train.whiten)

    def subset(
        self,
        seed: int,
        *,
        fraction: float | None = None,
        per_class: int | None = None,
        skip: float = 0.0,
        window: float | None = None,
        ease: Tensor | None = None,
    ) -> Tensor:
        """Indices `[n]` into `train` of a stratified subset, sorted by class: a `fraction` in (0, 1], or `per_class`.

        Subsets of one seed are nested: a smaller one is contained in every larger one. `skip` in [0, 1) leaves out the
        first images of each class, as a fraction: the subset shares no image with the subset of `fraction=skip`.
        With a `window` in [0, 1] the seed draws only from a window of each class, ordered by `ease` (`window_of`).
        A `ValueError` names a class that would be empty or has too few images.
        """
        if window is not None:
            if not 0 <= window <= 1 or skip:
                raise ValueError(f"window={window}, skip={skip}: window must be in [0, 1], and skip 0 with it")
            if ease is None or ease.shape != (len(self.train),):
                raise ValueError(f"window={window}: needs the ease of each of the {len(self.train)} training images")
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
            # rounded so that a fraction and the complement that skips it always make the whole class
            count = per_class if fraction is None else round((skip + fraction) * len(members)) - first
            if count < 1:
                said = f"leaves class {name} of {self.name} empty; it has {len(members)} images"
                if per_class is not None:
                    raise ValueError(f"per_class={per_class}: {said}; must be at least 1")
                fewest = int(torch.bincount(self.train.labels, minlength=len(self.classes)).min())
                raise ValueError(f"fraction={fraction}: {said}; must be at least {math.ceil(500 / fewest) / 1000}")
            if count > len(members) - first:
                raise ValueError(
                    f"{'fraction' if per_class is None else 'per_class'}={fraction or per_class}: class {name} of "
                    f"{self.name} has {len(members)} training images" + (f", less {first} skipped" if first else "")
                )
            if window is not None:
                members = window_of(members, ease, count, window)
            order = torch.randperm(len(members), generator=seeded(seed, "subset", c))
            picks.append(members[order[first : first + count]])
        return torch.cat(picks)


SPLITS = ("train", "validation", "test")

WINDOW = 1.5  # size of a window of difficulty, in sizes of what is drawn from it: so draws differ


def window_of(members: Tensor, ease: Tensor, count: int, place: float) -> Tensor:
    """The images that `count` images of a difficulty are drawn from: `WINDOW` times as many of the positions `members`.

    They are ordered by `ease` `[train]`. The window is at the easiest (`place` 0) or hardest (1) end, or between them.
    """
    ordered = members[ease[members].argsort(descending=True, stable=True)]
    width = min(round(WINDOW * count), len(ordered))
    start = round(place * (len(ordered) - width))
    return ordered[start : start + width]


def mixed(images: Tensor, matrix: Tensor) -> Tensor:
    """Images `[n, C, H, W]`, each flattened to d values and multiplied by `matrix` `[d, d]`."""
    return (images.flatten(1) @ matrix).view(images.shape)


def moved_to(holder, device: str):
    """A `Split` or a `Dataset` with all its tensors on `device`."""
    held = {field.name: getattr(holder, field.name) for field in dataclasses.fields(holder)}
    return dataclasses.replace(holder, **{k: v.to(device) for k, v in held.items() if isinstance(v, Tensor | Split)})


def split_indices(labels: Tensor, held_out: tuple[float, float]) -> tuple[Tensor, Tensor, Tensor]:
    """Stratified train, validation and test indices; `held_out` are the fractions of validation and test."""
    splits = ([], [], [])
    for c in labels.unique():
        members = torch.nonzero(labels == c).flatten()
        members = members[torch.randperm(len(members), generator=seeded(SPLIT_SEED, "split", int(c)))]
        validation, test = (round(f * len(members)) for f in held_out)
        sizes = [len(members) - validation - test, validation, test]
        for split, piece in zip(splits, members.split(sizes), strict=True):
            split.append(piece)
    return tuple(torch.cat(split).sort().values for split in splits)


def moments(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation `[C, 1, 1]` of each channel of `raw` `[n, C, H, W]`, in the units of `raw`."""
    if raw.dtype != torch.uint8:
        return raw.mean((0, 2, 3)).view(-1, 1, 1), raw.std((0, 2, 3)).view(-1, 1, 1)
    # from counts of each value: exact for bytes, and without a float copy
    counts = torch.stack([torch.bincount(c.flatten(), minlength=256) for c in raw.unbind(1)]).double()
    values, total = torch.arange(256.0, dtype=torch.float64), counts.sum(1, keepdim=True)
    mean = (counts * values).sum(1, keepdim=True) / total
    variance = (counts * (values - mean) ** 2).sum(1, keepdim=True) / (total - 1)
    return mean.float()[..., None], variance.sqrt().float()[..., None]


def fingerprint(splits: list[Split]) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of the images and labels of all splits."""
    sha = hashlib.sha256()
    for tensor in (t for split in splits for t in (split.raw, split.labels)):
        sha.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
        sha.update(tensor.contiguous().numpy())
    return sha.hexdigest()[:16]


def standardised(name: str, classes, raw: Tensor, labels: Tensor, indices, where: str = "") -> Dataset:
    """A `Dataset` from images `[n, C, H, W]` (floats in [0, 1], or uint8), labels `[n]` and the indices of each split.

    A `ValueError` if a label has no class, or a channel of the training images is constant.
    """
    classes, full = tuple(classes), 255 if raw.dtype == torch.uint8 else 1
    if not 0 <= int(labels.min()) <= int(labels.max()) < len(classes):
        raise ValueError(f"dataset={name!r}: has labels outside its {len(classes)} classes ({where})")
    zero, unit = moments(raw[indices[0]])
    if not unit.min() > 0:
        raise ValueError(f"dataset={name!r}: a channel of its training images is constant ({where})")
    kinds = Split, Split, Sealed
    splits = [kind(raw[i], labels[i], zero, unit) for kind, i in zip(kinds, indices, strict=True)]
    order = torch.cat([indices[0], indices[1]])
    return Dataset(name, classes, *splits, zero / full, unit / full, fingerprint(splits), where, order)


def whitened(data: Dataset, as_official: bool = False) -> Dataset:
    """`data` with ZCA-whitened instead of standardised images; fitted on the training images (MTT's recipe).

    The official code fits on all 50,000 images of CIFAR-10 (`as_official`); else the validation images are left out.
    """
    full = 255 if data.train.raw.dtype == torch.uint8 else 1
    raw = torch.cat([data.train.raw, data.validation.raw]) if as_official else data.train.raw
    found = cached_fit(raw, data.fingerprint)
    one = torch.ones(1, 1, 1)
    changes = {"zero": full * found["mean"], "unit": full * one, "whiten": found["matrix"]}
    splits = {k: dataclasses.replace(getattr(data, k), **changes) for k in SPLITS}
    return dataclasses.replace(data, **splits, mean=found["mean"], std=one, colour=found["inverse"])


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
    """A data set of torchvision: its published test split, and 10 % of every training class for validation."""
    kind, root = published(name), find(name, data)
    raw, labels = [], []
    with warnings.catch_warnings():
        # CIFAR's pickles are older than this rule of numpy
        warnings.filterwarnings("ignore", message=r"dtype\(\): align should be passed as Python or NumPy boolean")
        both = [kind(root, train=train, download=False) for train in (True, False)]
    for split in both:
        images = torch.as_tensor(split.data)  # MNIST [n, H, W], CIFAR [n, H, W, C]
        images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
        raw.append(resized(images, size or images.shape[-1]).contiguous())
        labels.append(torch.as_tensor(split.targets, dtype=torch.int64))
        if len(raw[-1]) != len(labels[-1]):
            raise ValueError(f"dataset={name!r}: {len(raw[-1])} images but {len(labels[-1])} labels in {root}")
    classes, count = both[0].classes, len(labels[0])
    train, validation, _ = split_indices(labels[0], (0.1, 0))
    raw, labels = torch.cat(raw), torch.cat(labels)
    return standardised(name, classes, raw, labels, (train, validation, torch.arange(count, len(labels))), str(root))


def load_folder(size: int, path: str) -> Dataset:
    """Images in one sub-folder per class (its name), or in split folders that contain such sub-folders; resized.

    A split without a folder is taken from every class of the training images: 10 % for validation, 20 % for the test.
    If all images are grey, the data set has one channel; otherwise all are RGB. A `ValueError` says what is wrong.
    """
    name = f"folder:{path}"
    try:
        found = scan_folder(Path(path).expanduser())
        if len(found.classes) < 2:
            has = f"must hold a sub-folder for each class, at least two; has {list(found.classes)}"
            raise ValueError(f"{has} (skipped: {found.skipped_text()})")
        check_counts(found)
        raw = read_images([p for split in found.files.values() for paths in split for p in paths], size or 32)
    except ValueError as error:
        raise ValueError(f"dataset={name!r}: {error}") from None
    if (raw == raw[:, :1]).all():
        raw = raw[:, :1]
    labels = {
        split: torch.repeat_interleave(torch.arange(len(paths)), torch.tensor([len(p) for p in paths]))
        for split, paths in found.files.items()
    }
    indices, first = list(split_indices(labels["train"], missing_shares(found))), len(labels["train"])
    for i, split in enumerate(SPLITS[1:], 1):
        if split in labels:
            indices[i] = torch.arange(first, first + len(labels[split]))
            first += len(labels[split])
    all_labels = torch.cat(list(labels.values()))
    return standardised(name, found.classes, raw, all_labels, indices, folder_text(path, found))


def missing_shares(found: FolderContents) -> tuple[float, float]:
    """The fractions of the training images used for validation and test: 0 for a split with its own folder."""
    return tuple(0 if split in found.files else share for split, share in zip(SPLITS[1:], (0.1, 0.2), strict=True))


def check_counts(found: FolderContents) -> None:
    """A `ValueError` names a class with too few images in a split, or too few to hold some out."""
    shares = [share for share in missing_shares(found) if share]
    enough = next(n for n in range(1, 100) if all(round(share * n) for share in shares))
    for split, by_class in found.files.items():
        least = enough if split == "train" else 1
        for c, paths in zip(found.classes, by_class, strict=True):
            if len(paths) < least:
                place = f"{found.folders[split]}/{c}" if found.folders else f"class {c}"
                why = f", to hold one out for each of {len(shares)} other splits" if least > 1 else ""
                raise ValueError(
                    f"{place} has {len(paths)} images ({', '.join(IMAGE_SUFFIXES)}); must have at least {least}{why} "
                    f"(skipped: {found.skipped_text()})"
                )


def folder_text(path: str, found: FolderContents) -> str:
    """The `where` of a folder: its path, how it was split, and what was skipped."""
    given = [f"{split} from {folder}/" for split, folder in found.folders.items()]
    source = f" of {found.folders['train']}/" if given else ""
    cut = [
        f"{split} from {100 * share:.0f} % of every class{source}"
        for split, share in zip(SPLITS[1:], missing_shares(found), strict=True)
        if share
    ]
    return f"{Path(path).expanduser()}; {', '.join([*given, *cut])}; skipped: {found.skipped_text()}"


# loaders `(size, place)` by name. A size of 0 means the data set's own size, 32 for a folder. `place` is the path after
# "folder:", and the setting `data` for the others
DATASETS: dict[str, Callable[[int, str], Dataset]] = {
    "digits": load_digits,
    **{name: functools.partial(load_published, name) for name in PUBLISHED},
    "folder": load_folder,
}


def check_name(dataset: str) -> None:
    """A `ValueError` unless `dataset` is the name of a data set, or folder:PATH."""
    name, colon, path = dataset.partition(":")
    if name not in DATASETS or (name == "folder") != bool(path) or (colon and not path):
        names = ", ".join(n for n in DATASETS if n != "folder")
        raise ValueError(f"dataset={dataset!r}: must be one of {names}, or folder:PATH (a sub-folder for each class)")


def load(dataset: str, size: int = 0, data: str = "") -> Dataset:
    """The data set of that name with images of `size` x `size` pixels (0: its own size); `data` is searched first.

    A `ValueError` names what is unknown, missing, damaged or impossible.
    """
    check_name(dataset)
    if size < 0:
        raise ValueError(f"size={size}: must be at least 1, or 0 for its own size")
    name, _, path = dataset.partition(":")
    return DATASETS[name](size, path or data)


@functools.lru_cache(maxsize=2)
def load_data(dataset: str, size: int, data: str, device: str, zca: bool = False) -> Dataset:
    """`load`, cached in this process; `whitened` if `zca`."""
    found = load(dataset, size, data)
    return (whitened(found) if zca else found).to(device)


def describe(data: Dataset) -> str:
    """A summary as text: where it was found, images per split and class, shape, mean, std, fingerprint."""
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
