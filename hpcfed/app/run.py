"""`hpcfed run`: this process as one rank of a world, or as the one that starts mpiexec."""

import argparse
import contextlib
import gc
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

from hpcfed.cluster import launcher, rejoin
from hpcfed.cluster.stop import INTERRUPTED, Stop
from hpcfed.cluster.topology import connect_world, deepspeed_process, launched_rank, restarted
from hpcfed.errors import DiskError, RunError, UserError, reason
from hpcfed.rounds import preflight
from hpcfed.settings.reading import given_once
from hpcfed.settings.resolve import Resolved, resolve

if TYPE_CHECKING:
    from hpcfed.rounds.setup import Setup


def run_command(
    options: argparse.Namespace,
    started: float | None = None,
    listen: bool = True,
    faults: list[UserError] | None = None,
) -> int:
    """Run a federation as the command line says; returns the exit code, see `hpcfed.app.cli.main`.

    options: source, overrides, ranks, oversubscribe, resume, live. started: when this process did,
    by time.monotonic().
    """
    started = time.monotonic() if started is None else started
    try:
        given_once(options.overrides)
        resolved = resolve(options.source, options.overrides)
        on_terminal = sys.stdout.isatty() and sys.stderr.isatty()
        live = on_terminal if options.live is None else options.live
        if options.ranks is not None:
            return _start(resolved, options, live)
    except UserError as error:
        return refuse(error, launched_rank(), faults)  # all ranks find the same fault
    process = deepspeed_process()
    if process is None:
        return _take_part(resolved, options, live, started, listen, faults)
    quiet()
    try:
        return rejoin.take_part(process, resolved.config.cluster, _words(options, live))
    except UserError as error:  # each process has seen something else
        return refuse(error, 0, faults)


def refuse(error: UserError, rank: int, faults: list[UserError] | None) -> int:
    """Exit code 2; the first rank says why, unless the caller does."""
    if faults is not None:
        faults.append(error)
    elif rank == 0:
        print("hpcfed:", " ".join(str(error).split("\n")), file=sys.stderr, flush=True)
    return 2


def check_ranks(options: argparse.Namespace) -> None:
    """Raises UserError for a number of ranks that cannot be meant."""
    if options.ranks < 1:
        raise UserError(f"--ranks is {options.ranks}; it must be at least 1.")
    if not options.oversubscribe:
        launcher.check_number(options.ranks)


def _start(resolved: Resolved, options: argparse.Namespace, live: bool) -> int:
    """Check what can be checked without MPI, then start the ranks."""
    check_ranks(options)
    resume = options.resume or restarted()
    if not (resume and preflight.is_complete(resolved.config)):
        preflight.check(resolved, options.ranks, resume)
    grace = resolved.config.cluster.grace_seconds
    code = launcher.start(options.ranks, _words(options, live), grace)
    last_words = launcher.farewell(code)
    if last_words:
        print(f"hpcfed: {last_words}.", file=sys.stderr, flush=True)
    return code


def _words(options: argparse.Namespace, live: bool) -> list[str]:
    """The command line of each rank."""
    words = ["run", options.source, *options.overrides, "--live" if live else "--no-live"]
    return [*words, "--resume"] if options.resume else words


def _take_part(
    resolved: Resolved,
    options: argparse.Namespace,
    live: bool,
    started: float,
    listen: bool,
    faults: list[UserError] | None,
) -> int:
    """This process as one rank of the MPI world."""
    stop = Stop(resolved.config.cluster.grace_seconds)
    if listen:
        stop.listen()
    quiet()
    try:
        world = connect_world()
    except UserError as error:
        return refuse(error, 0, faults)
    setup: Setup | None = None
    try:
        resume = options.resume or restarted()
        with world.agreement("looking for the run directory"):
            complete = resume and preflight.is_complete(resolved.config)
        if complete:
            if world.rank == 0:
                print(f"the run in {preflight.output_folder(resolved.config)}/ is complete")
            return 0
        with world.agreement("checking the configuration"):
            checked = preflight.check(resolved, world.size, resume)
        with _lasting():
            import peft  # with most of transformers  # noqa: F401

            from hpcfed.rounds.federation import Federation
            from hpcfed.rounds.progress import Progress
            from hpcfed.rounds.setup import set_up

        setup = set_up(checked, world, started, stop=stop)
        before = setup.state.rounds
        summary = Federation(setup).run(Progress(speaks=world.rank == 0, live=live))
        if summary is None:
            world.comm.Barrier()
            # A scheduler that starts it again and again must see whether it gets anywhere.
            return INTERRUPTED if setup.state.rounds > before else 1
        if world.rank == 0:
            print(f"everything lies in {checked.output}/")
    except DiskError as error:  # of this rank alone
        refuse(error.then("and go on with --resume: what is committed is whole"), 0, faults)
        if world.size > 1:
            world.comm.Abort(2)
        _close(setup)
        return 2
    except UserError as error:  # raised on all ranks alike
        refuse(error, world.rank, faults)
        world.comm.Barrier()
        return 2
    except RunError as error:  # raised on all ranks alike
        _close(setup)
        if world.rank == 0:
            print(f"hpcfed: {error}", file=sys.stderr, flush=True)
        world.comm.Barrier()
        return 1
    except BaseException as error:
        # A rank that dies alone would leave the others waiting in a collective for ever.
        if world.size > 1:
            if not isinstance(error, KeyboardInterrupt):
                logging.getLogger("hpcfed").exception("rank %d failed:", world.rank)
            print(
                f"hpcfed: rank {world.rank} failed {world.watch.what} ({reason(error)}), and the "
                "job ends; what is committed is kept: go on with --resume.",
                file=sys.stderr,
                flush=True,
            )
            world.comm.Abort(1)
        _close(setup)  # the process may live on, and resume the run
        if isinstance(error, KeyboardInterrupt) and listen:
            print("hpcfed: interrupted; go on with --resume.", file=sys.stderr, flush=True)
            return INTERRUPTED
        raise
    finally:
        world.watch.stop()
    return 0


def _close(setup: "Setup | None") -> None:
    """Give back what a run that ended early holds."""
    if setup is not None:
        setup.directory.close()
        setup.engine.close()


@contextlib.contextmanager
def _lasting() -> Iterator[None]:
    """What is imported here stays: the garbage collector neither looks for garbage in it meanwhile,
    which takes a seventh of the time, nor ever again."""
    if "torch" in sys.modules:  # a second run of this process, or a program of its own
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


def quiet() -> None:
    """Third-party chatter off, unless the user asked for it."""
    # Deprecations between transformers, PEFT, DeepSpeed and torch; not ours, and not the user's.
    for module in ("transformers", "torch.distributed"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its sockets look up names in vain
