"""Checks settings against each other, the data and this machine, before anything runs."""

import os

import torch

from augdistill_core import make_optimizer, make_phi, snapshots_every
from augdistill_report.settings import Settings
from augdistill_report.show.tracking import check_tracker


def preflight(settings: Settings) -> None:
    """A `ValueError` for settings that are each valid, but do not fit together, or the data, or this machine."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda': torch finds no CUDA device here; use cpu")
    check_tracker(settings.track)
    if settings.cluster:
        from augdistill_report.work.cluster import check_cluster  # needs an optional package

        check_cluster(settings.cluster, settings.cluster_insecure)
    data = settings.load(whiten=False)
    with torch.device("meta"):  # sizes without memory
        student = settings.student(data)
    check_memory(settings, sum(p.numel() for p in student.parameters()), min(settings.expert_batch, len(data.train)))
    trained = snapshots_every(len(data.train), settings)[1]  # notebook 07 always trains its own experts
    for key, snapshots in (("max_start_epoch", settings.snapshots()), ("policy_max_start_epoch", trained)):
        last = snapshots - settings.expert_epochs
        if not getattr(settings, key) <= last:
            raise ValueError(
                f"{key}={getattr(settings, key)}: the experts' {snapshots} snapshots less "
                f"expert_epochs={settings.expert_epochs} leave start epochs in [0, {last}]"
            )
    try:
        index = data.subset(settings.seed, per_class=settings.images_per_class)
    except ValueError as error:
        raise ValueError(f"images_per_class={settings.images_per_class}: too many ({error})") from None
    base = data.train.take(index).images
    make_phi(settings.phi, base, len(data.classes), settings.seed)
    for key in ("phi", "alpha", "pixel"):
        kind, momentum = getattr(settings, f"{key}_optimizer"), getattr(settings, f"{key}_momentum")
        try:
            make_optimizer(kind, list(student.parameters()), 0.1, momentum)
        except ValueError as error:
            raise ValueError(f"{key}_optimizer={kind!r}: {error}") from None


def check_fractions(settings: Settings) -> None:
    """A `ValueError` if a fraction of the subset table leaves a class without an image."""
    data = settings.load(whiten=False)
    for fraction in settings.fraction_list:
        try:
            data.subset(settings.seed, fraction=fraction)
        except ValueError as error:
            raise ValueError(f"fractions={settings.fractions!r}: {error}") from None


def check_memory(settings: Settings, parameters: int, batch: int) -> None:
    """A `ValueError` if one student with so many parameters cannot be trained in this machine's (or GPU's) memory.

    This counts the parameters, gradient and momentum, and the first feature maps of one batch. A run needs far more, so
    settings that are refused here cannot work.
    """
    needed = 4 * (3 * parameters + batch * settings.width * settings.size**2)
    if settings.device == "cuda":
        there = torch.cuda.get_device_properties(0).total_memory
    elif hasattr(os, "sysconf") and not settings.cluster:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:  # jobs run on other machines, or this is Windows, which gives no size
        return
    if needed > there:
        raise ValueError(
            f"width={settings.width}, depth={settings.depth}: a student of {parameters:,} parameters needs at least "
            f"{needed / 1e9:,.0f} GB to train, and {settings.device} has {there / 1e9:,.0f} GB; use a smaller width"
        )
