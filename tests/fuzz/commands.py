"""Commands that run to their end with a setting that is spoiled, and datasets whose unfinished parts are."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
from support import datasets
from support.scripts import SCRIPTS, SETTINGS

from cepe_jax.data.corpus import PrepareConfig, prepare
from cepe_jax.data.records import DATASET, TFDS_FILES, Records
from cepe_jax.settings import parse
from cepe_jax.weights.convert import to_jax
from cepe_jax.weights.source import open_ours
from fuzz.kind import KINDS, Kind, same, spoil_bytes, spoil_json
from fuzz.models import make_hf
from fuzz.mutations import TEXTS, Rng, pick
from fuzz.settings import settings_in

# Script, command, and arguments below the directory of the case. One process works on each dataset.
LINES = [
    ("convert.py", "to-jax", ["{}/hf", "{}/out"]),
    ("convert.py", "to-hf", ["{}/ours", "{}/out"]),
    ("convert.py", "verify", ["{}/ours"]),
    (
        "prepare_data.py",
        "",
        ["--input={}/texts", "--out={}/out", "--tokenizer={}/docs", "--workers=1", "--test_fraction=0.2"],
    ),
    ("prepare_data.py", "sample", ["--data={}/docs", "--out={}/out", "--kind=packed", "--length=16", "--workers=1"]),
]
SPLITS = "train", "retrieval", "test"


def make_texts(to: Path) -> None:
    to.mkdir(parents=True)
    for number in range(12):
        (to / f"{number}.txt").write_text("".join(chr(97 + (number + i * i) % 26) for i in range(300)))


def prepared(place: Path) -> PrepareConfig:
    """Return the settings of a dataset in two units."""
    shares = {"test_fraction": 0.2, "retrieval_fraction": 0.2, "unit_bytes": 2000, "workers": 1}
    return PrepareConfig(input=place / "texts", out=place / "docs", tokenizer=str(place / "tokenizer"), **shares)


def make_unfinished(to: Path) -> None:
    """Write a dataset whose units are finished, and which is not registered."""
    make_texts(to / "texts")
    (to / "tokenizer").mkdir()
    datasets.make_tokenizer(to / "tokenizer")
    prepare(prepared(to))
    for name in (*TFDS_FILES, DATASET, "report.md"):
        (to / "docs" / name).unlink()


def spoil_unfinished(place: Path, rng: Rng) -> list[str]:
    """Change the mark of a unit, the identity, a shard or its lengths."""
    files = sorted(path for path in (place / "docs").rglob("*") if path.is_file())
    path = pick(rng, files + [file for file in files if file.suffix == ".json"] * 3)
    return spoil_json(path, rng) if path.suffix == ".json" else spoil_bytes(path, rng)


def finish(place: Path) -> dict[str, bytes | str]:
    """Return what the finished dataset holds: its files, and of its index what does not name its place."""
    prepare(prepared(place))
    docs = place / "docs"
    paths = [path for path in docs.iterdir() if path.is_file() and path.suffix != ".json"]
    files = {path.name: str(np.load(path)) if path.suffix == ".npy" else path.read_bytes() for path in paths}
    index = json.loads((docs / DATASET).read_text())
    return files | {"index": json.dumps([index[name] for name in ("name", "tokenizer", "splits")])}


KINDS["unfinished dataset"] = Kind(make_unfinished, spoil_unfinished, finish, same)


def make_commands(to: Path) -> None:
    make_unfinished(to / "made")
    prepare(prepared(to / "made"))
    for name in ("texts", "docs"):
        shutil.move(to / "made" / name, to / name)
    shutil.rmtree(to / "made")
    (to / "hf").mkdir()
    make_hf(to / "hf")
    to_jax(to / "hf", to / "ours")


def spoil_line(place: Path, rng: Rng) -> list[str]:
    """Choose a command, one of its settings and a text for it."""
    script, word, arguments = pick(rng, LINES)
    names = [name for name, _ in settings_in(SETTINGS[script, word]) if name != "workers"]
    case = {"script": script, "word": word, "arguments": arguments, "name": pick(rng, names), "text": pick(rng, TEXTS)}
    (place / "case.json").write_text(json.dumps(case))
    words = [case["name"], case["name"].rpartition(".")[2], *filter(None, [case["text"][:50]])]
    return [*words, "test_fraction"]  # another seed may draw no document for a split


def run_line(place: Path):
    """Run the command and return its settings; None for no command."""
    if not (place / "case.json").exists():
        return None
    case = json.loads((place / "case.json").read_text())
    config_class, function = SCRIPTS[case["script"]].COMMANDS[case["word"]]
    arguments = [argument.format(place) for argument in case["arguments"]]
    places = list(getattr(config_class, "POSITIONALS", ()))
    named = [f"--{place}={argument}" for place, argument in zip(places, arguments, strict=False)] or arguments
    kept = [argument for argument in named if not argument.startswith(f"--{case['name']}=")]
    config = parse(config_class, [*kept, f"--{case['name']}={case['text']}"])
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            function(config)
    except ValueError:
        if (config.out if hasattr(config, "out") else place / "none").exists():  # an unfinished dataset stays
            shutil.rmtree(config.out)
        raise
    return config


def wrong_line(place: Path, config, whole: None) -> str:
    """What a command has written must be whole and, of a model, hold the tensors that its source has."""
    if config is None:
        return ""
    case = json.loads((place / "case.json").read_text())
    if case["word"] == "verify":
        return ""
    if case["script"] == "prepare_data.py":
        splits = SPLITS if not case["word"] else ("train",)
        records = [list(Records(config.out, split)) for split in splits if _has(config.out, split)]
        return "" if any(records) else "no record"
    target = config.target
    if case["word"] == "to-hf":
        to_jax(target, place / "again")
        target = place / "again"
    found, expected = (json.loads((path / "hash.json").read_text())["tensors"] for path in (target, place / "ours"))
    open_ours(target).verify()
    if getattr(config, "dtype", None) in (None, "float32"):
        return "" if found == expected else "other tensors"
    return "" if found.keys() == expected.keys() else "tensors of other names"


def _has(path: Path, split: str) -> bool:
    return json.loads((path / DATASET).read_text())["splits"].get(split, {}).get("records", 0) > 0


KINDS["real command lines"] = Kind(make_commands, spoil_line, run_line, wrong_line)
