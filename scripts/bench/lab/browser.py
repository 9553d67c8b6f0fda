"""One tab of a headless Chromium, through its own debugging protocol: nothing but the browser itself is needed."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator
from typing import Any

ANSWER_SECONDS = 60.0
PROGRAMS = ("chromium", "chromium-browser", "google-chrome")


def browser_program() -> str | None:
    """The browser on the path; None: there is none."""
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


class Tab:
    """Messages as JSON over a pipe, each ended by a zero byte."""

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
        async with asyncio.timeout(ANSWER_SECONDS):
            answer = await waiting
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        result: dict[str, Any] = answer["result"]
        return result

    async def value(self, script: str) -> Any:
        """What a script comes to in the page, or what it promises."""
        answer = await self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"])[:500])
        return answer["result"].get("value")

    async def until(self, script: str, seconds: float) -> None:
        """Wait until a script is true. Raises TimeoutError."""
        async with asyncio.timeout(seconds):
            while not await self.value(script):
                await asyncio.sleep(0.1)

    async def shape(self, width: int, height: int, scheme: str, *, phone: bool) -> None:
        """Have the window so large, in pixels, and the page `light` or `dark`."""
        await self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone
        )

    async def picture(self, *, whole_page: bool = True) -> bytes:
        """A PNG of the window, or of all that could be scrolled to."""
        taken = await self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole_page)
        return base64.b64decode(taken["data"])

    async def _hear(self) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                message = json.loads((await self._reader.readuntil(b"\0"))[:-1])
                if "id" in message:
                    waiting = self._waiting.pop(message["id"])
                    if not waiting.done():
                        waiting.set_result(message)
                elif message["method"] == "Runtime.exceptionThrown":
                    self.errors.append(json.dumps(message["params"])[:500])
                elif message["method"] == "Log.entryAdded" and message["params"]["entry"]["level"] == "error":
                    self.errors.append(message["params"]["entry"]["text"])
                elif message["method"] == "Runtime.consoleAPICalled" and message["params"]["type"] == "error":
                    self.errors.append(json.dumps(message["params"]["args"])[:500])


@contextlib.asynccontextmanager
async def browser(program: str) -> AsyncIterator[Tab]:
    """Start a browser and give a tab of it."""
    to_read, to_write = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(prefix="p2ptrain-chromium-", ignore_cleanup_errors=True) as profile:
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe"]

        def wire() -> None:
            os.dup2(to_read[0], 3)
            os.dup2(to_write[1], 4)

        process = subprocess.Popen(
            [program, *flags, f"--user-data-dir={profile}", "about:blank"],
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
