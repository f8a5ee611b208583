"""The setup of a result: the data, the student, the experts, the machine."""

import dataclasses
import functools
from pathlib import Path

from augdistill_core import ConvNet, ExpertConfig, knob, snapshots_every
from augdistill_report.data.augmentations import AUGMENTATIONS, DIFFERENTIABLE, Choices
from augdistill_report.data.datasets import Dataset, check_name, load_data
from augdistill_report.files.expert_files import FLOATS, SETUP_KEYS, ExpertFile, experts_of_setup


def absolute(path: str) -> str:
    """A path as one that holds in every folder; "" stays."""
    return str(Path(path).expanduser().absolute()) if path else ""


def public_name(dataset: str) -> str:
    """A data set's name without where a folder of images lay, which may be private."""
    kind, colon, path = dataset.partition(":")
    return kind + colon + Path(path).name


@dataclasses.dataclass(frozen=True)
class Setup(ExpertConfig):
    """The world that a result lives in: the data, the student, the experts, the machine."""

    dataset: str = knob("digits", "which data: any name in DATASETS, or folder:PATH")
    data: str = knob("", "a folder that holds the data set, looked into first (then AUGDISTILL_DATA, then the cache)")
    size: int = knob(16, "images are size x size pixels", low=4, high=256)
    zca: bool = knob(False, "images are ZCA-whitened (eps .1, fit on the training split), not standardised")
    width: int = knob(32, "the student's channels", low=1)
    depth: int = knob(2, "the student's blocks", low=1)
    expert_augment: str = knob(
        "none",
        "augmentation the experts train with, or kornia:NAME(key=value)",
        choices=Choices("expert_augment", AUGMENTATIONS),
    )
    expert_float: str = knob("float32", "how experts' parameters are kept on disk", choices=tuple(FLOATS))
    experts_at_once: int = knob(0, "so many train at once on a GPU, the rest on others; 0 = all", low=0)
    expert_files: str = knob("", "a folder of experts to use instead of training them")
    augment: str = knob(
        "none",
        "differentiable augmentation after phi in the unroll (MTT's A), or kornia:NAME(key=value)",
        choices=Choices("augment", DIFFERENTIABLE, differentiable=True),
    )
    seed: int = knob(0, "everything random follows from it", low=0)
    device: str = knob("cpu", "cpu, or a CUDA device", choices=("cpu", "cuda"))
    threads: int = knob(1, "CPU threads in a process (another count rounds differently)", low=1)

    def __post_init__(self):
        super().__post_init__()
        check_name(self.dataset)
        # absolute: a notebook, which runs in another folder, must find the same
        name, colon, path = self.dataset.partition(":")
        object.__setattr__(self, "dataset", name + colon + absolute(path))
        object.__setattr__(self, "data", absolute(self.data))
        object.__setattr__(self, "expert_files", absolute(self.expert_files))

    def load(self, whiten: bool = True) -> Dataset:
        """The data; without `whiten` never whitened, which takes a minute, where only content and sizes count."""
        return load_data(self.dataset, self.size, self.data, self.device, self.zca and whiten)

    def student(self, data: Dataset) -> ConvNet:
        return ConvNet(data.shape[0], len(data.classes), self.size, self.width, self.depth)

    def expert_key(self) -> dict:
        """What an expert must have been made with to be of use here: the data by content, and the student."""
        return {key: getattr(self, key) for key in SETUP_KEYS} | {"dataset": self.load(whiten=False).fingerprint}

    def snapshots(self) -> int:
        """How many snapshots the experts hold after the first."""
        files = given_experts(self)
        return min(map(len, files)) - 1 if files else snapshots_every(len(self.load(whiten=False).train), self)[1]

    def public(self) -> dict:
        """The settings as results name them: not where data and files lay on this machine, which may be private."""
        places = {"data": "", "dataset": public_name(self.dataset), "expert_files": Path(self.expert_files).name}
        return self.to_dict() | places


@functools.lru_cache(maxsize=8)
def given_experts(setup: Setup) -> list[ExpertFile]:
    """The experts that `expert_files` names, opened once a process; none if there they are trained here."""
    if not setup.expert_files:
        return []
    return experts_of_setup(setup.expert_files, setup.experts, setup.expert_key(), setup.device)
