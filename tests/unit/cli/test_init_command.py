"""`p2ptrain init`: a run.toml that loads, for the embedded corpus or for one's own text."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import pytest

from p2ptrain.cli.main import run
from p2ptrain.config.home import Home
from p2ptrain.config.loading import load_manifest
from p2ptrain.data.corpus import unpack


def init(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        run(["init", *map(str, arguments)])
    return int(caught.value.code or 0)


@pytest.fixture
def letters(tmp_path: Path) -> Path:
    """A folder of text: 200 paragraphs."""
    folder = tmp_path / "my letters"
    folder.mkdir()
    (folder / "all.txt").write_text("\n\n".join(f"Dear reader, this is letter {n}. " * 4 for n in range(200)))
    return folder


def test_the_embedded_corpus_enters_by_the_hashes_of_its_data_card(tmp_path: Path) -> None:
    assert init(tmp_path / "run.toml") == 0
    data = load_manifest(tmp_path / "run.toml").data
    card = json.loads((resources.files("p2ptrain.data") / "embedded" / "card.json").read_text())
    assert (data.sha256, data.bytes) == (card["train"]["sha256"], card["train"]["bytes"])
    assert (data.heldout_sha256, data.heldout_bytes) == (card["heldout"]["sha256"], card["heldout"]["bytes"])
    assert data.tokenizer_sha256 == card["tokenizer"]["sha256"]


def test_ones_own_text_enters_by_hash_and_a_copy_stays_in_the_home(tmp_path: Path, letters: Path) -> None:
    home = Home(tmp_path / "home")
    arguments = (tmp_path / "run.toml", "--data", letters, "--license", "CC-BY-4.0", "--home", home.path)
    assert init(*arguments) == 0
    made = load_manifest(tmp_path / "run.toml")
    assert (made.name, made.data.name, made.data.license) == ("my-letters", "my-letters", "CC-BY-4.0")
    (letters / "all.txt").unlink()
    corpus = unpack(home.corpus(made.data.sha256).read_bytes(), made.data)
    assert corpus.train.startswith(b"Dear reader, this is letter 0.")
    assert b"letter 199" in corpus.heldout


def test_it_says_what_to_type_next(tmp_path: Path, letters: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, home = tmp_path / "my run.toml", tmp_path / "home"
    assert init(path, "--data", letters, "--license", "MIT", "--home", home) == 0
    assert f"p2ptrain bootstrap '{path}' --home {home}" in capsys.readouterr().out


def test_a_manifest_is_replaced_only_by_force_and_is_then_another_run(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    assert init(path, "--name", "first") == 0
    first = load_manifest(path)
    assert init(path) == 2
    assert load_manifest(path) == first
    assert init(path, "--force", "--name", "second") == 0
    assert load_manifest(path).name == "second"
    assert load_manifest(path).nonce != first.nonce


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--data", "{letters}"], 2, "--data needs --license"),
        (["--license", "MIT"], 2, "--license needs --data"),
        (["--data", "{letters}", "--license", "mine"], 9, "licence"),
        (["--data", "{letters}/none.txt", "--license", "MIT"], 9, "no text at"),
        (["--name", "a\nb"], 2, "--name"),
    ],
)
def test_a_mistake_writes_nothing(
    tmp_path: Path,
    letters: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    path = tmp_path / "run.toml"
    assert init(path, *(argument.format(letters=letters) for argument in arguments)) == code
    assert message in capsys.readouterr().err
    assert not path.exists()


def test_a_place_that_cannot_hold_a_manifest_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert init(tmp_path) == 2
    assert init(tmp_path / "nowhere" / "run.toml") == 2
    assert f"mkdir -p {tmp_path / 'nowhere'}" in capsys.readouterr().err
