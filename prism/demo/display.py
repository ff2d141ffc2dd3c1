"""Shows how memory moves: a live picture on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import NamedTuple, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from prism.demo.samples import ModelSample, Sample

LINE_SECONDS = 1.0


class Cell(NamedTuple):
    """How a slab of one use looks."""

    letter: str
    style: str
    meaning: str


WEIGHTS = Cell("W", "bold white on blue", "weights")
USED = Cell("u", "black on green", "KV in use")
CACHED = Cell("c", "black on yellow", "KV cached")
EMPTY = Cell("-", "black on bright_black", "KV, empty")
FREE = Cell(".", "bright_black", "free")


class Progress(NamedTuple):
    """What the users do at the moment."""

    title: str
    seconds: float
    num_open: int
    num_answers: int
    num_wrong: int


class Display(Protocol):
    """Where samples are shown while the block runs."""

    def show(self, sample: Sample, progress: Progress) -> None:
        """Show the present state."""

    def __enter__(self) -> Display: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def cells(model: ModelSample) -> list[Cell]:
    """A model's slabs, one cell each. A slab that is partly used counts as used, then as cached."""
    used = min(model.kv, _up(model.kv_used))
    cached = min(model.kv - used, _up(model.kv_cached))
    empty = model.kv - used - cached
    return [WEIGHTS] * model.weights + [USED] * used + [CACHED] * cached + [EMPTY] * empty


def _up(number: float) -> int:
    return -int(-number // 1)


def open_display(console: Console) -> Display:
    """The display that fits where the output goes."""
    return LiveDisplay(console) if console.is_terminal else LineDisplay(console)


class LineDisplay:
    """A line whenever memory has moved, once a second at most."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown: str | None = None
        self._title: str | None = None
        self._due = 0.0

    def __enter__(self) -> LineDisplay:
        legend = ", ".join(f"{cell.letter} {cell.meaning}" for cell in (WEIGHTS, USED, CACHED, EMPTY, FREE))
        self._console.print(f"One letter is one slab: {legend}.", soft_wrap=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def show(self, sample: Sample, progress: Progress) -> None:
        """Print a line if there is news."""
        if progress.title != self._title:
            self._title = progress.title
            self._print(progress.title)
        line = memory_line(sample)
        now = time.monotonic()
        if line == self._shown or now < self._due:
            return
        self._shown, self._due = line, now + LINE_SECONDS
        self._print(f"{progress.seconds:5.1f} s  {line}")

    def _print(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def memory_line(sample: Sample) -> str:
    """All slabs of the device in one line."""
    width = sample.num_slabs
    parts = [
        f"{m.name} {''.join(cell.letter for cell in cells(m)) or m.state:<{width}}" for m in sample.models
    ]
    return "  ".join([*parts, f"free {FREE.letter * sample.num_free}".rstrip()])


class LiveDisplay:
    """One line a model, redrawn in place; above it, how memory lay at the end of each phase."""

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, auto_refresh=False)
        self._title = ""
        self._last: Sample | None = None

    def __enter__(self) -> LiveDisplay:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, trace)

    def show(self, sample: Sample, progress: Progress) -> None:
        """Redraw."""
        if progress.title != self._title and self._last is not None:
            line = f"{memory_line(self._last)}  <- {self._title}"
            self._live.console.print(line, highlight=False, markup=False, soft_wrap=True)
        self._title, self._last = progress.title, sample
        self._live.update(picture(sample, progress), refresh=True)


def picture(sample: Sample, progress: Progress) -> Group:
    """The device with its models, and what goes on."""
    width = max(len(model.name) for model in sample.models)
    lines = [Text(f"{progress.seconds:5.1f} s  {progress.title}", style="bold")]
    lines += [_model_line(model, width) for model in sample.models]
    lines.append(_line("free", width, "", [FREE] * sample.num_free, ""))
    lines.append(_legend())
    wrong = f", {progress.num_wrong} of them wrong" if progress.num_wrong else ", all right"
    lines.append(Text(f"{progress.num_open} chats run; {progress.num_answers} answers{wrong}"))
    return Group(*lines)


def _model_line(model: ModelSample, width: int) -> Text:
    requests = f"requests: {model.num_requests}" if model.num_requests else ""
    return _line(model.name, width, model.state, cells(model), requests)


def _line(name: str, width: int, state: str, slabs: list[Cell], note: str) -> Text:
    line = Text(f"{name:<{width}}  {state:<8} ", no_wrap=True, overflow="crop")
    for cell in slabs:
        line.append(f"{cell.letter} ", style=cell.style)
    return line.append(f"  {note}")


def _legend() -> Text:
    legend = Text("one cell is one slab: ")
    for cell in (WEIGHTS, USED, CACHED, EMPTY, FREE):
        legend.append(f"{cell.letter} ", style=cell.style).append(f" {cell.meaning}  ")
    return legend
