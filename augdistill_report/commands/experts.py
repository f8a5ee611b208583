"""`augdistill experts`: trains a run's experts, lists and checks their files, imports those of the official code."""

import itertools
from pathlib import Path

import torch
from torch import Tensor, nn

from augdistill_report.commands.preflight import preflight
from augdistill_report.files.expert_files import EXPERT, FLOATS, ExpertFile, content_of, in_folder, snapshot_tensors
from augdistill_report.files.store import Store, tensor_digest
from augdistill_report.files.torch_files import read_torch
from augdistill_report.run import run_folder, start_folder
from augdistill_report.settings import resolve
from augdistill_report.work.experts import expert_jobs, missing_experts, with_accuracy
from augdistill_report.work.pool import run_jobs
from augdistill_report.work.progress import Progress
from augdistill_report.work.setup import Setup


def files_of(files: list[str], preset: str, out: str) -> list[Path]:
    """The named files (of a folder, all its experts), or those of a run; a `ValueError` if there are none."""
    places = [Path(file) for file in files] or [run_folder(preset, out) / "artefacts"]
    found = [[place] if place.is_file() else in_folder(place) for place in places]
    for place, inside in zip(places, found, strict=True):
        if not inside:
            raise ValueError(f"{place}: must be an expert's file, or a folder that holds some (expert-*.safetensors)")
    return list(itertools.chain(*found))


def expert_table(files: list[ExpertFile]) -> str:
    """A text table with a line an expert."""
    head = ("expert", "file", "data set", "epochs", "snapshots", "validation", "MB", "float")
    rows = [head]
    for file in sorted(files, key=lambda f: (f.path.parent, f.about["expert"])):
        about, epochs = file.about, file.spec["setup"].get("epochs", "")
        size = f"{file.path.stat().st_size / 1e6:.3g}"
        last = f"{100 * about['validation'][-1]:.1f} %"
        rows.append((about["expert"], file.path.name, about["dataset"], epochs, len(file), last, size, file.float))
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(head))]
    return "\n".join("  ".join(f"{cell!s:{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def check(paths: list[Path]) -> list[str]:
    """Read each file completely; returns a line for each damaged one."""
    wrong = []
    for path in paths:
        try:
            ExpertFile(path).check()
        except (ValueError, OSError) as error:
            wrong.append(str(error))
    return wrong


def train(preset: str, out: str = "", changes: dict | None = None) -> list[ExpertFile]:
    """Train the experts that a run lacks, interrupted ones from their checkpoints; returns all its experts' files."""
    settings = resolve(preset, changes)
    preflight(settings)
    if settings.expert_files:
        raise ValueError(f"expert_files={settings.expert_files!r}: a run with given experts trains none")
    folder, setup = run_folder(preset, out), settings.select(Setup)
    start_folder(folder, preset, settings)
    torch.set_num_threads(settings.threads)
    store = Store(folder / "artefacts")
    run_jobs(missing_experts(setup), store, settings.pool, Progress("experts"))
    return [job.file(store) for job in expert_jobs(setup)]


# --- the official code's files ----------------------------------------------------------------------------------------


def trajectory_of(snapshots, student: nn.Module) -> Tensor:
    """The trajectory `[snapshots, P]` of one official expert, which is a list of snapshots (lists of parameters).

    The parameters are in the ConvNet's own order: convolution and norm of each block, weight before bias, then the
    classifier; feature maps are flattened in the same order, too. But the official first convolution pads grey images
    by 3, ours by 1: at 28x28 the classifier does not fit, at other sizes the accuracy shows the difference. A
    `ValueError` names what does not fit.
    """
    wanted = [(name, tuple(p.shape)) for name, p in student.named_parameters()]
    if not isinstance(snapshots, list | tuple) or len(snapshots) < 2:
        raise ValueError("must be a list of at least two snapshots")
    trajectory = torch.empty(len(snapshots), sum(p.numel() for p in student.parameters()))
    for t, parameters in enumerate(snapshots):
        if not isinstance(parameters, list | tuple) or not all(isinstance(p, Tensor) for p in parameters):
            raise ValueError(f"snapshot {t}: must be a list of tensors")
        for i, ((name, shape), p) in enumerate(zip(wanted, parameters, strict=False)):
            if tuple(p.shape) != shape:
                raise ValueError(f"snapshot {t}: parameter {i} ({name}) is {tuple(p.shape)}, must be {shape}")
        if len(parameters) != len(wanted):
            raise ValueError(f"snapshot {t}: holds {len(parameters)} parameters, must be {len(wanted)}")
        torch.cat([p.detach().reshape(-1).float() for p in parameters], out=trajectory[t])
    if torch.equal(trajectory[0], trajectory[-1]):
        raise ValueError("ends where it starts: the official code, run on a CPU, stores no copies of its snapshots")
    return trajectory


def import_buffers(buffers: list[str], preset: str, out: str, changes: dict | None = None) -> list[ExpertFile]:
    """Convert every expert of the official files to a file in `out`, with its measured validation accuracy.

    Experts are numbered after those in `out`; an expert that is there already is left unchanged. The official code
    trains on all images, so the accuracy is on images that the expert has seen. A `ValueError` names the file and the
    expert that do not fit. Returns the files of all these experts.
    """
    settings = resolve(preset, changes)
    torch.set_num_threads(settings.threads)
    setup, store, progress = settings.select(Setup), Store(out), Progress("import")
    student = setup.student(setup.load())
    present = [ExpertFile(path) for path in in_folder(out)]
    number, kept = 1 + max((file.about["expert"] for file in present), default=-1), []
    for b, path in enumerate(map(Path, buffers)):
        buffer = read_torch(path, "a replay_buffer_*.pt of the official MTT code")
        if not isinstance(buffer, list | tuple) or not buffer:
            raise ValueError(f"{path}: must be a list of experts, as the official MTT code writes it")
        for position, snapshots in enumerate(buffer):
            progress(b + position / len(buffer), len(buffers))
            try:
                theta = trajectory_of(snapshots, student).to(FLOATS[setup.expert_float])
                digests = {name: tensor_digest(t) for name, t in snapshot_tensors(theta, position).items()}
                spec = {"setup": setup.expert_key(), "content": content_of(digests)}
                if not store.has(EXPERT, spec):
                    about = {"expert": number, "imported": {"file": path.name, "position": position}, "loss": []}
                    store.save(EXPERT, spec, *with_accuracy(setup, theta, about))
                    number += 1
            except ValueError as error:
                fits = f"for {preset}: size={setup.size}, width={setup.width}, depth={setup.depth}"
                raise ValueError(f"{path}, expert {position}: {error} ({fits})") from None
            kept.append(ExpertFile(store.path(EXPERT, spec)))
            kept[-1].write_json()
    progress(len(buffers), len(buffers))
    return kept
