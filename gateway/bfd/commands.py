"""The command language of OpenBFDD's ``bfdd-control``: a line of words in, the text of the reply out.

Kube-OVN's scripts, probes and tests speak it and read the replies, so their words are kept. What differs is the role:
OpenBFDD waits for an allowed peer to speak first, we speak to it at once (``(a)`` in ``status``).
Times are integer microseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from gateway.bfd.packet import Diag, State
from gateway.bfd.session import Session, SessionConfig
from gateway.bfd.table import Entry, Happened, SessionTable
from gateway.bfd.udp import canonical

VERSION = "bfdd-beacon (vpc-nat-gateway) 1.0"

STATE_NAMES = {State.ADMIN_DOWN: "AdminDown", State.DOWN: "Down", State.INIT: "Init", State.UP: "Up"}
DIAG_NAMES = {
    Diag.NONE: "No Diagnostic",
    Diag.DETECTION_TIME_EXPIRED: "Control Detection Time Expired",
    Diag.ECHO_FAILED: "Echo Function Failed",
    Diag.NEIGHBOR_SIGNALED_DOWN: "Neighbor Signaled Session Down",
    Diag.FORWARDING_PLANE_RESET: "Forwarding Plane Reset",
    Diag.PATH_DOWN: "Path Down",
    Diag.CONCATENATED_PATH_DOWN: "Concatenated Path Down",
    Diag.ADMINISTRATIVELY_DOWN: "Administratively Down",
    Diag.REVERSE_CONCATENATED_PATH_DOWN: "Reverse Concatenated Path Down",
}
_UNITS = {"s": 1_000_000, "ms": 1_000, "us": 1}
_SETTINGS = {"mintx": "desired_min_tx", "minrx": "required_min_rx", "multi": "detect_mult"}


def diag_name(diag: int) -> str:
    """A diagnostic in words."""
    return DIAG_NAMES.get(Diag(diag), "") if diag in Diag.__members__.values() else f"Diagnostic {diag}"


class _Rejected(Exception):
    """The command cannot be obeyed; the text is the reply."""


class Commands:
    """Obeys commands on a table of sessions.

    ``did`` is given whatever the sessions ask for in consequence, ``stop`` is called for the command of that name.
    """

    def __init__(self, table: SessionTable, did: Callable[[Happened], None], stop: Callable[[], None]) -> None:
        self.log_types = {"command": True, "session": True}
        """Which kinds of lines the log has."""
        self._table = table
        self._did = did
        self._stop = stop
        self._verbs: dict[str, Callable[[list[str], int], str]] = {
            "status": self._status,
            "session": self._session,
            "allow": self._allow,
            "block": self._block,
            "connect": self._connect,
            "log": self._log,
            "version": lambda words, now: VERSION,
            "stop": self._stopped,
        }
        self._actions: dict[str, Callable[[Entry, int], object]] = {
            "kill": lambda entry, now: table.remove(entry),
            "reset": table.reset,
            "suspend": lambda entry, now: entry.session.suspend(),
            "resume": lambda entry, now: did(Happened(entry, entry.session.resume(now))),
        }

    def execute(self, line: str, now: int) -> str:
        """Obey one line; the reply ends with a newline."""
        verb, *words = line.split() or [""]
        handler = self._verbs.get(verb)
        if handler is None:
            return f"Unknown command <{verb}>\n"
        try:
            return handler(words, now) + "\n"
        except _Rejected as reason:
            return f"{reason}\n"

    def _stopped(self, words: list[str], now: int) -> str:
        self._stop()
        return "stopping"

    # Peers

    def _allow(self, words: list[str], now: int) -> str:
        address = _address(words)
        self._table.allow(address, now)
        return f"Allowing connections from {address}"

    def _block(self, words: list[str], now: int) -> str:
        address = _address(words)
        self._table.block(address)
        return f"Blocking connections from {address}. This will not terminate any ongoing session."

    def _connect(self, words: list[str], now: int) -> str:
        pair, _ = _pair(words)
        if pair is None:
            raise _Rejected("Must supply 'local ip remote ip' address pair.")
        local, remote = pair
        if (":" in local) != (":" in remote):
            raise _Rejected(f"Failed to open connection from local {local} to remote {remote}")
        self._table.connect(local, remote, now)
        return f"Opened connection from local {local} to remote {remote}"

    # Sessions

    def _session(self, words: list[str], now: int) -> str:
        if words[:1] == ["new"]:
            if words[1:2] != ["set"]:
                raise _Rejected("'new' can only be used with 'set'.")
            self._table.defaults, reply = _changed(self._table.defaults, words[2:])
            return reply
        entries, rest = self._select(words)
        action, arguments = (rest[0], rest[1:]) if rest else ("", [])
        if action == "set":
            return self._set(entries, arguments, now)
        if action == "state":
            return self._state(entries, arguments, now)
        act = self._actions.get(action)
        if act is None:
            choice = "'set', 'state', 'kill', 'reset', 'suspend' or 'resume'"
            raise _Rejected(f"Must supply session action: {choice}, not <{action}>.")
        for entry in entries:
            act(entry, now)
        return f"Attempting to {action} session(s)."

    def _set(self, entries: list[Entry], words: list[str], now: int) -> str:
        # The words are checked even when no session is there to be changed.
        _, reply = _changed(self._table.defaults, words)
        for entry in entries:
            config, _ = _changed(entry.session.config, words)
            self._did(Happened(entry, entry.session.configure(config, now)))
        return reply

    def _state(self, entries: list[Entry], words: list[str], now: int) -> str:
        wanted = words[0] if words else ""
        if wanted not in ("up", "down", "admin"):
            raise _Rejected("Must supply state: 'up', 'down' or 'admin'.")
        diag = _diag(words[1:], Diag.NONE if wanted == "up" else Diag.PATH_DOWN if wanted == "down" else None)
        for entry in entries:
            session = entry.session
            if wanted == "admin":
                self._did(Happened(entry, session.disable(now, diag)))
            elif wanted == "down":
                # A hold in Down ends a hold in AdminDown; the order keeps the session from moving in between.
                self._did(Happened(entry, session.hold(now, diag)))
                self._did(Happened(entry, session.enable(now)))
            else:
                self._did(Happened(entry, session.release(now)))
                self._did(Happened(entry, session.enable(now)))
        return f"Attempting to put session(s) into {wanted} state with diagnostic <{diag_name(diag)}>."

    # Words of a session

    def _select(self, words: list[str]) -> tuple[list[Entry], list[str]]:
        """The sessions that the first words name, and the words after them."""
        which = words[0] if words else ""
        if which == "all":
            return self._table.entries, words[1:]
        number = _natural(which)
        if number is not None:
            entry = self._table.get(number)
            if entry is None:
                raise _Rejected(f"No session with id={which}.")
            return [entry], words[1:]
        pair, rest = _pair(words)
        if pair is None:
            raise _Rejected("Must supply 'all', session id or 'remote ip local ip' before other settings.")
        entry = self._table.find(*pair)
        if entry is None:
            raise _Rejected(f"No session with local ip={pair[0]} and remote ip={pair[1]}.")
        return [entry], rest

    # Status

    def _status(self, words: list[str], now: int) -> str:
        everything = not words or words[0] == "all"
        entries, rest = self._select(words) if words else (self._table.entries, ["compact"])
        level, compact = 1, False
        while rest:
            option, *rest = rest
            number = _natural(rest[0]) if rest else None
            if option == "level" and number is not None:
                level, rest = number, rest[1:]
            elif option in ("compact", "nocompact"):
                compact = option == "compact"
            elif option != "brief":
                raise _Rejected(f"Unrecognized status setting <{option}>.")
        separator = " " if compact else "\n  "
        lines = [f"There are {len(entries)} sessions:"] if everything else []
        for entry in entries:
            if everything:
                lines.append(f"Session {entry.id}")
            lines.append(" " + separator.join(_described(entry, level, now)))
        return "\n".join(lines)

    def _log(self, words: list[str], now: int) -> str:
        match words:
            case ["type", "list"]:
                return "Available log types:\n" + "\n".join(f" {name}" for name in self.log_types)
            case ["type", name, ("yes" | "no") as value] if name in self.log_types:
                before, self.log_types[name] = self.log_types[name], value == "yes"
                return f"Log type {name} set to {value}, was {'yes' if before else 'no'}"
            case ["type", name, ("yes" | "no")]:
                raise _Rejected(f"Unknown log type: {name}.")
            case _:
                raise _Rejected("Must specify: 'type' followed by 'list' or by a log type and 'yes' or 'no'.")


def _described(entry: Entry, level: int, now: int) -> list[str]:
    session = entry.session
    local = f"id={entry.id} local={entry.local} (a)"
    if level <= 1:
        suffix = ("<Forced>" if _forced(session) else "") + (" <Suspended>" if session.suspended else "")
        return [local, f"remote={entry.remote}", f"state={STATE_NAMES[session.state]}{suffix}"]
    remote, intervals = session.remote, session.intervals
    forced = ("Forced: " if _forced(session) else "") + ("Suspended: " if session.suspended else "")
    fields = [
        local,
        f"remote={entry.remote}",
        f"LocalState={STATE_NAMES[session.state]}<{forced}{diag_name(session.diag)}>",
        f"RemoteState={STATE_NAMES[remote.state]}<{diag_name(remote.diag)}>",
        f"LocalId={session.discriminator}",
        f"RemoteId={remote.discriminator}",
    ]
    if level >= 3:
        fields += [
            f"Time={(now - session.changed_at) / 1_000_000:.3f} s",
            f"CurrentTxInterval={session.transmit_interval:,} us",
            f"CurrentRxTimeout={session.detection_time:,} us",
        ]
    if level >= 4:
        pending_tx = (
            "" if intervals.tx_in_use == intervals.desired_min_tx else f" (pending {intervals.desired_min_tx:,} us)"
        )
        pending_rx = (
            "" if intervals.rx_in_use == intervals.required_min_rx else f" (pending {intervals.required_min_rx:,} us)"
        )
        fields += [
            f"LocalDetectMulti={session.config.detect_mult}",
            f"LocalDesiredMinTx={intervals.tx_in_use:,} us{pending_tx} (def {session.config.desired_min_tx:,} us)",
            f"LocalRequiredMinRx={intervals.rx_in_use:,} us{pending_rx}",
            f"RemoteDetectMulti={remote.detect_mult}",
            f"RemoteDesiredMinTx={remote.min_tx:,} us",
            f"RemoteRequiredMinRx={remote.min_rx:,} us",
            f"PacketsSent={session.packets_sent}",
            f"PacketsReceived={session.packets_received}",
        ]
    return fields


def _forced(session: Session) -> bool:
    return session.held is not None or session.state is State.ADMIN_DOWN


def _natural(text: str) -> int | None:
    """A number of at most ten digits; whatever is longer fits nowhere here."""
    return int(text) if text.isdecimal() and len(text) <= 10 else None


def _address(words: list[str]) -> str:
    if not words:
        raise _Rejected("Must supply an IPv4 or IPv6 address.")
    address = canonical(words[0])
    if address is None:
        raise _Rejected(f"Must supply an IPv4 or IPv6 address. Invalid address <{words[0]}>.")
    return address


def _pair(words: list[str]) -> tuple[tuple[str, str] | None, list[str]]:
    """``local A remote B`` in either order, and the words after it."""
    given = dict(zip(words[0:4:2], words[1:4:2], strict=False))
    if set(given) != {"local", "remote"}:
        return None, words
    return (_address([given["local"]]), _address([given["remote"]])), words[4:]


def _changed(config: SessionConfig, words: list[str]) -> tuple[SessionConfig, str]:
    """The configuration after ``set``, and the reply."""
    name = words[0] if words else ""
    field = _SETTINGS.get(name)
    if field is None:
        raise _Rejected("Must supply item to set: 'mintx', 'minrx' or 'multi'.")
    value = _natural(words[1]) if len(words) > 1 else None
    if value is None:
        raise _Rejected(f"Must supply an integer value for 'set {name}'.")
    if name != "multi":
        unit = words[2] if len(words) > 2 else ""
        if unit not in _UNITS:
            raise _Rejected(f"Must supply a unit after the value {value}: 's', 'ms' or 'us'.")
        value *= _UNITS[unit]
    try:
        changed = replace(config, **{field: value})
    except ValueError as reason:
        raise _Rejected(f"Must supply a value in range for 'set {name}': {reason}.") from None
    return changed, f"Attempting to set {name} to " + (f"{value}." if name == "multi" else f"{value:,} us.")


def _diag(words: list[str], default: Diag | None) -> Diag:
    if default is Diag.NONE and words:
        raise _Rejected("State up can not have diagnostic value. Must supply none.")
    if not words:
        return Diag.ADMINISTRATIVELY_DOWN if default is None else default
    number = _natural(words[0])
    if number is None or number not in Diag.__members__.values():
        raise _Rejected(f"Must supply a diagnostic between 0 and {max(Diag)}.")
    return Diag(number)
