"""Threads and logical CPUs are counted by what the container may use, not by the host."""

import os

import pytest

from infra import cores, session
from pipelines.run import CpuShare

QUOTA, PERIOD = "cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"


@pytest.mark.parametrize(
    ("files", "may_run_on", "expected"),
    [
        ({"cpu.max": "800000 100000\n"}, 96, 8),
        ({"cpu.max": "750000 100000\n"}, 96, 7),
        ({"cpu.max": "50000 100000\n"}, 96, 1),
        ({"cpu.max": "max 100000\n"}, 96, 96),
        ({"cpu.max": "9600000 100000\n"}, 12, 12),
        ({QUOTA: "800000\n", PERIOD: "100000\n"}, 96, 8),
        ({QUOTA: "-1\n", PERIOD: "100000\n"}, 96, 96),
        ({}, 5, 5),
    ],
)
def test_a_container_on_a_host_of_96_cores_uses_what_it_may(files, may_run_on, expected, tmp_path, monkeypatch):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(cores, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "cpu_count", lambda: 96)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(may_run_on)))
    assert CpuShare().torch_threads() == expected
    assert CpuShare(2).torch_threads() == max(1, expected // 2) and CpuShare(2, threads=3).torch_threads() == 3
    assert session.local_cpus(None, {}) == max(4, expected)
