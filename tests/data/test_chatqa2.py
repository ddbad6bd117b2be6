"""ChatQA 2's prompt: as the paper writes it, as transformers renders it, and in datasets and models made with it."""

import dataclasses
import itertools
import json
import re
from pathlib import Path

import jax
import pytest
from support.models import DECODER, filled
from support.refusals import one_line
from support.tokenizers import CHATML, as_llama_2, byte_level

import cepe_jax
from cepe_jax.data.conversations import ConversationConfig, prepare_conversations
from cepe_jax.data.examples import ExampleConfig
from cepe_jax.data.records import Records
from cepe_jax.data.template import SHIPPED, Template, has_template
from cepe_jax.data.tokenizer import Tokenizer
from cepe_jax.inference.terminal import GenerateConfig, run_generate
from cepe_jax.model.llama import Llama
from cepe_jax.training.run import run_stage
from cepe_jax.training.settings import TrainConfig
from cepe_jax.weights.source import save

SYSTEM = (
    "This is a chat between a user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions based on the context. The assistant should also indicate when the "
    "answer cannot be found in the context."
)
USER, AGAIN = {"role": "user", "content": "Who is the heir?"}, {"role": "user", "content": "Since when?"}
ANSWER = {"role": "assistant", "content": "Ann </s> is."}
LAST = {"role": "assistant", "content": "Since May."}
BOOK = "Ann inherits </s>\n\nthe house.", "It is May."


@pytest.fixture(params=["sentencepiece", "bytes"])
def tokenizer(request, tmp_path) -> Tokenizer:
    """A base model's, which has no template. Its BOS and EOS are <s> and </s>."""
    if request.param == "bytes":
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
        return Tokenizer(byte_level(tmp_path / "tokenizer.json"))
    return Tokenizer(as_llama_2(tmp_path / "tokenizer.model"))


def test_prompts_are_the_papers(tokenizer):
    """With BOS before them; without documents their place goes, too."""
    template = Template(tokenizer, "chatqa2")
    assert template.render([USER]) == f"<s>System: {SYSTEM}\n\nUser: Who is the heir?\n\nAssistant:"
    assert template.render([USER, ANSWER, AGAIN], documents=BOOK) == (
        f"<s>System: {SYSTEM}\n\nAnn inherits </s>\n\nthe house.\n\nIt is May.\n\nUser: Who is the heir?\n\n"
        "Assistant: Ann </s> is.\n\nUser: Since when?\n\nAssistant:"
    )
    own = {"role": "system", "content": "Be brief."}
    assert template.render([own, USER], documents=["x"]) == (
        "<s>System: Be brief.\n\nx\n\nUser: Who is the heir?\n\nAssistant:"
    )


def test_answers_alone_are_labels(tokenizer):
    """EOS ends the last one; what people and documents call </s> is text."""
    template = Template(tokenizer, "chatqa2")
    ids, targets = template.with_targets([USER, ANSWER, AGAIN, LAST], BOOK)
    assert ids[0] == tokenizer.bos_id
    assert ids[1:].count(tokenizer.bos_id) == 0
    assert [i for i in ids if i == tokenizer.eos_id] == [ids[-1]]
    turns = [list(turn) for target, turn in itertools.groupby(range(len(ids)), lambda n: targets[n]) if target]
    learnt = [tokenizer.decode(ids[turn[0] : turn[-1] + 1]) for turn in turns]
    assert [text.strip() for text in learnt] == ["Ann </s> is.", "Since May."]
    assert targets[-1]


@pytest.mark.parametrize("documents", [(), BOOK])
def test_transformers_reads_the_same(tmp_path, documents):
    transformers = pytest.importorskip("transformers")
    byte_level(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    template, messages = Template(Tokenizer(tmp_path), "chatqa2"), [USER, LAST, AGAIN, LAST]
    options = {"chat_template": SHIPPED["chatqa2"].read_text()}
    if documents:
        documents = [document.replace("</s>", "") for document in documents]  # which is a token to them
        options["documents"] = [{"text": document} for document in documents]
    wanted = theirs.apply_chat_template(messages[:3], tokenize=False, add_generation_prompt=True, **options)
    assert template.render(messages[:3], documents=documents) == wanted
    asked = {"return_assistant_tokens_mask": True, "return_dict": True, "tokenize": True}
    wanted = theirs.apply_chat_template(messages, **asked, **options)
    ids, targets = template.with_targets(messages, documents)
    assert ids == wanted["input_ids"]
    assert targets == [bool(one) for one in wanted["assistant_masks"]]


def test_a_template_without_documents_is_refused(tokenizer, tmp_path):
    (tmp_path / "chat.jinja").write_text(CHATML)
    template = Template(tokenizer, str(tmp_path / "chat.jinja"))
    assert template.with_targets([USER, ANSWER])
    for call in (template.with_targets, lambda messages, documents: template.render(messages, "", documents)):
        with pytest.raises(ValueError, match=r"chat\.jinja: .*documents") as error:
            call([USER, ANSWER], [USER["content"]])  # which the prompt has anyway
        one_line(error)


def test_unknown_templates_and_roles_are_refused(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match="(?=.*chatqa3)(?=.*chatqa2)") as error:
        Template(tokenizer, "chatqa3")
    one_line(error)
    for messages in ([USER, {"role": "tool", "content": "x"}], [USER, {"role": "system", "content": "x"}]):
        with pytest.raises(ValueError, match=messages[1]["role"]) as error:
            Template(tokenizer, "chatqa2").render(messages)
        one_line(error)


def decoder_at(path: Path, assets: Path) -> Path:
    sizes = dataclasses.replace(DECODER, vocab_size=Tokenizer(assets).vocab_size)
    save(filled(lambda: Llama(sizes, key=jax.random.key(0)), 1), path, assets)
    return path


@pytest.fixture
def home(tmp_path) -> Path:
    """A base decoder without a template, and lines of conversations with documents."""
    byte_level(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    decoder_at(tmp_path / "decoder", tmp_path)
    (tmp_path / "raw").mkdir()
    lines = ({"messages": [USER, LAST | {"content": f"{n}."}], "documents": [f"It is {n}.", " "]} for n in range(24))
    (tmp_path / "raw/chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def prepared(home: Path, context: str) -> Path:
    sizes = {"tokenizer": str(home / "decoder"), "test_fraction": 0.3, "workers": 1}
    out = home / context
    prepare_conversations(ConversationConfig(input=home / "raw", out=out, template="chatqa2", context=context, **sizes))
    return out


@pytest.mark.parametrize(("context", "number"), [("prompt", 0), ("encoder", 1)])
def test_documents_go_where_the_setting_says(home, context, number):
    records = Records(prepared(home, context), "train")
    assert (home / context / "chat_template.jinja").read_text() == SHIPPED["chatqa2"].read_text()
    for record in records:
        text = records.tokenizer.decode(record["tokens"])
        of_line = re.search(r"(\d+)\.$", text)[1]
        assert (f"\n\nIt is {of_line}.\n\nUser: " in text) == (context == "prompt")
        assert len(record["document_lengths"]) == number


def test_a_base_model_gets_the_template_of_its_data(home):
    """It chats by it afterwards; a model with another template is refused."""
    data = prepared(home, "prompt")
    settings = {"decoder": str(home / "decoder"), "examples": ExampleConfig(window=400)}
    config = TrainConfig("sft", data, home / "out", 1, 2, **settings)
    model = run_stage(config)
    assert not has_template(Tokenizer(home / "decoder"))
    assert Template(Tokenizer(model)).render([USER]) == Template(Tokenizer(home), "chatqa2").render([USER])
    chat = cepe_jax.load(model, window=400).chat(documents=["It is 7."])
    assert isinstance("".join(chat.say("Who?", max_new_tokens=2)), str)
    assert "\n\nIt is 7.\n\nUser: Who?\n\nAssistant:" in chat._template.tokenizer.decode(chat.session.ids)
    again = run_stage(dataclasses.replace(config, decoder=str(model), out=home / "again"))
    assert Template(Tokenizer(again)).digest == Template(Tokenizer(model)).digest
    (home / "chat_template.jinja").write_text(CHATML)
    other = decoder_at(home / "other", home)
    with pytest.raises(ValueError, match=f"(?=.*{other})(?=.*{data})(?=.*chat template)") as error:
        run_stage(dataclasses.replace(config, decoder=str(other), out=home / "refused"))
    one_line(error)


def test_chats_of_other_templates_take_no_documents(home):
    """A template that would leave them out, and a prompt, which is its own text."""
    (home / "book.txt").write_text("It is 7.")
    (home / "chat_template.jinja").write_text(CHATML)
    chat = GenerateConfig(decoder_at(home / "other", home), chat=True, document_file=(home / "book.txt",), window=400)
    with pytest.raises(ValueError, match="(?=.*chat_template.jinja)(?=.*documents)") as error:
        run_generate(chat)
    one_line(error)
    with pytest.raises(ValueError, match="document_file") as error:
        dataclasses.replace(chat, chat=False, prompt="Who?")
    one_line(error)
