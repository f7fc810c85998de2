"""Entry points for torch.hub: every builder of `whiten_layers.models`, from a checkout that is not installed."""

import importlib.util
import pathlib

import whiten_layers

dependencies = ["torch", "torchvision", "einops"]

# A checkout has models/ beside the library, not in it, and a bare `import models` may find the user's own. (If the
# library was already imported from elsewhere, that copy is used, with its own models.)
if importlib.util.find_spec("whiten_layers.models") is None:
    whiten_layers.__path__.append(str(pathlib.Path(whiten_layers.__file__).parent.parent))

from whiten_layers.models import *  # noqa: E402, F403
