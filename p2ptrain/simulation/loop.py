"""An asyncio loop whose clock jumps to the next timer, so that hours pass in seconds and a seed has one history.

Nothing in it waits or looks at the machine's clock: when no callback is ready, the time becomes that of the earliest
timer. Work for other threads is done at once, on this one. Every callback belongs to an `Actor` by its context; those
of an actor that is frozen are kept until it is thawed, as a stopped process finds its late timers when it goes on, and
those of a dead one are dropped.

Rests on BaseEventLoop of CPython 3.11 to 3.13: its heap of timers and its queue.
"""

from __future__ import annotations

import asyncio
import heapq
import inspect
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context, ContextVar
from typing import Any, cast


class Actor:
    """What crashes, freezes and thaws as one: the simulator's process."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop
        loop.actors.append(self)
        #: for all callbacks of this actor
        self.context = Context()
        self.context.run(current_actor.set, self)
        self.alive = True
        self.frozen = False
        #: tasks of this actor that have not ended; those of a dead one are kept, since their end would run its code
        self.tasks: dict[asyncio.Task[Any], None] = {}
        self._held: deque[asyncio.Handle] = deque()

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run `work` as this actor."""
        return self._loop.create_task(work, context=self.context)

    def freeze(self) -> None:
        """Nothing of it runs any more, until `thaw`."""
        self.frozen = True

    def thaw(self) -> None:
        """What has come due meanwhile runs now, in order."""
        self.frozen = False
        self._loop._ready.extend(self._held)
        self._held.clear()

    def kill(self) -> None:
        """Nothing of it ever runs again, not even what cleans up."""
        self.alive = False
        self._held.clear()


current_actor: ContextVar[Actor | None] = ContextVar("current_actor", default=None)


class _NoSelector:
    """There are no sockets here."""

    def select(self, timeout: float | None) -> list[Any]:
        return []


class VirtualLoop(asyncio.BaseEventLoop):
    """See the module docstring."""

    # BaseEventLoop's own, which its stubs do not list
    _ready: deque[asyncio.Handle]
    _scheduled: list[asyncio.TimerHandle]

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self._time = 0.0
        self._selector = _NoSelector()
        self._clock_resolution = 1e-9
        self.actors: list[Actor] = []
        #: callbacks run so far
        self.steps = 0
        #: exceptions that nobody took
        self.faults: list[BaseException | str] = []
        self.set_exception_handler(self._note_fault)
        self.set_task_factory(_make_task)  # type: ignore[arg-type]

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._time

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        """Do it now."""
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except StopIteration as error:
            raise RuntimeError("StopIteration in a thread") from error
        except BaseException as error:
            future.set_exception(error)
        return future

    def _note_fault(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.faults.append(context.get("exception") or str(context.get("message")))

    def discard(self) -> None:
        """The history is over: forget what has never begun, in silence."""
        for actor in self.actors:
            for task in actor.tasks:
                work = task.get_coro()
                # The closing of an asynchronous generator is no coroutine, and says nothing when forgotten.
                if inspect.iscoroutine(work) and inspect.getcoroutinestate(work) == inspect.CORO_CREATED:
                    work.close()
        self.close()

    def _check_closed(self) -> None:
        """What is left when a history ends is collected later, and may still schedule what never runs."""

    def _process_events(self, event_list: list[Any]) -> None:
        pass

    def _write_to_self(self) -> None:
        pass

    def _run_once(self) -> None:
        scheduled = self._scheduled
        while scheduled and scheduled[0].cancelled():
            heapq.heappop(scheduled)._scheduled = False  # type: ignore[attr-defined]
        if not self._ready:
            if not scheduled:
                raise RuntimeError("everything waits, and nothing is due")
            self._time = max(self._time, scheduled[0].when())
        while scheduled and scheduled[0].when() <= self._time:
            timer = heapq.heappop(scheduled)
            timer._scheduled = False  # type: ignore[attr-defined]
            self._ready.append(timer)
        for _ in range(len(self._ready)):
            handle = self._ready.popleft()
            if handle.cancelled():
                continue
            actor = cast(Context, handle._context).get(current_actor)  # type: ignore[attr-defined]
            if actor is not None and not actor.alive:
                continue
            if actor is not None and actor.frozen:
                actor._held.append(handle)
                continue
            self.steps += 1
            handle._run()


def _make_task(
    loop: VirtualLoop, work: Coroutine[Any, Any, Any], context: Context | None = None, **options: Any
) -> asyncio.Task[Any]:
    # `options`: Python 3.13.3 hands on the task's name too.
    task = asyncio.Task(work, loop=loop, context=context, **options)
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    actor = context.get(current_actor) if context is not None else current_actor.get()
    if actor is not None:
        actor.tasks[task] = None
        task.add_done_callback(lambda done: actor.tasks.pop(done, None))
    return task
