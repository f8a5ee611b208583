"""A notebook's run: its settings, its data, its jobs, and the folder that keeps the results.

    run = open_run("02_baseline_mtt", globals())      # the first cell after the parameters
    scores = run.evaluate({"real images": run.evaluation(run.base)})
    run.number("real images", scores["real images"])
    run.finish(headline="...", figure="pixels")       # the last cell: writes results/02_baseline_mtt.json

A run's folder holds config.json, results/, curves/, rows/, figures/, notebooks/, phis/ (saved phis), scores/ (of
`augdistill score`), and artefacts/ (the store of finished jobs).
"""

import base64
import dataclasses
import hashlib
import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from augdistill_core import DistillConfig, Trajectories
from augdistill_report.data.datasets import SPLITS, Split
from augdistill_report.files.phi_files import save_phi
from augdistill_report.files.sealed_json import read_json, write_json
from augdistill_report.files.store import Store, digest, write
from augdistill_report.places import RUNS
from augdistill_report.settings import Settings, given_settings, preset_path, resolve
from augdistill_report.show.image_grids import film, image_grid, png, readable_choice
from augdistill_report.show.tracking import Tracker
from augdistill_report.work.distillation import Distillation
from augdistill_report.work.experts import Expert, load_trajectories, missing_experts
from augdistill_report.work.jobs import Subset, Task
from augdistill_report.work.own_code import file_source, own_source
from augdistill_report.work.pool import WorkConfig, make_jobs, needs_of
from augdistill_report.work.provenance import SOURCES, code_state, environment
from augdistill_report.work.scoring import Evaluation, Score
from augdistill_report.work.setup import Setup, given_experts, public_name
from augdistill_report.work.statistics import Accuracy, brief, markdown_table

CONFIGURATION = "augdistill_configuration"  # a key of the metadata of an output in an executed notebook


def configuration(settings: Settings) -> str:
    """A digest of all that a number may depend on: settings (but not workers and trackers), data, and code.

    Data counts by content. All code counts: a notebook's results are cheap to repeat from stored jobs, which depend on
    less.
    """
    content = {"dataset": settings.load(whiten=False).fingerprint, "data": None}
    content |= {"expert_files": [file.content for file in given_experts(settings.select(Setup))]}
    content |= {"phis": [file_source(path) for path in settings.phi_files]}
    content |= dict.fromkeys([*WorkConfig.names(), "track"])
    return digest({"settings": settings.to_dict() | content, "source": SOURCES.digest()})


def run_folder(preset: str, out: str = "") -> Path:
    """The folder of a run of `preset`: `out`, or runs/<name of the preset> in the clone."""
    return Path(out).resolve() if out else RUNS / preset_path(preset).stem


def folder_config(folder: Path) -> dict:
    """The config.json of a run's folder: `preset` and `settings`; {} if there is none yet.

    A `ValueError` if the file is damaged, or if the folder holds other files and no run.
    """
    path = folder / "config.json"
    if path.exists():
        return read_json(path, "run")
    if folder.exists() and any(folder.iterdir()) and not (folder / "artefacts").is_dir():
        raise ValueError(f"out={str(folder)!r}: holds files but no run (no config.json); choose an empty folder")
    return {}


def start_folder(folder: Path, preset: str, settings: Settings) -> None:
    """Make a run's folder and write its config.json; a `ValueError` if it cannot be written or holds no run."""
    try:
        folder_config(folder)
        write_json(folder / "config.json", "run", {"preset": preset, "settings": settings.to_dict()})
    except OSError as error:
        raise ValueError(f"out={str(folder)!r}: cannot be written ({error.strerror or error})") from None


class Run:
    """One notebook's run; made by `open_run`."""

    def __init__(self, notebook: str, settings: Settings, folder: Path, store: Path | None = None):
        self.notebook, self.settings, self.folder = notebook, settings, folder
        self.store = Store(store or folder / "artefacts")
        self.tracker = Tracker(settings.track, folder, notebook)
        self.numbers: dict = {}
        self.figures: list[str] = []
        self.films: list[str] = []
        self.digests: dict[str, str] = {}  # of the files of figures and films: SHA-256 by name
        self.made_by: dict = {"preset": "", "changes": {}, "phi_files": {}}
        self.jobs: dict[Path, Task] = {}  # that this notebook's numbers come from, by file
        code_state()  # of now, not of the end

    # --- data ---------------------------------------------------------------------------------------------------------

    @property
    def data(self):
        return self.settings.load()

    @property
    def student(self):
        return self.settings.student(self.data)

    @property
    def base(self) -> Subset:
        """The few real images that notebooks 02 and 03 start from."""
        return Subset(self.settings.seed, per_class=self.settings.images_per_class)

    def train(self, subset: Subset) -> Split:
        return self.data.train.take(subset.index(self.data))

    # --- jobs: run on all cores; finished results are reused ----------------------------------------------------------

    def make(self, jobs: list[Task], what: str) -> None:
        """Run the jobs whose results the store lacks, after what they need; `what` names them in the progress bar."""
        make_jobs(self.store, self.settings.pool, jobs, what)
        if what != "experts":  # they are made once for many runs
            self.count(jobs)

    def count(self, jobs: list[Task]) -> None:
        """Add the CPU seconds of finished jobs and of what they need, but experts, to those of this notebook.

        Each job counts once, whether it was made now or before: a second run gives the same numbers.
        """
        every = [one for job in jobs for one in (job, *needs_of(job)) if one.kind != Expert.kind]
        done = [job for job in every if self.store.has(job.kind, job.spec())]
        self.jobs |= {self.store.path(job.kind, job.spec()): job for job in done}

    def experts(self) -> tuple[Trajectories, list[list[float]]]:
        """The expert trajectories, and for each the validation accuracy by snapshot, in [0, 1]."""
        setup = self.settings.select(Setup)
        self.make(missing_experts(setup), "experts")
        found = load_trajectories(setup, self.store)
        return found, [file.about["validation"][: found.snapshots] for file in found.trajectories]

    def distillation(self, phi: str, subset: Subset, config: DistillConfig | None = None, **changes) -> Distillation:
        """The job that trains `phi` on a subset, with `config` (default: this run's settings) and these changes."""
        config = dataclasses.replace(config or self.settings.select(DistillConfig), **changes)
        return Distillation(self.settings.select(Setup), phi, subset, config, own_source(phi))

    def distill(self, rows: dict) -> dict:
        """Train every row's phi; returns a `Distilled` for each, and writes its curve as JSON lines to curves/."""
        self.make(list(rows.values()), "distillation")
        results = {name: job.stored_phi(self.store) for name, job in rows.items()}
        for name, result in results.items():
            lines = "".join(json.dumps(record) + "\n" for record in result.history)
            write(self.folder / "curves" / self.notebook / f"{file_name(name)}.jsonl", lines)
            job = rows[name]
            self.remember(name, job)
            about = job.config.to_dict() | {
                "phi": job.phi,
                "seed": job.setup.seed,
                "dataset": public_name(job.setup.dataset),
            }
            self.tracker.curve(file_name(name), about, result.history)
        return results

    def remember(self, name, job: Distillation) -> None:
        """Write what a row is to rows/<notebook>/, so that `augdistill score` and `export` find it by its name.

        With this run's own settings: another run in the folder writes another config.json.
        """
        row = {"row": file_name(name), "store": str(self.store.folder), **dataclasses.asdict(job)}
        row |= {"settings": self.settings.to_dict(), "made_by": self.made_by}
        write_json(row_file(self.folder / self.notebook / file_name(name)), "row", row)

    def evaluation(self, subset: Subset, distilled: Distillation | None = None, **changes) -> Evaluation:
        """The job that scores a distilled phi on a subset; without a phi, the images without augmentation."""
        config = self.settings.eval_config(distilled is not None, **changes)
        return Evaluation(self.settings.select(Setup), subset, config, distilled)

    def evaluate(self, rows: dict) -> dict:
        """Score every row on the test split; an `Accuracy` for each. Choose all options before, with `choose`."""
        scores = {name: Score(job.setup, job) for name, job in rows.items()}
        self.make(list(scores.values()), "evaluation")
        return {name: Accuracy(**job.stored(self.store)[1]) for name, job in scores.items()}

    def choose(self, options: dict) -> dict:
        """For each method, the option that scores best on the validation split (the first of equal ones).

        `options` holds jobs by (method, option). The test split is not opened.
        """
        self.make(list(options.values()), "choices")
        best: dict = {}
        for (method, option), job in options.items():
            value = float(np.mean(job.stored(self.store)[1]["validation"]))
            if method not in best or value > best[method][0]:
                best[method] = (value, option)
        return {method: option for method, (_, option) in best.items()}

    def seconds(self, job: Distillation | Evaluation) -> float:
        """CPU seconds of a finished job; of an evaluation, with the students that its `Score` trained."""
        jobs = [job, *([Score(job.setup, job)] if isinstance(job, Evaluation) else [])]
        return sum(self.store.seconds(j.kind, j.spec()) for j in jobs if self.store.has(j.kind, j.spec()))

    def probe(self, rows: dict) -> dict:
        """The measures of every row's `Probe`."""
        self.make(list(rows.values()), "probes")
        return {name: job.stored(self.store)[1] for name, job in rows.items()}

    # --- results ------------------------------------------------------------------------------------------------------

    def titles(self, split: Split) -> list[str]:
        """The class names of a split's images."""
        return [self.data.classes[label] for label in split.labels.tolist()]

    def number(self, name: str, value) -> None:
        """Add a number to the notebook's results: an `Accuracy`, or JSON values (numbers, texts, lists)."""
        self.numbers[name] = value.numbers() if isinstance(value, Accuracy) else value

    def save(self, name: str, job: Distillation, strength: float = 1.0, probability: float = 1.0) -> Path:
        """Write the phi that `job` trains to phis/<name>.safetensors, for `load_phi` and `augdistill apply`."""
        path = self.folder / "phis" / f"{file_name(name)}.safetensors"
        return save_phi(path, job, self.store, strength, probability)

    def table(self, markdown: str, folded: str = "") -> None:
        """Display a Markdown table; with a text `folded`, the reader sees only that until he opens it."""
        from IPython.display import Markdown, display

        display(Markdown(fold(markdown, folded) if folded else markdown))

    def figure(self, figure, name: str) -> None:
        """Display a figure, and save it as figures/<name>.png (the same bytes for the same picture)."""
        from IPython import display

        content = picture(figure)
        self.write_picture(f"{name}.png", content)
        self.figures.append(name)
        display.display(display.Image(content, alt=name.replace("_", " ")))

    def grid(self, rows: dict[str, torch.Tensor], split: Split, name: str) -> None:
        """Display and save rows of images `[n, C, H, W]`, standardised and in the order of `split`, by row name.

        The picture shows a readable choice of them, under the names of their classes, and says what it leaves out.
        """
        index, note = readable_choice(split.labels)
        shown = {label: self.data.pixels(images[index.to(images.device)]) for label, images in rows.items()}
        self.figure(image_grid(shown, self.titles(split.take(index)), title=note), name)

    def film(self, frames: list[Image.Image], name: str) -> None:
        """Display pictures as a film, and save it as figures/<name>.gif."""
        from IPython import display

        content = film(frames)
        self.write_picture(f"{name}.gif", content)
        self.films.append(name)
        source = f"data:image/gif;base64,{base64.b64encode(content).decode()}"
        display.display(display.HTML(f'<img alt="{name.replace("_", " ")}" src="{source}">'))

    def write_picture(self, file: str, content: bytes) -> None:
        """Write figures/<file>, and keep its digest: a run that stops later has replaced the picture of the one before,
        but not its results."""
        write(self.folder / "figures" / file, content)
        self.digests[file] = hashlib.sha256(content).hexdigest()

    def finish(self, *, headline: str = "", figure: str = ""):
        """Write results/<notebook>.json: the numbers, with settings, versions, commit, CPU seconds of the jobs, and
        digests of the pictures.

        `headline` states the notebook's finding in one sentence. `figure` names the figure that shows it, one that
        `Run.figure` has saved (else a `ValueError`). Returns a folded table of the numbers, for the last cell: its
        output says which configuration the executed copy is of.
        """
        from IPython.display import Markdown

        if figure and figure not in self.figures:
            made = ", ".join(self.figures) or "none"
            raise ValueError(f"finish(figure={figure!r}): must be a figure that this notebook made ({made})")
        results = {
            "notebook": self.notebook,
            **self.made_by,
            "seconds": sum(self.store.seconds(job.kind, job.spec()) for job in self.jobs.values()),
            "headline": headline,
            "figure": figure,
            "settings": self.settings.public(),
            "fingerprint": self.data.fingerprint,
            "images": {name: len(getattr(self.data, name)) for name in SPLITS},
            "classes": len(self.data.classes),
            "configuration": configuration(self.settings),
            "environment": environment(self.settings.device),
            "numbers": self.numbers,
            "figures": self.figures,
            "films": self.films,
            "digests": self.digests,
        }
        write_json(self.folder / "results" / f"{self.notebook}.json", "results", results)
        self.tracker.pictures([self.folder / "figures" / f"{name}.png" for name in self.figures])
        rows = [{"name": name, "value": brief(value)} for name, value in self.numbers.items()]
        summary = f"All numbers of this notebook (results/{self.notebook}.json)"
        about = {CONFIGURATION: results["configuration"]}
        return Markdown(fold(markdown_table(rows), summary), metadata=about)


def fold(markdown: str, summary: str) -> str:
    """Markdown that a reader opens by a click on its summary."""
    return f"<details><summary>{summary}</summary>\n\n{markdown}\n</details>"


UNIMPORTANT = {*WorkConfig.names(), "track", "data"}  # settings that change no number


def made_by(folder: Path, settings: Settings) -> dict:
    """The preset of a run's folder, how its settings differ from it, and a digest of each file of the user's own phis:
    what repeats the run."""
    preset = folder_config(folder)["preset"]
    count = "images_per_class"  # a preset may choose its settings by it
    before, now = resolve(preset, {count: getattr(settings, count)}).public(), settings.public()
    before[count] = getattr(resolve(preset), count)
    changes = {key: now[key] for key in now if now[key] != before[key] and key not in UNIMPORTANT}
    own = {path.name: digest(file_source(path)) for path in settings.phi_files}
    return {"preset": Path(preset).stem, "changes": changes, "phi_files": own}


def picture(figure) -> bytes:
    """A matplotlib figure or a Pillow image as PNG: the same bytes for the same picture."""
    if isinstance(figure, Image.Image):
        return png(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def file_name(name: str | tuple) -> str:
    """A row's name (a text or a tuple of texts) as a file name."""
    name = name if isinstance(name, str) else ", ".join(map(str, name))
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)


def row_file(row: Path) -> Path:
    """The file that says what a row is, for the name RUN/NOTEBOOK/ROW (ROW as a notebook calls it)."""
    return row.parent.parent / "rows" / row.parent.name / f"{file_name(row.name)}.json"


@dataclasses.dataclass(frozen=True)
class StoredRow:
    """A finished row of a run: the job that trained its phi, the store that holds its result, and what made the run.

    `settings` are those of the run that made the row; `made_by` is what repeats that run (see `made_by`).
    """

    job: Distillation
    store: Store
    settings: Settings
    made_by: dict


def stored_row(row: Path, changes: dict | None = None) -> StoredRow:
    """A finished row by its name RUN/NOTEBOOK/ROW, with `changes` of its run's settings; registers the phis they name.

    Another place of the data (`data`) is also that of the row's job. A `ValueError` if there is no such row (it lists
    those there are), if an earlier version wrote its file, or if its result is gone.
    """
    path, changes = row_file(row), changes or {}
    if not path.is_file():
        there = ", ".join(sorted(file.stem for file in path.parent.glob("*.json"))) or "none"
        raise ValueError(f"{row}: no such row; finished rows of {row.parent.name}: {there}")
    found = read_json(path, "row")
    if missing := [key for key in ("settings", "made_by") if key not in found]:
        raise ValueError(
            f"{path}: has no {missing[0]!r} (an earlier version wrote it), so how its run was made is not known; run "
            f"{row.parent.name} again"
        )
    settings = Settings.from_dict(found["settings"] | changes)
    settings.load_phis()
    place = {"data": settings.data} if "data" in changes else {}
    setup, subset = Setup.from_dict(found["setup"] | place), Subset(**found["subset"])
    job = Distillation(setup, found["phi"], subset, DistillConfig.from_dict(found["config"]), own_source(found["phi"]))
    store = Store(found["store"])
    if not store.has(job.kind, job.spec()):
        raise ValueError(f"{row}: {store.folder} has no result of this code for it; run {row.parent.name} again")
    return StoredRow(job, store, settings, found["made_by"])


def open_run(notebook: str, parameters: dict) -> Run:
    """Start a notebook's run: resolve its settings, make its folder, and write config.json there.

    `parameters` are the notebook's variables (`globals()`). Used are `preset` (required), `out` (the run's folder),
    each setting that is not None, and `store`, a folder of finished jobs that several runs share (those of a sweep). A
    `ValueError` names a wrong setting, or a folder that holds no run.
    """
    settings = resolve(parameters["preset"], given_settings(parameters))
    folder = run_folder(parameters["preset"], parameters.get("out") or "")
    start_folder(folder, parameters["preset"], settings)
    torch.set_num_threads(settings.threads)
    run = Run(notebook, settings, folder, parameters.get("store"))
    run.made_by = made_by(folder, settings)  # now: the preset's file may be changed or removed until the last cell
    return run
