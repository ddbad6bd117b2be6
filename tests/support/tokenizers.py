"""Tokenizers trained in a test, chat templates as models bring them, and contexts in chunks."""

import json
from collections.abc import Sequence
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

TEXTS = [
    "def f(x):\n    return x + 1\n\n\n# what is it? It is a test.\n" * 9,
    "user assistant system Hello there! <a>\n" * 9,
]
TEXTS += ["The quick brown fox jumps over the lazy dog, and then 🙂 goes home.\n" * 5]
WINDOW, CHUNK = 48, 8  # tokens: what the tiny text model's decoder reads, and its encoder at once
CHATML_TOKENS = "<|im_start|>", "<|im_end|>"
# SmolLM2's, but for the name of the one who made it.
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}"
    "{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# Zephyr's, as it is written: blocks stand on lines of their own, some indented.
ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
  {% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
    {% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
LLAMA_3_TOKENS = "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"
LLAMA_3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%Y") %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {#- tools are left out #}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""


def byte_level(path: Path, special: Sequence[str] = ("<s>", "</s>"), vocab_size: int = 320, texts=TEXTS) -> Path:
    """A tokenizer.json at `path`, of the kind that Llama 3 has: texts begin with the first special token."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"initial_alphabet": alphabet, "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=list(special), **options)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[special[0], "$A"], special_tokens=[(special[0], tokenizer.token_to_id(special[0]))]
    )
    tokenizer.save(str(path))
    return path


def write_chatml(home: Path) -> None:
    """Write a tokenizer of 334 ids or fewer and a chat template into a directory."""
    byte_level(home / "tokenizer.json", ("<s>", "</s>", *CHATML_TOKENS), 330)
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHATML}
    (home / "tokenizer_config.json").write_text(json.dumps(settings))


def as_llama_2(path: Path, vocab_size: int = 330, **options) -> Path:
    """A SentencePiece model at `path` with Llama 2's options: a space before every text, newlines are bytes."""
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter("\n".join(TEXTS).split("\n")),
            model_writer=file,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=True,
            allow_whitespace_only_pieces=True,
            minloglevel=2,
            **options,
        )
    return path


def to_tokenizers(model: Path, path: Path) -> Path:
    """The SentencePiece BPE model as a tokenizer.json at `path`: merges are all pairs of pieces, the best first."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    count = processor.vocab_size()
    vocabulary = {processor.id_to_piece(i): i for i in range(count)}
    user_defined = "\n" in vocabulary
    merges = []
    for i in range(count):
        piece = processor.id_to_piece(i)
        if processor.is_byte(i) or processor.is_control(i) or processor.is_unknown(i):
            continue
        cuts = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        merges += [(-processor.get_score(i), pair) for pair in cuts if set(pair) <= set(vocabulary)]
    pairs = [pair for _, pair in sorted(merges, key=lambda merge: merge[0])]
    bpe = models.BPE(vocab=vocabulary, merges=pairs, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    tokenizer = tokenizers.Tokenizer(bpe)
    spaces = tokenizers.normalizers.Replace(" ", "▁")
    prefix = len(processor.encode("\n")) > 1
    tokenizer.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.Prepend("▁")] * prefix + [spaces])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + [decoders.Strip(content=" ", left=1)] * prefix)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    if user_defined:
        tokenizer.add_tokens([tokenizers.AddedToken("\n", normalized=False)])
    tokenizer.save(str(path))
    return path


def byte_ids(path: Path) -> list[int]:
    """The id of each byte, of a SentencePiece model or a tokenizer.json with bytes."""
    if path.suffix == ".model":
        find = sentencepiece.SentencePieceProcessor(model_file=str(path)).piece_to_id
    else:
        find = tokenizers.Tokenizer.from_file(str(path)).token_to_id
    if path.suffix == ".model" or find("<0x00>") is not None:
        return [find(f"<0x{byte:02X}>") for byte in range(256)]
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]  # the others are, in order, the letters from 256 on
    letters = {byte: chr(byte) for byte in shown} | {
        byte: chr(256 + number) for number, byte in enumerate(sorted(set(range(256)) - set(shown)))
    }
    return [find(letters[byte]) for byte in range(256)]


def chunks_of(ids: list[int]) -> list[list[int]]:
    return [ids[at : at + CHUNK] for at in range(0, len(ids), CHUNK)]
