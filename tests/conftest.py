import contextlib
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def denormals():
    """A stage that ran in this process has switched them off (runtime.py), and property tests draw them."""
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def shared_data():
    """The folder of real data sets that may lie beside the repository; the tests that need it are skipped without."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("no folder ../shared/data with real data")
    return path


with contextlib.suppress(ImportError):  # the environment of tests/xla goes without it
    import hypothesis

    hypothesis.settings.register_profile(
        "patient", deadline=None
    )  # seconds say nothing on a busy machine
    hypothesis.settings.load_profile("patient")
