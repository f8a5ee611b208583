"""InstaAug (Miao et al. 2023): ranges of rotation, crop and colour for each image, learned with the classifier.

A small network maps an image x to two ends of a range for each kind of transformation; a sample between them is used:

    t = r high(x) - (1 - r) low(x),   r uniform in [0, 1],   each end = limit * sigmoid(network + start)

Classifier and network together minimise cross entropy - w * range. The cross entropy keeps a range small where the
transformation changes the class of an image; elsewhere the reward w makes it wider. w is multiplied (or divided) by 1.2
while the mean range is below (or above) its band and does not return by itself. (The official code calls this range an
entropy; the entropy of a uniform sample is its logarithm.) Constants are those of the official code where it has them.
Students are scored on images without augmentation.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from augdistill_core import affine, color, per_image, to_device, turn_hue

# for each kind: the limit of its ends, their initial logit, and the reward w per unit of range.
# Units: radians; logarithm; fractions of the side; standard deviations of the data, logarithms of factors, radians
KINDS = {
    "rotation": (math.pi, -2.0, 0.1),
    "zoom": (math.log(2), -2.0, 0.2),  # with the shifts: a crop
    "shift_x": (0.25, -2.0, 0.2),
    "shift_y": (0.25, -2.0, 0.2),
    "brightness": (0.8, -4.0, 0.1),
    "contrast": (0.8, -4.0, 0.1),
}

RGB_KINDS = {"saturation": (0.8, -4.0, 0.1), "hue": (0.8, -4.0, 0.1)}

LEARNING_RATE = 0.01  # of Adam; at .03 the ranges grow faster than the classifier learns, and end at their limits

RANGE_PACE, FURTHEST = 1.2, 50  # of w: the factor of one change, and the largest number of changes in each direction

EVERY = 20  # steps over which the mean range is taken before w may change (the official code: an epoch)

UNCHANGED = 0.005  # a smaller change towards the band counts as none


class InstaAug(nn.Module):
    """An augmentation for images like `images` `[n, C, H, W]`, called like a phi; `learn` takes a training step.

    `kinds` selects kinds (empty = all). `reward` is a factor on the initial w. `bands` replaces the band of some kinds:
    (lowest, highest) mean of an end; the default is (0, limit).
    """

    def __init__(
        self,
        images: Tensor,
        seed: int,
        *,
        kinds: Sequence[str] = (),
        reward: float = 1.0,
        bands: dict[str, tuple[float, float]] | None = None,
    ):
        super().__init__()
        known = KINDS | (RGB_KINDS if images.shape[1] == 3 else {})
        table = {kind: known[kind] for kind in kinds or known}
        self.kinds = list(table)
        bands = {kind: (0.0, limit) for kind, (limit, *_) in table.items()} | (bands or {})
        limit, start, weight = (torch.tensor(column)[:, None] for column in zip(*table.values(), strict=True))
        self.register_buffer("limit", limit)
        self.register_buffer("start", start)
        self.register_buffer("first", reward * weight.expand(-1, 2))  # the initial w, [kinds, 2], one per end,
        self.register_buffer("changes", torch.zeros_like(self.first))  # and how often it was multiplied since
        self.register_buffer("band", torch.tensor([bands[kind] for kind in self.kinds]).T[..., None])  # [2, kinds, 1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.look, self.last = per_image(images.shape[1], 2 * len(self.kinds))
        self.to(images)
        self.optimizer = torch.optim.Adam(self.parameters(), lr=LEARNING_RATE)
        self.images, self.seen, self.before = images[:0], [], None

    @property
    def weight(self) -> Tensor:
        """The current w, `[kinds, 2]`, one per end."""
        return self.first * RANGE_PACE**self.changes

    def ends(self, images: Tensor) -> Tensor:
        """The two ends of each kind's range for each image: `[B, kinds, (low, high)]`, both at least 0."""
        out = self.last(self.look(images)).view(len(images), -1, 2)
        return self.limit * torch.sigmoid(out + self.start)

    def forward(self, images: Tensor, *, generator: torch.Generator, **_) -> Tensor:
        self.images = images.detach()
        low, high = self.ends(images).unbind(2)
        r = to_device(torch.rand(low.shape, generator=generator, device=generator.device), images.device).to(images)
        draw = dict(zip(self.kinds, (r * high - (1 - r) * low).unbind(1), strict=True))
        nothing = images.new_zeros(len(images))
        angle, zoom, right, down, brightness, saturation, contrast = (
            draw.get(kind, nothing)
            for kind in ("rotation", "zoom", "shift_x", "shift_y", "brightness", "saturation", "contrast")
        )
        images = affine(images, angle, zoom, nothing, right, down)
        images = color(images, brightness, saturation.exp() - 1, contrast.exp() - 1)
        return turn_hue(images, draw["hue"]) if "hue" in draw else images

    def learn(self) -> None:
        """A step of the network, after the backward pass of the loss on its last images; adds the reward's gradient."""
        mean = self.ends(self.images).mean(0)
        (-(self.weight * mean).sum()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seen.append(mean.detach())
        if len(self.seen) == EVERY:
            self.adapt(torch.stack(self.seen).mean(0))
            self.seen = []

    def adapt(self, mean: Tensor) -> None:
        """Change the w of each end whose mean range is outside its band, unless it is returning."""
        lowest, highest = self.band
        before = mean if self.before is None else self.before
        up = (mean < lowest) & (mean < before + UNCHANGED)
        down = (mean > highest) & (mean > before - UNCHANGED)
        self.changes = (self.changes + up.float() - down.float()).clamp(-FURTHEST, FURTHEST)
        self.before = mean
