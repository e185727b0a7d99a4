import resource
import shutil
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts and "_proc" not in p.parts)
# what takes longest starts first, so that the workers end together: notebooks and files of tests with their processor seconds, as `--timings` lists them
LONGEST = {"L2_Training": 400, "L3_Context": 300, "own_data": 215, "test_distributed.py": 190, "L1_Sampling": 160, "L4_FastSampling": 160, "L5_FlowMatching": 250, "L6_FewSteps": 310, "L7_Editing": 165, "test_cli.py": 100, "judge": 75, "metrics": 65, "muon": 48, "train_command": 46, "evaluate_command": 43, "many_machines": 60,
           "test_judge.py": 33, "test_planted_faults.py": 31, "test_fast_sampling.py": 30, "debug": 30, "test_check.py": 30,
           "test_machines.py": 28, "test_site.py": 27, "test_pictures.py": 25, "test_metrics.py": 20, "test_faults.py": 20, "test_resume.py": 20, "test_flow_matching.py": 20, "test_few_steps.py": 55, "test_editing.py": 60}


@pytest.fixture(scope="session")
def root(): return ROOT


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "A throw-away copy of the repository, so that a failing check never edits the working tree"
    copied = tmp_path_factory.mktemp("repo") / "repo"
    ignored = shutil.ignore_patterns(".git", "_proc", "_docs", "__pycache__", "build", "dist", "out", "*.egg-info", ".venv*", "venv")
    shutil.copytree(ROOT, copied, symlinks=True, ignore=ignored)
    return copied


# --- how the tests are shared out: whole files, because their tests share what they train, but each notebook by itself ---

def unit(nodeid):
    file, _, test = nodeid.partition("::")
    return nodeid if test.startswith("test_cells[") else file.rpartition("/")[2]


def shown(nodeid): return unit(nodeid).rpartition("[")[2].rstrip("]") # the notebook, or the file


def pytest_collection_modifyitems(items):
    def rank(item): return -LONGEST.get(shown(item.nodeid), 0)
    items.sort(key=rank)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    if config.getoption("dist") != "loadfile": return None
    from xdist.scheduler import LoadScopeScheduling
    class Units(LoadScopeScheduling):
        def _split_scope(self, nodeid): return unit(nodeid)
    config.option.loadscopereorder = False
    return Units(config, log)


# --- where the time goes: `--timings` --------------------------------------------------------------------------------

def seconds():
    "Processor time of this process and of those that it started."
    return sum(use.ru_utime + use.ru_stime for use in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


def pytest_addoption(parser):
    parser.addoption("--timings", type=int, default=0, metavar="N", help="list the N files, tests and cells of notebooks that take most processor time")


NOTED = [0.0]

def pytest_collection_finish(): NOTED[0] = seconds() # what was imported so far counts for no test


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport():
    report = (yield).get_result()
    report.seconds = seconds() - NOTED[0]
    NOTED[0] += report.seconds


def pytest_terminal_summary(terminalreporter, config):
    tables = {"files and notebooks": Counter(), "tests": Counter(), "cells of notebooks": Counter()}
    for report in (r for reports in terminalreporter.stats.values() for r in reports if hasattr(r, "seconds")):
        cells = dict(report.user_properties).get("cells", []) if report.when == "call" else []
        spent = report.seconds + sum(s for s, _ in cells)
        tables["files and notebooks"][shown(report.nodeid)] += spent
        if not cells: tables["tests"][report.nodeid] += spent
        for s, cell in cells: tables["cells of notebooks"][cell] += s
    for name, table in tables.items() if config.option.timings else ():
        terminalreporter.section(f"processor seconds of {name}: {table.total():.0f}")
        for what, spent in table.most_common(config.option.timings): terminalreporter.write_line(f"{spent:8.1f}  {what}")
