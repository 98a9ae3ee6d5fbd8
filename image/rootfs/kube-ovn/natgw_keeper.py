"""Keep the gateway's daemon running: `python3 -I -S -B natgw_keeper.py RUN_DIR`, a listening socket as descriptor 3.

A gateway's pod runs `sleep` as its first process: nothing there would start the daemon again, nor reap what a dying
daemon leaves behind. This process is the daemon's parent and adopts (PR_SET_CHILD_SUBREAPER) what it forked.

A daemon that ends by itself with 0, or on SIGTERM or SIGINT, was told to stop, and its keeper ends with it. After any
other end it is started again: the first time at once, after further ends within seconds with a delay that grows. One
that never became ready is given up: whoever asked for it is told, and the next verb tries anew, perhaps with other
settings.

Who connects to the socket asks for a daemon, which cuts a delay short. `1` is the answer when verbs are taken; a
connection closed without it says that the daemon just started has ended.
"""

import _signal
import _socket
import ctypes
import fcntl
import posix
import select
import sys
import time

LISTENER_FD = READY_FD = 3
STEADY_SECONDS = 10.0
FIRST_DELAY, LONGEST_DELAY = 0.25, 30.0
STOPPED = (0, -_signal.SIGTERM, -_signal.SIGINT)
PR_SET_CHILD_SUBREAPER = 36


class Keeper:
    """One daemon, those who wait for it, and when it is to be started next."""

    def __init__(self, run_dir, listener):
        self.run_dir = run_dir
        self.listener = listener
        self.home = posix.stat(run_dir + "/keep.sock").st_ino
        self.pid = None
        self.ready = None  # the pipe on which a starting daemon says that it takes verbs
        self.serving = False
        self.proven = False
        self.stopping = False
        self.failures = 0
        self.started = self.start_at = 0.0
        self.waiting = []
        self.why = ""
        # Signals only wake the loop, through this pipe; their handlers do nothing.
        self.wakeup, written = posix.pipe()
        for fd in (self.wakeup, written):
            posix.set_blocking(fd, False)
        _signal.signal(_signal.SIGCHLD, lambda *_: None)
        for number in (_signal.SIGTERM, _signal.SIGINT):
            _signal.signal(number, self.stop)
        _signal.set_wakeup_fd(written, warn_on_full_buffer=False)

    def stop(self, *_):
        """SIGTERM to the keeper is meant for the daemon."""
        self.stopping = True
        if self.pid:
            posix.kill(self.pid, _signal.SIGTERM)

    def run(self):
        """Until the daemon is told to stop, has never become ready, or its run directory is gone; the exit code."""
        while True:
            if self.pid is None:
                if self.stopping or not self.at_home():
                    return 0
                if time.monotonic() >= self.start_at:
                    self.start()
            self.wait()
            code = self.reap()
            if code is None:
                continue
            if self.stopping or code in STOPPED:
                return 0
            if not self.proven:
                return 1
            self.ended(code)

    def at_home(self):
        """Whether this is still the keeper that verbs reach: not if the container's files have gone."""
        try:
            return posix.stat(self.run_dir + "/keep.sock").st_ino == self.home
        except OSError:
            return False

    def wait(self):
        """For a signal, a caller, or word from the daemon; no longer than until the next start."""
        poll = select.poll()
        for fd in (self.wakeup, self.listener.fileno(), self.ready):
            if fd is not None:
                poll.register(fd, select.POLLIN)
        delay = None if self.pid is not None else max(0.0, self.start_at - time.monotonic()) * 1000
        woken = [fd for fd, _ in poll.poll(delay)]
        if self.wakeup in woken:
            posix.read(self.wakeup, 512)
        if self.ready in woken:
            self.hear()
        if self.listener.fileno() in woken:
            self.accept()

    def hear(self):
        """The daemon says that it takes verbs, or has closed the pipe without it: then its end is near."""
        said = posix.read(self.ready, 16)
        posix.close(self.ready)
        self.ready = None
        if said:
            self.serving = self.proven = True
            self.answer(b"1")

    def accept(self):
        fd, _ = self.listener._accept()
        self.waiting.append(_socket.socket(fileno=fd))
        self.start_at = 0.0
        if self.serving and self.takes_verbs():
            self.answer(b"1")  # else it is dying: the answer is for its successor to give

    def takes_verbs(self):
        probe = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        try:
            probe.connect(self.run_dir + "/exec.sock")
        except OSError:
            return False
        finally:
            probe.close()
        return True

    def answer(self, text):
        for caller in self.waiting:
            try:
                caller.sendall(text)
            except OSError:
                continue  # it did not wait
            finally:
                caller.close()
        self.waiting.clear()

    def start(self):
        """Start the daemon. Its stderr and ours is its log, opened anew each time because the daemon rotates it."""
        log = posix.open(
            self.run_dir + "/natgw.log", posix.O_WRONLY | posix.O_CREAT | posix.O_APPEND | posix.O_NOFOLLOW
        )
        posix.dup2(log, 2)
        posix.close(log)
        if self.why:
            posix.write(2, log_line(f"the daemon {self.why}; starting it again"))
        self.ready, writable = posix.pipe()
        self.started = time.monotonic()
        pid = posix.fork()
        if pid == 0:
            try:
                become_daemon(writable)
            finally:
                posix._exit(127)
        posix.close(writable)
        self.pid = pid
        if self.stopping:  # since we looked
            posix.kill(pid, _signal.SIGTERM)

    def reap(self):
        """Take the end of every child and orphan; the exit code of the daemon if it was among them, else None."""
        ended = None
        while True:
            try:
                pid, status = posix.waitpid(-1, posix.WNOHANG)
            except ChildProcessError:
                return ended
            if pid == 0:
                return ended
            if pid == self.pid:
                ended = posix.waitstatus_to_exitcode(status)

    def ended(self, code):
        """Note how the daemon ended, and when to start the next."""
        now = time.monotonic()
        self.why = f"was ended by signal {-code}" if code < 0 else f"ended with {code}"
        self.failures = 0 if now - self.started >= STEADY_SECONDS else self.failures + 1
        delay = min(LONGEST_DELAY, FIRST_DELAY * 2 ** (self.failures - 2)) if self.failures > 1 else 0.0
        if self.serving and self.waiting:
            delay = 0.0
        else:
            self.answer(b"")
        self.pid, self.serving, self.start_at = None, False, now + delay
        if self.ready is not None:
            posix.close(self.ready)
            self.ready = None


def log_line(message):
    """A warning as the daemon writes one, by NATGW_LOG; the messages here need no escaping."""
    if posix.environ.get(b"NATGW_LOG") == b"json":
        now = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
        return f'{{"time": "{now}", "level": "warning", "logger": "natgw", "message": "{message}"}}\n'.encode()
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    return f"{now} WARNING natgw: {message}\n".encode()


def become_daemon(ready):
    """In the child. What cannot be executed says so in the log."""
    posix.dup2(ready, READY_FD)
    environment = dict(posix.environ)
    environment[b"NATGW_READY_FD"] = b"%d" % READY_FD
    try:
        posix.execve(sys.executable, [sys.executable, "-P", "-m", "api.main"], environment)
    except OSError as error:
        posix.write(2, f"{sys.executable}: {error}\n".encode(errors="replace"))


def main():
    # Out of the way of the descriptor on which the daemon says that it is ready.
    listener = _socket.socket(fileno=fcntl.fcntl(LISTENER_FD, fcntl.F_DUPFD_CLOEXEC, 10))
    posix.close(LISTENER_FD)
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    keeper = Keeper(sys.argv[1], listener)
    code = keeper.run()
    if keeper.at_home():
        posix.unlink(keeper.run_dir + "/keep.sock")
    keeper.answer(b"")  # last: who hears it looks whether there is a keeper still
    return code


# Nothing is buffered and nothing needs to be torn down.
posix._exit(main())
