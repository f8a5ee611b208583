"""Campaigns: the most valuable results first, as far as a time limit allows. A file lists the pieces:

    preset: cifar10-gpu
    tiny: {size: 8, width: 4}     # with --tiny: settings of every piece, for a trial in seconds
    pieces:                       # in order of value; each gives one row of the table
      - {row: pixels (MTT), images_per_class: 1, phi: pixels, mtt: true}
      - {row: RandAugment, fraction: 0.5, eval_augment: randaugment, eval_steps: 17600}

To add a piece, add a line. All keys but those of `OWN` are settings.
"""

import dataclasses
from pathlib import Path

from augdistill_core import builders, in_short, nearest
from augdistill_report.files.yaml_files import read_yaml
from augdistill_report.places import NOTEBOOKS
from augdistill_report.run import Run
from augdistill_report.settings import Settings, resolve
from augdistill_report.work.experts import missing_experts
from augdistill_report.work.jobs import Job, Subset
from augdistill_report.work.scoring import CONTROLS, Score
from augdistill_report.work.setup import Setup

OWN = {  # the keys of a piece that are no settings, with their types and meanings
    "row": (str, "the method's name"),
    "fraction": (float, "the subset that students train on, in (0, 1]; without it, images_per_class of each class"),
    "phi": (str, "the phi that learns on these images, any name in PHIS; without it, none does"),
    "mtt": (bool, "whether it learns by MTT's optimisers (the settings pixel_*)"),
    "only": (str, f"a control, {' or '.join(CONTROLS)}: students train on one effect of phi alone"),
}


@dataclasses.dataclass(frozen=True)
class Piece:
    """One row of a campaign: students trained on a few images, through a learned phi or without one."""

    row: str
    settings: Settings
    fraction: float | None = None
    phi: str = ""
    mtt: bool = False
    only: str = ""

    @property
    def images(self) -> str:
        """Which images it starts from: pieces with the same can be compared."""
        if self.fraction is None:
            count = self.settings.images_per_class
            return f"{count} image{'s' if count > 1 else ''} a class"
        return "all the data" if self.fraction == 1 else f"{100 * self.fraction:g} %"

    @property
    def name(self) -> tuple[str, str]:
        """Its row and images. Pieces of one name that differ in their seed are repetitions."""
        return self.row, self.images

    def jobs(self, folder: Path) -> list[Job]:
        """Its jobs, each after those that it needs; the last is its `Score`. A report of the same run has the same."""
        run, s = Run("campaign", self.settings, folder), self.settings
        subset = run.base if self.fraction is None else Subset(s.seed, fraction=self.fraction)
        distilled = run.distillation(self.phi, subset, s.pixel_config if self.mtt else None) if self.phi else None
        evaluation = dataclasses.replace(run.evaluation(subset, distilled), only=self.only)
        experts = missing_experts(s.select(Setup)) if distilled or s.eval_labels == "soft" else []
        return [*experts, *filter(None, [distilled]), Score(evaluation.setup, evaluation)]


@dataclasses.dataclass(frozen=True)
class Campaign:
    """The content of a campaign's file, checked."""

    name: str
    preset: str
    changes: dict  # of settings, for every piece
    pieces: list[Piece]


def campaign_path(name: str) -> Path:
    """The file of a campaign: a name in notebooks/campaigns, or a path; a `ValueError` if there is none."""
    own, names = name.endswith((".yaml", ".yml")), sorted(p.stem for p in (NOTEBOOKS / "campaigns").glob("*.yaml"))
    path = Path(name) if own else NOTEBOOKS / "campaigns" / f"{name}.yaml"
    if not (path.is_file() if own else name in names):
        raise ValueError(f"campaign {name!r}: must be one of {', '.join(names)}, or the path of a .yaml file")
    return path


def read_campaign(name: str, changes: dict, tiny: bool = False) -> Campaign:
    """Read a campaign's file; `changes` of settings are for every piece. A `ValueError` says what is wrong."""
    path = campaign_path(name)
    content = read_yaml(path)
    for key in content:
        if key not in ("preset", "tiny", "pieces"):
            raise ValueError(f"{path}: unknown key {in_short(key)}: must be preset, tiny or pieces")
    preset, listed, small = content.get("preset"), content.get("pieces"), content.get("tiny") or {}
    if not isinstance(preset, str) or not isinstance(small, dict):
        raise ValueError(f"{path}: preset must be the name of a preset, tiny settings such as {{size: 8}}")
    if not isinstance(listed, list) or not listed or not all(isinstance(piece, dict) for piece in listed):
        raise ValueError(f"{path}: pieces must be a list of lines such as `- {{row: RandAugment, fraction: 0.1}}`")
    pieces: list[Piece] = []
    for number, line in enumerate(listed, 1):
        try:
            piece = piece_of(line, preset, (small if tiny else {}) | changes)
            if (piece.name, piece.settings.seed) in [(p.name, p.settings.seed) for p in pieces]:
                raise ValueError(f"{piece.row!r} on {piece.images} is there already; a repetition needs another seed")
        except ValueError as error:
            raise ValueError(f"{path}: piece {number}: {error}") from None
        pieces.append(piece)
    return Campaign(path.stem, preset, changes, pieces)


def piece_of(line: dict, preset: str, changes: dict) -> Piece:
    """The piece of a line in a campaign's file; a `ValueError` names the key that is wrong."""
    own, settings = ({k: v for k, v in line.items() if (k in OWN) is is_own} for is_own in (True, False))
    try:
        Settings.refuse_unknown(settings)
    except ValueError:
        key = next(key for key in settings if key not in Settings.names())
        raise ValueError(f"unknown key {in_short(key)}: {nearest(key, [*OWN, *Settings.names()])}") from None
    for key, value in own.items():
        kind, meaning = OWN[key]
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ValueError(f"{key}={in_short(value)}: must be a {kind.__name__} ({meaning})")
    if not own.get("row"):
        raise ValueError(f"row is missing: {OWN['row'][1]}")
    fraction, only = own.get("fraction"), own.get("only", "")
    if fraction is not None and not 0 < fraction <= 1:
        raise ValueError(f"fraction={fraction}: must be in (0, 1]")
    if fraction is not None and "images_per_class" in line:
        raise ValueError("fraction and images_per_class: give one of them")
    if only not in ("", *CONTROLS):
        raise ValueError(f"only={only!r}: must be {' or '.join(CONTROLS)}")
    if not own.get("phi") and (only or own.get("mtt")):
        raise ValueError("only and mtt: are for a piece with a phi")
    builders(own["phi"]) if own.get("phi") else None
    return Piece(settings=resolve(preset, settings | changes), **own)
