"""`augdistill figures`: publishes the pictures and numbers of a finished run, or of its sweeps, in figures/<preset>.

The same run gives the same bytes. Results of uncommitted code are refused, since nobody could reproduce them.
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

FIGURES, RESULTS = ROOT / "figures", ROOT / "docs" / "results.md"


def publish(preset: str, out: str = "", gallery: Path | None = None, only: str = "") -> Path:
    """Copy a finished run's pictures and results to `gallery`/<preset>, and its sweeps; returns that folder.

    Without a `gallery` that is figures/, and the tables of docs/results.md are updated. `only` publishes just the
    notebooks whose numbers it lists ("01,02"), and no sweeps. A `ValueError` if results are missing or damaged, or
    come from other settings, uncommitted code or several commits.
    """
    folder, target = run_folder(preset, out), (gallery or FIGURES) / preset_path(preset).stem
    ours = run_results(folder, preset, only)
    files: dict[Path, Path] = {}  # source by target
    for name, result in ours.items():
        files[target / f"{name}.json"] = folder / "results" / f"{name}.json"
        pictures = [*(f"{figure}.png" for figure in result["figures"]), *(f"{film}.gif" for film in result["films"])]
        files |= {target / picture: folder / "figures" / picture for picture in pictures}
    swept = {} if only else sweep_results(folder)
    files |= sweep_files(swept, target)
    now = {f"{target.name}/{name}": result for name, result in ours.items()} | named(swept, target)
    copy_all(files, fill(RESULTS.read_text(encoding="utf-8"), now) if gallery is None else "")
    return target


def publish_sweeps(preset: str, out: str = "", gallery: Path | None = None) -> Path:
    """Copy the JSON and the picture of every sweep in a run's folder to `gallery`/<preset>; returns that folder.

    A `ValueError` if there is no sweep, or one that is damaged or of uncommitted code.
    """
    folder, target = run_folder(preset, out), (gallery or FIGURES) / preset_path(preset).stem
    swept = sweep_results(folder)
    if not swept:
        raise ValueError(f"{folder} holds no sweep: make one first (augdistill sweep GRID.yaml --preset {preset})")
    tables = fill(RESULTS.read_text(encoding="utf-8"), named(swept, target)) if gallery is None else ""
    copy_all(sweep_files(swept, target), tables)
    return target


def copy_all(files: dict[Path, Path], tables: str) -> None:
    """Read every source of `files` (by target), then write all targets, and docs/results.md if there is a text."""
    contents = {}
    for target, source in files.items():
        if not source.is_file():
            raise ValueError(f"{source}: is missing; run augdistill report (or sweep) again, then publish")
        contents[target] = source.read_bytes()
    for target, content in contents.items():
        write(target, content)
    if tables:
        write(RESULTS, tables)


def run_results(folder: Path, preset: str, only: str) -> dict[str, dict]:
    """The chosen notebooks' results by name; a `ValueError` unless all are of the run's settings and one commit."""
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
    """The results of the sweeps in a run's folder, by file; a `ValueError` if one is of uncommitted code."""
    found = {path: read_sweep(path) for path in sorted(folder.glob("sweeps/*/*.json"))}
    for path, result in found.items():
        if not is_committed(result):
            raise ValueError(f"{path.stem} was swept with uncommitted code: commit, sweep again, then publish")
    return found


def read_sweep(path: Path) -> dict:
    """The results of a sweep from its file; a `ValueError` if it is damaged or that of another grid."""
    result = read_json(path, "sweep")
    if Path(result["grid"]).stem != path.stem:
        raise ValueError(f"{path}: holds what the grid {result['grid']} found; delete it and sweep again")
    return result


def sweep_files(swept: dict[Path, dict], target: Path) -> dict[Path, Path]:
    """The sweeps' files to copy: source by target."""
    return {target / file.name: file for path in swept for file in (path, path.with_suffix(".png"))}


def is_committed(result: dict) -> bool:
    """Whether a result was made by committed code."""
    return bool(result["environment"]["commit"]) and not result["environment"]["uncommitted"]


# --- the tables of docs/results.md ------------------------------------------------------------------------------------

STUDY = "why_phi_failed"


def named(swept: dict[Path, dict], target: Path) -> dict[str, dict]:
    """What sweeps found, by preset and name, as tables refer to it."""
    return {f"{target.name}/{path.stem}": result for path, result in swept.items()}


def fill(text: str, now: dict[str, dict] | None = None) -> str:
    """`text` with every table between `<!-- table: KIND NAME -->` and `<!-- /table -->` written anew.

    NAME is a file of figures/ without its suffix (digits/03_phi_distillation); the study's table takes all its files.
    `now` holds, by such names, results that are published at this moment. A `ValueError` names a damaged file.
    """
    now = now or {}
    studies = {f"{path.parent.name}/{STUDY}" for path in FIGURES.glob(f"*/{STUDY}.json")}
    studies |= {name for name in now if name.endswith(STUDY)}

    def result(name: str) -> dict:
        path = FIGURES / f"{name}.json"
        return now.get(name) or (read_sweep(path) if name in studies else read_json(path, "results"))

    def table(match: re.Match) -> str:
        kind, *names = match[2].split()
        found = {name: result(name) for name in names or sorted(studies)}
        return f"{match[1]}\n{markdown_table(TABLES[kind](found))}\n{match[3]}"

    return re.sub(r"(<!-- table: (.*?) -->\n).*?(<!-- /table -->)", table, text, flags=re.DOTALL)


def images_table(found: dict[str, dict]) -> list[dict]:
    """Test accuracy on a few real images, a row a method (notebook 03)."""
    (result,) = found.values()
    scores = {k: v for k, v in result["numbers"].items() if isinstance(v, dict) and {"mean", "std", "n"} <= set(v)}
    return [{"ten real images, through": name, "test accuracy": score} for name, score in scores.items()]


def subsets_table(found: dict[str, dict]) -> list[dict]:
    """Test accuracy and the gain over no augmentation, by method and subset (notebook 05)."""
    (result,) = found.values()
    numbers = result["numbers"]
    scores, gains = numbers["test accuracy"]["equal updates"], numbers["gain over no augmentation"]
    fractions = sorted({fraction for by_fraction in scores.values() for fraction in by_fraction}, key=float)

    def cell(id: str, fraction: str) -> str:
        its = gains.get(id, {}).get(fraction)
        gain = f"; {100 * its['gain']:+.1f} ± {100 * its['interval']:.1f}" if its else ""
        return shown(scores[id][fraction]) + gain if fraction in scores[id] else ""

    return [
        {"test accuracy; gain (points, 95 % CI)": numbers["methods"][id]}
        | {f"{100 * float(fraction):g} %": cell(id, fraction) for fraction in fractions}
        for id in scores
    ]


def unseen_table(found: dict[str, dict]) -> list[dict]:
    """Test accuracy on a few images that no phi has seen (notebook 07)."""
    (result,) = found.values()
    scores = result["numbers"]["test accuracy"]
    return [{"ten unseen images, through": name, "test accuracy": score} for name, score in scores.items()]


def study_table(found: dict[str, dict]) -> list[dict]:
    """What phi adds to the test accuracy, by row of the study's short form and by preset (notebook 04)."""
    cells = {name.partition("/")[0]: result["cells"] for name, result in found.items()}
    presets = sorted(cells, key=lambda name: (name != "digits", name != "fashion-small", name))

    def gain(cells: list[dict], row: tuple[str, str]) -> str:
        gains = values(cells, row, "gain")
        return gain_points(gains) if gains else "refused" if row in over_seeds(cells) else "not run"

    rows = read_grid(NOTEBOOKS / "sweeps" / f"{STUDY}.yaml").short
    return [
        {"gain over the real images": row_label(row)} | {name: gain(cells[name], row) for name in presets}
        for row in rows
    ]


TABLES = {"images": images_table, "subsets": subsets_table, "unseen": unseen_table, "study": study_table}
