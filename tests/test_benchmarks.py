"""The benchmark for a GPU: the same code on a CPU, cut short by its time limit, and continued."""

import json
import os
import subprocess
import sys

import pytest

from augdistill_report.places import ROOT


def bench(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--tiny", *map(str, arguments)]
    threads = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, check=False, cwd=ROOT, env=threads, capture_output=True, text=True)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
def test_a_run_that_is_cut_short_keeps_its_rows_and_goes_on(tmp_path):
    file = tmp_path / "gpu.json"
    cut = bench("--out", tmp_path, "--minutes", 0.05)
    assert cut.returncode == 0, cut.stderr
    first = json.loads(file.read_text())
    assert first["rows"] and first["rows left out"]
    first["rows"] = [row for row in first["rows"] if "stopped" not in row][:1]
    file.write_text(json.dumps(first))

    whole = bench("--out", tmp_path, "--minutes", 5, "--continue")
    assert whole.returncode == 0, whole.stderr
    found = json.loads(file.read_text())
    assert found["rows"][: len(first["rows"])] == first["rows"] and not found["rows left out"]
    rows = {row["row"]: row for row in found["rows"]}
    assert len(rows) == len(found["rows"]) and first["rows left out"][-1] in rows
    assert not [row for row in rows.values() if "stopped" in row]
    assert rows["exact: gradient in float32"]["cosine"] > 0.99999 > rows["exact: gradient in bf16"]["cosine"] > 0.98
    assert all(rows[f"exact: {what} together"]["exact"] for what in ("experts", "students"))
    assert rows["exact: gradients in float64"]["exact"] and rows["exact: resumed"]["same bits"]
    for batch in (10, 20):
        for variant in ("official", "graph, float32", "graph, bf16", "replay, float32"):
            row = rows[f"{batch} images a step, {variant}"]
            assert row["seconds"] > 0 and row["n"] == 3 and row["memory MB"] >= 0
        assert f"{batch} images a step: " in whole.stdout and "times as fast as official" in whole.stdout
    assert all(rows[f"experts {how}"]["experts a minute"] > 0 for how in ("together", "one by one"))
    assert (
        rows["students on 10 images"]["students a minute"] > rows["students on all the data"]["students a minute"] > 0
    )
    assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")
    assert found["environment"]["device"].startswith("CPU") and "commit" in found["environment"]

    other = json.dumps(found | {"sizes": {}})
    file.write_text(other)
    refused = bench("--out", tmp_path, "--continue")
    assert refused.returncode == 1 and "is of another device, size or commit" in refused.stderr
    assert file.read_text() == other
