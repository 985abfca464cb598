"""Tables and labelled lines that fit the terminal: a table that is too wide moves columns below
their rows, and no cell is cut or wrapped to a word a line.

The width is the terminal's (or `COLUMNS`), and 80 where output goes to a file or a pipe.
"""

import shutil
import textwrap
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

_GAP = "  "
_BELOW = 4
"""Indent of what stands below a row."""

_LEAST = 40
"""Columns that a table takes however narrow the terminal is: names have to fit."""


def terminal_width() -> int:
    """Columns to print in."""
    return max(_LEAST, shutil.get_terminal_size((80, 24)).columns)


def entry(label: str, text: str, indent: int = 10, width: int | None = None) -> str:
    """`label` and, beside it, `text` on lines that begin at `indent`; paths and commands stay
    whole.
    """
    return textwrap.fill(
        text,
        width or terminal_width(),
        initial_indent=label.ljust(indent),
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def packed(parts: Iterable[str], indent: int = 10, width: int | None = None) -> str:
    """Parts, none of which is broken, on as few lines as they need; further ones begin at
    `indent`.
    """
    width, lines = width or terminal_width(), []
    for part in parts:
        if lines and len(lines[-1]) + len(_GAP) + len(part) <= width:
            lines[-1] += _GAP + part
        else:
            lines.append(" " * indent + part if lines else part)
    return "\n".join(lines)


def print_table(
    heads: Sequence[str],
    rows: Iterable[Sequence["str | Text"]],
    *,
    left: Collection[str] = (),
    title: str = "",
) -> None:
    """Print rows below heads; all columns are numbers, set to the right, but the first one and
    those in `left`. A row with a cell more than there are heads has that one, a remark, below it.

    Cells may be rich's `Text` with a style.
    """
    # rich takes a while to load, and most commands print no table
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    if title:
        console.print(title, markup=False)
    for line in table_lines(heads, rows, left=left):
        console.print(line)


def table_lines(
    heads: Sequence[str],
    rows: Iterable[Sequence["str | Text"]],
    *,
    left: Collection[str] = (),
    width: int | None = None,
) -> list["Text"]:
    """The lines of `print_table`, for `width` columns (default: the terminal's)."""
    from rich.text import Text

    width = width or terminal_width()
    cells = [[Text(cell) if isinstance(cell, str) else cell for cell in row] for row in rows]
    sides = ["left" if not column or head in left else "right" for column, head in enumerate(heads)]
    # what the cells of each column need, whatever its head takes
    needs = [
        max((row[column].cell_len for row in cells), default=0) for column in range(len(heads))
    ]
    stacked, inline = _fit(heads, needs, sides, width)
    sizes = {
        column: max(needs[column], *(len(line) for line in stacked[column])) for column in inline
    }
    deep = max(len(stacked[column]) for column in inline)
    lines = []
    for level in range(deep):
        parts = []
        for column in inline:
            words = [""] * (deep - len(stacked[column])) + stacked[column]
            parts.append(_aligned(Text(words[level], "bold"), sides[column], sizes[column]))
        lines.append(_joined(parts))
    for row in cells:
        parts = [_aligned(row[column], sides[column], sizes[column]) for column in inline]
        lines.append(_joined(parts))
        below = [
            Text(" ".join(heads[column].split()) + ": ").append_text(row[column])
            for column in range(len(heads))
            if column not in inline and row[column]
        ]
        lines += _below(filter(None, [*below, *row[len(heads) :]]), width)
    return lines


def _fit(
    heads: Sequence[str], needs: Sequence[int], sides: Sequence[str], width: int
) -> tuple[list[list[str]], list[int]]:
    """Each head's lines, as few as it takes, and the columns that stand beside one another: all of
    them if they fit; else first the widest text goes below, then numbers from the last.
    """
    inline = list(range(len(heads)))
    most = max(len(head.split()) for head in heads)
    while True:
        for depth in range(1, most + 1):
            lines = [_stacked(head, depth) for head in heads]
            total = sum(max(needs[c], *(len(line) for line in lines[c])) for c in inline)
            if total + len(_GAP) * (len(inline) - 1) <= width or len(inline) == 1:
                return lines, inline
        text = [column for column in inline[1:] if sides[column] == "left"]
        inline.remove(max(text, key=needs.__getitem__) if text else inline[-1])


def _stacked(head: str, depth: int) -> list[str]:
    """A head on at most `depth` lines, as narrow as it gets; one with lines of its own on those at
    least.
    """
    lines = head.split("\n")
    for size in range(1, max(map(len, lines))):
        wrapped = textwrap.wrap(head, size, break_long_words=False, break_on_hyphens=False)
        if len(wrapped) <= max(depth, len(lines)) and max(map(len, wrapped)) <= size:
            return wrapped
    return lines


def _aligned(cell: "Text", side: str, size: int) -> "Text":
    cell = cell.copy()
    (cell.pad_right if side == "left" else cell.pad_left)(size - cell.cell_len)
    return cell


def _joined(parts: Sequence["Text"]) -> "Text":
    from rich.text import Text

    line = Text(_GAP).join(parts)
    line.rstrip()
    return line


def _below(parts: Iterable["Text"], width: int) -> list["Text"]:
    """Parts below a row, several a line where they fit."""
    from rich.text import Text

    lines: list[Text] = []
    for part in parts:
        if lines and lines[-1].cell_len + len(_GAP) + part.cell_len <= width:
            lines[-1].append(_GAP).append_text(part)
        elif part.cell_len + _BELOW <= width:
            lines.append(Text(" " * _BELOW).append_text(part))
        else:
            style = part.style or (part.spans[-1].style if part.spans else "")
            wrapped = entry("", part.plain, _BELOW, width).splitlines()
            lines += [Text(line, style) for line in wrapped]
    return lines
