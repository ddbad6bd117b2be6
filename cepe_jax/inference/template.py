"""Chat templates: a conversation to the text that the model was trained on, and to its ids.

They come with a model, as programs for Jinja; what they may do is what transformers lets them do.
"""

import datetime
import json
from pathlib import Path

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cepe_jax.data.tokenizer import Tokenizer
from cepe_jax.data.tokenizer_files import settings_beside, tokens_in

Message = dict[str, str]  # role (system, user or assistant) and content
PRIVATE_USE = range(0xE000, 0xF900)  # characters that no text should contain


class Template:
    """The chat template beside a tokenizer.

    What users write never becomes a special token or another that marks turns: in contents their names are text.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        settings = settings_beside(tokenizer.path)
        self.where, source = _source(tokenizer.path, settings)
        if not isinstance(source, str):
            raise ValueError(f"{self.where}: the chat template is {source!r}: give a text, or a list of named ones")
        try:
            self._program = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"{self.where}: not a chat template, line {error.lineno}: {error.message}") from None
        ends = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        names = {i: name for name, i in tokenizer.special.items()}
        self._tokens = {role: names[i] for role, i in ends.items()}
        for role in ("bos_token", "eos_token", "unk_token", "pad_token"):
            if names := tokens_in(settings.get(role)):
                self._tokens[role] = names[0]

    def escape_for(self, messages: list[Message]) -> str:
        """A character that is in none of the messages, to write special tokens' names with as text."""
        return next(c for c in map(chr, PRIVATE_USE) if not any(c in message["content"] for message in messages))

    def render(self, messages: list[Message], escape: str = "") -> str:
        """The conversation as one text, up to where the model's next answer begins."""
        messages = [message | {"content": self.tokenizer.escaped(message["content"], escape)} for message in messages]
        try:
            return self._program.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=True, **self._tokens
            )
        except Exception as error:  # of the template's own making, whatever it is: it is a program
            raise ValueError(f"{self.where}: the chat template refuses the conversation: {error}") from None


def _source(tokenizer: Path, settings: dict) -> tuple[Path, str]:
    """Where the template stands, and its text: chat_template.jinja's, else tokenizer_config.json's."""
    alone, config = (tokenizer.with_name(name) for name in ("chat_template.jinja", "tokenizer_config.json"))
    if alone.exists():
        try:
            return alone, alone.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{alone}: not UTF-8 at byte {error.start}: copy it again") from None
    template = settings.get("chat_template")
    if template is None:
        raise ValueError(
            f"{tokenizer.parent} has no chat template: copy chat_template.jinja or tokenizer_config.json of a chat "
            f"model there, or give a prompt that is no chat"
        )
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        if "default" not in named:
            raise ValueError(f"{config}: chat templates {', '.join(named)}, and no default: name one so")
        template = named["default"]
    return config, template


class _Generation(Extension):
    """`{% generation %}` marks what a model is trained on: here it changes nothing."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    def refuse(message: str):
        raise jinja2.TemplateError(message)

    def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    extensions = [loopcontrols, _Generation]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment
