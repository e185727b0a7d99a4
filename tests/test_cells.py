"""Every cell of every notebook runs. This is what `nbdev_test` does, by its own function and with the flags of `settings.ini`;
here each notebook has a process of its own, starts with torch imported already, and shares the workers with the tests: see `conftest.py`."""
import io
import multiprocessing
import subprocess
import sys
from contextlib import redirect_stderr
from functools import cache
from pathlib import Path

import nbformat
import pytest
from conftest import NOTEBOOKS, ROOT, seconds
from nbformat.v4 import new_code_cell, new_notebook

FLAGS = ("notest", "slow")


def execute(path, flags, mouth):
    "Tell what went wrong, or nothing, and the processor seconds of each cell."
    import nbdev.test
    cells = []
    class Shell(nbdev.test.CaptureShell):
        def cell(self, cell, **kwargs):
            before = seconds()
            super().cell(cell, **kwargs)
            if cell.cell_type == "code": cells.append((seconds() - before, f"{path.stem} [{cell.get('id', '')}]"))
    nbdev.test.CaptureShell = Shell
    with redirect_stderr(io.StringIO()) as said: passed, _ = nbdev.test.test_nb(path, skip_flags=list(flags), basepath=ROOT)
    mouth.send((None if passed else said.getvalue(), cells))

@cache
def server():
    "Processes fork off a server that has imported what takes long; nothing that a test or a notebook does can reach the next one."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "nbdev.test", "matplotlib.pyplot", "ipywidgets"])
    return context

def in_a_process(path, flags=FLAGS):
    ear, mouth = server().Pipe(duplex=False)
    child = server().Process(target=execute, args=(path, flags, mouth))
    child.start()
    mouth.close()
    try: return ear.recv()
    except EOFError: return f"{path.name}: its process has ended", []
    finally:
        child.kill() # it is done, or nobody waits for it any more
        child.join()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_cells(path, record_property):
    wrong, cells = in_a_process(path)
    record_property("cells", cells)
    if wrong: pytest.fail(wrong, pytrace=False)


# --- the runner itself -----------------------------------------------------------------------------------------------

def write(path, *sources):
    nbformat.write(new_notebook(cells=[new_code_cell(source) for source in sources]), path)
    return path

def test_the_flags_are_those_of_nbdev(root):
    from nbdev.config import get_config
    assert get_config(path=root).tst_flags.split() == list(FLAGS)

def test_a_failing_cell_is_shown(tmp_path):
    wrong, cells = in_a_process(write(tmp_path / "tiny.ipynb", "x = 1", "assert x == 2, 'not two'", "never = 1"))
    assert "AssertionError" in wrong and "not two" in wrong and "tiny.ipynb" in wrong and len(cells) == 2

@pytest.mark.parametrize("flag", ["notest", "slow", "eval: false"])
def test_flagged_cells_are_left_out(tmp_path, flag):
    wrong, cells = in_a_process(write(tmp_path / "tiny.ipynb", f"#| {flag}\nraise ValueError", "1"))
    assert not wrong and len(cells) == 1

def test_a_notebook_starts_anew_in_its_own_folder(tmp_path):
    (tmp_path / "beside.txt").touch()
    first = write(tmp_path / "first.ipynb", "import os, torch; torch.leaves = os.environ['LEAVES'] = 'a trace'; torch.manual_seed(3)")
    second = write(tmp_path / "second.ipynb", "import os, torch; assert not hasattr(torch, 'leaves') and 'LEAVES' not in os.environ and os.path.exists('beside.txt')",
                   "assert torch.initial_seed() != 3 and __name__ == '__main__'")
    assert not in_a_process(first)[0] and not in_a_process(second)[0]

def test_a_notebook_that_kills_its_process_is_an_error(tmp_path):
    assert in_a_process(write(tmp_path / "tiny.ipynb", "import os; os._exit(1)")) == ("tiny.ipynb: its process has ended", [])

def test_the_command_of_nbdev_works_too():
    done = subprocess.run([Path(sys.executable).parent / "nbdev_test", "--path", "nbs/toolkit/disk.ipynb"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "Success" in done.stdout, done.stderr
