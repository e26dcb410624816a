"""Verbs under way."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

from torch.profiler import record_function


class Pending:
    """A verb under way, the rest of which this rank does when somebody waits for it.

    A verb ends when all ranks have done their part of it. Ranks that each waited for another verb first would wait for
    each other forever. So verbs that are put into one queue are finished in the order of their start, whichever is
    waited for.
    """

    def __init__(
        self,
        name: str,
        parts: Iterable[Callable[[], object]],
        explaining: Callable[[], AbstractContextManager[None]],
        queue: deque[Pending] | None = None,
        release: Callable[[], object] | None = None,
    ) -> None:
        """Put a verb that has been started behind all others of a queue.

        Args:
            name: What a profiler calls it.
            parts: What is left to do for the result; each begins what the next one waits for. One may be called again
                after a KeyboardInterrupt.
            explaining: A context for each of these and ``release``, which may replace what is raised.
            queue: Verbs to finish before this one; None where the order does not matter.
            release: What is then to be waited for until the buffers may be written again.
        """
        self._name = name
        self._left = deque(parts)
        self._release = release
        self._explaining = explaining
        self._failure: Exception | None = None
        self._queue: deque[Pending] = deque() if queue is None else queue
        self._queue.append(self)

    def wait(self) -> None:
        """Wait until the result is there and buffers may be written; more than once does no harm.

        This blocks the host, or on an accelerator the current stream. A RuntimeError, at each call, says that another
        rank is gone, or too late.
        """
        self.finish()
        if self._failure is not None:
            raise self._failure
        if self._release is not None:
            with self._explaining():
                self._release()
            self._release = None

    def finish(self) -> None:
        """For the verbs' own use: do what is left for the result; ``wait`` will say if that failed."""
        while self._left:
            first = self._queue[0]
            while first._left:
                first.go_on()
            if self._queue and self._queue[0] is first:
                self._queue.popleft()  # and not before: what was interrupted is still to be done

    def go_on(self) -> None:
        """For the verbs' own use: do the next part of what is left for the result, if there is any.

        A signal handler that reads a parameter in flight may come back here meanwhile, and do all that is left.
        """
        if not self._left:
            return
        part = self._left[0]
        with record_function(self._name):
            try:
                with self._explaining():
                    part()
            except Exception as error:  # who waits for this verb hears of it, not who waits for a later one
                self._failure = error
                self._left.clear()
                return
        if self._left and self._left[0] is part:
            self._left.popleft()


DONE = Pending("", [], nullcontext)
"""A verb that has nothing left to do."""
