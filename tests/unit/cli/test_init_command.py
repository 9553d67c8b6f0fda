"""`p2ptrain init`: a run.toml that loads, for the embedded corpus or for one's own text."""

from __future__ import annotations

import functools
import hashlib
import json
import resource
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

from p2ptrain.cli.main import run
from p2ptrain.config.home import Home
from p2ptrain.config.loading import load_manifest
from p2ptrain.config.manifest import TOKENIZER_VOCABULARY
from p2ptrain.data.provenance import sources_in
from p2ptrain.data.token_file import TokenFile


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


def test_ones_own_text_enters_as_tokens_which_stay_in_the_home(tmp_path: Path, letters: Path) -> None:
    home = Home(tmp_path / "home")
    arguments = (tmp_path / "run.toml", "--data", letters, "--license", "CC-BY-4.0", "--home", home.path)
    assert init(*arguments, "--url", "https://example.org/letters", "--attribution", "A. Reader") == 0
    made = load_manifest(tmp_path / "run.toml")
    assert (made.name, made.data.name, made.data.license) == ("my-letters", "my-letters", "CC-BY-4.0")
    (source,) = sources_in(made.data)
    assert source.sha256 == hashlib.sha256((letters / "all.txt").read_bytes()).hexdigest()
    assert (source.url, source.attribution) == ("https://example.org/letters", "A. Reader")
    (letters / "all.txt").unlink()
    assert made.data.token_file is not None
    file = TokenFile(home.tokens(made.data.token_file.root))
    assert file.path.stat().st_size == made.data.token_file.bytes
    assert file.tokenizer.decode(file.train).startswith("Dear reader, this is letter 0.")
    assert "letter 199" in file.tokenizer.decode(file.heldout)
    assert made.model.vocabulary == TOKENIZER_VOCABULARY


def test_the_vocabulary_follows_the_tokenizer(tmp_path: Path, letters: Path) -> None:
    arguments = (tmp_path / "run.toml", "--data", letters, "--license", "MIT", "--home", tmp_path / "home")
    assert init(*arguments, "--tokenizer", "train:300") == 0
    made = load_manifest(tmp_path / "run.toml")
    assert made.model.vocabulary == 300
    tokenizer = tmp_path / "tokenizer.json"
    assert made.data.token_file is not None
    tokenizer.write_bytes(TokenFile(Home(tmp_path / "home").tokens(made.data.token_file.root)).tokenizer_json())
    assert init(*arguments, "--force", "--tokenizer", tokenizer) == 0
    assert load_manifest(tmp_path / "run.toml").data.token_file == made.data.token_file


def test_private_text_leaves_the_manifest_alone(tmp_path: Path, letters: Path) -> None:
    home = Home(tmp_path / "home")
    arguments = (tmp_path / "run.toml", "--data", letters, "--license", "MIT", "--home", home.path)
    assert init(*arguments, "--private") == 0
    data = load_manifest(tmp_path / "run.toml").data
    assert data.private and data.bytes == 0 and data.token_file is not None
    shared, own = TokenFile(home.tokens(data.token_file.root)), TokenFile(home.own_tokens)
    assert (shared.header.train_tokens, own.header.heldout_tokens) == (0, 0)
    assert shared.header.heldout_tokens and own.header.train_tokens
    assert b"letter 0." not in shared.path.read_bytes()


@pytest.mark.parametrize(
    ("license", "flags", "code", "said"),
    [
        ("CC-BY-NC-4.0", ["--commercial-use"], 9, "CC-BY-NC-4.0 allows no commercial use"),
        ("CC-BY-NC-4.0", [], 0, "allows no commercial use, perhaps"),
        ("CC-BY-ND-4.0", [], 0, "CC-BY-ND-4.0 allows no changed versions"),
        ("CC-BY-NC-4.0 OR MIT", ["--commercial-use"], 0, ""),
    ],
)
def test_what_a_licence_forbids_is_said(
    tmp_path: Path,
    letters: Path,
    capsys: pytest.CaptureFixture[str],
    license: str,
    flags: list[str],
    code: int,
    said: str,
) -> None:
    arguments = ("--data", letters, "--license", license, "--home", tmp_path / "home", *flags)
    assert init(tmp_path / "run.toml", *arguments) == code
    err = capsys.readouterr().err
    assert said in err and ("licence" in err or "commercial" in err) == bool(said)


def test_an_empty_path_is_no_current_folder(
    tmp_path: Path, letters: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(letters)
    assert init(tmp_path / "run.toml", "--data", "", "--license", "MIT") == 2
    assert "--data is empty" in capsys.readouterr().err
    assert init(tmp_path / "run.toml", "--home", "") == 2
    assert "--home is empty" in capsys.readouterr().err


def test_a_home_under_the_tilde_is_the_users(tmp_path: Path, letters: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("P2PTRAIN_HOME", "~/there")
    assert init(tmp_path / "run.toml", "--data", letters, "--license", "MIT") == 0
    assert list((tmp_path / "there" / "data").glob("*.tokens"))


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
        (["--data", "{letters}", "--license", "MIT", "--license", "MIT"], 2, "2 times --license for 1 times --data"),
        (["--data", "{letters}", "--license", "MIT", "--tokenizer", "train:x"], 9, "not a number of tokens"),
        (["--data", "{letters}", "--license", "MIT", "--tokenizer", "{letters}"], 9, "no tokenizer at"),
        (["--data", "{letters}", "--license", "MIT", "--field", ""], 2, "--field is empty"),
        (["--tokenizer", "train:300"], 2, "--tokenizer needs --data"),
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
    home = ("--home", tmp_path / "home")
    assert init(path, *(argument.format(letters=letters) for argument in arguments), *home) == code
    assert message in capsys.readouterr().err
    assert not path.exists()


def test_a_place_that_cannot_hold_a_manifest_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert init(tmp_path) == 2
    assert init(tmp_path / "nowhere" / "run.toml") == 2
    assert f"mkdir -p {tmp_path / 'nowhere'}" in capsys.readouterr().err


def test_a_size_picks_what_suits_it_and_the_numbers_are_there_for_programs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.toml"
    assert init(path, "--size", "10M", "--format", "json") == 0
    shown = json.loads(capsys.readouterr().out)
    model = load_manifest(path).model
    assert shown["needs"]["parameters"] == model.parameters == 9_966_848
    assert (model.layers, model.heads, model.embedding, model.context) == (10, 4, 256, 256)
    assert shown["next"] == f"p2ptrain bootstrap {path}"
    assert init(path, "--force", "--size", "12M") == 2
    assert "use one of 1M, 10M" in capsys.readouterr().err


def test_what_this_process_may_not_hold_is_refused_unless_forced(tmp_path: Path) -> None:
    path, limit = tmp_path / "run.toml", 6 * 10**9

    def under_a_limit(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "p2ptrain", "init", str(path), "--size", "1B", *more]
        limited = functools.partial(resource.setrlimit, resource.RLIMIT_AS, (limit, limit))
        return subprocess.run(command, capture_output=True, text=True, preexec_fn=limited)

    refused = under_a_limit()
    assert refused.returncode == 18 and "ulimit -v allows 6 GB" in refused.stderr
    assert not path.exists()
    assert under_a_limit("--force").returncode == 0
    assert load_manifest(path).model.embedding == 2048
