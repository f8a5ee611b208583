"""Notebook 05's protocol: what is learned, chosen and scored, by whom the test split is opened, what the tables say."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from augdistill_core import ConvNet, Phi, flatten, initial_parameters, logits_of, seeded, unflatten
from augdistill_report import open_run
from augdistill_report.commands import publish as gallery
from augdistill_report.commands.cli import main
from augdistill_report.commands.preflight import check_fractions, preflight
from augdistill_report.data.datasets import Sealed, load
from augdistill_report.settings import Settings, resolve
from augdistill_report.show import plots, subset_plots
from augdistill_report.studies import drift, subset_methods, subset_tables, subsets
from augdistill_report.studies.subset_methods import FULL, HAND, LEARNED, Method, every_method, methods
from augdistill_report.work import scoring, students
from augdistill_report.work.experts import load_trajectories
from augdistill_report.work.jobs import Subset
from augdistill_report.work.scoring import MAX_LOOKS, EvalConfig, Evaluation, Patience, Score, train_student
from augdistill_report.work.setup import Setup
from augdistill_report.work.statistics import (
    GAIN,
    Accuracy,
    Difference,
    brief,
    difference,
    gain,
    markdown_table,
    unpaired,
)
from augdistill_report.work.students import STUDENTS, accuracy, accuracy_of


class Opened(list):
    """Which code opened the test split, in turn."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run of the smoke preset with two subsets of one size: choices, scores, and when the test split was opened."""
    changes = dict(preset="smoke", out=str(tmp_path_factory.mktemp("run")), fractions="0.1", subset_repeats=2)
    run, opened, real = open_run("05_subset_evaluation", changes), Opened(), Sealed.opened
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sealed, "opened", lambda split: opened.append("opened") or real(split))
        chosen = subsets.choose(run, [0.1])
        learned = [(t.number, t.learned(0.1, chosen)) for t in subsets.trials(run.settings)]
        run.distill({(id, number): job for number, jobs in learned for id, job in jobs.items()})
        before = len(opened)
        jobs = subsets.evaluations(run, chosen)
        scores = run.evaluate(jobs)
    return dict(run=run, chosen=chosen, jobs=jobs, scores=scores, before=before, opened=len(opened))


# --- the test split ---------------------------------------------------------------------------------------------------


def test_nothing_but_the_last_scoring_opens_the_test_split(world):
    assert world["before"] == 0  # not what learns, and not what chooses
    different = {job.spec()["config"]["eval_augment"] + str(job.spec()) for job in world["jobs"].values()}
    assert world["opened"] == len(different)  # and each score once


def test_a_method_that_looks_at_a_test_image_fails(world):
    data, settings = world["run"].data, world["run"].settings
    student = settings.student(data)
    looks = {
        "images": lambda: data.test.images,
        "a part": lambda: data.test.take(slice(0, 3)).images,
        "batches": lambda: next(data.test.batches(8)).images,
        "made": data.test.made,
        "whitened or moved": lambda: data.to("cpu").test.images,
        "accuracy": lambda: accuracy(student, initial_parameters(student, 0), data.test),
    }
    for look in looks.values():
        with pytest.raises(ValueError, match="the test split is sealed: model selection uses train and validation"):
            look()

    def peeks(images, **_):
        return images + 0 * data.test.images[: len(images)]

    with pytest.raises(ValueError, match="sealed"):
        train_student(student, None, *both(data), EvalConfig(eval_steps=2), 0, augment=peeks)
    assert torch.equal(data.test.opened().raw, data.test.raw) and len(data.test.opened()) == len(data.test)


def both(data, count=20):
    part = data.train.take(slice(0, count))
    return part.images, part.labels


# --- the protocol -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phi", ["unet_noise", "unet"])
def test_no_two_methods_have_one_colour(phi):
    """A picture of the best of each group holds methods of all groups."""
    colours = [method.colour for method in every_method(resolve("digits", {"phi": phi}))]
    assert len(set(colours)) == len(colours)


def test_every_method_has_the_same_protocol(world):
    run, jobs = world["run"], dict(world["jobs"])
    rows = methods(run.settings, 0.1) | {FULL.id: FULL}
    assert {id for id, _, _ in jobs} == {*rows}
    free = {"eval_augment", "eval_labels", "eval_magnitude", "eval_reward", "eval_lr"}
    free |= {"eval_augment_probability", "phi_strength", "phi_probability"}
    everyone = sum(len(score.test) for (id, *_), score in world["scores"].items() if id == "none")
    assert jobs.pop((FULL.id, 1.0, 0)).config.eval_students == everyone == 4  # as many as each other row has
    same = [{k: v for k, v in job.config.to_dict().items() if k not in free} for job in jobs.values()]
    assert all(config == same[0] for config in same) and same[0]["eval_steps"] == run.settings.subset_eval_steps
    for (id, _, k), job in jobs.items():
        assert job.config.eval_augment == rows[id].augment
        assert job.subset == Subset(run.settings.seed + k, fraction=0.1)
        assert not job.distilled or job.distilled.subset == job.subset  # it learned on that very subset
    identity, plain = ([world["scores"][name, 0.1, k].test for k in (0, 1)] for name in ("identity", "none"))
    assert identity == plain


def test_subsets_are_nested_and_stratified():
    data, settings = load("digits", 8), resolve("smoke", {"subset_repeats": 3})
    for trial in subsets.trials(settings):
        parts = [set(trial.subset(f).index(data).tolist()) for f in (0.01, 0.1, 0.5)]
        assert parts[0] < parts[1] < parts[2]
        counts = torch.bincount(data.train.labels[trial.subset(0.1).index(data)])
        assert counts.min() >= counts.max() - 1 and len(counts) == 10
    first, second, _ = (t.subset(0.1).index(data).tolist() for t in subsets.trials(settings))
    assert first != second


def learned(settings):
    """The phis of the first repetition at 10 %, each with its first option."""
    options = {(id, 0.1): method.options(settings)[0] for id, method in methods(settings, 0.1).items()}
    return subsets.trials(settings)[0].learned(0.1, options)


PLAIN = Method("none", "no augmentation", "control", "black")

RANDAUGMENT_S_OWN = ("eval_magnitude", "eval_augment_probability")


def test_validation_chooses_and_the_best_option_is_the_one_that_is_scored(world):
    run, first = world["run"], subsets.trials(world["run"].settings)[0]
    for name, method in methods(run.settings, 0.1).items():
        options = method.options(run.settings)
        if name == "phi_randaugment":
            own = world["chosen"]["randaugment", 0.1]
            options = [o for o in options if all(o[key] == own[key] for key in RANDAUGMENT_S_OWN)]
        jobs = [first.scored(method, 0.1, option) for option in options]
        means = [sum(job.stored(run.store)[1]["validation"]) for job in jobs] if len(jobs) > 1 else [0.0]
        assert world["chosen"][name, 0.1] == options[means.index(max(means))]
    rows = methods(run.settings, 0.1)
    expected = [(magnitude, often) for magnitude in (2, 9) for often in (1.0, 0.5)]
    options = rows["randaugment"].options(run.settings)
    assert [tuple(o[key] for key in RANDAUGMENT_S_OWN) for o in options] == expected
    assert [o["eval_augment_probability"] for o in rows["dsa"].options(run.settings)] == [1.0, 0.5]
    assert [(o["phi_strength"], o["phi_probability"]) for o in rows["policy"].options(run.settings)] == [
        (1.0, 1.0),
        (0.5, 1.0),
        (1.0, 0.5),
    ]
    for learns_or_none in ("instaaug", "none", "identity", "pixels_mtt"):
        options = rows[learns_or_none].options(run.settings)
        assert not any({"eval_augment_probability", "phi_probability"} & set(option) for option in options)
    for taught in ("none", "randaugment", "affine"):  # as many choices as the same augmentation in its own row
        theirs = methods(dataclasses.replace(run.settings, taught_augment=taught), 0.1)
        count = {"none": 1, "randaugment": 4, "affine": 2}[taught]
        assert len(theirs["experts_augmentation"].options(run.settings)) == count
    rates = Settings(subset_lrs="0.01, 0.1")
    assert [o["eval_lr"] for o in rows["none"].options(rates)] == [0.01, 0.1]
    for wrong in ("", "0.1, x", "0", "-1", "inf"):
        with pytest.raises(ValueError, match=r"subset_lrs=.*must be different step sizes above 0"):
            Settings(subset_lrs=wrong)


def test_an_augmentation_is_applied_to_as_many_images_as_asked(world):
    run, first = world["run"], subsets.trials(world["run"].settings)[0]

    def job(**option):
        return first.scored(PLAIN, 0.1, option)

    never, half, always = (job(eval_augment="crop_flip", eval_augment_probability=p) for p in (0.0, 0.5, 1.0))
    plain, *others = (j.stored(run.store)[0]["0/features.0.weight"] for j in (job(), half, always))
    assert torch.equal(never.stored(run.store)[0]["0/features.0.weight"], plain)
    assert not any(torch.equal(plain, other) for other in others) and not torch.equal(*others)
    x = run.data.train.images[:200]
    changed = [j.augment()(x, generator=torch.Generator().manual_seed(0)) != x for j in (half, always)]
    low, high = (float(c.flatten(1).any(1).float().mean()) for c in changed)
    assert 0.38 < low / high < 0.62  # 3 deviations about .5; high is not 1: a crop may stay where it is
    assert job().augment() is None and job(eval_augment="instaaug").augment() is None


def test_the_second_budget_is_the_same_but_for_its_end(world):
    assert subsets.budgets(world["run"].settings) == {}
    settings = dataclasses.replace(world["run"].settings, subset_patience=2, subset_eval_steps=80)
    how = subsets.budgets(settings)
    assert list(how) == ["until it stops"]
    config = subsets.trials(settings)[0].scored(PLAIN, 0.1, {}, **how["until it stops"]).config
    assert (config.eval_patience, config.eval_steps) == (2, 20)


def test_dc_bench_s_budget_is_its_protocol_with_the_row_s_augmentation(world):
    settings = dataclasses.replace(world["run"].settings, subset_epochs=7)
    how = subsets.budgets(settings)
    assert list(how) == ["DC-Bench"]
    option = dict(eval_augment="dsa", eval_lr=0.5)
    config = subsets.trials(settings)[0].scored(PLAIN, 0.5, option, **how["DC-Bench"]).config
    assert (config.eval_batch, config.eval_lr, config.eval_momentum, config.eval_decay) == (256, 0.01, 0.9, 5e-4)
    assert config.eval_augment == "dsa" and config.steps(600) == 7 * 3  # batches of 256


def test_a_table_may_have_some_rows_only(world):
    def rows(text, fraction=0.1):
        return list(methods(dataclasses.replace(world["run"].settings, subset_rows=text), fraction))

    assert rows("") == [method.id for method in every_method(world["run"].settings) if not method.asked]
    assert rows("policy, dsa, identity") == ["none", "identity", "dsa", "policy"]
    assert rows("policy, dsa", 0.5) == ["none", "dsa"]  # above policy_fraction
    with pytest.raises(ValueError, match="subset_rows='dsa, dropout': unknown row 'dropout'; must be among identity, "):
        rows("dsa, dropout")
    assert rows("window") == ["none", "window"]  # only if it is asked for
    settings = dataclasses.replace(world["run"].settings, subset_rows="policy, identity")
    assert set(learned(settings)) == {"policy", "identity"}
    few = {key: score for key, score in world["scores"].items() if key[0] in ("none", "policy", "all")}
    assert "* compared with" not in subset_tables.verdict(dataclasses.replace(settings, subset_rows="policy"), few)


# --- until it stops improving -----------------------------------------------------------------------------------------


def test_patience_keeps_the_best_and_ends_after_two_plateaus():
    model, watch, seen = torch.nn.Linear(1, 1), Patience(2), []
    for look, value in enumerate([0.1, 0.5, 0.4, 0.5, 0.6, 0.2, 0.6, 0.9]):
        model.weight.data.fill_(look)
        seen.append((watch.is_over(model, value), watch.factor))
        if seen[-1][0]:
            break
    # .4 and .5 are no improvement: a tenth of the step; .2 and .6 are none either: the end, before .9
    assert seen == [(False, 1)] * 3 + [(False, 0.1)] * 3 + [(True, 0.1)]
    assert watch.best == 0.6 and watch.state["weight"].item() == 4
    ever = Patience(3)
    assert [ever.is_over(model, look / 100) for look in range(MAX_LOOKS)] == [False] * (MAX_LOOKS - 1) + [True]


def test_a_patient_student_is_the_best_it_was_on_validation(monkeypatch):
    data = load("digits", 8)
    student, (images, labels) = ConvNet(1, 10, 8, width=8, depth=2), both(data, 300)
    seen, real = [], students.accuracy

    def watched(model, theta, split):
        seen.append((real(model, theta, split), theta))
        return seen[-1][0]

    monkeypatch.setattr(students, "accuracy", watched)
    config = EvalConfig(eval_steps=5, eval_patience=1, eval_lr=0.2)
    model = train_student(student, None, images, labels, config, 3, validation=data.validation)
    values = [value for value, _ in seen]
    assert 3 <= len(values) <= MAX_LOOKS and not model.training
    best = seen[values.index(max(values))][1]
    assert torch.equal(flatten(model.parameters()), best) and max(values) > values[0]
    # the same steps as without patience, as long as the step size stands
    plain = EvalConfig(eval_steps=10, eval_lr=0.2)
    monkeypatch.setattr(students, "accuracy", real)
    monkeypatch.setattr(scoring, "MAX_LOOKS", 1)
    once = train_student(student, None, images, labels, config, 3, validation=data.validation)
    halfway = train_student(student, None, images, labels, plain, 3)  # its step size falls after 5
    assert not torch.equal(flatten(once.parameters()), flatten(halfway.parameters()))
    torch.testing.assert_close(flatten(once.parameters()), seen[0][1])


# --- other students ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STUDENTS)
@pytest.mark.parametrize("channels, size", [(1, 8), (3, 16)])
def test_other_students_take_small_images_and_have_weights_of_their_own(name, channels, size):
    student = STUDENTS[name](channels, 10, size)
    x = torch.randn(3, channels, size, size, generator=seeded(0))
    assert student(x).shape == (3, 10)
    theta = initial_parameters(student, 1)
    assert torch.equal(theta, initial_parameters(student, 1)) and not torch.equal(theta, initial_parameters(student, 2))
    if name == "mlp":  # against the formula
        pieces = unflatten(student, theta)
        h = x.flatten(1)
        for k, (w, b) in enumerate(zip(pieces[::2], pieces[1::2], strict=True)):
            h = F.linear(F.relu(h) if k else h, w, b)
        torch.testing.assert_close(logits_of(student, pieces, x), h)


def test_a_student_with_batch_norm_is_scored_with_the_statistics_that_it_learned(tmp_path):
    """Stored and read again, in its evaluation mode: one image's class does not hang on the others beside it."""
    run = open_run("other", {"preset": "smoke", "out": str(tmp_path)})
    job = run.evaluation(Subset(0, per_class=1), eval_student="resnet18", eval_steps=3, eval_students=2)
    assert run.choose({("a", 1): job}) == {"a": 1}  # stores the students
    models, validation = job.students(run.store, lambda done, total: None)
    assert not any(model.training for model in models) and int(models[0].bn1.num_batches_tracked) == 3
    assert validation == [accuracy_of(model, run.data.validation) for model in models]
    x = run.data.validation.images[:8]
    torch.testing.assert_close(models[0](x)[:1], models[0](x[:1]), rtol=1e-4, atol=1e-4)
    found = Score(job.setup, job).stored(run.store)[1]
    assert found["test"] == [accuracy_of(model, run.data.test.opened()) for model in models]
    fresh = job.trained(run.store, lambda done, total: None)[0]
    assert all(map(torch.equal, models[1].state_dict().values(), fresh[1].state_dict().values()))


def test_unknown_students_are_refused():
    with pytest.raises(ValueError, match="subset_students='mlp, vgg': must be among mlp, lenet, resnet18"):
        Settings(subset_students="mlp, vgg")
    with pytest.raises(ValueError, match="eval_student='vgg': must be one of convnet, mlp, lenet, resnet18"):
        EvalConfig(eval_student="vgg")


# --- what the tables say ----------------------------------------------------------------------------------------------


def made_up():
    """Three trials of three students: phi is significantly better than no augmentation, RandAugment is not."""
    values = {
        "none": [[0.50, 0.52, 0.51], [0.50, 0.50, 0.51], [0.50, 0.50, 0.50]],
        "randaugment": [[0.50, 0.62, 0.51], [0.50, 0.49, 0.50], [0.51, 0.51, 0.51]],
        "phi": [[0.80, 0.82, 0.81], [0.80, 0.80, 0.81], [0.80, 0.80, 0.80]],
    }
    return {(n, 0.1, k): Accuracy(v, v) for n, several in values.items() for k, v in enumerate(several)}


def test_differences_and_words_are_those_of_the_numbers():
    here, rows = subset_tables.at(made_up(), 0.1), methods(resolve("smoke"), 0.1)
    its = difference(here, "phi", "none")
    assert (its.mean, its.half, its.over) == (pytest.approx(0.3), None, "3 repetitions")
    assert not its.significant and its.verdict == "too few to say (n = 3 repetitions)"  # all equal: no spread
    # .0333, -.0067 and .01 on average: Student's t with two degrees of freedom is 4.30
    its = difference(here, "randaugment", "none")
    assert its.mean == pytest.approx(0.11 / 9) and its.half == pytest.approx(4.3027 * 0.020092 / 3**0.5, rel=1e-3)
    assert not its.significant and its.verdict == "not significantly different"
    assert subset_tables.compared(here, "randaugment", "none", rows) == (
        "*RandAugment* compared with *no augmentation*: +1.2 ± 5.0 points, not significantly different"
    )
    # all differences are the same, as on few test images: that is no interval of width 0
    assert subset_tables.compared(here, "none", "phi", rows).endswith(": -30.0 (n = 3 repetitions) points")
    assert (
        subset_tables.by_method(made_up())["randaugment"][0.1].test == [0.50, 0.62, 0.51, 0.50, 0.49, 0.50] + [0.51] * 3
    )


def test_words_about_one_method_alone_and_about_all_the_data_as_a_subset():
    """Nothing is different from no others; and all the data, with more students, are no row of their own subset."""
    settings = resolve("smoke", {"subset_rows": "dsa", "fractions": "0.5,1"})
    values = [0.5, 0.6, 0.55]
    scores = {("none", 0.5, 0): Accuracy(values, values), ("all", 1.0, 0): Accuracy(values * 2, values * 2)}
    words = subset_tables.verdict(settings, scores)
    assert (
        "55.0 % on the test split). Compared with all the data: " in words
        and "significantly different from" not in words
    )
    scores |= {(id, 1.0, k): Accuracy(values, values) for id in ("none", "dsa") for k in (0, 1)}
    table = subset_tables.subset_table(settings, scores, 1.0)
    assert [next(iter(row.values())) for row in table if GAIN in row] == ["no augmentation", "DSA"]
    assert "“all the data" not in subset_tables.headline(settings, scores, 1.0)


def test_equivalence_is_an_interval_within_half_a_point():
    """Welch's interval, beside scipy's own; a missing difference alone is not called equivalence."""
    few = [[0.980, 0.984, 0.982], [0.981, 0.983, 0.979], [0.981, 0.981, 0.980]]
    full = [0.9810, 0.9830, 0.9800, 0.9815, 0.9805]
    its = unpaired(few, full)
    means = [sum(v) / 3 for v in few]
    theirs = stats.ttest_ind(means, full, equal_var=False).confidence_interval(0.95)
    assert its.mean - its.half == pytest.approx(theirs.low) and its.mean + its.half == pytest.approx(theirs.high)
    assert its.over == "3 repetitions and 5 students"
    assert its.equivalent and its.verdict == "equivalent within 0.5 points"
    further = [[v - 0.004 for v in several] for several in few]
    assert unpaired(further, full).verdict == "significantly worse"
    scattered = [[v + shift for v in several] for several, shift in zip(few, (-0.01, 0, 0.01), strict=True)]
    assert not (its := unpaired(scattered, full)).equivalent and its.verdict == "not significantly different"
    assert unpaired(few[:1], full).over == "3 students and 5 students"
    for too_few in (unpaired(few[:2], full), unpaired(few, full[:2])):
        assert too_few.half is None and not too_few.equivalent and too_few.verdict.startswith("too few to say")
    assert unpaired([[0.6]] * 3, [0.5] * 3).half is None  # no spread: nothing can be said
    assert unpaired([[0.5]] * 3, [0.5] * 3) == Difference(0.0, 0.0, "3 repetitions and 3 students")
    scores = {("phi", 0.1, k): Accuracy(v, v) for k, v in enumerate(few)} | {("all", 1.0, 0): Accuracy(full, full)}
    scores |= {("none", 0.1, k): Accuracy(v, v) for k, v in enumerate(further)}
    words = subset_tables.verdict(resolve("smoke", {"subset_rows": "phi"}), scores)
    assert "*phi (unet_noise)* is best on validation (98.1 % on the test split; no augmentation" in words
    assert "Compared with all the data: +0.0 ± 0.2 points, equivalent within 0.5 points." in words
    # the row is picked on validation, whatever its test accuracy
    scores |= {("none", 0.1, k): Accuracy(v, [1.0] * 3) for k, v in enumerate(further)}
    words = subset_tables.verdict(resolve("smoke", {"subset_rows": "phi"}), scores)
    assert "*no augmentation* is best on validation (" in words and "is best (" not in words
    assert f"Compared with all the data: {unpaired(further, full)}" in words
    said = subset_tables.headline(resolve("smoke", {"subset_rows": "phi"}), scores, 0.1)
    assert "“no augmentation” is best on validation: " in said and said.count("no augmentation") == 1


def test_the_table_and_the_verdict_hold_the_numbers_of_the_results(world):
    run, scores = world["run"], world["scores"]
    cost, methods_here = subsets.seconds(run, world["jobs"]), methods(run.settings, 0.1)
    table = subset_tables.subset_table(run.settings, scores, 0.1)
    stored = subsets.bytes_stored(run, world["jobs"])
    costs = subset_tables.cost_table(run.settings, world["chosen"], cost, stored, 0.1)
    n = len(subsets.trials(run.settings)[0].subset(0.1).index(run.data))
    assert stored["none", 0.1] == n * (64 + 1) and stored["pixels_mtt", 0.1] == n * (4 * 64 + 1)
    pooled, stored, gains = (
        subset_tables.by_method(scores),
        subset_tables.as_results(scores),
        subset_tables.gains_by_method(scores),
    )
    first = "10 % (12 to 13 images a class)"
    groups = dict.fromkeys(f"**{method.group}**" for method in methods_here.values())
    assert [row[first] for row in table if len(row) == 1] == list(groups)
    assert [row[first] for row in costs] == [row[first] for row in table]
    table = [row for row in table if len(row) > 1]
    assert [row[first] for row in table] == [method.label for method in methods_here.values()]
    for row, (id, method) in zip(table, methods_here.items(), strict=True):
        assert row["test accuracy (n = 4 students)"] == str(pooled[id][0.1])
        assert stored[id]["0.1"]["values"] == pooled[id][0.1].test
        assert row[GAIN] == gain(subset_tables.at(scores, 0.1), id, "none")
        if id != "none":
            found = gains[id]["0.1"]
            assert row[GAIN] == f"{100 * found['gain']:+z.1f} (n = 2 repetitions)"
            assert found["over"] == "2 repetitions" and found["interval"] is None
        learning, epoch = cost[id, 0.1]
        assert epoch > 0 and (learning > 0) == bool(method.phi)
    assert markdown_table(table).count("\n") == len(table) + 2
    words = subset_tables.verdict(run.settings, scores)
    valid = {id: np.mean(series[0.1].validation) for id, series in pooled.items() if id != FULL.id}
    best = max(valid, key=valid.get)
    accuracy = f"{100 * pooled[best][0.1].mean:.1f} % on the test split"
    assert f"**{first}**: *{methods_here[best].label}* is best on validation ({accuracy}" in words
    # a picture of the best of each group: again on validation
    groups = {id: method.group for id, method in methods_here.items() if id != "none"}
    leading = subset_tables.leaders(run.settings, scores, 0.1)
    assert leading[0] == "none" and [groups[id] for id in leading[1:]] == list(dict.fromkeys(groups.values()))
    assert all(valid[id] == max(valid[other] for other in groups if groups[other] == groups[id]) for id in leading[1:])
    assert f"All the data, no augmentation: {pooled[FULL.id][1.0]}." in words
    assert "with n = 2 repetitions nothing is said about significance" in words and "significantly" not in words
    perfect = {("identity", 0.1, k): Accuracy([1.0, 1.0], [1.0, 1.0]) for k in (0, 1)}
    words = subset_tables.verdict(run.settings, scores | perfect)
    assert "*identity* is best on validation" in words and "*identity* compared" not in words  # it has learned nothing
    both = subset_tables.side_by_side(run.settings, scores, scores, "until it stops")
    assert both[1]["10 %"] == "; ".join(2 * [str(pooled["none"][0.1])]) and both[4]["100 %"]


def test_the_published_table_is_of_equal_updates():
    score = {"mean": 0.5, "std": 0.1, "n": 3, "values": [0.4, 0.5, 0.6]}
    found = {"none": {"0.01": score, "0.1": score}, "policy": {"0.01": score}}
    numbers = {
        "methods": {"none": "no augmentation", "policy": "policy"},
        "test accuracy": {"equal updates": found, "until it stops": {"policy": {"0.1": score}}},
        "gain over no augmentation": {"policy": {"0.01": {"gain": 0.02, "interval": 0.01, "over": "3 repetitions"}}},
    }
    assert gallery.subsets_table({"mine/05_subset_evaluation": {"numbers": numbers}}) == [
        {
            "test accuracy; gain (points, 95 % CI)": "no augmentation",
            "1 %": "50.0 ± 10.0 % (n = 3)",
            "10 %": "50.0 ± 10.0 % (n = 3)",
        },
        {
            "test accuracy; gain (points, 95 % CI)": "policy",
            "1 %": "50.0 ± 10.0 % (n = 3); +2.0 ± 1.0",
            "10 %": "",
        },
    ]


def test_the_published_differences_from_all_the_data_are_over_repetitions():
    ours = [0.50, 0.52, 0.61, 0.63, 0.70, 0.72]  # three repetitions of two students
    full = [0.80, 0.82, 0.81]
    scores = {"none": {"0.5": {"values": ours}}, "identity": {"0.5": {"values": full}}, "all": {"1": {"values": full}}}
    scores["policy"] = {"0.5": {"values": [0.81] * 6}}
    numbers = {"methods": {id: id.upper() for id in scores}, "test accuracy": {"equal updates": scores}}
    settings = {"subset_eval_steps": 3000, "subset_repeats": 3}
    rows = gallery.full_table({"mine/05_subset_evaluation": {"numbers": numbers, "settings": settings}})
    its = unpaired([ours[:2], ours[2:4], ours[4:]], full)
    assert [list(row.values()) for row in rows] == [["NONE", str(its)], ["POLICY", "+0.0 ± 2.5"]]
    assert list(rows[0]) == ["minus all the data (points, 95 % CI)", "mine, 50 %, 3,000 steps"]
    settings["subset_repeats"] = 1
    full[:] = [0.8101, 0.8100, 0.8102]
    (_, row) = gallery.full_table({"mine/05_subset_evaluation": {"numbers": numbers, "settings": settings}})
    assert row["mine, 50 %, 3,000 steps"] == "+0.0 ± 0.0 (equivalent)"


def test_a_method_is_added_in_one_place(world, monkeypatch):
    """A row in the list is in the table, the choices, every picture, the drifts and among the carried-over methods."""
    settings, (first, *_) = world["run"].settings, subsets.trials(world["run"].settings)
    policy = {method.id: method for method in every_method(settings)}["policy"]
    mine = dataclasses.replace(policy, id="mine", label="my method", colour="#123456", marker="<", small=False)
    mine = dataclasses.replace(mine, phi="policy+policy", augment="dsa", carried=True)
    quiet = dataclasses.replace(mine, id="quiet", label="quiet", phi="", drift=False, carried=False)
    real = every_method
    monkeypatch.setattr(subset_methods, "every_method", lambda s: [*real(s), mine, quiet])
    assert list(methods(settings, 0.5))[-2:] == ["mine", "quiet"]  # not only on small subsets
    assert list(methods(dataclasses.replace(settings, subset_rows="mine"), 0.1)) == ["none", "mine"]
    job = learned(settings)["mine"]
    assert job.phi == "policy+policy" and job.config.draws == 2 and job.setup.expert_augment == settings.taught_augment
    assert "quiet" not in learned(settings)
    option = mine.options(settings)[0]
    assert first.scored(mine, 0.1, option).distilled == job and option["eval_augment"] == "dsa"
    # what tables and pictures say
    chosen, ids = world["chosen"] | {(id, 0.1): option for id in ("mine", "quiet")}, ("mine", "quiet")
    scores = world["scores"] | {(id, 0.1, k): Accuracy([0.9, 0.9], [0.9, 0.9]) for id in ids for k in (0, 1)}
    table = subset_tables.subset_table(settings, scores, 0.1)
    here = [row["10 % (12 to 13 images a class)"] for row in table]
    assert here.index("**learned on the subset**") < here.index("my method") == here.index("quiet") - 1
    assert "*my method* is best on validation" in subset_tables.verdict(settings, scores)
    series, rows = subset_tables.by_method(scores), subset_tables.shown_rows(settings)
    full = series.pop(FULL.id)[1.0]
    panels = subset_tables.panels(settings, series)
    assert {"mine", "quiet"} < {id for title, ids in panels.items() if title.startswith(LEARNED) for id in ids}
    assert all("none" in ids and len(ids) <= 5 for ids in panels.values())  # and all the data: six lines
    history = [{"iteration": 0, "loss": 0.5, "alpha": 0.1}]
    moved = {0: {drift.NOISE: (0.1, None), "mine": (0.2, 0.1)}}
    for figure, label in (
        (subset_plots.by_fraction(panels, full, {0.1: "10 %"}, rows), "my method"),
        (plots.curves({("mine", "10 %"): history}, rows=rows), "my method, 10 %"),
        (subset_plots.drift_panels({"": {"": moved}}, drift.NOISE, rows), "my method"),
    ):
        lines = [
            h for axis in figure.axes for h, its in zip(*axis.get_legend_handles_labels(), strict=True) if its == label
        ]
        colours = [getattr(line, "lines", [line])[0].get_color() for line in lines]
        assert colours and set(colours) == {"#123456"}
    # the jobs that its flags ask for
    student = dataclasses.replace(settings, subset_students="mlp")
    carried = subsets.other_students(type("Run", (), {"settings": student}), 0.1, chosen)
    assert ("mlp", "mine", 0) in carried and ("mlp", "quiet", 0) not in carried
    asked = []
    watched = type("Run", (), dict(settings=settings, data=world["run"].data, store=world["run"].store))
    watched.probe = lambda jobs: asked.extend(jobs.values()) or {}
    subsets.drifts(watched, 0.1, chosen)
    assert all("mine" in dict(job.methods) and "quiet" not in dict(job.methods) for job in asked) and asked


@pytest.mark.parametrize("dataset", ["digits", "fashion"])
def test_methods_are_told_apart_in_every_picture(dataset):
    settings = resolve("smoke", {"dataset": dataset})
    rows = every_method(settings)
    for key in ("id", "label"):
        assert len({getattr(row, key) for row in rows}) == len(rows)
    for group in subset_methods.GROUPS:
        its = [row for row in rows if row.group == group or row.id == "none"]
        assert len({row.colour for row in its}) == len(its)
    assert len({row.colour for row in rows if row.drift}) == sum(row.drift for row in rows)
    assert all(row.colour == plots.COLOURS[row.label] for row in rows if row.label in plots.COLOURS)
    assert {row.id for row in rows if row.group == LEARNED and not row.phi} == {"instaaug"}
    assert all(row.follows in {"", *(other.id for other in rows)} for row in rows)
    assert {row.id for row in rows if row.group == HAND} >= {"dsa", "crop_flip", "randaugment"}


def test_pictures_show_each_method_on_the_same_images(world):
    run = world["run"]
    images, titles, note = subsets.pictures(run, 0.1, world["chosen"])
    changed = {row.label for row in methods(run.settings, 0.1).values() if row.group != "control"}
    assert titles == list("0123456789") and note == "shown: 1 of 12 to 13 images a class"
    assert set(images) == {"x", *changed} and len(changed) == 15
    assert all(shown.shape == (10, 1, 8, 8) and 0 <= shown.min() <= shown.max() <= 1 for shown in images.values())
    assert not any(torch.equal(images[name], images["x"]) for name in images if name != "x")
    insta = subsets.trained_instaaug(world["jobs"]["instaaug", 0.1, 0], run.store)
    assert not torch.equal(
        insta.ends(run.data.train.images[:2]), insta.limit * torch.sigmoid(insta.start.expand(2, -1, 2))
    )


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_method_that_changes_the_shape_or_returns_nan_is_named():
    data = load("digits", 8)
    student, (images, labels) = ConvNet(1, 10, 8, width=4, depth=1), both(data)

    class Halving(Phi):
        def forward(self, images, **_):
            return images[..., ::2]

    class Broken(Phi):
        def forward(self, images, **_):
            return images / 0 * 0

    config = EvalConfig(eval_steps=2)
    for method, message in (
        (Halving(), "Halving turned .* must keep it"),
        (Broken(), "Broken returns values that are not finite"),
    ):
        for options in (dict(phi=method), dict(phi=None, augment=method)):
            with pytest.raises(ValueError, match=message):
                train_student(student, images=images, labels=labels, config=config, **options)


def test_a_phi_that_was_trained_for_another_data_set_is_refused():
    setup = Setup(size=8)
    world = subsets.trials(resolve("smoke"))[0]
    job = learned(world.settings)["phi"]
    for changes, ours in (
        (dict(dataset="fashion", size=8), "fashion, 8, False"),
        (dict(size=16), "digits, 16, False"),
        (dict(size=8, zca=True), "digits, 8, True"),
    ):
        with pytest.raises(ValueError, match=f"phi 'unet_noise' was trained on digits, 8, False: not for {ours}"):
            Evaluation(dataclasses.replace(setup, **changes), job.subset, EvalConfig(), job)
    Evaluation(dataclasses.replace(setup, experts=3), job.subset, EvalConfig(), job)  # the images are the same


@pytest.mark.parametrize("fractions", ["0", "-0.1", "1.5", "nan", "0.1, 2", "a", ""])
def test_impossible_fractions_are_refused(fractions):
    with pytest.raises(ValueError, match=rf"fractions={fractions!r}: must be different numbers in \(0, 1\]"):
        Settings(fractions=fractions)


def test_a_fraction_that_leaves_a_class_empty_is_refused_where_fractions_are_used(capsys):
    few = ["report", "--preset", "smoke", "--set", "fractions=0.1, 0.002"]
    assert main([*few, "--only", "05"]) == 2
    said = capsys.readouterr().err
    assert "fractions='0.1, 0.002': fraction=0.002: leaves class 0 of digits empty; it has 124 images" in said
    least = float(said.rpartition("must be at least ")[2])
    settings = resolve("smoke", {"fractions": f"0.1, {least}"})
    check_fractions(settings)
    with pytest.raises(ValueError, match="leaves class"):
        check_fractions(dataclasses.replace(settings, fractions=f"{least - 0.001}"))
    preflight(resolve("smoke", {"fractions": "0.002"}))  # for the other notebooks


# --- what there is to match -------------------------------------------------------------------------------------------


def test_drifts_are_of_the_rows_that_follow_the_same_experts(world):
    run, chosen = world["run"], world["chosen"]
    found = subsets.drifts(run, 0.1, chosen)
    experts = load_trajectories(subsets.trials(run.settings)[0].setup(run.settings.taught_augment), run.store)
    every = -(-len(run.data.train) // run.settings.expert_batch)  # a snapshot an epoch
    assert list(found) == [0, every * ((experts.snapshots - 2) // 2), every * (experts.snapshots - 2)]
    rows = ["none", "experts_augmentation", "randaugment"]
    rows += ["policy", "unet_policy", "pixels_policy", "pixels_augmented"]
    for by_name in found.values():
        assert list(by_name) == [drift.NOISE, *rows]
        assert all(error is not None for _, error in by_name.values())
    table = subset_tables.drift_table(run.settings, found, 0.1)
    labels = [methods(run.settings, 0.1)[id].label for id in rows]
    assert [row["10 % (12 to 13 images a class)"] for row in table if len(row) > 1] == [drift.NOISE, *labels]
    value, error = found[0]["none"]
    assert table[2]["from step 0"] == f"{value:.2f} ± {error:.2f}"


def test_one_size_is_a_picture_of_its_own():
    scores = {name: Accuracy([0.5, 0.52, 0.54], [0.5] * 3) for name in ("no augmentation", "policy")}
    (axis,) = subset_plots.accuracy_dots(scores, Accuracy([0.6, 0.62], [0.6, 0.6])).axes
    assert [t.get_text() for t in axis.get_yticklabels()] == [f"{name}   52.0 ± 2.0 %" for name in scores]
    assert 0.5 < axis.get_xlim()[1] - axis.get_xlim()[0] < 20 and axis.get_xlim()[0] > 40  # near to one another


def test_a_number_that_goes_on_for_pages_is_cut():
    assert brief({"loss": 0.5}) == "loss 0.5"
    text = brief([{"row": "a", "value": k} for k in range(500)])
    assert text.startswith("row a, value 0, row a, value 1, ") and text.endswith("... (all of it is in the file)")
    assert len(text) < 440
