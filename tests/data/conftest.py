"""What the tests of data sets share."""

import pytest

from augdistill_report.data.datasets import load_data


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """No data set of this machine is found, unless a test says where; nothing is kept from one test to the next."""
    monkeypatch.delenv("AUGDISTILL_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    load_data.cache_clear()
