"""What each subcommand of `augdistill` takes and does: one function each, that adds options and returns the action.

A subcommand has a module of its own name in this folder. It is imported when the subcommand runs, so that --help and
wrong options answer at once, and no command needs another's packages. To add one: such a function, its line in
`SUBCOMMANDS`, and the module.
"""

import argparse
from collections.abc import Callable

Parser, Options = argparse.ArgumentParser, argparse.Namespace
Action = Callable[[Options], int | None]  # returns the exit code, None for 0


# --- options that several subcommands have ----------------------------------------------------------------------------


def add_run(command: Parser, preset: str | None = "digits", out: str = "the run's folder (runs/<preset>)") -> None:
    """--preset and --out; both are required if there is no default preset."""
    needed = preset is None
    what = "a name in notebooks/presets, or a .yaml file"
    command.add_argument("--preset", default=preset or "", required=needed, help=what)
    command.add_argument("--out", default="", required=needed, metavar="DIR", help=out)


def add_set(command: Parser, form: str = "KEY=VALUE", what: str = "change a setting") -> None:
    command.add_argument("--set", action="append", default=[], metavar=form, help=what)


def add_cluster(command: Parser) -> None:
    command.add_argument("--cluster", default="", metavar="SCHEDULER", help="a Dask scheduler's address, or its .json")


def add_data_folder(command: Parser) -> None:
    command.add_argument("--data", default="", metavar="DIR", help="its folder (AUGDISTILL_DATA, or the cache)")


def settings_changes(options: Options, *own: str) -> dict[str, str]:
    """The settings changed by --set, and by those options in `own` that were used; a `ValueError` for a wrong --set."""
    changes = {}
    for pair in options.set:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"--set {pair!r}: must be key=value")
        changes[key.strip()] = value.strip()
    return changes | {key: getattr(options, key) for key in own if getattr(options, key)}


# --- the subcommands --------------------------------------------------------------------------------------------------


def add_report(command: Parser) -> Action:
    add_run(command)
    command.add_argument("--only", default="", metavar="02,03", help="only these notebooks")
    add_set(command)
    add_cluster(command)
    command.add_argument("--track", default="", metavar="NAME", help="also log curves to trackio, wandb or tensorboard")
    command.add_argument("--fresh", action="store_true", help="repeat finished work")

    def run(options: Options) -> None:
        from augdistill_report.commands.report import report

        changes = settings_changes(options, "track", "cluster")
        print(f"report: {report(options.preset, options.out, options.only, changes, options.fresh)}")

    return run


def add_sweep(command: Parser) -> Action:
    command.add_argument("grid", metavar="GRID.yaml", help="the grid: the notebook, and the settings that vary")
    command.add_argument("--row", action="append", default=[], metavar="NAME", help="only this row; repeatable")
    command.add_argument("--short", action="store_true", help="only the rows that the grid lists under `short`")
    add_run(command, preset="")
    add_set(command)
    add_cluster(command)
    command.add_argument("--fresh", action="store_true", help="repeat finished cells")

    def run(options: Options) -> int:
        from augdistill_report.commands.sweep import sweep

        changes, o = settings_changes(options, "cluster"), options
        folder, cells = sweep(o.grid, o.preset, o.out, changes, o.short, o.row, o.fresh)
        print((folder / "table.md").read_text())
        failed = sum("error" in cell for cell in cells)
        print(f"sweep: {folder} ({len(cells)} cells{f', {failed} failed' if failed else ''})")
        return 1 if failed == len(cells) else 0

    return run


def add_campaign(command: Parser) -> Action:
    command.add_argument("name", metavar="NAME", help="a list in notebooks/campaigns, or a .yaml file")
    command.add_argument("--minutes", type=float, default=7.0, metavar="M", help="the time limit (7)")
    command.add_argument("--device", default="", metavar="cpu|cuda", help="default: as in the preset")
    command.add_argument("--tiny", action="store_true", help="a trial in a minute, with numbers that mean nothing")
    command.add_argument("--out", default="", metavar="DIR", help="the run's folder (runs/<preset>)")
    add_set(command)

    def run(options: Options) -> int:
        from augdistill_report.commands.campaign import DONE, campaign

        changes, o = settings_changes(options, "device"), options
        table, rows = campaign(o.name, o.minutes, o.out, changes, o.tiny)
        done = sum(row.state == DONE for row in rows)
        print(table.read_text())
        goes_on = "" if done == len(rows) else "; the same command goes on from there"
        print(f"campaign: {table} ({done} of {len(rows)} pieces done{goes_on})")
        return 1 if not done and any(row.failed for row in rows) else 0

    return run


def add_publish(command: Parser) -> Action:
    add_run(command)
    command.add_argument("--only", default="", metavar="02,03", help="only these notebooks, or: sweeps, campaigns")
    command.add_argument("--as", dest="name", default="", metavar="NAME", help="its folder in figures/ (the preset's)")

    def run(options: Options) -> None:
        from augdistill_report.commands.publish import publish

        print(f"published: {publish(options.preset, options.out, options.only, options.name)}")

    return run


def add_app(command: Parser) -> Action:
    add_run(command)
    command.add_argument("--port", type=int, default=8866, metavar="N", help="or one near it, if it is in use (8866)")
    command.add_argument("--no-browser", action="store_true", help="only print the address, with its token")
    add_set(command)

    def run(options: Options) -> None:
        try:
            from augdistill_report.commands.app import app
        except ImportError as error:  # an optional package
            raise ValueError(f"app: needs voila ({error}): pip install 'augdistill[app]'") from None
        app(options.preset, options.out, settings_changes(options), options.port, not options.no_browser)

    return run


def add_data(command: Parser) -> Action:
    several = command.add_subparsers(dest="what", required=True)
    check = several.add_parser("check", help="read a complete data set and describe it")
    check.add_argument("--size", type=int, default=0, help="resize its images to this many pixels (0: no)")
    fetch = several.add_parser("fetch", help="download a missing data set; no other command does")
    fetch.add_argument("--mirror", default="", metavar="URL", help="a web folder with its files")
    for one in (check, fetch):
        one.add_argument("name", help="a data set's name, or (check) folder:PATH")
        add_data_folder(one)

    def run(options: Options) -> None:
        from augdistill_report.commands.data import check_data, fetch_data

        if options.what == "fetch":
            print(fetch_data(options.name, options.data, options.mirror))
        else:
            print(check_data(options.name, options.data, options.size))

    return run


def add_experts(command: Parser) -> Action:
    several = command.add_subparsers(dest="what", required=True)
    train = several.add_parser("train", help="train the experts that a run lacks; continues after a stop")
    show = several.add_parser("list", help="one line per expert: its data, length, accuracy, size")
    check = several.add_parser("check", help="read each expert completely, list damaged files (exit code 1)")
    bring = several.add_parser("import", help="convert experts of the official MTT code, for the setting expert_files")
    bring.add_argument("files", nargs="+", metavar="replay_buffer_N.pt", help="the official code's files")
    for one in (show, check):
        one.add_argument("files", nargs="*", metavar="FILE", help="experts' files or folders (those of a run)")
    for one in (train, show, check):
        add_run(one)
    add_run(bring, preset=None, out="the output folder")
    for one in (train, bring):
        add_set(one)
    add_cluster(train)

    def run(options: Options) -> int:
        from augdistill_report.commands import experts
        from augdistill_report.files.expert_files import ExpertFile

        where = options.preset, options.out
        if options.what == "check":
            paths = experts.files_of(options.files, *where)
            wrong = experts.check(paths)
            print("\n".join([*wrong, f"experts: {len(paths)} checked, {len(wrong)} damaged"]))
            return 1 if wrong else 0
        if options.what == "list":
            files = [ExpertFile(path) for path in experts.files_of(options.files, *where)]
        elif options.what == "train":
            files = experts.train(*where, settings_changes(options, "cluster"))
        else:
            files = experts.import_buffers(options.files, *where, settings_changes(options))
        print(f"{experts.expert_table(files)}\nexperts: {files[0].path.parent}")
        return 0

    return run


def add_apply(command: Parser) -> Action:
    command.add_argument("phi", metavar="PHI", help="a phi's file: runs/<preset>/phis/<name>.safetensors")
    command.add_argument(
        "--to", required=True, metavar="WHAT", help="a data set (training split), or folder of classes"
    )
    command.add_argument("--out", required=True, metavar="DIR", help="the output folder, a sub-folder for each class")
    command.add_argument("--copies", type=int, default=1, metavar="K", help="augmented copies of each image (1)")
    command.add_argument("--count", type=int, default=0, metavar="N", help="only the first N images of each class")
    command.add_argument("--seed", type=int, default=0, metavar="S", help="the same seed makes the same images (0)")
    command.add_argument("--strength", type=float, metavar="L", help="x + L (phi(x) - x); default: as in the file")
    command.add_argument("--probability", type=float, metavar="P", help="of applying phi; default: as in the file")
    add_set(command, "phis=FILE", "files that register your phis")
    add_data_folder(command)

    def run(options: Options) -> None:
        from augdistill_report.commands.apply import How, apply, load_phi, load_phis

        load_phis(settings_changes(options))
        how = How(options.copies, options.count, options.seed)
        augment = load_phi(options.phi, options.strength, options.probability)
        print(f"apply: {apply(augment, options.to, options.out, how, options.data)}")

    return run


def add_score(command: Parser) -> Action:
    what = "images_best.pt (MTT), .npz, .safetensors, a folder, positions (.npy, .txt), a phi, or RUN/NOTEBOOK/ROW"
    command.add_argument("what", metavar="WHAT", help=what)
    command.add_argument("--on", default="", metavar="DATA", help="the data set to test on (a row has its own)")
    command.add_argument("--protocol", default="ours", metavar="NAME", help="ours, mtt, dc-bench, dd-ranking ...")
    of = "of all other settings: the ConvNet, the experts (digits; a row has those of its run)"
    command.add_argument("--preset", default="", help=of)
    command.add_argument("--student", default="", metavar="NAME", help="convnet3, resnet18, vgg11, alexnet ...")
    command.add_argument("--students", type=int, default=0, metavar="N", help="students of each row")
    command.add_argument("--labels", default="", metavar="KIND", help="hard, probabilities, logits, or experts")
    command.add_argument("--normalisation", default="", metavar="NAME", help="pixels, own, zca, cifar10 ...")
    command.add_argument("--lr", type=float, default=0.0, help="the step size learned with the images (mtt)")
    command.add_argument("--size", type=int, default=0, help="image size in pixels, for positions")
    command.add_argument("--beside", default="random,bytes,window,all", metavar="ROWS", help="what else is scored")
    command.add_argument("--name", default="", help="what the result is called")
    command.add_argument("--out", default="", metavar="DIR", help="the folder of results (runs/<preset>)")
    command.add_argument("--publish", action="store_true", help="also write it to figures/scoreboard (committed code)")
    add_set(command)

    def run(options: Options) -> None:
        from augdistill_report.commands.score import score

        same = (
            *("on", "protocol", "preset", "student", "students", "labels", "normalisation", "lr", "size"),
            *("beside", "name", "out", "publish"),
        )
        given = {key: getattr(options, key) for key in same}
        print(score(options.what, changes=settings_changes(options), **given))

    return run


def add_export(command: Parser) -> Action:
    command.add_argument("row", metavar="ROW", help="RUN/NOTEBOOK/ROW, or the file of a saved phi")
    command.add_argument("--format", required=True, metavar="FORM", help="mtt, folder, npz or safetensors")
    command.add_argument("--out", required=True, metavar="PATH", help="the file or folder to write")
    command.add_argument("--draws", type=int, default=1, metavar="K", help="draws of a stochastic phi (1)")
    add_set(command, what="phis, data; for a saved phi also dataset")

    def run(options: Options) -> None:
        from augdistill_report.commands.export import export

        made = export(options.row, options.format, options.out, options.draws, settings_changes(options))
        print(f"export: {made}")

    return run


SUBCOMMANDS: dict[str, tuple[Callable[[Parser], Action], str]] = {  # by name, with what --help says of each
    "report": (add_report, "run the notebooks, then write one HTML page"),
    "sweep": (add_sweep, "run a notebook for every point of a grid"),
    "campaign": (add_campaign, "make a list of results in order of value, within a time limit"),
    "app": (add_app, "serve the explorer (notebook 06) to a browser on this machine"),
    "publish": (add_publish, "copy a finished run to figures/, and write docs/results.md"),
    "apply": (add_apply, "augment a data set's images with a saved phi"),
    "score": (add_score, "test students trained on a distilled set, and what stands beside it"),
    "export": (add_export, "write what a run has distilled, in a form that others read"),
    "data": (add_data, "check a data set, or download one"),
    "experts": (add_experts, "train, list, check or import experts"),
}
