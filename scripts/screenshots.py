"""Makes pictures of every page of the dashboard, against a real swarm, in headless Chromium, and checks the pages.

    python scripts/screenshots.py --url http://127.0.0.1:8420/ --out pictures

Each page is taken in light and dark, 1280 and 390 pixels wide. Fails where a page is wider than its window, prints an
error to the console, has a control without a name, or text of too little contrast (WCAG AA: 4.5 to 1). Needs chromium
on the path, as Debian has it, and speaks to it by its own debugging protocol.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

VIEWS = ("overview", "peers", "rounds", "exchange", "credit", "past", "manifest")
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
SCHEMES = ("light", "dark")
START_SECONDS, DRAWN_SECONDS = 60.0, 45.0

CHECKS = """(() => {
  const problems = [];
  const wide = document.documentElement.scrollWidth - innerWidth;
  if (wide > 0) problems.push(`the page is ${wide} pixels wider than its window`);
  for (const one of document.querySelectorAll('button, input, a, [role=region], [role=img]')) {
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


class Tab:
    """One tab of a browser, through its debugging pipe: messages as JSON, each ended by a zero byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._count = 0
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._session = ""
        #: what the page printed as an error, or threw
        self.errors: list[str] = []
        self._hearing = asyncio.create_task(self._hear())

    async def open(self) -> None:
        """Open a tab and listen to it."""
        made = await self.call("Target.createTarget", url="about:blank")
        attached = await self.call("Target.attachToTarget", targetId=made["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            await self.call(f"{domain}.enable")

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol. Raises RuntimeError: the browser refuses."""
        self._count += 1
        waiting = self._waiting[self._count] = asyncio.get_running_loop().create_future()
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._writer.write(json.dumps(message).encode() + b"\0")
        async with asyncio.timeout(START_SECONDS):
            answer = await waiting
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    async def value(self, script: str) -> Any:
        """Return what a script comes to in the page."""
        answer = await self.call("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"])[:500])
        return answer["result"].get("value")

    async def until(self, script: str, seconds: float) -> None:
        """Wait until a script is true. Raises TimeoutError."""
        async with asyncio.timeout(seconds):
            while not await self.value(script):
                await asyncio.sleep(0.1)

    async def _hear(self) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                message = json.loads((await self._reader.readuntil(b"\0"))[:-1])
                if "id" in message:
                    self._waiting.pop(message["id"]).set_result(message)
                elif message["method"] == "Runtime.exceptionThrown":
                    self.errors.append(json.dumps(message["params"])[:500])
                elif message["method"] == "Log.entryAdded" and message["params"]["entry"]["level"] == "error":
                    self.errors.append(message["params"]["entry"]["text"])
                elif message["method"] == "Runtime.consoleAPICalled" and message["params"]["type"] == "error":
                    self.errors.append(json.dumps(message["params"]["args"])[:500])


@contextlib.asynccontextmanager
async def browser(program: str) -> Any:
    """Start a browser and give a tab of it."""
    to_read, to_write = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(prefix="p2ptrain-chromium-", ignore_cleanup_errors=True) as profile:
        flags = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
        ]

        def wire() -> None:
            os.dup2(to_read[0], 3)
            os.dup2(to_write[1], 4)

        process = subprocess.Popen(
            [program, *flags, f"--user-data-dir={profile}", "--no-first-run", "about:blank"],
            close_fds=False,
            preexec_fn=wire,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read[0])
        os.close(to_write[1])
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=64 * 2**20)
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(to_write[0], "rb"))
        transport, protocol = await loop.connect_write_pipe(
            asyncio.streams.FlowControlMixin, os.fdopen(to_read[1], "wb")
        )
        tab = Tab(reader, asyncio.StreamWriter(transport, protocol, None, loop))
        try:
            await tab.open()
            yield tab
        finally:
            transport.close()
            process.terminate()
            process.wait()


async def take(url: str, out: Path, program: str, views: tuple[str, ...]) -> list[str]:
    """Make all pictures; returns what is wrong with the pages."""
    out.mkdir(parents=True, exist_ok=True)
    problems: list[str] = []
    base, _, fragment = url.partition("#")
    async with browser(program) as tab:
        for scheme in SCHEMES:
            await tab.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            for size, (width, height) in SIZES.items():
                await tab.call(
                    "Emulation.setDeviceMetricsOverride",
                    width=width,
                    height=height,
                    deviceScaleFactor=1,
                    mobile=size == "phone",
                )
                await tab.call("Page.navigate", url="about:blank")
                await tab.call("Page.navigate", url=f"{base}#{fragment}&view=overview".replace("#&", "#"))
                await tab.until("document.body?.dataset.drawn === 'yes'", DRAWN_SECONDS)
                for view in views:
                    name = f"{view}-{scheme}-{size}"
                    await tab.value(f"document.getElementById('tab-{view}').click()")
                    if view in ("credit", "past", "manifest"):
                        table = {"past": "past-peers"}.get(view, f"{view}-table")
                        with contextlib.suppress(TimeoutError):
                            await tab.until(f"document.querySelector('#{table} table') !== null", 20.0)
                    if view == "overview":
                        with contextlib.suppress(TimeoutError):
                            await tab.until("document.querySelectorAll('canvas').length >= 4", 5.0)
                    await asyncio.sleep(0.3)
                    picture = await tab.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
                    (out / f"{name}.png").write_bytes(base64.b64decode(picture["data"]))
                    problems += [f"{name}: {problem}" for problem in await tab.value(CHECKS)]
                    problems += [f"{name}: console: {error}" for error in tab.errors]
                    tab.errors.clear()
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8420/", help="address that p2ptrain dashboard printed")
    parser.add_argument("--out", type=Path, default=Path("pictures"), help="folder for the pictures")
    parser.add_argument("--views", default=",".join(VIEWS), help="which pages, separated by commas")
    arguments = parser.parse_args()
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        print("there is no chromium on the path: sudo apt install chromium", file=sys.stderr)
        return 77
    with urllib.request.urlopen(arguments.url.partition("#")[0], timeout=10) as page:
        assert page.status == 200
    problems = asyncio.run(take(arguments.url, arguments.out, program, tuple(arguments.views.split(","))))
    print(f"{len(list(arguments.out.glob('*.png')))} pictures in {arguments.out}")
    print("\n".join(problems) or "no page is too wide, prints errors, lacks names or contrast")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
