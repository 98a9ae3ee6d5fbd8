"""The measurements at their smallest: that they run and measure what they say, not what comes out."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import page
from bench.__main__ import QUESTIONS, run
from bench.bed import Bed
from bench.generator import Line, Traffic
from bench.scale import Scale

pytestmark = pytest.mark.alone


@pytest.mark.parametrize("name", QUESTIONS)
def test_measurement_runs_and_is_written_down(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run([name], Scale("tiny"), tmp_path)
    documents = page.load(tmp_path)
    assert documents
    text = tmp_path / "page.md"
    text.write_text(f"before\n{page.BEGIN}\noutdated\n{page.END}\nafter\n")
    page.write(documents, text, tmp_path / "pictures")
    written, said = text.read_text(), capsys.readouterr().out
    assert written.startswith("before\n")
    assert written.endswith("after\n")
    assert "outdated" not in written
    for document in documents:
        assert document["figures"], document
        assert all(min(figure["values"]) > 0 for figure in document["figures"]), document
        assert document["question"] in said
        assert document["question"] in written
        assert (tmp_path / "pictures" / f"{document['name']}.svg").read_text().rstrip().endswith("</svg>")
        assert f"(pictures/{document['name']}.svg)" in written


# Few enough frames that a veth's queue of 256 takes them all, however late its reader comes.
@pytest.mark.parametrize("protocol", ["udp", "tcp"])
def test_every_frame_of_the_generator_is_a_new_connection(protocol: str) -> None:
    bed = Bed()
    try:
        # One rule that looks at the connection makes the kernel track them.
        bed.gateway.run("iptables-legacy", "-A", "FORWARD", "-m", "conntrack", "--ctstate", "INVALID", "-j", "DROP")
        line = Line(bed, Traffic(True, ("198.18.0.0/15 10.1.0.0/16 8080",), f"meta l4proto {protocol}", protocol))
        done = line.round(0.15, rate=1000)
    finally:
        bed.remove()
    assert done.sent > 0
    assert (done.arrived, done.astray, done.tracked) == (done.sent, 0, done.sent)


def test_frames_that_arrive_otherwise_are_counted_apart() -> None:
    bed = Bed()
    try:
        templates = ("198.18.0.0/15 10.1.0.1/32 8080", "198.18.0.0/15 10.1.0.2/32 8080")
        done = Line(bed, Traffic(True, templates, "ip daddr 10.1.0.1")).round(0.15, rate=1000)
    finally:
        bed.remove()
    # Half of them, as the generator's fixed numbers have it: 24 of 64, the fewest that it sends, and soon nearly half.
    assert 0.3 * done.sent < done.arrived < 0.7 * done.sent
    assert done.arrived + done.astray == done.sent
