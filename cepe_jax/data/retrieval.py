"""Passages for sequences: documents cut into passages, searched for what each sequence begins with.

`out/index` holds the passages and what is searched, the same for every job; the first one that is built stays. The
result is a dataset whose record i belongs to record i of the sequences.
"""

import functools
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cepe_jax.data.builder import Builder, ShardWriter, array, text, token_dtype
from cepe_jax.data.corpus import Corpus
from cepe_jax.data.examples import RETRIEVED
from cepe_jax.data.passages import Passages
from cepe_jax.data.records import Records, joins, opened, shard_path
from cepe_jax.data.sampling import documents_in
from cepe_jax.data.search import BATCH, BM25, Dense, Encoder, Searcher, check_encoder_name, load_encoder
from cepe_jax.data.units import JobConfig, Work, one_job, run_units
from cepe_jax.directories import staged_directory
from cepe_jax.parsing import Seed
from cepe_jax.progress import track

INDEX = "index"
BINS = 1 << 16  # of the draws by which documents are chosen


@dataclass(frozen=True, kw_only=True)
class RetrieveConfig(JobConfig):
    data: Path  # a dataset of sequences
    passages: Path  # the dataset of documents that is searched
    out: Path  # gets the dataset of passages
    k: int  # passages for a sequence
    split: str = "train"  # split of the sequences
    passage_split: str = "retrieval"  # split of the documents
    passage_length: int = 256  # tokens of a passage; a document's last one is shorter
    query_tokens: int = 256  # first tokens of a sequence, which are its query
    passage_tokens: int = 200_000_000  # tokens that are searched, of whole documents in random order
    encoder: str = ""  # "": BM25; module:function: (n, width) for a list of n texts, compared by dot product
    seed: Seed = 0  # draws the documents that are searched

    def __post_init__(self):
        super().__post_init__()
        for name in ("k", "passage_length", "query_tokens", "passage_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give a number above 0")
        check_encoder_name(self.encoder)


def choose(corpus: Corpus, tokens: int, seed: int) -> np.ndarray:
    """Return the numbers, ascending, of documents drawn at random until they have this many tokens, or of all.

    Each document draws a number, and those with the lowest are chosen. The lengths are read twice, a shard at a time:
    the first time for the tokens in each bin of draws, the second for the draws in the bin where the last one is.
    """

    def shards() -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield the numbers, lengths and draws of each shard's documents."""
        for shard in range(len(corpus.records.facts["shards"])):
            table = list(corpus.records.lengths(shard).values()) or [(np.zeros(0, int), np.zeros(0, int))]
            numbers, lengths = (np.concatenate(columns) for columns in zip(*table, strict=True))
            order = np.argsort(numbers)
            yield numbers[order], lengths[order], np.random.default_rng((seed, shard)).random(len(order))

    tokens_in = sum(np.bincount((draws * BINS).astype(int), lengths, BINS) for _, lengths, draws in shards())
    last = int(np.searchsorted(np.cumsum(tokens_in), tokens))
    chosen, parts = [], []
    for numbers, lengths, draws in shards():
        bins = (draws * BINS).astype(int)
        chosen.append(numbers[bins < last])
        parts.append((numbers[bins == last], lengths[bins == last], draws[bins == last]))
    numbers, lengths, draws = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    order = np.argsort(draws)
    enough = np.searchsorted(np.cumsum(lengths[order]), tokens - tokens_in[:last].sum()) + 1
    return np.sort(np.concatenate([*chosen, numbers[order[:enough]]]))


def build_index(config: RetrieveConfig, corpus: Corpus, encode: Encoder | None) -> None:
    """`out/index`, of this job or of another one that was faster; both are the same."""
    index = config.out / INDEX
    if index.exists():
        return
    try:
        with staged_directory(index) as place:
            numbers = choose(corpus, config.passage_tokens, config.seed).tolist()
            documents = [corpus[n] for n in track(numbers, "read, documents")]
            passages = Passages.of(documents, config.passage_length)
            passages.save(place)
            texts = track(passages.texts(corpus.tokenizer), "index, passages", len(passages))
            searcher = Dense.of(texts, encode) if encode else BM25.of(texts)
            searcher.save(place)
            place.rename(index)
    except OSError:
        if not index.exists():  # by now, of another job
            raise


def features_of(dtype, passage_length: int) -> dict:
    """Return the features: a row for each passage, best first, and in `lengths` the number of its real tokens.

    `names` has a line for each passage: the document, and the passage's first token in it.
    """
    return {
        "passages": array(dtype, None, passage_length),
        "lengths": array(np.int32, None),
        "scores": array(np.float32, None),
        "names": text(),
    }


@one_job
def retrieve(config: RetrieveConfig) -> None:
    """A dataset of passages at `config.out`, the best ones for each sequence, none of them of its own documents."""
    base = Records(config.data, config.split)
    if "length" not in base.index:
        raise ValueError(f"{config.data} holds {base.name}: sample sequences from it first")
    corpus = Corpus(config.passages, config.passage_split)
    if corpus.records.index["tokenizer"] != base.index["tokenizer"]:
        raise ValueError(f"{config.passages} and {config.data} have different tokenizers: prepare both with one")
    encode = load_encoder(config.encoder) if config.encoder else None
    tokenizer = base.tokenizer
    settings = config.identity("out") | {"data": base.digest, "passages": corpus.records.digest}
    builder = Builder(config.out, settings, tokenizer)
    if builder.finished:
        return
    try:
        build_index(config, corpus, encode)
    except ValueError:  # other settings may do
        builder.forget()
        raise
    sizes = [shard["records"] for shard in base.facts["shards"]]
    units = [(sum(sizes[:number]), size) for number, size in enumerate(sizes)]
    dtype = token_dtype(tokenizer.vocab_size)
    work = RetrieveUnit(config, len(units), dtype, base.digest)
    job = config if config.workers or not encode else replace(config, workers=1)  # an accelerator is one process's
    marks = run_units(builder, units, sizes, work, job, "retrieve, sequences")
    if marks is None:
        return
    for left in config.out.glob(f".{INDEX}.*"):  # of jobs that were killed
        shutil.rmtree(left)
    facts = {name: getattr(config, name) for name in ("passage_length", "query_tokens")}
    facts |= {"tokenizer": base.index["tokenizer"], "joins": joins(base, config.out)}
    builder.register(RETRIEVED, features_of(dtype, config.passage_length), marks, facts)


@functools.lru_cache(maxsize=1)
def opened_index(config: RetrieveConfig) -> tuple[Passages, Searcher]:
    """The index of `config.out`, opened once by a process that works on one unit after another."""
    index = config.out / INDEX
    searcher = Dense.load(index, load_encoder(config.encoder)) if config.encoder else BM25.load(index)
    return Passages.load(index, config.passage_length), searcher


@dataclass(frozen=True)
class RetrieveUnit:
    """The work on a shard of sequences: their passages, in a shard of their own."""

    config: RetrieveConfig
    num_units: int
    dtype: type
    digest: str  # of the sequences

    def __call__(self, number: int, first: int, count: int) -> Work:
        config = self.config
        base = opened(config.data, config.split, self.digest)
        tokenizer, (passages, searcher) = base.tokenizer, opened_index(config)
        path = shard_path(config.out, RETRIEVED, config.split, number, self.num_units)
        shard = ShardWriter(path, features_of(self.dtype, config.passage_length))
        for start in range(first, first + count, BATCH):
            records = [base[n] for n in range(start, min(start + BATCH, first + count))]
            queries = [tokenizer.decode(record["tokens"][: config.query_tokens].tolist()) for record in records]
            excluded = [passages.numbers_of(documents_in(record["name"])) for record in records]
            all_numbers, all_scores = searcher.search(queries, excluded, config.k)
            for record, numbers, scores in zip(records, all_numbers, all_scores, strict=True):
                numbers = numbers[numbers >= 0]
                tokens, lengths = passages.padded(numbers)
                result = {
                    "passages": tokens,
                    "lengths": lengths,
                    "scores": scores[: len(numbers)],
                    "names": "\n".join(map(passages.source, numbers)),
                }
                shard.write(result, record["domain"], int(lengths.sum()), lengths.tolist())
                yield 1, int(lengths.sum())
        return {"splits": {config.split: shard.close()}}
