"""`hpcfed doctor`: the machine, and a trial step of a model on it."""

import argparse
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

from hpcfed.app.run import check_ranks, quiet
from hpcfed.cluster import launcher
from hpcfed.cluster.topology import World, connect_world
from hpcfed.errors import UserError
from hpcfed.settings.reading import given_once
from hpcfed.settings.resolve import Resolved, resolve
from hpcfed.storage.paths import home

if TYPE_CHECKING:
    from hpcfed.cluster.doctor import Finding

_EPILOG = """examples:
  hpcfed doctor --ranks 2                                       the machine
  hpcfed doctor --model my/folder                               and a model, on the built-in task
  hpcfed doctor my.yaml --ranks 4                               and what this configuration trains
  hpcfed doctor my.yaml --model gpt2 deepspeed=ds_configs/zero3.json
"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `doctor` to argparse's commands; --ranks comes with what `hpcfed run` has of it."""
    parser = commands.add_parser(
        "doctor",
        help="check what a run needs of the machine, and try a step of a model on it",
        description="Check what a run needs of the machine: packages, MPI, launchers, devices, "
        "ZeRO's operators, the run folder, a timed Allreduce. With --model or a configuration also "
        "make the trial step that a run begins with: the longest and the shortest row of its data "
        "through tokenizer, model, adapter, objective, loss and backward, at its ZeRO stage; no "
        "run directory is made or looked at. Start it as you would start a run: with srun, mpirun, "
        "or --ranks N. Exit code 1 if something has to be mended.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "words", nargs="*", default=[], metavar="CONFIG-or-PRESET section.key=value",
        help="what to try a step of; default: lora-fedavg on the built-in task, if there is "
        "--model",
    )  # fmt: skip
    parser.add_argument("--model", metavar="NAME", help="try a step of this model: model.name")
    parser.add_argument("--folder", default="runs", help="where runs will lie; default: runs")


def call(options: argparse.Namespace) -> int:
    """On this rank, or on ranks of its own; exit code 1 if something is to be mended. Raises
    UserError for words that cannot be meant."""
    resolved = _resolved(options)
    if options.ranks is not None:
        check_ranks(options)
        model = [] if options.model is None else [f"--model={options.model}"]
        words = ["doctor", f"--folder={options.folder}", *model, *options.words]
        return launcher.start(options.ranks, words)
    quiet()
    from hpcfed.cluster.doctor import examine

    world = connect_world()

    def findings() -> "Iterator[Finding]":
        yield from examine(world, home(options.folder))
        if resolved is not None:
            yield from _trial(resolved, world)

    bad = False
    for finding in findings():
        bad = bad or bool(finding.mend)
        if world.rank == 0:
            print(finding.line(), flush=True)
    world.comm.Barrier()
    return 1 if bad else 0


def _resolved(options: argparse.Namespace) -> Resolved | None:
    """The configuration to try a step of, if any."""
    overrides = [word for word in options.words if "=" in word]
    sources = [word for word in options.words if "=" not in word]
    if len(sources) > 1:
        raise UserError(
            f"{sources[0]!r} and {sources[1]!r} are two configurations; give one, and values as "
            "section.key=value."
        )
    if options.model is not None:
        overrides.append(f"model.name={options.model}")
    if not sources and not overrides:
        return None
    given_once(overrides)
    return resolve(sources[0] if sources else "lora-fedavg", overrides)


def _trial(resolved: Resolved, world: World) -> "Iterator[Finding]":
    """The step, and each thing to know of the model."""
    from hpcfed.cluster.doctor import Finding
    from hpcfed.rounds import preflight
    from hpcfed.rounds.setup import try_out

    try:
        with world.agreement("checking the configuration"):
            checked = preflight.check(resolved, world.size, writes=False)
        answer, notes = try_out(checked, world)
    except UserError as error:  # raised on all ranks alike
        yield Finding("trial step", "fails", str(error))
        return
    except Exception:
        if world.size > 1:  # or the others would wait for ever
            logging.getLogger("hpcfed").exception("rank %d failed:", world.rank)
            world.comm.Abort(1)
        raise
    finally:
        world.watch.stop()
    yield Finding("trial step", answer)
    for note in notes:
        yield Finding("model", note, note=True)
