"""A run.toml that names a strategy: what it need not say, and what it may."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import msgspec
import pytest

from p2ptrain.config.loading import new_manifest, parse_manifest, render
from p2ptrain.config.manifest import Manifest, OptimizerConfig, Strategy
from p2ptrain.config.sizes import Size
from p2ptrain.errors import ManifestError

HERE = Path("run.toml")
HEAD = 'name = "a"\nnonce = "' + "0" * 32 + '"\n'
STRATEGIES = get_args(Strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_naming_it_is_enough_and_the_template_says_all_of_it(strategy: Strategy) -> None:
    named = parse_manifest(f'{HEAD}[optimizer]\nstrategy = "{strategy}"\n', HERE)
    template = render(new_manifest("a", strategy))
    written = parse_manifest(template, HERE)
    assert named.optimizer == written.optimizer
    assert (named.codec, named.round) == (written.codec, written.round)
    assert written.optimizer.strategy == strategy
    assert "reply_topk = " in template


def test_a_run_that_says_nothing_is_what_the_manifest_says() -> None:
    assert parse_manifest(HEAD, HERE) == Manifest(name="a", nonce="0" * 32)


def test_what_a_run_says_goes_before_what_its_strategy_suggests() -> None:
    text = '[optimizer]\nstrategy = "sparse_diloco"\nlearning_rate = 0.5\n[optimizer.matrix]\ntopk = 9\n'
    optimizer = parse_manifest(HEAD + text + "[round]\ntarget_batch = 7\n", HERE).optimizer
    suggested = new_manifest("a", "sparse_diloco").optimizer
    assert optimizer.learning_rate == 0.5
    assert (optimizer.matrix.topk, optimizer.matrix.reply_topk) == (9, suggested.matrix.reply_topk)
    assert optimizer.head == suggested.head


def test_one_key_of_a_kind_leaves_the_others_as_they_are_by_default() -> None:
    default = Manifest(name="a", nonce="0" * 32).optimizer.embedding
    embedding = parse_manifest(f"{HEAD}[optimizer.embedding]\ntopk = 9\n", HERE).optimizer.embedding
    assert embedding == msgspec.structs.replace(default, topk=9)


@pytest.mark.parametrize("strategy", ["demo", "local_demo"])
def test_steps_of_signs_are_smaller_in_a_wider_model_and_with_a_small_batch_unless_the_run_says_how_large(
    strategy: str,
) -> None:
    def rate(width: int, said: str = "", batch: int = 16) -> float:
        text = f'[model]\nembedding = {width}\n[optimizer]\nstrategy = "{strategy}"\n{said}'
        return parse_manifest(f"{HEAD}{text}[round]\ntarget_batch = {batch}\n", HERE).optimizer.learning_rate

    assert rate(128) == new_manifest("a", strategy).optimizer.learning_rate  # type: ignore[arg-type]
    assert rate(64) == 2 * rate(128) == 4 * rate(256)
    assert rate(128, batch=4) == rate(128) / 2 and rate(128, batch=64) == rate(128)
    assert rate(64, "learning_rate = 0.5\n") == 0.5


def test_the_warm_up_is_as_many_tokens_as_suit_the_model() -> None:
    def warm_tokens(size: Size) -> float:
        made = new_manifest("a", size=size)
        return made.optimizer.warmup_rounds * made.round.target_batch * made.context / made.model.parameters

    assert warm_tokens("25M") == pytest.approx(warm_tokens("100M"), rel=0.05)
    assert new_manifest("a").optimizer.warmup_rounds == OptimizerConfig().warmup_rounds
    tiny = parse_manifest(f"{HEAD}[model]\nembedding = 1024\n[optimizer]\ntotal_rounds = 300\n", HERE)
    assert tiny.optimizer.warmup_rounds == 30, "a tenth of a short run"


def test_a_template_whose_model_is_changed_by_hand_follows_it() -> None:
    template = render(new_manifest("a"))
    assert "# learning_rate = 0.001" in template.splitlines() and "# warmup_rounds = 10" in template.splitlines()
    edited = template.replace("embedding = 128\n", "embedding = 768\n").replace("layers = 2\n", "layers = 12\n")
    optimizer = parse_manifest(edited, HERE).optimizer
    assert optimizer.learning_rate == 0.00017 and optimizer.warmup_rounds == 200
    said = msgspec.structs.replace(new_manifest("a"), optimizer=OptimizerConfig(learning_rate=0.5))
    assert "learning_rate = 0.5" in render(said).splitlines()


@pytest.mark.parametrize("table", ["model = 3", "[model]\nembedding = 0", '[model]\nembedding = "wide"'])
def test_a_width_that_is_none_is_refused_as_before(table: str) -> None:
    with pytest.raises(ManifestError, match="model"):
        parse_manifest(f"{HEAD}{table}\n", HERE)


def test_looking_ahead_where_inner_steps_are_taken_anyway_is_refused() -> None:
    text = '[optimizer]\nstrategy = "diloco"\nlook_ahead = 0.1\n'
    with pytest.raises(ManifestError, match="look_ahead contradicts strategy diloco"):
        parse_manifest(HEAD + text, HERE)


@pytest.mark.parametrize("value", ['"demi"', "3", "[1]"])
def test_another_strategy_is_refused(value: str) -> None:
    with pytest.raises(ManifestError, match=r"optimizer\.strategy"):
        parse_manifest(f"{HEAD}[optimizer]\nstrategy = {value}\n", HERE)


def test_tables_that_are_none_are_refused_as_before() -> None:
    for text in ("optimizer = 3\n", '[optimizer]\nstrategy = "dense"\nmatrix = 3\n'):
        with pytest.raises(ManifestError, match="optimizer"):
            parse_manifest(HEAD + text, HERE)
