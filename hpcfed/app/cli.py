"""The command line: parse, call, print."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from hpcfed.app import compare_cli, doctor_cli, results_cli, scripts, status_cli, sweep_cli
from hpcfed.app.options import listing
from hpcfed.app.run import quiet, refuse, run_command
from hpcfed.cluster import launcher
from hpcfed.cluster.topology import launched_rank
from hpcfed.errors import UserError
from hpcfed.rounds import preflight
from hpcfed.settings import deepspeed_config
from hpcfed.settings.reading import given_once
from hpcfed.settings.resolve import describe, presets, resolve

_EPILOG = """examples:
  hpcfed run demo --ranks 4                         a first run, nothing to download
  hpcfed run demo method=lora-fedavg --ranks 4      the same setting with another method
  hpcfed run fibecfed task.name=trec --ranks 4      FibecFed on a task of the hub
  hpcfed run fedpeptao task.name=trec --ranks 4     FedPepTAO: deep prompts
  hpcfed run my.yaml local.lr=1e-3 seed=7           a configuration and two overrides
  mpirun -n 8 hpcfed run my.yaml                    inside an MPI world that you start
  srun --mpi=pmix hpcfed run my.yaml                the same under Slurm
  hpcfed options layers                             what the options of layers mean
  hpcfed config my.yaml local.lr=1e-3               what would run, and where each value is from
  hpcfed plan my.yaml --nodes 2 --gpus 4            what it would take, before it takes it
  hpcfed sweep submit my-sweep.yaml                 many runs, as jobs of Slurm or here
  hpcfed status runs/demo                           how far it is; of sweeps and comparisons too
  hpcfed scripts my-cluster                         Slurm scripts and DeepSpeed JSON to edit
  hpcfed export runs/demo                           an adapter for PEFT, with a model card
  hpcfed predict runs/demo texts.csv                labels and probabilities
  hpcfed report runs/*                              a page of curves, clients, costs
  hpcfed doctor --ranks 2                           whether this machine can
  hpcfed doctor --model my/folder                   and whether a model trains on it
"""

_PROVENANCE = """List the presets: methods, and a setting to try them in.

fibecfed: of the paper only the abstract and second-hand accounts of its equations could be had. The
paper's: difficulty by Fisher information, easy batches first with a growing share, shared layers by
their sensitivity to noise, `lossless`, sparse updates by Fisher information with momentum. Ours:
two warm-up rounds, where difficulties come from, the pace's shape, the noise's size and norm, the
shares of 0.5, momentum 0.9. fedpeptao: the published code was read; fedpeptao-published is as the
code has it, fedpeptao has another layer score and server, chosen on validation data.

"rate tuned": by a table of benchmarks/README.md, on trec and mr with MiniLM (fibecfed 4e-3,
p-tuning-v2 and fedpeptao 0.04, lora-fedavg 2e-3). All other rates are starting points, not tuned.
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of `hpcfed`."""
    parser = argparse.ArgumentParser(
        prog="hpcfed",
        description="Federated fine-tuning of large language models on HPC clusters.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"hpcfed {version('hpcfed')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser(
        "run",
        help="run a federation",
        description="Run a federation. Inside an MPI world this process takes part in it; with "
        "--ranks N it starts mpiexec on this machine; alone it is a world of one.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_source(run)
    _add_ranks(run)
    run.add_argument(
        "--resume",
        action="store_true",
        help="go on where the run in the run directory was when it ended, if there is one; a job "
        "that Slurm has requeued does so on its own",
    )
    run.add_argument(
        "--live",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="draw a live bar (default: on a terminal)",
    )
    commands.add_parser(
        "presets",
        help="list the presets",
        description=_PROVENANCE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = commands.add_parser(
        "options",
        help="explain every option",
        description="Every option with its default, what it means and what it takes; or only those "
        "with one of the words in their name, in what is said of them, or set by a preset of that "
        "name, as in `hpcfed options layers server.control fedprox`.",
    )
    option.add_argument("words", nargs="*", default=[], metavar="WORD", help="part of a text")
    config = commands.add_parser(
        "config",
        help="print the resolved configuration, and where each value comes from",
        description="Print the resolved configuration as YAML, each line with where its value "
        "comes from: a preset, a file, the command line, or the default. What `hpcfed run` would "
        "refuse without data, model and launch is refused here too. What an option means: "
        "`hpcfed options`.",
    )
    _add_source(config)
    plan = commands.add_parser(
        "plan",
        help="what a run would take: memory by ZeRO stage, bytes a round, who runs when",
        description="What a run, or each run of a sweep, would take on so many GPUs. Needs the "
        "data and the model's config.json and tokenizer, but loads no weights and no GPU.",
    )
    _add_source(plan)
    plan.add_argument("--nodes", type=int, metavar="N", help="default: 1, or the sweep's")
    plan.add_argument("--gpus", type=int, metavar="G", help="of a node; default: 1, or the sweep's")
    plan.add_argument(
        "--memory", type=float, default=80.0, metavar="GB", help="of a GPU; default: 80"
    )
    doctor_cli.add_parser(commands)
    _add_ranks(commands.choices["doctor"])
    results_cli.add_parsers(commands)
    sweep_cli.add_parser(commands)
    compare_cli.add_parser(commands)
    status_cli.add_parser(commands)
    script = commands.add_parser(
        "scripts",
        help="copy the Slurm scripts, launch files, experiments and DeepSpeed JSON",
        description="Copy slurm/, launch/ and ds_configs/ into a folder of yours, to be edited "
        "there; they work from any folder, with the python that runs this.",
    )
    script.add_argument("folder", type=Path, metavar="DIR", help="made if it is not there")
    return parser


def _add_ranks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, metavar="N", help="start N MPI ranks on this machine")
    parser.add_argument(
        "--oversubscribe",
        action="store_true",
        help=f"with --ranks: more than {launcher.RANKS_PER_CORE} ranks a core, which is refused "
        "else",
    )


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="CONFIG-or-PRESET", help="a YAML file, or a preset")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="section.key=value",
        help="values that win over the file's; `hpcfed options` explains all",
    )


def main(
    arguments: Sequence[str] | None = None,
    listen: bool = True,
    faults: list[UserError] | None = None,
) -> int:
    """Run the command line; returns the exit code: 2 for anything the user can mend.

    listen: a run stops between two rounds when a signal asks it to; False under a scheduler of
    Python functions, which has handlers of its own. faults: what the user can mend goes there, and
    is not printed.
    """
    started = time.monotonic()
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = build_parser()
    options, rest = parser.parse_known_args(words)
    no_overrides = options.command not in ("run", "config", "plan", "doctor")
    if any(word.startswith("-") or no_overrides for word in rest):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest and options.command == "doctor":
        options.words = [*options.words, *rest]
    elif rest:  # argparse stops collecting overrides at the first option
        options.overrides = [*options.overrides, *rest]
    try:
        if options.command == "doctor":
            return doctor_cli.call(options)
        if options.command == "presets":
            width = max(map(len, presets()))
            print("\n".join(f"{name:<{width}}  {text}" for name, text in presets().items()))
            return 0
        if options.command == "options":
            print("\n".join(listing(options.words)))
            return 0
        if options.command in results_cli.COMMANDS:
            return results_cli.call(options)
        if options.command == "sweep":
            return sweep_cli.call(options)
        if options.command == "status":
            return status_cli.call(options)
        if options.command == "compare":
            return compare_cli.call(options)
        if options.command == "scripts":
            print("\n".join(str(options.folder / file) for file in scripts.write(options.folder)))
            return 0
        if options.command == "plan":
            return _plan(options)
        if options.command == "config":
            given_once(options.overrides)
            resolved = resolve(options.source, options.overrides)
            preflight.check_options(resolved, resolved.config.cluster.ranks_per_client)
            deepspeed_config.load(resolved.config)
            print(describe(resolved))
            return 0
    except UserError as error:
        return refuse(error, launched_rank(), faults)  # all ranks find the same fault
    except BrokenPipeError:  # a reader, as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return run_command(options, started, listen, faults)


def _plan(options: argparse.Namespace) -> int:
    if any(given is not None and given < 1 for given in (options.nodes, options.gpus)):
        raise UserError("--nodes and --gpus must be at least 1.")
    given_once(options.overrides)
    sweep = sweep_cli.describes_sweep(options.source)
    resolved = None if sweep else resolve(options.source, options.overrides)
    quiet()
    from hpcfed.app.plan import plan

    if resolved is None:
        lines = sweep_cli.plan(options)
    else:
        lines = plan(resolved, options.nodes or 1, options.gpus or 1, options.memory)
    for line in lines:
        print(line, flush=True)
    return 0
