"""Have the gateway's daemon started for a verb that finds none.

The daemon and its keeper (natgw_keeper) must outlive the exec that started them and hold nothing of it: an exec ends
only when the last holder of its stdout and stderr has closed them. So the keeper gets a session of its own and
/dev/null. Here is also where it is found to be running already, about to start the next daemon.
"""

import _socket
import fcntl
import posix
import select
import sys

READY_SECONDS = 30.0  # a start takes one second of a processor, which may have others to serve
LISTENER_FD = 3
LOCATIONS = (
    *(b"NATGW_RUN_DIR", b"NATGW_STATE_DIR", b"NATGW_ENV_FILE", b"NATGW_TOKEN_FILE"),
    *(b"NATGW_TLS_CERT", b"NATGW_TLS_KEY", b"NATGW_TLS_CLIENT_CA"),
)
OWN_FILE = posix.O_CREAT | posix.O_NOFOLLOW | posix.O_CLOEXEC  # no link that others may have laid leads us away
HELP = ("help", "--help", "-h")


def start(run_dir, connect, arguments):
    """A socket connected to a daemon that this call, another one at the same time, or the keeper has started.

    Raises OSError; its text is the line to print. Help needs no daemon: this process becomes the one that
    prints it.
    """
    if arguments[:1] and arguments[0] in HELP:
        program = "import sys; from api.execverbs import help_text; sys.stdout.write(help_text())"
        posix.execv(sys.executable, [sys.executable, "-P", "-c", program])
    make_directory(run_dir)
    lock = posix.open(run_dir + "/start.lock", posix.O_RDWR | OWN_FILE, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        client = connect(run_dir + "/exec.sock")
        return client if client is not None else launch(run_dir, connect)
    finally:
        posix.close(lock)


def launch(run_dir, connect):
    """Ask the keeper for a daemon, wait until it is ready, connect. Where there is no keeper, start one."""
    log = run_dir + "/natgw.log"
    log_fd = posix.open(log, posix.O_WRONLY | posix.O_APPEND | OWN_FILE, 0o600)
    logged_before = posix.fstat(log_fd).st_size
    posix.close(log_fd)
    child = None
    while True:
        keeper = connect(run_dir + "/keep.sock")
        if keeper is None:
            child = start_keeper(run_dir)
            keeper = connect(run_dir + "/keep.sock")
        ready = keeper is not None and wait_ready(keeper)
        # The keeper that was found may have been about to end with a daemon that was told to stop: then ours is next.
        if ready is not False or child is not None or "keep.sock" in posix.listdir(run_dir):
            break
    client = connect(run_dir + "/exec.sock") if ready else None
    if client is not None:
        return client
    if ready is None:
        raise OSError(f"the daemon was not ready within {READY_SECONDS:.0f} s; see {log}")
    if child is not None:
        posix.waitpid(child, 0)  # it has given up; PID 1 might not reap it
    # A keeper that was there may have been at an attempt already, and that one have said why before we looked.
    since = logged_before if child is not None else 0
    raise OSError(f"the daemon did not start: {last_line(log, since)}; see {log}")


def wait_ready(keeper):
    """True: the daemon is ready; False: it has ended; None: neither within READY_SECONDS."""
    poll = select.poll()
    poll.register(keeper.fileno(), select.POLLIN)
    if not poll.poll(READY_SECONDS * 1000):
        return None
    try:
        return bool(keeper.recv(1))
    except ConnectionError:
        return False


def start_keeper(run_dir):
    """Fork the keeper with a socket that callers reach from now on; its process id."""
    path = run_dir + "/keep.sock"
    if "keep.sock" in posix.listdir(run_dir):
        posix.unlink(path)  # of one that was killed
    listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        listener.bind(path)
        listener.listen(64)
        child = posix.fork()
        if child == 0:
            try:
                become_keeper(run_dir, listener.fileno())
            finally:
                posix._exit(127)
        return child
    finally:
        listener.close()


def become_keeper(run_dir, listener):
    """In the child: no terminal, no inherited descriptors, nothing that depends on where the verb was called."""
    program = absolute_path(__file__.rpartition("/")[0] or ".") + "/natgw_keeper.py"
    run_dir = absolute_path(run_dir)
    environment = absolute(dict(posix.environ))
    posix.setsid()
    posix.chdir("/")
    posix.umask(0o077)
    null = posix.open("/dev/null", posix.O_RDWR)
    # First out of the way of 0-3: a caller may have closed any of those.
    aside = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (null, null, null, listener)]
    for target, fd in enumerate(aside):
        posix.dup2(fd, target)
    for name in posix.listdir("/proc/self/fd"):
        if int(name) > LISTENER_FD:
            try:
                posix.close(int(name))
            except OSError:
                continue  # the descriptor of the listing itself
    posix.execve(sys.executable, [sys.executable, "-I", "-S", "-B", program, run_dir], environment)


def absolute_path(path):
    return path if path.startswith("/") else posix.getcwd() + "/" + path


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
