"""Labels as parameters: `labels` leaves images as they are and learns what students take as their labels.

In a chain it learns together with any other phi: `labels+pixels` are free images with learned labels (as in DATM and
PAD), `labels+unet_noise` a network with learned labels, `labels` alone real images with learned labels. Each base image
has K probabilities. They start at a mixture: a share of the experts' mean probabilities for the image as it is, and
its hard label for the rest (`start_labels`, which `distill` calls). `labels_mixed` keeps that mixture: the control.

The mean is over experts and over snapshots late in their trajectories. An expert's last steps are mostly the noise of
its batches: a mean over snapshots has less of it, and costs no training.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from augdistill_method.experts import Trajectories
from augdistill_method.phi import Phi, register_phi
from augdistill_method.student import logits_of, unflatten

LEAST = 1e-4  # the smallest initial probability of a learned label: a logit must be finite

LOGIT_PACE = 3.0  # change of a logit per unit of its parameter: so one step size suits labels and pixels


class Labels(Phi):
    """Soft labels `[n, K]` of n base images. `soft` holds the experts' part of the initial mixture: zero = hard labels.

    A learned label is softmax(log(initial label) + `LOGIT_PACE` * change), with a `change` per image and class.
    """

    stochastic = False
    bound = True
    starts_as_identity = True

    def __init__(self, images: Tensor, classes: int, *, learned: bool = True):
        super().__init__()
        self.register_buffer("soft", torch.zeros(len(images), classes))
        self.change = nn.Parameter(torch.zeros(len(images), classes)) if learned else None

    def forward(self, images, **_):
        return images

    def relabel(self, labels, index):
        if labels.ndim != 1:
            raise ValueError("labels: two phis of a chain give labels; use one")
        soft = self.soft[index]
        first = soft + (1 - soft.sum(1, keepdim=True)) * F.one_hot(labels, soft.shape[1])
        if self.change is None:
            return first
        return (first.clamp(min=LEAST).log() + LOGIT_PACE * self.change[index]).softmax(1)


def teacher_of(experts: Trajectories, temperature: float = 1.0, snapshots: int = 1) -> Callable[[Tensor], Tensor]:
    """The mean class probabilities `[B, classes]` of the trained experts for images `[B, C, H, W]`.

    `temperature` divides their logits. Each expert counts by up to `snapshots` of its snapshots, evenly spaced over the
    last sixth of its trajectory; 1 = the last one alone.
    """
    student, last = experts.student, experts.snapshots - 1
    late = torch.linspace(last, last - last // 6, snapshots).round().int().unique().tolist()
    ends = [unflatten(student, trajectory[time]) for trajectory in experts.trajectories for time in late]
    return lambda images: torch.stack(
        [(logits_of(student, end, images) / temperature).softmax(1) for end in ends]
    ).mean(0)


@torch.no_grad()
def start_labels(
    phi: nn.Module, experts: Trajectories, images: Tensor, share: float, temperature: float, snapshots: int
) -> None:
    """Give the labels in `phi` their initial mixture, with this `share` of the experts (`teacher_of`).

    Labels that have one keep it.
    """
    for labels in phi.modules():
        if isinstance(labels, Labels) and not labels.soft.any():
            teacher = teacher_of(experts, temperature, snapshots)
            labels.soft.copy_(share * torch.cat([teacher(x) for x in images.split(512)]))


register_phi("labels")(Labels)

register_phi("labels_mixed")(lambda images, classes: Labels(images, classes, learned=False))
