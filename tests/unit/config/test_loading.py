"""run.toml: what `init` writes loads as it was meant, and what a person gets wrong is named."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2ptrain.config.loading import load_manifest, new_manifest, parse_manifest, render, toml_value
from p2ptrain.config.manifest import DataConfig, FileConfig, Manifest, RoundConfig, SourceConfig
from p2ptrain.errors import ManifestError

HEAD = 'name = "a"\nnonce = "' + "0" * 32 + '"\n'
HERE = Path("run.toml")


def test_the_template_loads_as_the_manifest_it_was_made_of(tmp_path: Path) -> None:
    made = msgspec.structs.replace(new_manifest("first light"), round=RoundConfig(pace="fixed", grace_seconds=1e-3))
    path = tmp_path / "run.toml"
    path.write_text(render(made))
    assert load_manifest(path) == made


def test_every_key_of_the_template_has_a_comment_above_it() -> None:
    lines = render(new_manifest("a")).splitlines()
    keys = [n for n, line in enumerate(lines) if line and not line.startswith("#")]
    assert len(keys) > 60
    assert all(lines[n - 1].startswith("# ") for n in keys)


def test_two_new_manifests_are_two_runs() -> None:
    assert new_manifest("a").nonce != new_manifest("a").nonce


@given(st.recursive(st.text(st.characters(codec="utf-8")) | st.integers(-(2**63), 2**63) | st.booleans(), st.lists))
def test_values_are_written_as_toml_reads_them(value: object) -> None:
    assert tomllib.loads(f"key = {toml_value(value)}")["key"] == value


@given(st.floats())
def test_floats_are_written_as_toml_reads_them(value: float) -> None:
    assert repr(tomllib.loads(f"key = {toml_value(value)}")["key"]) == repr(value)


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("layers = 3", "unknown key layers", "did you mean model.layers?"),
        ("modle = 3", "unknown key modle", "did you mean model?"),
        ("[model]\nlayer = 3", "unknown key model.layer", "did you mean model.layers?"),
        ("[optimizer.matrix]\nto_pk = 3", "unknown key optimizer.matrix.to_pk", "did you mean optimizer.matrix.topk?"),
        ("zzz = 3", "unknown key zzz", "known keys here: protocol, name"),
        ("[model]\nlayers = 999", "model.layers = 999: expected `int` <= 256", "model.layers: Transformer blocks."),
        ("[model]\nheads = 3", "model.embedding = 128 must be a multiple of 2 * heads = 6", "correct it in"),
        ("[model]\nlayers = 256\nembedding = 32768", "parameters; at most 2,147,483,648", "correct it in"),
        ("[optimizer.matrix]\ntopk = 5000", "optimizer.matrix.topk = 5000: expected `int` <= 4096", "4096"),
        ("[optimizer]\nbeta = nan", "optimizer.beta = nan: expected `float`", "momentum"),
        ('[optimizer.matrix]\ndirection = "lion"', "expected one of 'sign', 'rms', 'muon'", "direction"),
        ("[codec]\nvalue_bits = 3", "codec.value_bits = 3: expected one of 1, 2", "sign"),
        ("[round]\nmin_seconds = 70", "round.min_seconds = 70.0 is above max_seconds = 60.0", "correct it in"),
        ('[access]\nmode = "list"\npeers = ["me"]', 'access.peers[0] = "me"', "correct it in"),
        ("model = 3", "model = 3: expected `object`", "correct it in"),
        ("[[model]]\nlayers = 3", "model = ", "correct it in"),
        ("model =", "is not TOML", "correct run.toml"),
    ],
)
def test_a_mistake_is_named_with_what_to_do(text: str, message: str, hint: str) -> None:
    with pytest.raises(ManifestError) as caught:
        parse_manifest(HEAD + text, HERE)
    assert message in str(caught.value)
    assert "run.toml" in str(caught.value)
    assert hint in caught.value.hint


def test_a_missing_key_is_named() -> None:
    with pytest.raises(ManifestError, match="`nonce`"):
        parse_manifest('name = "a"', HERE)


def test_a_missing_file_tells_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ManifestError) as caught:
        load_manifest(tmp_path / "run.toml")
    assert caught.value.hint == f"p2ptrain init {tmp_path / 'run.toml'}"
    assert caught.value.exit_code == 3


def test_a_byte_order_mark_and_windows_line_ends_change_nothing(tmp_path: Path) -> None:
    plain = load_manifest(_written(tmp_path / "run.toml", HEAD.encode()))
    marked = HEAD.replace("\n", "\r\n").encode("utf-8-sig")
    assert load_manifest(_written(tmp_path / "run.toml", marked)) == plain


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_sources_and_tokens_come_back_and_a_mistake_in_them_is_named(tmp_path: Path) -> None:
    source = SourceConfig(name="letters", license="MIT", url="https://example.org/a", attribution='A. "Reader"')
    data = DataConfig(tokens=FileConfig(bytes=9, root="0" * 64), sources=(source, source))
    manifest = msgspec.structs.replace(new_manifest("a"), data=data)
    assert parse_manifest(render(manifest), HERE) == manifest
    for key, wrong, message in (
        ("bytes", 'bytes = "nine"', "data.tokens.bytes"),
        ("url", 'url = "file:///etc/passwd"', "data.sources[0].url"),
        ("url", 'ulr = ""', "unknown key data.sources.ulr"),
    ):
        lines = render(manifest).split("[data.tokens]\n")
        broken = re.sub(rf"^{key} = .*$", wrong, lines[1], count=1, flags=re.M)
        with pytest.raises(ManifestError) as caught:
            parse_manifest(f"{lines[0]}[data.tokens]\n{broken}", HERE)
        assert message in str(caught.value)


def test_what_is_no_text_or_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ManifestError, match="UTF-8"):
        load_manifest(tmp_path / "run.toml")
    with pytest.raises(ManifestError, match="cannot read"):
        load_manifest(tmp_path)


def test_what_the_template_says_is_what_a_bare_manifest_means() -> None:
    bare = parse_manifest(HEAD, HERE)
    assert bare == Manifest(name="a", nonce="0" * 32)
    assert parse_manifest(render(bare), HERE) == bare


def test_a_key_that_is_not_set_stands_in_the_template_as_a_comment_with_what_it_means() -> None:
    assert '# robust = "bounded"' in render(new_manifest("a")).splitlines()
    said = parse_manifest(f'{HEAD}\n[round]\nrobust = "trimmed"\n', HERE)
    assert 'robust = "trimmed"' in render(said).splitlines()
    assert (said.round.sums_by, new_manifest("a").round.sums_by) == ("trimmed", "bounded")
