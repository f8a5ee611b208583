"""`augdistill figures`: publish the pictures and numbers of a finished run, or of its sweeps, in figures/<preset>.

The same run gives the same bytes. Results of uncommitted code are refused: nobody could reproduce their numbers.
Everything is read and checked before anything is written.
"""

import re
from pathlib import Path

from augdistill_report.commands.report import notebooks
from augdistill_report.files.sealed_json import read_json
from augdistill_report.files.store import write
from augdistill_report.places import NOTEBOOKS, ROOT
from augdistill_report.run import configuration, folder_config, run_folder
from augdistill_report.settings import Settings, preset_path
from augdistill_report.show.page import finished
from augdistill_report.studies.grid import read_grid
from augdistill_report.studies.why import gain_points, values
from augdistill_report.work.statistics import markdown_table, over_seeds, row_label, shown

FIGURES, README = ROOT / "figures", ROOT / "README.md"


def publish(preset: str, out: str = "", gallery: Path | None = None, only: str = "") -> Path:
    """Copy a finished run's pictures and results to `gallery`/<preset>, and its sweeps; returns that folder.

    Without a `gallery` that is figures/, and README's tables are written anew. `only` publishes just the notebooks
    whose numbers it lists ("01,02"): no sweeps, no tables. A `ValueError` if results are missing, damaged, of other
    settings, of uncommitted code or of several commits.
    """
    folder, target = run_folder(preset, out), (gallery or FIGURES) / preset_path(preset).stem
    ours = run_results(folder, preset, only)
    files: dict[Path, Path] = {}  # what is written, and what it is copied from
    for name, result in ours.items():
        files[target / f"{name}.json"] = folder / "results" / f"{name}.json"
        pictures = [*(f"{figure}.png" for figure in result["figures"]), *(f"{film}.gif" for film in result["films"])]
        files |= {target / picture: folder / "figures" / picture for picture in pictures}
    swept = {} if only else sweep_results(folder)
    files |= sweep_files(swept, target)
    readme = ""
    if not only and gallery is None:
        readme = fill(README.read_text(encoding="utf-8"), target.name, ours)
        readme = fill_study(readme, FIGURES, target.name, swept)
    copy_all(files, readme)
    return target


def publish_sweeps(preset: str, out: str = "", gallery: Path | None = None) -> Path:
    """Copy the JSON and the picture of every sweep in a run's folder; returns the folder that they went to.

    A `ValueError` if there is no sweep, or one that is damaged or of uncommitted code.
    """
    folder, target = run_folder(preset, out), (gallery or FIGURES) / preset_path(preset).stem
    swept = sweep_results(folder)
    if not swept:
        raise ValueError(f"{folder} holds no sweep: make one first (augdistill sweep GRID.yaml --preset {preset})")
    readme = ""
    if gallery is None:
        readme = fill_study(README.read_text(encoding="utf-8"), FIGURES, target.name, swept)
    copy_all(sweep_files(swept, target), readme)
    return target


def copy_all(files: dict[Path, Path], readme: str) -> None:
    """Read every source of `files` (by target), then write all targets, and README where there is a text for it."""
    contents = {}
    for target, source in files.items():
        if not source.is_file():
            raise ValueError(f"{source}: is missing; run augdistill report (or sweep) again, then publish")
        contents[target] = source.read_bytes()
    for target, content in contents.items():
        write(target, content)
    if readme:
        write(README, readme)


def run_results(folder: Path, preset: str, only: str) -> dict[str, dict]:
    """The results of the chosen notebooks by name, all finished with the run's settings and one committed state."""
    config = folder_config(folder)
    if not config:
        raise ValueError(f"{folder} holds no run: make one first (augdistill report --preset {preset})")
    try:
        settings = Settings.from_dict(config["settings"])
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}; run augdistill report again, then publish") from None
    found, _ = finished(folder, configuration(settings))
    chosen = [path.stem for path in notebooks(only)]
    if missing := [name for name in chosen if name not in found]:
        raise ValueError(
            f"{folder}: {', '.join(missing)} not finished with its settings and this code; run augdistill report"
        )
    for name in chosen:
        if not is_committed(found[name]):
            raise ValueError(f"{name} was run from uncommitted code: commit, run the report again, then publish")
    if len({found[name]["environment"]["commit"] for name in chosen}) > 1:
        raise ValueError(f"{folder}: its notebooks ran at different commits; run the report again, then publish")
    return {name: found[name] for name in chosen}


def sweep_results(folder: Path) -> dict[Path, dict]:
    """What the sweeps in a run's folder found, by file, all of committed code."""
    found = {path: read_sweep(path) for path in sorted(folder.glob("sweeps/*/*.json"))}
    for path, result in found.items():
        if not is_committed(result):
            raise ValueError(f"{path.stem} was swept with uncommitted code: commit, sweep again, then publish")
    return found


def read_sweep(path: Path) -> dict:
    """What a sweep found, from its file; a `ValueError` if it is damaged or that of another grid."""
    result = read_json(path, "sweep")
    if Path(result["grid"]).stem != path.stem:
        raise ValueError(f"{path}: holds what the grid {result['grid']} found; delete it and sweep again")
    return result


def sweep_files(swept: dict[Path, dict], target: Path) -> dict[Path, Path]:
    """The files of sweeps to copy: what is written, and what it is copied from."""
    return {target / file.name: file for path in swept for file in (path, path.with_suffix(".png"))}


def is_committed(result: dict) -> bool:
    """Whether a result's code is that of a commit."""
    return bool(result["environment"]["commit"]) and not result["environment"]["uncommitted"]


STUDY = "why_phi_failed"


def study_table(studies: dict[str, list[dict]]) -> str:
    """The table of the study: what phi adds to the accuracy, by row (those of its short form) and preset.

    `studies` holds the study's cells by preset.
    """
    sets = sorted(studies, key=lambda name: (name != "digits", name != "fashion-small", name))

    def gain(cells: list[dict], row: tuple[str, str]) -> str:
        gains = values(cells, row, "gain")
        return gain_points(gains) if gains else "refused" if row in over_seeds(cells) else "not run"

    rows = read_grid(NOTEBOOKS / "sweeps" / f"{STUDY}.yaml").short
    table = [
        {"gain over the real images": row_label(row)} | {name: gain(studies[name], row) for name in sets}
        for row in rows
    ]
    return markdown_table(table).rstrip() if studies else ""


def fill_study(text: str, gallery: Path, preset: str = "", swept: dict[Path, dict] | None = None) -> str:
    """`text` with the study's table, of what `gallery` holds, between `<!-- study -->` and `<!-- /study -->`.

    Sweeps of `preset` that are published now (`swept`, by file) come before those that `gallery` holds.
    """
    own = [result for path, result in (swept or {}).items() if path.stem == STUDY]
    found = {preset: own[0]} if own else {}
    for path in sorted(gallery.glob(f"*/{STUDY}.json")):
        if path.parent.name not in found:
            found[path.parent.name] = read_sweep(path)
    table = study_table({name: result["cells"] for name, result in found.items()})
    pattern = r"(<!-- study -->\n).*?(<!-- /study -->)"
    return re.sub(pattern, lambda m: f"{m[1]}\n{table}\n\n{m[2]}", text, flags=re.DOTALL)


def result_tables(results: dict[str, dict]) -> str:
    """README's tables from a published run: methods on the base images, by subset, on unseen images."""
    base = scores(results["03_phi_distillation"])
    subsets, unseen = (results[name]["numbers"] for name in ("05_subset_evaluation", "07_unseen_images"))
    by_fraction = subsets["test accuracy"]["equal updates"]
    fractions = sorted({fraction for found in by_fraction.values() for fraction in found}, key=float)
    tables = [
        [{"trained on a few real images, each through": name, "test accuracy": score} for name, score in base.items()],
        [
            {"subset": subsets["methods"][name]} | {f"{100 * float(f):g} %": found.get(f, "") for f in fractions}
            for name, found in by_fraction.items()
        ],
        [
            {"a few images that no phi has seen, each through": name, "test accuracy": score}
            for name, score in unseen["test accuracy"].items()
        ],
    ]
    return "\n".join(map(markdown_table, tables)).rstrip()


def scores(result: dict) -> dict[str, str]:
    """The scores (mean, deviation, n) among a notebook's numbers, by name, as text."""
    return {k: shown(v) for k, v in result["numbers"].items() if isinstance(v, dict) and {"mean", "std", "n"} <= set(v)}


def fill(text: str, preset: str, results: dict[str, dict]) -> str:
    """`text` with the tables of a preset's results between `<!-- results: PRESET -->` and `<!-- /results -->`."""
    pattern = rf"(<!-- results: {re.escape(preset)} -->\n).*?(<!-- /results -->)"
    return re.sub(pattern, lambda m: f"{m[1]}\n{result_tables(results)}\n\n{m[2]}", text, flags=re.DOTALL)
