import functools
import importlib
import os
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["OMP_NUM_THREADS"] = "1"  # before torch: the networks here are small

from helpers import EXPERT, MIMIC, ROOT, SCRIPTS, run


@pytest.fixture(scope="session")
def studio(tmp_path_factory):
    """A folder with all scripts, two small experts and a mimic of them."""
    folder = tmp_path_factory.mktemp("studio")
    for name in (*SCRIPTS, "common"):
        shutil.copy(ROOT / f"{name}.py", folder)
    (folder / "results").mkdir()
    shutil.copy(ROOT / "results/published.csv", folder / "results")
    for command in (EXPERT + " --game pong", EXPERT + " --game boxing --hidden 16 20", MIMIC):
        run(folder, command)
    return folder


@pytest.fixture
def copy(studio, tmp_path):
    return Path(shutil.copytree(studio, tmp_path / "copy"))


@pytest.fixture
def short_episodes(monkeypatch):
    """Let evaluate.py's episodes end after 1,000 frames: whole ones of Boxing have 7,100."""
    module = importlib.import_module("evaluate")
    short = functools.partial(module.make_envs, max_frames=1_000)
    monkeypatch.setattr(module, "make_envs", short)
