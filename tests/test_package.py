"What is shipped: metadata, a wheel that works where nothing but it is installed, and no heavy import where none is needed."
import importlib.metadata
import json
import subprocess
import sys
import sysconfig
import zipfile
from configparser import ConfigParser

import pytest

import diffusion_course
from conftest import ROOT


def settings():
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def test_one_version_everywhere():
    version = settings()["version"]
    assert diffusion_course.__version__ == version == importlib.metadata.version("diffusion_course")
    assert version in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_requirements_are_pinned_and_complete():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[-1] == "-e ." and all("==" in line for line in lines[:-1])
    pinned = {line.split("==")[0].lower() for line in lines[:-1]}
    wanted = {name.split(">")[0].split("=")[0].split("<")[0].lower() for key in ("requirements", "dev_requirements") for name in settings()[key].split()}
    assert wanted <= pinned, f"not pinned: {wanted - pinned}"


def test_import_is_light():
    code = "import sys, diffusion_course; print([m for m in ('torch', 'numpy', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.fixture(scope="module")
def wheel(copy):
    "A wheel built from the sdist, as a user of the package index gets it"
    def run(*command): subprocess.run([sys.executable, *command], cwd=copy, check=True, capture_output=True)
    run("setup.py", "-q", "sdist", "-d", "dist")
    sdist, = (copy / "dist").glob("*.tar.gz")
    run("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "dist", str(sdist))
    built, = (copy / "dist").glob("*.whl")
    return built


def test_wheel_carries_models_and_licence(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for model in (ROOT / "diffusion_course/pretrained").glob("*.safetensors"): assert f"diffusion_course/pretrained/{model.name}" in names
    assert any(name.endswith("LICENSE") for name in names)
    assert not any(name.startswith(("tests/", "nbs/", "benchmarks/", "tools/")) for name in names)


SAMPLE = """
import json, sys, diffusion_course
from diffusion_course.checkpoints import pretrained
from diffusion_course.context import one_hot
from diffusion_course.sampling import clipped, predictor, sample
net, schedule = pretrained("sprites")
images = sample(clipped(predictor(net, schedule, one_hot("food")), schedule), schedule, 2, steps=10)
print(json.dumps([diffusion_course.__file__, list(images.shape), bool(images.isfinite().all())]))
"""


def test_wheel_samples_in_an_environment_of_its_own(wheel, tmp_path):
    "The environment holds the wheel alone; its requirements are read from this one, because they are gigabytes"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "--disable-pip-version-check", wheel], check=True)
    site = next((tmp_path / "env").glob("lib/*/site-packages"))
    (site / "requirements.pth").write_text(sysconfig.get_paths()["purelib"])
    done = subprocess.run([python, "-c", SAMPLE], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    file, shape, finite = json.loads(done.stdout)
    assert file.startswith(str(site)) and shape == [2, 3, 16, 16] and finite
