"""Cells of a grid, one model's answers to one question: all records and then what they are, or no result at all.

`cells/NAME.jsonl` has a line for each record, `cells/NAME.json`, which is written last, what was asked of what, and the
digest of the records. Where a cell failed, `cells/NAME.failed` says why until it is run again.
"""

import glob
import hashlib
import json
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any, TypedDict

from cepe_jax.data.records import DATASET
from cepe_jax.devices import describe
from cepe_jax.directories import staged, write_json
from cepe_jax.evaluation.readers.models import ModelConfig
from cepe_jax.evaluation.tasks.evaluation import Evaluation, Point
from cepe_jax.identity import as_json, refuse_another_run
from cepe_jax.inference.caches.retrieval_heads import FILE as HEADS
from cepe_jax.parsing import read_json, typed

SCHEMA = 2  # of the files of a cell and of results.json
REQUIRED = "id", "read", "seconds"  # in every record: its name, the tokens that were read for it, and in what time


@dataclass(frozen=True)
class Provenance:
    """The code and the devices of a process."""

    device: str
    jax: str
    python: str
    packages: dict[str, str | None]
    commit: str | None  # None outside of a checkout
    date: str


@dataclass(frozen=True)
class CellFacts(Provenance):
    """The facts of a measurement in a cell's file; a file that lacks one of these is no result."""

    tokenizer: str  # its fingerprint
    weights: str | None  # their digest
    data_digest: str | None
    mesh: dict[str, int]
    seconds: float  # of all records together
    peak_memory: int  # bytes


class Stored(TypedDict):
    """The rest of a cell's file."""

    identity: dict[str, Any]
    sha256: str  # of the records


class Failure(TypedDict):
    message: str


@dataclass(frozen=True)
class Cell:
    model: str  # as the grid calls it
    data: str
    point: Point
    model_config: ModelConfig
    evaluation: Evaluation

    @property
    def name(self) -> str:
        return ".".join([self.model, self.data, *filter(None, (self.point.kind, str(self.point.value)))])

    @property
    def identity(self) -> dict:
        """The settings that the records depend on, by their dotted names.

        The axis is not among them, so that values can be added, unless questions depend on its longest value. Metrics
        are not: they are computed from the stored records.
        """
        settings = {"model": as_json(self.model_config), "data": self.evaluation.identity()}
        return {"schema": SCHEMA, "family": self.evaluation.section} | dict(_dotted(settings))

    def path(self, out: Path, suffix: str) -> Path:
        return out / "cells" / f"{self.name}.{suffix}"


def _dotted(settings: dict, group: str = "") -> Iterable[tuple[str, object]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _dotted(value, f"{group}{name}.")
        else:
            yield f"{group}{name}", value


class Missing(ValueError):
    """A cell has no result, and why."""


def write(out: Path, cell: Cell, records: Iterable[dict], facts: Callable[[], CellFacts]) -> None:
    """Write the cell's records and facts, which are asked for after the last record.

    ValueError, and nothing is there, for records that are no result.
    """
    path, ids, digest = cell.path(out, "jsonl"), set(), hashlib.sha256()
    with staged(path) as place:
        with open(place, "wb") as file:
            for record in records:
                if lacking := [name for name in REQUIRED if name not in record]:
                    raise ValueError(f"a record of {cell.name} lacks {', '.join(lacking)}")
                if record["id"] in ids:
                    raise ValueError(f"{cell.name} has two records of {record['id']}: names must differ")
                ids.add(record["id"])
                line = f"{json.dumps(record, allow_nan=False)}\n".encode()
                digest.update(line)
                file.write(line)
        if not ids:
            raise ValueError(f"{cell.name} has no record: its data is empty")
    names = {"family": cell.evaluation.section, "model": cell.model, "data": cell.data} | cell.point._asdict()
    counts = {"records": len(ids), "sha256": digest.hexdigest()}
    result = {"schema": SCHEMA, "name": cell.name} | names | counts | vars(facts()) | cell.evaluation.facts()
    write_json(cell.path(out, "json"), result | {"identity": cell.identity})


def read(out: Path, cell: Cell) -> tuple[dict, list[dict]]:
    """The facts and the records of a finished cell; Missing for one that is not, or whose files are no result.

    ValueError for one of the same name that was run with other settings.
    """
    path, records = cell.path(out, "json"), cell.path(out, "jsonl")
    failed = cell.path(out, "failed")
    try:
        if not path.exists():
            raise Missing(read_json(failed, Failure)["message"] if failed.exists() else "not run yet")
        facts = read_json(path, mend="run it again")
        typed(facts, Stored, str(path), "run it again")
    except ValueError as error:
        raise Missing(str(error)) from None
    # Older files have settings, too, that the evaluation does not read: no record depends on them.
    identity = {name: value for name, value in facts["identity"].items() if name in cell.identity}
    refuse_another_run(path, identity, cell.identity)
    if lacking := CellFacts.__dataclass_fields__.keys() - facts.keys():
        raise Missing(f"{path} lacks {', '.join(sorted(lacking))}: run it again")
    content = records.read_bytes() if records.exists() else b""
    if hashlib.sha256(content).hexdigest() != facts["sha256"]:
        raise Missing(f"{records} is not what was measured: run it again")
    return facts, [json.loads(line) for line in content.splitlines()]


def write_failure(out: Path, cell: Cell, message: str, trace: str) -> None:
    write_json(cell.path(out, "failed"), {"name": cell.name, "message": message, "traceback": trace})


def provenance() -> Provenance:
    """Return what computes in this process, and by which code."""
    import jax

    packages = {name: _version(name) for name in ("cepe-jax", "jaxlib", "flax", "numpy")}
    python, today = platform.python_version(), date.today().isoformat()
    return Provenance(describe(), jax.__version__, python, packages, _commit(), today)


def weights_of(model: ModelConfig) -> str | None:
    """Return the digest that stands beside the weights in our format, with that of the heads that Razor selects.

    None of other formats: it would take reading all weights.
    """
    hashes, heads = model.path / "hash.json", model.path / HEADS
    if not hashes.exists():
        return None
    digest = read_json(hashes)["all"]
    if model.cache.kind == "razor" and heads.exists():
        digest += f" {hashlib.sha256(heads.read_bytes()).hexdigest()}"
    return digest


def data_at(evaluation: Evaluation, out: Path) -> str | None:
    """Return a digest of what is asked about, None if a place is missing.

    Of a dataset it is that of its index, which has the digests of its records; of other files that of their names,
    sizes and times, except of files below `out`.
    """
    digest = hashlib.sha256()
    for place in evaluation.places():
        if not place.exists():
            return None
        if (place / DATASET).exists():
            digest.update((place / DATASET).read_bytes())
            continue
        # As `data.sources.plan`, into folders that are links.
        inside = glob.glob("**", root_dir=place, recursive=True, include_hidden=True) if place.is_dir() else [""]
        for name in sorted(inside):
            path = place / name
            if path.is_file() and not path.resolve().is_relative_to(out.resolve()):
                facts = path.stat()
                digest.update(f"{name!a} {facts.st_size} {facts.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None  # run from a checkout


def _commit() -> str | None:
    """Return the commit of the checkout that this file is in, and whether it has changes; None outside of one."""
    root = Path(__file__).parents[3]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or None
