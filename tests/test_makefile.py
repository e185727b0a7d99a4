"`make` on a machine with any Python: stand-ins for the interpreters, so that nothing is installed."
import os
import shutil
import subprocess

import pytest
from conftest import ROOT

MAKE = shutil.which("make")
pytestmark = pytest.mark.skipif(MAKE is None, reason="no make here")

# A Python of version $version: it answers what tools/environment.sh asks, makes "environments" and notes what it installs.
STUB = """#!/bin/sh
version={version} venv={venv}
case "$*" in
*ensurepip*) [ $venv = yes ] && [ $version -ge 11 ] && [ $version -le 14 ] ;;
*version_info*) [ $version -ge 11 ] && [ $version -le 14 ] ;;
"-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && echo $version > "$3/pyvenv.cfg" ;;
"-m pip install "*) echo "$@" >> log; [ ! -e no-network ] ;;
esac
"""
TOOLS = "sh mkdir cp rm ls touch echo grep sed expand env cat"


@pytest.fixture
def clone(tmp_path):
    "The files that `make setup` reads, in a folder with a space in its name."
    folder = tmp_path / "a clone"
    (folder / "tools").mkdir(parents=True)
    for name in ("Makefile", "requirements.txt", "settings.ini", "setup.py", "tools/environment.sh"): shutil.copy(ROOT / name, folder / name)
    return folder


def stub(path, version, venv=True):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(STUB.format(version=version, venv="yes" if venv else "no"))
    path.chmod(0o755)
    return path


def make(clone, *arguments, **pythons):
    "`make` with these interpreters (python3=13, python3_12=12) and no others on the PATH."
    path = clone.parent / "bin"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    for tool in TOOLS.split(): (path / tool).symlink_to(shutil.which(tool))
    for name, version in pythons.items(): stub(path / name.replace("_", "."), abs(version), venv=version > 0)
    env = {"PATH": str(path), "HOME": str(clone), "LC_ALL": "C.UTF-8"}
    return subprocess.run([MAKE, *(arguments or ["setup"])], cwd=clone, env=env, capture_output=True, text=True)


def made_with(clone): return int((clone / ".venv/pyvenv.cfg").read_text())


@pytest.mark.parametrize("version", [11, 12, 13, 14])
def test_the_usual_python(clone, version):
    done = make(clone, python3=version)
    assert done.returncode == 0, done.stderr
    assert made_with(clone) == version and "install -q -r requirements.txt" in (clone / "log").read_text()
    assert "broken" not in done.stdout and done.stdout.count("\n") == 1
    assert make(clone, python3=version).stdout.startswith("make: Nothing")               # once


@pytest.mark.parametrize("pythons, version", [
    (dict(python3=9, python3_12=12), 12), (dict(python3=15, python3_11=11, python3_13=13), 13), (dict(python3_11=11), 11),
    (dict(python3=10, python3_14=14, python3_13=13), 14), (dict(python3=-12, python3_11=11), 11)],   # negative: without venv, as on Debian
    ids=["older", "newer", "no python3", "the newest", "no venv"])
def test_another_python_is_found(clone, pythons, version):
    assert make(clone, **pythons).returncode == 0 and made_with(clone) == version


@pytest.mark.parametrize("pythons", [{}, dict(python3=10), dict(python3=-13), dict(python3=9, python3_11=10)], ids=str)
def test_no_python_is_one_line(clone, pythons):
    done = make(clone, **pythons)
    assert done.returncode and not (clone / ".venv").exists()
    said = [line for line in done.stderr.splitlines() if not line.startswith("make:")]
    assert len(said) == 1 and "3.11 to 3.14" in said[0] and "PYTHON=" in said[0] and "python3-venv" in said[0]


def test_python_by_name(clone):
    mine = stub(clone.parent / "my python" / "python", 13)
    assert make(clone, "setup", f"PYTHON={mine}", python3=12).returncode == 0 and made_with(clone) == 13     # the advice works
    shutil.rmtree(clone / ".venv")
    stub(mine, 10)
    done = make(clone, "setup", f"PYTHON={mine}", python3=12)
    assert done.returncode and "is not Python 3.11 to 3.14" in done.stderr and not (clone / ".venv").exists()


BREAK = {
    "interrupted": (lambda venv: (venv / ".making").touch(), "interrupted"),
    "python gone": (lambda venv: (venv / "bin/python").unlink(), "gone"),
    "python upgraded": (lambda venv: (venv / "bin/python").write_text("#!/bin/sh\ncase \"$*\" in *pip*) exit 1;; esac\n"), "no pip"),
    "other version": (lambda venv: stub(venv / "bin/python", 10), "not 3.11 to 3.14"),
}

@pytest.mark.parametrize("ready", [True, False], ids=["was ready", "never ready"])
@pytest.mark.parametrize("how", BREAK)
def test_a_broken_environment_is_made_anew(clone, how, ready):
    make(clone, python3=12)
    (clone / ".venv/old").touch()
    BREAK[how][0](clone / ".venv")
    if not ready: (clone / ".venv/.ready").unlink()
    done = make(clone, python3=13)
    assert done.returncode == 0, done.stderr
    assert ".venv is broken" in done.stdout and BREAK[how][1] in done.stdout
    assert made_with(clone) == 13 and not (clone / ".venv/old").exists() and (clone / ".venv/.ready").exists()
    assert make(clone, python3=13).stdout.startswith("make: Nothing")


def test_nothing_is_removed_where_nothing_can_be_made(clone):
    make(clone, python3=12)
    (clone / ".venv/bin/python").unlink()
    assert make(clone, python3=10).returncode and (clone / ".venv/pyvenv.cfg").exists()


def test_an_installation_that_fails_is_half_made(clone):
    (clone / "no-network").touch()
    assert make(clone, python3=12).returncode and not (clone / ".venv/.ready").exists()
    (clone / "no-network").unlink()
    done = make(clone, python3=12)
    assert done.returncode == 0 and "interrupted" in done.stdout and (clone / ".venv/.ready").exists()


def test_new_pins_are_installed_into_what_there_is(clone):
    make(clone, python3=12)
    (clone / ".venv/old").touch()
    later = (clone / ".venv/.ready").stat().st_mtime + 5
    os.utime(clone / "requirements.txt", (later, later))
    assert make(clone, python3=13).returncode == 0 and (clone / ".venv/old").exists() and (clone / "log").read_text().count("install") == 2


@pytest.mark.parametrize("content", ["environment of another version", "photographs"])
def test_foreign_folders_are_never_removed(clone, content):
    mine = clone / "mine"
    if content == "photographs": mine.mkdir(); (mine / "cat.png").touch()
    else: stub(mine / "bin/python", 10); (mine / "pyvenv.cfg").touch()
    before = sorted(mine.rglob("*"))
    done = make(clone, "setup", "VENV=mine", python3=12)
    assert done.returncode and "Name another folder" in done.stderr and sorted(mine.rglob("*")) == before
    (clone / ".venv").mkdir(), (clone / ".venv/cat.png").touch()
    assert make(clone, python3=12).returncode and (clone / ".venv/cat.png").exists()


def test_an_environment_of_your_own_is_used(clone):
    stub(clone / "mine/bin/python", 13)
    (clone / "no-network").touch()
    assert make(clone, "setup", "VENV=mine", python3=12).returncode                       # a failed installation leaves no mark in it
    (clone / "no-network").unlink()
    done = make(clone, "setup", "VENV=mine", python3=12)
    assert done.returncode == 0 and "broken" not in done.stdout and not (clone / ".venv").exists()


def test_settings_reach_the_tests(clone):
    "`make test PRECISION=…` sets the precision; waiting threads never spin; whoever set that themselves is left alone."
    (clone / "Makefile").open("a").write("\nshow:\n\t@env\n")
    def shown(*arguments, **env): return make(clone, "show", *arguments, python3=12).stdout.splitlines()
    assert "DIFFUSION_COURSE_PRECISION=float32" in shown("PRECISION=float32") and "OMP_WAIT_POLICY=PASSIVE" in shown()
    assert not any(line.startswith("DIFFUSION_COURSE_PRECISION") for line in shown())
    assert "OMP_WAIT_POLICY=ACTIVE" in shown("OMP_WAIT_POLICY=ACTIVE")


@pytest.mark.parametrize("path", sorted((ROOT / "tools").glob("*.py")), ids=lambda p: p.name)
def test_tools_let_waiting_threads_sleep(path):
    "The setting counts only before torch is imported."
    text = path.read_text(encoding="utf-8")
    imports = [text.find(f"\n{word} {name}") for word in ("import", "from") for name in ("torch", "diffusion_course", "execnb")]
    if any(i >= 0 for i in imports): assert 0 < text.find('OMP_WAIT_POLICY') < min(i for i in imports if i >= 0)
