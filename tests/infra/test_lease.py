"""Writers beside each other, one that must be alone, and holders that were killed; on a local disk and on S3."""

import json
import time

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
        with lease.alone(place, "erase"):  # its own rerun
            pass
    with lease.writing(place, "night"):
        pass


def test_who_asks_is_told_of_other_writers_alone(place):
    assert not lease.another_writes(place, "me")
    with lease.writing(place, "me"), lease.reading(place, "reader"):
        assert not lease.another_writes(place, "me")
        with lease.writing(place, "you"):
            assert lease.another_writes(place, "me")
    assert not lease.another_writes(place, "me")


def test_a_killed_holders_lease_runs_out(place):
    def held(seconds):
        kept = {"owner": "killed", "kind": "writing", "until": time.time() + seconds}
        Storage(place).write_bytes(f"{lease.FOLDER}/writing-killed.json", json.dumps(kept).encode())

    held(60)
    with pytest.raises(ConcurrentRunError, match="run killed is at work"):
        with lease.alone(place, "erase"):
            pass
    held(-0.1)
    with lease.alone(place, "erase"):
        pass


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
