"""`augdistill apply`: augments a data set or a folder of images with a saved phi, into PNG files in class folders.

The same command writes the same bytes. A command that was stopped continues: complete files are kept, all others are
made again.
"""

import concurrent.futures
import dataclasses
import io
import itertools
from pathlib import Path

import torch
from torch import Tensor

from augdistill_core import Config, knob, seeded
from augdistill_report.data.datasets import DATASETS, load
from augdistill_report.data.folders import IMAGE_SUFFIXES, read_images, scan_folder
from augdistill_report.files.phi_files import load_phi
from augdistill_report.files.sealed_json import read_json, write_json
from augdistill_report.files.store import digest, tensor_digest, write
from augdistill_report.run import picture
from augdistill_report.settings import Settings
from augdistill_report.show.image_grids import image_grid, is_whole_png
from augdistill_report.work.phi_layer import Augment, by, trained_on
from augdistill_report.work.progress import Line
from augdistill_report.work.setup import public_name

__all__ = ["How", "apply", "load_phi", "load_phis"]

BATCH = 32  # images at once; each batch has its own seed, so that a stopped command need not repeat all of them

WRITERS = 16  # files that are written at the same time

SHOWN = 10  # classes in the picture

NOTE, GRID = "apply.json", "grid.png"  # in the output folder: what made the images, and a picture of some


@dataclasses.dataclass(frozen=True)
class How(Config):
    """How many images `apply` writes, and their seed."""

    copies: int = knob(1, "augmented copies of each image", low=1)
    count: int = knob(0, "only the first images of each class, this many; 0 = all", low=0)
    seed: int = knob(0, "the seed of all random numbers", low=0)


def load_phis(changes: dict[str, str]) -> None:
    """Run the files that register a user's own phis: `{"phis": FILES}`, as the setting `phis` names them.

    A `ValueError` for any other setting.
    """
    for key in changes:
        if key != "phis":
            raise ValueError(f"--set {key}: apply takes only phis=FILE; the settings of phi's training are in its file")
    Settings(**changes).load_phis()


def of_set(name: str, augment: Augment, count: int, data: str) -> tuple[dict[str, Tensor], str]:
    """The images `[n, C, H, W]` of a data set's training split by class, and the data set's fingerprint."""
    found = load(name, augment.about["shape"][-1], data)
    expected = tuple(augment.about["shape"])
    if found.shape != expected:
        raise ValueError(f"--to {name}: its images are {by(found.shape)}, but {described(augment)}")
    images, labels = found.train.raw, found.train.labels
    return {c: images[labels == i][: count or None] for i, c in enumerate(found.classes)}, found.fingerprint


def of_folder(path: str, augment: Augment, count: int, line: Line) -> tuple[dict[str, Tensor], str]:
    """The images `[n, C, H, W]` of a folder by class, resized to phi's size, and a digest of the files used.

    Of a folder with split folders, the training split. A `ValueError` says what does not fit.
    """
    channels, size, _ = augment.about["shape"]
    if channels not in (1, 3):
        raise ValueError(f"--to folder:{path}: its images are {by((3, size, size))}, but {described(augment)}")
    try:
        found = scan_folder(Path(path).expanduser().resolve())
        if not found.classes:
            raise ValueError("must hold a sub-folder for each class; has none")
        files = [paths[: count or None] for paths in found.files["train"]]
        for c, paths in zip(found.classes, files, strict=True):
            if not paths:
                has = f"class {c} has no images ({', '.join(IMAGE_SUFFIXES)})"
                raise ValueError(f"{has}; skipped: {found.skipped_text()}")
        flat = [file for paths in files for file in paths]
        images = read_images(flat, size, line.show)
    except ValueError as error:
        raise ValueError(f"--to folder:{path}: {error}") from None
    if channels == 1:
        coloured = (images != images[:, :1]).flatten(1).any(1).tolist()
        if any(coloured):
            file = flat[coloured.index(True)]
            raise ValueError(f"--to folder:{path}: {file} is in colour, but {described(augment)}")
    by_class = images[:, :channels].split([len(paths) for paths in files])
    status = [(str(file), file.stat()) for file in flat]
    key = digest({"files": [[file, found.st_size, found.st_mtime_ns] for file, found in status]})
    return dict(zip(found.classes, by_class, strict=True)), key


def described(augment: Augment) -> str:
    about = augment.about
    return f"phi {about['phi']!r} was trained on {by(about['shape'])} images ({trained_on(about)})"


def class_folder(out: Path, name: str) -> Path:
    """The sub-folder of `out` for a class, also if its name has a slash (FashionMNIST has a class T-shirt/top)."""
    return out / name.replace("/", "_")


def start(out: Path, classes: list[str], made: dict) -> None:
    """Make the folder and write its note; a `ValueError` if these classes cannot be written there."""
    folders = {class_folder(out, name): name for name in classes}
    if len(folders) < len(classes):
        raise ValueError(f"--out {out}: two classes would share a folder ({', '.join(map(repr, classes))})")
    for folder, name in folders.items():
        if folder.name in (GRID, NOTE):
            raise ValueError(f"--out {out}: class {name!r} has the name of a file that apply writes; rename it")
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            kind = "a link" if folder.is_symlink() else "a file"
            raise ValueError(f"--out {out}: {folder.name!r} is {kind}, must be a folder; remove it")
    try:
        if out.exists() and any(out.iterdir()):
            if not (out / NOTE).is_file():
                raise ValueError(f"--out {out}: holds files that apply did not make; choose an empty folder")
            if read_json(out / NOTE, "apply") != made:
                raise ValueError(f"--out {out}: holds images of other settings ({NOTE}); choose an empty folder")
        write_json(out / NOTE, "apply", made)
    except OSError as error:
        raise ValueError(f"--out {out}: cannot be written ({error.strerror or error})") from None


def is_done(file: Path) -> bool:
    """Whether an image was written completely by an earlier command, and is no link."""
    return file.is_file() and not file.is_symlink() and is_whole_png(file)


def pixels_png(image: Tensor) -> bytes:
    """Pixels `[C, H, W]` in [0, 1] as a PNG file."""
    from PIL import Image

    values = (image * 255).round().byte().permute(1, 2, 0).squeeze(-1)
    buffer = io.BytesIO()
    Image.fromarray(values.numpy()).save(buffer, format="png")
    return buffer.getvalue()


def apply(augment: Augment, to: str, out: Path | str, how: How, data: str = "") -> str:
    """Augment the images of a data set or a folder (`to`) and write them into `out`; returns a summary in one line.

    Files are OUT/<class>/<number>.png, with _<copy> for several copies, and OUT/grid.png: the first image of each class
    before and after. Before anything is written, a `ValueError` says what does not fit. An `OSError` names a file that
    could not be written (full disk).
    """
    out, line = Path(out).expanduser().resolve(), Line()
    augment.check(torch.zeros(augment.about["shape"]))  # refuses a phi that takes no other images at all
    if to.partition(":")[0] not in DATASETS and Path(to).expanduser().is_dir():
        to = f"folder:{to}"
    kind, _, path = to.partition(":")
    try:
        if kind == "folder" and path:
            if out.is_relative_to(Path(path).expanduser().resolve()):
                raise ValueError(f"--out {out}: lies inside the folder of the input images; choose another")
            images, fingerprint = of_folder(path, augment, how.count, line)
        else:
            images, fingerprint = of_set(to, augment, how.count, data)
        classes = augment.about["classes"]
        if augment.applied.conditional and not set(images) <= set(classes):
            strange = ", ".join(sorted(set(images) - set(classes)))
            raise ValueError(
                f"--to {to}: {described(augment)}, reads the class and knows {', '.join(classes)}; has {strange}"
            )
        made = {
            "phi": augment.about["phi"],
            "trained on": trained_on(augment.about),
            "state": digest({name: tensor_digest(t) for name, t in augment.state_dict().items()}),
            "strength": augment.applied.strength,
            "probability": augment.applied.probability,
            "to": public_name(to),
            "of": fingerprint,
            **how.to_dict(),
        }
        start(out, list(images), made)
        total = write_images(augment, images, out, how, line)
    finally:
        line.clear()
    about = augment.about
    return f"{total} images of {to} in {out}; phi {about['phi']} was trained on {trained_on(about)}"


def write_images(augment: Augment, images: dict[str, Tensor], out: Path, how: How, line: Line) -> int:
    """Write every file that is not complete, and the picture; returns the number of images in the folder."""
    done, total = 0, how.copies * sum(map(len, images.values()))
    shown = {}
    for name, raw in images.items():
        label = augment.about["classes"].index(name) if augment.applied.conditional else None
        folder = class_folder(out, name)
        for first in range(0, len(raw), BATCH):
            x = raw[first : first + BATCH]
            x = x.float() / 255 if x.dtype == torch.uint8 else x
            for copy in range(how.copies):
                suffix = f"_{copy}" if how.copies > 1 else ""
                files = [folder / f"{first + i:05}{suffix}.png" for i in range(len(x))]
                in_picture = first == copy == 0 and len(shown) < SHOWN
                missing = [not is_done(file) for file in files]
                if in_picture or any(missing):
                    generator = seeded(how.seed, "apply", name, first, copy)
                    augmented = augment(x, labels=label, generator=generator)
                    if in_picture:
                        shown[name] = x[0], augmented[0]
                    todo = itertools.compress(zip(files, augmented, strict=True), missing)
                    with concurrent.futures.ThreadPoolExecutor(WRITERS) as pool:  # threads: they wait for the disk
                        list(pool.map(lambda item: write(item[0], pixels_png(item[1])), todo))
                done += len(files)
                line.show(f"{out}: {done} of {total} images")
    before, after = (torch.stack(images) for images in zip(*shown.values(), strict=True))
    title = f"shown: {len(shown)} of {len(images)} classes" if len(shown) < len(images) else ""
    write(out / GRID, picture(image_grid({"x": before, "phi(x)": after}, list(shown), title=title)))
    return total
