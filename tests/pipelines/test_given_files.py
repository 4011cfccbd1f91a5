"""Files that a person wrote: a byte order mark, CRLF, blank lines and spaces at line ends change nothing."""

import json

import pytest

from infra.errors import InputError
from infra.storage import Storage
from pipelines import options, tables
from pipelines.generate.parts.oracle import read_oracle
from pplug import tasks
from pplug.encoder import EncoderConfig
from tests.pipelines.population import NOTES, Population

BOM = b"\xef\xbb\xbf"
USERS = {"anna", "bert van der Berg", "c/d=e 😀"}


def forms(text: str) -> dict[str, bytes]:
    """The same lines as different editors save them; a blank line more, a space at each end."""
    plain = text.encode()
    return {
        "plain": plain,
        "bom": BOM + plain,
        "crlf": BOM + plain.replace(b"\n", b"\r\n"),
        "cr": plain.replace(b"\n", b"\r"),
        "spaces": b"".join(b" " + line + b" \t\n\n" for line in plain.splitlines()),
        "no end": plain.rstrip(b"\n"),
        "two together": BOM + plain + BOM + plain,
    }


@pytest.mark.parametrize("form", forms(""))
def test_a_file_of_ids_is_read_alike_however_it_was_saved(tmp_path, form):
    path = tmp_path / "users.txt"
    path.write_bytes(forms("".join(f"{user}\n" for user in sorted(USERS)))[form])
    assert tables.read_users(str(path)) == USERS  # spaces within an id stay


def test_a_file_of_ids_may_lie_on_s3(s3):
    text = "\ufeff" + "".join(f"{user}\r\n" for user in sorted(USERS))
    Storage(s3).write_bytes("erase/users.txt", text.encode())
    assert tables.read_users(f"{s3}/erase/users.txt") == USERS
    with pytest.raises(InputError, match=r"users=s3://.*/none.txt: cannot be read .* one user id per line"):
        tables.read_users(f"{s3}/erase/none.txt")


def test_a_file_of_ids_in_another_encoding_is_named(tmp_path):
    path = tmp_path / "users.txt"
    path.write_bytes("anna\n".encode("utf-16"))
    with pytest.raises(InputError, match=r"users=.*users.txt: cannot be read .* one user id per line, in UTF-8"):
        tables.read_users(str(path))


@pytest.mark.parametrize("form", forms(""))
def test_an_oracle_file_is_read_alike_however_it_was_saved(tmp_path, form):
    path = tmp_path / "oracle.jsonl"
    lines = [json.dumps({"user_id": user, "text": f"{user} likes cats"}, ensure_ascii=False) for user in sorted(USERS)]
    path.write_bytes(forms("".join(line + "\n" for line in lines))[form])
    found = read_oracle(str(path))
    assert found == {user: f"{user} likes cats" for user in USERS}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"user_id": 7, "text": "cats"}', "user_id is a number"),
        ('{"user_id": "zoe", "text": null}', "text is null"),
        ('{"user_id": true, "text": "cats"}', "user_id is true or false"),
        ('{"user_id": "zoe", "text": ["cats"]}', "text is a list"),
        ('{"user_id": "zoe"}', "expected JSON lines"),
        ('["zoe"]', "expected JSON lines"),
        ("zoe", "expected JSON lines"),
    ],
)
def test_a_line_of_an_oracle_file_that_has_no_two_strings_is_named(tmp_path, line, said):
    path = tmp_path / "oracle.jsonl"
    path.write_text('{"user_id": "anna", "text": "dogs"}\n\n' + line + "\n")
    with pytest.raises(InputError) as error:
        read_oracle(str(path))
    message = str(error.value)
    assert f"oracle={path}: line 3: {said}" in message and "both strings" in message
    assert "zoe" not in message.replace(str(path), "") and "cats" not in message


@pytest.mark.parametrize("form", ["plain", "bom", "crlf", "cr"])
def test_task_and_config_files_are_read_alike_however_they_were_saved(tmp_path, form):
    task, config = tmp_path / "task.yaml", tmp_path / "config.yaml"
    task.write_bytes(forms(json.dumps(NOTES, indent=1) + "\n")[form])
    assert tasks.find(str(task)) == tasks.TaskSpec.model_validate(NOTES)
    config.write_bytes(forms("model: m\nmax_tokens: 64\n")[form])
    given = options.read(["--config", str(config)], EncoderConfig)
    assert given.values == {"model": "m", "max_tokens": 64}


def test_ids_that_match_nobody_are_named_and_counted(tmp_path, capsys):
    population = Population(tmp_path)
    items = tmp_path / "items.jsonl"
    items.write_text("".join(json.dumps({"user_id": u, "item_id": "1", "text": "x", "mood": "good"}) + "\n"
                             for u in ("anna", "bert van der Berg")))  # fmt: skip
    asked = tmp_path / "asked.jsonl"
    asked.write_text(json.dumps({"request_id": "r", "user_id": "zoe", "input": "How do I feel? x"}))
    assert population.ingest(source=str(items), requests_source=str(asked), task=population.task(NOTES)) == 0
    histories, requests = (tables.open_table(population.tables, name).snapshot() for name in ("histories", "requests"))
    path = tmp_path / "users.txt"
    path.write_text("anna\nbert\nBERT van der Berg\nzoe\n")
    capsys.readouterr()
    assert len(tables.read_users(str(path), histories)) == 4
    assert capsys.readouterr().out == (f"users={path}: 3 of 4 ids have no row in histories: lines 2, 3, 4\n")
    tables.read_users(str(path), requests, histories)
    assert "2 of 4 ids have no row in requests, histories: lines 2, 3\n" in capsys.readouterr().out
    path.write_text("anna\nbert van der Berg\n")
    tables.read_users(str(path), histories)
    assert capsys.readouterr().out == ""
    path.write_text("".join(f"nobody-{n:03d}\n" for n in range(500)))
    tables.read_users(str(path), histories)
    said = capsys.readouterr().out
    assert "500 of 500 ids" in said and "nobody-" not in said
    assert said.endswith("lines 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 490 more\n")
