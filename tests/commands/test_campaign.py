"""Campaigns: the shipped list fits its recipe, and what a time limit or a kill stops goes on from where it was."""

import dataclasses
import sys
import time

import pytest
import yaml
from helpers import augdistill, until

from augdistill_core import DistillConfig
from augdistill_report.commands import campaign
from augdistill_report.commands.cli import main
from augdistill_report.files.sealed_json import read_json
from augdistill_report.files.store import OutOfTime, Store
from augdistill_report.places import NOTEBOOKS
from augdistill_report.settings import Settings, resolve
from augdistill_report.studies.pieces import read_campaign
from augdistill_report.work.distillation import Distillation
from augdistill_report.work.experts import Expert, Together
from augdistill_report.work.jobs import Subset
from augdistill_report.work.scoring import EvalConfig, Evaluation, Score
from augdistill_report.work.setup import Setup

SHIPPED = yaml.safe_load((NOTEBOOKS / "campaigns" / "cifar10-gpu.yaml").read_text())
CONTROL = "{row: no augmentation, fraction: 0.1}"


@pytest.mark.parametrize("tiny", [False, True])
def test_the_shipped_pieces_fit_their_experts_and_each_has_a_control(tiny):
    pieces = read_campaign("cifar10-gpu", {}, tiny).pieces
    images = {piece.images for piece in pieces}
    assert {"1 image a class", "10 images a class", "1 %", "10 %", "50 %", "all the data"} == images
    for piece in pieces:
        s = piece.settings
        if piece.phi:
            assert s.max_start_epoch + s.expert_epochs <= s.epochs, piece.name
        of_images = [other for other in pieces if other.images == piece.images]
        assert of_images and any(not other.phi for other in of_images)
        assert {other.settings.eval_steps for other in of_images} == {s.eval_steps}  # one budget for a comparison
        assert {other.settings.zca for other in of_images} == {s.zca}
    mtt = {piece.images: piece.settings for piece in pieces if piece.mtt}
    ten = mtt["10 images a class"]
    assert tiny or (ten.syn_steps, ten.max_start_epoch, ten.epochs, ten.pixel_lr, ten.zca) == (30, 20, 22, 100, True)


def a_list(folder, *lines, **more):
    """The file of a campaign with the preset smoke and these lines."""
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({"preset": "smoke", "pieces": [yaml.safe_load(line) for line in lines]} | more))
    return path


@pytest.mark.parametrize(
    "line, wrong",
    {
        "{fraction: 0.1}": "piece 2: row is missing",
        "{row: a, fraction: 1.5}": "piece 2: fraction=1.5: must be in (0, 1]",
        "{row: a, fraction: yes}": "piece 2: fraction=True: must be a float",
        "{row: a, phi: unett}": "piece 2: unknown phi 'unett'",
        "{row: a, iteratons: 3}": "piece 2: unknown key 'iteratons': the nearest are iterations",
        "{row: a, fracton: 0.1}": "piece 2: unknown key 'fracton': the nearest are fraction",
        "{row: a, mtt: true}": "piece 2: only and mtt: are for a piece with a phi",
        "{row: a, phi: unet, only: all}": "piece 2: only='all': must be stored or added",
        "{row: a, fraction: 0.1, images_per_class: 1}": "piece 2: fraction and images_per_class: give one",
        "{row: a, max_start_epoch: 99}": "'a' on 1 image a class: max_start_epoch=99",
        CONTROL: "piece 2: 'no augmentation' on 10 % is there already; a repetition needs another seed",
    }.items(),
)
def test_a_wrong_piece_is_one_line_before_any_work(tmp_path, capsys, line, wrong):
    assert main(["campaign", str(a_list(tmp_path, CONTROL, line)), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert wrong in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def small(**changes) -> Settings:
    return resolve("smoke", {"size": 8, "width": 4, "experts": 2, "epochs": 3, "iterations": 3} | changes)


@pytest.mark.parametrize("kind", [Distillation, Expert, Together])
def test_at_its_deadline_a_job_keeps_its_state_and_ends_as_if_it_had_not_been_stopped(tmp_path, kind):
    setup = small().select(Setup)
    job = {
        Distillation: lambda: Distillation(setup, "unet_noise", Subset(0, per_class=1), small().select(DistillConfig)),
        Expert: lambda: Expert(setup, 1),
        Together: lambda: Together(setup, (0, 1)),
    }[kind]()
    for other in job.needs() if kind is Distillation else []:
        for place in "ab":
            other.run(Store(tmp_path / place))
    stops, late = 0, Store(tmp_path / "a", deadline=0.0)
    while not late.has(job.kind, job.spec()):
        try:
            job.run(late)
        except OutOfTime:
            stops += 1
    assert stops == 3  # after each iteration, or each epoch
    job.run(Store(tmp_path / "b"))
    for made in job.needs() if kind is Together else [job]:
        (ours, about), (undisturbed, same) = (Store(tmp_path / p).load(made.kind, made.spec()) for p in "ab")
        assert about == same and ours.keys() == undisturbed.keys()
        assert all(ours[name].equal(undisturbed[name]) for name in ours)


def test_work_without_progress_is_stopped_but_no_import(tmp_path, monkeypatch):
    with pytest.raises(OutOfTime), campaign.alarm(time.monotonic() + 0.05):
        time.sleep(60)
    with campaign.alarm(time.monotonic() + 0.05):
        pass
    time.sleep(0.1)  # the alarm is off
    (tmp_path / "slow_to_import.py").write_text("import time\ntime.sleep(0.3)\nwhole = True\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(OutOfTime), campaign.alarm(time.monotonic() + 0.05):
        import slow_to_import

        assert slow_to_import.whole
        time.sleep(60)
    assert sys.modules["slow_to_import"].whole


def test_students_that_cannot_finish_in_time_are_given_up(tmp_path):
    config = small().select(EvalConfig, eval_students=4, eval_steps=2, eval_lr=0.02)
    setup = small().select(Setup)
    score = Score(setup, Evaluation(setup, Subset(0, per_class=1), config))
    state = campaign.run_until(score, Store(tmp_path, time.monotonic()), lambda share: None)
    assert state.startswith("stopped by the time limit in accuracy at 25 %, all of it takes about")


LINES = (
    "{row: pixels (MTT), images_per_class: 1, phi: pixels, mtt: true}",
    "{row: real images, images_per_class: 1}",
    "{row: identity, images_per_class: 1, phi: identity}",
    "{row: bad, images_per_class: 1, phi: identity, expert_lr: 1.0e+30}",
    CONTROL,
    "{row: no augmentation, fraction: 0.1, seed: 1}",
    "{row: affine, fraction: 0.1, eval_augment: affine}",
    "{row: U-Net, fraction: 0.1, phi: unet_class_noise+policy, draws: 2, batch_syn: 10}",
    "{row: U-Net of a blank image, fraction: 0.1, phi: unet_class_noise+policy, draws: 2, batch_syn: 10, only: stored}",
)


def test_a_campaign_goes_on_after_a_limit_and_a_kill_and_finds_what_an_undisturbed_one_finds(tmp_path, capsys):
    path = str(a_list(tmp_path, *LINES, tiny={"size": 8, "width": 4, "iterations": 3}))
    command = ["campaign", path, "--tiny", "--device", "cpu"]
    out = tmp_path / "out"
    assert main([*command, "--out", str(out), "--minutes", "1e-9"]) == 0
    assert "0 of 9 pieces done; the same command goes on from there" in capsys.readouterr().out
    file = out / "campaigns" / "mine-tiny.json"
    assert {row["state"] for row in read_json(file, "campaign")["rows"]} == {"not started"}
    assert not file.with_suffix(".png").exists()

    process = augdistill(tmp_path, *command, "--out", out)
    until(lambda: list(out.glob("artefacts/accuracy-*.safetensors")))
    process.kill()
    process.communicate()
    kept = {p: p.stat().st_mtime_ns for p in out.glob("artefacts/[!.]*.safetensors")}
    for place in (out, tmp_path / "undisturbed"):
        assert main([*command, "--out", str(place)]) == 0
    assert all(p.stat().st_mtime_ns == moment for p, moment in kept.items() if p.exists())
    found, undisturbed = (
        read_json(place / "campaigns" / "mine-tiny.json", "campaign") for place in (out, tmp_path / "undisturbed")
    )
    rows = {(row["row"], row["images"], row["seed"]): row for row in found["rows"]}
    assert [row["state"] == "done" for row in rows.values()] == [name[0] != "bad" for name in rows]
    assert rows["bad", "1 image a class", 0]["state"].startswith("failed: expert 0 diverged")
    assert [row.get("test") for row in undisturbed["rows"]] == [row.get("test") for row in found["rows"]]
    assert found["tiny"] and rows["U-Net", "10 %", 0]["settings"]["draws"] == 2
    done = [row for row in rows.values() if row["state"] == "done"]  # some by the process that was killed
    assert all(row["test"]["n"] == 2 and row["seconds"] > 0 for row in done)
    table = file.with_suffix(".md").read_text().splitlines()
    assert len(table) == 2 + 8 and sum("(n = 4 students)" in line for line in table) == 1  # two seeds in one line
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_damaged_result_costs_its_own_piece_alone(tmp_path, capsys):
    path = str(a_list(tmp_path, *LINES, tiny={"size": 8, "width": 4, "iterations": 3}))
    command = ["campaign", path, "--tiny", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    for kind in ("accuracy", "distilled"):  # the scores are gone, so the pieces need their phis, which are damaged
        for file in (tmp_path / "out" / "artefacts").glob(f"{kind}-*.safetensors"):
            file.unlink() if kind == "accuracy" else file.write_bytes(b"damaged")
    assert main(command) == 0
    rows = read_json(tmp_path / "out" / "campaigns" / "mine-tiny.json", "campaign")["rows"]
    for row in rows:
        assert row["state"].startswith("failed: ") if row["phi"] or row["row"] == "bad" else row["state"] == "done", row


def test_a_report_of_the_same_run_finds_a_campaign_s_jobs(tmp_path):
    """Its jobs have the same specifications as those of notebook 02."""
    from augdistill_report.run import Run

    (piece, *_) = read_campaign(str(a_list(tmp_path, *LINES)), {}).pieces
    run = Run("02_baseline_mtt", piece.settings, tmp_path)
    distilled = run.distillation("pixels", run.base, run.settings.pixel_config)
    evaluation = run.evaluation(run.base, distilled)
    *_, ours, score = piece.jobs(tmp_path)
    assert (ours, score) == (distilled, Score(evaluation.setup, evaluation))
    assert dataclasses.replace(piece, phi="", mtt=False).jobs(tmp_path) == [
        Score(evaluation.setup, run.evaluation(run.base))
    ]
