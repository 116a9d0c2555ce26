"""A progress bar on stderr, for people at a terminal."""

from __future__ import annotations

import contextlib
import importlib
import sys
import time
from types import TracebackType
from typing import Any

__all__ = ["Progress"]

_REDRAW_SECONDS = 0.1


class Progress:
    """A progress bar on stderr: tqdm's if it is installed, else a line of our own.

    Nothing is shown when stderr is not a terminal.
    """

    def __init__(self, label: str, total: int, unit: str = "files") -> None:
        self._label = label
        self._total = total
        self._unit = unit
        self._done = 0
        self._shown_at = 0.0
        self._visible = sys.stderr.isatty()
        self._bar: Any = None
        if self._visible:
            with contextlib.suppress(ImportError):
                self._bar = importlib.import_module("tqdm").tqdm(
                    desc=label, total=total, unit=f" {unit}", unit_scale=True
                )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._visible:
            self._draw()
            print(file=sys.stderr)

    def advance(self, n: int = 1) -> None:
        """Count `n` more as done."""
        self._done += n
        if self._bar is not None:
            self._bar.update(n)
        elif self._visible and time.monotonic() - self._shown_at > _REDRAW_SECONDS:
            self._draw()

    def report(self, done: int, total: int) -> None:
        """Take the state as a whole, as the `progress` of ``recover`` gives it."""
        self._total = total
        if self._bar is not None:
            self._bar.total = total
        self.advance(done - self._done)

    def _draw(self) -> None:
        self._shown_at = time.monotonic()
        percent = 100 * self._done // max(1, self._total)
        print(
            f"\r{self._label}: {percent:3d}% ({self._done:,} of {self._total:,} "
            f"{self._unit})",
            end="",
            file=sys.stderr,
            flush=True,
        )
