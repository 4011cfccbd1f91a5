"""S3 as it is set up in the field: what botocore follows, delta's client and s3fs follow; else one line says why."""

import dataclasses
import json
import os
import re
import socket
import sys
import threading
from pathlib import Path

import boto3
import pyarrow as pa
import pytest
from botocore.exceptions import EndpointConnectionError

from infra import nodes, s3
from infra.errors import ConcurrentRunError, InputError
from infra.storage import Storage, is_transient
from infra.table import Table
from pipelines.__main__ import main
from tests.s3_server import S3Server

SECRET = "a-secret-of-the-profile"


@pytest.fixture
def bare(s3_server, monkeypatch, tmp_path):
    """No variable of AWS and no ~/.aws: what a test sets is all there is."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    (tmp_path / ".aws").mkdir()
    return tmp_path / ".aws"


def keys(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")


def by_service_variable(folder, url, monkeypatch):
    keys(monkeypatch)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", url)


def by_variable(folder, url, monkeypatch):
    keys(monkeypatch)
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)


def by_default_profile(folder, url, monkeypatch):
    (folder / "config").write_text(f"[default]\nregion = eu-west-1\nendpoint_url = {url}\n")
    (folder / "credentials").write_text(f"[default]\naws_access_key_id = k\naws_secret_access_key = {SECRET}\n")


def by_profile_with_services(folder, url, monkeypatch):
    """Credentials that a program gives, as those of SSO: nothing but botocore could find them."""
    said = {"Version": 1, "AccessKeyId": "k", "SecretAccessKey": SECRET, "SessionToken": "t"}
    (folder / "say.py").write_text(f"print({json.dumps(json.dumps(said))})")
    elsewhere = folder / "other-config"
    elsewhere.write_text(
        f"[profile night]\nregion = eu-west-1\nservices = here\ncredential_process = {sys.executable} {folder}/say.py\n"
        f"[services here]\ns3 =\n  endpoint_url = {url}\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(elsewhere))
    monkeypatch.setenv("AWS_PROFILE", "night")


WAYS = [by_service_variable, by_variable, by_default_profile, by_profile_with_services]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_both_clients_follow_what_botocore_follows(way, bare, s3_server, monkeypatch, spec, rows):
    way(bare, s3_server.url, monkeypatch)
    place = f"s3://tables/{way.__name__}"
    table = Table.create(f"{place}/things", spec, 4)  # delta's client
    files = table.write(rows(bucket=1), "run")  # s3fs
    table.commit(files, run_id="run", group=0, mode="append", planned_on=0, complete=True)
    assert table.snapshot(complete=True).rows == 2 and Storage(place).is_file("things/" + files[0].path)
    options = table.storage.delta_options()
    if way in (by_default_profile, by_profile_with_services):
        assert (options["AWS_SECRET_ACCESS_KEY"], options["AWS_REGION"]) == (SECRET, "eu-west-1")
    assert options.get("AWS_SESSION_TOKEN") == ("t" if way is by_profile_with_services else None)
    assert options["AWS_ENDPOINT_URL"] == s3_server.url and options["AWS_ALLOW_HTTP"] == "true"


def test_amazons_own_endpoint_is_left_to_the_clients(bare, monkeypatch):
    keys(monkeypatch)
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    assert s3.connection().endpoint is None
    assert "AWS_ENDPOINT_URL" not in s3.connection().delta_options()
    assert s3.connection().region == "eu-central-1"


# --- refusals, before work starts


def nobody(folder, url, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)


def sso_without_login(folder, url, monkeypatch):
    (folder / "config").write_text(
        "[default]\nregion = eu-west-1\nsso_session = s\nsso_account_id = 123456789012\nsso_role_name = r\n"
        "[sso-session s]\nsso_start_url = https://example.awsapps.com/start\nsso_region = eu-west-1\n"
    )


def no_such_profile(folder, url, monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "nights")


def nothing_listens(folder, url, monkeypatch):
    keys(monkeypatch)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")


@pytest.mark.parametrize(
    ("way", "message"),
    [
        (nobody, "no credentials on this machine; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY .* AWS_PROFILE"),
        (sso_without_login, r"Token.*aws sso login.*or set AWS_ACCESS_KEY_ID"),
        (no_such_profile, "profile \\(nights\\) could not be found.*or set AWS_ACCESS_KEY_ID"),
        (nothing_listens, "http://127.0.0.1:1 does not answer .*check the network and AWS_ENDPOINT_URL"),
    ],
)
def test_what_cannot_be_used_is_one_line_that_says_what_to_set(way, message, bare, s3_server, monkeypatch):
    way(bare, s3_server.url, monkeypatch)
    with pytest.raises(InputError, match=message) as error:
        s3.check(["s3://tables/x"])
    assert "\n" not in str(error.value)


def of_a_service_account(folder, url, monkeypatch):
    """Credentials as pods of Kubernetes have them: STS gives them for a token."""
    (folder / "token").write_text("a.b.c")
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/pplug-nodes")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(folder / "token"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_a_role_that_is_refused_is_told_so(bare, s3_server, monkeypatch):
    """As where the role's policy does not name the service account."""
    of_a_service_account(bare, s3_server.url, monkeypatch)
    s3_server.fault = lambda environ: "403" if environ["PATH_INFO"] == "/" else None
    with pytest.raises(InputError, match=r"AssumeRoleWithWebIdentity .*\(ClientError\); mend it, or set"):
        s3.check(["s3://tables/x"])


def test_a_credential_service_that_is_away_is_asked_again_and_ends_no_night_for_good(bare, monkeypatch, capsys):
    """Exit code 2 would: Kubernetes starts no job again that says its input is wrong."""
    port = free_port()
    of_a_service_account(bare, f"http://127.0.0.1:{port}", monkeypatch)
    with monkeypatch.context() as hurried:
        hurried.setattr(s3, "AWAY_S", 0)
        with pytest.raises(EndpointConnectionError) as error:
            s3.connection()
        assert is_transient(error.value)
        words = ["--plug", "p", "--tables", "s3://tables/x", "--run-dir", "s3://tables/run"]
        assert main(["refresh", *words]) == 1
        said = capsys.readouterr().err
        assert said.startswith("refresh: failed: EndpointConnectionError at infra/s3.py:") and said.count("\n") == 1
        os.unlink(said.split()[-1])  # the log
    late = threading.Timer(1.5, lambda: S3Server(port))
    late.start()
    found = s3.connection()
    late.join()
    assert found.delta_options()["AWS_SESSION_TOKEN"]

    def away():
        raise EndpointConnectionError(endpoint_url="https://sts.amazonaws.com")

    monkeypatch.setattr(s3, "AWAY_S", 0)
    monkeypatch.setattr(found.credentials, "get_frozen_credentials", away)  # when they are to be renewed
    with pytest.raises(EndpointConnectionError):
        found.delta_options()


def test_amazons_own_address_is_asked_again_while_nothing_answers(bare, monkeypatch, capsys):
    """A server that starts late stands for a network that was away; it is asked as if it were Amazon's. A job that it
    ends has exit code 1, since Kubernetes starts none again that says its input is wrong."""
    port = free_port()
    keys(monkeypatch)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    amazon = dataclasses.replace(s3.connection(), endpoint=None)
    monkeypatch.setattr(s3, "connection", lambda: amazon)
    with monkeypatch.context() as hurried:
        hurried.setattr(s3, "AWAY_S", 0)
        with pytest.raises(TimeoutError, match="Amazon, region .* does not answer .*check the network and AWS_REGION"):
            s3.check(["s3://tables/x"])
        assert "does not answer" in nodes.reach("s3://tables/x")  # told with the node's name
        assert main(["refresh", "--plug", "p", "--tables", "s3://tables/x", "--run-dir", "s3://tables/run"]) == 1
        said = capsys.readouterr().err
        assert said.startswith("refresh: failed: s3://tables/x: Amazon, region ") and said.count("\n") == 1
        os.unlink(said.split()[-1])  # the log
    late = threading.Timer(1.5, lambda: S3Server(port))
    late.start()
    s3.check(["s3://tables/x"])
    late.join()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("403", r"s3://tables/x: the credentials may not list the bucket tables \(AccessDenied\)"),
        ("expired", r"s3://tables/x: the credentials have expired \(ExpiredToken\); renew them"),
        ("503", None),  # the jobs themselves wait for a server that is busy
    ],
)
def test_what_the_server_refuses_is_told_by_its_cause(kind, message, s3_server):
    s3_server.fault = lambda environ: kind
    if message is None:
        return s3.check(["s3://tables/x"])
    with pytest.raises(InputError, match=message):
        s3.check(["s3://tables/x"])


def test_a_bucket_that_is_not_there_is_refused_and_one_that_is_there_is_looked_at_once(s3_server):
    seen = []
    s3_server.fault = lambda environ: seen.append(environ["PATH_INFO"])
    s3.check(["s3://tables/a", "s3://tables/b"])
    assert seen == ["/tables"]
    with pytest.raises(InputError, match="there is no bucket tabels at http://"):
        s3.check(["s3://tabels/a"])


def test_an_address_that_lost_a_slash_is_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="'s3:/bucket/plug': an address begins with two slashes"):
        Storage("s3:/bucket/plug")
    assert Storage("s3:b").uri == str(tmp_path / "s3:b")  # a name, if an odd one


def test_the_lifecycle_rule_of_security_md_ends_unfinished_uploads(s3_server):
    """The document's JSON is what the server takes."""
    text = (Path(__file__).parents[2] / "SECURITY.md").read_text()
    (given,) = [
        found for found in map(json.loads, re.findall(r"```json\n(.*?)```", text, re.DOTALL)) if "Rules" in found
    ]
    client = boto3.client("s3", endpoint_url=s3_server.url, region_name="us-east-1")
    client.create_bucket(Bucket="with-a-rule")
    client.put_bucket_lifecycle_configuration(Bucket="with-a-rule", LifecycleConfiguration=given)
    (rule,) = client.get_bucket_lifecycle_configuration(Bucket="with-a-rule")["Rules"]
    assert (rule["Status"], rule["AbortIncompleteMultipartUpload"]) == ("Enabled", {"DaysAfterInitiation": 1})


# --- files that a vacuum took


def test_a_commit_whose_files_are_gone_adds_nothing(s3_server, spec, rows):
    """As beside a run that was held for longer than the retention of a vacuum."""
    table = Table.create("s3://tables/held/things", spec, 4)
    files = [file for bucket in range(3) for file in table.write(rows(bucket=bucket), "held")]
    table.storage.delete(files[1].path)
    with pytest.raises(ConcurrentRunError, match="1 of the 3 files .*bucket=1.*a vacuum .*Run it again"):
        table.commit(files, run_id="held", group=0, mode="append", planned_on=0, complete=True)
    assert table.version == 0 and len(table.committed("held")) == 0
    again = [file for bucket in range(3) for file in table.write(rows(bucket=bucket), "held")]
    table.commit(again, run_id="held", group=0, mode="append", planned_on=0, complete=True)
    found = table.snapshot(complete=True).read(["user_id"])
    wanted = pa.concat_tables([rows(bucket=bucket) for bucket in range(3)])["user_id"]
    assert sorted(found["user_id"].to_pylist()) == sorted(wanted.to_pylist())
