"""What runs keep and what users ask that is spoiled: contexts, checkpoints, prompts and sizes."""

import functools
import itertools
import json
from pathlib import Path

import ml_dtypes
import numpy as np
from support.tokenizers import CHUNK

from cepe_jax.inference import context as contexts
from cepe_jax.inference.caches.retrieval_heads import FILE, Scores, read_scores
from cepe_jax.inference.generate import Sampling
from cepe_jax.inference.text import TextModel, load
from cepe_jax.weights.checkpoint import Checkpoints
from cepe_jax.weights.source import open_ours
from fuzz.kind import KINDS, Kind, same, spoil_bytes, spoil_json
from fuzz.models import make_ours, spoil_safetensors, stored
from fuzz.mutations import (
    Rng,
    change_json,
    pick,
)

IDENTITY = {"dtype": "float32", "tokenizer": "t", "encoder": "e"}


def make_contexts(to: Path) -> None:
    states = np.random.default_rng(0).standard_normal((2, 5, 4)).astype(np.float32)
    passages = tuple(contexts.Passage(f"{number:064x}", array, 4, 0) for number, array in enumerate(states))
    contexts.ContextCache(IDENTITY, passages).save(to / "contexts")


def spoil_contexts(place: Path, rng: Rng) -> list[str]:
    """Change the file, or its facts under a hash that is right again."""
    path = place / "contexts"
    if rng.random() < 0.5:
        return spoil_safetensors(path, rng)
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    facts, words = change_json(header["__metadata__"]["facts"], rng)
    header["__metadata__"] = {"facts": facts, "sha256": contexts._sha256(facts, stored(path))}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[start:])
    return words


def read_contexts(place: Path) -> list[tuple]:
    cache = contexts.ContextCache.load(place / "contexts", IDENTITY)
    sizes = cache.num_tokens, cache.nbytes
    return [
        sizes,
        *((one.digest, one.chunk_length, one.chunk_positions, one.states_LE.tobytes()) for one in cache.passages),
    ]


def wrong_contexts(place: Path, result: list[tuple], whole: list[tuple]) -> str:
    """The hash that a spoiled file has may be right: then passages must be exactly those of its facts."""
    data = (place / "contexts").read_bytes()
    facts = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["facts"])
    states, chunks = stored(place / "contexts"), facts.get("chunks", [[0, 0]] * len(facts["passages"]))
    expected = [
        (name, *map(int, chunk), states[name].tobytes()) for name, chunk in zip(facts["passages"], chunks, strict=True)
    ]
    if any(type(number) is not int or number < 0 for chunk in chunks for number in chunk):
        return f"chunks of {chunks}"
    return "" if result[1:] == expected and facts["identity"] == IDENTITY else f"passages of {facts}"


def make_checkpoints(to: Path) -> None:
    checkpoints = Checkpoints(to, {"run": 1})
    for step in (2, 4):
        checkpoints.save(step, state_of(step))
    checkpoints.close()


def state_of(step: int) -> dict:
    return {"a": np.arange(300, dtype=np.float32) + step, "b": {"c": np.ones(5, ml_dtypes.bfloat16)}}


def spoil_checkpoints(place: Path, rng: Rng) -> list[str]:
    files = sorted(path for path in place.rglob("*") if path.is_file())
    path = pick(rng, files)
    try:
        return [] if rng.random() < 0.5 else spoil_json(path, rng, 0) and []
    except (ValueError, LookupError):
        return spoil_bytes(path, rng)


def read_checkpoints(place: Path) -> tuple[int, list[bytes]]:
    import jax
    import jax.numpy as jnp

    checkpoints = Checkpoints(place, {"run": 1})
    try:
        step, state = checkpoints.restore(jax.tree.map(jnp.asarray, state_of(0)))
    finally:
        checkpoints.close()
    return step, [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


KINDS["contexts file"] = Kind(make_contexts, spoil_contexts, read_contexts, wrong_contexts)
KINDS["checkpoint"] = Kind(make_checkpoints, spoil_checkpoints, read_checkpoints, same)


# Retrieval heads


def make_heads(to: Path) -> None:
    make_ours(to)
    shape = shape_of(to)
    scores = np.random.default_rng(0).random((2, *shape)).round(6).tolist()
    written = Scores(open_ours(to).base_hash, 9, 0, *scores)
    (to / FILE).write_text(json.dumps(vars(written)))


def shape_of(place: Path) -> tuple[int, int]:
    decoder = open_ours(place).config.decoder
    return decoder.num_layers, decoder.num_kv_heads


def spoil_heads(place: Path, rng: Rng) -> list[str]:
    return [*spoil_json(place / FILE, rng), FILE]


def read_heads(place: Path) -> tuple:
    return tuple(scores.tolist() for scores in read_scores(place, open_ours(place).config.decoder))


def wrong_heads(place: Path, result: tuple, whole: tuple) -> str:
    """Scores of the same model are the numbers in the file, one for each head."""
    written = json.loads((place / FILE).read_text())
    same_model = written["base"] == open_ours(place).base_hash
    shapes = {np.shape(scores) for scores in result} == {shape_of(place)}
    return "" if same_model and shapes and list(result) == [written["induction"], written["echo"]] else f"{result}"


# Prompts and sizes

PROMPTS = ["", "a", "Hello there! <a>\n\nWhat is it?", "\x00", "é🙂", "\ud800", "</s><|im_start|>", "x" * 5_000]
PROMPTS += ["".join(map(chr, range(0xE000, 0xF900)))]
SIZES_ASKED = [1, 2, 3, 40, 0, -1, 47, 48, 10**12, 1 << 31, 10**30]


def make_model(to: Path) -> None:
    make_ours(to)


def spoil_prompt(place: Path, rng: Rng) -> list[str]:
    sound = {"prompt": "Hello there! <a>", "chat": False, "max_new_tokens": 3, "stop": [], "overflow": "error"}
    case = sound | {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "chunk_length": CHUNK}
    choices = {
        "prompt": PROMPTS,
        "chat": [True],
        "max_new_tokens": SIZES_ASKED,
        "top_k": SIZES_ASKED,
        "top_p": [0.5, 0.0, 2.0, 1e-40],
        "stop": [["a"], ["", "a"], [""], ["\ud800"], ["a" * 5_000], ["e", "\n"]],
        "overflow": ["truncate_left", "passages"],
        "chunk_length": [0, -1, 10**12],
    }
    for name in rng.choice(list(choices), 2, replace=False):
        case[name] = pick(rng, choices[name])
    (place / "case.json").write_text(json.dumps(case))
    words = ["prompt", "text", "max_new_tokens", "top_k", "top_p", "stop", "overflow", "chunk_length", "conversation"]
    return [*words, "message", "window"]


@functools.cache
def model_at(path: Path) -> TextModel:
    return load(path)


def answer(place: Path, plain: bool = False) -> str:
    """Return the text that the case asks for; `plain`: without settings that must not change it."""
    if not (place / "case.json").exists():
        return ""
    case = json.loads((place / "case.json").read_text())
    model = model_at(place.parents[1] / make_model.__name__)
    limits = {"max_new_tokens": case["max_new_tokens"]}
    if not plain:
        sampling = Sampling(case["temperature"], case["top_k"], case["top_p"])
        limits |= {"sampling": sampling, "stop": tuple(case["stop"])}
    where = {"overflow": case["overflow"], "chunk_length": case["chunk_length"]}
    if case["chat"]:
        answer = model.chat(case["prompt"], **where).say(case["prompt"], **limits)  # goes on as long as it may
        return "".join(itertools.islice(answer, 20))
    return model.generate(case["prompt"], **limits, **where)


def wrong_answer(place: Path, result: str, whole: str) -> str:
    """A greedy answer must be the one without stop strings up to the first of them, whatever else is set."""
    expected = answer(place, plain=True)
    stops = json.loads((place / "case.json").read_text())["stop"] if (place / "case.json").exists() else []
    expected = expected[: min([len(expected), *(expected.find(stop) for stop in stops if stop in expected)])]
    return "" if result == expected else f"{result!r} for {expected!r}"


KINDS["retrieval heads"] = Kind(make_heads, spoil_heads, read_heads, wrong_heads)
KINDS["prompts and sizes"] = Kind(make_model, spoil_prompt, answer, wrong_answer)
