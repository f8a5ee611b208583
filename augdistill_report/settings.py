"""Every knob of a run, in one flat list: presets, papermill's `-p` and `--set` all speak these names.

`Settings` is the union of what the parts of a run take, so that each part can be handed just its own
(`settings.part(DistillConfig)`), and what a stored result depends on is just what it was handed.
"""

import dataclasses
import functools
import hashlib
import importlib.util
import math
import os
import sys
from pathlib import Path

import cloudpickle
import torch
import yaml

from augdistill_config import Config, knob
from augdistill_core import ConvNet, DistillConfig, ExpertConfig, make_optimizer, make_phi, snapshots_every
from augdistill_report.augmentations import AUGMENTATIONS, DIFFERENTIABLE
from augdistill_report.data import Dataset, check_name, load_data
from augdistill_report.expert_files import FLOATS, WORLD, ExpertFile, of_world
from augdistill_report.pool import Pool
from augdistill_report.students import STUDENTS
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
    zca: bool = knob(False, "images are ZCA-whitened (eps .1, fit on the training split), not standardised")
    width: int = knob(32, "the student's channels", low=1)
    depth: int = knob(2, "the student's blocks", low=1)
    expert_augment: str = knob("none", "augmentation the experts train with", choices=tuple(AUGMENTATIONS))
    expert_float: str = knob("float32", "how experts' parameters are kept on disk", choices=tuple(FLOATS))
    experts_at_once: int = knob(0, "so many train at once on a GPU, the rest on others; 0 = all", low=0)
    expert_files: str = knob("", "a folder of experts to use instead of training them")
    augment: str = knob("none", "differentiable augmentation after phi in the unroll (MTT's A)", choices=DIFFERENTIABLE)
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

    def world(self) -> dict:
        """What an expert must have been made with to be of use here: the data by content, and the student."""
        return {key: getattr(self, key) for key in WORLD} | {"dataset": self.load(whiten=False).fingerprint}

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
    return of_world(setup.expert_files, setup.experts, setup.world(), setup.device)


@dataclasses.dataclass(frozen=True)
class EvalConfig(Config):
    """How a method is scored: fresh students trained on its images by SGD, the step size x0.1 halfway (MTT).

    MTT's protocol is eval_epochs 1000, eval_batch 256, eval_lr 0 and eval_augment dsa; DC-Bench's the same with
    eval_lr .01. (Both codes train one epoch more, and drop the step size, and the momentum with it, two epochs later.)
    """

    eval_students: int = knob(5, "fresh students, each with a seed of its own", low=2)
    eval_steps: int = knob(300, "SGD steps of each", low=2)
    eval_epochs: int = knob(0, "their passes over the images instead; 0 = as many steps as eval_steps", low=0)
    eval_batch: int = knob(64, "images a step (all, if there are fewer)", low=1)
    eval_lr: float = knob(0.02, "SGD step size; 0 = the alpha that phi learned (plain images: alpha)", low=0)
    eval_momentum: float = knob(0.9, "SGD momentum", low=0, high=1)
    eval_decay: float = knob(5e-4, "weight decay", low=0)
    eval_patience: int = knob(
        0,
        "how often eval_steps more may fail to improve the validation accuracy before the step size falls, and again "
        "before training ends, with the best student; 0 = eval_steps (or eval_epochs) are all",
        low=0,
    )
    eval_student: str = knob("convnet", "which students: the experts' own, or others", choices=("convnet", *STUDENTS))
    eval_augment: str = knob("none", "augmentation after phi in every step", choices=(*AUGMENTATIONS, "instaaug"))
    eval_magnitude: int = knob(9, "its magnitude, where it is randaugment", low=0, high=30)
    eval_augment_probability: float = knob(
        1.0, "part of the images that it is applied to, drawn in every step, unless it is instaaug", low=0, high=1
    )
    eval_reward: float = knob(1.0, "times its rewards for wide ranges, where it is instaaug", low=0)
    eval_labels: str = knob("hard", "the images' own, or what the experts say of them", choices=("hard", "soft"))
    phi_strength: float = knob(1.0, "lambda: students train on x + lambda (phi(x) - x)", low=0)
    phi_probability: float = knob(1.0, "part of the images that phi is applied to, drawn in every step", low=0, high=1)

    def steps(self, images: int) -> int:
        """How many steps a student takes on so many images."""
        return self.eval_epochs * -(-images // self.eval_batch) or self.eval_steps


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
    pixel_alpha_lr: float = knob(1e-5, "the step size of SGD for alpha beside them (MTT: 1e-7 to 1e-5)", low=0)
    fractions: str = knob("0.01, 0.1, 0.5", "parts of the training data in notebook 05, each in (0, 1]")
    subset_batch: int = knob(48, "images a student step when phi learns on a fraction", low=1)
    subset_iterations: int = knob(25, "outer steps when phi, or pixels, learn on a fraction", low=1)
    subset_repeats: int = knob(1, "parts of each size in notebook 05, each with phis of its own; 3 to quote", low=1)
    subset_rates: str = knob("0.02", "step sizes of its students, one of which validation chooses for each method")
    subset_rows: str = knob("", "rows of its table beside plain images, with commas between; empty = every method")
    subset_patience: int = knob(0, "eval_patience of its second budget; 0 = none", low=0)
    subset_epochs: int = knob(0, "passes over a part in its third, DC-Bench's (1000 is theirs); 0 = none", low=0)
    subset_students: str = knob("", "its students of other architectures, with commas between; those of eval_student")
    subset_eval_steps: int = knob(100, "SGD steps of a student that is scored in notebooks 05 and 07", low=2)
    repeats: int = knob(1, "repetitions of notebook 07: other experts, other images, another phi", low=1)
    teach: str = knob("affine", "the augmentation that its experts are trained with", choices=tuple(AUGMENTATIONS))
    policy_fraction: float = knob(0.1, "the largest part that policies learn on: they take longest", low=0, high=1)
    late_start_epoch: int = knob(0, "T+ of policies, in notebooks 05 and 07; 0 = as late as can be", low=0)
    policy_iterations: int = knob(35, "outer steps of policies", low=1)
    episode_iterations: int = knob(90, "outer steps of the phis that meet new images in each", low=1)
    track: str = knob("none", "a tracker that gets curves and pictures too", choices=("none", *TRACKERS))
    workers: int = knob(0, "processes that share the work; 0 = one a core (one, on a GPU)", low=0)
    notebooks_at_once: int = knob(0, "of a report, sharing the workers; 0 = one, or all on a cluster", low=0)
    cluster: str = knob("", "a Dask cluster that shares it instead: its scheduler's address, or its scheduler.json")

    def __post_init__(self):
        super().__post_init__()
        _ = self.fraction_list, self.rate_list, self.student_list  # each refuses what is not such a list
        files = (absolute(part.strip()) for part in self.phis.split(","))
        object.__setattr__(self, "phis", ", ".join(file for file in files if file))
        if self.cluster.endswith(".json"):
            object.__setattr__(self, "cluster", absolute(self.cluster))

    def listed(self, key: str, high: float, what: str) -> list[float]:
        """The different numbers, above 0 and at most `high`, that a setting holds; there must be one."""
        try:
            values = [float(part) for part in getattr(self, key).split(",")]
        except ValueError:
            values = []
        fit = all(0 < v <= high and v < math.inf for v in values)
        if not values or not fit or len(set(values)) < len(values):
            raise ValueError(f"{key}={getattr(self, key)!r}: must be different {what}, with commas between")
        return values

    @property
    def fraction_list(self) -> list[float]:
        return self.listed("fractions", 1, "numbers in (0, 1]")

    @property
    def rate_list(self) -> list[float]:
        return self.listed("subset_rates", math.inf, "step sizes above 0")

    @property
    def student_list(self) -> list[str]:
        names = [part.strip() for part in self.subset_students.split(",") if part.strip()]
        if not set(names) <= set(STUDENTS):
            known = ", ".join(STUDENTS)
            raise ValueError(f"subset_students={self.subset_students!r}: must be among {known}, with commas between")
        return names

    def public(self) -> dict:
        return super().public() | {"phis": ", ".join(path.name for path in self.phi_files), "cluster": ""}

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
            alpha_lr=self.pixel_alpha_lr,
            alpha_momentum=0.5,
        )

    def eval_config(self, learned: bool, **changes) -> EvalConfig:
        """How a phi that has `learned` a step size, or plain images, are scored.

        Where eval_lr leaves the step size to phi, plain images have the one that phi's own starts from.
        """
        config = self.part(EvalConfig, **changes)
        return config if learned or config.eval_lr else dataclasses.replace(config, eval_lr=self.alpha)

    @property
    def pool(self) -> Pool:
        workers = self.workers or (1 if self.device == "cuda" else os.cpu_count() or 1)
        return Pool(max(workers // max(self.notebooks_at_once, 1), 1), self.cluster)


def preset_path(preset: str) -> Path:
    """The file of a preset: a name in notebooks/presets, or the path of a YAML file of one's own."""
    if not PRESETS.is_dir():
        raise ValueError(f"{PRESETS} is missing: install augdistill from its clone, with pip install -e")
    path = Path(preset) if preset.endswith((".yaml", ".yml")) else PRESETS / f"{preset}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in PRESETS.glob("*.yaml")))
        raise ValueError(f"preset={preset!r}: must be one of {names}, or the path of a .yaml file")
    return path


BY_COUNT = "with_images_per_class"  # the key of a preset under which stands what depends on images_per_class


def read_preset(preset: str) -> tuple[dict, dict[int, dict]]:
    """What a preset's file holds: the settings, and those that it has for some values of images_per_class only.

    A `ValueError` names what is wrong, in any part of it.
    """
    path = preset_path(preset)
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"preset={preset!r}: {path} is not YAML ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"preset={preset!r}: {path} must hold `key: value` lines")
    by_count = values.pop(BY_COUNT, {})
    counted = isinstance(by_count, dict) and all(type(k) is int and isinstance(v, dict) for k, v in by_count.items())
    if not counted:
        raise ValueError(f"{path}: {BY_COUNT}={by_count!r}: must hold settings by number, as `10: {{key: value}}`")
    for count, part in {None: {}, **by_count}.items():
        try:
            Settings.from_dict(values | part | ({} if count is None else {"images_per_class": count}))
        except ValueError as error:
            raise ValueError(f"{path}: {'' if count is None else f'{BY_COUNT}: {count}: '}{error}") from None
    return values, by_count


def resolve(preset: str, overrides: dict | None = None) -> Settings:
    """The settings of a preset with some keys changed; whatever is wrong is refused by name.

    A preset that has other settings for each images_per_class is the recipe of one data set: it gives those of the
    number that is asked for, and takes no other number and no other data set.
    """
    values, by_count = read_preset(preset)
    changes = overrides or {}
    settings = Settings.from_dict(values | changes)
    if by_count:
        count, dataset = settings.images_per_class, Settings.from_dict(values).dataset
        if count not in by_count:
            known = ", ".join(map(str, by_count))
            raise ValueError(f"images_per_class={count}: preset {preset!r} is a recipe for {known} images a class")
        if settings.dataset != dataset:
            raise ValueError(
                f"dataset={settings.dataset!r}: preset {preset!r} is a recipe for {dataset}; use the preset of that "
                "data set, or a .yaml file of your own"
            )
        settings = Settings.from_dict(values | by_count[count] | changes)
    settings.load_phis()
    return settings


def preflight(settings: Settings) -> None:
    """Refuse, before anything runs, settings that are each possible but do not fit together or fit this machine."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda': torch finds no CUDA device here; use cpu")
    check_tracker(settings.track)
    if settings.cluster:
        from augdistill_report.cluster import check_cluster  # needs an extra

        check_cluster(settings.cluster)
    data = settings.load(whiten=False)
    student = settings.student(data)
    trained = snapshots_every(len(data.train), settings)[1]  # notebook 07 trains its own in any case
    for key, snapshots in (("max_start_epoch", settings.snapshots()), ("late_start_epoch", trained)):
        last = snapshots - settings.expert_epochs
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
    for fraction in settings.fraction_list:
        try:
            data.subset(settings.seed, fraction=fraction)
        except ValueError as error:
            raise ValueError(f"fractions={settings.fractions!r}: {error}") from None
    make_phi(settings.phi, base, len(data.classes), settings.seed)
    for key in ("phi", "alpha", "pixel"):
        kind, momentum = getattr(settings, f"{key}_optimizer"), getattr(settings, f"{key}_momentum")
        try:
            make_optimizer(kind, list(student.parameters()), 0.1, momentum)
        except ValueError as error:
            raise ValueError(f"{key}_optimizer={kind!r}: {error}") from None
