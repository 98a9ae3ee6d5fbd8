"""nat-gateway.sh as it is run: what it sends, how it ends, and how it starts the daemon.

The daemon here is a stand-in found ahead of the real ``api.main``: the real exec server over a service without
a kernel. So no test needs root.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

from api.execverbs import help_text
from api.execwire import Reply, Request, decode_request

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "image" / "rootfs" / "kube-ovn" / "nat-gateway.sh"
HERE = os.stat("/proc/self/ns/net").st_ino
TIMEOUT = 50.0  # seconds; what takes that long hangs

STAND_IN = """
    import asyncio, os, signal
    from concurrent.futures import Future
    from pathlib import Path
    from types import SimpleNamespace

    from api.execserver import ExecServer

    class Service:
        spec = None

        def change(self, edit, *, by, announce=(), dismiss=()):
            future = Future()
            try:
                self.spec = edit(self.spec)
                future.set_result(SimpleNamespace(spec=self.spec))
            except Exception as error:
                future.set_exception(error)
            return future

    async def main():
        run_dir = Path(os.environ["NATGW_RUN_DIR"])
        (run_dir / "natgw.pid").write_text(str(os.getpid()))
        with (run_dir / "starts").open("a") as starts:
            starts.write(f"{os.getpid()}\\n")
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        server = ExecServer(Service(), run_dir, Path(os.environ["NATGW_ENV_FILE"]), "iptables v1.8.9 (legacy)")
        await server.start()
        with os.fdopen(int(os.environ["NATGW_READY_FD"]), "wb") as ready:
            ready.write(b"1\\n")
        await stop.wait()
        await server.close()

    asyncio.run(main())
"""


class Gateway:
    """Directories of one gateway, and a daemon program for its first verb to start."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.run_dir = path / "run"
        self.environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(path / "lib"),
            "NATGW_PYTHON": sys.executable,
            "NATGW_RUN_DIR": str(self.run_dir),
            "NATGW_STATE_DIR": str(path / "state"),
            "NATGW_ENV_FILE": str(path / "nat-gateway.env"),
        }
        self.daemon(STAND_IN)

    def daemon(self, program: str) -> None:
        """Have ``python -m api.main`` run this program; the rest of ``api`` stays what it is."""
        package = self.path / "lib" / "api"
        package.mkdir(parents=True, exist_ok=True)
        (package / "__init__.py").write_text(f"__path__.append({str(ROOT / 'api')!r})\n")
        (package / "main.py").write_text(textwrap.dedent(program))

    def verb(self, *words: str | bytes, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.run(["bash", str(SCRIPT), *words], environment)

    def run(
        self, argv: Sequence[str | bytes], environment: Mapping[str, str] | None = None, cwd: Path = Path("/")
    ) -> subprocess.CompletedProcess[str]:
        """Run to the end of its outputs, as an exec does: until nobody holds them any more."""
        return subprocess.run(
            argv,
            env=self.environment | dict(environment or {}),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )

    @property
    def pid(self) -> int:
        return int((self.run_dir / "natgw.pid").read_text())

    @property
    def starts(self) -> list[str]:
        return (self.run_dir / "starts").read_text().split()

    @property
    def keeper(self) -> int:
        """Process id of the daemon's parent."""
        return int(Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[1])

    def end(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send the daemon a signal, and wait for its end."""
        process = os.pidfd_open(self.pid)
        try:
            signal.pidfd_send_signal(process, number)
            assert select.select([process], [], [], TIMEOUT)[0]  # gone: what is only dying still takes a call
        finally:
            os.close(process)

    def stop(self) -> None:
        """End the daemon for good: with its run directory gone, its keeper starts no other."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            pids = self.starts
            shutil.rmtree(self.run_dir, ignore_errors=True)
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    gateway = Gateway(tmp_path)
    try:
        yield gateway
    finally:
        gateway.stop()


@pytest.fixture(params=["perl", "python"])
def client(request: pytest.FixtureRequest, gateway: Gateway) -> Gateway:
    """The same with one of the two clients: Python's is for machines without Perl."""
    if request.param == "python":
        gateway.environment["NATGW_PERL"] = ""
    return gateway


class OneCall:
    """Listens in the daemon's place, takes one request and answers with given bytes."""

    def __init__(self, gateway: Gateway, answer: bytes) -> None:
        gateway.run_dir.mkdir(mode=0o700)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(gateway.run_dir / "exec.sock"))
        self._listener.listen()
        self._listener.settimeout(TIMEOUT)
        self._answer = answer
        self._thread = threading.Thread(target=self._take)
        self._thread.start()
        self.received = b""

    def _take(self) -> None:
        connection, _ = self._listener.accept()
        with connection:
            while chunk := connection.recv(65536):
                self.received += chunk
            connection.sendall(self._answer)

    def request(self) -> Request:
        """What came in."""
        self._thread.join(TIMEOUT)
        self._listener.close()
        return decode_request(self.received)


def ended(done: subprocess.CompletedProcess[str]) -> tuple[int, str, str]:
    return done.returncode, done.stdout, done.stderr


def one_line(text: str) -> str:
    assert text.endswith("\n")
    assert text.count("\n") == 1
    return text


# --- what is sent and what comes back ---------------------------------------------------------------------


def test_words_arrive_as_they_are(client: Gateway) -> None:
    call = OneCall(client, Reply().encode())
    words = ("eip-add", "", "a b", "*", "$(id)", "'\"", "line\nbreak", "é")
    done = client.verb(*words, b"\xff", GATEWAY_V4="172.18.0.1", GATEWAY_V6="", VPC_INTERFACE="net3", OTHER="x")
    assert ended(done) == (0, "", "")
    assert call.request() == Request(HERE, {"GATEWAY_V4": "172.18.0.1", "VPC_INTERFACE": "net3"}, (*words, "\\xff"))


@pytest.mark.parametrize(
    "reply", [Reply(0, "out\n", ""), Reply(1, "", "err\n"), Reply(7, "x", "y"), Reply(0, "z" * 3_000_000)]
)
def test_the_answer_is_passed_on(client: Gateway, reply: Reply) -> None:
    call = OneCall(client, reply.encode())
    assert ended(client.verb("x")) == (reply.code, reply.stdout, reply.stderr)
    call.request()


@pytest.mark.parametrize("answer", [b"", b"0", b"0\0", Reply(0, "a", "b").encode()[:-1]])
def test_an_answer_that_breaks_off_is_a_failure(client: Gateway, answer: bytes) -> None:
    call = OneCall(client, answer)
    code, out, err = ended(client.verb("init"))
    call.request()
    assert (code, out) == (1, "")
    assert "ended before it answered" in one_line(err)


def test_a_daemon_that_dies_on_the_call(client: Gateway) -> None:
    client.run_dir.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(client.run_dir / "exec.sock"))
        listener.listen()
        listener.settimeout(TIMEOUT)
        with ThreadPoolExecutor(1) as pool:
            verb = pool.submit(client.verb, *(["x" * 100_000] * 15))  # more than a socket buffers
            listener.accept()[0].close()
            code, out, err = ended(verb.result(TIMEOUT))
    assert (code, out) == (1, "")
    assert "ended before it answered" in one_line(err)


def test_nobody_reads_the_output(client: Gateway) -> None:
    call = OneCall(client, Reply(3, "out\n" * 100_000, "").encode())
    done = client.run(["bash", "-c", f"(bash {SCRIPT} x; echo $? >&2) | true"])
    assert done.stderr == "3\n"
    call.request()


@pytest.mark.parametrize(
    ("program", "deadline", "interpreter"),
    [
        ("natgw_verb.pl", "$deadline = {};", ["/usr/bin/perl", "-e"]),
        ("natgw_verb.py", "DEADLINE_SECONDS = {}\n", [sys.executable, "-I", "-S", "-c"]),
    ],
)
def test_an_answer_that_never_comes(gateway: Gateway, program: str, deadline: str, interpreter: list[str]) -> None:
    patient = (SCRIPT.parent / program).read_text()
    assert deadline.format(60) in patient
    gateway.run_dir.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(gateway.run_dir / "exec.sock"))
        listener.listen()
        impatient = patient.replace(deadline.format(60), deadline.format(1))
        code, out, err = ended(gateway.run([*interpreter, impatient, "init"]))
    assert (code, out) == (1, "")
    assert "no answer within 1 s" in one_line(err)


def test_nothing_but_the_answer_is_said_whatever_is_set_for_other_programs(client: Gateway) -> None:
    """No locale of this name is installed, of which Perl would warn; none of these reaches the daemon's words."""
    call = OneCall(client, Reply(0, "é\n", "").encode())
    odd = {"LANG": "xx_YY.UTF-8", "PERL5OPT": "-Mno::such", "PERL_UNICODE": "SDA", "PERLIO": ":crlf", "PYTHONPATH": "/"}
    assert ended(client.verb("x", "é", **odd)) == (0, "é\n", "")
    assert call.request().words == ("x", "é")


def test_a_daemon_that_listens_is_asked_without_a_python(gateway: Gateway) -> None:
    call = OneCall(gateway, Reply(0, "out\n", "").encode())
    assert ended(gateway.verb("x", NATGW_PYTHON="/none")) == (0, "out\n", "")
    call.request()
    code, out, err = ended(gateway.verb("x", NATGW_PYTHON="/none"))
    assert (code, out) == (1, "")
    assert "/none: No such file or directory" in one_line(err)


def test_pythons_client_imports_nothing_but_its_socket() -> None:
    """A controller waits for it once per rule where there is no Perl."""

    def modules(*argv: str) -> set[str]:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-B", "-X", "importtime", *argv],
            env={"NATGW_RUN_DIR": "/proc/self/mem/x"},
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
        lines = (line for line in done.stderr.splitlines() if line.startswith("import time:"))
        return {line.rpartition("|")[2].strip() for line in lines}

    assert modules(str(SCRIPT.parent / "natgw_verb.py"), "init") - modules("-c", "pass") <= {"_socket"}


# --- how the script is found and finds its Python ---------------------------------------------------------


def test_from_anywhere(gateway: Gateway) -> None:
    link = gateway.path / "link.sh"
    link.symlink_to(SCRIPT)
    chain = gateway.path / "chain.sh"
    chain.symlink_to("link.sh")
    directory = gateway.path / "kube-ovn"
    directory.symlink_to(SCRIPT.parent)
    version = (0, "get-iptables-version\niptables v1.8.9 (legacy)\n", "")
    for argv, cwd in (
        (["bash", SCRIPT.name], SCRIPT.parent),
        (["bash", f"./{SCRIPT.name}"], SCRIPT.parent),
        (["bash", str(SCRIPT.relative_to(ROOT))], ROOT),
        (["bash", str(link)], Path("/")),
        (["bash", "chain.sh"], gateway.path),
        (["bash", "kube-ovn/nat-gateway.sh"], gateway.path),
        ([str(SCRIPT)], Path("/")),
        (["env", "-u", "NATGW_PYTHON", "bash", str(link)], Path("/")),
        (["env", "-u", "NATGW_PYTHON", "bash", SCRIPT.name], SCRIPT.parent),
    ):
        assert ended(gateway.run([*argv, "get-iptables-version"], cwd=cwd)) == version, argv
    shell = gateway.run(["/bin/bash", "-c", f"bash {SCRIPT} get-iptables-version"])
    assert ended(shell) == version


def test_a_relative_run_dir(gateway: Gateway) -> None:
    places = {"NATGW_RUN_DIR": "run", "NATGW_STATE_DIR": "state", "NATGW_ENV_FILE": "etc/env"}
    assert ended(gateway.run(["bash", str(SCRIPT), "init"], places, cwd=gateway.path)) == (0, "", "")
    assert ended(gateway.verb("eip-add", "172.18.0.20/16")) == (0, "", "")
    assert (gateway.path / "etc" / "env").exists()
    assert len(gateway.starts) == 1


def test_no_python(gateway: Gateway) -> None:
    lonely = gateway.path / "a" / "b" / "c"
    lonely.mkdir(parents=True)
    shutil.copy(SCRIPT, lonely)
    code, out, err = ended(gateway.run(["bash", str(lonely / SCRIPT.name), "help"], {"NATGW_PYTHON": ""}))
    assert (code, out) == (1, "")
    assert "no Python" in one_line(err)
    assert "NATGW_PYTHON" in err


def test_no_path(gateway: Gateway) -> None:
    """An exec may bring no PATH at all; the daemon still finds its tools."""
    bash = shutil.which("bash")
    assert bash is not None
    assert ended(gateway.run(["env", "-u", "PATH", bash, str(SCRIPT), "init"])) == (0, "", "")
    environment = Path(f"/proc/{gateway.pid}/environ").read_bytes().split(b"\0")
    assert any(entry.startswith(b"PATH=") and b"/usr/sbin:" in entry for entry in environment)


def test_help_needs_no_daemon(gateway: Gateway) -> None:
    for word in ("help", "--help", "-h"):
        assert ended(gateway.verb(word)) == (0, help_text(), "")
    assert not gateway.run_dir.exists()


# --- starting the daemon ----------------------------------------------------------------------------------


def test_the_first_verb_starts_it_and_the_next_ones_use_it(gateway: Gateway) -> None:
    assert ended(gateway.verb("eip-add", "172.18.0.20/16")) == (1, "", "nat gateway not initialized\n")
    assert ended(gateway.verb("init")) == (0, "", "")
    assert ended(gateway.verb("eip-add", "172.18.0.20/16")) == (0, "", "")
    assert len(gateway.starts) == 1
    assert gateway.run_dir.stat().st_mode & 0o777 == 0o700


def test_racing_verbs_start_one(gateway: Gateway) -> None:
    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(lambda _: ended(gateway.verb("init")), range(8)))
    assert set(done) == {(0, "", "")}
    assert len(gateway.starts) == 1


def test_it_holds_nothing_of_the_exec_that_started_it(gateway: Gateway) -> None:
    readable, writable = os.pipe()
    started = subprocess.run(  # ends only when both outputs are closed
        ["bash", str(SCRIPT), "init"],
        env=gateway.environment,
        cwd=gateway.path,
        capture_output=True,
        pass_fds=[writable],
        timeout=TIMEOUT,
        check=False,
    )
    assert (started.returncode, started.stdout, started.stderr) == (0, b"", b"")
    os.close(writable)
    assert os.read(readable, 1) == b""  # nobody holds the other end
    os.close(readable)
    process = Path("/proc") / str(gateway.pid)
    held = {int(fd.name): os.readlink(fd) for fd in (process / "fd").iterdir()}
    assert held[0] == held[1] == "/dev/null"
    assert held[2] == str(gateway.run_dir / "natgw.log")
    assert not [path for path in held.values() if path.startswith("pipe:") or path.endswith("start.lock")]
    assert os.getsid(gateway.pid) == gateway.keeper
    assert os.readlink(process / "cwd") == "/"
    keeper = Path("/proc") / str(gateway.keeper)
    held_by_keeper = {os.readlink(fd) for fd in (keeper / "fd").iterdir()}
    own = {"/dev/null", str(gateway.run_dir / "natgw.log")}
    assert all(path in own or path.startswith(("pipe:", "socket:")) for path in held_by_keeper)


def test_closed_standard_descriptors(gateway: Gateway) -> None:
    done = gateway.run(["bash", "-c", f"bash {SCRIPT} init <&- >&- 2>&-; echo $?"])
    assert ended(done) == (0, "0\n", "")
    assert os.readlink(f"/proc/{gateway.pid}/fd/1") == "/dev/null"


def test_a_killed_one_is_started_again(gateway: Gateway) -> None:
    assert ended(gateway.verb("init")) == (0, "", "")
    keeper = gateway.keeper
    gateway.end()
    assert ended(gateway.verb("init")) == (0, "", "")
    assert len(gateway.starts) == 2
    assert gateway.keeper == keeper
    assert "was ended by signal 9; starting it again" in (gateway.run_dir / "natgw.log").read_text()


def test_one_that_ends_at_once_leaves_its_last_words(gateway: Gateway) -> None:
    gateway.run_dir.mkdir()
    log = gateway.run_dir / "natgw.log"
    log.write_text("old news\n")
    gateway.daemon("import sys; sys.exit('eth0: no such device')")
    code, out, err = ended(gateway.verb("init"))
    assert (code, out) == (1, "")
    assert "did not start: eth0: no such device; see " + str(log) in one_line(err)
    gateway.daemon("import os; os._exit(1)")
    code, out, err = ended(gateway.verb("init"))
    assert (code, out) == (1, "")
    assert "it left no message" in one_line(err)


def test_one_that_cannot_be_imported(gateway: Gateway) -> None:
    gateway.daemon("import no_such_module_at_all")
    code, out, err = ended(gateway.verb("init"))
    assert (code, out) == (1, "")
    assert "no_such_module_at_all" in one_line(err)


def test_a_run_dir_that_cannot_be(gateway: Gateway) -> None:
    gateway.run_dir.write_text("a file")
    code, out, err = ended(gateway.verb("init"))
    assert (code, out) == (1, "")
    assert str(gateway.run_dir) in one_line(err)


def test_a_run_dir_too_long_for_a_socket(gateway: Gateway) -> None:
    run_dir = gateway.path / ("x" * 120)
    code, out, err = ended(gateway.verb("init", NATGW_RUN_DIR=str(run_dir)))
    assert (code, out) == (1, "")
    assert "too long" in one_line(err)


# --- the daemon's keeper ----------------------------------------------------------------------------------


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def test_a_killed_one_comes_back_without_a_verb(gateway: Gateway) -> None:
    assert ended(gateway.verb("init")) == (0, "", "")
    keeper = gateway.keeper
    for number in range(2, 5):
        gateway.end()
        wait_for(lambda number=number: len(gateway.starts) == number, "the next daemon")  # type: ignore[misc]
        assert ended(gateway.verb("init")) == (0, "", "")
        assert children(keeper) == [str(gateway.pid)]  # neither a zombie nor an orphan
    assert len(gateway.starts) == 4


def test_one_that_is_told_to_stop_stays_away(gateway: Gateway) -> None:
    assert ended(gateway.verb("init")) == (0, "", "")
    keeper = os.pidfd_open(gateway.keeper)
    try:
        gateway.end(signal.SIGTERM)
        assert select.select([keeper], [], [], TIMEOUT)[0]
    finally:
        os.close(keeper)
    assert len(gateway.starts) == 1
    assert not (gateway.run_dir / "keep.sock").exists()
    assert ended(gateway.verb("init")) == (0, "", "")
    assert len(gateway.starts) == 2


def test_stopping_the_keeper_stops_the_daemon(gateway: Gateway) -> None:
    assert ended(gateway.verb("init")) == (0, "", "")
    daemon = os.pidfd_open(gateway.pid)
    try:
        os.kill(gateway.keeper, signal.SIGTERM)
        assert select.select([daemon], [], [], TIMEOUT)[0]
    finally:
        os.close(daemon)
    wait_for(lambda: not (gateway.run_dir / "keep.sock").exists(), "the keeper's end")
    assert len(gateway.starts) == 1


def test_a_killed_keeper_is_replaced_when_its_daemon_ends(gateway: Gateway) -> None:
    assert ended(gateway.verb("init")) == (0, "", "")
    keeper = gateway.keeper
    os.kill(keeper, signal.SIGKILL)
    wait_for(lambda: gateway.keeper != keeper, "the keeper's end")
    assert ended(gateway.verb("init")) == (0, "", "")  # the daemon that stands
    assert len(gateway.starts) == 1
    gateway.end()
    assert ended(gateway.verb("init")) == (0, "", "")
    assert len(gateway.starts) == 2


def test_one_that_fails_at_its_return(gateway: Gateway) -> None:
    """It is tried again and again, ever more rarely; a verb tries at once and hears the reason."""
    assert ended(gateway.verb("init")) == (0, "", "")
    gateway.daemon("import sys; sys.exit('eth0: no such device')")
    keeper = gateway.keeper
    gateway.end()
    log = gateway.run_dir / "natgw.log"
    wait_for(lambda: log.read_text().count("eth0: no such device") >= 2, "another attempt")
    code, out, err = ended(gateway.verb("init"))
    assert (code, out) == (1, "")
    assert "did not start: eth0: no such device; see " in one_line(err)
    gateway.daemon(STAND_IN)
    assert ended(gateway.verb("init")) == (0, "", "")
    assert gateway.keeper == keeper


def test_racing_verbs_after_a_death_share_one_daemon(gateway: Gateway) -> None:
    assert ended(gateway.verb("init")) == (0, "", "")
    gateway.end()
    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(lambda _: ended(gateway.verb("init")), range(8)))
    assert set(done) == {(0, "", "")}
    assert len(gateway.starts) == 2


def test_a_keeper_without_its_run_directory_ends_with_the_daemon(gateway: Gateway) -> None:
    assert ended(gateway.verb("init")) == (0, "", "")
    keeper = os.pidfd_open(gateway.keeper)
    try:
        gateway.stop()
        assert select.select([keeper], [], [], TIMEOUT)[0]
    finally:
        os.close(keeper)
    assert not gateway.run_dir.exists()


# --- waiting until it is ready ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def natgw_start() -> ModuleType:
    spec = importlib.util.spec_from_file_location("natgw_start", SCRIPT.parent / "natgw_start.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("said", "ready"), [(b"1", True), (b"", False)])
def test_readiness(natgw_start: ModuleType, said: bytes, ready: bool) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        theirs.sendall(said)
        theirs.close()
        assert natgw_start.wait_ready(ours) is ready


def test_one_that_is_never_ready(natgw_start: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(natgw_start, "READY_SECONDS", 0.1)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert natgw_start.wait_ready(ours) is None
