"""A phi for unseen images: what is trained and scored on what, soft labels, choices, statistics over repetitions."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from augdistill_core import (
    Added,
    Stored,
    flatten,
    initial_parameters,
    logits_of,
    make_phi,
    seeded,
    train_experts,
    unflatten,
)
from augdistill_report import open_run
from augdistill_report.commands.preflight import preflight
from augdistill_report.data.augmentations import RandomAffine
from augdistill_report.files.store import Store
from augdistill_report.run import picture
from augdistill_report.settings import Settings, resolve
from augdistill_report.show import plots, subset_plots
from augdistill_report.studies import unseen, why
from augdistill_report.studies.grid import sweep_table
from augdistill_report.work import statistics
from augdistill_report.work.experts import load_trajectories
from augdistill_report.work.jobs import Subset
from augdistill_report.work.probes import Probe, probe
from augdistill_report.work.scoring import EvalConfig, Evaluation, teacher_of, train_student
from augdistill_report.work.statistics import Accuracy


@pytest.fixture(scope="module")
def world():
    return unseen.Repetition(resolve("smoke", {"eval_students": 2}))


def test_no_phi_of_episodes_is_scored_on_an_image_that_it_met():
    for seed in range(3):
        settings = resolve("digits", {"seed": seed})
        data, world = settings.load(), unseen.Repetition(settings)
        met, few = (set(s.index(data).tolist()) for s in (world.rest, world.few))
        assert not met & few
        assert len(met) == pytest.approx(0.8 * len(data.train), rel=0.01) and len(few) == 10
    for job in world.episodes().values():
        assert job.subset == world.rest and job.config.episode == 1 and job.config.alpha_mode == "held"


def test_repetitions_have_seeds_of_their_own():
    settings = resolve("smoke", {"unseen_repeats": 3, "seed": 5, "taught_augment": "dsa"})
    worlds = unseen.repetitions(settings)
    assert [world.settings.seed for world in worlds] == [5, 6, 7]
    assert {job.setup.seed for world in worlds for job in world.ranges().values()} == {5, 6, 7}
    jobs = worlds[0].ranges()
    assert {name: (job.setup.expert_augment, job.config.draws) for name, job in jobs.items()} == {
        "two draws": ("dsa", 2),
        "ordinary loss": ("dsa", 1),
        "two draws, experts without augmentation": ("none", 2),
    }
    # late: as far as the experts' way allows, or as told
    assert {job.config.max_start_epoch for job in jobs.values()} == {3}  # 4 snapshots, M = 1
    late = unseen.Repetition(dataclasses.replace(settings, policy_max_start_epoch=2))
    assert late.ranges()["two draws"].config.max_start_epoch == 2
    with pytest.raises(ValueError, match=r"policy_max_start_epoch=4: .* start epochs in \[0, 3\]"):
        preflight(dataclasses.replace(settings, policy_max_start_epoch=4))
    many = unseen.Repetition(dataclasses.replace(settings, images_per_class=50))
    with pytest.raises(ValueError, match=r"images_per_class=50: must be at most 20% of the smallest class of digits"):
        many.episodes()
    # what a row is called, it is, whatever else is set
    other = unseen.Repetition(dataclasses.replace(settings, draws=3, episode=1, alpha_mode="raw")).ranges()
    assert [job.config.draws for job in other.values()] == [2, 1, 2]
    assert {(job.config.episode, job.config.alpha_mode) for job in other.values()} == {(0, "held")}


def test_the_truth_is_what_the_experts_augmentation_draws():
    affine = RandomAffine()
    expected = dict(rotation=affine.rotation, scale=affine.scale, shift_x=affine.shift, shift_y=affine.shift)
    assert (
        unseen.truth(Settings(taught_augment="affine"))
        == unseen.truth(Settings(taught_augment="flip_affine"))
        == expected
    )
    assert unseen.truth(Settings(taught_augment="flip_affine", dataset="fashion")) == expected | {"flip": 0.5}
    assert unseen.truth(Settings(taught_augment="dsa")) == unseen.truth(Settings(taught_augment="none")) == {}


def test_soft_labels_are_the_experts_mean_probabilities(world):
    settings = world.settings
    data, student = settings.load(), settings.student(settings.load())
    experts = train_experts(student, data.train.images, data.train.labels, settings, 0)
    x = data.validation.take(slice(0, 5)).images
    teacher = teacher_of(experts)
    expected = sum(
        logits_of(student, unflatten(student, way[-1]), x).softmax(1) / len(experts.theta) for way in experts.theta
    )
    torch.testing.assert_close(teacher(x), expected)
    # one step from the same start, against plain torch: the loss is the cross entropy with those probabilities
    config, train = EvalConfig(eval_steps=2, eval_lr=0.1, eval_momentum=0, eval_decay=0), data.train.take(slice(0, 6))
    end = train_student(student, None, train.images, train.labels, config, 3, teacher=teacher)
    theta = [p.detach().clone().requires_grad_() for p in unflatten(student, initial_parameters(student, seeded(3)))]
    for lr in (0.1, 0.01):
        log = F.log_softmax(logits_of(student, theta, train.images), 1)
        loss = -(teacher(train.images).detach() * log).sum(1).mean()
        theta = [
            (p - lr * g).detach().requires_grad_() for p, g in zip(theta, torch.autograd.grad(loss, theta), strict=True)
        ]
    torch.testing.assert_close(flatten(end.parameters()), flatten(theta), rtol=1e-4, atol=1e-6)


def test_soft_labels_are_used_where_they_are_asked_for(world, tmp_path):
    store = Store(tmp_path)
    hard, soft = (world.evaluation(world.few, eval_labels=kind) for kind in ("hard", "soft"))
    assert hard.spec() != soft.spec()
    assert hard.stored(store)[1] != soft.stored(store)[1]


@pytest.mark.parametrize("name", ["unet_class_noise", "unet_class+policy", "unet", "mlp_noise"])
def test_what_a_phi_stores_and_what_it_adds(name):
    images = torch.randn(6, 1, 8, 8, generator=seeded(0))
    phi = make_phi(name, images, 3, 0)
    with torch.no_grad():
        for p in phi.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=seeded(1)))
    given = dict(labels=torch.tensor([2, 0, 1, 1, 0, 2]), index=torch.arange(6))
    out = Stored(phi)(images, generator=seeded(2), **given)
    assert torch.equal(out, phi(torch.zeros_like(images), generator=seeded(2), **given))
    assert torch.equal(out, Stored(phi)(images + 1, generator=seeded(2), **given)) and out.abs().sum() > 0
    added = Added(phi)(images, generator=seeded(2), **given)
    assert torch.equal(added, phi(images, generator=seeded(2), **given) - images) and added.abs().sum() > 0
    for control in (Stored(phi), Added(phi)):
        assert (control.conditional, control.stochastic) == (phi.conditional, phi.stochastic)


def test_a_control_is_another_evaluation(world, tmp_path):
    store, jobs = Store(tmp_path), world.episodes()
    for name, only in unseen.ALONE.values():
        whole, alone = world.evaluation(world.few, jobs[name]), world.evaluation(world.few, jobs[name], only=only)
        assert isinstance(alone, Evaluation) and whole.spec() != alone.spec()
        assert alone.stored(store)[1] != whole.stored(store)[1]
    for distilled, kind in ((jobs["conditioned U-Net"], "bias"), (None, "stored"), (None, "added")):
        with pytest.raises(ValueError, match=f"only='{kind}': must be empty, or 'stored' or 'added' with"):
            world.evaluation(world.few, distilled, only=kind)


def test_what_a_phi_holds_is_counted_in_images(world):
    data = world.settings.load()
    assert unseen.holds(make_phi("pixels", data.train.images[:7], 10, 0), data) == 7
    assert unseen.holds(make_phi("identity", data.train.images[:7], 10, 0), data) == 0


def test_the_validation_split_chooses(tmp_path):
    run, rates = open_run("choice", {"preset": "smoke", "out": str(tmp_path)}), (1e-9, 0.05)
    part = Subset(0, fraction=0.5)
    options = {(n, lr): run.evaluation(part, eval_lr=lr, eval_steps=n) for n in (5, 40) for lr in rates}
    options["a tie", 1] = options["a tie", 2] = options[40, 0.05]
    best = run.choose(options)
    validation = {key: sum(job.stored(run.store)[1]["validation"]) for key, job in options.items()}
    assert best == {n: max(rates, key=lambda lr, n=n: validation[n, lr]) for n in (5, 40)} | {"a tie": 1}
    assert best[40] == 0.05  # who learns is better than who stands still


def test_strength_and_probability_reach_the_students(world, tmp_path):
    store, job = Store(tmp_path), world.ranges()["two draws"]
    full, off, half = (
        world.evaluation(world.few, job, **use) for use in ({}, {"phi_probability": 0.0}, {"phi_strength": 0.5})
    )
    plain = Evaluation(world.setup(world.settings.taught_augment), world.few, off.config, None)
    assert off.stored(store)[1] == plain.stored(store)[1]
    ends = [job.stored(store)[0]["0/classifier.weight"] for job in (full, off, half)]
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(ends, 2))


def test_statistics_over_repetitions():
    scores = {
        ("phi", 0): Accuracy([0.9, 0.8], [0.7, 0.7]),
        ("plain", 0): Accuracy([0.5, 0.6], [0.5, 0.5]),
        ("phi", 1): Accuracy([0.7, 0.9], [0.6, 0.6]),
        ("plain", 1): Accuracy([0.6, 0.5], [0.5, 0.5]),
        ("phi", 2): Accuracy([0.7, 0.7], [0.6, 0.6]),
        ("plain", 2): Accuracy([0.5, 0.5], [0.5, 0.5]),
    }
    found = statistics.pooled(scores)
    assert found["phi"].test == [0.9, 0.8, 0.7, 0.9, 0.7, 0.7] and found["plain"].validation == [0.5] * 6
    # over the three repetitions: .3, .25 and .2; Student's t with two degrees of freedom is 4.303
    assert statistics.gain(scores, "phi", "plain") == f"+25.0 ± {100 * 4.30265 * 0.05 / 3**0.5:.1f}"
    assert statistics.difference(scores, "phi", "plain").over == "3 repetitions"
    assert statistics.gain(scores, "plain", "plain") == ""
    # against scipy's own interval
    pair = [scores["phi", k] - scores["plain", k] for k in (0, 1, 2)]
    expected = stats.ttest_1samp([p["mean"] for p in pair], 0).confidence_interval()
    its = statistics.difference(scores, "phi", "plain")
    assert (its.mean - its.half, its.mean + its.half) == pytest.approx((expected.low, expected.high))


def test_one_value_has_no_deviation_and_warns_of_nothing(recwarn):
    one, other = Accuracy([0.9], [0.9]), Accuracy([0.5], [0.5])
    assert str(one) == "90.0 (n = 1) %" and one.std == 0
    assert statistics.summary([0.5]) == {"mean": 0.5, "std": None, "n": 1, "values": [0.5]}
    assert statistics.shown(statistics.summary([0.5])) == "50.0 % (n = 1)"
    its = statistics.difference({("a", 0): one, ("b", 0): other}, "a", "b")
    assert str(its) == "+40.0 (n = 1 student)" and not its.significant
    assert statistics.mean_and_std([0.25], ".2f") == "0.25 (n = 1)"
    cell = {"panel": "", "row": "a", "point": {"seed": 0}, "numbers": {"gain": statistics.summary([0.1])}}
    assert "| a | 0.1 (n = 1) | 1 |" in sweep_table([cell])
    assert picture(plots.heat_map([cell], "gain")) and picture(plots.bars({"a": one}))
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]


@pytest.mark.parametrize("gap, other", [(0.5, 0.0), (0.001, 0.001)])
def test_of_two_values_nothing_is_said_about_significance(gap, other):
    """The interval of two is 9 times their deviation: huge, or 0 where they happen to agree."""
    own = Accuracy([0.1 + gap, 0.1 + gap + other], [0, 0]), Accuracy([0.1, 0.1], [0, 0])
    its = statistics.difference({("a", 0): own[0], ("b", 0): own[1]}, "a", "b")
    assert its.half is None and not its.significant and its.verdict == "too few to say (n = 2 students)"
    several = {(name, k): score for k in (0, 1) for name, score in zip("ab", own, strict=True)}
    assert statistics.difference(several, "a", "b").verdict == "too few to say (n = 2 repetitions)"


def test_no_number_is_shown_as_minus_zero():
    small = Accuracy([0.4996, 0.49962, 0.49958], [0.5] * 3), Accuracy([0.5] * 3, [0.5] * 3)
    its = statistics.difference({("a", 0): small[0], ("b", 0): small[1]}, "a", "b")
    assert its.mean < 0 and str(its) == "+0.0 ± 0.0"
    assert statistics.mean_and_std([-0.04, -0.02]) == "0.0 ± 0.0"
    assert statistics.shown(statistics.summary([-0.0004])) == "0.0 % (n = 1)"
    assert why.gain_points([-0.0004, -0.0002]) == "+0.0 ± 0.0 points"


def test_a_mean_is_rounded_alike_in_sentences_and_tables():
    """A measured case on the edge: the mean of the percentages is 52.1499..., 100 times the mean 52.1500..."""
    measured = [0.5233, 0.5227, 0.5256, 0.5175, 0.5172, 0.5223, 0.5273, 0.5191, 0.5185]
    text, table = str(Accuracy(measured, measured)), statistics.shown(statistics.summary(measured))
    assert text == "52.2 ± 0.4 %" and table == f"{text} (n = 9)"


def test_ranges_over_the_last_quarter():
    histories = [
        [{"iteration": i, "phi": {"rotation": 0.1 * 2.0**-i, "flip": 0.5}} for i in range(8)],
        [{"iteration": i, "phi": {"rotation": 0.2, "flip": 0.25}} for i in range(2)],
    ]
    found = unseen.recovered(histories)
    assert found["rotation"] == pytest.approx([0.1 * 2**-6.5, 0.2]) and found["flip"] == pytest.approx([0.5, 0.25])
    assert statistics.mean_and_std([0.1, 0.2], ".3f") == "0.150 ± 0.071"
    figure = subset_plots.ranges({"a": histories, "b": histories[1:]}, {"rotation": 0.15})
    assert [len(axis.lines) for axis in figure.axes] == [5, 3]  # kinds by histories, and one truth
    unknown = subset_plots.ranges({"a": histories}, {})
    assert {t.get_text() for t in unknown.axes[0].get_legend().get_texts()} == {"rotation (rad)", "flip (probability)"}
    assert {t.get_text() for t in figure.axes[1].get_legend().get_texts()} == {
        "rotation (rad)",
        "not in the experts' augmentation",
    }


def test_a_subset_that_skips_is_what_follows(world):
    data = resolve("digits").load()
    for part in (0.3, 0.2, 1 / 3, 0.5):
        first, then = data.subset(4, fraction=part), data.subset(4, fraction=1 - part, skip=part)
        assert sorted([*first.tolist(), *then.tolist()]) == list(range(len(data.train)))
    then = data.subset(4, fraction=0.7, skip=0.3)
    assert Subset(4, fraction=0.7, skip=0.3).index(data).tolist() == then.tolist()
    with pytest.raises(ValueError, match="skip=1"):
        data.subset(4, fraction=0.1, skip=1.0)
    with pytest.raises(ValueError, match=r"fraction=0\.8: class 0 .*less \d+ skipped"):
        data.subset(4, fraction=0.8, skip=0.3)


# --- what the loss knows of a range -----------------------------------------------------------------------------------


def test_the_loss_is_looked_at_around_the_experts_own_ranges(world, tmp_path):
    job, truth, store = world.ranges()["two draws"], {"rotation": 0.2, "shift_x": 0.1}, Store(tmp_path)
    probes = unseen.around(job, truth)
    assert set(probes) == {(kind, f) for kind in truth for f in (0.0, 0.5, 1.0, 1.5, 2.0)}
    assert dict(probes["rotation", 1.5].ranges) == {"rotation": pytest.approx(0.3), "shift_x": 0.1}
    assert probes["rotation", 1.0] == probes["shift_x", 1.0]  # made once
    job.run(store)
    phi = job.stored_phi(store).phi
    one = dataclasses.replace(probes["rotation", 0.0], segments=2)
    found = one.stored(store)[1]
    phi.hold({"rotation": 0.0, "shift_x": 0.1})
    train = world.settings.load().train.take(job.subset.index(world.settings.load()))
    alpha = job.stored(store)[1]["alpha"]
    expected = probe(phi, alpha, train, load_trajectories(job.setup, store), job.config, 2, job.setup.seed)
    assert found == expected
    learned = Probe(job.setup, job, segments=2).stored(store)[1]
    assert learned["loss"] != expected["loss"] and learned["identity"] == expected["identity"]  # on the same segments


def test_valleys_are_paired_by_segment():
    def found(loss):
        return {"loss": loss, "variance": [0.1, 0.2]}

    probes = {
        ("rotation", 0.0, 0): found([1.1, 2.3]),
        ("rotation", 0.0, 1): found([1.2, 2.2]),
        ("rotation", 1.0, 0): found([1.0, 2.0]),
        ("rotation", 1.0, 1): found([1.0, 2.0]),
    }
    curves = unseen.valleys(probes)
    mean, error = curves["rotation"][0.0]
    assert mean == pytest.approx(0.2) and error == pytest.approx(torch.tensor([0.1, 0.3, 0.2, 0.2]).std().item() / 2)
    assert curves["rotation"][1.0] == (0.0, 0.0)
    assert subset_plots.range_losses(curves).axes[0].get_xlabel().startswith("range")
