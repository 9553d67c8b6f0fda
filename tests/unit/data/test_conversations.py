"""Conversations become text by the tokenizer's own template; what assistants say counts in the loss."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from p2ptrain.data.conversations import chat_of
from p2ptrain.data.gathering import Gathered, gather
from p2ptrain.data.listing import list_files
from p2ptrain.data.reading import Wanted
from p2ptrain.data.tokenizer import TextTokenizer, read_tokenizer, shipped_tokenizer
from p2ptrain.errors import DataError

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TALK = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Bye!"},
]


def with_template(template: str) -> TextTokenizer:
    return TextTokenizer(shipped_tokenizer().json, template)


def test_the_text_is_what_transformers_makes_of_it_and_answers_alone_count() -> None:
    # What `render_jinja_template` of transformers 5.24 returns.
    wanted = (
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
        "<|im_start|>assistant\nBye!<|im_end|>\n"
    )
    chat = chat_of(with_template(CHATML))
    assert chat is not None
    texts = chat(TALK)
    assert "".join(text for text, _ in texts) == wanted
    assert [text for text, learned in texts if learned] == ["Hello!<|im_end|>\n", "Bye!<|im_end|>\n"]
    assert texts[0][0].endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_the_template_lies_beside_the_tokenizer(tmp_path: Path, place: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(shipped_tokenizer().json)
    config = json.dumps({"chat_template": [{"name": "default", "template": CHATML}]})
    (tmp_path / place).write_text(CHATML if place.endswith("jinja") else config)
    chat = chat_of(read_tokenizer(tmp_path))
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": TALK}))
    passages = list(gather(list_files([tmp_path / "a.jsonl"]), Wanted(chat=chat), Gathered()))
    assert [passage.learned for passage in passages] == [False, True, False, True]
    assert passages[0].begins and passages[-1].ends and sum(p.begins + p.ends for p in passages) == 2


def test_without_a_template_there_are_no_conversations() -> None:
    assert chat_of(shipped_tokenizer()) is None


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no system role') }}",
        "{{ messages[9].content }}",
        "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ 1 / 0 }}",
    ],
)
def test_a_template_that_refuses_or_misbehaves_is_an_error_with_a_place(tmp_path: Path, template: str) -> None:
    (tmp_path / "a.jsonl").write_text("\n" + json.dumps({"messages": TALK}))
    wanted = Wanted(chat=chat_of(with_template(template)))
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: the template"):
        list(gather(list_files([tmp_path / "a.jsonl"]), wanted, Gathered()))


def test_blocks_and_loops_that_transformers_knows_are_known() -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    template = (
        "{% for message in messages %}{% if message.role == 'system' %}{% continue %}{% endif %}{{ message.role }}: "
        "{% if message.role == 'assistant' %}{% generation %}\n{{ message.content }}{% endgeneration %}\n{% else %}"
        "{{ message.content }}\n{% endif %}{% endfor %}"
    )
    messages = [
        {"role": role, "content": text}
        for role, text in (("system", "Be kind."), ("user", "Who?"), ("assistant", "I."), ("user", "Oh."))
    ]
    chat = chat_of(with_template(template))
    assert chat is not None
    (expected,), _ = utils.render_jinja_template(conversations=[messages], chat_template=template)
    passages = chat(messages)
    assert "".join(text for text, _ in passages) == expected
    assert [text.strip() for text, learned in passages if learned] == ["assistant: I."]


def test_a_malformed_template_is_refused() -> None:
    with pytest.raises(DataError, match="template for conversations is malformed"):
        chat_of(with_template("{% for %}"))
