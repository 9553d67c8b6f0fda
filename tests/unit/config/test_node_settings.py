"""A node's settings: flag, environment, node.toml, what the home remembers, default, in this order."""

from __future__ import annotations

from pathlib import Path

import pytest

from p2ptrain.config.home import Home
from p2ptrain.config.node import NodeTable, explain, resolve_settings
from p2ptrain.errors import UsageError


def test_each_place_gives_way_to_the_one_before_it(tmp_path: Path) -> None:
    node_toml = tmp_path / "node.toml"
    flags: dict[str, object] = {"port": 1}
    environment = {"P2PTRAIN_PORT": "2"}
    node_toml.write_text("port = 3")
    Home(tmp_path).remember_port(4)
    seen = []
    for forget in (flags.clear, environment.clear, node_toml.unlink, Home(tmp_path).port.unlink, lambda: None):
        settings = resolve_settings(tmp_path, flags, environment)
        seen.append((settings.port, settings.origins["port"]))
        forget()
    assert seen == [
        (1, "--port"),
        (2, "P2PTRAIN_PORT"),
        (3, str(node_toml)),
        (4, str(tmp_path / "port")),
        (0, "default"),
    ]


def test_flags_not_given_count_for_nothing(tmp_path: Path) -> None:
    given = {key: None for key in NodeTable.__struct_fields__} | {"announce": []}
    assert resolve_settings(tmp_path, given, {}) == resolve_settings(tmp_path, None, {})


def test_a_flag_of_zero_is_given_and_asks_for_a_fresh_port(tmp_path: Path) -> None:
    Home(tmp_path).remember_port(4)
    assert resolve_settings(tmp_path, {"port": 0}, {}).port == 0
    (tmp_path / "node.toml").write_text("port = 0")
    assert resolve_settings(tmp_path, {}, {}).port == 4


def test_lists_come_from_every_place(tmp_path: Path) -> None:
    (tmp_path / "node.toml").write_text('announce = ["a:1"]')
    assert resolve_settings(tmp_path, {}, {}).announce == ("a:1",)
    assert resolve_settings(tmp_path, {}, {"P2PTRAIN_ANNOUNCE": "b:1, c:2"}).announce == ("b:1", "c:2")
    assert resolve_settings(tmp_path, {"announce": ["d:3"]}, {}).announce == ("d:3",)


def test_the_home_has_its_origin_too(tmp_path: Path) -> None:
    environment = {"P2PTRAIN_HOME": str(tmp_path)}
    assert resolve_settings(None, {}, environment).home == tmp_path
    assert resolve_settings(None, {}, environment).origins["home"] == "P2PTRAIN_HOME"
    assert resolve_settings(tmp_path, {}, {"P2PTRAIN_HOME": "/elsewhere"}).origins["home"] == "--home"
    assert resolve_settings(None, {}, {}).origins["home"] == "default"


def test_the_table_names_every_setting_and_where_it_is_from(tmp_path: Path) -> None:
    rows = list(explain(resolve_settings(tmp_path, {"name": "mine"}, {"P2PTRAIN_THREADS": "2"})))
    assert [key for key, _, _ in rows] == ["home", *NodeTable.__struct_fields__]
    assert ("name", '"mine"', "--name") in rows
    assert ("threads", "2", "P2PTRAIN_THREADS") in rows
    assert ("device", '"auto"', "default") in rows


@pytest.mark.parametrize(
    ("flags", "environment", "file", "message", "hint"),
    [
        ({"port": 99999}, {}, "", "--port = 99999: expected `int` <= 65535", "TCP port"),
        ({"device": "tpu"}, {}, "", "--device = \"tpu\": expected one of 'auto', 'cpu'", "cuda"),
        ({"log_format": "xml"}, {}, "", "--log-format", "stderr"),
        ({"name": "\x1b[2J"}, {}, "", "--name", "ASCII"),
        ({}, {"P2PTRAIN_PORT": "high"}, "", 'P2PTRAIN_PORT = "high": expected `int`', "correct P2PTRAIN_PORT"),
        ({}, {"P2PTRAIN_THREADS": "-1"}, "", "P2PTRAIN_THREADS", "threads"),
        ({}, {}, "port = 'x'", 'node.toml: port = "x": expected `int`', "correct"),
        ({}, {}, "prot = 1", "unknown key prot", "did you mean port?"),
        ({}, {}, "port =", "is not TOML", "correct"),
    ],
)
def test_a_value_that_does_not_fit_is_named_with_where_it_is_from(
    tmp_path: Path, flags: dict[str, object], environment: dict[str, str], file: str, message: str, hint: str
) -> None:
    (tmp_path / "node.toml").write_text(file)
    with pytest.raises(UsageError) as caught:
        resolve_settings(tmp_path, flags, environment)
    assert message in str(caught.value)
    assert hint in caught.value.hint


def test_settling_settings_writes_nothing(tmp_path: Path) -> None:
    resolve_settings(tmp_path / "home", {}, {})
    assert list(tmp_path.iterdir()) == []
