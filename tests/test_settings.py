"""Settings and presets, whatever they hold; and the paper's baseline: its recipe as presets, and its protocols.

The recipe's numbers are compared with the authors' own commands, its protocols with a plain torch loop.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import random
import shutil
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml

from augdistill_core import flatten, initial_parameters, seeded, unflatten
from augdistill_report.commands.cli import main
from augdistill_report.commands.preflight import preflight
from augdistill_report.data.augmentations import DSA
from augdistill_report.data.datasets import load
from augdistill_report.places import PRESETS
from augdistill_report.run import Run, open_run
from augdistill_report.settings import (
    REPORT_NETWORK,
    STUDENT_REPORT,
    Settings,
    preset_text,
    read_preset,
    resolve,
)
from augdistill_report.studies.grid import read_grid
from augdistill_report.work.jobs import Subset
from augdistill_report.work.scoring import EvalConfig, Evaluation, train_student
from augdistill_report.work.setup import Setup
from augdistill_report.work.students import accuracy_of

RECIPES = ("cifar10", "cifar100", "mnist", "fashion")
COUNTS = (1, 10, 50)
COMMANDS = {  # how the author of MTT says to run it, as DC-Bench lists it
    ("cifar10", 1): "--syn_steps=50 --expert_epochs=2 --max_start_epoch=2 --lr_img=100 --lr_lr=1e-07 --lr_teacher=0.01 "
    "--zca",
    ("cifar10", 10): "--syn_steps=30 --expert_epochs=2 --max_start_epoch=20 --lr_img=100 --lr_lr=1e-05 "
    "--lr_teacher=0.001 --zca",
    ("cifar10", 50): "--syn_steps=30 --expert_epochs=2 --max_start_epoch=40 --lr_img=1000 --lr_lr=1e-05 "
    "--lr_teacher=0.001",
    ("cifar100", 1): "--syn_steps=20 --expert_epochs=3 --max_start_epoch=20 --lr_img=1000 --lr_lr=1e-05 "
    "--lr_teacher=0.01 --zca",
    ("cifar100", 10): "--syn_steps=20 --expert_epochs=2 --max_start_epoch=20 --lr_img=1000 --lr_lr=1e-05 "
    "--lr_teacher=0.01",
    ("cifar100", 50): "--syn_steps=80 --expert_epochs=2 --max_start_epoch=40 --lr_img=1000 --lr_lr=1e-05 "
    "--lr_teacher=0.01 --batch_syn=125 --zca",
}
FLAGS = {"lr_img": "pixel_lr", "lr_lr": "pixel_alpha_lr", "lr_teacher": "alpha"}  # others have our name


# --- the recipe's numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset, count", COMMANDS)
def test_the_numbers_are_those_of_the_author_s_commands(preset, count):
    settings = resolve(preset, {"images_per_class": count})
    given = dict(flag.removeprefix("--").partition("=")[::2] for flag in COMMANDS[preset, count].split())
    expected = {"zca": "zca" in given, "batch_syn": int(given.pop("batch_syn", 0))}
    given.pop("zca", None)
    expected |= {FLAGS.get(flag, flag): float(value) for flag, value in given.items()}
    assert len(expected) == 8
    assert {key: getattr(settings, key) for key in expected} == expected


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("preset", RECIPES)
def test_what_all_recipes_share(preset, count):
    s = resolve(preset, {"images_per_class": str(count)})
    assert (s.dataset, s.images_per_class, s.width, s.depth) == (preset, count, 128, 3)
    assert (s.experts, s.epochs, s.expert_lr, s.expert_batch, s.expert_momentum) == (100, 50, 0.01, 256, 0)
    assert (s.expert_augment, s.augment, s.eval_augment) == ("dsa", "dsa", "dsa")
    pixels = s.pixel_config
    assert (pixels.iterations, pixels.phi_optimizer, pixels.phi_lr, pixels.phi_momentum) == (
        5000,
        "SGD",
        s.pixel_lr,
        0.5,
    )
    assert (pixels.alpha_mode, pixels.alpha_optimizer, pixels.alpha_momentum) == ("raw", "SGD", 0.5)
    assert (pixels.alpha, pixels.alpha_lr) == (s.alpha, s.pixel_alpha_lr)
    assert (s.eval_students, s.eval_epochs, s.eval_batch, s.eval_lr) == (5, 1000, 256, 0)
    assert (s.eval_momentum, s.eval_decay) == (0.9, 5e-4)
    if preset in ("mnist", "fashion"):  # for which nobody has published one
        cifar = resolve("cifar10", {"images_per_class": count})
        assert dataclasses.replace(s, dataset="cifar10", size=32) == cifar


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("preset", RECIPES)
def test_they_fit_the_real_data(preset, count):
    place = Path(os.environ.get("AUGDISTILL_DATA", "/nowhere"))
    folder = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python", "mnist": "MNIST"}
    if not (place / folder.get(preset, "FashionMNIST")).is_dir():
        pytest.skip(f"AUGDISTILL_DATA names no folder that holds {preset}")
    preflight(resolve(preset, {"images_per_class": count, "data": str(place)}))


def written(path: Path, **values) -> str:
    path.write_text(yaml.safe_dump({"dataset": "digits", "size": 8, "width": 4} | values))
    return str(path)


def test_a_preset_chooses_by_images_per_class(tmp_path):
    parts = {1: {"syn_steps": 5, "zca": True}, 10: {"syn_steps": 7}}
    mine = written(tmp_path / "mine.yaml", syn_steps=3, images_per_class=10, with_images_per_class=parts)
    assert (resolve(mine).syn_steps, resolve(mine).zca, resolve(mine).width) == (7, False, 4)
    assert [resolve(mine, {"images_per_class": c}).syn_steps for c in ("1", 1, "10")] == [5, 5, 7]
    assert (
        resolve(mine, {"images_per_class": 1, "syn_steps": 9, "zca": "false"}).syn_steps == 9
    )  # what is asked for wins
    run = open_run("02_baseline_mtt", {"preset": mine, "out": str(tmp_path / "run"), "images_per_class": 1})
    assert (run.settings.syn_steps, run.settings.zca, len(run.train(run.base))) == (5, True, 10)


@pytest.mark.parametrize(
    "parts, says",
    [
        ({1: {"syn_stepz": 5}}, "with_images_per_class: 1: unknown key 'syn_stepz'"),
        ({10: {"syn_steps": 0}}, "with_images_per_class: 10: syn_steps=0: must be at least 1"),
        ({0: {}}, "with_images_per_class: 0: images_per_class=0: must be at least 1"),
        ({"ten": {}}, "with_images_per_class={'ten': {}}: must hold settings for each count"),
        ({1: [5]}, "must hold settings for each count"),
        ([1], "must hold settings for each count"),
    ],
)
def test_what_is_wrong_in_it_is_named(parts, says, tmp_path):
    mine = written(tmp_path / "mine.yaml", with_images_per_class=parts)
    with pytest.raises(ValueError) as error:
        resolve(mine, {"images_per_class": 1})
    assert str(error.value).startswith(mine) and says in str(error.value)


def test_a_number_that_is_not_in_it_is_refused():
    with pytest.raises(
        ValueError, match="images_per_class=5: preset 'cifar10' is a recipe for 1, 10, 50 images a class"
    ):
        resolve("cifar10", {"images_per_class": "5"})
    assert resolve("cifar10-small", {"images_per_class": 5}).images_per_class == 5  # no recipe: any number


@pytest.mark.parametrize("preset, dataset", [("cifar10", "cifar100"), ("cifar100", "cifar10"), ("cifar10", "mnist")])
def test_a_recipe_is_for_its_own_data_set(preset, dataset, capsys, tmp_path):
    arguments = ["report", "--preset", preset, "--set", f"dataset={dataset}", "--out", str(tmp_path / "run")]
    assert main(arguments) == 2 and not (tmp_path / "run").exists()
    assert f"dataset='{dataset}': preset '{preset}' is a recipe for {preset}" in capsys.readouterr().err


def test_a_grid_takes_a_recipe_as_it_is(tmp_path, capsys):
    """For one number of images a class, but not for several, each of which has other settings."""
    parts = {1: {"iterations": 2}, 2: {"iterations": 3}}
    small = dict(experts=2, epochs=4, syn_steps=3, expert_epochs=1, max_start_epoch=2, eval_steps=2, eval_students=2)
    mine = written(tmp_path / "mine.yaml", **small, depth=2, phi="identity", workers=1, with_images_per_class=parts)
    grid = tmp_path / "grid.yaml"
    grid.write_text("notebook: one_phi.ipynb\naxes: {images_per_class: [1, 2]}\n")
    (tmp_path / "one_phi.ipynb").write_bytes((PRESETS.parent / "sweeps" / "one_phi.ipynb").read_bytes())
    arguments = ["sweep", str(grid), "--preset", mine, "--out", str(tmp_path / "run")]
    assert main(arguments) == 2
    assert "varies images_per_class, but" in capsys.readouterr().err
    grid.write_text("notebook: one_phi.ipynb\naxes: {seed: [0]}\n")
    assert main([*arguments, "--set", "images_per_class=2"]) == 0
    (path,) = (tmp_path / "run").glob("sweeps/grid/cells/*/config.json")
    settings = yaml.safe_load(path.read_text())["settings"]
    assert (settings["images_per_class"], settings["iterations"]) == (2, 3)


# --- presets that are like others -------------------------------------------------------------------------------------


def test_no_preset_is_a_copy():
    """A line that changes nothing of what a preset takes over is left out."""
    for path in PRESETS.glob("*.yaml"):
        content = yaml.safe_load(path.read_text())
        if "like" in content:
            parent = read_preset(content["like"])[0]
            assert not [key for key, value in content.items() if value == parent.get(key, Settings)]


def test_a_preset_takes_over_what_it_does_not_change(tmp_path):
    (tmp_path / "far").mkdir()
    parts = {1: {"syn_steps": 5, "zca": True}, 10: {"syn_steps": 7}}
    base = written(tmp_path / "far" / "base.yaml", syn_steps=3, epochs=9, with_images_per_class=parts)
    middle, last = tmp_path / "middle.yaml", tmp_path / "far" / "last.yml"
    middle.write_text("like: far/base.yaml\nepochs: 8\nwith_images_per_class: {10: {width: 6}, 50: {width: 9}}")
    last.write_text("like: ../middle.yaml\nzca: false\nseed: 2")
    assert resolve(str(middle), {"images_per_class": 1}) == dataclasses.replace(resolve(base), epochs=8)
    of = {count: resolve(str(last), {"images_per_class": count}) for count in (1, 10, 50)}
    assert [(s.epochs, s.seed, s.zca, s.size) for s in of.values()] == [(8, 2, False, 8)] * 3  # its own line wins
    assert [(s.syn_steps, s.width) for s in of.values()] == [(5, 4), (7, 6), (3, 9)]
    mine = written(tmp_path / "mine.yaml", like="cifar10", dataset="cifar100")  # a name means one of the report's
    assert resolve(mine, {"images_per_class": "50"}).max_start_epoch == 40
    alone = tmp_path / "alone.yaml"  # as a sweep sends it to another machine
    alone.write_text(preset_text(str(last)))
    shutil.rmtree(tmp_path / "far")
    assert all(resolve(str(alone), {"images_per_class": count}) == settings for count, settings in of.items())


@pytest.mark.parametrize(
    "content, says",
    [
        ("like: nowhere", "mine.yaml: like: preset='nowhere': must be one of cifar10, "),
        ("like: nowhere.yaml", "mine.yaml: like: preset='nowhere.yaml': must be one of cifar10, "),
        ("like: ../sweeps/why_phi_failed", "like: preset='../sweeps/why_phi_failed': must be one of"),
        ("like: [smoke, digits]", "mine.yaml: like: preset=['smoke', 'digits']: must be one of"),
        ("like: mine.yaml", "mine.yaml: like: 'mine.yaml' inherits from itself: mine.yaml -> mine.yaml"),
        ("like: round.yaml", "like: 'mine.yaml' inherits from itself: mine.yaml -> round.yaml -> mine.yaml"),
        ("like: bad.yaml", "bad.yaml: unknown key 'sed': the nearest are seed, "),
        ("seed: 1\nwith_images_per_class: {1: {like: smoke}}", "with_images_per_class: 1: unknown key 'like'"),
    ],
)
def test_a_preset_that_cannot_be_like_another_says_why(content, says, tmp_path):
    (tmp_path / "mine.yaml").write_text(content)
    (tmp_path / "round.yaml").write_text("like: mine.yaml")
    (tmp_path / "bad.yaml").write_text("sed: 1")
    with pytest.raises(ValueError) as error:
        resolve(str(tmp_path / "mine.yaml"))
    assert says in str(error.value) and str(error.value).startswith(str(tmp_path / "mine.yaml"))


def test_the_student_report_s_setting_is_that_of_the_study():
    grid = read_grid(PRESETS.parent / "sweeps" / "why_phi_failed.yaml")
    report = grid.fixed | grid.rows["report", "SGD 1000"]
    assert {key: report[key] for key in STUDENT_REPORT} == STUDENT_REPORT and report["phi"] == REPORT_NETWORK
    rows = json.dumps(
        {": ".join(row): changes for row, changes in grid.rows.items()}, sort_keys=True
    ).encode()  # as when each row was written out
    assert hashlib.sha256(rows).hexdigest()[:12] == "9644e1ea5a68"


# --- settings under attack --------------------------------------------------------------------------------------------

HUGE = {
    "phis=/etc/passwd": "phis='/etc/passwd': is not a Python file; must be .py files that register phis",
    "phis=/dev/zero": "phis='/dev/zero': is not a Python file",
    "width=100000": "width=100000, depth=2: a student of ",
    "seed=99999999999999999999": "seed='99999999999999999999': must be below 2**63 ",
    "iterations=" + "9" * 5000: "iterations='999",
    "threads=100000000": "threads='100000000': must be in [1, 1024]",
    "data=a\0b": r"data='a\x00b': must be one line of text, without control characters",
    "data=" + "x" * 100_000: "must be at most 4096 characters",
    "expert_files=a\nb": r"expert_files='a\nb': must be one line of text",
    "data=\udcff": r"data='\udcff': must be one line of text",
    "x" * 100_000 + "=1": "unknown key 'xxx",
}


@pytest.mark.parametrize("change", HUGE, ids=[change[:20].encode("unicode_escape").decode() for change in HUGE])
def test_hostile_settings_are_refused_in_a_line_within_a_second(change, tmp_path, capsys):
    load("digits", 8)
    assert main(["report", "--preset", "nowhere"]) == 2  # imports what the command needs, which takes seconds
    assert capsys.readouterr().err
    start = time.process_time()
    assert main(["report", "--preset", "smoke", "--out", str(tmp_path / "run"), "--set", change]) == 2
    assert time.process_time() - start < 1
    error = capsys.readouterr().err
    assert HUGE[change] in error and error.count("\n") == 1 and len(error) < 600
    assert not (tmp_path / "run").exists()


def test_a_student_must_fit_the_machine_whole():
    """By its parameters, or by the feature maps of one batch."""
    for changes in ({"width": 100_000}, {"depth": 1, "width": 10_000_000}):
        with pytest.raises(ValueError, match=r"^width=\d+, depth=\d: a student of [\d,]+ parameters needs at least"):
            preflight(resolve("smoke", changes))
    preflight(resolve("smoke", {"width": 256, "expert_batch": 10**9}))  # a batch is the whole set at most


@pytest.mark.parametrize(
    "source, says",
    [
        ("import nowhere_at_all", "ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("def (", "SyntaxError: "),
        ("raise ValueError('two\\nlines')", "ValueError: two lines"),
        ("x = '\0'", "null bytes"),
    ],
)
def test_a_file_of_phis_that_cannot_be_run_is_named(source, says, tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text(source)
    assert main(["report", "--preset", "smoke", "--out", str(tmp_path / "run"), "--set", f"phis={path}"]) == 2
    error = capsys.readouterr().err
    assert f"phis='{path}': " in error and says in error and error.count("\n") == 1


ODD = (None, True, 0, -1, 3, 10**30, 1.5, float("nan"), float("-inf"), 10**400, "", "1e-3", "true", "9" * 5000, "a\0b")
ODD += ("smoke", "digits", "none", "0.1,2", ",", "folder:", "x" * 5000, [], [1], {}, {"seed": 1}, b"\xff", 1j, "\ud800")


def anything(rng: random.Random, depth: int = 0):
    kind = rng.randrange(8)
    if kind == 0 and depth < 3:
        return [anything(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 1 and depth < 3:
        return {a_key(rng): anything(rng, depth + 1) for _ in range(rng.randrange(4))}
    return rng.choice(ODD)


def a_key(rng: random.Random):
    keys = (*Settings.names(), "like", "set", "rows", "axes", "short", "with_images_per_class", "teach", "sed", "")
    return rng.choice(keys) if rng.random() < 0.9 else rng.choice((None, 1, 2.5, True, "<<", "a\nb"))


def taken(read, argument) -> bool:
    """Whether `read` takes the argument, rather than refusing it in one line."""
    try:
        read(argument)
        return True
    except ValueError as error:
        assert str(error).isprintable() and 0 < len(str(error)) < 5000
        return False


def test_settings_of_any_kind_are_taken_or_refused():
    """3,000 dictionaries of one to three keys, and every odd value for every key."""
    rng = random.Random(0)
    some = [{a_key(rng): anything(rng) for _ in range(rng.randint(1, 3))} for _ in range(3000)]
    assert 30 < sum(taken(Settings.from_dict, values) for values in some) < 300
    odd = [{key: value} for key in Settings.names() for value in ODD]
    assert 200 < sum(taken(Settings.from_dict, values) for values in odd) < len(odd) / 2


def test_presets_and_grids_of_any_kind_are_taken_or_refused(tmp_path):
    """Files of random keys and values, and the report's own with a few random bytes changed."""
    rng, path = random.Random(1), tmp_path / "mine.yaml"
    real = [(PRESETS / "cifar10.yaml").read_bytes(), (PRESETS.parent / "sweeps" / "why_phi_failed.yaml").read_bytes()]
    real.append(yaml.safe_dump({"notebook": "01_expert_trajectories.ipynb", "rows": {"a": {"seed": 1}}}).encode())
    took = {read_preset: 0, read_grid: 0}
    for turn in range(300):
        if turn % 3:
            content = bytearray(rng.choice(real))
            for _ in range(rng.randint(0, 3)):
                start, new = rng.randrange(len(content)), b"\0 *a &a [ { \xff : - <<".split(b" ")
                content[start : start + rng.randrange(4)] = rng.choice(new)
        else:
            values = {a_key(rng): anything(rng) for _ in range(rng.randrange(6))}
            content = repr(values).replace("'", '"').replace("None", "null").encode("utf-8", "surrogatepass")
        path.write_bytes(bytes(content))
        for read in took:
            took[read] += taken(read, str(path))
    assert min(took.values()) > 10


# --- its protocols ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    return load("digits", 8)


def test_students_train_as_in_a_plain_loop(digits):
    """MTT's: SGD with momentum and decay on batches of augmented images, for epochs, a tenth of the step halfway."""
    student, train = Setup(size=8, width=8).student(digits), digits.train.take(slice(0, 25))
    config = EvalConfig(eval_epochs=5, eval_steps=99, eval_batch=10, eval_lr=0.3, eval_momentum=0.9, eval_decay=0.05)
    dsa = DSA()
    found = train_student(student, None, train.images, train.labels, config, 7, "student", 0, augment=dsa)

    draw, shake = seeded(7, "student", 0), seeded(7, "student", 0, "augment")
    model = Setup(size=8, width=8).student(digits)
    with torch.no_grad():
        for p, value in zip(model.parameters(), unflatten(model, initial_parameters(model, draw)), strict=True):
            p.copy_(value)
    optimizer, steps = torch.optim.SGD(model.parameters(), 0.3, momentum=0.9, weight_decay=0.05), itertools.count()
    for _ in range(5):
        order = torch.randperm(25, generator=draw)
        for batch in (order[:10], order[10:20], order[20:]):
            if next(steps) == 7:  # of 15
                optimizer.param_groups[0]["lr"] = 0.03
            optimizer.zero_grad()
            F.cross_entropy(model(dsa(train.images[batch], generator=shake)), train.labels[batch]).backward()
            optimizer.step()
    expected = flatten(model.parameters()).detach()
    assert next(steps) == 15
    torch.testing.assert_close(flatten(found.parameters()).detach(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("epochs, images, steps", [(0, 10, 300), (1000, 10, 1000), (1000, 256, 1000), (10, 257, 20)])
def test_epochs_count_their_batches(epochs, images, steps):
    assert EvalConfig(eval_epochs=epochs, eval_batch=256).steps(images) == steps


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    changes = {"eval_lr": 0, "eval_epochs": 3, "alpha": 0.07, "alpha_lr": 0.2, "phi": "identity"}
    return Run("mine", resolve("smoke", changes), tmp_path_factory.mktemp("run"))


def test_a_student_s_step_size_is_the_one_that_was_learned(run):
    """Without a phi students take its initial value; with a given eval_lr (DC-Bench's) always that."""
    job = run.distillation("identity", run.base)
    alpha = job.stored_phi(run.store).alpha
    assert abs(alpha - 0.07) > 0.005
    rows = {
        "learned": run.evaluation(run.base, job),
        "plain": run.evaluation(run.base),
        "fixed": run.evaluation(run.base, job, eval_lr=0.01),
    }
    assert [row.config.eval_lr for row in rows.values()] == [0, 0.07, 0.01]
    scores, images = run.evaluate(rows), run.train(run.base)
    for name, lr in {"learned": alpha, "plain": 0.07, "fixed": 0.01}.items():
        config = dataclasses.replace(rows[name].config, eval_lr=lr)
        for k in range(2):
            model = train_student(run.student, None, images.images, images.labels, config, 0, "student", k)
            assert scores[name].test[k] == accuracy_of(model, run.data.test.opened())
    with pytest.raises(ValueError, match=r"eval_lr=0.0: must be above 0 without a phi"):
        Evaluation(run.settings.select(Setup), run.base, EvalConfig(eval_lr=0))


def test_fractions_and_unseen_images_are_scored_by_steps(run):
    """Their students take subset_eval_steps, whatever eval_epochs says: a thousand epochs of a set would never end."""
    from augdistill_report.studies.unseen import Repetition

    repetition = Repetition(run.settings)
    job = repetition.evaluation(Subset(0, fraction=0.5))
    assert job.config.steps(700) == run.settings.subset_eval_steps and job.config.eval_lr == 0.07


def test_notebook_02_shows_both_protocols(tmp_path, monkeypatch):
    """Where the preset leaves the step size to what was learned; on whitened images, which its pictures undo."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    changes = ("zca=true", "augment=dsa", "eval_lr=0", "eval_epochs=3", "eval_augment=dsa")
    arguments = [word for change in changes for word in ("--set", change)]
    assert main(["report", "--preset", "smoke", "--only", "02", "--out", str(tmp_path / "run"), *arguments]) == 0
    numbers = yaml.safe_load((tmp_path / "run" / "results" / "02_baseline_mtt.json").read_text())["numbers"]
    images = ("real images", "pixels (MTT)", "pixels (2018 loss)")
    scored = [name for name, value in numbers.items() if isinstance(value, dict) and "std" in value]
    assert scored == [f"{name}{how}" for name in images for how in ("", ", step size .01")]
    assert list((tmp_path / "cache" / "augdistill" / "zca").glob("zca-*.safetensors"))
