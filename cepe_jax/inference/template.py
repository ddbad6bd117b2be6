"""Chat templates: a conversation to the text that the model was trained on, and to its ids.

They come with a model, as programs for Jinja. They may do what transformers lets them do, in a process of their own,
with limits of time, memory and output: see `template_program`.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from cepe_jax.data.tokenizer import Tokenizer
from cepe_jax.data.tokenizer_files import settings_beside, tokens_in
from cepe_jax.inference import template_program

Message = dict[str, str]  # role (system, user or assistant) and content
SECONDS = 10  # of computing, for one conversation; templates take milliseconds
PRIVATE_USE = range(0xE000, 0xF900)  # characters that no text should contain


class Renderer:
    """The process that runs templates. It starts with the first one, and again after one that ended it."""

    def __init__(self):
        self._process: subprocess.Popen | None = None
        self._lock = threading.Lock()

    def ask(self, source: str, variables: dict | None) -> str:
        """Return the text that the template makes of these variables; ValueError for its refusal or its end."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._process = self._start()
            try:
                request = json.dumps({"source": source, "variables": variables, "seconds": SECONDS})
                self._process.stdin.write(f"{request}\n".encode())
                self._process.stdin.flush()
                line = self._process.stdout.readline()
            except BaseException:  # Ctrl-C too: the next request must not read this one's reply
                self._process.kill()
                raise
            if not line.endswith(b"\n"):
                late = self._process.wait() == -signal.SIGPROF
                fault = f"computes for more than {SECONDS} seconds" if late else "ended its process"
                raise ValueError(f"the chat template {fault}")
        reply = json.loads(line)
        if "fault" in reply:
            raise ValueError(reply["fault"])
        return reply["text"]

    def _start(self) -> subprocess.Popen:
        program = sys.executable, "-P", template_program.__file__
        paths = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}  # where Jinja is, however this process found it
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        return subprocess.Popen(program, env=paths, start_new_session=True, **pipes)  # which Ctrl-C does not reach


RENDERER = Renderer()


class Template:
    """The chat template beside a tokenizer.

    What users write never becomes a special token or another that marks turns: in contents their names are text.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        settings = settings_beside(tokenizer.path)
        self.where, self._source = _source(tokenizer.path, settings)
        self._run(None)  # a text that is no template is refused here
        ends = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        names = {i: name for name, i in tokenizer.special.items()}
        self._tokens = {role: names[i] for role, i in ends.items()}
        for role in ("bos_token", "eos_token", "unk_token", "pad_token"):
            if names := tokens_in(settings.get(role)):
                self._tokens[role] = names[0]

    def escape_for(self, messages: list[Message]) -> str:
        """A character that is in none of the messages, to write special tokens' names with as text."""
        for character in map(chr, PRIVATE_USE):
            if not any(character in message["content"] for message in messages):
                return character
        raise ValueError("the conversation has all characters of private use, U+E000 to U+F8FF: leave one out")

    def render(self, messages: list[Message], escape: str = "") -> str:
        """The conversation as one text, up to where the model's next answer begins."""
        messages = [message | {"content": self.tokenizer.escaped(message["content"], escape)} for message in messages]
        return self._run(
            {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True} | self._tokens
        )

    def _run(self, variables: dict | None) -> str:
        try:
            return RENDERER.ask(self._source, variables)
        except ValueError as error:
            raise ValueError(f"{self.where}: {error}") from None


def _source(tokenizer: Path, settings: dict) -> tuple[Path, str]:
    """Return the template's file and its text: chat_template.jinja's, else tokenizer_config.json's."""
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
