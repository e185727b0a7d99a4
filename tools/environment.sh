#!/bin/sh
# The virtual environment that `make` works in.
#   environment.sh check VENV          succeeds if VENV is whole: its Python runs, is 3.11 to 3.14 and has pip
#   environment.sh make VENV [PYTHON]  makes it and installs the pinned set; what is broken or half-made is named and made anew
set -eu
command=$1 venv=$2 wanted=${3:-}

version='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))'
runs() { "$venv/bin/python" -c "$1" >/dev/null 2>&1; }
suits() { "$1" -c "import venv, ensurepip; $version" >/dev/null 2>&1; } # Debian's Python comes without ensurepip

whats_wrong() { # with an environment that exists; nothing if all is well
    if [ -e "$venv/.making" ]; then echo "its installation was interrupted"
    elif ! runs ''; then echo "its Python is gone"
    elif ! runs "$version"; then echo "its Python is not 3.11 to 3.14"
    elif ! runs 'import pip'; then echo "it has no pip"
    fi
}

ours() { # may be removed: made by `make`, or a virtual environment in the usual place
    [ -e "$venv/.making" ] || [ -e "$venv/.ready" ] || { [ "$venv" = .venv ] && [ -f "$venv/pyvenv.cfg" ]; }
}

find_python() {
    if [ -n "$wanted" ]; then
        suits "$wanted" && { echo "$wanted"; return; }
        echo "PYTHON=$wanted is not Python 3.11 to 3.14 with venv: leave PYTHON out, or name another one" >&2; exit 1
    fi
    for python in python3 python3.14 python3.13 python3.12 python3.11; do
        suits "$python" && { echo "$python"; return; }
    done
    echo "No Python 3.11 to 3.14 with venv on the PATH: install one (python.org; Debian, Ubuntu: apt install python3-venv), or say where it is: make PYTHON=/path/to/python3" >&2
    exit 1
}

if [ "$command" = check ]; then [ -z "$(whats_wrong)" ]; exit; fi

fresh=yes
if [ -e "$venv" ] && [ -n "$(ls -A "$venv")" ]; then
    why=$(whats_wrong)
    if [ -z "$why" ]; then fresh=
    elif ! ours; then echo "$venv: $why, and 'make' did not make it. Name another folder: make VENV=…" >&2; exit 1
    else echo "$venv is broken: $why. Making it anew …"
    fi
fi
if [ -n "$fresh" ]; then
    python=$(find_python) # first of all: without one nothing is removed
    rm -rf "$venv"
    "$python" -m venv "$venv"
fi
# an environment that is not ours, because it was named by VENV, is never marked, and so never removed for being half-made
if [ -n "$fresh" ] || [ -e "$venv/.ready" ]; then touch "$venv/.making"; fi
echo "Setting up $venv (a few minutes, mostly PyTorch) …"
"$venv/bin/python" -m pip install -q -r requirements.txt
rm -f "$venv/.making"
touch "$venv/.ready"
