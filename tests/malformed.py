"""Calls of nat-gateway.sh that mean nothing, made from calls that mean something: hypothesis strategies."""

from __future__ import annotations

from hypothesis import strategies as st


def wide(text: str) -> str:
    """The text in full-width forms, which much software takes for the plain ones."""
    return "".join(chr(ord(char) + 0xFEE0) for char in text)


HOSTILE = (
    "$(touch /tmp/natgw-was-here)",
    "`id`",
    ";reboot",
    "|tee",
    "a b",
    "x\ny",
    "\n",
    "\r\n",
    "\x1b[31m",
    "'",
    '"',
    "\\",
    "*",
    "%s",
    "{0}",
    "-1",
    "--help",
    "../../etc/passwd",
    wide("12"),
    "\N{SUPERSCRIPT TWO}",
    "\N{ARABIC-INDIC DIGIT THREE}",
    "\u202e",
    "\u2028",
    "\ud800",
    "0x50",
    "1e3",
    "nan",
    "x" * 5000,
)
"""Good for no field at all."""

NAMES = ("0x50", "1e3", "nan")
"""Of these, what an interface may well be called."""

_IPV4 = (
    *("256.1.1.1", "1.2.3", "1.2.3.4.5", "1.2.3.04", "0.0.0.0", "127.0.0.1", "224.0.0.1", "255.255.255.255"),
    *(
        "fd00::1",
        "::ffff:1.2.3.4",
        f"{wide('1')}.2.3.4",
        "1.2.3.4\n",
        " 1.2.3.4",
        "16909060",
        "0x01020304",
        "localhost",
    ),
)
_LENGTHS = ("/33", "/-1", "/", f"/{wide('24')}", "/24/24", "/24 ", "/x", "/+8", "/;reboot")
_CIDR = ("256.0.0.0/8", "10.0.2/24", "10.0.2.0.0/24", "fd00::/129", *(f"10.0.2.0{length}" for length in _LENGTHS))
_MANY = "9" * 5000
_PORT = ("0", _MANY, "65536", "-1", "+80", " 80", "80 ", "80.0", "8_0", wide("80"), "http", "99999999999999999999")

# For each kind of field a good value, and what is bad in its place (an empty value is, too).
KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "eip": ("192.168.0.20", (*_IPV4, *(f"192.168.0.20{length}" for length in _LENGTHS))),
    "ip": ("10.0.1.5", (*_IPV4, "10.0.1.5/24")),
    "address": ("192.168.0.20/24", (*(f"{ip}/24" for ip in _IPV4), *(f"192.168.0.20{length}" for length in _LENGTHS))),
    "cidr": ("10.0.2.0/24", (*_CIDR, "fd00::/64")),
    "prefix": ("10.0.2.0/24", _CIDR),
    "gateway": ("10.0.1.1", _IPV4),
    "port": ("80", _PORT),
    "protocol": ("tcp", ("icmp", "sctp", "tcp ", wide("tcp"), "6", "all", "TCP\n")),
    "backends": (
        "10.0.1.5:80",
        (
            *("10.0.1.5", "10.0.1.5:", ":80", "10.0.1.5:80@", "@10.0.1.5:80", "10.0.1.5:80@@10.0.1.6:80", "@"),
            *(f"10.0.1.5:{port}" for port in _PORT),
            *(f"{ip}:80" for ip in _IPV4),
        ),
    ),
    "direction": ("egress", ("Egress", "both", "egress ")),
    "priority": ("2", ("-1", _MANY, "65536", "x", "1.5", "+1", " 1", wide("1"))),
    "classifier": ("u32", ("u16", "U32", "basic", "matchall;")),
    "match": ("ip", ("ipv6", "IP", "mac")),
    "side": ("dst", ("sport", "DST", "dst ", "dst 10.0.0.0/8")),
    "rate": ("10", ("0", "-1", "10mbit", "1e3", "inf", _MANY, ".5", "5.", "1,5", "99999999999", wide("10"))),
    "burst": ("10", ("-1", "10MB", "1e3", "inf", _MANY, ".5", "99999999999", wide("10"))),
    "old priority": ("2", ("-1", "x", "1.5", "+1", " 1", wide("1"))),
    "interface": (
        "net1",
        ("abcdefghijklmnop", "net1;x", "net 1", "net1\n", f"{wide('net')}1", "..", "-x", "net1,net1"),
    ),
}

ADDS: dict[str, tuple[str, ...]] = {
    "init": ("interface", "interface"),
    "subnet-route-add": ("cidr", "gateway"),
    "ext-subnet-route-add": ("cidr", "gateway"),
    "eip-add": ("address",),
    "floating-ip-add": ("eip", "ip"),
    "dnat-add": ("eip", "port", "protocol", "ip", "port"),
    "nft-dnat-map-add": ("eip", "port", "protocol", "backends"),
    "snat-add": ("eip", "cidr"),
    "eip-ingress-qos-add": ("eip", "priority", "rate", "burst"),
    "eip-egress-qos-add": ("eip", "priority", "rate", "burst"),
    "qos-add": ("direction", "interface", "priority", "classifier", "match", "side", "cidr", "rate", "burst"),
}
"""The fields that each verb needs; an empty one is as bad as any."""

DELETES: dict[str, tuple[str, ...]] = {
    "subnet-route-del": ("prefix",),
    "ext-subnet-route-del": ("prefix",),
    "eip-del": ("address",),
    "floating-ip-del": ("eip",),
    "dnat-del": ("eip", "port", "protocol"),
    "nft-dnat-map-del": ("eip", "port", "protocol"),
    "snat-del": ("eip", "cidr"),
    "eip-ingress-qos-del": ("eip",),
    "eip-egress-qos-del": ("eip",),
    "qos-del": ("direction", "interface", "old priority", "classifier", "match", "side", "prefix"),
}
"""The fields that name what is to be deleted; where one is empty nothing is named, which is no error."""

_GOOD_INIT = ("eth0", "net1")
_NO_VERBS = ("", "EIP-ADD", "eip-add ", *(value for value in HOSTILE if value != "--help"))


def _good(verb: str) -> list[str]:
    return list(_GOOD_INIT) if verb == "init" else [KINDS[kind][0] for kind in (ADDS | DELETES)[verb]]


def _spoiled(verb: str) -> st.SearchStrategy[str]:
    """A rule of the verb with one field spoiled, left out, or too many."""
    kinds = (ADDS | DELETES)[verb]
    good = _good(verb)

    def with_field(index: int, value: str) -> str:
        return ",".join([*good[:index], value, *good[index + 1 :]])

    bad = [
        with_field(i, value)
        for i, kind in enumerate(kinds)
        for value in (*KINDS[kind][1], *HOSTILE)
        if kind != "interface" or value not in NAMES
    ]
    if verb in ADDS:
        # Up to 1.16 a limit's interface may be empty: there is a usual one.
        bad += [with_field(i, "") for i in range(len(kinds)) if (verb, kinds[i]) != ("qos-add", "interface")]
    bad += [",".join(good[:count]) for count in range(1, len(kinds))]
    bad += [",".join([*good, *["1"] * surplus]) for surplus in (6, 500)]
    return st.sampled_from(bad)


@st.composite
def calls(draw: st.DrawFn) -> tuple[str, ...]:
    """The words of a call that must be refused as a whole: one of its rules is malformed, or there is no such verb."""
    verb = draw(st.sampled_from([*ADDS, *DELETES, *_NO_VERBS]))
    if verb not in ADDS | DELETES:
        return (verb, *draw(st.lists(st.sampled_from(HOSTILE), max_size=2)))
    good = [",".join(_good(verb))]
    before = draw(st.sampled_from([[], [] if verb == "init" else good]))
    return (verb, *before, draw(_spoiled(verb)))


def all_calls() -> list[tuple[str, ...]]:
    """Every spoiled rule there is, each as a call of its own."""
    return [(verb, rule) for verb in (*ADDS, *DELETES) for rule in _spoiled(verb).elements]  # type: ignore[attr-defined]
