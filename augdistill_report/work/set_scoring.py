"""Scores a given set of images: students are trained on it as on any subset, in its own normalisation.

The set is in the store, under a digest of its content (`keep_set`): so a job depends on what is in a file, not on its
place, and a score that was stopped goes on where it was.
"""

import dataclasses

import torch
from torch import Tensor

from augdistill_core import Phi, teacher_of
from augdistill_report.data.datasets import Dataset
from augdistill_report.files.phi_files import load_phi
from augdistill_report.files.store import Store, digest, tensor_digest, write
from augdistill_report.work.experts import load_trajectories, own_experts
from augdistill_report.work.jobs import Tick
from augdistill_report.work.normalisation import Normalisation, data_in
from augdistill_report.work.provenance import phi_modules
from augdistill_report.work.scoring import Evaluation, train_student
from augdistill_report.work.students import accuracy_of

STORED_SET = "set"  # kind of a stored set's file


@dataclasses.dataclass(frozen=True)
class GivenSet:
    """In the place of a `Subset`: `images` images that the store keeps under `content`, and perhaps a saved phi.

    phi: the digest of its file in the store ("" = none); a score depends on its code too: `phi_name` is its name in
        PHIS, `phi_source` the source of a user's own
    hard: whether students get the labels of the content, not those that phi gives
    """

    content: str
    images: int
    normalisation: Normalisation = Normalisation()  # noqa: RUF009 (frozen)
    phi: str = ""
    phi_name: str = ""
    phi_source: str = ""
    hard: bool = False

    def about(self, data: Dataset) -> float:
        return self.images


def keep_set(store: Store, tensors: dict[str, Tensor], normalisation: Normalisation) -> GivenSet:
    """Put a set into the store.

    `tensors`: `labels` `[draws, n]` or `[draws, n, classes]`, and either `images` `[n, C, H, W]`, as students are
    trained on them, with one draw, or `index` `[draws, n]`: positions in the training images, followed by the
    validation images. A student takes the draw of its number.
    """
    content = digest({name: tensor_digest(tensors[name]) for name in sorted(tensors)})
    if not store.has(STORED_SET, {"content": content}):
        with store.making(STORED_SET, {"content": content}):
            store.save(STORED_SET, {"content": content}, tensors, {})
    return GivenSet(content, tensors["labels"].shape[1], normalisation)


def keep_phi(store: Store, content: bytes) -> str:
    """Put the file of a saved phi into the store; returns its digest."""
    name = digest({"phi": content.hex()})
    write(store.folder / f"phi-{name}.safetensors", content)
    return name


def real_images(data: Dataset, index: Tensor) -> Tensor:
    """The images `[n, C, H, W]` at positions `[n]` in the training images, followed by the validation images."""
    trained, count = index < len(data.train), len(data.train)
    images = torch.empty(len(index), *data.shape, device=data.mean.device)
    images[trained] = data.train.take(index[trained]).images
    images[~trained] = data.validation.take(index[~trained] - count).images
    return images


class ImagesOnly(Phi):
    """The images of a phi, without the labels that it gives."""

    def __init__(self, phi: Phi):
        super().__init__()
        self.phi = phi

    def forward(self, images, **given):
        return self.phi(images, **given)


@dataclasses.dataclass(frozen=True)
class SetEvaluation(Evaluation):
    """Fresh students trained on a `GivenSet` (in the place of `subset`). Its `Score` measures their test accuracy."""

    def modules(self):
        name = self.subset.phi_name
        return [*super().modules(), *(phi_modules(name) if name else [])]

    def __post_init__(self):
        super().__post_init__()
        if self.config.eval_augment == "instaaug":
            raise ValueError("eval_augment='instaaug': learns with the students of notebook 05; choose another")

    def needs(self):
        return own_experts(self.setup) if self.config.eval_labels == "soft" else []

    @property
    def data(self):
        return data_in(self.setup, self.subset.normalisation)

    def phi(self, store):
        return load_phi(store.folder / f"phi-{self.subset.phi}.safetensors").applied if self.subset.phi else None

    def trained(self, store: Store, tick: Tick):
        data, config, setup = self.data, self.config, self.setup
        tensors, _ = store.load(STORED_SET, {"content": self.subset.content})
        phi, augment, validation = self.phi(store), self.augment(), data.validation.made()
        phi = phi and (ImagesOnly(phi) if self.subset.hard else phi).to(setup.device)
        teacher = self.teacher(store) if config.eval_labels == "soft" else None
        models = []
        for k in range(config.eval_students):
            images, labels = (t.to(setup.device) for t in self.draw(tensors, k))
            path = (setup.seed, "student", k)
            options = dict(augment=augment, teacher=teacher, validation=validation)
            models.append(train_student(self.student(), phi, images, labels, config, *path, **options))
            tick(k + 1, config.eval_students)
        return models, [accuracy_of(model, validation) for model in models]

    def draw(self, tensors: dict[str, Tensor], student: int) -> tuple[Tensor, Tensor]:
        """The images and labels of a student."""
        own = student % len(tensors["labels"])
        images = tensors["images"] if "images" in tensors else real_images(self.data, tensors["index"][own])
        return images, tensors["labels"][own]

    def teacher(self, store: Store):
        """The experts as a teacher for images in the set's normalisation; theirs is the setup's own."""
        data, own, taught = self.data, self.setup.load(), teacher_of(load_trajectories(self.setup, store))
        return lambda images: taught(own.standardise(data.pixels(images, clamp=False)))
