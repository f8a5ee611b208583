"""Means with standard deviation, n and confidence interval, and their form in texts and tables."""

import dataclasses

import numpy as np

BASELINE = "no augmentation"  # the label of the method that every gain is measured from


def summary(values: list[float]) -> dict:
    """`mean`, `std` (n - 1 in the denominator; None for one value), `n`, and the `values` in their order."""
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": std, "n": len(values), "values": values}


def tenths(history: list[dict]) -> list[float]:
    """The mean loss over the first and over the last tenth of a run's iterations, [first, last]."""
    tenth = max(1, len(history) // 10)
    return [float(np.mean([r["loss"] for r in records])) for records in (history[:tenth], history[-tenth:])]


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """Test accuracies in [0, 1], one a student, and validation accuracies, which are used to choose options.

    `stopped` is the kind of `Stop` that ended the training of their phi early, or "". `str` shows it.
    """

    test: list[float]
    validation: list[float]
    stopped: str = ""

    @property
    def mean(self) -> float:
        return summary(self.test)["mean"]

    @property
    def std(self) -> float:
        """The standard deviation over students; 0 for one student."""
        return summary(self.test)["std"] or 0.0

    def __str__(self):
        return f"{mean_and_std(self.test, unit=100)} %{stop_mark(self.stopped)}"

    def numbers(self) -> dict:
        """The `summary` of the test accuracies, with `stopped` if the run stopped early."""
        return summary(self.test) | ({"stopped": self.stopped} if self.stopped else {})

    def __sub__(self, other: "Accuracy") -> dict:
        """The `summary` of the paired differences: the two students of a pair share initialisation and batches."""
        return summary([a - b for a, b in zip(self.test, other.test, strict=True)])


def stop_mark(stopped) -> str:
    """The text after a row's name or number if its run stopped early (a `Stop`, or its kind); else ""."""
    return f" (stopped: {getattr(stopped, 'kind', stopped)})" if stopped else ""


def outcomes(results: dict) -> list[dict]:
    """Rows for `markdown_table`, one a `Distilled`: its loss (means over tenths), its alpha, and why it stopped."""
    return [
        {"": name, "loss, first to last tenth": tenths(r.history), "alpha": r.alpha, "stopped": str(r.stopped or "")}
        for name, r in results.items()
    ]


def mean_and_std(values: list[float], form: str = "z.1f", std_form: str = "", unit: float = 1) -> str:
    """ "mean ± standard deviation", each in its number format ("z": no -0.0); "mean (n = 1)" for one value.

    `unit` multiplies both (100: per cent) after the mean was taken, as in `shown`: else the last digit could differ.
    """
    found = summary(values)
    deviation = f"± {unit * found['std']:{std_form or form.lstrip('+')}}" if len(values) > 1 else "(n = 1)"
    return f"{unit * found['mean']:{form}} {deviation}"


def shown(value) -> str:
    """A result as text for a table: accuracies in %, numbers with four digits."""
    if value is None or value != value:
        return "not finite"
    if isinstance(value, dict) and "mean" in value:
        deviation = "" if value["std"] is None else f" ± {100 * value['std']:.1f}"
        return f"{100 * value['mean']:z.1f}{deviation} % (n = {value['n']}){stop_mark(value.get('stopped'))}"
    if isinstance(value, tuple):
        return "(" + ", ".join(map(shown, value)) + ")"
    if isinstance(value, list):
        return (" to " if len(value) == 2 else ", ").join(map(shown, value))
    if isinstance(value, dict):
        return ", ".join(f"{k} {shown(v)}" for k, v in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def brief(value, most: int = 400) -> str:
    """`shown`, cut to at most `most` characters: the cells of a study would fill pages."""
    text = str(shown(value))
    return text if len(text) <= most else f"{text[:most].rpartition(', ')[0]} ... (all of it is in the file)"


def markdown_table(rows: list[dict]) -> str:
    """A Markdown table with a line a row and a column a key; "" where a row lacks a key. True is a dot.

    Other values are `shown`. Line breaks and bars in a value do not break the table. All Markdown tables are made here.
    """
    head = list(dict.fromkeys(key for row in rows for key in row))

    def cell(value) -> str:
        text = ("●" if value else "") if isinstance(value, bool) else shown(value)
        return " ".join(text.split()).replace("|", "\\|")

    lines = [[cell(name) for name in head], *([cell(row.get(name, "")) for name in head] for row in rows)]
    first, *others = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([first, "|---" * len(head) + "|", *others]) + "\n"


# --- the cells of a sweep ---------------------------------------------------------------------------------------------


def level(value) -> float | None:
    """The number that a table averages: a number itself, or the mean of a `summary`; None for anything else."""
    if isinstance(value, dict) and "mean" in value:
        return value["mean"]
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def over_seeds(cells: list[dict]) -> dict[tuple[str, ...], list[dict]]:
    """The cells grouped so that those of a group differ only in their seed; in the order of their seeds.

    The keys are (panel, row), followed by "key value" for each other axis of the grid.
    """
    groups: dict[tuple[str, ...], list[dict]] = {}
    for cell in cells:
        axes = [f"{key} {value}" for key, value in cell["point"].items() if key != "seed"]
        groups.setdefault((cell["panel"], cell["row"], *axes), []).append(cell)
    return groups


def row_label(row: tuple[str, ...]) -> str:
    """The label of a grid's row (panel, name, "axis value" ...); an empty panel is left out."""
    panel, *rest = row
    name = ", ".join(filter(None, rest)) or "all"
    return f"{panel}: {name}" if panel else name


# --- accuracies of methods over repetitions, by (method, repetition) --------------------------------------------------


def pooled(scores: dict[tuple, Accuracy]) -> dict[str, Accuracy]:
    """The accuracies of each method, the students of all repetitions pooled."""
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


FEWEST = 3  # values that an interval needs: that of two is 9 times their standard deviation, or 0 where they agree

ROUNDING = 1e-9  # of an accuracy

EQUIVALENCE = 0.005  # accuracies are equivalent if the whole interval of their difference is at most so far from 0


@dataclasses.dataclass(frozen=True)
class Difference:
    """A mean difference in accuracy, in [-1, 1], with the half-width of its 95 % interval.

    half: None for fewer than `FEWEST` values: nothing is said about their significance
    over: what n counts ("5 repetitions")
    """

    mean: float
    half: float | None
    over: str

    @property
    def significant(self) -> bool:
        """Whether the 95 % interval excludes 0; False where there is none."""
        return self.half is not None and abs(self.mean) > self.half

    @property
    def equivalent(self) -> bool:
        """Whether the 95 % interval is within `EQUIVALENCE` of 0 (two one-sided tests at 2.5 %); False without one."""
        return self.half is not None and abs(self.mean) + self.half <= EQUIVALENCE

    @property
    def verdict(self) -> str:
        """ "significantly better" or "worse", "equivalent within 0.5 points", "not significantly different", or that n
        is too small."""
        if self.half is None:
            return f"too few to say (n = {self.over})"
        if self.significant:
            return f"significantly {'better' if self.mean > 0 else 'worse'}"
        if self.equivalent:
            return f"equivalent within {100 * EQUIVALENCE:g} points"
        return "not significantly different"

    @property
    def words(self) -> str:
        """The difference with what it says: "+1.2 ± 5.0 points, not significantly different". Without an interval only
        the number."""
        return f"{self} points" + (f", {self.verdict}" if self.half is not None else "")

    def __str__(self):
        """The difference in percentage points, with its interval or n."""
        return f"{100 * self.mean:+z.1f} " + (f"(n = {self.over})" if self.half is None else f"± {100 * self.half:.1f}")


def difference(scores: dict[tuple, Accuracy], method: str, other: str) -> Difference:
    """The mean accuracy of `method` minus that of `other`, with its 95 % interval (Student's t).

    n counts repetitions if there are several, since students of one repetition share images, experts and phi. With one
    repetition n counts its students.
    """
    found = [(score - scores[other, k])["values"] for (name, k), score in scores.items() if name == method]
    values, over = independent(found)
    n, mean, half = len(values), float(np.mean(values)), None
    if n >= FEWEST:
        half = t_quantile(n - 1) * float(np.std(values, ddof=1)) / n**0.5
    return Difference(mean, None if no_spread(mean, half) else half, over)


def no_spread(mean: float, half: float | None) -> bool:
    """Whether an interval says nothing because all differences happen to be equal, and not 0.

    Accuracies on few test images often are; methods that are the same differ by 0.
    """
    return half is not None and half < ROUNDING < abs(mean)


def independent(repetitions: list[list[float]]) -> tuple[list[float], str]:
    """The values that an interval counts, and how many of what: means of repetitions; students if there is one."""
    several = len(repetitions) > 1
    values = [float(np.mean(v)) for v in repetitions] if several else repetitions[0]
    n, of = len(values), "repetitions" if several else "students"
    return values, f"{n} {of if n > 1 else of.removesuffix('s')}"


def t_quantile(freedom: float) -> float:
    """The 97.5 % quantile of Student's t."""
    from scipy import stats  # takes a second to import

    return float(stats.t.ppf(0.975, freedom))


def unpaired(repetitions: list[list[float]], reference: list[float]) -> Difference:
    """The mean accuracy of a method minus that of students that do not come in repetitions, with Welch's 95 % interval.

    `repetitions` are the accuracies of the method's students by repetition, which n counts as in `difference`;
    `reference` those of the other students: with all the data there is one set of images for all repetitions.
    """
    values, over = independent(repetitions)
    parts = [(float(np.var(v, ddof=1)) / len(v), len(v) - 1) for v in (values, reference) if len(v) >= FEWEST]
    half = None
    if len(parts) == 2:
        variance = sum(part for part, _ in parts)
        freedom = variance**2 / sum(part**2 / n for part, n in parts) if variance else 1.0
        half = t_quantile(freedom) * variance**0.5
    mean = float(np.mean(values) - np.mean(reference))
    return Difference(mean, None if no_spread(mean, half) else half, f"{over} and {len(reference)} students")


GAIN = f"gain over {BASELINE} (points, 95 % CI)"  # the title of a table's column


def gain(scores: dict[tuple, Accuracy], method: str, baseline: str) -> str:
    """The gain of a method over the baseline in points, with its 95 % interval; "" for the baseline itself."""
    return "" if method == baseline else str(difference(scores, method, baseline))
