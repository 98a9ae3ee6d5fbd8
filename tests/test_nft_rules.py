"""Rules as nf_tables expressions: what is written is read back the same, and nothing of it is overlooked."""

from __future__ import annotations

import struct

from hypothesis import assume, given
from hypothesis import strategies as st

from gateway.kernel.netlink import attribute, messages
from gateway.kernel.nft_reading import rule as read
from gateway.kernel.nft_rules import counted, expressions
from gateway.kernel.nft_tables import handle_of
from rules.iptables import parse_rule, render_rule
from rules.ruleset import AnyRule, Destination, DestinationPort, Dnat, Drop, Jump, Rule, Source
from tests import strategies as some

MAPPING = Rule((Destination("192.168.0.10/32"), DestinationPort("udp", 53)), Dnat("10.0.1.5", 5353))


@given(some.kernel_rules | some.any_rules)
def test_what_is_written_is_read_back(rule: AnyRule) -> None:
    written = expressions(rule)
    if written is not None:
        assert read(written) == rule
        assert parse_rule(render_rule(rule)) == rule  # and every tool could print it


def test_rules_of_a_gateway_are_spoken() -> None:
    assert expressions(MAPPING)
    assert expressions(Rule((Destination("192.168.0.10/32"),), Dnat("10.0.1.5")))


@given(st.binary(min_size=8, max_size=8), st.binary(min_size=8, max_size=8))
def test_a_counter_does_not_matter(packets: bytes, octets: bytes) -> None:
    written = expressions(MAPPING)
    assert written is not None
    zeros = counted(bytes(8), bytes(8))
    assert zeros in written
    assert read(written.replace(zeros, counted(packets, octets))) == MAPPING


@given(some.kernel_rules, st.data())
def test_other_bytes_are_another_rule_or_none(rule: Rule, data: st.DataObject) -> None:
    written = expressions(rule)
    assume(written is not None)
    assert written is not None
    at = data.draw(st.integers(0, len(written) - 1))
    bit = data.draw(st.integers(0, 7))
    other = bytearray(written)
    other[at] ^= 1 << bit
    zeros = counted(bytes(8), bytes(8))
    found = read(bytes(other))
    if found is not None:
        # A count is no part of the rule; every other bit is.
        assert expressions(found) == other or abs(written.index(zeros) + len(zeros) / 2 - at) <= len(zeros) / 2
        assert (expressions(found) == written) == (found == rule)


@given(st.binary(max_size=200))
def test_anything_at_all_is_read_without_an_error(raw: bytes) -> None:
    assert read(raw) is None
    assert handle_of(memoryview(raw)) >= 0


def test_what_iptables_could_not_print_is_not_spoken() -> None:
    for rule in (
        Rule((Destination("192.168.0.10/24"),), Drop()),  # host bits
        Rule((DestinationPort("tcp", 1), Source("10.0.0.1/32")), Drop()),  # out of order
        Rule((Source("10.0.0.1/32"), Source("10.0.0.1/32")), Drop()),
        Rule((), Dnat("10.0.1.999")),
        Rule((), Dnat("10.1", 80)),
        Rule((), Dnat("10.0.1.5", 1 << 16)),
        Rule((), Jump("A\nCOMMIT")),
    ):
        assert expressions(rule) is None


def test_a_message_of_the_kernel_has_a_handle() -> None:
    body = bytes(4) + attribute(1, b"nat\0") + attribute(2, b"C\0") + attribute(3, struct.pack(">Q", 77))
    ((_, said),) = messages(struct.pack("=IHHII", 16 + len(body), 1, 0, 0, 0) + body)
    assert handle_of(said) == 77
