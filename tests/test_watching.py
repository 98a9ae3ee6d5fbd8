"""What the daemon tells its flow watcher: the whole spec once, then what changed."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from api.watching import Change, objects
from gateway.watcher.accounts import Accounts, Objects
from rules.spec import GatewaySpec
from tests.strategies import quick, specs


def told(accounts: Accounts, line: bytes) -> None:
    said = json.loads(line)
    accounts.change(Objects.of(said["gone"]), Objects.of(said["new"]))


def known(accounts: Accounts) -> tuple[object, ...]:
    """Everything by which a flow finds its account, and the account's objects."""
    places = (accounts._dnats, accounts._fips_in, accounts._fips_out)
    found = [{place: account.targets for place, account in each.items()} for each in places]
    snats = {
        (eip, shift, network): account.targets
        for eip, by_length in accounts._snats.items()
        for shift, networks in by_length.items()
        for network, account in networks.items()
    }
    return (*found, snats, accounts._names, accounts._all.keys(), accounts.ports.keys(), set(accounts.sums()))


@quick
@given(st.lists(specs, min_size=1, max_size=4))
def test_changes_lead_where_the_whole_spec_does(versions: list[GatewaySpec]) -> None:
    told_all, told_changes = Accounts(), Accounts()
    old = None
    for new in versions:
        change = Change.between(old, new)
        told(told_changes, change.line)
        told(told_changes, change.line)  # it may stand in the whole spec already
        old = new
    whole = objects(versions[-1])
    told_all.set(Objects.of(json.loads(whole)))
    assert known(told_changes) == known(told_all)
    assert list(map(set, told_changes.objects)) == list(map(set, told_all.objects))
    told_changes.set(Objects.of(json.loads(whole)))
    assert known(told_changes) == known(told_all)
    assert list(map(list, told_changes.objects)) == list(map(list, told_all.objects))
