"""Datasets that select records of others: which examples they give, how often, and what is refused."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest
from support import datasets
from support.refusals import one_line

from cepe_jax.data.builder import array
from cepe_jax.data.conversations import features_of as conversation_features
from cepe_jax.data.examples import ExampleConfig
from cepe_jax.data.loader import batches, examples, open_mix
from cepe_jax.data.preferences import features_of as pair_features
from cepe_jax.data.recipes import PairsOfAnswers, WholeConversations, Windows

REPEATS = {1: 2, 4: 1, 7: 3}  # number of a record -> how often it comes


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return datasets.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def select(path, base, tokenizer, repeats: dict[int, int] = REPEATS):
    features = {"number": array(np.int64), "repeats": array(np.int32)}
    rows = [{"number": np.int64(number), "repeats": np.int32(times)} for number, times in repeats.items()]
    return datasets.write(path, "coreset", features, [rows], tokenizer, selects=datasets.joins(base))


def text_records(features: dict, lengths: list[int]) -> list[dict]:
    """Records whose texts have these lengths, and whose first token is their number."""
    records = []
    for number, length in enumerate(lengths):
        record = {name: np.full(length, number) for name in features if "document" not in name}
        record |= {name: np.ones(length) for name in record if "targets" in name}
        record |= {"documents": np.zeros(0), "document_lengths": np.zeros(0)}
        records.append(record | {"name": str(number), "domain": "d"})
    return records


@pytest.fixture(scope="module")
def home(tokenizer, tmp_path_factory):
    """Sequences, conversations and pairs, ten each, and of each a coreset."""
    home = tmp_path_factory.mktemp("coresets")
    sequences = [100 * number + np.arange(17) for number in range(10)]
    datasets.write_sequences(home / "sequences", sequences, 16, tokenizer)
    for name, features in (
        ("conversations", conversation_features(tokenizer)),
        ("preferences", pair_features(tokenizer)),
    ):
        records = text_records(features, [9] * 10)
        datasets.write(home / name, name, features, [records[:5], records[5:]], tokenizer, length=9)
    for name in ("sequences", "conversations", "preferences"):
        select(home / f"{name}-coreset", home / name, tokenizer)
    return home


def test_windows_of_selected_sequences_come_as_often_as_they_should(home):
    """Two windows of each; an epoch has each of the six sequences once, whatever the mixture's order."""
    recipe = Windows(ExampleConfig(window=8))
    sources = open_mix(home, {"sequences-coreset": 1.0}, recipe)
    assert len(sources[0]) == 2 * sum(REPEATS.values())
    data = examples(sources, [1.0], recipe, seed=0)
    firsts = Counter(int(row) for batch in islice(batches(data, 4), 3) for row in batch["tokens"][:, 0])
    wanted = {100 * number + start: times for number, times in REPEATS.items() for start in (0, 8)}
    assert firsts == wanted


@pytest.mark.parametrize("reads_documents", [False, True])
def test_selected_conversations_are_packed_alone(home, reads_documents):
    """Nine tokens take eight places: two share a window of 20, unless each has a memory of its own."""
    recipe = WholeConversations(ExampleConfig(window=20, num_chunks=1, chunk_length=4), reads_documents)
    (source,) = open_mix(home / "conversations-coreset", {}, recipe)
    assert len(source) == (6 if reads_documents else 3)
    names = [source[n]["name"].splitlines() for n in range(len(source))]
    assert Counter(name for window in names for name in window) == {str(n): times for n, times in REPEATS.items()}


def test_selected_pairs_that_fit_come(home):
    recipe = PairsOfAnswers(ExampleConfig(window=9), reads_documents=False)
    (source,) = open_mix(home / "preferences-coreset", {}, recipe)
    assert Counter(int(source[n]["chosen"][0]) for n in range(len(source))) == REPEATS
    assert source.path.name == "preferences-coreset"
    (whole,) = open_mix(home / "preferences", {}, recipe)
    assert source.digest.startswith(whole.digest)
    assert source.digest != whole.digest


def test_selections_of_records_that_do_not_fit_are_refused(home, tokenizer, tmp_path):
    """Another record of the base fits, so that the base is sound."""
    features = pair_features(tokenizer)
    records = text_records(features, [9, 3])
    base = datasets.write(tmp_path / "base", "preferences", features, [records], tokenizer, lengths=[9, 3])
    recipe = PairsOfAnswers(ExampleConfig(window=8), reads_documents=False)
    assert len(open_mix(base, {}, recipe)[0]) == 1
    coreset = select(tmp_path / "coreset", base, tokenizer, {0: 1})
    with pytest.raises(ValueError, match="coreset.* 8 ") as refusal:
        open_mix(coreset, {}, recipe)
    one_line(refusal)


def test_another_base_is_refused(home, tokenizer, tmp_path):
    sequences = [100 * number + np.arange(17) for number in range(10)]
    base = datasets.write_sequences(tmp_path / "base", sequences, 16, tokenizer)
    coreset = select(tmp_path / "coreset", base, tokenizer)
    datasets.write_sequences(tmp_path / "other", sequences[::-1], 16, tokenizer)
    base.rename(tmp_path / "gone")
    (tmp_path / "other").rename(base)
    with pytest.raises(ValueError, match=r"coreset .*base") as refusal:
        open_mix(coreset, {}, Windows(ExampleConfig(window=8)))
    one_line(refusal)
