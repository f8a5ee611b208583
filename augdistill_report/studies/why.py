"""What one choice of settings comes to: a phi trained on a few real images and scored, beside its controls.

A `Case` is a row of a study at one seed; what it comes to is the same whether a notebook asks for it or a sweep does.
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
from augdistill_report.work.probes import Probe
from augdistill_report.work.progress import Progress
from augdistill_report.work.provenance import SOURCES, own_source
from augdistill_report.work.scoring import Evaluation, Score
from augdistill_report.work.setup import Setup
from augdistill_report.work.statistics import Accuracy, level, over_seeds, summary, tenths


@dataclasses.dataclass(frozen=True)
class Case(Task):
    """The phi of `settings`, trained on its base images (or on episodes of all the data) and scored on the former."""

    settings: Settings

    kind = "case"

    @property
    def setup(self) -> Setup:
        return self.settings.select(Setup)

    @property
    def base(self) -> Subset:
        return Subset(self.settings.seed, per_class=self.settings.images_per_class)

    @property
    def distilled(self) -> Distillation:
        """With episodes phi is trained on images drawn afresh from all the training data."""
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
        """What it consists of: the distillation, its probe, phi's accuracy, and that of the real images."""
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
        """What it came to, as plain JSON values; what is missing is made."""
        return self.stored(store)[1]

    def found(self, store: Store) -> dict:
        return {"numbers": self.numbers(store)}


def study(run: Run, grid: Grid, short: bool) -> tuple[list[dict], dict[str, list[Case]]]:
    """What `augdistill sweep` finds in the cells of a grid of `one_phi.ipynb`, made here: `as_found` of each.

    Beside them the cases by row, in the order of their seeds.
    """
    settings = run.settings
    changes = {"iterations": settings.why_iterations} if settings.why_iterations else {}
    cases = {choice: Case(choice.settings) for choice in grid.choices(settings, changes, short)}
    run.make(
        [job for setup in dict.fromkeys(c.setup for c in cases.values()) for job in missing_experts(setup)], "experts"
    )
    found = run_grid(cases, run.store, settings.pool, Progress("cases"))
    rows: dict[str, list[Case]] = {}
    for choice, case in cases.items():
        rows.setdefault(choice.row, []).append(case)
    return found, rows


ENDED = {"diverged": "diverged", "alpha": "ended with alpha below zero", "minutes": "ran out of minutes"}  # by `Stop`

# --- what a study shows: `cells` are what a sweep found (`as_found`) --------------------------------------------------


def values(cells: list[dict], row: str, number: str) -> list[float]:
    """A number of a row, a value a seed; none where a cell failed."""
    found = [level(cell.get("numbers", {}).get(number)) for cell in over_seeds(cells).get(row, [])]
    return [v for v in found if v is not None]


def losses(cells: list[dict]) -> list[dict]:
    """For each row, means over its seeds: the loss, the identity's at the same alpha, and what befell it."""
    rows = []
    for name, group in over_seeds(cells).items():
        numbers = [cell["numbers"] for cell in group if "numbers" in cell]
        if not numbers:
            continue
        states = Counter(state for n in numbers for state in n["states"])
        stops = Counter(ENDED[n["stopped"]["kind"]] for n in numbers if n["stopped"])
        befell = [f"{stop} in {count} of {len(numbers)}" for stop, count in stops.items()]
        befell += [f"{state} in {count} of {len(numbers)}" for state, count in states.items()]
        row = {"": name}
        row |= {k: float(np.mean([n[k] for n in numbers])) for k in ("matching loss", "identity at the same alpha")}
        row |= {k: float(np.mean([n[k] for n in numbers])) for k in ("alpha", "change of x", "noise in the loss")}
        rows.append(row | {"what befell it": "; ".join(befell)})
    return rows


def reach(run: Run, case: Case, alphas: list[float]) -> dict[str, dict[str, list]]:
    """The matching loss against alpha, before anything is learned: of x after N steps, and of an untrained phi.

    `case` gives the world; `run` makes and stores the probes. Curves by name, `[(alpha, loss), ...]`, in two panels.
    """
    blank = dict(iterations=1, alpha_mode="fixed")
    n = case.settings.syn_steps
    kinds = {f"x, {steps} steps": dict(phi="identity", syn_steps=steps) for steps in (max(1, n // 3), n, 3 * n)}
    kinds |= {f"{phi}, untrained": dict(phi=phi) for phi in ("distnet2", "distnet3", "distnet5")}
    jobs = {}
    for name, changes in kinds.items():
        distilled = dataclasses.replace(case, settings=dataclasses.replace(case.settings, **blank | changes)).distilled
        for alpha in alphas:
            jobs[name, alpha] = Probe(distilled.setup, distilled, moment="0", alpha=alpha, segments=4)
    found = run.probe(jobs)
    curves = {name: [(a, float(np.mean(found[name, a]["loss"]))) for a in alphas] for name in kinds}
    images = {name: curve for name, curve in curves.items() if name.startswith("x, ")}
    phis = {f"x, {n} steps": curves[f"x, {n} steps"]}
    phis |= {name: curve for name, curve in curves.items() if name not in images}
    return {"real images": images, f"untrained phis, {n} steps": phis}


def noise(run: Run, cases: dict[str, Case]) -> dict[str, dict[str, list]]:
    """Along each case's way: how far two draws of phi are apart, and the part of the loss that is their variance."""
    ways = {name: [m for m in case.distilled.stored_moments(run.store) if m != "last"] for name, case in cases.items()}
    jobs = {
        (name, moment): Probe(case.setup, case.distilled, moment=moment, alpha=case.settings.alpha)
        for name, case in cases.items()
        for moment in [*ways[name], "last"]
    }
    found = run.probe(jobs)
    panels: dict[str, dict[str, list]] = {"size of the noise, in sizes of x": {}, "its part of the loss": {}}
    for name, case in cases.items():
        moments = [(int(m), found[name, m]) for m in ways[name]]
        moments.append((len(case.history(run.store)), found[name, "last"]))
        size, part = panels.values()
        size[name] = [(i, float(np.mean(p["spread"])) / 2**0.5) for i, p in moments]
        part[name] = [(i, float(np.mean(p["variance"]) / np.mean(p["loss"]))) for i, p in moments]
    return panels


def learns(gains: list[float]) -> bool:
    """Whether phi adds more than one point of accuracy at every seed.

    Not by mean and deviation: how much there is to add depends on the base images, and so on the seed.
    """
    return bool(gains) and min(gains) > 0.01


def gain_points(gains: list[float]) -> str:
    """Gains over seeds in points of accuracy."""
    deviation = f" ± {100 * summary(gains)['std']:.1f}" if len(gains) > 1 else ""
    return f"{100 * np.mean(gains):+.1f}{deviation} points"


def verdicts(cells: list[dict]) -> list[dict]:
    """Each claim of the student report that these cells can judge: what they say, and whether it holds."""
    gain = {name: values(cells, name, "gain") for name in over_seeds(cells)}
    rows = []

    def judge(claim: str, names: list[str], verdict, also: str = "") -> None:
        known = [name for name in names if gain.get(name)]
        if names and len(known) == len(names):
            seen = "; ".join(f"{name.partition(': ')[2]}: {gain_points(gain[name])}" for name in known)
            rows.append({"claim": claim, "seen": "; ".join(s for s in (seen, also) if s), "verdict": verdict()})

    def stands(name: str) -> bool:
        return not learns(gain[name])

    def found(name: str) -> list[dict]:
        return [
            c["numbers"] | {"alpha_mode": c["settings"]["alpha_mode"]}
            for c in over_seeds(cells)[name]
            if "numbers" in c
        ]

    def explosions(name: str) -> str:
        stops = [numbers["stopped"] for numbers in found(name)]
        return f"diverged in {sum(map(diverged, stops))} of {len(stops)} runs"

    own = [name for name in ("report: Adam for phi", "report: both optimisers", "mended: distnet2") if name in gain]
    mended, unet = "mended: U-Net, Adam .003, log alpha", "report: U-Net with noise"
    unet = unet if unet in gain else "mended: SGD .01 for phi"
    able = next((name for name in own if learns(gain[name])), None)
    changed = {
        "report: Adam for phi": "with nothing changed but phi's optimiser",
        "report: both optimisers": "with phi's and alpha's optimisers changed",
        "mended: distnet2": "with both optimisers changed, and noise in every step",
    }
    judge(
        "phi does not learn with SGD at 1000",
        ["report: SGD 1000"],
        lambda: "true: it explodes" if stands("report: SGD 1000") else "not seen",
        explosions("report: SGD 1000") if "report: SGD 1000" in gain else "",
    )
    slow = [name for name in ("report: SGD .01", "report: SGD .1") if name in gain]
    judge("nor at .01 or .1", slow, lambda: "true: it stands still" if all(map(stands, slow)) else "not seen")
    fixed = [name for name in gain if name.startswith("report: alpha fixed")]
    judge("nor with alpha fixed at .01, .1 or 1", fixed, lambda: "true" if all(map(stands, fixed)) else "not seen")
    ran = [n for name in gain if name.startswith("report: ") for n in found(name) if n["alpha_mode"] == "raw"]
    if ran:
        low = {"alpha at zero", "alpha below zero"}
        fell = sum(bool(low & {*n["states"]}) or n["stopped"].get("kind") == "alpha" for n in ran)
        rows.append(
            {
                "claim": "a learned alpha runs to zero, and below",
                "seen": f"in {fell} of {len(ran)} runs that learned it raw",
                "verdict": "true, of a raw alpha" if fell else "not seen here",
            }
        )
    judge(
        "phi is unable to learn the desired transformation",
        own,
        lambda: f"false: the same network learns, {changed[able]}" if able else "not refuted",
    )
    judge(
        "the issue lies in the architecture",
        [unet, *own],
        lambda: (
            "false: another architecture stands still with the report's optimiser, its own learns with another"
            if able and stands(unet)
            else "in part: a larger phi learns, with other optimisers; with the report's it stands still"
            if learns(gain.get(mended, [])) and stands(unet)
            else "not refuted"
        ),
    )
    zoo = [
        name for name in gain if name.startswith("zoo: ") and name not in ("zoo: identity",) and "pixels" not in name
    ]
    if zoo:
        able = [name.partition(": ")[2] for name in zoo if learns(gain[name])]
        rows.append(
            {
                "claim": "a range of architectures fails",
                "seen": f"by Adam, {len(able)} of {len(zoo)} learn: {', '.join(able)}",
                "verdict": "false" if able else "not refuted",
            }
        )
    pixels, long = "long: pixels, MTT's SGD 100", "long: U-Net"
    judge(
        "phi only has to do what pixels do",
        [long, pixels],
        lambda: (
            "true of a phi that is large enough: it reaches the pixels"
            if np.mean(gain[long]) > np.mean(gain[pixels]) - 0.01
            else "not reached here"
        ),
    )
    judge(
        "noise in phi may help it",
        ["mended: no noise", mended],
        lambda: (
            "seen"
            if learns([a - b for a, b in zip(gain[mended], gain["mended: no noise"], strict=True)])
            else "not seen"
        ),
    )
    return rows
