"""Two methods in one setting: their rounds as a table, and their curves.

    python examples/compare_methods.py
    python examples/compare_methods.py --methods fibecfed,mine.yaml --ranks 4 federation.rounds=12

The built-in questions and the packaged MiniLM; nothing is downloaded. The first line takes 2 to 3
minutes on 2 cores. What stands at the end overrides SETTING. A run that is complete is only read,
so this may be called again.
"""

import argparse
import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

import hpcfed
from hpcfed.app.report import report

SETTING = [
    "task.max_length=48", "federation.clients=12", "federation.per_round=4", "federation.rounds=6",
    "local.epochs=1", "evaluation.every=2", "cluster.threads=1",
]  # fmt: skip
SOURCE = "lora-fedavg"  # whatever preset: its method is replaced
DIGITS = {"loss": ".4f", "validation": ".4f", "MB up": ".2f", "seconds": ".1f"}
Row = dict[str, str | int | float | None]


def main(words: Sequence[str] | None = None) -> None:
    """Run what is not complete; print, save and draw the rounds."""
    options = parse(words)
    results = {}
    given = dict(word.split("=", 1) for word in [*SETTING, *options.overrides])
    setting = [f"{key}={value}" for key, value in given.items()]  # no key twice
    for method in options.methods.split(","):
        output = options.folder / Path(method).stem
        own = [*setting, f"method={method}", f"output={output}"]
        results[method] = hpcfed.run(SOURCE, own, ranks=options.ranks or None, resume=True)
    rows = [row for method, result in results.items() for row in rounds(method, result)]
    show(rows)
    for method, result in results.items():
        print(f"{method}: test score {result.summary['score']['personal']:.4f}")
    save(rows, options.folder / "rounds.csv")
    page = options.folder / "report.html"
    try:
        report([result.path for result in results.values()], page)
        print(f"the curves are in {page}")
    except hpcfed.UserError as error:  # without matplotlib: pip install 'hpcfed[plot]'
        print(error)


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Two methods, or more, in one setting.")
    parser.add_argument("--methods", default="lora-fedavg,fedsa-lora", help="presets, or your own")
    parser.add_argument("--ranks", type=int, default=2, help="0: all in this process")
    parser.add_argument("--folder", type=Path, default=Path("runs/compare"))
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_args(words)


def rounds(method: str, result: hpcfed.Result) -> Iterator[Row]:
    """A row for each round; rounds without a validation have no score."""
    uploads = 0.0
    for line in result.metrics:
        uploads += line["bytes"]["up"] / 1e6
        yield {
            "method": method,
            "round": line["round"],
            "loss": line["train_loss"],
            "validation": line["validation"]["personal"]["score"] if "validation" in line else None,
            "MB up": uploads,
            "seconds": sum(line["seconds"].values()),
        }


def show(rows: list[Row]) -> None:
    """Print a table."""
    cells = [list(rows[0]), *([_cell(*pair) for pair in row.items()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        print("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)))


def _cell(column: str, value: str | int | float | None) -> str:
    return "" if value is None else f"{value:{DIGITS.get(column, '')}}"


def save(rows: list[Row], file: Path) -> None:
    """The same as CSV, for pandas.read_csv or whatever reads tables."""
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
