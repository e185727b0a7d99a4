"Everything of the docs site short of Quarto itself: nbdev's processing, and the references in `_quarto.yml`."
import html
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


def in_order(node):
    "The notebooks of the sidebar from top to bottom: the order in which the site's previous and next links run."
    return [h for h in hrefs(node) if h.endswith(".ipynb")]


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


def test_the_site_shows_the_code_that_the_lessons_explain(processed):
    "nbdev leaves out `export` cells; `exports` keeps them. A lesson without its code would be a summary."
    for path in NOTEBOOKS:
        exported = [cell["source"] for cell in json.loads(path.read_text())["cells"] if "".join(cell["source"]).startswith("#| export")]
        shown = "\n".join("".join(cell["source"]) for cell in json.loads((processed / path.relative_to(ROOT / "nbs")).read_text())["cells"])
        for name in re.findall(r"^(?:def|class) ([a-zA-Z]\w*)", "\n".join(map("".join, exported)), re.M):
            assert re.search(rf"^(def|class) {name}\b", shown, re.M), f"{path.name}: {name} is not on the page; start its cell with #| exports"


def test_the_lessons_follow_each_other():
    config = yaml.safe_load((ROOT / "_quarto.yml").read_text())["website"]
    assert config["page-navigation"] is True and config["navbar"]["search"] is True
    pages = in_order(config["sidebar"]["contents"])
    assert pages[:8] == ["index.ipynb", "L1_Sampling.ipynb", "L2_Training.ipynb", "L3_Context.ipynb", "L4_FastSampling.ipynb", "L5_FlowMatching.ipynb", "L6_FewSteps.ipynb", "L7_Editing.ipynb"]
    assert len(pages) == len(set(pages))
    assert all((ROOT / "nbs" / item["href"]).is_file() for item in config["navbar"]["left"])


def test_no_asset_from_another_host():
    "Pages may link to the world, but nothing is loaded from it: no image, script, style or font."
    config = yaml.safe_load((ROOT / "_quarto.yml").read_text())["format"]["html"]
    assert config["html-math-method"] == "mathml" and set(config["theme"]) == {"light", "dark"}
    assert "http" not in (ROOT / "nbs" / config["css"]).read_text() and "@import" not in (ROOT / "nbs" / config["css"]).read_text()
    loads = re.compile(r"""(?:src|srcset)=["'](?:https?:)?//|<link[^>]+href=["'](?:https?:)?//|@import|url\(["']?https?:|!\[[^\]]*\]\(https?:""")
    for path in NOTEBOOKS:
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            texts = ["".join(cell["source"])] if cell["cell_type"] == "markdown" else []
            texts += ["".join(o.get("data", {}).get(kind, "")) for o in cell.get("outputs", []) for kind in ("text/html", "text/markdown")]
            for text in texts: assert not loads.search(text), f"{path.name}: {loads.search(text)[0]}"


def test_every_page_can_be_rendered(processed, monkeypatch):
    "The pages as Quarto receives them, through another renderer: well-formed, with a title and every figure in place."
    from nbconvert import HTMLExporter
    from nbconvert.filters import Highlight2HTML
    monkeypatch.setattr(Highlight2HTML, "__call__", lambda self, source, *_, **__: html.escape(source)) # colours in code take most of the time
    for path in sorted(processed.rglob("*.ipynb")):
        page, _ = HTMLExporter(template_name="basic").from_filename(str(path))
        assert "Traceback (most recent call last)" not in page, path.name
        for source in re.findall(r'<img[^>]+src="([^"]+)"', page):
            assert source.startswith("data:image/") or (path.parent / source).exists(), f"{path.name}: {source[:60]}"
