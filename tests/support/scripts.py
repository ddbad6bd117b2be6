"""The scripts as modules, and their commands."""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

FOLDER = Path(__file__).parents[2] / "scripts"


def load(path: Path) -> ModuleType:
    """Return a script as a module; the environment variables that it sets are taken back."""
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(os.environ):
        spec.loader.exec_module(module)
    return module


SCRIPTS = {path.name: load(path) for path in sorted(FOLDER.glob("*.py"))}
# (script, command) -> class of its settings
SETTINGS = {(name, word): row[0] for name, script in SCRIPTS.items() for word, row in script.COMMANDS.items()}
