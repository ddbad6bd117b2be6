"""Text in, text out: against the whole model, computed anew for each token."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from support.models import flip, forget, make_encoder
from support.oracles import draw
from support.tokenizers import CHUNK, WINDOW, byte_level, chunks_of

import cepe_jax
from cepe_jax.inference import context as context_module
from cepe_jax.inference import text
from cepe_jax.inference.context import ContextCache
from cepe_jax.inference.generate import GREEDY, Draws, Sampling
from cepe_jax.inference.overflow import fit
from cepe_jax.inference.text import TextModel
from cepe_jax.weights.source import save

PROMPT = "def f(x):\n    return"
TEXTS = ["The quick brown fox jumps over", "  what is it?\n\nIt is a test"]
HOT = Sampling(temperature=1.0, seed=5)


@pytest.fixture(scope="module")
def context(text_model) -> ContextCache:
    return text_model.encode(TEXTS, chunk_length=CHUNK)


@pytest.fixture(scope="module")
def write(text_model, fresh):
    """The text after these tokens beside these contexts, in ids, and the tokens."""

    def write(tokens: list[int], contexts: list[list[int]], count: int, sampling: Sampling = GREEDY):
        chunks, new = [chunk for ids in contexts for chunk in chunks_of(ids)], []
        for number in range(count):
            draws = Draws.of([sampling]).at(number)
            new.append(int(draw(fresh(tokens + new, chunks)[None], draws)[0]))
            if new[-1] in (1, 3):
                new.pop()
                break
        tokenizer = text_model.tokenizer
        return tokenizer.decode(tokens + new)[len(tokenizer.decode(tokens)) :], new

    return write


@pytest.fixture(scope="module")
def hot(text_model, write) -> str:
    """Twenty tokens drawn after PROMPT beside TEXTS."""
    tokenizer = text_model.tokenizer
    text, new = write([0, *tokenizer.encode(PROMPT)], [tokenizer.encode(text) for text in TEXTS], 20, HOT)
    assert len(new) == 20
    assert len(set(new)) > 10
    return text


def test_generate(text_model, context, hot, write):
    """BOS stands before the prompt alone; the text is what the prompt's text goes on with."""
    assert text_model.generate(PROMPT, context, max_new_tokens=20, sampling=HOT) == hot
    plain, _ = write([0, *text_model.tokenizer.encode(PROMPT)], [], 12, HOT)
    assert len(plain) > 5
    assert text_model.generate(PROMPT, max_new_tokens=12, sampling=HOT) == plain != hot[: len(plain)]


def test_stream(text_model, context, hot):
    """A piece a token, and one at the end."""
    pieces = list(text_model.stream(PROMPT, context, max_new_tokens=20, sampling=HOT))
    assert "".join(pieces) == hot
    assert len(pieces) == 21
    assert sum(map(bool, pieces)) > 10


def test_stop_strings(text_model, context, hot):
    stop = [hot[9:12], hot[15:]]
    text = text_model.generate(PROMPT, context, max_new_tokens=20, sampling=HOT, stop=stop)
    assert text == hot[: hot.index(stop[0])] != hot
    pieces = list(text_model.stream(PROMPT, context, max_new_tokens=20, sampling=HOT, stop=stop))
    assert "".join(pieces) == text
    assert len(pieces) < 20


def test_prompts_together(text_model, context, hot, write):
    """Each is what it is alone: with one context for all, with its own, with none."""
    tokenizer = text_model.tokenizer
    other = tokenizer.encode(TEXTS[1])
    both = text_model.generate([PROMPT, "x"], context, max_new_tokens=20, sampling=[HOT, GREEDY])
    assert both == [hot, text_model.generate("x", context, max_new_tokens=20)]
    contexts = [context, context.select([1])]
    alone, _ = write([0, *tokenizer.encode("x")], [other], 20)
    assert text_model.generate([PROMPT, "x"], contexts, max_new_tokens=20, sampling=[HOT, GREEDY]) == [hot, alone]
    stopped = text_model.generate([PROMPT, "x"], context, max_new_tokens=20, sampling=[HOT, GREEDY], stop=[hot[5:8]])
    assert stopped == [hot[: hot.index(hot[5:8])], both[1].split(hot[5:8])[0]]


def test_a_prompt_and_new_tokens_fill_the_window(text_model, write):
    """The last new token takes no position. One more is refused, or costs the prompt its first token."""
    prompt = "It is a test. " + PROMPT
    ids = [0, *text_model.tokenizer.encode(prompt)]
    room = WINDOW + 1 - len(ids)
    wanted, new = write(ids, [], room, HOT)
    assert len(new) == room > 5
    for overflow in ("error", "truncate_left"):
        assert text_model.generate(prompt, max_new_tokens=room, sampling=HOT, overflow=overflow) == wanted
    with pytest.raises(ValueError, match=f"{len(ids)} tokens and {room + 1} new .* {WINDOW} "):
        text_model.generate(prompt, max_new_tokens=room + 1)
    cut = fit(prompt, text_model.tokenizer, WINDOW, room + 1, "truncate_left", CHUNK)
    assert cut == ([ids[1:2]], [0, *ids[2:]])


@pytest.mark.parametrize("mode", ["truncate_left", "passages"])
def test_overflow(text_model, context, write, mode):
    """What the decoder cannot read of a long prompt is read by the encoder, after the contexts."""
    tokenizer = text_model.tokenizer
    prompt = "def f(x):\n\n" * 9 + PROMPT
    room = WINDOW + 1 - 6 - 1
    if mode == "truncate_left":
        ids = tokenizer.encode(prompt)
        moved, rest = ids[:-room], ids[-room:]
        moved = [moved[: len(moved) % CHUNK], *chunks_of(moved[len(moved) % CHUNK :])]
    else:
        parts = [tokenizer.encode("def f(x):\n\n")] * 9
        count = next(n for n in range(10) if len(tokenizer.encode(prompt[11 * n :])) <= room)
        moved, rest = parts[:count], tokenizer.encode(prompt[11 * count :])
    assert len(moved) > 3
    wanted, _ = write([0, *rest], [*map(tokenizer.encode, TEXTS), *moved], 6)
    limits = {"max_new_tokens": 6, "overflow": mode, "chunk_length": CHUNK}
    assert text_model.generate(prompt, context, **limits) == wanted
    alone, _ = write([0, *tokenizer.encode("x")], list(map(tokenizer.encode, TEXTS)), 6)
    assert text_model.generate([prompt, "x"], context, **limits) == [wanted, alone]


def test_score(text_model, context, fresh):
    """Log-probabilities of the tokens that a continuation adds; spaces at the prompt's end count to it."""
    tokenizer = text_model.tokenizer
    chunks = [chunk for text in TEXTS for chunk in chunks_of(tokenizer.encode(text))]
    prompt, continuations = PROMPT + "  ", ["x", " + 1\n", "<s>"]
    scores = text_model.score(prompt, continuations, context)
    before = [0, *tokenizer.encode(PROMPT)]
    for score, continuation in zip(scores, continuations, strict=True):
        whole = [0, *tokenizer.encode(prompt + continuation)]
        assert whole[: len(before)] == before
        wanted, best = [], []
        for at in range(len(before), len(whole)):
            logits_V = np.asarray(fresh(whole[:at], chunks), np.float64)
            wanted.append(logits_V[whole[at]] - np.log(np.exp(logits_V - logits_V.max()).sum()) - logits_V.max())
            best.append(logits_V.argmax() == whole[at])
        np.testing.assert_allclose(score.log_probs, wanted, rtol=0, atol=2e-5)
        assert score.greedy == all(best)
    plain = text_model.score(prompt, continuations)
    assert all(abs(a.total - b.total) > 1e-3 for a, b in zip(scores, plain, strict=True))


def test_a_boundary_within_a_token(text_model, monkeypatch):
    """Where prompt and continuation share a token, nothing of the text is lost, and all begin at the same place."""
    tokenizer, given = text_model.tokenizer, []
    monkeypatch.setattr(text, "score", lambda *read: given.append(read[1:3]) or [])
    merged = 0
    for prompt in ("It i", "It is a t", "def f(x):\n  ", "qui", "", " \n"):
        continuations = ["s a test", "n", " ", "est", "ck"]
        text_model.score(prompt, continuations)
        before, after = given[-1]
        wholes = [tokenizer.encode(prompt + continuation, bos=True) for continuation in continuations]
        assert [before + ids for ids in after] == wholes
        assert [tokenizer.decode(whole) for whole in wholes] == [prompt + text for text in continuations]
        stripped = tokenizer.encode(prompt.rstrip(), bos=True)
        assert before == stripped[: len(before)]
        assert len(before) == len(stripped) or any(whole[len(before)] != stripped[len(before)] for whole in wholes)
        merged += len(before) < len(stripped)
    assert merged > 1
    assert text_model.score("a", []) == []


@pytest.mark.parametrize("mode", ["truncate_left", "passages"])
def test_score_of_a_long_prompt(text_model, context, monkeypatch, mode):
    """All of the text is read, the beginning by the encoder, and the decoder reads as much as fits."""
    tokenizer, scored, moved = text_model.tokenizer, [], []
    encode = text.encode
    monkeypatch.setattr(text, "encode", lambda model, ids, *more: moved.extend(ids) or encode(model, ids, *more))
    monkeypatch.setattr(text, "score", lambda *read: scored.append(read) or [])
    prompt, continuations = "def f(x):\n\n" * 9 + "It i", ["s a test", "t"]
    text_model.score(prompt, continuations, context, overflow=mode, chunk_length=CHUNK)
    (_, before, after, memory, _) = scored[0]
    for ids, continuation in zip(after, continuations, strict=True):
        assert "".join(map(tokenizer.decode, [*moved, before + ids])) == prompt + continuation
        assert len(before) + len(ids) <= WINDOW + 1
    longest = max(map(len, after))
    assert before[0] == tokenizer.bos_id
    assert len(moved) > 1
    if mode == "truncate_left":
        assert len(before) + longest == WINDOW + 1
    else:
        more = prompt[len("def f(x):\n\n") * (len(moved) - 1) :]
        assert 1 + len(tokenizer.encode(more)) + longest > WINDOW + 1
    assert memory.valid_BM.sum() == context.num_tokens + sum(map(len, moved))
    known = dataclasses.replace(text_model, window=None)
    for call in (
        lambda: known.score(prompt, ["a"], overflow=mode),
        lambda: known.generate(prompt, overflow=mode),
    ):
        with pytest.raises(ValueError, match="window, .*max_position_embeddings"):
            call()


def test_contexts_as_ids(text_model, context):
    ids = list(map(text_model.tokenizer.encode, TEXTS))
    given = text_model.encode([ids[0], np.array(ids[1])], chunk_length=CHUNK)
    assert [p.digest for p in given.passages] == [p.digest for p in context.passages]


def test_spaces_of_a_tokenizer_that_puts_one_before_every_text(llama_2, monkeypatch):
    """None is added between prompt and continuation, and none is lost."""
    tokenizer, given = llama_2.tokenizer, []
    whole = tokenizer.encode("what is it", bos=True)
    before = tokenizer.encode("what", bos=True)
    assert tokenizer.encode(" is it") != whole[len(before) :]
    monkeypatch.setattr(text, "stream", lambda *_, **__: iter([[i] for i in whole[len(before) :]]))
    assert llama_2.generate("what", max_new_tokens=9) == " is it"
    assert "".join(llama_2.stream("what", max_new_tokens=9, stop=[" it"])) == " is"
    monkeypatch.setattr(text, "score", lambda *read: given.extend(read[1:3]) or [])
    llama_2.score("what ", ["is it", " is"])
    assert given == [before, [whole[len(before) :], tokenizer.encode("what  is", bos=True)[len(before) :]]]


def test_known_texts_are_not_encoded_again(text_model, context, monkeypatch):
    read = []
    encode = context_module.encode_chunks
    monkeypatch.setattr(context_module, "encode_chunks", lambda *given: read.append(given[2].sum()) or encode(*given))
    again = text_model.encode(["new", *TEXTS], chunk_length=CHUNK, known=context)
    assert sum(read) == len(text_model.tokenizer.encode("new"))
    assert [p.digest for p in again.passages[1:]] == [p.digest for p in context.passages]


def test_a_plain_decoder(plain_home, write, fresh):
    """A Llama directory generates and scores; it has no encoder, and of a long prompt it reads the last tokens."""
    model = cepe_jax.load(plain_home)
    tokens = [0, *model.tokenizer.encode("x = ")]
    wanted, _ = write(tokens, [], 5)
    assert model.generate("x = ", max_new_tokens=5) == wanted
    long = "The quick brown fox: " * 9
    ids = model.tokenizer.encode(long)
    wanted, _ = write([0, *ids[len(ids) - (WINDOW - 9) :]], [], 9)
    assert model.generate(long, max_new_tokens=9, overflow="truncate_left") == wanted
    whole, before = model.tokenizer.encode(long + "x"), len(model.tokenizer.encode(long.rstrip()))
    read = [0, *whole[len(whole) - WINDOW :]]
    (score,) = model.score(long, ["x"], overflow="truncate_left")
    for at, log_prob in zip(range(before - len(whole), 0), score.log_probs, strict=True):
        logits_V = np.asarray(fresh(read[:at]), np.float64)
        assert log_prob == pytest.approx(logits_V[read[at]] - np.logaddexp.reduce(logits_V), abs=1e-5)
    for call, said in (
        (lambda: model.encode(["a"]), "context .*CEPE .*plain decoder"),
        (lambda: model.score("a", ["b"], ContextCache({})), "context .*CEPE .*plain decoder"),
        (lambda: model.generate("a", overflow="passages"), "passages.* truncate_left"),
        (lambda: model.score("a", ["b"], overflow="passages"), "passages.* truncate_left"),
    ):
        with pytest.raises(ValueError, match=said):
            call()


def test_load(home, text_model, tmp_path):
    assert isinstance(text_model, TextModel)
    assert (text_model.window, text_model.stop_ids) == (WINDOW, (1, 3))
    assert cepe_jax.load(home, "bfloat16", window=20).window == 20
    assert cepe_jax.load(home, "bfloat16").model.decoder.embed.dtype == "bfloat16"
    bare = shutil.copytree(home, tmp_path / "bare")
    forget(bare)
    for name in ("tokenizer.json", "generation_config.json"):
        (bare / name).unlink()
    with pytest.raises(FileNotFoundError, match=r"bare: no tokenizer\.model .*no tokenizer\.json"):
        cepe_jax.load(bare)
    loaded = cepe_jax.load(bare, tokenizer=home)
    assert (loaded.stop_ids, loaded.identity) == ((1,), text_model.identity)
    config = json.loads((bare / "config.json").read_text())
    for ends, stop_ids in ((2, (1, 2)), ([2, 3], (1, 2, 3)), (None, (1,))):
        config["huggingface"]["eos_token_id"] = ends
        (bare / "config.json").write_text(json.dumps(config))
        assert cepe_jax.load(bare, tokenizer=home).stop_ids == stop_ids
    for wrong in ("</s>", -1, True):
        (bare / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}))
        with pytest.raises(ValueError, match=f"generation_config.json: eos_token_id is {wrong!r}"):
            cepe_jax.load(bare, tokenizer=home)


def test_verify_reads_all_weights_first(home, tmp_path):
    path = shutil.copytree(home, tmp_path / "flipped")
    assert cepe_jax.load(path, verify=True).window == WINDOW
    flip(path)
    cepe_jax.load(path)
    with pytest.raises(ValueError, match=f"{path}: .* changed"):
        cepe_jax.load(path, verify=True)


def test_refused_directories(home, tmp_path, monkeypatch):
    """Before a weight is read."""
    config = json.loads((home / "config.json").read_text())
    other = byte_level(tmp_path / "tokenizer.json", ("<s>", "</s>"), 330)
    with pytest.raises(ValueError, match="tokenizer of .*: use .*tokenizer.json"):
        cepe_jax.load(home, tokenizer=other)
    bare = tmp_path / "bare"
    bare.mkdir()
    for name, ids in (("decoder", 320), ("encoder", 325)):
        changed = {**config, name: {**config[name], "vocab_size": ids}}
        (bare / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=f" 330 ids .*{name} of .*bare .* {ids}: "):
            cepe_jax.load(bare, tokenizer=home)
    for window in (1, WINDOW + 1):
        with pytest.raises(ValueError, match=f"window is {window}: .* 2 .* {WINDOW}"):
            cepe_jax.load(home, window=window)
    save(make_encoder(), tmp_path / "encoder")
    with pytest.raises(ValueError, match="an encoder, .*CEPE"):
        cepe_jax.load(tmp_path / "encoder")
    with pytest.raises(ValueError, match="no config.json in .*: give a directory"):
        cepe_jax.load(tmp_path / "absent")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="meta/Llama-2: hf download meta/Llama-2 --local-dir Llama-2, "):
        cepe_jax.load("meta/Llama-2")
    with pytest.raises(ValueError, match="no config.json in bare/model: give a directory"):
        cepe_jax.load("bare/model")  # bare is a directory, so it is no name of the hub's


def test_bad_input(text_model, context):
    long = "def f(x):\n" * 20
    cases = {
        "encode .*list of texts": lambda: text_model.encode("a"),
        "encode .*lists of ids": lambda: text_model.encode([5, 6]),
        "passage 1 .*no tokens": lambda: text_model.encode(["a", ""]),
        f"window of {WINDOW} tokens": lambda: text_model.generate(long, context, max_new_tokens=4),
        "50 new tokens.*window's": lambda: text_model.generate("a", max_new_tokens=50, overflow="passages"),
        "overflow 'left': choose": lambda: text_model.generate("a", max_new_tokens=5, overflow="left"),
        "max_new_tokens is 0": lambda: text_model.generate("a", max_new_tokens=0),
        "2 contexts for 1 prompts": lambda: text_model.generate("a", [context, context], max_new_tokens=5),
        "context .*another encoder": lambda: text_model.generate(
            "a", ContextCache({**text_model.identity, "encoder": "x"}), max_new_tokens=5
        ),
        "prompt is 5": lambda: text_model.generate(5),
        "prompt is a list of 2": lambda: text_model.generate(["a", 5]),
        "prompt is None": lambda: text_model.stream(None),
        "max_new_tokens is '5'": lambda: text_model.generate("a", max_new_tokens="5"),
        "stop is None": lambda: text_model.generate("a", stop=None, max_new_tokens=5),
        r"stop is \[5\]": lambda: text_model.generate("a", stop=[5], max_new_tokens=5),
        "stop is 'x'": lambda: text_model.generate("a", stop="x", max_new_tokens=5),
        "continuation 1 .*empty": lambda: text_model.score("a", ["b", ""]),
        f"continuation 0 .*window {WINDOW}": lambda: text_model.score(long, ["a"]),
    }
    for said, call in cases.items():
        with pytest.raises(ValueError, match=said):
            call()
