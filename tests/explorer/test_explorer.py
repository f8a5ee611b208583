"""The explorer without a browser: what it finds and shows, training in the background, wrong and hostile input."""

import gc
import io
import itertools
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from ipywidgets import Widget
from pages import run_in, said, told, wait
from PIL import Image
from safetensors.torch import save_file

from augdistill_core import PHIS, DistillConfig, Phi, augmented, register_phi, seeded
from augdistill_method import phi as phi_module
from augdistill_report import load_phi
from augdistill_report.explorer.choices import choice_titles
from augdistill_report.explorer.page import Page
from augdistill_report.explorer.state import Explorer, Noised, View, frames
from augdistill_report.explorer.training import Background, Stopped, Training
from augdistill_report.files.phi_files import save_phi
from augdistill_report.files.store import SealedFile, open_stored, write_sealed
from augdistill_report.settings import REPORT_NETWORK, STUDENT_REPORT
from augdistill_report.show.image_grids import difference_image, film, image_grid, png
from augdistill_report.work.probes import phi_images


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with trained phis: that of notebook 03, some with other settings, and the pixels of notebook 02."""
    run = run_in(tmp_path_factory.mktemp("runs"))
    rows = {"unet": run.distillation(run.settings.phi, run.base)}
    rows["other"] = run.distillation(run.settings.phi, run.base, phi_lr=0.5)
    rows["other alpha"] = run.distillation(run.settings.phi, run.base, alpha=0.5)
    rows["pixels"] = run.distillation("pixels", run.base, run.settings.pixel_config)
    rows["report"] = run.distillation(REPORT_NETWORK, run.base, **STUDENT_REPORT)
    run.distill(rows)
    run.save("mine", rows["unet"])
    return run, rows


@pytest.fixture
def copy(finished, tmp_path):
    """The same run in a folder of its own, to be damaged."""
    shutil.copytree(finished[0].folder, tmp_path / "smoke")
    return run_in(tmp_path)


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_a_sheet_shows_every_pixel_where_it_belongs(rng_untouched):
    rng = np.random.default_rng(0)
    grey, colour = (torch.from_numpy(rng.random((n, c, 5, 4), dtype=np.float32)) for n, c in ((3, 1), (2, 3)))
    with rng_untouched():
        sheet = np.array(image_grid({"a": grey, "b": colour}, ["x", "y", "z"], cell=8))
    for images, line in ((grey, 0), (colour, 1)):
        for place, image in enumerate(images):
            expected = (image.expand(3, 5, 4).permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
            tall = expected.repeat(2, 0).repeat(2, 1)
            found = sheet[24 + 16 * line :, -3 * 14 + 14 * place :][:10, :8]
            assert np.array_equal(found, tall)
    assert (sheet[24 + 16 :, -14:] == 255).all()  # a shorter row leaves paper


@pytest.mark.parametrize("size", [1, 32, 200])
def test_sheets_of_any_size_hold_a_picture(size):
    images = torch.rand(2, 1, size, size, generator=seeded(0))
    images[0, 0, 0, 0] = torch.nan
    sheet = image_grid({"": images, "no images": images[:0]}, ["a very long name of a class", ""])
    assert Image.open(io.BytesIO(png(sheet))).size == sheet.size
    assert png(sheet) == png(sheet)


def test_no_difference_is_grey():
    assert torch.equal(difference_image(torch.tensor([0.0, -1.0, 1.0, -3.0])), torch.tensor([0.5, 0.0, 1.0, 0.0]))


def test_a_film_plays_its_frames_in_order():
    shades = [Image.new("RGB", (30, 20), (k, 255 - k, 40)) for k in (0, 90, 200)]
    played = Image.open(io.BytesIO(film(shades, seconds=0.1)))
    assert played.n_frames == 3 and played.info["loop"] == 0
    for k, frame in enumerate(shades):
        played.seek(k)
        assert np.abs(np.array(played.convert("RGB"), int) - np.array(frame, int)).max() < 8
        assert played.info["duration"] == (100 if k < 2 else 600)
    with pytest.raises(ValueError, match="all of one size"):
        film([shades[0], Image.new("RGB", (31, 20))])
    with pytest.raises(ValueError, match="needs frames"):
        film([])


# --- looking ----------------------------------------------------------------------------------------------------------


def test_it_opens_with_what_notebook_03_trained(finished):
    run, rows = finished
    explorer = Explorer(run)
    assert explorer.choice.name.startswith("unet_noise, Adam 0.001, 1 a class, 4 iterations")
    assert list(explorer.moments) == ["0", "1", "2", "last"] and explorer.problems == []
    look, base = explorer.look(View(count=10)), run.train(run.base)
    assert look.columns == [f"{c} ●" for c in run.data.classes]
    assert torch.equal(look.rows["x"], run.data.pixels(base.images))
    phi, pixels = (rows[name].stored_phi(run.store).phi for name in ("unet", "pixels"))
    given = base.images[list(range(10)) + [0] * 6], torch.cat([base.labels, base.labels[:1].expand(6)])
    expected = augmented(phi, *given, torch.arange(16), seeded(0, "explorer"))[:10]
    assert torch.equal(look.rows["phi(x)"], run.data.pixels(expected))
    assert torch.equal(look.rows["pixels (MTT)"], run.data.pixels(pixels.pixels))
    size = (expected - base.images).square().mean().sqrt() / base.images.square().mean().sqrt()
    assert look.change == pytest.approx(size.item())


def test_every_slider_does_what_it_says(finished):
    run, _ = finished
    explorer = Explorer(run)
    explorer.choose(explorer.choices["untrained distnet2"])
    whole = explorer.look(View())
    assert explorer.look(View(strength=0)).change == 0
    assert explorer.look(View(strength=0.5)).change == pytest.approx(whole.change / 2)
    assert torch.equal(explorer.look(View()).rows["phi(x)"], whole.rows["phi(x)"])
    assert not torch.equal(explorer.look(View(seed=1)).rows["phi(x)"], whole.rows["phi(x)"])
    still = [explorer.look(View(noise=0, seed=seed)).rows["phi(x)"] for seed in (0, 1)]
    assert torch.equal(*still)
    for count, label in itertools.product((1, 7, 20), (-1, 0, 9)):
        look = explorer.look(View(count=count, label=label, image=20))
        assert len(look.columns) == count and len(look.draws[f"image {count}"]) == 6
        index = explorer.index(View(count=count, label=label))
        assert len(set(index.tolist())) == count
        assert label < 0 or set(run.data.train.labels[index].tolist()) == {label}
    assert set(explorer.index(View(count=10)).tolist()) == set(run.base.index(run.data).tolist())
    with pytest.raises(ValueError, match="label=10: must be a class of digits, at most 9"):
        explorer.look(View(label=10))
    for key, value in {"strength": 1.6, "noise": -0.1, "count": 21, "image": 0, "label": -2}.items():
        with pytest.raises(ValueError, match=f"{key}={value}"):
            View(**{key: value})


@pytest.mark.parametrize("name", PHIS)
def test_any_phi_of_the_zoo_can_be_turned(finished, name, rng_untouched):
    run, _ = finished
    explorer = Explorer(run)
    explorer.choose(explorer.choices[f"untrained {name}"])
    with rng_untouched():
        look = explorer.look(View(strength=0.7, noise=1.5, count=20))
        explorer.prepare(View())
    bound = explorer.moments["0"].bound
    assert len(look.columns) == (10 if bound else 20)
    assert all(images.min() >= 0 and images.max() <= 1 for images in look.rows.values())


def test_noise_is_measured_from_the_mean_of_draws():
    class Shifted(Phi):
        stochastic = True

        def forward(self, images, *, generator, **_):
            return images + torch.randn(len(images), 1, 1, 1, generator=generator)

    x, given = torch.zeros(4, 1, 3, 3), {"labels": torch.zeros(4).long(), "index": torch.arange(4)}
    draws = [Shifted()(x, generator=seeded(k, "mean"), **given) for k in range(4)]
    mean, draw = torch.stack(draws).mean(0), Shifted()(x, generator=seeded(5), **given)
    for noise in (0, 0.3, 1, 2):
        out = Noised(Shifted(), noise)(x, generator=seeded(5), **given)
        assert torch.allclose(out, mean + noise * (draw - mean), atol=1e-6)


def test_equal_titles_show_the_settings_that_differ(finished):
    run, rows = finished
    named = choice_titles([rows["unet"], rows["other alpha"], rows["other"]])
    assert named[0] == "unet_noise, Adam 0.001, 1 a class, 4 iterations, alpha 0.02"
    assert named[1] == "unet_noise, Adam 0.001, 1 a class, 4 iterations, alpha 0.5"
    assert named[2] == "unet_noise, Adam 0.5, 1 a class, 4 iterations"
    shown = {name.removesuffix(" (stopped: diverged)") for name in Explorer(run).choices}
    assert set(named) < shown


def test_a_film_of_stored_moments_ends_with_the_trained_phi(finished):
    run, rows = finished
    moments_of = {name: rows[name].stored_moments(run.store) for name in ("unet", "report")}
    pictures = frames(run, moments_of)
    assert len(pictures) == len(moments_of["unet"]) and len({picture.size for picture in pictures}) == 1
    base = run.train(run.base)
    last = {"x": run.data.pixels(base.images)}
    last |= {name: run.data.pixels(phi_images(phis["last"], base, 0)) for name, phis in moments_of.items()}
    assert png(pictures[-1]) == png(image_grid(last, run.titles(base), 56, title="iteration last"))


# --- what is found, and what is not -----------------------------------------------------------------------------------


def test_no_runs_yet_offers_to_train(tmp_path, opened):
    page = opened(run_in(tmp_path))
    assert "No phi has been trained on this data yet" in said(page) and "Train one here" in said(page)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_runs_beside_this_one_are_found_and_other_data_are_not(copy, tmp_path, opened):
    page = opened(run_in(tmp_path, "beside"))
    assert any(name.startswith("unet_noise, Adam 0.001") for name in page.phi.options)
    assert "file smoke/mine" in page.phi.options
    bigger = opened(run_in(tmp_path, "bigger", size=16))
    assert not any(choice.trained for choice in bigger.explorer.choices.values())
    assert "5 results of other data, or of another version of the code" in said(bigger)
    assert "1 saved phis of other data" in said(bigger)


def test_saved_phis_of_one_name_are_all_there_and_each_opens_itself(finished, copy, opened):
    _, rows = finished
    run_in(copy.folder.parent, "beside").folder.joinpath("phis").mkdir(parents=True)
    save_phi(copy.folder.parent / "beside" / "phis" / "mine.safetensors", rows["other"], copy.store, strength=0.5)
    page = opened(copy)
    names = [name for name in page.phi.options if name.startswith("file")]
    assert [name.partition(" (stopped")[0] for name in names] == ["file beside/mine", "file mine"]
    for name, row in [(names[1], "unet"), (names[0], "other")]:
        page.phi.value = name
        shown = page.explorer.first.learned["last"].state_dict()
        saved = rows[row].stored_phi(copy.store).phi.state_dict()
        assert all(torch.equal(shown[key], saved[key]) for key in saved)
        assert ("saved for strength 0.5" in page.caption.value) == (row == "other")
    page.strength.value = 0.5
    assert "saved for strength" not in page.caption.value


def test_damaged_files_are_named_and_the_page_lives_on(copy, opened):
    stored = sorted((copy.folder / "artefacts").glob("distilled-*.safetensors"))
    job = copy.distillation(copy.settings.phi, copy.base)
    (other,) = {p for p in stored if "0.5" in json.dumps(job_spec(p)["config"]["phi_lr"])}
    content = bytearray(other.read_bytes())
    content[-3] ^= 255  # a tensor: told when it is read
    other.write_bytes(content)
    broken = copy.store.path("distilled", copy.distillation(REPORT_NETWORK, copy.base, **STUDENT_REPORT).spec())
    broken.write_bytes(broken.read_bytes()[:100])
    (copy.folder / "phis" / "pickle.safetensors").write_bytes(b"PK\x03\x04 a pickle")
    page = opened(copy)
    for name in (broken.name, "pickle.safetensors"):
        assert f"{name} is damaged" in said(page)
    before = page.phi.value
    assert before.startswith(f"{job.phi}, Adam 0.001")
    grid, (name,) = page.grid.value, [name for name in page.phi.options if "Adam 0.5" in name]
    page.phi.value = name
    assert 'role="alert"' in said(page) and f"{other} is damaged" in said(page)
    told(page, "its values have changed since they were written")
    assert page.phi.value == before and page.grid.value == grid
    page.seed.value = 3
    assert page.grid.value != grid and "Error" not in said(page)


def job_spec(path: Path) -> dict:
    return open_stored(path, "distilled").about["spec"]


@pytest.fixture
def shaken(tmp_path):
    """A run with a stored and a saved phi whose name nobody has registered any more."""
    run = run_in(tmp_path)

    @register_phi("shaky")
    class Shaky(Phi):
        def __init__(self, images, classes):
            super().__init__()
            self.far = torch.nn.Parameter(torch.ones(1))

        def forward(self, images, **_):
            return images * self.far

    run.save("shaken", run.distillation("shaky", run.base, iterations=1))
    run.distill({"chain": run.distillation("shaky+policy", run.base, iterations=1)})
    del phi_module._REGISTRY["shaky"]
    return run


def test_phis_that_are_not_registered_here_are_counted_quietly(shaken, opened):
    page = opened(shaken)
    assert page.explorer.problems == ["3 of phis that are not registered here (shaky)"]
    assert "delete" not in said(page) and "damaged" not in said(page)
    assert not any("shaky" in name for name in page.phi.options)


def test_it_opens_whatever_lies_in_the_folders(copy, opened):
    """Files that are no files, not ours, or sealed with unusable headers; and the first choice is damaged, too."""
    results, phis = copy.folder / "artefacts", copy.folder / "phis"
    good = next(results.glob("distilled-*.safetensors"))
    content = SealedFile(good, "distilled").about
    header = SealedFile(phis / "mine.safetensors", "phi").about
    (results / "distilled-folder.safetensors").mkdir()
    (results / "distilled-link.safetensors").symlink_to(results / "nowhere")
    (phis / "link.safetensors").symlink_to(results / "nowhere")
    (phis / "folder.safetensors").mkdir()
    shutil.copy(next(results.glob("expert-*.safetensors")), results / "distilled-expert.safetensors")
    nested = {"augdistill 1": '{"about": ' + "[" * 10**5}
    for place in (results / "distilled-nested.safetensors", phis / "nested.safetensors"):
        save_file({"a": torch.zeros(2)}, place, nested)
    for number, spec in enumerate(({}, {"setup": []}, content["spec"] | {"subset": 1}, content["spec"] | {"phi": 7})):
        write_sealed(results / f"distilled-{number}.safetensors", "distilled", content | {"spec": spec}, {})
    for key in ("data", "shape", "subset", "setup", "phi"):
        without = {name: value for name, value in header.items() if name != key}
        write_sealed(phis / f"without-{key}.safetensors", "phi", without, {})
    huge = header | {"shape": [1, 200000, 200000]}
    write_sealed(phis / "huge.safetensors", "phi", huge, {"a": torch.zeros(1)})
    job = copy.distillation(copy.settings.phi, copy.base)
    first = copy.store.path(job.kind, job.spec())
    first.write_bytes(first.read_bytes()[:-3] + b"\1\2\3")  # a tensor of what it opens with
    page = opened(copy)
    text = said(page)
    damaged = [
        "distilled-nested",
        "nested",
        "huge",
        *(f"without-{key}" for key in ("data", "shape", "subset", "setup")),
    ]
    for name in [*damaged, first.stem]:
        assert f"{name}.safetensors is damaged" in text
    for name in ("distilled-folder", "distilled-link", "folder", "link"):
        assert f"{name}.safetensors: no such file" in text
    assert "distilled-expert.safetensors is not ours" in text and "4 results of other data" in text
    assert page.phi.value and "file mine" in page.phi.options
    for preset in page.data.options:
        if preset in ("digits", "smoke"):
            page.data.value = preset
            assert "Error" not in said(page)


def test_damaged_pixels_leave_their_row_out(copy, opened):
    job = copy.distillation("pixels", copy.base, copy.settings.pixel_config)
    path = copy.store.path(job.kind, job.spec())
    path.write_bytes(path.read_bytes()[:-5])
    page = opened(copy)
    assert "pixels (MTT)" not in page.explorer.look(page.view).rows
    assert path.name in said(page)


def test_data_that_are_not_here_are_a_line_and_the_old_ones_stay(finished, opened, monkeypatch, tmp_path):
    monkeypatch.delenv("AUGDISTILL_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    page = opened(finished[0])
    page.data.value = "cifar100"
    told(page, "dataset='cifar100': not found.*augdistill data fetch cifar100")
    assert page.data.value == "smoke" and page.explorer.run is finished[0]
    page.data.value = "digits"  # of another size, beside it
    assert page.explorer.data.shape == (1, 16, 16) and page.learning.steps.value == 15
    assert len(page.label.options) == 11 and "No phi has been trained" in said(page)
    assert not (finished[0].folder.parent / "digits").exists()  # looking leaves nothing


def test_a_phi_of_ones_own_is_there_too(tmp_path, opened):
    own = tmp_path / "own.py"
    own.write_text(
        "from augdistill_core import Phi, register_phi\n"
        "@register_phi('darker')\n"
        "class Darker(Phi):\n"
        "    def __init__(self, images, classes):\n"
        "        super().__init__()\n"
        "    def forward(self, images, **_):\n"
        "        return images - 1\n"
    )
    page = opened(run_in(tmp_path, phis=str(own), phi="darker"))
    assert page.phi.value == "untrained darker" and "darker" in page.learning.network.options
    assert "relative change of x" in page.caption.value


# --- training ---------------------------------------------------------------------------------------------------------


def nothing(*_):
    pass


@pytest.mark.parametrize("phi", ["unet_noise", "distnet2"])
def test_interrupted_training_gives_the_same_bits(tmp_path, phi):
    run = run_in(tmp_path)
    training = Training(run, phi, run.settings.select(DistillConfig, iterations=1))
    told_to_stop = iter([False] * 4 + [True] * 9)

    def check():
        if next(told_to_stop):
            raise Stopped

    def thread(iterations, check):
        background = Background()
        errors = []
        background.start(lambda: training.more(iterations, check, nothing), errors.append)
        background.thread.join()
        return errors

    run.experts()
    assert thread(2, nothing) == [None]
    assert thread(50, check) == [None]
    done = len(training.history)
    assert done == 7 and list(training.moments()) == ["0", "1", "2", "4", "now"]
    job = training.store()
    other = run_in(tmp_path, "other")
    expected = other.distillation(phi, other.base, iterations=done)
    assert job == expected  # so notebook 03 finds it
    found, made = job.stored(run.store), expected.stored(other.store)
    assert found[1] == made[1] and training.alpha == made[1]["alpha"]
    assert found[0].keys() == made[0].keys() and all(torch.equal(t, made[0][k]) for k, t in found[0].items())
    now, last = training.moments()["now"], job.stored_moments(run.store)["last"]
    assert all(torch.equal(a, b) for a, b in zip(now.parameters(), last.parameters(), strict=True))


def test_the_report_s_setting_dies_and_the_mended_one_learns(tmp_path, opened):
    page = opened(run_in(tmp_path))
    page.learning.iterations.value = 30
    page.learning.report.click()
    assert (
        page.learning.network.value,
        page.learning.optimizer.value,
        page.learning.step.value,
        page.learning.mode.value,
    ) == (
        REPORT_NETWORK,
        "SGD",
        1000,
        "raw",
    )
    page.learning.train.click()
    status = wait(page)
    assert 'role="alert"' in status and "distnet2, SGD 1000 diverged at iteration" in status
    (died,) = page.learning.here()
    job = died.store()
    assert job.stored(page.run.store)[1]["stopped"]["reason"] == died.stopped and job.config.iterations == 30
    page.learning.train.click()
    wait(page)
    told(page, "diverged.*start again with other settings")
    page.strength.value = 0.5  # the page lives on
    assert "Error" not in said(page)
    page.learning.mended.click()
    page.learning.train.click()
    assert "distnet2, Adam 0.01 was trained for 30 iterations" in wait(page)
    _, learns = page.learning.here()
    losses = [record["loss"] for record in learns.history]
    assert sum(losses[-10:]) < sum(losses[:10]) and page.curves.layout.display == ""
    page.learning.report.click()  # and back: the same training is found again
    page.learning.mended.click()
    page.learning.iterations.value = 1
    page.learning.train.click()
    wait(page)
    assert len(page.learning.here()) == 2 and len(learns.history) == 31


def test_what_was_trained_is_scored_saved_and_found_by_notebook_03(tmp_path, opened):
    page = opened(run_in(tmp_path))
    page.learning.network.value, page.learning.iterations.value = "unet_noise", 3
    page.learning.train.click()
    wait(page)
    page.strength.value = 0.5
    page.students.evaluate.click()
    assert "evaluated" in wait(page)
    run = page.run
    job = page.learning.here()[0].store()
    for row, (distilled, changes) in {
        "no augmentation": (None, {}),
        "identity": (None, {}),
        "trained here": (job, {"phi_strength": 0.5}),
    }.items():
        score = run.evaluation(run.base, distilled, **changes).stored(run.store)[1]["validation"]
        text = f"{100 * np.mean(score):.1f} ± {100 * np.std(score, ddof=1):.1f} % (n = 2)"
        assert text in page.scores.value.split(row)[1].split("</tr>")[0]
    page.learning.name.value = "my phi"
    page.moment.value = "1"
    page.learning.save.click()
    told(page, "iteration 1 is shown: a file holds phi after its training; choose now first")
    assert not (run.folder / "phis").exists()
    page.moment.value, page.noise.value = "now", 0.5
    page.learning.save.click()
    path = run.folder / "phis" / "my_phi.safetensors"
    assert f"saved, for strength 0.5 and noise 1 (0.5 is shown): {path}" in said(page)
    page.noise.value = 1.0
    assert load_phi(path).about["strength"] == 0.5 and "file my_phi" in page.phi.options
    changes = said(page).split("with ")[1].split("</div>")[0].replace("-p ", "").split()
    given = dict(zip(changes[::2], changes[1::2], strict=True))
    settings = run_in(tmp_path, "other", **given)
    assert run.store.has(job.kind, settings.distillation(settings.settings.phi, settings.base).spec())
    page.learning.save.click()
    told(page, "my_phi.safetensors exists already; choose another")
    page.learning.name.value = " "
    page.learning.save.click()
    told(page, "name: is empty")
    page.phi.value = "untrained unet"
    page.learning.name.value = "other"
    page.learning.save.click()
    told(page, "untrained unet: was not trained here")


def test_students_take_the_step_size_that_phi_learned_where_they_are_to(tmp_path, opened):
    page = opened(run_in(tmp_path, eval_lr=0.0, alpha=0.05))
    page.learning.iterations.value = 3
    page.learning.train.click()
    wait(page)
    page.students.evaluate.click()
    assert "evaluated" in wait(page)
    run, job = page.run, page.learning.here()[0].store()
    score = run.evaluation(run.base, job).stored(run.store)[1]["validation"]
    assert (
        f"{100 * np.mean(score):.1f} ± {100 * np.std(score, ddof=1):.1f} %"
        in page.scores.value.split("trained here")[1]
    )
    page.learning.save.click()
    page.phi.value = "file mine"
    page.students.evaluate.click()
    told(page, "mine.safetensors: does not hold the alpha that it learned")


def test_one_thing_at_a_time_and_it_can_be_stopped(tmp_path, opened):
    page = opened(run_in(tmp_path))
    page.learning.iterations.value = 500
    page.learning.train.click()
    assert (
        page.learning.train.disabled
        and page.students.evaluate.disabled
        and page.learning.save.disabled
        and not page.stop.disabled
    )
    deadline = time.monotonic() + 60
    while not (page.learning.here() and page.learning.here()[0].history):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    page.learning.start_training()
    told(page, "a training or an evaluation is running")
    seen = page.grid.value
    page.strength.value = 0  # a slider works meanwhile
    assert page.grid.value != seen
    page.stop.click()
    assert "was trained for" in wait(page)
    assert 0 < len(page.learning.here()[0].history) < 500
    assert page.stop.disabled and not page.learning.train.disabled
    page.students.evaluate.click()
    page.stop.click()
    assert "stopped" in wait(page) or "evaluated" in said(page)


def test_impossible_settings_are_lines(tmp_path, opened):
    page = opened(run_in(tmp_path))
    page.learning.target.value = 10
    page.learning.train.click()
    told(page, "M = 10: the experts have 4 snapshots")
    page.learning.target.value = 4  # the start is then always the first snapshot
    page.learning.iterations.value = 1
    page.learning.train.click()
    assert "trained for 1 iterations" in wait(page)
    page.learning.take_mended()
    page.learning.network.value = "distnet2"
    page.learning.step.value = 1e-5
    assert page.errors == []


def test_no_widget_s_value_goes_unchecked_to_disk_or_to_work(tmp_path, opened, monkeypatch):
    """A client sets any trait of a slider: its bounds first, then a value."""
    page = opened(run_in(tmp_path))
    page.learning.iterations.value = 1
    page.learning.train.click()
    wait(page)
    page.strength.max = 1e301
    page.strength.value = 1e300
    told(page, r"strength=1e\+300: must be in \[0, 1.5\]")
    page.learning.save.click()
    told(page, r"strength=1e\+300: must be in \[0, 1.5\]")
    assert not (page.run.folder / "phis").exists()
    page.students.evaluate.click()
    told(page, r"strength=1e\+300")
    page.strength.value = 1
    monkeypatch.setattr(Training, "more", lambda *_: pytest.fail("it must not start"))
    for key, slider, wrong in (
        ("iterations", page.learning.iterations, 10**9),
        ("syn_steps", page.learning.steps, 10**9),
        ("expert_epochs", page.learning.target, 11),
        ("phi_lr", page.learning.step, 1e9),
        ("alpha", page.learning.alpha, 100.0),
    ):
        right, slider.max = slider.value, 10**10 if isinstance(wrong, int) else 12
        slider.value = wrong
        page.learning.train.click()
        told(page, f"{key}=.*: must be in")
        slider.value = right
    page.count.max = 10**6
    page.count.value = 10**6
    told(page, "count=1000000: must be in")
    page.count.value = 10
    page.students.evaluate.click()
    assert "evaluated" in wait(page)


def test_a_stored_phi_whose_run_stopped_is_marked(finished, opened):
    run, rows = finished
    page = opened(run)
    marked = [name for name in page.phi.options if name.endswith(" (stopped: diverged)")]
    stopped = {job.phi for job in rows.values() if job.stored_phi(run.store).stopped}
    assert REPORT_NETWORK in stopped and {name.partition(",")[0] for name in marked} == stopped
    page.phi.value = next(name for name in marked if name.startswith("distnet2, SGD 1000, 1 a class"))
    assert "(stopped: diverged)" in page.caption.value


def test_an_error_that_nobody_expected_is_a_line_too(tmp_path, opened, monkeypatch):
    page = opened(run_in(tmp_path))

    @register_phi("broken")
    class Broken(Phi):
        def __init__(self, images, classes):
            super().__init__()

        def forward(self, images, **_):
            raise ZeroDivisionError("a phi with an error")

    page.look_again()
    before = page.grid.value
    page.phi.value = "untrained broken"
    assert "unexpected ZeroDivisionError: a phi with an error" in said(page)
    told(page, "a phi with an error")
    assert page.grid.value == before
    page.phi.value = "untrained unet"
    assert "Error" not in said(page)
    monkeypatch.setattr(Training, "more", lambda *_: {}["nothing"])
    page.learning.train.click()
    assert "unexpected KeyError" in wait(page)
    told(page, "nothing")


def test_closing_while_it_trains_ends_the_thread(tmp_path):
    page = Page(run_in(tmp_path))
    page.learning.iterations.value = 500
    page.learning.train.click()
    page.close()
    assert not page.background.busy and page.errors == []


def test_hundreds_of_changes_leave_nothing_behind(finished, opened):
    from matplotlib.figure import Figure

    page = opened(finished[0])
    widgets, figures = models(), count_of(Figure)
    for change in range(60):
        page.strength.value = 0.05 * (change % 30)
        page.label.value = change % 10
    assert models() == widgets and count_of(Figure) == figures
    assert count_of(Image.Image) < 10


def models() -> int:
    """How many widgets there are in this process."""
    return len(Widget.get_manager_state()["state"])


def count_of(kind: type) -> int:
    gc.collect()
    return sum(type(o) is kind for o in gc.get_objects())


def test_the_page_says_where_it_is_live_when_it_is_not(finished, opened):
    shown = opened(finished[0])._repr_mimebundle_()
    assert "make app" in shown["text/html"] and "application/vnd.jupyter.widget-view+json" in shown
