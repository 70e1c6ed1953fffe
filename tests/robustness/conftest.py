"""Some files of these tests, where they are loaded with all that they hold, change MMEngine for the whole process."""

import pytest
from mmengine.logging import HistoryBuffer


@pytest.fixture(autouse=True)
def _statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the statistics of log histories back after each test."""
    monkeypatch.setattr(HistoryBuffer, "_statistics_methods", dict(HistoryBuffer._statistics_methods))
