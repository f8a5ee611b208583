"""Every setting of a run in one flat list. Presets, papermill's `-p` and `--set` all use these names.

`Settings` is assembled from the `Config` of each component: the setup, distillation, scoring, the workers, and one file
for each study (`studies/*_config.py`, found in that folder). So each component gets only its own settings
(`settings.select(DistillConfig)`), and a stored result depends only on the settings that made it.
"""

import ast
import dataclasses
import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import cloudpickle
import yaml

from augdistill_core import Config, DistillConfig, in_short, knob
from augdistill_report import studies
from augdistill_report.files.yaml_files import read_yaml
from augdistill_report.places import PRESETS
from augdistill_report.show.tracking import TRACKERS
from augdistill_report.work.pool import WorkConfig
from augdistill_report.work.scoring import EvalConfig
from augdistill_report.work.setup import Setup, absolute

RENAMED = {  # new names of settings, by old name
    "teach": "taught_augment",
    "study_iterations": "why_iterations",
    "study_rows": "why_rows",
    "subset_rates": "subset_lrs",
    "repeats": "unseen_repeats",
    "late_start_epoch": "policy_max_start_epoch",
}

# The student report's phi and settings, and the settings that make the same phi learn. The grid of notebook 04 repeats
# them: a test compares the two.
REPORT_NETWORK = "distnet2"
STUDENT_REPORT = dict(phi_optimizer="SGD", phi_lr=1000.0, phi_momentum=0.5)
STUDENT_REPORT |= dict(alpha_mode="raw", alpha_optimizer="SGD", alpha_lr=1e-5)
USUAL_PHI = "unet_noise"  # a run's phi unless another is chosen; notebook 03 also shows it beside another one
MENDED = dict(phi_optimizer="Adam", phi_lr=0.01)


def study_configs() -> list[type[Config]]:
    """The settings of the studies: the `Config` classes of the files `studies/*_config.py`."""
    found = []
    for file in sorted(Path(studies.__path__[0]).glob("*_config.py")):
        module = importlib.import_module(f"{studies.__name__}.{file.stem}")
        found += [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]
    return found


@dataclasses.dataclass(frozen=True)
class Settings(Setup, DistillConfig, EvalConfig, WorkConfig, *study_configs()):
    """Every setting. What single rows of a notebook's table change is in that notebook."""

    images_per_class: int = knob(1, "images a class in the base set of notebooks 02 and 03", low=1)
    phi: str = knob(USUAL_PHI, "the phi of notebooks 03 and 05, and of a sweep: a name in PHIS")
    phis: str = knob("", "Python files that register your own phis, separated by commas")
    track: str = knob("none", "a tracker that also receives the curves and pictures", choices=("none", *TRACKERS))

    def __post_init__(self):
        super().__post_init__()
        if self.memory == "captured" and self.device == "cpu":
            raise ValueError("memory='captured': needs a CUDA device; use device=cuda, or graph, replay or auto")
        files = (absolute(name.strip()) for name in self.phis.split(","))
        object.__setattr__(self, "phis", ", ".join(file for file in files if file))
        if self.cluster.endswith(".json"):
            object.__setattr__(self, "cluster", absolute(self.cluster))

    @classmethod
    def refuse_unknown(cls, keys: Iterable) -> None:
        for key in keys:
            if isinstance(key, str) and key in RENAMED:
                raise ValueError(f"setting {key!r} is called {RENAMED[key]!r} now: rename it")
        super().refuse_unknown(keys)

    def public(self) -> dict:
        return super().public() | {"phis": ", ".join(path.name for path in self.phi_files), "cluster": ""}

    @property
    def phi_files(self) -> list[Path]:
        return [Path(name.strip()) for name in self.phis.split(",") if name.strip()]

    def load_phis(self) -> None:
        """Run the files that register the user's own phis; a `ValueError` names a file that cannot be run."""
        for path in self.phi_files:
            if path.suffix != ".py" or not path.is_file():
                reason = "no such file" if path.suffix == ".py" else "is not a Python file"
                raise ValueError(f"phis={str(path)!r}: {reason}; must be .py files that register phis")
            name = f"phis_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}_{path.stem}"
            spec = importlib.util.spec_from_file_location(name, path)
            module = sys.modules[name] = importlib.util.module_from_spec(spec)
            try:
                spec.loader.exec_module(module)
            except (Exception, SystemExit) as error:
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                raise ValueError(f"phis={str(path)!r}: {reason}") from error
            cloudpickle.register_pickle_by_value(module)  # worker processes cannot import the module by this name

    def eval_config(self, learned: bool, **changes) -> EvalConfig:
        """The scoring settings for a phi that `learned` a step size, or (not `learned`) without augmentation.

        With eval_lr=0 students take the alpha that phi learned. Without augmentation they take `alpha`, its initial
        value.
        """
        config = self.select(EvalConfig, **changes)
        return config if learned or config.eval_lr else dataclasses.replace(config, eval_lr=self.alpha)


def preset_path(preset: str, beside: Path | None = None) -> Path:
    """The file of a preset: a name in notebooks/presets, or the path of a YAML file, relative to `beside`.

    A `ValueError` if there is no such preset.
    """
    if not PRESETS.is_dir():
        raise ValueError(f"{PRESETS} is missing: install augdistill again")
    names = sorted(path.stem for path in PRESETS.glob("*.yaml"))
    own = isinstance(preset, str) and preset.endswith((".yaml", ".yml"))
    path = (beside or Path()) / preset if own else PRESETS / f"{preset}.yaml"
    if not (os.path.isfile(path) if own else preset in names):
        raise ValueError(f"preset={in_short(preset)}: must be one of {', '.join(names)}, or the path of a .yaml file")
    return path


BY_COUNT = "with_images_per_class"  # a preset's key: settings that depend on images_per_class
LIKE = "like"  # a preset's key: another preset, whose settings it inherits


def read_preset(preset: str, heirs: tuple[Path, ...] = ()) -> tuple[dict, dict[int, dict]]:
    """The settings of a preset: those for every run, and those for single values of images_per_class.

    They include the settings inherited from the preset that it is `like`, unless its file changes them (for every run,
    or for that value). `heirs` are the files that inherit from this one. A `ValueError` names the file and what is
    wrong in it.
    """
    path = preset_path(preset, heirs[-1].parent if heirs else None)
    if path.resolve() in heirs:
        circle = " -> ".join(heir.name for heir in (*heirs, path))
        raise ValueError(f"{preset!r} inherits from itself: {circle}")
    values = read_yaml(path)
    by_count, parent = values.pop(BY_COUNT, {}), values.pop(LIKE, None)
    if not isinstance(by_count, dict) or not all(type(k) is int and isinstance(v, dict) for k, v in by_count.items()):
        right = "must hold settings for each count, such as `10: {key: value}`"
        raise ValueError(f"{path}: {BY_COUNT}={in_short(by_count)}: {right}")
    for count, own in {None: {}, **by_count}.items():
        try:
            Settings.from_dict(values | own | ({} if count is None else {"images_per_class": count}))
        except ValueError as error:
            raise ValueError(f"{path}: {'' if count is None else f'{BY_COUNT}: {count}: '}{error}") from None
    if parent is None:
        return values, by_count
    try:
        theirs, theirs_by_count = read_preset(parent, (*heirs, path.resolve()))
    except ValueError as error:
        raise ValueError(f"{path}: {LIKE}: {error}") from None
    for count, inherited in theirs_by_count.items():
        by_count[count] = {k: v for k, v in inherited.items() if k not in values} | by_count.get(count, {})
    return theirs | values, by_count


def preset_text(preset: str) -> str:
    """A preset with all inherited settings as one YAML text, for a machine without the files that it is `like`."""
    values, by_count = read_preset(preset)
    return yaml.safe_dump(values | ({BY_COUNT: by_count} if by_count else {}))


def resolve(preset: str, overrides: dict | None = None) -> Settings:
    """The settings of a preset with some keys changed; a `ValueError` names a key or value that is wrong.

    A preset with other settings for each images_per_class is the recipe of one data set. It accepts only those values,
    and only that data set.
    """
    values, by_count = read_preset(preset)
    changes = overrides or {}
    settings = Settings.from_dict(values | changes)
    if by_count:
        count, dataset = settings.images_per_class, Settings.from_dict(values).dataset
        if count not in by_count:
            known = ", ".join(map(str, sorted(by_count)))
            raise ValueError(f"images_per_class={count}: preset {preset!r} is a recipe for {known} images a class")
        if settings.dataset != dataset:
            raise ValueError(
                f"dataset={settings.dataset!r}: preset {preset!r} is a recipe for {dataset}; use the preset of that "
                "data set, or a .yaml file of your own"
            )
        settings = Settings.from_dict(values | by_count[count] | changes)
    settings.load_phis()
    return settings


# --- the parameters of a notebook -------------------------------------------------------------------------------------

PARAMETERS = ("preset", "out", "store")  # a notebook's parameters besides the settings


def given_settings(variables: dict) -> dict:
    """The settings among a notebook's variables (its `globals()`) that are not None.

    A parameter that is no setting is a `ValueError`, since papermill injects a mistyped `-p iteratons 3` silently.
    IPython's history shows which variables are parameters. In a script, which has none, every plain value is one.
    """
    if "_ih" in variables:
        names = assigned_parameters(variables["_ih"])
    else:
        plain = str | int | float | list | dict | tuple | None
        names = [k for k, v in variables.items() if not k.startswith("_") and isinstance(v, plain)]
    for name in names:
        if name not in PARAMETERS:
            try:
                Settings.refuse_unknown([name])
            except ValueError as error:
                raise ValueError(f"{error} (it was given as a parameter of this notebook)") from None
    return {k: v for k, v in variables.items() if k in Settings.names() and v is not None}


def assigned_parameters(cells: list[str]) -> list[str]:
    """The variables that a notebook's parameters cell (the last that sets `preset`) and papermill's cell assign."""
    found = []
    for cell in reversed(cells):
        names = assigned(cell)
        injected = cell.startswith("# Parameters")  # papermill's first line
        if injected or "preset" in names:
            found += names
        if "preset" in names and not injected:
            break
    return found


def assigned(cell: str) -> list[str]:
    """The variables that a cell assigns at its top level: `a = 1`, `a: int = 1`."""
    try:
        lines = ast.parse(cell).body
    except SyntaxError:  # then the cell did not run
        return []
    targets = [t for line in lines if isinstance(line, ast.Assign) for t in line.targets]
    targets += [line.target for line in lines if isinstance(line, ast.AnnAssign)]
    return [target.id for target in targets if isinstance(target, ast.Name)]
