"""What a pod's environment asks of the supervisor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gateway.bfd import control
from gateway.bfd.health import Hysteresis
from gateway.bfd.ladder import Pair
from gateway.bfd.session import SessionConfig
from gateway.bfd.targets import Target
from gateway.bfd.udp import canonical, family_of


@dataclass(frozen=True, slots=True)
class Settings:
    """What the environment asks for. Raises ValueError, whose text names the variable."""

    pod_ips: list[str]
    peer_ips: list[str]
    session: SessionConfig
    socket_path: Path
    state_path: Path
    metrics_address: str
    multihop: bool = False
    """``NATGW_BFD_MULTIHOP=on``: peers are more than one hop away (RFC 5883, UDP port 4784). OVN never speaks so."""

    @staticmethod
    def read(environment: Mapping[str, str]) -> Settings:
        """The settings of an environment."""
        settings = Settings(
            pod_ips=_addresses(environment, "POD_IPS"),
            peer_ips=_addresses(environment, "BFD_PEER_IPS"),
            session=SessionConfig(
                desired_min_tx=_number(environment, "BFD_MIN_TX", 1000, 4_294_967) * 1000,
                required_min_rx=_number(environment, "BFD_MIN_RX", 1000, 4_294_967) * 1000,
                detect_mult=_number(environment, "BFD_MULTI", 3, 255),
            ),
            socket_path=Path(control.supervisor_socket(environment)),
            state_path=Path(
                environment.get("BFDD_SUPERVISOR_STATE") or control.supervisor_directory(environment) + "/state.json"
            ),
            metrics_address=environment.get("BFDD_METRICS_ADDRESS") or ":10669",
            multihop=_switch(environment, "NATGW_BFD_MULTIHOP", "off"),
        )
        if not settings.pairs():
            raise ValueError("POD_IPS and BFD_PEER_IPS have no pair of the same family")
        return settings

    def served(self) -> list[str]:
        """The addresses that there are sessions for."""
        return sorted({local for local, _ in self.pairs()})

    def pairs(self) -> list[Pair]:
        """Every session there should be: all pairs of one family."""
        return sorted(
            {(local, remote) for local in self.pod_ips for remote in self.peer_ips if (":" in local) == (":" in remote)}
        )


@dataclass(frozen=True, slots=True)
class HealthSettings:
    """What the environment asks of the health probes. Raises ValueError, whose text names the variable.

    =============================  =======  ========================================================================
    ``NATGW_BFD_HEALTH``           on       ``off``: sessions are Up whatever the gateway can do
    ``NATGW_BFD_HEALTH_INTERVAL``  1000     milliseconds between probes, 100 or more
    ``NATGW_BFD_HEALTH_FALL``      2000     milliseconds that a probe must fail until the sessions go Down
    ``NATGW_BFD_HEALTH_RISE``      5000     milliseconds without a failure until they may come Up again
    ``NATGW_BFD_HEALTH_GATEWAYS``  -        external gateways, one per family; else the default route's
    ``NATGW_BFD_HEALTH_TARGETS``   -        ``icmp:ADDRESS`` and ``tcp:ADDRESS:PORT``, separated by commas
    =============================  =======  ========================================================================

    That the gateway behind the outer interface has gone is noticed within three intervals and the fall time, where the
    kernel's timers could be set (see ``probes``); that the interface has no carrier, at once.
    """

    enabled: bool
    interval: int
    hysteresis: Hysteresis
    gateways: Mapping[int, str]
    targets: tuple[Target, ...]

    @staticmethod
    def read(environment: Mapping[str, str]) -> HealthSettings:
        """The settings of an environment."""
        interval = _number(environment, "NATGW_BFD_HEALTH_INTERVAL", 1000, 3_600_000, least=100)
        gateways = _addresses(environment, "NATGW_BFD_HEALTH_GATEWAYS", optional=True)
        targets = environment.get("NATGW_BFD_HEALTH_TARGETS") or ""
        try:
            parsed = tuple(Target.parse(item) for item in targets.split(",") if targets)
        except ValueError as error:
            raise ValueError(f"NATGW_BFD_HEALTH_TARGETS: {error}") from None
        return HealthSettings(
            enabled=_switch(environment, "NATGW_BFD_HEALTH", "on"),
            interval=interval * 1000,
            hysteresis=Hysteresis(
                # A failure must be seen twice: the first look may fall between a question and its answer.
                fall=_number(environment, "NATGW_BFD_HEALTH_FALL", 2000, 3_600_000, least=interval) * 1000,
                rise=_number(environment, "NATGW_BFD_HEALTH_RISE", 5000, 3_600_000) * 1000,
            ),
            gateways={int(family_of(address)): address for address in gateways},
            targets=parsed,
        )


def drain_grace(environment: Mapping[str, str]) -> int:
    """``NATGW_BFD_DRAIN``, the seconds that the end may be put off while traffic moves, in microseconds.

    25 by default: Kube-OVN's pods with BFD are killed 30 s after they were told to end. 0 ends at once.
    """
    return _number(environment, "NATGW_BFD_DRAIN", 25, 86_400, least=0) * 1_000_000


def _switch(environment: Mapping[str, str], name: str, default: str) -> bool:
    text = environment.get(name) or default
    if text not in ("on", "off"):
        raise ValueError(f"{name}: {text!r} is neither on nor off")
    return text == "on"


def _addresses(environment: Mapping[str, str], name: str, optional: bool = False) -> list[str]:
    addresses: list[str] = []
    if optional and not environment.get(name):
        return addresses
    for item in environment.get(name, "").split(","):
        address = canonical(item.strip())
        if address is None:
            raise ValueError(f"{name}: not an IPv4 or IPv6 address: {item.strip()!r}")
        addresses.append(address)
    return addresses


def _number(environment: Mapping[str, str], name: str, default: int, greatest: int, least: int = 1) -> int:
    text = environment.get(name) or str(default)
    if not text.isdecimal() or not least <= int(text) <= greatest:
        raise ValueError(f"{name}: {text!r} is not a number from {least} to {greatest}")
    return int(text)
