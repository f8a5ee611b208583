"""Folders of images: which files are read, which are skipped and counted, and how a file becomes a tensor.

A folder has one of two layouts: a sub-folder for each class, or split folders (`train/`, and `val/`, `test/` or both)
that each hold the same class folders. Links are never followed, inside or outside the folder: a linked image would be
counted twice, or be in two splits.
"""

import collections
import dataclasses
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")  # torchvision's

# the allowed contents, whatever the suffix says; for some other formats Pillow would run other programs
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

SPLIT_OF = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}

APPLY_PICTURE = "grid.png"  # `augdistill apply` writes it beside the class folders

NAMED = 10  # the number of bad files that an error names; others are counted


@dataclasses.dataclass(frozen=True)
class FolderContents:
    """The contents of an image folder. `files[split][c]` are the sorted image files of class `classes[c]`.

    `folders[split]` is the name of the split's folder. Without split folders, it is empty and all files are in "train".
    """

    classes: tuple[str, ...]
    files: dict[str, list[list[Path]]]
    folders: dict[str, str]
    skipped: collections.Counter

    def skipped_text(self) -> str:
        return ", ".join(f"{count} {what}" for what, count in sorted(self.skipped.items())) or "nothing"


def listed(folder: Path, skipped: collections.Counter) -> tuple[list[Path], list[Path]]:
    """The sub-folders and image files directly in `folder`, sorted; other entries are counted in `skipped`."""
    folders, images = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                path = folder / entry.name
                if entry.name.startswith("."):
                    skipped["hidden"] += 1
                elif entry.is_symlink():
                    skipped["links"] += 1
                elif entry.is_dir():
                    folders.append(path)
                elif not entry.is_file():
                    skipped["special"] += 1
                elif path.suffix.lower() in IMAGE_SUFFIXES:
                    images.append(path)
                else:
                    skipped[path.suffix.lower() or "without a suffix"] += 1
    except OSError as error:
        raise ValueError(f"{folder}: this folder cannot be read ({error.strerror or error})") from None
    return sorted(folders), sorted(images)


def are_splits(folders: list[Path]) -> bool:
    """Whether these are split folders. A single such name among others is a class, like "train" among vehicles."""
    splits = {SPLIT_OF.get(folder.name.lower()) for folder in folders}
    return bool(folders) and (None not in splits or len(splits - {None}) > 1)


def image_files(folder: Path, skipped: collections.Counter | None = None) -> list[Path]:
    """The image files under `folder` and its sub-folders, sorted; other files are counted in `skipped`."""
    skipped = collections.Counter() if skipped is None else skipped
    folders, images = listed(folder, skipped)
    if are_splits(folders):
        raise ValueError(f"{folder} holds {first_names(folders)}: split folders must contain the class folders")
    return sorted([*images, *(path for inner in folders for path in image_files(inner, skipped))])


def first_names(paths: list[Path]) -> str:
    """The first names of files or folders, and how many more there are."""
    names = [path.name + "/" * path.is_dir() for path in paths[:NAMED]]
    return ", ".join(names) + (f" and {len(paths) - NAMED} more" if len(paths) > NAMED else "")


def scan_folder(folder: Path) -> FolderContents:
    """The images in a folder by split and class; no image is opened.

    A `ValueError` says what was found and what is needed, if the folder has neither layout or cannot be read.
    """
    if not folder.is_dir():
        raise ValueError("there is no such folder")
    skipped = collections.Counter()
    inner, images = listed(folder, skipped)
    if any(path.name == APPLY_PICTURE for path in images):
        skipped[APPLY_PICTURE] += 1
    images = [path for path in images if path.name != APPLY_PICTURE]
    if images:
        beside = f" beside {first_names(inner)}" if inner else ""
        raise ValueError(
            f"holds {first_names(images)}{beside}: every image must be in the sub-folder of its class, or all of "
            "them in train/<class>/ and test/<class>/"
        )
    folders = split_folders(folder, inner) if are_splits(inner) or holds_classes(inner) else {}
    by_split = {}
    for split, path in folders.items() or [("train", folder)]:
        by_split[split], images = listed(path, skipped) if folders else (inner, [])
        if images:
            raise ValueError(
                f"{path} holds {first_names(images)}: every image of a split must be in the sub-folder of its class"
            )
    classes = {split: tuple(path.name for path in paths) for split, paths in by_split.items()}
    for split, names in classes.items():
        if names != classes["train"]:
            here, there = set(classes["train"]) - set(names), set(names) - set(classes["train"])
            found = [f"only {folders['train'].name} has {', '.join(sorted(here))}"] if here else []
            found += [f"only {folders[split].name} has {', '.join(sorted(there))}"] if there else []
            raise ValueError(f"the split folders must hold the same classes; {'; '.join(found)}")
    files = {split: [image_files(path, skipped) for path in paths] for split, paths in by_split.items()}
    return FolderContents(classes["train"], files, {split: path.name for split, path in folders.items()}, skipped)


def holds_classes(folders: list[Path]) -> bool:
    """Whether a folder with the name of a split holds folders and no image, and so is not a class."""
    for folder in folders:
        if folder.name.lower() in SPLIT_OF:
            inner, images = listed(folder, collections.Counter())
            if inner and not images:
                return True
    return False


def split_folders(folder: Path, inner: list[Path]) -> dict[str, Path]:
    """The split folders by split, "train" first; a `ValueError` if one is double or missing, or others are there."""
    found = collections.defaultdict(list)
    for path in inner:
        found[SPLIT_OF.get(path.name.lower(), "")].append(path)
    if strange := found.pop("", []):
        splits = first_names([path for paths in found.values() for path in paths])
        raise ValueError(
            f"holds {splits} beside {first_names(strange)}: must hold split folders ({', '.join(SPLIT_OF)}) or class "
            "folders, not both"
        )
    for split, paths in found.items():
        if len(paths) > 1:
            raise ValueError(f"holds {first_names(paths)}: must hold one folder for the {split} split")
    if "train" not in found:
        raise ValueError(f"holds {first_names(inner)}: must hold train/ as well")
    return {split: found[split][0] for split in ("train", "validation", "test") if split in found}


def resized(raw: Tensor, size: int) -> Tensor:
    """uint8 images `[n, C, H, W]` as `[n, C, size, size]`: bilinear, antialiased, rounded to bytes again."""
    if raw.shape[-2:] == (size, size):
        return raw
    options = dict(size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    return torch.cat([F.interpolate(chunk.float(), **options).round().byte() for chunk in raw.split(4096)])


def read_image(path: Path, size: int) -> Tensor:
    """One image file as uint8 `[3, size, size]`, resized to a square (not cropped), rotated as its EXIF data say.

    Transparency is dropped. Of 16 bits per colour channel, the upper 8 are used. A `ValueError` names a file that
    cannot be read, has several frames, has grey values of more than 8 bits, or has more pixels than Pillow allows
    (`Image.MAX_IMAGE_PIXELS`, 89 million; a small file may hold far more).
    """
    import numpy as np
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                if image.mode[0] in "IF":
                    raise ValueError(f"mode {image.mode}; must have 8 bits per channel")
                if image.format != "MPO" and (frames := getattr(image, "n_frames", 1)) > 1:
                    # an MPO file is a photograph (.jpg) with its preview
                    raise ValueError(f"it has {frames} frames; must be one image")
                ImageOps.exif_transpose(image, in_place=True)
                # Pillow warns if transparency is converted to RGB directly
                upright = image.convert("RGBA") if "transparency" in image.info else image
                pixels = np.array(upright if upright.mode == "RGB" else upright.convert("RGB"))
    except Exception as error:  # a damaged file can make Pillow raise nearly any exception
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ValueError(f"{path} is not a readable image ({reason or type(error).__name__})") from None
    channels = torch.from_numpy(pixels).permute(2, 0, 1)
    at_once = 3 if channels.numel() < 1 << 24 else 1  # floats of a large image: one channel at a time
    return torch.cat([resized(chunk[None], size)[0] for chunk in channels.split(at_once)])


def read_images(paths: list[Path], size: int, show: Callable[[str], None] = lambda text: None) -> Tensor:
    """Image files as uint8 `[n, 3, size, size]`; `show` gets the progress as text.

    A `ValueError` names the first 10 files that cannot be read, each with its reason, and counts the rest.
    """
    images, bad = torch.empty(len(paths), 3, size, size, dtype=torch.uint8), []
    for i, path in enumerate(paths):
        show(f"reading: {i} of {len(paths)} images")
        try:
            images[i] = read_image(path, size)
        except ValueError as error:
            bad.append(str(error))
    if bad:
        more = f"; and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
        raise ValueError(f"{len(bad)} of {len(paths)} images cannot be read: {'; '.join(bad[:NAMED])}{more}")
    return images
