"""The command line, in the manner of Go's ``flag``: one dash or two, the value behind ``=`` or as the next word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

LISTEN_ADDRESS = ":10666"

# The flags of klog, which Kube-OVN's observer has too. They concern a log that this program does not write.
_KLOG_SWITCHES = {"add_dir_header", "alsologtostderr", "logtostderr", "one_output", "skip_headers", "skip_log_headers"}
_KLOG_VALUES = {"log_backtrace_at", "log_dir", "log_file", "log_file_max_size", "stderrthreshold", "v", "vmodule"}
_OURS = {"config", "network-status", "listen-address"}
_SWITCHES = {"health-check", *_KLOG_SWITCHES}


class Options(NamedTuple):
    """What the command line asks for: paths, and where to listen (HOST:PORT, every address without a host)."""

    config: str = "/etc/kube-ovn-observer/config.json"
    network_status: str = "/etc/podinfo/network-status"
    listen_address: str = LISTEN_ADDRESS
    health_check: bool = False


def parse(argv: Sequence[str]) -> Options:
    """The options in a command line. Raises ValueError."""
    found: dict[str, str] = {}
    words = iter(argv)
    for word in words:
        if not word.startswith("-") or not word.strip("-"):
            break
        name, equals, value = word[2 if word.startswith("--") else 1 :].partition("=")
        if name in _SWITCHES:
            found[name] = value if equals else "true"
        elif name in _OURS | _KLOG_VALUES:
            if not equals:
                value = next(words, "")
                if not value:
                    raise ValueError(f"flag needs an argument: -{name}")
            found[name] = value
        else:
            raise ValueError(f"flag provided but not defined: -{name}")
    defaults = Options()
    return Options(
        found.get("config", defaults.config),
        found.get("network-status", defaults.network_status),
        found.get("listen-address", "") or defaults.listen_address,
        found.get("health-check", "false").lower() in ("1", "t", "true"),
    )
