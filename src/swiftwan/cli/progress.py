"""How a run looks while it runs, and how Ctrl-C ends it.

On a terminal a line a phase, the current one with a bar, the time of a step and the time left. Elsewhere
(a log, a pipe, --json) one plain line when a phase ends.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, Task, TextColumn
from rich.text import Text

from swiftwan.errors import Cancelled, SwiftwanError

if TYPE_CHECKING:
    from swiftwan.pipelines.result import StepEvent

_AFTER = {"image": "text", "text": "denoise", "denoise": "decode", "decode": "save"}


class Display:
    """Follows a run through its phases: load, image, text, denoise, decode, save."""

    def __init__(self) -> None:
        self.phase = ""
        self.step = 0
        self.steps = 0
        self.interrupted = False
        self._first = 0
        self._began = self._first_step = time.perf_counter()

    @property
    def where(self) -> str:
        return f"{self.phase} {self.step}/{self.steps}" if self.steps > 1 else self.phase

    def begin(self, phase: str) -> None:
        """End the phase under way, if any, and begin another."""
        if self.phase:
            self.show_end(self._seconds())
        self.phase, self.step, self.steps, self._first = phase, 0, 0, 0
        self._began = time.perf_counter()
        self.show_begin()

    def on_step(self, event: StepEvent) -> None:
        """Take a step of the engine; to be given to ``Engine.run``."""
        if self.interrupted:  # a library swallowed the interrupt
            raise KeyboardInterrupt
        if event.phase != self.phase:
            self.begin(event.phase)
        self.step, self.steps = event.step, event.steps
        if self.step and not self._first:  # not always the first of all: a run that was stopped goes on
            self._first, self._first_step = self.step, time.perf_counter()
        self.show_step()
        if self.step == self.steps and self.phase in _AFTER:
            self.begin(_AFTER[self.phase])

    def end(self) -> None:
        self.show_end(self._seconds())
        self.phase = ""

    def step_seconds(self) -> float | None:
        """Mean time of a step so far, without the first, which compiles and warms up."""
        if self.step < 1 or self.steps < 2:
            return None
        if self.step == self._first:
            return self._first_step - self._began
        return (time.perf_counter() - self._first_step) / (self.step - self._first)

    def told(self) -> str:
        """Steps, time a step and time left, as far as known."""
        if (each := self.step_seconds()) is None:
            return ""
        told = f"{self.step:>{len(str(self.steps))}}/{self.steps}  {_seconds(each)}/step"
        left = (self.steps - self.step) * each
        return f"{told}  {_clock(left)} left" if left else told

    def _seconds(self) -> float:
        return time.perf_counter() - self._began

    def show_begin(self) -> None:
        """Show that a phase began."""

    def show_step(self) -> None:
        """Show the step just done."""

    def show_end(self, seconds: float) -> None:
        """Show that the phase ended."""


class PlainDisplay(Display):
    """A line a phase on stderr."""

    def show_end(self, seconds: float) -> None:
        told = f"{self.phase:<8} {_seconds(seconds)}"
        sys.stderr.write(told + (f"  {self.told()}\n" if self.steps > 1 else "\n"))
        sys.stderr.flush()


class LiveDisplay(Display):
    """Moving lines on a terminal."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress = progress
        self._task = progress.add_task("", visible=False)

    def show_begin(self) -> None:
        self._task = self._progress.add_task(self.phase, total=None, told="")

    def show_step(self) -> None:
        self._progress.update(self._task, completed=self.step, total=self.steps, told=self.told())

    def show_end(self, seconds: float) -> None:
        told = f"[bold]{_seconds(seconds)}[/]" + (f"  [dim]{self.told()}[/]" if self.steps > 1 else "")
        self._progress.update(self._task, completed=1, total=1, told=told)

    def drop(self) -> None:
        """Take away the line of a phase that will not end; the error's line says more."""
        self._progress.update(self._task, visible=False)


class _BarWhileRunning(BarColumn):
    def render(self, task: Task) -> Any:
        return Text() if task.finished else super().render(task)


@contextmanager
def shown(*, plain: bool) -> Iterator[Display]:
    """Yield the display for this stderr; with ``plain`` never a moving one."""
    console = Console(stderr=True)
    if plain or not console.is_terminal:
        yield PlainDisplay()
        return
    done = "✓" if console.encoding.startswith("utf") else "*"
    columns = (
        SpinnerColumn(finished_text=f"[green]{done}[/]"),
        TextColumn("{task.description:<8}"),
        TextColumn("{task.fields[told]}"),
        _BarWhileRunning(bar_width=28),
    )
    with Progress(*columns, console=console) as progress:
        display = LiveDisplay(progress)
        try:
            yield display
        except SwiftwanError:
            display.drop()
            raise


@contextmanager
def cancellable(display: Display) -> Iterator[None]:
    """Turn the first Ctrl-C into Cancelled, which says where the run was; a second ends the process at once.

    An interrupt that the caller told us to ignore (nohup) stays ignored.
    """

    def at_once(*_: Any) -> None:
        if sys.stderr.isatty():
            os.write(2, b"\x1b[?25h\n")  # the cursor, which the display hides
        os._exit(Cancelled.exit_code)

    def interrupt(*_: Any) -> None:
        signal.signal(signal.SIGINT, at_once)
        display.interrupted = True
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if before != signal.SIG_IGN:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        raise Cancelled(f"cancelled at {display.where}; nothing was written") from None
    finally:
        if not display.interrupted:
            signal.signal(signal.SIGINT, before)


def _seconds(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s" if seconds < 60 else _clock(seconds)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
