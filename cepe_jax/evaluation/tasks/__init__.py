"""The evaluations. Every file of this folder is imported: one that registers a family of tasks adds it."""

import importlib
import pkgutil

for module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(module.name)
