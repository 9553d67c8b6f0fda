"""Makes pictures of `top` and of every page of the dashboard, against a real swarm, and checks the pages.

    python scripts/screenshots.py --out pictures
    python scripts/screenshots.py --out pictures --url http://127.0.0.1:8420/     # of a dashboard that runs

Without --url it starts five peers on this machine first, pauses one of them and kills another, and looks from the home
of the first; that takes about two minutes. Each page is taken in light and dark, 1280 and 390 pixels wide. It fails
where a page is wider than its window, prints an error to the console, has a control without a name, or text of too
little contrast (WCAG AA: 4.5 to 1). With --axe all rules of axe-core are checked, too:

    npm pack axe-core && tar xf axe-core-*.tgz      # then: --axe package/axe.min.js

Needs chromium on the path, as Debian has it (`apt install chromium`), and nothing else to speak to it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "bench"))

from lab.browser import Tab, browser, browser_program
from lab.commands import Command, Peers
from lab.report import note

VIEWS = ("overview", "peers", "rounds", "exchange", "credit", "past", "manifest")
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
SCHEMES = ("light", "dark")
NAMES = ("ada", "grace", "linus", "mary", "edith")
DRAWN_SECONDS = 45.0
TOP_COLUMNS, TOP_LINES = 110, 34
NO_BROWSER = "there is no chromium on the path: apt install chromium"

CHECKS = """(() => {
  const problems = [];
  const wide = document.documentElement.scrollWidth - innerWidth;
  if (wide > 0) problems.push(`the page is ${wide} pixels wider than its window`);
  for (const one of document.querySelectorAll('button, input, select, a, [role=region], [role=img]')) {
    const label = one.getAttribute('aria-label') || one.textContent.trim() || one.labels?.[0]?.textContent;
    if (!label) problems.push(`${one.tagName} ${one.id} has no name`);
  }
  const numbers = (color) => {
    const paint = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
    paint.fillStyle = color; paint.fillRect(0, 0, 1, 1);
    return [...paint.getImageData(0, 0, 1, 1).data];
  };
  const light = (rgb) => rgb.slice(0, 3).map((v) => v / 255)
    .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, n) => sum + v * [0.2126, 0.7152, 0.0722][n], 0);
  const ground = (one) => {
    for (let at = one; at; at = at.parentElement) {
      const found = numbers(getComputedStyle(at).backgroundColor);
      if (found[3] === 255) return found;
    }
    return [255, 255, 255, 255];
  };
  const seen = new Set();
  for (const one of document.querySelectorAll('body *')) {
    const own = [...one.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || !one.offsetParent || one.className === 'skip') continue;
    const [a, b] = [light(numbers(getComputedStyle(one).color)), light(ground(one))];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const what = `${one.tagName}.${one.className}`;
    if (contrast >= 4.5 || seen.has(what)) continue;
    seen.add(what);
    problems.push(`${what}: contrast ${contrast.toFixed(2)}`);
  }
  return problems;
})()"""
AXE = """axe.run().then((found) => found.violations.map(
  (one) => `axe: ${one.id}: ${one.help}: ${one.nodes.slice(0, 3).map((node) => node.target.join(' ')).join('; ')}`))"""


async def take(url: str, out: Path, program: str, views: tuple[str, ...] = VIEWS, axe: str = "") -> list[str]:
    """Make pictures of all pages; return what is wrong with them.

    Args:
        axe: the source of axe-core; empty: its rules are not checked.
    """
    out.mkdir(parents=True, exist_ok=True)
    problems: list[str] = []
    base, _, fragment = url.partition("#")
    async with browser(program) as tab:
        for scheme in SCHEMES:
            for size, (width, height) in SIZES.items():
                await tab.shape(width, height, scheme, phone=size == "phone")
                await tab.call("Page.navigate", url="about:blank")
                await tab.call("Page.navigate", url=f"{base}#{fragment}&view=overview".replace("#&", "#"))
                await tab.until("document.body?.dataset.drawn === 'yes'", DRAWN_SECONDS)
                if axe:
                    await tab.value(f"{axe};0")
                for view in views:
                    await show(tab, view)
                    name = f"{view}-{scheme}-{size}"
                    (out / f"{name}.png").write_bytes(await tab.picture())
                    found = await tab.value(CHECKS) + (await tab.value(AXE) if axe else []) + tab.errors
                    problems += [f"{name}: {problem}" for problem in found]
                    tab.errors.clear()
    return problems


async def show(tab: Tab, view: str) -> None:
    """Choose a view, and wait until it is drawn."""
    await tab.value(f"document.getElementById('tab-{view}').click()")
    drawn = {
        "overview": "document.querySelectorAll('canvas').length >= 4",
        "past": "document.body.dataset.past === 'none' || document.querySelector('#past-rounds table') !== null",
    }.get(view, f"document.querySelector('#{view}-table table, #{view}-table .hint') !== null")
    await tab.until(drawn, DRAWN_SECONDS)
    # Whatever the charts and a change of the layout take to settle.
    await tab.value("new Promise((then) => requestAnimationFrame(() => requestAnimationFrame(() => then(0))))")


async def take_top(address: str, home: Path, out: Path, program: str) -> None:
    """Make a picture of `p2ptrain top`, by Textual's own drawing of its screen."""
    from p2ptrain.cli.screen import Screen
    from p2ptrain.config.home import Home
    from p2ptrain.peer.observing import Observer

    out.mkdir(parents=True, exist_ok=True)
    observer = await Observer.create([address], None, Home(home))
    try:
        app = Screen(observer.look)
        async with app.run_test(size=(TOP_COLUMNS, TOP_LINES)) as pilot:
            for _ in range(15):
                await app.look_again()
                await pilot.pause(1.0)
            drawing = app.export_screenshot(title="p2ptrain top")
    finally:
        await observer.close()
    # Its fonts would come from elsewhere.
    drawing = re.sub(r"@font-face\s*{[^}]*}", "", drawing).replace("Fira Code", "DejaVu Sans Mono")
    (out / "top.svg").write_text(drawing)
    left, top, width, height = map(float, re.search(r'viewBox="([^"]+)"', drawing)[1].split())  # type: ignore[index]
    async with browser(program) as tab:
        await tab.shape(int(width - left), int(height - top), "dark", phone=False)
        await tab.call("Page.navigate", url=(out / "top.svg").absolute().as_uri())
        await tab.until("document.readyState === 'complete'", DRAWN_SECONDS)
        (out / "top.png").write_bytes(await tab.picture(whole_page=False))


@contextlib.contextmanager
def dashboard_of_five() -> Iterator[tuple[str, str, Path]]:
    """A dashboard of five real peers, one of which is paused and one killed: its URL, an address and a home."""
    with contextlib.ExitStack() as undo:
        folder = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="p2ptrain-shots-", dir="/tmp")))
        peers = undo.enter_context(Peers(folder, {name: ("127.0.0.1", ()) for name in NAMES}))
        note("five peers have started")
        peers.train(20, 600)
        home = peers.home(NAMES[0])
        undo.callback(Command("pause", folder, "pause", "--home", str(peers.home("linus"))).stop)
        peers.peers["edith"].kill()
        board = Command("dashboard", folder, "dashboard", "--home", str(home), "--listen", "127.0.0.1:0")
        undo.callback(board.stop)
        url = board.says(r"(http://\S+)")
        yield url, peers.address, home


def main() -> int:
    """Make all pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="address that p2ptrain dashboard printed; default: five peers are started")
    parser.add_argument("--out", type=Path, default=Path("pictures"), help="folder for the pictures")
    parser.add_argument("--views", default=",".join(VIEWS), help="which pages, separated by commas")
    parser.add_argument("--axe", type=Path, metavar="FILE", help="axe.min.js of axe-core")
    options = parser.parse_args()
    program = browser_program()
    if program is None:
        print(NO_BROWSER, file=sys.stderr)
        return 77
    axe = options.axe.read_text() if options.axe else ""
    views = tuple(options.views.split(","))
    if options.url:
        with urllib.request.urlopen(options.url.partition("#")[0], timeout=10) as page:
            assert page.status == 200
        problems = asyncio.run(take(options.url, options.out, program, views, axe))
    else:
        with dashboard_of_five() as (url, address, home):
            asyncio.run(take_top(address, home, options.out, program))
            problems = asyncio.run(take(url, options.out, program, views, axe))
    print(f"{len(list(options.out.glob('*.png')))} pictures in {options.out}")
    print("\n".join(problems) or "no page is too wide, prints errors, lacks names or contrast")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
