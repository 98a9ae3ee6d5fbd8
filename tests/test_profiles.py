"""The example profiles are ones that their programs take."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

SECURITY = Path(__file__).parents[1] / "deploy/security"


def parsed(profile: Path) -> int:
    """The exit status of AppArmor's own parser, which is to load nothing and keep nothing."""
    argv = ["apparmor_parser", "--skip-kernel-load", "--skip-cache", str(profile)]
    return subprocess.run(argv, capture_output=True, check=False, timeout=60).returncode


def test_apparmors_parser_takes_the_profile_and_would_refuse_another(tmp_path: Path) -> None:
    profile = SECURITY / "apparmor.profile"
    assert parsed(profile) == 0
    wrong = tmp_path / "wrong"
    wrong.write_text(profile.read_text().replace("capability net_raw,", "capability net_rwa,"))
    assert parsed(wrong) != 0


@pytest.mark.parametrize(
    "name", ["clone3", "unshare", "setns", "mount", "umount2", "ptrace", "bpf", "init_module", "keyctl"]
)
def test_the_system_calls_that_lead_out_are_not_allowed(name: str) -> None:
    said = json.loads((SECURITY / "seccomp.json").read_text())
    assert said["defaultAction"] == "SCMP_ACT_ERRNO"
    allowed = [group for group in said["syscalls"] if group["action"] == "SCMP_ACT_ALLOW" and not group.get("args")]
    assert not [group for group in allowed if name in group["names"]]
