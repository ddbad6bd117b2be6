"""Settings from YAML and the command line: what wins, what is refused, and how it is said."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from cepe_jax.data.conversations import ConversationConfig
from cepe_jax.data.corpus import PrepareConfig
from cepe_jax.data.retrieval import RetrieveConfig
from cepe_jax.data.sampling import SampleConfig
from cepe_jax.evaluation.tasks.perplexity import Perplexity
from cepe_jax.settings import parse
from cepe_jax.training.settings import TrainConfig


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    steps: int = 3

    def __post_init__(self):
        if self.rate < 0:
            raise ValueError(f"rate is {self.rate}: give 0 or more")


@dataclass(frozen=True)
class Words:
    before: str = "a"
    behind_it: str = "b"


@dataclass(frozen=True)
class Settings:
    out: Path
    text: str = "none"
    kind: Literal["one", "two"] = "one"
    count: int = 1
    inner: Inner = Inner()
    names: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    log: Path | None = None
    context_file: tuple[Path, ...] = ()
    dry_run: bool = False
    note: str | None = None
    mix: dict[str, float] = field(default_factory=dict)
    shares: dict[int, float] = field(default_factory=dict)
    runs: dict[str, Inner] = field(default_factory=dict)
    words: Words | None = None


@pytest.fixture
def call(tmp_path):
    """parse(Settings) of these arguments, `text` in the place of --config."""

    def call(*arguments: str, text: str | None = None) -> Settings:
        if text is not None:
            (tmp_path / "c.yaml").write_text(text)
            arguments = "--config", str(tmp_path / "c.yaml"), *arguments
        return parse(Settings, arguments)

    return call


def one_line(error) -> str:
    """As `run` prints it: messages of the YAML library have several lines."""
    message = " ".join(str(error.value).split())
    assert len(message) < 250
    return message


def test_file_then_overrides_in_order(call):
    text = "text: file\ncount: 2\ninner: {rate: 0.25, steps: 7}\nnames: [a, b]\n"
    assert call("--out=o", text=text) == Settings(Path("o"), "file", "one", 2, Inner(0.25, 7), ("a", "b"))
    settings = call("--out=o", "--count=3", "--inner.rate", "1e-4", "--count", "4", "--inner.rate=2e-4", text=text)
    assert (settings.count, settings.inner) == (4, Inner(2e-4, 7))


def test_overrides_win_wherever_the_file_stands(call, tmp_path):
    (tmp_path / "late.yaml").write_text("count: 2\n")
    assert call("--count=5", "--out=o", f"--config={tmp_path / 'late.yaml'}").count == 5


def test_both_spellings(call):
    assert call("--out", "o", "--text", "a=b") == call("--out=o", "--text=a=b")
    assert call("--out=o", "--text=--odd").text == "--odd"


@pytest.mark.parametrize("text", ["", "# nothing\n"])
def test_an_empty_file_sets_nothing(call, text):
    assert call("--out=o", text=text) == Settings(Path("o"))


@pytest.mark.parametrize(
    "text", ["def f(x):", "a: b", "123", "yes", "# hi", "[1,", "", "null", "*x", "'a", "- a", " two \n", "**/*.py"]
)
def test_text_on_the_command_line_is_taken_as_it_stands(call, text):
    assert call("--out=o", f"--text={text}").text == text
    assert call("--out=o", "--text", text).text == text
    assert call("--out=o", f"--note={text}").note == text


def test_values(call):
    settings = call("--out=2024", "--sizes=[1, 2]", "--names=[a, b c]", "--log=a: b", "--inner={steps: 9}")
    assert settings == Settings(Path("2024"), inner=Inner(steps=9), names=("a", "b c"), sizes=(1, 2), log=Path("a: b"))
    assert call("--out=o", text="log: null").log is None


def test_numbers_are_written_as_numbers(call):
    """With underscores between digits too, and an exponent without a point; text keeps its zeros."""
    settings = call("--out=o", text="count: 4_690_000\ninner: {rate: 1e-4, steps: +7}\ntext: 010\nmix: {a: .5, b: 2.}")
    assert settings.count == 4690000
    assert settings.inner == Inner(1e-4, 7)
    assert (settings.text, settings.mix) == ("010", {"a": 0.5, "b": 2.0})


def test_whole_numbers_may_name_values(call):
    assert call("--out=o", "--shares={0: 0.25, 8_192: 0.75}").shares == {0: 0.25, 8192: 0.75}
    assert call("--out=o", "--shares.16=1", text="shares: {32: 2}").shares == {16: 1.0, 32: 2.0}
    assert call("--out=o", "--mix={2: 3}").mix == {"2": 3.0}
    for text, name in (("{0: 1, '0': 2}", "0"), ("{a: 1}", "shares.a"), ("{-1: 1}", "shares.-1"), ("{1.5: 1}", "1.5")):
        with pytest.raises(ValueError, match=re.escape(name)) as error:
            call("--out=o", f"--shares={text}")
        one_line(error)


def test_names_may_have_hyphens(call):
    """But in what is named by the user, as a dataset is."""
    assert call("--out=o", "--dry-run=true", "--context-file", "a-b") == call(
        "--out=o", "--dry_run=true", "--context_file=a-b"
    )
    assert call("--out=o", "--mix.my-data=2").mix == {"my-data": 2}


def test_groups_that_the_user_names(call):
    """They are as strict inside as any group, and keep the names that they were given."""
    text = "runs: {a-b: {rate: 0.25, steps: 7}, c: {}}\n"
    assert call("--out=o", text=text).runs == {"a-b": Inner(0.25, 7), "c": Inner()}
    changed = call("--out=o", "--runs.a-b.steps=8", "--runs.d-e.rate", "1", text=text).runs
    assert changed == {"a-b": Inner(0.25, 8), "c": Inner(), "d-e": Inner(1.0)}


def test_text_in_a_group_that_may_be_left_out(call):
    assert call("--out=o").words is None
    assert call("--out=o", "--words.before=Passage: {x}", "--words.behind-it=no").words == Words("Passage: {x}", "no")
    assert call("--out=o", "--words.before={x}", text="words: {behind_it: c}").words == Words("{x}", "c")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("runs: {a: {<<: {steps: 1}}}", r"unknown .*runs\.a\.<<"),
        ("runs: {a: {stepps: 1}}", r"unknown .*runs\.a\.stepps: .*steps\?"),
        ("runs: {a: {steps: many}}", "runs.a.steps is 'many'"),
        ("runs: {a: 3}", r"runs\.a is 3: .*group"),
        ("runs: {a: }", r"runs\.a is None: .*group"),
        ("runs: [1]", r"runs is \[1\]: .*group"),
        ("runs: {a: {rate: -1}}", "rate is -1.0"),
        ("runs: {a: {}, a: {}}", "line 1: a .*twice"),
    ],
)
def test_wrong_groups_that_the_user_names(call, text, said):
    with pytest.raises(ValueError, match=said) as error:
        call("--out=o", text=text)
    one_line(error)


def test_a_list_may_come_item_by_item(call):
    """Each adds to what the command line said before, and all of it replaces what the file says."""
    text = "names: [file]\nsizes: [9]\n"
    settings = call("--out=o", "--names=a: b", "--sizes", "1", "--names", "null", "--sizes=2", "--names=c,", text=text)
    assert (settings.names, settings.sizes) == (("a: b", "null", "c,"), (1, 2))
    assert call("--out=o", "--names=x", "--names=[a, b]", "--names=c").names == ("a", "b", "c")
    assert call("--out=o", "--context-file=A", "--context-file", "B").context_file == (Path("A"), Path("B"))
    assert call("--out=o", '--names=["[/INST]"]', text=text).names == ("[/INST]",)


def test_a_name_alone_is_true(call):
    """Where the setting is true or false; of any other, what follows is the value."""
    assert call("--out=o", "--dry-run").dry_run
    wanted = call("--out=o", "--dry_run=true", "--count=2")
    assert call("--out=o", "--dry-run", "--count=2") == call("--dry-run", "yes", "--out=o", "--count", "2") == wanted
    assert not call("--out=o", "--dry-run", "--dry-run", "false").dry_run
    assert call("--out=o", "--text", "--dry-run") == call("--out=o", "--text=--dry-run")


@dataclass(frozen=True)
class Copy:
    source: Path
    target: Path
    force: bool = False
    kind: str = "none"

    POSITIONALS = ("source", "target")


@dataclass(frozen=True)
class Copies:
    first: Copy
    copies: dict[str, Copy] = field(default_factory=dict)


@pytest.mark.parametrize(
    "arguments", ["a b", "a --target b", "--kind none a b", "a --force=false b", "--target=b --source=a"]
)
def test_positionals_are_settings_in_their_order(arguments):
    assert parse(Copy, arguments.split()) == Copy(Path("a"), Path("b"))


@pytest.mark.parametrize(("arguments", "said"), [("a", "--target"), ("--source=a b", "--target"), ("a b c", "c: .*=")])
def test_wrong_positionals_are_named(arguments, said):
    with pytest.raises(ValueError, match=said) as error:
        parse(Copy, arguments.split())
    one_line(error)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("count: 1\ntext: a\ncount: 2\n", "line 3: count .*line 1"),
        ("text: a\ninner:\n  rate: 1\n  steps: 2\n  rate: 1\n", "line 5: rate .*line 3"),
        ("inner: {steps: 1, rate: 2, steps: 1}\n", "line 1: steps .*line 1"),
        ("text: a\n- b\n", "c.yaml"),
        ("text: [a\n", "c.yaml"),
        ("- text\n", "list, not .*mapping"),
        ("false\n", "bool, not .*mapping"),
        ("text\n", "str, not .*mapping"),
        ("[a, b]: c\n", "no name .*setting"),
        ("1.5: c\n", "no name .*setting"),
        ("runs:\n  a: &a {rate: 0.25}\n  b: {<<: *a}\n", r"line 3: \*a .*alias"),
        ("text: !!python/object/apply:os.getcwd []\n", "line 1: .*constructor"),
        ("[" * 100_000, "nested"),
    ],
)
def test_strict_yaml(call, text, where):
    with pytest.raises(ValueError, match=r"c\.yaml") as error:
        call("--out=o", text=text)
    assert re.search(where, one_line(error))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("cuont: 1", r"cuont: .*count\?"),
        ("inner: {rat: 1}", r"inner\.rat: .*rate\?"),
        ("inner.rate: 1", r"inner\.rate"),
        ("qqqqqqqq: 1", "qqqqqqqq in Settings"),
    ],
)
def test_unknown_settings_name_the_nearest(call, wrong, said):
    with pytest.raises(ValueError, match="unknown setting") as error:
        call("--out=o", text=wrong)
    assert re.search(said, one_line(error))


@pytest.mark.parametrize(("wrong", "said"), [("cuont", "count"), ("inner.step", "steps"), ("iner.steps", "inner")])
def test_unknown_on_the_command_line_names_the_nearest(call, wrong, said):
    with pytest.raises(ValueError, match=f"unknown setting .*: .*{said}") as error:
        call("--out=o", f"--{wrong}=1")
    assert wrong.split(".")[0] in one_line(error)


def test_values_of_the_class_are_no_settings():
    """Conversations have a constant in the place of a setting of documents."""
    with pytest.raises(ValueError, match="unknown setting skip_shorter"):
        parse(ConversationConfig, ["--input=in", "--out=out", "--tokenizer=t", "--skip_shorter=3"])


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--count=many", "count is 'many'"),
        ("--count=1.5", "count is 1.5"),
        ("--count=[1]", r"count is \[1\]"),
        ("--count=[1", r"count=\[1"),
        ("--count=", "count has no"),
        ("--inner.rate=fast", "inner.rate is 'fast'"),
        ("--inner.rate=-1", "rate is -1.0"),
        ("--inner=3", "inner is 3: .*group"),
        ("--count.a=3", r"count is \{'a': 3\}"),
        ("--names=", "names has no"),
        ("--names=[a", r"names=\[a"),
        ("--names", "--names: .*--setting=value"),
        ("--sizes=a", r"sizes is \['a'\]"),
        ("--sizes=[a]", r"sizes is \['a'\]"),
        ("--sizes={a: 1}", r"sizes is \[\{'a': 1\}\]: .*\[a, b\]"),
        ("--sizes=[[1]]", r"sizes is \[\[1\]\]: .*\[a, b\]"),
        ("--dry_run=1", "dry_run is 1"),
        ("--mix=packed", "mix is 'packed'"),
        ("--mix=[packed]", r"mix is \['packed'\]"),
        ("--dry-runs", r"unknown .*dry-runs: .*dry_run\?"),
        ("--inner={rate: 1, rate: 2}", "rate .*twice"),
        ("--kind=three", "kind is 'three'"),
        ("out=o", "out: .*--setting=value"),
        ("--text", "--text: .*--setting=value"),
        ("--count=true", "count is True"),
        ("--count=010", "count is '010'"),
        ("--count=1:30", "count is '1:30'"),
        ("--count=0x10", "count is '0x10'"),
        ("--count=!!bool x", "count=!!bool x: "),
        ("--count=!!timestamp x", "count=!!timestamp x: "),
        ("--count=2026-11-22", r"count is datetime\.date"),
        ("--count=1" + "0" * 30, r"count is 1e\+30"),
        ("--count=" + "9" * 5000, r"9{50}\.\.\. \(5,000 characters\) is no number"),
        ("--count=10**12", r"count is '10\*\*12'"),
        ("--inner.rate=.nan", "inner.rate is '.nan'"),
        ("--inner.rate=-.inf", "inner.rate is '-.inf'"),
        ("--inner.rate=nan", "inner.rate is 'nan'"),
        ("--inner.rate=1e999", "1e999 is no number"),
        ("--inner.rate=!!float .inf", "inner.rate=!!float .inf: "),
        ("--inner.rate=yes", "inner.rate is True"),
        ("--mix={a: .nan}", "mix.a is '.nan'"),
        ("--mix={a: b}", "mix.a is 'b'"),
        ("--sizes=[true]", r"sizes is \[True\]"),
        ("--sizes=true", r"sizes is \[True\]"),
        ("--context_file=[1]", r"context_file is \[1\]: .*text"),
        ("--kind=" + "x" * 5000, r"kind is 'x+\.\.\. .*one, two"),
        ("--sizes=[&a [x, x], *a]", r"line 1: \*a .*alias"),
        ("--sizes=" + "[" * 100_000, "nested"),
        ("--" + "x" * 5000 + "=1", r"unknown setting x{50}\.\.\."),
    ],
)
def test_wrong_values_are_named(call, argument, said):
    with pytest.raises(ValueError, match=said) as error:
        call("--out=o", argument)
    one_line(error)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("inner:\n", "inner has no"),
        ("text:\n", "text has no"),
        ("names: ab\n", "names is 'ab'"),
        ("text: no\n", "text is False"),
    ],
)
def test_wrong_values_in_a_file_are_named(call, text, said):
    with pytest.raises(ValueError, match=said):
        call("--out=o", text=text)


def test_a_setting_below_a_value(call):
    with pytest.raises(ValueError, match=r"--text\.a: text .*one value"):
        call("--out=o", "--text=x", "--text.a=3")


def test_what_is_missing_is_named(call, tmp_path):
    """In a group too, where one that has no default is missing as a whole."""
    with pytest.raises(ValueError, match=r"--out: .*--help") as error:
        call()
    one_line(error)
    with pytest.raises(ValueError, match=r"--first\.source, --first\.target: "):
        parse(Copies, [])
    with pytest.raises(ValueError, match=r"--copies\.a\.target: "):
        parse(Copies, ["--copies.a.source=b"])
    with pytest.raises(FileNotFoundError, match="nowhere.yaml"):
        call("--config", str(tmp_path / "nowhere.yaml"))


@pytest.mark.parametrize("config_class", [TrainConfig, PrepareConfig, SampleConfig, RetrieveConfig, Perplexity])
@pytest.mark.parametrize("seed", [-1, 1 << 32])
def test_seeds_have_32_bits(config_class, seed):
    with pytest.raises(ValueError, match=f"seed is {seed}: ") as error:
        parse(config_class, [f"--seed={seed}"])
    one_line(error)


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), 0.0])
def test_weights_of_a_mix_are_finite(weight):
    with pytest.raises(ValueError, match=f"mix is .*{weight}"):
        TrainConfig("lm", Path("data"), Path("out"), 1, 1, decoder="tiny", mix={"packed": weight})
