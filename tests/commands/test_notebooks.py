"""The form of each notebook file: title, parameters, cell lengths, no outputs."""

import nbformat
import pytest

from augdistill_report import settings
from augdistill_report.commands import report as runner
from augdistill_report.settings import Settings


@pytest.mark.parametrize("path", runner.notebooks(), ids=lambda path: path.stem)
def test_a_notebook_is_in_order(path):
    import papermill

    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")
    assert not any(cell.outputs or cell.execution_count for cell in code)
    lengths = sorted(
        len(cell.source.splitlines()) for cell in code if "parameters" not in cell.metadata.get("tags", [])
    )
    assert lengths[len(lengths) // 2] < 10 and lengths[-1] <= 30
    declared = papermill.inspect_notebook(str(path))
    assert {"preset", "out"} < set(declared) <= set(Settings.names()) | {"preset", "out"}
    types = {field.name: field.type.__name__ for field in settings.dataclasses.fields(Settings)}
    for name, parameter in declared.items():
        assert parameter["help"]
        assert parameter["inferred_type_name"] == types.get(name, "str")
