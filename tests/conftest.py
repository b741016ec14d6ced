"""What every test shares: one torch thread each, and property tests without deadlines."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
settings.register_profile(
    "sfllava",
    deadline=None,
    derandomize="CI" in os.environ,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("sfllava")


@pytest.fixture
def torch_threads():
    """`torch.set_num_threads`, undone after the test."""
    yield torch.set_num_threads
    torch.set_num_threads(1)
