"""How far parts of the data go, through each method: what notebook 05 learns, chooses and scores.

One protocol for all: the same student, the same number of steps (or, as a second budget, until it stops improving), the
same nested and stratified parts, every choice by validation accuracy. A method is a phi that learns on the part, an
augmentation of each step, or the one after the other. `settings.subset_repeats` parts of each size, with phis of their
own, make the repetitions that intervals are over; experts and the students' seeds are the same in all of them.
"""

import dataclasses
import itertools

import torch

from augdistill_core import DistillConfig, augmented, seeded, snapshots_every
from augdistill_report.data.augmentations import DIFFERENTIABLE, NEVER_FLIPPED, augmentation
from augdistill_report.data.instaaug import InstaAug
from augdistill_report.settings import Settings
from augdistill_report.studies.drift import Drift, shares
from augdistill_report.studies.unseen import CONDITIONED, POLICY, Repetition
from augdistill_report.work.distillation import Distillation
from augdistill_report.work.experts import load_trajectories
from augdistill_report.work.jobs import Subset
from augdistill_report.work.scoring import Evaluation, train_student
from augdistill_report.work.setup import Setup
from augdistill_report.work.statistics import Accuracy, difference, pooled

PLAIN, FULL, SOFT = "plain images", "all the data", "soft labels"

TAUGHT = "the experts' augmentation"  # hand-designed: what a policy that found all of it does

STRENGTHS = {"randaugment": ("eval_magnitude", (2, 9)), "instaaug": ("eval_reward", (1.0, 0.1))}  # to choose from

PROBABILITIES = (1.0, 0.5)  # of an augmentation, likewise

PIXELS = ("pixels (MTT)", "pixels (2018 loss)")

POLICIES = {  # of experts that were trained with an augmentation, by two draws
    "policy": POLICY,
    "U-Net and policy": f"{CONDITIONED}+{POLICY}",
    "pixels and policy": f"pixels+{POLICY}",
}

UNDER = "pixels and the experts' augmentation"  # which free images learn under, and students see them through

FOLLOWERS = (*POLICIES, UNDER)  # of such experts

USES = ((1.0, 1.0), (0.5, 1.0), (1.0, 0.5))  # a phi's strength and probability

STEPS_2018 = 3  # student steps of the dataset distillation of 2018, which takes one or a few


@dataclasses.dataclass(frozen=True)
class Method:
    """A row: through the phi that `learned` names (none: ""), then an augmentation; by which labels."""

    learned: str = ""
    augment: str = "none"
    labels: str = "hard"

    @property
    def of_experts(self) -> bool:
        """Whether it knows anything from experts, which saw all the data."""
        return bool(self.learned) or self.labels == "soft"

    def options(self, settings: Settings) -> list[dict]:
        """What the validation split may choose between, as changes of `EvalConfig`."""
        whole = self.learned in ("", "identity", *PIXELS, UNDER)  # nothing is left of an image that pixels have taken
        uses = [{}] if whole else [dict(phi_strength=s, phi_probability=p) for s, p in USES]
        key, values = STRENGTHS.get(self.augment, ("", ()))
        strengths = [{key: value} for value in values] or [{}]
        often = [] if self.augment in ("none", "instaaug") else PROBABILITIES  # InstaAug learns how much it does
        shares = [dict(eval_augment_probability=p) for p in often] or [{}]
        rates = [dict(eval_lr=rate) for rate in settings.lr_list]
        always = dict(eval_augment=self.augment, eval_labels=self.labels)
        return [always | a | b | c | d for a, b, c, d in itertools.product(rates, strengths, shares, uses)]


def methods(settings: Settings, fraction: float) -> dict[str, Method]:
    """The rows of the table at a fraction, in its order: `subset_rows`, or all; policies learn up to `policy_fraction`.

    A `ValueError` for a row that there is not.
    """
    every = every_method(settings)
    named = [part.strip() for part in settings.subset_rows.split(",") if part.strip()]
    if unknown := [name for name in named if name not in every]:
        known = ", ".join(name for name in every if name != PLAIN)
        raise ValueError(f"subset_rows={settings.subset_rows!r}: no row is {unknown[0]!r}; must be among {known}")
    small = fraction <= settings.policy_fraction
    return {
        name: method
        for name, method in every.items()
        if name == PLAIN or ((not named or name in named) and (small or name not in FOLLOWERS))
    }


def every_method(settings: Settings) -> dict[str, Method]:
    """Every row that a table can have, in its order."""
    crop = "crop" if settings.dataset in NEVER_FLIPPED else "crop and flip"
    return {
        PLAIN: Method(),
        "identity": Method("identity"),
        SOFT: Method(labels="soft"),
        TAUGHT: Method(augment=settings.taught_augment),
        "DSA": Method(augment="dsa"),
        crop: Method(augment="crop_flip"),
        "AutoAugment": Method(augment="autoaugment"),
        "RandAugment": Method(augment="randaugment"),
        "TrivialAugment": Method(augment="trivialaugment"),
        "InstaAug": Method(augment="instaaug"),
        **{name: Method(name) for name in PIXELS},
        settings.phi: Method(settings.phi),
        **{name: Method(name) for name in POLICIES},
        **({UNDER: Method(UNDER, settings.taught_augment)} if settings.taught_augment in DIFFERENTIABLE else {}),
        both(settings): Method(settings.phi, "randaugment"),
    }


def both(settings: Settings) -> str:
    """The row of phi with a policy, which is held against that policy alone."""
    return f"{settings.phi} and RandAugment"


@dataclasses.dataclass(frozen=True)
class Trial(Repetition):
    """One repetition in the world of `settings`: parts of its own, by `number`."""

    number: int = 0

    def setup(self, augment: str) -> Setup:
        """As for any repetition; the experts that were given, where they are of that kind."""
        return self.settings.select(Setup) if augment == self.settings.expert_augment else super().setup(augment)

    def subset(self, fraction: float) -> Subset:
        return Subset(self.settings.seed + self.number, fraction=fraction)

    def learned(self, fraction: float) -> dict[str, Distillation]:
        """The phis of a part, by the name that methods know them by."""
        s, part = self.settings, self.subset(fraction)
        batches = dict(iterations=s.subset_iterations, batch_syn=s.subset_batch)
        mtt = dataclasses.replace(s.pixel_config, **batches).to_dict()
        of_2018 = dict(objective="real_loss", alpha_mode="log", syn_steps=STEPS_2018, phi_lr=0.05) | batches
        ours = s.select(DistillConfig, **batches).to_dict()
        phis = {
            "identity": self.distillation("identity", part, s.expert_augment, **ours | {"iterations": 1}),
            PIXELS[0]: self.distillation("pixels", part, s.expert_augment, **mtt),
            PIXELS[1]: self.distillation("pixels", part, s.expert_augment, **of_2018),
            s.phi: self.distillation(s.phi, part, s.expert_augment, **ours),
        }
        late = dict(draws=2) | self.late
        phis |= {name: self.distillation(phi, part, s.taught_augment, **late) for name, phi in POLICIES.items()}
        needed = {method.learned for method in methods(s, fraction).values()}
        if UNDER in needed:
            under = self.distillation("pixels", part, s.taught_augment, **late)
            phis[UNDER] = dataclasses.replace(under, setup=dataclasses.replace(under.setup, augment=s.taught_augment))
        return {name: job for name, job in phis.items() if name in needed}

    def scored(self, method: Method, fraction: float, option: dict, **changes) -> Evaluation:
        """The evaluation of a method on a part, by an option of its own."""
        distilled = self.learned(fraction)[method.learned] if method.learned else None
        return self.evaluation(self.subset(fraction), distilled, **option | changes)


def trials(settings: Settings) -> list[Trial]:
    return [Trial(settings, number) for number in range(settings.subset_repeats)]


def choose(run, fractions: list[float]) -> dict[tuple[str, float], dict]:
    """Each method's option at each fraction, and that of all the data: the best on validation, of the first parts.

    phi with RandAugment has the RandAugment that is best alone, where that is a row.
    """
    settings, first = run.settings, trials(run.settings)[0]

    def best(candidates: dict[tuple[str, float], tuple[Method, list[dict]]]) -> dict:
        options = {
            (key, number): first.scored(method, key[1], option)
            for key, (method, several) in candidates.items()
            for number, option in enumerate(several)
        }
        return {key: candidates[key][1][number] for key, number in run.choose(options).items()}

    rows = {(name, f): method for f in fractions for name, method in methods(settings, f).items()}
    rows |= {(FULL, 1.0): Method()}
    last = {(name, f): method for (name, f), method in rows.items() if name == both(settings)}
    found = best({key: (method, method.options(settings)) for key, method in rows.items() if key not in last})

    def of_alone(f: float, options: list[dict]) -> list[dict]:
        alone = {key: value for key, value in found.get(("RandAugment", f), {}).items() if key != "eval_lr"}
        return [option for option in options if option.items() >= alone.items()]

    found |= best({(name, f): (m, of_alone(f, m.options(settings))) for (name, f), m in last.items()})
    return {key: found[key] for key in rows}


def evaluations(run, chosen: dict[tuple[str, float], dict], **changes) -> dict[tuple[str, float, int], Evaluation]:
    """The evaluations of every method at every fraction in every trial, each by the option that was chosen for it.

    All the data are the same in every trial: they are one row of the first.
    """
    jobs = {}
    for (name, f), option in chosen.items():
        method = methods(run.settings, f).get(name, Method())
        for trial in trials(run.settings)[: 1 if name == FULL else None]:
            jobs[name, f, trial.number] = trial.scored(method, f, option, **changes)
    return jobs


def budgets(settings: Settings) -> dict[str, dict]:
    """What other budgets than equal updates change, by name, where the settings ask for them.

    "until it stops": until validation stops improving, looked at four times as often. "DC-Bench": its protocol (Cui et
    al. 2022), so many passes over the part, whatever step size was chosen; the augmentation is that of the row.
    """
    patient = dict(eval_patience=settings.subset_patience, eval_steps=max(settings.subset_eval_steps // 4, 2))
    dc_bench = dict(eval_epochs=settings.subset_epochs, eval_batch=256, eval_lr=0.01)
    dc_bench |= dict(eval_momentum=0.9, eval_decay=5e-4)
    asked = {"until it stops": settings.subset_patience, "DC-Bench": settings.subset_epochs}
    return {name: how for name, how in {"until it stops": patient, "DC-Bench": dc_bench}.items() if asked[name]}


def at(scores: dict[tuple[str, float, int], Accuracy], fraction: float) -> dict[tuple[str, int], Accuracy]:
    """The scores at one fraction, by method and trial."""
    return {(name, k): score for (name, f, k), score in scores.items() if f == fraction}


def by_method(scores: dict[tuple[str, float, int], Accuracy]) -> dict[str, dict[float, Accuracy]]:
    """The scores of all trials together, by method and fraction."""
    series: dict[str, dict[float, Accuracy]] = {}
    for f in dict.fromkeys(f for _, f, _ in scores):
        for name, score in pooled(at(scores, f)).items():
            series.setdefault(name, {})[f] = score
    return series


def panels(settings: Settings, series: dict) -> dict[str, dict[str, dict[float, Accuracy]]]:
    """The curves of two pictures: what knows the part alone, and what learned on it from experts."""
    learned = [name for f in settings.fraction_list for name, m in methods(settings, f).items() if m.of_experts]
    return {
        "of the part alone": {name: scores for name, scores in series.items() if name not in learned},
        "learned from experts": {name: scores for name, scores in series.items() if name in [PLAIN, *learned]},
    }


def seconds(run, jobs: dict[tuple[str, float, int], Evaluation]) -> dict[tuple[str, float], tuple[float, float]]:
    """Of each method at each fraction: CPU seconds to learn it, and of an epoch of a student; means over trials."""
    found: dict[tuple[str, float], list] = {}
    for (name, f, _), job in jobs.items():
        images, c = len(job.subset.index(job.data)), job.config
        learning = run.seconds(job.distilled) if job.distilled else 0.0
        epoch = run.seconds(job) / c.eval_students / c.steps(images) * -(-images // c.eval_batch)
        found.setdefault((name, f), []).append((learning, epoch))
    return {key: tuple(sum(column) / len(column) for column in zip(*rows, strict=True)) for key, rows in found.items()}


def subset_table(scores: dict, chosen: dict, cost: dict, fraction: float) -> list[dict]:
    """The rows at one fraction: accuracy, gain over plain images with its 95 % interval, seconds, what was chosen."""
    here, rows = at(scores, fraction), []
    for name, score in pooled(here).items():
        learning, epoch = cost[name, fraction]
        rows.append(
            {
                f"{100 * fraction:g} % of the data": name,
                "test accuracy": str(score),
                "gain in points": "" if name == PLAIN else points(*difference(here, name, PLAIN)[:2]),
                "s to learn": f"{learning:.0f}" if learning else "",
                "s an epoch": f"{epoch:.2f}",
                "chosen": ", ".join(
                    f"{key.partition('_')[2].replace('_', ' ')} {value:g}"
                    for key, value in chosen[name, fraction].items()
                    if key not in ("eval_augment", "eval_labels")
                ),
            }
        )
    return rows


def gained(scores: dict, name: str, fraction: float) -> dict:
    """What a method adds to plain images at a fraction: mean, half of its 95 % interval, and over what."""
    mean, half, over = difference(at(scores, fraction), name, PLAIN)
    return {"gain": mean, "interval": half, "over": over}


def side_by_side(scores: dict, others: dict, budget: str) -> list[dict]:
    """Two budgets: accuracy with equal updates, and by another one, by method and fraction."""
    first, second, rows = by_method(scores), by_method(others), []
    for name, by_fraction in second.items():
        cells = {f"{100 * f:g} %": f"{first[name][f]}; {score}" for f, score in by_fraction.items()}
        rows.append({f"equal updates; {budget}": name} | cells)
    fractions = list(dict.fromkeys(key for row in rows for key in row))
    return [{key: row.get(key, "") for key in fractions} for row in rows]


def by_student(carried: dict[tuple[str, str, int], Accuracy]) -> dict[tuple[str, str], Accuracy]:
    """The scores of all trials together, by student and method."""
    return pooled({((student, name), k): score for (student, name, k), score in carried.items()})


def carried_over(carried: dict[tuple[str, str, int], Accuracy]) -> list[dict]:
    """A row a student: the accuracy of each method, and what it adds to plain images."""
    found, rows = by_student(carried), {}
    for (student, name), score in found.items():
        here = {(n, k): s for (own, n, k), s in carried.items() if own == student}
        gain = "" if name == PLAIN else f" ({points(*difference(here, name, PLAIN)[:2])})"
        rows.setdefault(student, {"student": student})[name] = f"{score}{gain}"
    return list(rows.values())


def points(mean: float, half: float) -> str:
    return f"{100 * mean:+.1f} ± {100 * half:.1f}"


def verdict(scores: dict, settings: Settings) -> str:
    """Who wins where, in words, from the numbers: paragraphs of Markdown.

    Two methods are told apart where their mean difference over trials (students, if there is one trial) exceeds half of
    its 95 % interval.
    """
    said, full, reached = [], pooled(at(scores, 1.0))[FULL], []
    for f in dict.fromkeys(f for name, f, _ in scores if name != FULL):
        here, rows = at(scores, f), methods(settings, f)
        by_hand = [name for name, m in rows.items() if m.augment != "none" and not m.learned]
        learned = [name for name, m in rows.items() if m.learned not in ("", "identity")]
        means = {name: score.mean for name, score in pooled(here).items()}
        best, hand, ours = (max(names, key=means.get, default="") for names in (means, by_hand, learned))
        near = ", ".join(f"*{name}*" for name in means if name != best and not significantly_better(here, best, name))
        said.append(
            f"**{100 * f:g} %**: *{best}* is best ({100 * means[best]:.1f} %; plain images {100 * means[PLAIN]:.1f} %),"
            f" {'not told apart from ' + near if near else 'told apart from all others'}."
        )
        pairs = {
            "The best that learned on the part against the best augmentation by hand: ": (ours, hand),
            "": (settings.phi, hand),
            "And ": (both(settings), "RandAugment"),
        }
        said[-1] += "".join(f" {w}{against(here, *pair)}." for w, pair in pairs.items() if means.keys() >= {*pair})
        if means[best] >= full.mean - full.std:
            reached.append(f"{100 * f:g} % through *{best}*")
    within = ", ".join(reached) or "no part through any method"
    return "\n\n".join([*said, f"All the data, plain, give {full}; not more than a deviation below that: {within}."])


def significantly_better(here: dict[tuple[str, int], Accuracy], one: str, other: str) -> bool:
    """Whether one method is better than the other by more than the interval of the difference."""
    mean, half, _ = difference(here, one, other)
    return mean > half


def against(here: dict[tuple[str, int], Accuracy], one: str, other: str) -> str:
    """One method against another, in words."""
    mean, half, _ = difference(here, one, other)
    word = "better" if mean > half else "worse" if mean < -half else "not told apart"
    return f"*{one}* against *{other}*: {points(mean, half)} points, {word}"


@torch.no_grad()
def pictures(run, fraction: float, chosen: dict, count: int = 8) -> tuple[dict[str, torch.Tensor], list[str]]:
    """What each method makes of the same images, one of each of a part's first classes: pixels, and their names."""
    settings, data, first = run.settings, run.data, trials(run.settings)[0]
    part = data.train.take(first.subset(fraction).index(data))
    index = torch.tensor([int((part.labels == c).nonzero()[0]) for c in range(min(count, len(data.classes)))])
    x, labels = part.images[index], part.labels[index]
    phis, rows = first.learned(fraction), {"x": x}
    for name, method in methods(settings, fraction).items():
        option, images, own = chosen[name, fraction], x, seeded(settings.seed, "picture")
        if method.learned:
            images = augmented(phis[method.learned].stored_phi(run.store).phi, images, labels, index, own)
        if method.augment == "instaaug":
            images = augmented(insta(first, fraction, option), images, labels, index, own)
        else:
            augment = augmentation(method.augment, data, option.get("eval_magnitude", 9))
            images = augmented(augment, images, labels, index, own)
        if name not in (PLAIN, "identity", SOFT):  # which are x
            rows[name] = images
    return {name: data.pixels(images) for name, images in rows.items()}, run.titles(part.take(index))


@torch.enable_grad()
def insta(trial: Trial, fraction: float, option: dict) -> InstaAug:
    """The InstaAug of the first student of its row."""
    job = trial.scored(Method(augment="instaaug"), fraction, option)
    part = job.data.train.take(job.subset.index(job.data))
    augment, seed = InstaAug(part.images, 0, reward=job.config.eval_reward), (job.setup.seed, "student", 0)
    train_student(job.student(), None, part.images, part.labels, job.config, *seed, augment=augment)
    return augment


def drifts(run, fraction: float, chosen: dict) -> dict[int, dict[str, tuple[float, float | None]]]:
    """What methods do not make up for on a part, by the step of the experts' way that students start from (`shares`).

    At the first, a middle and the last snapshot that has a next one, of the experts that policies follow.
    """
    first, rows = trials(run.settings)[0], methods(run.settings, fraction)
    names = [PLAIN, TAUGHT, "RandAugment", *FOLLOWERS]  # what else learns may follow other experts
    jobs = tuple((n, first.scored(rows[n], fraction, chosen[n, fraction])) for n in names if n in rows)
    setup = first.setup(run.settings.taught_augment)
    every, last = snapshots_every(len(run.data.train), setup)[0], load_trajectories(setup, run.store).snapshots - 2
    found = run.probe({start: Drift(setup, start, jobs) for start in (0, last // 2, last)})
    return {start * every: shares(f) for start, f in found.items()}


def drift_table(found: dict[int, dict[str, tuple[float, float | None]]], fraction: float) -> list[dict]:
    """A row a method, a column a place of the experts' way."""
    cell = {
        (name, step): f"{value:.2f}" + (f" ± {error:.2f}" if error is not None else "")
        for step, by_name in found.items()
        for name, (value, error) in by_name.items()
    }
    names = dict.fromkeys(name for name, _ in cell)
    return [{f"{100 * fraction:g} %": n} | {f"from step {step}": cell[n, step] for step in found} for n in names]


def other_students(run, fraction: float, chosen: dict) -> dict[tuple[str, str, int], Evaluation]:
    """phi, and what it is held against, for students of other architectures: jobs by student, method and trial."""
    settings, rows = run.settings, methods(run.settings, fraction)
    names = [PLAIN, "RandAugment", "pixels (MTT)", settings.phi, both(settings)]
    return {
        (student, name, t.number): t.scored(rows[name], fraction, chosen[name, fraction], eval_student=student)
        for student in ("convnet", *settings.student_list)
        for name in names
        if name in rows
        for t in trials(settings)
    }
