"""Start the gateway's daemon for the first verb that finds none.

The daemon must outlive the exec that started it and hold nothing of it: an exec ends only when the last
holder of its stdout and stderr has closed them. So it gets a session of its own, /dev/null, its log as
stderr (what kills it before it can log is then found there), and the pipe on which it says that it is ready.
"""

import fcntl
import posix
import select
import sys
import time

READY_SECONDS = 10.0
READY_FD = 3
LOCATIONS = (b"NATGW_RUN_DIR", b"NATGW_STATE_DIR", b"NATGW_ENV_FILE", b"NATGW_TOKEN_FILE")
HELP = ("help", "--help", "-h")


def start(run_dir, connect, arguments):
    """A socket connected to a daemon that this call, or another one at the same time, has started.

    Raises OSError; its text is the line to print. Help needs no daemon: this process becomes the one that
    prints it.
    """
    if arguments[:1] and arguments[0] in HELP:
        program = "import sys; from api.execverbs import help_text; sys.stdout.write(help_text())"
        posix.execv(sys.executable, [sys.executable, "-P", "-c", program])
    make_directory(run_dir)
    lock = posix.open(run_dir + "/start.lock", posix.O_RDWR | posix.O_CREAT | posix.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        client = connect(run_dir + "/exec.sock")
        return client if client is not None else launch(run_dir, connect)
    finally:
        posix.close(lock)


def launch(run_dir, connect):
    """Start the daemon, wait until it is ready, connect."""
    log = run_dir + "/natgw.log"
    log_fd = posix.open(log, posix.O_WRONLY | posix.O_CREAT | posix.O_APPEND | posix.O_CLOEXEC, 0o600)
    logged_before = posix.fstat(log_fd).st_size
    readable, writable = posix.pipe()
    child = posix.fork()
    if child == 0:
        try:
            detach(log_fd, writable)
        finally:
            posix._exit(127)
    posix.close(writable)
    posix.waitpid(child, 0)
    ready = wait_ready(readable)
    client = connect(run_dir + "/exec.sock")
    if client is not None:
        return client
    if ready is None:
        raise OSError(f"the daemon was not ready within {READY_SECONDS:.0f} s; see {log}")
    raise OSError(f"the daemon did not start: {last_line(log, logged_before)}; see {log}")


def wait_ready(readable):
    """True: the daemon is ready; False: it has ended; None: neither within READY_SECONDS."""
    poll = select.poll()
    poll.register(readable, select.POLLIN)
    deadline = time.monotonic() + READY_SECONDS
    said = b""
    while not said.endswith(b"\n"):
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            return None
        chunk = posix.read(readable, 16)
        if not chunk:
            return False
        said += chunk
    return True


def detach(log_fd, ready_fd):
    """In the child: a grandchild without parent, terminal or inherited descriptors becomes the daemon."""
    environment = absolute(dict(posix.environ))
    posix.setsid()
    if posix.fork():
        posix._exit(0)
    posix.chdir("/")
    posix.umask(0o077)
    null = posix.open("/dev/null", posix.O_RDWR)
    # First out of the way of 0-3: a caller may have closed any of those.
    aside = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (null, null, log_fd, ready_fd)]
    for target, fd in enumerate(aside):
        posix.dup2(fd, target)
    for name in posix.listdir("/proc/self/fd"):
        if int(name) > READY_FD:
            try:
                posix.close(int(name))
            except OSError:
                continue  # the descriptor of the listing itself
    environment[b"NATGW_READY_FD"] = b"%d" % READY_FD
    try:
        posix.execve(sys.executable, [sys.executable, "-P", "-m", "api.main"], environment)
    except OSError as error:
        posix.write(2, f"{sys.executable}: {error}\n".encode(errors="replace"))


def absolute(environment):
    """The daemon's environment: paths that do not depend on our working directory, and a PATH to find tools."""
    for name in LOCATIONS:
        path = environment.get(name)
        if path and not path.startswith(b"/"):
            environment[name] = posix.getcwdb() + b"/" + path
    environment.setdefault(b"PATH", b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
    return environment


def make_directory(path):
    """Make the run directory, for root alone, and what leads to it."""
    made = ""
    for part in path.split("/"):
        made += part + "/"
        try:
            posix.mkdir(made, 0o700 if made.rstrip("/") == path.rstrip("/") else 0o755)
        except (FileExistsError, IsADirectoryError):
            continue


def last_line(path, offset):
    """The last line written to a file behind ``offset`` bytes."""
    with open(path, "rb") as file:
        file.seek(offset)
        lines = file.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it left no message")
