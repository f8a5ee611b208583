"""Numbers that say how sure they are: means with their deviation and n, and how a person reads them."""

import dataclasses

import numpy as np
from scipy.special import stdtrit


def summary(values: list[float]) -> dict:
    """Mean, standard deviation (n - 1 in the denominator), n, and the values themselves, in their order."""
    return {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)), "n": len(values), "values": values}


def tenths(history: list[dict]) -> list[float]:
    """The mean loss over the first and over the last tenth of a run."""
    tenth = max(1, len(history) // 10)
    return [float(np.mean([r["loss"] for r in part])) for part in (history[:tenth], history[-tenth:])]


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """Test accuracies in [0, 1], one a student; those on the validation split are for choosing.

    `stopped` is the kind of `Stop` that ended the training of their phi early, "" for none: the text shows it.
    """

    test: list[float]
    validation: list[float]
    stopped: str = ""

    @property
    def mean(self) -> float:
        return summary(self.test)["mean"]

    @property
    def std(self) -> float:
        return summary(self.test)["std"]

    def __str__(self):
        return f"{100 * self.mean:.1f} ± {100 * self.std:.1f} %{stop_mark(self.stopped)}"

    def numbers(self) -> dict:
        """The `summary` of the test accuracies, and `stopped`, if it did."""
        return summary(self.test) | ({"stopped": self.stopped} if self.stopped else {})

    def __sub__(self, other: "Accuracy") -> dict:
        """The `summary` of the differences, student by student: each pair shares initialisation and batches."""
        return summary([a - b for a, b in zip(self.test, other.test, strict=True)])


def stop_mark(stopped) -> str:
    """What follows a row's name or number if its run stopped early (a `Stop`, or its kind); "" if it did not."""
    return f" (stopped: {getattr(stopped, 'kind', stopped)})" if stopped else ""


def outcomes(results: dict) -> list[dict]:
    """Rows for `markdown_table`: a `Distilled` each, with its loss (means over tenths), alpha, why it stopped."""
    return [
        {"": name, "loss, first to last tenth": tenths(r.history), "alpha": r.alpha, "stopped": str(r.stopped or "")}
        for name, r in results.items()
    ]


def shown(value) -> str:
    """A result as a person reads it."""
    if value is None or value != value:
        return "not finite"
    if isinstance(value, dict) and "mean" in value:
        stopped = stop_mark(value.get("stopped"))
        return f"{100 * value['mean']:.1f} ± {100 * value['std']:.1f} % (n = {value['n']}){stopped}"
    if isinstance(value, tuple):
        return "(" + ", ".join(map(shown, value)) + ")"
    if isinstance(value, list):
        return (" to " if len(value) == 2 else ", ").join(map(shown, value))
    if isinstance(value, dict):
        return ", ".join(f"{k} {shown(v)}" for k, v in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def brief(value, most: int = 400) -> str:
    """The same, cut where it goes on for pages, as a whole study's cells do."""
    text = str(shown(value))
    return text if len(text) <= most else f"{text[:most].rpartition(', ')[0]} ... (all of it is in the file)"


def markdown_table(rows: list[dict]) -> str:
    """Rows of equal keys as a Markdown table; True is a dot."""
    cells = [[("●" if v else "") if isinstance(v, bool) else shown(v) for v in row.values()] for row in rows]
    return text_table(list(rows[0]), cells)


def text_table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table. What has several lines or a bar stays in its cell."""
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in (head, *rows)]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]]) + "\n"


# --- reading what was found -------------------------------------------------------------------------------------------


def level(value) -> float | None:
    """A number that a table can average: itself, or the mean of a summary; None for anything else."""
    if isinstance(value, dict) and "mean" in value:
        return value["mean"]
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def over_seeds(cells: list[dict]) -> dict[str, list[dict]]:
    """The cells by what they are apart from their seed: a name, and its cells in the order of their seeds."""
    groups: dict[str, list[dict]] = {}
    for cell in cells:
        rest = [f"{key} {value}" for key, value in cell["point"].items() if key != "seed"]
        groups.setdefault(", ".join([part for part in (cell["row"], *rest) if part]) or "all", []).append(cell)
    return groups


def spread(values: list[float]) -> str:
    """A number over repetitions: mean ± deviation; alone, if there is one."""
    return f"{np.mean(values):.3f}" + (f" ± {summary(values)['std']:.3f}" if len(values) > 1 else "")


def pooled(scores: dict[tuple, Accuracy]) -> dict[str, Accuracy]:
    """Scores by (method, repetition) as scores by method: the students of all repetitions together."""
    methods: dict[str, list[Accuracy]] = {}
    for (method, _), score in scores.items():
        methods.setdefault(method, []).append(score)
    return {
        method: Accuracy(
            [v for s in several for v in s.test],
            [v for s in several for v in s.validation],
            ", ".join(sorted({s.stopped for s in several} - {""})),
        )
        for method, several in methods.items()
    }


def gain(scores: dict[tuple, Accuracy], method: str, plain: str = "plain images") -> dict:
    """What a method adds to plain images: mean and 95 % interval, and over how many of what."""
    mean, half, over = difference(scores, method, plain)
    return {"gain in points": f"{100 * mean:+.1f} ± {100 * half:.1f}", "over": over}


def difference(scores: dict[tuple, Accuracy], method: str, other: str) -> tuple[float, float, str]:
    """How much better a method is than another: mean, half of its 95 % interval (Student's t), and over what.

    `scores` are by (method, repetition). Over repetitions, where there are several (students of one world share images,
    experts and phi); else over students.
    """
    found = [(score - scores[other, k])["values"] for (name, k), score in scores.items() if name == method]
    values, of = ([np.mean(v) for v in found], "repetitions") if len(found) > 1 else (found[0], "students")
    half = stdtrit(len(values) - 1, 0.975) * np.std(values, ddof=1) / len(values) ** 0.5
    return float(np.mean(values)), float(half), f"{len(values)} {of}"
