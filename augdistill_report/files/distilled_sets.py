"""Distilled sets as files: what other codes release is read without running any of their code, and ours is written so.

`read_set` takes a pair of MTT's official code (images_best.pt and labels_best.pt, and lr_best.pt if it is there), .npz,
.safetensors, a folder of images (a sub-folder a class), or a file of positions in the training set (.npy, .txt, .pt).
`write_set` writes the first four, each with a card: what is in the set, how it is normalised, and how it was made. A
set with a card comes back with the same bits, but from a folder: its images are rounded to 8 bits.
"""

import dataclasses
import io
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from augdistill_report.data.folders import FORMATS, read_images, scan_folder
from augdistill_report.files.sealed_json import JSON_KINDS, check_json, read_json, strict_json, write_json
from augdistill_report.files.store import FORMAT, SealedFile, as_json, digest, tensor_digest, write, write_sealed
from augdistill_report.files.torch_files import read_torch

FORMATS_OUT = ("mtt", "folder", "npz", "safetensors")

KINDS_OF_LABELS = ("hard", "probabilities", "logits", "experts")  # what `--labels` may name

KIND_OF_SET, CARD, PAIR = "distilled set", "card.json", "images_best.pt"

MOST_BYTES = 1 << 34  # bytes that a file may claim to hold


@dataclasses.dataclass(frozen=True)
class DistilledSet:
    """Images and labels as they are in a file.

    `images` `[n, C, H, W]`: uint8, or floats in a normalisation that the file may not say. A selection has None, and
    `positions` `[n]` in the source's training images instead. `labels`: int64 `[n]`, or probabilities `[n, classes]`;
    None for a selection. `classes`: the class names that a folder gives to the labels. `lr`: the step size that was
    learned with the images (0: none is known). `card`: what `write_set` said of it ({} for a file of another code).
    `bytes`: of the images as they are stored. `stored_labels`: as the file holds them, before they were read as a kind
    that was named (None: as `labels`).
    """

    images: Tensor | None
    labels: Tensor | None
    form: str
    bytes: int
    positions: Tensor | None = None
    classes: tuple[str, ...] = ()
    lr: float = 0.0
    card: dict = dataclasses.field(default_factory=dict)
    stored_labels: Tensor | None = None

    def __len__(self):
        return len(self.positions if self.images is None else self.images)

    @property
    def content(self) -> str:
        """A digest of images, labels and step size."""
        return content_of_set(self.images, self.labels, self.lr)


def content_of_set(images: Tensor, labels: Tensor, lr: float) -> str:
    """A digest that identifies a distilled set, in whatever form it is stored."""
    return digest({"images": tensor_digest(images), "labels": tensor_digest(labels), "lr": lr})


def read_set(path: Path | str, labels: str = "") -> DistilledSet:
    """The distilled set in a file or folder; `labels` names what the labels are, one of `KINDS_OF_LABELS`.

    Without a name, a matrix is taken for probabilities if its rows are. A `ValueError` names the file, what is wrong
    with it, and what would be right.
    """
    path = Path(path).expanduser()
    if labels and labels not in KINDS_OF_LABELS:
        raise ValueError(f"labels={labels!r}: must be one of {', '.join(KINDS_OF_LABELS)}")
    if path.is_dir() and (path / PAIR).is_file():
        path = path / PAIR
    if path.is_dir():
        if labels in ("probabilities", "logits"):
            raise ValueError(f"labels={labels!r}: {path} is a folder, whose sub-folders are classes: must be hard")
        found = from_folder(path)
    elif not path.is_file():
        raise ValueError(f"{path}: no such file or folder; must be a distilled set, a selection, a saved phi or a row")
    elif path.suffix == ".npz":
        found = from_npz(path, labels)
    elif path.suffix == ".safetensors":
        found = from_safetensors(path, labels)
    elif path.suffix == ".pt" and path.name.startswith("images"):
        found = from_pair(path, labels)
    elif path.suffix in (".npy", ".txt", ".pt"):
        return from_positions(path)
    else:
        raise ValueError(f"{path}: must be .npz, .safetensors, .npy or .txt, images*.pt beside labels*.pt, or a folder")
    check_content(found, path)
    return found


def check_content(found: DistilledSet, path: Path) -> None:
    """A `ValueError` unless the images can be trained on, and are those of the card."""
    images = found.images
    if images.ndim != 4 or not images.numel():
        raise ValueError(f"{path}: images are {tuple(images.shape)}, must be [n, C, H, W]")
    if images.shape[2] != images.shape[3]:
        last = " (channels come second)" if images.shape[3] in (1, 3) else ""
        raise ValueError(f"{path}: images are {tuple(images.shape)}, must be square: [n, C, size, size]{last}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ValueError(f"{path}: images are {images.dtype}, must be floats or uint8")
    if bad := int((~images.float().isfinite()).sum()):
        raise ValueError(f"{path}: {bad} values of the images are not finite")
    if not 0 <= found.lr < float("inf"):
        raise ValueError(f"{path}: its step size is {found.lr:g}, must be above 0")
    if len(found.labels) != len(images):
        raise ValueError(f"{path}: {len(images)} images but {len(found.labels)} labels")
    if found.card:
        check_json(found.card, JSON_KINDS["card"].shape, f"{path}: its card")
    # a card is of what the file holds: `--labels hard` may have made classes of its probabilities
    stored = found.labels if found.stored_labels is None else found.stored_labels
    if found.card and found.card["content"] != content_of_set(images, stored, found.lr):
        raise ValueError(
            f"{path}: its card is of other images, labels or step size: export it again, or remove the card"
        )


def read_labels(values: Tensor, kind: str, path: Path) -> Tensor:
    """Labels as int64 `[n]`, or as probabilities `[n, classes]`; a `ValueError` if they are not of this kind."""
    if values.ndim == 1:
        if values.is_floating_point() or values.dtype == torch.bool:
            raise ValueError(f"{path}: labels are {values.dtype}, must be whole numbers, or a matrix [n, classes]")
        if kind in ("probabilities", "logits"):
            raise ValueError(f"{path}: labels are {tuple(values.shape)}, must be [n, classes] for --labels {kind}")
        return values.long()
    if values.ndim != 2 or not values.numel():
        raise ValueError(f"{path}: labels are {tuple(values.shape)}, must be [n] or [n, classes]")
    values = values.float()
    if bad := int((~values.isfinite()).sum()):
        raise ValueError(f"{path}: {bad} values of the labels are not finite")
    if kind == "logits":
        return values.softmax(1)
    if kind in ("hard", "experts"):
        return values.argmax(1)
    if values.min() < 0 or not torch.allclose(values.sum(1), torch.ones(len(values)), atol=1e-3):
        if kind == "probabilities":
            raise ValueError(f"{path}: labels are no probabilities: each row must be at least 0 and sum to 1")
        raise ValueError(f"{path}: labels are a matrix, but no probabilities: name them (--labels logits, or hard)")
    return values


# --- the forms --------------------------------------------------------------------------------------------------------


def a_tensor(path: Path, what: str) -> Tensor:
    """The one tensor in a file of `torch.save`."""
    found = read_torch(path, what)
    if not isinstance(found, Tensor):
        raise ValueError(f"{path}: holds a {type(found).__name__}, must hold one tensor")
    return found.detach().clone()


def from_pair(path: Path, kind: str) -> DistilledSet:
    """MTT's pair: images*.pt, labels*.pt and (if it is there) lr*.pt, which differ in that word only."""
    labels, lr = (path.with_name(word + path.name.removeprefix("images")) for word in ("labels", "lr"))
    images = a_tensor(path, "the images of MTT's code")
    values = a_tensor(labels, f"the labels of {path.name}")
    rate = float(a_tensor(lr, "a step size").reshape(-1)[0]) if lr.is_file() else 0.0
    card = read_json(path.with_name(CARD), "card") if path.with_name(CARD).is_file() else {}
    size = images.numel() * images.element_size()
    about = dict(lr=rate, card=card, stored_labels=values)
    return DistilledSet(images, read_labels(values, kind, labels), "mtt", size, **about)


def from_named(tensors: dict[str, Tensor], kind: str, path: Path, card: dict) -> DistilledSet:
    """A set from tensors by name: `images`, one of `labels`, `probabilities` and `logits`, and perhaps `lr`."""
    if "images" not in tensors:
        raise ValueError(f"{path}: holds {', '.join(sorted(tensors)) or 'nothing'}; must hold images")
    names = [name for name in ("labels", "probabilities", "logits") if name in tensors]
    if len(names) != 1 and kind not in names:
        has = " and ".join(names) or "no labels"
        raise ValueError(f"{path}: holds {has}; must hold labels, probabilities or logits (of several: name --labels)")
    name = kind if kind in names else names[0]
    own = kind if name == "labels" or kind in ("hard", "experts") else name
    images, lr = tensors["images"], tensors.get("lr")
    size = images.numel() * images.element_size()
    rate = 0.0 if lr is None else float(lr.reshape(-1)[0])
    about = dict(lr=rate, card=card, stored_labels=tensors[name])
    return DistilledSet(images, read_labels(tensors[name], own, path), path.suffix[1:], size, **about)


def from_npz(path: Path, kind: str) -> DistilledSet:
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > MOST_BYTES:
                raise ValueError(f"it claims to hold more than {MOST_BYTES:,} bytes")
        with np.load(path, allow_pickle=False) as archive:  # objects would be pickles, which may hold code
            arrays = {name: archive[name] for name in archive.files}
        card = strict_json(str(arrays.pop("card"))) if "card" in arrays else {}
        tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    except Exception as error:  # numpy's reader raises many types of errors on damaged files
        raise ValueError(f"{path}: is damaged, or holds more than arrays of numbers ({error})") from None
    return from_named(tensors, kind, path, card)


def from_safetensors(path: Path, kind: str) -> DistilledSet:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            ours = FORMAT in (file.metadata() or {})
            tensors = {} if ours else {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    except SafetensorError as error:
        raise ValueError(f"{path}: is damaged ({error})") from None
    card = {}
    if ours:
        sealed = SealedFile(path, KIND_OF_SET)
        tensors, card = sealed.read(), sealed.about
    return from_named(tensors, kind, path, card)


def from_folder(path: Path) -> DistilledSet:
    """A folder with a sub-folder of images for each class. The images keep their size, and so must have one size."""
    from PIL import Image

    try:
        found = scan_folder(path)
        files = [file for paths in found.files["train"] for file in paths]
        if not files:
            raise ValueError(f"has no images in sub-folders, and no {PAIR} (skipped: {found.skipped_text()})")
        sizes = set()
        for file in files:
            try:
                with warnings.catch_warnings(action="error"), Image.open(file, formats=FORMATS) as image:
                    sizes.add(image.size)
            except Exception as error:  # a damaged file can make Pillow raise nearly any exception
                raise ValueError(f"{file} is not a readable image ({error})") from None
        if len(sizes) > 1 or len(set(*sizes)) > 1:
            shown = ", ".join(f"{w}x{h}" for w, h in sorted(sizes)[:5])
            raise ValueError(f"images of {shown} pixels: all must be squares of one size")
        images = read_images(files, next(iter(sizes))[0])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if (images == images[:, :1]).all():
        images = images[:, :1].contiguous()
    labels = torch.repeat_interleave(
        torch.arange(len(found.classes)), torch.tensor([len(paths) for paths in found.files["train"]])
    )
    card = read_json(path / CARD, "card") if (path / CARD).is_file() else {}
    size = sum(file.stat().st_size for file in files)
    return DistilledSet(
        images, labels, "folder", size, classes=found.classes, lr=card["lr"] if card else 0.0, card=card
    )


def from_positions(path: Path) -> DistilledSet:
    """A selection: the positions of its images in the source's training images, whole numbers, one an image."""
    images = f"; images themselves: {PAIR}, with labels_best.pt beside it, or .npz" if path.suffix == ".pt" else ""
    try:
        if path.suffix == ".npy":
            values = torch.from_numpy(np.load(path, allow_pickle=False))
        elif path.suffix == ".pt":
            values = a_tensor(path, "positions in the training set")
        else:
            values = torch.tensor([int(line) for line in path.read_text(encoding="utf-8").split()])
    except (ValueError, OSError, EOFError, TypeError) as error:
        raise ValueError(f"{path}: is no file of positions in the training set ({error}){images}") from None
    if values.ndim != 1 or not len(values) or values.is_floating_point() or values.dtype == torch.bool:
        raise ValueError(f"{path}: holds {values.dtype} {tuple(values.shape)}, must be whole numbers [n]{images}")
    return DistilledSet(None, None, "selection", 0, positions=values.long())


# --- writing ----------------------------------------------------------------------------------------------------------


def write_set(found: DistilledSet, out: Path | str, form: str) -> Path:
    """Write a set in one of `FORMATS_OUT`, with its card; returns the file or folder.

    "mtt" and "folder" are folders. A folder holds images as PNG: pixels in [0, 1] as 8 bits, hard labels only. A
    `ValueError` says what cannot be written.
    """
    out = Path(out).expanduser()
    if form not in FORMATS_OUT:
        raise ValueError(f"format={form!r}: must be one of {', '.join(FORMATS_OUT)}")
    if form in ("mtt", "folder") and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out={str(out)!r}: exists and is not empty; choose another folder")
    if form == "folder":
        return to_folder(found, out)
    soft = found.labels.ndim == 2
    card = found.card | {"content": found.content}
    if form == "mtt":
        for word, value in (("labels", found.labels), ("lr", torch.tensor(found.lr, dtype=torch.float64))):
            if word == "labels" or found.lr:
                write(out / f"{word}_best.pt", torch_bytes(value))
        write_json(out / CARD, "card", card)
        write(out / PAIR, torch_bytes(found.images))  # last: a folder without it is no set
        return out
    tensors = {"images": found.images, "probabilities" if soft else "labels": found.labels}
    tensors |= {"lr": torch.tensor(found.lr, dtype=torch.float64)} if found.lr else {}
    out = out if out.suffix == f".{form}" else out.with_name(f"{out.name}.{form}")
    if form == "npz":
        buffer = io.BytesIO()
        np.savez(buffer, card=np.array(as_json(card)), **{name: t.numpy() for name, t in tensors.items()})
        write(out, buffer.getvalue())
    else:
        write_sealed(out, KIND_OF_SET, card, tensors)
    return out


def torch_bytes(value: Tensor) -> bytes:
    """A tensor as `torch.save` writes it."""
    buffer = io.BytesIO()
    torch.save(value.clone(), buffer)
    return buffer.getvalue()


def to_folder(found: DistilledSet, out: Path) -> Path:
    """PNG files in class folders, in the order of the set within each class, and the card of what is written."""
    from PIL import Image

    if found.labels.ndim == 2:
        raise ValueError("format='folder': holds hard labels only, these are soft; choose mtt, npz or safetensors")
    if found.images.dtype != torch.uint8:
        raise ValueError("format='folder': holds pixels as bytes")  # `export` converts them
    names = [found.classes[c].replace("/", "_") for c in found.labels.tolist()]
    order = sorted(range(len(found)), key=lambda i: (names[i], i))  # as a folder is read
    for i in order:
        buffer = io.BytesIO()
        Image.fromarray(found.images[i].permute(1, 2, 0).squeeze(-1).contiguous().numpy()).save(buffer, format="png")
        write(out / names[i] / f"{i:06}.png", buffer.getvalue())
    labels = torch.tensor([sorted(set(names)).index(names[i]) for i in order])
    write_json(out / CARD, "card", found.card | {"content": content_of_set(found.images[order], labels, found.lr)})
    return out
