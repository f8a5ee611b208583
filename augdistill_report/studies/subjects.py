"""What is scored: a distilled set of a file, a selection, or a phi with its subset, ready for students to train on.

A set must fit the data set that students are tested on: its channels, its classes, its normalisation. What a file does
not say is found, and refused by name where it cannot be.
"""

import dataclasses
import math
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from augdistill_core import PHIS, Wrapper, labels_under
from augdistill_report.data.datasets import Dataset
from augdistill_report.files.distilled_sets import DistilledSet
from augdistill_report.files.phi_files import load_phi, save_phi
from augdistill_report.files.store import Store
from augdistill_report.settings import Settings
from augdistill_report.work.difficulty import subset_index
from augdistill_report.work.distillation import Distillation
from augdistill_report.work.jobs import Subset
from augdistill_report.work.normalisation import (
    WHITE,
    Normalisation,
    candidates,
    data_in,
    distance_to_real,
    of_card,
)
from augdistill_report.work.own_code import own_source
from augdistill_report.work.pool import run_jobs
from augdistill_report.work.progress import Progress
from augdistill_report.work.scoring import EvalConfig
from augdistill_report.work.set_scoring import GivenSet, SetEvaluation, keep_phi, keep_set
from augdistill_report.work.setup import Setup
from augdistill_report.work.statistics import stop_mark

QUICK_STUDENTS = dict(
    eval_students=2, eval_steps=150, eval_epochs=0, eval_augment="none", eval_lr=0.02, eval_labels="hard"
)

MARGIN = 0.02  # two normalisations whose quick students differ by less (plus their spread) are not told apart


@dataclasses.dataclass(frozen=True)
class Subject:
    """A set in the store, and what its budget is.

    `labels` `[n]` or `[n, classes]`, as students get them. `bytes` by what they are for: images, labels, phi, decoder.
    `lr`: the step size learned with the images (0: none is known). `how` says how its images are normalised, and why.
    """

    name: str
    setup: Setup
    given: GivenSet
    labels: Tensor
    bytes: dict[str, int]
    lr: float
    how: str

    @property
    def data(self) -> Dataset:
        """The data set in the normalisation of the set."""
        return data_in(self.setup, self.given.normalisation)

    @property
    def hard(self) -> Tensor:
        """The class of each image, `[n]`: of soft labels the most probable one."""
        return self.labels.argmax(1) if self.labels.ndim == 2 else self.labels


def label_bytes(labels: Tensor, classes: int) -> int:
    """Bytes that labels need: a byte (or two) for a class, four for a probability."""
    return 4 * labels.numel() if labels.ndim == 2 else len(labels) * math.ceil(math.log2(classes) / 8)


def stored_bytes(phi: nn.Module | None, hard: Tensor, data: Dataset) -> dict[str, int]:
    """Bytes by part (images, labels, phi) of what students need: base images with labels `hard` `[n]`, and a phi.

    A real image has a byte a value; learned images, and all other parameters of phi, four.
    """
    labels = labels_under(phi, hard, torch.arange(len(hard)))
    size = {"images": len(hard) * math.prod(data.shape), "labels": label_bytes(labels, len(data.classes))}
    parts = [] if phi is None else parts_of(phi)
    of_labels = [part for part in parts if isinstance(part, PHIS["labels"])]
    of_images = [part for part in parts if getattr(part, "bound", False) and part not in of_labels]
    others = [part for part in parts if part not in of_labels and part not in of_images]
    if of_images:  # in the place of real images
        size["images"] = sum(map(state_bytes, of_images))
    return size | ({"phi": sum(map(state_bytes, others))} if others else {})


def experts_bytes(setup: Setup, config: EvalConfig) -> int:
    """Bytes of the experts, if they give the labels of each augmented image while students train."""
    if config.eval_labels == "hard":
        return 0
    return setup.experts * 4 * sum(p.numel() for p in setup.student(setup.load()).parameters())


def parts_of(phi: nn.Module) -> list[nn.Module]:
    """The phis that a phi is made of."""
    if isinstance(phi, Wrapper):
        return [part for child in phi.children() for part in parts_of(child)]
    return [part for child in phi for part in parts_of(child)] if isinstance(phi, nn.ModuleList) else [phi]


def state_bytes(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in module.state_dict().values())


def setup_for(settings: Settings, normalisation: Normalisation) -> Setup:
    """The setup that students are scored in; whitened, if the set is, so that controls are whitened too."""
    return settings.select(Setup, zca=normalisation.name in WHITE)


# --- a set of a file --------------------------------------------------------------------------------------------------


def fitted_to(found: DistilledSet, data: Dataset, name: str) -> DistilledSet:
    """The set with labels as positions in the data's classes, and its channels; a `ValueError` if it does not fit."""
    classes = [c.replace("/", "_") for c in data.classes]
    labels, images = found.labels, found.images
    if found.classes:
        named = [classes.index(c) if c in classes else int(c) if c.isdecimal() else -1 for c in found.classes]
        for c, place in zip(found.classes, named, strict=True):
            if not 0 <= place < len(classes):
                raise ValueError(f"{name}: class {c!r} is none of {data.name}: {', '.join(data.classes)}, or a number")
        labels = torch.tensor(named)[labels]
    elif labels.ndim == 2 and labels.shape[1] != len(classes):
        raise ValueError(f"{name}: labels are {tuple(labels.shape)}, {data.name} has {len(classes)} classes")
    elif labels.ndim == 1 and not 0 <= int(labels.min()) <= int(labels.max()) < len(classes):
        raise ValueError(
            f"{name}: labels from {int(labels.min())} to {int(labels.max())}; {data.name} has classes 0 to "
            f"{len(classes) - 1}"
        )
    channels = data.shape[0]
    if found.form == "folder" and images.shape[1] == 1:
        images = images.expand(-1, channels, -1, -1)  # all its images are grey
    if tuple(images.shape[1:]) != data.shape:
        raise ValueError(f"{name}: images are {tuple(images.shape[1:])}, {data.name} has {data.shape} (C, H, W)")
    return dataclasses.replace(found, images=images, labels=labels)


def from_set(found: DistilledSet, name: str, settings: Settings, store: Store, normalisation: str = "") -> Subject:
    """A distilled set, in the normalisation that its card or `normalisation` names; else it is found."""
    data = settings.select(Setup, zca=False).load()
    if found.positions is not None:
        return from_positions_in(found, name, settings, store, data)
    found = fitted_to(found, data, name)
    other = other_data(found.card, data, name)
    if found.images.dtype == torch.uint8 and normalisation not in ("", "pixels"):
        raise ValueError(f"{name}: its images are bytes, so they are pixels: not --normalisation {normalisation}")
    if normalisation:
        chosen, how = Normalisation(normalisation), f"{normalisation}, as it was named"
    elif found.card:
        try:
            chosen = of_card(found.card["normalisation"])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if chosen.name == "zca-own" and found.card.get("fingerprint") != data.fingerprint:
            raise ValueError(f"{name}: it is whitened by other data than {data.name}: name another --normalisation")
        how = f"{chosen.name}, as its card says"
    elif found.images.dtype == torch.uint8:
        chosen, how = Normalisation("pixels"), "pixels, since they are bytes"
    else:
        chosen, how = found_normalisation(found, name, settings, store)
    given = keep_images(found, chosen, settings, store)
    size = {"images": found.bytes, "labels": label_bytes(found.labels, len(data.classes))}
    return Subject(name, setup_for(settings, chosen), given, found.labels, size, found.lr, how + other)


def other_data(card: dict, data: Dataset, name: str) -> str:
    """What a score must say of a set that was made from other data; "" for the same data, or if no card says it.

    A `ValueError` if its classes are others: then label 3 means something else.
    """
    if not card:
        return ""
    if list(data.classes) != card["classes"]:
        ours, its = (
            ", ".join(classes[:5]) + ", ..." * (len(classes) > 5) for classes in (data.classes, card["classes"])
        )
        raise ValueError(
            f"{name}: its card says that it was made from {card['data']}, with the classes {its}; {data.name} has "
            f"{ours}: score it on {card['data']} (--on)"
        )
    if card.get("fingerprint", data.fingerprint) != data.fingerprint:
        where = f"({card['data']}, {card['fingerprint']}) than it is scored on ({data.name}, {data.fingerprint})"
        return f"; its card says that it was made from other data {where}"
    return ""


def keep_images(found: DistilledSet, normalisation: Normalisation, settings: Settings, store: Store) -> GivenSet:
    """The set in the store, as students are trained on it."""
    data = data_in(setup_for(settings, normalisation), normalisation)
    images = normalisation.trained_on(found.images.to(data.mean.device), data).cpu()
    return keep_set(store, {"images": images, "labels": found.labels[None]}, normalisation)


def found_normalisation(found: DistilledSet, name: str, settings: Settings, store: Store) -> tuple[Normalisation, str]:
    """The one normalisation that fits the set, and a line that says why; a `ValueError` if none fits, or several do.

    One fits if real images have such a mean and deviation in it, and quick students that are trained on the set and
    validated in it are (nearly) the best of all.
    """
    among = candidates(settings.select(Setup, zca=False).load())
    config = settings.select(EvalConfig, **QUICK_STUDENTS)
    hard = dataclasses.replace(found, labels=found.labels if found.labels.ndim == 1 else found.labels.argmax(1))
    jobs = {n: SetEvaluation(setup_for(settings, n), keep_images(hard, n, settings, store), config) for n in among}
    run_jobs(list(jobs.values()), store, settings.pool, Progress("normalisation"))
    accuracy = {n: job.stored(store)[1]["validation"] for n, job in jobs.items()}
    best = max(sum(values) / len(values) for values in accuracy.values())
    fit, lines = [], []
    for n, values in accuracy.items():
        distance = distance_to_real(found.images, n, data_in(setup_for(settings, n), n))
        mean, spread = sum(values) / len(values), max(values) - min(values)
        if distance.plausible and mean >= best - MARGIN - spread:
            fit.append(n)
        lines.append(f"{n.name} ({distance}; quick students {100 * mean:.1f} % on validation)")
    tried = "; ".join(lines)
    if len(fit) != 1:
        which = f"{' and '.join(n.name for n in fit)} fit" if fit else "none fits"
        raise ValueError(f"{name}: normalisation not certain, {which}: name it (--normalisation). Tried: {tried}")
    return fit[0], f"{fit[0].name}, found. Tried: {tried}"


def from_positions_in(found: DistilledSet, name: str, settings: Settings, store: Store, data: Dataset) -> Subject:
    """A selection of the source's training images; a `ValueError` names a position that is none of them."""
    order, positions = data.order.cpu(), found.positions
    place = torch.full((int(order.max()) + 1,), -1)
    place[order] = torch.arange(len(order))
    known = (positions >= 0) & (positions < len(place))
    index = torch.where(known, place[positions.clamp(0, len(place) - 1)], -1)
    if (index < 0).any():
        bad = int(positions[index < 0][0])
        raise ValueError(
            f"{name}: position {bad} is no training image of {data.name} (they are in 0 to {int(order.max())})"
        )
    if len(index.unique()) < len(index):
        raise ValueError(f"{name}: holds a position twice; must be different images")
    labels = torch.cat([data.train.labels, data.validation.labels]).cpu()[index]
    given = keep_set(store, {"index": index[None], "labels": labels[None]}, Normalisation())
    size = {"images": len(index) * math.prod(data.shape), "labels": label_bytes(labels, len(data.classes))}
    return Subject(name, settings.select(Setup, zca=False), given, labels, size, 0.0, "own: real images")


# --- a phi with its subset --------------------------------------------------------------------------------------------


def from_phi(path: Path, name: str, settings: Settings, store: Store, lr: float = 0.0) -> Subject:
    """A saved phi with the subset that it was trained on; a `ValueError` if that is of other data."""
    layer = load_phi(path)
    about, phi = layer.about, layer.applied
    setup = settings.select(Setup, zca=about["setup"]["zca"])
    data = setup.load()
    if about["data"]["fingerprint"] != data.fingerprint:
        raise ValueError(
            f"{name}: was trained on {about['data']['name']} ({about['data']['fingerprint']}), not on {data.name} at "
            f"{data.shape[1]}x{data.shape[2]} ({data.fingerprint})"
        )
    # a subset of one difficulty was ranked by the experts of its own setup
    own = Setup.from_dict(about["setup"] | {key: getattr(settings, key) for key in ("dataset", "data", "device")})
    index = subset_index(Subset(**about["subset"]), own, store)
    hard = data.train.labels.cpu()[index]
    normalisation = Normalisation("zca-own" if setup.zca else "own")
    tensors = {"index": index[None], "labels": hard[None]}  # phi itself replaces the labels that it has learned
    code = dict(phi=keep_phi(store, path.read_bytes()), phi_name=about["phi"], phi_source=own_source(about["phi"]))
    given = dataclasses.replace(keep_set(store, tensors, normalisation), **code)
    labels = labels_under(phi, hard, torch.arange(len(index))).detach()
    size = stored_bytes(phi, hard, data)
    return Subject(name, setup, given, labels, size, lr, f"{normalisation.name}, as phi was trained")


def from_row(job: Distillation, name: str, settings: Settings, made: Store, store: Store) -> Subject:
    """A row of a run: the phi that a job trained (it is in the store `made`), with its subset and its step size."""
    meta = job.stored(made)[1]
    name, alpha = f"{name}{stop_mark(meta['stopped'] and meta['stopped']['kind'])}", meta["alpha"]
    with tempfile.TemporaryDirectory() as folder:
        path = save_phi(Path(folder) / "row.safetensors", job, made)
        return from_phi(path, name, settings, store, max(alpha, 0.0))
