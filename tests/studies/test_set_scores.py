"""A distilled set is scored in its own normalisation, to the number that plain torch gives, beside honest controls."""

import dataclasses
import math
import re
import types

import pytest
import torch
from helpers import make_folder
from safetensors.torch import load_file
from torch import nn

from augdistill_core import Applied, seeded
from augdistill_report import score
from augdistill_report.commands.cli import main
from augdistill_report.commands.export import export
from augdistill_report.commands.score import place_on_board
from augdistill_report.data.augmentations import augmentation
from augdistill_report.data.datasets import load, whitened
from augdistill_report.files.distilled_sets import read_set
from augdistill_report.files.sealed_json import read_json, write_json
from augdistill_report.run import Run, made_by, row_file, start_folder, stored_row
from augdistill_report.settings import resolve
from augdistill_report.show.budget_plot import accuracy_by_bytes, colours_of
from augdistill_report.studies import scoreboard
from augdistill_report.studies.protocols import PROTOCOLS, augmentation_robust_score, label_robust_score
from augdistill_report.studies.set_scores import of_classes
from augdistill_report.studies.subjects import from_phi
from augdistill_report.work.networks import alexnet, convnet3, vgg11
from augdistill_report.work.normalisation import CONSTANTS, Normalisation
from augdistill_report.work.scoring import EvalConfig, evaluate
from augdistill_report.work.set_scoring import STORED_SET, SetEvaluation
from augdistill_report.work.students import accuracy_of

STUDENTS = dict(width=16, eval_steps=100, eval_students=3)
CHANGES = dict(syn_steps=5, iterations=30) | STUDENTS


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with three finished rows: learned pixels, a U-Net with noise, and pixels learned with their labels."""
    folder, settings = tmp_path_factory.mktemp("scored") / "run", resolve("smoke", CHANGES)
    start_folder(folder, "smoke", settings)
    run = Run("02_baseline_mtt", settings, folder)
    run.made_by = made_by(folder, settings)
    run.rows = {
        "pixels (MTT)": run.distillation("pixels", run.base, settings.pixel_config),
        "unet_noise": run.distillation("unet_noise", run.base),
        "with labels": run.distillation("labels+pixels", run.base, phi_optimizer="Adam", phi_lr=0.02, iterations=10),
    }
    run.distill(run.rows)
    return run


def scored(run, what, on="digits", **options):
    options = dict(preset="smoke", out=str(run.folder), beside="", changes=STUDENTS) | options
    return score(str(what), on, **options)


def pair(folder, x, y):
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(x, folder / "images_best.pt")
    torch.save(y, folder / "labels_best.pt")
    return folder


def by_plain_torch(folder, students=4) -> torch.Tensor:
    """Test accuracies of students trained on an exported pair by nothing but torch and the card."""
    images, labels = (torch.load(folder / f"{word}_best.pt") for word in ("images", "labels"))
    card = read_json(folder / "card.json", "card")
    mean, std = (torch.tensor(card["normalisation"][word]).view(-1, 1, 1) for word in ("mean", "std"))
    test = load("digits", 8).test
    inputs = (test.raw - mean) / std
    found = []
    for seed in range(students):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            blocks = [
                [nn.Conv2d(c, 16, 3, padding=1), nn.InstanceNorm2d(16, affine=True), nn.ReLU(), nn.AvgPool2d(2)]
                for c in (1, 16)
            ]
            net = nn.Sequential(*blocks[0], *blocks[1], nn.Flatten(), nn.Linear(16 * 4, 10))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
        for step in range(100):
            if step == 50:
                optimizer.param_groups[0]["lr"] = 0.002
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images), labels).backward()
            optimizer.step()
        with torch.no_grad():
            found.append(float((net(inputs).argmax(1) == test.labels).double().mean()))
    return torch.tensor(found, dtype=torch.float64)


def test_a_row_and_its_exports_have_one_score_which_plain_torch_confirms(run, tmp_path, capsys):
    row = f"{run.folder}/02_baseline_mtt/pixels (MTT)"
    mine = score(row, beside="")
    evaluation = run.evaluation(run.base, run.rows["pixels (MTT)"])
    assert mine.accuracies["the set"] == run.evaluate({"": evaluation})[""].test  # the notebook's own number
    for form in ("mtt", "npz", "safetensors"):
        assert main(["export", row, "--format", form, "--out", str(tmp_path / form)]) == 0
        written = tmp_path / (form if form == "mtt" else f"{form}.{form}")
        assert torch.equal(read_set(written).images, run.rows["pixels (MTT)"].stored_phi(run.store).phi.pixels.detach())
        again = scored(run, written)
        assert again.accuracies == mine.accuracies and again.result["normalisation"] == "own, as its card says"
    assert main(["export", row, "--format", "folder", "--out", str(tmp_path / "folder")]) == 0
    assert re.search(r"10 images .* \d+\.\d % of the values were outside \[0, 1\]", capsys.readouterr().out)
    rounded = scored(run, tmp_path / "folder")
    assert rounded.result["rows"]["the set"]["bytes"]["images"] < 10 * 64 * 4
    ours, theirs = torch.tensor(mine.accuracies["the set"]).double(), by_plain_torch(tmp_path / "mtt")
    half = 3 * math.hypot(ours.std() / len(ours) ** 0.5, theirs.std() / len(theirs) ** 0.5)
    assert abs(ours.mean() - theirs.mean()) < half + 0.02 and theirs.mean() > 0.3


def test_a_row_is_scored_and_exported_by_the_settings_of_its_own_run(run, tmp_path):
    row = f"{run.folder}/02_baseline_mtt/pixels (MTT)"
    before = score(row, beside="").result
    config = (run.folder / "config.json").read_bytes()
    start_folder(run.folder, "smoke", resolve("smoke", CHANGES | {"width": 8, "eval_steps": 40, "seed": 5}))  # another
    try:
        after = score(row, beside="").result
        assert main(["export", row, "--format", "npz", "--out", str(tmp_path / "set")]) == 0
    finally:
        (run.folder / "config.json").write_bytes(config)
    assert after["protocol"] == before["protocol"] and after["protocol"]["steps"] == 100
    assert after["rows"]["the set"]["accuracy"] == before["rows"]["the set"]["accuracy"]
    assert read_set(tmp_path / "set.npz").card["protocol"]["eval_steps"] == 100
    assert after["command"] == before["command"]
    assert after["command"].startswith("augdistill report --preset smoke --only 02 --set ")
    assert "--set eval_steps=100" in after["command"] and "seed" not in after["command"]


def test_another_place_of_the_data_is_also_that_of_the_row_s_job(run, tmp_path):
    found = stored_row(run.folder / "02_baseline_mtt" / "unet_noise", {"data": str(tmp_path)})
    assert found.job.setup.data == found.settings.data == str(tmp_path)


@pytest.mark.parametrize("key", ["settings", "made_by"])
def test_a_row_of_an_earlier_version_is_refused_by_name(key, run, tmp_path):
    row = run.folder / "02_baseline_mtt" / "pixels (MTT)"
    other = tmp_path / "02_baseline_mtt" / "old"
    content = read_json(row_file(row), "row")
    write_json(row_file(other), "row", {k: v for k, v in content.items() if k != key})
    for use in (score, lambda what: export(what, "npz", str(tmp_path / "set"))):
        with pytest.raises(ValueError, match=rf"old\.json: has no '{key}' .*; run 02_baseline_mtt again"):
            use(str(other))


def test_learned_labels_are_exported_and_scored_as_they_are(run, tmp_path, capsys):
    row = f"{run.folder}/02_baseline_mtt/with labels"
    mine = score(row, beside="random")
    assert main(["export", row, "--format", "npz", "--out", str(tmp_path / "soft")]) == 0
    labels = read_set(tmp_path / "soft.npz").labels
    assert labels.shape == (10, 10) and not torch.equal(labels, labels.round())
    again = scored(run, tmp_path / "soft.npz", beside="random")
    assert again.accuracies == mine.accuracies  # the random images have the learned labels in both
    assert again.result["rows"]["the set"]["bytes"] == mine.result["rows"]["the set"]["bytes"]
    assert main(["export", row, "--format", "folder", "--out", str(tmp_path / "folder")]) == 2
    assert main(["export", row, "--format", "npz", "--out", str(tmp_path / "two"), "--draws", "2"]) == 2
    error = capsys.readouterr().err
    assert "format='folder': holds hard labels only" in error and "draws=2: must be 1 for a phi that is not" in error
    noisy = f"{run.folder}/02_baseline_mtt/unet_noise"
    assert main(["export", noisy, "--format", "npz", "--out", str(tmp_path / "draws"), "--draws", "2"]) == 0
    found = read_set(tmp_path / "draws.npz")
    assert len(found) == 20 and not torch.equal(found.images[:10], found.images[10:])
    assert torch.equal(found.labels[:10], found.labels[10:]) and found.card["draws"] == 2


def test_what_stands_beside_a_score(run, capsys):
    path = run.save("unet", run.rows["unet_noise"])
    arguments = ["score", str(path), "--on", "digits", "--preset", "smoke", "--out", str(run.folder), "--students", "3"]
    arguments += ["--protocol", "dd-ranking", "--set", "eval_epochs=4", "--student", "convnet", "--set", "width=16"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    (path,) = (run.folder / "scores").glob("digits-8-unet-dd-ranking-convnet-*.json")
    result = read_json(path, "score")
    rows = result["rows"]
    assert list(rows) == [
        *("the set", "random", "random, same bytes", "best window", "all the data"),
        *("the set, no augmentation", "random, no augmentation"),
    ]
    of_phi = sum(4 * p.numel() for p in run.rows["unet_noise"].stored_phi(run.store).phi.parameters())
    assert rows["the set"]["bytes"] == {"images": 640, "phi": of_phi, "labels": 10}
    assert rows["random"]["bytes"] == {"images": 640, "labels": 10} and rows["random"]["images"] == 10
    several = rows["random, same bytes"]
    assert several["images"] % 10 == 0 and sum(several["bytes"].values()) <= 650 + of_phi
    assert rows["all the data"]["images"] == len(run.data.train)
    assert re.fullmatch(r"from \d+ %, step size [\d.]+", rows["best window"]["option"])
    held = [load_file(path) for path in run.store.folder.glob(f"{STORED_SET}-*.safetensors")]
    drawn = [tensors["index"] for tensors in held if len(tensors.get("index", ())) == 3]
    assert len(drawn) >= 7  # at random, as many bytes, five windows: each student has its own images
    assert all(len({tuple(sorted(own.tolist())) for own in index}) == 3 for index in drawn)
    assert result["protocol"]["changed"] == {"eval_epochs": 4, "eval_student": "convnet", "eval_students": 3}
    assert result["protocol"]["steps"] == 4 and "eval_epochs=4" in said
    again = "augdistill score unet.safetensors --on digits --protocol dd-ranking --student convnet --students 3"
    assert result["command"].startswith(again) and "--set eval_epochs=4" in result["command"]
    before = result["opened"]["in all"]
    assert f"opened for 7 rows; {run.folder} holds {before} test accuracies" in said and before >= 7
    assert result["sentence"] in said and "as many random real images" in result["sentence"]
    values = [[row["accuracy"]["values"][0] for row in rows.values()][i] for i in (0, 1, 0, 4, 5, 6)]
    scores = {name: found["values"][0] for name, found in result["scores"].items()}
    assert scores["label-robust score"] == label_robust_score(*values[:4])
    assert scores["augmentation-robust score"] == augmentation_robust_score(values[0], values[1], *values[4:])
    assert main(arguments) == 0  # everything is found again, and the test split stays closed
    assert f"holds {before} test accuracies" in capsys.readouterr().out


def test_a_changed_setting_of_the_students_is_said_and_used(run):
    row = f"{run.folder}/02_baseline_mtt/pixels (MTT)"
    mine = score(row, beside="", changes={"eval_steps": "7", "phi_probability": "0.5"})
    assert mine.result["protocol"]["changed"] == {"eval_steps": 7, "phi_probability": 0.5}
    assert mine.result["protocol"]["steps"] == 7 and "changed: eval_steps=7, phi_probability=0.5" in str(mine)
    assert score(row, beside="", changes={"eval_steps": "100"}).result["protocol"]["changed"] == {}  # as it was
    short = {"eval_epochs": "2", "eval_student": "convnet", "eval_lr": "0.02"}  # one step size, also the default one
    ranked = score(row, protocol="dd-ranking", beside="", changes=short).result
    assert ranked["protocol"]["changed"]["eval_lr"] == 0.02 == ranked["protocol"]["eval_lr"]
    assert ranked["rows"]["the set"]["option"] == ""
    with pytest.raises(ValueError, match=r"unknown key 'eval_setps'"):
        score(row, beside="", changes={"eval_setps": "7"})


@pytest.mark.parametrize("labels", ["", "experts"])
def test_the_hard_labels_of_dd_ranking_are_on_the_images_of_the_set(run, labels):
    """Students of learned images with learned labels, or with labels by experts: the same images with hard labels."""
    row = f"{run.folder}/02_baseline_mtt/{'pixels (MTT)' if labels else 'with labels'}"
    options = dict(protocol="dd-ranking", student="convnet", labels=labels, beside="random,all")
    result = score(row, changes={"eval_epochs": "4", "eval_lr": "0.01"}, **options).result
    job = run.rows["pixels (MTT)" if labels else "with labels"]
    pixels, train = job.stored_phi(run.store).phi, run.train(run.base)
    config = EvalConfig.from_dict({k: v for k, v in result["protocol"].items() if k in EvalConfig.names()})
    config = dataclasses.replace(config, eval_steps=4, eval_epochs=0, eval_labels="hard")
    augment = Applied(augmentation("dsa", run.data), probability=config.eval_augment_probability)
    images = pixels(train.images, labels=train.labels, index=torch.arange(10), generator=seeded(0)).detach()
    learned = types.SimpleNamespace(images=images, labels=train.labels)
    arguments = (run.student, None, learned, run.data.validation, config, run.settings.seed)
    models, _ = evaluate(*arguments, augment=augment)
    expected = [accuracy_of(model, run.data.test.opened()) for model in models]
    assert result["rows"]["the set, hard labels"]["accuracy"]["values"] == pytest.approx(expected)


def test_the_score_of_a_saved_phi_depends_on_its_code(run, tmp_path):
    subject = from_phi(run.save("code", run.rows["unet_noise"]), "code", run.settings, run.store)
    job = SetEvaluation(subject.setup, subject.given, run.settings.select(EvalConfig))
    assert "augdistill_method.zoo.unet" in job.modules()
    other = dataclasses.replace(job, subset=dataclasses.replace(subject.given, phi_source="changed"))
    assert other.spec() != job.spec()


def test_dd_ranking_s_scores_are_those_of_its_paper():
    assert label_robust_score(0.5, 0.5, 0.8, 0.8) == pytest.approx((1 - math.exp(-1)) / (math.e - math.exp(-1)))
    assert label_robust_score(1, 0, 1, 0) == 1 and label_robust_score(0, 1, 0, 1) == 0
    assert augmentation_robust_score(1, 0, 1, 0) == 1 and augmentation_robust_score(0, 1, 0, 1) == 0
    alpha = 0.3 * (0.6 - 0.4) - 0.7 * (0.85 - 0.5)
    assert label_robust_score(0.6, 0.4, 0.5, 0.85, 0.3) == pytest.approx(
        (math.e**alpha - 1 / math.e) / (math.e - 1 / math.e)
    )


# --- files of others --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real():
    """80 real digits, with their labels, in each form that a file may have."""
    data = load("digits", 8)
    few = data.train.take(data.subset(3, per_class=8))
    official = whitened(data, as_official=True)
    white = dataclasses.replace(official.train, raw=few.raw, labels=few.labels)
    of_mnist = (few.raw - CONSTANTS["mnist"][0][0]) / CONSTANTS["mnist"][1][0]
    return {"pixels": few.raw, "own": few.images, "zca": white.images, "mnist": of_mnist}, few.labels


@pytest.mark.parametrize("form", ["pixels", "own", "zca"])
def test_a_normalisation_is_found_and_the_set_scored_in_it(form, run, real, tmp_path):
    images, labels = real
    found = scored(run, pair(tmp_path / form, images[form], labels))
    assert found.result["normalisation"].startswith(f"{form}, found. Tried: pixels (means ")
    known = scored(run, tmp_path / form, normalisation=form)
    assert known.accuracies == found.accuracies and min(found.accuracies["the set"]) > 0.6
    if form != "own":
        return
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    moved = scored(run, pair(tmp_path / "moved", images[form][shuffled], labels[shuffled]))
    assert moved.result["normalisation"].startswith(form) and min(moved.accuracies["the set"]) > 0.6


def test_a_normalisation_that_is_not_certain_must_be_named(run, real, tmp_path, capsys):
    images, labels = real
    for x, why in ((5 * images["own"] + 9, "none fits"), (images["own"].abs(), "")):
        path = pair(tmp_path / "odd", x, labels)
        command = ["score", str(path), "--on", "digits", "--preset", "smoke", "--out", str(run.folder), "--beside", ""]
        assert main(command) == 2
        error = capsys.readouterr().err
        assert f"odd: normalisation not certain, {why}" in error and "quick students" in error
    path = pair(tmp_path / "mnist", images["mnist"], labels)
    named = scored(run, path, normalisation="mnist")
    assert named.result["normalisation"] == "mnist, as it was named" and min(named.accuracies["the set"]) > 0.6
    with pytest.raises(ValueError, match="normalisation='cifar10': is for 3 channels, the images have 1"):
        scored(run, path, normalisation="cifar10")
    with pytest.raises(ValueError, match="normalisation='white': must be one of pixels, own, zca"):
        scored(run, path, normalisation="white")


def test_constants_change_images_as_they_should():
    data = load("digits", 8)
    other = Normalisation("mnist").of(data)
    x = other.train.take(slice(5))
    assert torch.allclose(x.images, (x.raw - 0.1307) / 0.3081) and torch.allclose(
        other.pixels(x.images), x.raw, atol=1e-6
    )
    assert torch.allclose(other.test.opened().images, (data.test.raw - 0.1307) / 0.3081)
    same = Normalisation("own", data.mean.flatten().tolist(), data.std.flatten().tolist())
    assert same.of(data) is data


def test_soft_labels_teach_and_their_control_has_the_same(run, real, tmp_path):
    images, labels = real
    logits = 3 * nn.functional.one_hot(labels, 10).float()
    path = pair(tmp_path / "soft", images["own"], logits)
    found = scored(run, path, labels="logits", normalisation="own", beside="random,bytes")
    rows = found.result["rows"]
    assert rows["the set"]["bytes"]["labels"] == rows["random"]["bytes"]["labels"] == 4 * 80 * 10
    assert rows["random, same bytes"]["bytes"]["labels"] == rows["random, same bytes"]["images"]
    assert min(rows["random"]["accuracy"]["values"]) > 0.6
    taught = scored(run, pair(tmp_path / "hard", images["own"], labels), labels="experts", normalisation="own")
    assert (
        taught.result["rows"]["the set"]["bytes"]["decoder"] > 0 and taught.result["protocol"]["eval_labels"] == "soft"
    )


def test_positions_are_those_of_the_source(run, tmp_path):
    data = load("digits", 8)
    own = data.order[data.subset(0, per_class=1)]  # in scikit-learn's order
    (tmp_path / "chosen.txt").write_text("\n".join(map(str, own.tolist())))
    found = scored(run, tmp_path / "chosen.txt", size=8)
    evaluation = run.evaluation(run.base)
    assert found.accuracies["the set"] == run.evaluate({"": evaluation})[""].test
    of_test = (set(range(1797)) - set(data.order.tolist())).pop()
    for positions, error in (
        ([of_test], "is no training image of digits"),
        ([9999], "9999"),
        ([-1], "-1"),
        ([own[0], own[0]], "twice"),
    ):
        (tmp_path / "chosen.txt").write_text("\n".join(str(int(p)) for p in positions))
        with pytest.raises(ValueError, match=error):
            scored(run, tmp_path / "chosen.txt", size=8)


@pytest.mark.parametrize(
    "options, error",
    [
        (dict(protocol="best"), "protocol='best': must be one of ours, mtt"),
        (dict(protocol="mtt"), "takes the step size that was learned with the images"),
        (dict(beside="others"), "beside='others': must be among random, bytes, window, all"),
        (dict(on=""), "name the data set that students are tested on"),
        (dict(student="vgg"), "eval_student='vgg': must be one of convnet, mlp"),
        (dict(publish=True), ""),
    ],
)
def test_wrong_arguments_are_refused_by_name(options, error, run, real, tmp_path, monkeypatch):
    if "publish" in options:
        around = {"commit": "0" * 40, "uncommitted": True}
        monkeypatch.setattr("augdistill_report.commands.score.environment", lambda device: around)
        error = "the code has uncommitted changes"
    with pytest.raises(ValueError, match=error):
        scored(run, pair(tmp_path / "set", real[0]["own"], real[1]), **dict(normalisation="own") | options)


@pytest.mark.parametrize(
    "what, options, error",
    [
        ("row", dict(labels="hard"), "labels='hard': does not apply to a row of a run: .*export the row"),
        ("row", dict(labels="probabilities"), "labels='probabilities': does not apply to a row of a run"),
        ("row", dict(normalisation="zca"), "normalisation='zca': does not apply to a row"),
        ("row", dict(preset="smoke"), "preset='smoke': does not apply to a row .* change single ones by --set"),
        ("row", dict(size=8), "size=8: does not apply to a row"),
        ("row", dict(lr=0.5), "lr=0.5: does not apply here, where students are trained at step size 0.02"),
        (
            "row",
            dict(lr=0.5, protocol="dd-ranking"),
            "at step size 0.001 or 0.005 .*--protocol mtt, or --set eval_lr=0.5",
        ),
        ("row", dict(changes={"zca": "true"}), "zca='true': a set's normalisation says"),
        ("row", dict(changes={"iterations": "3"}), "iterations='3': does not apply to a score"),
        ("phi", dict(size=8), "size=8: does not apply to a saved phi: it has the size that it was trained at"),
        ("phi", dict(labels="hard"), "labels='hard': does not apply to a saved phi: only 'experts'"),
        ("phi", dict(normalisation="own"), "normalisation='own': does not apply to a saved phi"),
        ("selection", dict(labels="logits"), "labels='logits': does not apply to a selection"),
        ("selection", dict(normalisation="own"), "normalisation='own': does not apply to a selection"),
        ("pair", dict(size=8), "size=8: does not apply to a distilled set: its images have their own size"),
    ],
)
def test_an_option_that_would_change_nothing_is_refused_by_name(what, options, error, run, real, tmp_path):
    if what == "row":
        path, options = f"{run.folder}/02_baseline_mtt/pixels (MTT)", dict(beside="") | options
        with pytest.raises(ValueError, match=error):
            score(path, **options)
        return
    (tmp_path / "chosen.txt").write_text("0 1 2")
    made = {"phi": lambda: run.save("unet", run.rows["unet_noise"]), "selection": lambda: tmp_path / "chosen.txt"}
    path = made.get(what, lambda: pair(tmp_path / "set", real[0]["own"], real[1]))()
    with pytest.raises(ValueError, match=error):
        scored(run, path, **options)


def test_an_export_refuses_a_setting_that_it_does_not_use(run, tmp_path):
    row, phi = f"{run.folder}/02_baseline_mtt/pixels (MTT)", str(run.save("unet", run.rows["unet_noise"]))
    for what, changes, error in (
        (row, {"eval_steps": "77"}, r"eval_steps='77': does not apply to an export of a row .*must be phis or data"),
        (row, {"iteratons": "3"}, "unknown key 'iteratons'"),
        (phi, {"iteratons": "3"}, "unknown key 'iteratons'"),
        (phi, {"eval_steps": "77"}, r"does not apply to an export of a saved phi \(unet.safetensors\)"),
    ):
        with pytest.raises(ValueError, match=error):
            export(what, "npz", str(tmp_path / "set"), changes=changes)
    assert not (tmp_path / "set.npz").exists()


def test_a_set_that_does_not_fit_the_data_is_refused_by_name(run, real, tmp_path):
    images, labels = real
    for x, y, error in (
        (images["own"], labels + 1, "labels from 1 to 10; digits has classes 0 to 9"),
        (images["own"].expand(-1, 3, -1, -1), labels, r"images are \(3, 8, 8\), digits has \(1, 8, 8\)"),
        (images["own"], torch.full((80, 4), 0.25), r"labels are \(80, 4\), digits has 10 classes"),
    ):
        with pytest.raises(ValueError, match=error):
            scored(run, pair(tmp_path / "set", x, y), normalisation="own")
    with pytest.raises(
        ValueError, match="no such row; finished rows of 02_baseline_mtt: pixels__MTT_, unet_noise, with_labels"
    ):
        score(f"{run.folder}/02_baseline_mtt/others")


@pytest.fixture(scope="module")
def other_digits(tmp_path_factory):
    """Another data set with the classes of digits, and one with other classes."""
    root = tmp_path_factory.mktemp("others")
    for name, classes in (("same", map(str, range(10))), ("letters", "abcdefghij")):
        make_folder(root / name, tuple(classes), 20, mode="L", size=(8, 8))
    return {name: f"folder:{root / name}" for name in ("same", "letters")}


def test_each_data_set_and_each_way_of_scoring_has_its_own_file(run, real, other_digits, tmp_path):
    path, out = pair(tmp_path / "pixels", real[0]["pixels"], real[1]), str(tmp_path / "out")
    options = dict(out=out, normalisation="pixels")
    found = [scored(run, path, **options), scored(run, path, other_digits["same"], **options)]
    found += [scored(run, path, out=out, normalisation="own")]
    found += [scored(run, path, changes=STUDENTS | {"width": 8}, **options)]
    found += [scored(run, pair(path, real[0]["pixels"].flip(0), real[1]), **options)]
    assert len({one.path for one in found}) == 5 == len(list((tmp_path / "out" / "scores").iterdir()))
    assert all(read_json(one.path, "score")["data"] == one.result["data"] for one in found)
    assert found[0].path.name.startswith("digits-8-pixels-ours-convnet-")
    assert found[1].path.name.startswith("folder_same-8-pixels-ours-convnet-")
    assert scored(run, path, **options).path == found[4].path  # the same score again


def test_a_published_score_is_replaced_only_by_one_of_the_same_students(run, tmp_path):
    result = score(f"{run.folder}/02_baseline_mtt/unet_noise", beside="").result
    first = place_on_board(result, tmp_path)
    assert first.name == "digits-8-unet_noise-ours-convnet.json"
    older = {key: value for key, value in result.items() if key not in ("setup", "content")}
    for published in (result, older):  # an older file does not say of which setup it is
        write_json(first, "score", published)
        assert place_on_board(result | {"content": "made again"}, tmp_path) == first
        shorter = result | {"protocol": result["protocol"] | {"eval_steps": 7, "steps": 7}}
        beside = place_on_board(shorter, tmp_path)
        assert beside != first and beside.name.startswith("digits-8-unet_noise-ours-convnet-")


def test_a_card_of_other_data_is_said_and_one_of_other_classes_refused(run, other_digits, tmp_path):
    row = f"{run.folder}/02_baseline_mtt/pixels (MTT)"
    assert main(["export", row, "--format", "npz", "--out", str(tmp_path / "set")]) == 0
    assert "other data" not in scored(run, tmp_path / "set.npz").result["normalisation"]
    said = str(scored(run, tmp_path / "set.npz", other_digits["same"]))
    assert re.search(r"its card says that it was made from other data \(digits, \w+\) than it is scored on", said)
    with pytest.raises(
        ValueError, match=r"made from digits, with the classes 0, 1, 2, 3, 4, \.\.\.; .* has a, b, c, d"
    ):
        scored(run, tmp_path / "set.npz", other_digits["letters"])


def test_a_scoreboard_marks_what_was_not_measured(run, tmp_path):
    results = [
        score(f"{run.folder}/02_baseline_mtt/{row}", beside="random,bytes", changes=STUDENTS)
        for row in list(run.rows)[:2]
    ]
    for result in results:
        write_json(tmp_path / f"{result.path.name}", "score", result.result)
    entries = [entry for result in scoreboard.read_board(tmp_path) for entry in scoreboard.entries_of(result)]
    assert [entry.method for entry in entries].count("random real images") == 4
    training = "ours: convnet of width 16 and depth 2, 100 steps, 3 students, step size 0.02, no augmentation"
    assert {entry.training for entry in entries} == {training}
    short = [dataclasses.replace(entry, training="ours: convnet, 7 steps", accuracy=0.1) for entry in entries]
    assert len(scoreboard.distinct(entries + short)) == 2 * len(scoreboard.distinct(entries))  # never for one another
    entries = scoreboard.distinct(entries)  # ten random images stand beside both rows
    assert [entry.method for entry in entries].count("random real images") == 3
    board = entries + scoreboard.PUBLISHED_SCORES
    figure = accuracy_by_bytes(scoreboard.by_data(board))
    for axis, published in zip(figure.axes, (False, True), strict=True):
        drawn = [line for line in axis.lines if line.get_marker() not in ("", "None", "|")]
        assert drawn and {line.get_markerfacecolor() == "none" for line in drawn if len(line.get_xdata())} == {
            published
        }
        assert all(("published, not measured" in t.get_text()) == published for t in axis.get_legend().get_texts())
    mtt = next(row for row in scoreboard.board_table(board) if row["test accuracy"] == "46.3 %")
    assert mtt["bytes"] == f"{10 * (4 * 3072 + 1):,}" and mtt["source"].startswith(
        "published, not measured: Cazenavette"
    )
    assert scoreboard.read_board(tmp_path / "nowhere") == []


def test_scores_by_different_students_stay_apart_on_the_scoreboard(run):
    row = f"{run.folder}/02_baseline_mtt/pixels (MTT)"
    base = score(row, beside="random").result
    others = [
        ("setup", {"width": 64}, "convnet of width 64 and depth"),
        ("setup", {"depth": 3}, "of width 16 and depth 3"),
        ("protocol", {"eval_augment": "dsa"}, "step size 0.02, augmentation dsa"),
        ("protocol", {"eval_lr": 0.01}, "step size 0.01, no augmentation"),
        ("protocol", {"eval_batch": 7}, "batches of 7"),
        ("protocol", {"eval_decay": 0.25}, "eval_decay 0.25"),
        ("protocol", {"eval_students": 9}, "9 students"),
    ]
    results = [base, *(base | {part: base[part] | change} for part, change, _ in others), base | {"whitened": True}]
    entries = [entry for result in results for entry in scoreboard.entries_of(result)]
    assert scoreboard.distinct(entries) == entries and len(entries) == 2 * len(results)
    for result, (*_, said) in zip(results[1:], others, strict=False):
        assert all(said in entry.training for entry in scoreboard.entries_of(result)), said
    assert scoreboard.entries_of(results[-1])[0].training.endswith("no augmentation, whitened")
    assert len(scoreboard.distinct(entries + entries)) == len(entries)
    learned = [base | {"protocol": base["protocol"] | {"name": "mtt", "eval_lr": lr}} for lr in (0.01, 0.02)]
    both = [scoreboard.entries_of(result)[0] for result in learned]
    assert both[0].training == both[1].training and "step size" not in both[0].training
    assert len(scoreboard.distinct(both)) == 2  # the digest knows the step sizes that were learned
    older = {key: value for key, value in base.items() if key != "setup"}
    assert scoreboard.entries_of(older)[0].training.startswith("ours: convnet, 100 steps, 3 students")

    figure = accuracy_by_bytes(scoreboard.by_data(entries))
    names = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert len(set(names)) == 2 * len(results) and sum("augmentation dsa" in name for name in names) == 2
    drawn = [line for line in figure.axes[0].lines if line.get_marker() not in ("", "None", "|", "_")]
    assert max(len(line.get_xdata()) for line in drawn) == 1  # no line joins different students


def test_random_images_with_soft_labels_say_whose_labels_they_are(run):
    row = f"{run.folder}/02_baseline_mtt/with labels"
    found = score(row, beside="random").result
    entries = [e for name in ("one", "two") for e in scoreboard.entries_of(found | {"name": name})]
    assert [entry.method for entry in scoreboard.distinct(entries)] == [
        *("one", "random real images, soft labels of one", "two", "random real images, soft labels of two")
    ]
    by_experts = score(row, beside="random,bytes", labels="experts").result
    entries = [e for name in ("one", "two") for e in scoreboard.entries_of(by_experts | {"name": name})]
    methods = {entry.method: entry.training for entry in scoreboard.distinct(entries)}
    taught = {method: "labels by experts" in training for method, training in methods.items()}
    expected = {"one": True, "two": True, "random real images, labels by experts": True, "random real images": False}
    assert taught == expected  # as many real images as the bytes hold have hard labels


def test_methods_of_one_panel_of_the_scoreboard_have_different_colours():
    board = [e for result in scoreboard.read_board() for e in scoreboard.entries_of(result)]
    panels = scoreboard.by_data(scoreboard.distinct(board) + scoreboard.PUBLISHED_SCORES)
    named = [list(dict.fromkeys(entry.method for entry in entries)) for entries in panels.values()]
    colours = colours_of(named)
    for methods in named:
        assert len({colours[method] for method in methods}) == len(methods) > 5, methods


# --- controls and students --------------------------------------------------------------------------------------------


def test_controls_have_the_classes_of_the_set_and_no_image_twice():
    labels = torch.arange(300) % 3
    pools = [torch.nonzero(labels == c).flatten() for c in range(3)]
    wanted = torch.tensor([2, 2, 0, 1, 2])
    index = of_classes(wanted, pools, torch.Generator().manual_seed(0))
    assert torch.equal(labels[index], wanted) and len(index.unique()) == 5
    with pytest.raises(ValueError, match="101 images of class 0: the training split has 100"):
        of_classes(torch.zeros(101), pools, torch.Generator())


@pytest.mark.parametrize("build, parameters", [(convnet3, 320_010), (alexnet, 1_872_202), (vgg11, 9_231_114)])
def test_networks_are_those_of_the_papers(build, parameters):
    """320,010 is the count that DC and MTT give; the others: convolutions, norms and the linear layer by hand."""
    with torch.device("meta"):
        assert sum(p.numel() for p in build(3, 10, 32).parameters()) == parameters
    with torch.no_grad():
        for size in (8, 16):
            assert build(1, 3, size)(torch.zeros(2, 1, size, size)).shape == (2, 3)


def test_every_protocol_says_where_it_is_from():
    settings = resolve("digits")
    for protocol in PROTOCOLS.values():
        assert protocol.source and settings.eval_config(True, **protocol.changes, eval_student=protocol.student)
