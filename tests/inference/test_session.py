"""A text without end: each token is the one that a fresh model draws after what the decoder reads beside what moved."""

import random
import weakref

import numpy as np
import pytest
from support.oracles import draw
from support.tokenizers import CHUNK, WINDOW, chunks_of

from cepe_jax.inference import generate as generating
from cepe_jax.inference import session as module
from cepe_jax.inference.caches import Rolling, new_cache
from cepe_jax.inference.context import ContextCache, Passage, encode
from cepe_jax.inference.generate import Draws, Sampling, generate
from cepe_jax.inference.session import Session

HOT = Sampling(temperature=1.0, seed=5)
HEAD = 5
GIVEN = [list(range(40, 60)), [7, 8, 9]]


@pytest.fixture
def session(text_model) -> Session:
    return Session(text_model.model, WINDOW, HEAD, CHUNK, ContextCache(text_model.identity))


@pytest.fixture
def drawn(fresh):
    """What a fresh model draws as the nth token after a text, by the definition of what moves to the encoder."""

    def drawn(ids: list[int], number: int, given: list[list[int]] = []) -> int:  # noqa: B006 (never changed)
        head, rest, moved = ids[:HEAD], ids[HEAD:], []
        while len(head) + len(rest) + 1 > WINDOW:
            moved, rest = [*moved, rest[:CHUNK]], rest[CHUNK:]
        chunks = [chunk for passage in given for chunk in chunks_of(passage)] + moved
        draws = Draws.of([HOT]).at(number)
        return int(draw(fresh(head + rest, chunks)[None], draws)[0])

    return drawn


def random_ids(count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(4, 330), k=count)


def test_every_token_is_a_fresh_models(text_model, drawn):
    """Over many overflows, among tokens drawn and among tokens given, one by one and many at once, with a context."""
    context = encode(text_model.model, GIVEN, text_model.identity, CHUNK)
    session = Session(text_model.model, WINDOW, HEAD, CHUNK, context)
    session.replace(random_ids(12))
    moved = []
    for number in range(60):
        if number in (20, 25, 40):  # a user's turn: a few tokens, many, more than the window has
            session.replace(session.ids + random_ids({20: 6, 25: 30, 40: 50}[number], number))
        token = session.next(HOT)
        assert token == drawn(session.ids, number, GIVEN), number
        assert len(session.tokens) + 1 <= WINDOW
        session.ids.append(token)
        moved.append(session.moved)
    assert moved[0] == 0
    assert moved[-1] > 12
    assert len(session.context) == len(GIVEN) + session.moved
    assert len(context) == len(GIVEN)


def test_a_text_that_repeats_itself(session, drawn):
    """What the decoder reads begins with what it has read, but beside another memory."""
    for number in range(8):
        text = random_ids(HEAD, number) + random_ids(CHUNK, number + 1) * 8
        session.replace(text[:40])
        assert session.next(HOT) == drawn(text[:40], 2 * number)
        session.replace(text[:60])
        assert session.next(HOT) == drawn(text[:60], 2 * number + 1)


def test_decoder_memory_is_constant(session, monkeypatch):
    """The cache has the same shape whatever was read, and an old one is gone before there is a new one."""
    alive, shapes = [], []

    def watched(*given):
        alive.append([old() for old in caches if old() is not None])
        return new_cache(*given)

    caches = []
    monkeypatch.setattr(module, "new_cache", watched)
    for count in (10, 12, 150, 70):
        session.replace(random_ids(count))
        session.next()
        cache = session._read[0]
        shapes.append([x.shape for x in (cache.k_ZBKSH, cache.v_ZBKSH)])
        caches.append(weakref.ref(cache.k_ZBKSH))
        del cache
    assert shapes == shapes[:1] * 4
    assert alive == [[], [], []]  # the second text went on where the first ended


def test_the_memory_has_few_lengths(session):
    """Each is a program to compile: 256 tokens more are seldom another one."""
    lengths = {}
    for count in (5, 1024, 1025, 3000, 16_384, 16_385, 20_000):
        states_LE = np.ones((count, session.model.encoder.config.width), np.float32)
        session.context = ContextCache(session.context.identity, (Passage(str(count), states_LE),))
        memory = session._memory()
        assert memory.states_BME.shape[:2] == memory.valid_BM.shape
        assert memory.valid_BM.sum() == count == memory.valid_BM[0, :count].sum()
        lengths[count] = memory.valid_BM.shape[1]
    assert list(lengths.values()) == [1024, 1024, 2048, 4096, 16_384, 20_480, 20_480]


@pytest.mark.parametrize("change", [3, 9, 40, 70, 79])
def test_another_text_in_its_place(session, drawn, change):
    """A text that differs from some token on, in the head, in what moved or in what the decoder reads; shorter ones."""
    ids = random_ids(80)
    session.replace(ids)
    assert session.next(HOT) == drawn(ids, 0)
    other = [*ids[:change], (ids[change] - 3) % 320 + 4, *ids[change + 1 :]]
    session.replace(other)
    assert session.next(HOT) == drawn(other, 1)
    session.replace(other[: change + 10])
    assert session.next(HOT) == drawn(other[: change + 10], 2)


def test_chunks_that_stay_are_not_encoded_again(session, monkeypatch):
    read = []
    monkeypatch.setattr(
        module,
        "encode",
        lambda model, chunks, *more, **known: read.extend(chunks) or encode(model, chunks, *more, **known),
    )
    ids = random_ids(80)
    session.replace(ids)
    session.next()
    first = len(read)
    assert [i for chunk in read for i in chunk] == ids[HEAD : HEAD + first * CHUNK]
    session.replace([1, *ids[1:]])  # another head
    session.next()
    session.replace(ids + random_ids(CHUNK))
    session.next()
    assert len(read) == first + 1
    session.replace([*ids[: HEAD + 2 * CHUNK], 9, 9, *ids[HEAD + 2 * CHUNK + 2 :]])
    session.next()
    assert len(read) == first + 1 + first - 2


def test_an_interruption_leaves_it_whole(session, drawn, monkeypatch):
    """Wherever it comes: in the encoder, when the cache has been given away, in waiting for the token."""

    def interrupted(function):
        def run(*given, **more):
            function(*given, **more)
            raise KeyboardInterrupt

        return run

    ids = random_ids(30)
    session.replace(ids)
    session.next(HOT)
    moments = [("next_token", 3), ("encode", 40), ("right_padded", 5), ("next_token", 1)]
    for number, (name, more) in enumerate(moments, 1):
        ids = ids + random_ids(more, number)
        session.replace(ids)
        with monkeypatch.context() as patch:
            place = module if name == "encode" else generating
            patch.setattr(place, name, interrupted(getattr(place, name)))
            with pytest.raises(KeyboardInterrupt):
                session.next(HOT)
        assert session.next(HOT) == drawn(ids, number)


def test_what_leaves_no_room(text_model, session):
    empty = ContextCache(text_model.identity)
    with pytest.raises(ValueError, match=f" 40 tokens and {CHUNK + 1} more .* {WINDOW}"):
        Session(text_model.model, WINDOW, 40, CHUNK, empty)
    assert Session(text_model.model, WINDOW, 39, CHUNK, empty)
    with pytest.raises(ValueError, match=f"has {WINDOW} tokens and 1 more"):
        Session(text_model.model.decoder, WINDOW, WINDOW, CHUNK, None)


def test_a_plain_decoder_ends_with_its_window(text_model, drawn):
    session = Session(text_model.model.decoder, WINDOW, HEAD, CHUNK, None)
    ids = random_ids(WINDOW - 1)
    session.replace(ids)
    assert session.next(HOT) == drawn(ids, 0)
    session.ids.append(9)
    with pytest.raises(ValueError, match=f" {WINDOW} tokens .*plain decoder {WINDOW}: "):
        session.next(HOT)
    session.replace(ids[:9])
    assert session.next(HOT) == drawn(ids[:9], 1)
    assert np.all(session.tokens == np.array(ids[:9]))


def test_a_plain_decoder_may_drop_tokens(text_model, drawn):
    """As CEPE moves them, among tokens drawn and texts replaced; nothing is read beside."""
    session = Session(text_model.model.decoder, WINDOW, HEAD, CHUNK, None, drops=True)
    session.replace(random_ids(WINDOW - 2))
    moved = []
    for number in range(20):
        if number in (6, 12):  # more than the window has, then a text that shares no chunk with it
            session.replace(session.ids + random_ids(50, number) if number == 6 else random_ids(WINDOW + 3, number))
        kept = session.ids[:HEAD] + session.ids[HEAD + CHUNK * -(-max(0, len(session.ids) + 1 - WINDOW) // CHUNK) :]
        assert session.next(HOT) == drawn(kept, number)
        assert session.tokens == kept
        session.ids.append(9)
        moved.append(session.moved)
    assert (moved[0], moved[3], moved[11], moved[12]) == (0, 1, 8, 1)
    with pytest.raises(ValueError, match=f"{CHUNK + 1} more .* {WINDOW}"):
        Session(text_model.model.decoder, WINDOW, 40, CHUNK, None, drops=True)


def test_a_bounded_cache_has_no_end(text_model):
    """Nothing is refused, dropped or read anew: what follows is what the cache's policy says of the whole text."""
    policy, decoder = Rolling(12, 3), text_model.model.decoder
    session = Session(decoder, None, HEAD, CHUNK, None, policy=policy)
    text = random_ids(3 * WINDOW)
    for count in (9, 40, 41, 3 * WINDOW):
        session.replace(text[:count])
        assert [[session.next()]] == generate(decoder, [text[:count]], max_new_tokens=1, policy=policy)
        assert session.tokens == text[:count]
