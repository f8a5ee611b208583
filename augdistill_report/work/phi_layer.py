"""A trained phi as a layer, one line of an image pipeline:

augment = load_phi("runs/digits/phis/unet.safetensors")  # pixels in [0, 1] go in, augmented pixels come out
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from augdistill_core import Applied, Config, Phi, augmented, knob
from augdistill_report.data.datasets import mixed

SLACK = 0.25  # how far pixels may leave [0, 1] and still be taken for pixels (a bicubic resize overshoots)


@dataclasses.dataclass(frozen=True)
class Use(Config):
    """How strongly and how often a phi is applied."""

    strength: float = knob(1.0, "lambda: images become x + lambda (phi(x) - x)", low=0, high=100)
    probability: float = knob(1.0, "the fraction of the images that phi is applied to", low=0, high=1)


def by(shape) -> str:
    return "x".join(map(str, shape))


def default_labels(sample) -> Any:
    """The labels in a sample, found as `v2.MixUp` finds them; None where there are none.

    Of a tuple or list, the second item. If that item (or the sample) is a dictionary, the value of its key "labels", or
    else of its first key that contains "label", in upper or lower case. Unlike in `v2.MixUp` a number is accepted:
    data sets return numbers.
    """
    if isinstance(sample, Tensor):  # images alone
        return None
    if isinstance(sample, tuple | list):
        sample = sample[1] if len(sample) > 1 else None
    if isinstance(sample, Mapping):
        keys = [key for key in sample if isinstance(key, str) and "label" in key.lower()]
        exact = [key for key in keys if key.lower() == "labels"]
        sample = sample[(exact or keys)[0]] if keys else None
    return sample if isinstance(sample, int) or type(sample) is Tensor else None


class Augment(nn.Module):
    """A trained phi on pixels: one line of a torchvision pipeline, or a layer.

    `about` is the header of its file: the phi's name, its training data and its settings. A phi that was trained on
    whitened images has `whitening` (the mean image `[C, H, W]`, and the two matrices `[d, d]`). `labels_getter(sample)`
    finds the labels for a phi that reads them. With `same_on_batch` all images of a call get the same random numbers,
    each as if it were alone. Both can be set later, too.

    Random numbers come from torch's global generator, which DataLoader seeds in each worker, as in torchvision's own
    transforms, unless a `generator` is passed. It augments in `train()` and in `eval()`, unlike dropout: torchvision's
    transforms and kornia's augmentations ignore `training`, too. For evaluation leave it out of the pipeline, or load
    it with strength 0.

    The other names are kornia's: `p`, and `_params`, with which `layer(images, params=layer._params)` repeats the last
    call. An image keeps its shape, as with `keepdim=True` there. kornia's containers treat it as any module that is not
    theirs: they pass images only, and their own `params` do not repeat its random numbers.
    """

    def __init__(
        self,
        phi: Phi,
        about: dict,
        use: Use,
        whitening: list[Tensor] | None = None,
        labels_getter: Callable[[Any], Any] = default_labels,
        same_on_batch: bool = False,
    ):
        super().__init__()
        self.applied = Applied(phi, use.strength, use.probability).requires_grad_(False)
        self.about, self.labels_getter, self.same_on_batch = about, labels_getter, same_on_batch
        self._params: dict[str, Any] = {}
        data = about["data"]
        mean, std = (torch.tensor(data[name]).view(-1, 1, 1) for name in ("mean", "std"))
        for name, value in zip(("mean", "whiten", "colour"), whitening or (mean, None, None), strict=True):
            self.register_buffer(name, value)
        self.register_buffer("std", std)

    @property
    def p(self) -> float:
        """The probability that phi is applied to an image; `load_phi(path, probability=...)` sets it."""
        return self.applied.probability

    def forward(
        self, *inputs: Any, labels=None, generator: torch.Generator | None = None, params: dict[str, Any] | None = None
    ) -> Any:
        """A sample with its images augmented. Its structure and everything else in it stay the same.

        A sample is what torchvision's v2 transforms take: images, or tuples, lists and dictionaries that hold them, or
        several arguments. Images are `[C, H, W]` or `[B, C, H, W]`, floats in [0, 1], and come back with their shape
        and type: every `tv_tensors.Image`, or, if there is none, the first plain tensor. All images of one sample get
        the same random numbers. `labels` (a number, or `[B]`: positions in `about["classes"]`) are for a phi that reads
        them; None takes those in the sample. `params`, the `_params` of an earlier call, repeat its random numbers; the
        labels must be given again. A `ValueError` says what does not fit.
        """
        sample = inputs[0] if len(inputs) == 1 else inputs
        if params is not None:
            generator = self.generator_of(params, generator)
        elif generator is None:
            generator = torch.Generator().manual_seed(int(torch.empty((), dtype=torch.int64).random_()))
        drawn = {"same_on_batch": self.same_on_batch, "device": generator.device, "state": generator.get_state()}
        self._params = drawn if params is None else params
        if labels is None and self.applied.conditional:
            labels = self.labels_getter(sample)
        on = self.on_images if type(sample) in (Tensor, nn.Parameter) else self.on_sample
        return on(sample, labels, generator)

    def generator_of(self, params: dict[str, Any], generator: torch.Generator | None) -> torch.Generator:
        """The generator as it was when a call's `_params` were kept."""
        if generator is not None:
            raise ValueError("params: repeat an earlier draw; must not be given with a generator")
        if not isinstance(params, dict) or params.keys() != {"same_on_batch", "device", "state"}:
            raise ValueError("params: must be the _params of an earlier call of this layer")
        generator = torch.Generator(params["device"])
        generator.set_state(params["state"])
        return generator

    def on_sample(self, sample, labels, generator: torch.Generator):
        """A sample as v2's own base class transforms it, with phi as the transform."""
        from torchvision import tv_tensors
        from torchvision.transforms import v2

        layer, state, done = self, generator.get_state(), []

        class OnImages(v2.Transform):
            def transform(self, found, params):
                if isinstance(found, tv_tensors.TVTensor) and not isinstance(found, tv_tensors.Image):
                    return found  # boxes, masks, key points
                done.append(found)
                generator.set_state(state)
                out = layer.on_images(found, labels, generator)
                return tv_tensors.wrap(out, like=found) if isinstance(found, tv_tensors.Image) else out

        out = OnImages()(sample)
        if not done:
            self.check(sample)
        return out

    @torch.no_grad()
    def on_images(self, images: Tensor, labels, generator: torch.Generator) -> Tensor:
        """Images `[C, H, W]` or `[B, C, H, W]` in [0, 1], augmented: a plain tensor of their shape and type."""
        self.check(images)
        batch = images.as_subclass(Tensor).reshape(-1, *images.shape[-3:])
        if not len(batch):
            return images
        labels = self.checked(labels, len(batch))
        x = (batch.to(self.mean) - self.mean) / self.std
        x = x if self.whiten is None else mixed(x, self.whiten)
        given, state, out = (x, labels, torch.arange(len(x), device=x.device)), generator.get_state(), []
        for part in zip(*(t.split(1 if self._params["same_on_batch"] else len(x)) for t in given), strict=True):
            generator.set_state(state)
            out.append(augmented(self.applied, *part, generator))
        x = torch.cat(out)
        x = x if self.colour is None else mixed(x, self.colour)
        return (x * self.std + self.mean).clamp(0, 1).to(images.as_subclass(Tensor)).reshape(images.shape)

    def check(self, images) -> None:
        """A `ValueError` unless phi can take these images."""
        name, shape = self.about["phi"], tuple(self.about["shape"])
        if self.applied.bound:
            raise ValueError(f"phi {name!r} is bound to the base images that it was trained on: it takes no others")
        if not isinstance(images, Tensor):
            what = type(images).__name__
            if isinstance(images, tuple | list | Mapping):
                what = f"a {what} without images"
            raise ValueError(f"phi {name!r} takes tensors, not {what}: put v2.ToImage() before it")
        if not images.is_floating_point():
            kind = str(images.dtype).removeprefix("torch.")
            right = "ToTensor() or v2.ToDtype(torch.float32, scale=True)"
            raise ValueError(f"phi {name!r} takes floats in [0, 1], not {kind}: put {right} before it")
        if images.ndim not in (3, 4) or images.shape[-3:] != shape:
            data = self.about["data"]["name"]
            raise ValueError(f"phi {name!r} was trained on {by(shape)} images ({data}): not for {by(images.shape)}")
        if images.numel():
            low, high = (v.item() for v in images.aminmax())
            if low < -SLACK or high > 1 + SLACK:
                raise ValueError(
                    f"phi {name!r} takes pixels in [0, 1], not in [{low:.3g}, {high:.3g}]: scale them before it, "
                    "normalise them after it"
                )

    def checked(self, labels, images: int) -> Tensor:
        """Labels `[images]`, zeros for a phi that does not read them; a `ValueError` says what is wrong with them."""
        if labels is None and self.applied.conditional:
            raise ValueError(
                f"phi {self.about['phi']!r} reads the labels: pass labels= with the images, or samples that hold them "
                "((image, label), {'image': ..., 'label': ...}), or set labels_getter (kornia's containers hand over "
                "images only: layer.labels_getter = lambda images: labels)"
            )
        labels = torch.as_tensor(0 if labels is None else labels, device=self.mean.device)
        count = len(self.about["classes"])
        if labels.numel() not in (1, images) or labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(f"labels: must be {images} whole numbers, one an image")
        if self.applied.conditional and not 0 <= int(labels.min()) <= int(labels.max()) < count:
            raise ValueError(
                f"labels: must be in [0, {count - 1}], the positions of {', '.join(self.about['classes'])}"
            )
        return labels.to(torch.int64).view(-1).expand(images)

    def extra_repr(self) -> str:
        return f"{self.about['phi']}, {by(self.about['shape'])}, trained on {trained_on(self.about)}"


def trained_on(about: dict) -> str:
    return f"{about['data']['name']} ({about['data']['fingerprint']})"
