"""What the study measures, against other computations; and what it concludes, from cells whose answer is known."""

import copy
import dataclasses
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from augdistill_core import PHIS, DistillConfig, draw_segment, make_phi, matching_loss, seeded, train_experts
from augdistill_report.places import ROOT
from augdistill_report.run import picture
from augdistill_report.settings import resolve
from augdistill_report.show import plots
from augdistill_report.studies import diagnosis
from augdistill_report.studies import why as study
from augdistill_report.studies.grid import panel_and_name, read_grid
from augdistill_report.work.jobs import Subset
from augdistill_report.work.probes import probe
from augdistill_report.work.provenance import SOURCES
from augdistill_report.work.statistics import markdown_table


@pytest.fixture(scope="module")
def world():
    """The smoke preset's data, student and experts, and ten base images."""
    settings = resolve("smoke", {"size": 16})
    data = settings.load()
    student = settings.student(data)
    experts = train_experts(student, data.train.images, data.train.labels, settings, 0)
    return settings, data, student, experts, data.train.take(Subset(0, per_class=1).index(data))


# --- the zoo ----------------------------------------------------------------------------------------------------------


def test_receptive_fields_are_those_of_the_layers(world):
    *_, base = world
    sides = {"identity": 1, "pixels": 0, "distnet3": 1, "distnet5": 1, "distnet": 5, "distnet2": 9, "hallucinator": 5}
    for name, side in sides.items():
        phi = make_phi(name, base.images, 10, 0)
        assert diagnosis.receptive_field(phi, base.images[0]) == side, name
    assert diagnosis.receptive_field(make_phi("unet", base.images, 10, 0), base.images[0]) == 16  # all there is


def test_the_zoo_s_table(world):
    _, _, student, _, base = world
    rows = {row["phi"]: row for row in diagnosis.zoo(list(PHIS), base, 10, student)}
    assert list(rows) == list(PHIS)
    # distnet: conv3 1-6 on 14 x 14, deconv3 6-1 from there; the student: two blocks of width 8, and a linear layer
    passes = 16 * 16 * 9 * 8 + 8 * 8 * 8 * 9 * 8 + 8 * 4 * 4 * 10
    assert rows["distnet"]["cost in student passes"] == pytest.approx(2 * 14 * 14 * 9 * 6 / passes)
    assert rows["pixels"]["parameters"] == base.images.numel() and rows["pixels"]["in images"] == 10
    for name, row in rows.items():
        # what holds something for each position grows with the image, what holds something for each class with these
        larger = F.interpolate(base.images, size=24)
        count = {
            key: sum(p.numel() for p in make_phi(name, images, classes, 0).parameters())
            for key, images, classes in (("", base.images, 10), ("positions", larger, 10), ("labels", base.images, 11))
        }
        assert count[""] == row["parameters"]
        assert row["positions"] == (count["positions"] > count[""])
        # a phi of learned labels does not see the class, but has a number for each
        assert (row["labels"] or name == "labels") == (count["labels"] > count[""])
    assert {name for name, row in rows.items() if row["noise"]} == {
        n for n in rows if any(part in n for part in ("noise", "dist", "policy", "kornia:"))
    } - {
        "distnet4",
        "distnet5",
    }


def test_a_table_keeps_lines_and_bars_in_their_cells():
    from nbconvert.filters.markdown_mistune import markdown2html_mistune

    numbers = {"verdict": "**1 %**: a is best.\n\nAll the data: |b| = .5", "pair": (0.25, float("nan"))}
    page = markdown2html_mistune(markdown_table([{"results.json": k, "": v} for k, v in numbers.items()]))
    cells = [re.sub("<.*?>", "", cell) for cell in re.findall("<td>(.*?)</td>", page, re.DOTALL)]
    assert cells == ["verdict", "1 %: a is best. All the data: |b| = .5", "pair", "(0.25, not finite)"]


def test_markdown_shows_what_it_is_given():
    text = markdown_table(
        [{"phi": "a", "noise": True, "cost": 0.5}, {"phi": "b", "noise": False, "cost": float("nan")}]
    )
    assert text.splitlines() == ["| phi | noise | cost |", "|---|---|---|", "| a | ● | 0.5 |", "| b |  | not finite |"]
    assert markdown_table([{"a": "1"}, {"b": "2"}]).splitlines() == ["| a | b |", "|---|---|", "| 1 |  |", "|  | 2 |"]


def test_one_function_writes_markdown_tables():
    assert [module for module, text in SOURCES.text.items() if "|---" in text] == ["augdistill_report.work.statistics"]


# --- where the gradient goes ------------------------------------------------------------------------------------------


def test_the_first_step_by_layer_is_that_of_plain_autograd(world):
    settings, _, student, experts, base = world
    config = settings.select(
        DistillConfig, phi_optimizer="SGD", phi_lr=0.1, noise="once", alpha_mode="fixed", alpha=0.1
    )
    phi = make_phi("hallucinator", base.images, 10, 0)
    found = diagnosis.first_step(phi, base, experts, config, 7)

    _, start, target = draw_segment(experts, config, seeded(7, "distill"))
    own, names = copy.deepcopy(phi), [name for name, _ in student.named_parameters()]
    theta, images = start.clone().requires_grad_(), own(base.images)
    for _ in range(config.syn_steps):
        pieces = theta.split([p.numel() for p in student.parameters()])
        shaped = {n: t.view_as(p) for n, t, p in zip(names, pieces, student.parameters(), strict=True)}
        loss = F.cross_entropy(torch.func.functional_call(student, shaped, (images,)), base.labels)
        theta = theta - 0.1 * torch.autograd.grad(loss, theta, create_graph=True)[0]
    ((theta - target).square().sum() / (start - target).square().sum()).backward()
    for name, p in own.named_parameters():
        assert found[name]["weights"] == pytest.approx(float(p.detach().norm()), rel=1e-5)
        assert found[name]["gradient"] == pytest.approx(float(p.grad.norm()), rel=2e-2)  # a step of size 1, taken back
        assert found[name]["update"] == pytest.approx(0.1 * found[name]["gradient"], rel=2e-2)
    before = make_phi("hallucinator", base.images, 10, 0).state_dict()
    assert all(torch.equal(before[name], p) for name, p in phi.state_dict().items())  # phi itself stays as it was


def test_instance_norm_hides_the_size_of_the_images(world):
    _, _, student, _, base = world
    found = diagnosis.gains(student, base, [1.0, 3.0, 1000.0], 0)
    assert found["with instance norm"][0] == found["without"][0] == 0
    assert max(found["with instance norm"]) < 0.01 and found["without"][2] > found["without"][1] > 1


# --- probes -----------------------------------------------------------------------------------------------------------


class Shrink(nn.Module):
    def forward(self, images, **_):
        return 0.5 * images


def test_a_probe_is_the_matching_loss_of_plain_sgd(world):
    settings, _, student, experts, base = world
    config = settings.select(DistillConfig)
    found = probe(Shrink(), 0.05, base, experts, config, 3, 11)
    generator = seeded(11, "probe")
    for k in range(3):
        _, start, target = draw_segment(experts, config, generator)
        for name, images in (("loss", 0.5 * base.images), ("identity", base.images)):
            model = copy.deepcopy(student)
            vector_to_parameters(start.clone(), model.parameters())
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
            for _ in range(config.syn_steps):
                optimizer.zero_grad()
                F.cross_entropy(model(images), base.labels).backward()
                optimizer.step()
            end = parameters_to_vector(model.parameters()).detach()
            assert found[name][k] == pytest.approx(float(matching_loss(end, target, start)), rel=1e-3)
    assert found["change"] == pytest.approx([0.5] * 3) and found["spread"] == [0.0] * 3
    assert found["variance"] == pytest.approx([0.0] * 3, abs=1e-6)


def test_a_probe_has_the_augmentation_of_the_unroll_after_phi(world):
    settings, _, _, experts, base = world
    arguments = 0.05, base, experts, settings.select(DistillConfig), 3, 11
    halved = probe(Shrink(), *arguments)
    augmented = probe(lambda images, **_: images, *arguments, augment=lambda images, **_: 0.5 * images)
    assert augmented["loss"] == augmented["identity"] == pytest.approx(halved["loss"], rel=1e-6)


def test_a_probe_s_variance_and_spread_are_those_of_the_noise(world):
    settings, _, _, experts, base = world

    class Noise(nn.Module):
        size = 0.0

        def forward(self, images, *, generator, **_):
            return images + self.size * torch.randn(images.shape, generator=generator)

    found = []
    for size in (0.0, 0.3, 0.6):
        phi = Noise()
        phi.size = size
        found.append(probe(phi, 0.1, base, experts, settings.select(DistillConfig), 4, 0))
    rms = float(base.images.square().mean().sqrt())
    assert [np.mean(f["spread"]) for f in found] == pytest.approx([0, 0.3 * 2**0.5 / rms, 0.6 * 2**0.5 / rms], rel=0.05)
    assert found[0]["variance"] == pytest.approx([0] * 4, abs=1e-6)
    assert 1e-6 < np.mean(found[1]["variance"]) < np.mean(found[2]["variance"])


def test_phi_is_kept_as_it_was_along_the_way(tmp_path):
    """Before iterations 0, 1, 2, 4: what a run of just so many iterations gives."""
    from augdistill_report.files.store import Store
    from augdistill_report.studies.why import Case

    store, settings = Store(tmp_path), resolve("smoke", {"iterations": 5, "phi": "distnet2", "alpha_lr": 0.1})
    way = Case(settings).distilled.stored_moments(store)
    assert list(way) == ["0", "1", "2", "4", "last"]
    fresh = Case(settings).distilled.fresh_phi()
    assert all(torch.equal(a, b) for a, b in zip(way["0"].parameters(), fresh.parameters(), strict=True))
    for count, moment in ((1, "1"), (2, "2"), (4, "4"), (5, "last")):
        short = Case(dataclasses.replace(settings, iterations=count)).distilled.stored_phi(store).phi
        assert all(torch.equal(a, b) for a, b in zip(way[moment].parameters(), short.parameters(), strict=True))
    identity = Case(dataclasses.replace(settings, phi="identity")).distilled.stored_moments(store)
    assert list(identity) == ["0", "1", "2", "4", "last"]


# --- conclusions ------------------------------------------------------------------------------------------------------


GRID = read_grid(ROOT / "notebooks" / "sweeps" / "why_phi_failed.yaml")


def cell(row: str, seed: int, gain: float, stopped: dict | None = None, **more) -> dict:
    stopped = stopped or {}
    numbers = {"gain": {"mean": gain, "std": 0.0, "n": 2, "values": [gain] * 2}, "stopped": stopped, "states": {}}
    numbers["change of x"] = 0.015
    panel, name = panel_and_name(row)
    settings = {"alpha_mode": "raw" if panel == "report" else "log", "phi": name}
    return {"panel": panel, "row": name, "point": {"seed": seed}, "settings": settings, "numbers": numbers | more}


def cells_of(gains: dict[str, list[float]]) -> list[dict]:
    return [cell(row, k, gain) for row, values in gains.items() for k, gain in enumerate(values)]


DIVERGED = {"kind": "diverged", "reason": "diverged at iteration 3: loss nan"}

STUCK, LEARNT = [0.0, 0.001, -0.002], [0.05, 0.2, 0.011]
MEASURED = {
    "report: SGD .01": STUCK,
    "report: SGD .1": STUCK,
    "report: SGD 1000": [-0.4, -0.1, 0.0],
    "report: Adam for phi": LEARNT,
    "report: U-Net with noise": STUCK,
    "zoo: distnet3": STUCK,
    "zoo: distnet6": LEARNT,
    "long: pixels, MTT's SGD 100": [0.2, 0.2, 0.2],
    "long: U-Net": [0.2, 0.19, 0.185],
}


def verdict(gains: dict, claim: str) -> str:
    (row,) = (row for row in study.verdicts(cells_of(gains), GRID) if claim in row["claim"])
    return row["verdict"]


def test_verdicts_follow_the_numbers():
    claims = {
        "learn with SGD at 1000": ("true", "report: SGD 1000", LEARNT),
        "nor at .01 or .1": ("true", "report: SGD .1", LEARNT),
        "unable to learn": ("false", "report: Adam for phi", STUCK),
        "lies in the architecture": ("false", "report: U-Net with noise", LEARNT),
        "range of architectures": ("false", "zoo: distnet6", STUCK),
        "what pixels do": ("true", "long: U-Net", STUCK),
    }
    for claim, (expected, row, otherwise) in claims.items():
        assert verdict(MEASURED, claim).startswith(expected), claim
        assert not verdict(MEASURED | {row: otherwise}, claim).startswith(expected), claim
    # what it took to learn is said; and where only a larger phi learns, that is
    more = MEASURED | {"report: Adam for phi": STUCK, "report: both optimisers": LEARNT}
    assert "alpha's optimisers changed" in verdict(more, "unable")
    more |= {"report: both optimisers": STUCK, "mended: U-Net, Adam .003, log alpha": LEARNT}
    assert verdict(more, "unable") == "not refuted" and verdict(more, "lies in the architecture").startswith("in part")
    # one seed that does not gain is enough not to speak of learning
    assert not verdict(MEASURED | {"report: Adam for phi": [0.3, 0.3, 0.005]}, "unable").startswith("false")


def test_a_verdict_says_diverged_or_unchanged_only_of_runs_that_did_or_were():
    def said(row: str, claim: str, *gains: float, stops=(None, None), change: float | None = 0.015) -> str:
        cells = [
            cell(row, k, gain, stop, **{"change of x": change})
            for k, (gain, stop) in enumerate(zip(gains, stops, strict=True))
        ]
        (found,) = (found["verdict"] for found in study.verdicts(cells, GRID) if claim in found["claim"])
        return found

    large, small = ("report: SGD 1000", "SGD at 1000"), ("report: SGD .01", "nor at .01")
    assert said(*large, 0.003, -0.2) == "true: it adds nothing"
    assert said(*large, 0.003, -0.2, stops=(DIVERGED, None)) == "true: it diverges or adds nothing"
    assert said(*large, 0.003, -0.2, stops=(DIVERGED, DIVERGED)) == "true: it diverges"
    assert said(*small, 0.0, 0.001) == "true: it does not change"
    assert said(*small, 0.0, -0.3, change=0.9) == said(*small, 0.0, 0.0, change=None) == "true: it adds nothing"


@pytest.mark.parametrize("row", study.JUDGED, ids=": ".join)
def test_a_verdict_about_a_row_that_the_grid_has_not_is_refused(row):
    """Renaming a row must not silently drop its verdict; a row that was not run is fine."""
    renamed = {(*row, "renamed") if key == row else key: changes for key, changes in GRID.rows.items()}
    with pytest.raises(ValueError, match=re.escape(f"has no row {': '.join(row)!r}, which a verdict")):
        study.verdicts([], dataclasses.replace(GRID, rows=renamed))
    assert study.verdicts([], GRID) == []


def test_every_verdict_of_the_whole_study_is_given():
    """Each claim that the code can judge is judged where every row of the committed grid was run."""
    cells = [
        cell("", k, 0.0) | {"panel": panel, "row": name, "settings": {"alpha_mode": "raw", "phi": "unet"}}
        for panel, name in GRID.rows
        for k in range(3)
    ]
    assert len(study.verdicts(cells, GRID)) == 9


def test_an_alpha_that_fell_is_counted():
    cells = cells_of({"report: SGD .01": STUCK, "mended: distnet2": STUCK})
    cells[1]["numbers"]["states"] = {"alpha below zero": 24, "alpha at zero": 4}
    (row,) = (row for row in study.verdicts(cells, GRID) if "runs to zero" in row["claim"])
    assert row["measured"].startswith("in 1 of 3") and row["verdict"].startswith("true")


def test_a_claim_without_its_cells_is_left_out():
    rows = study.verdicts(cells_of({"report: SGD 1000": STUCK}), GRID)
    claims = ["phi does not learn with SGD at 1000", "a learned alpha runs to zero, and below"]
    assert [row["claim"] for row in rows] == claims and rows[1]["verdict"] == "not seen here"
    failed = {"panel": "report", "row": "Adam for phi", "point": {"seed": 0}, "error": "ValueError: no"}
    assert study.verdicts([failed], GRID) == []


def test_losses_count_the_runs_that_went_wrong():
    more = {
        "matching loss": 0.5,
        "identity at the same alpha": 0.8,
        "alpha": 0.1,
        "change of x": 0.2,
        "noise in the loss": 0,
    }
    cells = [cell("a", k, 0.1, stopped, **more) for k, stopped in enumerate([None, DIVERGED, None])]
    cells[0]["numbers"]["states"] = {"alpha at zero": 7}
    (row,) = study.losses([*cells, {"panel": "", "row": "b", "point": {"seed": 0}, "error": "no"}])
    assert row["matching loss"] == 0.5 and row["failed runs"] == "diverged in 1 of 3; alpha at zero in 1 of 3"


def test_a_heat_map_draws_whatever_a_sweep_finds():
    failed = {"panel": "x", "row": "c", "point": {"seed": 0}, "error": "ValueError: no gradient"}
    for cells in (
        [*cells_of({"x: a": [0.1, -0.2], "y: b": [0.3]}), failed],
        cells_of({"a": [0.1], "b": [0.2]}),
        [cell("a", 0, float("nan"), DIVERGED), cell("a", 1, 0.1)],
        [failed],
    ):
        assert picture(plots.heat_map(cells, "gain")).startswith(b"\x89PNG")
        assert picture(plots.heat_map(cells)) == picture(plots.heat_map(cells))


def test_a_run_out_of_minutes_is_no_divergence():
    out = {"kind": "minutes", "reason": "the time limit minutes=5 was reached at iteration 3 of 9"}
    measured = {"alpha": 0.1, "change of x": 0.0, "noise in the loss": 0.0, "matching loss": 1.0}
    measured["identity at the same alpha"] = 1.0
    stops = [None, out, DIVERGED, out]
    cells = [cell("report: SGD 1000", k, 0.0, stop, **measured) for k, stop in enumerate(stops)]
    (row,) = study.losses(cells)
    assert row["failed runs"] == "reached the time limit in 2 of 4; diverged in 1 of 4"
    assert "diverged in 1 of 4 runs" in str([v["measured"] for v in study.verdicts(cells, GRID)])
    crosses = [line for axis in plots.heat_map(cells, "gain").axes for line in axis.lines if line.get_marker() == "x"]
    assert len(crosses) == 1
