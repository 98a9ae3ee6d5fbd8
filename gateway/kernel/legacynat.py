"""Whether somebody has rules in a legacy nat table, asked without iptables and without loading the table.

The kernel says where each built-in chain begins, and where the rule is that carries out its policy: where the two are
one, the chain is empty.
"""

from __future__ import annotations

from pathlib import Path

from gateway.kernel.xtables import info, open_socket
from gateway.ports import Refused

_TRANSLATING = ("PREROUTING", "POSTROUTING")
_NAMES = Path("/proc/thread-self/net/ip_tables_names")


def occupied(table: str) -> str:
    """The name of the first of PREROUTING and POSTROUTING that is not empty; an empty text if both are."""
    try:
        loaded = _NAMES.read_text().split()
    except FileNotFoundError:
        return ""
    if table not in loaded:
        return ""
    with open_socket() as asking:
        try:
            chains = info(asking, table).builtin
        except OSError as error:
            words = error.strerror or str(error)
            raise Refused(f"ask for the legacy table {table}", words, retryable=True) from error
    return next((name for name, (begin, policy) in chains.items() if name in _TRANSLATING and begin != policy), "")
