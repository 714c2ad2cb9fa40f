"""A comparison: which runs it needs, which of them are finished, and what is started next.

Tuning runs come first; the values that are best on validation data are those of the final runs,
which alone look at the test split. A finished run is kept as a cell (cells.py) and not run again.
"""

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import mean
from typing import Any

from hpcfed.app.cells import Cell, Settings, Store, identity, of_run, settings_of
from hpcfed.app.compare_file import Description, Method, Options, Setting, tries
from hpcfed.app.jobs import Jobs, Status
from hpcfed.data import partition, sources
from hpcfed.errors import UserError
from hpcfed.rounds.preflight import check_options, check_threads
from hpcfed.settings import deepspeed_config
from hpcfed.settings.config import Config
from hpcfed.settings.resolve import Resolved, as_text, resolve
from hpcfed.storage.checks import DamageError
from hpcfed.storage.files import writing

POLL_SECONDS = 1.0
RUNS = "runs"


@dataclass(frozen=True)
class Wanted:
    """A run that the comparison needs. tuned: the values of what is tuned; final: it looks at the
    test split."""

    method: str
    setting: Setting
    seed: int
    tuned: Options
    final: bool
    words: tuple[str, ...]  # after `hpcfed run`
    resolved: Resolved
    settings: Settings
    identity: str  # of its cell

    @property
    def config(self) -> Config:
        """Its configuration."""
        return self.resolved.config

    @property
    def name(self) -> str:
        """Of its folder."""
        parts = [self.method, self.setting.label, str(self.seed)]
        readable = re.sub(r"[^\w.=+]+", "-", "-".join(p for p in parts if p)).strip("-")
        return f"{readable[:80]}-{self.identity[:8]}"

    @property
    def label(self) -> str:
        """How a person calls it."""
        tuned = ", ".join(f"{k.rpartition('.')[2]} {as_text(v)}" for k, v in self.tuned.items())
        parts = [self.method, self.setting.label, f"seed {self.seed}"]
        return ", ".join(p for p in parts if p) + (f" (tries {tuned})" if not self.final else "")


@dataclass(frozen=True)
class Progress:
    """How far it is. left: seconds, if anything is known of that."""

    done: int
    running: int
    waiting: int
    failed: int
    left: float | None


class Comparison:
    """A description, its cells and its jobs."""

    def __init__(self, spec: Description, at_once: int = 1) -> None:
        """at_once: runs side by side, on this machine. Raises UserError for whatever a run would be
        refused for before it reads data."""
        self.spec, self._at_once = spec, at_once
        self.store = Store(spec.cells)
        self._wanted: dict[Any, Wanted] = {}
        self.jobs = Jobs(spec.folder / RUNS, spec.executor, spec.cluster, {}, takes_turns=False)
        for wanted in self._every():
            try:
                self._check(wanted)
            except UserError as error:
                raise UserError(f"{spec.name}, {wanted.label}: {error}") from None

    # What is wanted.

    def final(self, method: Method, setting: Setting, seed: int) -> Wanted | None:
        """The run of the table; None as long as it is not known with which values."""
        chosen = self.chosen(method, setting)
        return None if chosen is None else self._want(method, setting, seed, chosen, True)

    def finals(self) -> Iterator[Wanted | None]:
        """All of the table, methods side by side."""
        for setting in self.spec.settings:
            for seed in self.spec.seeds:
                for method in self.spec.methods:
                    yield self.final(method, setting, seed)

    def tuning(self) -> Iterator[Wanted]:
        """The runs that choose."""
        for method in self.spec.methods:
            for place in self._places():
                for options in self._tries(method):
                    yield from self._tried(method, place, options)

    def chosen(self, method: Method, setting: Setting) -> Options | None:
        """What is best on validation data, of what is tuned; nothing without `tune`; None as long
        as it is not known. The mean over the second half of the validations, since a single one
        jumps, and over the tasks that one choice is made on; of equals the first."""
        if self.spec.tune is None:
            return {}
        if isinstance(method.tune, str):
            method = self.spec.method(method.tune)
        best: tuple[float, Options] | None = None
        for options in self._tries(method):
            cells = [self.cell(own) for own in self._tried(method, self._place(setting), options)]
            if any(cell is None for cell in cells):
                return None
            score = mean(late(cell) for cell in cells if cell is not None)
            if best is None or score > best[0]:
                best = score, options
        assert best is not None
        return best[1]

    def _tries(self, method: Method) -> list[Options]:
        """What is tried for a method that is tuned itself; nothing for others."""
        if self.spec.tune is None or isinstance(method.tune, str):
            return []
        return tries(self.spec.values(method))

    def _places(self) -> list[tuple[Setting, ...]]:
        """Where one choice is made: the settings whose validation it is the best on."""
        return list(dict.fromkeys(self._place(setting) for setting in self.spec.settings))

    def _place(self, setting: Setting) -> tuple[Setting, ...]:
        """The settings on which a setting's values are chosen: of the first point of the grid, and
        the same model; its own task, or those that the description names."""
        assert self.spec.tune is not None
        own = [other for other in self.spec.settings if other.model == setting.model]
        first = [other for other in own if other.condition == own[0].condition]
        tasks = self.spec.tune.tasks or (setting.task,)
        return tuple(other for other in first if other.task in tasks)

    def _tried(
        self, method: Method, place: tuple[Setting, ...], options: Options
    ) -> Iterator[Wanted]:
        assert self.spec.tune is not None
        for setting in place:
            yield self._want(method, setting, self.spec.tune.seed, options, False)

    def _every(self) -> Iterator[Wanted]:
        """All runs; a final one whose values are not known yet with the first to be tried."""
        if self.spec.tune is not None:
            yield from self.tuning()
        yield from (
            self.final(method, setting, seed)
            or self._want(method, setting, seed, self._tries(self._tuner(method))[0], True)
            for method in self.spec.methods
            for setting in self.spec.settings
            for seed in self.spec.seeds
        )

    def _tuner(self, method: Method) -> Method:
        return self.spec.method(method.tune) if isinstance(method.tune, str) else method

    def _want(
        self, method: Method, setting: Setting, seed: int, tuned: Options, final: bool
    ) -> Wanted:
        key = method.name, setting.label, seed, tuple(map(str, tuned.items())), final
        if key not in self._wanted:
            values: Options = {
                **self.spec.overrides, **setting.options, **method.options, **tuned,
                "seed": seed, "evaluation.test": final,
            }  # fmt: skip
            words = [f"{key}={as_text(value)}" for key, value in values.items()]
            try:
                resolved = resolve(self.spec.source, words)
            except UserError as error:
                raise UserError(f"{self.spec.name}, method {method.name}: {error}") from None
            settings = settings_of(resolved.config)
            self._wanted[key] = Wanted(
                method.name, setting, seed, tuned, final, (self.spec.source, *words), resolved,
                settings, identity(settings),
            )  # fmt: skip
        return self._wanted[key]

    # What may be.

    def _check(self, wanted: Wanted) -> None:
        """Raises UserError for options that cannot be."""
        check_options(wanted.resolved, self.jobs.tasks)
        check_threads(wanted.config)
        deepspeed_config.load(wanted.config)
        if not wanted.config.data.validation:
            raise UserError(
                "data.validation is 0, and what is chosen, and costs to a target, are read from "
                "validation; set it to a share of the rows."
            )

    def check_data(self) -> None:
        """Raises UserError for data that cannot be read or shared out, and for those of which a
        finished cell has others."""
        digests: dict[str, str] = {}
        for wanted in self._every():
            config = wanted.config
            key = repr((config.data, config.task, config.federation.clients, config.seed))
            if key not in digests:
                try:
                    task = sources.load(config)
                    partition.partition(task, config)
                except UserError as error:
                    raise UserError(f"{self.spec.name}, {wanted.label}: {error}") from None
                digests[key] = sources.digest(task)
            cell = self.cell(wanted)
            if cell is not None and cell.content["data"] != digests[key]:
                raise UserError(
                    f"{self.spec.name}, {wanted.label}: the data are not those of the cell that is "
                    f"finished in {self.spec.cells}; put them back, or give another folder."
                )

    # What is done.

    def cell(self, wanted: Wanted) -> Cell | None:
        """Its result, if it is finished."""
        return self.store.find(wanted.identity, wanted.settings)

    def known(self) -> list[Wanted]:
        """All runs that can be started, in order; runs of one configuration once."""
        tuning = self.tuning() if self.spec.tune is not None else iter(())
        every = [*tuning, *(own for own in self.finals() if own is not None)]
        return list({own.identity: own for own in reversed(every)}.values())[::-1]

    def missing(self) -> list[Wanted]:
        """Those of `known` that are not finished."""
        return [own for own in self.known() if self.cell(own) is None]

    def unknown(self) -> int:
        """How many final runs wait for a choice."""
        return sum(own is None for own in self.finals())

    def gather(self) -> list[tuple[Wanted, Cell]]:
        """Make cells of the runs that are complete; returns those."""
        found = []
        for wanted in self.missing():
            folder = self.jobs.folder / wanted.name
            if not (folder / "summary.json").is_file():
                continue
            try:
                cell = of_run(folder, wanted.settings)
            except DamageError as damage:
                raise UserError(f"{damage}; remove {folder}, and it is run again.") from None
            self.store.keep(wanted.identity, cell)
            found.append((wanted, cell))
            if not self.spec.keep_runs:
                shutil.rmtree(folder)
        return found

    def run(self, say: Callable[[Progress, list[tuple[Wanted, Cell]]], None]) -> list[Status]:
        """Start what is missing, and wait; returns what has failed. What had failed before is tried
        again, once."""
        with writing(self.jobs.folder):
            self.jobs.folder.mkdir(parents=True, exist_ok=True)
        self._share_cores()
        tried: set[str] = set()
        while True:
            began = time.monotonic()
            finished = self.gather()
            while finished and (more := self.gather()):  # what is known now may be finished too
                finished += more
            known = self.known()
            missing = [own for own in known if self.cell(own) is None]
            self.jobs.runs |= {
                own.name: (*own.words, f"output={self.jobs.folder / own.name}") for own in missing
            }
            found = self.jobs.status([own.name for own in missing]) if missing else []
            fresh = [own.name for own in found if own.over and own.name not in tried]
            busy = [own for own in found if not own.over]
            if self.spec.executor != "slurm":
                fresh = fresh[: max(0, self._at_once - len(busy))]
            say(self._progress(found, tried, len(known) - len(missing)), finished)
            if fresh:
                tried |= set(fresh)
                self.jobs.submit(fresh)
            elif not busy:
                return [own for own in found if own.state != "complete"]
            else:
                # To look at hundreds of runs takes the processor from those that run.
                time.sleep(max(POLL_SECONDS, 50 * (time.monotonic() - began)))

    def _share_cores(self) -> None:
        """Runs side by side share this machine's cores, unless it is said otherwise."""
        if self.spec.executor != "slurm" and "OMP_NUM_THREADS" not in os.environ:
            cores = len(os.sched_getaffinity(0))
            os.environ["OMP_NUM_THREADS"] = str(max(1, cores // (self._at_once * self.jobs.tasks)))

    def _progress(self, found: list[Status], tried: set[str], done: int) -> Progress:
        """found: of what is missing."""
        failed = [own for own in found if own.over and own.name in tried]
        running = [own for own in found if own.state == "running"]
        waiting = len(found) - len(running) - len(failed) + self.unknown()
        return Progress(done, len(running), waiting, len(failed), self._left(found, running))

    def _left(self, found: list[Status], running: list[Status]) -> float | None:
        """Seconds, from what finished runs took: of the same setting, else of all."""
        took: dict[str, list[float]] = {}
        for wanted in self._wanted.values():
            cell = self.cell(wanted)
            if cell is not None:
                took.setdefault(wanted.setting.label, []).append(cell.spent["total"])
        if not took:
            return None
        overall = mean(seconds for own in took.values() for seconds in own)
        by_name = {own.name: own for own in self._wanted.values()}
        total = self.unknown() * overall
        for status in found:
            wanted = by_name[status.name]
            share = 1 - status.rounds / wanted.config.federation.rounds
            total += share * mean(took.get(wanted.setting.label, [overall]))
        at_once = self._at_once if self.spec.executor != "slurm" else max(1, len(running))
        return total / at_once


def late(cell: Cell) -> float:
    """Mean validation score of the second half of the validations; a single round jumps."""
    points = [point["score"] for point in cell.curve]
    return mean(float("-inf") if p is None else float(p) for p in points[len(points) // 2 :])
