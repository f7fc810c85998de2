"""torch.hub's entry points: every builder of `whiten_layers.models`, from a checkout that nothing is installed from."""

import importlib.util
import pathlib

import whiten_layers

dependencies = ["torch", "torchvision", "einops"]

# A checkout has models/ beside the library, not in it, and a bare `import models` may find the user's own. (A library
# that was imported before, from elsewhere, has its own and is the one that is used.)
if importlib.util.find_spec("whiten_layers.models") is None:
    whiten_layers.__path__.append(str(pathlib.Path(whiten_layers.__file__).parent.parent))

from whiten_layers.models import *  # noqa: E402, F403
