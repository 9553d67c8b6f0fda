"""The application of `p2ptrain top`, drawn by Textual: it draws what the views say, and works nothing out."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, ClassVar

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.widgets import DataTable, Footer, Sparkline, Static

from p2ptrain.cli.output import printable
from p2ptrain.cli.tables import count_text, seconds_text
from p2ptrain.observe.census import Inspection
from p2ptrain.observe.views import SORTS, round_row, sorted_peers

POINTS = 240
ROUNDS = 40
_STYLES = {"ok": "bold green", "warn": "bold yellow", "fail": "bold red"}
_PEERS = ("name", "peer", "state", "round", "tokens/s", "share", "late", "path", "last fault", "loss", "seen")
_ROUNDS = ("round", "sealed by", "turn", "included", "skipped", "late", "what else")


class Screen(App[None]):
    """See the module docstring.

    Args:
        look: returns how the swarm is now.
        pause: returns how many seconds there are to be before the next.
    """

    CSS = """
    #head { height: auto; padding: 0 1; }
    #curves { height: 5; }
    .curve { width: 1fr; padding: 0 1; }
    Sparkline { height: 3; }
    #peers { height: 1fr; min-height: 4; }
    #rounds { height: 1fr; min-height: 4; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", "Quit"),
        Binding("s", "sort", "Sort peers by the next column"),
        Binding("r", "toggle_rounds", "Rounds on or off"),
        Binding("p", "pause", "Stand still or go on"),
        Binding("question_mark", "show_help_panel", "Keys"),
    ]

    def __init__(self, look: Callable[[], Awaitable[Inspection]], pause: Callable[[], float] = lambda: 3.0) -> None:
        super().__init__()
        self._look, self._pause = look, pause
        self._sort = "name"
        self._paused = False
        self._looking = False
        self._seen: Inspection | None = None
        #: train loss and tokens a second, since this began
        self._losses: deque[float] = deque(maxlen=POINTS)
        self._speeds: deque[float] = deque(maxlen=POINTS)

    def compose(self) -> ComposeResult:
        """Lay out the screen."""
        yield Static("looking at the swarm ...", id="head")
        with Horizontal(id="curves"):
            with Vertical(classes="curve"):
                yield Static("train loss", id="loss-text")
                yield Sparkline([], id="loss", summary_function=max)
            with Vertical(classes="curve"):
                yield Static("tokens a second", id="speed-text")
                yield Sparkline([], id="speed", summary_function=max)
        peers: DataTable[Text] = DataTable(id="peers", cursor_type="row", zebra_stripes=True)
        rounds: DataTable[Text] = DataTable(id="rounds", cursor_type="row", zebra_stripes=True)
        peers.add_columns(*_PEERS)
        rounds.add_columns(*_ROUNDS)
        yield peers
        yield rounds
        yield Footer()

    def on_mount(self) -> None:
        """Begin to look."""
        self.title = "p2ptrain"
        self.call_after_refresh(self._keep_looking)

    async def _keep_looking(self) -> None:
        await self.look_again()
        self.set_timer(self._pause(), self._keep_looking)

    async def look_again(self) -> None:
        """Take one look, and draw it."""
        if self._paused or self._looking:
            return
        self._looking = True
        try:
            self._seen = await self._look()
        finally:
            self._looking = False
        overview = self._seen.as_json()["overview"]
        if overview["train_loss"] is not None:
            self._losses.append(overview["train_loss"])
        self._speeds.append(overview["tokens_per_second"])
        self.draw()

    def draw(self) -> None:
        """Draw the newest look."""
        seen = self._seen
        if seen is None:
            return
        value = seen.as_json()
        run, overview, health = value["run"], value["overview"], value["health"]
        of = f" of {overview['last_round']}" if overview["last_round"] else ""
        eta = "" if overview["eta_seconds"] is None else f"  done in {seconds_text(overview['eta_seconds'])}"
        still = "  [stands still: p goes on]" if self._paused else ""
        head = Text(printable(f"{run['name']}  round {run['round']}{of}{eta}{still}\n"))
        head.append(printable(health["text"]), _STYLES[health["level"]])
        spent = overview["round_seconds"]
        if spent:
            parts = ", ".join(f"{part} {seconds:.2f} s" for part, seconds in spent.items())
            head.append(f"\na round takes {sum(spent.values()):.2f} s: {parts}", "dim")
        self.query_one("#head", Static).update(head)
        loss = "-" if overview["train_loss"] is None else f"{overview['train_loss']:.3f}"
        self.query_one("#loss-text", Static).update(f"train loss {loss}")
        self.query_one("#speed-text", Static).update(f"{count_text(overview['tokens_per_second'])} tokens/s")
        self.query_one("#loss", Sparkline).data = list(self._losses)
        self.query_one("#speed", Sparkline).data = list(self._speeds)
        self._fill("#peers", [self._peer_cells(peer) for peer in sorted_peers(seen.peers, self._sort)])
        names = {peer["peer_id"]: peer["name"] for peer in seen.peers}
        rows = [round_row(sealed, names) for sealed in list(seen.rounds)[-ROUNDS:]][::-1]
        self._fill("#rounds", [_round_cells(row) for row in rows])

    def _fill(self, name: str, rows: list[tuple[str, ...]]) -> None:
        table: DataTable[Text] = self.query_one(name, DataTable)
        at = table.cursor_row
        table.clear()
        for row in rows:
            table.add_row(*(Text(printable(cell)) for cell in row))
        if rows:
            table.move_cursor(row=min(at, len(rows) - 1))

    def _peer_cells(self, peer: Mapping[str, Any]) -> tuple[str, ...]:
        share = "-" if peer["share"] is None else f"{100 * peer['share']:.0f} %"
        return (
            peer["name"],
            peer["peer_id"][-8:],
            peer["state"],
            str(peer["round"]),
            f"{peer['tokens_per_second']:,.0f}",
            share,
            f"{peer['late']}/{peer['rounds']}" if peer["rounds"] else "-",
            peer["path"],
            f"{peer['fault']}, round {peer['fault_round']}" if peer["fault"] else "-",
            "-" if peer["train_loss"] is None else f"{peer['train_loss']:.3f}",
            f"{peer['last_seen_seconds']:.0f} s ago",
        )

    def action_sort(self) -> None:
        """Sort peers by the next column."""
        keys = list(SORTS)
        self._sort = keys[(keys.index(self._sort) + 1) % len(keys)]
        self.notify(f"peers by {self._sort}")
        self.draw()

    def action_toggle_rounds(self) -> None:
        """Show rounds, or leave their place to peers."""
        table = self.query_one("#rounds", DataTable)
        table.display = not table.display

    def action_pause(self) -> None:
        """Stand still, or go on."""
        self._paused = not self._paused
        self.draw()


def _round_cells(row: dict[str, Any]) -> tuple[str, ...]:
    turn = "alone" if row["solo"] else f"takeover {row['place']}" if row["takeover"] else "its own"
    more = [f"{name}: {fault}" for name, fault in row["faults"].items()]
    more += [f"{name} admitted" for name in row["joins"]]
    return (
        str(row["round"]),
        row["sealer"],
        turn,
        f"{len(row['included'])}/{row['members']}",
        f"{row['skipped_parts']}/{row['parts']}",
        ", ".join(row["late"]) or "-",
        "; ".join(more) or "-",
    )
