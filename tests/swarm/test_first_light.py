"""A swarm as users run it: join by address, join late, lose peers at the worst moment, and still agree to the bit."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from p2ptrain.swarm.identity import format_peer_id, load_or_create_identity

sys.path.insert(0, str(Path(__file__).parent))

from peers import Peer, Swarm, run

COMPUTE_SECONDS = 1.0
DEADLINE_SECONDS = 4.0 + 1.0 + 2.0
"""round_max + grace + reply_timeout of the manifest: what a round takes when a reducer never answers."""
SEAL_TIMEOUT_SECONDS = 1.0
MACHINE_SECONDS = 4.0
"""What a busy machine of two cores may add."""


@pytest.fixture
def swarm(tmp_path: Path) -> Iterator[Swarm]:
    made = Swarm(tmp_path)
    yield made
    made.close()


def same_replica(*peers: Peer) -> None:
    for peer in peers:
        peer.ended()
    assert len({peer.replica() for peer in peers}) == 1


def same_export(*peers: Peer) -> None:
    """What each peer's home exports is one file, to the byte, and of the state that they ended at."""
    pytest.importorskip("safetensors", reason="pip install 'p2ptrain[export]'")
    made = []
    for peer in peers:
        out = peer.home.with_name(f"{peer.home.name}-exported")
        result = json.loads(run("export", str(out), "--home", str(peer.home), "--format", "hf", "--json").stdout)
        assert (result["state_id"], result["parameters_sha256"]) == peer.replica()
        made.append((result["root"], result["files"]))
    assert len(made[0][1]) == 1 and all(one == made[0] for one in made)


# Four processes that load all themselves, and many rounds: on a busy machine it outlasts one test's limit.
@pytest.mark.timeout(600)
def test_a_late_peer_ends_bit_identical_and_inspect_tells_the_truth_all_along(swarm: Swarm) -> None:
    swarm.fresh = True  # as users start them
    # Long enough for a process that loads all itself to come in, on a busy machine too.
    swarm.write_manifest(last_round=180, evaluated_every=10)
    ada = swarm.bootstrap("ada")
    address = ada.address()
    observer = swarm.watch(address)
    assert len(observer.sees({"ada": "solo"}, 30)["peers"]) == 1
    grace = swarm.join("grace", address).started()
    observer.sees({"ada": "training", "grace": "training"}, 30)
    ada.reaches(20)
    linus = swarm.join("linus", address).started()
    seen = observer.sees({"ada": "training", "grace": "training", "linus": "training"}, 60)
    assert seen["run"]["name"] == "test"
    assert (seen["run"]["round"], seen["run"]["state_id"]) in {(p["round"], p["state_id"]) for p in seen["peers"]}
    assert seen["dht"] == {"nodes_alive": 3, "nodes_dead": 0}
    for peer in seen["peers"]:
        assert peer["tokens_per_second"] > 0 or peer["name"] == "linus"
        assert peer["last_seen_seconds"] < 10
    told = seen["evaluation"]
    assert told["by"] in {peer["peer_id"] for peer in seen["peers"]} and told["figures"]["bits_per_byte"] > 0
    same_replica(ada, grace, linus)
    measured_in_turn_and_checked_by(linus, ada)
    result = run("eval", "--home", str(linus.home), "--format", "json", "--max-tokens", "500", fresh=True)
    assert json.loads(result.stdout)["parameters_sha256"] == linus.replica()[1]
    text = run("sample", "--home", str(linus.home), "--prompt", "Fellow citizens", "--tokens", "5", fresh=True).stdout
    assert text.startswith("Fellow citizens")


def measured_in_turn_and_checked_by(peer: Peer, other: Peer) -> None:
    """Members have measured rounds in turn; both peers were told alike, and what this one holds it finds again."""
    histories = []
    for home in (peer.home, other.home):
        lines = run("eval", "--history", "--format", "json", "--home", str(home)).stdout.splitlines()
        histories.append({(one["round"], one["by"]): one for one in map(json.loads, lines)})
    known, others = histories
    common = known.keys() & others.keys()
    assert common and all(known[key]["figures"] == others[key]["figures"] for key in common)
    assert len({by for _, by in known}) >= 2 and len({round for round, _ in known}) == len(known)
    logged = [entry["evaluation"] for entry in peer.entries() if "evaluation" in entry]
    # Each once, as it was heard: what a member has measured may come after what another one has measured later.
    assert sorted((one["round"], one["by"]) for one in logged) == sorted(known)
    newest = max(common)
    found = run("eval", "--round", str(newest[0]), "--format", "json", "--home", str(peer.home))
    measured = json.loads(found.stdout)
    assert measured["state_id"] == known[newest]["state_id"] and measured["tokens"] == 256
    (said,) = measured["members"]
    assert said["agrees"] and said["by"] == newest[1]
    assert said["figures"]["perplexity"] == pytest.approx(measured["perplexity"], rel=1e-4)


@pytest.mark.parametrize("moment", ["a reply half sent", pytest.param("any moment", marks=pytest.mark.long)])
def test_the_others_train_on_when_the_bootstrap_peer_is_killed(swarm: Swarm, moment: str) -> None:
    swarm.write_manifest(last_round=90)
    ada = swarm.bootstrap("ada", failpoint="reply_half_sent")
    address = ada.address()
    grace, linus = (swarm.join(name, address) for name in ("grace", "linus"))
    grace.started()
    linus.started()
    observer = swarm.watch(joined_address(grace))
    observer.sees({"ada": "training", "grace": "training", "linus": "training"}, 60)
    if moment == "a reply half sent":
        killed_at = ada.dies_at_failpoint()
    else:
        time.sleep(random.uniform(0.0, 2.0))
        killed_at = ada.kill()
    for peer in (grace, linus):
        peer.reaches(ada.round + 2)
    # The round that was under way, its deadline, and one more place for each sealer that may be dead.
    allowed = COMPUTE_SECONDS + DEADLINE_SECONDS + SEAL_TIMEOUT_SECONDS + MACHINE_SECONDS
    times = seal_times(grace, killed_at)
    assert max(later - earlier for earlier, later in itertools.pairwise(times)) < allowed
    observer.sees({"ada": "lost"}, 15)
    same_replica(grace, linus)


@pytest.mark.long
def test_a_learner_carries_the_run_on_when_the_only_member_is_killed(swarm: Swarm) -> None:
    swarm.write_manifest(last_round=80)
    ada = swarm.bootstrap("ada", failpoint="join_received")
    address = ada.address()
    ada.reaches(6)
    grace = swarm.join("grace", address)
    ada.dies_at_failpoint()
    grace.reaches(ada.round + 2)
    # The dead one comes back from its disk and takes part again.
    ada_again = swarm.join("ada", joined_address(grace)).started()
    same_replica(grace, ada_again)
    same_export(grace, ada_again)


def test_a_peer_that_is_asked_to_leave_ends_cleanly_and_leaves_nothing_running(swarm: Swarm) -> None:
    swarm.write_manifest()
    ada = swarm.bootstrap("ada")
    address = ada.address()
    grace = swarm.join("grace", address).started()
    observer = swarm.watch(address)
    observer.sees({"ada": "training", "grace": "training"}, 40)
    grace.process.send_signal(signal.SIGINT)
    grace.ended(40)
    swarm.nothing_runs()
    observer.sees({"grace": "leaving"}, 10)
    ada.reaches(ada.round + 3)
    ada.process.send_signal(signal.SIGTERM)
    ada.ended(40)


def joined_address(peer: Peer) -> str:
    """The address of a peer, from what its home remembers."""
    identity = load_or_create_identity(peer.home / "identity.key")
    return f"/ip4/127.0.0.1/tcp/{(peer.home / 'port').read_text()}/p2p/{format_peer_id(identity.peer_id)}"


def seal_times(peer: Peer, since: float) -> list[float]:
    """When each round of its journal was sealed, from the last one before `since` on."""
    times = []
    for path in (peer.home / "journal").glob("round-*"):
        # The oldest rounds are pruned meanwhile; those asked for are newer.
        with contextlib.suppress(FileNotFoundError):
            times.append(path.stat().st_mtime)
    before = [t for t in times if t < since]
    assert before, "the journal reaches back to the moment asked for"
    return [max(before), *sorted(t for t in times if t >= since)]
