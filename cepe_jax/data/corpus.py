"""Files of text to tokenised documents on disk, split by document."""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cepe_jax.data import tokenizer as tokenizers
from cepe_jax.data.examples import Document
from cepe_jax.data.tokenizer import Tokenizer
from cepe_jax.directories import new_directory
from cepe_jax.progress import track

SPLITS = ("train", "test")


@dataclass(frozen=True)
class PrepareConfig:
    input: Path  # the directory that is read
    out: Path  # the dataset's directory; must not exist yet
    pattern: str = "**/*.txt"  # which of the files below `input`
    exclude: tuple[str, ...] = ()  # files below a folder of one of these names are left out
    tokenizer: str = ""  # file or directory; "" trains one on the training split
    vocab_size: int = 2048  # pieces of the tokenizer that is trained
    skip_shorter: int = 0  # characters: shorter documents are counted and left out
    test_fraction: float = 0.01
    seed: int = 0


def split_of(name: str, config: PrepareConfig) -> str:
    """The split of the document `name`: by its name and the seed alone, so it stays when others come and go."""
    draw = int.from_bytes(hashlib.sha256(f"{config.seed}:{name}".encode()).digest()[:8], "big") / 2**64
    return "test" if draw < config.test_fraction else "train"


def read_files(config: PrepareConfig) -> dict[str, str]:
    """Name below `input` -> text of every document; ValueError for what is no text, or empty."""
    if not config.input.is_dir():
        raise FileNotFoundError(f"{config.input}: no such directory")
    texts, skipped = {}, 0
    for path in sorted(config.input.glob(config.pattern)):
        relative = path.relative_to(config.input)
        if not path.is_file() or set(relative.parts[:-1]) & set(config.exclude):
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 at byte {error.start}: convert it or exclude its folder") from None
        if len(text) < config.skip_shorter:
            skipped += 1
        elif not text:
            raise ValueError(f"{path}: an empty document: remove it, or set --skip_shorter=1")
        else:
            texts[str(relative)] = text
    if not texts:
        raise ValueError(f"{config.input}: no document matches {config.pattern} ({skipped} were shorter than asked)")
    print(f"{len(texts)} documents, {skipped} shorter than {config.skip_shorter} characters left out")
    return texts


def prepare(config: PrepareConfig) -> None:
    """A dataset at `config.out`: the tokenizer, and for each split its tokens and documents. Whole or absent.

    A document is BOS, its tokens, EOS.
    """
    texts = read_files(config)
    splits = {name: split_of(name, config) for name in texts}
    for split in SPLITS:
        if split not in splits.values():
            raise ValueError(f"no document fell into the {split} split: change --test_fraction {config.test_fraction}")
    with new_directory(config.out) as staged:
        _write(config, texts, splits, staged)


def _write(config: PrepareConfig, texts: dict[str, str], splits: dict[str, str], staged: Path) -> None:
    if config.tokenizer:
        tokenizer = Tokenizer(config.tokenizer)
        name = "tokenizer.json" if tokenizer.path.suffix == ".json" else "tokenizer.model"  # what Corpus looks for
        shutil.copy(tokenizer.path, staged / name)
        if (settings := tokenizer.path.with_name("tokenizer_config.json")).exists():
            shutil.copy(settings, staged)  # names the special tokens of a tokenizer.json
    else:
        training_texts = (text for name, text in texts.items() if splits[name] == "train")
        tokenizer = tokenizers.train(training_texts, config.vocab_size, staged / "tokenizer.model")
    documents: dict[str, list] = {split: [] for split in SPLITS}
    tokens: dict[str, list] = {split: [] for split in SPLITS}
    for name, text in track(texts.items(), "tokenise", len(texts)):
        ids = tokenizer.encode(text, bos=True, eos=True)
        documents[splits[name]].append({"name": name, "tokens": len(ids)})
        tokens[splits[name]].extend(ids)
    for split in SPLITS:
        np.save(staged / f"{split}.npy", np.asarray(tokens[split], np.int32))
        (staged / f"{split}.json").write_text(json.dumps(documents[split], indent=1))
        print(f"{split}: {len(documents[split])} documents, {len(tokens[split]):,} tokens")
    facts = {"tokenizer": tokenizer.fingerprint(), "tokens": {}}
    for split in SPLITS:
        facts["tokens"][split] = hashlib.sha256((staged / f"{split}.npy").read_bytes()).hexdigest()
    (staged / "dataset.json").write_text(json.dumps(facts, indent=1))


class Corpus:
    """One split of a prepared dataset, its tokens mapped from disk; `facts` are hashes of tokenizer and tokens."""

    def __init__(self, path: Path, split: str):
        path = Path(path)
        if not (path / "dataset.json").exists():
            raise FileNotFoundError(f"{path}: not a prepared dataset: make one with scripts/prepare_data.py")
        self.tokenizer = Tokenizer(path)
        try:
            self.facts = json.loads((path / "dataset.json").read_text())
            entries = json.loads((path / f"{split}.json").read_text())
            tokens = np.load(path / f"{split}.npy", mmap_mode="r")
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path}: its {split} split is damaged ({error}): prepare it again") from None
        if self.facts["tokenizer"] != self.tokenizer.fingerprint():
            raise ValueError(f"{path}: its tokenizer is not the one it was tokenised with: prepare it again")
        ends = np.cumsum([entry["tokens"] for entry in entries])
        if len(tokens) != ends[-1]:
            raise ValueError(
                f"{path}/{split}.npy holds {len(tokens)} tokens, its documents {ends[-1]}: prepare it again"
            )
        starts = [0, *ends[:-1]]
        self.documents = [Document(e["name"], tokens[a:b]) for e, a, b in zip(entries, starts, ends, strict=True)]
