"""`Setup`: the data, the student, the experts and the machine of a result."""

import dataclasses
import functools
from pathlib import Path

from augdistill_core import PRECISIONS, ConvNet, ExpertConfig, knob, snapshots_every
from augdistill_report.data.augmentations import AUGMENTATIONS, DIFFERENTIABLE, Choices
from augdistill_report.data.datasets import Dataset, check_name, load_data
from augdistill_report.files.expert_files import FLOATS, SETUP_KEYS, ExpertFile, experts_of_setup

# what experts from a folder must share with the settings, since results are published with these; not the number of
# epochs, which the file itself has
TRAINING_KEYS = ["expert_augment", "expert_lr", "expert_batch", "expert_momentum", "expert_decay", "snapshot_steps"]


def absolute(path: str) -> str:
    """The absolute form of a path, valid in every working directory; "" stays ""."""
    return str(Path(path).expanduser().absolute()) if path else ""


def public_name(dataset: str) -> str:
    """A data set's name for publication: for `folder:PATH` only the folder's name, since the path may be private."""
    kind, colon, path = dataset.partition(":")
    return kind + colon + Path(path).name


@dataclasses.dataclass(frozen=True)
class Setup(ExpertConfig):
    """The data, the student, the experts and the machine of a result."""

    dataset: str = knob("digits", "the data set: a name in DATASETS, or folder:PATH")
    data: str = knob("", "the folder that holds the data set; empty = look in AUGDISTILL_DATA, then in the cache")
    size: int = knob(16, "images are size x size pixels", low=4, high=256)
    zca: bool = knob(False, "images are ZCA-whitened (eps .1, fit on the training split), not standardised")
    width: int = knob(32, "channels of each of the student's convolutions", low=1)
    depth: int = knob(2, "blocks of the student, each a convolution, InstanceNorm, ReLU and 2x2 pooling", low=1)
    expert_augment: str = knob(
        "none",
        "augmentation that the experts are trained with, or kornia:NAME(key=value)",
        choices=Choices("expert_augment", AUGMENTATIONS),
    )
    expert_float: str = knob("float32", "number type of the experts' parameters on disk", choices=tuple(FLOATS))
    experts_at_once: int = knob(0, "experts that train together on one GPU; 0 = all", low=0)
    expert_files: str = knob("", "a folder with trained experts to use; empty = train them")
    augment: str = knob(
        "none",
        "differentiable augmentation after phi in the unroll (MTT's A), or kornia:NAME(key=value)",
        choices=Choices("augment", DIFFERENTIABLE, differentiable=True),
    )
    seed: int = knob(0, "the seed of all random numbers", low=0)
    device: str = knob("cpu", "cpu, or a CUDA device", choices=("cpu", "cuda"))
    precision: str = knob(
        "float32",
        "number type of the ConvNet's convolutions, in experts, unroll and evaluation; tf32 needs a CUDA device",
        choices=tuple(PRECISIONS),
    )
    threads: int = knob(1, "CPU threads of each process (another number changes the rounding)", low=1, high=1024)

    def __post_init__(self):
        super().__post_init__()
        check_name(self.dataset)
        if self.precision == "tf32" and self.device == "cpu":
            raise ValueError("precision='tf32': a CPU does not have it; use device=cuda, or float32 or bf16")
        # absolute, since a notebook runs in another working directory
        name, colon, path = self.dataset.partition(":")
        object.__setattr__(self, "dataset", name + colon + absolute(path))
        object.__setattr__(self, "data", absolute(self.data))
        object.__setattr__(self, "expert_files", absolute(self.expert_files))

    def load(self, whiten: bool = True) -> Dataset:
        """The data set; with `whiten` it is ZCA-whitened if the setting `zca` is on, which can take a minute."""
        return load_data(self.dataset, self.size, self.data, self.device, self.zca and whiten)

    def student(self, data: Dataset) -> ConvNet:
        """A new student for images `[B, C, size, size]` of `data`."""
        return ConvNet(data.shape[0], len(data.classes), self.size, self.width, self.depth, self.precision)

    def expert_key(self) -> dict:
        """The settings that an expert's file must share to be used here. The data set is named by its fingerprint."""
        return {key: getattr(self, key) for key in SETUP_KEYS} | {"dataset": self.load(whiten=False).fingerprint}

    def snapshots(self) -> int:
        """The number of snapshots of each expert after its initial one."""
        files = given_experts(self)
        return min(map(len, files)) - 1 if files else snapshots_every(len(self.load(whiten=False).train), self)[1]

    def public(self) -> dict:
        """The settings for publication: without the paths of data and files on this machine, which may be private."""
        places = {"data": "", "dataset": public_name(self.dataset), "expert_files": Path(self.expert_files).name}
        return self.to_dict() | places


@functools.lru_cache(maxsize=8)
def given_experts(setup: Setup) -> list[ExpertFile]:
    """The experts in the folder `expert_files`, opened once in each process; [] if this run trains its own."""
    if not setup.expert_files:
        return []
    training = {key: getattr(setup, key) for key in TRAINING_KEYS}
    return experts_of_setup(setup.expert_files, setup.experts, setup.expert_key(), training, setup.device)
