"""A row is scored with the step size that it shows, and is marked if its run stopped early."""

import dataclasses

import pytest
import torch

from augdistill_core import Phi, Stop, register_phi
from augdistill_report.run import Run
from augdistill_report.settings import resolve
from augdistill_report.show import plots
from augdistill_report.work import scoring
from augdistill_report.work.jobs import Subset
from augdistill_report.work.statistics import Accuracy, markdown_table, pooled
from augdistill_report.work.students import STUDENTS, accuracy_of


@pytest.fixture
def run(tmp_path):
    """Notebook 02's pixels, with a learned alpha that becomes negative before the run diverges."""
    changes = dict(iterations=8, pixel_alpha_lr=0.03, pixel_lr=0.0001, eval_lr=0.0)
    return Run("mine", resolve("smoke", changes), tmp_path)


def test_a_row_whose_run_stopped_is_marked_and_scored_with_the_alpha_that_it_shows(run, monkeypatch):
    job = run.distillation("pixels", run.base, run.settings.pixel_config)
    result = run.distill({"pixels": job})["pixels"]
    assert result.stopped.kind == "diverged" and min(record["alpha"] for record in result.history) < 0 < result.alpha
    rates = []

    def train(student, phi, images, labels, config, *seed, **options):
        rates.append(config.eval_lr)
        return student

    monkeypatch.setattr(scoring, "train_student", train)
    monkeypatch.setattr(
        scoring.Score, "run", lambda self, store, tick: store.save(self.kind, self.spec(), *self.work(store, tick))
    )
    evaluation = run.evaluation(run.base, job)
    scored = Accuracy(**scoring.Score(job.setup, evaluation).stored(run.store)[1])
    assert rates == [result.alpha] * run.settings.eval_students and scored.stopped == "diverged"
    # the mark stands in whatever shows the row
    assert str(scored).endswith(" % (stopped: diverged)")
    (axis,) = plots.bars({"pixels": scored}).axes
    assert [text.get_text() for text in axis.texts] == [str(scored)]
    run.number("pixels", scored)
    assert run.numbers["pixels"]["stopped"] == "diverged"
    assert "(n = 2) (stopped: diverged) |" in markdown_table([{"": "pixels", "accuracy": run.numbers["pixels"]}])
    both = pooled({("pixels", 0): scored, ("pixels", 1): Accuracy([0.5], [0.5])})
    assert both["pixels"].stopped == "diverged"
    # and without a phi there is none
    assert (
        scoring.Evaluation(job.setup, run.base, dataclasses.replace(evaluation.config, eval_lr=0.1)).stopped(run.store)
        == ""
    )


def test_free_images_are_not_used_on_other_images(tmp_path):
    """They are looked up by position, so other images would get them with the wrong labels."""
    run = Run("mine", resolve("smoke", dict(iterations=2, width=4)), tmp_path)
    job = run.distillation("pixels", Subset(0, per_class=2), run.settings.pixel_config)
    for other in (Subset(0, per_class=1), Subset(7, per_class=2)):
        with pytest.raises(ValueError, match=r"phi 'pixels' holds something for each of the 20 images that it was"):
            run.evaluate({"pixels": run.evaluation(other, job)})
    assert len(run.evaluate({"pixels": run.evaluation(Subset(0, per_class=2), job)})) == 1


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(eval_patience=20), r"eval_patience=20: must be in \[0, 19\]"),
        (
            dict(eval_patience=2, eval_epochs=5),
            "eval_patience=2: counts rounds of eval_steps, so eval_epochs must be 0",
        ),
    ],
)
def test_a_patience_that_never_ends_training_is_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        scoring.EvalConfig(**changes)


@pytest.mark.parametrize("size", [4, 8, 16])
def test_a_resnet_18_takes_a_batch_of_one_small_image(size):
    """The last batch of an epoch may hold one; its batch norm needs more than one pixel."""
    assert STUDENTS["resnet18"](1, 10, size).train()(torch.zeros(1, 1, size, size)).shape == (1, 10)


def test_a_row_that_ran_to_its_end_is_not_marked():
    assert str(Accuracy([0.5, 0.5], [0.5, 0.5])) == "50.0 ± 0.0 %"
    assert "stopped" not in Accuracy([0.5, 0.5], [0.5, 0.5]).numbers()


@pytest.mark.parametrize(
    "alpha, error",
    [
        (0.0, "eval_lr=0: phi 'identity' learned alpha 0, must be above 0"),
        (-4.92, "eval_lr=0: phi 'identity' learned alpha -4.92, must be above 0"),
        (float("nan"), "alpha=nan: must be a finite number"),
    ],
)
def test_a_learned_alpha_that_is_no_step_size_is_refused(run, monkeypatch, alpha, error):
    """It used to become 0: students that never moved, scored like any other."""
    job = run.distillation("identity", run.base, iterations=1)
    run.make([*scoring.own_experts(job.setup), job], "distillation")
    tensors, meta = job.stored(run.store)
    run.store.save(job.kind, job.spec(), tensors, meta | {"alpha": alpha})
    with pytest.raises(ValueError, match=error):
        run.evaluation(run.base, job).work(run.store, lambda *_: None)


def test_logits_that_are_not_finite_are_wrong_and_not_of_the_first_class(run):
    validation = run.data.validation.made()
    student = run.student
    assert accuracy_of(student, validation) > 0
    with torch.no_grad():
        student.classifier.bias.fill_(float("nan"))
    assert accuracy_of(student, validation) == 0


def test_a_stop_comes_back_from_the_store_as_it_was(run):
    @register_phi("louder than all")
    class Louder(Phi):
        def __init__(self, images, classes):
            super().__init__()
            self.gain = torch.nn.Parameter(torch.ones(()))

        def forward(self, images, **_):
            return images * self.gain

    job = run.distillation("louder than all", run.base, phi_optimizer="SGD", phi_lr=1e12, iterations=3)
    stopped = run.distill({"louder": job})["louder"].stopped
    assert isinstance(stopped, Stop) and stopped.kind == "diverged"
    assert job.stored(run.store)[1]["stopped"] == {"kind": "diverged", "reason": str(stopped)}
