"""What a run says: the screen, log.txt, metrics.jsonl and, when asked for, the boards of `boards.py`."""

import json
import math
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vavae_fast.artifacts import make_folder, write_text
from vavae_fast.errors import printable
from vavae_fast.training.boards import Board, open_boards

_SPARED_FIRST = ("lr", "mcos", "mdms", "mse", "rec", "valid_psnr", "valid_mse", "data")  # on a narrow terminal
QUIET_SECONDS = 10.0  # on a screen that is no terminal, at most one progress line in this time
WAITING_BYTES = 1 << 24  # of lines that a full disk keeps waiting


class RunLog:
    """Writes for one process; every other process of the run holds one with `folder=None`, which is silent."""

    def __init__(self, folder: Path | None, title: str, boards: tuple[str, ...] = (), config: dict[str, Any] | None = None):
        """`config`: nested keys and values, for the boards that show them."""
        self.folder, self.title = folder, title
        self.terminal = sys.stdout.isatty()
        self.last_line, self.open_line = -math.inf, False
        self.boards: list[Board] = []
        if folder is not None:
            make_folder(folder)
            self.metrics, self.text = _Lines(folder / "metrics.jsonl"), _Lines(folder / "log.txt")
            self.boards = open_boards(boards, folder, title, config or {})

    def forget_after(self, step: int) -> None:
        """Drop logged values of steps beyond `step`: a run that was cut off there logs them again."""
        if self.folder is not None:
            self.metrics.close()
            _forget_after(self.folder / "metrics.jsonl", step)
            self.metrics = _Lines(self.folder / "metrics.jsonl")
        for board in self.boards:
            board.forget_after(step)

    def say(self, line: str) -> None:
        """One line, to the screen and log.txt."""
        if self.folder is None:
            return
        self._end_line()
        line = printable(line)
        _show(f"{self.title}  {line}\n")
        self.text.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line}")

    @contextmanager
    def sparing(self, what: str) -> Iterator[None]:
        """What the disk refuses inside is said: a run does not stop for the lack of `what`, which only shows how it goes."""
        try:
            yield
        except OSError as error:
            self.say(f"{what} not written: {error}")

    def step(self, values: dict[str, float | str], max_steps: int, seconds_left: float) -> None:
        """One logged step: `values` hold `step`, `loss`, `lr`, `images_per_second`, `data_wait` and whatever else."""
        if self.folder is None:
            return
        self.values(values)
        line = progress_line(values, max_steps, seconds_left)
        self.text.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line}")
        now = time.monotonic()
        if self.terminal:
            width = shutil.get_terminal_size().columns - 1  # a line that wraps could not be overwritten
            short = f"{self.title}  {progress_line(values, max_steps, seconds_left, width - len(self.title) - 2)}"
            _show(f"\r\033[K{short[:width]}")
            self.open_line = True
        elif now - self.last_line >= QUIET_SECONDS or values["step"] >= max_steps:
            _show(f"{self.title}  {line}\n")
            self.last_line = now

    def values(self, values: dict[str, float | str]) -> None:
        """`values`, `step` among them, to metrics.jsonl, and the numbers to the boards; nothing on the screen."""
        if self.folder is None:
            return
        finite = {k: (v if isinstance(v, str) or math.isfinite(v) else None) for k, v in values.items()}
        self.metrics.write(json.dumps(finite))
        for board in self.boards:
            board.scalars(int(values["step"]), {key: value for key, value in values.items() if key != "step" and not isinstance(value, str)})

    def image(self, step: int, path: Path) -> None:
        """A picture in a folder of the run folder, whose name it has on the boards."""
        for board in self.boards:
            board.image(step, path)

    def close(self) -> None:
        if self.folder is None:
            return
        self._end_line()
        self.metrics.close()
        self.text.close()
        for board in self.boards:
            board.close()

    def _end_line(self) -> None:
        if self.open_line:
            _show("\n")
            self.open_line = False


def _show(text: str) -> None:
    """On the screen; where that is a file on a full disk, without it."""
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        raise
    except OSError:
        pass  # it stays in the stream's buffer, and comes with a later line


class _Lines:
    """Lines appended to a file, each at once. Those that the disk refuses wait for room, and the run does not wait for them."""

    def __init__(self, path: Path):
        self.file, self.waiting = open(path, "ab", buffering=0), b""

    def write(self, line: str) -> None:
        if len(self.waiting) < WAITING_BYTES:
            self.waiting += line.encode() + b"\n"
        try:
            while self.waiting:
                self.waiting = self.waiting[self.file.write(self.waiting) :]
        except OSError:
            pass  # tried again with the next line; the checkpoint that finds no room either is what is said

    def close(self) -> None:
        self.file.close()


def progress_line(values: dict[str, float | str], max_steps: int, seconds_left: float, width: int | None = None) -> str:
    """`step 200/80000  loss 0.742  lr 2e-4  412 img/s  MFU 41%  data 0%  ETA 6 h 53 m`; MFU where the device's peak is known.

    Of a line longer than `width` the parts of `_SPARED_FIRST` are left out, as many as it takes.
    """
    parts = {"step": f"step {values['step']:.0f}/{max_steps}"} | ({"stage": str(values["stage"])} if "stage" in values else {})
    parts |= {key: f"{key} {values[key]:.4g}" for key in ("loss", "mse", "valid_mse", "rec", "valid_psnr", "mcos", "mdms") if key in values}
    parts |= {"lr": f"lr {values['lr']:.2g}", "rate": f"{values['images_per_second']:.0f} img/s"}
    if "mfu" in values:
        parts["mfu"] = f"MFU {100 * values['mfu']:.0f}%"
    parts["data"] = f"data {100 * values['data_wait']:.0f}%"
    if values.get("skipped"):
        parts["skipped"] = f"skipped {values['skipped']:.0f}"
    parts["eta"] = f"ETA {readable_time(seconds_left)}"
    for key in _SPARED_FIRST:
        if width is not None and len("  ".join(parts.values())) > width:
            parts.pop(key, None)
    return "  ".join(parts.values())


def readable_time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} m" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} m"


def _forget_after(path: Path, step: int) -> None:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if _logged_step(line) <= step]
    write_text(path, "".join(line + "\n" for line in lines))


def _logged_step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf  # a line that a kill cut short

