"""What all tests share."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# nothing is asserted about wall time, and a failure must come back on the next run
settings.register_profile("cfssl", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("cfssl")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets, from CFSSL_SHARED_DATA or beside the checkout;
    skips where there is none.
    """
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("CFSSL_SHARED_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"real data sets are absent: {folder} does not exist (set CFSSL_SHARED_DATA)")
    return folder
