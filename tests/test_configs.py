"""Every committed config and every command that we show parses, and those that train find the data made before them."""

import ast
import dataclasses
import importlib.util
import re
import shlex
import sys
from itertools import takewhile
from pathlib import Path

import numpy as np
import pytest
from support import datasets
from support.models import make_cepe, make_decoder, make_encoder

from cepe_jax.benchmarks.compiled import CompileConfig, without_files
from cepe_jax.benchmarks.data import DataBenchmarkConfig
from cepe_jax.benchmarks.inference import InferenceBenchmarkConfig
from cepe_jax.benchmarks.training import MemoryConfig, TrainBenchmarkConfig
from cepe_jax.cli import decode, parse, read_yaml, take
from cepe_jax.config import DECODERS, ENCODERS
from cepe_jax.data.corpus import PrepareConfig
from cepe_jax.data.retrieval import RetrieveConfig
from cepe_jax.data.sampling import SampleConfig
from cepe_jax.evaluation.gains import GainsConfig
from cepe_jax.evaluation.harness import HarnessConfig
from cepe_jax.evaluation.sweep.grid import PerplexityRun, SweepConfig, TaskRun
from cepe_jax.evaluation.sweep.report import ReportConfig
from cepe_jax.inference.terminal import GenerateConfig
from cepe_jax.training.settings import TrainConfig
from cepe_jax.training.stages import run_stage
from cepe_jax.training.teacher import TeacherConfig, features_of
from cepe_jax.weights.directory import save

ROOT = Path(__file__).parents[1]
CLASSES = {  # of a script, or of a script and its command
    "prepare_data.py": PrepareConfig,
    "prepare_data.py sample": SampleConfig,
    "prepare_data.py retrieve": RetrieveConfig,
    "prepare_data.py teacher": TeacherConfig,
    "benchmark.py data": DataBenchmarkConfig,
    "benchmark.py train": TrainBenchmarkConfig,
    "benchmark.py memory": MemoryConfig,
    "benchmark.py inference": InferenceBenchmarkConfig,
    "compile_tpu.py": CompileConfig,
    "train.py": TrainConfig,
    "evaluate.py perplexity": PerplexityRun,
    "evaluate.py tasks": TaskRun,
    "evaluate.py sweep": SweepConfig,
    "evaluate.py harness": HarnessConfig,
    "evaluate.py gains": GainsConfig,
    "evaluate.py report": ReportConfig,
    "generate.py": GenerateConfig,
}
AMONG_TRAINING = "benchmark.py train", "benchmark.py memory", "compile_tpu.py"  # its settings too
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
# In the order in which what one makes is read by another.
FOLDERS = "weights", "data", "training", "inference", "evaluation", "benchmarks"
PAGES = [ROOT / place / "README.md" for place in ("", *(f"cepe_jax/{name}" for name in FOLDERS), "scripts", "configs")]


def shown_commands() -> dict[str, str]:
    """Where a command stands -> the command line, for each that starts a Python script of ours."""
    shown = {path.name: path.read_text().splitlines()[0].removeprefix("# ") for path in CONFIGS}
    for page in (*PAGES, *sorted((ROOT / "scripts").glob("*.py"))):
        name, text = str(page.relative_to(ROOT)), page.read_text()
        if name.endswith(".py"):
            text = f"```bash\n{ast.get_docstring(ast.parse(text))}\n```\n"
        blocks = re.findall(r"^ *```(?:bash|sh|shell|console)\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
        lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
        found = [line[line.index("python scripts/") :] for line in lines if "python scripts/" in line]  # after srun too
        found += [words.replace(",", " ") for words in re.findall(r"command: \[(python, .*?)\]", text, re.DOTALL)]
        shown |= {f"{name}:{number} {line[:60]}": line for number, line in enumerate(found)}
    quickstart = (ROOT / "scripts" / "quickstart.sh").read_text().replace("\\\n", " ")
    for filled, value in (("$seed", "0"), ('"${more[@]}"', "--steps=9"), (">/dev/null", "")):
        quickstart = quickstart.replace(filled, value)
    for line in re.findall(r"^ *stage .*", quickstart, re.MULTILINE):
        name, script, rest = re.match(r" *stage (\S+) \S+ (\S+) (.*)", line).groups()
        shown[f"quickstart.sh:{name}"] = f"python scripts/{script} {rest}"
    return shown


COMMANDS = shown_commands()
TRAINING = [where for where in COMMANDS if "README.md:" in where and "scripts/train.py" in COMMANDS[where]]
CARRIED = {"../bucket/data": "data", "/bucket/data": "data", "DIR": "data"}  # what was made at one place, at another


@pytest.fixture
def parse_command(monkeypatch):
    """The configuration of a command line, or what convert.py would do; nothing is run."""
    monkeypatch.chdir(ROOT)

    def parse_command(command: str):
        words = shlex.split(command, comments=True)
        while "=" in words[0]:  # FOO=bar python ...
            words.pop(0)
        assert Path(words[0]).name == "python"
        assert words[1].startswith("scripts/")
        assert (ROOT / words[1]).is_file()
        script = Path(words.pop(1)).name
        if script != "convert.py":
            if f"{script} {words[1]}" in CLASSES:
                script = f"{script} {words.pop(1)}"
            monkeypatch.setattr(sys, "argv", words)
            if script in AMONG_TRAINING:
                return take(CLASSES[script]), parse(TrainConfig, without_files)
            return parse(CLASSES[script])
        monkeypatch.setattr(sys, "argv", words)
        spec = importlib.util.spec_from_file_location("convert", ROOT / "scripts" / script)
        convert = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(convert)
        called = []
        for name in ("to_jax", "to_hf"):
            monkeypatch.setattr(convert, name, lambda *given, name=name: called.append((name, *given)))
        monkeypatch.setattr(convert.Directory, "__init__", lambda self, source: called.append(("verify", source)))
        monkeypatch.setattr(convert.Directory, "verify", lambda self: None)
        convert.main()
        return called[0]

    return parse_command


@pytest.mark.parametrize("where", COMMANDS)
def test_shown_commands_parse(parse_command, where):
    assert parse_command(COMMANDS[where])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return datasets.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def model_configs(tmp_path_factory) -> dict[str, str]:
    """The config.json of a tiny model by the setting that names it."""
    home = tmp_path_factory.mktemp("models")
    for name, make in (("decoder", make_decoder), ("encoder", make_encoder), ("cepe", make_cepe)):
        save(make(), home / name)
    return {path.name: (path / "config.json").read_text() for path in home.iterdir()}


def write_dataset(home: Path, made: dict, place: str, tokenizer) -> None:
    """Write at `home / place` a tiny dataset of the kind and sizes that the command made[place] gives it."""
    config = made[place]
    if isinstance(config, SampleConfig):
        tokens = np.zeros((2, config.length + 1), np.int32)
        datasets.write_sequences(home / place, list(tokens), config.length, tokenizer, shards=1)
        return
    write_dataset(home, made, str(config.data), tokenizer)
    shapes = {"teacher_index": (config.window, config.top_k), "teacher_prob": (config.window, config.top_k + 1)}
    record = {name: np.zeros(shape) for name, shape in shapes.items()}
    facts = {name: getattr(config, name) for name in ("window", "context", "top_k")}
    facts["joins"] = datasets.joins(home / config.data)
    features = features_of(np.uint16, config.top_k)
    datasets.write(home / place, "teacher", features, [[record] * 2], tokenizer, **facts)


@pytest.mark.parametrize("where", TRAINING)
def test_readme_training_commands_dry_run(
    parse_command, tokenizer, model_configs, tmp_path, monkeypatch, capsys, where
):
    """The data are those that the commands before it make, of the same lengths, where `--data` and `mix` name them."""
    made = {}
    for name in takewhile(lambda name: name != where, COMMANDS):
        if "README.md:" in name and re.search(r"prepare_data.py (sample|teacher)", COMMANDS[name]):
            config = parse_command(COMMANDS[name])
            made[str(config.out)] = config
    config = parse_command(COMMANDS[where])
    data = CARRIED.get(str(config.data), str(config.data))
    for name in config.mix or [""]:
        write_dataset(tmp_path, made, str(Path(data) / name), tokenizer)
    starts = {"decoder": config.decoder, "encoder": config.encoder, "cepe": config.cepe}
    for kind, start in starts.items():
        if start and start not in DECODERS | ENCODERS:
            home = tmp_path / "models" / kind
            home.mkdir(parents=True)
            (home / "config.json").write_text(model_configs[kind])
            starts[kind] = str(home)
    run_stage(dataclasses.replace(config, **starts, data=tmp_path / data, out=tmp_path / "out", dry_run=True))
    told = capsys.readouterr().out
    assert all(re.search(rf"^{name}: .* times each of its \d+ examples$", told, re.MULTILINE) for name in config.mix)


def test_the_shown_commands_are_found():
    assert set(PAGES) >= set((ROOT / "cepe_jax").rglob("README.md"))
    assert len(COMMANDS) >= len(CONFIGS) + 8 + 3
    assert {re.search(r"scripts/(\w+\.py)", command)[1] for command in COMMANDS.values()} >= {
        "prepare_data.py",
        "train.py",
        "evaluate.py",
        "convert.py",
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_configs(parse_command, path):
    """A config's first line runs it, the hardware is named, and its settings arrive."""
    lines = path.read_text().splitlines()
    command = lines[0].removeprefix("# ")
    assert f"--config configs/{path.name}" in command
    assert lines[1].startswith("# Hardware: ")
    config = parse_command(command)
    if "evaluate.py perplexity" in command:  # a sweep, of which the settings are one evaluation's
        config = config.perplexity["perplexity"]
    assert_holds(dataclasses.asdict(config), read_yaml(path))


def assert_holds(config: dict, settings: dict) -> None:
    for name, value in settings.items():
        if isinstance(value, dict):
            assert_holds(config[name], value)
        else:
            assert config[name] == (tuple(value) if isinstance(value, list) else type(config[name])(value)), name


def test_each_table_has_its_config():
    """The page names the configs that are there, and each asks several models, the first of them CEPE, what it says."""
    page = (ROOT / "cepe_jax" / "evaluation" / "README.md").read_text()
    table = re.findall(r"^\|.*\| `(eval_\w+\.yaml)` \|", page, re.MULTILINE)
    paths = [path for path in CONFIGS if path.name.startswith("eval_")]
    assert sorted(table) == [path.name for path in paths]
    for path in paths:
        config = decode(SweepConfig, read_yaml(path) | {"out": "out"})
        assert next(iter(config.models)).startswith("cepe")
        names = [cell.name for group in config.cells() for cell in group]
        assert len(names) == len(set(names)) > len(config.models) > 1
        assert {model.dtype for model in config.models.values()} == {"bfloat16"}


@pytest.mark.parametrize("script", CLASSES)
def test_help(monkeypatch, capsys, script):
    assert CLASSES[script].__name__ in (ROOT / "scripts" / script.split()[0]).read_text()
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as ended:
        parse(CLASSES[script])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"--{field.name}" in shown for field in dataclasses.fields(CLASSES[script]))


def test_help_of_convert(parse_command, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_command("python scripts/convert.py --help")
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("to-jax", "to-hf", "verify"))


def test_convert(parse_command):
    assert parse_command("python scripts/convert.py to-jax a b") == ("to_jax", "a", "b", None)
    assert parse_command("python scripts/convert.py to-jax a b --dtype bfloat16") == ("to_jax", "a", "b", "bfloat16")
    assert parse_command("python scripts/convert.py to-hf a b") == ("to_hf", "a", "b")
    assert parse_command("python scripts/convert.py verify a") == ("verify", "a")
    for wrong in ("", "to-torch a b", "to-jax a", "to-jax a b --dtype float16", "to-hf a b --dtype bfloat16"):
        with pytest.raises(SystemExit) as ended:
            parse_command(f"python scripts/convert.py {wrong}")
        assert ended.value.code == 2


def test_every_script_is_known():
    scripts = {path.name for path in (ROOT / "scripts").glob("*.py")}
    assert scripts == {*(name.split()[0] for name in CLASSES), "convert.py"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    for path, heading in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()):
        there = page.parent / path if path else page
        assert there.exists(), path
        if heading:
            names = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)
            assert heading in {re.sub(r"[^\w\- ]", "", name).replace(" ", "-").lower() for name in names}
