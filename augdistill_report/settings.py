"""Every knob of a run, in one flat list: presets, papermill's `-p` and `--set` all speak these names.

`Settings` is the union of what the parts of a run take, so that each part can be handed just its own
(`settings.part(DistillConfig)`), and what a stored result depends on is just what it was handed.
"""

import dataclasses
import hashlib
import importlib.util
import os
import sys
from pathlib import Path

import cloudpickle
import torch
import yaml

from augdistill_config import Config, knob
from augdistill_core import ConvNet, DistillConfig, ExpertConfig, make_optimizer, make_phi, snapshots_every
from augdistill_report.augmentations import AUGMENTATIONS
from augdistill_report.data import Dataset, check_name, load_data
from augdistill_report.tracking import TRACKERS, check_tracker

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
PRESETS = NOTEBOOKS / "presets"


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
    width: int = knob(32, "the student's channels", low=1)
    depth: int = knob(2, "the student's blocks", low=1)
    expert_augment: str = knob("none", "augmentation the experts train with", choices=tuple(AUGMENTATIONS))
    augment: str = knob("none", "augmentation after phi in the unroll (MTT's A)", choices=tuple(AUGMENTATIONS))
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

    def load(self) -> Dataset:
        return load_data(self.dataset, self.size, self.data, self.device)

    def student(self, data: Dataset) -> ConvNet:
        return ConvNet(data.shape[0], len(data.classes), self.size, self.width, self.depth)


@dataclasses.dataclass(frozen=True)
class EvalConfig(Config):
    """How a method is scored: fresh students trained on its images by SGD, the step size x0.1 halfway (MTT)."""

    eval_students: int = knob(5, "fresh students, each with a seed of its own", low=2)
    eval_steps: int = knob(300, "SGD steps of each", low=2)
    eval_batch: int = knob(64, "images a step (all, if there are fewer)", low=1)
    eval_lr: float = knob(0.02, "SGD step size", low=1e-12)
    eval_momentum: float = knob(0.9, "SGD momentum", low=0, high=1)
    eval_decay: float = knob(5e-4, "weight decay", low=0)
    eval_augment: str = knob("none", "augmentation after phi in every step", choices=tuple(AUGMENTATIONS))
    eval_labels: str = knob("hard", "the images' own, or what the experts say of them", choices=("hard", "soft"))
    phi_strength: float = knob(1.0, "lambda: students train on x + lambda (phi(x) - x)", low=0)
    phi_probability: float = knob(1.0, "part of the images that phi is applied to, drawn in every step", low=0, high=1)


@dataclasses.dataclass(frozen=True)
class Settings(Setup, DistillConfig, EvalConfig):
    """All of it. What notebooks compare beyond these (rows of a table) stands in the notebooks."""

    images_per_class: int = knob(1, "images a class in the base set of notebooks 02 and 03", low=1)
    phi: str = knob("unet_noise", "the phi of notebooks 03 and 05, and of a sweep: any name in PHIS")
    phis: str = knob("", "Python files that register phis of your own, with commas between")
    study_iterations: int = knob(0, "outer steps of the phis in the study of notebook 04; 0 = as its grid says", low=0)
    study_rows: str = knob("short", "which rows of the study notebook 04 shows", choices=("short", "whole"))
    pixel_optimizer: str = knob("SGD", "for the pixels of notebook 02: any of torch.optim")
    pixel_lr: float = knob(100.0, "its step size (MTT: 100 to 1000)", low=0)
    pixel_momentum: float = knob(0.5, "its momentum, where it has one", low=0, high=1)
    fractions: str = knob("0.01, 0.1, 0.5", "parts of the training data in notebook 05, each in (0, 1]")
    subset_batch: int = knob(48, "images a student step when phi learns on a fraction", low=1)
    subset_iterations: int = knob(100, "outer steps when phi learns on a fraction", low=1)
    subset_eval_steps: int = knob(300, "SGD steps of a student that is scored in notebook 05", low=2)
    repeats: int = knob(1, "repetitions of notebook 07: other experts, other images, another phi", low=1)
    teach: str = knob("affine", "the augmentation that its experts are trained with", choices=tuple(AUGMENTATIONS))
    phi_fraction: float = knob(0.1, "the part of the data that it sends through phi", low=1e-6, high=1)
    late_start_epoch: int = knob(0, "T+ of its phis that learn on that part, or ranges; 0 = as late as can be", low=0)
    policy_iterations: int = knob(60, "outer steps of those phis", low=1)
    episode_iterations: int = knob(100, "outer steps of the phis that meet new images in each", low=1)
    track: str = knob("none", "a tracker that gets curves and pictures too", choices=("none", *TRACKERS))
    workers: int = knob(0, "processes that share the work; 0 = one a core (one, on a GPU)", low=0)

    def __post_init__(self):
        super().__post_init__()
        _ = self.fraction_list  # refuses what is not a list of fractions
        files = (absolute(part.strip()) for part in self.phis.split(","))
        object.__setattr__(self, "phis", ", ".join(file for file in files if file))

    @property
    def fraction_list(self) -> list[float]:
        try:
            values = [float(part) for part in self.fractions.split(",")]
        except ValueError:
            values = []
        if not values or not all(0 < v <= 1 for v in values) or len(set(values)) < len(values):
            raise ValueError(f"fractions={self.fractions!r}: must be different numbers in (0, 1], with commas between")
        return values

    def public(self) -> dict:
        """The settings as results name them: not where data and files lay on this machine, which may be private."""
        phis = ", ".join(path.name for path in self.phi_files)
        return self.to_dict() | {"data": "", "dataset": public_name(self.dataset), "phis": phis}

    @property
    def phi_files(self) -> list[Path]:
        return [Path(part.strip()) for part in self.phis.split(",") if part.strip()]

    def load_phis(self) -> None:
        """Run the files that register phis of the user's own; a `ValueError` that names one that cannot be run."""
        for path in self.phi_files:
            if not path.is_file():
                raise ValueError(f"phis={str(path)!r}: no such file; must be Python files that register phis")
            name = f"phis_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}_{path.stem}"
            spec = importlib.util.spec_from_file_location(name, path)
            module = sys.modules[name] = importlib.util.module_from_spec(spec)
            try:
                spec.loader.exec_module(module)
            except Exception as error:
                raise ValueError(f"phis={str(path)!r}: {type(error).__name__}: {error}") from error
            cloudpickle.register_pickle_by_value(module)  # worker processes cannot import it by that name

    @property
    def pixel_config(self) -> DistillConfig:
        """The settings of the baseline: MTT's own, alpha raw, SGD with momentum on both."""
        return self.part(
            DistillConfig,
            phi_optimizer=self.pixel_optimizer,
            phi_lr=self.pixel_lr,
            phi_momentum=self.pixel_momentum,
            alpha_mode="raw",
            alpha_optimizer="SGD",
            alpha_lr=1e-5,
            alpha_momentum=0.5,
        )

    @property
    def processes(self) -> int:
        return self.workers or (1 if self.device == "cuda" else os.cpu_count() or 1)


def preset_path(preset: str) -> Path:
    """The file of a preset: a name in notebooks/presets, or the path of a YAML file of one's own."""
    if not PRESETS.is_dir():
        raise ValueError(f"{PRESETS} is missing: install augdistill from its clone, with pip install -e")
    path = Path(preset) if preset.endswith((".yaml", ".yml")) else PRESETS / f"{preset}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in PRESETS.glob("*.yaml")))
        raise ValueError(f"preset={preset!r}: must be one of {names}, or the path of a .yaml file")
    return path


def resolve(preset: str, overrides: dict | None = None) -> Settings:
    """The settings of a preset with some keys changed; whatever is wrong is refused by name."""
    path = preset_path(preset)
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"preset={preset!r}: {path} is not YAML ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"preset={preset!r}: {path} must hold `key: value` lines")
    try:
        Settings.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    settings = Settings.from_dict(values | (overrides or {}))
    settings.load_phis()
    return settings


def preflight(settings: Settings) -> None:
    """Refuse, before anything runs, settings that are each possible but do not fit together or fit this machine."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda': torch finds no CUDA device here; use cpu")
    check_tracker(settings.track)
    data = settings.load()
    student = settings.student(data)
    snapshots = snapshots_every(len(data.train), settings)[1]
    last = snapshots - settings.expert_epochs
    for key in ("max_start_epoch", "late_start_epoch"):
        if not getattr(settings, key) <= last:
            raise ValueError(
                f"{key}={getattr(settings, key)}: the experts' {snapshots} snapshots less "
                f"expert_epochs={settings.expert_epochs} leave start epochs in [0, {last}]"
            )
    try:
        index = data.subset(settings.seed, per_class=settings.images_per_class)
    except ValueError as error:
        raise ValueError(f"images_per_class={settings.images_per_class}: too many ({error})") from None
    base = data.train.take(index).images
    for key, value, fraction in [
        *(("fractions", settings.fractions, fraction) for fraction in settings.fraction_list),
        ("phi_fraction", settings.phi_fraction, settings.phi_fraction),
    ]:
        try:
            data.subset(settings.seed, fraction=fraction)
        except ValueError as error:
            raise ValueError(f"{key}={value!r}: {error}") from None
    make_phi(settings.phi, base, len(data.classes), settings.seed)
    for key in ("phi", "alpha", "pixel"):
        kind, momentum = getattr(settings, f"{key}_optimizer"), getattr(settings, f"{key}_momentum")
        try:
            make_optimizer(kind, list(student.parameters()), 0.1, momentum)
        except ValueError as error:
            raise ValueError(f"{key}_optimizer={kind!r}: {error}") from None
