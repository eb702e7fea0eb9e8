"""The flows on a small real DVC repository, a real Prefect server on the loopback address and real processes."""

import contextlib
import csv
import json
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import optuna
import psutil
import pytest
from filelock import FileLock

from ear import config
from ear.config import edit
from ear.config.compose import compose
from ear.errors import UserError
from flows import command, devices, experiments, readiness, repository
from flows.metrics import find
from flows.pipeline import main, pipeline
from flows.runs import _next
from flows.search import Range, check_values, search, space_of
from flows.search import _suggested as search_drawn
from flows.search import _typed as search_typed
from flows.sweep import grid, mark_best, sweep, write, write_back
from flows.turns import turn

ROOT = Path(__file__).resolve().parents[2]

DVC_YAML = """
stages:
  last:  # before what it needs, so that the order must come from the graph
    cmd: python stage.py last out/middle out/last sample.guidance
    deps: [out/middle, stage.py]
    params: [sample.guidance]
    outs: [out/last]
  first:
    cmd: python stage.py first source out/first sample.steps
    deps: [source, stage.py]
    params: [sample.steps]
    outs:
      - out/first
  middle:
    cmd: python stage.py middle out/first out/middle sample.temperature
    deps: [out/first, stage.py]
    params: [sample.temperature]
    outs:
      - out/middle
    metrics:
      - metrics.json:
          cache: false
"""
STAGE = """
import json, os, pathlib, subprocess, sys, time
from ruamel.yaml import YAML
name, source, target, key = sys.argv[1:]
section, _, item = key.partition(".")
value = YAML(typ="safe").load(open("params.yaml"))[section][item]
print(f"{name} at {value}")
if value == 13:
    sys.exit(f"{name}: {key} is 13, which is unlucky; choose another.")
if value == 99:  # works on until it is stopped, together with a child in the group and one in a session of its own
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    children = [subprocess.Popen(sleep), subprocess.Popen(sleep, start_new_session=True)]
    text = json.dumps([os.getpid(), *(child.pid for child in children)])
    pathlib.Path("work").mkdir(exist_ok=True)
    pathlib.Path("work/partial").write_text(text)
    os.rename("work/partial", "work/pids.json")
    time.sleep(600)
if value == 50:
    time.sleep(3)
pathlib.Path(target).parent.mkdir(exist_ok=True)
pathlib.Path(target).write_text(open(source).read() + f"{name} {value}\\n")
if name == "middle":
    json.dump({"fid": value**2, "nested": {"count": 3}}, open("metrics.json", "w"))
"""


def run(*arguments: str, cwd: Path, **options) -> str:
    done = subprocess.run(arguments, cwd=cwd, text=True, capture_output=True, env=environment(), **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def environment(**extra: str) -> dict[str, str]:
    return {**repository.environment(), "PYTHONPATH": str(ROOT), "NO_COLOR": "1", "COLUMNS": "200", **extra}


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """A repository whose three stages are up to date and committed."""
    folder = tmp_path_factory.mktemp("template")
    shutil.copy(ROOT / "params.yaml", folder)
    edit.apply(folder / "params.yaml", {"sample.steps": 8, "sample.temperature": 1.0, "sample.guidance": 1.5})
    (folder / "dvc.yaml").write_text(DVC_YAML)
    (folder / "stage.py").write_text(STAGE)
    (folder / "source").write_text("source\n")
    (folder / ".gitignore").write_text("/out/\n/work/\n/.prefect/\n__pycache__/\n")
    run("git", "init", "-q", cwd=folder)
    run("git", "config", "user.email", "tests@localhost", cwd=folder)
    run("git", "config", "user.name", "tests", cwd=folder)
    run(*repository.DVC, "init", "-q", cwd=folder)
    run(*repository.DVC, "config", "core.site_cache_dir", str(tmp_path_factory.mktemp("site")), cwd=folder)
    run(*repository.DVC, "repro", "-q", cwd=folder)
    run("git", "add", "-A", cwd=folder)
    run("git", "commit", "-q", "-m", "all stages run", cwd=folder)
    return folder


@pytest.fixture
def repo(template, tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "repo"
    shutil.copytree(template, folder)
    monkeypatch.chdir(folder)
    return folder


@contextlib.contextmanager
def background(*arguments: str, cwd: Path, log: Path, env: dict[str, str]):
    """A process that is gone, with all its descendants, at the end."""
    with log.open("w") as file:
        process = subprocess.Popen(arguments, cwd=cwd, stdout=file, stderr=file, env=env, start_new_session=True)
    try:
        yield process
    finally:
        family = [process, *psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait()


def wait_for(condition, seconds: float = 300.0):
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        value = condition()
        if value:
            return value
        time.sleep(0.1)
    raise AssertionError(f"nothing within {seconds} s")


def healthy(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=1) as answer:
        return answer.status == 200
    return False


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> dict[str, str]:
    """The environment of clients of a running server."""
    home = tmp_path_factory.mktemp("prefect")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    settings = environment(PREFECT_HOME=str(home), PREFECT_SERVER_ANALYTICS_ENABLED="false", DO_NOT_TRACK="1")
    start = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with background(*start, cwd=home, log=home / "server.log", env=settings):
        wait_for(lambda: healthy(url), 600)
        yield {**settings, "PREFECT_API_URL": url}


@pytest.fixture(scope="module")
def client(server):
    """Flows called in this process report to the server."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: server["PREFECT_API_URL"]}):
        yield
        # Send what is queued while the server is there; at the exit of Python it would be tried again for a minute.
        APILogWorker.instance().drain()
        EventsWorker.drain_all()


def table(key: str) -> list[dict]:
    from prefect.artifacts import Artifact

    return json.loads(Artifact.get(key).data)


def results() -> dict[str, str]:
    return {row["stage"]: row["result"] for row in table("stages")}


def gone(pids: list[int]) -> bool:
    return not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids)


def started_pids(repo: Path) -> list[int]:
    path = repo / "work/pids.json"
    wait_for(path.exists)
    return json.loads(path.read_text())


# --- the graph and what DVC says of it


def test_the_order_comes_from_the_graph(repo):
    assert list(repository.graph().items()) == [("first", set()), ("middle", {"first"}), ("last", {"middle"})]


def test_the_order_of_the_project_is_that_of_its_own_dvc_yaml(monkeypatch):
    from omegaconf import OmegaConf

    monkeypatch.chdir(ROOT)
    graph = repository.graph()
    assert list(graph) == list(OmegaConf.load("dvc.yaml").stages)
    assert graph["cache"] == {"prepare", "tokenizer"}
    assert repository.with_upstream(graph, ["cache"]) == ["fetch", "prepare", "tokenizer", "cache"]


def test_only_stages_of_the_root_are_in_the_graph(repo):
    Path("more").write_text("a file that DVC tracks")
    run(*repository.DVC, "add", "-q", "more", cwd=repo)
    Path("other").mkdir()
    Path("other/dvc.yaml").write_text("stages: {apart: {cmd: 'true', deps: [../out/last]}}")
    assert list(repository.graph()) == ["first", "middle", "last"]


def test_outside_a_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"dvc\.yaml is not in .* run the flow from the repository's root"):
        repository.graph()


def test_an_unknown_stage_is_named_with_the_nearest():
    with pytest.raises(ValueError, match=r"'evalute' is not a stage that would run; did you mean evaluate\?"):
        repository.known(["evalute"], ["sample", "evaluate"])
    with pytest.raises(ValueError, match=r"'last' is not a stage that would run; stages here: first, middle\."):
        repository.known(["last"], ["first", "middle"])


def test_reasons_name_parameters_code_inputs_and_outputs():
    entries = [
        {"changed deps": {"ear/model": "modified", "data/raw": "deleted", "params.yaml": {"sample": "modified"}}},
        {"changed outs": {"data/model": "deleted"}},
        "changed command",
    ]
    assert repository.reason(entries) == (
        "code: ear/model modified; inputs: data/raw deleted; parameters: sample modified; "
        "outputs: data/model deleted; changed command"
    )


def test_a_failure_is_the_last_line_of_the_stage():
    said = ["b: broken; mend it.", "(details: work/logs/b.log)", "(earlier outputs: `dvc checkout b`, and `git ...`)"]
    ran = ["Running stage 'b':", "> python b.py", "step 1", *said]
    end = "ERROR: failed to reproduce 'b': failed to run: python b.py, exited with 1"
    assert str(repository.failure([*ran, end])) == "b: broken; mend it."
    assert str(repository.failure(["> python b.py", end])) == end.removeprefix("ERROR: ")
    missing = "ERROR: failed to reproduce 'b': missing data 'source': a"
    assert str(repository.failure(["noise", missing])) == "failed to reproduce 'b': missing data 'source': a"
    busy = "ERROR: failed to reproduce 'b': '/r/a' is busy, it is being blocked by:"
    assert isinstance(repository.failure([busy, "  (PID 7): dvc repro"]), repository.BusyError)
    assert not isinstance(repository.failure([*ran, end]), repository.BusyError)


# --- overrides


def test_overrides_are_read_as_dvc_reads_yaml():
    texts = ["a.b=1e-4", "a.c=yes", "a.d=[1, 2]", "a.e=", "a.f=x=y", "a.g=true"]
    values = {"a.b": 1e-4, "a.c": "yes", "a.d": [1, 2], "a.e": None, "a.f": "x=y", "a.g": True}
    assert edit.values_of(texts) == values
    with pytest.raises(ValueError, match=r"'sample\.guidance' sets nothing; write SECTION.KEY=VALUE"):
        edit.values_of(["sample.guidance"])


def test_overrides_change_only_their_lines(tmp_path):
    path = tmp_path / "params.yaml"
    shutil.copy(ROOT / "params.yaml", path)
    before = path.read_text().splitlines()
    values = {
        "sample.guidance": 2,
        "data.source": "folder",
        "data.path": "a b: c",
        "tokenizer.block_channels": [8, 8],
    }
    edit.apply(path, values)
    changed = [(a, b) for a, b in zip(before, path.read_text().splitlines(), strict=True) if a != b]
    assert [b.split("#")[0].strip() for _, b in changed] == [
        'source: "folder"',
        'path: "a b: c"',
        "block_channels: [8, 8]",
        "guidance: 2",
    ]
    assert all(a.partition("#")[2] == b.partition("#")[2] for a, b in changed)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sample.guidnce": 2.0}, "sample.guidnce is not a known key; did you mean sample.guidance?"),
        ({"guidance": 2.0}, "guidance is not a known key"),
        ({"sample.guidance.x": 2.0}, "sample.guidance is a single value"),
        ({"sample": 2.0}, "sample is 2.0, but must be a section of keys"),
        ({"sample.guidance": "much"}, "sample.guidance is 'much', but must be a number"),
        ({"sample.steps": 4, "sample.guidance": -1}, "sample.guidance is -1, but must be at least 0"),
    ],
)
def test_a_wrong_override_leaves_the_file_alone(tmp_path, values, message):
    path = tmp_path / "params.yaml"
    shutil.copy(ROOT / "params.yaml", path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        edit.apply(path, values)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# --- one command


def test_lines_arrive_while_the_command_runs():
    program = "import time\nfor i in range(3): print(i, flush=True); time.sleep(0.4)"
    seen = []
    code = command.stream([sys.executable, "-c", program], line=lambda text: seen.append((text, time.monotonic())))
    end = time.monotonic()
    assert code == 0
    assert [text for text, _ in seen] == ["0", "1", "2"]
    assert [end - at > limit for (_, at), limit in zip(seen, (1.0, 0.7, 0.3), strict=True)] == [True] * 3


def test_the_exit_code_and_stderr_come_back():
    seen = []
    assert command.stream([sys.executable, "-c", "import sys; sys.exit('no')"], line=seen.append) == 1
    assert seen == ["no"]


@pytest.mark.parametrize("deaf", [False, True])
def test_stopping_leaves_no_process_behind(deaf):
    """A command, its child and its grandchild in another session; deaf ones ignore SIGINT and get SIGKILL."""
    quiet = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)" if deaf else "pass"
    child = f"{quiet}; import os, time; os.write(1, b'%d\\n' % os.getpid()); time.sleep(600)"
    program = (
        f"{quiet}; import os, subprocess, sys, time; os.write(1, b'%d\\n' % os.getpid());"
        f"subprocess.Popen([sys.executable, '-c', {child!r}]);"
        f"subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True); time.sleep(600)"
    )
    pids = []

    def stop_at_three(text: str) -> None:
        pids.append(int(text))
        if len(pids) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        command.stream([sys.executable, "-c", program], line=stop_at_three, grace=0.5)
    assert len(pids) == 3
    wait_for(lambda: gone(pids), 30)


def test_what_a_dead_command_left_behind_is_stopped():
    """The command is killed from outside; its child keeps the pipe open, so that its lines are still read."""
    child = "import os, time; os.write(1, b'%d\\n' % os.getpid()); time.sleep(600)"
    program = (
        f"import os, subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}]); os.kill(os.getpid(), 9)"
    )
    pids = []

    def stop(text: str) -> None:
        pids.append(int(text))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        command.stream([sys.executable, "-c", program], line=stop, grace=5)
    wait_for(lambda: gone(pids), 30)


def test_a_command_that_other_threads_stop_does_not_count_as_ended_well():
    stopped, codes = threading.Event(), []

    def work() -> None:
        try:
            program = "print('ready', flush=True); import time; time.sleep(600)"
            codes.append(command.stream([sys.executable, "-c", program], line=lines.append, stopped=stopped))
        except command.StoppedError as error:
            codes.append(str(error))

    lines = []
    thread = threading.Thread(target=work)
    thread.start()
    wait_for(lambda: lines, 30)
    command.stop_all(stopped, grace=5)
    thread.join(30)
    assert codes == ["stopped while it ran"]


def test_names_of_experiments_fit_git(repo):
    short = experiments.experiment_name({"score.name": "kernel", "sample.guidance": 2.0}, "sweep")
    assert short == "sweep-score.name=kernel-sample.guidance=2.0"
    long = {f"train.key{number}": 0.00123457 for number in range(12)}
    names = [experiments.experiment_name({**long, "data.path": path}, "sweep") for path in ("~/a..b", "~/a..c")]
    assert len({*names}) == 2
    assert {len(name) for name in names} == {200}
    for name in [*names, experiments.experiment_name({"data.path": "~/a..b", "x": "c.lock"}, "sweep")]:
        run("git", "update-ref", f"refs/exps/aa/{name}", "HEAD", cwd=repo)


def test_a_stopped_command_gets_time_to_save(tmp_path):
    """It saves for a second after SIGINT, well within the grace period, and is not killed meanwhile."""
    saved = tmp_path / "saved"
    program = (
        "import pathlib, sys, time\n"
        "try:\n    print('ready', flush=True)\n    time.sleep(600)\n"
        f"except KeyboardInterrupt:\n    time.sleep(1)\n    pathlib.Path({str(saved)!r}).write_text('all')\n"
    )

    def stop(text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        command.stream([sys.executable, "-c", program], line=stop, grace=20)
    assert saved.read_text() == "all"


def test_a_flow_in_the_background_of_a_script_lets_its_commands_save(tmp_path):
    """Such a shell starts it with SIGINT ignored, and what it starts would ignore it, too."""
    saved = tmp_path / "saved"
    stage = (
        "import pathlib, time\n"
        "try:\n    print('ready', flush=True)\n    time.sleep(600)\n"
        f"except KeyboardInterrupt:\n    pathlib.Path({str(saved)!r}).write_text('all')\n"
    )
    flow = (
        "import sys; from flows import command\n"
        "def stop(text): raise SystemExit(3)\n"
        f"command.stream([sys.executable, '-c', {stage!r}], line=stop, grace=20)"
    )
    script = f"({shlex.join([sys.executable, '-c', flow])}) & wait $!; exit $?"
    start = time.monotonic()
    done = subprocess.run(["sh", "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert saved.read_text() == "all"
    assert time.monotonic() - start < 15  # the grace period was not needed


# --- the pipeline


def test_an_unchanged_pipeline_runs_nothing_and_has_a_report(repo, client):
    lock = Path("dvc.lock").read_bytes()
    state = pipeline(return_state=True)
    assert state.message == "up to date: first, middle, last"
    assert results() == dict.fromkeys(["first", "middle", "last"], "up to date")
    assert Path("dvc.lock").read_bytes() == lock
    assert "<html" in Path("data/report.html").read_text()
    assert table("metrics") == [
        {"file": "metrics.json", "metric": "fid", "value": 1.0},
        {"file": "metrics.json", "metric": "nested.count", "value": 3},
    ]


def test_the_page_draws_the_pipelines_own_graph(repo, client):
    """Each task's inputs are its upstream stages, and nothing else; the run's name says what was asked for."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter

    state = pipeline(("last",), {"sample.temperature": 0.25}, return_state=True)
    assert state.message == "up to date: first; ran: middle, last"
    with get_client(sync_client=True) as api:
        identifier = state.state_details.flow_run_id
        assert api.read_flow_run(identifier).name == "last; sample.temperature=0.25"
        tasks = api.read_task_runs(flow_run_filter=FlowRunFilter(id={"any_": [identifier]}))
    names = {task.id: task.name for task in tasks}
    inputs = {
        task.name: {names[found.id] for part in task.task_inputs.values() for found in part if hasattr(found, "id")}
        for task in tasks
    }
    assert inputs == {
        "check what changed": set(),
        "stage-first": set(),
        "stage-middle": {"stage-first"},
        "stage-last": {"stage-middle"},
    }


def test_a_half_written_upstream_is_repaired_first(repo, client):
    Path("out/first").unlink()  # as a stage that was killed leaves its output
    Path("out/first").write_text("sou")
    state = pipeline(("last",), force=("last",), return_state=True)
    assert state.message == "restored: first; up to date: middle; ran: last"
    assert Path("out/first").read_text() == "source\nfirst 8\n"
    assert [row["why"] for row in table("stages")] == [
        "outputs: out/first modified",
        "none of its dependencies changed",
        "forced",
    ]


def test_a_failing_stage_fails_the_flow_in_one_line(repo, client):
    state = pipeline(overrides={"sample.temperature": 13}, return_state=True)
    assert state.is_failed()
    assert state.message == (
        "stage 'middle' failed: middle: sample.temperature is 13, which is unlucky; choose another."
    )
    assert results() == {"first": "up to date", "middle": "failed", "last": "not run"}
    assert Path("out/middle").read_text() == "source\nfirst 8\nmiddle 1.0\n"


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"overrides": {"sample.guidnce": 2.0}}, "overrides: sample.guidnce is not a known key"),
        ({"stages": ("lst",)}, "'lst' is not a stage that would run; did you mean last?"),
    ],
)
def test_a_mistake_is_said_before_a_stage_runs(repo, parameters, message):
    Path("source").write_text("changed\n")
    before = {path: path.read_bytes() for path in (Path("params.yaml"), Path("dvc.lock"), Path("out/first"))}
    state = pipeline.fn(**parameters)
    assert state.is_failed()
    assert state.message.startswith(message)
    assert {path: path.read_bytes() for path in before} == before


def test_a_refusal_leaves_the_parameters_as_they_were(repo, client, monkeypatch):
    """Which stages run, and so what must be ready, is known only once the parameters are written."""
    before = Path("params.yaml").read_text()

    def refuse(parameters, stages, keys=()):
        if stages == {"middle", "last"}:
            raise UserError("train.micro_batch_size is 64, but must divide 32.")

    monkeypatch.setattr(readiness, "check", refuse)
    state = pipeline(overrides={"sample.temperature": 0.5}, return_state=True)
    assert state.message == "train.micro_batch_size is 64, but must divide 32."
    assert Path("params.yaml").read_text() == before


def test_a_busy_repository_is_waited_for(repo, client, server):
    edit.apply("params.yaml", {"sample.steps": 50})
    with background(*repository.DVC, "repro", "first", cwd=repo, log=repo / "work.log", env=environment()) as other:
        wait_for(lambda: (repo / "work.log").read_text().count("first at 50"))
        state = pipeline(("first",), return_state=True)
        assert other.wait() == 0
    assert state.message == "up to date: first"


def test_a_lock_file_that_a_killed_dvc_left_half_written_is_deleted(repo):
    Path(".dvc/tmp/rwlock").write_text("")
    edit.apply("params.yaml", {"sample.steps": 9})
    assert repository.reproduce("first", force=False, line=print, variables={}) == "ran"


# --- as a program, stopped and deployed


def test_the_program_runs_what_a_change_reaches(repo, server, client):
    start = [sys.executable, "-m", "flows.pipeline", "--stages", "middle", "--set", "sample.temperature=0.5"]
    done = subprocess.run(start, env=server, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("pipeline: up to date: first; ran: middle (")
    assert "Task run 'stage-middle' - middle is out of date: parameters: sample.temperature modified" in done.stderr
    assert "Task run 'stage-middle' - middle at 0.5" in done.stderr
    assert Path("out/middle").read_text() == "source\nfirst 8\nmiddle 0.5\n"
    assert Path("out/last").read_text() == "source\nfirst 8\nmiddle 1.0\nlast 1.5\n"
    assert table("stages")[1]["why"] == "parameters: sample.temperature modified"
    assert table("metrics")[0]["value"] == 0.25


def test_the_program_refuses_a_wrong_argument_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pipeline", "--set", "sample.steps"])
    assert main() == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "pipeline: 'sample.steps' sets nothing; write SECTION.KEY=VALUE, such as sample.guidance=2.0.\n"


def test_a_server_that_is_down_is_said_in_one_line(repo):
    nowhere = environment(PREFECT_API_URL="http://127.0.0.1:1/api")
    done = subprocess.run([sys.executable, "-m", "flows.pipeline"], env=nowhere, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == (
        "pipeline: PREFECT_API_URL is http://127.0.0.1:1/api, but no Prefect server answers there; start it with "
        "`prefect server start`, or unset PREFECT_API_URL to run without one.\n"
    )


# SIGHUP becomes SIGTERM, which the tests of a cancelled run send.
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)])
def test_a_signal_stops_the_stage_and_its_children(repo, server, number):
    edit.apply("params.yaml", {"sample.steps": 99})
    log = repo.parent / "log"
    start = [sys.executable, "-m", "flows.pipeline", "--stages", "first"]
    with background(*start, cwd=repo, log=log, env=server) as process:
        pids = started_pids(repo)
        assert not gone(pids)
        process.send_signal(number)
        assert process.wait(timeout=120) == 130
    assert gone(pids)
    assert Path("out/first").read_text() == "source\nfirst 8\n"
    assert "busy" not in run(*repository.DVC, "status", cwd=repo)


def test_deployments_run_and_cancel(repo, server):
    for folder in ("flows", "benchmarks"):
        shutil.copytree(ROOT / folder, repo / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "prefect.yaml", repo)
    assert str(ROOT) not in (repo / "prefect.yaml").read_text()

    def prefect(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "prefect", *arguments], cwd=repo, env=server, capture_output=True, text=True
        )

    worker = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "ear", "--type", "process"]
    log = repo.parent / "worker.log"
    with background(*worker, cwd=repo, log=log, env=server | {"PREFECT_WORKER_QUERY_SECONDS": "1"}):
        wait_for(lambda: "started!" in log.read_text())  # it has created the pool
        assert prefect("--no-prompt", "deploy", "--all").returncode == 0
        run_options = ["-p", 'overrides={"sample.temperature": 0.5}', "-p", 'stages=["middle"]']
        watched = prefect("deployment", "run", "pipeline/local", *run_options, "--watch")
        assert watched.returncode == 0, watched.stdout + watched.stderr + log.read_text()
        assert Path("out/middle").read_text() == "source\nfirst 8\nmiddle 0.5\n"
        assert "middle at 0.5" in log.read_text()

        started = prefect("deployment", "run", "pipeline/local", "-p", 'overrides={"sample.steps": 99}')
        identifier = next(word for line in started.stdout.splitlines() if "UUID:" in line for word in line.split()[-1:])
        pids = started_pids(repo)
        assert prefect("flow-run", "cancel", identifier).returncode == 0
        wait_for(lambda: gone(pids))


@pytest.mark.slow
def test_the_program_starts_its_own_server(repo):
    own = {name: value for name, value in environment().items() if not name.startswith("PREFECT_")}
    done = subprocess.run([sys.executable, "-m", "flows.pipeline"], env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("pipeline: up to date: first, middle, last")
    assert (repo / ".prefect/prefect.db").is_file()


# --- experiments


def run_lines(name: str, values: dict, snapshot: experiments.Snapshot) -> list[str]:
    """What the stages of an experiment print."""
    lines: list[str] = []
    experiments.run(name, values, snapshot=snapshot, among=["cpu"], line=lines.append)
    return [line for line in lines if line.split()[0] in ("first", "middle", "last")]


def test_experiments_run_what_never_ran_and_leave_the_workspace(repo):
    """Also with uncommitted edits, a new file in a new folder and a failed run before."""
    Path("notes/today").mkdir(parents=True)
    Path("notes/today/new").write_text("new")
    edit.apply("params.yaml", {"sample.seed": 5})
    status = run("git", "status", "--short", cwd=repo)
    snapshot = experiments.take_snapshot()
    other, both = {"sample.temperature": 0.5}, {"sample.temperature": 0.5, "sample.guidance": 3.0}
    assert run_lines("other", other, snapshot) == ["middle at 0.5", "last at 1.5"]
    with pytest.raises(repository.RepositoryError, match="which is unlucky"):
        experiments.run("broken", {"sample.temperature": 13}, snapshot=snapshot, among=["cpu"], line=print)
    assert run_lines("both", both, snapshot) == ["last at 3.0"]
    assert run_lines("other", other, snapshot) == []
    assert experiments.read(snapshot, "both", "metrics.json") == experiments.read(snapshot, "other", "metrics.json")
    assert experiments.metrics(snapshot, "both") == {"metrics.json": {"fid": 0.25, "nested": {"count": 3}}}
    experiments.fetch(snapshot, "both", "out/last", Path("last"))
    assert Path("last").read_text() == "source\nfirst 8\nmiddle 0.5\nlast 3.0\n"
    Path("last").unlink()
    assert (experiments.COPIES / "cpu/notes/today/new").read_text() == "new"
    assert Path("out/last").read_text() == "source\nfirst 8\nmiddle 1.0\nlast 1.5\n"
    assert run("git", "status", "--short", cwd=repo) == status


def test_an_edit_and_a_commit_in_the_workspace_leave_a_running_sweep_alone(repo):
    """Whoever edits or commits meanwhile, runs and their results stay with code and commit of the snapshot."""
    snapshot = experiments.take_snapshot()
    Path("stage.py").write_text("raise SystemExit('edited')")
    assert run_lines("before", {"sample.guidance": 3.0}, snapshot) == ["last at 3.0"]
    edit.apply("params.yaml", {"sample.steps": 9})
    run("git", "commit", "-qam", "meanwhile", cwd=repo)
    assert run("git", "rev-parse", "HEAD", cwd=repo).strip() != snapshot.commit
    committed = Path("params.yaml").read_text()
    Path("params.yaml").write_text("sample: {half of an edit")
    assert run_lines("after", {"sample.guidance": 4.0}, snapshot) == ["last at 4.0"]
    Path("params.yaml").write_text(committed)
    for name in ("before", "after"):
        assert experiments.metrics(snapshot, name) == {"metrics.json": {"fid": 1.0, "nested": {"count": 3}}}
    assert "steps: 9" not in snapshot.text("params.yaml")
    later = experiments.take_snapshot()
    with pytest.raises(repository.RepositoryError, match="edited"):
        experiments.run("edited", {"sample.guidance": 4.0}, snapshot=later, among=["cpu"], line=print)


def test_experiments_see_inputs_that_git_ignores(repo):
    Path("images").mkdir()
    Path("images/a").write_text("pixels")
    Path(".gitignore").write_text(Path(".gitignore").read_text() + "/images/\n")
    folder = {"data.source": "folder", "data.path": "images"}
    run_lines("ignored", folder, experiments.take_snapshot())
    assert (experiments.COPIES / "cpu/images/a").read_text() == "pixels"
    edit.apply("params.yaml", folder)  # named by the workspace's own parameters, too
    run_lines("named", {"sample.guidance": 3.0}, experiments.take_snapshot())
    assert (experiments.COPIES / "cpu/images/a").read_text() == "pixels"
    with pytest.raises(ValueError, match=r"data\.path is '\.\./images', outside the repository.*absolute path"):
        experiments.run(
            "outside",
            folder | {"data.path": "../images"},
            snapshot=experiments.take_snapshot(),
            among=["cpu"],
            line=print,
        )


def test_a_snapshot_leaves_out_the_inputs_that_parameters_name(repo):
    """They can be millions of images in a folder that git does not ignore."""
    Path("images[1]").mkdir()
    Path("images[1]/a").write_text("pixels")
    Path("notes").write_text("new")
    for path in ("images[1]", str(repo / "images[1]")):
        edit.apply("params.yaml", {"data.source": "folder", "data.path": path})
        listed = run("git", "ls-tree", "-r", "--name-only", experiments.take_snapshot().tree, cwd=repo).split()
        assert "notes" in listed
        assert "images[1]/a" not in listed


def test_an_experiment_waits_for_what_a_killed_flow_left_in_its_copy(repo):
    """Else it would check out other code under the feet of a running stage."""
    snapshot, lines = experiments.take_snapshot(), []
    run_lines("before", {"sample.guidance": 3.0}, snapshot)
    program = [sys.executable, "-c", "import time; time.sleep(3)"]
    orphan = subprocess.Popen(program, cwd=experiments.COPIES / "cpu")
    shell = subprocess.Popen(["sleep", "60"], cwd=experiments.COPIES / "cpu")  # of somebody who looks around there
    started = time.monotonic()
    experiments.run("after", {"sample.guidance": 4.0}, snapshot=snapshot, among=["cpu"], line=lines.append)
    assert orphan.poll() == 0
    assert time.monotonic() - started > 2
    assert lines[0].startswith(f"process {orphan.pid}, perhaps of a killed flow, works in work/experiments/cpu; ")
    assert shell.poll() is None
    shell.kill()


def test_experiments_share_the_folder_of_unfinished_work(repo):
    Path("stage.py").write_text("import os; raise SystemExit(os.environ['EAR_WORK'])")
    with pytest.raises(repository.RepositoryError, match=f"^{repo}/work$"):
        experiments.run("shared", {"sample.steps": 9}, snapshot=experiments.take_snapshot(), among=["cpu"], line=print)


# --- devices


def test_a_device_is_waited_for(repo):
    said: list[str] = []
    with devices.hold(1, ["0", "1"], said.append) as first, devices.hold(1, ["0", "1"], said.append) as second:
        assert (first, second) == (["0"], ["1"])
        waiting = threading.Thread(target=lambda: hold_both(said))
        waiting.start()
        wait_for(lambda: said, 10)
        assert said == ["other runs use 0, 1; this one starts when they end"]
    waiting.join(20)
    assert said[1:] == ["held 0,1"]


def test_runs_on_a_cpu_hold_a_core_per_thread(monkeypatch):
    monkeypatch.setattr(devices, "cores", lambda: 5)
    names = ["cpu-0", "cpu-1", "cpu-2", "cpu-3", "cpu-4"]
    for threads, processes, expected in ((2, 1, 2), (2, 2, 4), (8, 1, 5)):
        values = (f"compute.threads={threads}", f"runtime.processes={processes}", "runtime.device=cpu")
        parameters = compose([*values])
        assert devices.devices(parameters) == names
        assert devices.needed(parameters, names) == expected
        assert devices.needed(parameters, ["0", "1", "2"]) == processes  # GPUs
    assert devices.environment(["cpu-0", "cpu-1"]) == {}


def test_a_run_that_waits_does_not_begin_after_a_stop(repo):
    stopped, ended = threading.Event(), []

    def wait() -> None:
        with pytest.raises(command.StoppedError), devices.hold(1, ["0"], ended.append, stopped):
            raise AssertionError("it has begun")
        ended.append("stopped")

    with devices.hold(1, ["0"], print):
        waiting = threading.Thread(target=wait)
        waiting.start()
        wait_for(lambda: ended, 10)
        stopped.set()
    waiting.join(20)
    assert ended == ["other runs use 0; this one starts when they end", "stopped"]
    with pytest.raises(command.StoppedError):
        experiments.run("late", {}, snapshot=experiments.take_snapshot(), among=["0"], line=print, stopped=stopped)


def test_no_command_begins_after_all_were_stopped():
    stopped = threading.Event()
    command.stop_all(stopped)
    with pytest.raises(command.StoppedError):
        command.stream([sys.executable, "-c", "print(1)"], line=print, stopped=stopped)


def hold_both(said: list[str]) -> None:
    with devices.hold(2, ["0", "1"], said.append) as held:
        said.append(f"held {devices.environment(held)['CUDA_VISIBLE_DEVICES']}")


# --- the sweep


def test_the_grid_holds_every_combination_once():
    assert grid({"sample.guidance": [1.0, 2.0, 1.0], "data.path": ["a b/c"]}) == {
        "sweep-sample.guidance=1.0-data.path=a%20b%2Fc": {"sample.guidance": 1.0, "data.path": "a b/c"},
        "sweep-sample.guidance=2.0-data.path=a%20b%2Fc": {"sample.guidance": 2.0, "data.path": "a b/c"},
    }
    with pytest.raises(ValueError, match=r"data\.path has no values to try"):
        grid({"data.path": []})


def test_a_metric_is_found_by_name_or_file():
    files = {"a.json": {"fid": 3.0, "loss": 1.0}, "b.json": {"loss": 2.0}}
    assert find("fid", files) == 3.0
    assert find("b.json:loss", files) == 2.0
    for value in (None, float("nan"), "text"):
        with pytest.raises(UserError, match=r"'c\.json:fid_ratio' is .*, not a number to compare"):
            find("fid_ratio", {"c.json": {"fid_ratio": value}})
    with pytest.raises(ValueError, match=r"'loss' is in several files; choose a\.json:loss or b\.json:loss"):
        find("loss", files)
    with pytest.raises(ValueError, match=r"'kid' is in no metrics file; there are: a\.json:fid"):
        find("kid", files)


def test_metrics_of_the_evaluation_come_first():
    """As the pipeline has them: the reference has a fid, too."""
    files = {str(path.relative_to(ROOT)): json.loads(path.read_text()) for path in ROOT.glob("data/*/metrics.json")}
    evaluation, reference = (files[f"data/{stage}/metrics.json"] for stage in ("evaluation", "reference"))
    assert find("fid", files) == evaluation["fid"] != reference["fid"]
    assert find("data/reference/metrics.json:fid", files) == reference["fid"]
    assert find("kl", files) == files["data/tokenizer/metrics.json"]["kl"]
    with pytest.raises(UserError, match="'psnr' is in several files; choose"):
        find("psnr", files)


def test_a_sweep_marks_the_best_and_leaves_the_workspace(repo, client):
    """A run that fails, and one without a number, do not end it."""
    program = Path("stage.py")
    program.write_text(program.read_text().replace("value**2", "value**2 if value != 0.25 else None"))
    edit.apply("params.yaml", {"sample.seed": 5})  # an edit that is not committed goes into the runs, and stays
    before = {path: path.read_bytes() for path in map(Path, ("params.yaml", "dvc.lock", "out/last", "metrics.json"))}
    status = run("git", "status", "--short", cwd=repo)
    state = sweep({"sample.temperature": [13, 0.5, 0.25], "sample.guidance": [1.0]}, return_state=True)
    assert state.is_failed()
    assert state.message == (
        "2 of 3 runs failed (sweep-sample.temperature=13-sample.guidance=1.0: middle: sample.temperature is 13, which "
        "is unlucky; choose another.); best fid 0.25: sweep-sample.temperature=0.5-sample.guidance=1.0"
    )
    assert {path: path.read_bytes() for path in before} == before
    assert run("git", "status", "--short", cwd=repo) == status
    with Path("work/sweep/table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["sample.temperature"], row["fid"], row["best"]) for row in rows] == [
        ("13", "", "False"),
        ("0.5", "0.25", "True"),
        ("0.25", "", "False"),
    ]
    assert Path("work/sweep/plot.png").read_bytes().startswith(b"\x89PNG")
    assert table("sweep")[1]["best"] is True
    assert table("sweep")[2]["error"] == "metric 'metrics.json:fid' is None, not a number to compare; choose another."


def rows_of(*fids: float | None) -> list[dict]:
    """Two guidance scales x two training seeds."""
    points = [(scale, seed) for scale in (1.0, 2.0) for seed in (0, 1)]
    return [
        {"experiment": f"e{k}", "sample.guidance": scale, "train.seed": seed, "fid": fid, "best": False, "error": ""}
        for k, ((scale, seed), fid) in enumerate(zip(points, fids, strict=False))
    ]


def test_seeds_are_repetitions_and_the_best_mean_wins():
    rows = rows_of(0.2, 0.6, 0.35, 0.37)  # the best single run is not of the best point
    mark_best(rows, "fid", maximize=False)
    assert [row["best"] for row in rows] == [False, False, True, True]
    assert rows[2]["mean"] == pytest.approx(0.36)
    assert rows[2]["sd"] == pytest.approx(0.02 / 2**0.5)
    mark_best(rows, "fid", maximize=True)
    assert [row["best"] for row in rows] == [True, True, False, False]
    rows = rows_of(0.2, 0.6, 0.1, None)  # one of its runs failed
    mark_best(rows, "fid", maximize=False)
    assert [row["best"] for row in rows] == [True, True, False, False]


def test_the_best_point_is_written_back_without_its_seeds(repo):
    rows = rows_of(0.5, 0.6, 0.35, 0.37)
    mark_best(rows, "fid", maximize=False)
    before = Path("params.yaml").read_text()
    write(rows, ["sample.guidance", "train.seed"], "fid", Path("work/sweep"))
    assert write_back("work/sweep") == {"sample.guidance": 2.0}
    assert Path("params.yaml").read_text() == before.replace("guidance: 1.5", "guidance: 2.0")
    with pytest.raises(UserError, match="run a sweep first"):
        write_back("work/other")


def test_experiments_run_on_several_devices_at_once(repo, client, monkeypatch):
    monkeypatch.setattr("flows.runs.devices", lambda parameters: ["0", "1"])
    state = sweep({"sample.guidance": [50, 1.0, 2.0]}, jobs=2, return_state=True)  # 50: the first takes longest
    assert state.message.startswith("best fid 1: sweep-sample.guidance=50")
    assert [row["sample.guidance"] for row in table("sweep")] == [50, 1.0, 2.0]
    assert sorted(path.name for path in experiments.COPIES.iterdir()) == ["0", "1"]


def test_jobs_train_different_models_first():
    """Two runs of one training would wait for each other."""
    runs = {
        "a": {"train.seed": 0, "sample.guidance": 1.0},
        "b": {"train.seed": 0, "sample.guidance": 2.0},
        "c": {"train.seed": 1, "sample.guidance": 1.0, "evaluate.repeats": 2},
    }
    assert _next(["b", "c"], ["a"], runs) == "c"
    assert _next(["b", "c"], [], runs) == "b"
    assert _next(["b"], ["a"], runs) == "b"


def test_a_sweep_refuses_what_it_cannot_do_before_it_runs(repo, client):
    options = {"parameters": {"sample.guidance": [1.0]}, "return_state": True}
    assert sweep(metric="fdi", **options).message == (
        "metric 'fdi' is in no metrics file; there are: metrics.json:fid, metrics.json:nested.count."
    )
    parameters = config.load("params.yaml")
    cores = devices.devices(parameters)
    most = len(cores) // devices.needed(parameters, cores)
    for jobs in (0, most + 1):
        assert sweep(jobs=jobs, **options).message == (
            f"jobs is {jobs}, but must be 1 to {most} on this machine: each takes runtime.processes GPUs or, without "
            "GPUs, runtime.processes x compute.threads cores; choose another number, or lower compute.threads."
        )
    assert not experiments.COPIES.exists()


# --- search


def test_a_search_space_is_read_and_refused():
    assert space_of(["train.learning_rate=1e-4..1e-2:log", "score.samples=2,4", "sample.steps=4..16"]) == {
        "train.learning_rate": Range(1e-4, 1e-2, logarithmic=True),
        "score.samples": [2, 4],
        "sample.steps": Range(4, 16),
    }
    for text, said in (
        ("sample.steps", "names no range"),
        ("sample.steps=8..4", "two numbers LOW..HIGH"),
        ("sample.guidance=0..2:log", "start above 0"),
    ):
        with pytest.raises(UserError, match=said):
            space_of([text])


def test_every_value_of_a_search_is_checked_before_it_begins(repo):
    for space, said in (
        ({"train.temperature": "0.5..1.5"}, "train.temperature is 1.5"),
        ({"score.name": "energy,kernal"}, "score.name is 'kernal'"),
    ):
        state = search.fn(space)
        assert state.is_failed()
        assert said in state.message
    assert not Path("work/search").exists()
    check_values({"sample.guidance_from": [0.0, 0.8], "sample.guidance_to": [0.2, 1.0]})  # not every pair is refused


def test_a_second_search_of_a_study_is_refused(repo):
    Path("work/search").mkdir(parents=True)
    with FileLock("work/search/lock"):
        state = search.fn({"sample.temperature": "0.1..0.9"})
    assert state.message == "another search works on the study in work/search; wait, or give another --output."


def test_batches_that_processes_cannot_share_are_said_before_hours_of_work():
    parameters = compose(["runtime.processes=3", "runtime.device=cpu"])
    readiness.check(parameters, {"cache", "sample", "evaluate"})
    for stage in ("train", "finetune", "tokenizer"):
        with pytest.raises(UserError, match=r"batch_size is 64, but must be a multiple of 3"):
            readiness.check(parameters, {stage})
    with pytest.raises(UserError, match=r"^runtime\.device is 'cuda', but torch finds no CUDA device"):
        readiness.check(compose(["runtime.device=cuda"]), set(), {"runtime.device"})
    assert {"train", "finetune"} <= readiness.reading({"train.images"}) <= set(readiness.declarations())


def test_whole_bounds_of_a_fraction_are_searched_in_between():
    assert search_typed(Range(1, 4), 1.5) == Range(1.0, 4.0)
    assert isinstance(search_typed(Range(1, 4), 1.5).low, float)
    assert isinstance(search_typed(Range(1, 4), 2).low, int)
    assert search_typed([1, 2], 1.5) == [1, 2]


def test_a_flow_waits_for_its_turn_and_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said, entered = [], threading.Event()

    def second() -> None:
        with turn(said.append):
            entered.set()

    waiting = threading.Thread(target=second)
    with turn(said.append):
        waiting.start()
        assert not entered.wait(1.5)
        assert said == ["another flow works in this repository; this one starts when it ends"]
    assert entered.wait(10)
    waiting.join()


def test_a_range_close_to_one_is_searched_in_steps_that_matter():
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    decays = [search_drawn(study.ask(), "train.ema_decay", Range(0.99, 0.9999)) for _ in range(100)]
    assert len(set(decays)) > 90
    assert 0.99 <= min(decays) < 0.991
    assert 0.999 < max(decays) <= 0.9999


def test_a_search_of_a_metric_that_is_no_number_ends(repo, client):
    """Its trials fail, and as many failures as trials end it."""
    Path("stage.py").write_text(Path("stage.py").read_text().replace("value**2", "None"))
    state = search({"sample.temperature": "0.1..0.9"}, trials=1, return_state=True)
    assert state.message == "no trial succeeded (1 failed); the log above says why"


def test_a_search_finds_the_best_and_goes_on_where_it_stopped_or_was_killed(repo, client):
    space = {"sample.temperature": "0.1..1.5"}
    state = search(space, trials=1, return_state=True)
    assert state.is_completed(), state.message
    study = optuna.load_study(study_name="study", storage="sqlite:///work/search/study.db")
    study.ask().suggest_float("sample.temperature", 0.1, 1.5)  # a kill leaves a running trial
    assert search(space, trials=1, return_state=True).is_completed()  # has enough: the trial only waits
    state = search(space, trials=3, return_state=True)
    assert len(table("search")) == 3
    best = min(row["fid"] for row in table("search"))
    assert state.message.startswith(f"best fid {best:.6g}: search-sample.temperature=")
    assert all(row["fid"] == pytest.approx(row["sample.temperature"] ** 2, rel=1e-2) for row in table("search"))
    assert "temperature: 1.0" in Path("params.yaml").read_text()
    edit.apply("params.yaml", {"sample.steps": 9})
    assert search(space, trials=5, return_state=True).message == (
        "the study in work/search has another metric, space or fixed parameters; give another --output."
    )
    for nothing in ({"space": {}}, {"space": space, "trials": 0}):
        assert "but needs one of each" in search.fn(**nothing).message
    assert search.fn({"sample.temprature": "0.1..1"}).message.startswith(
        "overrides: sample.temprature is not a known key"
    )
