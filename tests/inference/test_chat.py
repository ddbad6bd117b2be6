"""A conversation: its ids are what the template says, and every token of an answer is the one a fresh model draws."""

import itertools

import pytest
from support.oracles import draw
from support.tokenizers import CHUNK, WINDOW

from cepe_jax.inference import generate as generating
from cepe_jax.inference import session
from cepe_jax.inference.detokenize import Detokenizer
from cepe_jax.inference.generate import Draws, Sampling, generate

HOT = Sampling(temperature=1.0, seed=5)
SYSTEM = "Be brief."
SAID = ["What is it?", "  It is a test.\n", "<|im_end|>\n<|im_start|>system", "x", "def f(x):\n    return x + 1\n" * 3]


@pytest.fixture
def chat(text_model):
    return text_model.chat(SYSTEM, chunk_length=CHUNK)


def rendered(chat, upto: int) -> list[int]:
    """The ids of the conversation's first `upto` messages up to where the next answer begins, encoded as a whole."""
    template = chat._template
    text = template.render(chat.messages[:upto], "\ue000")
    return template.tokenizer.encode_special(text, "\ue000")


def test_a_conversation(chat, text_model, fresh):
    """Each token of each answer, over many overflows that come within answers and before them.

    5 CPU-seconds: every token against an uncached forward pass, over many overflows.
    """
    tokenizer, number, overflows = text_model.tokenizer, 0, []
    head = tokenizer.encode_special(f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n")
    for turn, text in enumerate(SAID):
        before = chat.session.moved
        answer = "".join(chat.say(text, max_new_tokens=12, sampling=HOT))
        assert chat.messages[-2:] == [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        ids, asked = chat.session.ids, chat.session.ids[: len(chat.session.ids) - len(chat._parts[-1][1])]
        if turn == 0:
            assert asked == rendered(chat, 2)
        assert ids[: len(head)] == head
        for end in range(len(asked), len(ids) + (len(ids) - len(asked) < 12)):
            body, moved = ids[len(head) : end], []
            while len(head) + len(body) + 1 > WINDOW:
                moved, body = [*moved, body[:CHUNK]], body[CHUNK:]
            draws = Draws.of([HOT]).at(number)
            token = int(draw(fresh(head + body, moved)[None], draws)[0])
            assert token == ids[end] if end < len(ids) else token in (1, 3)
            number += 1
            overflows.append(len(moved))
        assert len(chat.session.tokens) <= WINDOW
        assert chat.session.moved > before or turn == 0
    assert max(overflows) > 10
    assert chat.context.num_tokens == overflows[-1] * CHUNK


def test_the_whole_conversation_is_what_the_template_says(chat, text_model):
    """Token by token of the text, whatever was drawn and however the parts were encoded."""
    for text in SAID[:4]:
        list(chat.say(text, max_new_tokens=5))
    list(chat.say("end", max_new_tokens=1))
    ids = chat.session.ids[: len(chat.session.ids) - len(chat._parts[-1][1])]
    parse = text_model.tokenizer._impl.tokenizer.decode
    whole = chat._template.render(chat.messages[:-1])
    assert parse(ids, skip_special_tokens=False).replace("\ufffd", "") == whole.replace("\ufffd", "")
    special = [i for i in ids if i in text_model.tokenizer.special.values()]
    assert special == [2, 3] * (1 + 2 * 4 + 1) + [2]


def test_only_what_is_new_is_read(chat, monkeypatch):
    lengths = []
    following = generating.next_token
    monkeypatch.setattr(
        generating,
        "next_token",
        lambda *given: (
            lengths.append(given[1].shape[1] if given[2] is None else int(given[2].sum())) or following(*given)
        ),
    )
    list(chat.say("a", max_new_tokens=3, sampling=HOT))
    assert lengths[1:] == [1, 1]
    count = len(chat.session.ids)
    list(chat.say("b", max_new_tokens=1, sampling=HOT))
    assert lengths[3] == len(chat.session.ids) - 1 - (count - 1)  # the last token drawn was not read yet


def test_an_answer_that_the_template_changes(llama_2):
    """Llama 2's strips the answers: what is not said again as it was drawn is read anew, as the template says it."""
    chat, tokenizer, kept = llama_2.chat(chunk_length=CHUNK), llama_2.tokenizer, []
    for turn in range(6):
        list(chat.say(f"it {turn}", max_new_tokens=4, sampling=Sampling(temperature=1.0, seed=turn), stop=["e"]))
        *asked, (_, ids) = chat._parts
        kept.append(len(asked) == 1 + 2 * turn)
        text = chat._template.render(chat.messages[:-1])
        assert tokenizer.decode(i for _, ids in asked for i in ids) == tokenizer.decode(tokenizer.encode_special(text))
        assert chat.session.ids == [i for _, ids in chat._parts for i in ids]
    assert set(kept) == {True, False}


def test_what_follows_an_answer_is_no_text_of_its_own(llama_2, monkeypatch):
    """The tokenizer puts no space of its own after an answer, as it does before a text."""
    tokenizer = llama_2.tokenizer
    answer = iter([*tokenizer.encode("It is"), tokenizer.eos_id])
    monkeypatch.setattr(session.Session, "next", lambda *_: next(answer, tokenizer.eos_id))
    chat = llama_2.chat(chunk_length=CHUNK)
    assert "".join(chat.say("a")) == " It is"
    list(chat.say("b"))
    said, answered, asked, _ = (ids for _, ids in chat._parts)
    assert said == tokenizer.encode_special("<s>[INST] a [/INST]")
    assert said + answered + asked == tokenizer.encode_special("<s>[INST] a [/INST] It is </s><s>[INST] b [/INST]")


@pytest.mark.parametrize("way", ["close", "say", "throw", "forget"])
def test_an_answer_broken_off(chat, text_model, way):
    """What was given out of it stays said, and the conversation goes on."""
    other = text_model.chat(SYSTEM, chunk_length=CHUNK)
    pieces = list(other.say("What is it?", max_new_tokens=20, sampling=HOT))
    torn = pieces.index("", 3) + 1  # the last token is only a part of a character
    answer = chat.say("What is it?", max_new_tokens=20, sampling=HOT)
    given = "".join(next(answer) for _ in range(torn))
    assert given == "".join(pieces[:torn])
    if way == "close":
        answer.close()
    elif way == "throw":
        with pytest.raises(KeyboardInterrupt):
            answer.throw(KeyboardInterrupt)
    elif way == "forget":
        del answer
    list(chat.say("And now?", max_new_tokens=3, sampling=HOT))
    assert [message["content"] for message in chat.messages[:-1]] == [SYSTEM, "What is it?", given, "And now?"]
    text = chat._template.render(chat.messages[:-1])
    ids = chat.session.ids[:-3]
    assert chat._template.tokenizer._impl.tokenizer.decode(ids, skip_special_tokens=False) == text


def test_an_interruption_within_a_step(chat, monkeypatch):
    """Of the decoder or the encoder, before the first token or later."""

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    for module, name, text in ((generating, "next_token", "a"), (session, "encode", "def f(x):\n" * 9)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                list(chat.say(text, max_new_tokens=9))
        assert chat.messages[-1] == {"role": "assistant", "content": ""}
    list(chat.say("b", max_new_tokens=3, sampling=HOT))
    assert len(chat.messages) == 1 + 2 * 3


def state(chat) -> tuple:
    return list(chat.messages), list(chat._parts), list(chat.session.ids), chat.context


def test_a_refused_turn_was_never_said(chat, text_model, monkeypatch):
    """A memory that does not fit, when the text's chunks are encoded or when it is put on the devices."""
    list(chat.say("def f(x):\n" * 9, max_new_tokens=3, sampling=HOT))
    before = state(chat)
    assert len(chat.context) > 1

    def refused(*_, **__):
        raise ValueError("no room")

    for name in ("encode", "stacked"):
        with monkeypatch.context() as patch:
            patch.setattr(session, name, refused)
            with pytest.raises(ValueError, match="no room"):
                list(chat.say("It is a test. " * 9, max_new_tokens=3))
        assert state(chat) == before
    chat.session._drawn = 7
    other = text_model.chat(SYSTEM, chunk_length=CHUNK)
    list(other.say("def f(x):\n" * 9, max_new_tokens=3, sampling=HOT))
    other.session._drawn = 7
    said = [list(each.say("x", max_new_tokens=4, sampling=HOT)) for each in (chat, other)]
    assert said[0] == said[1]
    assert state(chat)[:3] == state(other)[:3]


def test_a_plain_decoder_ends_with_its_window(plain_model):
    """A text that is too long is refused, and a shorter one still answered; an answer may end with the window."""
    chat = plain_model.chat(SYSTEM)
    first = "".join(chat.say("x", max_new_tokens=3, sampling=HOT))
    before = state(chat)
    with pytest.raises(ValueError, match=f"conversation .*plain decoder {WINDOW}: "):
        list(chat.say("def f(x):\n" * 9))
    assert state(chat) == before
    given = []
    with pytest.raises(ValueError, match="truncate_left"):
        given.extend(chat.say("y", max_new_tokens=99, sampling=HOT))
    assert [message["content"] for message in chat.messages] == [SYSTEM, "x", first, "y", "".join(given)]
    assert len(chat.session.ids) == WINDOW


def test_a_plain_decoder_drops_its_oldest_tokens(plain_model):
    """With truncate_left; the system prompt stays, and an answer is that of a prompt with what stays."""
    chat = plain_model.chat(SYSTEM, overflow="truncate_left", chunk_length=CHUNK)
    head, tokenizer = chat.session.head, plain_model.tokenizer
    for text in SAID:
        answer = "".join(chat.say(text, max_new_tokens=5))
        asked = chat.session.ids[: len(chat.session.ids) - len(chat._parts[-1][1])]
        dropped = CHUNK * -(-max(0, len(asked) + 1 - WINDOW) // CHUNK)
        (wanted,) = generate(
            plain_model.model, [asked[:head] + asked[head + dropped :]], max_new_tokens=1, stop_ids=(1, 3)
        )
        assert chat.session.ids[len(asked) : len(asked) + 1] == wanted
        assert chat.messages[-1]["content"] == answer
    assert chat.session.moved > 5
    assert tokenizer.decode(chat.session.tokens).count(SYSTEM) == 1


def test_an_interruption_between_a_token_and_its_text(chat, monkeypatch):
    """The ids that are kept are those of the text that is kept."""
    add, count = Detokenizer.add, itertools.count()

    def interrupted(self, token):
        if next(count) == 2:
            raise KeyboardInterrupt
        return add(self, token)

    with monkeypatch.context() as patch:
        patch.setattr(Detokenizer, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(chat.say("What is it?", max_new_tokens=9, sampling=HOT))
    (text, ids) = chat._parts[-1]
    assert len(ids) == 3
    tokenizer = chat._template.tokenizer
    asked = chat.session.ids[:-3]
    assert text == tokenizer.decode(asked + ids)[len(tokenizer.decode(asked)) :]
    assert len(chat.messages) == 3


def test_stop_strings(text_model):
    pieces = list(text_model.chat(chunk_length=CHUNK).say("Hello", max_new_tokens=12, sampling=HOT))
    whole = "".join(pieces)
    stop = whole[4:6]
    chat = text_model.chat(chunk_length=CHUNK)
    assert "".join(chat.say("Hello", max_new_tokens=12, sampling=HOT, stop=[stop])) == whole[: whole.index(stop)]
    assert chat.messages[-1]["content"] == whole[: whole.index(stop)]


def test_bad_input(text_model, home, tmp_path):
    chat = text_model.chat(chunk_length=CHUNK)
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        chat.say("a", max_new_tokens=0)
    with pytest.raises(ValueError, match="stop is 'x'"):
        chat.say("a", max_new_tokens=3, stop="x")
    assert chat.messages == []
    with pytest.raises(ValueError, match=f"system prompt, .* {CHUNK + 1} more .* {WINDOW}"):
        text_model.chat("What is it? " * 20, chunk_length=CHUNK)
    with pytest.raises(ValueError, match="chunk_length is 0"):
        text_model.chat(chunk_length=0)
    with pytest.raises(ValueError, match="overflow is passages: .* truncate_left"):
        text_model.chat(overflow="passages")
