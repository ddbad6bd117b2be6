"""The influence of documents on an answer (arXiv 2407.14985; TracIn, Pruthi et al. 2020).

In(d, (x, y)) = sum over checkpoints of grad l(d, s_y) . grad l((x, y), s_y), with l = -log P of the tokens of s_y alone
where it stands. The product is not normalised. The mean over documents with a pair, of s_y and an n-gram of the prompt,
is compared with the mean over documents with s_y alone.
"""

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cepe_jax.config import Compute, DecoderConfig, Dtype
from cepe_jax.data.corpus import Corpus
from cepe_jax.data.examples import IGNORE
from cepe_jax.directories import one_writer_in, write_json, write_text
from cepe_jax.evaluation.sweep.estimates import Estimate
from cepe_jax.evaluation.sweep.plots import save_figure
from cepe_jax.identity import as_json
from cepe_jax.inference.generate import power_of_two
from cepe_jax.model.llama import Llama
from cepe_jax.model.logits import token_nll
from cepe_jax.parsing import Seed
from cepe_jax.progress import track
from cepe_jax.tracing.index import Index, Ngram
from cepe_jax.tracing.probabilities import HoldsSpecial, Read, text_of
from cepe_jax.tracing.table import Table, Target
from cepe_jax.tracing.words import placed_words
from cepe_jax.weights.source import load, open_model

log = logging.getLogger(__name__)

SHORTEST = 32  # tokens that a short row is filled up to


@dataclass(frozen=True, kw_only=True)
class InfluenceConfig:
    models: tuple[Path, ...]  # checkpoints of one training, decoders: the influence is summed over them
    data: Path  # the dataset of documents that they were trained on
    index: Path  # its index
    table: Path  # the table of a task
    out: Path  # gets influence.json, report.md and report.png
    targets: int = 50  # n-grams of answers, drawn among those for which there are documents of both kinds
    documents: int = 50  # documents of each kind for an n-gram at most, drawn
    window: int = 512  # tokens of a text at most: the last ones, up to the n-gram's end
    parameters: tuple[str, ...] = ()  # whose gradients are taken, such as layers.mlp or embed; []: all
    batch_size: int = 8  # documents at once
    dtype: Dtype = "float32"  # type of weights and activations
    seed: Seed = 0  # draws n-grams and documents

    def __post_init__(self):
        for name in ("targets", "documents", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give a number above 0")
        if self.window < 2:
            raise ValueError(f"window is {self.window}: give 2 tokens or more")
        if not self.models:
            raise ValueError("models is []: give one or more")


@dataclass(frozen=True)
class Row:
    """A text up to the end of an n-gram."""

    ids: list[int]
    count: int  # the last ids, which are the n-gram's

    @classmethod
    def of(cls, read: Read, start: int, end: int, window: int) -> "Row":
        """Return the last `window` tokens of a text up to the n-gram at characters [start, end)."""
        span = read.tokens(start, end)
        ids = read.ids[max(span.stop - window, 0) : span.stop]
        return cls(ids, min(span.stop - span.start, len(ids) - 1))


@dataclass(frozen=True)
class Case:
    """A target, with documents of both kinds."""

    target: Target
    query: Row
    paired: list[Row]  # documents that hold the n-gram and one of the prompt that is paired with it
    single: list[Row]  # documents that hold the n-gram and none of these


def find(words: Sequence[str], ngram: Ngram) -> list[int]:
    """Return the places of an n-gram in words, ascending."""
    first, n = ngram[0], len(ngram)
    return [at for at, word in enumerate(words) if word == first and tuple(words[at : at + n]) == ngram]


def document_row(text: str, corpus: Corpus, target: Target, window: int) -> Row:
    """Return the row of a document that holds the target: where it first follows an n-gram that is paired with it.

    Where it follows none it is where it first stands.
    """
    words = placed_words(text)
    plain = [word.word for word in words]
    firsts = [found[0] for pair in target.pairs if (found := find(plain, tuple(pair["x"].split())))]
    places = find(plain, target.y)
    at = next((place for place in places if firsts and place > min(firsts)), places[0])
    return Row.of(Read.of(text, corpus.tokenizer), words[at].start, words[at + len(target.y) - 1].end, window)


def cases(config: InfluenceConfig, index: Index, table: Table) -> Iterator[Case]:
    """Yield the targets that are drawn, with their documents."""
    corpora = [Corpus(config.data, split) for split in index.facts["records"]]
    for corpus in corpora:
        index.check_is_of(corpus)
    firsts = np.cumsum([0, *map(len, corpora)])
    rng, targets, count = np.random.default_rng(config.seed), list(table.targets()), 0

    def row_of(number: int, target: Target) -> Row | None:
        which = int(np.searchsorted(firsts, number, side="right")) - 1
        corpus = corpora[which]
        document = corpus[int(number - firsts[which])]
        try:
            return document_row(corpus.tokenizer.decode(document.tokens), corpus, target, config.window)
        except HoldsSpecial as error:
            log.info("%s is left out: %s", document.name, error)
            return None

    for n in rng.permutation(len(targets)):
        target = targets[n]
        ys, *xs = index.documents([target.y, *(tuple(pair["x"].split()) for pair in target.pairs)])
        with_x = np.unique(np.concatenate(xs))
        kinds = np.intersect1d(ys, with_x), np.setdiff1d(ys, with_x)
        rows = []
        for kind in kinds:
            drawn = (row_of(int(number), target) for number in rng.permutation(kind))
            rows.append(list(itertools.islice(filter(None, drawn), config.documents)))
        if all(rows):
            text, begin = text_of(table.examples[target.example])
            span = begin + target.start, begin + target.end
            yield Case(target, Row.of(Read.of(text, corpora[0].tokenizer), *span, config.window), *rows)
            count += 1
        if count == config.targets:
            return


def batch_of(rows: Sequence[Row], size: int) -> dict[str, np.ndarray]:
    """Return tokens (B, T), and for the n-gram's tokens (B, S) their labels and which position predicts each."""
    length = max(power_of_two(max(len(row.ids) for row in rows) - 1), SHORTEST)
    spans = power_of_two(max(row.count for row in rows))
    tokens_BT = np.zeros((size, length), np.int32)
    at_BS, labels_BS = np.zeros((size, spans), np.int32), np.full((size, spans), IGNORE, np.int32)
    for b, row in enumerate(rows):
        end = len(row.ids) - 1
        tokens_BT[b, :end] = row.ids[:-1]
        at_BS[b, : row.count] = np.arange(end - row.count, end)
        labels_BS[b, : row.count] = row.ids[-row.count :]
    return {"tokens": tokens_BT, "at": at_BS, "labels": labels_BS}


def loss(model: Llama, batch: dict) -> jax.Array:
    """Return -log P of the n-grams' tokens, summed over the rows."""
    hidden_BTD, _ = model.decode(batch["tokens"])  # padding stands after all that is predicted
    hidden_BSD = jnp.take_along_axis(hidden_BTD, batch["at"][..., None], axis=1)
    return token_nll(model.logits(hidden_BSD), batch["labels"]).sum()


def chosen(model: Llama, parameters: Sequence[str]) -> tuple[list, Callable[[list], Llama]]:
    """Return the weights whose names begin with one of `parameters`, all for none, and the model with others there."""
    named, structure = jax.tree_util.tree_flatten_with_path(model)
    names = [jax.tree_util.keystr(path).strip(".").removesuffix(".value") for path, _ in named]
    leaves = [leaf for _, leaf in named]
    at = [
        n for n, name in enumerate(names) if not parameters or any(f"{name}.".startswith(f"{p}.") for p in parameters)
    ]
    if not at:
        known = ", ".join(names)
        raise ValueError(f"no parameter is {', '.join(parameters)}: there are {known}")

    def rebuilt(weights: list) -> Llama:
        others = dict(zip(at, weights, strict=True))
        return jax.tree.unflatten(structure, [others.get(n, leaf) for n, leaf in enumerate(leaves)])

    return [leaves[n] for n in at], rebuilt


@partial(jax.jit, static_argnames="parameters")
def gradient(model: Llama, batch: dict, parameters: tuple[str, ...]) -> list[jax.Array]:
    """Return the gradient of the rows' losses for the chosen weights."""
    weights, rebuilt = chosen(model, parameters)
    return jax.grad(lambda weights: loss(rebuilt(weights), batch))(weights)


# Attention has a derivative of its own, for the backward pass alone: so the product is of two gradients, and not the
# forward derivative along one of them.
@partial(jax.jit, static_argnames="parameters")
def product(model: Llama, query: list[jax.Array], batch: dict, parameters: tuple[str, ...]) -> jax.Array:
    """Return the dot products of the query's gradient with those of the rows, summed over these, in fp32."""
    pairs = zip(query, gradient(model, batch, parameters), strict=True)
    return sum((a.astype(jnp.float32) * b.astype(jnp.float32)).sum() for a, b in pairs)


def influence_of(model: Llama, case: Case, config: InfluenceConfig) -> tuple[float, float]:
    """Return the mean influence of the documents with the pair, and of those with the n-gram alone, at a checkpoint."""
    query = gradient(model, batch_of([case.query], 1), config.parameters)
    means = []
    for rows in (case.paired, case.single):
        parts = [rows[at : at + config.batch_size] for at in range(0, len(rows), config.batch_size)]
        products = [product(model, query, batch_of(part, config.batch_size), config.parameters) for part in parts]
        means.append(float(np.sum(products, dtype=np.float64)) / len(rows))
    return means[0], means[1]


def check_model(path: Path, corpus: Corpus) -> None:
    """Raise ValueError unless the model is a decoder that knows the ids of the corpus."""
    config = open_model(path).config
    if type(config) is not DecoderConfig:
        raise ValueError(f"{path} is not a plain decoder: give the directory of one")
    corpus.tokenizer.check_is_of(path)
    if config.vocab_size < corpus.tokenizer.vocab_size:
        known = f"{config.vocab_size} ids, and {corpus.records.path} has {corpus.tokenizer.vocab_size}"
        raise ValueError(f"{path} knows {known}: give its model")


def influence(config: InfluenceConfig) -> None:
    """Write the influence of documents with and without pairs to `config.out`, and print the report."""
    index, table = Index(config.index), Table(config.table)
    table.check_is_of(index)
    corpus = Corpus(config.data, next(iter(index.facts["records"])))
    for path in config.models:
        check_model(path, corpus)
    with one_writer_in(config.out):
        all_cases = list(track(cases(config, index, table), "read documents, n-grams", config.targets))
        if not all_cases:
            raise ValueError(f"no n-gram of {config.table} has documents with and without its pairs: lower gamma or n")
        sums_C2 = np.zeros((len(all_cases), 2))
        for path in config.models:
            model = load(path, Compute(config.dtype))
            for number, case in enumerate(track(all_cases, f"influence at {path.name}, n-grams")):
                sums_C2[number] += influence_of(model, case, config)
        result = summary(all_cases, sums_C2, config)
        write_json(config.out / "influence.json", {"config": as_json(config)} | result)
        with save_figure(config.out / "report.png", figsize=(4.6, 4.4)) as panel:
            panel.scatter(sums_C2[:, 1], sums_C2[:, 0], s=12, alpha=0.6)
            panel.axline((0, 0), slope=1, color="0.6", linewidth=1)
            panel.set(xscale="symlog", yscale="symlog", xlabel="the n-gram alone", ylabel="with the pair")
            panel.set(title="mean influence of documents")
        text = report(result)
        write_text(config.out / "report.md", text)
    print(text)


def summary(all_cases: Sequence[Case], sums_C2: np.ndarray, config: InfluenceConfig) -> dict:
    """Return the means of both kinds and of their paired difference; n-grams of one example are dependent."""
    groups = [str(case.target.example) for case in all_cases]
    columns = {"paired": sums_C2[:, 0], "single": sums_C2[:, 1], "difference": sums_C2[:, 0] - sums_C2[:, 1]}
    cases = [
        {"example": case.target.example, "y": " ".join(case.target.y), "paired": float(pair), "single": float(alone)}
        | {"documents": [len(case.paired), len(case.single)]}
        for case, (pair, alone) in zip(all_cases, sums_C2, strict=True)
    ]
    means = {name: vars(Estimate.of(values, groups)) for name, values in columns.items()}
    return {"means": means, "larger": float((columns["difference"] > 0).mean()), "cases": cases}


def report(result: dict) -> str:
    """Return the report in Markdown."""
    lines = ["| documents | mean influence | standard error |", "|---|---|---|"]
    titles = {"paired": "with the pair", "single": "with the n-gram alone", "difference": "difference, paired"}
    for name, title in titles.items():
        one = result["means"][name]
        lines.append(
            f"| {title} | {one['mean']:+.4g} | {'' if one['stderr'] is None else format(one['stderr'], '.2g')} |"
        )
    share = f"{100 * result['larger']:.0f}% of {len(result['cases'])} n-grams"
    return (
        "# Influence\n\nDot products of gradients, not normalised, summed over the checkpoints; means over documents, "
        "then over n-grams of answers. The error takes n-grams of one example for dependent. Documents with the pair "
        f"have more influence for {share}.\n\n" + "\n".join(lines) + "\n\n![Influence](report.png)\n"
    )
