"""The laboratory from Python, for scripts and notebooks: the words of the command line as functions.

    import producer

    batch = producer.submit("digits.yaml")
    batch.wait()
    batch.frame()

Every function takes `settings=` (a `netassay.settings.Settings`), else uses those of the environment, which a process
reads once. Connections are opened for each call and closed with it, so all of this may be used from several threads.
What a person can mend is raised as a `netassay.errors.UserError`, with the same words as on the command line.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from netassay.errors import UserError

if TYPE_CHECKING:
    from datetime import datetime

    import polars

    from netassay.job import Record
    from netassay.method import Contract, Method
    from netassay.settings import Settings
    from netassay.store.database import Database
    from netassay.store.reading import AttemptSeen, FailureGroup, Progress, Query, WorkerInfo
    from netassay.store.submission import Submitted
    from producer.notebook import Drawing
    from producer.submission import What
    from producer.sweeps import RowError

#: A mistake in a row is shown so often in the warning about rows that were left out.
_SHOWN = 5


class NoPandas(UserError, ImportError):
    """A pandas frame was asked for where there is no pandas."""


class NothingToDraw(UserError, LookupError):
    """No method of the batch, or not the one that was asked for, draws a figure."""


@dataclass(frozen=True)
class Batch:
    """Jobs submitted together under a name; shows itself in a notebook.

    submitted: what the submission that made this object did; None where it was looked up. left_out: of that
    submission, the mistakes of the rows that `skip_invalid` left out.
    """

    name: str
    settings: Settings = field(repr=False)
    submitted: Submitted | None = field(default=None, repr=False, compare=False)
    left_out: tuple[RowError, ...] = field(default=(), repr=False, compare=False)

    def progress(self) -> Progress:
        """How it stands now."""
        from netassay.store import reading

        with _store(self.settings) as database:
            return reading.progress(database, self.name)

    def wait(self, timeout: float | None = None, bar: bool = True) -> Progress:
        """Until it is over or paused, or for `timeout` seconds. Returns how it stood last: see its `over` and `failed`.

        bar: show a bar, on standard error or in the notebook. Ctrl-C, or a notebook's stop button, ends the waiting and
        not the batch. An outage of the store is waited out.
        """
        try:
            return self._wait(timeout, bar)
        except KeyboardInterrupt:
            print(f"no longer waiting; {self.name} goes on (to end it: cancel)", file=sys.stderr, flush=True)
            raise

    def _wait(self, timeout: float | None, bar: bool) -> Progress:
        from netassay.store import reading
        from producer import following, notebook

        with _store(self.settings) as database, notebook.bar(bar) as shown:
            (last,) = following.show(following.follow(database, self.settings, [self.name], timeout), shown)
            if last.resting:
                shown.show(last, "", reading.failures(database, self.name) if last.failed else ())
            if last.state == "paused":
                reason = f" ({last.reason})" if last.reason else ""
                shown.say(f"{self.name} is paused{reason}; go on with its resume(), then wait() again")
            return last

    def frame(self, arrays: bool = False, pandas: bool = False) -> Any:
        """Its records as a Polars frame, params and results as typed columns (see `producer.frames`).

        arrays: with the small arrays of results as lists. pandas: as a pandas frame instead; raises NoPandas.
        """
        from netassay.store.reading import Query
        from producer import frames

        with _store(self.settings) as database, _laboratory(self.settings):
            found = frames.frame(database, Query(batch=self.name), arrays=arrays)
        return _to_pandas(found) if pandas else found

    def records(self, state: str = "") -> Iterator[Record]:
        """Its records in order, read page by page, jobs without an outcome included; only those in `state` if given."""
        from netassay.store import reading

        with _store(self.settings) as database:
            for record in reading.records(database, self.name):
                if not state or record.state == state:
                    yield record

    def array(self, record: Record, name: str) -> Any:
        """An array of a record's result, as NumPy. Raises KeyError where the result has no such field."""
        with _laboratory(self.settings):
            return record.array(name)

    def failures(self) -> list[FailureGroup]:
        """Its failed jobs by cause, the most frequent first, with the message of one each."""
        from netassay.store import reading

        with _store(self.settings) as database:
            return reading.failures(database, self.name)

    def pause(self) -> bool:
        """Start no more of its jobs; running ones end. False where it was not open."""
        from netassay.store import control

        with _store(self.settings) as database:
            return control.pause(database, self.name)

    def resume(self) -> bool:
        """Go on with it; False where it was neither paused nor cancelled."""
        from netassay.store import control

        with _store(self.settings) as database:
            return control.resume(database, self.name)

    def cancel(self) -> bool:
        """Stop it, its running jobs included; what is done stays. False where it was over."""
        from netassay.store import control

        with _store(self.settings) as database:
            return control.cancel(database, self.name)

    def retry(self, cause: str | None = None) -> int:
        """Give its failed jobs (of one cause, if given) a new start. Returns how many."""
        from netassay.job import CAUSES
        from netassay.store import control

        if cause is not None and cause not in CAUSES:
            raise UserError(f"{cause!r} is no cause; causes are: {', '.join(CAUSES)}")
        with _store(self.settings) as database:
            return control.retry(database, self.name, cause)

    def set_weight(self, weight: float) -> None:
        """Its share of the slots against other open batches; 1 is usual."""
        from netassay.store import control

        with _store(self.settings) as database:
            control.set_weight(database, self.name, weight)

    def plot(self, method: str = "", beside: str | os.PathLike[str] | None = None) -> Drawing:
        """The figure of its method, which shows itself in a notebook and has `save(path)`.

        method: which one, where several of its methods draw. beside: a CSV file of other tools' times on the same
        instances, to be shown beside (`netassay.beside`). Raises NothingToDraw, BrokenMethod or UnknownMethod for a
        method that this process has not got, and UserError for a file of times that cannot be read.
        """
        from netassay import beside as others
        from netassay import catalogue
        from netassay.job import BUILDER
        from netassay.store import reading
        from producer.notebook import Drawing

        times = None if beside is None else others.read(beside)
        found: dict[str, list[Record]] = {}
        with _store(self.settings) as database, _laboratory(self.settings):
            for record in reading.records(database, self.name):
                found.setdefault(record.method, []).append(record)
            plots = {name: catalogue.get(name).drawn(times) for name in ([method] if method in found else found)}
            drawable = {name: plot for name, plot in plots.items() if plot is not None}
            if method:
                drawable = {name: plot for name, plot in drawable.items() if name == method}
            elif len(drawable) > 1:  # a network that was trained on the way is not what the batch is about
                drawable.pop(BUILDER, None)
            if not drawable:
                what = (
                    f"{method} draws no figure in batch {self.name}" if method else f"batch {self.name} has no figure"
                )
                if times is not None:
                    what += " beside other tools' times"
                raise NothingToDraw(f"{what}; its methods are: {', '.join(found) or 'none'}")
            if len(drawable) > 1:
                raise NothingToDraw(
                    f"batch {self.name} has several figures; choose one: method={' or '.join(map(repr, drawable))}"
                )
            ((name, plot),) = drawable.items()
            return Drawing(plot(found[name]))

    def _repr_html_(self) -> str:
        from html import escape

        from netassay.store import reading
        from producer.notebook import batch_html

        try:
            with _store(self.settings) as database:
                progress = reading.progress(database, self.name)
                return batch_html(progress, reading.failures(database, self.name) if progress.failed else ())
        except Exception as error:  # such as an outage; a display must not raise
            return f"<b>{escape(self.name)}</b> &middot; {escape(str(error))}"


@dataclass(frozen=True)
class Status:
    """What runs. lab: what the lab of the home folder wrote down of itself; None where none runs there."""

    lab: dict[str, Any] | None
    workers: list[WorkerInfo]
    batches: list[Progress]


@dataclass(frozen=True)
class Logs:
    """What is known of one job: its state; of a failure the cause and message; the children that died on it."""

    state: str
    cause: str
    message: str
    attempts: list[AttemptSeen]


def submit(
    what: What,
    name: str = "",
    *,
    method: str = "",
    append: bool = False,
    fresh: bool = False,
    weight: float = 1.0,
    note: str = "",
    tags: Sequence[str] = (),
    skip_invalid: bool = False,
    settings: Settings | None = None,
) -> Batch:
    """Submit jobs as a batch. When this returns, no crash loses a job; they run wherever a lab or worker does.

    what: a path or quoted glob, or several; a sweep as a mapping; or rows of params (a list of mappings, a Polars or
    pandas frame; empty cells take the default) with `method=`. name: else the sweep's own, else the file's. append:
    add to the batch of this name. fresh: compute again what is known already. tags: words to find the batch by.
    skip_invalid: leave invalid rows out, with a warning, instead of refusing all.

    Raises BadSweep (its `errors` have `row`, `field` and `message`), CannotSubmit, NameTaken, ChangedFile; nothing is
    stored then.
    """
    from producer import submission

    config = _config(settings)
    prepared, outcome = submission.submit(
        what,
        config,
        name or None,
        weight,
        skip_invalid,
        method=method,
        note=note,
        tags=tags,
        append=append,
        fresh=fresh,
    )
    if prepared.refused:
        told = "".join(f"\n  {error}" for error in prepared.errors[:_SHOWN])
        warnings.warn(f"{submission.left_out(prepared)}:{told}", stacklevel=2)
    return Batch(outcome.name, config, outcome, tuple(prepared.errors))


def batch(name: str, *, settings: Settings | None = None) -> Batch:
    """The batch of that name. Raises NoSuchBatch."""
    found = Batch(name, _config(settings))
    found.progress()
    return found


def batches(*, settings: Settings | None = None) -> list[Batch]:
    """All batches, newest first."""
    from netassay.store import reading

    config = _config(settings)
    with _store(config) as database:
        return [Batch(progress.name, config) for progress in reading.batches(database)]


def results(
    pattern: str = "",
    network: str = "",
    since: str | float | datetime | None = None,
    state: str = "",
    cause: str = "",
    *,
    arrays: bool = False,
    settings: Settings | None = None,
) -> polars.DataFrame:
    """Records of a batch, or across all batches, as a Polars frame with params and results as typed columns.

    pattern: the name of a batch, else a method or a glob such as `lipschitz.*`. network: only records on the network of
    this name, glob or reference. since: only what ended later than this: `7d`, `12h`, `2026-01-31`, a datetime, or
    seconds since 1970. arrays: with the small arrays of results as lists.

    Raises UserError where the words make no sense, or nothing is called so.
    """
    from producer import frames

    config = _config(settings)
    with _store(config) as database, _laboratory(config):
        return frames.frame(database, query_of(database, pattern, network, since, state, cause), arrays=arrays)


def query_of(
    database: Database,
    what: str = "",
    network: str = "",
    since: str | float | datetime | None = None,
    state: str = "",
    cause: str = "",
) -> Query:
    """The query that these words stand for, as for `results`.

    Raises UserError where the words make no sense, NoSuchMethod or NoSuchNetwork where nothing is called so.
    """
    from netassay.job import CAUSES, ENDS
    from netassay.store import reading

    for given, known, kind in ((state, ("pending", "running", *ENDS), "state"), (cause, CAUSES, "cause")):
        if given and given not in known:
            raise UserError(f"there is no {kind} {given!r}; {kind}s are: {', '.join(known)}")
    no_batch = _no_batch(database, what) if what else ""
    query = reading.Query(
        batch="" if no_batch else what,
        method=what if no_batch else "",
        network=network,
        since=_moment(since),
        state=state,
        cause=cause,
    )
    try:
        reading.check(database, query)
    except reading.NoSuchMethod as error:
        raise UserError(f"{no_batch}; nor is a method: {error}") from None
    return query


def methods(text: str = "", *, settings: Settings | None = None) -> dict[str, str]:
    """Methods in whose name or first line every word of `text` occurs -> their first line.

    One that is there but cannot be used says why instead.
    """
    from netassay import catalogue

    with _laboratory(_config(settings)):
        broken = {name: f"(broken) {why}" for name, why in catalogue.broken().items()}
        claims = {name: catalogue.claim(name) for name in catalogue.names()} | broken
    words = text.lower().split()
    return {
        name: claim
        for name, claim in sorted(claims.items())
        if all(word in f"{name} {claim}".lower() for word in words)
    }


def method(name: str, *, settings: Settings | None = None) -> Method:
    """One method: its `doc`, `Params`, `Result`, `example`. Raises UnknownMethod, BrokenMethod."""
    from netassay import catalogue

    with _laboratory(_config(settings)):
        return catalogue.get(name)


def run(
    method: str, params: Mapping[str, Any] | None = None, /, *, settings: Settings | None = None, **fields: Any
) -> Contract:
    """One job in this process, without any lab, for a look at a method or one under construction. Returns its Result.

    Params are given as a mapping, by name, or both. Raises BadSweep where they are wrong, and what the method raises
    (`NotApplicable`, `InvalidInput`, `NumericalError`).
    """
    from netassay import catalogue
    from producer import submission

    with _laboratory(_config(settings)):
        found = catalogue.get(method)
        return found.run(submission.parameters(found, {**(params or {}), **fields}))


def up(
    slots: int = 0, *, flower: bool = True, monitor: bool = True, settings: Settings | None = None
) -> dict[str, Any]:
    """Start the lab of the home folder in the background. Returns what it says of itself.

    slots: compute children; 0: one a core. It outlives this process: see `down`. Raises LabError.
    """
    from producer import lab

    return lab.up(_config(settings), slots, flower, monitor)


def down(*, settings: Settings | None = None) -> bool:
    """Stop the lab of the home folder; what is submitted goes on at the next `up`. False where none ran."""
    from producer import lab

    return lab.down(_config(settings))


@contextlib.contextmanager
def running_lab(slots: int = 0, *, flower: bool = False, settings: Settings | None = None) -> Iterator[dict[str, Any]]:
    """A lab for the time of the block. Raises LabError, also where one runs already."""
    from producer import lab

    with lab.running(_config(settings), slots, flower) as described:
        yield described


def status(*, settings: Settings | None = None) -> Status:
    """What runs: the lab, its workers, the batches."""
    from netassay.store import reading
    from producer import lab

    config = _config(settings)
    described = lab.Place(config.root).described()
    with lab.records_of(config) as database:
        if not database.exists():
            return Status(described, [], [])
        database.prepare()
        return Status(described, reading.workers(database), reading.batches(database))


def logs(key: str, *, settings: Settings | None = None) -> Logs:
    """What is known of the job whose key starts so: its failure, and the last words of children that died on it.

    Raises NoSuchJob.
    """
    from netassay.store import reading

    with _store(_config(settings)) as database:
        end = reading.end_of(database, key)
        return Logs(end.state, end.cause, end.message, reading.attempts(database, key))


def _config(given: Settings | None) -> Settings:
    if given is not None:
        return given
    from netassay.settings import settings

    return settings()


@contextlib.contextmanager
def _store(config: Settings) -> Iterator[Database]:
    """The records, for the time of the block. Raises StoreError where there are none yet."""
    from netassay.store.database import StoreError
    from producer import lab

    with lab.records_of(config) as database:
        if not database.exists():
            raise StoreError(
                f"there is no lab in {config.root} yet; start one with: producer.up() (or set NETASSAY_HOME / "
                "NETASSAY_STORE, or give settings=)"
            )
        database.prepare()
        yield database


@contextlib.contextmanager
def _laboratory(config: Settings) -> Iterator[None]:
    """The methods and artifacts of these settings are those that methods, plots and references see in the block."""
    from netassay import catalogue
    from netassay.store import artifacts

    with catalogue.using(config.methods), artifacts.using(artifacts.of(config)):
        yield


def _no_batch(database: Database, name: str) -> str:
    """Why no batch is called so; empty where one is."""
    from netassay.store import control

    try:
        control.batch_id_of(database, name)
    except control.NoSuchBatch as error:
        return str(error)
    return ""


def _moment(since: str | float | datetime | None) -> float | None:
    """Seconds since 1970 of `7d`, `12h`, `30m` (ago), an ISO date or time, a datetime, or such seconds themselves."""
    if since is None:
        return None
    with contextlib.suppress(ValueError, OverflowError):
        moment = _seconds(since)
        if math.isfinite(moment):
            return moment
    raise UserError(f"since={since!r} is no time; give 7d, 12h, 30m, 2026-01-31, a datetime or seconds since 1970")


def _seconds(since: str | float | datetime) -> float:
    """As `_moment`. Raises ValueError, OverflowError."""
    from datetime import datetime

    units = {"d": 86_400, "h": 3_600, "m": 60}
    if isinstance(since, datetime):
        return since.timestamp()
    if not isinstance(since, str):
        return _not_negative(since)
    if since[-1:] in units:
        return time.time() - _not_negative(float(since[:-1])) * units[since[-1:]]
    return datetime.fromisoformat(since).timestamp()


def _not_negative(number: float) -> float:
    if number < 0:
        raise ValueError
    return number


def _to_pandas(frame: polars.DataFrame) -> Any:
    try:
        import pandas  # noqa: F401
    except ImportError:
        raise NoPandas(
            "a pandas frame needs pandas, which is not installed here; try: pip install pandas, or use the Polars "
            "frame that .frame() gives"
        ) from None
    return frame.to_pandas()
