"""One setting for all properties: no deadlines, since a busy machine is no fault. What clients
remember of logs lies in a folder of this run."""

import gc

import pytest
from hypothesis import settings

settings.register_profile("casemate", deadline=None, print_blob=True)
settings.load_profile("casemate")


def pytest_collection_finish():
    """What was collected lives to the end: the cycle collector need not look at it each time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 50)


@pytest.fixture(scope="session", autouse=True)
def memory_of_logs(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CASEMATE_LOGS", str(tmp_path_factory.mktemp("logs")))
        yield
