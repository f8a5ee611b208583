"""`augdistill score`: what a distilled set is worth, by test accuracy, with the controls that must stand beside it.

from augdistill_report import score

print(score("logged_files/CIFAR10/images_best.pt", on="cifar10", protocol="dc-bench"))
"""

import dataclasses
import functools
import shlex
from pathlib import Path

import torch

from augdistill_report.commands.publish import FIGURES, gallery_page, is_committed
from augdistill_report.files.distilled_sets import PAIR, read_set
from augdistill_report.files.phi_files import open_phi
from augdistill_report.files.sealed_json import read_json, strict_json, write_json
from augdistill_report.files.store import Store, as_json, digest, write
from augdistill_report.run import file_name, row_file, run_folder, stored_row
from augdistill_report.settings import Settings, resolve
from augdistill_report.studies.set_scores import BESIDE, StudentTraining, score_subject, table_of, training_by
from augdistill_report.studies.subjects import Subject, from_phi, from_row, from_set
from augdistill_report.work.pool import WorkConfig, make_jobs
from augdistill_report.work.provenance import environment
from augdistill_report.work.scoring import EvalConfig
from augdistill_report.work.setup import Setup
from augdistill_report.work.statistics import markdown_table, shown

SCOREBOARD = FIGURES / "scoreboard"

USUAL_PRESET = "digits"  # of what is no row of a run


@dataclasses.dataclass(frozen=True)
class SetScore:
    """A finished score: `result` holds all its numbers, `path` is its file. As text: a table and a sentence."""

    result: dict
    path: Path

    @property
    def accuracies(self) -> dict[str, list[float]]:
        """The test accuracies in [0, 1], one a student, of each row by name."""
        return {name: row["accuracy"]["values"] for name, row in self.result["rows"].items()}

    def __str__(self):
        r, folder = self.result, self.path.parents[1]
        protocol, opened = r["protocol"], r["opened"]
        changed = ", ".join(f"{k}={v}" for k, v in protocol["changed"].items())
        lines = [
            f"{r['name']} on {r['data']} at {r['size']}x{r['size']}",
            f"protocol: {protocol['name']} ({protocol['source']}){f'; changed: {changed}' if changed else ''}",
            f"students: {protocol['eval_students']} x {protocol['eval_student']}, {protocol['steps']} steps",
            f"normalisation: {r['normalisation']}",
            f"test split: opened for {opened['now']} rows; {folder} holds {opened['in all']} test accuracies",
            "",
            markdown_table(table_of(r)),
            *(f"{name}: {shown(value)}" for name, value in r["scores"].items()),
            r["sentence"],
            f"numbers: {self.path}",
        ]
        return "\n".join(lines)


ROW, PHI, SELECTION, SET = "a row of a run", "a saved phi", "a selection", "a distilled set"

OWN_LABELS = "only 'experts' can replace its own labels"

INAPPLICABLE = {  # options by what is scored, with the reason: there they would change nothing
    ROW: {
        "preset": "the settings of its run are used; change single ones by --set",
        "size": "it has the size of its run",
        "normalisation": "it has that of its run",
        "labels": f"{OWN_LABELS}; to read them otherwise, export the row and score the file",
    },
    PHI: {
        "size": "it has the size that it was trained at",
        "normalisation": "it has that of its training",
        "labels": OWN_LABELS,
    },
    SELECTION: {"normalisation": "its images are those of the data set", "labels": OWN_LABELS},
    SET: {"size": "its images have their own size"},
}

USED_SETTINGS = {*Setup.names(), *EvalConfig.names(), *WorkConfig.names(), "phis", "images_per_class"}


def refuse_inapplicable(kind: str, given: dict) -> None:
    """A `ValueError` that names the first option in `given` (by name) that changes nothing for this kind of thing."""
    for option, reason in INAPPLICABLE[kind].items():
        if given[option] and not (option == "labels" and given[option] == "experts"):
            raise ValueError(f"{option}={given[option]!r}: does not apply to {kind}: {reason}; leave it out")


def refuse_unused(changes: dict) -> None:
    """A `ValueError` that names the first setting in `changes` that does not exist, or that no score depends on."""
    Settings.refuse_unknown(changes)
    for key, value in changes.items():
        if key == "zca":
            raise ValueError(f"zca={value!r}: a set's normalisation says whether it is whitened: use --normalisation")
        if key not in USED_SETTINGS:
            raise ValueError(f"{key}={value!r}: does not apply to a score, which depends on no such setting")


def check_lr(lr: float, training: StudentTraining) -> None:
    """A `ValueError` if a given step size is not the one that students are trained with."""
    rates = training.lrs or (training.config.eval_lr,)
    if lr and rates != (lr,):
        its = " or ".join(f"{rate:g}" for rate in rates)
        raise ValueError(
            f"lr={lr:g}: does not apply here, where students are trained at step size {its}: use --protocol mtt, or "
            f"--set eval_lr={lr:g}"
        )


def is_phi(path: Path) -> bool:
    """Whether a file is a saved phi."""
    try:
        open_phi(path)
    except ValueError:
        return False
    return True


def subject_named(
    what: str, on: str, preset: str, size: int, out: str, changes: dict, labels: str, normalisation: str, name: str
) -> tuple[Subject, Settings, Path, dict]:
    """What is scored, the settings to score it by, the folder that keeps the results, and `made_by` of a row's run.

    `made_by` is {} for what is no row of a run.
    """
    path = Path(what).expanduser()
    given = dict(preset=preset, size=size, labels=labels, normalisation=normalisation)
    refuse_unused(changes)
    preset = preset or USUAL_PRESET

    def settings_of(size: int) -> Settings:
        return resolve(preset, {"dataset": on, **({"size": size} if size else {}), **changes})

    if not path.exists() and row_file(path).parent.is_dir():
        refuse_inapplicable(ROW, given)
        folder = Path(out or path.parent.parent).resolve()
        row = stored_row(path, ({"dataset": on} if on else {}) | changes)
        subject = from_row(row.job, name or path.name, row.settings, row.store, Store(folder / "artefacts"))
        return subject, row.settings, folder, row.made_by
    if path.exists() and not on:
        raise ValueError(f"{what}: name the data set that students are tested on (--on)")
    folder = run_folder(preset, out)
    store = Store(folder / "artefacts")
    if path.is_file() and path.suffix == ".safetensors" and is_phi(path):
        refuse_inapplicable(PHI, given)
        settings = settings_of(open_phi(path).about["setup"]["size"])
        return from_phi(path, name or path.stem, settings, store), settings, folder, {}
    found = read_set(path, labels)
    refuse_inapplicable(SELECTION if found.images is None else SET, given)
    settings = settings_of(size if found.images is None else found.images.shape[2])
    named_by = path if path.name != PAIR else path.absolute().parent
    own = name or (named_by.name if named_by.is_dir() else path.stem)
    return from_set(found, own, settings, store, normalisation), settings, folder, {}


def command_of(what: str, made: dict, arguments: dict, changes: dict) -> str:
    """The command that makes a score again, without the paths of this machine.

    For a row of a run (`made`: what repeats that run; else {}) it stands after the report that makes the row.
    """
    path, before = Path(what).expanduser(), ""
    if made:
        sets = "".join(f" --set {shlex.quote(f'{k}={v}')}" for k, v in made["changes"].items())
        before = f"augdistill report --preset {made['preset']} --only {path.parent.name[:2]}{sets} && "
        path = Path("runs", made["preset"], path.parent.name, path.name)
    options = "".join(f" --{k} {shlex.quote(str(v))}" for k, v in arguments.items() if v)
    sets = "".join(f" --set {shlex.quote(f'{k}={v}')}" for k, v in changes.items() if k not in WorkConfig.names())
    return f"{before}augdistill score {shlex.quote(str(path) if made else path.name)}{options}{sets}"


def named_score(result: dict) -> str:
    """A score's name in files: data, size, the set, the protocol, the students."""
    how = result["protocol"]
    return file_name(f"{result['data']}-{result['size']}-{result['name']}-{how['name']}-{how['eval_student']}")


def students_of(result: dict) -> dict:
    """All that determines how the students of a score are trained and tested, but not what they are trained on.

    Published scores of earlier versions do not say `setup`.
    """
    return {key: result.get(key) for key in ("fingerprint", "size", "whitened", "protocol", "setup")}


def digest_of_score(result: dict) -> str:
    """A digest of all that a score depends on: what was scored, on which data, by which students, beside which rows."""
    its = {"content": result["content"], "rows": list(result["rows"]), **students_of(result)}
    return digest(strict_json(as_json(its)))


def place_on_board(result: dict, board: Path = SCOREBOARD) -> Path:
    """The file of a published score. Tables name it, so it has a digest only beside a score by other students.

    A score of the same name by the same students is replaced: the set was made or scored again.
    """
    path = board / f"{named_score(result)}.json"
    now = strict_json(as_json(result))  # as a file has it
    if path.exists() and not same_students(read_json(path, "score"), now):
        return path.with_name(f"{path.stem}-{digest(students_of(now))}.json")
    return path


def same_students(one: dict, other: dict) -> bool:
    """Whether two scores are by the same students on the same data, as far as both say."""
    its, theirs = students_of(one), students_of(other)
    return all(None in (its[key], theirs[key]) or its[key] == theirs[key] for key in its)


def score(
    what: str,
    on: str = "",
    *,
    protocol: str = "ours",
    preset: str = "",
    student: str = "",
    students: int = 0,
    labels: str = "",
    normalisation: str = "",
    lr: float = 0.0,
    size: int = 0,
    beside: str = ",".join(BESIDE),
    name: str = "",
    out: str = "",
    publish: bool = False,
    changes: dict | None = None,
) -> SetScore:
    """Score a distilled set on a data set; returns the numbers, and writes them to OUT/scores.

    Args:
        what: the pair of MTT's code (images_best.pt, or its folder), .npz, .safetensors, a folder of images, a file of
            positions in the training set (.npy, .txt), a saved phi, or a run's row (RUN/NOTEBOOK/ROW).
        on: the data set whose test images students are tested on (a row has its own).
        protocol: a name in `PROTOCOLS`.
        preset: where all other settings are from: the students' ConvNet, the experts (for the window of difficulty);
            "" is digits, or for a row the settings of its run.
        student, students: another architecture (`eval_student`), another number of students.
        labels: what the labels are: hard, probabilities, logits, or experts (they label each augmented image).
        normalisation: how the images are normalised, a name in `NORMALISATIONS`; "" finds it.
        lr: the step size that was learned with the images, where the protocol takes that (mtt).
        size: of a selection's images in pixels (a set has its own).
        beside: the rows beside it, of random, bytes, window, all.
        name: how the result is called; out: the folder (runs/<preset>), whose finished jobs are used.
        publish: also write it to figures/scoreboard, for notebook 08; committed code only.
        changes: settings by name, as `--set`; those of eval_* change the protocol, and the result says so.

    A `ValueError` says what is wrong with a file or an argument, or which argument would change nothing.
    """
    changes = dict(changes or {})
    own = {k: v for k, v in changes.items() if k in EvalConfig.names()}  # of the protocol
    others = {k: v for k, v in changes.items() if k not in own}
    subject, settings, folder, made = subject_named(what, on, preset, size, out, others, labels, normalisation, name)
    torch.set_num_threads(settings.threads)
    if lr:
        subject = dataclasses.replace(subject, lr=lr)
    own |= {"eval_student": student} if student else {}
    own |= {"eval_students": students} if students else {}
    own |= {"eval_labels": "soft"} if labels == "experts" else {}
    training = training_by(protocol, subject, settings, own)
    check_lr(lr, training)
    around = environment(settings.device)
    if publish and not is_committed({"environment": around}):
        raise ValueError("publish: the code has uncommitted changes, so nobody could repeat the score; commit first")
    rows = tuple(part.strip() for part in beside.split(",") if part.strip())
    store = Store(folder / "artefacts")
    make = functools.partial(make_jobs, store, settings.pool)
    result = score_subject(subject, training, store, make, rows)
    asked = dict(on=on, protocol=protocol, student=student, students=students, labels=labels, lr=lr, beside=beside)
    asked |= {} if made else {"preset": preset or USUAL_PRESET, "normalisation": normalisation, "size": size}
    result |= {"command": command_of(what, made, asked, changes), "environment": around}
    result |= {"seconds": sum(row["seconds"] for row in result["rows"].values())}
    path = folder / "scores" / f"{named_score(result)}-{digest_of_score(result)}.json"
    write_json(path, "score", result)
    if publish:
        write_json(place_on_board(result), "score", result)
        write(FIGURES / "README.md", gallery_page())
    return SetScore(result, path)
