"""Chat templates: a conversation to the text that the model was trained on, and to its ids.

They come with a model, as programs for Jinja. They may do what transformers lets them do, in a process of their own,
with limits of time, memory and output: see `template_program`.
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from cepe_jax.data import template_program
from cepe_jax.data.tokenizer import Tokenizer
from cepe_jax.data.tokenizer_files import TEMPLATE, settings_beside, tokens_in

Message = dict[str, str]  # role (system, user or assistant) and content
SHIPPED = {"chatqa2": Path(__file__).with_name("chatqa2.jinja")}  # templates of this package
SECONDS = 10  # of computing, for one conversation; templates take milliseconds
PRIVATE_USE = range(0xE000, 0xF900)  # characters that no text should contain


class Renderer:
    """The process that runs templates. It starts with the first one, and again after one that ended it."""

    def __init__(self):
        self._process: subprocess.Popen | None = None
        self._lock = threading.Lock()

    def ask(self, source: str, variables: dict | None, marks: tuple[str, str] | None = None) -> str:
        """Return the text that the template makes of these variables; ValueError for its refusal or its end.

        `marks` stand around what it marks for training.
        """
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._process = self._start()
            try:
                request = json.dumps({"source": source, "variables": variables, "marks": marks, "seconds": SECONDS})
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
    """The chat template beside a tokenizer, or another one for its tokens.

    What users write never becomes a special token or another that marks turns: in contents and documents their names
    are text.
    """

    def __init__(self, tokenizer: Tokenizer, other: str = "", text: str = ""):
        """Read the template, or in its place `other`, one of this package's by name or a file; or take `text`."""
        self.tokenizer = tokenizer
        settings = settings_beside(tokenizer.path)
        if text:
            self.where, self.source = tokenizer.path, text
        else:
            self.where, self.source = _other(other) if other else _source(tokenizer.path, settings)
        self._run(None)  # a text that is no template is refused here
        ends = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        names = {i: name for name, i in tokenizer.special.items()}
        self._tokens = {role: names[i] for role, i in ends.items()}
        for role in ("bos_token", "eos_token", "unk_token", "pad_token"):
            if names := tokens_in(settings.get(role)):
                self._tokens[role] = names[0]

    @property
    def digest(self) -> str:
        """Equal for templates that write the same of a conversation."""
        return hashlib.sha256(json.dumps([self.source, sorted(self._tokens.items())]).encode()).hexdigest()

    def escape_for(self, messages: list[Message], documents: Sequence[str] = ()) -> str:
        """A character that is in no message and no document, to write special tokens' names with as text."""
        return self._free(messages, documents, 1)[0]

    def _free(self, messages: list[Message], documents: Sequence[str], count: int) -> list[str]:
        """Return `count` characters that are in no message and no document."""
        used = set().union(*(message["content"] for message in messages), *documents)
        free = list(itertools.islice((c for c in map(chr, PRIVATE_USE) if c not in used), count))
        if len(free) < count:
            raise ValueError("the conversation has all characters of private use, U+E000 to U+F8FF: leave some out")
        return free

    def render(self, messages: list[Message], escape: str = "", documents: Sequence[str] = ()) -> str:
        """The conversation as one text, up to where the model's next answer begins.

        ValueError if the template does not write the documents, which stand in the prompt.
        """
        return self._render(self._escaped(messages, escape), self._texts(documents, escape), ends=False)

    def _escaped(self, messages: list[Message], escape: str) -> list[Message]:
        return [message | {"content": self.tokenizer.escaped(message["content"], escape)} for message in messages]

    def _texts(self, documents: Sequence[str], escape: str) -> list[str]:
        return [self.tokenizer.escaped(document, escape) for document in documents]

    def _render(
        self, messages: list[Message], documents: list[str], ends: bool, marks: tuple[str, str] | None = None
    ) -> str:
        """Return the conversation as one text. It ends with its last message, or where the next answer begins."""
        named = [{"text": document} for document in documents] or None  # as transformers passes them
        variables = {"messages": messages, "tools": None, "documents": named, "add_generation_prompt": not ends}
        if documents and not self._writes_documents:
            raise ValueError(f"{self.where}: it does not write documents into the prompt: give another template")
        return self._run(variables | self._tokens, marks)

    @cached_property
    def _writes_documents(self) -> bool:
        """True if the template writes a document beside a question; it is a character that is in nothing else."""
        messages, sign = [{"role": "user", "content": "?"}], chr(PRIVATE_USE[0])
        named = {"messages": messages, "tools": None, "documents": [{"text": sign}], "add_generation_prompt": True}
        return sign in self._run(named | self._tokens)

    def ids_of(self, messages: list[Message]) -> list[int]:
        """Return the ids of a whole conversation, which ends with its last message."""
        escape = self.escape_for(messages)
        return self.tokenizer.encode_special(self._render(self._escaped(messages, escape), [], ends=True), escape)

    def with_targets(self, messages: list[Message], documents: Sequence[str] = ()) -> tuple[list[int], list[bool]]:
        """Return the ids of a whole conversation, and which of them a model learns: those of the assistant's turns.

        The documents are part of the prompt.

        A turn is what the template marks by `{% generation %}`. Of a template without marks it is the content, the
        special token that follows it, such as the end of the turn, and the white space between it and the prompt that
        the model would get. A token that is only in part a turn's is learnt.
        ValueError if the assistant says nothing, or the template does not write what it says as it stands.
        """
        spoken = [message["content"] for message in messages if message["role"] == "assistant"]
        if not any(content.strip() for content in spoken):
            raise ValueError("the conversation has no assistant's turn: there is nothing to learn from it")
        escape, begin, end = self._free(messages, documents, 3)
        unmarked = messages = self._escaped(messages, escape)
        documents = self._texts(documents, escape)
        text = self._render(messages, documents, ends=True)
        marked = self._render(messages, documents, ends=True, marks=(begin, end))
        if by_content := marked == text:
            messages = [m if m["role"] != "assistant" else m | {"content": _between(m["content"], begin, end)}
                        for m in messages]  # fmt: skip
            marked = self._render(messages, documents, ends=True)
        spans = [span.span(1) for span in re.finditer(f"{begin}([^{end}]*){end}", marked)]
        spans = [(a - 2 * n - 1, b - 2 * n - 1) for n, (a, b) in enumerate(spans)]  # in the text without marks
        turns = [n for n, m in enumerate(messages) if m["role"] == "assistant" and begin in m["content"]]
        wanted = len(turns) if by_content else len(spans)
        if marked.replace(begin, "").replace(end, "") != text or not 0 < len(spans) == wanted:
            raise ValueError(f"{self.where}: it changes what the assistant says: mark it there by {{% generation %}}")
        if by_content:
            prompts = [(unmarked[:turn], documents) for turn in turns]
            spans = [self._widened(text, span, *prompt) for span, prompt in zip(spans, prompts, strict=True)]
        placed = self.tokenizer.placed_special(text, escape)
        learnt = [
            any(first <= begin < last if begin == end else begin < last and first < end for first, last in spans)
            for _, begin, end in placed
        ]
        if not any(learnt):
            raise ValueError(f"{self.where}: it marks nothing of what the assistant says")
        return [i for i, _, _ in placed], learnt

    def _widened(
        self, text: str, span: tuple[int, int], before: list[Message], documents: list[str]
    ) -> tuple[int, int]:
        """Return the place of a content, and of what belongs to its turn around it, after the messages `before`."""
        first, last = span
        with contextlib.suppress(ValueError):  # of a template that wants other messages before an answer
            prompt = self._render(before, documents, ends=False)
            if text.startswith(prompt) and text[len(prompt) : first].isspace():
                first = len(prompt)
        end_of_turn = self._special.match(text, last)
        return first, end_of_turn.end() if end_of_turn else last

    @cached_property
    def _special(self) -> re.Pattern:
        """Finds a special token, which white space may precede."""
        names = sorted(self.tokenizer.special, key=len, reverse=True)
        return re.compile(rf"\s*(?:{'|'.join(map(re.escape, names)) or '(?!)'})")

    def _run(self, variables: dict | None, marks: tuple[str, str] | None = None) -> str:
        try:
            return RENDERER.ask(self.source, variables, marks)
        except ValueError as error:
            raise ValueError(f"{self.where}: {error}") from None


def _between(content: str, begin: str, end: str) -> str:
    """Return the content with marks around all but the white space at its ends, which templates may take away."""
    core = content.strip()
    if not core:
        return content
    at = content.index(core)
    return content[:at] + begin + core + end + content[at + len(core) :]


def has_template(tokenizer: Tokenizer) -> bool:
    """Return True if there is a chat template beside the tokenizer."""
    beside = tokenizer.path.with_name(TEMPLATE).exists()
    return beside or settings_beside(tokenizer.path).get("chat_template") is not None


def _other(name: str) -> tuple[Path, str]:
    """Return the file and the text of one of this package's templates, or of the file of this name."""
    path = SHIPPED.get(name, Path(name))
    if not path.is_file():
        raise FileNotFoundError(f"template is {name}: give a file, or one of {', '.join(SHIPPED)}")
    return path, _text_of(path)


def _text_of(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}: copy it again") from None


def _source(tokenizer: Path, settings: dict) -> tuple[Path, str]:
    """Return the template's file and its text: chat_template.jinja's, else tokenizer_config.json's."""
    alone, config = (tokenizer.with_name(name) for name in (TEMPLATE, "tokenizer_config.json"))
    if alone.exists():
        return alone, _text_of(alone)
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
