"""Ruleset <-> the text of iptables-save and iptables-restore; the legacy and the nft variant print alike.

Writing and reading are inverses: every rule that ``render_rule`` writes is what iptables-save prints for it,
and ``parse_rule`` reads it back as the same value. What our vocabulary cannot say exactly becomes ``Foreign``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache

from rules.ruleset import (
    BUILTIN,
    AnyRule,
    ChainEdit,
    ChainRef,
    Conntrack,
    DeleteChain,
    DeleteRule,
    Destination,
    DestinationPort,
    Dnat,
    Drop,
    Family,
    Foreign,
    Goto,
    InInterface,
    InsertRule,
    Jump,
    Mark,
    Masquerade,
    Match,
    NewChain,
    OutInterface,
    Protocol,
    ReplaceRules,
    Return,
    Rule,
    Rules,
    Ruleset,
    SetMark,
    Snat,
    Source,
    States,
    Target,
)

# XT_EXTENSION_MAXNAMELEN less the terminating zero.
CHAIN_NAME_MAX = 28
ALL_BITS = 0xFFFFFFFF
PORT_MAX = 0xFFFF

_BYTE = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_ADDRESS = rf"{_BYTE}\.{_BYTE}\.{_BYTE}\.{_BYTE}"
_PREFIX4 = rf"{_ADDRESS}/(?:3[0-2]|[12]?\d)"
_PREFIX6 = r"(?=[0-9a-f]*:)[0-9a-f:]{2,39}/(?:12[0-8]|1[01]\d|[1-9]?\d)"
_PREFIX = rf"(?:{_PREFIX4}|{_PREFIX6})"
_INTERFACE = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,14}"  # a trailing + would mean "any name that begins so"
_PORT = r"(?:0|[1-9]\d{0,4})"
_HEX = r"0x(?:0|[1-9a-f][0-9a-f]{0,7})"
_NAME = rf"[A-Za-z0-9_][A-Za-z0-9_.-]{{0,{CHAIN_NAME_MAX - 1}}}"

# iptables-save prints -s -d -i -o -p first and the modules after them; ours stand in this one order.
_RULE = re.compile(
    rf"(?:-s ({_PREFIX}) )?(?:-d ({_PREFIX}) )?(?:-i ({_INTERFACE}) )?(?:-o ({_INTERFACE}) )?"
    rf"(?:-p (tcp|udp|sctp) -m \5 --dport ({_PORT}) )?"
    rf"(?:-p (icmp|ipv6-icmp) )?"
    rf"(?:-m mark --mark ({_HEX})(?:/(?!0xf{{8}} )({_HEX}))? )?"
    rf"(?:-m conntrack --ctstate (DNAT) --ctorigdst ({_ADDRESS}) )?"
    rf"(?:-m conntrack --ctstate (RELATED,ESTABLISHED) )?"
    rf"(?:-g ({_NAME})|-j (?:DNAT --to-destination ({_ADDRESS})(?::({_PORT}))?"
    rf"|SNAT --to-source ({_ADDRESS})( --random-fully)?"
    rf"|MARK --set-xmark ({_HEX})/({_HEX})"
    rf"|(MASQUERADE --random-fully)"
    rf"|({_NAME})))",
    re.ASCII,
).fullmatch
_ESCAPED = re.compile(r"\\.", re.DOTALL)
_CHAIN = re.compile(_NAME, re.ASCII).fullmatch

# Targets that may stand without options; the kernel's tools refuse chains with the name of a target.
_EXTENSIONS = {
    *("ACCEPT", "RETURN", "QUEUE", "AUDIT", "CHECKSUM", "CLASSIFY", "CT", "DNAT", "ECN", "LOG", "MARK", "MASQUERADE"),
    *("NFLOG", "NFQUEUE", "NOTRACK", "REDIRECT", "REJECT", "SNAT", "SYNPROXY", "TRACE"),
}
_BARE: dict[str, Target] = {"DROP": Drop(), "MASQUERADE": Masquerade(), "RETURN": Return()}


def render_rule(rule: AnyRule) -> str:
    """The text after ``-A CHAIN``, exactly as iptables-save prints it.

    Raises ValueError for a rule that would not be read back as the same one: a name with a blank or a newline in
    it, matches out of order, a value out of range.
    """
    if isinstance(rule, Foreign):
        if "\n" in rule.text or "\0" in rule.text:
            raise ValueError(f"not one line: {rule.text!r}")
        return rule.text
    text = rule_text(rule)
    if parse_rule(text) != rule:
        raise ValueError(f"not a rule that iptables-save could print: {text!r}")
    return text


def rule_text(rule: AnyRule) -> str:
    """As ``render_rule``, for a rule that is only to be shown."""
    if isinstance(rule, Foreign):
        return rule.text
    return " ".join((*map(_match, rule.matches), _target(rule.target)))


def _match(match: Match) -> str:  # noqa: PLR0911 -- one line a match
    match match:
        case Source(prefix):
            return f"-s {prefix}"
        case Destination(prefix):
            return f"-d {prefix}"
        case InInterface(name):
            return f"-i {name}"
        case OutInterface(name):
            return f"-o {name}"
        case DestinationPort(protocol, port):
            return f"-p {protocol} -m {protocol} --dport {port}"
        case Mark(value, mask):
            return f"-m mark --mark {value:#x}" if mask == ALL_BITS else f"-m mark --mark {value:#x}/{mask:#x}"
        case Protocol(name):
            return f"-p {name}"
        case States(names):
            return f"-m conntrack --ctstate {names}"
        case Conntrack(state, orig_dst):
            return f"-m conntrack --ctstate {state} --ctorigdst {orig_dst}"


def _target(target: Target) -> str:  # noqa: PLR0911 -- one line a target
    match target:
        case Jump(chain):
            return f"-j {chain}"
        case Goto(chain):
            return f"-g {chain}"
        case Dnat(address, port):
            return f"-j DNAT --to-destination {address}" + ("" if port is None else f":{port}")
        case Snat(address, random_fully):
            return f"-j SNAT --to-source {address}" + (" --random-fully" if random_fully else "")
        case Masquerade(random_fully):
            return "-j MASQUERADE" + (" --random-fully" if random_fully else "")
        case SetMark(value, mask):
            return f"-j MARK --set-xmark {value:#x}/{mask:#x}"
        case Drop():
            return "-j DROP"
        case Return():
            return "-j RETURN"


@lru_cache(maxsize=1 << 12)  # what was just rendered is read back
def parse_rule(text: str) -> AnyRule:
    """The rule that iptables-save printed as ``text`` (after ``-A CHAIN``).

    ``-j NAME`` alone is read as a jump to a chain unless NAME is a well-known target; only ``parse_save`` knows
    which chains there are.
    """
    found = _RULE(text)
    if found is None:
        return Foreign(text)
    src, dst, iif, oif, proto, dport, icmp, mark, mask, state, orig, states, *action = found.groups()
    target = _parse_target(action)
    if target is None or (dport and (int(dport) > PORT_MAX or icmp)) or (state and states):
        return Foreign(text)
    matches: list[Match] = []
    if src:
        matches.append(Source(src))
    if dst:
        matches.append(Destination(dst))
    if iif:
        matches.append(InInterface(iif))
    if oif:
        matches.append(OutInterface(oif))
    if proto:
        matches.append(DestinationPort(proto, int(dport)))
    if icmp:
        matches.append(Protocol(icmp))
    if mark:
        matches.append(Mark(int(mark, 16), int(mask, 16) if mask else ALL_BITS))
    if state:
        matches.append(Conntrack(state, orig))
    if states:
        matches.append(States(states))
    return Rule(tuple(matches), target)


def _parse_target(groups: list[str]) -> Target | None:
    """The groups of the target's part of the pattern; None where it is no target of ours."""
    goto, dnat, port, snat, random_fully, xmark, mask, masquerade, name = groups
    if goto:
        return Goto(goto)
    if dnat:
        number = int(port) if port else None
        return None if number is not None and number > PORT_MAX else Dnat(dnat, number)
    if snat:
        return Snat(snat, random_fully is not None)
    if xmark:
        return SetMark(int(xmark, 16), int(mask, 16))
    if masquerade:
        return Masquerade(random_fully=True)
    return _BARE.get(name) or (None if name in _EXTENSIONS else Jump(name))


def parse_save(text: str, family: Family = 4) -> Ruleset:
    """What iptables-save (family 6: ip6tables-save) printed, of one table or of several.

    Comments, counters and policies are passed over.

    Raises ValueError on a line that iptables-save does not print.
    """
    chains: dict[ChainRef, list[AnyRule]] = {}
    table = ""
    for line in _lines(text):
        if line.startswith(("-A ", "[")):
            words = (line.partition(" ")[2] if line.startswith("[") else line).split(" ", 2)  # [packets:bytes] -A ...
            ref = ChainRef(table, words[1], family) if words[0] == "-A" and len(words) > 1 else None
            if ref is None or ref not in chains:
                raise ValueError(f"not a line of iptables-save: {line!r}")
            chains[ref].append(parse_rule(words[2] if len(words) > 2 else ""))
        elif line.startswith(":"):
            chains[ChainRef(table, line[1:].partition(" ")[0], family)] = []
        elif line.startswith("*"):
            table = line[1:].rstrip()
        elif line and not line.startswith("#") and line != "COMMIT":
            raise ValueError(f"not a line of iptables-save: {line!r}")
    return Ruleset({ref: tuple(_known_jumps(ref, rules, chains)) for ref, rules in chains.items()})


def _lines(text: str) -> Iterator[str]:
    """Lines of iptables-save; a comment in quotes may hold newlines, which are printed as they are."""
    begun = ""
    for part in text.split("\n"):
        line = begun + part
        if '"' in line and not line.startswith("#") and _ESCAPED.sub("", line).count('"') % 2:
            begun = line + "\n"
        else:
            begun = ""
            yield line


def _known_jumps(ref: ChainRef, rules: Iterable[AnyRule], chains: Mapping[ChainRef, object]) -> Iterator[AnyRule]:
    """A jump to a chain that is not there is a target that we do not know."""
    for rule in rules:
        match rule:
            case Rule(_, Jump(chain) | Goto(chain)) if ref._replace(chain=chain) not in chains:
                yield Foreign(rule_text(rule))
            case _:
                yield rule


def render_save(ruleset: Ruleset) -> str:
    """The ruleset as iptables-save prints it: tables and user-defined chains by name, built-in chains first."""
    tables: dict[str, dict[str, Rules]] = {}
    for ref, rules in ruleset.chains.items():
        tables.setdefault(ref.table, {})[ref.chain] = rules
    return "".join(line + "\n" for table in sorted(tables) for line in _save_table(table, tables[table]))


def _save_table(table: str, chains: Mapping[str, Rules]) -> Iterator[str]:
    builtin = [name for name in BUILTIN.get(table, ()) if name in chains]
    ordered = [*builtin, *sorted(chains.keys() - set(builtin))]
    yield f"*{table}"
    yield from (f":{_chain(name)} {'ACCEPT' if name in builtin else '-'} [0:0]" for name in ordered)
    for name in ordered:
        for rule in chains[name]:
            text = rule.text if isinstance(rule, Foreign) else render_rule(rule)
            yield f"-A {name} {text}".rstrip()
    yield "COMMIT"


def render_restore(table: str, edits: Sequence[ChainEdit]) -> str:
    """What to feed to ``iptables-restore --noflush`` to make the edits, all of them or none.

    Raises ValueError for an edit of another table and for names that would not stay one word.
    """
    lengths: dict[str, int] = {}  # of the chains whose length is known, so that a rule at the end is appended
    lines = [line for edit in edits for line in _edit_lines(_of_table(table, edit), lengths)]
    return "\n".join((f"*{_chain(table)}", *lines, "COMMIT", ""))


def _of_table(table: str, edit: ChainEdit) -> ChainEdit:
    if edit.ref.table != table:
        raise ValueError(f"{edit} is not an edit of the table {table}")
    return edit


def _edit_lines(edit: ChainEdit, lengths: dict[str, int]) -> Iterator[str]:
    chain = _chain(edit.ref.chain)
    match edit:
        case NewChain():
            # Not ":NAME - [0:0]": that would flush a chain which stands, instead of being refused.
            lengths[chain] = 0
            yield f"-N {chain}"
        case DeleteChain():
            yield from (f"-F {chain}", f"-X {chain}")
        case InsertRule(_, index, rule):
            # -I N walks the chain to its N-th rule, -A does not.
            where = f"-A {chain}" if lengths.get(chain) == index else f"-I {chain} {index + 1}"
            if chain in lengths:
                lengths[chain] += 1
            yield f"{where} {render_rule(rule)}"
        case DeleteRule(_, index, _):
            if chain in lengths:
                lengths[chain] -= 1
            yield f"-D {chain} {index + 1}"
        case ReplaceRules(_, rules):
            lengths[chain] = len(rules)
            yield f"-F {chain}"
            yield from (f"-A {chain} {render_rule(rule)}" for rule in rules)


def _chain(name: str) -> str:
    if not _CHAIN(name):
        raise ValueError(f"not a chain name: {name!r}")
    return name
