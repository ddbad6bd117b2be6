"""The house: rooms stand in import order, and heavy or foreign libraries stay where they belong."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import cepe_jax

ROOT = Path(cepe_jax.__file__).parent
ROOMS = (
    "model",
    "data",
    "weights",
    "training",
    "selection",
    "inference",
    "evaluation",
    "tracing",
    "benchmarks",
)  # in order of import
TREES = {
    ".".join(("cepe_jax", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): ast.parse(
        path.read_text()
    )
    for path in sorted(ROOT.rglob("*.py"))
}


def room(module: str) -> int:
    """Where the module stands: 0 for the files at the root, then the rooms in order, then the package's own names."""
    parts = module.split(".")
    if len(parts) == 1:
        return 1 + len(ROOMS)
    if parts[1] not in ROOMS and f"cepe_jax.{parts[1]}" in TREES and len(parts) == 2:
        return 0
    return 1 + ROOMS.index(parts[1])


def imports(module: str) -> set[str]:
    """Full names of what the module imports, anywhere in it; `from a import b` is a.b where that is our module."""
    found = set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            found |= {full if (full := f"{node.module}.{a.name}") in TREES else node.module for a in node.names}
    return found


def ours(module: str) -> set[str]:
    return {name for name in imports(module) if name.split(".")[0] == "cepe_jax"}


def users(*libraries: str) -> set[str]:
    """Our modules that import one of these libraries."""
    return {m for m in TREES if {name.split(".")[0] for name in imports(m)} & set(libraries)}


@pytest.mark.parametrize("module", TREES)
def test_rooms_import_only_rooms_above(module):
    for other in ours(module):
        assert other in TREES, f"{module} imports {other}, which does not exist"
        assert room(other) <= room(module), f"{module} imports {other} from a room below it"


def test_inference_needs_no_training():
    assert not {name for m in TREES if m.startswith("cepe_jax.inference") for name in ours(m) if ".training" in name}


def test_single_methods_are_optional():
    """A method of its own uses the house; what every user loads does not import it."""
    methods = "selection", "tracing"
    for module in TREES:
        if module.split(".")[1:2] in (["model"], ["training"], ["inference"]) and module.split(".")[-1] not in methods:
            assert not {name for name in ours(module) if set(name.split(".")) & set(methods)}, module


def test_every_folder_is_a_known_room():
    folders = {path.parent.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py")}
    assert folders <= {
        ".",
        *ROOMS,
        "inference/caches",
        *(f"evaluation/{name}" for name in ("readers", "tasks", "sweep")),
    }


def test_no_cycles():
    graph = {module: ours(module) - {module} for module in TREES}
    assert list(graphlib.TopologicalSorter(graph).static_order())


def test_config_knows_nothing_of_ours():
    assert not ours("cepe_jax.config")


def test_libraries_stay_in_their_room():
    assert users("torch") <= {"cepe_jax.weights.huggingface", "cepe_jax.weights.files"}
    assert users("gguf") == {"cepe_jax.weights.gguf"}
    assert users("sklearn") == {"cepe_jax.selection.coreset"}
    assert users("lm_eval") <= {"cepe_jax.evaluation.adapters", "cepe_jax.evaluation.harness"}
    assert users("orbax") <= {"cepe_jax.weights.checkpoint"}
    of_data = "grain", "array_record", "tensorflow_datasets", "bm25s", "backports", "sentencepiece", "tokenizers"
    assert all(m.startswith(("cepe_jax.data.", "cepe_jax.benchmarks.")) for m in users(*of_data))
    assert not users("tensorflow", "transformers")


def test_mesh_axes_are_named_in_sharding_alone():
    """ "data" and "context" are words of other trades too; these two are not."""
    named = {
        module
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value in ("fsdp", "tensor")
    }
    assert named == {"cepe_jax.sharding"}


@pytest.mark.parametrize(
    ("modules", "unwanted"),
    [
        ("cepe_jax", {"jax", "flax"}),
        ("cepe_jax.exits", {"jax", "draccus"}),
        ("cepe_jax.commands", {"jax", "numpy"}),
        ("cepe_jax.model.cepe", {"orbax"}),
        ("cepe_jax.training.stages, cepe_jax.inference.text", set()),
    ],
)
def test_imports_are_light(modules, unwanted):
    """What reads data, draws or belongs to another framework is imported where it is used."""
    program = f"import sys, {modules}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "cepe_jax" in loaded
    heavy = {"torch", "tensorflow", "transformers", "grain", "tensorflow_datasets", "bm25s", "matplotlib", "sklearn"}
    assert not loaded & (heavy | unwanted)
