"""Calls that mean nothing: exit code 1, one line, and neither the kernel nor the spec nor the file has changed."""

from __future__ import annotations

import asyncio
import copy
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from api.execserver import ExecServer
from api.execverbs import VERBS
from api.execwire import Reply, Request
from tests import gateway_kit, malformed

LONGEST = 10_000
"""Characters that a refusal may have, however long the word is that it refuses (each may need ten to be shown)."""


@dataclass
class Face:
    """A gateway over the fake kernel, behind the exec face."""

    gateway: gateway_kit.Gateway
    server: ExecServer
    env_file: Path

    def call(self, *words: str, **environment: str) -> Reply:
        request = Request(os.stat("/proc/self/ns/net").st_ino, environment, words)
        return asyncio.run(self.server.handle(request))

    def state(self) -> object:
        """All that a call may change."""
        kernel, service = self.gateway.kernel, self.gateway.service
        text = self.env_file.read_text() if self.env_file.exists() else None
        return copy.deepcopy((kernel.chains, kernel.links, kernel.addresses, kernel.routes, service.spec, text))


@pytest.fixture(scope="module")
def face(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Face]:
    directory = tmp_path_factory.mktemp("gateway")
    made = gateway_kit.gateway(directory)
    face = Face(made, ExecServer(made.service, directory, directory / "env", "iptables v1.8.9"), directory / "env")
    for line in ("init", "eip-add 192.168.0.50/24", "floating-ip-add 192.168.0.50,10.0.1.9"):
        assert face.call(*line.split()) == Reply()
    yield face
    made.service.close()


def assert_refused(face: Face, words: tuple[str, ...], **environment: str) -> None:
    before, writes = face.state(), face.gateway.kernel.writes
    reply = face.call(*words, **environment)
    assert reply.code == 1
    assert face.gateway.kernel.writes == writes
    if words[0] in VERBS:
        assert reply.stdout == ""
        assert reply.stderr.endswith("\n")
        assert reply.stderr[:-1].isprintable()
        assert "internal error" not in reply.stderr
        assert len(reply.stderr) <= LONGEST
    else:
        assert reply.stderr == ""
        assert reply.stdout.startswith("Unknown command")
        assert reply.stdout.partition("\n")[0].isprintable()
    assert face.state() == before


def test_every_verb_is_tried() -> None:
    assert {*malformed.ADDS, *malformed.DELETES} == set(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_spoiled_rule_is_refused(face: Face, verb: str) -> None:
    for words in malformed.all_calls():
        if words[0] == verb:
            assert_refused(face, words)


@settings(max_examples=300, deadline=None)
@given(malformed.calls())
def test_malformed_calls_are_refused_as_a_whole(face: Face, words: tuple[str, ...]) -> None:
    assert_refused(face, words)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["GATEWAY_V4", "GATEWAY_V6"]), st.sampled_from(malformed.HOSTILE))
def test_malformed_environments_are_refused(face: Face, name: str, value: str) -> None:
    assert_refused(face, ("eip-add", "192.168.0.21/24"), **{name: value})


@pytest.mark.parametrize("value", malformed.HOSTILE)
def test_interfaces_of_the_environment_that_cannot_be_are_refused(face: Face, value: str) -> None:
    if value not in malformed.NAMES:
        assert_refused(face, ("init",), EXTERNAL_INTERFACE=value)


_ANYTHING = st.lists(st.one_of(st.text(max_size=20), st.sampled_from([*malformed.HOSTILE, *VERBS])), max_size=4)
_FIELDS = [value for good, bad in malformed.KINDS.values() for value in (good, *bad)]
_RULES = st.lists(st.sampled_from(["", "--random-fully", *_FIELDS, *malformed.HOSTILE]), max_size=10).map(",".join)


@settings(max_examples=500, deadline=None)
@given(st.one_of(_ANYTHING, st.tuples(st.sampled_from(list(VERBS)), _RULES)))
@example([])
@example(["dnat-del", ",\N{SUPERSCRIPT TWO},"])
def test_whatever_is_called_is_answered(face: Face, words: list[str]) -> None:
    """Whether it means something or not: no crash, no more than one line of complaint, nothing left if refused."""
    before = face.state()
    reply = face.call(*words)
    assert "internal error" not in reply.stderr
    assert reply.stderr.count("\n") == bool(reply.stderr)
    assert reply.code == 1 or reply.stderr == ""
    if reply.code:
        assert face.state() == before
