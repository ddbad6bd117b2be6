"""All kinds of input that are spoiled: each module adds its own."""

from fuzz import commands, models, runs, settings, texts  # noqa: F401
from fuzz.kind import KINDS  # noqa: F401
