"""The methods of the subset table (notebook 05): a `Method` is one row, and `every_method` is the one list of them.

A row says how its phi learns, how students train, what is selected on the validation split, and how tables and figures
show it. To add a method, add a `Method` to the list in `every_method`; nothing else is needed.
"""

import dataclasses
import itertools
from collections.abc import Callable

from augdistill_core import DistillConfig
from augdistill_report.data.augmentations import DIFFERENTIABLE, NEVER_FLIPPED
from augdistill_report.settings import Settings
from augdistill_report.show.plots import COLOURS, look
from augdistill_report.studies.unseen import CONDITIONED, POLICY, Repetition
from augdistill_report.work.difficulty import PLACES
from augdistill_report.work.statistics import BASELINE

CONTROL, HAND, SELECTED = "control", "hand-designed", "selected images"
LEARNED, IMAGES = "learned on the subset", "distilled images"

GROUPS = (CONTROL, HAND, SELECTED, LEARNED, IMAGES)  # in the order of every table and figure

# alternatives that the validation split selects from, as changes of settings; the first wins a tie
MAGNITUDES = ({"eval_magnitude": 2}, {"eval_magnitude": 9})  # of RandAugment

REWARDS = ({"eval_reward": 1.0}, {"eval_reward": 0.1})  # of InstaAug, for wide ranges

APPLIED = ({"eval_augment_probability": 1.0}, {"eval_augment_probability": 0.5})  # of an augmentation

USES = tuple(dict(phi_strength=s, phi_probability=p) for s, p in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.5)))  # of a phi

MIXES = tuple(dict(label_share=share) for share in (0.5, 0.75, 1.0))  # of the experts in initial labels

WINDOWS = tuple(dict(window=place) for place in PLACES)  # of difficulty

COPIES = ({"eval_copies": 10},)  # with so many, a 10 % subset holds as many images as all the data

STEPS_2018 = 3  # student steps of the dataset distillation of 2018, which uses one or a few


# --- how a phi learns on a subset: changes of `DistillConfig` ---------------------------------------------------------


def batches(repetition: Repetition) -> dict:
    return dict(iterations=repetition.settings.subset_iterations, batch_syn=repetition.settings.subset_batch)


def by_own_settings(repetition: Repetition) -> dict:
    """The run's own settings."""
    return repetition.settings.select(DistillConfig, **batches(repetition)).to_dict()


def one_iteration(repetition: Repetition) -> dict:
    """The run's own settings, with one iteration: for a phi without parameters."""
    return by_own_settings(repetition) | {"iterations": 1}


def by_mtt(repetition: Repetition) -> dict:
    """MTT's objective, for free images (pixels)."""
    return dataclasses.replace(repetition.settings.pixel_config, **batches(repetition)).to_dict()


def by_2018(repetition: Repetition) -> dict:
    """The objective of 2018, for free images (pixels): the loss on real images after a few student steps."""
    return dict(objective="real_loss", alpha_mode="log", syn_steps=STEPS_2018, phi_lr=0.05) | batches(repetition)


def by_two_draws(repetition: Repetition) -> dict:
    """Two-draw matching on late segments of the expert trajectories."""
    return dict(draws=2) | repetition.late


# --- the rows ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the subset table. Students train on `augment`(phi(x)) for x of a subset, with phi's or soft labels.

    id: its key in results, and its name in `subset_rows`
    label, colour, marker, line: how every table and figure shows it (matplotlib's terms)
    group: one of `CONTROL`, `HAND`, `LEARNED`, `IMAGES`, `SELECTED`
    phi: the phi that learns on the subset, any name in PHIS ("" = none)
    recipe: how it learns: a function of the repetition that returns changes of `DistillConfig`
    experts: the augmentation that its experts were trained with
    under: the augmentation inside the unroll ("" = the run's own)
    augment, labels: of the students' training, as in `EvalConfig`
    choices: what is selected on the validation split, besides the step size: a tuple of alternatives per choice, each
        a change of `EvalConfig`, of `DistillConfig`, or of the subset (`window`)
    follows: the id of the method that it is compared with, and whose selected alternatives it keeps; only other choices
        are selected for it (if that method is not in the table: of the one that that one follows)
    asked: whether it is in the table only if `subset_rows` names it
    small: whether it learns only on subsets up to `policy_fraction`, because it is slow
    drift: whether it is in the drift table, where each student step has its own draw (so not fixed copies)
    carried: whether students of other architectures are trained by it too
    """

    id: str
    label: str
    group: str
    colour: str
    marker: str = "o"
    line: str = "-"
    phi: str = ""
    recipe: Callable[[Repetition], dict] | None = None
    experts: str = ""
    under: str = ""
    augment: str = "none"
    labels: str = "hard"
    choices: tuple[tuple[dict, ...], ...] = ()
    follows: str = ""
    asked: bool = False
    small: bool = False
    drift: bool = False
    carried: bool = False

    def options(self, settings: Settings) -> list[dict]:
        """All alternatives for the selection on the validation split, as changes of settings (and `window`)."""
        rates = [dict(eval_lr=rate) for rate in settings.lr_list]
        always = dict(eval_augment=self.augment, eval_labels=self.labels)
        return [
            always | {k: v for change in changes for k, v in change.items()}
            for changes in itertools.product(rates, *self.choices)
        ]


NONE, PHI = "none", "phi"  # ids: of the baseline of every gain (no augmentation), and of the run's own phi

EXPERTS = "experts' augmentation"

MIXED, LEARNED_LABELS = "mixed_labels", "learned_labels"  # ids of real images with such labels

FULL = Method("all", "all the data, no augmentation", CONTROL, "#222222")


def random_ranges(settings: Settings) -> tuple[dict, ...]:
    """Candidates of random ranges: as many as can be scored for what a policy's training costs, at least two.

    The exact gradient of a student step takes at least nine forward passes of multiplications, ordinary training three.
    """
    s, draws = settings, 2
    learning = 3 * s.policy_iterations * draws * s.syn_steps * s.subset_batch
    count = round(learning / (s.eval_students * s.subset_eval_steps * s.eval_batch))
    return tuple(dict(eval_candidate=k) for k in range(max(2, count)))


def every_method(settings: Settings) -> list[Method]:
    """Every row that the table can have, group by group."""
    given, taught = settings.expert_augment, settings.taught_augment
    crop = "crop" if settings.dataset in NEVER_FLIPPED else "crop and flip"
    of_taught = {"none": (), "randaugment": (MAGNITUDES, APPLIED)}.get(taught, (APPLIED,))
    own = dict(phi=settings.phi, recipe=by_own_settings, experts=given, carried=True)
    late = dict(recipe=by_two_draws, experts=taught, small=True, drift=True)
    randaugment = dict(augment="randaugment", choices=(MAGNITUDES, APPLIED))
    both, under = dict(phi=f"{CONDITIONED}+{POLICY}"), dict(phi="pixels", under=taught, augment=taught)
    soft = dict(labels="soft", augment=taught, choices=of_taught, asked=True)
    labels = dict(augment=taught, choices=(MIXES, *of_taught), asked=True)
    learned = labels | late | dict(under=taught, drift=False)
    known = COLOURS  # of labels that other notebooks show too
    orange, blue, green, sky, pink, brown = "#d55e00", "#0072b2", "#009e73", "#56b4e9", "#cc79a7", "#8c6d31"
    rows = [
        Method(NONE, BASELINE, CONTROL, known[BASELINE], drift=True, carried=True),
        Method("identity", "identity", CONTROL, known["identity"], "s", ":", "identity", one_iteration, given),
        Method("soft_labels", "soft labels", CONTROL, known["soft labels"], "D", labels="soft"),
        Method(
            "experts_augmentation", EXPERTS, HAND, known[EXPERTS], "s", augment=taught, choices=of_taught, drift=True
        ),
        Method("dsa", "DSA", HAND, pink, "D", augment="dsa", choices=(APPLIED,)),
        Method("crop_flip", crop, HAND, sky, "^", augment="crop_flip", choices=(APPLIED,)),
        Method("autoaugment", "AutoAugment", HAND, green, "v", augment="autoaugment", choices=(APPLIED,)),
        Method("randaugment", "RandAugment", HAND, orange, "P", **randaugment, drift=True, carried=True),
        Method("trivialaugment", "TrivialAugment", HAND, brown, "X", augment="trivialaugment", choices=(APPLIED,)),
        # it learns together with the student, also how often it applies each transformation
        Method("instaaug", "InstaAug", LEARNED, brown, "*", augment="instaaug", choices=(REWARDS,)),
        Method(
            "pixels_mtt", "pixels (MTT)", IMAGES, known["pixels (MTT)"], "^", "-", "pixels", by_mtt, given, carried=True
        ),
        Method(
            "pixels_2018", "pixels (2018 loss)", IMAGES, known["pixels (2018 loss)"], "v", "-", "pixels", by_2018, given
        ),
        Method(PHI, f"phi ({settings.phi})", LEARNED, look(settings.phi).colour, "P", choices=(USES,), **own),
        Method("policy", "policy", LEARNED, sky, "X", choices=(USES,), phi=POLICY, **late),
        Method("unet_policy", "U-Net + policy", LEARNED, blue, "*", choices=(USES,), **both, **late),
        Method("pixels_policy", "pixels + policy", IMAGES, "#000000", choices=(USES,), phi=f"pixels+{POLICY}", **late),
        Method(
            *("pixels_augmented", f"pixels + {EXPERTS}", IMAGES, pink, "h"),
            **dict(choices=of_taught, follows="experts_augmentation") | under | late,
        ),
        # the run's phi, learned as those images are
        Method(
            *("phi_augmented", f"phi ({settings.phi}) + {EXPERTS}", LEARNED, "#4059ad", "P", "--", settings.phi),
            **dict(choices=(*of_taught, USES), follows="experts_augmentation", under=taught, augment=taught) | late,
            asked=True,
        ),
        # the controls of a policy, real images with other labels, images and labels together, images selected
        Method(
            *("random_policy", "policy, random ranges", HAND, "#999933", "d", ":"),
            **dict(augment="random_policy", choices=(random_ranges(settings), APPLIED), follows="policy", asked=True),
        ),
        Method(
            *("policy_copies", "policy, ten fixed copies", LEARNED, "#88ccee", "d", ":", POLICY),
            **late | dict(choices=(USES, COPIES), follows="policy", asked=True, drift=False),
        ),
        Method(
            *("soft_augmented", f"soft labels + {EXPERTS}", CONTROL, "#999933", "D", ":"),
            **soft | dict(follows="experts_augmentation"),
        ),
        Method(
            *(MIXED, f"mixed labels + {EXPERTS}", CONTROL, "#117733", "s", "--", "labels_mixed", one_iteration, taught),
            **labels | dict(follows="experts_augmentation"),
        ),
        Method(
            *(LEARNED_LABELS, f"learned labels + {EXPERTS}", LEARNED, "#44aa99", "o", "-", "labels"),
            **learned | dict(follows=MIXED),
        ),
        Method(
            *("pixels_mixed", f"pixels, mixed labels + {EXPERTS}", IMAGES, "#882255", "s", "--", "labels_mixed+pixels"),
            **learned | dict(follows=MIXED),
        ),
        # the images of `pixels_augmented`, which learned with hard labels; the experts label what students see
        Method(
            *("pixels_soft", f"pixels, soft labels + {EXPERTS}", IMAGES, "#aa4499", "D", ":", "pixels"),
            **late | soft | dict(under=taught, drift=False, follows="soft_augmented"),
        ),
        Method(
            *("pixels_learned", f"pixels, learned labels + {EXPERTS}", IMAGES, "#cc3311", "o", "-", "labels+pixels"),
            **learned | dict(follows=LEARNED_LABELS),
        ),
        Method(
            *("unet_learned", f"U-Net, learned labels + {EXPERTS}", LEARNED, "#332288", "o", "-", "labels+unet_noise"),
            **learned | dict(choices=(MIXES, *of_taught, USES), follows=LEARNED_LABELS),
        ),
        Method("window", "best window", SELECTED, "#882255", "v", choices=(WINDOWS,), asked=True),
        Method(
            *("window_augmented", f"best window + {EXPERTS}", SELECTED, "#332288", "s", "--"),
            **dict(augment=taught, choices=(WINDOWS, *of_taught), follows="window", asked=True),
        ),
        Method(
            *("window_mixed", f"best window, mixed labels + {EXPERTS}", SELECTED, "#666699", "o", "-"),
            **labels | dict(choices=(WINDOWS, MIXES, *of_taught), follows="window_augmented"),
            **dict(phi="labels_mixed", recipe=one_iteration, experts=taught),
        ),
        Method(
            *("phi_randaugment", f"phi ({settings.phi}) + RandAugment", LEARNED, "#6a3d9a", "d"),
            **dict(augment="randaugment", choices=(MAGNITUDES, APPLIED, USES), follows="randaugment"),
            **own,
        ),
    ]
    known_rows = [row for row in rows if not row.under or row.under in DIFFERENTIABLE]
    known_rows = known_rows if settings.subset_by == "random" else [in_window(row) for row in known_rows]
    return sorted(known_rows, key=lambda row: GROUPS.index(row.group))


def in_window(row: Method) -> Method:
    """The row on a window of difficulty: where it lies is selected for no augmentation, and kept by all others."""
    choices = row.choices if WINDOWS in row.choices else (*row.choices, WINDOWS)
    return dataclasses.replace(row, choices=choices, follows="" if row.id == NONE else row.follows or NONE)


def methods(settings: Settings, fraction: float) -> dict[str, Method]:
    """The rows of the table at a fraction by id, in order: no augmentation, and those in `subset_rows`.

    If it is empty, all rows that need not be asked for.

    A `ValueError` names an unknown row.
    """
    every = {method.id: method for method in every_method(settings)}
    named = [name.strip() for name in settings.subset_rows.split(",") if name.strip()]
    if unknown := [name for name in named if name not in every]:
        known = ", ".join(name for name in every if name != NONE)
        raise ValueError(f"subset_rows={settings.subset_rows!r}: unknown row {unknown[0]!r}; must be among {known}")
    small = fraction <= settings.policy_fraction
    there = [
        id
        for id, method in every.items()
        if id == NONE or ((id in named if named else not method.asked) and (small or not method.small))
    ]
    return linked(every, there)


def linked(every: dict[str, Method], there: list[str]) -> dict[str, Method]:
    """The rows `there` of a table by id. A row whose followed row is left out follows the one that that one follows."""

    def followed(method: Method) -> str:
        other = method.follows
        while other and other not in there:
            other = every[other].follows
        return other

    return {id: dataclasses.replace(every[id], follows=followed(every[id])) for id in there}


def shown_rows(settings: Settings) -> dict[str, Method]:
    """The rows of all fractions by id, and the row of all the data, for figures and tables."""
    found = {id for f in settings.fraction_list for id in methods(settings, f)}
    every = {method.id: method for method in every_method(settings)}
    return linked(every, [id for id in every if id in found]) | {FULL.id: FULL}
