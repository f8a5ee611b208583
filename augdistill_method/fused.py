"""Instance norm, ReLU and 2x2 average pooling as one operation, with explicit first and second derivatives.

The result equals that of torch's own three layers. The operation exists for speed: outside the convolutions those three
layers take half of the time, most of it in group norm's second derivative and in average pooling.

For every image and channel, with x = (z - mean) / std over its n pixels: y = relu(gain x + shift), p = pool(y). The
norm's derivatives lie in the span of 1, x and one or two more images. So each costs a few sums over the pixels
(`[B, C]` below) and one weighted sum of images. x is not stored: it is rstd (z - mean).

On a CUDA device inductor compiles each formula (`by_inductor`; **not run on one yet**). Compiled on a CPU, the
student's gradient and products equal the uncompiled ones to 2e-15 in float64, in channels_last too; but there it is
slower than torch's own kernels: 1.15 to 1.3 times the official time of an unroll.
"""

import functools
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def norm_relu_pool(z: Tensor, gain: Tensor, shift: Tensor, eps: float = 1e-5) -> Tensor:
    """`avg_pool2d(relu(group_norm(z, C, gain, shift, eps)), 2)` of `[B, C, H, W]`, twice differentiable.

    Forward mode works too. z may be bfloat16, and the result then is, too. Norms and sums are computed in the type of
    gain and shift.
    """
    # torch's layers: a compiler fuses them by itself, torch.func supports only them, and odd sizes are rare
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or any(n % 2 for n in z.shape[2:]):
        return F.avg_pool2d(F.relu(F.group_norm(z.to(gain.dtype), z.shape[1], gain, shift, eps)), 2).to(z.dtype)
    return _Block.apply(as_block(z), gain, shift, eps)  # a copy made inside it would cut the second derivative


def total(a: Tensor) -> Tensor:
    return a.sum((2, 3))


def combine(constant: Tensor, *terms: tuple[Tensor, Tensor]) -> Tensor:
    """constant + sum of coefficient * image: coefficients `[B, C]`, images `[B, C, H, W]`."""
    out = constant[..., None, None]
    for coefficient, image in terms:
        add = out.addcmul_ if out.shape == image.shape else out.addcmul
        out = add(image, coefficient[..., None, None])
    return out


def average_pool(y: Tensor) -> Tensor:
    """2x2 means, by adding rows, then columns: torch's own kernel takes 6 times as long on a CPU."""
    if torch.compiler.is_compiling():
        return F.avg_pool2d(y, 2)
    batch, channels, height, width = y.shape
    rows = y.view(batch, channels, height // 2, 2, width)
    pairs = (rows[..., 0, :] + rows[..., 1, :]).unflatten(-1, (-1, 2))
    return (pairs[..., 0] + pairs[..., 1]).mul_(0.25)


def average_unpool(p: Tensor, y: Tensor) -> Tensor:
    """Backward through pool and ReLU: each pixel passes a quarter to its four pixels, where y > 0."""
    if torch.compiler.is_compiling():  # no matrix product, which would be a kernel of its own
        return through_relu((p / 4)[:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2).reshape(y.shape), y)
    twice = torch.eye(p.shape[-1], dtype=p.dtype, device=p.device).mul_(0.25).repeat_interleave(2, 1)
    out = (p.reshape(-1, p.shape[-1]) @ twice.repeat(1, 2)).view(y.shape)  # each row, twice as wide, repeated
    return through_relu(out, y)


def through_relu(a: Tensor, y: Tensor) -> Tensor:
    """`a` (overwritten) where y > 0, else 0."""
    if torch.compiler.is_compiling():
        return torch.where(y > 0, a, 0)
    return torch.ops.aten.threshold_backward.grad_input(a, y, 0, grad_input=a)


def norm_backward(a: Tensor, z: Tensor, gain: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """d/dz, d/dgain and d/dshift of <a, gain x + shift>."""
    batch, channels, height, width = z.shape
    if torch.compiler.is_compiling():
        n, k, of_a = height * width, gain * rstd, total(a)
        of_ax = rstd * (total(a * z) - mean * of_a)
        of_z = -k * of_ax * rstd / n
        return combine(-k * of_a / n - of_z * mean, (k, a), (of_z, z)), of_ax.sum(0), of_a.sum(0)
    sizes = batch, channels, height * width, channels
    return torch.ops.aten.native_group_norm_backward(a, z, mean, rstd, gain, *sizes, [True, True, True])


# ----------------------------------------------------------------------------------------------------------------------
# The operation and its derivatives: images in and out have z's type, all else has gain's
# ----------------------------------------------------------------------------------------------------------------------


@functools.cache
def compiled(formula: Callable) -> Callable:
    """The formula, which inductor compiles at the first call with each shape."""
    return torch.compile(formula, fullgraph=True, dynamic=False)


def by_inductor(formula: Callable) -> Callable:
    """The formula compiled by inductor on a CUDA device; elsewhere, or if it cannot be, as it is."""

    @functools.wraps(formula)
    def call(*given):
        if not compiles(given[0]):
            return formula(*given)
        try:
            with torch._dynamo.config.patch(recompile_limit=1000):  # layers x sizes of a batch
                return compiled(formula)(*(t.detach() if isinstance(t, Tensor) else t for t in given))
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = " ".join(str(error).split("\n")[:2])
            warnings.warn(f"norm, ReLU and pooling run without inductor, so they are slower: {reason}", stacklevel=2)
            FAILED.append(reason)
            return formula(*given)

    return call


FAILED: list[str] = []  # why inductor cannot be used here, once it has been tried


def compiles(z: Tensor) -> bool:
    """Whether formulas of `z` run compiled: not inside a check of each operation, which dynamo refuses."""
    return z.is_cuda and not FAILED and not torch._C._len_torch_dispatch_stack()


@by_inductor
def block(z: Tensor, gain: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """p, and what the derivatives need: y (or, in fewer bytes, where it is positive), mean and rstd."""
    batch, channels, height, width = z.shape
    z_ = z.to(gain.dtype)
    if torch.compiler.is_compiling():
        variance, mean = torch.var_mean(z_, (2, 3), correction=0)
        rstd = torch.rsqrt(variance + eps)
        y = combine(shift - gain * rstd * mean, (gain * rstd, z_)).relu()
        return average_pool(y).to(z.dtype), y > 0, mean, rstd
    y, mean, rstd = torch.native_group_norm(z_, gain, shift, batch, channels, height * width, channels, eps)
    y = y.relu_()
    return average_pool(y).to(z.dtype), y.to(z.dtype), mean, rstd


@by_inductor
def block_backward(p: Tensor, z, gain, y, mean, rstd) -> tuple[Tensor, Tensor, Tensor]:
    """The cotangent of p -> those of z, gain, shift."""
    z_, p, y = (image.to(gain.dtype) for image in (z, p, y))
    d_z, d_gain, d_shift = norm_backward(average_unpool(p, y), z_, gain, mean, rstd)
    return d_z.to(z.dtype), d_gain, d_shift


@by_inductor
def block_tangent(u: Tensor, u_gain: Tensor, u_shift: Tensor, z, gain, y, mean, rstd) -> Tensor:
    """The tangents of z, gain, shift -> that of p."""
    u, z_, y = (image.to(gain.dtype) for image in (u, z, y))
    return tangent(u, u_gain, u_shift, z_, gain, y, mean, rstd).to(z.dtype)


@by_inductor
def block_backward_twice(u: Tensor, u_gain, u_shift, p, z, gain, y, mean, rstd) -> tuple[Tensor, Tensor, Tensor]:
    """Backward through `block_backward`: cotangents of its results -> those of p, z, gain."""
    u, p, z_, y = (image.to(gain.dtype) for image in (u, p, z, y))
    d_z, d_gain = curvature(average_unpool(p, y), u, u_gain, z_, gain, mean, rstd)
    return tangent(u, u_gain, u_shift, z_, gain, y, mean, rstd).to(z.dtype), d_z.to(z.dtype), d_gain


@by_inductor
def block_tangent_backward(p: Tensor, u: Tensor, u_gain: Tensor, z, gain, y, mean, rstd) -> tuple[Tensor, ...]:
    """Backward through `block_tangent`: the cotangent of its result -> those of u, u_gain, u_shift, z, gain."""
    p, u, z_, y = (image.to(gain.dtype) for image in (p, u, z, y))
    a = average_unpool(p, y)
    d_z, d_gain = curvature(a, u, u_gain, z_, gain, mean, rstd)
    d_u, d_u_gain, d_u_shift = norm_backward(a, z_, gain, mean, rstd)
    return d_u.to(z.dtype), d_u_gain, d_u_shift, d_z.to(z.dtype), d_gain


def tangent(u: Tensor, u_gain: Tensor, u_shift: Tensor, z, gain, y, mean, rstd) -> Tensor:
    """The tangent of p for tangents u, u_gain, u_shift of z, gain, shift: pool(relu'(gain N(u) + u_gain x + u_shift)).

    N(u) = rstd (u - mean(u) - x mean(u x)) is the derivative of x along u; N is symmetric.
    """
    n = z[0, 0].numel()
    of_u = total(u)
    of_ux = rstd * (total(u * z) - mean * of_u)
    k = gain * rstd
    of_z = (u_gain - k * of_ux / n) * rstd
    return average_pool(through_relu(combine(u_shift - k * of_u / n - of_z * mean, (k, u), (of_z, z)), y))


def curvature(a: Tensor, u: Tensor, u_gain: Tensor, z, gain, mean, rstd) -> tuple[Tensor, Tensor]:
    """d/dz and d/dgain of <a, gain N(u) + u_gain x>: a cotangent `a` times a tangent of the norm's output."""
    n = z[0, 0].numel()
    of_a, of_u = total(a), total(u)
    of_ax, of_ux = (rstd * (total(b * z) - mean * s) for b, s in ((a, of_a), (u, of_u)))
    a_n_u = rstd * (total(a * u) - of_a * of_u / n - of_ax * of_ux / n)  # <a, N(u)>, which is d/dgain
    # d/dz = N(p a + q u) - r x: N depends on z through x (the first two terms) and through rstd (the third)
    p, q = u_gain - gain * rstd * of_ux / n, -gain * rstd * of_ax / n
    r = rstd * gain * a_n_u / n
    of_z = -rstd * ((p * of_ax + q * of_ux) * rstd / n + r)
    constant = -rstd * (p * of_a + q * of_u) / n - of_z * mean
    return combine(constant, (p * rstd, a), (q * rstd, u), (of_z, z)), a_n_u.sum(0)


# ----------------------------------------------------------------------------------------------------------------------
# The same for autograd
# ----------------------------------------------------------------------------------------------------------------------


def as_block(images: Tensor) -> Tensor:
    """Images in the layout that the formulas take: inductor any, torch's own kernels one channel after the other."""
    return images if compiles(images) else images.contiguous()


class _Block(torch.autograd.Function):
    """z, gain, shift -> p."""

    @staticmethod
    def forward(ctx, z, gain, shift, eps):
        p, *kept = block(z, gain, shift, eps)
        kept = z, gain, *kept
        ctx.save_for_backward(*kept)
        ctx.save_for_forward(*kept)
        return p

    @staticmethod
    def backward(ctx, p):
        return *_Backward.apply(p, *ctx.saved_tensors), None

    @staticmethod
    def jvp(ctx, u, u_gain, u_shift, _):
        return _Tangent.apply(u, u_gain, u_shift, *ctx.saved_for_forward)


class _Backward(torch.autograd.Function):
    """`block_backward`, and backward through it."""

    @staticmethod
    def forward(ctx, p, *kept):
        ctx.save_for_backward(p, *kept)
        return block_backward(p, *kept)

    @staticmethod
    @once_differentiable
    def backward(ctx, u, u_gain, u_shift):
        d_p, d_z, d_gain = block_backward_twice(as_block(u), u_gain, u_shift, *ctx.saved_tensors)
        return d_p, d_z, d_gain, None, None, None


class _Tangent(torch.autograd.Function):
    """`block_tangent`, and backward through it."""

    @staticmethod
    def forward(ctx, u, u_gain, u_shift, *kept):
        u = as_block(u)
        ctx.save_for_backward(u, u_gain, *kept)
        return block_tangent(u, u_gain, u_shift, *kept)

    @staticmethod
    @once_differentiable
    def backward(ctx, p):
        return *block_tangent_backward(p, *ctx.saved_tensors), None, None, None
