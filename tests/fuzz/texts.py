"""Tokenizers, chat templates, raw documents, tasks and datasets that are spoiled."""

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
from support import datasets
from support.tokenizers import CHATML, CHATML_TOKENS, as_llama_2, byte_level

from cepe_jax.data.corpus import PrepareConfig, documents_of, no_counts
from cepe_jax.data.examples import ExampleConfig
from cepe_jax.data.loader import Sequences
from cepe_jax.data.recipes import Windows
from cepe_jax.data.sources import BYTE_ORDER_MARK, plan
from cepe_jax.data.template import Template
from cepe_jax.data.tokenizer import Tokenizer
from cepe_jax.evaluation.tasks import layouts
from fuzz.kind import KINDS, Kind, differing, mistyped, same, spoil_bytes, spoil_json
from fuzz.mutations import (
    Rng,
    change_lines,
    change_template,
    compressed_bomb,
    packed,
    pick,
    zstd,
)

PROBES = ["Hello, is it a test?\n  007 naïve 🙂", " <|im_start|>user </s>", ""]
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "</s><|im_end|> a"}]


def make_tokenizer_json(to: Path) -> None:
    byte_level(to / "tokenizer.json", ("<s>", "</s>", *CHATML_TOKENS), 330)
    added = {str(i): {"content": name, "special": True} for i, name in enumerate(("<s>", "</s>", *CHATML_TOKENS))}
    settings = {"bos_token": {"__type": "AddedToken", "content": "<s>"}, "eos_token": "</s>", "pad_token": None}
    settings |= {"chat_template": [{"name": "default", "template": CHATML}], "legacy": False, "add_bos_token": True}
    (to / "tokenizer_config.json").write_text(json.dumps(settings | {"added_tokens_decoder": added}))
    (to / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": list(CHATML_TOKENS)}))
    (to / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 3}))


def make_tokenizer_model(to: Path) -> None:
    make_tokenizer_json(to)
    as_llama_2(to / "tokenizer.model")
    for name in ("tokenizer.json", "added_tokens.json", "tokenizer_config.json", "special_tokens_map.json"):
        (to / name).unlink()


def read_tokenizer(place: Path) -> tuple[Tokenizer, list[list[int]], list[str]]:
    tokenizer = Tokenizer(place)
    ids = [tokenizer.encode(text, bos=True, eos=True) for text in PROBES]
    ids += [tokenizer.encode_special(text) for text in PROBES]
    return tokenizer, ids, [tokenizer.decode(row) for row in ids]


def read_chat(place: Path) -> tuple[Tokenizer, list[list[int]], list[str]]:
    """Read the tokenizer and a conversation by its template."""
    tokenizer, ids, texts = read_tokenizer(place)
    template = Template(tokenizer)
    escape = template.escape_for(MESSAGES)
    text = template.render(MESSAGES, escape)
    return tokenizer, [*ids, tokenizer.encode_special(text, escape)], [*texts, text]


def wrong_ids(place: Path, result: tuple, whole: tuple) -> str:
    """Check that ids are ids, and the ends of texts those that the settings name."""
    tokenizer, ids, texts = result
    for i in (tokenizer.bos_id, tokenizer.eos_id, *tokenizer.begin, *tokenizer.special.values(), *sum(ids, [])):
        if type(i) is not int or not 0 <= i < tokenizer.vocab_size:
            return f"an id is {i!r}, and there are {tokenizer.vocab_size}"
    if not all(isinstance(text, str) for text in texts):
        return "no texts"
    path = place / "tokenizer_config.json"
    settings = json.loads(path.read_text()) if path.exists() else {}
    for role, i in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id)):
        name = settings.get(role)
        name = name.get("content", name) if isinstance(name, dict) else name
        if name not in (None, "") and tokenizer.special.get(name if isinstance(name, str) else None) != i:
            return f"{role} is {name!r} and its id {i}"
    return ""


def wrong_vocabulary(place: Path, result: tuple, whole: tuple) -> str:
    """A tokenizer.json has no checksum: each token must have the id that the file gives it."""
    written, ours = json.loads((place / "tokenizer.json").read_text()), result[0]._impl.vocabulary()
    added = {token["content"]: token["id"] for token in written.get("added_tokens") or []}
    for name, i in (written["model"]["vocab"] | added).items():
        if ours.get(name) != i or type(i) is not int:
            return f"{name!r} is {ours.get(name)!r}, and the file has {i!r}"
    return wrong_ids(place, result, whole)


def wrong_pieces(place: Path, result: tuple, whole: tuple) -> str:
    """A tokenizer.model has no checksum: pieces and scores must be those that protobuf reads."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString((place / "tokenizer.model").read_bytes())
    if list(result[0]._impl.table()) != [(piece.piece, piece.score) for piece in model.pieces]:
        return "other pieces than the file's"
    return wrong_ids(place, result, whole)


def spoil_beside(place: Path, rng: Rng) -> list[str]:
    names = ["tokenizer_config.json"] * 4 + ["special_tokens_map.json", "added_tokens.json"]
    return spoil_json(place / pick(rng, names), rng)


def spoil_template(place: Path, rng: Rng) -> list[str]:
    (place / "chat_template.jinja").write_bytes(change_template(CHATML, rng))
    return []


KINDS["tokenizer.model"] = Kind(
    make_tokenizer_model, lambda place, rng: spoil_bytes(place / "tokenizer.model", rng), read_tokenizer, wrong_pieces
)
KINDS["tokenizer.json"] = Kind(
    make_tokenizer_json,
    lambda place, rng: spoil_json(place / "tokenizer.json", rng),
    read_tokenizer,
    wrong_vocabulary,
)
KINDS["tokenizer_config.json"] = Kind(make_tokenizer_json, spoil_beside, read_chat, wrong_ids)
KINDS["chat template"] = Kind(make_tokenizer_json, spoil_template, read_chat, wrong_ids)


# Data: raw documents, tasks, datasets

DOCUMENTS = [{"text": f"document {i} of a\ntale", "meta": {"source": f"s{i % 2}"}} for i in range(8)]
SUFFIXES = "", ".gz", ".zst"


def make_documents(to: Path) -> None:
    lines = "".join(json.dumps(document) + "\n" for document in DOCUMENTS).encode()
    for suffix in SUFFIXES:
        (to / f"a.jsonl{suffix}").write_bytes(packed(lines, suffix))
        (to / f"b.txt{suffix}").write_bytes(packed("One naïve text.\n".encode() * 9, suffix))


def spoil_documents(place: Path, rng: Rng) -> list[str]:
    """Change bytes, a line, or let a small file unfold to 4 GiB."""
    path = place / pick(rng, sorted(path.name for path in place.iterdir()))
    if path.suffix in SUFFIXES and rng.random() < 0.1:
        path.write_bytes(compressed_bomb(path.suffix))
        path.rename(path.with_name(f"bomb-{path.name}"))
    elif "jsonl" in path.name and rng.random() < 0.4:
        lines = "".join(json.dumps(document) + "\n" for document in DOCUMENTS)
        path.write_bytes(packed(change_lines(lines, rng).encode("utf-8", "surrogatepass"), path.suffix))
    else:
        spoil_bytes(path, rng)
    return []


def read_documents(place: Path) -> tuple[dict[str, str], list[str]]:
    """Return the documents by name, and what is wrong with others."""
    config = PrepareConfig(input=place, out=place / "out", patterns=("**/*.*",), bad_share=1.0)
    counts, read = no_counts(), {}
    for unit in plan(config.input, config.patterns, (), 1 << 28):
        for _, name, _, content in documents_of(config, unit, counts):
            read[name] = content if len(content) < 1 << 20 else "long"
    return read, counts["faults"]


def wrong_documents(place: Path, result: tuple, whole: tuple) -> str:
    """A document must be what Python's own decompression and JSON read; of the others there must be one line each."""
    expected = {}
    for path in place.iterdir():
        if path.name.startswith("bomb"):
            continue
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
        data = zstd().decompress(data) if path.suffix == ".zst" else data
        at = 0
        for line in data.split(b"\n") if "jsonl" in path.name else [data]:
            name = f"{path.name}:{at}" if "jsonl" in path.name else path.name
            at += len(line) + 1
            try:
                text = line.decode().removeprefix(BYTE_ORDER_MARK)
                expected[name] = json.loads(text)["text"] if "jsonl" in path.name else text
            except (ValueError, LookupError, TypeError, RecursionError):
                continue
    read, faults = result
    for name, text in read.items():
        if text != expected.get(name) and not name.startswith("bomb"):
            return f"{name} is {text[:60]!r}, and the file has {expected.get(name, '')[:60]!r}"
    if lost := [name for name, text in whole[0].items() if expected.get(name) == text and read.get(name) != text]:
        return f"{', '.join(lost)} are sound and lost"
    if any("\n" in fault or str(place) not in fault for fault in faults):
        return f"faults: {faults}"
    return ""


QUESTION = {
    "id": 7,
    "question": "Who?",
    "answers": ["B"],
    "choices": ["A", "B"],
    "contexts": ["one", "two"],
    "scores": [2, 0.5],
}
QUESTION |= {"demonstrations": [{"question": "Q", "answer": "A", "contexts": ["c"]}, {"question": "R", "answer": "B"}]}
PASSAGE = {"title": "T", "text": "one", "score": "1.5"}
RETRIEVED = {"question": "Who?", "answers": ["B"], "ctxs": [PASSAGE, PASSAGE | {"score": 0.5}]}
TASKS = {"records": (layouts.RECORDS, QUESTION), "nq": (layouts.LAYOUTS["nq"], RETRIEVED)}


def make_tasks(to: Path) -> None:
    for name, (_, line) in TASKS.items():
        (to / name).mkdir()
        (to / name / "test.jsonl").write_text("".join(json.dumps(line | {"id": i}) + "\n" for i in range(3)))


def spoil_tasks(place: Path, rng: Rng) -> list[str]:
    path = place / pick(rng, list(TASKS)) / "test.jsonl"
    if rng.random() < 0.3:
        return spoil_bytes(path, rng)
    path.write_text(change_lines(path.read_text(), rng))
    return []


def read_tasks(place: Path) -> dict[str, list]:
    return {name: layouts.load(place / name, layout, False)[0] for name, (layout, _) in TASKS.items()}


def wrong_tasks(place: Path, result: dict, whole: dict) -> str:
    """Each record must have the fields that JSON reads in its line, in their declared types."""
    for name in TASKS:
        lines = [json.loads(line) for line in (place / name / "test.jsonl").read_text().splitlines() if line.strip()]
        for line, record in zip(lines, result[name], strict=True):
            if mistyped(record, type(record)):
                return f"another type in {record}"
            line = {"choices": [], "demonstrations": []} | line
            if "ctxs" in line:
                texts = [f"{one['title']}\n{one['text']}" if one.get("title") else one["text"] for one in line["ctxs"]]
                scores = [one.get("score") for one in line["ctxs"]]
                line = line | {
                    "contexts": texts,
                    "scores": None if None in scores else [float(score) for score in scores],
                }
                answers = line.get("answers", line.get("answer", line.get("possible_answers")))
                line["answers"] = [one for one in ([answers] if isinstance(answers, str) else answers) if one != ""]
            for field in ("question", "answers", "choices", "contexts"):
                if differing(line.get(field, []), getattr(record, field)):
                    return f"{field} is {getattr(record, field)!r} for {line.get(field)!r}"
            if (line.get("scores") and [float(score) for score in line["scores"]]) != (
                record.scores and list(record.scores)
            ):
                return f"scores are {record.scores} for {line.get('scores')}"
            if len(record.demonstrations) != len(line["demonstrations"]):
                return f"{len(record.demonstrations)} demonstrations"
    return ""


def make_dataset(to: Path) -> None:
    tokenizer = datasets.make_tokenizer(to)
    rng = np.random.default_rng(0)
    path = datasets.write_sequences(to / "data", list(rng.integers(3, 290, (12, 17))), 16, tokenizer)
    shutil.copytree(path, to, dirs_exist_ok=True)
    shutil.rmtree(path)


def spoil_dataset(place: Path, rng: Rng) -> list[str]:
    names = [path.name for path in place.iterdir() if path.is_file() and path.name != "report.md"]
    path = place / pick(rng, sorted(names) + ["dataset.json"] * 4)
    return spoil_json(path, rng) if path.suffix == ".json" else spoil_bytes(path, rng)


def read_dataset(place: Path) -> dict:
    sequences = Sequences(place, Windows(ExampleConfig(window=8, num_chunks=1, chunk_length=8)))
    read = [sequences[number] for number in range(len(sequences))]
    rows = [(np.asarray(record["tokens"]).tolist(), record["name"], record["domain"]) for record in read]
    lengths = [sequences.records.lengths(shard) for shard in range(len(sequences.records.facts["shards"]))]
    lengths = [{domain: (a.tolist(), b.tolist()) for domain, (a, b) in of.items()} for of in lengths]
    return {"rows": rows, "lengths": lengths, "tokenizer": sequences.records.tokenizer.fingerprint()}


KINDS["raw documents"] = Kind(make_documents, spoil_documents, read_documents, wrong_documents)
KINDS["task file"] = Kind(make_tasks, spoil_tasks, read_tasks, wrong_tasks)
KINDS["dataset"] = Kind(make_dataset, spoil_dataset, read_dataset, same)
