"""The interface of a phi, the registry `PHIS`, chains and wrappers, and the two controls (identity and pixels).

All phis share one interface, the learned pixels of the baseline included, so the baseline, the student report's
networks and ours are rows of one table. To add a phi: write a file in `augdistill_method/zoo` with a subclass of `Phi`,
its `forward`, and the decorator `register_phi("name")`.
"""

import contextlib
import copy
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from augdistill_method.random import seeded, to_device


class Phi(nn.Module):
    """An augmentation: maps images `[B, C, H, W]` to images of the same shape. Subclass, write `forward`, register.

    `forward(images, *, labels, index, generator)` may use `labels` `[B]`, `index` `[B]` (each image's position in the
    base set) and `generator` (the only source of noise); take `**_` for arguments that you ignore. The class attributes
    below describe a phi; the table of phis and the tests read them.
    """

    stochastic = True  # may sample noise from the generator; False: phi(x) is the same for every seed
    conditional = False  # reads the labels
    positional = False  # has parameters for each pixel position
    bound = False  # has parameters for each base image, so it cannot augment other images
    starts_as_identity = False  # returns its input before training

    def forward(self, images: Tensor, *, labels: Tensor, index: Tensor, generator: torch.Generator) -> Tensor:
        raise NotImplementedError

    def relabel(self, labels: Tensor, index: Tensor) -> Tensor:
        """The labels that students learn for phi(x): by default the images' own, `[B]`; or probabilities `[B, K]`."""
        return labels

    def report(self) -> dict[str, float]:
        """Numbers to monitor while the phi learns; `distill` stores them in each record."""
        return {}


class Wrapper(Phi):
    """A phi made of other phis: it has an attribute (stochastic, conditional, positional, bound) if one of them has it,
    and starts as the identity if all of them do. A module without these attributes counts as `Phi` itself. Its labels
    are those of its `phi`."""

    def __init__(self, *phis: nn.Module):
        super().__init__()
        for claim in ("stochastic", "conditional", "positional", "bound"):
            setattr(self, claim, any(getattr(phi, claim, getattr(Phi, claim)) for phi in phis))
        self.starts_as_identity = all(getattr(phi, "starts_as_identity", False) for phi in phis)

    def relabel(self, labels, index):
        return labels_under(self.phi, labels, index)


class Chain(Wrapper):
    """Phis applied one after the other, from left to right: `make_phi("unet+policy", ...)`."""

    def __init__(self, phis: Sequence[Phi]):
        super().__init__(*phis)
        self.phis = nn.ModuleList(phis)

    def forward(self, images, **given):
        for phi in self.phis:
            images = phi(images, **given)
        return images

    def relabel(self, labels, index):
        for phi in self.phis:
            labels = labels_under(phi, labels, index)
        return labels

    def report(self):
        return {k: v for phi in self.phis for k, v in getattr(phi, "report", dict)().items()}


class Applied(Wrapper):
    """A phi with a strength, x + strength (phi(x) - x), applied to each image with a `probability` in [0, 1]."""

    def __init__(self, phi: Phi, strength: float = 1.0, probability: float = 1.0):
        super().__init__(phi)
        self.phi, self.strength, self.probability = phi, strength, probability
        self.stochastic = self.stochastic or probability < 1

    def forward(self, images, *, generator, **given):
        out = self.phi(images, generator=generator, **given)
        if self.strength != 1:
            out = images + self.strength * (out - images)
        if self.probability < 1:
            taken = torch.rand(len(images), generator=generator, device=generator.device) < self.probability
            out = torch.where(to_device(taken, images.device).view(-1, 1, 1, 1), out, images)
        return out


_REGISTRY: dict[str, Callable[[Tensor, int], Phi]] = {}

PHIS = types.MappingProxyType(_REGISTRY)  # read-only: only `register_phi` adds entries, so no name is used twice


def origin(build) -> tuple[str, str]:
    """The module and the name under which a class or function was defined."""
    return getattr(build, "__module__", ""), getattr(build, "__qualname__", repr(build))


def is_ours(build) -> bool:
    """Whether a phi is defined in this package, not by a user."""
    return origin(build)[0].split(".")[0] == __name__.split(".")[0]


def register_phi(name: str):
    """Decorator: register `build(images, classes) -> Phi` (a function or a class) as `PHIS[name]`.

    `images` `[n, C, H, W]` is the base set: read the shape from it (and, for a bound phi, the initial values).
    A `ValueError` if the name contains a +, or belongs to another phi.
    """

    def register(build):
        if "+" in name:
            raise ValueError(f"phi {name!r}: a + separates the names in a chain; choose another name")
        # a notebook cell may run twice, and a worker may load a file twice: the same definition is replaced
        if name in PHIS and origin(PHIS[name]) != origin(build):
            raise ValueError(f"phi {name!r} is registered already; choose another name")
        _REGISTRY[name] = build
        return build

    return register


def builders(name: str) -> list:
    """The entries of `PHIS` for a name: one, or those of a chain ("unet+policy"); a `ValueError` if unknown."""
    names = name.split("+")
    for one in names:
        if one not in PHIS:
            raise ValueError(f"unknown phi {one!r}: must be one of {', '.join(PHIS)}, or several joined by +")
    return [PHIS[one] for one in names]


def make_phi(name: str, images: Tensor, classes: int, seed: int) -> Phi:
    """A new phi of that name (or chain of names) for base images `[n, C, H, W]`, initialised from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        phis = [build(images, classes) for build in builders(name)]
        return (phis[0] if len(phis) == 1 else Chain(phis)).to(images)


def augmented(augment, images: Tensor, labels: Tensor, index: Tensor, generator: torch.Generator) -> Tensor:
    """`augment` applied to a batch (None: no change); a `ValueError` if it changes the shape or the number type."""
    if augment is None:
        return images
    out = augment(images, labels=labels, index=index, generator=generator)
    if out.shape != images.shape:
        raise ValueError(f"{type(augment).__name__} turned {tuple(images.shape)} into {tuple(out.shape)}: must keep it")
    if out.dtype != images.dtype:
        raise ValueError(f"{type(augment).__name__} turned {images.dtype} into {out.dtype}: must keep it")
    return out


def labels_under(phi, labels: Tensor, index: Tensor) -> Tensor:
    """The labels of phi(x) for hard `labels` `[B]` of the base images `index` `[B]`: hard, or probabilities `[B, K]`.

    A `phi` that is None, or does not say (any function of images), keeps the labels.
    """
    return phi.relabel(labels, index) if hasattr(phi, "relabel") else labels


@register_phi("identity")
class Identity(Phi):
    """phi(x) = x: the control with which every claim about phi is compared (alpha is still learned)."""

    stochastic = False
    starts_as_identity = True

    def __init__(self, images: Tensor, classes: int):
        super().__init__()

    def forward(self, images, **_):
        return images


@register_phi("pixels")
class Pixels(Phi):
    """The baseline: one learned image per base image, initialised with it (MTT's synthetic set, real init)."""

    stochastic = False
    bound = True
    positional = True
    starts_as_identity = True

    def __init__(self, images: Tensor, classes: int):
        super().__init__()
        self.pixels = nn.Parameter(images.detach().clone())

    def forward(self, images, *, index, **_):
        return self.pixels[index]


class Control(Wrapper):
    """One component of a phi, scored alone."""

    def __init__(self, phi: Phi):
        super().__init__(phi)
        self.phi, self.starts_as_identity = phi, False


class Stored(Control):
    """The control of a class-conditioned phi: its output for a blank image (all pixels at their mean).

    It contains all that phi stores for each class, and no information from the input image.
    """

    def forward(self, images, **given):
        return self.phi(torch.zeros_like(images), **given)


class Added(Control):
    """The control of a phi that may recognise the class: phi(x) - x, what it adds, without the image itself."""

    def forward(self, images, **given):
        return self.phi(images, **given) - images


def line_of(phi: nn.Module, error: Exception) -> str:
    """ ", FILE:LINE", where an error was raised in the file that defines phi; "" if it was raised elsewhere."""
    file = getattr(sys.modules.get(type(phi).__module__), "__file__", None)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f", {Path(file).name}:{lines[-1]}" if lines else ""


@contextlib.contextmanager
def same_buffers(phi) -> Iterator[None]:
    """Within it, calls of phi change copies of its buffers only (a mean that a norm keeps, for example)."""
    modules = phi.modules() if isinstance(phi, nn.Module) else ()
    own = [(m, name, value) for m in modules for name, value in m._buffers.items() if value is not None]
    for module, name, value in own:
        module._buffers[name] = value.clone()
    try:
        yield
    finally:
        for module, name, value in own:
            module._buffers[name] = value


def check_phi(phi: Phi, images: Tensor, labels: Tensor) -> None:
    """A `ValueError` for a phi that cannot be trained, found by calls of a copy on a few base images.

    It raises an exception, changes the shape, returns values that are not finite, samples from another source than
    `generator`, returns labels that are neither classes nor probabilities, or has only frozen parameters. Or it is not
    what its class says: it draws noise without being `stochastic`, reads labels without being `conditional`, or the
    index without being `bound`.
    """
    name, few = type(phi).__name__, slice(0, 8)
    index = torch.arange(len(labels))[few]
    copied = copied_phi(phi)

    def out(phi: nn.Module, look: str, labels: Tensor = labels[few], index: Tensor = index) -> Tensor:
        return augmented(phi, images[few], labels, index, seeded(0, look))

    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            one, again, other = (out(copied, look) for look in ("one", "one", "two"))
            check_labels(labels_under(copied, labels[few], index), labels[few], images)
        except Exception as error:  # anything that a user's code can raise
            what = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            raise ValueError(f"phi ({name}{line_of(phi, error)}): {what}") from error
    if not one.isfinite().all():
        raise ValueError(f"phi ({name}): returns values that are not finite before training")
    if not torch.equal(one, again):
        raise ValueError(
            f"phi ({name}): gives two results for one seed; sample its noise from `generator` to be reproducible"
        )
    if not getattr(phi, "stochastic", True) and not torch.equal(one, other):
        raise ValueError(f"phi ({name}): draws noise, but its class has stochastic = False; it must be True")
    parameters = list(phi.parameters())
    if parameters and not any(p.requires_grad for p in parameters):
        raise ValueError(f"phi ({name}): every parameter is frozen (requires_grad=False); there is nothing to learn")
    if copied is not phi:
        check_claims(name, copied, out, labels, few)


def copied_phi(phi: nn.Module) -> nn.Module:
    """A copy of phi whose calls leave phi's buffers as they are; phi itself if it cannot be copied."""
    try:
        return copy.deepcopy(phi)
    except Exception:  # a user's class may hold what cannot be copied
        return phi


@torch.no_grad()
def check_claims(name: str, copied: nn.Module, out: Callable, labels: Tensor, few: slice) -> None:
    """A `ValueError` for a phi that reads labels or index, and does not say so.

    A phi may ignore both before it learns, so the parameters of the copy are moved first.
    """
    generator = seeded(0, "moved")
    for p in copied.parameters():
        if p.requires_grad and p.is_floating_point():
            p.add_(to_device(0.1 * torch.randn(p.shape, generator=generator), p.device).to(p))
    index, classes = torch.arange(len(labels))[few], int(labels.max()) + 1
    others = {
        "conditional": ("labels", dict(labels=(labels[few] + 1) % classes)),
        "bound": ("index", dict(index=(index + 1) % len(labels))),
    }
    with torch.random.fork_rng(devices=[]):
        try:
            one = out(copied, "one")
            changed = {claim: (what, out(copied, "one", **other)) for claim, (what, other) in others.items()}
        except Exception:  # moved by chance to where it is not defined: nothing can be said
            return
    try:
        check_labels(labels_under(copied, labels[few], index), labels[few], one)
    except ValueError as error:
        raise ValueError(f"phi ({name}), after a small change of its parameters: {error}") from None
    for claim, (what, other) in changed.items():
        if not getattr(copied, claim, getattr(Phi, claim)) and not torch.allclose(one, other, equal_nan=True):
            raise ValueError(f"phi ({name}): reads `{what}`, but its class has {claim} = False; it must be True")


def check_labels(given: Tensor, labels: Tensor, images: Tensor) -> None:
    """A `ValueError` unless labels `given` for hard `labels` `[B]` are classes `[B]` or probabilities `[B, K]`."""
    hard = given.dtype == labels.dtype and given.shape == labels.shape
    soft = given.dtype == images.dtype and given.ndim == 2 and len(given) == len(labels)
    sums = given.sum(1) if soft else None
    if hard or (soft and given.min() >= 0 and torch.allclose(sums, torch.ones_like(sums), atol=1e-3)):
        return
    found = f"{given.dtype} of shape {tuple(given.shape)}" + (f" with sums from {sums.min():.3g}" if soft else "")
    raise ValueError(f"relabel returned {found}: must be classes [B], or probabilities [B, K] that sum to 1")
