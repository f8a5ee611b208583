"""Every setting of a run, in one flat list: presets, papermill's `-p` and `--set` all speak these names.

`Settings` is assembled from what the parts of a run declare: the setup, distillation, scoring, who works, and one leaf
file a study (`studies/*_config.py`, found in that folder). So each part can be handed just its own
(`settings.select(DistillConfig)`), and what a stored result depends on is just what it was handed.
"""

import dataclasses
import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path

import cloudpickle
import yaml

from augdistill_core import Config, DistillConfig, knob
from augdistill_report import studies
from augdistill_report.places import PRESETS
from augdistill_report.show.tracking import TRACKERS
from augdistill_report.work.pool import WorkConfig
from augdistill_report.work.scoring import EvalConfig
from augdistill_report.work.setup import Setup, absolute

RENAMED = {  # settings by their old names
    "teach": "taught_augment",
    "study_iterations": "why_iterations",
    "study_rows": "why_rows",
    "subset_rates": "subset_lrs",
    "repeats": "unseen_repeats",
    "late_start_epoch": "policy_max_start_epoch",
}


# what the student report ran first, and what mends it, as changes of a run's settings; of this network
REPORT_NETWORK = "distnet2"
STUDENT_REPORT = dict(phi_optimizer="SGD", phi_lr=1000.0, phi_momentum=0.5)
STUDENT_REPORT |= dict(alpha_mode="raw", alpha_optimizer="SGD", alpha_lr=1e-5)
MENDED = dict(phi_optimizer="Adam", phi_lr=0.01)


def study_configs() -> list[type[Config]]:
    """What the studies declare: the `Config` of each file `studies/*_config.py`."""
    found = []
    for file in sorted(Path(studies.__path__[0]).glob("*_config.py")):
        module = importlib.import_module(f"{studies.__name__}.{file.stem}")
        found += [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]
    return found


@dataclasses.dataclass(frozen=True)
class Settings(Setup, DistillConfig, EvalConfig, WorkConfig, *study_configs()):
    """All of it. What notebooks compare beyond these (rows of a table) stands in the notebooks."""

    images_per_class: int = knob(1, "images a class in the base set of notebooks 02 and 03", low=1)
    phi: str = knob("unet_noise", "the phi of notebooks 03 and 05, and of a sweep: any name in PHIS")
    phis: str = knob("", "Python files that register phis of your own, with commas between")
    track: str = knob("none", "a tracker that gets curves and pictures too", choices=("none", *TRACKERS))

    def __post_init__(self):
        super().__post_init__()
        files = (absolute(part.strip()) for part in self.phis.split(","))
        object.__setattr__(self, "phis", ", ".join(file for file in files if file))
        if self.cluster.endswith(".json"):
            object.__setattr__(self, "cluster", absolute(self.cluster))

    @classmethod
    def from_dict(cls, values: dict):
        for key in values:
            if key in RENAMED:
                raise ValueError(f"setting {key!r} is called {RENAMED[key]!r} now: rename it")
        return super().from_dict(values)

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

    def eval_config(self, learned: bool, **changes) -> EvalConfig:
        """How a phi that has `learned` a step size, or plain images, are scored.

        Where eval_lr leaves the step size to phi, plain images have the one that phi's own starts from.
        """
        config = self.select(EvalConfig, **changes)
        return config if learned or config.eval_lr else dataclasses.replace(config, eval_lr=self.alpha)


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
