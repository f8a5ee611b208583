"""The student: the ConvNet of the dataset distillation literature, its parameters as one flat vector, and SGD.

The norm, ReLU and pooling of a ConvNet block are one operation here (`norm_relu_pool`, see `fused`), for speed.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from augdistill_method.capture import launched
from augdistill_method.fused import norm_relu_pool
from augdistill_method.precision import PRECISIONS, arithmetic
from augdistill_method.random import to_device


class ConvNet(nn.Module):
    """The ConvNet of MTT (Gidaris & Komodakis 2018): `depth` x [conv3x3, instance norm, ReLU, 2x2 pool], linear.

    Takes `[B, channels, size, size]`, returns logits `[B, classes]`. 320,010 parameters on CIFAR-10 at width 128.
    `precision` is one of `PRECISIONS`. With "bf16" the images between the layers are bfloat16, and all that is summed
    over them (norms, logits, loss, gradients) has the parameters' own type.
    """

    forward_mode = True  # all layers support differentiable forward mode, so the unroll can use its faster product

    def __init__(self, channels: int, classes: int, size: int, width: int = 128, depth: int = 3, precision="float32"):
        super().__init__()
        if precision not in PRECISIONS:
            raise ValueError(f"precision={precision!r}: must be one of {', '.join(PRECISIONS)}")
        if depth < 1 or size >> depth < 1:
            raise ValueError(
                f"depth={depth}: {depth} poolings of {size}x{size} images; must be at least 1, and leave a pixel"
            )
        self.shape, self.classes, self.precision = (channels, size, size), classes, precision
        blocks = []
        for i in range(depth):
            blocks += [
                nn.Conv2d(channels if i == 0 else width, width, 3, padding=1),
                nn.GroupNorm(width, width),  # one channel per group = instance norm without running statistics
                nn.ReLU(),
                nn.AvgPool2d(2),
            ]
        self.features = nn.Sequential(*blocks)
        self.classifier = nn.Linear(width * (size >> depth) ** 2, classes)

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[1:] != self.shape:
            raise ValueError(f"images of shape {tuple(images.shape[1:])}: this student takes {self.shape} (C, H, W)")
        x = images.bfloat16() if self.precision == "bf16" else images
        if images.is_cuda and not torch._C._are_functorch_transforms_active():  # `vmap` does not know this layout
            x = x.contiguous(memory_format=torch.channels_last)  # the layout of a GPU's convolutions
        for convolution, norm in zip(self.features[::4], self.features[1::4], strict=True):
            z = F.conv2d(x, convolution.weight.to(x.dtype), convolution.bias.to(x.dtype), padding=1)
            x = norm_relu_pool(z, norm.weight, norm.bias, norm.eps)
        return self.classifier(x.flatten(1).to(images.dtype))


def flatten(parameters: Iterable[Tensor]) -> Tensor:
    """Parameters as one flat vector `[P]`: a copy, never an alias of live weights; differentiable."""
    return torch.cat([p.reshape(-1) for p in parameters])


def unflatten(student: nn.Module, theta: Tensor) -> list[Tensor]:
    """`theta` `[P]` as views in the shapes of `student`'s parameters (a shared one counts once)."""
    parameters = list(student.parameters())
    sizes = [p.numel() for p in parameters]
    if theta.shape != (sum(sizes),):
        raise ValueError(f"parameters of shape {tuple(theta.shape)}: this student has ({sum(sizes)},)")
    return [piece.view_as(p) for piece, p in zip(theta.split(sizes), parameters, strict=True)]


def parameter_positions(student: nn.Module) -> dict[str, int]:
    """Every name of a parameter in `student`, and the position of that parameter in `student.parameters()`."""
    position = {id(p): i for i, p in enumerate(student.parameters())}
    return {
        f"{path}.{name}".lstrip("."): position[id(p)]
        for path, module in student.named_modules()
        for name, p in module.named_parameters(recurse=False, remove_duplicate=False)
    }


def logits_of(student: nn.Module, theta: Sequence[Tensor], images: Tensor) -> Tensor:
    """`student`'s logits `[B, classes]` with the parameters `theta` (a list, as from `unflatten`)."""
    # set every name of a shared parameter here: torch's own weight tying corrupts a module that has two names
    replaced = {name: theta[i] for name, i in parameter_positions(student).items()}
    return functional_call(student, replaced, (images,), tie_weights=False)


def initial_parameters(student: nn.Module, seed: int | torch.Generator) -> Tensor:
    """A new random initialisation `[P]` of `student`, by each layer's `reset_parameters`."""
    model = copy.deepcopy(student).cpu()  # so that the weights do not depend on the device
    seed = int(torch.randint(2**62, (), generator=seed)) if isinstance(seed, torch.Generator) else int(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, module in model.named_modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
            elif next(module.parameters(recurse=False), None) is not None:
                raise ValueError(
                    f"student's {name or type(module).__name__} holds parameters but has no reset_parameters()"
                )
    return flatten(model.parameters()).detach()


def check_student(student: nn.Module) -> None:
    """A `ValueError` for a layer whose second forward pass may differ from the first; the unroll needs equal passes."""
    for name, module in student.named_modules():
        kind = type(module).__name__
        if getattr(module, "track_running_stats", False) and module.training:
            raise ValueError(
                f"student's {name} ({kind}) changes its running statistics in every pass: build it with "
                "track_running_stats=False, or use GroupNorm"
            )
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0 and module.training:
            raise ValueError(f"student's {name} ({kind}) samples from torch's global generator: use p=0")


def check_images(student: nn.Module, images: Tensor, labels: Tensor) -> None:
    """A `ValueError` if shapes, types or values of images and labels do not fit `student`."""
    check_student(student)
    if images.ndim != 4 or len(images) == 0 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"images {tuple(images.shape)} and labels {tuple(labels.shape)}: must be [B, C, H, W] and [B], B at least 1"
        )
    kinds = {p.dtype for p in student.parameters()}
    if {images.dtype} != kinds:
        raise ValueError(f"images are {images.dtype}, the student is {', '.join(map(str, kinds))}: must be the same")
    with torch.no_grad():
        classes = student(images[:1]).shape[1]
    if labels.dtype != torch.int64 or not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(
            f"labels from {labels.min().item()} to {labels.max().item()}: must be integers in [0, {classes - 1}], "
            f"of type int64 (they are {labels.dtype})"
        )


def with_parameters(student: nn.Module, theta: Tensor) -> nn.Module:
    """A copy of `student` with the parameters `theta` `[P]`."""
    model = copy.deepcopy(student)
    with torch.no_grad():
        for p, value in zip(model.parameters(), unflatten(student, theta), strict=True):
            p.copy_(value)
    return model


def sgd(
    student: nn.Module,
    start: Tensor,
    batches: Iterable[tuple[Tensor, Tensor]],
    lr: float | Callable[[int], float],
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    velocity: Tensor | None = None,
) -> Iterator[tuple[nn.Module, Tensor]]:
    """Train a copy of `student` from `start` `[P]` by torch's SGD; after each step yield the live model and its loss.

    This is ordinary training, without a gradient through it: for experts, and for the students that are scored.
    `lr` may be a function of the step number. Copy what you keep, because the model changes in later steps. If given,
    `velocity` `[P]` is the initial momentum buffer and is updated in place: with the parameters it is SGD's full state.
    """
    model = with_parameters(student, start)
    rate = lr if callable(lr) else lambda step: lr
    optimizer = torch.optim.SGD(model.parameters(), lr=rate(0), momentum=momentum, weight_decay=weight_decay)
    if velocity is not None:
        for p, own in zip(model.parameters(), unflatten(student, velocity), strict=True):
            optimizer.state[p]["momentum_buffer"] = own
    for step, (images, labels) in enumerate(batches):
        optimizer.param_groups[0]["lr"] = rate(step)
        optimizer.zero_grad()
        with arithmetic(student):
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
        optimizer.step()
        yield model, loss.detach()


IMAGES_AT_ONCE = 256  # students with fewer images a step share kernels (`vmap`); an estimate, not measured


def sgd_together(
    student: nn.Module,
    start: Tensor,
    batches: Iterable[Sequence[tuple[Tensor, Tensor]]],
    lr: float | Callable[[int], float],
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    velocity: Tensor | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """`sgd` for E students at once, from `start` `[E, P]`; after each step yield theta `[E, P]` and losses `[E]`.

    Each element of `batches` holds E pairs (images, labels) of equal shapes. The next step overwrites theta. On a CUDA
    device a step is one CUDA graph (`augdistill_method.capture`). In it as many students as have `IMAGES_AT_ONCE`
    images are computed by the same kernels, and half as many as often as memory does not suffice; then the next ones.
    """
    rate, theta = lr if callable(lr) else lambda step: lr, start
    velocity = torch.zeros_like(start) if velocity is None else velocity
    chunk, decay = 0, None

    def loss(theta: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits_of(student, unflatten(student, theta), images), labels)

    def slope(theta: Tensor, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            theta = theta.detach().requires_grad_()
            value = loss(theta, images, labels)
            return torch.autograd.grad(value, theta)[0], value.detach()

    def slopes(theta: Tensor, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if chunk > 1:
            return torch.vmap(torch.func.grad_and_value(loss), chunk_size=chunk)(theta, images, labels)
        return tuple(map(torch.stack, zip(*map(slope, theta, images, labels), strict=True)))

    def step(theta: Tensor, velocity: Tensor, images: Tensor, labels: Tensor, rate: Tensor) -> tuple[Tensor, ...]:
        gradient, losses = slopes(theta, images, labels)
        velocity = momentum * velocity + (gradient + decay * theta)
        return theta - rate * velocity, velocity, losses

    launch = launched(step, start.device)
    for number, pairs in enumerate(batches):
        images, labels = map(torch.stack, zip(*pairs, strict=True))
        if decay is None:
            decay = weight_decay * used(student, theta[0], images[0], labels[0])
            chunk = min(max(IMAGES_AT_ONCE // images.shape[1], 1), len(start))
        size = to_device(torch.tensor(rate(number), dtype=start.dtype), start.device)
        done = None
        while done is None:
            try:
                with arithmetic(student):
                    done = launch(theta, velocity, images, labels, size)
            except torch.OutOfMemoryError:
                if chunk == 1:
                    raise
                chunk, launch = -(-chunk // 2), launched(step, start.device)
        theta, losses = done[0], done[2].clone()
        velocity.copy_(done[1])
        yield theta, losses


def used(student: nn.Module, theta: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    """`[P]`: 1 where the loss depends on the parameter, else 0: torch's SGD does not change (or decay) those."""
    with torch.enable_grad(), arithmetic(student):
        pieces = [p.detach().requires_grad_() for p in unflatten(student, theta)]
        loss = F.cross_entropy(logits_of(student, pieces, images), labels)
        found = torch.autograd.grad(loss, pieces, allow_unused=True)
    return flatten(torch.full_like(p.detach(), g is not None) for p, g in zip(pieces, found, strict=True))
