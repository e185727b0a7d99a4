"Python code in a process of its own that need not import torch again: it forks off the tests."
import io
import os
import sys
import tempfile
import time
import traceback
import warnings
from typing import NamedTuple


class Done(NamedTuple):
    returncode: int
    stdout: bytes
    stderr: bytes


def forked(code, *argv, encoding="utf-8", timeout=300):
    "What `python -c code argv…` returns and prints. The code starts in the state of the tests, and whatever it does to it ends with the process."
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        sys.stdout.flush(); sys.stderr.flush()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning) # Python warns of fork beside threads; the child uses none
            child = os.fork()
        if child == 0: _run(code, argv, out, err, encoding)
        end = time.monotonic() + timeout
        while not (ended := os.waitpid(child, os.WNOHANG))[0]:
            if time.monotonic() > end: os.kill(child, 9); os.waitpid(child, 0); raise TimeoutError(code)
            time.sleep(0.01)
        for file in (out, err): file.seek(0)
        return Done(os.waitstatus_to_exitcode(ended[1]), out.read(), err.read())


def _run(code, argv, out, err, encoding):
    status = 1
    try:
        os.dup2(out.fileno(), 1); os.dup2(err.fileno(), 2)
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), encoding, write_through=True)
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), encoding, "backslashreplace", write_through=True)
        sys.argv = ["-c", *map(str, argv)]
        if torch := sys.modules.get("torch"): torch.set_num_threads(1) # the threads of the parent are not here
        try:
            exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
            if status and not isinstance(end.code, int): print(end.code, file=sys.stderr)
        except BaseException: traceback.print_exc()
    finally: os._exit(status)
