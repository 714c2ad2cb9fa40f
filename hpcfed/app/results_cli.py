"""`hpcfed report`, `hpcfed export` and `hpcfed predict`: what is done with a run's results."""

import argparse
from pathlib import Path
from typing import Any

from hpcfed.errors import UserError

COMMANDS = ("export", "predict", "report")

_EXPORT = """examples:
  hpcfed export runs/demo                        the shared adapter after the last round
  hpcfed export runs/demo --client 3             client 3's own: shared and personal values
  hpcfed export runs/demo --best --merge         merged into its model, as of the best round
"""


def add_parsers(commands: Any) -> None:
    """Add them to argparse's commands."""
    report = commands.add_parser(
        "report",
        help="a page that shows runs, figures for a paper, data as CSV",
        description="One HTML page that works offline, of runs, finished or not: scores over "
        "rounds, seconds, samples and bytes, layers, curriculum, clients, time, failures. Runs "
        "that differ only in the seed are one curve. Needs matplotlib.",
    )
    report.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="a run directory, or a folder of them"
    )
    report.add_argument(
        "--to", type=Path, default=Path("report.html"), metavar="FILE", help="default: report.html"
    )
    report.add_argument("--figures", type=Path, metavar="FOLDER", help="figures and CSV, too")
    report.add_argument("--format", choices=("png", "pdf", "svg"), default="png")
    report.add_argument(
        "--width", choices=("column", "page"), default="page", help="of a paper in two columns"
    )
    export = commands.add_parser(
        "export",
        help="a run's adapter, or the model with it, for PEFT and transformers",
        description="Write a run's adapter as a folder that PEFT loads, or merged as one that "
        "transformers loads, with tokenizer and model card. The run stays as it is.",
        epilog=_EXPORT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    export.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    export.add_argument(
        "--merge", action="store_true", help="LoRA: into the model's weights, in its type"
    )
    export.add_argument(
        "--to", type=Path, metavar="FOLDER", help="default: exported/RUN, and what was chosen"
    )
    predict = commands.add_parser(
        "predict",
        help="labels and probabilities of texts",
        description="Labels and probabilities of the texts in a file: .csv or .jsonl with the "
        "columns that the run had (text, text_pair), or .txt with a text in each line.",
    )
    predict.add_argument(
        "folder", type=Path, metavar="FOLDER", help="of hpcfed export, or a run directory"
    )
    predict.add_argument("texts", type=Path, metavar="TEXTS")
    predict.add_argument(
        "--to", type=Path, metavar="FILE", help=".csv or .jsonl; default: CSV on standard output"
    )
    predict.add_argument("--batch", type=int, default=32, metavar="N", help="texts a forward")
    for parser in (export, predict):
        parser.add_argument(
            "--client", metavar="K", help="the model of this client, by number or name"
        )
        parser.add_argument(
            "--best", action="store_true", help="of the round that was best by validation"
        )


def call(options: argparse.Namespace) -> int:
    """Do what was asked. Raises UserError for what cannot be."""
    from hpcfed.app.run import quiet

    quiet()
    if options.command == "report":
        from hpcfed.app.report import report

        shown = report(options.runs, options.to, options.figures, options.format, options.width)
        print(f"{options.to} shows {shown} run{'s'[: shown > 1]}")
        return 0
    if options.command == "export":
        from hpcfed.app.export import export

        name = options.run.resolve().name
        name += f"-client-{options.client}" if options.client is not None else ""
        name += "-best" * options.best + "-merged" * options.merge
        to = options.to or Path("exported") / name
        what = export(options.run, to, options.client, options.best, options.merge)
        print(f"{to} holds {what}")
        return 0
    from hpcfed.app.predict import predict

    if options.batch < 1:
        raise UserError(f"--batch is {options.batch}; it must be at least 1.")
    number = predict(
        options.folder, options.texts, options.to, options.client, options.best, options.batch
    )
    if options.to is not None:
        print(f"{options.to} holds {number} predictions")
    return 0
