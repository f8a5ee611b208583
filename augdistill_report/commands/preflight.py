"""What is refused before anything runs."""

import torch

from augdistill_core import make_optimizer, make_phi, snapshots_every
from augdistill_report.settings import Settings
from augdistill_report.show.tracking import check_tracker


def preflight(settings: Settings) -> None:
    """Refuse, before anything runs, settings that are each possible but do not fit together or fit this machine."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda': torch finds no CUDA device here; use cpu")
    check_tracker(settings.track)
    if settings.cluster:
        from augdistill_report.work.cluster import check_cluster  # needs an extra

        check_cluster(settings.cluster, settings.cluster_insecure)
    data = settings.load(whiten=False)
    student = settings.student(data)
    trained = snapshots_every(len(data.train), settings)[1]  # notebook 07 trains its own in any case
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
    for fraction in settings.fraction_list:
        try:
            data.subset(settings.seed, fraction=fraction)
        except ValueError as error:
            raise ValueError(f"fractions={settings.fractions!r}: {error}") from None
    make_phi(settings.phi, base, len(data.classes), settings.seed)
    for key in ("phi", "alpha", "pixel"):
        kind, momentum = getattr(settings, f"{key}_optimizer"), getattr(settings, f"{key}_momentum")
        try:
            make_optimizer(kind, list(student.parameters()), 0.1, momentum)
        except ValueError as error:
            raise ValueError(f"{key}_optimizer={kind!r}: {error}") from None
