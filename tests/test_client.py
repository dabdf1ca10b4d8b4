"""The Python API, used as a script or a notebook uses it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars
import psutil
import pytest
from labs import PATIENCE, Lab, embedded, until, variables

import producer
from netassay.errors import UserError
from netassay.figure import Figure
from netassay.settings import Settings
from netassay.store.control import NoSuchBatch
from netassay.store.database import StoreError
from netassay.store.submission import NameTaken
from producer import client, following, notebook
from producer.notebook import Drawing
from producer.submission import CannotSubmit
from producer.sweeps import BadSweep

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "python.md").read_text()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings of a laboratory that is not there yet, in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    return Settings(home=tmp_path / "home")


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with embedded(slots=1) as found:
        yield found


def keys(batch: producer.Batch) -> list[str]:
    return [record.key for record in batch.records()]


# --- what can be submitted ----------------------------------------------------------------------------------------


def test_importing_the_package_loads_no_library() -> None:
    heavy = {"torch", "sqlalchemy", "polars", "pyarrow", "pydantic", "rich", "yaml", "celery", "numpy", "IPython"}
    program = f"import sys, producer; sys.exit(str({heavy} & set(sys.modules)) if {heavy} & set(sys.modules) else 0)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


VALUES = [0, 1, 2, 3, 4]
SWEEP = {"method": "diagnostics.echo", "params": {"tag": 5}, "grid": {"value": VALUES}}
FORMS: dict[str, Callable[[Path], tuple[Any, dict[str, Any]]]] = {
    "a path": lambda folder: (str(write(folder)), {}),
    "a path object": lambda folder: (write(folder), {}),
    "a list of paths": lambda folder: ([write(folder)], {}),
    "a mapping": lambda folder: ({"name": "sweep", "jobs": [SWEEP]}, {}),
    "a mapping with an array": lambda folder: (
        {"name": "sweep", "jobs": SWEEP | {"grid": {"value": np.arange(5)}, "params": {"tag": np.int64(5)}}},
        {},
    ),
    "a mapping without a method": lambda folder: ({"jobs": {"params": {"tag": 5}, "grid": {"value": VALUES}}}, ECHO),
    "a quoted glob": lambda folder: (str(write(folder).with_name("sw*.yaml")), {}),
    "rows": lambda folder: ([{"value": value, "tag": 5} for value in VALUES], ECHO),
    "rows of their own methods": lambda folder: (
        [{"method": "diagnostics.echo", "value": value, "tag": 5} for value in VALUES],
        {"name": "sweep"},
    ),
    "a generator of rows": lambda folder: (({"value": value, "tag": np.int64(5)} for value in VALUES), ECHO),
    "a Polars frame": lambda folder: (polars.DataFrame({"value": VALUES, "tag": [5] * 5, "log": [None] * 5}), ECHO),
    "a pandas frame": lambda folder: (
        pytest.importorskip("pandas").DataFrame({"value": VALUES, "tag": [5] * 5, "log": [None] * 5}),
        ECHO,
    ),
}  # fmt: skip
ECHO = {"method": "diagnostics.echo", "name": "sweep"}


def write(folder: Path) -> Path:
    path = folder / "sweep.yaml"
    path.write_text("jobs: {method: diagnostics.echo, params: {tag: 5}, grid: {value: {range: [0, 5]}}}")
    return path


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_of_the_same_jobs_is_the_same_batch(
    here: Settings, tmp_path: Path, form: Callable[[Path], tuple[Any, dict[str, Any]]]
) -> None:
    first = producer.submit({"name": "sweep", "jobs": SWEEP}, settings=here)
    assert first.submitted is not None
    assert (first.submitted.new, first.submitted.already) == (5, False)
    what, options = form(tmp_path)
    again = producer.submit(what, settings=here, **options)
    assert again == first, "named after the file"
    assert again.submitted is not None
    assert again.submitted.already
    assert [record.params["value"] for record in again.records()] == VALUES


def test_mistakes_in_rows_come_all_together_with_row_and_field_and_nothing_is_stored(here: Settings) -> None:
    rows: list[dict[str, Any]] = [{"value": value} for value in range(100)]
    rows[16], rows[40], rows[99] = {"value": float("nan")}, {"valeu": 1}, {"value": 7, "tag": "seven"}
    with pytest.raises(BadSweep) as caught:
        producer.submit(rows, method="diagnostics.echo", name="rows", settings=here)
    told = str(caught.value)
    assert {"value", "valeu", "tag"} <= {error.field for error in caught.value.errors}
    assert all(words in told for words in ("17", "41", "100", "nearest: value")), told
    assert not here.root.exists()
    with pytest.warns(UserWarning, match="3 invalid rows were left out"):
        batch = producer.submit(rows, method="diagnostics.echo", name="rows", skip_invalid=True, settings=here)
    assert batch.progress().size == 97
    assert {"value", "valeu", "tag"} <= {error.field for error in batch.left_out}


WRONG = {
    "a number": (lambda: (7, {}), "int cannot be submitted; give a path"),
    "nothing": (lambda: ([], {}), "the list is empty"),
    "a mixture": (lambda: ([{"value": 1}, "a.yaml"], {}), "cannot be submitted"),
    "a lazy frame": (lambda: (polars.LazyFrame({"value": [1]}), ECHO), "collect()"),
    "no name": (lambda: ({"jobs": SWEEP}, {}), "needs a name"),
    "no valid row": (lambda: ([{"value": float("nan")}], ECHO | {"skip_invalid": True}), "nothing to submit"),
}


@pytest.mark.parametrize("given, words", WRONG.values(), ids=WRONG)
def test_what_cannot_be_submitted_is_refused_in_words(
    here: Settings, given: Callable[[], tuple[Any, dict[str, Any]]], words: str
) -> None:
    what, options = given()
    with pytest.raises(CannotSubmit, match=re.escape(words)):
        producer.submit(what, settings=here, **options)
    assert not here.root.exists()


def test_a_missing_file_and_rows_without_a_method_are_refused(here: Settings) -> None:
    with pytest.raises(UserError, match=r"missing\.yaml"):
        producer.submit("missing.yaml", settings=here)
    with pytest.raises(BadSweep, match="method"):
        producer.submit([{"value": 1}], "rows", settings=here)
    assert not here.root.exists()


def test_a_taken_name_is_refused_unless_the_jobs_are_to_be_added(here: Settings) -> None:
    rows = [{"value": value} for value in range(10)]
    producer.submit(rows[:5], "grows", method="diagnostics.echo", note="first", settings=here)
    with pytest.raises(NameTaken):
        producer.submit(rows[3:], "grows", method="diagnostics.echo", settings=here)
    batch = producer.submit(rows[3:], "grows", method="diagnostics.echo", append=True, settings=here)
    assert [record.params["value"] for record in batch.records()] == list(range(10))
    assert batch.progress().note == "first"


def test_paths_in_a_mapping_start_from_the_working_folder(here: Settings, tmp_path: Path) -> None:
    with pytest.raises(BadSweep, match=re.escape(str(tmp_path / "nets" / "a.onnx"))):
        producer.submit([{"network": Path("nets/a.onnx")}], "nets", method="networks.describe", settings=here)


# --- batches ------------------------------------------------------------------------------------------------------


def test_before_the_first_submission_there_is_nothing_and_it_says_so(here: Settings) -> None:
    for ask in (producer.batches, producer.results, lambda **rest: producer.batch("digits", **rest)):
        with pytest.raises(StoreError, match=r"there is no lab in .*producer\.up\(\)"):
            ask(settings=here)
    assert producer.status(settings=here) == client.Status(None, [], [])
    assert not producer.down(settings=here)
    assert "no lab" in producer.Batch("digits", here)._repr_html_()


def test_batches_are_found_by_name_newest_first(here: Settings) -> None:
    for name in ("one", "two"):
        producer.submit([{"value": 1, "tag": len(name)}], name, method="diagnostics.echo", settings=here)
    assert [batch.name for batch in producer.batches(settings=here)] == ["two", "one"]
    assert producer.batch("one", settings=here).progress().size == 1
    with pytest.raises(NoSuchBatch, match="'three'; the newest are: two, one"):
        producer.batch("three", settings=here)
    assert [progress.name for progress in producer.status(settings=here).batches] == ["two", "one"]


def test_pause_resume_cancel_and_weight_do_what_the_words_say(here: Settings) -> None:
    batch = producer.submit([{"value": 1}], "asked", method="diagnostics.echo", weight=2, settings=here)
    assert (batch.pause(), batch.pause()) == (True, False)
    assert batch.progress().state == "paused"
    assert batch.resume()
    batch.set_weight(5)
    assert batch.progress().weight == 5
    assert (batch.cancel(), batch.progress().over) == (True, True)
    assert batch.retry() == 0
    with pytest.raises(UserError, match=r"'tiem' is no cause; causes are: .*time"):
        batch.retry("tiem")
    with pytest.raises(StoreError, match="weight"):
        batch.set_weight(0)


def test_every_call_closes_its_connections(here: Settings) -> None:
    batch = producer.submit([{"value": 1}], "closed", method="diagnostics.echo", settings=here)
    batch.progress(), batch.failures(), batch.frame(), list(batch.records()), batch.pause(), batch.wait()
    records = batch.records()
    next(records)
    records.close()
    held = [file.path for file in psutil.Process().open_files() if file.path.startswith(str(here.root))]
    assert held == []


# --- waiting ------------------------------------------------------------------------------------------------------


def test_a_script_submits_waits_and_reads(lab: Lab, capfd: pytest.CaptureFixture[str]) -> None:
    batch = producer.submit(
        [{"value": v} for v in range(200)], "waited", method="diagnostics.echo", settings=lab.config
    )
    last = batch.wait(timeout=PATIENCE)
    assert (last.over, last.done, last.failed) == (True, 200, 0)
    frame = batch.frame()
    assert frame["square"].to_list() == [value**2 for value in range(200)]
    assert frame["state"].unique().to_list() == ["done"]
    everywhere = producer.results("diagnostics.*", since="1h", state="done", settings=lab.config)
    assert set(frame["job"]) <= set(everywhere["job"])
    assert producer.results("waited", settings=lab.config).equals(frame)
    assert producer.results("waited", since="2999-01-01", settings=lab.config).height == 0
    assert next(batch.records(state="failed"), None) is None
    assert capfd.readouterr() == ("", ""), "no terminal, no bar"


@pytest.mark.parametrize(
    "since", ["yesterday", "d", "7w", "", "nand", "infd", "1e400d", "-1h", float("nan"), float("inf"), -1.0]
)
def test_a_time_that_is_none_is_refused_with_examples(lab: Lab, since: str | float) -> None:
    with pytest.raises(UserError, match="give 7d, 12h, 30m"):
        producer.results(since=since, settings=lab.config)


@pytest.mark.parametrize(
    "words, told",
    [
        ({"state": "finished"}, "there is no state 'finished'; states are: pending, running, done"),
        ({"cause": "tiem"}, "there is no cause 'tiem'"),
        ({"pattern": "waitid"}, "no batch is called 'waitid'; .*nor is a method"),
        ({"network": "nowhere.onnx"}, "nowhere.onnx"),
    ],
)
def test_words_that_find_nothing_are_refused(lab: Lab, words: dict[str, str], told: str) -> None:
    producer.submit([{"value": 1}], "some", method="diagnostics.echo", settings=lab.config)
    with pytest.raises(UserError, match=told):
        producer.results(settings=lab.config, **words)


def test_failures_are_told_by_cause_and_a_job_by_its_logs(lab: Lab) -> None:
    rows = [{"cause": "numerical", "tag": 1}, {"cause": "numerical", "tag": 2}, {"cause": "error", "tag": 3}]
    batch = producer.submit(rows, "failing", method="diagnostics.fail", settings=lab.config)
    assert batch.wait(timeout=PATIENCE, bar=False).failed == 3
    assert [(group.cause, group.jobs) for group in batch.failures()] == [("numerical", 2), ("error", 1)]
    logs = producer.logs(batch.failures()[0].example_key, settings=lab.config)
    assert (logs.state, logs.cause, logs.attempts) == ("failed", "numerical", [])
    assert "numerical" in batch._repr_html_()
    assert batch.retry("error") == 1
    assert batch.wait(timeout=PATIENCE, bar=False).failed == 3


def test_waiting_ends_with_the_time_given_and_the_batch_goes_on(lab: Lab) -> None:
    batch = producer.submit([{"seconds": 2.0}], "slow", method="diagnostics.sleep", settings=lab.config)
    assert not batch.wait(timeout=0.2, bar=False).over
    assert not batch.wait(timeout=0, bar=False).over
    assert batch.wait(timeout=PATIENCE, bar=False).done == 1


def test_ctrl_c_ends_the_waiting_and_not_the_batch(lab: Lab) -> None:
    path = lab.document("interrupted", {"method": "diagnostics.sleep", "params": {"seconds": 30.0, "tag": 9}})
    program = f"import producer; producer.submit({str(path)!r}).wait()"
    environment = os.environ | {"NETASSAY_HOME": str(lab.home)}
    waiting = subprocess.Popen([sys.executable, "-c", program], env=environment, stderr=subprocess.PIPE, text=True)
    until(lambda: any(batch.name == "interrupted" for batch in producer.batches(settings=lab.config)))
    batch = producer.batch("interrupted", settings=lab.config)
    until(lambda: batch.progress().running)
    for _ in range(3):  # Python drops an interrupt that comes while it finalises an object
        waiting.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            waiting.wait(2)
            break
    _, said = waiting.communicate(timeout=PATIENCE)
    assert waiting.returncode != 0, said
    assert "no longer waiting; interrupted goes on" in said
    assert (batch.progress().state, batch.progress().running) == ("open", 1)
    batch.cancel()
    assert batch.wait(timeout=PATIENCE, bar=False).over


def test_waiting_without_a_lab_says_once_how_to_start_one(
    here: Settings, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "QUIET_SECONDS", 0.2)
    batch = producer.submit([{"value": 1}], "alone", method="diagnostics.echo", settings=here)
    assert not batch.wait(timeout=1.5).over
    said = capfd.readouterr().err
    assert said.count("no worker runs") == 1
    assert "producer.up()" in said


def test_waiting_for_a_paused_batch_ends_and_says_how_to_go_on(
    here: Settings, capfd: pytest.CaptureFixture[str]
) -> None:
    batch = producer.submit([{"value": 1}], "held", method="diagnostics.echo", settings=here)
    batch.pause()
    assert batch.wait(timeout=PATIENCE).state == "paused"
    assert "resume()" in capfd.readouterr().err


def test_several_threads_submit_and_wait_at_once(lab: Lab) -> None:
    ended: dict[int, int] = {}

    def work(number: int) -> None:
        rows = [{"value": value, "tag": 70 + number} for value in range(50)]
        batch = producer.submit(rows, f"thread-{number}", method="diagnostics.echo", settings=lab.config)
        ended[number] = batch.wait(timeout=PATIENCE, bar=False).done

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ended == dict.fromkeys(range(4), 50)


def test_on_a_terminal_the_bar_shows_the_name_as_it_is(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    console = Console(record=True, force_terminal=True, width=120, file=open(os.devnull, "w"))  # noqa: SIM115
    monkeypatch.setattr("producer.show.errors", console)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    name = "[red]terminal[/red]"
    producer.submit([{"value": 1, "tag": 33}], name, method="diagnostics.echo", settings=lab.config).wait(PATIENCE)
    shown = console.export_text()
    assert name in shown
    assert "1/1" in shown


# --- frames, plots, HTML ------------------------------------------------------------------------------------------


def test_without_pandas_a_pandas_frame_is_refused_with_the_way_out(
    here: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = producer.submit([{"value": 1}], "frames", method="diagnostics.echo", settings=here)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(client.NoPandas, match="pip install pandas"):
        batch.frame(pandas=True)


def test_with_pandas_the_frame_has_the_same_columns(here: Settings) -> None:
    pytest.importorskip("pandas")
    batch = producer.submit([{"value": 1}], "frames", method="diagnostics.echo", settings=here)
    assert list(batch.frame(pandas=True).columns) == batch.frame().columns


def test_a_batch_without_a_figure_says_which_methods_it_has(here: Settings) -> None:
    batch = producer.submit([{"tag": 1}], "plain", method="diagnostics.fail", settings=here)
    for method in ("", "diagnostics.fail", "verification.certify"):
        with pytest.raises(client.NothingToDraw, match=r"its methods are: diagnostics\.fail"):
            batch.plot(method)


def drawing() -> Drawing:
    marks = [{"mark": "line", "x": [1, 2], "y": [1, 4], "label": "<i>"}]
    return Drawing(Figure.model_validate({"title": "Two points", "panels": [{"marks": marks}]}))


def test_a_figure_shows_itself_as_vega_lite_and_as_a_picture(tmp_path: Path) -> None:
    import base64

    bundle, about = drawing()._repr_mimebundle_()
    assert bundle["application/vnd.vegalite.v5+json"]["title"]["text"] == ["Two points"]
    png = base64.b64decode(bundle["image/png"])
    assert png.startswith(b"\x89PNG\r\n")
    assert about["image/png"]["width"] * 2 == int.from_bytes(png[16:20], "big")
    assert drawing().save(tmp_path / "two.svg").read_text().count("<svg") == 1
    with pytest.raises(UserError, match="nowhere is no folder"):
        Drawing(Figure(title="None", panels=[])).save(tmp_path / "nowhere" / "x.png")
    empty, _ = Drawing(Figure(title="None", caption="no records", panels=[]))._repr_mimebundle_()
    assert empty == {"text/plain": "None: no records"}


def test_all_that_users_wrote_is_escaped(here: Settings) -> None:
    from dataclasses import replace

    from netassay.store.reading import FailureGroup

    evil = "<script>alert('&')</script>"
    batch = producer.submit([{"value": 1}], evil, method="diagnostics.echo", note=evil, settings=here)
    progress = replace(batch.progress(), reason=evil, state=evil)
    shown = notebook.batch_html(progress, [FailureGroup(evil, 1, evil, evil)], pace=evil, said=[evil])
    for text in (shown, batch._repr_html_(), producer.Batch(evil, Settings(home="/nonexistent"))._repr_html_()):
        assert "<script" not in text
        assert "&lt;script&gt;" in text
    assert shown.count("&lt;script&gt;") >= 7


# --- notebooks ----------------------------------------------------------------------------------------------------


class ZMQInteractiveShell:
    """What IPython calls the shell of a notebook's kernel."""


def test_in_a_notebook_one_output_is_updated_until_the_batch_is_over(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []

    class Handle:
        def update(self, content: str) -> None:
            shown.append(content)

    def display(content: str, display_id: bool) -> Handle:
        assert not shown, "a second output"
        shown.append(content)
        return Handle()

    module = types.ModuleType("IPython")
    module.get_ipython = ZMQInteractiveShell  # type: ignore[attr-defined]
    module.display = types.SimpleNamespace(HTML=str, display=display)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", module)
    monkeypatch.setitem(sys.modules, "IPython.display", module.display)
    rows = [{"seconds": 0.2, "tag": 500 + tag} for tag in range(4)]
    batch = producer.submit(rows, "shown", method="diagnostics.sleep", settings=lab.config)
    batch.wait(timeout=PATIENCE)
    assert len(shown) > 2
    assert "finished" not in shown[0]
    assert "finished" in shown[-1]
    assert "4 done" in shown[-1]


def test_the_example_notebook_runs_in_a_real_kernel(tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    page = nbformat.read(ROOT / "examples" / "digits.ipynb", as_version=4)
    with embedded(start=False) as lab, variables({"NETASSAY_HOME": str(lab.home)}):
        nbclient.NotebookClient(page, timeout=PATIENCE, resources={"metadata": {"path": str(ROOT)}}).execute()
        assert producer.status(settings=lab.config).lab is None, "the notebook stops its lab"
    outputs = [output for cell in page.cells if cell.cell_type == "code" for output in cell.outputs]
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert {"text/html", "image/png", "application/vnd.vegalite.v5+json"} <= kinds
    texts = [output["data"]["text/html"] for output in outputs if "text/html" in output.get("data", {})]
    assert any("finished" in text for text in texts), "the bar at its end"
    assert not [output for output in outputs if output.output_type == "error"]


# --- the page that tells of it ------------------------------------------------------------------------------------


def table() -> dict[str, str]:
    """Verb -> what the page has beside it."""
    rows = re.findall(r"^\| `netassay (\w+)[^|]*\| (.*?) \|$", PAGE, re.MULTILINE)
    assert len(rows) == len(dict(rows)), "a verb stands there twice"
    return dict(rows)


def test_every_verb_of_the_command_line_has_its_function_or_a_reason_why_not() -> None:
    from typer.main import get_command

    from producer.cli import app

    verbs = set(get_command(app).commands)  # type: ignore[attr-defined]
    assert set(table()) == verbs, f"missing: {verbs - set(table())}; no verb: {set(table()) - verbs}"
    for verb, beside in table().items():
        names = re.findall(r"`(producer|batch)\.(\w+)\(", beside)
        assert names or re.match(r"no: \w+", beside), f"{verb} has neither"
        for owner, name in names:
            assert callable(getattr(producer if owner == "producer" else producer.Batch, name))


def test_every_function_stands_on_the_page() -> None:
    public = {f"producer.{name}(" for name in producer.__all__ if name[0].islower()}
    fields = producer.Batch.__dataclass_fields__
    public |= {f"batch.{name}(" for name in vars(producer.Batch) if not name.startswith("_") and name not in fields}
    assert not {name for name in public if name not in PAGE}


def test_no_link_of_the_page_is_broken() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", PAGE) if "://" not in link]
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        text = (ROOT / "docs" / path).read_text()
        headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        assert not anchor or anchor in {heading.lower().replace(" ", "-") for heading in headings}, link


def test_everything_on_the_page_can_be_done_as_it_stands_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process after the other, in an empty folder that has the repository's examples in it."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for name, code in re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```", PAGE, re.DOTALL):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(code)
    site = tmp_path / "site"
    install = f"{sys.executable} -m pip install --quiet --no-deps --no-index --no-build-isolation --target {site}"
    with embedded(start=False) as lab:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("NETASSAY_")}
        environment |= {
            "NETASSAY_HOME": str(lab.home),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(site),
        }
        commands = {
            "python": lambda code: [sys.executable, "-W", "error::UserWarning", "-c", code],
            "sh": lambda code: ["sh", "-euc", code.replace("pip install", install)],
        }
        for file, language, code in re.findall(r"(<!-- file: \S+ -->\n)?```(\w+)\n(.*?)```", PAGE, re.DOTALL):
            if file:
                continue
            done = subprocess.run(
                commands[language](code), cwd=tmp_path, env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}\n{lab.logs()}"
