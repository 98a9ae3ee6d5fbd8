"""What a pod's environment asks of the supervisor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gateway.bfd import control
from gateway.bfd.ladder import Pair
from gateway.bfd.session import SessionConfig
from gateway.bfd.udp import canonical


@dataclass(frozen=True, slots=True)
class Settings:
    """What the environment asks for. Raises ValueError, whose text names the variable."""

    pod_ips: list[str]
    peer_ips: list[str]
    session: SessionConfig
    socket_path: Path
    state_path: Path
    metrics_address: str

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
        )
        if not settings.pairs():
            raise ValueError("POD_IPS and BFD_PEER_IPS have no pair of the same family")
        return settings

    def pairs(self) -> list[Pair]:
        """Every session there should be: all pairs of one family."""
        return sorted(
            {(local, remote) for local in self.pod_ips for remote in self.peer_ips if (":" in local) == (":" in remote)}
        )


def _addresses(environment: Mapping[str, str], name: str) -> list[str]:
    addresses: list[str] = []
    for item in environment.get(name, "").split(","):
        address = canonical(item.strip())
        if address is None:
            raise ValueError(f"{name}: not an IPv4 or IPv6 address: {item.strip()!r}")
        addresses.append(address)
    return addresses


def _number(environment: Mapping[str, str], name: str, default: int, greatest: int) -> int:
    text = environment.get(name) or str(default)
    if not text.isdecimal() or not 1 <= int(text) <= greatest:
        raise ValueError(f"{name}: {text!r} is not a number from 1 to {greatest}")
    return int(text)
