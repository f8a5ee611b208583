"""Rows that must be asked for: learned labels, images selected by difficulty, and the controls of a policy."""

import dataclasses
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from augdistill_core import Applied, ConvNet, labels_under, make_phi, seeded
from augdistill_report import open_run
from augdistill_report.data.augmentations import RANDOM_RANGES, augmentation
from augdistill_report.data.datasets import load
from augdistill_report.files.phi_files import load_phi, open_phi, rebuilt
from augdistill_report.settings import resolve
from augdistill_report.show.subset_plots import changes_by_subset
from augdistill_report.studies import subset_tables, subsets
from augdistill_report.studies.subjects import stored_bytes
from augdistill_report.studies.subset_methods import NONE, every_method, methods, random_ranges
from augdistill_report.work.difficulty import PLACES, Difficulty
from augdistill_report.work.scoring import EvalConfig, Evaluation, teacher_of, train_student
from augdistill_report.work.statistics import Accuracy, Difference

ASKED = [method.id for method in every_method(resolve("smoke")) if method.asked]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    rows = ", ".join([*ASKED, "policy", "experts_augmentation"])
    changes = dict(preset="smoke", fractions="0.1", subset_rows=rows, width=4, taught_augment="dsa")
    run = open_run("05_subset_evaluation", changes | dict(out=str(tmp_path_factory.mktemp("run"))))
    chosen = subsets.choose(run, [0.1])
    jobs = subsets.evaluations(run, chosen)
    return run, chosen, jobs, run.evaluate(jobs)


def test_every_row_is_scored_and_compared_with_the_one_it_follows(world):
    run, chosen, jobs, scores = world
    assert {id for id, _, _ in scores} >= {*ASKED, NONE}
    changes = subset_tables.over_followed(run.settings, scores)
    table = {row["method"]: row for row in subset_tables.changes_table(run.settings, changes)}
    rows = methods(run.settings, 0.1)
    for one in ASKED:
        if other := rows[one].follows:
            row = table[rows[one].label]
            assert row["minus (points, 95 % CI)"] == rows[other].label
            assert row["10 %"].startswith(f"{100 * changes[one][0.1].mean:+z.1f} ")
            shared = {k for choice in rows[other].choices for o in choice for k in o}
            shared &= {k for choice in rows[one].choices for o in choice for k in o}
            assert all(chosen[one, 0.1][k] == chosen[other, 0.1][k] for k in shared), one
    for id, unrolled, epochs in (
        ("learned_labels", "dsa", 3),
        ("pixels_learned", "dsa", 3),
        ("mixed_labels", "none", 1),
    ):
        job = jobs[id, 0.1, 0].distilled
        assert (job.setup.augment, job.setup.expert_augment, job.config.iterations) == (unrolled, "dsa", epochs)
        option = chosen["mixed_labels", 0.1]
        assert job.config.label_share == option["label_share"]
    soft = jobs["pixels_soft", 0.1, 0]  # images learned with hard labels, for students that the experts of DSA teach
    assert (soft.distilled.phi, soft.distilled.setup.augment) == ("pixels", "dsa")
    assert (soft.config.eval_labels, soft.config.eval_augment, soft.setup.expert_augment) == ("soft", "dsa", "dsa")


def test_what_one_change_adds_is_the_difference_from_the_row_that_is_followed():
    settings = resolve("smoke", {"subset_rows": "mixed_labels, learned_labels, pixels_mixed, pixels_learned"})

    def scores(*values):
        return {k: Accuracy([v, v], [v, v]) for k, v in enumerate(values)}

    of_rows = {"mixed_labels": (0.5, 0.6), "learned_labels": (0.6, 0.6), "pixels_learned": (0.7, 0.8), NONE: (0.1, 0.1)}
    every = {(id, 0.1, k): score for id, values in of_rows.items() for k, score in scores(*values).items()}
    every |= {("pixels_mixed", 0.5, 0): Accuracy([0.9], [0.9]), ("mixed_labels", 0.5, 0): Accuracy([0.5], [0.5])}
    found = subset_tables.over_followed(settings, every)
    means = {id: {f: round(d.mean, 9) for f, d in by.items()} for id, by in found.items()}
    # mixed labels follow a row that is not in the table
    assert means == {"learned_labels": {0.1: 0.05}, "pixels_learned": {0.1: 0.15}, "pixels_mixed": {0.5: 0.4}}
    assert found["pixels_learned"][0.1].over == "2 repetitions" and found["pixels_mixed"][0.5].half is None
    rows = subset_tables.shown_rows(settings)
    (axis,) = changes_by_subset(found, {0.1: "10 % (2)", 0.5: "50 % (9)"}, rows).axes
    labels = [text.get_text().replace("\n", " ") for text in axis.get_legend().get_texts()]
    assert labels == [f"{rows[id].label}, over {rows[rows[id].follows].label}" for id in means]
    assert [line.get_ydata().tolist() for line, *_ in axis.containers] == [
        [pytest.approx(100 * v) for v in by.values()] for by in means.values()
    ]
    one = {id: {0.1: by[0.1]} for id, by in found.items() if 0.1 in by}  # a single size: texts instead of a legend
    (axis,) = changes_by_subset(one, {0.1: "10 % (2)"}, rows).axes
    assert [line.get_xdata().tolist() for line, *_ in axis.containers] == [[pytest.approx(5)], [pytest.approx(15)]]
    texts = [label.get_text().replace("\n", " ") for label in axis.get_yticklabels()]
    assert texts == [
        f"{rows[id].label}, over {rows[rows[id].follows].label}   {found[id][0.1]}"
        for id in ("learned_labels", "pixels_learned")
    ]


@pytest.mark.parametrize("sizes", [{0.1: "10 % (2)"}, {0.1: "10 % (2)", 0.5: "50 % (9)"}])
@pytest.mark.parametrize("half", [None, 0.02])
def test_a_difference_of_too_few_values_has_no_error_bar(sizes, half):
    rows = subset_tables.shown_rows(resolve("smoke", {"subset_rows": "mixed_labels, learned_labels"}))
    change = Difference(0.1, half, "2 students" if half is None else "3 students")
    (axis,) = changes_by_subset({"learned_labels": dict.fromkeys(sizes, change)}, sizes, rows).axes
    label = (axis.get_xlabel() if len(sizes) == 1 else axis.get_ylabel()).replace("\n", " ")
    said = "95 % interval over 3 students" if half else "n = 2 students: no interval"
    assert label == f"difference in test accuracy (points, {said})"
    ((_, caps, (bars,)),) = axis.containers
    ends = [*bars.get_segments(), *(cap.get_data()[len(sizes) > 1] for cap in caps)]
    drawn = [np.isfinite(np.array(end, dtype=float)).any() for end in ends]
    assert all(drawn) if half else not any(drawn)


def test_the_best_window_is_the_window_that_is_scored(world):
    run, chosen, jobs, _ = world
    job = jobs["window_mixed", 0.1, 0]
    assert job.subset.window == chosen["window", 0.1]["window"] == job.distilled.subset.window
    assert any(isinstance(need, Difficulty) for need in job.needs())
    base = run.data.train.take(job.distilled.index(run.store))
    phi = job.distilled.stored_phi(run.store).phi
    experts = subsets.load_trajectories(job.setup, run.store)
    teacher = teacher_of(experts, snapshots=job.distilled.config.label_snapshots)
    share = job.distilled.config.label_share
    expected = share * teacher(base.images) + (1 - share) * F.one_hot(base.labels, 10)
    torch.testing.assert_close(labels_under(phi, base.labels, torch.arange(len(base))), expected)


def test_a_window_for_all_rows_lies_where_no_augmentation_wants_it():
    rows = {row.id: row for row in every_method(resolve("smoke", {"subset_by": "window"}))}
    windows = [o["window"] for o in rows[NONE].options(resolve("smoke"))]
    assert len(windows) == 5 and not rows[NONE].follows
    for row in rows.values():
        assert {o["window"] for o in row.options(resolve("smoke"))} == {*windows}
        last = row.id
        while rows[last].follows:
            last = rows[last].follows
        assert last == NONE
    with pytest.raises(ValueError, match="subset_by='best': must be one of random, window"):
        resolve("smoke", {"subset_by": "best"})


@pytest.mark.parametrize(
    ("rows", "by", "expected"),
    [
        ("mixed_labels, pixels_learned", "random", {"mixed_labels": "", "pixels_learned": "mixed_labels"}),
        ("window, window_mixed", "random", {"window": "", "window_mixed": "window"}),
        ("mixed_labels", "window", {"mixed_labels": NONE}),
        ("window_mixed, pixels_soft", "window", {"window_mixed": NONE, "pixels_soft": NONE}),
    ],
)
def test_a_row_whose_followed_row_is_left_out_follows_the_next_one(rows, by, expected):
    settings = resolve("smoke", {"subset_rows": rows, "subset_by": by, "taught_augment": "dsa"})
    assert {id: row.follows for id, row in methods(settings, 0.1).items()} == {NONE: ""} | expected
    assert {id: row.follows for id, row in subset_tables.shown_rows(settings).items()} == (
        {NONE: ""} | expected | {"all": ""}
    )


def test_a_window_for_all_rows_needs_experts_of_one_kind():
    rows = {"subset_by": "window", "expert_augment": "none", "taught_augment": "dsa"}
    with pytest.raises(ValueError, match=r"subset_by='window': .* 'identity' has experts with expert_augment='none'"):
        methods(resolve("smoke", rows | {"subset_rows": "dsa, identity"}), 0.1)
    assert "pixels_augmented" in methods(resolve("smoke", rows | {"subset_rows": "dsa, pixels_augmented"}), 0.1)


def test_what_is_chosen_is_kept_along_rows_that_are_left_out():
    """Each row by itself would choose its last option."""
    settings = resolve("smoke", {"subset_rows": "window, window_mixed", "fractions": "0.1", "taught_augment": "dsa"})
    run = types.SimpleNamespace(settings=settings, choose=lambda jobs: dict(list(jobs)))
    chosen = subsets.choose(run, [0.1])
    assert chosen["window_mixed", 0.1]["window"] == chosen["window", 0.1]["window"] == PLACES[-1]


def test_fixed_copies_are_not_in_the_drift_table_which_draws_in_each_step():
    assert not methods(resolve("smoke", {"subset_rows": "policy_copies"}), 0.1)["policy_copies"].drift


def test_learned_labels_are_saved_with_the_images_and_drawn(world):
    run, chosen, jobs, _ = world
    job = jobs["pixels_learned", 0.1, 0].distilled
    phi, index = job.stored_phi(run.store).phi, torch.arange(20)
    path = run.save("mine", job)
    file = open_phi(path)
    again = rebuilt(file.about, file.read())
    labels = run.data.train.labels[job.index(run.store)][:20]
    assert torch.equal(labels_under(again, labels, index), labels_under(phi, labels, index))
    assert torch.equal(again.phis[1].pixels, phi.phis[1].pixels)
    assert (phi.phis[0].change != 0).any() and labels_under(phi, labels, index).requires_grad
    with pytest.raises(ValueError, match="bound to the base images"):
        load_phi(path)(torch.rand(2, 1, 8, 8))
    pictures, *_ = subsets.pictures(run, 0.1, chosen)
    of_labels = {name for name in pictures if name.endswith(": labels")}
    assert len(of_labels) == 5 and len({shown.shape for shown in pictures.values()}) == 1
    bars = subsets.label_bars(torch.tensor([[0.5, 0.0, 1.0, 0.26]]), torch.zeros(1, 3, 4, 8))[0, 0]
    dark = (bars < 0.5).sum(0).tolist()
    assert dark == [2, 2, 0, 0, 4, 4, 1, 1] and bars[-1, 0] < 0.5 < bars[0, 0]


@pytest.mark.parametrize(
    "name, images, labels, phi",
    [
        ("", 1, "hard", None),
        ("identity", 1, "hard", 0),
        ("pixels", 4, "hard", None),
        ("labels", 1, "soft", None),
        ("labels_mixed", 1, "soft", None),
        ("labels+pixels", 4, "soft", None),
        ("pixels+policy", 4, "hard", "policy"),
        ("unet_noise", 1, "hard", "unet_noise"),
        ("labels+unet_noise", 1, "soft", "unet_noise"),
    ],
)
def test_bytes_are_those_of_what_students_need(name, images, labels, phi):
    data = load("digits", 8)
    base = data.train.take(slice(0, 12))
    made = make_phi(name, base.images, 10, 0) if name else None
    if made and name.startswith("labels"):
        made.get_submodule("phis.0" if "+" in name else "").soft.fill_(0.1)
    expected = {"images": 12 * 64 * images, "labels": 12 * (40 if labels == "soft" else 1)}
    if phi is not None:
        own = make_phi(phi, base.images, 10, 0).state_dict().values() if phi else []
        expected |= {"phi": 4 * sum(tensor.numel() for tensor in own)}
    found = stored_bytes(made, base.labels, data)
    assert found == expected
    applied = stored_bytes(Applied(made, probability=0.5), base.labels, data) if made else expected
    assert applied == expected


def test_fixed_copies_are_made_once_and_each_has_its_label():
    data = load("digits", 8)
    images, labels = data.train.images[:12], data.train.labels[:12]
    calls, fed = [], []

    def shifted(x, *, index, generator, **_):
        calls.append(index)
        return x + torch.rand(len(x), 1, 1, 1, generator=generator)

    def teacher(x):
        fed.append(x)
        return F.one_hot(torch.zeros(len(x), dtype=torch.long), 10).float()

    config = EvalConfig(eval_steps=9, eval_batch=9, eval_copies=3)
    train_student(
        ConvNet(1, 10, 8, width=4, depth=1), None, images, labels, config, 0, augment=shifted, teacher=teacher
    )
    assert torch.cat(calls).bincount().tolist() == [3] * 12  # and no image is augmented during training
    once = {tuple(x.flatten().tolist()) for x in torch.cat(fed[:4])}
    assert len(torch.cat(fed[:4])) == len(once) == 36  # an epoch is every copy once
    assert all(tuple(x.flatten().tolist()) in once for x in torch.cat(fed[4:]))
    own = torch.stack([(copy - images).flatten(1).std(1).argmin() for copy in torch.cat(fed[:4])])
    assert own.bincount().tolist() == [3] * 12
    setup = dataclasses.replace(resolve("smoke")).select(subsets.Setup)
    with pytest.raises(ValueError, match="eval_copies=2: must be 0 for instaaug"):
        Evaluation(setup, subsets.Subset(0, 1), EvalConfig(eval_copies=2, eval_augment="instaaug"))


def test_random_ranges_are_a_policy_s_and_as_many_as_its_training_pays_for():
    data = load("digits", 8)
    one, again, other = (augmentation("random_policy", data, candidate=k) for k in (0, 0, 1))
    low, high = RANDOM_RANGES
    assert one.report() == again.report() != other.report() and "flip" not in one.kinds
    assert all(low * 0.999 <= value <= high * 1.001 for value in one.report().values())
    x, given = data.train.images[:5], dict(labels=data.train.labels[:5], index=torch.arange(5))
    policy = make_phi("policy", x, 10, 0)
    policy.leave_out("flip")
    policy.hold(one.report())
    torch.testing.assert_close(one(x, generator=seeded(1), **given), policy(x, generator=seeded(1), **given))
    # 3 x 200 iterations x 2 draws x 15 steps x 64 images, over 3 students x 3,000 steps x 64 images: exactly 2
    assert len(random_ranges(resolve("cifar10-labels"))) == 2
    assert len(random_ranges(resolve("cifar10-labels", {"policy_iterations": 1000}))) == 10


def test_a_run_by_difficulty_draws_every_row_from_one_window(tmp_path):
    given = dict(preset="smoke", fractions="0.1", subset_by="window", subset_rows="instaaug, dsa, policy", width=4)
    run = open_run("05_subset_evaluation", given | dict(out=str(tmp_path / "run")))
    chosen = subsets.choose(run, [0.1])
    jobs = [job for (id, *_), job in subsets.evaluations(run, chosen).items() if id != "all"]
    assert {job.subset.window for job in jobs} == {chosen[NONE, 0.1]["window"]} and len(jobs) == 4
    pictures, *_ = subsets.pictures(run, 0.1, chosen)
    assert {*pictures} >= {"x", "InstaAug", "DSA", "policy"}
