"""The environment variables that configure the daemon; each is documented in docs/manual.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_network
from pathlib import Path
from typing import Literal, cast, get_args

from api.listen import ANYWHERE, METRICS_LISTEN, CannotListen, parse_listen
from api.tls import Exposure, TlsFiles
from gateway.drift import Policy as DriftPolicy
from gateway.watcher.options import LogOptions
from rules.desired import ArpPolicy
from rules.fastpath import Setting as FastpathSetting
from rules.inputguard import InputPolicy

IptablesChoice = Literal["auto", "legacy", "nft"]
LogFormat = Literal["console", "json"]


class BadSetting(ValueError):
    """An environment variable says something that cannot be."""


@dataclass(frozen=True)
class Settings:
    """Where the daemon lives and how it behaves."""

    run_dir: Path
    state_dir: Path
    env_file: Path
    iptables: IptablesChoice
    arp: ArpPolicy
    drift: DriftPolicy
    listen: str | None
    token_file: Path | None
    metrics_listen: str | None
    log: LogFormat = "console"
    input: InputPolicy | None = None
    exposure: Exposure = field(default_factory=Exposure)
    fastpath: FastpathSetting = "auto"

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Settings:
        """Read NATGW_*; an empty value counts as absent. Raises BadSetting naming the variable."""
        token_file = environment.get("NATGW_TOKEN_FILE")
        try:
            LogOptions.of(environment)  # the flow watcher reads it for itself, and would have nobody to complain to
        except ValueError as error:
            raise BadSetting(str(error)) from error
        return cls(
            run_dir=Path(environment.get("NATGW_RUN_DIR") or "/run/natgw"),
            state_dir=Path(environment.get("NATGW_STATE_DIR") or "/var/lib/natgw"),
            env_file=Path(environment.get("NATGW_ENV_FILE") or "/etc/kube-ovn/nat-gateway.env"),
            iptables=cast(IptablesChoice, _one_of(environment, "NATGW_IPTABLES", get_args(IptablesChoice))),
            arp=cast(ArpPolicy, _one_of(environment, "NATGW_ARP", get_args(ArpPolicy))),
            drift=cast(DriftPolicy, _one_of(environment, "NATGW_DRIFT", get_args(DriftPolicy))),
            listen=environment.get("NATGW_LISTEN") or None,
            token_file=Path(token_file) if token_file else None,
            metrics_listen=environment.get("NATGW_METRICS_LISTEN") or None,
            fastpath=cast(FastpathSetting, _one_of(environment, "NATGW_FASTPATH", get_args(FastpathSetting))),
            log=cast(LogFormat, _one_of(environment, "NATGW_LOG", get_args(LogFormat))),
            input=_input_policy(environment),
            exposure=_exposure(environment),
        )


def _exposure(environment: Mapping[str, str]) -> Exposure:
    names = ("NATGW_TLS_CERT", "NATGW_TLS_KEY", "NATGW_TLS_CLIENT_CA")
    cert, key, client_ca = (Path(value) if (value := environment.get(name)) else None for name in names)
    if (cert is None) != (key is None) or (client_ca and not cert):
        raise BadSetting("NATGW_TLS_CERT and NATGW_TLS_KEY belong together, and NATGW_TLS_CLIENT_CA needs both")
    anywhere = _one_of(environment, "NATGW_LISTEN_ANYWHERE", ("no", ANYWHERE)) == ANYWHERE
    words = (environment.get("NATGW_LISTEN_RATE") or "50:100").split(":")
    if len(words) != 2 or not all(word.isascii() and word.isdigit() and int(word[:9]) > 0 for word in words):
        raise BadSetting("NATGW_LISTEN_RATE is not like 50:100 (requests a second of one caller, and at once)")
    tls = TlsFiles(cert, key, client_ca) if cert and key else None
    return Exposure(tls, anywhere, (float(words[0]), float(words[1])))


def _input_policy(environment: Mapping[str, str]) -> InputPolicy | None:
    """What may be sent to the gateway itself: None for all. Where it was told to listen counts as named."""
    choice = _one_of(environment, "NATGW_INPUT", ("open", "protect"))
    ports = [_port(word) for word in _listed(environment, "NATGW_METRICS_PORTS")]
    peers = [_peer(word) for word in _listed(environment, "NATGW_BGP_PEERS")]
    places = {name: environment.get(name) for name in ("NATGW_LISTEN", METRICS_LISTEN)}
    try:
        listeners = tuple(parse_listen(place, name) for name, place in places.items() if place)
    except CannotListen as error:
        raise BadSetting(str(error)) from error
    return InputPolicy(tuple(ports), tuple(peers), listeners) if choice == "protect" else None


def _listed(environment: Mapping[str, str], name: str) -> list[str]:
    return [word for word in environment.get(name, "").replace(",", " ").split() if word]


def _port(word: str) -> int:
    if not (word.isascii() and word.isdigit() and 0 < int(word[:9]) < 65536):
        raise BadSetting(f"NATGW_METRICS_PORTS: {word!r} is not a port number")
    return int(word)


def _peer(word: str) -> str:
    try:
        return str(ip_network(word))
    except ValueError as error:
        raise BadSetting(f"NATGW_BGP_PEERS: {error}") from error


def _one_of(environment: Mapping[str, str], name: str, choices: tuple[str, ...]) -> str:
    value = environment.get(name) or choices[0]
    if value not in choices:
        raise BadSetting(f"{name}={value!r}: must be one of {', '.join(choices)}")
    return value


def interfaces_file(path: Path) -> dict[str, str]:
    """The NAME=value lines of the env file that ``init`` left; empty where there is none."""
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        return {}
    pairs = (line.partition("=") for line in lines if not line.lstrip().startswith("#"))
    return {name.strip(): value.strip().strip("\"'") for name, separator, value in pairs if separator}
