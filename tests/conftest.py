"""Shared set-up: helper modules beside the tests are importable."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest test first, so that no process waits for it at the end."""
    items.sort(key=lambda item: item.name != "test_it_passes_the_suite")
