import contextlib
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
REAL = Path(os.environ.get("NANO_REAL") or ROOT.parent / "shared")  # real data and templates
SLOW = bool(os.environ.get("NANO_SLOW"))  # tests of all cases, which take much longer


def few(cases, *telling):
    """Those of the cases that tell most, and all of them with NANO_SLOW=1."""
    return [case for case in cases if SLOW or case in telling]


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def ctrl_c():
    """A shell starts what runs in the background with Ctrl-C ignored, and tests send it."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def denormals():
    """A stage that ran in this process has switched them off, and property tests draw them."""
    torch.set_flush_denormal(False)


@pytest.fixture(scope="module")
def stages_folder(tmp_path_factory):
    """Models, data, a reward adapter, and in one/ each stage's run on one process."""
    import stages

    path = tmp_path_factory.mktemp("stages")
    stages.prepare(path)
    stages.alone([stages.job(path, name, path / "one" / name) for name in stages.STAGES])
    return path


@pytest.fixture(scope="session")
def shared_data():
    """A folder of real data sets. Tests that need them are skipped without."""
    if not (REAL / "data").is_dir():
        pytest.skip("no real data: NANO_REAL= names a folder with data/ and templates/")
    return REAL / "data"


with contextlib.suppress(ImportError):  # the environment of tests/xla goes without it
    import hypothesis

    # On a busy machine the seconds of an example say nothing.
    hypothesis.settings.register_profile("patient", deadline=None)
    hypothesis.settings.load_profile("patient")
