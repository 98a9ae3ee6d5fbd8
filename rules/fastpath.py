"""GatewaySpec -> maps: the chains' meaning once more, in a form that is as quick for 50,000 rules as for one.

A chain is walked rule by rule: with 10,000 port mappings a gateway takes 8,000 new connections a second, with one
130,000. So the state is rendered twice. The chains of ``rules.nat`` are what people and Kube-OVN's tests read, and they
alone are always right; the maps of this module stand in nat chains of our own table a little ahead of iptables'
(``rules.maps``), and decide the same in constant time.

**Equal meaning.** The rules of our two chains ask in the order in which the iptables chains are walked: floating IPs,
then port mappings; floating IPs, then source translations from the longest prefix to the shortest, then hairpins.
Where two objects make one key (two floating IPs of one host, two EIPs for one prefix) the older has it, as the earlier
rule of a chain decides. Shared port mappings stand in ``ip kube-ovn`` and decide before either.

**A hit binds the connection**, and then no later nat chain is asked. **A miss** would have the packet walk the long
chains in vain. So it gets the mark ``MISSED``, and the first rule of DNAT_FILTER and of SNAT_FILTER sends what bears
it to MAPS_MISSED, by ``-g``: there the mark is taken off, and the walk goes on behind the jump to our chains, with
whatever other rules there are in PREROUTING and POSTROUTING. All nat chains of a hook are run in one go, so nobody but
nat chains ever sees the mark: not routing (``ip rule fwmark``), not the filter table, not the wire, not the next hook.
For the same reason one bit is enough for both hooks.

**One map for each prefix length**, asked with the source address cut to that length, in descending order: one interval
map would need prefixes flattened into disjoint ranges, so that one /16 over 256 prefixes of /24 would be 257 entries,
and adding or deleting it as many edits. Here every object is one entry, and a lookup is as many hash lookups as there
are different lengths (never more than 33).

**Other people's rules.** A rule that stands in PREROUTING or POSTROUTING ahead of the jump to our chains, in either
iptables variant, or an nft nat chain between our priority and iptables', comes before our chains but would come after
our maps. As long as there is one, the maps stay off. Rules behind our jump see in either case what we leave undecided.

**Order.** The chains come before the maps whenever both change. Going on: MAPS_MISSED and the rules that lead to it
must stand before the first packet bears the mark; then the whole table appears in one transaction, and there is no
moment in which a packet meets half of it. While the maps are on, they alone decide, so that one transaction on the
table is the moment at which a change of the chains takes effect: a new object works from there on, a deleted one or
a changed one goes or changes there, and its rule in the chain comes or goes a little earlier without a meaning for
packets. Going off: the chains are complete again before the table goes; in between a missed packet keeps a mark that
nobody takes off, and walks our chains as it always did. An entry whose EIP is not up yet attracts no packet.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Literal, TypeVar

from rules import nat
from rules.entries import Entries
from rules.iptables import render_rule
from rules.keyed import Keyed
from rules.maps import (
    POSTROUTING,
    PREROUTING,
    AddEntry,
    DropEntry,
    DropTable,
    EntryKey,
    FipIn,
    FipOut,
    Hairpin,
    MapEdit,
    MapRules,
    MapTable,
    Missed,
    Ports,
    PrefixSnat,
    WriteChains,
    asked,
)
from rules.nft import Endpoint
from rules.ruleset import AnyRule, ChainRef, Rules
from rules.spec import Dnat, Eip, Fip, GatewaySpec, Interfaces, Snat
from rules.splice import once

T = TypeVar("T")

Setting = Literal["auto", "off"]
NO_TABLE = MapTable()

_FIP_IN, _PORTS, _FIP_OUT = FipIn(), Ports(), FipOut()


def table(spec: GatewaySpec) -> MapTable:
    """The whole table of a spec."""
    standing = _chains_of(spec.interfaces, spec.snats)
    return MapTable(standing, asked(standing), entries(spec))


def table_of(sides: Interfaces, found: Mapping[EntryKey, Endpoint]) -> MapTable:
    """The table that holds these entries."""
    standing = chains(sides, (key.map for key in found))
    return MapTable(standing, asked(standing), Entries(found))


@once
def _chains_of(sides: Interfaces, snats: Keyed[Snat]) -> dict[str, MapRules]:
    return chains(sides, (snat_key(snat).map for snat in _oldest(snats, {snat.internal_cidr for snat in snats})))


def chains(sides: Interfaces, maps: Iterable[str]) -> dict[str, MapRules]:
    """The rules that ask; of the maps for source prefixes only those named, the others always."""
    named = set(maps)
    lengths = [
        rule
        for length in range(32, -1, -1)
        for rule in (PrefixSnat(sides.external, length, True), PrefixSnat(sides.external, length, False))
        if rule.map in named
    ]
    hairpin = Hairpin(sides.vpc, nat.TENANT_MARK)
    return {
        PREROUTING: (_FIP_IN, _PORTS, Missed()),
        POSTROUTING: (_FIP_OUT, *lengths, hairpin, Missed()),
    }


class _Entries:
    """The entries of a spec; what it has in common with the last one asked for is not looked at again."""

    def __init__(self) -> None:
        self._last: tuple[GatewaySpec, Entries[EntryKey, Endpoint]] = (GatewaySpec(), Entries())

    def __call__(self, spec: GatewaySpec) -> Entries[EntryKey, Endpoint]:
        """Every entry of the spec; where two objects make one key the older has it."""
        known, found = self._last
        fips = spec.fips.changes(known.fips)
        changes = (
            _singly(_eip_entry, *spec.eips.changes(known.eips))
            | _singly(_dnat_entry, *spec.dnats.changes(known.dnats))
            | _singly(_fip_entry, *fips)
        )
        changes |= _fip_sources(spec.fips, *fips)
        changes |= _prefixes(spec.snats, *spec.snats.changes(known.snats))
        found = found.changed(changes)
        self._last = (spec, found)  # both at once: threads may call
        return found


entries = _Entries()


def _singly(
    made: Callable[[T], tuple[EntryKey, Endpoint]], gone: Iterable[T], fresh: Iterable[T]
) -> dict[EntryKey, Endpoint | None]:
    """What becomes of the entries of objects of which each has one of its own."""
    found: dict[EntryKey, Endpoint | None] = {made(item)[0]: None for item in gone}
    return found | dict(map(made, fresh))


def _eip_entry(eip: Eip) -> tuple[EntryKey, Endpoint]:
    return EntryKey("hairpin", eip.ip), (eip.ip, 0)


def _dnat_entry(dnat: Dnat) -> tuple[EntryKey, Endpoint]:
    return EntryKey("ports", dnat.eip, dnat.protocol, dnat.external_port), (dnat.internal_ip, dnat.internal_port)


def _fip_entry(fip: Fip) -> tuple[EntryKey, Endpoint]:
    return EntryKey("fip-in", fip.eip), (fip.internal_ip, 0)


def _fip_sources(fips: Keyed[Fip], gone: Sequence[Fip], fresh: Sequence[Fip]) -> dict[EntryKey, Endpoint | None]:
    """What becomes of the sources that the changed floating IPs have or had: the oldest one of each decides."""
    concerned = {fip.internal_ip for fip in (*gone, *fresh)}
    found: dict[EntryKey, Endpoint | None] = {EntryKey("fip-out", ip): None for ip in concerned}
    oldest = (fip for fip in reversed(tuple(fips)) if fip.internal_ip in concerned)
    return found | {EntryKey("fip-out", fip.internal_ip): (fip.eip, 0) for fip in oldest}


def _prefixes(snats: Keyed[Snat], gone: Sequence[Snat], fresh: Sequence[Snat]) -> dict[EntryKey, Endpoint | None]:
    """What becomes of the prefixes of the changed source translations."""
    prefixes = {snat.internal_cidr for snat in (*gone, *fresh)}
    found: dict[EntryKey, Endpoint | None] = {_key(prefix, how): None for prefix in prefixes for how in (True, False)}
    return found | {snat_key(snat): (snat.eip, 0) for snat in _oldest(snats, prefixes)}


def _oldest(snats: Keyed[Snat], prefixes: Container[str]) -> Iterable[Snat]:
    """The source translation that decides for each of these prefixes."""
    found: dict[str, Snat] = {}
    for snat in snats:
        if snat.internal_cidr in prefixes:
            found.setdefault(snat.internal_cidr, snat)
    return found.values()


def snat_key(snat: Snat) -> EntryKey:
    """The key of a source translation: its prefix, in the map for the length and for how ports are chosen."""
    return _key(snat.internal_cidr, snat.random_fully)


def _key(prefix: str, random_fully: bool) -> EntryKey:
    address, _, length = prefix.partition("/")
    return EntryKey(f"snat-{length}-random" if random_fully else f"snat-{length}", address)


def hindrance(setting: Setting, ruleset: Mapping[ChainRef, Rules], found: str) -> str:
    """Why there shall be no maps, in one line; empty if nothing speaks against them.

    ``found`` is what the driver found in the kernel outside of the chains of our iptables variant.
    """
    if setting == "off":
        return "switched off (NATGW_FASTPATH=off)"
    for ref, hook in nat.HOOKS:
        if ref.table == "nat" and (rule := _ahead(ruleset.get(ref, ()), hook)):
            return f"another rule stands ahead of ours in {ref.table} {ref.chain}: {render_rule(rule)}"
    return found


def _ahead(rules: Rules, hook: AnyRule) -> AnyRule | None:
    """The first rule, if that is not the jump to our chain; where that jump is missing it will be appended."""
    return next((rule for rule in rules[:1] if rule != hook), None)


def edits(wanted: MapTable, standing: MapTable) -> Iterator[MapEdit]:
    """What turns one table into the other, in an order in which the kernel takes it as one transaction."""
    if wanted.damaged or not wanted.stands:
        if standing.stands:
            yield DropTable()
        return
    if standing.damaged:
        yield DropTable()
        standing = NO_TABLE
    unasked = standing.maps - wanted.maps
    changed = list(wanted.entries.differences(standing.entries))
    changed.sort(key=_key_of)  # map by map, and the same order in every process: strings hash differently in each
    yield from (DropEntry(key) for key, _, was in changed if was is not None and key.map not in unasked)
    if standing.chains != wanted.chains or standing.maps != wanted.maps:
        yield WriteChains(wanted.chains, tuple(sorted(unasked)))
    yield from (AddEntry(key, target) for key, target, _ in changed if target is not None)


def _key_of(change: tuple[EntryKey, object, object]) -> EntryKey:
    return change[0]
