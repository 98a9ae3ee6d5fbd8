"""Rules as entries of a legacy table: what is written is read back the same, and nothing of it is overlooked."""

from __future__ import annotations

import struct

from hypothesis import assume, given
from hypothesis import strategies as st

from gateway.kernel import ipt_table
from gateway.kernel.ipt_entries import content, entry, offsets, rule
from gateway.kernel.xtables import Info
from rules.iptables import parse_rule, render_rule
from rules.ruleset import (
    BUILTIN,
    AnyRule,
    ChainRef,
    Destination,
    DestinationPort,
    Dnat,
    Drop,
    Goto,
    InInterface,
    Jump,
    Return,
    Rule,
    Rules,
    Source,
)
from tests import strategies as some

MAPPING = Rule((Destination("192.168.0.10/32"), DestinationPort("udp", 53)), Dnat("10.0.1.5", 5353))


def read(raw: bytes, named: dict[int, str] | None = None) -> Rule | None:
    target_at, length = offsets(raw, 0)
    return rule(raw[:length], target_at, (named or {}).get)


@given(some.kernel_rules | some.any_rules)
def test_what_is_written_is_read_back(wanted: AnyRule) -> None:
    written = entry(wanted)
    if written is not None:
        assert offsets(written, 0)[1] == len(written)
        assert parse_rule(render_rule(wanted)) == wanted  # and every tool could print it
        if isinstance(wanted, Rule) and not isinstance(wanted.target, Drop | Return):  # these libiptc makes a number of
            assert read(written) == wanted


@given(some.kernel_rules, st.data())
def test_other_bytes_are_another_rule_or_none(wanted: Rule, data: st.DataObject) -> None:
    written = entry(wanted)
    assume(written is not None and not isinstance(wanted.target, Drop | Return))
    assert written is not None
    at = data.draw(st.integers(0, len(written) - 1).filter(lambda at: not 88 <= at < 92))  # the lengths
    other = bytearray(written)
    other[at] ^= 1 << data.draw(st.integers(0, 7))
    found = read(bytes(other))
    if found is not None:
        again = entry(found)
        assert again is not None
        assert content(again) == content(bytes(other))
        assert (found == wanted) == (content(again) == content(written))


def test_what_iptables_could_not_print_is_not_spoken() -> None:
    for wanted in (
        Rule((Destination("192.168.0.10/24"),), Drop()),  # host bits
        Rule((DestinationPort("tcp", 1), Source("10.0.0.1/32")), Drop()),  # out of order
        Rule((Source("10.0.0.1/32"), Source("10.0.0.1/32")), Drop()),
        Rule((InInterface("a b"),), Drop()),
        Rule((), Dnat("10.0.1.999")),
        Rule((), Dnat("10.0.1.5", 1 << 16)),
    ):
        assert entry(wanted) is None


# --- a whole table ---------------------------------------------------------------------------------------------------

CHAINS: dict[str, Rules] = {
    "PREROUTING": (Rule((), Jump("OURS")),),
    "OURS": (MAPPING, Rule((), Goto("LAST"))),
    "LAST": (),
}


def standard(number: int, goto: bool = False) -> bytes:
    written = bytearray(entry(Rule((), Return())) or b"")
    written[112:152] = struct.pack("=H29sBi4x", 40, b"", 0, number)
    written[82] = 2 if goto else 0
    return bytes(written)


def head(name: str) -> bytes:
    written = entry(Rule((), Return())) or b""
    length = struct.pack("=H", 176)
    return written[:90] + length + written[92:112] + struct.pack("=H29sB32s", 64, b"ERROR", 0, name.encode())


def table(chains: dict[str, Rules], *, back: int = -5) -> tuple[Info, bytes]:
    """A nat table as the kernel tells it."""
    begins: dict[str, int] = {}

    def laid() -> tuple[bytes, list[int], list[int]]:
        raw, hooks, policies = b"", [0] * 5, [0] * 5
        for name in (*BUILTIN["nat"], *(name for name in chains if name not in BUILTIN["nat"])):
            number = (
                ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING").index(name)
                if name in BUILTIN["nat"]
                else None
            )
            raw += head(name) if number is None else b""
            begins[name] = len(raw)
            for one in chains.get(name, ()):
                assert isinstance(one, Rule)
                to = one.target
                raw += (
                    standard(begins.get(to.chain, 0), isinstance(to, Goto))
                    if isinstance(to, Jump | Goto)
                    else entry(one) or b""
                )
            if number is not None:
                hooks[number], policies[number] = begins[name], len(raw)
            raw += standard(back if number is None else -2)
        return raw + head("ERROR"), hooks, policies

    laid()  # only now it is known where chains begin
    raw, hooks, policies = laid()
    info = struct.pack("=32s13I", b"nat", 0b11011, *hooks, *policies, 0, len(raw))
    return Info(info, 0), raw


def test_a_table_is_read_with_jumps_by_their_names() -> None:
    found = ipt_table.parsed("nat", *table(CHAINS))
    assert found is not None
    empty = {ChainRef("nat", name): () for name in BUILTIN["nat"]}
    assert found.chains == empty | {ChainRef("nat", name): rules for name, rules in CHAINS.items()}
    assert not found.equals


def test_two_equal_rules_are_noticed() -> None:
    found = ipt_table.parsed("nat", *table({"OURS": (MAPPING, MAPPING)}))
    assert found is not None
    assert found.equals
    apart = ipt_table.parsed("nat", *table({"OURS": (MAPPING,), "LAST": (MAPPING,)}))
    assert apart is not None
    assert not apart.equals


def test_a_table_of_another_layout_is_nobodys() -> None:
    info, raw = table(CHAINS)
    assert ipt_table.parsed("mangle", info, raw) is None
    assert ipt_table.parsed("nat", *table(CHAINS, back=-2)) is None
    assert ipt_table.parsed("nat", info, raw[:-176]) is None


@given(st.binary(max_size=600))
def test_anything_at_all_is_read_without_an_error(noise: bytes) -> None:
    info, raw = table(CHAINS)
    for mixed in (noise, noise + raw, raw[:200] + noise + raw[200:], raw[: len(raw) // 2] + noise):
        found = ipt_table.parsed("nat", info, mixed)
        assert found is None or ChainRef("nat", "PREROUTING") in found.chains
