"""The replay itself: the transcript is sound and complete, the model misses nothing, docs/releases.md says the same."""

from __future__ import annotations

import copy

import pytest
from replay.model import DEVICES, Model, Seen
from replay.script import RELEASES, Release, transcript
from replay.table import DOCUMENT, document

from api.execverbs import VERBS

EVERYTHING = """\
init
default 192.168.0.1 onlink
route 10.0.2.0/24 10.0.1.1
eip 192.168.0.50/24
fip 192.168.0.50 10.0.1.11
dnat 192.168.0.50 80 tcp 10.0.1.12 8080
snat 192.168.0.50 10.0.0.0/16 --random-fully
snat 192.168.0.50 10.0.1.0/24
share 192.168.0.50 81 udp 10.0.1.11:1 10.0.1.12:2
rate egress net1 2.5
rate ingress net1 10"""
RULES = """\
-A PREROUTING -j VPC_MARK
-A FORWARD -j ARP_GUARD
-A VPC_MARK -i eth0 -j MARK --set-xmark 0x1/0x1
-A PREROUTING -j DNAT_FILTER
-A POSTROUTING -j SNAT_FILTER
-A DNAT_FILTER -m mark --mark 0x20000000/0x20000000 -g MAPS_MISSED
-A DNAT_FILTER -j EXCLUSIVE_DNAT
-A DNAT_FILTER -j SHARED_DNAT
-A EXCLUSIVE_DNAT -d 192.168.0.50/32 -j DNAT --to-destination 10.0.1.11
-A EXCLUSIVE_SNAT -s 10.0.1.11/32 -j SNAT --to-source 192.168.0.50
-A HAIRPIN_SNAT -o eth0 -m mark --mark 0x1/0x1 -m conntrack --ctstate DNAT --ctorigdst 192.168.0.50 -j SNAT\
 --to-source 192.168.0.50 --random-fully
-A MAPS_MISSED -j MARK --set-xmark 0x0/0x20000000
-A SHARED_DNAT -d 192.168.0.50/32 -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.0.1.12:8080
-A SHARED_SNAT -s 10.0.1.0/24 -o net1 -j SNAT --to-source 192.168.0.50
-A SHARED_SNAT -s 10.0.0.0/16 -o net1 -j SNAT --to-source 192.168.0.50 --random-fully
-A SNAT_FILTER -m mark --mark 0x20000000/0x20000000 -g MAPS_MISSED
-A SNAT_FILTER -j EXCLUSIVE_SNAT
-A SNAT_FILTER -j SHARED_SNAT
-A SNAT_FILTER -j HAIRPIN_SNAT"""
MAPS = """\
table ip kube-ovn {
    map service-ips {
        type ipv4_addr . inet_proto . inet_service : verdict
        elements = { 192.168.0.50 . udp . 81 : goto dnat-0123456789ab }
    }
    chain dnat-0123456789ab {
        meta l4proto udp dnat ip to numgen random mod 2 map { 0 : 10.0.1.11 . 1, 1 : 10.0.1.12 . 2 }
    }
}"""


def good() -> tuple[Model, Seen]:
    """A model with an object of each kind, and what a kernel shows of it."""
    model = Model(own="192.168.0.11/24", gateway="192.168.0.1")
    for line in EVERYTHING.splitlines():
        model.add(tuple(line.split()))
    seen = Seen(
        rules=RULES.splitlines(),
        addresses=["192.168.0.11/24", "192.168.0.50/24"],
        routes=["default via 192.168.0.1 dev net1 onlink", "10.0.2.0/24 via 10.0.1.1 dev eth0"],
        maps=MAPS,
        classes=dict.fromkeys(DEVICES, "")
        | {
            "net1": "class htb 1:2 root leaf 2: prio 0 rate 2500Kbit ceil 2500Kbit burst 1Kb cburst 1Kb\n",
            "ifb-net1": "class htb 1:2 root leaf 2: prio 0 rate 10Mbit ceil 10Mbit burst 1Kb cburst 1Kb\n",
        },
    )
    return model, seen


def test_the_model_is_content_with_what_it_describes() -> None:
    model, seen = good()
    assert model.differences(seen) == []


def test_the_model_misses_nothing() -> None:
    model, seen = good()
    for name in ("rules", "addresses", "routes"):
        for index in range(len(getattr(seen, name))):
            spoiled = copy.deepcopy(seen)
            line = getattr(spoiled, name).pop(index)
            assert model.differences(spoiled), f"without {line}"
            getattr(spoiled, name).extend([line, line])
            assert model.differences(spoiled), f"twice {line}"
    for what in list(model.objects):
        less = copy.deepcopy(model)
        less.remove(what)
        assert less.differences(seen), f"{what} is left over"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("192.168.0.50 . udp . 81", "192.168.0.50 . udp . 82"),
        ("mod 2", "mod 3"),
        ("10.0.1.12 . 2", "10.0.1.12 . 3"),
        ("--to-destination 10.0.1.12:8080", "--to-destination 10.0.1.12:80"),
        ("--to-source 192.168.0.50 --random-fully", "--to-source 192.168.0.50"),
        ("-A SHARED_SNAT -s 10.0.1.0/24 ", "-A SHARED_SNAT -s 10.0.1.0/25 "),
        ("-o net1", "-o net2"),
    ],
)
def test_the_model_notices_what_is_different(old: str, new: str) -> None:
    model, seen = good()
    assert old in RULES + MAPS
    seen.rules = [line.replace(old, new) for line in seen.rules]
    seen.maps = seen.maps.replace(old, new)
    assert model.differences(seen)


def test_the_model_notices_order_and_rates() -> None:
    model, seen = good()
    first = next(i for i, rule in enumerate(seen.rules) if rule.startswith("-A SHARED_SNAT"))
    seen.rules[first : first + 2] = reversed(seen.rules[first : first + 2])
    assert "SHARED_SNAT" in "".join(model.differences(seen))
    for device, text in (("net1", ""), ("eth0", "class htb 1:2 root rate 10Mbit ceil 10Mbit\n")):
        model, seen = good()
        model.add(("rate", "egress", "eth0", "10"))
        model.remove(("rate", "egress", "eth0", "10"))
        seen.classes[device] = text
        assert model.differences(seen)


@pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.name)
def test_the_transcript_is_sound(release: Release) -> None:
    """What comes did not stand, what goes did; at the end only init, the default route and 1.12's route stand."""
    model = Model(own="192.168.0.11/24", gateway="192.168.0.1")
    model.new_pod()
    for step in transcript(release):
        assert step.calls
        for line in step.lines:
            if (line.kind, line.text) == ("@", "new pod"):
                model.new_pod()
            if line.kind in "+-":
                (model.add if line.kind == "+" else model.remove)(line.words)
    assert {what[0] for what in model.objects} <= {"init", "default", "route"}


def test_every_verb_is_replayed() -> None:
    sent = {call.words[0] for release in RELEASES for step in transcript(release) for call in step.calls}
    assert sent == {*VERBS, "get-iptables-version"}


def test_the_page_on_releases_says_what_is_replayed() -> None:
    assert DOCUMENT.read_text() == document(), "in netns-tests, run python -m replay.table"
