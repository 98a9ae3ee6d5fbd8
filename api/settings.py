"""The environment variables that configure the daemon; each is documented in the README."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from gateway.drift import Policy as DriftPolicy
from gateway.watcher.options import LogOptions
from rules.desired import ArpPolicy
from rules.fastpath import Setting as FastpathSetting

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
    log: LogFormat = "console"
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
            fastpath=cast(FastpathSetting, _one_of(environment, "NATGW_FASTPATH", get_args(FastpathSetting))),
            log=cast(LogFormat, _one_of(environment, "NATGW_LOG", get_args(LogFormat))),
        )


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
