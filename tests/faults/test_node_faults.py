"""A cluster of three nodes that share S3 and nothing else: the line runs there, and a night in which a node and then
the driver are killed ends with the tables of an undisturbed one."""

import json
import os
import re

import pytest
import yaml

from infra.storage import Storage
from pipelines import tables
from tests.cluster import Nodes
from tests.faults.jobs import Job
from tests.pipelines import small

BUCKETS = 10
CPUS = 3
"""Logical CPUs of a node: what each of the jobs asks for, so that one node that is left does for it."""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(os.geteuid() != 0, reason="a node with a disk of its own takes root"),
]


class Commits:
    """The table's commits, as the server sees them; a store on which each of them and each part of a file takes half a
    second leaves time to kill something between two of them."""

    def __init__(self, server, table):
        self.seen, self._log = set(), re.compile(rf"/{table}[^/]*/_delta_log/\d{{20}}\.json$")
        server.fault = self._fault

    def _fault(self, environ):
        path, put = environ["PATH_INFO"], environ["REQUEST_METHOD"] == "PUT"
        commit = put and self._log.search(path)
        if commit:
            self.seen.add(path)
        return "slow" if commit or (path.endswith(".parquet") and (put or "/histories/" in path)) else None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """World and models; on the other nodes an empty disk stands in its place."""
    root = tmp_path_factory.mktemp("nodes")
    small.make(root, train_users=40, test_users=2, train_requests=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PPLUG_CACHE", str(root / "cache"))
        yield root


@pytest.fixture(scope="module")
def nodes(folder, _s3_server):
    with Nodes(str(folder)) as nodes:
        fill(nodes)
        yield nodes


def fill(nodes):
    """Adds nodes until there are two beside the head."""
    while nodes.alive() < 3:
        nodes.add(CPUS)


@pytest.fixture(scope="module")
def line(folder, nodes):
    """The place on S3 where the line has run undisturbed."""
    place = "s3://tables/line-on-nodes"
    words = ["-m", "tests.line_at", str(folder), str(BUCKETS), place]
    with Job(words, folder / "line.log", nodes.address) as job:
        assert job.wait(900) == 0, job.output[-6000:]
    return place


def rows(place, name):
    return tables.open_table(place, name).snapshot(complete=True).read().to_pylist()


def words(folder, job, run_id, place, values):
    config = folder / f"{run_id}.yaml"
    run = {"run_id": run_id, "run_dir": f"{place}/runs/{run_id}"}
    config.write_text(yaml.safe_dump(values | run))
    return ["-m", "pipelines", job, "--config", str(config)]


def report(place, run_id):
    return json.loads(Storage(f"{place}/runs/{run_id}").read_bytes("report.json"))


def disturbed(nodes, s3_server, words, logs, place, table, stage):
    """Kills the node on which the stage runs and then the driver, each in the middle, and runs the job once more."""
    fill(nodes)
    seen = Commits(s3_server, table).seen

    def lose():
        at_work = nodes.at_work(stage)
        if at_work:
            nodes.lose(at_work[0])
        return bool(at_work)

    with Job(words, logs / "disturbed.log", nodes.address) as job:
        job.wait_until(lose, f"a node with {stage} at work")
        job.wait_until(lambda: nodes.alive() == 2, "the head notices that the node is gone")
        enough = max(len(seen), 1) + 2  # the first may be that of an empty table
        job.wait_until(lambda: len(seen) >= enough, "two commits without the node")
        job.kill_driver()
    s3_server.fault = lambda environ: None
    with Job(words, logs / "again.log", nodes.address) as job:
        assert job.wait() == 0, job.output[-6000:]
    again = report(place, "night")
    assert again["planned"] == again["already_there"] + again["written"]
    assert again["already_there"] > 0 and again["written"] > 0, "the driver was not killed in the middle"


def test_the_line_runs_where_nodes_share_nothing_but_s3(line):
    scores = report(line, "evaluate")["methods"]
    assert set(scores) == {"none", "plug"}
    personas = rows(f"{line}/tables", "personas")
    assert len(personas) == 40 and {row["plug_id"] for row in personas} == {report(line, "train")["plug_id"]}


def test_a_refresh_that_loses_a_node_and_its_driver_makes_the_same_tables(nodes, line, s3_server, s3, folder, tmp_path):
    for name in ("histories", "requests"):
        before, after = (Storage(place).join("tables", name) for place in (line, s3))
        for path in before.list():
            after.write_bytes(path, before.read_bytes(path))
    config = yaml.safe_load(json.dumps(report(line, "refresh-plug")["config"]))
    values = config | {"tables": f"{s3}/tables", "wave_texts": 1, "workers": 2}
    command = words(folder, "refresh", "night", s3, values)
    disturbed(nodes, s3_server, command, tmp_path, s3, "embeddings", "EmbedTexts")
    name = next(name for name in tables.names(f"{line}/tables") if name.startswith("embeddings"))
    for table, key, vectors in ((name, ("user_key", "text_hash"), ("vector",)),
                                ("personas", ("user_key",), ("mean_vector", "persona"))):  # fmt: skip
        want, got = ({tuple(row[part] for part in key): row for row in rows(f"{place}/tables", table)}
                     for place in (line, s3))  # fmt: skip
        assert got.keys() == want.keys() and len(rows(f"{s3}/tables", table)) == len(want)
        for row, wanted in zip((got[one] for one in want), want.values(), strict=True):
            for column, value in wanted.items():
                if column in vectors:  # the last bit depends on how many threads a worker has
                    value = pytest.approx(value, abs=1e-3)
                assert row[column] == value, column


def test_a_generate_that_loses_a_node_and_its_driver_gives_the_same_replies(nodes, line, s3_server, folder, tmp_path):
    config = report(line, "generate")["config"]
    values = config | {"wave_rows": 4, "engine": config["engine"] | {"batch_rows": 2, "in_flight": 1}}
    command = words(folder, "generate", "night", line, values)
    disturbed(nodes, s3_server, command, tmp_path, line, "generations", "Reply")
    found = {}
    for row in rows(f"{line}/tables", "generations"):
        found.setdefault(row.pop("run_id"), []).append(row)
    undisturbed, night = (sorted(map(str, found[run])) for run in ("generate", "night"))
    assert night == undisturbed and len(night) == 2 * 2 * 40
