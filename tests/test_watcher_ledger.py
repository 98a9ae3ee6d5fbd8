"""The flow watcher's sums: whose flow it is, and what events and dumps do to them."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.observer.ctnetlink import DESTROY, NEW
from gateway.observer.flow import Flow
from gateway.watcher.accounts import ACTIVE_IN, ACTIVE_OUT, SUMS, Objects
from gateway.watcher.talkers import MOST, TOP, Talkers
from tests.watcher_kit import (
    EIP,
    EIP2,
    FLOATING,
    ICMP,
    INSIDE,
    OBJECTS,
    PEER,
    SERVER,
    UDP,
    Book,
    counted,
    ends,
    flow,
    left,
    mapped,
)

ACTIVE = (ACTIVE_IN, ACTIVE_OUT)
ONE_IN, ONE_OUT = {"active in": 1, "new in": 1}, {"active out": 1, "new out": 1}


@pytest.mark.parametrize(
    ("one", "keys", "sums"),
    [
        (mapped(), [("eip", EIP), ("dnat", EIP, 8888, "tcp")], ONE_IN),
        (mapped(53, protocol=UDP), [("eip", EIP), ("dnat", EIP, 53, "udp")], ONE_IN),
        (mapped(8888, protocol=UDP), [("eip", EIP)], ONE_IN),
        (mapped(22, FLOATING), [("eip", FLOATING), ("fip", FLOATING, "10.0.1.33")], ONE_IN),
        (mapped(0, FLOATING, ICMP), [("eip", FLOATING), ("fip", FLOATING, "10.0.1.33")], ONE_IN),
        (left(FLOATING, "10.0.1.33"), [("eip", FLOATING), ("fip", FLOATING, "10.0.1.33")], ONE_OUT),
        (left(), [("eip", EIP2), ("snat", EIP2, "10.0.1.0/24")], ONE_OUT),
        (left(source="10.0.2.5"), [("eip", EIP2), ("snat", EIP2, "10.0.0.0/16")], ONE_OUT),
        (left(EIP), [("eip", EIP)], ONE_OUT),
        (left("198.51.100.1"), [], ONE_OUT),
        (mapped(80, "198.51.100.1"), [], ONE_IN),
    ],
)
def test_whose_flow_it_is(one: Flow, keys: list[tuple[object, ...]], sums: dict[str, int]) -> None:
    """The rule with exactly its port, the floating IP, or the longest prefix; else the EIP alone, or only the total."""
    book = Book()
    book.event(NEW, one)
    for key in OBJECTS.named():
        assert book.sums(*key) == (sums if key in keys else {}), key
    assert book.sums("total") == sums


def test_a_hairpin_is_in_for_one_eip_and_out_for_the_other() -> None:
    book = Book()
    one = flow(ends(INSIDE, 1234, EIP, 8888), ends(EIP2, 40000, SERVER, 80))
    book.event(NEW, one)
    book.event(DESTROY, counted(one, 3, 300, 2, 2000))
    assert book.sums("dnat", EIP, 8888, "tcp") == {
        "bytes in": 300,
        "packets in": 3,
        "bytes out": 2000,
        "packets out": 2,
        "new in": 1,
    }
    assert book.sums("snat", EIP2, "10.0.1.0/24") == {
        "bytes out": 300,
        "packets out": 3,
        "bytes in": 2000,
        "packets in": 2,
        "new out": 1,
    }
    assert book.sums("total")["new in"] == 1
    assert "new out" not in book.sums("total"), "it is one connection"


def test_bytes_come_with_the_end_or_with_a_dump_and_are_counted_once() -> None:
    book = Book()
    one = left()
    book.event(NEW, one)
    book.dump(counted(one, 1, 100, 1, 1000))
    assert book.sums("eip", EIP2) == {"bytes out": 100, "packets out": 1, "bytes in": 1000, "packets in": 1, **ONE_OUT}
    book.dump(counted(one, 2, 250, 1, 1000))
    book.event(DESTROY, counted(one, 2, 250, 2, 1400))
    total = {"bytes out": 250, "packets out": 2, "bytes in": 1400, "packets in": 2, "new out": 1}
    assert book.sums("eip", EIP2) == book.sums("total") == total
    assert len(book) == 0
    assert not book.accounts.ports[EIP2]


def test_what_was_there_before_is_active_but_not_new() -> None:
    book = Book(watching=False)
    one, ended = left(), left()
    book.event(DESTROY, counted(ended, 1, 60, 0, 0))
    book.dump(one)
    assert book.sums("eip", EIP2) == {"active out": 1, "bytes out": 60, "packets out": 1}
    assert [event for event, _ in book.told] == ["end"]


def test_what_began_during_the_first_dump_is_new() -> None:
    """The dump may tell of it before the event is read."""
    book = Book(watching=False)
    one, other = left(), left()
    book.begin_dump()
    book.dumped(one)
    book.event(NEW, one)
    book.event(NEW, other)
    book.dumped(other)
    book.end_dump()
    assert book.sums("eip", EIP2) == {"active out": 2, "new out": 2}


def test_what_no_event_told_of_is_new_when_a_dump_or_its_end_does() -> None:
    """Each is counted once, by whichever came first."""
    book = Book()
    long, short = left(port=40001), left(port=40002)
    book.dump(counted(long, 1, 60, 0, 0))
    assert book.sums("eip", EIP2) == {"active out": 1, "new out": 1, "bytes out": 60, "packets out": 1}
    book.event(DESTROY, counted(short, 2, 100, 1, 50))
    both = {"new out": 2, "bytes out": 160, "packets out": 3, "bytes in": 50, "packets in": 1}
    assert book.sums("eip", EIP2) == {"active out": 1, **both}
    book.event(NEW, long)
    book.event(DESTROY, counted(long, 1, 60, 0, 0))
    assert book.sums("eip", EIP2) == both
    assert (book.begun, book.events) == (2, {"new": 1, "end": 2})


def test_a_dump_that_tells_of_a_flow_before_its_event_does_not_count_it_twice() -> None:
    book = Book()
    one = left()
    book.begin_dump()
    book.dumped(one)
    book.event(NEW, one)
    book.end_dump()
    assert book.sums("eip", EIP2) == ONE_OUT
    assert [event for event, _ in book.told] == ["start"]


def test_a_flow_that_ended_during_a_dump_does_not_come_back() -> None:
    book = Book()
    one = left()
    book.event(NEW, one)
    book.begin_dump()
    book.event(DESTROY, one)
    book.dumped(one)
    book.end_dump()
    assert len(book) == 0
    assert book.sums("eip", EIP2) == {"new out": 1}


def test_lost_events_are_made_good_for_by_the_next_dump() -> None:
    """Both the beginning that nobody told of, and the end."""
    book = Book()
    ended, begun = left(port=40001), left(port=40002)
    book.event(NEW, ended)
    book.dump(counted(begun, 1, 60, 0, 0))
    assert book.sums("eip", EIP2) == {"active out": 1, "new out": 2, "bytes out": 60, "packets out": 1}
    assert [event for event, _ in book.told] == ["start", "start", "end"]
    assert book.told[1] == ("start", begun)
    assert book.told[2][1].translated == ended.translated
    book.dump(counted(begun, 1, 60, 0, 0))
    assert len(book.told) == 3


def test_beyond_its_capacity_flows_are_counted_when_they_end_and_not_remembered() -> None:
    book = Book(capacity=2)
    flows = [left(port=40000 + number) for number in range(4)]
    for one in flows:
        book.event(NEW, one)
    assert book.sums("eip", EIP2) == {"active out": 2, "new out": 2}
    assert (len(book), book.beyond) == (2, 2)
    assert [event for event, _ in book.told] == 4 * ["start"]
    for one in flows:
        book.event(DESTROY, counted(one, 1, 10, 0, 0))
    assert book.sums("eip", EIP2) == {"new out": 4, "bytes out": 40, "packets out": 4}


def test_a_flow_from_before_its_rule_was_known_moves_with_everything() -> None:
    book = Book(objects=Objects(eips=(EIP2,)))
    one = left()
    book.event(NEW, one)
    book.dump(counted(one, 1, 100, 0, 0))
    book.set(Objects(eips=(EIP2,), snats=((EIP2, "10.0.1.0/24"),)))
    book.dump(counted(one, 2, 200, 0, 0))
    everything = {"bytes out": 200, "packets out": 2, **ONE_OUT}
    assert book.sums("snat", EIP2, "10.0.1.0/24") == book.sums("eip", EIP2) == book.sums("total") == everything
    assert len(book.accounts.ports[EIP2]) == 1
    book.event(DESTROY, counted(one, 2, 200, 0, 0))
    assert not book.accounts.ports[EIP2]


def test_a_more_exact_rule_takes_living_flows_but_no_counts() -> None:
    """A counter does not go back."""
    book = Book(objects=Objects(eips=(EIP2,), snats=((EIP2, "10.0.0.0/16"),)))
    one = left()
    book.event(NEW, one)
    book.dump(counted(one, 1, 100, 0, 0))
    book.set(Objects(eips=(EIP2,), snats=((EIP2, "10.0.0.0/16"), (EIP2, "10.0.1.0/24"))))
    book.dump(counted(one, 2, 200, 0, 0))
    assert book.sums("snat", EIP2, "10.0.0.0/16") == {"bytes out": 100, "packets out": 1, "new out": 1}
    assert book.sums("snat", EIP2, "10.0.1.0/24") == {"bytes out": 100, "packets out": 1, "active out": 1}


def test_the_total_keeps_what_objects_leave_that_are_no_more() -> None:
    book = Book()
    for one in (left(), mapped()):
        book.event(NEW, one)
        book.event(DESTROY, counted(one, 1, 100, 1, 50))
    before = book.sums("total")
    book.set(Objects())
    assert book.sums("total") == before
    assert list(book.accounts.sums()) == [("total",)]
    book.set(OBJECTS)
    assert book.sums("eip", EIP2) == {}, "it is another one by now"
    assert book.sums("total") == before


def test_ports_are_counted_per_destination() -> None:
    """One port serves many destinations; what runs out is the ports towards one of them."""
    book = Book()
    flows = [left(port=40000, peer=f"203.0.113.{number}") for number in range(5)]
    flows += [left(port=41000 + number, peer=PEER) for number in range(3)]
    flows.append(left(port=40000, protocol=UDP))
    for one in flows:
        book.event(NEW, one)
    use = book.accounts.ports[EIP2]
    assert len(use) == 5, "40000 of TCP, 41000 to 41002, and 40000 of UDP"
    assert use.busiest() == ("tcp", PEER, 443, 3)
    for one in flows:
        book.event(DESTROY, one)
    assert (len(use), use.busiest()) == (0, None)


def test_a_floating_ip_holds_no_ports() -> None:
    book = Book()
    book.event(NEW, left(FLOATING, "10.0.1.33"))
    assert FLOATING not in book.accounts.ports


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_whatever_comes_the_sums_are_those_of_the_flows(data: st.DataObject) -> None:
    """Random events, dumps and specs, and events that nobody hears: in the end what lives is active, nothing is left of
    what ended, and whatever was ever heard of is counted once; no counter goes back."""
    specs = [OBJECTS, Objects(), Objects(eips=(EIP, EIP2)), OBJECTS._replace(snats=OBJECTS.snats[:1])]
    book = Book(capacity=data.draw(st.sampled_from([3, 1000])), objects=data.draw(st.sampled_from(specs)))
    living: dict[int, Flow] = {}
    heard: set[int] = set()
    counters = [0] * SUMS
    for _ in range(data.draw(st.integers(1, 40))):
        what = data.draw(st.sampled_from(["new", "end", "spec", "dump", "unheard new", "unheard end"]))
        if what in ("new", "unheard new"):
            made = data.draw(st.sampled_from([mapped, left]))
            port = data.draw(st.integers(1, 5))
            one = left(port=port) if made is left else mapped(data.draw(st.sampled_from([53, 8888])), peer_port=port)
            living[one.identifier] = one
            if what == "new":
                book.event(NEW, one)
        elif what in ("end", "unheard end") and living:
            one = living.pop(data.draw(st.sampled_from(sorted(living))))
            if what == "end":
                book.event(DESTROY, counted(one, 1, 10, 1, 20))
                heard.add(one.identifier)
        elif what == "spec":
            book.set(data.draw(st.sampled_from(specs)))
        else:
            book.dump(*(counted(one, 1, 10, 0, 0) for one in living.values()))
        heard |= book._entries.keys()
        before, counters = counters, book.accounts.sums()[("total",)]
        assert [place for place in range(SUMS) if counters[place] < before[place] and place not in ACTIVE] == []
    book.dump(*living.values())
    book.dump(*living.values())
    total = book.sums("total")
    assert total.get("active in", 0) + total.get("active out", 0) == len(book) <= len(living)
    assert len(book) == min(len(living), book.capacity)
    for one in living.values():
        book.event(DESTROY, one)
    total = book.sums("total")
    assert total.get("new in", 0) + total.get("new out", 0) == book.begun == len(heard | living.keys())
    assert not {"active in", "active out"} & book.sums("total").keys()
    assert not any(book.accounts.ports.values())
    assert all(value >= 0 for sums in book.accounts.sums().values() for value in sums)
    for talkers in (book.sources, book.destinations):
        assert not any(talkers._living.values())


def test_the_busiest_come_first_and_are_bounded() -> None:
    talkers = Talkers()
    for number in range(MOST + 100):
        talkers.of(number.to_bytes(4, "big"))[0] += number
    assert len(talkers._sums) <= MOST
    talkers.tick()
    assert len(talkers.top) == TOP
    busiest = socket.inet_ntoa((MOST + 99).to_bytes(4, "big"))
    assert talkers.top[0] == (busiest, [MOST + 99, *[0] * (SUMS - 1)])
    talkers.tick()
    assert talkers.top == ()


def test_who_holds_connections_is_told_even_if_silent() -> None:
    book = Book()
    for number in range(3):
        book.event(NEW, left(port=40000 + number))
    book.sources.tick()
    book.sources.tick()
    assert book.sources.top == ((INSIDE, [0, 0, 0, 0, 0, 3, 0, 0]),)


def test_who_is_inside_may_change_with_the_spec() -> None:
    """A packet for a floating IP that nothing was known of is taken for one that goes out, until the rule is known."""
    book = Book(objects=Objects())
    flows = [
        flow(ends(PEER, 4000, FLOATING, 22), ends(PEER, 4000, "10.0.1.33", 22)),
        flow(ends("10.0.1.33", 4000, PEER, 22), ends("10.0.1.33", 4000, PEER, 22)),
        flow(ends(INSIDE, 4000, FLOATING, 22), ends(FLOATING, 4000, "10.0.1.33", 22)),
        mapped(),
        left(),
    ]
    for one in flows:
        book.event(NEW, one)
    book.set(OBJECTS)
    book.dump(*(counted(one, 1, 100, 2, 200) for one in flows))
    book.set(Objects())
    book.dump(*(counted(one, 2, 200, 2, 200) for one in flows))
    for one in flows:
        book.event(DESTROY, counted(one, 2, 200, 2, 200))
    for side in (book.sources, book.destinations):
        side.tick()
        assert [talker for talker in side.top if any(talker.sums[4:6])] == []
    assert {name: value for name, value in book.sums("total").items() if name.startswith("active")} == {}


def test_two_connections_with_one_identifier_are_not_taken_for_each_other() -> None:
    """32 bits of a hash: among 100,000 connections such a pair is to be expected."""
    book = Book()
    first, other = left(source="10.0.1.6"), left(source="10.0.1.7", port=40001)
    other = other._replace(identifier=first.identifier)
    book.event(NEW, first)
    book.event(NEW, other)
    assert book.sums("eip", EIP2) == {"new out": 1, "active out": 1}
    book.dump(counted(other, 1, 100, 0, 0), counted(first, 1, 50, 0, 0))
    book.event(DESTROY, counted(other, 2, 200, 0, 0))
    assert len(book) == 1
    book.event(DESTROY, counted(first, 1, 50, 0, 0))
    assert book.sums("eip", EIP2) == {"new out": 2, "bytes out": 250, "packets out": 3}
    book.dump()
    assert len(book) == 0
