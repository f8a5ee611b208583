"""Captured steps, with a stand-in that calls the function again where a CUDA device would replay its kernels.

So this shows that a recording would be valid (nothing in it draws, waits for the device, or moves in memory), and what
happens if not. It does not show that CUDA records it: no test here runs on a CUDA device.
"""

import warnings

import pytest
import torch
from test_replay import inputs, soft_labels
from torch.utils._python_dispatch import TorchDispatchMode
from toys import STUDENTS, StandIn, built, mlp, toy

from augdistill_core import DistillConfig, ExpertConfig, distill, make_phi, train_experts, unroll
from augdistill_method import unroll as unroll_module
from augdistill_method.capture import CaptureCheck, Captured, NotCapturable, warn_once
from augdistill_method.unroll import captured, eager
from augdistill_report.data.augmentations import RandomAffine


@pytest.fixture(autouse=True)
def every_warning():
    warn_once.cache_clear()


@pytest.fixture
def stand_in(monkeypatch):
    """On this CPU, "replay" takes captured steps."""
    recorder = StandIn()
    monkeypatch.setitem(unroll_module.STEPS, "replay", lambda student: captured(student, recorder))
    yield recorder
    captured.cache_clear()


def gradients(student, sizes, soft, seed):
    """The end of an unroll over batches of these sizes, and its gradients in all inputs."""
    start, (images,), (labels,), alpha = inputs(student, 1, seed, sum(sizes))
    batches = [x.detach().requires_grad_() for x in images.split(sizes)]
    labels = [soft_labels(y) if soft else y for y in labels.split(sizes)]
    end = unroll(student, start, batches, labels, alpha, memory="replay")
    return end, *torch.autograd.grad(end.square().sum(), [start, alpha, *batches, *(labels if soft else [])])


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("build", STUDENTS.values(), ids=STUDENTS)
def test_captured_steps_give_the_bits_of_replay_and_are_recorded_once_a_shape(build, soft, stand_in, monkeypatch):
    student, sizes = built(build), [5, 3, 5, 5]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # every one of these students can be captured
        found = [gradients(student, sizes, soft, seed) for seed in (0, 1)]
    assert stand_in.recordings == 4  # two functions, two shapes
    monkeypatch.setitem(unroll_module.STEPS, "replay", eager)
    for seed, ours in enumerate(found):
        for one, other in zip(ours, gradients(student, sizes, soft, seed), strict=True):
            assert torch.equal(one, other)


def test_inputs_and_outputs_stay_where_they_are():
    seen = []

    def function(a, b):
        seen.append((a.data_ptr(), b.data_ptr()))
        return a * b, a.sum()

    recorded = Captured(function, StandIn())
    results = [recorded(torch.full((4,), float(k)), torch.arange(4.0)) for k in range(3)]
    assert len(set(seen)) == 1 and len(seen) == 5  # checked, recorded, replayed
    assert len({(x.data_ptr(), y.data_ptr()) for x, y in results}) == 1
    assert results[0][0].tolist() == [0, 2, 4, 6] and results[0][1] == 8
    recorded(torch.ones(2), torch.ones(2))
    recorded(torch.ones(4).double(), torch.ones(4))
    assert recorded.record.recordings == 3


def index_by_mask(x):
    x = x.clone()
    x[x > 0] = 0
    return x


AWKWARD = {
    "draws": lambda x: x + torch.rand_like(x),
    "normal_": lambda x: x.clone().normal_(),
    "item": lambda x: x * x.sum().item(),
    "branch": lambda x: -x if x.sum() > 0 else x * 2,
    "nonzero": lambda x: x * len(x.nonzero()),
    "unique": lambda x: x * len(x.unique()),
    "mask": lambda x: x * x[x > 0].sum(),
    "index_put": index_by_mask,
    "another device": lambda x: x + 0 * x.to("meta").numel(),
    "a number from another device": lambda x: x + 0 * x.sum().to("meta").numel(),
}


@pytest.mark.parametrize("awkward", AWKWARD.values(), ids=AWKWARD)
def test_what_cannot_be_captured_is_found_and_runs_as_it_is_with_one_warning(awkward):
    with pytest.raises(NotCapturable), CaptureCheck():
        awkward(torch.ones(2, 3))
    recorded = Captured(awkward, StandIn())
    with pytest.warns(UserWarning, match="without a CUDA graph, so it is slower: .*aten") as caught:
        for seed in range(2):
            torch.manual_seed(seed)
            found = recorded(torch.ones(2, 3) + seed)
            torch.manual_seed(seed)
            assert torch.equal(found, awkward(torch.ones(2, 3) + seed))
    assert len(caught) == 1 and recorded.record.recordings == 0


class Branches(torch.nn.Linear):
    """A student that branches on its images."""

    def __init__(self):
        super().__init__(64, 3)

    def forward(self, images):
        return super().forward(images.flatten(1) * (2 if images.mean() > 0 else 1))


def test_a_student_that_cannot_be_captured_is_replayed(stand_in, monkeypatch):
    student = built(Branches)
    with pytest.warns(UserWarning, match="without a CUDA graph.*_local_scalar_dense") as caught:
        found = gradients(student, [4, 4], False, 0)
    assert len(caught) == 1
    monkeypatch.setitem(unroll_module.STEPS, "replay", eager)
    for one, other in zip(found, gradients(student, [4, 4], False, 0), strict=True):
        assert torch.equal(one, other)


def test_what_cuda_itself_refuses_is_a_warning_too():
    def refuse(run):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nCUDA kernel errors might be")

    with pytest.warns(UserWarning, match=r"slower: CUDA error: operation not permitted when stream is capturing$"):
        assert Captured(torch.neg, refuse)(torch.ones(2)).tolist() == [-1, -1]


@pytest.mark.parametrize(("change", "sizes"), [({"draws": 2, "batch_syn": 5}, 2), ({"noise": "once"}, 1)], ids=str)
def test_distillation_through_captured_steps_has_the_same_bits(stand_in, monkeypatch, change, sizes):
    images, labels = toy(12)
    experts = train_experts(built(STUDENTS["convnet"]), images, labels, ExpertConfig(experts=1, epochs=4), 0)
    config = DistillConfig(iterations=3, syn_steps=3, max_start_epoch=1, memory="replay", **change)
    found = []
    for steps in (None, eager):
        if steps:
            monkeypatch.setitem(unroll_module.STEPS, "replay", steps)
        phi = make_phi("unet_noise", images, 3, seed=0)
        found.append(distill(phi, images, labels, experts, config, seed=0).history)
    assert found[0] == found[1] and stand_in.recordings == 2 * sizes


def test_a_cpu_is_told_that_it_has_no_cuda_graphs():
    student = built(mlp)
    with pytest.raises(ValueError, match="memory='captured': needs a CUDA device; use graph, replay or auto"):
        unroll(student, *inputs(student, 1), memory="captured")


class Reads(TorchDispatchMode):
    """Counts the operations whose result the program needs before it goes on: on a device it would wait for them."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += torch.Tag.data_dependent_output in function.tags
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("memory", ["graph", "replay"])
@pytest.mark.parametrize("noise", ["step", "once"])
def test_nothing_is_read_in_a_student_s_step(memory, noise):
    images, labels = toy(12)
    experts = train_experts(built(STUDENTS["convnet"]), images, labels, ExpertConfig(experts=1, epochs=4), 0)

    def reads(steps, iterations=1):
        options = dict(syn_steps=steps, iterations=iterations, max_start_epoch=1, batch_syn=5, noise=noise)
        phi = make_phi("unet_noise", images, 3, seed=0)
        with Reads() as found:
            config = DistillConfig(memory=memory, phi_optimizer="SGD", alpha_optimizer="SGD", **options)
            distill(phi, images, labels, experts, config, seed=0, augment=RandomAffine(flip=0.5))
        return found.count

    assert reads(steps=2) == reads(steps=7)
    assert reads(2, iterations=3) - reads(2, iterations=2) <= 3  # an expert, an epoch, and that its weights change
