"""`augdistill experts`: train a run's experts, list and check their files, import those of the official MTT code."""

import itertools
import pickle
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from augdistill_report.commands.preflight import preflight
from augdistill_report.files.expert_files import EXPERT, FLOATS, ExpertFile, content_of, in_folder, snapshot_tensors
from augdistill_report.files.store import Store, tensor_digest
from augdistill_report.run import run_folder, start_folder
from augdistill_report.settings import resolve
from augdistill_report.work.experts import expert_jobs, missing_experts, with_accuracy
from augdistill_report.work.pool import run_jobs
from augdistill_report.work.progress import Progress
from augdistill_report.work.setup import Setup


def files_of(files: list[str], preset: str, out: str) -> list[Path]:
    """The files that are named (all experts of a folder), or those of a run."""
    places = [Path(file) for file in files] or [run_folder(preset, out) / "artefacts"]
    found = [[place] if place.is_file() else in_folder(place) for place in places]
    for place, inside in zip(places, found, strict=True):
        if not inside:
            raise ValueError(f"{place}: must be an expert's file, or a folder that holds some (expert-*.safetensors)")
    return list(itertools.chain(*found))


def expert_table(files: list[ExpertFile]) -> str:
    """A line an expert."""
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
    """What is wrong with the files, each read whole: a line for each that is not as it was written."""
    wrong = []
    for path in paths:
        try:
            ExpertFile(path).check()
        except (ValueError, OSError) as error:
            wrong.append(str(error))
    return wrong


def train(preset: str, out: str = "", changes: dict | None = None) -> list[ExpertFile]:
    """Train the experts that a run lacks; those that were under way go on from their checkpoints."""
    settings = resolve(preset, changes)
    preflight(settings)
    if settings.expert_files:
        raise ValueError(f"expert_files={settings.expert_files!r}: a run that is given its experts trains none")
    folder, setup = run_folder(preset, out), settings.select(Setup)
    start_folder(folder, preset, settings)
    torch.set_num_threads(settings.threads)
    store = Store(folder / "artefacts")
    run_jobs(missing_experts(setup), store, settings.pool, Progress("experts"))
    return [job.file(store) for job in expert_jobs(setup)]


# --- the official code's files ----------------------------------------------------------------------------------------


def read_buffer(path: Path) -> list:
    """An official `replay_buffer_*.pt`, its tensors left on disk; a `ValueError` if it may hold code or is damaged."""
    try:
        archive = zipfile.is_zipfile(path)  # what torch has written since 1.6: tensors can stay on disk
        return torch.load(str(path), map_location="cpu", weights_only=True, mmap=archive or None)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; must be a replay_buffer_*.pt of the official MTT code") from None
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path}: holds more than tensors, or is cut off: not opened, since it may hold code"
        ) from None
    except Exception as error:  # rubbish makes torch's reader raise whatever it stumbles over
        raise ValueError(f"{path}: is damaged, or no file of torch.save ({type(error).__name__})") from None


def way_of(snapshots, student: nn.Module) -> Tensor:
    """One official expert, a list of snapshots that are lists of parameters, as a way `[snapshots, P]`.

    The order of the parameters is the ConvNet's own: a block's convolution and norm, each weight and bias, then the
    classifier's; images are flattened in the same order, too. Its first convolution pads grey images by 3, ours by 1:
    at 28x28 the classifier does not fit, at other sizes the accuracy tells. A `ValueError` names what does not fit.
    """
    wanted = [(name, tuple(p.shape)) for name, p in student.named_parameters()]
    if not isinstance(snapshots, list | tuple) or len(snapshots) < 2:
        raise ValueError("must be a list of at least two snapshots")
    way = torch.empty(len(snapshots), sum(p.numel() for p in student.parameters()))
    for t, parameters in enumerate(snapshots):
        if not isinstance(parameters, list | tuple) or not all(isinstance(p, Tensor) for p in parameters):
            raise ValueError(f"snapshot {t}: must be a list of tensors")
        for i, ((name, shape), p) in enumerate(zip(wanted, parameters, strict=False)):
            if tuple(p.shape) != shape:
                raise ValueError(f"snapshot {t}: parameter {i} ({name}) is {tuple(p.shape)}, must be {shape}")
        if len(parameters) != len(wanted):
            raise ValueError(f"snapshot {t}: holds {len(parameters)} parameters, must be {len(wanted)}")
        torch.cat([p.detach().reshape(-1).float() for p in parameters], out=way[t])
    if torch.equal(way[0], way[-1]):
        raise ValueError("ends where it starts: a file of the official code run on a CPU, which keeps no copies")
    return way


def import_buffers(buffers: list[str], preset: str, out: str, changes: dict | None = None) -> list[ExpertFile]:
    """Write every expert of the official files to `out` as one of ours, with its validation accuracy measured.

    Numbers go on from those that are there; an expert that is there already is passed over. The official code trains
    on all images, so the accuracy is on images that the expert has seen.
    """
    settings = resolve(preset, changes)
    torch.set_num_threads(settings.threads)
    setup, store, progress = settings.select(Setup), Store(out), Progress("import")
    student = setup.student(setup.load())
    present = [ExpertFile(path) for path in in_folder(out)]
    number, kept = 1 + max((file.about["expert"] for file in present), default=-1), []
    for b, path in enumerate(map(Path, buffers)):
        buffer = read_buffer(path)
        if not isinstance(buffer, list | tuple) or not buffer:
            raise ValueError(f"{path}: must be a list of experts, as the official MTT code writes it")
        for position, snapshots in enumerate(buffer):
            progress(b + position / len(buffer), len(buffers))
            try:
                theta = way_of(snapshots, student).to(FLOATS[setup.expert_float])
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
