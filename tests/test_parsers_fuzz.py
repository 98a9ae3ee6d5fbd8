"""Whatever is fed to a parser, it answers or refuses in the one way that it names; nothing else comes out of it.

What goes in is made of what is right, changed in a few places. ``make fuzz`` tries more (``NATGW_FUZZ_CASES``).
"""

from __future__ import annotations

import contextlib
import json
import os
import random
from collections.abc import Callable
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from api.execwire import MAGIC, BadRequest, Request, decode_request
from gateway.arp.frame import ArpFrame, MalformedFrame, announcement, parse
from gateway.bfd.commands import Commands
from gateway.bfd.session import SessionConfig
from gateway.bfd.table import SessionTable
from lab.manifests import read
from rules import nft
from rules.iptables import parse_rule, parse_save, render_rule, render_save
from rules.maps import label, labelled
from rules.ruleset import ChainRef, Foreign
from tests import strategies as some

CASES = int(os.environ.get("NATGW_FUZZ_CASES", "40"))
ROOT = Path(__file__).parent
MANIFESTS = [path.read_text() for path in sorted((ROOT.parent / "examples").glob("*.yaml"))]
LISTINGS = [path.read_text() for path in sorted((ROOT / "goldens/share").glob("*/*.json"))]
FRAME = announcement(b"123456", IPv4Address(1))
REQUEST = "\0".join((MAGIC, "4026531840", "GATEWAY_V4=192.168.0.1", "", "eip-add", "192.168.0.50/24", ""))
COMMANDS = [
    "status level 2 compact",
    "session 1 state down",
    "session all set mintx 300 ms",
    "allow 10.0.1.1",
    "connect local 10.0.1.5 remote 10.0.1.1",
    "session local 10.0.1.5 remote 10.0.1.1 kill",
    "session new set multi 3",
    "log type command no",
    "block 10.0.1.1",
]

fuzz = settings(max_examples=CASES, deadline=None, derandomize=CASES <= 1000, database=None)
pytestmark = pytest.mark.timeout(0 if CASES > 1000 else 120)

scraps = st.one_of(
    st.sampled_from(["", " ", "\n", '"', "\\", "0", "-", "-A", "-j", ":", "*", "\0", "/33", "9" * 5000, "é", "\u2028"]),
    st.text(max_size=6),
)


@st.composite
def changed(draw: st.DrawFn, texts: list[str]) -> str:
    """One of the texts with some of its words or characters replaced, doubled, or gone."""
    text = draw(st.sampled_from(texts))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(text)))
        upto = min(len(text), at + draw(st.integers(0, 12)))
        text = text[:at] + draw(scraps | st.just(text[at:upto] * 2)) + text[upto:]
    return text


@fuzz
@given(some.specs, st.data())
def test_what_iptables_could_print(spec: Any, data: st.DataObject) -> None:
    """A rule is either ours, and then its text says exactly that, or foreign."""
    saved = render_save(some.settled(spec).ruleset)
    text = data.draw(changed([saved]))
    with contextlib.suppress(ValueError):
        parse_save(text)
    line = data.draw(changed([line.split(" ", 2)[2] for line in saved.splitlines() if line.startswith("-A")]))
    rule = parse_rule(line)
    assert rule == Foreign(line) or render_rule(rule) == line


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(["@service-ips", "dnat-a"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["map", "set", "elem", "goto"]), inner),
    max_leaves=5,
)


def replaced(value: Any, choose: Callable[[], bool], other: Callable[[], Any]) -> Any:
    """The value with some of what is in it replaced."""
    if choose():
        return other()
    if isinstance(value, dict):
        return {key: replaced(inner, choose, other) for key, inner in value.items()}
    if isinstance(value, list):
        return [replaced(inner, choose, other) for inner in value]
    return value


@fuzz
@given(st.sampled_from(LISTINGS), st.sampled_from(LISTINGS), st.randoms(use_true_random=False), st.data())
def test_what_nft_could_print(table: str, elements: str, rng: random.Random, data: st.DataObject) -> None:
    texts = [
        json.dumps(replaced(json.loads(text), lambda: rng.random() < 0.03, lambda: data.draw(json_values)))
        for text in (table, elements)
    ]
    try:
        found = nft.parse(*texts)
    except ValueError:
        return
    assert isinstance(found, nft.NftTable)


def test_a_protocol_that_is_none_is_passed_over() -> None:
    match = {"match": {"op": "==", "left": {"meta": {"key": "l4proto"}}, "right": ["x"]}}
    rule = {"rule": {"chain": "dnat-a", "expr": [match, {"dnat": {"addr": 5}}]}}
    element = {"map": {"name": nft.MAP, "elem": [[{"concat": ["192.0.2.1", ["x"], 80]}, 5]]}}
    text = json.dumps(
        {"nftables": [{"chain": {"name": "dnat-a"}}, {"chain": {"name": ["a"]}}, rule, element, {"map": 5}]}
    )
    assert list(nft.parse(text, text).chains) == ["dnat-a"]


@fuzz
@given(changed(LISTINGS))
def test_what_is_no_listing_of_nft_at_all(text: str) -> None:
    with contextlib.suppress(ValueError):
        nft.parse(text, text)


@fuzz
@given(changed(["snat net1 24 random c5cf3226", "ports 16fe8197", "hairpin eth0 1 4b40dcf8", "missed 068fc27f", ""]))
def test_comments_of_rules_that_others_may_write(comment: str) -> None:
    assert label(labelled(comment)) == comment


@fuzz
@given(st.binary(max_size=80) | st.binary(max_size=8).map(lambda more: FRAME + more), st.data())
def test_frames(received: bytes, data: st.DataObject) -> None:
    frame = bytearray(received)
    for _ in range(data.draw(st.integers(0, 3)) if frame else 0):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = parse(bytes(frame))
    except MalformedFrame:
        return
    assert isinstance(found, ArpFrame)
    assert found.encode() == bytes(frame[:42])


@fuzz
@given(changed([REQUEST]))
def test_what_arrives_on_the_exec_socket(text: str) -> None:
    try:
        found = decode_request(text.encode(errors="replace"))
    except BadRequest:
        return
    assert isinstance(found, Request)


def test_a_namespace_of_more_digits_than_an_inode_has_is_refused() -> None:
    with pytest.raises(BadRequest, match="no network namespace"):
        decode_request(REQUEST.replace("4026531840", "9" * 5000).encode())


@fuzz
@given(st.lists(changed(COMMANDS), min_size=1, max_size=5))
def test_commands_to_the_speaker(lines: list[str]) -> None:
    table = SessionTable(SessionConfig(), lambda remote: ["10.0.1.5"], random.Random(1).random)
    commands = Commands(table, lambda happened: None, lambda: None)
    for number, line in enumerate(["allow 10.0.1.1", *lines]):
        assert commands.execute(line, number).endswith("\n")


yaml_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("10.0.0.0/8"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@fuzz
@given(st.sampled_from(MANIFESTS), st.randoms(use_true_random=False), st.data())
def test_manifests_with_values_of_other_kinds(text: str, rng: random.Random, data: st.DataObject) -> None:
    documents = [
        replaced(document, lambda: rng.random() < 0.02, lambda: data.draw(yaml_values))
        for document in yaml.safe_load_all(text)
    ]
    if rng.random() < 0.1:
        documents = [{"kind": "List", "items": data.draw(yaml_values | st.just(documents))}]
    assert read([("fuzz", yaml.safe_dump_all(documents))]) is not None


@fuzz
@given(changed(MANIFESTS))
def test_manifests_with_slips(text: str) -> None:
    assert read([("fuzz", text)]) is not None


def test_chains_that_are_not_declared_are_no_listing() -> None:
    with pytest.raises(ValueError, match="not a line of iptables-save"):
        parse_save("*nat\n-A NOWHERE -j DROP\nCOMMIT\n")
    assert ChainRef("nat", "NOWHERE") not in parse_save("*nat\nCOMMIT\n").chains


@pytest.mark.parametrize(
    "text", ["kind: List\nitems: 5\n", "? [1, 2]\n: 3\n", "2001-99-99", "a: !!int x", "[" * 20_000], ids=range(5)
)
def test_manifests_that_yaml_itself_chokes_on(text: str) -> None:
    (problem,) = read([("fuzz", text)]).problems
    assert problem.startswith("fuzz")
