"""What a person does by hand: turns ranges, brings images, compares two phis, follows students, shares what is seen."""

import ast
import copy
import io
import json
import math

import numpy as np
import pytest
import torch
from pages import run_in, said, told, wait
from PIL import Image
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from augdistill_core import affine, augmented, seeded
from augdistill_report import load_phi
from augdistill_report.data.augmentations import augmentation
from augdistill_report.explorer.choices import by_hand, fresh
from augdistill_report.explorer.controls import LINE_LENGTH, one_line
from augdistill_report.explorer.page import Page
from augdistill_report.explorer.ranges import learned_ranges, links_of, loss_along
from augdistill_report.explorer.state import Explorer, View
from augdistill_report.explorer.uploads import UPLOAD_BYTES, Own, read_own
from augdistill_report.studies.unseen import SEGMENTS
from augdistill_report.work.probes import probe


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with experts, and no trained phi."""
    run = run_in(tmp_path_factory.mktemp("hands"), images_per_class=2)
    run.experts()
    return run


@pytest.fixture
def explorer(run):
    """`explorer(phi)`: an explorer of the run that shows this phi (or chain), untrained."""

    def choose(phi: str) -> Explorer:
        explorer = Explorer(run)
        explorer.choose(fresh(run, phi))
        return explorer

    return choose


# --- ranges -----------------------------------------------------------------------------------------------------------

WITH_RANGES = ["policy", "policy_class", "policy_image", "kornia:RandomAffine", "kornia:ColorJitter", "unet+policy"]


@pytest.mark.parametrize("phi", WITH_RANGES)
def test_a_turned_range_is_the_one_that_was_asked_for_and_no_other(run, explorer, phi):
    explorer, few = explorer(phi), run.train(run.base)
    before, rows = explorer.look(View()).rows["phi(x)"], explorer.first.dials()
    learned = explorer.first.learned["0"]

    def ranges(of) -> dict[str, float]:
        found = {}
        for number, link in enumerate(links_of(of)):
            if hasattr(link, "kinds"):
                found |= {(number, k): v for k, v in learned_ranges(link, few.images, few.labels).items()}
        return found

    first = ranges(learned)
    for row in rows:
        wanted = row.most / 3
        explorer.first.turn({row.name: wanted})
        now = ranges(explorer.first.moments["0"].phi)
        assert now.pop((row.link, row.kind)) == pytest.approx(wanted / row.factor, rel=1e-4)
        assert now == pytest.approx({key: value for key, value in first.items() if key in now})
    assert ranges(learned) == first  # what was learned is not touched
    explorer.first.turn({row.name: 0.0 for row in rows})
    if "unet" not in phi:
        assert explorer.look(View()).change < 1e-3
    explorer.first.turn({})
    assert torch.equal(explorer.look(View()).rows["phi(x)"], before)


def test_degrees_are_degrees_and_pixels_are_pixels(run, explorer):
    explorer = explorer("policy")
    names = [row.name for row in explorer.first.dials()]
    still = dict.fromkeys(names, 0.0)
    explorer.first.turn(still | {"rotation": 30.0, "shift x": 2.0})
    view = View(count=5)
    _, fed, _ = explorer.images(view)
    noise = torch.randn(len(fed), len(names), generator=seeded(0, "explorer"))
    turns, right = math.radians(30) * noise[:, names.index("rotation")], 2 / 8 * noise[:, names.index("shift x")]
    nothing = torch.zeros(len(fed))
    expected = affine(fed, turns, nothing, nothing, right, nothing)[:5]
    assert torch.allclose(explorer.look(view).rows["phi(x)"], run.data.pixels(expected), atol=1e-3)


def test_the_links_of_a_chain_go_off_and_on(run, explorer):
    explorer = explorer("distnet2+policy")
    alone = Explorer(run)
    alone.choose(alone.choices["untrained distnet2"])
    explorer.first.turn({}, frozenset({1}))
    assert torch.equal(explorer.look(View()).rows["phi(x)"], alone.look(View()).rows["phi(x)"])
    explorer.first.turn({}, frozenset({0, 1}))
    assert explorer.look(View()).change == 0
    with pytest.raises(ValueError, match=r"links off \[2\]: this phi has 2"):
        explorer.first.turn({}, frozenset({2}))


def test_marks_show_what_was_learned_and_what_the_experts_were_taught(tmp_path):
    run = run_in(tmp_path, expert_augment="affine")
    explorer = Explorer(run)
    explorer.choose(explorer.choices["untrained policy"])
    rows = {row.name: row for row in explorer.first.dials()}
    assert rows["rotation"].taught == pytest.approx(math.degrees(0.15)) and rows["shift x"].taught == pytest.approx(
        8 * 0.087
    )
    assert rows["contrast"].taught == 0 and rows["rotation"].learned == pytest.approx(math.degrees(0.03), rel=1e-4)


def test_the_loss_along_a_range_is_that_of_policies_which_hold_it(run, explorer):
    explorer = explorer("policy")
    first, (row, *_) = explorer.first, explorer.first.dials()
    experts, ticks = explorer.experts(), []
    found = loss_along(
        row,
        lambda value: first.turned_at(row.name, value, "0"),
        first.choice,
        run.data,
        experts,
        lambda *t: ticks.append(t),
    )
    assert found[row.learned] == (0, 0) and list(found) == sorted(found) and len(ticks) == len(found)
    losses = {}
    for value in (row.learned, 3 * row.learned):
        policy = first.choice.like.fresh_phi()
        policy.hold(dict.fromkeys(policy.kinds, 0.03) | {"rotation": math.radians(value)})
        alpha, config = run.settings.alpha, first.choice.like.config
        p = probe(policy, alpha, run.train(run.base), experts, config, SEGMENTS, run.settings.seed)
        losses[value] = np.subtract(p["loss"], p["variance"])
    over = losses[3 * row.learned] - losses[row.learned]
    assert found[3 * row.learned][0] == pytest.approx(over.mean(), abs=1e-4)
    assert found[3 * row.learned][1] == pytest.approx(over.std(ddof=1) / SEGMENTS**0.5, abs=1e-4)


def test_a_client_can_turn_nothing_that_is_not_there(run, opened):
    page = opened(run)
    page.phi.value = "untrained policy"
    grid = page.grid.value
    page.ranges.board.values = {"rotation": 20.0}
    turned = page.grid.value
    assert turned != grid and "turned by hand" in page.caption.value
    for values, off, line in (
        ({"rotation": 1e9}, [], "rotation=1000000000.0: must be in"),
        ({"rotation": float("nan")}, [], "rotation=nan: must be in"),
        ({"rotation": "much"}, [], "rotation=much: must be in"),
        ({"rotation": True}, [], "rotation=True: must be in"),
        ({"twist": 1.0}, [], "range 'twist': this phi has rotation"),
        ({}, [7], r"links off \[7\]: this phi has 1"),
        ({}, ["0"], r"links off \['0'\]: must be whole numbers"),
    ):
        if off:
            page.ranges.board.off = off
        else:
            page.ranges.board.values = values
        told(page, line)
        assert page.grid.value == turned and page.ranges.board.values == {"rotation": 20.0}
    page.learning.keep()
    told(page, "untrained policy: was not trained here")
    page.ranges.measure.click()
    assert "loss along rotation: measured" in wait(page) and page.valley.layout.display == ""
    page.ranges.back.click()
    assert page.grid.value == grid
    page.phi.value = "untrained unet"
    assert page.ranges.board.rows == [] and "has no ranges" in page.ranges.note.value


# --- own images -------------------------------------------------------------------------------------------------------


def png_of(mode: str = "RGB", size=(40, 30)) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((9, 7)).resize(size).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("mode, channels", [("RGB", 1), ("RGB", 3), ("L", 3), ("RGBA", 1), ("P", 3)])
def test_an_image_becomes_what_the_data_set_has(mode, channels):
    own = read_own("mine.png", content := png_of(mode), (channels, 8, 8))
    expected = Image.open(io.BytesIO(content)).convert("RGB").resize((8, 8), Image.Resampling.BILINEAR)
    expected = np.array(expected.convert("L") if channels == 1 else expected, dtype=np.float32) / 255
    found = own.pixels[0].permute(1, 2, 0).squeeze().numpy()
    assert own.pixels.shape == (1, channels, 8, 8) and np.abs(found - expected.squeeze()).max() < 3 / 255
    many = own
    for _ in range(25):
        many = many + own
    assert len(many.names) == len(many.pixels) == 20


def test_what_is_no_image_is_refused_by_name_and_what_is_one_is_shown(run, opened):
    page = opened(run)
    page.phi.value = "untrained policy"
    seen = page.grid.value

    def drop(name, content: bytes, **more):
        page.take_file(page.upload, {"name": name, "last": True} | more, [content] if content else [])

    for name, content, more, line in (
        ("letter.png", b"no picture", {}, "letter.png is not a readable image"),
        ("big.png", b"", {"size": UPLOAD_BYTES + 1}, r"big.png: has 8.0 MB; must have at most 8 MB"),
        ("film.gif", film_of(3), {}, "film.gif is not a readable image .it has 3 frames"),
        ("empty.png", b"", {"size": "much"}, "empty.png is not a readable image"),
    ):
        drop(name, content, **more)
        told(page, line)
    assert page.grid.value == seen and page.explorer.upload is None
    drop("mine.png", png_of(), left_out=3)
    text = said(page)
    assert "1 of your images, each as 8 x 8 pixels, grey" in text and "3 more were left out" in text
    look = page.explorer.look(page.view)
    assert look.columns == ["mine.png"]
    assert torch.allclose(look.rows["x"], read_own("mine.png", png_of(), (1, 8, 8)).pixels, atol=1e-5)
    page.share.link.click()
    told(page, "your own images are not part of a link")
    page.phi.value = "untrained pixels"
    told(page, "untrained pixels: is bound to its base images and takes no others")
    page.phi.value = "untrained policy"
    page.remove.click()
    assert page.grid.value == seen


def film_of(frames: int) -> bytes:
    buffer, pictures = io.BytesIO(), [Image.new("L", (8, 8), 80 * k) for k in range(frames)]
    pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:])
    return buffer.getvalue()


def test_a_phi_that_reads_the_class_gets_the_one_that_was_chosen(run, explorer):
    explorer = explorer("policy_class")
    explorer.upload = Own(["mine"], torch.rand(1, 1, 8, 8, generator=seeded(0)))
    *_, labels = explorer.images(View(label=7))
    assert set(labels.tolist()) == {7}


# --- two at once ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["untrained distnet2", "dsa", "randaugment", "kornia:RandomAffine(degrees=40)"])
def test_each_of_two_is_shown_as_if_it_were_alone(run, explorer, other):
    explorer, view = explorer("policy"), View(strength=0.7, seed=3)
    alone = explorer.look(view)
    choice = explorer.choices[other] if other in explorer.choices else by_hand(run, other)
    explorer.compare(choice)
    both = explorer.look(view)
    explorer.compare(None)
    explorer.choose(choice)
    second = explorer.look(view)
    assert torch.equal(both.rows["A"], alone.rows["phi(x)"]) and torch.equal(both.rows["B"], second.rows["phi(x)"])
    assert torch.equal(both.rows["B - A"], ((both.rows["B"] - both.rows["A"]) / 2 + 0.5).clamp(0, 1))
    assert both.changes == [alone.change, second.change]
    if other not in explorer.choices:
        _, fed, labels = explorer.images(view)
        out = augmented(augmentation(other, run.data), fed, labels, torch.arange(len(fed)), seeded(3, "explorer"))
        expected = fed + 0.7 * (out - fed)
        assert torch.equal(second.rows["phi(x)"], run.data.pixels(expected)[: len(second.columns)])


def test_two_are_evaluated_side_by_side_and_a_wrong_name_is_a_line(run, opened):
    page = opened(run)
    page.kornia.value = "RandomAfine"
    page.add.click()
    told(page, "kornia has no augmentation RandomAfine: did you mean .*RandomAffine|RandomAfine.*RandomAffine")
    page.kornia.value = "kornia:RandomAffine(degrees=15)"
    page.add.click()
    assert page.other.value == "hand-designed kornia:RandomAffine(degrees=15)" and "B: " in page.caption.value
    page.students.evaluate.click()
    assert "evaluated" in wait(page)
    found = page.scores.value
    config = run.settings.eval_config(True)
    assert found.count("±") == 4 and f"n = {config.eval_students}" in found
    assert "too few to say (n = 2 students)" in found and config.eval_students == 2
    page.other.value = "nothing"
    assert "B: " not in page.caption.value


# --- students ---------------------------------------------------------------------------------------------------------


def test_students_go_where_plain_sgd_takes_them(run, explorer):
    explorer = explorer("policy")
    experts, base = explorer.experts(), run.train(run.base)
    paths = explorer.paths(View(), experts)
    assert list(paths) == ["no augmentation", "phi"] and not torch.equal(*(p[0][-1] for p in paths.values()))
    model, start = copy.deepcopy(experts.student), experts.trajectories[0][0].clone()
    vector_to_parameters(start.clone(), model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=run.settings.alpha)
    for _ in range(run.settings.syn_steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(base.images), base.labels).backward()
        optimizer.step()
    end = parameters_to_vector(model.parameters())
    assert torch.allclose(paths["no augmentation"][0][-1], end, atol=1e-6) and not torch.allclose(start, end, atol=1e-4)


def test_the_picture_of_students_follows_the_sliders(run, opened):
    page = opened(run)
    page.phi.value = "untrained policy"
    page.students.where.value = True
    seen = page.paths.value
    assert seen and page.paths.layout.display == ""
    page.strength.value = 0.3
    assert page.paths.value != seen
    page.students.where.value = False
    assert page.paths.layout.display == "none"


# --- what can be shared -----------------------------------------------------------------------------------------------


def seen_by(page) -> tuple:
    return page.grid.value, page.drawn.value, page.caption.value, page.students.where.value


def test_a_state_brings_back_the_same_picture(run, opened):
    page = opened(run)
    page.phi.value = "untrained policy"
    page.ranges.board.values = {"rotation": 12.0}
    page.other.value = "hand-designed dsa"
    page.strength.value, page.seed.value, page.label.value, page.count.value = 0.5, 4, 3, 2
    page.students.where.value = True
    state = json.loads(json.dumps(page.share.state()))
    assert state["ranges"] == {"rotation": 12.0} and state["label"] == 3 and "noise" not in state
    again = Page(run, state)
    by_link = opened(run)
    by_link.front.query = f"?token=secret&explorer={json.dumps(state)}"
    assert seen_by(again) == seen_by(by_link) == seen_by(page)
    cell = page.share.as_code()
    assert ast.literal_eval(cell.partition("Page(run, ")[2].rstrip().removesuffix(")")) == state
    pictures = page.share.frames()
    assert len(pictures) == 10 and len({picture.tobytes() for picture in pictures}) > 5


@pytest.mark.parametrize(
    "query, line",
    {
        "?explorer={": "is not a state",
        "?explorer=" + "[" * 5000: "is not a state",
        '?explorer={"phi":"shaky"}': "phi 'shaky': was not found here",
        '?explorer={"strength":9}': r"strength=9.*: must be in \[0, 1.5\]",
        '?explorer={"strength":"much"}': "strength='much': must be a float",
        '?explorer={"ranges":{"twist":1}}': "range 'twist'",
        '?explorer={"ranges":[1]}': r"ranges=\[1\]",
        '?explorer={"off":[5]}': r"links off \[5\]",
        '?explorer={"label":99}': "label=99: must be one of",
        '?explorer={"data":"../../etc"}': "data='../../etc': must be one of",
        '?explorer={"iteration":"77"}': "iteration='77': must be one of",
        '?explorer={"other":"hand-designed kornia:Nothing"}': "kornia has no augmentation Nothing",
        '?explorer={"eval":"1"}': "eval: is not part of the explorer's state",
    }.items(),
)
def test_a_link_that_does_not_fit_is_one_line(run, opened, query, line):
    page = opened(run)
    page.front.query = query
    told(page, line)
    seen = page.grid.value
    page.seed.value = 9
    assert page.grid.value != seen and "Error" not in said(page)


def test_a_phi_that_lives_on_the_page_is_saved_before_it_is_shared(tmp_path, opened):
    page = opened(run_in(tmp_path))
    page.learning.network.value, page.learning.iterations.value = "policy", 2
    page.learning.train.click()
    wait(page)
    page.share.link.click()
    told(page, "lives on this page only; save it")
    page.ranges.board.values = {"rotation": 10.0}
    page.learning.save.click()
    told(page, "the ranges are turned by hand")
    page.ranges.back.click()
    page.learning.save.click()
    assert load_phi(page.run.folder / "phis" / "mine.safetensors").about["phi"] == "policy"
    page.phi.value = "file mine"
    assert page.share.state()["phi"] == "file mine" and len(page.ranges.board.rows) == 7


@pytest.mark.parametrize("text", ["", "short.", "One. Two.", "a" * 400, "word " * 80, "First. " + "b " * 200, "<b>&"])
def test_a_line_is_one_line_and_nothing_is_lost(text):
    shown = one_line(text)
    first, _, rest = shown.partition(" <details><summary>more</summary> ")
    assert len(first) <= LINE_LENGTH + 10 and "<b>" not in shown
    if len(text) > LINE_LENGTH:
        whole = (first.removesuffix(" …") + rest.removesuffix("</details>")).replace(" ", "")
        assert whole == text.replace(" ", "")
