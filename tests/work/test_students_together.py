"""Evaluation students trained together, as on a CUDA device, are those trained one by one."""

import pytest
import torch
from toys import STUDENTS, StandIn, built, toy

from augdistill_core import flatten, make_phi
from augdistill_method import student as student_module
from augdistill_method.capture import Captured
from augdistill_report.data.augmentations import DSA
from augdistill_report.work.scoring import EvalConfig, train_student, train_students

SEEDS = [(0, "student", k) for k in range(3)]


@pytest.fixture
def as_on_cuda(monkeypatch):
    recorder = StandIn()
    monkeypatch.setattr(student_module, "launched", lambda step, device: Captured(step, recorder))
    return recorder


@pytest.mark.parametrize(
    ("phi", "augment", "change", "shapes"),
    [
        (None, None, {}, 2),
        ("unet_noise", DSA(), {}, 2),
        ("labels_mixed+unet_noise", DSA(), {"eval_batch": 64}, 1),
        (None, DSA(), {"eval_copies": 2, "eval_epochs": 3}, 1),
    ],
    ids=str,
)
def test_students_trained_together_are_those_trained_alone(phi, augment, change, shapes, as_on_cuda):
    images, labels = toy(14)
    student = built(STUDENTS["convnet"])
    phi = phi and make_phi(phi, images, 3, seed=0)
    config, told = EvalConfig(**dict(eval_steps=11, eval_batch=4, eval_lr=0.1) | change), []
    arguments = student, phi, images, labels, config
    together = train_students(*arguments, SEEDS, augment=augment, on_student=told.append)
    for seed, model in zip(SEEDS, together, strict=True):
        alone = train_student(*arguments, *seed, augment=augment)
        torch.testing.assert_close(flatten(model.parameters()), flatten(alone.parameters()), rtol=1e-9, atol=1e-12)
        assert not model.training
    assert told == [1, 2, 3] and as_on_cuda.recordings == shapes


def test_images_that_are_not_finite_are_refused_by_the_name_of_what_made_them():
    images, labels = toy(6)

    def breaks(batch, **_):
        return batch / 0

    with pytest.raises(ValueError, match="function returns values that are not finite"):
        train_students(built(STUDENTS["convnet"]), None, images, labels, EvalConfig(), SEEDS, augment=breaks)
