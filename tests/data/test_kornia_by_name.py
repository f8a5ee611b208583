"""Any of kornia's augmentations by name: read and never run, refused by name, drawn from our generator alone."""

import subprocess
import sys

import kornia.augmentation
import pytest
import torch

from augdistill_core import DistillConfig, seeded
from augdistill_report.data.augmentations import augmentation
from augdistill_report.data.datasets import load, standardised
from augdistill_report.data.kornia_by_name import REFUSED, ByKornia, build, check_kornia, known
from augdistill_report.files.store import Store
from augdistill_report.settings import Settings
from augdistill_report.work.distillation import Distillation
from augdistill_report.work.jobs import Subset
from augdistill_report.work.scoring import EvalConfig, Evaluation
from augdistill_report.work.setup import Setup

AFFINE = "kornia:RandomAffine(degrees=15,translate=(.1,.1))"
NEEDED = {  # what an augmentation cannot be built without, on images of 16 x 16
    "CenterCrop": "size=(16, 16)",
    "Denormalize": "mean=(.5, .5, .5), std=(.2, .2, .2)",
    "LongestMaxSize": "max_size=16",
    "Normalize": "mean=(.5, .5, .5), std=(.2, .2, .2)",
    "PadTo": "size=(16, 16)",
    "RandomAffine": "degrees=15",
    "RandomRain": "drop_height=(3, 6)",
    "RandomCrop": "size=(16, 16), padding=2",
    "RandomGaussianBlur": "kernel_size=(3, 3), sigma=(.1, 2.)",
    "RandomMotionBlur": "kernel_size=3, angle=15., direction=.5",
    "RandomResizedCrop": "size=(16, 16)",
    "RandomRotation": "degrees=15",
    "RandomRotation90": "times=(0, 3)",
    "RandomShear": "shear=(.1, .2)",
    "Resize": "size=(16, 16)",
    "SmallestMaxSize": "max_size=16",
}
TENSORS_ONLY = {"RandomFisheye"}  # its arguments are tensors, which are no literals


@pytest.fixture(scope="module")
def coloured():
    raw = torch.randint(0, 256, (40, 3, 16, 16), generator=seeded(0), dtype=torch.uint8)
    return standardised("cifar10", "ab", raw, torch.arange(40) % 2, torch.arange(40).split([30, 5, 5]))


@pytest.mark.parametrize("name", sorted(set(known()) - TENSORS_ONLY))
def test_every_augmentation_of_single_images_can_be_used(name, coloured, rng_untouched):
    text = f"kornia:{name}({NEEDED.get(name, '')})" if name in NEEDED else f"kornia:{name}"
    augment, images = augmentation(text, coloured), coloured.train.images
    with rng_untouched():
        first = [augment(images, labels=None, index=None, generator=g) for g in [seeded(0)] for _ in range(2)]
    again = [augment(images, generator=g) for g in [seeded(0)] for _ in range(2)]
    assert all(map(torch.equal, first, again))
    assert all(x.shape == images.shape and x.dtype == images.dtype and x.isfinite().all() for x in first)
    assert augment == ByKornia(text, coloured) != ByKornia("kornia:RandomInvert(p=.1)", coloured)


def test_it_is_kornia_s_own_on_pixels(coloured):
    for text in (AFFINE, "kornia:ColorJiggle(brightness=.3, hue=.1, p=1.)"):
        out = augmentation(text, coloured)(coloured.train.images, generator=seeded(5))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**62, (), generator=seeded(5))))
            expected = build(text)(coloured.train.raw / 255)
        torch.testing.assert_close(coloured.pixels(out), expected.clamp(0, 1), atol=1e-5, rtol=0)


def test_geometry_keeps_what_left_the_range_and_its_gradient(coloured):
    images = (3 * coloured.train.images).requires_grad_()  # as a phi may leave them
    out = augmentation("kornia:RandomHorizontalFlip(p=1.)", coloured)(images, generator=seeded(0))
    torch.testing.assert_close(out, images.flip(3), atol=1e-5, rtol=0)
    (gradient,) = torch.autograd.grad(out.square().sum() / 2, images)
    torch.testing.assert_close(gradient, images.detach(), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "text, why",
    {
        "kornia:RandomPlasmaShdow": "kornia has no augmentation RandomPlasmaShdow: the nearest are RandomPlasmaShadow",
        "kornia:randomaffine(degrees=5)": "the nearest are .*RandomAffine",
        "kornia:RandomAffine(degree=15)": "RandomAffine has no argument degree: the nearest are degrees",
        "kornia:RandomAffine": "RandomAffine needs degrees",
        "kornia:RandomAffine(degrees=-5)": "RandomAffine rejects its arguments: ",
        "kornia:RandomAffine(15)": r"must be kornia:NAME or kornia:NAME\(key=value",
        "kornia:": "must be kornia:NAME or",
        "kornia:RandomAffine(degrees=15": "must be kornia:NAME or",
        "kornia:RandomAffine(degrees=exit(3))": "must be kornia:NAME or",
        "kornia:RandomAffine(degrees=__import__('os').system('false'))": "must be kornia:NAME or",
        "kornia:os.system(command='false')": "must be kornia:NAME or",
        "kornia:RandomAffine(**{'degrees': 3})": "must be kornia:NAME or",
        "kornia:Resize(size=(8, 9), antialias=True)|16": None,
        "kornia:CenterCrop(size=(8, 8))|16": None,
        "kornia:LongestMaxSize(max_size=8)": "LongestMaxSize changes the shape, from .* to .*: must keep it",
        "kornia:RandomTransplantation": "it needs a mask",
        "kornia:RandomMixUpV2": "it returns images and mixed labels",
        "kornia:RandomDissolving": "it keeps state",
        "kornia:AugmentationSequential": "AugmentationSequential is not an augmentation of single images",
        "kornia:RandomAffine3D": "RandomAffine3D is not an augmentation of single images",
        "kornia:AugmentationBase2D": "AugmentationBase2D is not an augmentation of single images",
    }.items(),
)
def test_what_cannot_be_used_is_refused_by_name(text, why, coloured):
    if why is None:  # only the data say so: of their own size they would do
        text = text.split("|")[0]
        check_kornia(text)
        with pytest.raises(ValueError, match=r"changes the shape, from \(4, 3, 16, 16\) to \(4, 3, 8, "):
            augmentation(text, coloured)
        return
    with pytest.raises(ValueError, match=why) as error:
        Settings(eval_augment=text)
    assert str(error.value).startswith(f"eval_augment={text!r}: ") and "\n" not in str(error.value)


def test_what_keeps_state_or_returns_two_things_is_seen(monkeypatch):
    class Counts(kornia.augmentation.RandomInvert):
        calls = 0

        def forward(self, images):
            self.calls += 1
            return images * self.calls

    class Two(kornia.augmentation.RandomInvert):
        def forward(self, images):
            return images, images

    monkeypatch.setattr(kornia.augmentation, "RandomInvert", Counts)
    with pytest.raises(ValueError, match="RandomInvert keeps state: it gives two results"):
        check_kornia("kornia:RandomInvert")
    monkeypatch.setattr(kornia.augmentation, "RandomInvert", Two)
    with pytest.raises(ValueError, match="RandomInvert returns something else than a tensor"):
        check_kornia("kornia:RandomInvert")


def test_names_that_are_refused_exist():
    assert set(REFUSED) <= set(kornia.augmentation.__all__) and not set(REFUSED) & set(known())


@pytest.mark.parametrize("name", ["RandomEqualize", "RandomPosterize", "RandomClahe"])
def test_the_unroll_wants_a_gradient(name):
    Settings(eval_augment=f"kornia:{name}", expert_augment=f"kornia:{name}", taught_augment=f"kornia:{name}")
    with pytest.raises(ValueError, match=rf"^augment='kornia:{name}': {name} is not differentiable in the images"):
        Settings(augment=f"kornia:{name}")
    Settings(augment="kornia:ColorJiggle(hue=.1)")


def test_three_channels_where_the_data_have_one_is_refused_by_name():
    with pytest.raises(ValueError, match="RandomHue cannot take images of 1 x 8 x 8"):
        augmentation("kornia:RandomHue(hue=(-.1, .1))", load("digits", 8))


def test_distillation_and_scoring_take_one(tmp_path):
    small = dict(size=8, width=4, depth=1, experts=1, epochs=1, iterations=1, syn_steps=2, expert_epochs=1)
    small |= dict(max_start_epoch=0, eval_students=2, eval_steps=3)
    settings = Settings(**small, augment=AFFINE, expert_augment=AFFINE, eval_augment="kornia:RandomPlasmaShadow")
    setup, subset, store = settings.select(Setup), Subset(0, per_class=1), Store(tmp_path)
    job = Distillation(setup, "pixels", subset, settings.select(DistillConfig))
    for needed in (*job.needs(), job, Evaluation(setup, subset, settings.select(EvalConfig), job)):
        store.save(needed.kind, needed.spec(), *needed.work(store, lambda *_: None))
    other = Settings(**small, augment=AFFINE, expert_augment="kornia:RandomRotation(degrees=3)")
    assert other.select(Setup) != setup


def test_kornia_is_imported_only_where_it_is_used():
    """Half a second and more: `augdistill --help`, and a run without such an augmentation, do without."""
    code = """
import sys
from augdistill_report.commands.cli import main
try:
    main(["--help"])
except SystemExit:
    pass
import torch
from augdistill_core import make_phi, seeded
from augdistill_report.data.augmentations import augmentation
from augdistill_report.data.datasets import load
from augdistill_report.settings import Settings
from augdistill_report.work import distillation, experts, scoring
data = load("digits", 8)
Settings(eval_augment="crop_flip")
augmentation("affine", data)(data.train.take(slice(0, 4)).images, generator=seeded(0))
make_phi("unet+policy", data.train.take(slice(0, 4)).images, 10, 0)
assert "kornia" not in sys.modules
Settings(eval_augment="kornia:RandomInvert")
assert "kornia" in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
