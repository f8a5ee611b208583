"""What the explorer shows, without widgets: images through one phi or two, and the students that train on them.

A `View` holds the sliders' values. `Explorer.look` gives the images, `Explorer.paths` where students go, and
`Explorer.scoring` trains students on them.
"""

import dataclasses
import itertools
from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor

from augdistill_core import (
    PHIS,
    Applied,
    Config,
    Distilled,
    Phi,
    Trajectories,
    Wrapper,
    augmented,
    knob,
    make_phi,
    rms,
    seeded,
)
from augdistill_report.explorer.choices import Choice, find_trained, fresh
from augdistill_report.explorer.ranges import Dial, checked_turns, dials, links_of, with_ranges
from augdistill_report.explorer.uploads import Own
from augdistill_report.files.store import Store
from augdistill_report.run import Run
from augdistill_report.show.image_grids import difference_image, image_grid
from augdistill_report.work.distillation import Distillation
from augdistill_report.work.experts import load_trajectories, own_experts
from augdistill_report.work.probes import phi_images, student_path
from augdistill_report.work.scoring import Evaluation
from augdistill_report.work.setup import Setup

MAX_IMAGES = 20  # images in a picture

MEAN_OF = 4  # draws that estimate phi's mean: as many as a slider has time for


@dataclasses.dataclass(frozen=True)
class View(Config):
    """The values of the sliders: which images are shown, and how phi is applied to them."""

    strength: float = knob(1.0, "lambda: x + lambda (phi(x) - x)", low=0, high=1.5)
    noise: float = knob(
        1.0, "0 = the mean of several draws, 1 = one draw of phi, 2 = twice as far from the mean", low=0, high=2
    )
    seed: int = knob(0, "seed of phi's noise", low=0)
    label: int = knob(-1, "the class; -1 = all", low=-1)
    count: int = knob(10, "number of images", low=1, high=MAX_IMAGES)
    image: int = knob(1, "the image whose several draws are shown, counted from 1", low=1, high=MAX_IMAGES)
    draws: int = knob(6, "number of these draws", low=1, high=MAX_IMAGES)


class Noised(Wrapper):
    """A phi with its noise scaled: mean + noise (phi(x) - mean).

    The mean is over `MEAN_OF` draws. It is kept until the images are another tensor.
    """

    def __init__(self, phi: Phi, noise: float = 1.0):
        super().__init__(phi)
        self.phi, self.noise, self.of, self.mean = phi, noise, None, None

    def forward(self, images, *, generator, **given):
        draw = self.phi(images, generator=generator, **given)
        if self.noise == 1 or not self.stochastic:
            return draw
        return torch.lerp(self.average(images, **given), draw, self.noise)

    def average(self, images: Tensor, **given) -> Tensor:
        """The mean of several draws for images `[B, C, H, W]`, of their shape."""
        if self.of is not images:
            draws = [self.phi(images, generator=seeded(k, "mean"), **given) for k in range(MEAN_OF)]
            self.of, self.mean = images, torch.stack(draws).mean(0)
        return self.mean


class Chosen:
    """A phi that is shown, at all moments of its training, with its ranges as they are turned by hand."""

    def __init__(self, choice: Choice, run: Run):
        self.learned = {moment: phi.requires_grad_(False) for moment, phi in choice.read().items()}
        self.choice, self.run, self.own = choice, run, choice.like.index(run.store)
        self.moments = {moment: Noised(phi) for moment, phi in self.learned.items()}
        self.values: dict[str, float] = {}  # of turned ranges
        self.off: frozenset[int] = frozenset()  # links of a chain
        few = run.data.train.take(self.own[:MAX_IMAGES])
        self.rows = {m: dials(choice, phi, run, few.images, few.labels) for m, phi in self.learned.items()}

    def last(self, moment: str = "") -> str:
        return moment or list(self.moments)[-1]

    @property
    def bound(self) -> bool:
        return next(iter(self.learned.values())).bound

    @property
    def links(self) -> int:
        """The number of links of a chain, 1 for any other phi."""
        return len(links_of(next(iter(self.learned.values()))))

    def dials(self, moment: str = "") -> list[Dial]:
        return self.rows[self.last(moment)]

    def turn(self, values: dict[str, float], off: frozenset[int] = frozenset()) -> None:
        """Set these ranges (in units, by name) and leave out these links, at all moments; {} is as learned."""
        values = checked_turns(values, next(iter(self.rows.values())))
        if not off <= set(range(self.links)):
            raise ValueError(f"links off {sorted(off)}: this phi has {self.links}")
        self.values, self.off = values, off
        self.moments = {m: Noised(with_ranges(phi, self.rows[m], values, off)) for m, phi in self.learned.items()}

    def turned_at(self, name: str, value: float, moment: str) -> Phi:
        """The phi as it is turned, with one range at another value."""
        moment = self.last(moment)
        return with_ranges(self.learned[moment], self.rows[moment], self.values | {name: value}, self.off)

    def through(self, view: View, moment: str, fed: Tensor, labels: Tensor, index: Tensor | None) -> Tensor:
        """Images `[B, C, H, W]` through the phi; a `ValueError` if the result is not finite."""
        noised = self.moments[self.last(moment)]
        noised.noise = view.noise
        given = dict(labels=labels, index=self.place(index, fed))
        out = augmented(Applied(noised, view.strength), fed, **given, generator=seeded(view.seed, "explorer"))
        if not out.isfinite().all():
            raise ValueError(f"{self.choice.name}: phi(x) is not finite here: choose an earlier iteration")
        return out

    def place(self, index: Tensor | None, fed: Tensor) -> Tensor:
        """What a phi gets as the images' index: for a bound phi, their positions in its base set."""
        return positions_in(index, self.own) if self.bound else torch.arange(len(fed))


@dataclasses.dataclass(frozen=True)
class Look:
    """Images in [0, 1] to show: rows by name, and several draws of one image.

    `changes` are the relative changes of x, ||phi(x) - x|| / ||x||, one for each phi.
    """

    rows: dict[str, Tensor]
    columns: list[str]
    draws: dict[str, Tensor]
    changes: list[float]

    @property
    def change(self) -> float:
        return self.changes[0]

    def sheet(self, cell: int = 64, title: str = "") -> Image.Image:
        return image_grid(self.rows, self.columns, cell, title)

    def drawn(self, cell: int = 64) -> Image.Image:
        return image_grid(self.draws, [f"draw {k + 1}" for k in range(len(next(iter(self.draws.values()))))], cell)


@dataclasses.dataclass(frozen=True, eq=False)
class Present:
    """A phi that takes the place of a distillation in an `Evaluation`."""

    setup: Setup
    phi: Phi
    alpha: float

    def stored_phi(self, store: Store) -> Distilled:
        return Distilled(self.phi, self.alpha, [])


class Explorer:
    """A run's data set, the phis to choose from, the chosen one (`choose`), and one to compare it with (`compare`).

    `upload`, if not None, holds the user's own images, which are shown instead of the data set's.
    """

    def __init__(self, run: Run):
        self.run, self.data = run, run.data
        labels = self.data.train.labels
        fewest = int(torch.bincount(labels, minlength=len(self.data.classes)).min())
        self.order = self.data.subset(run.settings.seed, per_class=min(MAX_IMAGES, fewest)).view(
            len(self.data.classes), -1
        )
        self.problems: list[str] = []
        self.second: Chosen | None = None
        self.upload: Own | None = None
        self.refresh()
        for choice in self.choices.values():  # the first that can be read; an untrained one always can be
            try:
                self.choose(choice)
                break
            except (ValueError, OSError) as error:
                self.problems.append(str(error))

    def refresh(self) -> None:
        """Look for phis again."""
        found, self.problems = find_trained(self.run)
        names = dict.fromkeys([self.run.settings.phi, *PHIS])
        self.choices = {c.name: c for c in [*found, *(fresh(self.run, name) for name in names)]}
        self.pixels = self.distilled_pixels()

    @property
    def nothing_trained(self) -> bool:
        return not any(choice.trained for choice in self.choices.values())

    def distilled_pixels(self) -> Tensor | None:
        """The images that notebook 02 distilled from the run's base set, `[n, C, H, W]`; None if there are none."""
        job = self.run.distillation("pixels", self.run.base, self.run.settings.pixel_config)
        try:
            return job.stored_phi(self.run.store).phi.pixels.detach() if self.stored(job) else None
        except (ValueError, OSError) as error:
            self.problems.append(str(error))
            return None

    def stored(self, job: Distillation) -> bool:
        return self.run.store.has(job.kind, job.spec())

    def choose(self, choice: Choice) -> None:
        """Show this phi from now on; a `ValueError` if it cannot be read (then the old one stays)."""
        self.first = Chosen(choice, self.run)
        self.seen = (None, None)

    def compare(self, choice: Choice | None) -> None:
        """Show this phi beside the chosen one (None: none); a `ValueError` as in `choose`."""
        self.second = choice and Chosen(choice, self.run)
        self.seen = (None, None)

    @property
    def choice(self) -> Choice:
        return self.first.choice

    @property
    def moments(self) -> dict[str, Noised]:
        return self.first.moments

    @property
    def both(self) -> list[Chosen]:
        return [self.first, self.second] if self.second else [self.first]

    # --- looking --------------------------------------------------------------------------------------------------

    def index(self, view: View) -> Tensor:
        """Positions `[count]` in the training split of the images that a view shows, the run's base set first.

        A phi that is bound to its base images takes only those. A `ValueError` if there is no such class.
        """
        lines = list(self.order)
        if bound := [chosen for chosen in self.both if chosen.bound]:
            if len(bound) == 2 and not torch.equal(bound[0].own, bound[1].own):
                raise ValueError(f"{bound[1].choice.name}: is bound to other images than {bound[0].choice.name}")
            own = bound[0].own
            labels = self.data.train.labels[own]
            lines = [own[labels == c] for c in range(len(self.data.classes))]
        if view.label >= len(lines):
            raise ValueError(f"label={view.label}: must be a class of {self.data.name}, at most {len(lines) - 1}")
        lines = lines if view.label < 0 else [lines[view.label]]
        rounds = itertools.chain(*itertools.zip_longest(*(line.tolist() for line in lines)))
        return torch.tensor([place for place in rounds if place is not None][: view.count])

    def images(self, view: View) -> tuple[Tensor | None, Tensor, Tensor]:
        """(positions in the training split, images `[count + draws, C, H, W]`, their labels).

        The last `draws` images are copies of the view's `image`. Positions are None for the user's own images. Equal
        requests get the same tensors.
        """
        key = (view.label, view.count, view.image, view.draws, self.upload)
        if self.seen[0] != key:
            if self.upload:
                if bound := [chosen.choice.name for chosen in self.both if chosen.bound]:
                    raise ValueError(f"{bound[0]}: is bound to its base images and takes no others: remove yours")
                pixels = self.upload.pixels[: view.count]
                shown = torch.cat([torch.arange(len(pixels)), self.again(view, len(pixels))])
                images = self.data.standardise(pixels.to(self.data.mean))[shown]
                self.seen = (key, (None, images, torch.full((len(shown),), max(view.label, 0))))
            else:
                index = self.index(view)
                shown = torch.cat([index, index[self.again(view, len(index))]])
                split = self.data.train.take(shown)
                self.seen = (key, (shown, split.images, split.labels))
        return self.seen[1]

    def again(self, view: View, count: int) -> Tensor:
        """The position of the view's `image` among `count`, as often as it is drawn."""
        return torch.full((view.draws,), min(view.image, count) - 1)

    @torch.no_grad()
    def prepare(self, view: View, moment: str = "", other: str = "") -> None:
        """Compute the mean of phi's draws now, so that the noise slider need not wait for it."""
        shown, fed, labels = self.images(view)
        for chosen, at in zip(self.both, (moment, other), strict=False):
            phi = chosen.moments[chosen.last(at)]
            if phi.stochastic:
                phi.average(fed, labels=labels, index=chosen.place(shown, fed))

    @torch.no_grad()
    def look(self, view: View, moment: str = "", other: str = "") -> Look:
        """The view's images through phi at this moment of its training ("": the last). A `ValueError` if not finite.

        With a second phi, taken at the moment `other`, both are shown on the same images and seeds.
        """
        shown, fed, labels = self.images(view)
        count = len(fed) - view.draws
        x = fed[:count]
        outs = [c.through(view, at, fed, labels, shown) for c, at in zip(self.both, (moment, other), strict=False)]
        before, *after = (self.data.pixels(images[:count]) for images in (fed, *outs))
        drawn, one = [self.data.pixels(out[count:]) for out in outs], f"image {min(view.image, count)}"
        if self.second:
            rows = {"x": before, "A": after[0], "B": after[1], "B - A": difference_image(after[1] - after[0])}
            draws = {f"{one}, {name}": its for name, its in zip("AB", drawn, strict=True)}
        else:
            rows = {"x": before, "phi(x)": after[0], "difference": difference_image(after[0] - before)}
            draws = {one: drawn[0]}
        if shown is None:
            columns = self.upload.names[:count]
        else:
            index = shown[:count]
            rows |= self.pixels_row(index, before)
            own = torch.isin(index, self.first.own).tolist() if self.choice.trained else [False] * count
            marked = zip(labels[:count].tolist(), own, strict=True)
            columns = [self.data.classes[c] + " ●" * mine for c, mine in marked]
        return Look(rows, columns, draws, [rms(out[:count] - x) / (rms(x) or 1.0) for out in outs])

    def pixels_row(self, index: Tensor, before: Tensor) -> dict[str, Tensor]:
        """A row of the distilled pixels where there are some; white for other images."""
        if self.pixels is None or self.second:
            return {}
        of_base = self.run.base.index(self.data)
        here = torch.isin(index, of_base)
        made = torch.ones_like(before)
        made[here] = self.data.pixels(self.pixels[positions_in(index[here], of_base)])
        return {"pixels (MTT)": made} if here.any() else {}

    # --- students -------------------------------------------------------------------------------------------------

    def experts(self) -> Trajectories | None:
        """The expert trajectories of the chosen phi's setup; None while some must be trained."""
        setup, store = self.choice.like.setup, self.run.store
        if all(store.has(job.kind, job.spec()) for job in own_experts(setup)):
            return load_trajectories(setup, store)
        return None

    def paths(self, view: View, experts: Trajectories, moment: str = "", other: str = "") -> dict[str, list[Tensor]]:
        """Where students go, by row name: paths `[N + 1, P]` from two snapshots of the first expert, on phi's images.

        Strength and noise are the view's, N and alpha the phi's own. Without augmentation, alpha is the first phi's.
        """
        like, expert, seed = self.choice.like, experts.trajectories[0], view.seed
        starts = [expert[t] for t in sorted({0, like.config.max_start_epoch})]
        rows = {"no augmentation": (None, self.choice, self.first.own)}
        for chosen, at, name in zip(self.both, (moment, other), ("A" if self.second else "phi", "B"), strict=False):
            noised = chosen.moments[chosen.last(at)]
            noised.noise = view.noise
            rows[name] = Applied(noised, view.strength), chosen.choice, chosen.own if chosen.bound else self.first.own
        found = {}
        for name, (phi, choice, own) in rows.items():
            base = self.data.train.take(own[: like.config.batch_syn or len(own)])
            given = (phi, base, choice.alpha(), like.config.syn_steps, seed)
            found[name] = [student_path(experts.student, start, *given) for start in starts]
        return found

    def scoring(
        self, view: View, moment: str = "", other: str = ""
    ) -> Callable[[Callable[[float, float], None]], dict[str, list[float]]]:
        """The evaluation of what is shown, as a function: `work(tick)` gives the students' accuracies, a list a row.

        Fresh students are trained on the first phi's own images: without augmentation and through the identity (the
        controls), and through each phi as it is shown ("phi"; of two, "A" and "B"). Accuracies are on the validation
        split, since the user chooses a phi by them.
        """
        settings, subset = self.run.settings, self.choice.like.subset
        alpha = settings.alpha if settings.eval_lr else self.choice.alpha()  # used only if eval_lr is 0
        identity = make_phi("identity", self.data.train.take(self.first.own[:1]).images, len(self.data.classes), 0)
        setup, store = settings.select(Setup), self.run.store
        rows = {"no augmentation": None, "identity": Present(setup, identity, alpha)}
        for chosen, at, name in zip(self.both, (moment, other), ("A" if self.second else "phi", "B"), strict=False):
            if chosen.bound and not torch.equal(chosen.own, self.first.own):
                raise ValueError(f"{chosen.choice.name}: is bound to other images than those of {self.choice.name}")
            phi = Noised(chosen.moments[chosen.last(at)].phi, view.noise)
            rows[name] = Present(setup, phi, alpha if settings.eval_lr else chosen.choice.alpha())

        def work(tick):
            found = {}
            for row, (name, present) in enumerate(rows.items()):
                changes = {"phi_strength": view.strength} if name in ("phi", "A", "B") else {}
                config = settings.eval_config(present is not None, **changes)
                job = Evaluation(setup, subset, config, present)
                _, found[name] = job.trained(store, lambda done, total, r=row: tick(r + done / total, len(rows)))
            return found

        return work


def frames(run: Run, moments_of: dict[str, dict[str, Phi]]) -> list[Image.Image]:
    """A film of the run's base images through phis in training: a picture for each moment of the longest training.

    A training that ended before the others (it diverged, for example) keeps its last picture.
    """
    base, seed = run.train(run.base).take(slice(0, MAX_IMAGES)), run.settings.seed
    pictures, rows = [], {"x": run.data.pixels(base.images)}
    for moment in max(moments_of.values(), key=len):
        rows |= {
            name: run.data.pixels(phi_images(phis.get(moment) or list(phis.values())[-1], base, seed))
            for name, phis in moments_of.items()
        }
        pictures.append(image_grid(rows, run.titles(base), 56, title=f"iteration {moment}"))
    return pictures


def positions_in(index: Tensor, own: Tensor) -> Tensor:
    """The position of each of `index` `[n]` in `own`, `[n]`."""
    return torch.tensor([int((own == place).nonzero()[0]) for place in index], dtype=torch.int64)
