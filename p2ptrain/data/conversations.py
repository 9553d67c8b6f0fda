"""Conversations as text, by the template that comes with a tokenizer; what assistants say counts in the loss.

Templates are Jinja, rendered in a sandbox, with what the transformers library gives them. What a message adds is found
by rendering the conversation up to it, so a template that changes what it wrote before is refused. The date alone is
not given to them, as a run's text must not depend on the day on which somebody makes it.
"""

from __future__ import annotations

import json
from typing import Any

from p2ptrain.data.reading import Chat
from p2ptrain.data.tokenizer import TextTokenizer
from p2ptrain.errors import DataError


def chat_of(tokenizer: TextTokenizer) -> Chat | None:
    """Makes messages to passages as the tokenizer's template says; None: it has none.

    Raises:
        DataError: jinja2 is missing, or the template is malformed.
    """
    if not tokenizer.chat_template:
        return None
    try:
        import jinja2
        from jinja2 import nodes
        from jinja2.ext import Extension
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise DataError(
            "the template for conversations needs jinja2, which is not installed", hint="pip install 'p2ptrain[data]'"
        ) from error

    def refuse(reason: str) -> None:
        raise jinja2.TemplateError(reason)

    class Generation(Extension):
        """Templates put a block around what an assistant says; for us it changes nothing."""

        tags = {"generation"}  # noqa: RUF012 - as jinja has it

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = refuse
    try:
        template = environment.from_string(tokenizer.chat_template)
    except jinja2.TemplateError as error:
        raise DataError(
            f"the tokenizer's template for conversations is malformed: {error}", hint="correct its chat_template"
        ) from error
    # The document's own end follows it anyway.
    end = tokenizer.end_of_text

    def render(messages: list[dict[str, Any]], *, prompt: bool = False) -> str:
        try:
            return template.render(
                messages=messages, add_generation_prompt=prompt, bos_token=tokenizer.begin_of_text, eos_token=end
            )
        except Exception as error:  # whatever an expression in it raises
            raise ValueError(f"the template refuses this conversation: {error}") from error

    def chat(messages: list[dict[str, Any]]) -> list[tuple[str, bool]]:
        texts: list[tuple[str, bool]] = []
        done = ""
        for number, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            # What stands before an answer is not learned, its heading included.
            for upto, prompt, learned in ((number, True, False), (number + 1, False, True)):
                whole = render(messages[:upto], prompt=prompt) if upto else ""
                if not whole.startswith(done):
                    raise ValueError("the template changes what it wrote before a message")
                texts.append((whole[len(done) :], learned))
                done = whole
        whole = render(messages)
        if not whole.startswith(done):
            raise ValueError("the template changes what it wrote before a message")
        texts.append((whole[len(done) :], False))
        return [(text, learned) for text, learned in texts if text]

    return chat
