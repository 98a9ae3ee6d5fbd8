"""The part of Kube-OVN's controller that the lab plays: which exec calls a gateway gets, in which order, and when one
counts as failed. Pure, but for `run`.

Order, as in the controller: a new gateway gets ``init`` and then its subnet routes in one call; then come the EIPs;
rules wait for their EIP. The argument form is that of Kube-OVN 1.17: direct argv, one word for each rule.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lab.netns import inside
from lab.world import GatewayPlan, Share, Snat

SCRIPT = Path(__file__).resolve().parent.parent / "image" / "rootfs" / "kube-ovn" / "nat-gateway.sh"
_EXEC_SECONDS = 60.0  # the controller waits for ever; a lab says so instead


@dataclass(frozen=True)
class Call:
    """One exec in the gateway's container."""

    verb: str
    rules: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " ".join((self.verb, *self.rules))


@dataclass(frozen=True)
class Outcome:
    """What an exec gave back."""

    code: int
    stdout: str
    stderr: str

    @property
    def error(self) -> str | None:
        """The controller's rule: success is exit 0 and no line on stderr but empty ones and ``Warning:`` ones."""
        lines = [line.strip() for line in self.stderr.splitlines()]
        left = [line for line in lines if line and not line.startswith("Warning:")]
        if self.code:
            return f"exit {self.code}: {' / '.join(left) or self.stdout.strip() or 'no word of why'}"
        return f"exit 0, but stderr says: {' / '.join(left)}" if left else None


class ExecFailed(Exception):
    """An exec that the controller would count as failed (and repeat for ever)."""

    def __init__(self, gateway: str, call: Call, error: str) -> None:
        super().__init__(f"{gateway}: {call}: {error}")
        self.gateway, self.call, self.error = gateway, call, error


def creation_calls(gw: GatewayPlan) -> list[Call]:
    """What a new gateway gets before it is ready."""
    # Where Kube-OVN is not the primary CNI, the controller looks the interfaces' names up and tells them.
    named = (f"{gw.vpc_interface},{gw.external_interface}",) if gw.management is not None else ()
    calls = [Call("init", named)]
    if gw.vpc_cidrs:
        calls.append(Call("subnet-route-add", tuple(f"{cidr},{gw.lan_gateway}" for cidr in gw.vpc_cidrs)))
    return calls


def object_calls(gw: GatewayPlan) -> list[Call]:
    """EIPs, then floating IPs and DNAT rules. SNAT rules need the iptables version first: see `snat_call`."""
    return [
        *(Call("eip-add", (str(eip.address),)) for eip in gw.eips),
        *(Call("floating-ip-add", (f"{fip.eip},{fip.internal}",)) for fip in gw.fips),
        *(
            Call("dnat-add", (f"{d.eip},{d.external_port},{d.protocol},{d.internal},{d.internal_port}",))
            for d in gw.dnats
        ),
        *(share_call(share) for share in gw.shares),
    ]


def share_call(share: Share) -> Call:
    """All backends at once, sorted as text, as the controller names them whenever one of the rules changes."""
    backends = "@".join(sorted(f"{address}:{port}" for address, port in share.backends))
    return Call("nft-dnat-map-add", (f"{share.eip},{share.external_port},{share.protocol},{backends}",))


VERSION_CALL = Call("get-iptables-version")


def snat_call(snat: Snat, version: str) -> Call:
    """``snat-add``, with ``--random-fully`` where iptables is newer than 1.6.2."""
    rule = f"{snat.eip},{snat.cidr}"
    return Call("snat-add", (f"{rule},--random-fully" if _newer(version, (1, 6, 2)) else rule,))


def iptables_version(outcome: Outcome) -> str:
    """What the controller reads from ``get-iptables-version``; any stderr makes it read nothing, a failure '1.0.0'."""
    if outcome.code:
        return "1.0.0"
    found = re.search(r"v([0-9]+(?:\.[0-9]+)+)", outcome.stdout)
    return "" if outcome.stderr or found is None else found.group(1)


def _newer(version: str, than: tuple[int, ...]) -> bool:
    return tuple(int(part) for part in version.split(".")) > than if version else False


@dataclass(frozen=True)
class Pod:
    """A gateway's container as exec sees it: its namespace, its files, its environment."""

    gateway: GatewayPlan
    directory: Path
    script: Path = SCRIPT

    def argv(self, call: Call) -> list[str]:
        """The full command. The version is asked for through ``/bin/bash -c``, as the controller does it."""
        environment = {
            "NATGW_RUN_DIR": self.directory / "run",
            "NATGW_STATE_DIR": self.directory / "state",
            "NATGW_ENV_FILE": self.directory / "nat-gateway.env",
            "GATEWAY_V4": self.gateway.external_gateway,
            "GATEWAY_V6": "",
        }
        command = ["bash", str(self.script), call.verb, *call.rules]
        if call == VERSION_CALL:
            command = ["/bin/bash", "-c", shlex.join(command)]
        return inside(self.gateway.netns, ["env", *(f"{key}={value}" for key, value in environment.items()), *command])

    def run(self, call: Call) -> Outcome:
        """Exec as a kubelet does: over when the process has ended and nobody holds its stdout or stderr any more."""
        with subprocess.Popen(
            self.argv(call), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            try:
                stdout, stderr = process.communicate(timeout=_EXEC_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                assert process.stdout is not None
                assert process.stderr is not None
                process.stdout.close()
                process.stderr.close()
                return Outcome(
                    124, "", f"still running, or still holding stdout or stderr, after {_EXEC_SECONDS:.0f} s"
                )
        return Outcome(process.returncode, stdout, stderr)


def drive(pod: Pod, calls: Sequence[Call], told: Callable[[Pod, Call, Outcome], None]) -> None:
    """Run the calls in order, tell of each. Raises ExecFailed at the first that fails."""
    for call in calls:
        outcome = pod.run(call)
        told(pod, call, outcome)
        if outcome.error is not None:
            raise ExecFailed(pod.gateway.name, call, outcome.error)


def drive_snats(pod: Pod, told: Callable[[Pod, Call, Outcome], None]) -> None:
    """The version before every ``snat-add``, as the controller asks it."""
    for snat in pod.gateway.snats:
        outcome = pod.run(VERSION_CALL)
        told(pod, VERSION_CALL, outcome)
        drive(pod, [snat_call(snat, iptables_version(outcome))], told)
