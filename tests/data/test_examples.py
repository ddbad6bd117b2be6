"""Examples against slices written out again, and the rates of the recipe over many draws."""

import dataclasses

import numpy as np
import pytest

from cepe_jax.data.examples import (
    IGNORE,
    ExampleConfig,
    chunks_before,
    duplicate,
    mask_chunks,
    masked_lm,
    previous_document,
    retrieved,
    taught,
    window_at,
)

CONFIG = ExampleConfig(window=6, num_chunks=3, chunk_length=4)
TOKENS = np.arange(1000, 1060, dtype=np.int32)  # each says where it stands


def equal(a: dict, b: dict) -> bool:
    same = [np.array_equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a.keys() & b.keys()]
    return a.keys() == b.keys() and all(same)


@pytest.mark.parametrize("start", range(55))
def test_previous_document(start):
    """The window, the labels one further, and in the context what stands right before the window, in order."""
    example = previous_document(TOKENS, start, CONFIG)
    assert example["tokens"].tolist() == TOKENS[start : start + 6].tolist()
    ahead = TOKENS[start + 1 : start + 7].tolist()
    assert example["labels"].tolist() == ahead + [IGNORE] * (6 - len(ahead))
    context, real = example["context"], example["context_mask"]
    assert context.shape == real.shape == (3, 4)
    assert real.dtype == bool
    seen = context[real]
    assert seen.tolist() == TOKENS[max(start - 12, 0) : start].tolist()
    assert (seen < TOKENS[0] + start).all()
    assert real.ravel().tolist() == [False] * (12 - len(seen)) + [True] * len(seen)  # missing ones come first
    assert not context[~real].any()
    assert {example[name].dtype for name in ("tokens", "labels", "context")} == {np.dtype(np.int32)}


def test_a_window_at_the_end_of_the_document():
    assert window_at(TOKENS, 54, 6)["labels"].tolist() == [*TOKENS[55:].tolist(), IGNORE]
    assert window_at(TOKENS, 53, 6)["labels"].tolist() == TOKENS[54:].tolist()


def test_duplicate():
    """The encoder reads what the decoder reads, and nothing else; the last label is beyond the context."""
    config = dataclasses.replace(CONFIG, window=12)
    for start in (0, 7, 47):
        example = duplicate(TOKENS, start, config)
        assert example["context"].ravel().tolist() == example["tokens"].tolist() == TOKENS[start : start + 12].tolist()
        assert example["context_mask"].all()
        assert example["labels"].tolist() == TOKENS[start + 1 : start + 13].tolist()


def test_bad_windows():
    for start in (55, 60, 100):
        with pytest.raises(ValueError, match=f" 6 tokens at {start} .* 60$"):
            previous_document(TOKENS, start, CONFIG)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("window", 0),
        ("chunk_length", 0),
        ("foreign_rate", 1.1),
        ("chunk_mask_rate", -0.1),
        ("whole_chunk_rate", 2.0),
        ("mlm_rate", float("nan")),
    ],
)
def test_bad_configs(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}: give a"):
        dataclasses.replace(CONFIG, **{name: value})


def test_nothing_is_changed_in_place():
    before = TOKENS.copy()
    example = previous_document(TOKENS, 20, CONFIG)
    kept = {name: array.copy() for name, array in example.items()}
    mask_chunks(example, dataclasses.replace(CONFIG, chunk_mask_rate=1.0), np.random.default_rng(0))
    masked_lm(TOKENS, (), 7, 1.0, np.random.default_rng(0))
    assert equal(example, kept)
    np.testing.assert_array_equal(TOKENS, before)


def test_the_same_seed_gives_the_same_example():
    def draw(seed: int) -> list[dict]:
        rng = np.random.default_rng(seed)
        masked = mask_chunks(
            previous_document(TOKENS, 20, CONFIG), dataclasses.replace(CONFIG, chunk_mask_rate=1.0), rng
        )
        return [masked, masked_lm(TOKENS, (), 7, 0.5, rng)]

    assert all(map(equal, draw(3), draw(3)))
    assert not any(map(equal, draw(3), draw(4)))


def passages(number: int = 2) -> dict:
    """Passages of up to 4 tokens; the last is short."""
    return {
        "tokens": TOKENS[:30],
        "query_tokens": 3,
        "passages": 100 * np.arange(1, number + 1)[:, None] + np.arange(4),
        "lengths": np.where(np.arange(number) == number - 1, 3, 4),
    }


def test_retrieved():
    example = retrieved(passages(), CONFIG)
    chunks = [row[real].tolist() for row, real in zip(example["context"], example["context_mask"], strict=True)]
    assert chunks == [[100, 101, 102, 103], [200, 201, 202], []]
    assert not example["context"][~example["context_mask"]].any()
    assert example["context"].shape == (3, 4)
    assert example["tokens"].tolist() == TOKENS[:6].tolist()
    assert example["labels"].tolist() == [IGNORE, IGNORE, *TOKENS[3:7].tolist()]  # the query is tokens 0, 1, 2


def test_more_passages_than_chunks_and_none():
    example = retrieved(passages(5), CONFIG)
    assert example["context"][:, 0].tolist() == [100, 200, 300]
    none = {name: value[:0] if name in ("passages", "lengths") else value for name, value in passages().items()}
    assert not retrieved(none, CONFIG)["context_mask"].any()
    with pytest.raises(ValueError, match=" 4 tokens, chunk_length is 3"):
        retrieved(passages(), dataclasses.replace(CONFIG, chunk_length=3))


def test_taught():
    record = {"teacher_index": np.arange(8, dtype=np.uint16).reshape(4, 2), "teacher_prob": np.ones((4, 3), np.float16)}
    example = taught(record, CONFIG)
    assert example["teacher_index"].dtype == np.int32
    assert example["teacher_index"].tolist() == record["teacher_index"].tolist()
    assert example["teacher_prob"].dtype == np.float16
    for wrong in ({"teacher_index": np.zeros((3, 2))}, {"teacher_prob": np.zeros((4, 2))}):
        with pytest.raises(ValueError, match=r"teacher_index \[[34], 2\] .*teacher_prob \[4, [23]\]"):
            taught(record | wrong, CONFIG)
    with pytest.raises(ValueError, match="window's 3"):
        taught(record, dataclasses.replace(CONFIG, window=3))


def test_chunks_are_masked_as_in_the_paper():
    """30% of chunks are touched; 10% of these lose everything, the others a suffix; no token changes."""
    config = ExampleConfig(window=6, num_chunks=50, chunk_length=16)
    tokens = np.arange(50 * 16 + 7)
    example = previous_document(tokens, 800, config)
    kept = []
    for seed in range(200):
        masked = mask_chunks(example, config, np.random.default_rng(seed))
        assert equal(masked | {"context_mask": example["context_mask"]}, example)
        mask = masked["context_mask"]
        assert mask.dtype == bool
        lengths = mask.sum(1)
        np.testing.assert_array_equal(mask, np.arange(16) < lengths[:, None])  # a prefix
        kept.append(lengths)
    kept = np.concatenate(kept)
    assert_share(kept < 16, 0.3)
    touched = kept[kept < 16]
    assert_share(touched == 0, 0.1)
    partial = touched[touched > 0]
    for length in range(1, 16):  # every prefix, none more often than another
        assert_share(partial == length, 1 / 15)


def test_a_touched_chunk_loses_something_and_keeps_something():
    config = dataclasses.replace(CONFIG, chunk_mask_rate=1.0, whole_chunk_rate=0.0)
    for seed in range(100):
        lengths = mask_chunks(previous_document(TOKENS, 20, config), config, np.random.default_rng(seed))[
            "context_mask"
        ]
        assert set(lengths.sum(1)) <= {1, 2, 3}


def assert_share(happened: np.ndarray, share: float) -> None:
    """Within four and a half standard deviations."""
    assert abs(happened.mean() - share) < 4.5 * np.sqrt(share * (1 - share) / len(happened)), happened.mean()


def test_masking_keeps_what_is_already_masked():
    example = previous_document(TOKENS, 7, CONFIG)
    for seed in range(50):
        masked = mask_chunks(example, CONFIG, np.random.default_rng(seed))["context_mask"]
        assert not (masked & ~example["context_mask"]).any()


@pytest.mark.parametrize(("rates", "kept"), [((0.0, 1.0), 12), ((1.0, 1.0), 0)])
def test_masking_rates_at_their_ends(rates, kept):
    config = dataclasses.replace(CONFIG, chunk_mask_rate=rates[0], whole_chunk_rate=rates[1])
    masked = mask_chunks(previous_document(TOKENS, 20, config), config, np.random.default_rng(0))
    assert masked["context_mask"].sum() == kept


def test_masked_lm():
    """30% of the tokens become the mask id, and these alone are labels; BOS and EOS stay."""
    tokens = np.random.default_rng(0).integers(0, 50, 60_000).astype(np.int32)
    special = (1, 2)
    example = masked_lm(tokens, special, 50, 0.3, np.random.default_rng(1))
    masked = example["tokens"] == 50
    np.testing.assert_array_equal(example["tokens"][~masked], tokens[~masked])
    np.testing.assert_array_equal(example["labels"], np.where(masked, tokens, IGNORE))
    assert not masked[np.isin(tokens, special)].any()
    assert_share(masked[~np.isin(tokens, special)], 0.3)
    assert all(masked[tokens == token].any() for token in range(50) if token not in special)
    assert example["tokens"].dtype == example["labels"].dtype == np.int32


@pytest.mark.parametrize(("end", "num_chunks"), [(0, 2), (5, 2), (8, 2), (60, 15), (60, 20)])
def test_chunks_before(end, num_chunks):
    chunks = chunks_before(TOKENS, end, num_chunks, 4)
    assert chunks["context"].shape == chunks["context_mask"].shape == (num_chunks, 4)
    assert chunks["context"][chunks["context_mask"]].tolist() == TOKENS[max(end - num_chunks * 4, 0) : end].tolist()
