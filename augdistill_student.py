"""The student: the field's ConvNet, and parameters as one flat vector. Section 1 of `augdistill_core`.

A ConvNet's norm, ReLU and pooling are one operation here (`norm_relu_pool`), with its first and second derivatives
written by hand, exact against torch's own three layers. It is there for its speed: those three take half of the time
that the convolutions leave, most of it in group norm's second derivative and in average pooling.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call


class ConvNet(nn.Module):
    """The field's ConvNet (Gidaris & Komodakis 2018; MTT): `depth` x [conv3x3, instance norm, ReLU, 2x2 pool], linear.

    Takes `[B, channels, size, size]`, returns logits `[B, classes]`. 320,010 parameters on CIFAR-10 at width 128.
    """

    forward_mode = True  # every layer's tangents can be differentiated, so the unroll may take the faster product

    def __init__(self, channels: int, classes: int, size: int, width: int = 128, depth: int = 3):
        super().__init__()
        if depth < 1 or size >> depth < 1:
            raise ValueError(
                f"depth={depth}: {depth} poolings of {size}x{size} images must be at least 1, and leave something"
            )
        self.shape, self.classes = (channels, size, size), classes
        blocks = []
        for i in range(depth):
            blocks += [
                nn.Conv2d(channels if i == 0 else width, width, 3, padding=1),
                nn.GroupNorm(width, width),  # one channel a group = instance norm without running statistics
                nn.ReLU(),
                nn.AvgPool2d(2),
            ]
        self.features = nn.Sequential(*blocks)
        self.classifier = nn.Linear(width * (size >> depth) ** 2, classes)

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[1:] != self.shape:
            raise ValueError(f"images of shape {tuple(images.shape[1:])}: this student takes {self.shape} (C, H, W)")
        x = images
        for convolution, norm in zip(self.features[::4], self.features[1::4], strict=True):
            x = norm_relu_pool(convolution(x), norm.weight, norm.bias, norm.eps)
        return self.classifier(x.flatten(1))


def flatten(parameters: Iterable[Tensor]) -> Tensor:
    """Parameters as one flat vector `[P]`: a copy, never an alias of live weights; differentiable."""
    return torch.cat([p.reshape(-1) for p in parameters])


def unflatten(student: nn.Module, theta: Tensor) -> list[Tensor]:
    """The pieces of `theta` `[P]` as views in the shapes of `student`'s parameters (a shared one counts once)."""
    parameters = list(student.parameters())
    sizes = [p.numel() for p in parameters]
    if theta.shape != (sum(sizes),):
        raise ValueError(f"parameters of shape {tuple(theta.shape)}: this student has ({sum(sizes)},)")
    return [piece.view_as(p) for piece, p in zip(theta.split(sizes), parameters, strict=True)]


def places(student: nn.Module) -> dict[str, int]:
    """Every name under which `student` holds a parameter, and which of its parameters that is."""
    position = {id(p): i for i, p in enumerate(student.parameters())}
    return {
        f"{path}.{name}".lstrip("."): position[id(p)]
        for path, module in student.named_modules()
        for name, p in module.named_parameters(recurse=False, remove_duplicate=False)
    }


def logits_of(student: nn.Module, theta: Sequence[Tensor], images: Tensor) -> Tensor:
    """`student`'s logits `[B, classes]` with the parameters `theta` (the pieces, as `unflatten` gives them)."""
    # every place that holds a parameter, once: torch's own tying of shared weights corrupts a module with two names
    replaced = {name: theta[i] for name, i in places(student).items()}
    return functional_call(student, replaced, (images,), tie_weights=False)


def initial_parameters(student: nn.Module, seed: int | torch.Generator) -> Tensor:
    """A fresh random initialisation `[P]` of `student`, by every layer's own `reset_parameters`."""
    model = copy.deepcopy(student).cpu()  # the same weights whatever the device
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
    """Refuse layers whose draws or side effects make a second pass differ from the first, as the unroll needs."""
    for name, module in student.named_modules():
        kind = type(module).__name__
        if getattr(module, "track_running_stats", False) and module.training:
            raise ValueError(
                f"student's {name} ({kind}) changes its running statistics in every pass: build it with "
                "track_running_stats=False, or use GroupNorm"
            )
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0 and module.training:
            raise ValueError(f"student's {name} ({kind}) draws from torch's global state: use p=0")


def check_images(student: nn.Module, images: Tensor, labels: Tensor) -> None:
    """A `ValueError` if images or labels are not ones that `student` can take."""
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

    Ordinary, non-differentiable training: experts are made by it, and fresh students are evaluated by it.
    `lr` may be a function of the step number. Copy what you keep: the model goes on changing. The momentum starts from
    `velocity` `[P]` and is kept in it, if one is given: with the parameters it is all that SGD goes on from.
    """
    model = copy.deepcopy(student)
    with torch.no_grad():
        for p, value in zip(model.parameters(), unflatten(student, start), strict=True):
            p.copy_(value)
    rate = lr if callable(lr) else lambda step: lr
    optimizer = torch.optim.SGD(model.parameters(), lr=rate(0), momentum=momentum, weight_decay=weight_decay)
    if velocity is not None:
        for p, own in zip(model.parameters(), unflatten(student, velocity), strict=True):
            optimizer.state[p]["momentum_buffer"] = own
    for step, (images, labels) in enumerate(batches):
        optimizer.param_groups[0]["lr"] = rate(step)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield model, loss.detach()


def sgd_together(
    student: nn.Module,
    start: Tensor,
    batches: Iterable[Sequence[tuple[Tensor, Tensor]]],
    lr: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    velocity: Tensor | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """`sgd` for E students at once, from `start` `[E, P]`; after each step yield all of theta `[E, P]` and E losses.

    Each element of `batches` holds E pairs of equal shapes. Where memory does not hold all of them, parts of them
    follow each other.
    """

    def loss(theta: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits_of(student, unflatten(student, theta), images), labels)

    slope, part = torch.func.grad_and_value(loss), len(start)
    theta, decay = start, None
    velocity = torch.zeros_like(start) if velocity is None else velocity
    for pairs in batches:
        images, labels = map(torch.stack, zip(*pairs, strict=True))
        gradient = None
        while gradient is None:
            try:
                gradient, losses = torch.vmap(slope, chunk_size=part)(theta, images, labels)
            except torch.OutOfMemoryError:
                if part == 1:
                    raise
                part = -(-part // 2)
        if decay is None:
            decay = weight_decay * used(student, theta[0], images[0], labels[0])
        gradient = gradient + decay * theta
        velocity.mul_(momentum).add_(gradient)
        theta = theta - lr * velocity
        yield theta, losses


def used(student: nn.Module, theta: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    """`[P]`: 1 for what the loss depends on, 0 for the rest, which torch's SGD leaves alone, its decay included."""
    with torch.enable_grad():
        pieces = [p.detach().requires_grad_() for p in unflatten(student, theta)]
        loss = F.cross_entropy(logits_of(student, pieces, images), labels)
        found = torch.autograd.grad(loss, pieces, allow_unused=True)
    return flatten(torch.full_like(p.detach(), g is not None) for p, g in zip(pieces, found, strict=True))


# ----------------------------------------------------------------------------------------------------------------------
# Instance norm, ReLU and 2x2 average pooling as one operation
#
# For every image and channel, with x = (z - mean) / std over its n pixels: y = relu(gain x + shift), p = pool(y). What
# the norm's derivatives return lies in the span of 1, x and one or two images more, so each costs a few sums over the
# pixels (`[B, C]` below) and one weighted sum of images. x is not stored: it is rstd (z - mean).
# ----------------------------------------------------------------------------------------------------------------------


def norm_relu_pool(z: Tensor, gain: Tensor, shift: Tensor, eps: float = 1e-5) -> Tensor:
    """`avg_pool2d(relu(group_norm(z, C, gain, shift, eps)), 2)` of `[B, C, H, W]`; differentiable twice, both ways."""
    # a compiler fuses by itself, torch.func takes its own layers only, and odd sizes are rare
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or any(n % 2 for n in z.shape[2:]):
        return F.avg_pool2d(F.relu(F.group_norm(z, z.shape[1], gain, shift, eps)), 2)
    return _Block.apply(z, gain, shift, eps)


def total(a: Tensor) -> Tensor:
    return a.sum((2, 3))


def combine(constant: Tensor, *terms: tuple[Tensor, Tensor]) -> Tensor:
    """constant + sum of coefficient * image: coefficients `[B, C]`, images `[B, C, H, W]`."""
    out = constant[..., None, None]
    for coefficient, image in terms:
        add = out.addcmul_ if out.shape == image.shape else out.addcmul
        out = add(image, coefficient[..., None, None])
    return out


def pool(y: Tensor) -> Tensor:
    """2x2 means, by adding rows, then columns: torch's own kernel takes six times as long on a CPU."""
    batch, channels, height, width = y.shape
    rows = y.view(batch, channels, height // 2, 2, width)
    pairs = (rows[..., 0, :] + rows[..., 1, :]).unflatten(-1, (-1, 2))
    return (pairs[..., 0] + pairs[..., 1]).mul_(0.25)


def unpool(p: Tensor, y: Tensor) -> Tensor:
    """The way back through pool and ReLU: a quarter of each pixel to its four, where y > 0."""
    twice = torch.eye(p.shape[-1], dtype=p.dtype, device=p.device).mul_(0.25).repeat_interleave(2, 1)
    out = (p.reshape(-1, p.shape[-1]) @ twice.repeat(1, 2)).view(y.shape)  # each row, twice as wide, two times
    return through_relu(out, y)


def through_relu(a: Tensor, y: Tensor) -> Tensor:
    """`a` (overwritten) where y > 0, else 0."""
    return torch.ops.aten.threshold_backward.grad_input(a, y, 0, grad_input=a)


def norm_backward(a: Tensor, z: Tensor, gain: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """d/dz, d/dgain and d/dshift of <a, gain x + shift>."""
    batch, channels, height, width = z.shape
    sizes = batch, channels, height * width, channels
    return torch.ops.aten.native_group_norm_backward(a, z, mean, rstd, gain, *sizes, [True, True, True])


def tangent(u: Tensor, u_gain: Tensor, u_shift: Tensor, z, gain, y, mean, rstd) -> Tensor:
    """How p moves when z, gain and shift move by u, u_gain, u_shift: pool(relu'(gain N(u) + u_gain x + u_shift)).

    N(u) = rstd (u - mean(u) - x mean(u x)) is the derivative of x, and its own transpose.
    """
    n = z[0, 0].numel()
    of_u = total(u)
    of_ux = rstd * (total(u * z) - mean * of_u)
    k = gain * rstd
    of_z = (u_gain - k * of_ux / n) * rstd
    return pool(through_relu(combine(u_shift - k * of_u / n - of_z * mean, (k, u), (of_z, z)), y))


def curvature(a: Tensor, u: Tensor, u_gain: Tensor, z, gain, mean, rstd) -> tuple[Tensor, Tensor]:
    """d/dz and d/dgain of <a, gain N(u) + u_gain x>, the product of a cotangent and a tangent of the norm's output."""
    n = z[0, 0].numel()
    of_a, of_u = total(a), total(u)
    of_ax, of_ux = (rstd * (total(b * z) - mean * s) for b, s in ((a, of_a), (u, of_u)))
    a_n_u = rstd * (total(a * u) - of_a * of_u / n - of_ax * of_ux / n)  # <a, N(u)>, which is d/dgain
    # d/dz = N(p a + q u) - r x: N moves with x (the first two), and with rstd (the third)
    p, q = u_gain - gain * rstd * of_ux / n, -gain * rstd * of_ax / n
    r = rstd * gain * a_n_u / n
    of_z = -rstd * ((p * of_ax + q * of_ux) * rstd / n + r)
    constant = -rstd * (p * of_a + q * of_u) / n - of_z * mean
    return combine(constant, (p * rstd, a), (q * rstd, u), (of_z, z)), a_n_u.sum(0)


class _Block(torch.autograd.Function):
    """z, gain, shift -> p."""

    @staticmethod
    def forward(ctx, z, gain, shift, eps):
        z = z.contiguous()
        batch, channels, height, width = z.shape
        y, mean, rstd = torch.native_group_norm(z, gain, shift, batch, channels, height * width, channels, eps)
        kept = z, gain, y.relu_(), mean, rstd
        ctx.save_for_backward(*kept)
        ctx.save_for_forward(*kept)
        return pool(y)

    @staticmethod
    def backward(ctx, p):
        return *_Backward.apply(p, *ctx.saved_tensors), None

    @staticmethod
    def jvp(ctx, u, u_gain, u_shift, _):
        return _Tangent.apply(u, u_gain, u_shift, *ctx.saved_for_forward)


class _Backward(torch.autograd.Function):
    """The cotangent of p -> those of z, gain, shift."""

    @staticmethod
    def forward(ctx, p, z, gain, y, mean, rstd):
        ctx.save_for_backward(p, z, gain, y, mean, rstd)
        return norm_backward(unpool(p, y), z, gain, mean, rstd)

    @staticmethod
    @once_differentiable
    def backward(ctx, u, u_gain, u_shift):
        p, z, gain, y, mean, rstd = ctx.saved_tensors
        u = u.contiguous()
        d_z, d_gain = curvature(unpool(p, y), u, u_gain, z, gain, mean, rstd)
        return tangent(u, u_gain, u_shift, z, gain, y, mean, rstd), d_z, d_gain, None, None, None


class _Tangent(torch.autograd.Function):
    """The tangents of z, gain, shift -> that of p."""

    @staticmethod
    def forward(ctx, u, u_gain, u_shift, z, gain, y, mean, rstd):
        u = u.contiguous()
        ctx.save_for_backward(u, u_gain, z, gain, y, mean, rstd)
        return tangent(u, u_gain, u_shift, z, gain, y, mean, rstd)

    @staticmethod
    @once_differentiable
    def backward(ctx, p):
        u, u_gain, z, gain, y, mean, rstd = ctx.saved_tensors
        a = unpool(p, y)
        d_z, d_gain = curvature(a, u, u_gain, z, gain, mean, rstd)
        return *norm_backward(a, z, gain, mean, rstd), d_z, d_gain, None, None, None
