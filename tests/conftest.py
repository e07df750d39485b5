"""Settings of all tests: one thread, because the models are tiny and threads would wait for each other; slow tests."""

import pytest
import torch

torch.set_num_threads(1)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: further cases, run by python -m pytest -m slow")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("slow") and "slow" not in config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason="slow: python -m pytest -m slow"))
