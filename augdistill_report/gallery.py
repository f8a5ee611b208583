"""`augdistill figures`: publish a finished run's pictures and numbers to figures/<preset>, on purpose.

The same run gives the same bytes. A run of uncommitted code is refused: its numbers could not be made again.
"""

import json
import re
from pathlib import Path

from augdistill_report.artefacts import as_json, write
from augdistill_report.html import finished
from augdistill_report.run import configuration, run_folder
from augdistill_report.runner import notebooks
from augdistill_report.settings import ROOT, Settings, preset_path


def publish(preset: str, out: str = "", gallery: Path | None = None) -> Path:
    """Copy what the run left (pictures; numbers with settings, versions, device and commit); refresh README's table."""
    folder, target = run_folder(preset, out), (gallery or ROOT / "figures") / preset_path(preset).stem
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} holds no run: make one first (augdistill report --preset {preset})")
    settings = Settings.from_dict(json.loads((folder / "config.json").read_text())["settings"])
    ours, _ = finished(folder, configuration(settings))
    missing = [path.stem for path in notebooks() if path.stem not in ours]
    if missing:
        raise ValueError(
            f"{folder}: {', '.join(missing)} not finished with its settings and this code; run augdistill report"
        )
    for name, result in ours.items():
        if result["environment"]["uncommitted"] or not result["environment"]["commit"]:
            raise ValueError(f"{name} was run from uncommitted code: commit, run the report again, then publish")
    if len({result["environment"]["commit"] for result in ours.values()}) > 1:
        raise ValueError(f"{folder}: its notebooks ran at different commits; run the report again, then publish")
    for name, result in ours.items():
        write(target / f"{name}.json", as_json(result))
        for figure in result["figures"]:
            write(target / f"{figure}.png", (folder / "figures" / f"{figure}.png").read_bytes())
    if gallery is None:
        readme = ROOT / "README.md"
        write(readme, fill(readme.read_text(), target.name, ours))
    return target


def table(results: dict[str, dict]) -> str:
    """The accuracies of a published run as a Markdown table: one row a method."""
    lines = ["| method | test accuracy | students |", "|---|---|---|"]
    for result in results.values():
        for name, value in result["numbers"].items():
            if isinstance(value, dict) and {"mean", "std", "n"} <= set(value):
                lines.append(f"| {name} | {100 * value['mean']:.1f} ± {100 * value['std']:.1f} % | {value['n']} |")
    return "\n".join(lines)


def fill(text: str, preset: str, results: dict[str, dict]) -> str:
    """`text` with what stands between `<!-- results: PRESET -->` and `<!-- /results -->` replaced by the table."""
    pattern = rf"(<!-- results: {re.escape(preset)} -->\n).*?(\n<!-- /results -->)"
    return re.sub(pattern, lambda m: m[1] + table(results) + m[2], text, flags=re.DOTALL)
