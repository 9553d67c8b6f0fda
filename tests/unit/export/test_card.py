"""The model card, read as Markdown and YAML by libraries: strangers' text in it stays text."""

from __future__ import annotations

import itertools
import re
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

sys.path.insert(0, str(Path(__file__).parents[1]))

from homes import MEMBERS, SEQUENCES_READ, made_home
from lone import MANIFEST, identity_of

from p2ptrain.config.manifest import PROTOCOL_VERSION, DataConfig, FileConfig, SourceConfig
from p2ptrain.data.token_file import Header
from p2ptrain.export.card import Lines, Told, card_of, hub_licences
from p2ptrain.export.held import Held, load_held
from p2ptrain.swarm.identity import format_peer_id

hub = pytest.importorskip("huggingface_hub", reason="pip install 'p2ptrain[export]'")

HOSTILE = (
    "[click](https://evil.example) <img src=x onerror=alert(1)> `code` **bold** https://evil.example www.evil.example "
    "--- | # title \u202egnp.exe ![](http://evil.example/i.png) &lt;b&gt; license: mit"
)
SOURCES = (
    SourceConfig(
        name="letters_of _two_",
        license="CC-BY-4.0",
        sha256="ab" * 32,
        bytes=12345,
        url="https://example.org/a?b=<script>&c=|`[x](y)>",
        attribution=HOSTILE[:200],
    ),
    SourceConfig(name="more", license="MIT", url="https://huggingface.co/datasets/some-one/some.data"),
)


def held_with(tmp_path: Path, sources: tuple[SourceConfig, ...]) -> Held:
    tokens = FileConfig(bytes=1000, root="cd" * 32)
    data = DataConfig(name="letters", license="CC-BY-4.0 AND MIT", tokens=tokens, sources=sources)
    home, _ = made_home(tmp_path / "home", msgspec.structs.replace(MANIFEST, data=data), (), 8)
    return load_held(home)


def told(sources: tuple[SourceConfig, ...], **others: Any) -> Told:
    header = Header(
        300, 10, "ef" * 32, train_tokens=1234, heldout_tokens=56, train_bytes=1, heldout_bytes=1, documents=7
    )
    given = {"text": header, "bits_per_byte": None, "format": "hf"} | others
    lines = Lines("python", "load()")
    return Told(
        sources=sources, parameters_sha256="12" * 32, files={"model.safetensors": "34" * 32}, load=lines, **given
    )


def tokens_in(text: str) -> list[Token]:
    found: list[Token] = []
    for token in MarkdownIt("gfm-like", {"linkify": False}).parse(text):
        found += [token, *(token.children or [])]
    return found


def test_its_front_matter_is_what_the_hub_knows(tmp_path: Path) -> None:
    card = hub.ModelCard(card_of(held_with(tmp_path, SOURCES), told(SOURCES)))
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "license": ["cc-by-4.0", "mit"],
        "datasets": ["some-one/some.data"],
        "tags": ["p2ptrain"],
        "pipeline_tag": "text-generation",
    }


def test_strangers_text_is_shown_as_it_stands_and_is_no_markup(tmp_path: Path) -> None:
    text = hub.ModelCard(card_of(held_with(tmp_path, SOURCES), told(SOURCES))).text
    tokens = tokens_in(text)
    assert not [token for token in tokens if token.type in ("html_inline", "html_block", "image")]
    links = [token.attrs["href"] for token in tokens if token.type == "link_open"]
    assert links == [
        "https://example.org/a?b=%3Cscript%3E&c=%7C%60%5Bx%5D%28y%29%3E",
        "https://huggingface.co/datasets/some-one/some.data",
    ]
    shown = "".join(token.content for token in tokens if token.type in ("text", "text_special"))
    assert HOSTILE[:200].replace("\u202e", "\ufffd") in shown and "letters_of _two_" in shown
    assert "\u202e" not in text
    titles = [after.content for token, after in itertools.pairwise(tokens) if token.type == "heading_open"]
    assert titles == ["test, round 8", "Load it", "Text", "Training", "Members", "Check it"]
    # GitHub and the hub make links of addresses in text; a backslash keeps them from it.
    assert not re.search(r"https?://evil|www\.evil", text)


def test_it_says_what_was_trained_on_how_far_by_whom_and_how_to_check_it(tmp_path: Path) -> None:
    held = held_with(tmp_path, SOURCES)
    text = card_of(held, told(SOURCES, bits_per_byte=2.34567))
    for said in (
        "licence `CC-BY-4.0`",
        "12,345 bytes",
        f"SHA-256 `{'ab' * 32}`",
        "1,234 tokens to train on and 56 tokens held out, in 7 documents",
        "8 rounds, in which 16 contributions",
        f"has read {SEQUENCES_READ} sequences",
        "2.3457 bits per byte",
        f"| run | `{held.run_id.hex()}` |",
        f"| state id | `{held.chain.id.hex()}` |",
        f"| root | `{held.root.hex()}` |",
        f"| SHA-256 of the parameters | `{'12' * 32}` |",
        f"| SHA-256 of model.safetensors | `{'34' * 32}` |",
        f"| protocol | `{PROTOCOL_VERSION}` |",
        "p2ptrain export CHECK --home HOME --round 8 --format safetensors --json",
        *(f"- `{format_peer_id(identity_of(name).peer_id)}`" for name in MEMBERS),
    ):
        assert said in text, said
    assert "bits per byte" not in card_of(held, told(SOURCES)), "no figure that nobody measured"


@pytest.mark.parametrize(
    ("expressions", "expected"),
    [
        (["MIT", "MIT"], (["mit"], "")),
        (["GPL-3.0-or-later", "CC-BY-SA-4.0 AND ODbL-1.0"], (["gpl-3.0", "cc-by-sa-4.0", "odbl"], "")),
        (["MIT OR Apache-2.0"], (["other"], "MIT OR Apache-2.0")),
        (["LicenseRef-Public-Domain", "MIT", "0BSD"], (["other", "mit"], "LicenseRef-Public-Domain, 0BSD")),
        ([], ([], "")),
    ],
)
def test_licences_are_called_what_the_hub_calls_them(expressions: list[str], expected: tuple[list[str], str]) -> None:
    assert hub_licences(expressions) == expected
