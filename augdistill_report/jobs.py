"""The pieces of work that a report consists of: each says all it depends on, runs in any process, and is stored.

A job is a frozen dataclass of plain values. `spec()` is what its result depends on, `work()` makes the result. Jobs
find what they build on (a distillation its experts, an evaluation its phi) in the same store, and make what is missing.
"""

import dataclasses
import functools
import inspect
import math
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from augdistill_core import (
    DistillConfig,
    Distilled,
    Phi,
    Trajectories,
    distill,
    diverged,
    make_phi,
    snapshots_every,
    train_expert,
    train_together,
)
from augdistill_phis import OURS, Added, Applied, Stored, builders, origin
from augdistill_report.artefacts import Store, source_digest
from augdistill_report.augmentations import augmentation, fitted
from augdistill_report.checkpoints import Checkpoint
from augdistill_report.data import Dataset
from augdistill_report.evaluation import accuracy, accuracy_of, evaluate, probe, teacher_of
from augdistill_report.expert_files import FLOATS, ExpertFile, TrainingFiles, sealed, versions
from augdistill_report.instaaug import InstaAug
from augdistill_report.settings import ROOT, EvalConfig, Setup, given_experts, public_name
from augdistill_report.students import STUDENTS

Tick = Callable[..., None]  # tick(done, total, note=""): how far, and a word on what is wrong, if anything is
SOURCE = source_digest(ROOT)  # of the code that this process has imported


class Task:
    """A piece of work whose result is stored under what it depends on. `kind` names its files."""

    kind = "task"
    cost = 0.0  # about how much work it is beside others of its kind: what takes longest had better start first

    def spec(self) -> dict:
        """All that the result depends on, as plain JSON values."""
        raise NotImplementedError

    def work(self, store: Store, tick: Tick) -> tuple[dict, dict]:
        """Make the result: (tensors, plain JSON values)."""
        raise NotImplementedError

    def run(self, store: Store, tick: Tick = lambda done, total, note="": None) -> None:
        """Make the result and store it, unless it is there; if another process is making it, wait for that."""
        if not store.has(self.kind, self.spec()):
            with store.making(self.kind, self.spec()):
                if not store.has(self.kind, self.spec()):
                    began = time.process_time()  # what others do on the machine does not count
                    result = self.work(store, tick)
                    store.save(self.kind, self.spec(), *result, time.process_time() - began)
        self.tidy(store)

    def needs(self) -> list["Task"]:
        """The pieces that it builds on, and would make itself if they were missing."""
        return []

    def tidy(self, store: Store) -> None:
        """What is left to do when the result is there, even if a process was killed just then."""

    def stored(self, store: Store) -> tuple[dict, dict]:
        self.run(store)
        return store.load(self.kind, self.spec())


@dataclasses.dataclass(frozen=True)
class Job(Task):
    """A piece of work in a world: data, student, experts, machine."""

    setup: Setup

    def spec(self) -> dict:
        """Data and experts' files count by their content, whatever they are called and wherever they lie."""
        setup = dataclasses.asdict(self.setup) | {"dataset": self.data.fingerprint, "data": None}
        setup["expert_files"] = [file.content for file in given_experts(self.setup)]
        setup["experts_at_once"] = None  # who trains beside whom changes at most the last bits
        return dataclasses.asdict(self) | {"setup": setup, "source": SOURCE}

    @property
    def data(self) -> Dataset:
        return self.setup.load()

    def student(self):
        return self.setup.student(self.data).to(self.setup.device)


@dataclasses.dataclass(frozen=True)
class Expert(Job):
    """One expert's way, and its accuracy on the validation split at every snapshot."""

    expert: int

    kind = "expert"

    def spec(self):
        spec = super().spec()
        # it does not depend on how many others there are, nor on what is done with them
        return spec | {"setup": spec["setup"] | {"experts": None, "augment": None, "expert_files": None}}

    def work(self, store, tick):
        return self.scored(*trained(self, train_expert, self.expert, store, tick))

    def scored(self, theta: torch.Tensor, losses: list[float]) -> tuple[dict, dict]:
        theta = theta.to(FLOATS[self.setup.expert_float])
        return scored(self.setup, self.spec(), theta, {"expert": self.expert, "loss": losses})

    def file(self, store: Store) -> ExpertFile:
        """Its file in the store, made if it is missing, to be read by the snapshot."""
        self.run(store)
        file = ExpertFile(store.path(self.kind, self.spec()), self.setup.device)
        if file.spec != self.spec():
            raise ValueError(f"{file.path} is not ours (it was made from another specification): delete it")
        return file

    def tidy(self, store):
        training_files(self, [self.expert], store).clear()
        ExpertFile(store.path(self.kind, self.spec())).write_json()


@dataclasses.dataclass(frozen=True)
class Together(Job):
    """Some of a set-up's experts, those that the store lacks trained at once; each is stored as if made alone."""

    which: tuple[int, ...]

    kind = "experts"

    def needs(self):
        return [Expert(self.setup, k) for k in self.which]

    def work(self, store, tick):
        missing = [job for job in self.needs() if not store.has(job.kind, job.spec())]
        if missing:
            ways, losses = trained(self, train_together, [job.expert for job in missing], store, tick)
            for job, *found in zip(missing, ways, torch.stack(losses, 1).tolist(), strict=True):
                store.save(job.kind, job.spec(), *job.scored(*found))
        return {}, {"made": [job.expert for job in missing]}

    def tidy(self, store):
        training_files(self, [], store).clear()


def scored(setup: Setup, spec: dict, theta: torch.Tensor, about: dict) -> tuple[dict, dict]:
    """What is kept of an expert's way `[snapshots, P]`: with its accuracy on the validation split at every snapshot."""
    data = setup.load()
    student, validation = setup.student(data).to(setup.device), data.validation.made()
    about = about | {
        "dataset": public_name(data.name),
        "classes": list(data.classes),
        "versions": versions(setup.device),
        "validation": [accuracy(student, t.to(setup.device).float(), validation) for t in theta],
    }
    return {"theta": theta}, sealed(theta, spec, about)


def training_files(job: Expert | Together, which: list[int], store: Store) -> TrainingFiles:
    """Where a job keeps its training until it is done: beside its result."""
    return TrainingFiles(store.path(job.kind, job.spec()).with_suffix(".training"), job.spec(), which)


def trained(
    job: Expert | Together, how: Callable, which: int | list[int], store: Store, tick: Tick
) -> tuple[torch.Tensor, list]:
    """The experts `which` by `how` (one of the core's two ways), and their losses by snapshot.

    Killed at any moment, the next one goes on from the last whole epoch.
    """
    setup, data, losses = job.setup, job.data, []
    images, snapshots = data.train.images, snapshots_every(len(data.train), setup)[1]
    kept = training_files(job, which if isinstance(which, list) else [which], store)

    def on_snapshot(snapshot, loss):
        losses.append(loss)
        tick(snapshot, snapshots)

    # all of it as floats meanwhile (CIFAR-10: 550 MB), since the core takes tensors of floats
    arguments = (job.student(), images, data.train.labels, setup, setup.seed, which)
    augment = augmentation(setup.expert_augment, data)
    options = dict(augment=augment, on_snapshot=on_snapshot, on_epoch=kept.save, underway=kept.load(setup.device))
    return how(*arguments, **options), losses


def experts(setup: Setup) -> list[Expert]:
    return [Expert(setup, k) for k in range(setup.experts)]


def own_experts(setup: Setup) -> list[Expert]:
    """Those that are trained here: none if they are given."""
    return [] if setup.expert_files else experts(setup)


def to_train(setup: Setup) -> list[Job]:
    """The jobs that make a set-up's own experts: so many at once on a GPU, one a process on a CPU."""
    own = own_experts(setup)
    if setup.device != "cuda" or not own:
        return own
    at_once = setup.experts_at_once or len(own)
    return [Together(setup, tuple(range(len(own))[i : i + at_once])) for i in range(0, len(own), at_once)]


def trajectories(setup: Setup, store: Store) -> Trajectories:
    """The experts' ways, each read from its file by the snapshot."""
    files = given_experts(setup) or [job.file(store) for job in experts(setup)]
    return Trajectories(setup.student(setup.load()).to(setup.device), files)


@dataclasses.dataclass(frozen=True)
class Subset:
    """Which training images: so many a class, or a stratified fraction, of the nested order of `seed`.

    The first `skip` of each class (a fraction) are passed over: images that a phi trained on the rest has never seen.
    """

    seed: int
    per_class: int | None = None
    fraction: float | None = None
    skip: float = 0.0

    def index(self, data: Dataset) -> torch.Tensor:
        return data.subset(self.seed, per_class=self.per_class, fraction=self.fraction, skip=self.skip)

    def about(self, data: Dataset) -> float:
        """How many images, roughly, and even if there are not so many."""
        return self.per_class * len(data.classes) if self.per_class else self.fraction * len(data.train)


@dataclasses.dataclass(frozen=True)
class Distillation(Job):
    """A phi trained on a subset. `stored_phi` gives it back as `Distilled`; `stored_way` as it was along the way."""

    phi: str
    subset: Subset
    config: DistillConfig
    phi_source: str = ""  # of a phi that a user registered: what it says is part of what the result depends on

    kind = "distilled"

    @property
    def cost(self):
        c = self.config
        images = c.episode * len(self.data.classes) or self.subset.about(self.data)
        return c.iterations * c.draws * c.syn_steps * min(images, c.batch_syn or images)

    def needs(self):
        return own_experts(self.setup)

    def fresh_phi(self):
        base = self.data.train.take(self.subset.index(self.data)).images
        return fitted(make_phi(self.phi, base, len(self.data.classes), self.setup.seed), self.setup.dataset)

    def checkpoint(self, store: Store) -> Checkpoint:
        """How far it came when it was stopped: the same for every budget of minutes."""
        spec = self.spec()
        return Checkpoint(store, spec | {"config": spec["config"] | {"minutes": None}})

    def work(self, store, tick):
        checkpoint = self.checkpoint(store)
        with checkpoint.held():
            found, budget = checkpoint.read(), 60 * self.config.minutes or math.inf
            if found and found["run"]["seconds"] > budget:  # of a run with more minutes: neither used nor replaced
                found = checkpoint = None
            return self.from_checkpoint(store, tick, found or {"run": None, "way": {}}, checkpoint)

    def from_checkpoint(self, store: Store, tick: Tick, found: dict, checkpoint: Checkpoint | None) -> tuple:
        """The work from what was `found`; how far it comes goes to the checkpoint, where there is one."""
        train = self.data.train
        base = train.take(self.subset.index(self.data))
        real = (train.images, train.labels) if self.config.objective == "real_loss" else None
        phi, way = self.fresh_phi(), found["way"]

        def on_iteration(record):
            iteration = record["iteration"]
            tick(iteration + 1, self.config.iterations, record["state"] and f"{self.phi}: {record['state']}")
            if kept(iteration):
                way.update({f"{iteration}/{name}": t.clone() for name, t in phi.state_dict().items()})

        def on_step(state):
            if checkpoint:
                checkpoint.offer(lambda: {"run": state(), "way": way})

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a divergence is a result here: it is stored and shown
            result = distill(
                phi,
                base.images,
                base.labels,
                trajectories(self.setup, store),
                self.config,
                seed=self.setup.seed,
                augment=augmentation(self.setup.augment, self.data),
                real=real,
                on_iteration=on_iteration,
                on_step=on_step,
                resume=found["run"],
            )
        if checkpoint and result.stopped and not diverged(result.stopped):
            checkpoint.write()  # with more minutes it goes on from there
        meta = {"alpha": result.alpha, "history": result.history, "stopped": result.stopped}
        return way | {f"last/{name}": t for name, t in phi.state_dict().items()}, meta

    def tidy(self, store):
        checkpoint = self.checkpoint(store)
        if checkpoint.there:
            stopped = store.load(self.kind, self.spec())[1]["stopped"]
            if not stopped or diverged(stopped):  # else more minutes may go on from it
                checkpoint.remove()

    def stored_phi(self, store: Store) -> Distilled:
        return Distilled(self.stored_way(store)["last"], **self.stored(store)[1])

    def stored_way(self, store: Store) -> dict[str, Phi]:
        """phi before iterations "0", "1", "2", "4", "8" ..., and "last": what the run returned."""
        tensors, meta = self.stored(store)
        moments = [str(r["iteration"]) for r in meta["history"] if kept(r["iteration"])] + ["last"]
        phis = {moment: self.fresh_phi() for moment in moments}
        for moment, phi in phis.items():
            start = f"{moment}/"
            phi.load_state_dict({k.removeprefix(start): t for k, t in tensors.items() if k.startswith(start)})
        return phis


def kept(iteration: int) -> bool:
    """Whether phi is kept as it was before this iteration: 0, 1, 2, 4, 8 ..., dense where things go wrong."""
    return iteration & (iteration - 1) == 0


def own_source(phi: str) -> str:
    """The source of what a user registered for this phi, whole files; "" for the core's, which `SOURCE` covers."""
    return "".join(source(build) for build in builders(phi) if origin(build)[0] not in OURS)


def source(build) -> str:
    module = origin(build)[0]
    try:
        if module != "__main__" and (file := getattr(sys.modules.get(module), "__file__", None)):
            return Path(file).read_text(encoding="utf-8")
        return inspect.getsource(build)
    except (OSError, TypeError):
        return repr(build)  # holds an address: found again in this process only, never mistaken for another


CONTROLS = {"stored": Stored, "added": Added}  # a part of what phi does, by the name that an `Evaluation` has for it


@dataclasses.dataclass(frozen=True)
class Evaluation(Job):
    """Fresh students trained on a subset, through a distilled phi or (None) plainly, and their validation accuracy.

    `only` "stored": through nothing but what phi makes of a blank image (`Stored`); "added": through what it adds to
    each image, without the image (`Added`). What the students are worth on the test split, only a `Score` says.
    """

    subset: Subset
    config: EvalConfig
    distilled: Distillation | None = None
    only: str = ""

    kind = "students"

    @property
    def cost(self):
        c, images = self.config, round(self.subset.about(self.data))
        return c.eval_students * c.steps(images) * min(images, c.eval_batch)

    def __post_init__(self):
        if self.only not in (("", *CONTROLS) if self.distilled else ("",)):
            controls = " or ".join(map(repr, CONTROLS))
            raise ValueError(f"only={self.only!r}: must be empty, or {controls} beside a distilled phi")
        if not (self.config.eval_lr or self.distilled):
            raise ValueError("eval_lr=0.0: must be above 0 for plain images, which have learned no step size")
        if self.distilled and images_of(self.distilled.setup) != images_of(self.setup):
            ours, its = (", ".join(map(str, images_of(s))) for s in (self.setup, self.distilled.setup))
            raise ValueError(f"phi {self.distilled.phi!r} was trained on {its}: not for {ours} (dataset, size, zca)")

    def spec(self):
        return super().spec() | {"distilled": self.distilled and self.distilled.spec()}

    def needs(self):
        teachers = own_experts(self.setup) if self.config.eval_labels == "soft" else []
        return [self.distilled, *teachers] if self.distilled else teachers

    def student(self):
        build = STUDENTS.get(self.config.eval_student)
        if build is None:
            return super().student()
        return build(self.data.shape[0], len(self.data.classes), self.setup.size).to(self.setup.device)

    def phi(self, store: Store) -> Applied | None:
        """The distilled phi as students meet it: so strongly, so often, or but a part of what it does."""
        if self.distilled is None:
            return None
        phi = self.distilled.stored_phi(store).phi
        phi = CONTROLS[self.only](phi) if self.only else phi
        return Applied(phi, self.config.phi_strength, self.config.phi_probability)

    def augment(self) -> Applied | None:
        """The augmentation after phi as students meet it; None where there is none, or one that learns with them."""
        c = self.config
        known = None if c.eval_augment == "instaaug" else augmentation(c.eval_augment, self.data, c.eval_magnitude)
        return known and Applied(known, probability=c.eval_augment_probability)

    def work(self, store, tick):
        models, found = self.trained(store, tick)
        states = {f"{k}/{name}": t for k, model in enumerate(models) for name, t in model.state_dict().items()}
        return states, {"validation": found}

    def trained(self, store: Store, tick: Tick) -> tuple[list[torch.nn.Module], list[float]]:
        """The students, and the validation accuracy of each."""
        data, config = self.data, self.config
        if not config.eval_lr:  # a raw alpha that ran below zero teaches nothing: then students stay as they are
            config = dataclasses.replace(config, eval_lr=max(self.distilled.stored_phi(store).alpha, 0.0))
        train, validation = data.train.take(self.subset.index(data)), data.validation.made()
        arguments = (self.student(), self.phi(store), train, validation, config, self.setup.seed)
        soft, total = config.eval_labels == "soft", config.eval_students
        teacher = teacher_of(trajectories(self.setup, store)) if soft else None
        learns = config.eval_augment == "instaaug"
        learner = functools.partial(InstaAug, reward=config.eval_reward) if learns else None
        options = dict(augment=self.augment(), learner=learner, teacher=teacher)
        return evaluate(*arguments, **options, on_student=lambda done: tick(done, total))

    def students(self, store: Store, tick: Tick) -> tuple[list[torch.nn.Module], list[float]]:
        """The same; those that a choice has stored, or trained now and not stored (they may be large)."""
        if not store.has(self.kind, self.spec()):
            return self.trained(store, tick)
        tensors, meta = self.stored(store)
        models = [self.student().eval() for _ in meta["validation"]]
        for k, model in enumerate(models):
            start = f"{k}/"
            model.load_state_dict({n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)})
        return models, meta["validation"]


def images_of(setup: Setup) -> tuple:
    """What images a phi takes in this world."""
    return public_name(setup.dataset), setup.size, setup.zca


@dataclasses.dataclass(frozen=True)
class Score(Job):
    """The last scoring: what an evaluation's students are worth on the test split, which nothing else opens."""

    evaluation: Evaluation

    kind = "accuracy"

    @property
    def cost(self):
        return self.evaluation.cost

    def spec(self):
        return super().spec() | {"evaluation": self.evaluation.spec()}

    def needs(self):
        return [self.evaluation, *self.evaluation.needs()]

    def work(self, store, tick):
        models, validation = self.evaluation.students(store, tick)
        test = self.data.test.opened().made()
        return {}, {"validation": validation, "test": [accuracy_of(model, test) for model in models]}


@dataclasses.dataclass(frozen=True)
class Probe(Job):
    """The matching loss of a distilled phi on segments of its own, beside the identity's at the same alpha.

    Of phi as it was at one `moment` of its way (`stored_way`), with the alpha that was learned by then, or another; a
    policy with other `ranges` than it learned (`Policy.hold`), if there are any.
    """

    distilled: Distillation
    moment: str = "last"
    alpha: float | None = None
    segments: int = 8
    ranges: tuple[tuple[str, float], ...] = ()

    kind = "probe"

    def spec(self):
        return super().spec() | {"distilled": self.distilled.spec()}

    def needs(self):
        return [self.distilled, *own_experts(self.setup)]

    def work(self, store, tick):
        distilled = self.distilled
        base, alpha = self.data.train.take(distilled.subset.index(self.data)), self.alpha
        if alpha is None:
            meta = distilled.stored(store)[1]
            alpha = meta["alpha"] if self.moment == "last" else meta["history"][int(self.moment)]["alpha"]
        phi = distilled.stored_way(store)[self.moment]
        if self.ranges:
            phi.hold(dict(self.ranges))
        arguments = (phi, alpha, base, trajectories(self.setup, store), distilled.config)
        return {}, probe(*arguments, self.segments, self.setup.seed)
