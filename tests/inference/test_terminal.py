"""scripts/generate.py: files in, text out, a conversation on standard input, contexts kept in a file."""

import io
import re
import shutil
import subprocess
import sys
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.models import flip, forget
from support.tokenizers import CHUNK, WINDOW

from cepe_jax.data.tokenizer import Tokenizer
from cepe_jax.devices import Devices
from cepe_jax.inference import context, generate
from cepe_jax.inference.context import ContextCache
from cepe_jax.inference.generate import Sampling
from cepe_jax.inference.terminal import GenerateConfig, run_generate
from cepe_jax.inference.text import ModelFacts

ROOT = Path(__file__).parents[2]
HOT = Sampling(temperature=1.0, seed=5)


@pytest.fixture
def config(home, text_model, tmp_path, monkeypatch):
    """GenerateConfig of the tiny model, which is not loaded again, and of two files."""
    (tmp_path / "a.txt").write_bytes("def g(y):\r\n\treturn 🙂\n".encode())
    (tmp_path / "b.txt").write_text("It is a test")
    monkeypatch.setattr(ModelFacts, "load", lambda *_: text_model)
    files = tmp_path / "a.txt", tmp_path / "b.txt"

    def config(**settings) -> GenerateConfig:
        usual = {"prompt": "x = ", "chunk_length": CHUNK, "max_new_tokens": 6, "sampling": HOT, "context_file": files}
        return GenerateConfig(home, **{**usual, **settings})

    return config


def speak(monkeypatch, *lines: bytes, terminal: bool = False) -> None:
    stdin = SimpleNamespace(buffer=io.BytesIO(b"".join(lines)), isatty=lambda: terminal)
    monkeypatch.setattr(sys, "stdin", stdin)


def test_a_prompt(config, text_model, capsys):
    """The text alone on standard output; the files' bytes as they are."""
    run_generate(config(timings=True))
    read = text_model.encode(["def g(y):\r\n\treturn 🙂\n", "It is a test"], chunk_length=CHUNK)
    wanted = text_model.generate("x = ", read, max_new_tokens=6, sampling=HOT)
    out, err = capsys.readouterr()
    assert out == wanted + "\n"
    assert re.search(rf"contexts: {read.num_tokens} tokens, 0.0 MiB, 2 of 2 new, [\d.]+ s\n", err)
    assert re.search(r"6 tokens, .* [\d.]+ s, .* [\d.]+ s a token, \d+ MiB .*\n", err)
    run_generate(config(prompt="It is\n\n" * 30, overflow="passages", context_file=(), stop=(wanted[2],)))
    options = {"max_new_tokens": 6, "overflow": "passages", "chunk_length": CHUNK, "sampling": HOT}
    wanted = text_model.generate("It is\n\n" * 30, stop=[wanted[2]], **options)
    assert capsys.readouterr() == (wanted + "\n", "")


def test_contexts_that_are_kept(config, text_model, tmp_path, capsys, monkeypatch):
    """What is in the file is not encoded again; the file gets what it lacked and loses nothing."""
    kept, (a, b) = tmp_path / "kept.safetensors", config().context_file
    said, read = [], []
    encode = context.encode_chunks
    monkeypatch.setattr(context, "encode_chunks", lambda *given: read.append(given[2].sum()) or encode(*given))
    for files, new in (((a,), "1 of 1"), ((b, a), "1 of 2"), ((b,), "0 of 1"), ((), "0 of 2")):
        run_generate(config(contexts=kept, context_file=files, timings=True))
        out, err = capsys.readouterr()
        assert f"{new} new" in err
        said.append(out)
    assert sum(read) == ContextCache.load(kept, text_model.identity).num_tokens
    digests = [
        p.digest for p in text_model.encode([a.read_bytes().decode(), b.read_text()], chunk_length=CHUNK).passages
    ]
    assert [p.digest for p in ContextCache.load(kept, text_model.identity).passages] == digests
    run_generate(config())
    assert capsys.readouterr().out == said[1] == said[3] != said[2]


def test_a_conversation(config, text_model, monkeypatch, capsys):
    """A line is a turn; empty ones and what is no text are left out."""
    speak(monkeypatch, b"What is it?\n", b"\n", b"ab\xff\n", "é\r\n".encode(), b"last")
    run_generate(config(prompt="", chat=True, system="Be brief.", context_file=()))
    chat = text_model.chat("Be brief.", chunk_length=CHUNK)
    wanted = ["".join(chat.say(text, max_new_tokens=6, sampling=HOT)) for text in ("What is it?", "é", "last")]
    out, err = capsys.readouterr()
    assert out == "".join(f"{text}\n" for text in wanted)
    assert re.fullmatch("not UTF-8 at byte 2: .*\n", err)


def test_a_refused_turn(plain_home, plain_model, monkeypatch, capsys):
    """It is told, in a line, and the conversation goes on without it; with truncate_left nothing is refused."""
    monkeypatch.setattr(ModelFacts, "load", lambda *_: plain_model)
    settings = {"chat": True, "max_new_tokens": 6, "sampling": HOT, "chunk_length": CHUNK}
    lines = b"def f(x): " * 20 + b"\n", b"x\n"
    speak(monkeypatch, *lines)
    run_generate(GenerateConfig(plain_home, **settings))
    wanted = "".join(plain_model.chat().say("x", max_new_tokens=6, sampling=HOT))
    out, err = capsys.readouterr()
    assert out == f"\n{wanted}\n"
    assert re.fullmatch("refused: .*truncate_left .*\n", err)
    speak(monkeypatch, *lines)
    run_generate(GenerateConfig(plain_home, overflow="truncate_left", **settings))
    chat = plain_model.chat(overflow="truncate_left", chunk_length=CHUNK)
    wanted = ["".join(chat.say(text, max_new_tokens=6, sampling=HOT)) for text in ("def f(x): " * 20, "x")]
    assert capsys.readouterr() == ("".join(f"{text}\n" for text in wanted), "")


def test_a_terminal_says_how_to_leave(config, monkeypatch, capsys):
    speak(monkeypatch, b"x\n", terminal=True)
    run_generate(config(prompt="", chat=True, context_file=()))
    err = capsys.readouterr().err
    assert re.fullmatch("[^\n]*Ctrl-D[^\n]*\n> > ", err)


def test_a_seed_that_was_drawn_is_told(config, monkeypatch, capsys):
    """And gives the same text again, of a prompt and of a conversation; greedy text needs none."""
    for what in ({"context_file": ()}, {"context_file": (), "chat": True, "prompt": ""}):
        speak(monkeypatch, b"x\n")
        run_generate(config(sampling=Sampling(temperature=1.0), **what))
        out, err = capsys.readouterr()
        (seed,) = re.fullmatch(r".*--sampling\.seed=(\d+).*\n", err).groups()
        speak(monkeypatch, b"x\n")
        run_generate(config(sampling=Sampling(temperature=1.0, seed=int(seed)), **what))
        assert capsys.readouterr() == (out, "")
    run_generate(config(sampling=Sampling(), context_file=()))
    assert capsys.readouterr().err == ""


def test_a_long_prompt_of_a_plain_decoder(plain_home, plain_model, monkeypatch, capsys):
    """What is not read is told."""
    monkeypatch.setattr(ModelFacts, "load", lambda *_: plain_model)
    prompt, limits = "It is\n\n" * 30, {"max_new_tokens": 6, "overflow": "truncate_left"}
    run_generate(GenerateConfig(plain_home, prompt=prompt, **limits))
    out, err = capsys.readouterr()
    assert out == plain_model.generate(prompt, **limits) + "\n"
    dropped = len(plain_model.tokenizer.encode(prompt)) - (WINDOW - 6)
    assert re.fullmatch(f"[^\n]* {dropped} tokens [^\n]*\n", err)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prompt": "def f(x): " * 30}, f" 6 .*window of {WINDOW} .*truncate_left"),
        ({"prompt": "x", "overflow": "passages"}, "passages.* truncate_left"),
        ({"prompt": "x", "context_file": True}, "plain decoder, .* context_file"),
        ({"prompt": "x", "contexts": True}, "plain decoder, .* contexts"),
        ({"prompt": "x", "window": WINDOW + 1}, f"window is {WINDOW + 1}: .* {WINDOW}"),
        ({"prompt": "x", "max_new_tokens": WINDOW, "overflow": "truncate_left"}, f"{WINDOW} new tokens"),
        ({"chat": True, "overflow": "passages"}, "passages: .* truncate_left"),
        ({"chat": True, "system": "What is it? " * 20}, f"window of {WINDOW}"),
    ],
)
def test_refusals_come_before_weights_are_read(plain_home, tmp_path, settings, said):
    """The config and the tokenizer are enough: here the weights are gone."""
    bare = shutil.copytree(plain_home, tmp_path / "bare", ignore=lambda *_: ["model-00001-of-00001.safetensors"])
    (tmp_path / "a.txt").write_text("x")
    files = {"context_file": (tmp_path / "a.txt",), "contexts": tmp_path / "a.txt"}
    settings = {name: files[name] if value is True and name in files else value for name, value in settings.items()}
    with pytest.raises(ValueError, match=said):
        run_generate(GenerateConfig(bare, **{"max_new_tokens": 6, **settings}))
    with pytest.raises(ValueError, match="safetensors"):
        run_generate(GenerateConfig(bare, prompt="x", max_new_tokens=6))


def test_verify_refuses_changed_weights(plain_home, tmp_path):
    flip(path := shutil.copytree(plain_home, tmp_path / "flipped"))
    with pytest.raises(ValueError, match=f"{path}: .* changed"):
        run_generate(GenerateConfig(path, prompt="x", max_new_tokens=2, verify=True))


@pytest.mark.parametrize("chat", [True, False])
def test_a_tokenizer_elsewhere(home, text_model, tmp_path, monkeypatch, capsys, chat):
    """And it is read once."""
    bare, beside = shutil.copytree(home, tmp_path / "bare"), tmp_path / "beside"
    beside.mkdir()
    forget(bare)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).rename(beside / name)
    read = []
    made = Tokenizer.__init__
    monkeypatch.setattr(Tokenizer, "__init__", lambda self, path: read.append(path) or made(self, path))
    speak(monkeypatch, b"x\n")
    what = {"chunk_length": CHUNK, **({"chat": True} if chat else {"prompt": "x"})}
    run_generate(GenerateConfig(bare, beside, max_new_tokens=3, sampling=HOT, **what))
    pieces = text_model.chat(chunk_length=CHUNK).say("x", max_new_tokens=3, sampling=HOT) if chat else None
    wanted = "".join(pieces) if chat else text_model.generate("x", max_new_tokens=3, sampling=HOT)
    assert capsys.readouterr().out == f"{wanted}\n"
    read.clear()
    speak(monkeypatch)
    run_generate(GenerateConfig(home, max_new_tokens=3, **what))
    assert len(read) == 1


def test_ctrl_c(config, text_model, monkeypatch, capsys):
    """The first ends the answer, and the conversation goes on; one while nothing is said ends it."""
    lines, steps, following = iter([b"What is it?\n", b"x\n"]), count(), generate.next_token

    def readline():
        if line := next(lines, b""):
            return line
        raise KeyboardInterrupt

    def interrupted(*given):
        if next(steps) == 3:
            raise KeyboardInterrupt
        return following(*given)

    chat = text_model.chat(chunk_length=CHUNK)
    answer = chat.say("What is it?", max_new_tokens=6, sampling=HOT)
    wanted = ["".join(next(answer) for _ in range(3)), "".join(chat.say("x", max_new_tokens=6, sampling=HOT))]
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=SimpleNamespace(readline=readline), isatty=lambda: False))
    monkeypatch.setattr(generate, "next_token", interrupted)
    run_generate(config(prompt="", chat=True, context_file=()))
    assert capsys.readouterr().out == "".join(f"{text}\n" for text in wanted)


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "bad.txt: .*empty"), (b"ab\xff", "bad.txt: not UTF-8 at byte 2"), (None, "bad.txt")],
)
def test_bad_files(tmp_path, content, said):
    """Seen before anything is loaded."""
    if content is not None:
        (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        run_generate(GenerateConfig(tmp_path / "absent", prompt="x", context_file=(tmp_path / "bad.txt",)))


def test_bad_places(tmp_path, home):
    """Seen before anything is loaded, files and directories that stand where the other should."""
    (tmp_path / "file").touch()
    (tmp_path / "dir").mkdir()
    some = (home / "config.json",)
    for contexts, files in (("kept", ()), ("absent/kept", some), ("file/kept", some), ("dir", some), ("dir", ())):
        config = GenerateConfig(tmp_path / "absent", prompt="x", contexts=tmp_path / contexts, context_file=files)
        with pytest.raises(FileNotFoundError, match=f"{contexts}: no .*context_file"):
            run_generate(config)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "prompt, or chat"),
        ({"prompt": "x", "chat": True}, "prompt, or chat"),
        ({"prompt": "x", "system": "y"}, "system is .*chat"),
        ({"prompt": "x", "chunk_length": 0}, "chunk_length is 0: give"),
        ({"prompt": "x", "max_new_tokens": 0}, "max_new_tokens is 0: give"),
        ({"prompt": "x", "stop": ("",)}, "stop is "),
    ],
)
def test_bad_config(tmp_path, settings, said):
    with pytest.raises(ValueError, match=said):
        GenerateConfig(tmp_path, **settings)
    with pytest.raises(ValueError, match="tensor=0.*devices"):
        Devices(tensor=0)


def test_the_script_over_four_devices(home, text_model, tmp_path):
    """In a process of its own: the text that one device writes.

    10 CPU-seconds: the script's own mesh, which no test in one process can have.
    """
    (tmp_path / "a.txt").write_text("It is a test\n" * 9)
    options = ["--context-file", tmp_path / "a.txt", "--chunk-length=8", "--max-new-tokens=9", "--prompt=x = "]
    options += ["--sampling.temperature=1", "--sampling.seed=5", "--stop", "no such", "--mesh.tensor=2"]
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "scripts/generate.py", "--model", home, *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT), **devices})
    assert done.returncode == 0, done.stderr
    read = text_model.encode(["It is a test\n" * 9], chunk_length=CHUNK)
    assert done.stdout == text_model.generate("x = ", read, max_new_tokens=9, sampling=HOT) + "\n"
