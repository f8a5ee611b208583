"""The test accuracy of students trained on a distilled set, and what must stand beside it to be understood.

Beside it: as many random real images with the same labels, augmentation and steps; as many as its bytes would hold; as
many from the best window of difficulty; all the data with as many steps. Each student has its own random images. What
is selected (a step size, a window) is selected on the validation split. The test split is opened once, for all of them,
when nothing is left to select.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from augdistill_core import ExpertConfig, seeded
from augdistill_report.data.datasets import window_of
from augdistill_report.files.store import Store, digest
from augdistill_report.settings import Settings
from augdistill_report.studies.protocols import PROTOCOLS, Protocol, augmentation_robust_score, label_robust_score
from augdistill_report.studies.subjects import Subject, experts_bytes, label_bytes
from augdistill_report.work.difficulty import PLACES, Difficulty
from augdistill_report.work.jobs import Job, Subset
from augdistill_report.work.normalisation import WHITE
from augdistill_report.work.scoring import EvalConfig, Evaluation, Score
from augdistill_report.work.set_scoring import STORED_SET, SetEvaluation, keep_set
from augdistill_report.work.setup import public_name
from augdistill_report.work.statistics import Accuracy, Difference, difference, summary

THE_SET, RANDOM_ROW, BYTES_ROW, WINDOW_ROW, ALL_ROW = (
    "the set",
    "random",
    "random, same bytes",
    "best window",
    "all the data",
)

Make = Callable[[list[Job], str], None]  # runs the jobs that are missing; the text names them in a progress bar

BESIDE = {
    "random": RANDOM_ROW,
    "bytes": BYTES_ROW,
    "window": WINDOW_ROW,
    "all": ALL_ROW,
}  # rows by the names that choose them

PLAIN_SET, PLAIN_RANDOM, HARD_SET = "the set, no augmentation", "random, no augmentation", "the set, hard labels"


@dataclasses.dataclass(frozen=True)
class ScoredRow:
    """One row of a score: what students are trained on, its budget, and alternatives to select from.

    `options`: jobs by a text that tells them apart. `images`: how many a student trains on. `bytes` by what they are
    for.
    """

    options: dict[str, Evaluation]
    images: int
    bytes: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Measured:
    """The accuracy of a row, the option that was selected, and its CPU seconds."""

    row: ScoredRow
    accuracy: Accuracy
    option: str
    seconds: float

    def numbers(self) -> dict:
        return {
            "accuracy": self.accuracy.numbers(),
            "option": self.option,
            "images": self.row.images,
            "bytes": self.row.bytes,
            "seconds": round(self.seconds, 1),
        }


@dataclasses.dataclass(frozen=True)
class StudentTraining:
    """How students train: by a protocol's name, and what was `changed` of it."""

    name: str
    config: EvalConfig
    changed: dict

    @property
    def protocol(self) -> Protocol:
        return PROTOCOLS[self.name]

    @property
    def lrs(self) -> tuple[float, ...]:
        """The step sizes that the validation split selects from; () if there is one."""
        return () if "eval_lr" in self.changed else self.protocol.lrs


def training_by(protocol: str, subject: Subject, settings: Settings, changes: dict) -> StudentTraining:
    """How students of a subject train by a protocol with `changes` (eval_*) of it; `settings` are without them.

    A `ValueError` if there is no such protocol, or no step size is known.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol={protocol!r}: must be one of {', '.join(PROTOCOLS)}")
    its = {"eval_student": PROTOCOLS[protocol].student, **PROTOCOLS[protocol].changes}
    config = settings.select(EvalConfig, **its | changes)
    before = {k: its.get(k, getattr(settings, k)) for k in changes}
    if "eval_lr" in changes and PROTOCOLS[protocol].lrs:
        before["eval_lr"] = PROTOCOLS[protocol].lrs  # one step size is a change of a selection
    changed = {k: getattr(config, k) for k, value in before.items() if value != getattr(config, k)}
    training = StudentTraining(protocol, config, changed)
    if config.eval_lr or training.lrs:
        return training
    if not subject.lr:
        raise ValueError(
            f"{subject.name}: this protocol takes the step size that was learned with the images, and none is known "
            "(lr_best.pt, or a row's alpha): give it (--lr), or choose another protocol"
        )
    return dataclasses.replace(training, config=dataclasses.replace(config, eval_lr=subject.lr))


# --- the rows ---------------------------------------------------------------------------------------------------------


def of_classes(classes: Tensor, pools: list[Tensor], generator: torch.Generator) -> Tensor:
    """For each class in `classes` `[n]` another image of its pool (positions), drawn at random, `[n]`."""
    index = torch.empty(len(classes), dtype=torch.int64)
    for c, pool in enumerate(pools):
        wanted = classes == c
        if int(wanted.sum()) > len(pool):
            raise ValueError(f"{int(wanted.sum())} images of class {c}: the training split has {len(pool)}")
        index[wanted] = pool[torch.randperm(len(pool), generator=generator)[: int(wanted.sum())]]
    return index


def rows_of(
    subject: Subject, training: StudentTraining, store: Store, make: Make, beside: tuple[str, ...]
) -> dict[str, ScoredRow]:
    """What is scored, by name: the set, and the rows in `beside` (keys of `BESIDE`). Ranks the images, if it must."""
    data, setup, n, config = subject.data, subject.setup, len(subject.labels), training.config
    classes, pixels = len(data.classes), math.prod(data.shape)
    steps = dataclasses.replace(config, eval_steps=config.steps(n), eval_epochs=0)  # the same for every row
    train = data.train.labels.cpu()
    every = [torch.nonzero(train == c).flatten() for c in range(classes)]
    decoder = {"decoder": held} if (held := experts_bytes(setup, config)) else {}

    def options(job, config: EvalConfig = steps) -> dict[str, Evaluation]:
        if not training.lrs:
            return {"": job(config)}
        return {f"step size {lr:g}": job(dataclasses.replace(config, eval_lr=lr)) for lr in training.lrs}

    def real(indices: list[Tensor], labels: Tensor, config: EvalConfig = steps) -> dict[str, Evaluation]:
        tensors = {"index": torch.stack(indices), "labels": torch.stack([labels] * len(indices))}
        given = keep_set(store, tensors, subject.given.normalisation)
        return options(lambda config: SetEvaluation(setup, given, config), config)

    def own(config: EvalConfig, given=subject.given) -> dict[str, Evaluation]:
        return options(lambda config: SetEvaluation(setup, given, config), config)

    def drawn(counts_as: Tensor, pools: list[Tensor]) -> list[Tensor]:
        seeds = [seeded(setup.seed, "beside", k) for k in range(config.eval_students)]
        return [of_classes(counts_as, pools, seed) for seed in seeds]

    def real_bytes(labels: Tensor) -> dict[str, int]:
        return {"images": len(labels) * pixels, "labels": label_bytes(labels, classes)}

    size = real_bytes(subject.labels) | decoder
    rows = {THE_SET: ScoredRow(own(steps), n, subject.bytes | decoder)}
    if "random" in beside:
        rows[RANDOM_ROW] = ScoredRow(real(drawn(subject.hard, every), subject.labels), n, size)
    if "bytes" in beside:
        each = pixels + label_bytes(torch.zeros(1), classes)
        count = min(sum(rows[THE_SET].bytes.values()) // each // classes, *map(len, every))
        if count:
            many = torch.arange(classes).repeat_interleave(count)
            row = real(drawn(many, every), many, dataclasses.replace(steps, eval_labels="hard"))
            rows[BYTES_ROW] = ScoredRow(row, len(many), real_bytes(many))
    if "window" in beside:
        ranked = Difficulty(setup)
        make([ranked], "difficulty")
        ease = ranked.stored(store)[0]["probability"]
        counts = torch.bincount(subject.hard, minlength=classes).tolist()
        found = {}
        for place in PLACES:
            pools = [window_of(members, ease, count, place) for members, count in zip(every, counts, strict=True)]
            jobs = real(drawn(subject.hard, pools), subject.labels)
            found |= {", ".join(filter(None, (f"from {100 * place:g} %", how))): job for how, job in jobs.items()}
        rows[WINDOW_ROW] = ScoredRow(found, n, size)
    if "all" in beside:
        whole, hard = Subset(setup.seed, fraction=1.0), dataclasses.replace(steps, eval_labels="hard")
        found = options(lambda config: Evaluation(setup, whole, config), hard)
        rows[ALL_ROW] = ScoredRow(found, len(train), real_bytes(train))
    if training.protocol.ranked and {"random", "all"} <= set(beside):
        plain = dataclasses.replace(steps, eval_augment="none")
        rows[PLAIN_SET] = ScoredRow(own(plain), n, rows[THE_SET].bytes)
        rows[PLAIN_RANDOM] = ScoredRow(real(drawn(subject.hard, every), subject.labels, plain), n, size)
        if subject.labels.ndim == 2 or steps.eval_labels == "soft":
            tensors = store.load(STORED_SET, {"content": subject.given.content})[0] | {"labels": subject.hard[None]}
            content = keep_set(store, tensors, subject.given.normalisation).content
            hard = dataclasses.replace(subject.given, content=content, hard=True)
            size = subject.bytes | {"labels": label_bytes(subject.hard, classes)}
            rows[HARD_SET] = ScoredRow(own(dataclasses.replace(steps, eval_labels="hard"), hard), n, size)
    return rows


# --- measuring --------------------------------------------------------------------------------------------------------


def measured_rows(rows: dict[str, ScoredRow], store: Store, make: Make) -> tuple[dict[str, Measured], int]:
    """Select each row's option on the validation split, then score all rows on the test split.

    Also: how many rows of this data set have had their test accuracy measured in this store, these included.
    """
    several = [job for row in rows.values() if len(row.options) > 1 for job in row.options.values()]
    make(several, "choices")
    chosen = {}
    for name, row in rows.items():
        values = dict.fromkeys(row.options, 0.0)
        if len(values) > 1:
            values = {how: float(np.mean(job.stored(store)[1]["validation"])) for how, job in row.options.items()}
        chosen[name] = max(values, key=values.get)  # the first of equal ones
    scores = {name: Score(row.options[chosen[name]].setup, row.options[chosen[name]]) for name, row in rows.items()}
    make(list(scores.values()), "test accuracy")
    found = {}
    for name, score in scores.items():
        jobs = [score, *(rows[name].options.values() if len(rows[name].options) > 1 else [])]
        seconds = sum(store.seconds(job.kind, job.spec()) for job in jobs)
        found[name] = Measured(rows[name], Accuracy(**score.stored(store)[1]), chosen[name], seconds)
    return found, len(list(store.folder.glob(f"{Score.kind}-*.safetensors")))


def over_row(found: dict[str, Measured], other: str, row: str = THE_SET) -> Difference:
    """The test accuracy of a row minus that of another, with its 95 % interval over pairs of students."""
    scores = {(name, 0): m.accuracy for name, m in found.items()}
    return difference(scores, row, other)


def set_sentence(name: str, found: dict[str, Measured]) -> str:
    """What the numbers say about the set, in one plain sentence."""
    what = {
        RANDOM_ROW: "as many random real images",
        BYTES_ROW: "random real images of as many bytes",
        WINDOW_ROW: "the best window of difficulty",
        ALL_ROW: "all the data",
    }
    said = [f"compared with {text} {over_row(found, row).words}" for row, text in what.items() if row in found]
    return f"{name} gives {found[THE_SET].accuracy}" + (f": {'; '.join(said)}" if said else "") + "."


def ranking_scores(found: dict[str, Measured]) -> dict[str, dict]:
    """DD-Ranking's LRS and ARS, each a `summary` over students; {} without their rows."""
    if PLAIN_RANDOM not in found:
        return {}
    test = {name: m.accuracy.test for name, m in found.items()}
    lrs = zip(test[THE_SET], test[RANDOM_ROW], test.get(HARD_SET, test[THE_SET]), test[ALL_ROW], strict=True)
    ars = zip(test[THE_SET], test[RANDOM_ROW], test[PLAIN_SET], test[PLAIN_RANDOM], strict=True)
    return {
        "label-robust score": summary([label_robust_score(*values) for values in lrs]),
        "augmentation-robust score": summary([augmentation_robust_score(*values) for values in ars]),
    }


# what a score says of its setup: the students, and the experts that rank images and give labels
STUDENTS_SETUP = ("width", "depth", "precision", "seed", "expert_augment", "expert_files", *ExpertConfig.names())


def result_of(subject: Subject, training: StudentTraining, found: dict[str, Measured]) -> dict:
    """A score as plain JSON values, for its file and the scoreboard."""
    return {
        "name": subject.name,
        "data": public_name(subject.data.name),
        "size": subject.data.shape[1],
        "fingerprint": subject.data.fingerprint,
        "normalisation": subject.how,
        "whitened": subject.given.normalisation.name in WHITE,
        "content": digest(dataclasses.asdict(subject.given)),
        "setup": {key: subject.setup.public()[key] for key in STUDENTS_SETUP},
        "protocol": {
            "name": training.name,
            "source": training.protocol.source,
            "changed": training.changed,
            "steps": training.config.steps(len(subject.labels)),
            **training.config.to_dict(),
        },
        "rows": {name: m.numbers() for name, m in found.items()},
        "differences": {row: dataclasses.asdict(over_row(found, row)) for row in BESIDE.values() if row in found},
        "scores": ranking_scores(found),
        "sentence": set_sentence(subject.name, found),
    }


def score_subject(
    subject: Subject, training: StudentTraining, store: Store, make: Make, beside: tuple[str, ...]
) -> dict:
    """Score a subject and what stands beside it (keys of `BESIDE`): the result as plain JSON values.

    It says how many test accuracies the store holds then. What is finished is found there; the rest `make` makes.
    """
    if unknown := [name for name in beside if name not in BESIDE]:
        raise ValueError(f"beside={unknown[0]!r}: must be among {', '.join(BESIDE)}")
    rows = rows_of(subject, training, store, make, beside)
    found, opened = measured_rows(rows, store, make)
    return result_of(subject, training, found) | {"opened": {"now": len(found), "in all": opened}}


def table_of(result: dict) -> list[dict]:
    """The rows of a score for `markdown_table`: accuracy, what the set gains over the row, images, bytes, seconds."""

    def gain(name: str) -> str:
        d = result["differences"].get(name)
        return "" if d is None else str(Difference(**d))

    return [
        {
            "students trained on": f"{result['name']} ({name})" if name == THE_SET else name,
            "test accuracy": row["accuracy"],
            "the set minus this (points, 95 % CI)": gain(name),
            "images": row["images"],
            "bytes": f"{sum(row['bytes'].values()):,} ({', '.join(f'{k} {v:,}' for k, v in row['bytes'].items())})",
            "selected": row["option"],
            "CPU seconds": row["seconds"],
        }
        for name, row in result["rows"].items()
    ]
