"""torch.hub's entry points: every builder of `whiten_layers.models`, from a checkout that nothing is installed from."""

import pathlib
import sys

import whiten_layers

dependencies = ["torch", "torchvision", "einops"]

# A checkout has models/ beside the library, not in it, and a bare `import models` may find the user's own.
_library = pathlib.Path(whiten_layers.__file__).parent
if "whiten_layers.models" not in sys.modules and not (_library / "models").exists():
    whiten_layers.__path__.append(str(_library.parent))

from whiten_layers.models import *  # noqa: E402, F403
