"""nftables' transaction counter: whether anybody but us wrote to the namespace's nftables.

The kernel counts the transactions of a network namespace, whichever table they are about. Asking for the number takes
0.05 ms; a transaction can also name the number that it was made for, and is refused if that has passed.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from gateway.kernel.netlink import Message, Netlink, attributes
from gateway.kernel.nft_messages import GEN_ID, GETGEN, NETLINK_NETFILTER, NFGENMSG
from gateway.ports import Refused

# What a kernel without nftables answers to a question about them, and one without netfilter's sockets at all.
_NO_NFTABLES = (errno.EINVAL, errno.EOPNOTSUPP, errno.EPROTONOSUPPORT, errno.ENOENT)


def last(netlink: Netlink) -> int | None:
    """The number of the last transaction; None where the kernel has no nftables. Raises OSError."""
    try:
        (answer,) = netlink.ask(Message(GETGEN, 0, NFGENMSG))
    except OSError as error:
        if error.errno not in _NO_NFTABLES:
            raise
        return None
    return int.from_bytes(attributes(answer, len(NFGENMSG))[GEN_ID], "big")


class Generation:
    """The counter, and how often it moved without us; for the thread in whose namespace it is first asked."""

    def __init__(self) -> None:
        self._netlink = Netlink(NETLINK_NETFILTER)
        self._absent = False
        self._number: int | None = None
        self._others = 0

    def number(self) -> int | None:
        """The number of the last transaction; None where the kernel has no nftables.

        Raises Refused where the question fails.
        """
        if self._absent:  # asking again would have the kernel look for its module again
            return None
        try:
            number = last(self._netlink)
        except OSError as error:
            words = error.strerror or str(error)
            raise Refused("ask for the nftables generation", words, retryable=True) from error
        self._absent = number is None
        return number

    def others(self) -> int | None:
        """A number that changes with every transaction of somebody else; None where there are no nftables."""
        number = self.number()
        if number is None:
            return None
        if number != self._number:
            self._number = number
            self._others += 1
        return self._others

    def number_if(self, others: object) -> int | None:
        """The number of the last transaction, if ``others`` is still what it was; else None."""
        return self._number if others is not None and self.others() == others else None

    @contextmanager
    def own(self) -> Iterator[None]:
        """What is done within is one transaction of ours, or none: if no more happens, ``others`` stays the same."""
        self._absent = False
        self.others()
        before = self._number
        yield  # where it fails, nothing is known of whose transactions there were
        number = self.number()
        if before is not None and number == before + 1:
            self._number = number
