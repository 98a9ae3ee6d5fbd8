"""One verb: ask the gateway's daemon over its unix socket and say what it answered.

A controller waits for this process once per rule, so nothing is imported that the interpreter does not
hold already; run it with ``python -I -S -B``. The daemon is started when there is none (natgw_start).
The wire is described in api/execwire.py.
"""

import _signal
import _socket
import posix
import sys

DEADLINE_SECONDS = 60
PER_CALL = (b"GATEWAY_V4", b"GATEWAY_V6", b"VPC_INTERFACE", b"EXTERNAL_INTERFACE")


class Failure(Exception):
    """The verb got no answer; the message is the one line to print."""


def connect(path):
    """A connected socket, or None where no daemon listens."""
    client = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        client.connect(path)
    except (FileNotFoundError, ConnectionRefusedError):
        client.close()
        return None
    # Who listens there is asked of the kernel: where others may write to the directory, it could be anybody.
    _pid, uid, _gid = credentials(client)
    if uid not in (0, posix.geteuid()):
        client.close()
        raise Failure(f"user {uid} listens on {path}, who is not the gateway")
    return client


def credentials(client):
    """Process, user and group of who listens (SO_PEERCRED, struct ucred)."""
    said = client.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12)
    return [int.from_bytes(said[at : at + 4], sys.byteorder) for at in (0, 4, 8)]


def request(arguments):
    """The words and the environment of this call as the daemon reads them."""
    words = [b"natgw-exec/1", b"%d" % posix.stat("/proc/self/ns/net").st_ino]
    words += [name + b"=" + posix.environ[name] for name in PER_CALL if posix.environ.get(name)]
    encoding = sys.getfilesystemencoding()
    words += [b"", *(word.encode(encoding, "surrogateescape") for word in arguments), b""]
    return b"\0".join(words)


def exchange(client, message):
    """Send the request; return exit code, stdout and stderr."""
    answer = b""
    try:
        client.sendall(message)
        client.shutdown(_socket.SHUT_WR)
        while chunk := client.recv(65536):
            answer += chunk
    except ConnectionError:
        answer = b""
    parts = answer.split(b"\0")
    if len(parts) != 4:
        raise Failure("the daemon ended before it answered")
    return int(parts[0]), parts[1], parts[2]


def write(descriptor, text):
    """All of ``text``, or as much as somebody reads."""
    try:
        while text:
            text = text[posix.write(descriptor, text) :]
    except OSError:
        return


def too_late(_number, _frame):
    raise Failure(f"no answer within {DEADLINE_SECONDS} s")


def main():
    _signal.signal(_signal.SIGALRM, too_late)
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
    _signal.alarm(DEADLINE_SECONDS)
    run_dir = posix.environ.get(b"NATGW_RUN_DIR", b"").decode(errors="surrogateescape") or "/run/natgw"
    try:
        client = connect(run_dir + "/exec.sock")
        if client is None:
            sys.path.insert(0, __file__.rpartition("/")[0] or ".")
            import natgw_start  # noqa: PLC0415 -- only the first verb of a gateway pays for it

            client = natgw_start.start(run_dir, connect, sys.argv[1:])
        code, out, err = exchange(client, request(sys.argv[1:]))
    except (Failure, OSError) as error:
        code, out, err = 1, b"", f"nat gateway: {run_dir}: {error}\n".encode(errors="replace")
    write(1, out)
    write(2, err)
    # Nothing is buffered and nothing needs to be torn down.
    posix._exit(code)


main()
