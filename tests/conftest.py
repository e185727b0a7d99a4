import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts and "_proc" not in p.parts)


@pytest.fixture(scope="session")
def root(): return ROOT


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "A throw-away copy of the repository, so that a failing check never edits the working tree"
    copied = tmp_path_factory.mktemp("repo") / "repo"
    ignored = shutil.ignore_patterns(".git", "_proc", "_docs", "__pycache__", "build", "dist", "out", "*.egg-info", ".venv*", "venv")
    shutil.copytree(ROOT, copied, symlinks=True, ignore=ignored)
    return copied
