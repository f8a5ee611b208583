"""The study of why phi failed: a phi trained on a few real images with one choice of settings, scored with controls.

A `Case` is a row of the study at one seed. A notebook and a sweep get the same result for it.
"""

import dataclasses
from collections import Counter

import numpy as np

from augdistill_core import DistillConfig, diverged
from augdistill_report.files.store import Store
from augdistill_report.run import Run
from augdistill_report.settings import Settings
from augdistill_report.studies.grid import Grid, run_grid
from augdistill_report.work.distillation import Distillation
from augdistill_report.work.experts import missing_experts
from augdistill_report.work.jobs import Subset, Task
from augdistill_report.work.own_code import own_source
from augdistill_report.work.probes import Probe
from augdistill_report.work.progress import Progress
from augdistill_report.work.provenance import SOURCES
from augdistill_report.work.scoring import Evaluation, Score
from augdistill_report.work.setup import Setup
from augdistill_report.work.statistics import Accuracy, level, mean_and_std, over_seeds, row_label, summary, tenths


@dataclasses.dataclass(frozen=True)
class Case(Task):
    """The phi of `settings`, trained on its base images (or on episodes of all the data), scored on the base images."""

    settings: Settings

    kind = "case"
    whole = True

    @property
    def setup(self) -> Setup:
        return self.settings.select(Setup)

    @property
    def base(self) -> Subset:
        return Subset(self.settings.seed, per_class=self.settings.images_per_class)

    @property
    def distilled(self) -> Distillation:
        """The training job of phi; with episodes, each iteration has new images from all the training data."""
        subset = Subset(self.settings.seed, fraction=1.0) if self.settings.episode else self.base
        phi, config = self.settings.phi, self.settings.select(DistillConfig)
        return Distillation(self.setup, phi, subset, config, own_source(phi))

    def score(self, distilled: Distillation | None) -> Score:
        config = self.settings.eval_config(distilled is not None)
        return Score(self.setup, Evaluation(self.setup, self.base, config, distilled))

    @property
    def cost(self):
        return self.distilled.cost

    def needs(self):
        """Its jobs: the distillation, its probe, the accuracy with phi, and that with the real images."""
        distilled = self.distilled
        return [distilled, Probe(self.setup, distilled), self.score(distilled), self.score(None)]

    def spec(self):
        return {"needs": [job.spec() for job in self.needs()], "source": SOURCES.digest(type(self).__module__)}

    def history(self, store: Store) -> list[dict]:
        return self.distilled.stored(store)[1]["history"]

    def work(self, store, tick):
        distilled, probe, phi, real = self.needs()
        result = distilled.stored(store, tick)[1]
        history, probe = result["history"], probe.stored(store)[1]
        phi, real = (Accuracy(**job.stored(store)[1]) for job in (phi, real))
        return {}, {
            "test accuracy": summary(phi.test),
            "real images": summary(real.test),
            "gain": phi - real,
            "matching loss": float(np.mean(probe["loss"])),
            "identity at the same alpha": float(np.mean(probe["identity"])),
            "noise in the loss": float(np.mean(probe["variance"])),
            "change of x": float(np.mean(probe["change"])),
            "spread of draws": float(np.mean(probe["spread"])),
            "alpha": result["alpha"],
            "loss, first and last tenth": tenths(history),
            "states": dict(Counter(record["state"] for record in history if record["state"])),
            "stopped": result["stopped"],
        }

    def numbers(self, store: Store) -> dict:
        """Its result as plain JSON values; missing jobs are run."""
        return self.stored(store)[1]

    def found(self, store: Store) -> dict:
        return {"numbers": self.numbers(store)}


def study(run: Run, grid: Grid, short: bool) -> tuple[list[dict], dict[tuple[str, str], list[Case]]]:
    """The cells of a grid, one dict each, as `augdistill sweep` of `one_phi.ipynb` would find them.

    Only the first `why_repeats` seeds of the grid are run. Also returns the cases by (panel, row), in the order of
    their seeds.
    """
    settings = run.settings
    own = {"iterations": settings.why_iterations, "eval_steps": settings.why_eval_steps}
    changes = {key: value for key, value in own.items() if value}
    seeds = grid.axes["seed"][: settings.why_repeats]
    choices = [choice for choice in grid.choices(settings, changes, short) if choice.point["seed"] in seeds]
    cases = {choice: Case(choice.settings) for choice in choices}
    run.make(
        [job for setup in dict.fromkeys(c.setup for c in cases.values()) for job in missing_experts(setup)], "experts"
    )
    found = run_grid(cases, run.store, settings.pool, Progress("cases"))
    run.count(list(cases.values()))
    rows: dict[tuple[str, str], list[Case]] = {}
    for choice, case in cases.items():
        rows.setdefault((choice.panel, choice.row), []).append(case)
    return found, rows


ENDED = {"diverged": "diverged", "alpha": "ended with alpha below zero", "minutes": "reached the time limit"}  # by kind

# --- figures and tables of a study: `cells` are the results of a sweep ------------------------------------------------


def values(cells: list[dict], row: tuple[str, ...], number: str) -> list[float]:
    """One number of a row, one value per seed; failed cells have none."""
    found = [level(cell.get("numbers", {}).get(number)) for cell in over_seeds(cells).get(row, [])]
    return [v for v in found if v is not None]


def losses(cells: list[dict]) -> list[dict]:
    """For each row, means over its seeds: the loss, the identity's at the same alpha, and which runs went wrong."""
    rows = []
    for row, group in over_seeds(cells).items():
        numbers = [cell["numbers"] for cell in group if "numbers" in cell]
        if not numbers:
            continue
        states = Counter(state for n in numbers for state in n["states"])
        stops = Counter(ENDED[n["stopped"]["kind"]] for n in numbers if n["stopped"])
        counts = [f"{what} in {count} of {len(numbers)}" for what, count in [*stops.items(), *states.items()]]
        keys = ("matching loss", "identity at the same alpha", "alpha", "change of x", "noise in the loss")
        means = {key: float(np.mean([n[key] for n in numbers])) for key in keys}
        rows.append({"": row_label(row)} | means | {"failed runs": "; ".join(counts)})
    return rows


def reach(run: Run, case: Case, alphas: list[float]) -> dict[str, dict[tuple[str, str], list]]:
    """The matching loss against alpha before training: for x after N steps, and for untrained phis.

    `case` gives the setup; `run` makes and stores the probes. Curves by name, `[(alpha, loss), ...]`, in two panels; a
    name is (what is drawn, with what).
    """
    n = case.settings.syn_steps
    images = [("identity", steps) for steps in (max(1, n // 3), n, 3 * n)]
    phis = [(phi, n) for phi in ("identity", "distnet2", "distnet3", "distnet5")]
    jobs = {}
    for phi, steps in dict.fromkeys([*images, *phis]):
        changes = dict(iterations=1, alpha_mode="fixed", phi=phi, syn_steps=steps)
        distilled = dataclasses.replace(case, settings=dataclasses.replace(case.settings, **changes)).distilled
        for alpha in alphas:
            jobs[phi, steps, alpha] = Probe(distilled.setup, distilled, moment="0", alpha=alpha, segments=4)
    found = run.probe(jobs)

    def curve(phi: str, steps: int) -> list[tuple[float, float]]:
        return [(alpha, float(np.mean(found[phi, steps, alpha]["loss"]))) for alpha in alphas]

    return {
        "real images": {("x", f"{steps} steps"): curve(phi, steps) for phi, steps in images},
        f"untrained phis, {n} steps": {
            ("x", f"{n} steps") if phi == "identity" else (phi, "untrained"): curve(phi, steps) for phi, steps in phis
        },
    }


def noise(run: Run, cases: dict[str, Case]) -> dict[str, dict[str, list]]:
    """During the training of each case: the norm of phi's noise, and the variance's share of the loss."""
    moments_of = {
        name: [m for m in case.distilled.stored_moments(run.store) if m != "last"] for name, case in cases.items()
    }
    jobs = {
        (name, moment): Probe(case.setup, case.distilled, moment=moment, alpha=case.settings.alpha)
        for name, case in cases.items()
        for moment in [*moments_of[name], "last"]
    }
    found = run.probe(jobs)
    panels: dict[str, dict[str, list]] = {"norm of the noise / norm of x": {}, "variance's share of the loss": {}}
    for name, case in cases.items():
        moments = [(int(m), found[name, m]) for m in moments_of[name]]
        moments.append((len(case.history(run.store)), found[name, "last"]))
        ratio, share = panels.values()
        ratio[name] = [(i, float(np.mean(p["spread"])) / 2**0.5) for i, p in moments]
        share[name] = [(i, float(np.mean(p["variance"]) / np.mean(p["loss"]))) for i, p in moments]
    return panels


def learns(gains: list[float]) -> bool:
    """Whether phi adds more than 1 point of accuracy at every seed.

    Mean and standard deviation are not used: the possible gain depends on the base images, and so on the seed.
    """
    return bool(gains) and min(gains) > 0.01


ALMOST_UNCHANGED = 0.05  # a relative change of x that is almost none: an untrained phi changes x by .01 to .02


def gain_points(gains: list[float]) -> str:
    """Gains over seeds (mean ± standard deviation), in points of accuracy."""
    return f"{mean_and_std(gains, '+z.1f', unit=100)} points"


SGD_1000, ADAM, BOTH = ("report", "SGD 1000"), ("report", "Adam for phi"), ("report", "both optimisers")

SMALL_STEPS = [("report", "SGD .01"), ("report", "SGD .1")]

FIXED_ALPHA = [("report", f"alpha fixed at {alpha}") for alpha in (".01", ".1", "1")]

WORKING, QUIET = ("mended", "U-Net, Adam .003, log alpha"), ("mended", "no noise")

OWN_NETWORK = {  # rows of the report's own network, and what they change in its setting
    ADAM: "with nothing changed but phi's optimiser",
    BOTH: "with phi's and alpha's optimisers changed",
    ("mended", "distnet2"): "with both optimisers changed, and noise in every step",
}

U_NET_BY_SGD = [("report", "U-Net with noise"), ("mended", "SGD .01 for phi")]  # the first one that was run is used

LONG, LONG_PIXELS = ("long", "U-Net"), ("long", "pixels, MTT's SGD 100")

JUDGED = (SGD_1000, *SMALL_STEPS, *FIXED_ALPHA, WORKING, QUIET, *OWN_NETWORK, *U_NET_BY_SGD, LONG, LONG_PIXELS)


def verdicts(cells: list[dict], grid: Grid) -> list[dict]:
    """The claims of the student report that these cells can test: the measured numbers and the verdict.

    A claim whose rows were not run is left out. A `ValueError` names a row that a verdict needs and the grid lacks.
    """
    if unknown := [row for row in JUDGED if row not in grid.rows]:
        raise ValueError(f"{grid.path}: has no row {row_label(unknown[0])!r}, which a verdict of notebook 04 needs")
    groups = over_seeds(cells)
    gain = {row: values(cells, row, "gain") for row in groups}
    rows = []

    def judge(claim: str, ids: list[tuple[str, str]], verdict, also: str = "") -> None:
        known = [row for row in ids if gain.get(row)]
        if ids and len(known) == len(ids):
            seen = "; ".join(f"{name}: {gain_points(gain[panel, name])}" for panel, name in known)
            rows.append({"claim": claim, "measured": "; ".join(s for s in (seen, also) if s), "verdict": verdict()})

    def fails(row: tuple[str, ...]) -> bool:
        return not learns(gain[row])

    def explosions(row: tuple[str, ...]) -> list[bool]:
        return [diverged(cell["numbers"]["stopped"]) for cell in groups.get(row, []) if "numbers" in cell]

    def unchanged(row: tuple[str, ...]) -> bool:
        changes = [cell["numbers"]["change of x"] for cell in groups[row] if "numbers" in cell]
        return all(change is not None and change <= ALMOST_UNCHANGED for change in changes)  # None: not finite

    def explosive(row: tuple[str, ...]) -> str:
        exploded = explosions(row)
        return "it diverges" if all(exploded) else "it diverges or adds nothing" if any(exploded) else "it adds nothing"

    own = [row for row in OWN_NETWORK if row in gain]
    unet = next((row for row in U_NET_BY_SGD if row in gain), U_NET_BY_SGD[0])
    able = next((row for row in own if learns(gain[row])), None)
    judge(
        "phi does not learn with SGD at 1000",
        [SGD_1000],
        lambda: f"true: {explosive(SGD_1000)}" if fails(SGD_1000) else "not seen",
        f"diverged in {sum(exploded)} of {len(exploded)} runs" if (exploded := explosions(SGD_1000)) else "",
    )
    small = [row for row in SMALL_STEPS if row in gain]
    still = "it does not change" if all(map(unchanged, small)) else "it adds nothing"
    judge("nor at .01 or .1", small, lambda: f"true: {still}" if all(map(fails, small)) else "not seen")
    fixed = [row for row in FIXED_ALPHA if row in gain]
    judge("nor with alpha fixed at .01, .1 or 1", fixed, lambda: "true" if all(map(fails, fixed)) else "not seen")
    report = [cell for row in gain if row[0] == "report" for cell in groups[row] if "numbers" in cell]
    if raw := [cell["numbers"] for cell in report if cell["settings"]["alpha_mode"] == "raw"]:
        low = {"alpha at zero", "alpha below zero"}
        fell = sum(bool(low & {*n["states"]}) or n["stopped"].get("kind") == "alpha" for n in raw)
        rows.append(
            {
                "claim": "a learned alpha runs to zero, and below",
                "measured": f"in {fell} of {len(raw)} runs with a raw alpha",
                "verdict": "true of a raw alpha" if fell else "not seen here",
            }
        )
    judge(
        "phi is unable to learn the desired transformation",
        own,
        lambda: f"false: the same network learns, {OWN_NETWORK[able]}" if able else "not refuted",
    )
    judge(
        "the issue lies in the architecture",
        [unet, *own],
        lambda: (
            "false: another architecture fails with the report's optimiser, its own network learns with another"
            if able and fails(unet)
            else "in part: a larger phi learns with other optimisers, and fails with the report's"
            if learns(gain.get(WORKING, [])) and fails(unet)
            else "not refuted"
        ),
    )
    controls = ("identity", "pixels")
    zoo = [row for row in gain if row[0] == "zoo" and groups[row][0]["settings"]["phi"] not in controls]
    if zoo:
        able = [", ".join(row[1:]) for row in zoo if learns(gain[row])]
        rows.append(
            {
                "claim": "a range of architectures fails",
                "measured": f"by Adam, {len(able)} of {len(zoo)} learn: {', '.join(able)}",
                "verdict": "false" if able else "not refuted",
            }
        )
    judge(
        "phi only has to do what pixels do",
        [LONG, LONG_PIXELS],
        lambda: (
            "true of a phi that is large enough: it reaches the pixels"
            if np.mean(gain[LONG]) > np.mean(gain[LONG_PIXELS]) - 0.01
            else "not reached here"
        ),
    )
    judge(
        "noise in phi may help it",
        [QUIET, WORKING],
        lambda: "seen" if learns([a - b for a, b in zip(gain[WORKING], gain[QUIET], strict=True)]) else "not seen",
    )
    return rows
