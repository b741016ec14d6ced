"""What every test shares: one torch thread each, deprecations as errors, and property tests without deadlines."""

import json
import os
import signal
import sys

import pytest
from hypothesis import HealthCheck, settings

try:
    import torch
except ImportError:  # the tests of decoding need none
    torch = None
else:
    torch.set_num_threads(1)
# As in pyproject.toml, for what pytest's filters do not reach: processes that tests start, and the command line.
_WARNINGS = [f"error::{kind}" for kind in ("DeprecationWarning", "PendingDeprecationWarning", "FutureWarning")]
sys.warnoptions += _WARNINGS
os.environ["PYTHONWARNINGS"] = ",".join(_WARNINGS)
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


@pytest.fixture
def deadline():
    """The test fails where it waits for something that never comes."""

    def end(*_):
        raise TimeoutError("the test did not end in five minutes")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(300)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Checkpoints by (family, next_, layout of keys), written once."""
    from tiny_llava import write_checkpoint

    made = {}

    def make(family="vicuna", next_=False, layout="v4", **settings):
        key = family, next_, layout, json.dumps(settings, sort_keys=True)
        if key not in made:
            made[key] = write_checkpoint(tmp_path_factory.mktemp("tiny") / "model", family, next_, layout, **settings)
        return made[key]

    return make


@pytest.fixture
def load(checkpoints):
    """Loads one of them in the tests' small layout."""
    from tiny_engine import LAYOUT

    from sfllava_fast.engine.slowfast_llava import SlowFastLlava

    def load(*args, options=None, **settings):
        return SlowFastLlava.from_pretrained(checkpoints(*args, **settings), LAYOUT, **(options or {}))

    return load
