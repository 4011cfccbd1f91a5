"""ingest against the sources themselves: every question, item and gold is found again, and what is not has a reason."""

import gzip
import json
import shutil
from collections import Counter
from datetime import UTC, date, datetime
from pathlib import Path

import pytest

from infra.errors import InputError
from pipelines import tables
from pplug import tasks
from tests.pipelines.population import Population

UBOOT_LABELS = """arch/arm, board, include, configs, common, tools, drivers/net, top level, lib, doc, cmd, drivers/mtd,
arch/x86, drivers/usb, drivers/mmc""".replace("\n", " ").split(", ")
UBOOT = {
    "name": "uboot_subsystem",
    "marker": "article: ",
    "item": "{category}: {title}. {text}",
    "item_without_label": "{title}. {text}",
    "input": f"Which category? Just answer. categories: [{', '.join(UBOOT_LABELS)}] article: {{title}} {{text}}",
    "target": "category",
    "metric": "classification",
    "labels": UBOOT_LABELS,
}
pytestmark = pytest.mark.usefixtures("ray_session")


def load(path: Path):
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as stream:
        return json.load(stream)


def assert_all_found_again(population: Population, questions: list[dict], golds: dict[str, str], user_of=None) -> None:
    asked, items = population.requests(), population.items()
    asked = {i: row for i, row in asked.items() if not i.startswith("derived-")}
    assert set(asked) == {question["id"] for question in questions}
    for question in questions:
        row = asked[question["id"]]
        assert (row["input"], row["target"]) == (question["input"], golds.get(question["id"]))
        assert row["user_id"] == (question["id"] if user_of is None else user_of(question))
        days = [item["date"] for item in question["profile"] if "date" in item]
        end = None  # the history is exactly the profile, now and where a user may get more items
        if user_of is not None and days and len(days) == len(question["profile"]):
            end = datetime.fromisoformat(f"{max(days)}T00:00:00.000001+00:00")
        assert (row["as_of"], row["as_of_position"]) == (end, None)
        got = items[row["user_id"]]
        assert [row["item_id"] for row in got] == [item["id"] for item in question["profile"]]
        for row, item in zip(got, question["profile"], strict=True):
            assert row["fields"] == {name: text for name, text in item.items() if name not in ("id", "date")}
            day = date.fromisoformat(item["date"]) if "date" in item else None
            assert row["occurred_at"] == (datetime(day.year, day.month, day.day, tzinfo=UTC) if day else None)


# --- real files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stem", "questions", "outputs", "split", "task"),
    [
        ("LaMP_11_train", "questions_459k", "outputs", "train", None),
        ("LaMP_22_train", "questions", "outputs", "train", "LaMP_2N"),
        ("LaMP_22_dev", "questions", "outputs", "dev", "LaMP_2N"),
        ("LaMP_22_test", "questions", None, "test", "LaMP_2N"),
        ("LaMP_11_test", "questions_435k", None, "test", "LaMP_1"),
    ],
)
def test_the_benchmark_as_published_is_found_again(population, shared_data, stem, questions, outputs, split, task):
    source = population.folder / "lamp"
    source.mkdir()
    shutil.copy(shared_data / "lamp_fragments" / f"{stem}_{questions}.json", source / f"{split}_questions.json")
    if outputs:
        shutil.copy(shared_data / "lamp_fragments" / f"{stem}_{outputs}.json", source / f"{split}_outputs.json")
    assert population.ingest(source=str(source), split=split, task=task) == 0
    golds = {g["id"]: g["output"] for g in load(source / f"{split}_outputs.json")["golds"]} if outputs else {}
    assert_all_found_again(population, load(source / f"{split}_questions.json"), golds)
    assert not sum(population.report["rejected"].values())


def test_published_golds_without_their_questions_are_refused(population, shared_data):
    source = population.folder / "lamp"
    source.mkdir()
    shutil.copy(shared_data / "lamp_fragments/LaMP_11_dev_questions_437k.json", source / "dev_questions.json")
    shutil.copy(shared_data / "lamp_fragments/LaMP_11_dev_outputs.json", source / "dev_outputs.json")
    with pytest.raises(InputError, match=r"97 golds have no question \(.*\d and 92 more\); take"):
        population.ingest(source=str(source), split="dev")


def test_a_real_folder_with_its_own_labels_and_derived_requests(population, shared_data):
    source = shared_data / "uboot_subsystem_LaMP_2"
    task = population.task(UBOOT)
    assert population.ingest(source=str(source), split="dev", task=task, derive_requests=3) == 0
    questions = load(source / "dev_questions.json.gz")
    golds = {gold["id"]: gold["output"] for gold in load(source / "dev_outputs.json.gz")["golds"]}
    assert_all_found_again(population, questions, golds, user_of=lambda question: question["user_id"])
    derived = [row for i, row in population.requests().items() if i.startswith("derived-")]
    assert len(derived) == 3 * len(questions) == population.report["derived"]
    profiles = {question["user_id"]: question["profile"] for question in questions}
    for row in derived:
        item = profiles[row["user_id"]][row["as_of_position"]]
        assert row["as_of_position"] >= len(profiles[row["user_id"]]) - 3  # profiles are sorted by time
        assert row["target"] == item["category"] and row["input"].endswith(f"article: {item['title']} {item['text']}")
        assert row["as_of"].date().isoformat() == item["date"] and row["owner_id"] == row["user_id"]
    stored = tables.task_entry(None, tables.open_table(population.tables, "histories").snapshot(complete=True))
    assert stored == tasks.load(task)


@pytest.mark.slow
@pytest.mark.parametrize(("folder", "task"), [("acl_titles_LaMP_5", "LaMP_5"), ("movielens_rating_LaMP_3", "LaMP_3")])
def test_other_real_folders_name_their_task(population, shared_data, folder, task):
    assert population.ingest(source=str(shared_data / folder), split="dev") == 0
    questions = load(shared_data / folder / "dev_questions.json.gz")
    golds = {gold["id"]: gold["output"] for gold in load(shared_data / folder / "dev_outputs.json.gz")["golds"]}
    assert_all_found_again(population, questions, golds, user_of=lambda question: question["user_id"])
    assert population.report["task"] == task


def test_the_wrong_task_is_refused_before_anything_is_written(population, shared_data):
    source = str(shared_data / "uboot_subsystem_LaMP_2")
    with pytest.raises(InputError, match="no question holds its marker 'description: '.*YAML"):
        population.ingest(source=source, split="dev")  # its golds say LaMP_2
    with pytest.raises(InputError, match="outside its 15 labels"):
        population.ingest(source=source, split="dev", task="LaMP_2N")
    with pytest.raises(InputError, match="no table histories"):
        population.rows("histories")


# --- LaMP's layout, made small --------------------------------------------------------------------------------------


def question(id: str, items: list[dict], **more) -> dict:
    return {"id": id, **more, "input": f"Generate a headline for the following article: {id}", "profile": items}


def news(id: str, **more) -> dict:
    return {"title": f"title {id}", "text": f"text {id}", "id": id, **more}


def write_lamp(folder: Path, questions: list | bytes, golds: dict | None = None, split: str = "dev") -> str:
    folder.mkdir(exist_ok=True)
    raw = questions if isinstance(questions, bytes) else json.dumps(questions, ensure_ascii=False).encode()
    (folder / f"{split}_questions.json").write_bytes(raw)
    if golds is not None:
        rows = [{"id": i, "output": output} for i, output in golds.items()]
        (folder / f"{split}_outputs.json").write_text(json.dumps({"task": "LaMP_4", "golds": rows}))
    return str(folder)


def test_one_history_a_question_where_profiles_of_a_user_differ(population, tmp_path):
    asked = [
        question("1", [news("a")], user_id="u"),
        question("2", [news("b")], user_id="u"),
        question("3", [news("a")]),
    ]
    assert population.ingest(source=write_lamp(tmp_path / "lamp", asked), split="dev", task="LaMP_4") == 0
    rows = population.requests()
    assert {i: (row["user_id"], row["owner_id"]) for i, row in rows.items()} == {
        "1": ("1", "u"), "2": ("2", "u"), "3": ("3", "3")}  # fmt: skip
    assert {user: [row["item_id"] for row in items] for user, items in population.items().items()} == {
        "1": ["a"], "2": ["b"], "3": ["a"]}  # fmt: skip


def test_no_history_is_stored_of_which_nobody_knows_whose_it_is(population, tmp_path):
    """The request of a question is what tells whose its history is."""
    asked = [question(str(n), [news(str(n))], user_id="u") for n in range(1, 5)]
    asked[1]["input"] = " "
    asked[3] |= {"user_id": 7, "input": ""}  # the only question of 7, so that the history is that of 7
    asked += [question("5", [news("5")]) | {"input": ""}]
    source = write_lamp(tmp_path / "lamp", asked, {"1": "good", "2": "good", "3": "odd", "4": "good", "5": "bad"})
    task = {"name": "t", "item": "{text}", "item_without_label": "{text}", "marker": "article: "}
    task = population.task(task | {"metric": "classification", "labels": ["good", "bad"]})
    given = {"source": source, "split": "dev", "task": task, "max_reject_fraction": 1}
    for scope in ("auto", "question"):
        with pytest.raises(InputError, match=r"questions=skip: the questions of \d users have a history each"):
            population.ingest(**given, questions="skip", history_scope=scope)
    assert population.ingest(**given) == 0
    assert {row["user_id"]: row["owner_id"] for row in population.rows("requests")} == {"1": "u"}
    assert set(population.items()) == {"1", "7", "5"}
    assert population.rejects() == Counter(empty_text=3, target_outside_labels=1)


def test_one_history_a_user_where_dates_prove_it(population, tmp_path):
    days = [news(str(day), date=f"2024-01-0{day}") for day in range(1, 6)]
    asked = [
        question("late", days, user_id="u"),
        question("early", days[:2], user_id="u"),
        question("first", [], user_id="u"),
    ]
    source = write_lamp(tmp_path / "lamp", asked)
    assert population.ingest(source=source, split="dev", task="LaMP_4") == 0
    items = population.items()["u"]
    assert [row["item_id"] for row in items] == ["1", "2", "3", "4", "5"]
    assert population.report["already_there"] == 2  # the early profile's items, given twice
    for row in population.requests().values():
        assert row["user_id"] == row["owner_id"] == "u"
        seen = [item["item_id"] for item in items if item["occurred_at"] < row["as_of"]]
        assert seen == [item["id"] for item in next(q for q in asked if q["id"] == row["request_id"])["profile"]]


def test_a_users_only_question_sees_nothing_that_a_later_split_brings(population, tmp_path):
    """The later question's profile holds the item that the earlier one asks about."""
    days = [news(str(day), date=f"2024-01-0{day}") for day in range(1, 5)]
    folder = tmp_path / "lamp"
    for split, profile in (("train", days[:2]), ("dev", days)):
        source = write_lamp(folder, [question(f"of {split}", profile, user_id="u")], split=split)
        assert population.ingest(source=source, split=split, task="LaMP_4") == 0
    items, asked = population.items()["u"], population.requests()
    assert [row["item_id"] for row in items] == ["1", "2", "3", "4"]
    seen = {name: [row["item_id"] for row in items if row["occurred_at"] < asked[name]["as_of"]] for name in asked}
    assert seen == {"of train": ["1", "2"], "of dev": ["1", "2", "3", "4"]}


@pytest.mark.parametrize(
    ("first", "then", "beyond"),
    [
        ([(1, "2010")], [(1, "2010"), (2, "2010")], 1),  # the year is all that is known of both
        ([(1, "2010")], [(1, "2010"), (2, "2011")], 0),
        ([], [(2, "2010")], 1),
        ([(1, None)], [(2, None)], 2),
        ([(1, "2010"), (2, "2011")], [(1, "2010")], 0),
        ([(1, "2010"), (2, "2010")], [(1, "2010")], 1),
        ([(1, "2010")], [(1, "2010")], 0),
    ],
)
def test_splits_of_the_same_people_that_no_dates_part_need_tables_of_their_own(
    population, tmp_path, first, then, beyond
):
    """A question's history is its profile, and holds no item that another split alone brings."""

    def ingest(split: str, profile: list, **keys) -> int:
        items = [news(str(number), **({"date": year} if year else {})) for number, year in profile]
        source = write_lamp(tmp_path / "lamp", [question(f"of {split}", items, user_id="u")], split=split)
        return population.ingest(source=source, split=split, task="LaMP_4", **keys)

    assert ingest("train", first) == 0
    if first:  # the same profiles again, without the questions
        assert ingest("train", first, mode="replace", questions="skip") == 0
    before = population.items(), population.requests()
    if not beyond:
        assert ingest("dev", then) == 0
        return
    with pytest.raises(InputError, match=f": {beyond} questions of this split.* into tables of its own"):
        ingest("dev", then)
    assert (population.items(), population.requests()) == before
    assert ingest("dev", then, history_scope="question") == 0


@pytest.mark.parametrize(
    ("profiles", "why"),
    [
        ([[news("a")], [news("a"), news("b")]], "no dates"),
        ([[news("a", date="2024-01-02")], [news("b", date="2024-01-01")]], "not nested"),
        (
            [[news("a", date="2024-01-01")], [news("a", date="2024-01-01", text="?"), news("b", date="2024-01-02")]],
            "changed",
        ),
        ([[news("a", date="2024-01-01")], [news("a", date="2024-01-01"), news("b", date="2024-01-01")]], "same day"),
    ],
)
def test_one_history_a_user_is_refused_without_proof(population, tmp_path, profiles, why):
    asked = [question(str(i), items, user_id="u") for i, items in enumerate(profiles)]
    with pytest.raises(InputError, match="history_scope=user: the profiles of 1 users' questions"):
        population.ingest(source=write_lamp(tmp_path / "lamp", asked), split="dev", task="LaMP_4", history_scope="user")


def test_damaged_questions_and_items_are_set_aside_and_all_others_come_through(population, tmp_path):
    good = [question(str(i), [news(f"{i}a"), news(f"{i}b")]) for i in range(6)]
    raw = [json.dumps(one, ensure_ascii=False).encode() for one in good]
    raw[1] = raw[1].replace(b"text 1a", b"text \xff 1a")  # not UTF-8
    raw[2] = raw[2].replace(b'"text 2a"', b'"text 2a')  # a quote is gone: the rest of the file shifts
    bad = [
        {"title": "t", "id": "y"},
        news("z", text=" "),
        news(""),
        7,
        news("w", date="soon"),
        news("v", text={"a": "mapping"}),
    ]
    raw[3] = json.dumps(question("3", [news("x"), *bad, news("s", text="\ud800")])).encode()
    raw[4] = json.dumps(question("4", [news("4a")]) | {"input": ""}).encode()
    source = write_lamp(tmp_path / "lamp", b"[" + b",\n ".join(raw) + b"]\n", {str(i): "gold" for i in range(6)})
    assert population.ingest(source=source, split="dev", max_reject_fraction=0.6) == 0
    assert set(population.requests()) == {"0", "3", "5"}
    found = {user: [row["item_id"] for row in rows] for user, rows in population.items().items()}
    assert found == {"0": ["0a", "0b"], "3": ["x"], "4": ["4a"], "5": ["5a", "5b"]}
    assert population.rejects() == Counter(
        bad_utf8=2, bad_json=1, missing_field=1, empty_text=2, missing_id=1, wrong_type=2, bad_date=1
    )
    places = {row["key"]: row["reason"] for row in population.rows("rejects")}
    assert places["dev_questions.json question number 3"] == "bad_json"
    assert places["dev_questions.json question number 4 item 6"] == "bad_date"
    assert not any("text" in row["detail"].split() for row in population.rows("rejects") if "2a" in row["detail"])


def test_a_gold_of_null_is_no_answer_and_a_list_is_a_reject(population, tmp_path):
    golds = {"1": "gold", "2": None, "3": ["a", "b"], "4": 7}
    source = write_lamp(tmp_path / "lamp", [question(i, [news("a")]) for i in golds], golds)
    assert population.ingest(source=source, split="dev", max_reject_fraction=0.5) == 0
    assert {i: row["target"] for i, row in population.requests().items()} == {"1": "gold", "2": None, "4": "7"}
    assert population.rejects() == Counter(wrong_type=1)


def test_items_that_begin_as_questions_do_are_items(population, tmp_path):
    asked = [question("1", [news("a")]), question("2", [{"id": "7", "input": "an old question", "text": "t"}])]
    source = write_lamp(tmp_path / "lamp", asked, {"1": "x", "2": "y"})
    task = population.task({"name": "t", "item": "{text}", "item_without_label": "{text}", "marker": "article: "})
    assert population.ingest(source=source, split="dev", task=task) == 0
    assert not population.report["rejected"] and set(population.requests()) == {"1", "2"}
    found = {user: [(row["item_id"], row["fields"]) for row in rows] for user, rows in population.items().items()}
    assert found["2"] == [("7", {"input": "an old question", "text": "t"})] and len(found) == 2


def test_more_rejects_than_allowed_end_with_code_3(population, tmp_path):
    source = write_lamp(tmp_path / "lamp", [question("1", [news("a"), news("b", text="")])])
    assert population.ingest(source=source, split="dev", task="LaMP_4") == 3


def test_other_key_orders_and_a_byte_order_mark_are_read(population, tmp_path):
    asked = [{"profile": [news("a")], "user_id": 7, "input": "article: x", "id": 5}]
    source = write_lamp(tmp_path / "lamp", asked)
    assert population.ingest(source=source, split="dev", task="LaMP_4") == 0
    assert [(row["user_id"], row["request_id"]) for row in population.rows("requests")] == [("7", "5")]
    write_lamp(tmp_path / "lamp", b"\xef\xbb\xbf" + json.dumps([question("1", [news("a")])]).encode())
    assert population.ingest(source=source, split="dev", task="LaMP_4") == 0
    assert len(population.requests()) == 2


@pytest.mark.parametrize(
    ("content", "golds", "says"),
    [
        (b"{}", None, "not a question|holds no question"),
        (b"[]", None, "holds no question"),
        (b'[{"id": 1}]', None, "first entry is not a question.*expected <split>_questions.json"),
        (b"", None, "not valid JSON|holds no question"),
        (json.dumps([question("1", [])]).encode()[:-9], None, "breaks off in question 1.*fetch the file again"),
        (
            json.dumps([question("1", []), question("1", [])]).encode(),
            None,
            r"lamp/dev_questions.json: 1 ids occur twice \(1\); ids",
        ),
        (
            json.dumps([question("1", [])]).encode(),
            {"2": "x"},
            r"1 golds have no question \(2\); 1 questions have no gold \(1\); take",
        ),
    ],
)
def test_a_source_that_is_not_lamps_is_refused(population, tmp_path, content, golds, says):
    with pytest.raises(InputError, match=says):
        population.ingest(source=write_lamp(tmp_path / "lamp", content, golds), split="dev", task="LaMP_4")


def test_missing_files_splits_tasks_and_golds_are_named(population, tmp_path):
    with pytest.raises(InputError, match=r"nowhere: no file is there \(it does not exist\)"):
        population.ingest(source=str(tmp_path / "nowhere"), split="dev")
    with pytest.raises(InputError, match=r"no dev_questions.json or .json.gz here \(it has no file\)"):
        population.ingest(source=str(tmp_path / "nowhere"), split="dev", format="lamp")
    source = write_lamp(tmp_path / "lamp", [question("1", [])], split="train")
    with pytest.raises(InputError, match="it has the splits train: give --split"):
        population.ingest(source=source, split="dev")
    with pytest.raises(InputError, match="names no task; give --task"):
        population.ingest(source=source)
    (tmp_path / "lamp" / "train_outputs.json").write_text('{"golds": [{"id": "1"}]}')
    with pytest.raises(InputError, match="train_outputs.json: not a golds file.*'output'"):
        population.ingest(source=source)
    (tmp_path / "lamp" / "train_outputs.json").write_text('{"golds": ')
    with pytest.raises(InputError, match="train_outputs.json: cannot be read as JSON"):
        population.ingest(source=source)
    with pytest.raises(InputError, match="task LaMP_1 has no template"):
        (tmp_path / "lamp" / "train_outputs.json").unlink()
        population.ingest(source=source, task="LaMP_1", derive_requests=1)


def test_a_gzip_file_that_was_cut_is_named(population, tmp_path):
    write_lamp(tmp_path / "lamp", b"")
    packed = gzip.compress(json.dumps([question(str(i), [news("a")]) for i in range(500)]).encode())
    (tmp_path / "lamp" / "dev_questions.json").unlink()
    (tmp_path / "lamp" / "dev_questions.json.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(InputError, match="dev_questions.json.gz: breaks off.*fetch the file again"):
        population.ingest(source=str(tmp_path / "lamp"), split="dev", task="LaMP_4")
