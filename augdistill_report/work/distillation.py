"""The job that trains a phi on a subset."""

import dataclasses
import math
import warnings

import torch
from torch import Tensor

from augdistill_core import DistillConfig, Distilled, Phi, Stop, distill, diverged, make_phi
from augdistill_report.data.augmentations import augmentation, without_flips
from augdistill_report.files.checkpoints import Checkpoint
from augdistill_report.files.store import Store, a_count, a_finite_number, check_form, restore
from augdistill_report.work.difficulty import ranking, subset_index
from augdistill_report.work.experts import load_trajectories, own_experts
from augdistill_report.work.jobs import Job, Subset, Tick
from augdistill_report.work.provenance import phi_modules

RECORD = {"iteration": a_count, "loss": float, "alpha": float, "state": str}  # of one iteration: the keys that are used

STATE = {  # the training state in a checkpoint
    "phi": {str: Tensor},
    "step_size": {str: Tensor},
    "optimizers": [[{str: (Tensor, float)}]],
    "good": [Tensor],
    "generators": [Tensor],
    "history": [RECORD],
    "memory": str,
    "seconds": a_finite_number,
}


@dataclasses.dataclass(frozen=True)
class Distillation(Job):
    """Trains a phi on a subset. `stored_phi` loads the result, `stored_moments` phi at moments of its training."""

    phi: str
    subset: Subset
    config: DistillConfig
    phi_source: str = ""  # of a user's own phi: the result depends on it

    kind = "distilled"
    form = {"alpha": a_finite_number, "history": [RECORD], "stopped": (str, dict)}  # noqa: RUF012

    def modules(self):
        return [*super().modules(), *phi_modules(self.phi)]

    @property
    def cost(self):
        c = self.config
        images = c.episode * len(self.data.classes) or self.subset.about(self.data)
        return c.iterations * c.draws * c.syn_steps * min(images, c.batch_syn or images)

    def needs(self):
        return [*own_experts(self.setup), *ranking(self.subset, self.setup)]

    def index(self, store: Store | None) -> Tensor:
        """Positions `[n]` of the base images in the training split."""
        return subset_index(self.subset, self.setup, store)

    def fresh_phi(self, store: Store | None = None) -> Phi:
        """The phi in its initial state. The store is needed for a subset of one difficulty only."""
        base = self.data.train.take(self.index(store)).images
        return without_flips(make_phi(self.phi, base, len(self.data.classes), self.setup.seed), self.setup.dataset)

    def checkpoint(self, store: Store) -> Checkpoint:
        """Where an interrupted run keeps its training state: one place, whatever its budget of `minutes`."""
        spec = self.spec()
        return Checkpoint(store, spec | {"config": spec["config"] | {"minutes": None}})

    def work(self, store, tick):
        checkpoint = self.checkpoint(store)
        with checkpoint.held():
            found = checkpoint.read(lambda found: self.checked(found, store))
            budget = 60 * self.config.minutes or math.inf
            if found and found["run"]["seconds"] > budget:  # from a longer run: neither used nor replaced
                return self.from_checkpoint(store, tick, {"run": None, "moments": {}}, None)
            result = self.from_checkpoint(store, tick, found or {"run": None, "moments": {}}, checkpoint)
            return *result, checkpoint.seconds

    def checked(self, found: dict, store: Store) -> dict:
        """The content of a checkpoint; a `ValueError` says what is wrong with it."""
        check_form(found, {"run": STATE, "moments": {str: Tensor}}, "state")
        restore(self.fresh_phi(store), found["run"]["phi"])
        for state in found["run"]["generators"]:
            torch.Generator().set_state(state)
        return found

    def from_checkpoint(self, store: Store, tick: Tick, found: dict, checkpoint: Checkpoint | None) -> tuple:
        """(tensors, meta) of the run, continued from the state `found`; new states go to `checkpoint`, if any."""
        train = self.data.train
        base = train.take(self.index(store))
        real = (train.images, train.labels) if self.config.objective == "real_loss" else None
        phi, moments = self.fresh_phi(store), found["moments"]

        def on_iteration(record):
            iteration = record["iteration"]
            tick(iteration + 1, self.config.iterations, record["state"] and f"{self.phi}: {record['state']}")
            if kept(iteration):
                moments.update({f"{iteration}/{name}": t.clone() for name, t in phi.state_dict().items()})

        def on_step(state):
            if checkpoint:
                checkpoint.offer(lambda: {"run": state(), "moments": moments})

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a divergence is a result here: it is stored and shown
            result = distill(
                phi,
                base.images,
                base.labels,
                load_trajectories(self.setup, store),
                self.config,
                seed=self.setup.seed,
                augment=augmentation(self.setup.augment, self.data),
                real=real,
                on_iteration=on_iteration,
                on_step=on_step,
                resume=found["run"],
            )
        if checkpoint and result.stopped and not diverged(result.stopped):
            checkpoint.write()  # a run with more minutes continues from there
        stopped = dataclasses.asdict(result.stopped) if result.stopped else {}
        meta = {"alpha": result.alpha, "history": result.history, "stopped": stopped}
        return moments | {f"last/{name}": t for name, t in phi.state_dict().items()}, meta

    def tidy(self, store):
        checkpoint = self.checkpoint(store)
        if checkpoint.there:
            stopped = store.open(self.kind, self.spec(), self.form).about["meta"]["stopped"]
            if not stopped or diverged(stopped):  # else a run with more minutes may continue from it
                checkpoint.remove()

    def stored_phi(self, store: Store) -> Distilled:
        """The result, trained now if the store lacks it."""
        meta = self.stored(store)[1]
        stopped = Stop(**meta["stopped"]) if meta["stopped"] else None
        return Distilled(self.stored_moments(store)["last"], meta["alpha"], meta["history"], stopped)

    def stored_moments(self, store: Store) -> dict[str, Phi]:
        """phi before iterations "0", "1", "2", "4", "8" ..., and "last": the result of the run."""
        tensors, meta = self.stored(store)
        names = [str(r["iteration"]) for r in meta["history"] if kept(r["iteration"])] + ["last"]
        return {moment: self.restored(self.fresh_phi(store), tensors, moment, store) for moment in names}


def kept(iteration: int) -> bool:
    """Whether phi is stored before this iteration: 0, 1, 2, 4, 8 ..., densest where training fails."""
    return iteration & (iteration - 1) == 0
