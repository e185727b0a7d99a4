"Everything of the docs site short of Quarto itself: nbdev's processing, and the references in `_quarto.yml`."
import json
import re
import subprocess
import sys

import nbformat
import pytest
import yaml

from conftest import NOTEBOOKS, ROOT


def hrefs(node):
    if isinstance(node, str): yield node
    elif isinstance(node, list):
        for item in node: yield from hrefs(item)
    elif isinstance(node, dict):
        for key, value in node.items():
            if key in ("href", "file", "contents"): yield from hrefs(value)


def names(): return {path.relative_to(ROOT / "nbs").as_posix() for path in NOTEBOOKS}


def test_sidebar_lists_every_notebook():
    config = yaml.safe_load((ROOT / "_quarto.yml").read_text())
    assert {h for h in hrefs(config["website"]["sidebar"]["contents"]) if h.endswith(".ipynb")} == names()
    assert "nbdev.yml" in config["metadata-files"]
    assert (ROOT / "nbs/_quarto.yml").resolve() == (ROOT / "_quarto.yml").resolve()


@pytest.fixture(scope="module")
def processed(copy):
    code = "from nbdev.quarto import refresh_quarto_yml; refresh_quarto_yml(); from nbdev.serve import proc_nbs; proc_nbs(n_workers=0, force=True)"
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (copy / "nbs/nbdev.yml").read_text() == (ROOT / "nbs/nbdev.yml").read_text(), "commit nbs/nbdev.yml"
    return copy / "_proc"


def test_every_notebook_is_ready_for_quarto(processed):
    pages = sorted(processed.rglob("*.ipynb"))
    assert {p.relative_to(processed).as_posix() for p in pages} == names()
    assert (processed / "_quarto.yml").is_file() and (processed / "nbdev.yml").is_file()
    for page in pages:
        nb = nbformat.from_dict(json.loads(page.read_text()))
        for cell in nb.cells: cell.pop("has_sd", None) # nbdev marks its show_doc cells with a key that the format does not know
        nbformat.validate(nb)
        front = yaml.safe_load("".join(nb.cells[0].source).strip().strip("-"))
        assert nb.cells[0].cell_type == "raw" and front["title"] and front["output-file"].endswith(".html")
        for cell in nb.cells:
            assert not re.search(r"^#\| *(default_exp|export|hide)\b", "".join(cell.source), re.M), (page.name, cell.source)
            assert all(output.output_type != "error" for output in cell.get("outputs", [])), (page.name, cell.source)
