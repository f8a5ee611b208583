"""What notebook 05 shows of its scores: tables, panels of figures, and a verdict in words, group by group.

Every method of the table is in one of few groups. A table has a line before each group, a figure a panel for each.
"""

import itertools
from collections.abc import Iterable

import torch

from augdistill_report.settings import Settings
from augdistill_report.studies.drift import NOISE
from augdistill_report.studies.subset_methods import (
    CONTROL,
    FULL,
    GROUPS,
    HAND,
    IMAGES,
    LEARNED,
    NONE,
    PHI,
    Method,
    shown_rows,
)
from augdistill_report.studies.subsets import EQUAL, Key
from augdistill_report.work.distillation import Distillation
from augdistill_report.work.jobs import Subset
from augdistill_report.work.statistics import GAIN, Accuracy, Difference, difference, gain, pooled, unpaired


def percent(fraction: float) -> str:
    return f"{100 * fraction:g} %"


def sized(settings: Settings, fraction: float) -> str:
    """A fraction with what it is: "1 % (4 images a class)", or "(4 to 5 images a class)" where classes differ."""
    data = settings.load()
    sizes = torch.bincount(data.train.labels[Subset(settings.seed, fraction=fraction).index(data)]).tolist()
    count = f"{min(sizes)} to {max(sizes)}" if min(sizes) < max(sizes) else f"{max(sizes)}"
    return f"{percent(fraction)} ({count} image{'s' * (max(sizes) > 1)} a class)"


def at(scores: dict[Key, Accuracy], fraction: float) -> dict[tuple[str, int], Accuracy]:
    """The scores at one fraction, by method and trial, without those of all the data."""
    return {(id, k): score for (id, f, k), score in scores.items() if f == fraction and id != FULL.id}


def of_all(scores: dict[Key, Accuracy]) -> Accuracy:
    """The students with all the data and no augmentation."""
    return pooled({(id, k): score for (id, _, k), score in scores.items() if id == FULL.id})[FULL.id]


def by_method(scores: dict[Key, Accuracy]) -> dict[str, dict[float, Accuracy]]:
    """The scores pooled over all trials, by method and fraction."""
    series: dict[str, dict[float, Accuracy]] = {}
    for one, f in dict.fromkeys((id, f) for id, f, _ in scores):
        own = {(id, k): score for (id, fraction, k), score in scores.items() if (id, fraction) == (one, f)}
        series.setdefault(one, {})[f] = pooled(own)[one]
    return series


def as_results(scores: dict[Key, Accuracy]) -> dict[str, dict[str, dict]]:
    """The scores as a notebook stores them: a `summary` by method and fraction."""
    return {id: {f"{f:g}": score.numbers() for f, score in series.items()} for id, series in by_method(scores).items()}


def gains_by_method(scores: dict[Key, Accuracy]) -> dict[str, dict[str, dict]]:
    """The gain of each method over no augmentation, by method and fraction: mean, half the 95 % interval, over what."""
    found: dict[str, dict[str, dict]] = {}
    for id, f in dict.fromkeys((id, f) for id, f, _ in scores if id not in (NONE, FULL.id)):
        found.setdefault(id, {})[f"{f:g}"] = as_gain(difference(at(scores, f), id, NONE))
    return found


def as_gain(its: Difference) -> dict:
    """A difference as a notebook stores it."""
    return {"gain": its.mean, "interval": its.half, "over": its.over}


def over_followed(settings: Settings, scores: dict[Key, Accuracy]) -> dict[str, dict[float, Difference]]:
    """The accuracy of each method minus that of the method that it follows, by its id and fraction."""
    rows, keys = shown_rows(settings), dict.fromkeys((id, f) for id, f, _ in scores)
    found: dict[str, dict[float, Difference]] = {}
    for id, f in keys:
        other = rows[id].follows
        if other != NONE and (other, f) in keys:
            found.setdefault(id, {})[f] = difference(at(scores, f), id, other)
    return found


MOST = 6  # lines in one panel of a picture that one can still follow, with no augmentation and all the data


def by_group(settings: Settings, ids: Iterable[str]) -> dict[str, list[str]]:
    """The methods of each panel of a picture, by its title, the group: no augmentation is in each."""
    rows, found = shown_rows(settings), {}
    for group in GROUPS:
        members = [id for id in ids if id in rows and id not in (NONE, FULL.id) and rows[id].group == group]
        found |= {title: [NONE, *part] for title, part in titled(group, members, MOST - 2).items()}
    return found or {CONTROL: [NONE]}


def titled(title: str, names: list, most: int) -> dict[str, list]:
    """The names in order, in as few and as equal panels as possible, each of at most `most`, by the panel's title."""
    count = -(-len(names) // most)
    ends = [round(len(names) * k / count) for k in range(count + 1)] if count else []
    parts = [names[start:end] for start, end in itertools.pairwise(ends)]
    return {title if count == 1 else f"{title} ({k} of {count})": part for k, part in enumerate(parts, 1)}


def panels(settings: Settings, series: dict) -> dict[str, dict[str, dict[float, Accuracy]]]:
    """The curves of each panel of the accuracy figure (`by_group`)."""
    return {title: {id: series[id] for id in ids} for title, ids in by_group(settings, series).items()}


def drift_groups(settings: Settings, found: dict[int, dict[str, tuple]]) -> dict[str, dict[int, dict[str, tuple]]]:
    """What `drifts` found, for each panel of its figure (`by_group`)."""
    ids = list(dict.fromkeys(id for by_name in found.values() for id in by_name))
    return {
        title: {step: {id: by_name[id] for id in [NOISE, *members]} for step, by_name in found.items()}
        for title, members in by_group(settings, ids).items()
    }


def loss_curves(settings: Settings, learned: dict[Key, Distillation], results: dict, draws: int) -> dict[str, dict]:
    """Histories of the phis that match trajectories with so many draws, in the first trial, by panel and (id, size).

    A panel is a subset, with at most `MOST` lines.
    """
    rows, found = shown_rows(settings), {}
    for (id, f, k), job in learned.items():
        how = (job.config.objective, job.config.draws)
        if k == 0 and rows[id].group != CONTROL and how == ("trajectory", draws):
            found.setdefault(f, []).append(id)
    return {
        title: {id: results[id, f, 0].history for id in part}
        for f, ids in found.items()
        for title, part in titled(sized(settings, f), ids, MOST).items()
    }


def grouped(settings: Settings, rows: dict[str, dict]) -> list[dict]:
    """Rows of a table by method id, group by group: a line with its name comes before each group."""
    table, known = [], shown_rows(settings)
    for group in GROUPS:
        members = [row for id, row in rows.items() if id in known and known[id].group == group]
        table += [{next(iter(members[0])): f"**{group}**"}, *members] if members else []
    return table


CHOSEN = {  # the keys of an option, as a table names them
    "eval_lr": "step size",
    "eval_magnitude": "magnitude",
    "eval_reward": "reward",
    "eval_augment_probability": "augmentation probability",
    "eval_candidate": "candidate",
    "label_share": "experts' share of labels",
    "window": "window of difficulty",
    "phi_strength": "phi strength",
    "phi_probability": "phi probability",
}


def subset_table(settings: Settings, scores: dict, fraction: float) -> list[dict]:
    """The table rows at one fraction: accuracy, and gain over no augmentation."""
    here, known = at(scores, fraction), shown_rows(settings)
    rows = {
        id: {
            sized(settings, fraction): known[id].label,
            f"test accuracy (n = {len(score.test)} students)": str(score),
            GAIN: gain(here, id, NONE),
        }
        for id, score in pooled(here).items()
    }
    return grouped(settings, rows)


def cost_table(settings: Settings, chosen: dict, cost: dict, stored: dict, fraction: float) -> list[dict]:
    """The table rows at one fraction: CPU seconds, bytes stored, and the selected option."""
    rows, known = {}, shown_rows(settings)
    for (id, f), (learning, epoch) in cost.items():
        if f == fraction and id != FULL.id:
            options = [f"{what} {chosen[id, f][key]:g}" for key, what in CHOSEN.items() if key in chosen[id, f]]
            rows[id] = {
                sized(settings, fraction): known[id].label,
                "CPU seconds to learn": f"{learning:.0f}" if learning else "",
                "CPU seconds per student epoch": f"{epoch:.2f}",
                "bytes stored": f"{stored[id, f]:,}",
                "selected on validation": ", ".join(options),
            }
    return grouped(settings, rows)


def side_by_side(settings: Settings, scores: dict, others: dict, budget: str) -> list[dict]:
    """Accuracy with equal updates and with another budget, by method and fraction."""
    first, rows = by_method(scores), shown_rows(settings)
    table = {
        id: {f"{EQUAL}; {budget}": rows[id].label}
        | {percent(f): f"{first[id][f]}; {score}" for f, score in series.items()}
        for id, series in by_method(others).items()
    }
    return grouped(settings, table)


MOST_NAMED = 4  # most methods that a sentence lists


def best(here: dict[tuple[str, int], Accuracy], ids: Iterable[str] = ()) -> str:
    """The method (of `ids`, if given) with the highest mean validation accuracy; "" if there is none.

    The method that is best of many on the test split would owe some of that to chance.
    """
    means = {id: sum(score.validation) / len(score.validation) for id, score in pooled(here).items()}
    return max((id for id in means if id in ids or not ids), key=means.get, default="")


def leaders(settings: Settings, scores: dict[Key, Accuracy], fraction: float) -> list[str]:
    """No augmentation, and the method of each group that is best on validation at a fraction, in order."""
    here, rows = at(scores, fraction), shown_rows(settings)
    ids = [id for id in pooled(here) if id != NONE]
    groups = ([id for id in ids if rows[id].group == group] for group in GROUPS)
    return [NONE, *(best(here, members) for members in groups if members)]


def headline(settings: Settings, scores: dict[Key, Accuracy], fraction: float) -> str:
    """The sentence that sums up a fraction: the method that is best on validation, with its test accuracy."""
    here, rows, full = at(scores, fraction), shown_rows(settings), of_all(scores)
    means, id = pooled(here), best(here)
    plain = f"no augmentation has {means[NONE]}, " if id != NONE else ""
    name = f"With {sized(settings, fraction)} of the data “{rows[id].label}” is best on validation"
    return f"{name}: {means[id]} on the test split; {plain}all the data {full}."


def verdict(settings: Settings, scores: dict[Key, Accuracy]) -> str:
    """What the scores say at each fraction: paragraphs of Markdown, from the numbers.

    Methods are picked by validation accuracy. Two methods differ significantly if the 95 % interval of their mean
    difference over trials (over students, if there is one trial) excludes 0.
    """
    said, full, rows = [], of_all(scores), shown_rows(settings)
    for f in dict.fromkeys(f for id, f, _ in scores if id != FULL.id):
        here = at(scores, f)
        means, first = {id: score.mean for id, score in pooled(here).items()}, best(here)
        over = {id: difference(here, first, id) for id in means if id != first}
        near = [id for id, its in over.items() if not its.significant]
        unlike = ", significantly different from all others (95 % interval excludes 0)" if over else ""
        if near:
            unlike = ", not significantly different from " + ", ".join(f"*{rows[id].label}*" for id in near)
        if len(near) > MOST_NAMED:
            baseline = f", *{rows[NONE].label}* among them" if NONE in near else ""
            unlike = f", not significantly different from {len(near)} of {len(means) - 1} others{baseline}"
        if near and all(over[id].half is None for id in near):
            unlike = f"; with n = {over[near[0]].over} nothing is said about significance"
        its = unpaired([score.test for (id, _), score in here.items() if id == first], full.test)
        said.append(
            f"**{sized(settings, f)}**: *{rows[first].label}* is best on validation ({100 * means[first]:.1f} % on the "
            + (f"test split; {rows[NONE].label} {100 * means[NONE]:.1f} %" if first != NONE else "test split")
            + f"){unlike}. Compared with all the data: {its.words}."
        )
        learned = [id for id in means if rows[id].group in (LEARNED, IMAGES)]
        designed = [id for id in means if rows[id].group == HAND]
        ours, hand = (best(here, group) if group else "" for group in (learned, designed))
        pairs = {(ours, hand): "The best method learned on the subset, and the best hand-designed augmentation: "}
        pairs |= {pair: "" for pair in [(PHI, hand)] if pair not in pairs}
        said[-1] += "".join(f" {w}{compared(here, *p, rows)}." for p, w in pairs.items() if means.keys() >= {*p})
    return "\n\n".join([*said, f"{FULL.label.capitalize()}: {full}."])


def compared(here: dict[tuple[str, int], Accuracy], one: str, other: str, rows: dict[str, Method]) -> str:
    """A sentence that compares one method with another."""
    return f"*{rows[one].label}* compared with *{rows[other].label}*: {difference(here, one, other).words}"


def changes_table(settings: Settings, changes: dict[str, dict[float, Difference]]) -> list[dict]:
    """What one change adds (`over_followed`), in words, by method and fraction."""
    rows = shown_rows(settings)
    return [
        {"method": rows[id].label, "minus (points, 95 % CI)": rows[rows[id].follows].label}
        | {percent(f): its.words.replace(" points", "") for f, its in by.items()}
        for id, by in changes.items()
    ]


def by_student(carried: dict[tuple[str, str, int], Accuracy]) -> dict[str, dict[tuple[str, int], Accuracy]]:
    """The scores of each student, by method and trial."""
    found: dict[str, dict[tuple[str, int], Accuracy]] = {}
    for (student, id, k), score in carried.items():
        found.setdefault(student, {})[id, k] = score
    return found


def carried_over(settings: Settings, carried: dict[tuple[str, str, int], Accuracy]) -> list[dict]:
    """One column per student: the accuracy of each method, with its gain over no augmentation (points) in brackets."""
    rows, table = shown_rows(settings), {}
    for student, here in by_student(carried).items():
        for id, score in pooled(here).items():
            row = table.setdefault(id, {"test accuracy (gain in points, 95 % CI)": rows[id].label})
            row[student] = f"{score}" if id == NONE else f"{score} ({gain(here, id, NONE)})"
    return grouped(settings, table)


def drift_table(settings: Settings, found: dict[int, dict[str, tuple]], fraction: float) -> list[dict]:
    """One row per method, one column per start on the expert trajectory."""
    rows, table = shown_rows(settings), {}
    for step, by_name in found.items():
        for id, (value, error) in by_name.items():
            row = table.setdefault(id, {sized(settings, fraction): rows[id].label if id in rows else id})
            row[f"from step {step}"] = f"{value:.2f}" + (f" ± {error:.2f}" if error is not None else "")
    return [table.pop(NOISE), *grouped(settings, table)]
