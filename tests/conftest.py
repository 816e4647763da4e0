"""Real data for the tests that want it; without it they skip, and say what is missing."""

import os
import shutil
import signal
import zipfile
from pathlib import Path

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Started in the background of a script: the processes that tests interrupt would inherit the deafness.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared_data():
    """The folder of packed data sets: $BAFFLE_DATA, or ../shared/data beside the repository."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("BAFFLE_DATA", beside))
    if not (folder / "MNIST").is_dir():
        pytest.skip("no data folder with MNIST: set BAFFLE_DATA")
    return folder


@pytest.fixture(scope="session")
def unpacked(shared_data, tmp_path_factory):
    """MNIST/raw/*.gz and PACS128/<domain>/<class>/*.webp, in a folder that is removed afterwards."""
    folder = tmp_path_factory.mktemp("unpacked")
    (folder / "MNIST" / "raw").mkdir(parents=True)
    for file in (shared_data / "MNIST" / "raw").iterdir():
        shutil.copyfile(file, folder / "MNIST" / "raw" / file.name)
    with zipfile.ZipFile(shared_data / "pacs" / "pacs128.zip") as archive:
        archive.extractall(folder)
    yield folder
    shutil.rmtree(folder)
