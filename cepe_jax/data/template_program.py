"""The process in which chat templates run: they are programs, of whoever made the model.

It reads a request and writes a reply, a line of JSON each, until there are no more requests. Jinja's sandbox keeps
templates from files and from attributes of objects, and bounds neither time nor memory: a request that computes for
more than its `seconds` ends the process, and one that needs more than MEMORY is refused. This file is run as it stands,
and imports nothing of the package.
"""

import contextlib
import datetime
import functools
import json
import resource
import signal
import sys

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY = 1 << 30  # bytes of the address space
LONGEST = 1 << 24  # characters of a conversation


class _Generation(Extension):
    """`{% generation %}` marks what a model is trained on; as in transformers, what is set inside stays inside."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("marked"), [], [], body).set_lineno(line)

    def marked(self, caller) -> str:
        begin, end = self.environment.marks
        return begin + caller() + end


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


@functools.lru_cache(maxsize=4)
def _compiled(source: str) -> jinja2.Template:
    return _environment().from_string(source)


def _reason(error: Exception) -> str:
    """Return the error's message, the beginning of a long one."""
    if isinstance(error, MemoryError):
        return f"it needs more than {MEMORY >> 30} GiB of memory"
    message = " ".join(str(error).split()) or type(error).__name__
    return message if len(message) <= 100 else f"{message[:100]}..."


def reply_to(request: dict) -> dict:
    """Return `text`, the conversation that the template makes of `variables`, or `fault`; only compile without them.

    `marks`, if given, stand around what `{% generation %}` marks.
    """
    try:
        program = _compiled(request["source"])
    except jinja2.TemplateSyntaxError as error:
        return {"fault": f"not a chat template, line {error.lineno}: {_reason(error)}"}
    except Exception as error:  # of Python's compiler, for what Jinja makes of some templates
        return {"fault": f"not a chat template: {_reason(error)}"}
    if request["variables"] is None:
        return {"text": ""}
    program.environment.marks = request.get("marks") or ("", "")
    try:
        text = program.render(request["variables"])
    except Exception as error:  # of the template's own making, whatever it is
        return {"fault": f"the chat template refuses the conversation: {_reason(error)}"}
    if len(text) > LONGEST:
        return {"fault": f"the chat template makes {len(text):,} characters of the conversation, above {LONGEST:,}"}
    return {"text": text}


if __name__ == "__main__":
    with contextlib.suppress(ValueError, OSError):  # some systems have no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])  # its signal ends the process, also inside of C
        print(json.dumps(reply_to(request)), flush=True)
        signal.setitimer(signal.ITIMER_PROF, 0)
