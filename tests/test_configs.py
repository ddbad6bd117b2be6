"""Every committed config and every command that we show parses, and those that train find the data made before them."""

import ast
import dataclasses
import re
import shlex
from itertools import takewhile
from pathlib import Path

import numpy as np
import pytest
from support import datasets
from support.models import make_cepe, make_decoder, make_encoder
from support.scripts import SCRIPTS

from cepe_jax.commands import command_in
from cepe_jax.config import DECODERS, ENCODERS
from cepe_jax.data import conversations, preferences
from cepe_jax.data.conversations import ConversationConfig
from cepe_jax.data.preferences import PreferenceConfig
from cepe_jax.data.sampling import SampleConfig
from cepe_jax.evaluation.sweep.grid import SweepConfig
from cepe_jax.selection import tagcos
from cepe_jax.selection.tagcos import TagcosConfig
from cepe_jax.settings import decode, parse, read_yaml
from cepe_jax.training.run import dry_run
from cepe_jax.training.teacher import features_of
from cepe_jax.weights.source import save

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
# In the order in which what one makes is read by another.
FOLDERS = (
    "weights",
    "data",
    "training",
    "selection",
    "inference",
    "inference/caches",
    "evaluation",
    "tracing",
    "benchmarks",
)
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
    """The settings of a command line; nothing is run."""
    monkeypatch.chdir(ROOT)

    def parse_command(command: str):
        words = shlex.split(command, comments=True)
        while "=" in words[0]:  # FOO=bar python ...
            words.pop(0)
        python, script, *arguments = words
        assert Path(python).name == "python"
        assert Path(script).parent.name == "scripts"
        commands = SCRIPTS[Path(script).name].COMMANDS
        name, arguments = command_in(commands, arguments)
        return parse(commands[name][0], arguments)

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
    kinds = {ConversationConfig: conversations, PreferenceConfig: preferences}
    if type(config) in kinds:
        kind = kinds[type(config)]
        features = kind.features_of(tokenizer)
        record = {key: np.ones(0 if "document" in key else 3) for key in features} | {"name": "x", "domain": "d"}
        name = "conversations" if kind is conversations else "preferences"
        datasets.write(home / place, name, features, [[record] * 2], tokenizer, length=3)
        return
    if isinstance(config, SampleConfig):
        tokens = np.zeros((2, config.length + 1), np.int32)
        datasets.write_sequences(home / place, list(tokens), config.length, tokenizer, shards=1)
        return
    write_dataset(home, made, str(config.data), tokenizer)
    if isinstance(config, TagcosConfig):
        record = {"number": np.int64(0), "repeats": np.int32(1)}
        selects = datasets.joins(home / config.data)
        datasets.write(home / place, "coreset", tagcos.features_of(config), [[record]], tokenizer, selects=selects)
        return
    shapes = {"teacher_index": (config.window, config.top_k), "teacher_prob": (config.window, config.top_k + 1)}
    record = {name: np.zeros(shape) for name, shape in shapes.items()}
    facts = {name: getattr(config, name) for name in ("window", "context", "top_k")}
    facts["joins"] = datasets.joins(home / config.data)
    features = features_of(np.uint16, config.top_k)
    datasets.write(home / place, "teacher", features, [[record] * 2], tokenizer, **facts)


@pytest.mark.parametrize("where", TRAINING)
def test_readme_training_commands_dry_run(parse_command, tokenizer, model_configs, tmp_path, monkeypatch, where):
    """The data are those that the commands before it make, of the same lengths, where `--data` and `mix` name them."""
    made = {}
    for name in takewhile(lambda name: name != where, COMMANDS):
        if "README.md:" in name and re.search(
            r"prepare_data.py (sample|teacher|conversations|preferences|tagcos)", COMMANDS[name]
        ):
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
    told = "\n".join(dry_run(dataclasses.replace(config, **starts, data=tmp_path / data, out=tmp_path / "out")))
    names = config.mix or ([config.data.name] if config.stage in ("sft", "reward", "dpo") else [])
    assert all(re.search(rf"^{name}: .* times each of its \d+ examples$", told, re.MULTILINE) for name in names)


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
    config = {str(name): value for name, value in config.items()}  # whole numbers are names in a file, too
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


@pytest.mark.parametrize(
    ("command", "settings"),
    [
        ("to-jax a b", {"source": Path("a"), "target": Path("b"), "dtype": None}),
        ("to-jax a b --dtype bfloat16", {"source": Path("a"), "target": Path("b"), "dtype": "bfloat16"}),
        ("to-hf a b", {"source": Path("a"), "target": Path("b")}),
        ("verify a", {"source": Path("a")}),
    ],
)
def test_conversions(parse_command, command, settings):
    assert vars(parse_command(f"python scripts/convert.py {command}")) == settings


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("to-torch a b", "to-torch"),
        ("to-jax a", "--target"),
        ("to-jax a b --dtype float16", "dtype .*float16"),
        ("to-hf a b --dtype bfloat16", "dtype"),
    ],
)
def test_wrong_conversions_are_refused(parse_command, command, said):
    with pytest.raises(ValueError, match=said):
        parse_command(f"python scripts/convert.py {command}")


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ("", ("llama2_7b", "mlm_large", "")),
        ("--encoder=tiny", ("llama2_7b", "tiny", "")),
        ("--cepe=a", ("", "", "a")),
        ("--stage=lm", ("llama2_7b", "", "")),
        ("--stage=mlm", ("", "mlm_large", "")),
        ("--stage=mlm --decoder=tiny", ("tiny", "mlm_large", "")),
    ],
)
def test_sizes_are_the_papers_where_no_model_is_named(parse_command, settings, parts):
    """The stage is that of training, whatever step is compiled."""
    for command in ("compile_step.py --topology=v5e:2x2 --step=decode", "benchmark.py train"):
        shared = f"--config configs/train_cepe.yaml {settings}"
        config = parse_command(f"python scripts/{command} {shared}")
        assert (config.decoder, config.encoder, config.cepe) == parts
        assert config.stage == ("cepe" if "stage" not in settings else settings.split("=")[1].split()[0])
        assert getattr(config, "step", "decode") == "decode"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    for path, heading in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()):
        there = page.parent / path if path else page
        assert there.exists(), path
        if heading:
            names = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)
            assert heading in {re.sub(r"[^\w\- ]", "", name).replace(" ", "-").lower() for name in names}
