"""Flows: read from the kernel's messages, named, written to the log, chosen by filters."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.observer import ctnetlink
from gateway.observer.config import ConfigError, parse
from gateway.observer.flow import Counters, Endpoints, Flow, Identity, Recorder, labels, pack, unpack
from gateway.observer.table import FlowTable
from tests.observer_kit import (
    DESTROY,
    ICMP,
    NEW,
    UDP,
    UPDATE,
    address,
    attribute,
    body,
    flow,
    flows,
    message,
    tuple_attribute,
)
from tests.watcher_kit import Book

IDENTITY = Identity("ns", "gateway", "pod", 'no"de')
MOMENT = 1_766_000_000_123_456_789


def read(datagram: bytes, sequence: int = 0) -> list[tuple[str, Flow | None]]:
    buffer = memoryview(bytearray(datagram + b"rubbish"))
    return [
        (said.kind, ctnetlink.translated_flow(buffer, said.start, said.end))
        for said in ctnetlink.messages(buffer, len(datagram), sequence)
    ]


@given(flows(), st.booleans())
def test_a_message_says_what_the_kernel_put_into_it(wanted: Flow, flagged: bool) -> None:
    assert read(message(NEW, body(wanted, flagged))) == [("new", wanted)]


def test_events_are_told_apart_and_dumps_by_their_number() -> None:
    one, two = flow(1), flow(2, counters=Counters(1, 64, 1, 80), protocol=ICMP, ports=(0, 0))
    datagram = message(NEW, body(one)) + message(UPDATE, body(one)) + message(DESTROY, body(two))
    assert read(datagram) == [("new", one), ("update", one), ("destroy", two)]
    dump = message((0x100, 2), body(one), 5) + message((0x100, 2), body(two), 5)
    assert read(dump, 5) == [("dumped", one), ("dumped", two)]
    assert read(dump) == []
    assert read(datagram, 5) == []


def test_the_end_of_a_dump_and_refusals() -> None:
    def ends(kind: int, code: int) -> list[tuple[str, int]]:
        datagram = message((kind, 2), struct.pack("=i", code), 9)
        return [(said.kind, said.code) for said in ctnetlink.messages(memoryview(datagram), len(datagram), 9)]

    assert ends(3, 0) == [("done", 0)]
    assert ends(3, -4) == [("failed", 4)]
    assert ends(2, -1) == [("failed", 1)]
    (said,) = ends(2, 0)
    assert said[0] == "failed", "nobody asked for an acknowledgement"


def test_what_is_not_translated_is_no_flow() -> None:
    assert read(message(NEW, body(flow(snat=None)))) == [("new", None)]


def test_translation_shows_in_the_tuples_or_in_the_status() -> None:
    untouched = flow(snat=None)
    for status, nat in ((0x10, 1), (0x20, 2), (0x30, 3)):
        said = body(untouched._replace(nat=status >> 4))
        assert read(message(NEW, said)) == [("new", untouched._replace(nat=nat))]
    port_only = flow(snat=None)
    moved = port_only._replace(nat=1, translated=port_only.translated._replace(source_port=1025))
    assert read(message(NEW, body(moved._replace(nat=0)))) == [("new", moved)]


@given(st.binary(max_size=300))
def test_rubbish_is_refused_and_nothing_else_happens(datagram: bytes) -> None:
    try:
        read(datagram)
    except ctnetlink.Malformed:
        return


@given(flows(), st.data())
def test_damaged_messages_are_refused_or_read(wanted: Flow, data: st.DataObject) -> None:
    damaged = bytearray(message(NEW, body(wanted)))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
    for datagram in (bytes(damaged), cut):
        try:
            found = read(datagram)
        except ctnetlink.Malformed:
            continue
        for _, one in found:
            if one is not None:
                json.loads(Recorder(IDENTITY).line("start", one, MOMENT))
                assert unpack(pack(one), one.identifier, one.zone, one.counters) == one


def test_tuples_of_two_families_are_refused() -> None:
    four, six = flow().original, Endpoints(address("::1"), address("::2"), 1, 2)
    said = struct.pack("=BBH", 2, 0, 0) + tuple_attribute(1, 6, four) + tuple_attribute(2, 6, six)
    with pytest.raises(ctnetlink.Malformed, match="families"):
        read(message(NEW, said + attribute(12, bytes(4))))


@given(flows())
def test_packed_flows_come_back(wanted: Flow) -> None:
    assert unpack(pack(wanted), wanted.identifier, wanted.zone, wanted.counters) == wanted


def test_labels() -> None:
    both = flow(dnat=("10.9.9.9", 8443))
    assert labels(both) == ("ipv4", "tcp", "snat_dnat")
    assert labels(flow(protocol=UDP, snat=None, dnat=("10.9.9.9", 53))) == ("ipv4", "udp", "dnat")
    six = flow(source="fd00::2", destination="2001:db8::1", snat="2001:db8::5", protocol=58, ports=(0, 0))
    assert labels(six) == ("ipv6", "icmpv6", "snat")
    names = {number: labels(flow(protocol=number)).protocol for number in (1, 6, 17, 132, 47)}
    assert names == {1: "icmp", 6: "tcp", 17: "udp", 132: "sctp", 47: "other"}


def test_a_line_of_the_log_is_the_schema_to_the_letter() -> None:
    line = Recorder(IDENTITY).line("start", flow(42, zone=7), MOMENT).decode()
    assert line == (
        '{"schemaVersion":"v1","timestamp":"2025-12-17T19:33:20.123456Z","event":"start","conntrackID":42,"zone":7,'
        '"namespace":"ns","name":"gateway","pod":"pod","node":"no\\"de","addressFamily":"ipv4","protocol":"tcp",'
        '"protocolNumber":6,"natType":["snat"],'
        '"original":{"sourceIP":"10.0.0.2","sourcePort":12345,"destinationIP":"192.0.2.10","destinationPort":443},'
        '"translated":{"sourceIP":"198.51.100.5","sourcePort":12345,"destinationIP":"192.0.2.10",'
        '"destinationPort":443}}\n'
    )


def test_counters_zero_ports_and_ipv6_in_the_log() -> None:
    six = flow(
        source="fd00:0::2",
        destination="2001:db8::1",
        snat="2001:db8::5",
        protocol=58,
        ports=(0, 0),
        counters=Counters(1, 104, 0, 0),
        dnat=("fd00::9", 0),
    )
    record = json.loads(Recorder(IDENTITY).line("end", six, MOMENT))
    assert record["natType"] == ["dnat", "snat"]
    assert record["original"] == {"sourceIP": "fd00::2", "destinationIP": "2001:db8::1"}
    assert record["translated"] == {"sourceIP": "2001:db8::5", "destinationIP": "fd00::9"}
    assert record["counters"] == {"originalPackets": 1, "originalBytes": 104, "replyPackets": 0, "replyBytes": 0}
    assert (record["protocol"], record["protocolNumber"]) == ("icmpv6", 58)


# Configuration and filters


def config(log: dict[str, Any] | None = None, **changed: Any) -> bytes:
    document = {
        "namespace": "ns",
        "name": "gateway",
        "externalNetwork": "ns/external",
        "observability": {"conntrack": {"log": {"enabled": True, **(log or {})}}},
        **changed,
    }
    return json.dumps(document).encode()


def lets_through(one: Flow, **filters: Any) -> bool:
    return parse(config({"filters": filters})).log.filters.let_through(one)


def test_a_whole_configuration() -> None:
    whole = parse(
        config(
            observability={
                "resources": {"limits": {"cpu": "200m"}},
                "interfaceMetrics": {"enabled": True},
                "conntrack": {
                    "metrics": {"enabled": True},
                    "log": {"enabled": True, "events": ["end"], "rateLimit": {"recordsPerSecond": 50, "burst": 7}},
                },
                "unknown": 1,
            }
        )
    )
    assert (whole.namespace, whole.name, whole.external_network) == ("ns", "gateway", "ns/external")
    assert whole.interface_metrics
    assert whole.flow_metrics
    assert (whole.log.events, whole.log.rate, whole.log.burst) == ({"end"}, 50, 7)


def test_defaults() -> None:
    bare = parse(config(observability=None))
    assert not any((bare.interface_metrics, bare.flow_metrics, bare.log.enabled, bare.watches_flows))
    log = parse(config({"events": [], "rateLimit": {"recordsPerSecond": 0}, "filters": None})).log
    assert (log.events, log.rate, log.burst) == ({"start", "end"}, 100, 1000)
    assert parse(config()).watches_flows


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b"\xff\xfe", "JSON"),
        (b"[" * 100_000, "JSON"),
        (b"[]", "object"),
        (config(namespace=""), "required"),
        (config(name=None), "required"),
        (config(name=3), "name"),
        (config(observability=[]), "observability"),
        (config({"enabled": "yes"}), "conntrack.log.enabled"),
        (config({"enabled": 1}), "conntrack.log.enabled"),
        (config({"events": "start"}), "conntrack.log.events"),
        (config({"events": [1]}), r"conntrack.log.events\[0\]"),
        (config({"rateLimit": {"burst": True}}), "rateLimit.burst"),
        (config({"rateLimit": {"burst": 1.5}}), "rateLimit.burst"),
        (config({"filters": {"include": [3]}}), r"filters.include\[0\]"),
        *(
            (config({"filters": {"exclude": [{"original": {"sourceCIDRs": [cidr]}}]}}), r"sourceCIDRs\[0\]")
            for cidr in (
                "10.0.0.1",
                "10.0.0.0/33",
                "10.0.0.0/08",
                "10.0.0/8",
                "::/129",
                "x/8",
                "/8",
                "10.0.0.0/None",
                "",
            )
        ),
    ],
)
def test_a_configuration_that_cannot_be_used_is_named(text: bytes, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse(text)


FIELDS = [
    "namespace",
    "name",
    "externalNetwork",
    "observability",
    "conntrack",
    "log",
    "filters",
    "include",
    "original",
    "sourceCIDRs",
    "sourcePorts",
    "start",
]


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(FIELDS), inner),
    )
)
def test_any_json_is_read_or_refused(document: object) -> None:
    try:
        parse(json.dumps(document))
    except ConfigError:
        return


def test_without_filters_everything_is_let_through() -> None:
    assert lets_through(flow())
    assert lets_through(flow(), include=[], exclude=[])
    assert lets_through(flow(), include=[{}])
    assert not lets_through(flow(), exclude=[{}])


def test_exclude_comes_first_and_one_include_suffices() -> None:
    only_udp, only_tcp = {"protocols": ["udp"]}, {"protocols": ["tcp", "sctp"]}
    assert lets_through(flow(), include=[only_udp, only_tcp])
    assert not lets_through(flow(), include=[only_udp])
    assert not lets_through(flow(), include=[only_tcp], exclude=[only_tcp])


@pytest.mark.parametrize(
    ("rule", "matches"),
    [
        ({"addressFamilies": ["ipv4"]}, True),
        ({"addressFamilies": ["ipv6"]}, False),
        ({"natTypes": ["snat"]}, True),
        ({"natTypes": ["dnat"]}, True),
        ({"natTypes": ["snat_dnat"]}, True),
        ({"original": {"sourceCIDRs": ["10.0.0.0/8"]}}, True),
        ({"original": {"sourceCIDRs": ["10.0.0.99/24"]}}, True),
        ({"original": {"sourceCIDRs": ["10.0.1.0/24", "10.0.0.2/32"]}}, True),
        ({"original": {"sourceCIDRs": ["10.0.1.0/24", "::/0"]}}, False),
        ({"original": {"destinationCIDRs": ["192.0.2.0/28"], "destinationPorts": [{"start": 443, "end": 443}]}}, True),
        ({"original": {"destinationPorts": [{"start": 1, "end": 442}, {"start": 444, "end": 65535}]}}, False),
        ({"original": {"sourcePorts": [{"start": 12345, "end": 12346}]}}, True),
        ({"translated": {"sourceCIDRs": ["198.51.100.5/32"], "destinationCIDRs": ["10.9.9.9/32"]}}, True),
        ({"translated": {"destinationPorts": [{"start": 443, "end": 443}]}}, False),
        ({"protocols": ["tcp"], "natTypes": ["snat"], "original": {"sourceCIDRs": ["11.0.0.0/8"]}}, False),
        ({"original": {"sourceCIDRs": ["0.0.0.0/0"]}}, True),
    ],
)
def test_a_rule_asks_for_everything_it_names(rule: dict[str, Any], matches: bool) -> None:
    assert lets_through(flow(dnat=("10.9.9.9", 8443)), include=[rule]) is matches


def test_snat_dnat_means_both() -> None:
    assert not lets_through(flow(), include=[{"natTypes": ["snat_dnat"]}])
    assert not lets_through(flow(), include=[{"natTypes": ["dnat"]}])


def test_a_rule_without_ports_fits_a_flow_without_ports() -> None:
    ping = flow(protocol=ICMP, ports=(0, 0))
    assert lets_through(ping, include=[{"protocols": ["icmp"]}])
    assert lets_through(ping, include=[{"original": {"sourcePorts": [{"start": 0, "end": 10}]}}])
    assert not lets_through(ping, include=[{"original": {"sourcePorts": [{"start": 1, "end": 65535}]}}])


def test_lines_are_lines() -> None:
    line = Recorder(Identity("a\nb", "", "", "")).line("start", flow(), MOMENT)
    assert re.fullmatch(rb"[^\n]+\n", line)


def what_comes_of(read: Callable[[memoryview, int, int], Flow | None], said: bytes) -> object:
    """The flow that is read, or that it is refused."""
    try:
        return read(memoryview(b"#" + said + b"rubbish"), 1, 1 + len(said))
    except ctnetlink.Malformed:
        return ctnetlink.Malformed


@given(st.lists(flows(), min_size=1, max_size=6), st.data())
def test_what_is_read_at_once_is_what_is_read_whole(some: list[Flow], data: st.DataObject) -> None:
    """Also of others of the same length, and whatever has become of one on its way."""
    reader = ctnetlink.FlowReader()
    for one in [*some, *some]:
        said = body(one)
        damaged = bytearray(said)
        damaged[data.draw(st.integers(0, len(said) - 1))] ^= data.draw(st.integers(1, 255))
        for each in (said, bytes(damaged)):
            assert what_comes_of(reader.read, each) == what_comes_of(ctnetlink.translated_flow, each)


def test_the_usual_message_is_read_at_once_when_one_has_been_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = ctnetlink.FlowReader()
    one, other = flow(1), flow(2, source="10.0.0.9", counters=Counters(1, 60, 2, 120))
    six = flow(3, source="fd00::2", destination="2001:db8::1", snat="2001:db8::2")
    known = (one, other, six)
    for each in known:
        assert what_comes_of(reader.read, body(each)) == each
    monkeypatch.setattr(ctnetlink, "translated_flow", None)
    for each in known:
        like = each._replace(identifier=9, protocol=UDP, counters=each.counters and Counters(9, 600, 7, 500))
        assert what_comes_of(reader.read, body(like)) == like
    untranslated = flow(5, snat=None)
    assert what_comes_of(reader.read, body(untranslated)) is None


@given(st.lists(flows(), min_size=1, max_size=8), st.integers(0, 3))
def test_a_glance_says_what_the_whole_message_says_or_nothing(some: list[Flow], cut: int) -> None:
    glance = ctnetlink.Glance()
    for one in [*some, *some]:
        said = memoryview(bytearray(body(one)))
        seen = glance.at(said, 0, len(said))
        if seen is not None:
            whole = ctnetlink.translated_flow(said, 0, len(said))
            assert whole is not None
            assert (whole.zone, whole.identifier, whole.counters) == (0, *seen)
        glance.learn(said, 0, len(said))
        if cut:
            glance.at(said[: len(said) - cut], 0, len(said) - cut)  # nothing is read behind the end


def test_a_glance_knows_the_usual_message_when_it_has_seen_one() -> None:
    glance = ctnetlink.Glance()
    one = flow(counters=Counters(1, 60, 2, 120))
    first, second = (memoryview(bytearray(body(f))) for f in (one, one._replace(counters=Counters(9, 600, 7, 500))))
    assert glance.at(first, 0, len(first)) is None
    glance.learn(first, 0, len(first))
    assert glance.at(second, 0, len(second)) == (one.identifier, Counters(9, 600, 7, 500))


@pytest.mark.parametrize("table", [FlowTable(lambda event, one: None), Book()])
def test_what_a_dump_tells_unchanged_lives_and_what_has_changed_is_read(table: FlowTable | Book) -> None:
    one = flow(counters=Counters(1, 60, 0, 0))
    table.begin_dump()
    assert not table.unchanged(one.identifier, Counters(1, 60, 0, 0)), "it is not known"
    table.dumped(one)
    table.end_dump()
    table.begin_dump()
    assert not table.unchanged(one.identifier, Counters(2, 120, 0, 0))
    assert table.unchanged(one.identifier, Counters(1, 60, 0, 0))
    table.end_dump()
    assert len(table) == 1
    table.begin_dump()
    table.end_dump()
    assert len(table) == 0
