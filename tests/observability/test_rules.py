"""The rules and the dashboard, without a server: promtool computes what they give for series that are told."""

import json
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.observability.queries import DIRECTORY, metrics, queries, targets
from tests.services.prometheus import program
from trimsfs.control.metrics import HELP

ALERTS = yaml.safe_load((DIRECTORY / "alerts.yml").read_text())["groups"][0]["rules"]
RECORDING = yaml.safe_load((DIRECTORY / "recording.yml").read_text())["groups"][0]["rules"]
LABELS = 'instance="host:9099",job="trimsfs",mountpoint="/models"'


@dataclass(frozen=True)
class Case:
    """Series, a value each minute, and minutes at which the alert fires and at which it does not."""

    series: dict[str, str]
    fires: tuple[int, ...]
    quiet: tuple[int, ...]
    labels: dict[str, str] = field(default_factory=dict)


def counter(grows: str) -> Case:
    """A counter that alerts as soon as it grows, and no more some time afterwards."""
    return Case({grows: "0x10 3x100"}, fires=(12, 15), quiet=(5, 100))


CASES = {
    "TrimsfsExporterDown": Case({"up": "1x5 0x10 1x20"}, fires=(9, 14), quiet=(4, 7, 20)),
    "TrimsfsMountDown": Case({"trimsfs_up": "1x5 0x10 1x20"}, fires=(8, 14), quiet=(4, 6, 20)),
    # No scrape has its metrics any more; nor has one of an exporter that is down, which is another alert's.
    "TrimsfsMountGone": Case({"trimsfs_up": "1x5 stale", "up": "1x10 0x1 1x20"}, fires=(8, 14), quiet=(4, 6, 11, 25)),
    "TrimsfsKeeperGone": Case({"trimsfs_keeper_connected": "1x5 0x10 1x20"}, fires=(8, 14), quiet=(4, 6, 20)),
    # An upgrade and a crash are no crash loop; nor is what was counted before.
    "TrimsfsServerCrashes": Case(
        {"trimsfs_server_restarts_total": "7x10 8x4 9x20 10 11 12x40"}, (40, 45), (12, 20, 60)
    ),
    # An outage while servers are replaced, of which one opens its circuit late, one misses a scrape, and one has ended;
    # a short opening; an outage without a gap.
    "TrimsfsStoreDown": Case(
        {"trimsfs_store_circuit_open": "0x5 1 0 1 _ 1 stale 1 0x10 1 0x20 1x10 0x20"},
        fires=(10, 13, 50, 58),
        quiet=(4, 8, 16, 26, 27, 28, 40, 48, 60),
    ),
    "TrimsfsStoreErrors": Case(
        {"trimsfs_store_failed_attempts_total": "0x10 0+10x20 210x40", "trimsfs_store_requests_total": "0+100x70"},
        fires=(20, 30),
        quiet=(5, 12, 50),
    ),
    "TrimsfsFetchFailed": counter("trimsfs_fetch_failed_chunks_total"),
    "TrimsfsDescriptorsNearLimit": Case(
        {"trimsfs_server_open_descriptors": "100x5 900x10 100x20", "trimsfs_server_descriptor_limit": "1024x40"},
        fires=(12, 14),
        quiet=(4, 8, 20),
    ),
    "TrimsfsCacheFull": counter("trimsfs_disk_refused_chunks_total"),
    "TrimsfsDiskOrMemoryDamage": counter("trimsfs_integrity_repaired_chunks_total"),
    "TrimsfsWrongBytes": counter("trimsfs_integrity_differing_total"),
    "TrimsfsQuarantine": Case({"trimsfs_integrity_doubtful": "0x5 1x10 0x20"}, fires=(7, 14), quiet=(4, 20)),
    # Comparisons come and go: what waits for an hour at a time is not being compared.
    "TrimsfsNotCompared": Case({"trimsfs_integrity_to_compare": "2x30 0 2x150 0x9"}, fires=(160,), quiet=(40, 85, 189)),
    "TrimsfsSignatureRefused": counter("trimsfs_signatures_refusals_total"),
    "TrimsfsGpuLoadsFail": counter('trimsfs_gpu_device_failed_loads_total{device="GPU-1"}'),
    "TrimsfsFleetMemberFails": Case(
        {"trimsfs_fleet_failing_members": "0x5 1x15 0x20"}, fires=(17, 19), quiet=(4, 14, 25)
    ),
    "TrimsfsFleetDamage": counter("trimsfs_fleet_damaged_chunks_total"),
    "TrimsfsColdOpensSlow": Case(
        {
            'trimsfs_files_open_seconds_bucket{why="store",le="10.0"}': "0+9x20 189+5x40 394+9x40",
            'trimsfs_files_open_seconds_count{why="store"}': "0+9x20 189+9x40 558+9x40",
        },
        fires=(45, 60),
        quiet=(15, 28, 95),
    ),
}


AS_A_HOST_STARTS = (
    "TrimsfsFleetMemberFails",
    Case({"trimsfs_fleet_failing_members": "1x20"}, fires=(15,), quiet=(5,)),
)
"""A host that finds a member failing as it starts waits with the alert."""


def labelled(series: str) -> str:
    """A series with the labels of a mount."""
    name, _, labels = series.partition("{")
    return f"{name}{{{','.join([LABELS, *filter(None, [labels.rstrip('}')])])}}}"


def run_promtool(directory: Path, tests: list[dict[str, Any]]) -> None:
    """Have promtool compute what the rules give for series."""
    file = directory / "tests.json"  # JSON is YAML
    rules = [str(DIRECTORY / name) for name in ("alerts.yml", "recording.yml")]
    file.write_text(json.dumps({"rule_files": rules, "evaluation_interval": "30s", "tests": tests}))
    done = subprocess.run([program("promtool"), "test", "rules", file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_promtool_takes_the_rules() -> None:
    files = [DIRECTORY / name for name in ("alerts.yml", "recording.yml")]
    done = subprocess.run([program("promtool"), "check", "rules", *files], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert f"SUCCESS: {len(ALERTS)} rules found" in done.stdout


def test_every_alert_has_a_case_a_severity_and_what_to_do() -> None:
    assert CASES.keys() == {rule["alert"] for rule in ALERTS}
    for rule in ALERTS:
        assert rule["labels"]["severity"] in {"critical", "warning"}
        assert rule["annotations"].keys() == {"summary", "action"}


def test_the_table_of_the_documentation_has_every_alert() -> None:
    text = (DIRECTORY.parents[1] / "docs/operations.md").read_text()
    told = {row[0]: row for row in re.findall(r"^\| `(Trimsfs\w+)` \| (\w+) \| ([^|]+) \|", text, re.MULTILINE)}

    assert list(told) == [rule["alert"] for rule in ALERTS]
    for rule in ALERTS:
        _, severity, expression = told[rule["alert"]]
        assert severity == rule["labels"]["severity"]
        assert set(metrics(expression)) <= set(metrics(rule["expr"]))


@pytest.mark.slow
@pytest.mark.parametrize(("alert", "case"), [*CASES.items(), AS_A_HOST_STARTS])
def test_an_alert_fires_for_its_fault_and_stops(alert: str, case: Case, tmp_path: Path) -> None:
    firing = f'count(ALERTS{{alertname="{alert}",alertstate="firing"}})'
    any_alert = 'count(ALERTS{alertstate="firing"})'
    yes = [{"labels": "{}", "value": 1}]
    expected = [
        *({"expr": firing, "eval_time": f"{minute}m", "exp_samples": yes} for minute in case.fires),
        *({"expr": any_alert, "eval_time": f"{minute}m", "exp_samples": yes} for minute in case.fires),
        *({"expr": any_alert, "eval_time": f"{minute}m", "exp_samples": []} for minute in case.quiet),
    ]
    series = [{"series": labelled(name), "values": values} for name, values in case.series.items()]
    run_promtool(tmp_path, [{"interval": "1m", "input_series": series, "promql_expr_test": expected}])


@pytest.mark.slow
def test_a_member_of_a_fleet_that_fails_is_one_alert_for_all_hosts(tmp_path: Path) -> None:
    series = [
        {"series": labelled("trimsfs_fleet_failing_members").replace("host", host), "values": "0x5 1x20"}
        for host in ("one", "two", "three")
    ]
    firing = 'count(ALERTS{alertname="TrimsfsFleetMemberFails",alertstate="firing"})'
    expected = [{"expr": firing, "eval_time": "20m", "exp_samples": [{"labels": "{}", "value": 1}]}]
    run_promtool(tmp_path, [{"interval": "1m", "input_series": series, "promql_expr_test": expected}])


@pytest.mark.slow
def test_recording_rules(tmp_path: Path) -> None:
    opens = "trimsfs_files_open_seconds_count"
    series = {
        f'{opens}{{why="resident"}}': "0+6x20",
        f'{opens}{{why="disk"}}': "0+2x20",
        f'{opens}{{why="store"}}': "0+2x20",
        'trimsfs_model_saved_bytes{model="a"}': "100x20",
        'trimsfs_model_saved_bytes{model="b"}': "20x20",
        "trimsfs_store_requests_total": "0+10x20",
        "trimsfs_store_failed_attempts_total": "0+1x20",
    }
    results = {
        "instance_mountpoint:trimsfs_opens:hit_ratio5m": 0.8,
        "instance_mountpoint:trimsfs_memory_saved:bytes": 120,
        "instance_mountpoint:trimsfs_store_failed_attempts:ratio5m": 0.1,
    }
    assert results.keys() == {rule["record"] for rule in RECORDING}
    expected = [
        {"expr": f"round({name}, 0.001)", "eval_time": "15m"}
        | {"exp_samples": [{"labels": '{instance="host:9099",mountpoint="/models"}', "value": value}]}
        for name, value in results.items()
    ]
    told = [{"series": labelled(name), "values": values} for name, values in series.items()]
    run_promtool(tmp_path, [{"interval": "1m", "input_series": told, "promql_expr_test": expected}])


def test_what_is_asked_for_is_what_servers_and_the_exporter_tell() -> None:
    known = {"up", "trimsfs_up"}
    for name in HELP:
        known |= {f"trimsfs_{name}{ending}" for ending in ("", "_total", "_bucket", "_count", "_sum")}
    expressions = [rule["expr"] for rule in [*ALERTS, *RECORDING]] + queries()

    asked = {name for expression in expressions for name in metrics(expression)}
    assert len(asked) > 20
    assert asked - known == set()


def test_the_dashboard_tells_apart_hosts_that_mount_at_one_place() -> None:
    for target in targets():
        expression, legend = target["expr"], target.get("legendFormat", "")
        selectors = re.findall(r"\{[^}]*\}", expression)
        assert selectors
        assert set(selectors) == {'{instance=~"$instance",mountpoint=~"$mountpoint"}'}, expression
        assert ("{{mountpoint}}" in legend) == ("{{instance}}" in legend), legend
        for labels in re.findall(r"by \(([^)]*)\)", expression):
            assert ("mountpoint" in labels) == ("instance" in labels), expression
