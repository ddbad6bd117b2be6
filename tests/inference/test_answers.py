"""Prompts over documents: what the model reads beside them, what is told, what is refused."""

import re
from pathlib import Path

import pytest
from support.refusals import one_line
from support.tokenizers import CHUNK
from support.tracing import write_corpus

from cepe_jax.data.retriever import Retriever, RetrieverConfig
from cepe_jax.inference.answers import PromptRetrieval, answer
from cepe_jax.inference.context import ContextCache
from cepe_jax.inference.generate import Sampling
from cepe_jax.inference.terminal import GenerateConfig, run_generate
from cepe_jax.inference.text import ModelFacts
from cepe_jax.settings import parse

HOT = Sampling(temperature=1.0, seed=5)
TEXTS = {"a.txt": "quick brown fox\n", "b/c.md": "fox goes home\n", "d.py": "def f(x): return x\n"}
BEST = ["a.txt", "b/c.md"]  # for the prompt; the third has none of its words
PROMPT = "brown fox"


@pytest.fixture
def corpus(tmp_path) -> Path:
    for name, text in TEXTS.items():
        (tmp_path / "docs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "docs" / name).write_text(text)
    return tmp_path / "docs"


@pytest.fixture
def config(home, text_model, corpus, monkeypatch):
    """GenerateConfig of the tiny model, which is not loaded again, over three documents."""
    monkeypatch.setattr(ModelFacts, "load", lambda *_: text_model)

    def config(model: Path = home, retrieve: dict | None = None, **settings) -> GenerateConfig:
        usual = {"prompt": PROMPT, "corpus": corpus, "max_new_tokens": 6, "sampling": HOT, "chunk_length": CHUNK}
        return GenerateConfig(model, retrieve=PromptRetrieval(**{"k": 3} | (retrieve or {})), **usual | settings)

    return config


def test_the_encoder_reads_the_chunks(config, text_model, corpus, capsys):
    """The best last. The answer alone is on standard output, and then the sources are named on standard error."""
    run_generate(config())
    context = text_model.encode([TEXTS[name] for name in BEST[::-1]], chunk_length=CHUNK)
    wanted = text_model.generate(PROMPT, context, max_new_tokens=6, sampling=HOT)
    assert wanted != text_model.generate(PROMPT, max_new_tokens=6, sampling=HOT)
    out, err = capsys.readouterr()
    assert out == wanted + "\n"
    last = [len(text_model.tokenizer.encode(TEXTS[name])) - 1 for name in BEST]
    lines = [rf"read: {name}, tokens 0 to {n}, score [\d.]+\n" for name, n in zip(BEST, last, strict=True)]
    assert re.fullmatch("".join(lines), err)
    retriever = Retriever.open(corpus, text_model.tokenizer, RetrieverConfig())
    said = answer(text_model, PROMPT, retriever, k=3, chunk_length=CHUNK, max_new_tokens=6, sampling=HOT)
    assert said.text == wanted
    assert [chunk.document for chunk in said.chunks] == BEST


def test_the_prompt_has_the_chunks(plain_home, plain_model, config, corpus, monkeypatch, capsys):
    """Of a plain decoder, and of a CEPE that is told to."""
    wanted = "\n\n".join([*(TEXTS[name] for name in BEST[::-1]), PROMPT])
    text = plain_model.generate(wanted, max_new_tokens=6, sampling=HOT)
    run_generate(config(retrieve={"into": "decoder"}))
    assert capsys.readouterr().out == text + "\n"
    monkeypatch.setattr(ModelFacts, "load", lambda *_: plain_model)
    for into in (None, "decoder"):
        run_generate(config(plain_home, {"into": into}))
        assert capsys.readouterr().out == text + "\n"
    retriever = Retriever.open(corpus, plain_model.tokenizer, RetrieverConfig())
    assert answer(plain_model, PROMPT, retriever, k=3, max_new_tokens=6, sampling=HOT).text == text


def test_a_query_is_searched_instead_of_the_prompt(text_model, config, corpus, capsys):
    run_generate(config(retrieve={"query": "return"}))
    context = text_model.encode([TEXTS["d.py"]], chunk_length=CHUNK)
    wanted = text_model.generate(PROMPT, context, max_new_tokens=6, sampling=HOT)
    assert capsys.readouterr().out == wanted + "\n"
    retriever = Retriever.open(corpus, text_model.tokenizer, RetrieverConfig())
    said = answer(
        text_model, PROMPT, retriever, k=3, query="return", chunk_length=CHUNK, max_new_tokens=6, sampling=HOT
    )
    assert said.text == wanted


@pytest.mark.parametrize(("order", "names"), [("best_first", BEST), ("document", BEST), ("best_last", BEST[::-1])])
def test_the_order_is_a_setting(text_model, config, capsys, order, names):
    run_generate(config(retrieve={"into": "decoder", "order": order}))
    prompt = "\n\n".join([*(TEXTS[name] for name in names), PROMPT])
    assert capsys.readouterr().out == text_model.generate(prompt, max_new_tokens=6, sampling=HOT) + "\n"


def test_a_chunk_of_a_document_is_named_by_its_tokens(text_model, config, capsys):
    run_generate(config(retrieve={"chunk": 4, "k": 1}))
    name, first, last = re.search(r"read: (\S+), tokens (\d+) to (\d+), ", capsys.readouterr().err).groups()
    tokens = text_model.tokenizer.encode(TEXTS[name])
    assert int(first) % 4 == 0
    assert int(last) == min(int(first) + 4, len(tokens)) - 1
    assert re.search("fox|brown", text_model.tokenizer.decode(tokens[int(first) : int(last) + 1]))


def test_chunks_are_kept_like_other_contexts(config, text_model, corpus, tmp_path, capsys):
    """A file of contexts gets those that it lacks; files are read before the chunks."""
    kept = tmp_path / "kept.safetensors"
    run_generate(config(contexts=kept, timings=True))
    first, err = capsys.readouterr()
    assert "2 of 2 new" in err
    assert re.search(r"corpus: 2 of 3 chunks, [\d.]+ s\n", err)
    run_generate(config(contexts=kept, timings=True))
    assert capsys.readouterr()[0] == first
    run_generate(config(contexts=kept, context_file=(corpus / "d.py",), timings=True))
    out, err = capsys.readouterr()
    assert "1 of 3 new" in err
    texts = [TEXTS["d.py"], *(TEXTS[name] for name in BEST[::-1])]
    context = text_model.encode(texts, chunk_length=CHUNK, known=ContextCache.load(kept, text_model.identity))
    assert out == text_model.generate(PROMPT, context, max_new_tokens=6, sampling=HOT) + "\n"


def test_nothing_found_is_told(config, text_model, tmp_path, capsys):
    """And nothing is read, though a file of contexts has some."""
    kept = tmp_path / "kept.safetensors"
    run_generate(config(contexts=kept))
    capsys.readouterr()
    run_generate(config(prompt="zzz", contexts=kept))
    out, err = capsys.readouterr()
    assert out == text_model.generate("zzz", max_new_tokens=6, sampling=HOT) + "\n"
    assert re.fullmatch("no chunk of .*docs .*\n", err)


def refused(config: GenerateConfig) -> str:
    with pytest.raises((ValueError, OSError)) as error:
        run_generate(config)
    return one_line(error)


def test_refusals_come_before_weights_are_read(config, plain_home, monkeypatch, tmp_path):
    """`load` is never called."""
    monkeypatch.setattr(ModelFacts, "load", lambda *_: pytest.fail("loaded"))
    assert "into is encoder, and the model is a plain decoder" in refused(config(plain_home, {"into": "encoder"}))
    assert "k is 4, and " in refused(config(retrieve={"k": 4}))
    assert "3 chunks of 1200 tokens" in refused(config(retrieve={"k": 4}))
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path}/empty: no file matches" in refused(config(corpus=tmp_path / "empty"))
    assert f"{tmp_path}/nowhere: no such directory" in refused(config(corpus=tmp_path / "nowhere"))
    assert "math has no nowhere" in refused(config(retrieve={"search": "dense", "encoder": "math:nowhere"}))
    (tmp_path / "docs" / "a.txt").write_text("brown fox " * 30)
    assert "exceed the window" in refused(config(plain_home))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompt=x", "--retrieve.k=5"], "retrieve is given, and .* corpus"),
        (["--prompt=x", "--corpus=d", "--retrieve.k=0"], "k is 0: give 1"),
        (["--prompt=x", "--corpus=d", "--retrieve.chunk=0"], "chunk is 0: "),
        (["--prompt=x", "--corpus=d", "--retrieve.into=memory"], "retrieve.into is 'memory': .*encoder, decoder"),
        (["--chat", "--corpus=d"], "corpus is d, .* prompt"),
    ],
)
def test_settings_that_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said) as error:
        parse(GenerateConfig, ["--model=m", *arguments])
    one_line(error)


def test_a_dataset_of_documents_is_a_corpus(config, text_model, tmp_path, capsys):
    """Its chunks are cut by its own tokenizer, and read by the model's."""
    documents = write_corpus(tmp_path / "prepared", list(TEXTS.values()))
    run_generate(config(corpus=documents))
    out, err = capsys.readouterr()
    assert re.findall(r"read: (doc \d), tokens 0 to ", err) == ["doc 0", "doc 1"]
    context = text_model.encode([TEXTS[name] for name in BEST[::-1]], chunk_length=CHUNK)
    assert out == text_model.generate(PROMPT, context, max_new_tokens=6, sampling=HOT) + "\n"
