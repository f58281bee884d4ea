"""Tables, in the terminal and as markdown."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table as RichTable


@dataclass(frozen=True, slots=True)
class Table:
    """A table before it is rendered, and what there is to know to read it."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def markdown(self, level: str = "##") -> str:
        """The table below a heading, whose *level* is that many ``#``."""
        lines = [self.headings, ["---", *["---:"] * (len(self.headings) - 1)], *self.rows]
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        return "\n\n".join(filter(None, (f"{level} {self.title}", table, self.note)))


def show(tables: Iterable[Table], console: Console, failures: Iterable[str], skipped: Iterable[str] = ()) -> None:
    """Print tables, and what failed or was left out."""
    for table in tables:
        rich = RichTable(title=table.title, title_justify="left", caption=table.note or None)
        for number, heading in enumerate(table.headings):
            rich.add_column(heading, justify="left" if number == 0 else "right")
        for row in table.rows:
            rich.add_row(*row)
        console.print(rich)
    for text in skipped:
        console.print(f"left out: {text}", highlight=False)
    for text in failures:
        console.print(f"[red]failed:[/red] {text}", highlight=False)
