"""The scoreboard (notebook 08): scores of distilled sets beside each other, and beside published numbers.

Measured scores are the files that `augdistill score --publish` writes to figures/scoreboard. Published numbers are of
papers: none was measured here, and their protocols differ (several keep the best of repeated test evaluations).
"""

import dataclasses
import operator
from pathlib import Path

from augdistill_report.files.sealed_json import read_json
from augdistill_report.files.store import digest
from augdistill_report.places import ROOT
from augdistill_report.run import Run
from augdistill_report.studies.protocols import PROTOCOLS
from augdistill_report.studies.set_scores import (
    ALL_ROW,
    BESIDE,
    BYTES_ROW,
    RANDOM_ROW,
    THE_SET,
    WINDOW_ROW,
    score_subject,
    training_by,
)
from augdistill_report.studies.subjects import from_row
from augdistill_report.work.scoring import EvalConfig

BOARD = ROOT / "figures" / "scoreboard"

CIFAR = ("cifar10", 32)  # data set and size of the published numbers, all of ConvNet-3 of width 128

PIXELS = 3 * 32 * 32


@dataclasses.dataclass(frozen=True)
class Entry:
    """A marker of the scoreboard: accuracies in [0, 1], `spread` a standard deviation (None: it is not known).

    `training` says how students were trained: only accuracies with the same can be compared. `key` is a digest of all
    that a measured accuracy depends on besides the fields before it ("" for a published one).
    """

    method: str
    data: str
    size: int
    images: int
    bytes: int
    accuracy: float
    spread: float | None = None
    training: str = "that of the paper"
    source: str = "measured"
    key: str = ""

    @property
    def shown(self) -> str:
        return f"{100 * self.accuracy:.1f}{f' ± {100 * self.spread:.1f}' if self.spread else ''} %"

    @property
    def is_measured(self) -> bool:
        return self.source == "measured"


def published_rows(method: str, source: str, accuracies: dict[int, float], per_image: float) -> list[Entry]:
    """A paper's numbers on CIFAR-10: accuracy in % by images a class, with the bytes that one image needs."""
    return [
        Entry(method, *CIFAR, 10 * count, round(10 * count * (per_image + 1)), accuracy / 100, source=source)
        for count, accuracy in accuracies.items()
    ]


# images as 4-byte floats, as they were released; real images as bytes; soft labels as ten floats (40 bytes)
PUBLISHED_SCORES = [
    *published_rows("MTT", "Cazenavette et al., CVPR 2022", {1: 46.3, 10: 65.3, 50: 71.6}, 4 * PIXELS),
    *published_rows(
        "DATM (soft labels)", "Guo et al., ICLR 2024", {1: 46.9, 10: 66.8, 50: 76.1, 500: 83.5}, 4 * PIXELS + 39
    ),
    *published_rows("PAD (soft labels)", "Li et al., 2024", {500: 84.6}, 4 * PIXELS + 39),
    *published_rows("NCFM (an image holds four)", "Wang et al., CVPR 2025", {1: 49.5, 10: 71.8, 50: 77.4}, 4 * PIXELS),
    *published_rows("AT-BPTT", "Li et al., arXiv 2510.04838, 2025", {1: 54.4, 10: 72.4, 50: 78.7}, 4 * PIXELS),
    *published_rows(
        "random real images, DSA", "Zhao & Bilen, ICML 2021", {1: 15.4, 10: 31.0, 50: 50.6, 500: 73.2}, PIXELS
    ),
    # 64 colours: 6 bits a pixel, and a palette of 64 colours of three bytes
    *published_rows(
        "AutoPalette (200 images a class)", "Yuan et al., NeurIPS 2024", {200: 79.4}, 1024 * 6 / 8 + 64 * 3
    ),
    *published_rows("all the data", "Cazenavette et al., CVPR 2022", {5000: 84.8}, PIXELS),
]

SAID_ALREADY = ("eval_student", "eval_steps", "eval_epochs")  # by the first words of `training_text`


def setting_in_words(key: str, value) -> str:
    """A setting of students for a table: "step size 0.02"; one that has no words of its own by its name and value."""
    words = {
        "eval_lr": f"step size {value}",
        "eval_augment": "no augmentation" if value == "none" else f"augmentation {value}",
        "eval_labels": "labels by experts",  # said only where it is not "hard"
        "eval_students": f"{value} students",
        "eval_batch": f"batches of {value}",
    }
    return words.get(key, f"{key} {value}")


def training_text(result: dict, labels: str) -> str:
    """How students of a score were trained, in short: the protocol, the students, and all that is not as in it.

    `labels` is the `eval_labels` of the row. For the protocol "ours" the augmentation and the step size are always
    said: it leaves them to the preset. Step sizes that a protocol selects, or takes from the set, are not said.
    """
    how, setup = result["protocol"] | {"eval_labels": labels}, result.get("setup", {})  # older files have no setup
    name, student = how["name"], how["eval_student"]
    if student == "convnet" and setup:
        student += f" of width {setup['width']} and depth {setup['depth']}"
    usual = EvalConfig().to_dict() | PROTOCOLS[name].changes
    if name == "ours":
        usual |= {"eval_lr": None, "eval_augment": None}
    elif "eval_lr" not in how["changed"]:
        usual["eval_lr"] = how["eval_lr"]
    others = {k: v for k, v in how.items() if k in usual and k not in SAID_ALREADY and v != usual[k]}
    said = [f"{name}: {student}", f"{how['steps']:,} steps", *(setting_in_words(k, v) for k, v in others.items())]
    return ", ".join([*said, "whitened"] if result.get("whitened") else said)


def key_of_training(result: dict, labels: str) -> str:
    """A digest of how students of a score were trained: all settings of the protocol, their size, and whitening."""
    how, setup = result["protocol"], result.get("setup", {})
    settings = {k: v for k, v in how.items() if k not in ("source", "changed")} | {"eval_labels": labels}
    size = [setup.get(k) for k in ("width", "depth")] if how["eval_student"] == "convnet" else []
    selected = bool(PROTOCOLS[how["name"]].lrs) and "eval_lr" not in how["changed"]
    return digest(
        {"settings": settings | {"eval_lr": None} if selected else settings, "size": size}
        | {"whitened": result.get("whitened", False)}
    )


def entries_of(result: dict) -> list[Entry]:
    """The rows of a score as entries: the set by its own name, the rows beside it by theirs.

    Real images with soft labels also name whose labels they are: those of experts, or those learned with the set.
    """
    found = []
    for name, row in result["rows"].items():
        if name not in (THE_SET, *BESIDE.values()):
            continue
        method = result["name"] if name == THE_SET else name
        if name in (RANDOM_ROW, BYTES_ROW):
            method = "random real images"
        taught = "decoder" in row["bytes"]  # random images of as many bytes, and all the data, have hard labels
        if taught and name != THE_SET:
            method += ", labels by experts"
        elif name in (RANDOM_ROW, WINDOW_ROW) and row["bytes"]["labels"] >= 4 * row["images"]:
            method += f", soft labels of {result['name']}"
        labels = "soft" if taught else "hard"
        how = dict(training=training_text(result, labels), key=key_of_training(result, labels))
        accuracy, size = row["accuracy"], sum(row["bytes"].values())
        where = (result["data"], result["size"], row["images"], size)
        found.append(Entry(method, *where, accuracy["mean"], accuracy["std"], **how))
    return found


def distinct(entries: list[Entry]) -> list[Entry]:
    """Entries without those that stand beside several scores (all the data, as many random images): the first stays."""
    key = operator.attrgetter("method", "data", "size", "images", "bytes", "training", "key")
    return list({key(entry): entry for entry in reversed(entries)}.values())[::-1]


def read_board(folder: Path = BOARD) -> list[dict]:
    """The scores in a folder; [] if there is none. A `ValueError` names a damaged file."""
    return [read_json(path, "score") for path in sorted(folder.glob("*.json"))]


def by_data(entries: list[Entry]) -> dict[tuple[str, int], list[Entry]]:
    """Entries by data set and image size: accuracies on different ones cannot be compared."""
    panels: dict[tuple[str, int], list[Entry]] = {}
    for entry in entries:
        panels.setdefault((entry.data, entry.size), []).append(entry)
    return panels


def board_table(entries: list[Entry]) -> list[dict]:
    """Rows for `markdown_table`, the most accurate of each data set first."""
    return [
        {
            "data": f"{entry.data} {entry.size}x{entry.size}",
            "method": entry.method,
            "test accuracy": f"{100 * entry.accuracy:.1f}"
            + (f" ± {100 * entry.spread:.1f}" if entry.spread else "")
            + " %",
            "images": entry.images,
            "bytes": f"{entry.bytes:,}",
            "students": entry.training,
            "source": entry.source if entry.is_measured else f"published, not measured: {entry.source}",
        }
        for panel in by_data(entries).values()
        for entry in sorted(panel, key=lambda entry: -entry.accuracy)
    ]


def score_rows(run: Run, rows: dict, protocol: str = "ours") -> dict[str, dict]:
    """Score rows of a notebook, each a `Distillation` by name, with all that stands beside them: results by name."""
    found = {}
    for name, job in rows.items():
        subject = from_row(job, name, run.settings, run.store, run.store)
        training = training_by(protocol, subject, run.settings, {})
        found[name] = score_subject(subject, training, run.store, run.make, tuple(BESIDE))
    return found


def board_headline(results: dict[str, dict]) -> str:
    """The best of a run's own scores, as one sentence."""
    best = max(results.values(), key=lambda result: result["rows"][THE_SET]["accuracy"]["mean"])
    means = {name: 100 * row["accuracy"]["mean"] for name, row in best["rows"].items()}
    return (
        f"{best['rows'][THE_SET]['images']} images of “{best['name']}” give {means[THE_SET]:.1f} %, as many real "
        f"images, drawn at random for each student, {means[RANDOM_ROW]:.1f} %, all the data {means[ALL_ROW]:.1f} %."
    )
