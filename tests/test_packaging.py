"""The wheel and the editable install bring whiten_layers.models beside a foreign folder called models."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from .helpers import mostly_slow

ROOT = Path(__file__).parent.parent
NETWORKS = ("resnet_cifar", "resnet_imagenet", "video")

# Without the environment's own .pth files, among which may be an editable install of this library.
PROGRAM = """
import site, sys
sys.path[:0] = [""]
site.addsitedir(sys.argv[1])
sys.path.append(sys.argv[2])
import models
assert models.owner == "user"
import whiten_layers, whiten_layers.models, whiten_layers.inverse, whiten_layers.transforms
assert whiten_layers.models.whitened_resnet20()
print(whiten_layers.__file__, whiten_layers.models.__file__, sep="\\n")
"""


@pytest.fixture
def source(tmp_path):
    copy = tmp_path / "source"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in ("whiten_layers", "models"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignore)
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.mark.parametrize("editable", mostly_slow([False, True], [False]), ids=["wheel", "editable"])
def test_an_install_stands_beside_a_users_own_models(tmp_path, source, editable):
    target, project = tmp_path / "site", tmp_path / "project"
    (project / "models").mkdir(parents=True)
    (project / "models" / "__init__.py").write_text("owner = 'user'\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    options = ["--no-deps", "--no-build-isolation"]
    if editable:
        subprocess.run([*pip, "install", *options, "--target", target, "-e", source], check=True)
    else:
        subprocess.run([*pip, "wheel", *options, "-w", tmp_path, source], check=True)
        (wheel,) = tmp_path.glob("whiten_layers-*.whl")
        subprocess.run([*pip, "install", *options, "--target", target, wheel], check=True)
        installed = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
        assert {"whiten_layers/py.typed", *(f"whiten_layers/models/{name}.py" for name in NETWORKS)} <= installed
        assert not (target / "models").exists()
    command = [sys.executable, "-I", "-S", "-c", PROGRAM, str(target), sysconfig.get_path("purelib")]
    result = subprocess.run(command, cwd=project, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    library, models = map(Path, result.stdout.split())
    home = source if editable else target
    assert library.is_relative_to(home) and models.is_relative_to(home)


def test_a_bare_import_of_models_works_from_a_checkout():
    program = "import models, whiten_layers; assert models.whitened_resnet20()"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
