"""The most expensive jobs start first, and progress counts jobs by their cost."""

import concurrent.futures
import dataclasses

from augdistill_core import DistillConfig
from augdistill_report import open_run
from augdistill_report.files.store import Store
from augdistill_report.settings import resolve
from augdistill_report.studies.why import Case
from augdistill_report.work import pool
from augdistill_report.work.crew import Crew
from augdistill_report.work.distillation import Distillation
from augdistill_report.work.jobs import Subset, Task
from augdistill_report.work.pool import Pool, make_jobs, run_jobs
from augdistill_report.work.scoring import EvalConfig, Evaluation, Score
from augdistill_report.work.setup import Setup


class InTurn(Crew):
    """A crew that runs jobs one after the other in this process."""

    def __init__(self, store):
        self.store, self.executor = store, concurrent.futures.ThreadPoolExecutor(1)

    def __exit__(self, *_):
        self.executor.shutdown()

    def submit(self, job):
        return self.executor.submit(job.run, self.store)

    def state(self, future):
        return 0.5 if future.running() else 0.0, ""


def test_the_most_expensive_job_starts_first_and_counts_most(tmp_path, monkeypatch):
    began, shown = [], []

    @dataclasses.dataclass(frozen=True)
    class Piece(Task):
        name: str
        cost: float

        def spec(self):
            return {"name": self.name}

        def work(self, store, tick):
            began.append(self.name)
            tick(1, 2)
            return {}, {}

    pieces = [Piece("short", 1), Piece("long", 4), Piece("other short", 1), Piece("middle", 2)]
    monkeypatch.setattr(Pool, "crew", lambda pool, store: InTurn(store))
    run_jobs(pieces, Store(tmp_path / "two"), Pool(2), lambda *state: shown.append(state))
    assert began == ["long", "middle", "short", "other short"]
    assert shown[0] == (0, 4, "") and shown[-1] == (4, 4, "")
    began.clear()
    shown.clear()
    run_jobs(pieces, Store(tmp_path / "one"), Pool(1), lambda *state: shown.append(state))
    assert began == ["short", "long", "other short", "middle"]  # alone, in their own order
    assert [done for done, _, _ in shown] == [0, 0.25, 0.5, 1.5, 2.5, 2.75, 3, 3.5, 4]  # in eighths of the cost, of 4


def test_experts_are_made_first_and_alone(tmp_path, monkeypatch):
    """Students of soft labels and a phi need experts, directly or not; students of hard labels and stored jobs none."""
    settings = resolve("smoke", {"width": 4})
    setup, subset, store = settings.select(Setup), Subset(0, per_class=1), Store(tmp_path)
    asked = []
    monkeypatch.setattr(pool, "run_jobs", lambda jobs, *_: asked.append([job.kind for job in jobs]))

    def asked_for(config: EvalConfig, distilled=None) -> list[str]:
        asked.clear()
        make_jobs(store, Pool(), [Score(setup, Evaluation(setup, subset, config, distilled))], "evaluation")
        experts, *between, rest = asked
        assert rest == ["accuracy"] and between == ([["distilled"]] if distilled else [])
        return experts

    hard, soft = (settings.select(EvalConfig, eval_labels=labels, eval_steps=2) for labels in ("hard", "soft"))
    phi = Distillation(setup, "identity", subset, settings.select(DistillConfig))
    assert asked_for(hard) == [] and asked_for(soft) == asked_for(hard, phi) == ["expert"] * settings.experts
    score = Score(setup, Evaluation(setup, subset, soft))
    store.save(score.kind, score.spec(), {}, {"validation": [0.5], "test": [0.5], "stopped": ""}, 1.0)
    assert asked_for(soft) == []


def test_a_phi_is_made_before_its_score_and_counts_its_own_time(tmp_path):
    """Else its seconds would be counted with the score's, too."""
    run = open_run("mine", dict(preset="smoke", out=str(tmp_path), width=4, iterations=40))
    job = run.distillation("unet", run.base)
    evaluation = run.evaluation(run.base, job)
    run.evaluate({"unet": evaluation})
    learning, scoring = run.seconds(job), run.seconds(evaluation)
    assert 0 < scoring < learning and len(run.jobs) == 2


def test_a_case_makes_what_it_needs_by_itself_but_for_experts(tmp_path, monkeypatch):
    """What fails in a case is its result."""
    asked = []
    monkeypatch.setattr(pool, "run_jobs", lambda jobs, *_: asked.append([job.kind for job in jobs]))
    make_jobs(Store(tmp_path), Pool(), [Case(resolve("smoke", {"width": 4}))], "cases")
    assert asked == [["expert"] * 2, ["case"]]


def test_cost_follows_what_a_distillation_does():
    def cost(subset, **config):
        return Distillation(Setup(size=8), "unet", subset, DistillConfig(**config)).cost

    twenty = Subset(0, per_class=2)
    assert cost(twenty, draws=2) == cost(twenty, iterations=600) == 2 * cost(twenty)
    assert cost(twenty, batch_syn=10) == cost(Subset(0, fraction=0.5), episode=1) == cost(twenty) / 2
