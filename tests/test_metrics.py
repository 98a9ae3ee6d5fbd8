"""What Prometheus reads: every metric as it is declared and documented, with the values that it should have."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.parser import text_string_to_metric_families

from api import metric_docs
from api.http_traffic import Figures
from api.metric_names import DAEMON
from api.metrics import Exposition, GatewayCollector, no_limits
from gateway import meters
from gateway.meters import METERS
from gateway.observer.ctnetlink import DESTROY, NEW
from gateway.ports import Shaped
from gateway.watcher import exposition as watched
from gateway.watcher.accounts import Objects
from gateway.watcher.exposition import METRICS, Metric
from rules.tc import ClassKey
from tests.gateway_kit import Gateway, example, gateway
from tests.http_kit import Face, face
from tests.watcher_kit import EIP, EIP2, FLOATING, OBJECTS, PEER, Book, counted, left, mapped

ROOT = Path(__file__).resolve().parent.parent
COLLECTOR = {"accounting": True, "lost": 2, "resyncs": 5, "resyncSeconds": 0.25}
LOG = {"enabled": True, "records": 7, "drops": {"rate_limit": 3}}


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Gateway]:
    made = gateway(tmp_path)
    made.service.change(lambda _: example(), by="test").result()
    yield made
    made.service.close()


def samples(text: str) -> dict[str, dict[tuple[str, ...], float]]:
    """Values by the name of the sample and the values of its labels, in their order."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for one in family.samples:
            found.setdefault(one.name, {})[tuple(one.labels.values())] = one.value
    return found


def declared(families: Iterable[Family], metrics: Iterable[Metric]) -> None:
    """Every family is declared so, and its samples have exactly its labels."""
    by_name = {metric.name.removesuffix("_total"): metric for metric in metrics}
    for family in families:
        metric = by_name[family.name]
        assert (family.type, family.documentation) == (metric.kind, metric.meaning)
        for one in family.samples:
            assert set(one.labels) - {"le"} == set(metric.labels), one
            assert one.name.startswith(metric.name)


def test_the_documentation_is_what_the_code_declares() -> None:
    assert (ROOT / "docs/metrics.md").read_text() == metric_docs.markdown(), (
        "run: python -m api.metric_docs > docs/metrics.md"
    )


def test_names_are_unique_and_follow_the_conventions() -> None:
    names = [metric.name for metric in (*DAEMON, *METRICS)] + list(METERS)
    assert len(names) == len(set(names))
    for metric in (*DAEMON, *METRICS):
        assert (metric.kind == "counter") == metric.name.endswith("_total"), metric.name
        assert metric.meaning.endswith("."), metric.name


def test_what_other_pods_tell_is_documented_too() -> None:
    """Names in the sources of BFD's and the observer's metrics, against those in the documentation."""
    of_bfd = set(re.findall(r'"((?:kube_ovn_bfdd|natgw_bfd)_\w+)"', (ROOT / "gateway/bfd/metrics.py").read_text()))
    assert of_bfd == {name for name, _ in metric_docs.BFD}
    source = (ROOT / "gateway/observer/metrics.py").read_text()
    of_observer = set(re.findall(r'"((?:observability|conntrack_nat)_\w+)"', source)) - {"observability"}
    told = set(re.findall(r"`((?:observability|conntrack_nat|interface)_\w+)`", metric_docs.OBSERVER))
    assert of_observer <= told
    assert {name for name in told - of_observer if not name.startswith("interface_")} == {
        "conntrack_nat_packets_total",
        "conntrack_nat_bytes_total",
    }


def test_the_daemon_tells_what_is_declared(made: Gateway) -> None:
    meters.DRIFT_REPAIRS.add("rules")
    families = list(GatewayCollector(made.service, no_limits).collect())
    of_meters = [Metric(m.name, m.kind, m.explanation, m.labels) for m in METERS.values()]
    declared(families, [*DAEMON, *of_meters])
    assert {f.name for f in families} == {
        m.name.removesuffix("_total") for m in (*DAEMON, *of_meters) if m.name != "natgw_flow_watcher_up"
    }


def test_the_values_of_a_gateway(made: Gateway) -> None:
    text = Exposition(made.service, None, no_limits)().decode()
    found = samples(text)
    assert found["natgw_ready"] == {(): 1}
    assert found["natgw_objects"]["dnats",] == found["natgw_objects"]["fips",] == 1
    assert found["natgw_info"] == {("nat-gateway", "legacy", "test"): 1}
    assert found["natgw_interface_up"] == {("vpc",): 1, ("external",): 1}
    assert found["natgw_flow_watcher_up"] == {(): 0}, "there is none"
    assert "natgw_eip_bytes_total" not in found, "what nobody counts is missing, not 0"
    assert found["natgw_process_open_fds"][()] > 0
    histogram = found["natgw_transaction_duration_seconds_bucket"]
    assert histogram["+Inf", "committed"] >= histogram["0.002", "committed"] >= 0


def test_limits_have_what_they_are_and_what_they_did(made: Gateway) -> None:
    def shaped(classes: Iterable[ClassKey]) -> Mapping[ClassKey, Shaped]:
        return {key: Shaped(1000 + key.minor, 10, 2, 30) for key in classes}

    found = samples(Exposition(made.service, None, shaped)().decode())
    limits = {
        ("out", "all", "1", EIP_OF_EXAMPLE): 1_250_000.0,
        ("in", "src 203.0.113.0/24", "2", "net1"): 312_500.0,
    }
    assert found["natgw_qos_limit_bytes_per_second"] == limits
    assert found["natgw_qos_bytes_total"].keys() == limits.keys()
    assert set(found["natgw_qos_drops_total"].values()) == {2}
    assert found["natgw_qos_bytes_total"]["out", "all", "1", EIP_OF_EXAMPLE] == 1001


EIP_OF_EXAMPLE = "192.168.0.10"


def test_limits_whose_counters_cannot_be_read_are_still_told(made: Gateway) -> None:
    def refused(classes: Iterable[ClassKey]) -> Mapping[ClassKey, Shaped]:
        raise OSError(1, "Operation not permitted")

    found = samples(Exposition(made.service, None, refused)().decode())
    assert len(found["natgw_qos_limit_bytes_per_second"]) == 2
    assert "natgw_qos_bytes_total" not in found


def watcher_text(book: Book) -> str:
    return watched.exposition(book, 1000.5, COLLECTOR, LOG)


def test_the_watcher_tells_what_is_declared() -> None:
    book = Book()
    for one in (left(), left(FLOATING, "10.0.1.33"), mapped()):
        book.event(NEW, one)
        book.event(DESTROY, counted(one, 1, 100, 2, 300))
    living = left(port=41000)
    book.event(NEW, living)
    text = watcher_text(book)
    families = list(text_string_to_metric_families(text))
    declared(families, METRICS)
    assert [f.name for f in families] == [m.name.removesuffix("_total") for m in METRICS]
    found = samples(text)
    assert found["natgw_eip_bytes_total"][EIP2, "out"] == 100
    assert found["natgw_eip_bytes_total"][EIP2, "in"] == 300
    assert found["natgw_dnat_packets_total"][EIP, "8888", "tcp", "in"] == 1
    assert found["natgw_dnat_packets_total"][EIP, "8888", "tcp", "out"] == 2
    assert found["natgw_fip_flows_total"][FLOATING, "10.0.1.33", "out"] == 1
    assert found["natgw_snat_flows_active"][EIP2, "10.0.1.0/24", "out"] == 1
    assert found["natgw_snat_flows_total"][EIP2, "10.0.1.0/24", "out"] == 2
    assert found["natgw_translated_flows_total"] == {("in",): 1, ("out",): 3}
    assert found["natgw_snat_ports_in_use"] == found["natgw_snat_ports_busiest_in_use"] == {(EIP2,): 1}
    assert found["natgw_flow_events_total"] == {("new",): 4, ("end",): 3}
    assert found["natgw_flow_log_drops_total"] == {("rate_limit",): 3}
    assert PEER not in text, "peers are no labels"


def test_series_are_bounded_and_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched, "MOST_OBJECTS", 2)
    eips = tuple(f"192.0.2.{n}" for n in range(10, 15))
    book = Book(objects=Objects(eips=eips, snats=tuple((eip, "10.0.0.0/8") for eip in eips)))
    for eip in eips:
        one = left(eip)
        book.event(NEW, one)
        book.dump(*(counted(other, 1, 100, 0, 0) for other in [one]))
        book.event(DESTROY, counted(one, 1, 100, 0, 0))
    found = samples(watcher_text(book))
    assert found["natgw_eip_bytes_total"] == {
        **{(eip, way): number for eip in eips[:2] for way, number in (("in", 0.0), ("out", 100.0))},
        ("other", "in"): 0.0,
        ("other", "out"): 300.0,
    }
    assert found["natgw_snat_flows_total"]["other", "other", "out"] == 3


def test_the_traffic_of_a_spec_has_a_series_for_every_object() -> None:
    found = samples(watcher_text(Book()))
    assert len(found["natgw_eip_bytes_total"]) == 2 * len(OBJECTS.eips)
    assert len(found["natgw_dnat_bytes_total"]) == 2 * len(OBJECTS.dnats)


@pytest.fixture
def asked(tmp_path: Path) -> Iterator[Face]:
    yield from face(tmp_path)


def test_over_http(asked: Face) -> None:
    answer = asked("GET", "/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert samples(answer.text)["natgw_initialized"] == {(): 0}


def test_a_listener_for_metrics_has_nothing_else(asked: Face) -> None:
    from api.http_traffic import metrics_app  # noqa: PLC0415
    from tests.http_kit import call  # noqa: PLC0415

    app = metrics_app(Figures.of(asked.gateway.service))
    assert "natgw_ready" in call(app, "GET", "/metrics").text
    assert call(app, "GET", "/healthz").text == "ok\n"
    for method, path in (("GET", "/v1/gateway"), ("GET", "/v1/traffic"), ("GET", "/openapi.json"), ("PUT", "/metrics")):
        assert call(app, method, path).status_code in (404, 405), path
