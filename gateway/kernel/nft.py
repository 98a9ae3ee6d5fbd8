"""The nftables table of share-type DNAT, through nft: a script is one transaction, a listing is JSON.

nft is started only where it has something to say: the kernel counts the transactions on its nftables, and as
long as that number is the one of the last reading, so is the answer. Asking for it takes 0.05 ms, a listing 5.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence

from gateway.kernel.generation import Generation
from gateway.kernel.netlink import Message, Netlink, attributes, text
from gateway.kernel.nft_messages import GETTABLE, NETLINK_NETFILTER, NFGENMSG, TABLE_NAME
from gateway.kernel.tool import run
from gateway.ports import Refused
from rules.apply import apply_commands
from rules.nft import MAP, TABLE, NftCommand, NftTable, parse, script

log = logging.getLogger(__name__)

_TRIES = 5
_LIST_ALL = ["nft", "-j", "list", "table", "ip", TABLE]
_LIST_TABLE = ["nft", "-j", "--terse", "list", "table", "ip", TABLE]
_LIST_MAP = ["nft", "-j", "list", "map", "ip", TABLE, MAP]
_STEP = f"edit table ip {TABLE}"
# Words of the C library for what may pass: memory, and another transaction in between.
_PASSING = ("Cannot allocate memory", "Resource temporarily unavailable", "Interrupted system call")


class KernelNft:
    """``gateway.ports.Nft`` in the network namespace of the thread that first uses it.

    All drivers of a namespace's nftables are given one ``generation``, so that none takes another's writes for a
    stranger's.
    """

    def __init__(self, generation: Generation | None = None) -> None:
        self._netlink = Netlink(NETLINK_NETFILTER)
        self._generation = generation or Generation()
        self._read: tuple[int, NftTable] | None = None

    def read(self) -> NftTable:
        """The table; empty where there is none, or nothing that could list it."""
        for _ in range(_TRIES):
            others = self._generation.others()
            if others is None:
                return NftTable()
            if self._read is not None and self._read[0] == others:
                return self._read[1]
            # A listing that somebody's transaction fell into is one of neither state; the next turn notices.
            self._read = (others, self._list())
        raise Refused(_LIST_TABLE_TEXT, "the kernel's nftables never stood still", retryable=True)

    def commit(self, commands: Sequence[NftCommand]) -> None:
        """Carry the commands out as one transaction; raises Refused, and nothing has changed then."""
        before, self._read = self._read, None
        if before is not None:
            self._read = (_OUTDATED, before[1])
        try:
            commanded = script(commands)
        except ValueError as error:
            raise Refused(_STEP, str(error), retryable=False) from error
        known = before is not None and before[0] == self._generation.others()
        with self._generation.own():
            ended = run(["nft", "-f", "-"], stdin=commanded)
        if before is not None and known and not ended.code and len(commands) <= _FEW:
            # The kernel took it whole, and the generation tells whether anything else has happened.
            self._read = (before[0], apply_commands(before[1], commands))
        if ended.code:
            reason = _words(ended.stderr) or f"exit code {ended.code}"
            raise Refused(_STEP, reason, retryable=any(word in reason for word in _PASSING))

    def forget(self) -> None:
        """Read everything anew the next time."""
        if self._read is not None:
            self._read = (_OUTDATED, self._read[1])

    def _list(self) -> NftTable:
        if not self._stands():
            return NftTable()
        if shutil.which("nft") is None:
            log.error("the table ip %s stands, but nft is not installed: nobody looks after it", TABLE)
            return NftTable()
        # Without sets, of which the last reading tells, nothing is in the table that need not be listed.
        whole = self._read is not None and not self._read[1].sets
        listed = [run(_LIST_ALL)] * 2 if whole else [run(_LIST_TABLE), run(_LIST_MAP)]
        if listed[0].code:
            raise Refused(_LIST_TABLE_TEXT, _words(listed[0].stderr), retryable=True)
        try:
            return parse(*(ended.stdout if ended.code == 0 else _NOTHING for ended in listed))
        except ValueError as error:
            raise Refused(_LIST_TABLE_TEXT, str(error), retryable=False) from error

    def _stands(self) -> bool:
        try:
            tables = self._netlink.dump(Message(GETTABLE, 0, NFGENMSG))
        except OSError as error:
            raise Refused("list nftables", error.strerror or str(error), retryable=True) from error
        return any(text(attributes(said, len(NFGENMSG))[TABLE_NAME]) == TABLE for said in tables)


_OUTDATED = -1
_FEW = 100  # commands; what more of them have done is listed, which takes half a second for 2,000 services
_LIST_TABLE_TEXT = " ".join(_LIST_TABLE)
_NOTHING = '{"nftables": []}'


def _words(stderr: str) -> str:
    """The first complaint and the command that it is about, in one line.

    nft prints ``/dev/stdin:3:1-40: Error: ...``, the command, and carets under it.
    """
    lines = [line.strip() for line in stderr.splitlines() if line.strip(" \t^~")]
    complaint = "; ".join(lines[:2])
    return complaint.partition("Error: ")[2] or complaint
