"""Which of the two iptables variants holds the rules: the one in which Kube-OVN and its tests look for them."""

from __future__ import annotations

from typing import Literal, get_args

from gateway.kernel.restore import program
from gateway.kernel.tool import run
from gateway.ports import Refused, Variant
from rules.ruleset import Family

Setting = Literal["auto", "legacy", "nft"]


def choose(setting: str, family: Family = 4) -> Variant:
    """The variant for a setting (``auto``, ``legacy`` or ``nft``).

    ``auto`` asks what Kube-OVN's nat-gateway.sh asks: legacy if ``iptables-legacy -t nat -S INPUT 1`` succeeds,
    that is, if the program is there and the kernel has the legacy nat table (the question loads it); else nft.
    Raises ValueError for another setting.
    """
    match setting:
        case "legacy" | "nft":
            return setting
        case "auto":
            return "legacy" if _legacy_works(family) else "nft"
        case _:
            raise ValueError(f"iptables variant {setting!r} is none of {', '.join(get_args(Setting))}")


def _legacy_works(family: Family) -> bool:
    try:
        return run([program("legacy", family), "-t", "nat", "-S", "INPUT", "1"]).code == 0
    except Refused:
        return False


def iptables_version(variant: Variant) -> str:
    """What the variant's ``iptables -V`` prints, such as ``iptables v1.8.11 (legacy)``; raises Refused if it fails."""
    argv = [f"iptables-{variant}", "-V"]
    ended = run(argv)
    if ended.code:
        raise Refused(" ".join(argv), ended.stderr.strip(), retryable=False)
    return ended.stdout.strip()
