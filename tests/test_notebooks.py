"The notebooks are the single source: of the modules, of the README, and of what the site shows."
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import NOTEBOOKS, ROOT

BIN = Path(sys.executable).parent
LESSONS = [p for p in NOTEBOOKS if re.match(r"L\d_", p.name)]


def nbdev(command, folder):
    done = subprocess.run([str(BIN / command)], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} failed\n{done.stdout}\n{done.stderr}"


def tree(folder, pattern):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob(pattern)) if "__pycache__" not in p.parts}


def test_export_into_an_emptied_folder_gives_every_module(copy):
    shipped = ROOT / "diffusion_course"
    for module in (copy / "diffusion_course").glob("*.py"): module.unlink()
    nbdev("nbdev_export", copy)
    want, got = tree(shipped, "*.py"), tree(copy / "diffusion_course", "*.py")
    assert sorted(got) == sorted(want), "a module without its notebook, or the other way round"
    for name in want: assert got[name] == want[name], f"{name} is stale: run nbdev_export"


def test_notebooks_are_clean(copy):
    before = tree(ROOT / "nbs", "*.ipynb")
    nbdev("nbdev_clean", copy)
    dirty = [name for name, text in tree(copy / "nbs", "*.ipynb").items() if before[name] != text]
    assert not dirty, f"run nbdev_clean: {dirty}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_fit_to_commit(path):
    nb = json.loads(path.read_text(encoding="utf-8"))
    ids = [cell["id"] for cell in nb["cells"]]
    assert len(ids) == len(set(ids))
    assert "widgets" not in nb["metadata"], "live widget state must not be committed"
    assert path.stat().st_size < 1_000_000
    title = next(cell for cell in nb["cells"] if cell["cell_type"] == "markdown")
    lines = [line for line in "".join(title["source"]).splitlines() if line.strip()]
    assert lines[0].startswith("# ") and all(line[:1] in "#>-" for line in lines), "nbdev drops other text in the title cell"
    outputs = [output for cell in nb["cells"] for output in cell.get("outputs", [])]
    assert all(output["output_type"] != "error" for output in outputs)
    assert not any("stderr" == output.get("name") for output in outputs), "a cell warns"
    assert str(ROOT) not in path.read_text(encoding="utf-8"), "a path of this machine"


def shows_picture(cell):
    return any("image/png" in o.get("data", {}) or "<img" in "".join(o.get("data", {}).get("text/html", "")) for o in cell.get("outputs", []))


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_lesson_is_committed_executed(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert sum(map(shows_picture, cells)) >= 5, "run `make lessons`"
    text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown").lower()
    for part in ("what you will make", "predict", "failure", "exercise", "summary", "references"): assert part in text, f"no '{part}'"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_figure_has_a_text(path):
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if not shows_picture(cell): continue
        source, html = "".join(cell["source"]), "".join("".join(o.get("data", {}).get("text/html", "")) for o in cell["outputs"])
        assert "#| fig-alt:" in source or re.search(r'alt="[^"]{10,}"', html), source[:200]


def test_readme_is_the_front_page():
    spec = importlib.util.spec_from_file_location("readme", ROOT / "tools" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "README.md").read_text(encoding="utf-8") == module.readme(), "run `make readme`"


def test_links_of_the_readme_resolve():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r'\]\(([^)#\s]+)', text) + re.findall(r'(?:src|href)="([^"#]+)"', text)
    assert links
    for link in links:
        if not link.startswith(("http", "data:", "mailto:")): assert (ROOT / link).exists(), link


def test_links_between_notebooks_resolve():
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
        for link, anchor in re.findall(r'\]\((?!https?://)([^)#\s]*)(#[^)\s]+)?\)', text):
            if link: assert (path.parent / link).exists(), f"{path.name}: {link}"
            if not anchor or not (link or path.name).endswith(".ipynb"): continue
            target = json.loads((path.parent / (link or path.name)).read_text(encoding="utf-8"))["cells"]
            headings = re.findall(r'^#+ +(.+)$', "\n".join("".join(c["source"]) for c in target if c["cell_type"] == "markdown"), re.M)
            slugs = {re.sub(r'[^\w\- ]', "", h.split("{#")[0]).strip().lower().replace(" ", "-") for h in headings} | {h.split("{#")[1].rstrip("}") for h in headings if "{#" in h}
            assert anchor[1:] in slugs, f"{path.name}: {link}{anchor}"
