"""What a notebook holds in its hand: its settings, its data, the results it asks for, and the folder it leaves them in.

    run = open_run("02_baseline_mtt", globals())      # the first cell after the parameters
    scores = run.evaluate({"plain": run.evaluation(run.base)})
    run.number("plain", scores["plain"])
    run.finish()                                      # the last cell: writes results/02_baseline_mtt.json

A run's folder holds config.json, results/, curves/, figures/, notebooks/ and the store of finished work, artefacts/.
"""

import dataclasses
import io
import json
import platform
import subprocess
from pathlib import Path

import numpy as np
import torch

from augdistill_core import DistillConfig, Distilled, Trajectories
from augdistill_report.artefacts import Store, as_json, digest, write
from augdistill_report.data import Split
from augdistill_report.jobs import SOURCE, Distillation, Evaluation, Subset, experts, own_source, trajectories
from augdistill_report.pool import Progress, run_jobs
from augdistill_report.settings import ROOT, EvalConfig, Settings, Setup, preset_path, resolve

CODE = ["augdistill_*.py", "augdistill_report", "notebooks", "pyproject.toml"]


def git(*arguments: str) -> str:
    """What git says of this clone; "" without git or outside a clone."""
    try:
        out = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return out.stdout.strip()


def environment(device: str) -> dict:
    """What a number depends on beside its settings: versions, the machine, and the last commit that touched code."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "machine": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name()
        if device == "cuda"
        else f"CPU, {torch.backends.cpu.get_cpu_capability()}",
        "commit": git("log", "-1", "--format=%H", "--", *CODE),
        "uncommitted": bool(git("status", "--porcelain", "--", *CODE)),
    }


def configuration(settings: Settings) -> str:
    """A digest of all that a number may depend on: settings (not the number of processes), the data's content, code."""
    content = {"dataset": settings.load().fingerprint, "data": None}
    return digest({"settings": settings.to_dict() | {"workers": None} | content, "source": SOURCE})


def run_folder(preset: str, out: str = "") -> Path:
    """Where a run of `preset` goes: `out`, or runs/<name of the preset> in the clone."""
    return Path(out).resolve() if out else ROOT / "runs" / preset_path(preset).stem


def start_folder(folder: Path, preset: str, settings: Settings) -> None:
    """Make a run's folder and write its config.json; a `ValueError` if it cannot be written or is not a run's."""
    try:
        if folder.exists() and any(folder.iterdir()) and not (folder / "config.json").exists():
            raise ValueError(f"out={str(folder)!r}: holds files but no run (no config.json); choose an empty folder")
        write(folder / "config.json", as_json({"preset": preset, "settings": settings.to_dict()}))
    except OSError as error:
        raise ValueError(f"out={str(folder)!r}: cannot be written ({error.strerror or error})") from None


def summary(values: list[float]) -> dict:
    """Mean, standard deviation (n - 1 in the denominator), n, and the values themselves, in their order."""
    return {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)), "n": len(values), "values": values}


def tenths(history: list[dict]) -> list[float]:
    """The mean loss over the first and over the last tenth of a run."""
    tenth = max(1, len(history) // 10)
    return [float(np.mean([r["loss"] for r in part])) for part in (history[:tenth], history[-tenth:])]


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """Test accuracies in [0, 1], one a student; those on the validation split are for choosing."""

    test: list[float]
    validation: list[float]

    @property
    def mean(self) -> float:
        return summary(self.test)["mean"]

    @property
    def std(self) -> float:
        return summary(self.test)["std"]

    def __str__(self):
        return f"{100 * self.mean:.1f} ± {100 * self.std:.1f} %"

    def __sub__(self, other: "Accuracy") -> dict:
        """The `summary` of the differences, student by student: each pair shares initialisation and batches."""
        return summary([a - b for a, b in zip(self.test, other.test, strict=True)])


class Run:
    """One notebook's run; made by `open_run`."""

    def __init__(self, notebook: str, settings: Settings, folder: Path):
        self.notebook, self.settings, self.folder = notebook, settings, folder
        self.store = Store(folder / "artefacts")
        self.numbers: dict = {}
        self.figures: list[str] = []

    # --- data ---------------------------------------------------------------------------------------------------------

    @property
    def data(self):
        return self.settings.load()

    @property
    def student(self):
        return self.settings.student(self.data)

    @property
    def base(self) -> Subset:
        """The handful of real images that notebooks 02 and 03 start from."""
        return Subset(self.settings.seed, per_class=self.settings.images_per_class)

    def train(self, subset: Subset) -> Split:
        return self.data.train.take(subset.index(self.data))

    # --- work: jobs, run over the cores, reused where they were done before -------------------------------------------

    def _run(self, jobs: list, what: str) -> None:
        run_jobs(jobs, self.store, self.settings.processes, Progress(what))

    def experts(self) -> tuple[Trajectories, list[list[float]]]:
        """The experts' trajectories, and each one's validation accuracy by snapshot."""
        jobs = experts(self.settings.part(Setup))
        self._run(jobs, "experts")
        return trajectories(jobs[0].setup, self.store), [job.stored(self.store)[1]["validation"] for job in jobs]

    def distillation(self, phi: str, subset: Subset, config: DistillConfig | None = None, **changes) -> Distillation:
        """The job of training `phi` on a subset: by `config` (or this run's settings), then changed."""
        config = dataclasses.replace(config or self.settings.part(DistillConfig), **changes)
        return Distillation(self.settings.part(Setup), phi, subset, config, own_source(phi))

    def distill(self, rows: dict[str, Distillation]) -> dict[str, Distilled]:
        """Train every row's phi; leaves each one's curve as JSON lines in curves/."""
        self.experts()
        self._run(list(rows.values()), "distillation")
        results = {name: job.stored_phi(self.store) for name, job in rows.items()}
        for name, result in results.items():
            lines = "".join(json.dumps(record) + "\n" for record in result.history)
            write(self.folder / "curves" / self.notebook / f"{file_name(name)}.jsonl", lines)
        return results

    def evaluation(self, subset: Subset, distilled: Distillation | None = None, **changes) -> Evaluation:
        """The job of scoring a distilled phi, or None for the plain images, on a subset."""
        config = self.settings.part(EvalConfig, **changes)
        return Evaluation(self.settings.part(Setup), subset, config, distilled)

    def evaluate(self, rows: dict[str, Evaluation]) -> dict[str, Accuracy]:
        """Score every row."""
        self._run(list(rows.values()), "evaluation")
        return {name: Accuracy(**job.stored(self.store)[1]) for name, job in rows.items()}

    # --- what it leaves -----------------------------------------------------------------------------------------------

    def titles(self, split: Split) -> list[str]:
        """The class names of a split's images."""
        return [self.data.classes[label] for label in split.labels.tolist()]

    def number(self, name: str, value) -> None:
        """Put what the notebook shows into its results: a number, plain JSON values, or an `Accuracy`."""
        self.numbers[name] = summary(value.test) if isinstance(value, Accuracy) else value

    def figure(self, figure, name: str) -> None:
        """Show a figure once, and keep it as figures/<name>.png (the same bytes for the same picture)."""
        from IPython.display import Image, display

        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=110, metadata={"Software": None})
        write(self.folder / "figures" / f"{name}.png", picture.getvalue())
        self.figures.append(name)
        display(Image(picture.getvalue(), alt=name.replace("_", " ")))

    def finish(self):
        """Write results/<notebook>.json: the numbers, with the settings and the environment that they come from.

        Returns them as a table for the notebook's last cell.
        """
        from IPython.display import Markdown

        results = {
            "notebook": self.notebook,
            "settings": self.settings.to_dict() | {"data": ""},  # not where the data lay, which may be private,
            "fingerprint": self.data.fingerprint,  # but what they held
            "configuration": configuration(self.settings),
            "environment": environment(self.settings.device),
            "numbers": self.numbers,
            "figures": self.figures,
        }
        write(self.folder / "results" / f"{self.notebook}.json", as_json(results))
        lines = [f"| {name} | {shown(value)} |" for name, value in self.numbers.items()]
        return Markdown("\n".join([f"| results/{self.notebook}.json | |", "|---|---|", *lines]))


def shown(value) -> str:
    """A result as a person reads it."""
    if isinstance(value, dict) and "mean" in value:
        return f"{100 * value['mean']:.1f} ± {100 * value['std']:.1f} % (n = {value['n']})"
    if isinstance(value, list):
        return " to ".join(map(shown, value))
    if isinstance(value, dict):
        return ", ".join(f"{k} {shown(v)}" for k, v in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def file_name(name: str) -> str:
    """A row's name as a file's."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)


def open_run(notebook: str, parameters: dict) -> Run:
    """The run of a notebook from its parameters: `preset`, `out`, and every key of `Settings` that is not None."""
    names = set(Settings.names())
    overrides = {k: v for k, v in parameters.items() if k in names and v is not None}
    settings = resolve(parameters["preset"], overrides)
    folder = run_folder(parameters["preset"], parameters.get("out") or "")
    start_folder(folder, parameters["preset"], settings)
    torch.set_num_threads(settings.threads)
    return Run(notebook, settings, folder)
