import json
from pathlib import Path
from typing import Any


def results(folder: Path) -> dict[str, Any]:
    """What a benchmark has written of itself."""
    return json.loads((folder / "results.json").read_text())
