"""Progress on stderr: a bar on a terminal, a line elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

OnProgress = Callable[[int, int], None]


@contextlib.contextmanager
def loading_progress(name: str, *, is_shown: bool) -> Iterator[OnProgress | None]:
    """Gives a callback ``(done, total)`` for the tensors read, or None where nothing is to be shown."""
    if not is_shown:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    start = time.perf_counter()
    if console.is_terminal:
        columns = TextColumn("loading {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task(name, total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)
    else:
        yield lambda done, total: None
    console.print(f"loaded {name} in {time.perf_counter() - start:.1f} s", highlight=False)
