"""A page that is closed at the end of its test."""

import pytest

from augdistill_report.explorer.page import Page


@pytest.fixture
def opened():
    """Open a page; at the end nothing may run, and `page.errors` holds no error that the test has not read."""
    pages = []

    def open_page(run):
        pages.append(Page(run))
        return pages[-1]

    yield open_page
    for page in pages:
        page.close()
        assert not page.background.busy
        assert page.errors == []
