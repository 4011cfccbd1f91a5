"""Writers beside each other, one that must be alone, and holders that were killed; on a local disk and on S3."""

import errno
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest

from infra import lease
from infra.errors import ConcurrentRunError
from infra.storage import Storage
from infra.table import Table


def held(place) -> list[str]:
    return Storage(place).list(lease.FOLDER)


def test_writers_work_beside_each_other_and_leave_nothing(place):
    with lease.writing(place, "one"), lease.writing(place, "two"):
        assert len(held(place)) == 2
    assert held(place) == []


def test_who_must_be_alone_waits_for_writers_and_writers_for_him(place):
    with lease.writing(place, "night"):
        with pytest.raises(
            ConcurrentRunError, match=r"run night is at work here \(writing; .* run it again with run_id=erase"
        ):
            with lease.alone(place, "erase"):
                pytest.fail("both are at work")
        assert len(held(place)) == 1  # the refused one has taken its own back
    with lease.alone(place, "erase"):
        for other in (lease.writing, lease.alone):
            with pytest.raises(ConcurrentRunError, match=r"run erase is at work here \(alone"):
                with other(place, "night"):
                    pytest.fail("both are at work")
    with lease.writing(place, "night"):
        pass


def test_who_asks_is_told_of_other_writers_alone(place):
    assert not lease.another_writes(place, "me")
    with lease.writing(place, "me"), lease.reading(place, "reader"):
        assert not lease.another_writes(place, "me")
        with lease.writing(place, "you"):
            assert lease.another_writes(place, "me")
    assert not lease.another_writes(place, "me")


def put_down(place, kind="writing", owner="killed", renewed=1) -> str:
    """The lease of a process that was killed."""
    name = f"{lease.FOLDER}/{kind}-{owner}-1.json"
    Storage(place).write_bytes(name, json.dumps({"owner": owner, "kind": kind, "renewed": renewed}).encode())
    return name


@contextmanager
def awake(*given):
    """The process was only held up: it renews its lease again."""
    stop = threading.Event()

    def renew():
        renewed = 2
        while not stop.wait(0.1):
            put_down(*given, renewed)
            renewed += 1

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_a_killed_holders_lease_runs_out(place, monkeypatch):
    put_down(place)
    with pytest.raises(ConcurrentRunError, match="run killed is at work"):
        with lease.alone(place, "erase"):
            pass
    monkeypatch.setattr(lease, "LASTS_S", 1.0)
    time.sleep(2.1)  # S3 tells whole seconds
    with lease.alone(place, "erase"):
        pass


@pytest.mark.parametrize("ahead", [1000, -1000])
def test_a_clock_that_differs_from_the_storages_neither_ends_nor_keeps_a_lease(tmp_path, monkeypatch, ahead):
    wall = time.time
    with lease.reading(str(tmp_path), "train"):
        monkeypatch.setattr(time, "time", lambda: wall() + ahead)
        with pytest.raises(ConcurrentRunError, match="run train is at work"):
            with lease.alone(str(tmp_path), "erase"):
                pytest.fail("both are at work")
    killed = tmp_path / put_down(str(tmp_path))
    os.utime(killed, (wall() - 121, wall() - 121))
    with lease.alone(str(tmp_path), "erase"):
        pass


def test_the_lease_of_a_process_that_was_killed_an_hour_ago_is_removed(tmp_path):
    old, recent = tmp_path / put_down(str(tmp_path)), tmp_path / put_down(str(tmp_path), owner="night")
    os.utime(old, (time.time() - 3601, time.time() - 3601))
    os.utime(recent, (time.time() - 3500, time.time() - 3500))
    with lease.writing(str(tmp_path), "refresh"):
        pass
    assert not old.exists() and recent.exists()


def test_who_may_not_delete_tries_once_to_remove_what_was_left_and_not_at_each_commit(tmp_path, monkeypatch):
    for n in range(5):
        old = tmp_path / put_down(str(tmp_path), owner=f"night-{n}")
        os.utime(old, (1, 1))
    tries = []

    def refused(storage, name):
        tries.append(name)
        raise PermissionError

    monkeypatch.setattr(Storage, "delete", refused)
    with lease.writing(str(tmp_path), "refresh"):
        for _ in range(3):
            lease.refuse_if_not_alone(str(tmp_path), "refresh")
        assert len(tries) == 1


def test_a_lease_tells_the_release_before_until_when_it_holds(tmp_path):
    with lease.writing(str(tmp_path), "night"):
        (name,) = held(str(tmp_path))
        assert 100 < json.loads(Storage(str(tmp_path)).read_bytes(name))["until"] - time.time() <= 120


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lease, "RENEW_S", 0.8)


HOLDS = """
import sys
from infra import lease
lease.RENEW_S = 0.1
with lease.alone(sys.argv[1], "erase"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_processes_of_one_run_keep_each_other_out_and_each_gives_back_its_own(tmp_path, spec, rows, quick):
    root = str(tmp_path)
    table = Table.create(f"{root}/things", spec, 4)
    files = table.write(rows(bucket=1), "erase")
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", HOLDS, root], stdin=pipe, stdout=pipe, text=True) as first:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        own = held(root)
        with pytest.raises(ConcurrentRunError, match="run erase is at work here"):
            with lease.alone(root, "erase"):
                pytest.fail("both are at work")
        with pytest.raises(ConcurrentRunError, match="run erase is at work here"):
            table.commit(files, run_id="erase", group=0, mode="append", planned_on=0)
        assert held(root) == own and len(own) == 1
        first.communicate("")
    assert held(root) == [] and table.version == 0


def test_a_rerun_waits_for_no_longer_than_a_renewal_and_commits_beside_what_the_killed_one_left(
    place, spec, rows, quick
):
    table = Table.create(f"{place}/things", spec, 4)
    left = put_down(place, "alone", "erase")
    began = time.monotonic()
    with lease.alone(place, "erase"):
        assert 0.8 < time.monotonic() - began < 10
        table.commit(table.write(rows(), "erase"), run_id="erase", group=0, mode="append", planned_on=0)
        assert left in held(place)
        with awake(place, "alone", "erase"):
            time.sleep(0.5)
            with pytest.raises(ConcurrentRunError, match="run erase is at work here"):
                lease.refuse_if_not_alone(place, "erase")


def test_leases_that_several_killed_processes_left_are_watched_together(tmp_path, quick):
    for n in range(4):
        name = f"{lease.FOLDER}/alone-erase-{n}.json"
        Storage(str(tmp_path)).write_bytes(name, json.dumps({"owner": "erase", "kind": "alone", "renewed": n}).encode())
    began = time.monotonic()
    with lease.alone(str(tmp_path), "erase"):
        assert time.monotonic() - began < 2 * lease.WATCHED * lease.RENEW_S


def test_who_may_only_read_does_not_wait_for_a_process_that_was_killed_an_hour_ago(tmp_path, monkeypatch):
    old = tmp_path / put_down(str(tmp_path), "alone")
    os.utime(old, (time.time() - 3700, time.time() - 3700))

    def refused(storage, name, data):
        raise PermissionError(errno.EACCES, "read only")

    monkeypatch.setattr(Storage, "write_bytes", refused)
    monkeypatch.setattr(lease.time, "sleep", lambda seconds: pytest.fail("it waits"))
    with lease.reading(str(tmp_path), "train"):
        pass


def test_who_commits_without_a_lease_watches_one_that_seems_to_have_run_out(tmp_path, quick, monkeypatch):
    root, wall = str(tmp_path), time.time
    put_down(root, "alone")
    with pytest.raises(ConcurrentRunError, match="run killed is at work here"):
        lease.refuse_if_not_alone(root, "night")
    monkeypatch.setattr(time, "time", lambda: wall() + 1000)
    with awake(root, "alone", "killed"), pytest.raises(ConcurrentRunError, match="run killed is at work here"):
        lease.refuse_if_not_alone(root, "night")
    lease.refuse_if_not_alone(root, "night")


def test_who_is_alone_and_could_not_renew_its_lease_stops_before_its_next_commit(tmp_path, monkeypatch):
    root = str(tmp_path)
    monkeypatch.setattr(lease, "RENEW_S", 0.1)
    with lease.alone(root, "erase"):
        lease.refuse_if_not_alone(root, "erase")
        monkeypatch.setattr(lease, "LASTS_S", 0.6)
        with monkeypatch.context() as failing:
            failing.setattr(Storage, "write_bytes", lambda *given: 1 / 0)
            time.sleep(0.9)
        seen = Storage(root).read_bytes(held(root)[0])
        time.sleep(0.5)
        assert Storage(root).read_bytes(held(root)[0]) != seen  # renewed too late: another may have begun
        with pytest.raises(ConcurrentRunError, match="run erase has to be alone here, and could not renew its lease"):
            lease.refuse_if_not_alone(root, "erase")


def test_a_renewal_that_lands_too_late_is_none(tmp_path, monkeypatch):
    root, write = str(tmp_path), Storage.write_bytes
    monkeypatch.setattr(lease, "RENEW_S", 0.1)
    with lease.alone(root, "erase"):
        monkeypatch.setattr(lease, "LASTS_S", 0.6)

        def slowly(*given):
            time.sleep(0.55)
            write(*given)

        with monkeypatch.context() as slow:  # one renewal begins in time and lands late, and those behind it are quick
            slow.setattr(Storage, "write_bytes", slowly)
            time.sleep(0.3)
        time.sleep(0.7)
        with pytest.raises(ConcurrentRunError, match="run erase has to be alone here, and could not renew its lease"):
            lease.refuse_if_not_alone(root, "erase")


def test_a_living_holder_renews_its_lease(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "LASTS_S", 2.0)
    monkeypatch.setattr(lease, "RENEW_S", 0.1)
    with lease.writing(str(tmp_path), "long"):
        time.sleep(2.5)
        with pytest.raises(ConcurrentRunError):
            with lease.alone(str(tmp_path), "erase"):
                pass


def test_nobody_commits_while_somebody_is_alone_but_he_himself(place, spec, rows):
    table = Table.create(f"{place}/things", spec, 4)
    files = table.write(rows(bucket=1), "night")
    with lease.alone(place, "erase"):
        with pytest.raises(ConcurrentRunError, match="run erase is at work"):
            table.commit(files, run_id="night", group=0, mode="append", planned_on=0)
        own = table.commit(table.write(rows(bucket=2), "erase"), run_id="erase", group=0, mode="append", planned_on=0)
    assert own.version == 1
    table.commit(files, run_id="night", group=0, mode="append", planned_on=0)
    assert table.snapshot().rows == 4


@pytest.mark.parametrize("owner", ["../../up", "a/b", "ü" * 100])
def test_any_owners_lease_stays_in_the_folder(tmp_path, owner):
    with lease.writing(str(tmp_path / "root"), owner):
        assert len(held(str(tmp_path / "root"))) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["root"]


def test_who_makes_files_of_what_he_reads_keeps_away_who_must_be_alone_and_nobody_else(place):
    with lease.writing(place, "night"), lease.reading(place, "train"), lease.reading(place, "export"):
        assert len(held(place)) == 3
    Storage(place).write_bytes("histories/x", b"")
    with lease.reading(place, "train"):
        with pytest.raises(ConcurrentRunError, match=r"run train is at work here \(reading; "):
            with lease.alone(place, "erase"):
                pytest.fail("both are at work")
    with lease.alone(place, "erase"):
        with pytest.raises(ConcurrentRunError, match=r"run erase is at work here \(alone"):
            with lease.reading(place, "train"):
                pytest.fail("both are at work")


def test_who_may_not_delete_ends_as_its_work_did(s3_server, s3, capsys):
    s3_server.fault = lambda environ: "403" if environ["REQUEST_METHOD"] == "DELETE" else None
    with lease.writing(s3, "night"):
        pass
    said = capsys.readouterr().out
    assert "could not be given back (PermissionError): it runs out within 120 s" in said and "s3:DeleteObject" in said
    with pytest.raises(ConcurrentRunError, match=r"run night is at work here \(writing"):
        with lease.alone(s3, "erase"):
            pytest.fail("the lease is still there")


def test_a_reader_lays_nothing_down_where_there_is_nothing_to_read(tmp_path):
    with lease.reading(str(tmp_path / "mistyped"), "train"):
        assert not (tmp_path / "mistyped").exists()


def test_who_may_only_read_goes_on_without_a_lease_and_says_so(s3_server, s3, capsys):
    Storage(s3).write_bytes("things/x", b"x")
    s3_server.fault = lambda environ: "403" if environ["REQUEST_METHOD"] in ("PUT", "POST", "DELETE") else None
    with lease.reading(s3, "export"):
        assert Storage(s3).read_bytes("things/x") == b"x" and held(s3) == []
    assert "these credentials may only read here, so that this run has no lease" in capsys.readouterr().out
    with pytest.raises(PermissionError):
        with lease.writing(s3, "night"):
            pytest.fail("it cannot write")
    s3_server.fault = lambda environ: None
    with lease.alone(s3, "erase"):
        s3_server.fault = lambda environ: "403" if environ["REQUEST_METHOD"] == "PUT" else None
        with pytest.raises(ConcurrentRunError, match="run erase is at work here"):
            with lease.reading(s3, "export"):
                pytest.fail("an erase is at work")
