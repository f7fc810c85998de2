"""torch.hub finds every builder in a checkout that nothing is installed from."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch
import whiten_layers.models

ROOT = Path(__file__).parent.parent

# Without the environment's own .pth files, among which may be an editable install of this library; and from a
# folder whose own `models` is imported before.
PROGRAM = """
import sys
sys.path[:0] = [""]
sys.path.append(sys.argv[1])
import models
import torch
torch.hub.set_dir("hub")
arguments = dict(skip_validation=True, trust_repo=True)
print(*torch.hub.list("owner/repo:main", **arguments))
assert "ResNet-50" in torch.hub.help("owner/repo:main", "whitened_resnet50", **arguments)
networks = [torch.hub.load("owner/repo:main", "whitened_resnet20", num_classes=7, verbose=False, **arguments)]
networks.append(torch.hub.load("hub/owner_repo_main", "whitened_resnet18", source="local", num_classes=7))
for network in networks:
    network(torch.randn(2, 3, 32, 32)).sum().backward()
    assert type(network.fc).__name__ == "WhitenedLinear" and network.fc.out_features == 7
assert models.owner == "user" and sys.modules["models"] is models
import whiten_layers.models
print(whiten_layers.__file__, whiten_layers.models.__file__)
"""


def test_a_bare_checkout_beside_a_users_own_models(tmp_path):
    checkout = tmp_path / "hub" / "owner_repo_main"  # where torch.hub keeps what it has downloaded
    for folder in ("whiten_layers", "models"):
        shutil.copytree(ROOT / folder, checkout / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "hubconf.py", checkout)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("owner = 'user'\n")
    command = [sys.executable, "-I", "-S", "-c", PROGRAM, sysconfig.get_path("purelib")]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    builders, files = result.stdout.splitlines()
    assert builders.split() == sorted(whiten_layers.models.__all__)
    assert all(Path(file).is_relative_to(checkout) for file in files.split())


def test_beside_the_library_that_is_imported_already():
    before = list(whiten_layers.__path__)
    network = torch.hub.load(ROOT, "whitened_resnet20", source="local")
    assert type(network) is whiten_layers.models.resnet_cifar.CifarResNet and whiten_layers.__path__ == before
