"""Checkpoints on disk, read by another library, cut off, exchanged and kept."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import msgspec
import numpy as np
import pytest
from safetensors import safe_open

from p2ptrain import chain
from p2ptrain.errors import HomeError
from p2ptrain.state.checkpoint import NAME, Checkpoint, CheckpointMeta, Kept, load_checkpoint, save_checkpoint
from p2ptrain.state.tensors import pack_tensors

RUN_ID = bytes(32)
SHAPES = {"momentum": (2, 8), "p.weight": (3, 4), "r.0.first": (2, 8)}


def made(round: int = 7) -> Checkpoint:
    chance = np.random.default_rng(round)
    state = msgspec.structs.replace(chain.genesis(RUN_ID), round=round)
    arrays = {name: chance.random(shape, np.float32) for name, shape in SHAPES.items()}
    return Checkpoint(CheckpointMeta(RUN_ID, state, 5, 480, ()), arrays)


def only_file(folder: Path) -> Path:
    (found,) = folder.glob("*.safetensors")
    return found


def test_it_comes_back_and_the_library_of_safetensors_reads_the_same(tmp_path: Path) -> None:
    saved = made()
    length = save_checkpoint(tmp_path, saved)
    found = load_checkpoint(tmp_path, SHAPES)
    assert found is not None and found.meta == saved.meta
    said = json.loads((tmp_path / NAME).read_bytes())
    data = only_file(tmp_path).read_bytes()
    assert (said["round"], said["bytes"], said["sha256"]) == (7, len(data), hashlib.sha256(data).hexdigest())
    assert length == len(data)
    with safe_open(only_file(tmp_path), "np") as file:
        assert {*file.keys()} == {*SHAPES, "books"} and file.metadata()["round"] == "7"
        for name, array in saved.arrays.items():
            np.testing.assert_array_equal(file.get_tensor(name), array)
            np.testing.assert_array_equal(found.arrays[name], array)


@pytest.mark.parametrize("place", [0, 20, -1])
def test_a_byte_that_differs_is_noticed_and_the_error_says_what_to_do(tmp_path: Path, place: int) -> None:
    save_checkpoint(tmp_path, made())
    path = only_file(tmp_path)
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(HomeError, match="damaged") as raised:
        load_checkpoint(tmp_path, SHAPES)
    assert raised.value.hint == f"set it aside: mv {tmp_path / NAME} {tmp_path / NAME}.old"


def test_one_of_another_model_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, made())
    with pytest.raises(HomeError, match="another model"):
        load_checkpoint(tmp_path, SHAPES | {"p.weight": (4, 3)})


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path, SHAPES) is None


def test_the_last_ones_stay_and_one_of_each_stretch(tmp_path: Path) -> None:
    for round in (3, 9, 12, 18, 25, 31):
        save_checkpoint(tmp_path, made(round), Kept(last=2, every_rounds=10))
    rounds = sorted(int(path.name.split("-")[1]) for path in tmp_path.glob("*.safetensors"))
    assert rounds == [3, 12, 25, 31]
    found = load_checkpoint(tmp_path, SHAPES)
    assert found is not None and found.meta.chain.round == 31


def test_a_home_of_a_version_before_is_read_and_its_file_goes_with_the_next(tmp_path: Path) -> None:
    before = made()
    ordered = {name: before.arrays[name] for name in ("p.weight", "r.0.first", "momentum")}
    body = pack_tensors(msgspec.msgpack.encode(before.meta), ordered)
    (tmp_path / "checkpoint").write_bytes(hashlib.sha256(body).digest() + body)
    found = load_checkpoint(tmp_path, SHAPES)
    assert found is not None and found.meta == before.meta
    for name, array in before.arrays.items():
        np.testing.assert_array_equal(found.arrays[name], array)
    save_checkpoint(tmp_path, before)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([NAME, only_file(tmp_path).name])


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux")
def test_a_disk_that_is_full_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, made(1))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(handle: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path, made(2))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
