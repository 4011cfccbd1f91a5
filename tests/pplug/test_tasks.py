"""Task entries: LaMP's own wording, and a task nobody has seen before from YAML alone."""

import pytest
import yaml

from pplug import history, metrics, tasks

MADE_UP = """
name: recipes
marker: 'dish: '
query_end: ' /'
item: '{cuisine} <- {dish}'
item_without_label: '{dish}'
input: 'Which cuisine? Just answer. dish: {dish} /'
target: cuisine
metric: classification
labels: [thai, greek, 7]
"""


@pytest.mark.parametrize(
    ("task", "input", "text"),
    [
        ("LaMP_1", 'For an author who has written the paper with the title "On "x" and y", which reference is related? '
         'Just answer with [1] or [2] without explanation. [1]: "title "p"" [2]: "q"', 'On "x" and y'),
        ("LaMP_2", "tags: [a, b] description: A man. description: again", "A man. description: again"),
        ("LaMP_2N", "categories: [a] article: News", "News"),
        ("LaMP_3", "on a scale of 1 to 5? explanation. review: Fine", "Fine"),
        ("LaMP_4", "Generate a headline for the following article: News", "News"),
        ("LaMP_5", "Generate a title for the following abstract of a paper: We", "We"),
        ("LaMP_6", "Generate a subject for the following email: Hi", "Hi"),
        ("LaMP_7", "Paraphrase the following tweet without any explanation before or after it: lol", "lol"),
        ("LaMP_7", "no marker here", "no marker here"),
    ],
)  # fmt: skip
def test_the_query_is_what_follows_the_marker(task, input, text):
    assert tasks.query(input, tasks.get(task)) == text


@pytest.mark.parametrize("entry", tasks.lamp_entries(), ids=lambda entry: entry.name)
def test_a_derived_request_is_asked_as_the_benchmark_asks_and_its_query_is_found_again(entry):
    fields = {name: f"SOME {name}" for name in entry.fields}
    if entry.input is None:
        assert entry.name in ("LaMP_1", "LaMP_7")
        return
    asked = tasks.fill(entry.input, fields, entry.name)
    assert tasks.query(asked, entry) == f"SOME {tasks.slots(entry.input)[0]}"
    assert f"SOME {entry.target}" not in asked
    if entry.metric == "classification":
        assert f"[{', '.join(entry.labels)}]" in asked


def test_lamp_entries_have_the_published_sizes():
    assert {entry.name: len(entry.labels) for entry in tasks.lamp_entries() if entry.metric == "classification"} == {
        "LaMP_1": 2, "LaMP_2": 15, "LaMP_2N": 15}  # fmt: skip
    assert tasks.get("LaMP_2M") is tasks.get("LaMP_2")
    assert tasks.get("LaMP_3").max_output_tokens == 10
    assert all(entry.retrieval for entry in tasks.lamp_entries())


def test_an_entry_survives_json():
    for entry in tasks.lamp_entries():
        assert tasks.TaskSpec.from_json(entry.to_json()) == entry


def test_a_made_up_task_needs_one_yaml_file_and_no_code(tmp_path):
    path = tmp_path / "recipes.yaml"
    path.write_text(MADE_UP)
    entry = tasks.load(path)
    assert tasks.find(str(path)) == entry
    item = {"dish": "gyros", "cuisine": "greek", "extra": "x"}
    assert history.item_text(item, entry) == "greek <- gyros"
    assert tasks.query(tasks.fill(entry.input, item, entry.name), entry) == "gyros"
    assert metrics.score(entry, {"1": "7", "2": "thai"}, {"1": "7", "2": "greek"})["accuracy"] == 0.5


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("metric: accuracy", "metric.*classification"),
        ("labels: [thai]", "at least two labels"),
        ("labels: [thai, thai, greek]", "different from each other"),
        ("item: '{cuisine'", "item"),
        ("item: '{a.b} {dish}'", "item.*plain field name"),
        ("item: 'no slot'", "item.*names no field"),
        ("input: 'It is {cuisine}: {dish}'", "shows the field 'cuisine'"),
        ("target: null", "target is not"),
        ("markr: 'x'", "markr.*keys: name, marker"),
        ("metric: rating", "labels that are finite numbers"),
        ("metric: rating\nlabels: ['1', nan]", "finite numbers"),
        ("retrieval: {pattern: '{dish}', wrap: '{input}'}", r"retrieval.*\{items\}"),
    ],
)
def test_a_wrong_entry_names_file_and_key(tmp_path, change, says):
    path = tmp_path / "recipes.yaml"
    key = change.partition(":")[0]
    kept = [line for line in MADE_UP.splitlines() if not line.startswith(f"{key}:")]
    path.write_text("\n".join([*kept, change]))
    with pytest.raises(ValueError, match=says) as caught:
        tasks.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"- a\n- b\n", b"{", b"\xff\xfe", b"name: 2026-02-30", None])
def test_a_file_that_is_no_entry_is_named(tmp_path, content):
    path = tmp_path / "task.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="task.yaml"):
        tasks.load(path)


def test_an_unknown_task_lists_those_there_are():
    with pytest.raises(ValueError, match="did you mean LaMP_2.*known: LaMP_1, .*LaMP_7"):
        tasks.get("LaMP2")


# --- fields that may be missing, and entries of four lines ------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "fields", "text"),
    [
        ("{title?}. {text}", {"text": "b"}, "b"),
        ("{title?}. {text}", {"title": " ", "text": "b"}, "b"),
        ("{title?}. {text}", {"title": "a", "text": "b"}, "a. b"),
        ("{title?}. {text?}", {"title": "a"}, "a"),
        ("{tag}: {title?}. {text?}", {"tag": "t", "title": "a"}, "t: a"),
        ("{tag}: {title?}. {text?}", {"tag": "t", "text": "b"}, "t: b"),
        ("{text} ({year?}).", {"text": "b"}, "b."),
        ("{text} ({year?}).", {"text": "b", "year": "2001"}, "b (2001)."),
        ("{title?} - [{year?}] {text}", {"title": "a", "text": "b"}, "a - b"),
        ("{title?} - [{year?}] {text}", {"text": "b"}, "b"),
        ('the tag of "{title?}" is "{tag}" ', {"tag": "t"}, 'the tag of is "t" '),
        ("{{{title?}}} {text}", {"text": "{x?}"}, "{x?}"),
        ("{{{title?}}} {text}", {"title": "a", "text": "b"}, "{a} b"),
        ("{title?}\n{text}", {"text": "b"}, "b"),
        ("by {author?}", {}, "by"),
        ("{author?} wrote", {}, "wrote"),
        ("{0}: {a}", {"0": "x", "a": "y"}, "x: y"),
        ("{2020}", {"2020": "{0} x"}, "{0} x"),
    ],
)
def test_a_field_that_is_not_there_takes_its_brackets_and_its_stop_with_it(template, fields, text):
    assert tasks.fill(template, fields, "t") == text


def test_only_fields_without_a_question_mark_must_be_there():
    assert tasks.slots("{a?} {b}, {c?}") == ("a", "b", "c") and tasks.needed("{a?} {b}, {c?}") == ("b",)
    with pytest.raises(ValueError, match="needs the field 'b'.*only a"):
        tasks.fill("{a?} {b}", {"a": "1"}, "t")


MOOD = "name: mood\ntext: [title, text]\ntarget: mood\nlabels: [good, bad]\n"


def test_an_entry_of_four_lines_is_whole(tmp_path):
    path = tmp_path / "mood.yaml"
    path.write_text(MOOD)
    entry = tasks.load(path)
    assert entry == tasks.TaskSpec(
        name="mood",
        marker="text: ",
        item="{mood}: {title?}. {text?}",
        item_without_label="{title?}. {text?}",
        input="Which mood does this text have? Answer with one of [good, bad] and nothing else. text: "
        "{title?}. {text?}",
        target="mood",
        metric="classification",
        labels=("good", "bad"),
        retrieval=tasks.RetrievalForm(pattern='the mood of "{title?}. {text?}" is "{mood}" '),
        max_output_tokens=16,
    )  # fmt: skip
    assert entry.fields == ("mood",)
    asked = tasks.fill(entry.input, {"title": "Rain", "mood": "bad"}, entry.name)
    assert tasks.query(asked, entry) == "Rain"
    assert tasks.TaskSpec.from_json(entry.to_json()) == entry
    assert "text" not in entry.model_dump()


@pytest.mark.parametrize(
    ("labels", "metric"),
    [("labels: [1, 2, 3]", "rating"), ("labels: [a, b]", "classification"), ("metric: text", "text"), ("", "text")],
)
def test_the_metric_follows_from_the_labels(labels, metric):
    entry = tasks.TaskSpec.model_validate(yaml.safe_load(f"name: n\ntext: words\ntarget: x\n{labels}"))
    assert entry.metric == metric and entry.item == "{x}: {words}" and entry.fields == ("x", "words")


def test_what_is_given_stays_as_it_is():
    given = yaml.safe_load(MOOD) | {"input": "Say: {text}", "marker": "Say: ", "item": "{text}", "max_output_tokens": 3}
    entry = tasks.TaskSpec.model_validate(given)
    assert (entry.input, entry.marker, entry.item, entry.max_output_tokens) == ("Say: {text}", "Say: ", "{text}", 3)
    assert entry.item_without_label == "{title?}. {text?}"


def test_a_question_of_its_own_without_a_marker_is_the_query_as_a_whole():
    lines = {"name": "mail", "target": "topic", "text": "body", "input": "Which topic has this mail? {body}"}
    entry = tasks.TaskSpec.model_validate(lines)
    asked = tasks.fill(entry.input, {"body": "New text: see below"}, entry.name)
    assert tasks.query(asked, entry) == "Which topic has this mail? New text: see below" and entry.marker == ""


def test_a_question_that_holds_the_marker_is_a_marker_itself():
    entry = tasks.TaskSpec.model_validate(yaml.safe_load(MOOD.replace("good", "'text: x'")))
    asked = tasks.fill(entry.input, {"text": "Rain {y}", "mood": "bad"}, entry.name)
    assert tasks.query(asked, entry) == "Rain {y}"


def test_an_entry_given_in_full_is_stored_as_ever():
    """The stored form of an entry decides identities of profiles and runs: its keys are those of before."""
    entry = tasks.TaskSpec.model_validate(yaml.safe_load(MADE_UP))
    assert entry.to_json() == (
        '{"name":"recipes","marker":"dish: ","query_end":" /","item":"{cuisine} <- {dish}",'
        '"item_without_label":"{dish}","input":"Which cuisine? Just answer. dish: {dish} /","target":"cuisine",'
        '"metric":"classification","labels":["thai","greek","7"],"retrieval":null,"max_output_tokens":128}'
    )


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ("name: n\ntarget: x", "at least name and `text`"),
        ("name: n\ntext: [x, y]\ntarget: x", "the target"),
        ("name: n\ntext: []\ntarget: x", "list of names"),
        ("name: n\ntext: 'a b'\ntarget: x", "plain field name"),
        ("name: n\ntext: a\ntarget: x\nlabels: [yes, no]", "truth values"),
        ("name: n\ntext: a\ntarget: x\nlabels: [p]", "two labels"),
    ],
)
def test_a_wrong_short_entry_says_what_is_wrong(lines, says):
    with pytest.raises(ValueError, match=says):
        tasks.TaskSpec.model_validate(yaml.safe_load(lines))
