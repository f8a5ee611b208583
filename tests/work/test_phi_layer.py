"""A saved phi as a layer: valid and wrong inputs, samples of each structure, kornia, torch.compile, eval()."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from augdistill_core import seeded
from augdistill_report.files.phi_files import load_phi
from augdistill_report.run import Run
from augdistill_report.settings import resolve

SAVED = ("unet_noise", "unet_noise+policy", "unet_class_noise", "pixels", "policy")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Files of trained phis, by name."""
    run = Run("mine", resolve("smoke", {"iterations": 2, "phi_lr": 0.03}), tmp_path_factory.mktemp("run"))
    return {name: run.save(name, run.distillation(name, run.base)) for name in SAVED}


@pytest.fixture(scope="module")
def pixels():
    """Twelve images in [0, 1], and their labels."""
    split = resolve("smoke").load().train.take(slice(12))
    return split.raw, split.labels


def test_single_images_and_batches_of_any_float(saved, pixels):
    augment = load_phi(saved["unet_noise+policy"])
    images = pixels[0]
    alone = augment(images[0], generator=seeded(0))
    assert alone.shape == (1, 8, 8) and torch.equal(alone, augment(images[:1], generator=seeded(0))[0])
    assert augment(images[:0]).shape == (0, 1, 8, 8)
    for dtype in (torch.float16, torch.float64):
        assert augment(images.to(dtype)).dtype == dtype
    strided = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2).transpose(2, 3)
    expected = augment(strided.contiguous(), generator=seeded(0))
    torch.testing.assert_close(augment(strided, generator=seeded(0)), expected)
    out = torch.nn.Sequential(augment, torch.nn.Flatten())(images)
    assert out.shape == (12, 64) and out.min() >= 0 and out.max() <= 1


def test_it_is_random_as_torchvision_is(saved, pixels):
    augment, images = load_phi(saved["policy"]), pixels[0]
    torch.manual_seed(0)
    first, second = augment(images), augment(images)
    torch.manual_seed(0)
    assert torch.equal(augment(images), first) and not torch.equal(first, second)


@pytest.mark.parametrize(
    "wrong, says",
    [
        (torch.rand(3, 8, 8), r"'unet_noise' was trained on 1x8x8 images \(digits\): not for 3x8x8"),
        (torch.rand(4, 1, 16, 16), "1x8x8 images.*not for 4x1x16x16"),
        (torch.rand(8, 8), "not for 8x8"),
        (torch.zeros(1, 8, 8, dtype=torch.uint8), r"not uint8: put ToTensor\(\) or v2.ToDtype\(torch.float32, scale=T"),
        (torch.zeros(1, 8, 8, dtype=torch.int64), "not int64"),
        (torch.rand(1, 8, 8) * 255, "pixels in .0, 1., not in .*: scale them before it"),
        (torch.rand(1, 8, 8) * 4 - 2, "normalise them after it"),
        (Image.new("L", (8, 8)), r"takes tensors, not Image: put v2.ToImage\(\) before it"),
        (np.zeros((1, 8, 8)), "takes tensors, not ndarray"),
    ],
)
def test_what_it_cannot_take_is_refused_by_name(saved, wrong, says):
    with pytest.raises(ValueError, match=says):
        load_phi(saved["unet_noise"])(wrong)


def test_a_phi_that_reads_labels_wants_them(saved, pixels):
    augment, (images, labels) = load_phi(saved["unet_class_noise"]), pixels
    with pytest.raises(ValueError, match="'unet_class_noise' reads the labels: pass labels="):
        augment(images)
    one = augment(images[3], labels=int(labels[3]), generator=seeded(0))
    assert torch.equal(one, augment(images[3:4], labels=labels[3:4], generator=seeded(0))[0])
    assert torch.equal(
        augment(images, labels=2, generator=seeded(0)), augment(images, labels=[2] * 12, generator=seeded(0))
    )
    assert not torch.equal(
        augment(images, labels=2, generator=seeded(0)), augment(images, labels=3, generator=seeded(0))
    )
    for wrong in (10, -1):
        with pytest.raises(ValueError, match=r"labels: must be in \[0, 9\]"):
            augment(images, labels=wrong)
    other, alone = load_phi(saved["policy"]), seeded(0)  # a phi that reads none takes those of any set
    assert torch.equal(other(images, labels=labels + 100, generator=seeded(0)), other(images, generator=alone))
    for wrong in (labels[:3], labels.float(), torch.ones(12, dtype=torch.bool)):
        with pytest.raises(ValueError, match="labels: must be 12 whole numbers"):
            augment(images, labels=wrong)


def test_a_bound_phi_takes_no_other_images(saved, pixels):
    augment = load_phi(saved["pixels"])
    assert augment.applied.phi.pixels.shape == (10, 1, 8, 8)
    with pytest.raises(ValueError, match="'pixels' is bound to the base images"):
        augment(pixels[0])


# --- samples, as torchvision's v2 transforms take them ----------------------------------------------------------------


def sample_of(structure, image, label):
    """A sample of that structure, and the place of its image in it."""
    boxes = tv_tensors.BoundingBoxes(torch.tensor([[0, 0, 4, 4]]), format="XYXY", canvas_size=(8, 8))
    wrapped = tv_tensors.Image(image)
    return {
        "(tensor, number)": ((image, int(label)), lambda s: s[0]),
        "(tensor, tensor)": ((image, label), lambda s: s[0]),
        "[image, tensor]": ([wrapped, label], lambda s: s[0]),
        "dictionary": ({"x": image, "label": label, "name": "a.png"}, lambda s: s["x"]),
        "(image, dictionary)": ((wrapped, {"boxes": boxes, "Labels": label, "label_2": None}), lambda s: s[0]),
        "nested": ((1.5, {"labels": label, "views": [wrapped, torch.rand(3)]}), lambda s: s[1]["views"][0]),
    }[structure]


STRUCTURES = ["(tensor, number)", "(tensor, tensor)", "[image, tensor]", "dictionary", "(image, dictionary)", "nested"]


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", ["policy", "unet_class_noise"])
def test_a_sample_keeps_its_structure_and_only_its_image_changes(saved, pixels, structure, name):
    (image, label), augment = (part[5] for part in pixels), load_phi(saved[name])
    sample, image_of = sample_of(structure, image, label)
    torch.manual_seed(0)
    out = v2.Compose([augment, v2.Normalize([0.5], [0.5])])(sample)
    torch.manual_seed(0)
    expected = augment(image, labels=label)
    assert torch.equal(image_of(out).as_subclass(torch.Tensor), v2.functional.normalize(expected, [0.5], [0.5]))
    assert not torch.equal(expected, image)
    assert type(image_of(out)) is type(image_of(sample))
    before, after = (torch.utils._pytree.tree_flatten(s) for s in (sample, out))
    assert before[1] == after[1]
    assert [type(leaf) for leaf in before[0]] == [type(leaf) for leaf in after[0]]
    others = [(a, b) for a, b in zip(before[0], after[0], strict=True) if a is not b]
    assert [a is image_of(sample) for a, _ in others] == [True]


def test_several_arguments_batches_and_a_generator(saved, pixels):
    augment, (images, labels) = load_phi(saved["unet_class_noise"]), pixels
    expected = augment(images, labels=labels, generator=seeded(0))
    out, same = augment(images, labels, generator=seeded(0))
    assert torch.equal(out, expected) and same is labels
    # what is passed comes first
    out, _ = augment(images, labels, labels=2, generator=seeded(0))
    assert torch.equal(out, augment(images, labels=2, generator=seeded(0))) and not torch.equal(out, expected)
    # two images of a sample share their draw, as in v2
    twice = load_phi(saved["policy"])({"a": tv_tensors.Image(images), "b": tv_tensors.Image(images)})
    assert torch.equal(twice["a"], twice["b"]) and not torch.equal(twice["a"], images)


def test_labels_are_found_as_mixup_finds_them_or_as_it_is_told(saved, pixels):
    augment, (images, labels) = load_phi(saved["unet_class_noise"]), pixels
    expected = augment(images, labels=labels, generator=seeded(0))
    sample = {"x": images, "y": labels}
    with pytest.raises(ValueError, match=r"'unet_class_noise' reads the labels: .*\(image, label\).* labels_getter"):
        augment(sample)
    augment.labels_getter = lambda sample: sample["y"]
    assert torch.equal(augment(sample, generator=seeded(0))["x"], expected)
    with pytest.raises(ValueError, match=r"labels: must be in \[0, 9\]"):
        load_phi(saved["unet_class_noise"])((images, labels + 10))
    # a phi that reads none leaves any other pair alone
    assert load_phi(saved["policy"])((images, "a name"))[1] == "a name"


@pytest.mark.parametrize(
    "sample, says",
    [
        ((Image.new("L", (8, 8)), 3), r"takes tensors, not Image: put v2.ToImage\(\) before it"),
        (("a.png", 3), "takes tensors, not a tuple without images"),
        ({"x": np.zeros((1, 8, 8))}, "takes tensors, not a dict without images"),
        ((torch.zeros(1, 8, 8, dtype=torch.uint8), 3), r"not uint8: put ToTensor\(\)"),
        ((torch.rand(3, 8, 8), 3), "not for 3x8x8"),
        ({"x": tv_tensors.Image(torch.rand(1, 8, 8) * 255)}, "scale them before it"),
    ],
)
def test_what_is_wrong_in_a_sample_is_named(saved, sample, says):
    with pytest.raises(ValueError, match=says):
        load_phi(saved["policy"])(sample)


# --- other conventions ------------------------------------------------------------------------------------------------


def changes(layer, images):
    """Whether a layer still augments, in `train()` and in `eval()`."""
    torch.manual_seed(0)
    return [not torch.equal(layer.train(mode)(images), images) for mode in (True, False)]


def test_eval_does_what_it_does_to_other_augmentations(saved, pixels):
    """Nothing: kornia's and torchvision's augmentations work in evaluation mode, too. Only dropout is switched off."""
    import kornia.augmentation as K

    images = pixels[0]
    for layer in (K.RandomAffine(30.0, p=1.0), v2.RandomAffine((20, 30)), load_phi(saved["policy"])):
        assert changes(layer, images) == [True, True]
    assert changes(torch.nn.Dropout(0.5), images) == [True, False]
    off = load_phi(saved["policy"], strength=0.0)  # what switches phi off
    torch.testing.assert_close(off(images), images)


def test_kornia_s_containers_take_it(saved, pixels):
    import kornia.augmentation as K

    images, labels = pixels
    augment, rest = load_phi(saved["policy"]), K.RandomHorizontalFlip(p=1.0)
    torch.manual_seed(0)
    expected = augment(images).flip(3)
    torch.manual_seed(0)
    assert torch.equal(K.ImageSequential(augment, rest)(images), expected)
    for key in ("label", "class"):
        both = K.AugmentationSequential(augment, rest, data_keys=["input", key])
        torch.manual_seed(0)
        out, same = both(images, labels)
        assert torch.equal(out, expected) and torch.equal(same, labels)
    again = K.AugmentationSequential(rest)(augment(images, params=augment._params))
    assert torch.equal(again, expected)


def test_in_kornia_s_containers_a_phi_gets_its_labels_from_labels_getter(saved, pixels):
    import kornia.augmentation as K

    images, labels = pixels
    augment = load_phi(saved["unet_class_noise"])
    pipeline = K.AugmentationSequential(augment, data_keys=["input", "class"])
    with pytest.raises(ValueError, match=r"reads the labels: .*kornia's containers hand over images only: layer.label"):
        pipeline(images, labels)
    augment.labels_getter = lambda images: labels
    torch.manual_seed(0)
    out, _ = pipeline(images, labels)
    torch.manual_seed(0)
    assert torch.equal(out, augment(images, labels=labels))
    assert not torch.equal(out, augment(images, labels=0, params=augment._params))


@pytest.mark.parametrize("name", ["policy", "unet_noise+policy", "unet_class_noise"])
def test_params_repeat_the_last_draw(saved, pixels, name):
    (images, labels), augment = pixels, load_phi(saved[name], probability=0.5)
    assert augment.p == 0.5 and augment._params == {}
    first = augment(images, labels=labels)
    params = augment._params
    assert not torch.equal(augment(images, labels=labels), first)
    assert torch.equal(augment(images, labels=labels, params=params), first) and augment._params is params
    assert torch.equal(augment(images, labels=labels, params=params), first)
    again = pickle.loads(pickle.dumps(augment))  # in another process, too
    assert torch.equal(again(images, labels=labels, params=again._params), first)
    given = augment(images, labels=labels, generator=seeded(0))
    assert torch.equal(augment(images, labels=labels, params=augment._params), given)
    out, _ = augment((images, labels))  # a sample
    assert torch.equal(augment(images, labels=labels, params=augment._params), out)


def test_params_that_are_none_are_refused(saved, pixels):
    augment, images = load_phi(saved["policy"]), pixels[0]
    for wrong in ({}, [], {"batch_prob": torch.ones(12)}):
        with pytest.raises(ValueError, match="params: must be the _params of an earlier call"):
            augment(images, params=wrong)
    augment(images)
    with pytest.raises(ValueError, match="params: repeat an earlier draw; must not be given with a generator"):
        augment(images, params=augment._params, generator=seeded(0))


@pytest.mark.parametrize("name", ["policy", "unet_noise+policy", "unet_class_noise"])
def test_same_on_batch_is_one_draw_for_all_images(saved, pixels, name):
    import kornia.augmentation as K

    (images, labels), augment = pixels, load_phi(saved[name], probability=0.5)
    same, label = images[:1].expand(12, -1, -1, -1), labels[:1].expand(12)
    for layer in (augment, K.RandomAffine(30.0, p=0.5)):  # as kornia's does, the probability included
        given = dict(labels=label) if layer is augment else {}
        torch.manual_seed(1)
        assert len(layer(same, **given).unique(dim=0)) > 1
        layer.same_on_batch = True
        outs = [layer(same, **given) for _ in range(12)]
        assert all(len(out.unique(dim=0)) == 1 for out in outs)
        changed = [(out - same).abs().max() > 1e-4 for out in outs]
        assert any(changed) and not all(changed)
    alone = [augment(images[i], labels=int(labels[i]), generator=seeded(4)) for i in range(12)]
    out = augment(images, labels=labels, generator=seeded(4))
    assert torch.equal(out, torch.stack(alone))
    augment.same_on_batch = False  # the draw that is repeated was one for all
    assert torch.equal(augment(images, labels=labels, params=augment._params), out)


def test_an_image_keeps_its_shape_as_with_keepdim_in_kornia(saved, pixels):
    import kornia.augmentation as K

    image = pixels[0][0]
    for layer in (load_phi(saved["policy"]), K.RandomAffine(30.0, p=1.0, keepdim=True)):
        assert layer(image).shape == image.shape == (1, 8, 8)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["policy", "unet_class_noise"])
def test_on_a_cuda_device_it_makes_the_same_images(saved, pixels, name):
    import kornia.augmentation as K

    (images, labels), augment = pixels, load_phi(saved[name])
    augment.labels_getter = lambda images: labels
    expected = augment(images)
    augment.cuda()
    out = augment(images.cuda(), params=augment._params)
    assert out.device.type == "cuda"
    torch.testing.assert_close(out.cpu(), expected, atol=1e-4, rtol=0)
    out, _ = K.AugmentationSequential(augment, data_keys=["input", "class"])(images.cuda(), labels.cuda())
    assert out.device.type == "cuda" and not torch.equal(out.cpu(), images)
    augment(images.cuda(), generator=torch.Generator("cuda").manual_seed(0))
    first = augment(images.cuda(), params=augment._params)
    assert torch.equal(augment(images.cuda(), params=augment._params), first)


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
def test_torch_compile_takes_it(saved, pixels):
    augment = load_phi(saved["unet_noise+policy"])
    compiled = torch.compile(
        augment, backend="eager"
    )  # with graph breaks: checks look at values, and each call makes a generator
    torch.manual_seed(0)
    expected = augment(pixels[0])
    torch.manual_seed(0)
    torch.testing.assert_close(compiled(pixels[0]), expected)


def test_it_can_be_pickled(saved, pixels):
    """For DataLoader's workers, where they are spawned."""
    augment = load_phi(saved["policy"])
    again = pickle.loads(pickle.dumps(augment))
    assert torch.equal(again(pixels[0], generator=seeded(0)), augment(pixels[0], generator=seeded(0)))


def test_torchvision_is_imported_only_for_samples(saved):
    code = f"""
import sys, torch
from augdistill_report import load_phi
augment = load_phi({str(saved["policy"])!r})
augment(torch.rand(1, 8, 8))
assert "torchvision" not in sys.modules
augment((torch.rand(1, 8, 8), 3))
assert "torchvision" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
