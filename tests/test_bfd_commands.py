"""The words of bfdd-control and the replies that Kube-OVN's scripts, probes and tests rely on."""

from __future__ import annotations

import random
import re

import pytest

from gateway.bfd.commands import Commands, diag_name
from gateway.bfd.packet import ControlPacket, Diag, State
from gateway.bfd.session import SessionConfig
from gateway.bfd.table import Happened, SessionTable

LOCAL, PEER = "10.0.1.5", "10.0.1.1"
LOCAL6, PEER6 = "fd00::5", "fd00::1"


class Desk:
    """Commands on a table with one address of each family; what the sessions asked for, and whether to stop."""

    def __init__(self) -> None:
        self.now = 0
        self.happened: list[Happened] = []
        self.stopped = 0
        self.table = SessionTable(
            SessionConfig(), lambda remote: [LOCAL6 if ":" in remote else LOCAL], random.Random(1).random
        )
        self.commands = Commands(self.table, self.happened.append, self._stop)

    def _stop(self) -> None:
        self.stopped += 1

    def __call__(self, line: str) -> str:
        return self.commands.execute(line, self.now)

    def bring_up(self, index: int = 0) -> None:
        session = self.table.entries[index].session
        for state in (State.DOWN, State.INIT):
            session.receive(
                ControlPacket(
                    state=state,
                    detect_mult=3,
                    my_discriminator=7,
                    your_discriminator=session.discriminator,
                    desired_min_tx=100_000,
                    required_min_rx=100_000,
                ),
                self.now,
            )


@pytest.fixture
def desk() -> Desk:
    return Desk()


def test_an_empty_table(desk: Desk) -> None:
    assert desk("status") == "There are 0 sessions:\n"


def test_the_configuration_that_the_supervisor_sends(desk: Desk) -> None:
    assert desk("session new set mintx 100 ms") == "Attempting to set mintx to 100,000 us.\n"
    assert desk("session new set minrx 200 ms") == "Attempting to set minrx to 200,000 us.\n"
    assert desk("session new set multi 5") == "Attempting to set multi to 5.\n"
    assert desk(f"allow {PEER}") == f"Allowing connections from {PEER}\n"
    assert desk(f"allow {PEER6}") == f"Allowing connections from {PEER6}\n"
    assert desk("log type command no") == "Log type command set to no, was yes\n"
    assert desk.commands.log_types["command"] is False
    assert {entry.session.config for entry in desk.table.entries} == {SessionConfig(100_000, 200_000, 5)}


@pytest.mark.parametrize(("value", "microseconds"), [("2 s", 2_000_000), ("70 ms", 70_000), ("55555 us", 55_555)])
def test_units(desk: Desk, value: str, microseconds: int) -> None:
    assert desk(f"session new set mintx {value}") == f"Attempting to set mintx to {microseconds:,} us.\n"
    assert desk.table.defaults.desired_min_tx == microseconds


def test_status_has_a_line_per_session_with_its_fields(desk: Desk) -> None:
    desk(f"allow {PEER}")
    desk(f"allow {PEER6}")
    desk.bring_up()
    reply = desk("status")
    assert reply.splitlines()[0] == "There are 2 sessions:"
    assert re.findall(r"^Session (\d+)$", reply, re.MULTILINE) == ["1", "2"]
    fields = [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in reply.splitlines()]
    assert [line for line in fields if line] == [
        {"id": "1", "local": LOCAL, "remote": PEER, "state": "Up"},
        {"id": "2", "local": LOCAL6, "remote": PEER6, "state": "Down"},
    ]


def test_status_of_one_session(desk: Desk) -> None:
    desk(f"allow {PEER}")
    for selector in ("1", f"local {LOCAL} remote {PEER}", f"remote {PEER} local {LOCAL}"):
        assert desk(f"status {selector} compact") == f" id=1 local={LOCAL} (a) remote={PEER} state=Down\n"
    assert desk(f"status remote {PEER6} local {LOCAL6}").startswith("No session with ")
    assert desk("status 9") == "No session with id=9.\n"


def test_detailed_status_tells_every_interval(desk: Desk) -> None:
    desk("session new set mintx 100 ms")
    desk(f"allow {PEER}")
    desk.bring_up()
    desk("session all set mintx 300 ms")
    reply = desk("status all level 4 compact")
    for field in (
        "LocalState=Up<No Diagnostic>",
        "RemoteState=Init<No Diagnostic>",
        "RemoteId=7",
        "CurrentTxInterval=100,000 us",
        "LocalDesiredMinTx=100,000 us (pending 300,000 us) (def 300,000 us)",
        "RemoteRequiredMinRx=100,000 us",
    ):
        assert field in reply


def test_blocked_and_killed_means_gone(desk: Desk) -> None:
    desk(f"allow {PEER}")
    assert desk(f"block {PEER}").startswith(f"Blocking connections from {PEER}. ")
    assert desk("status").startswith("There are 1 sessions:"), "blocking ends no session"
    assert desk("session all kill") == "Attempting to kill session(s).\n"
    assert desk("status") == "There are 0 sessions:\n"
    desk(f"allow {PEER}")
    assert desk("status").startswith("There are 1 sessions:\n")


def test_reset_gives_another_id(desk: Desk) -> None:
    desk(f"allow {PEER}")
    assert desk(f"session local {LOCAL} remote {PEER} reset") == "Attempting to reset session(s).\n"
    assert [entry.id for entry in desk.table.entries] == [2]


def test_set_on_sessions_that_exist(desk: Desk) -> None:
    desk(f"allow {PEER}")
    desk.bring_up()
    desk("session 1 set mintx 60 ms")
    (happened,) = desk.happened
    assert happened.output.packet is not None
    assert happened.output.packet.desired_min_tx == 60_000
    assert desk.table.defaults == SessionConfig(), "new sessions are another matter"


def test_states_by_hand(desk: Desk) -> None:
    desk(f"allow {PEER}")
    session = desk.table.entries[0].session
    desk.bring_up()
    assert desk("session all state down").endswith("down state with diagnostic <Path Down>.\n")
    assert (session.state, session.diag) == (State.DOWN, Diag.PATH_DOWN)
    desk.bring_up()
    assert "state=Down<Forced>" in desk("status"), "and held there"
    desk("session all state admin")
    assert (session.state, session.diag) == (State.ADMIN_DOWN, Diag.ADMINISTRATIVELY_DOWN)
    desk("session all state down 6")
    assert (session.state, session.diag) == (State.DOWN, Diag.CONCATENATED_PATH_DOWN)
    desk("session all state up")
    desk.bring_up()
    assert "state=Up" in desk("status")


def test_suspend_and_resume(desk: Desk) -> None:
    desk(f"allow {PEER}")
    desk("session all suspend")
    assert desk.table.tick(0)[0].output.packet is None
    assert "<Suspended>" in desk("status")
    desk("session all resume")
    assert desk.happened[-1].output.packet is not None


def test_connect_needs_no_allow(desk: Desk) -> None:
    assert desk(f"connect local {LOCAL} remote {PEER}") == f"Opened connection from local {LOCAL} to remote {PEER}\n"
    assert len(desk.table) == 1
    assert desk(f"connect local {LOCAL} remote {PEER6}").startswith("Failed to open connection ")


def test_stop(desk: Desk) -> None:
    assert desk("stop") == "stopping\n"
    assert desk.stopped == 1


@pytest.mark.parametrize(
    ("line", "begin"),
    [
        ("", "Unknown command "),
        ("frobnicate now", "Unknown command <frobnicate>"),
        ("allow", "Must supply"),
        ("allow nonsense", "Must supply"),
        ("block 300.1.1.1", "Must supply"),
        ("connect local 10.0.0.1", "Must supply"),
        ("session", "Must supply"),
        ("session all", "Must supply session action"),
        ("session all explode", "Must supply session action"),
        ("session 77 reset", "No session "),
        ("session new kill", "'new' can only"),
        ("session new set", "Must supply item to set"),
        ("session new set colour 3", "Must supply item to set"),
        ("session new set mintx", "Must supply an integer"),
        ("session new set mintx ten ms", "Must supply an integer"),
        (f"session new set mintx {'9' * 6000} ms", "Must supply an integer"),
        (f"session {'9' * 6000} reset", "Must supply"),
        ("session new set mintx 10", "Must supply a unit"),
        ("session new set mintx 10 weeks", "Must supply a unit"),
        ("session new set mintx 0 ms", "Must supply a value in range"),
        ("session new set minrx 5000 s", "Must supply a value in range"),
        ("session new set multi 0", "Must supply a value in range"),
        ("session new set multi 256", "Must supply a value in range"),
        ("session all state", "Must supply state"),
        ("session all state sideways", "Must supply state"),
        ("session all state down 99", "Must supply a diagnostic"),
        ("session all state up 3", "State up can not"),
        ("status all level", "Unrecognized status setting"),
        ("log level debug", "Must specify"),
        ("log type gossip no", "Unknown log type"),
    ],
)
def test_what_cannot_be_obeyed_is_said_and_changes_nothing(desk: Desk, line: str, begin: str) -> None:
    desk(f"allow {PEER}")
    before = desk("status all level 4")
    assert desk(line).startswith(begin)
    assert desk("status all level 4") == before
    assert desk.table.defaults == SessionConfig()


def test_diagnostics_have_names_and_unknown_ones_a_number() -> None:
    assert [diag_name(diag) for diag in (0, 1, 8)] == [
        "No Diagnostic",
        "Control Detection Time Expired",
        "Reverse Concatenated Path Down",
    ]
    assert diag_name(31) == "Diagnostic 31"
