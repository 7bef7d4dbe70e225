"""The launcher with small stand-in programs: health, dead children, and nothing left behind."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from tensorguard.errors import ConfigurationError, UnavailableError
from tensorguard.stack.launcher import Launcher
from tensorguard.stack.ports import free_port, require_free
from tensorguard.stack.process import ServiceSpec
from tensorguard.stack.progress import ConsoleProgress

# Serves /health, and has a child of its own in the same process group, as vLLM has an engine core.
SERVER = """
import http.server, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
open(sys.argv[2], "w").write(str(child.pid))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *a): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def spec_of(tmp_path: Path, code: str = SERVER, name: str = "stand-in", **options: float) -> ServiceSpec:
    port = free_port()
    command = (sys.executable, "-c", code, str(port), str(tmp_path / f"{name}.child"))
    return ServiceSpec(name, command, f"127.0.0.1:{port}", health_path="/health", **options)


def wait_gone(pid: int) -> None:
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.05)
    raise AssertionError(f"process {pid} is still there")


def test_healthy_services_and_nothing_left_behind(tmp_path: Path) -> None:
    with Launcher(tmp_path / "logs") as launcher:
        launcher.start(spec_of(tmp_path, name="one"), spec_of(tmp_path, name="two"))
        pids = [process.pid for process in launcher.processes]
        pids += [int((tmp_path / f"{name}.child").read_text()) for name in ("one", "two")]
        assert all(psutil.pid_exists(pid) for pid in pids)
    for pid in pids:
        wait_gone(pid)


def test_one_service_is_stopped_and_the_others_go_on(tmp_path: Path) -> None:
    with Launcher(tmp_path / "logs") as launcher:
        launcher.start(spec_of(tmp_path, name="one"), spec_of(tmp_path, name="two"))
        one, two = launcher.processes
        launcher.stop("one")
        wait_gone(one.pid)
        assert [process.spec.name for process in launcher.processes] == ["two"]
        launcher.check_alive()
        launcher.start(spec_of(tmp_path, name="one"))
        assert psutil.Process(two.pid).status() != psutil.STATUS_ZOMBIE
        assert len(launcher.processes) == 2


def test_an_exception_stops_everything(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), Launcher(tmp_path) as launcher:
        launcher.start(spec_of(tmp_path))
        child = int((tmp_path / "stand-in.child").read_text())
        raise RuntimeError
    wait_gone(child)


def test_a_program_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SERVER
    with Launcher(tmp_path) as launcher:
        launcher.start(spec_of(tmp_path, stubborn, stop_seconds=0.2))
        pid = launcher.processes[0].pid
    wait_gone(pid)


def test_a_child_that_dies_shows_the_end_of_its_log(tmp_path: Path) -> None:
    failing = "import sys; print('error: the adapter is missing'); sys.exit(3)"
    with Launcher(tmp_path) as launcher:
        with pytest.raises(UnavailableError) as failed:
            launcher.start(spec_of(tmp_path, failing))
        assert "exit code 3" in failed.value.message
        assert "error: the adapter is missing" in failed.value.message
        assert str(tmp_path / "stand-in.log") in failed.value.message


def test_a_child_that_dies_later_is_noticed(tmp_path: Path) -> None:
    with Launcher(tmp_path) as launcher:
        launcher.start(spec_of(tmp_path))
        launcher.check_alive()
        os.kill(launcher.processes[0].pid, signal.SIGKILL)
        with pytest.raises(UnavailableError, match="SIGKILL"):
            launcher.wait()


def test_a_child_that_is_never_healthy(tmp_path: Path) -> None:
    with Launcher(tmp_path) as launcher, pytest.raises(UnavailableError, match=r"not healthy after 0\.3 s"):
        launcher.start(spec_of(tmp_path, "import time; time.sleep(60)", start_seconds=0.3))


def test_a_foreign_answer_on_the_port_is_not_health(tmp_path: Path) -> None:
    with Launcher(tmp_path / "a") as other, Launcher(tmp_path / "b") as launcher:
        other_spec = spec_of(tmp_path)
        other.start(other_spec)
        dead = ServiceSpec("dead", (sys.executable, "-c", ""), other_spec.address, health_path="/health")
        with pytest.raises(UnavailableError):
            launcher.start(dead)
            launcher.wait()


def test_a_program_that_does_not_exist(tmp_path: Path) -> None:
    with Launcher(tmp_path) as launcher, pytest.raises(ConfigurationError, match="/nowhere/python"):
        launcher.start(ServiceSpec("x", ("/nowhere/python",), "127.0.0.1:1"))


def test_the_previous_log_is_kept(tmp_path: Path) -> None:
    for text in ("first", "second"):
        with Launcher(tmp_path) as launcher, pytest.raises(UnavailableError):
            launcher.start(spec_of(tmp_path, f"print('{text}')"))
    assert (tmp_path / "stand-in.log.1").read_text() == "first\n"
    assert (tmp_path / "stand-in.log").read_text() == "second\n"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_children_die_with_the_launcher(tmp_path: Path, number: signal.Signals) -> None:
    spec = spec_of(tmp_path)
    script = f"""
import sys, time
from pathlib import Path
from tensorguard.stack.launcher import Launcher
from tensorguard.stack.process import ServiceSpec
launcher = Launcher(Path({str(tmp_path)!r}))
launcher.start(ServiceSpec("stand-in", {spec.command!r}, {spec.address!r}, health_path="/health"))
print(launcher.processes[0].pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        child = int((tmp_path / "stand-in.child").read_text())
        assert psutil.pid_exists(pid) and psutil.pid_exists(child)
        parent.send_signal(number)
    wait_gone(pid)
    wait_gone(child)


def test_a_busy_port_names_the_option() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        with pytest.raises(ConfigurationError, match="--port"):
            require_free("127.0.0.1", holder.getsockname()[1], "the gateway", "--port")
    require_free("127.0.0.1", free_port(), "the gateway", "--port")


def test_progress_prints_each_state_once_on_a_plain_stream() -> None:
    stream = io.StringIO()
    with ConsoleProgress(Console(file=stream)) as progress:
        progress.update("attestor", "waiting")
        for _ in range(5):
            progress.update("attestor", "starting", "127.0.0.1:7401")
        progress.update("attestor", "healthy", "127.0.0.1:7401")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert "starting" in lines[0] and "healthy" in lines[1]
