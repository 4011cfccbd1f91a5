"""The page and its charts from made-up figures, without a browser: self-contained, all numbers those of report.json."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from pipelines.evaluate import summary, wording
from pipelines.evaluate.report import charts, page
from pipelines.evaluate.score import Scored
from pipelines.evaluate.verdict import NO_DIFFERENCE, UNKNOWN, USER
from tests.pipelines.figures import METHODS, REFERENCES, UNCLEAR, claim, examples, made_up, typed


@pytest.fixture(scope="module")
def drawn():
    return charts.draw_all(typed())


def test_the_page_loads_nothing_and_shows_every_method(tmp_path):
    files = page.write(str(tmp_path), typed(made_up(warnings=["only 12 users: <rough>"])))
    html = (tmp_path / "report.html").read_text()
    assert set(files) == {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!#|data:,)""", html) and "<script" not in html
    assert not re.findall(r"url\((?!#)|@import", html)
    assert set(re.findall(r"https?://[^\s\"']+", html)) == {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert re.search(r">\+48\.3 points<", html) and not re.search(r">\+48\.3<", html)  # a gain has its unit everywhere
    ids = re.findall(r'\bid="([^"]*)"', html)
    assert len(ids) == len(set(ids))
    for target in re.findall(r'(?:href="|url\()#([^")]+)', html):
        assert target in ids
    assert all(f">{name}<" in html for name in METHODS)
    assert "only 12 users: &lt;rough&gt;" in html
    # of the hybrid no control was run; of the plug itself there are three
    assert f"<h1>Personalisation {UNKNOWN}: plug+bm25 gains 48.3 points of accuracy</h1>" in html
    assert f"plug, plug:mean, which have controls: {USER}." in html and "generate plug:other-user+bm25 too." in html
    for control in (
        "plug:soft-prompt (a soft prompt trained without any history) changes it by +2.1 points.",
        "plug:other-user (another person&#39;s history) changes it by \N{MINUS SIGN}3.6 points.",
        "plug:no-history (no history at all) changes it by +0.6 points, which may be chance.",
    ):
        assert f"The control {control}" in html
    for name, (score, _, gain, wide, *_) in METHODS.items():
        assert f"{100 * score:.1f}%" in html, name
        if gain is not None:  # those of the methods that may be claimed to help hold for all of them at once
            own = name not in ("oracle", "plug:no-history", "plug:other-user", "plug:soft-prompt")
            wide *= 1.2 if own else 1
            low, high = (f"{100 * end:+.1f}".replace("-", "\N{MINUS SIGN}") for end in (gain - wide, gain + wide))
            assert f"{low} to {high}" in html, name


def test_charts_are_whole_files_and_name_themselves(drawn):
    assert [chart.name for chart in drawn] == [
        "forest", "gain-by-length", "gain-by-age", "gain-by-distance", "users", "cost"]  # fmt: skip
    for chart in drawn:
        root = ElementTree.fromstring(chart.svg)
        assert root.tag.endswith("svg") and chart.png.startswith(b"\x89PNG\r\n") and len(chart.png) > 5000
        inline = ElementTree.fromstring(chart.inline)
        assert inline.get("role") == "img" and [child.text for child in inline][:2] == [chart.title, chart.says]
        # every colour of the page's picture is the page's to choose
        assert "var(--ink)" in chart.inline and not re.search(r": ?#[0-9a-f]{6}", chart.inline)
        assert "var(" not in chart.svg.decode()
        assert all(len(row) == len(chart.columns) for row in chart.rows) and chart.rows


def test_colours_are_told_apart_by_their_role():
    assert len(set(charts.LIGHT.values())) == len(charts.LIGHT) and set(page.DARK) == set(charts.LIGHT)


def test_the_same_figures_give_the_same_files(drawn):
    again = charts.draw_all(typed())
    assert [(chart.svg, chart.png, chart.inline) for chart in again] == [
        (chart.svg, chart.png, chart.inline) for chart in drawn
    ]


def test_a_gain_is_clearly_good_or_bad_only_by_an_interval_that_is_known():
    ends = {(0.1, 0.2): "good", (-0.2, -0.1): "bad", (-0.1, 0.1): "even", (0.0, 0.1): "even"}
    assert {pair: charts.role_of(*pair, 6) for pair in ends} == ends
    assert charts.role_of(float("nan"), float("nan"), 6) == "even"


@pytest.mark.parametrize(("people", "star", "helping"), [(6, "*", 7), (5, "", 0)])
def test_a_gain_of_too_few_people_is_nowhere_called_clear(people, star, helping):
    figures = typed(made_up() | {"n_users": people})
    assert charts.draw_all(figures)[0].says.startswith(f"{helping} of 7 methods are clearly better")
    html = page.render(figures, [])
    assert bool(re.search('class="(good|bad)"', html)) == bool(star)
    chance = "" if star else ", which may be chance"
    assert f"(a soft prompt trained without any history) changes it by +2.1 points{chance}." in html
    assert wording.cell(0.15, (0.1, 0.2), people) == f"+0.150 [+0.100, +0.200]{star}"
    assert wording.cell(0.15, (0.1, 0.2)) == "0.150 [0.100, 0.200]"
    assert (charts.role_of(-0.2, -0.1, people) == "bad") == bool(star)


def test_tables_beside_the_charts_hold_the_figures(drawn):
    forest, length, *_, users, cost = drawn
    assert ["plug", "+47.5 points", "+44.4 to +50.6"] in forest.rows and len(forest.rows) == len(METHODS) - 1
    assert ["plug", "30\N{EN DASH}34 (n=655)", "+47.5 points", "+43.1 to +51.9"] in length.rows
    says = "plug+bm25 gains +43.3 points at 24\N{EN DASH}29 and +53.3 points at 35\N{EN DASH}40 (items in the history)."
    assert length.says == says
    assert (
        users.rows[0][0] == "oracle"
        and ["bm25", "41.0% (37.0 to 45.0%)"] == [row[:2] for row in users.rows if row[0] == "bm25"][0]
    )
    assert ["plug:mean", "77.1%", "29", "2.1", "-", "2.0 KB"] in cost.rows
    assert "With plug+bm25, 72% of users do better" in users.says


def test_methods_that_tie_are_named_alike_and_one_group_is_told_once():
    """Two methods gain the same and help the same users: all speak of the one in the headline."""
    found = made_up()
    names = [name for name in found["methods"] if name in ("none", "plug", "bm25")]
    found["methods"] = {name: found["methods"][name if name == "none" else "plug"] for name in names}
    found["groups"] = {"length": found["groups"]["length"]}
    third = found["groups"]["length"]["thirds"][0]
    third["methods"] = {name: third["methods"][name if name == "none" else "plug"] for name in names}
    for order in (names, names[::-1]):
        found["methods"] = {name: found["methods"][name] for name in order}
        best = found["verdict"]["best"] = next(name for name in order if name != "none")  # the first of those that tie
        found["groups"]["length"]["thirds"] = [third | {"from": 1, "to": 1}]
        _, length, users, _ = charts.draw_all(typed(found))
        assert users.says.startswith(f"With {best}, ") and length.says.startswith(f"{best} gains ")
        assert length.says.count(" at 1 ") == 1 and "too alike to be divided" in length.says


def test_methods_that_reply_otherwise_than_none_are_told_by_run_and_kind():
    def part(*made_by, methods):
        return Scored(methods=dict.fromkeys(methods), made_by=frozenset(made_by))

    night = part(("none", "llm_id", "l"), ("none", "decoding_id", "d"), ("plug", "llm_id", "l"),
                 ("plug", "decoding_id", "e"), ("bm25", "llm_id", "m"), methods=("none", "plug"))  # fmt: skip
    again = part(("none", "llm_id", "l2"), ("none", "decoding_id", "d"), methods=("none",))
    soft = part(("plug:soft-prompt", "llm_id", "l2"), ("plug:soft-prompt", "decoding_id", "d"),
                ("adapter:none", "llm_id", "base"), methods=("plug:soft-prompt", "adapter:none"))  # fmt: skip
    unlike = summary.unlike_baseline([night, again, soft])
    assert unlike == {"adapter:none": ["llm_id"], "plug": ["decoding_id"]}
    ends = "than none, so that their gain over none holds this difference too;"
    assert summary.unlike_warnings(unlike, [night, again, soft]) == [
        f"adapter:none: by another LLM {ends} adapter:none tells how great it is",
        f"plug: by another decoding {ends} score none by the same decoding beside them",
    ]


def test_the_llm_without_an_adapter_tells_the_gain_of_adapters_on_the_same_llm_alone():
    def said(**llms: str) -> list[str]:
        names = {name.replace("_", ":"): llm for name, llm in llms.items()}
        part = Scored(
            methods=dict.fromkeys(names), made_by=frozenset((name, "llm_id", llm) for name, llm in names.items())
        )
        assert summary.unlike_baseline([part])["adapter"] == ["llm_id"]
        return [warning.partition("; ")[2] for warning in summary.unlike_warnings({"adapter": ["llm_id"]}, [part])]

    assert said(none="plain", adapter="tuned", adapter_none="tuned") == ["adapter:none tells how great it is"]
    assert said(none="plain", adapter="tuned") == ["generate adapter:none, which tells it"]
    assert said(none="plain", adapter="tuned", adapter_none="plain") == [
        "adapter:none is not by the LLM that they are by; generate it by that one, which tells it"
    ]


def test_the_page_says_who_was_chosen_and_what_the_classifier_has_learned_from():
    plain = page.render(typed(), [])
    assert "2,000 requests of 400 users<" in plain
    assert not re.search("<dt>(users|methods|classifier)</dt>", plain)
    config = made_up()["config"] | {
        "users": "owners.txt",
        "methods": ["none", "plug"],
        "references_from": ["data/train"],
    }
    read = {"data/train": {"histories": 7, "requests": 2}}
    html = page.render(typed(made_up(config=config, classifier_items=41_500, references_from=read)), [])
    assert "2,000 requests of 400 chosen users<" in html
    facts = dict(re.findall("<dt>([^<]*)</dt><dd>([^<]*)</dd>", html))
    assert facts["users"] == "those of owners.txt alone"
    assert facts["methods"] == "as chosen: none, plug; requests are those that they answered"
    assert facts["classifier"] == "trained on 41,500 items of these tables and of data/train (histories version 7)"


def test_no_backtick_stands_on_the_page():
    html = page.render(typed(made_up(warnings=["give `scores: [meteor]`"])), [])
    assert "`" not in html and "give scores: [meteor]" in html


def test_a_lower_error_is_a_gain():
    found = made_up()
    for row in found["methods"].values():
        for part in ("scores", "ci95", "vs_none"):
            if part in row:
                row[part] = {"mae": row[part]["accuracy"], "rmse": row[part]["f1"]}
    ends = {"ci95": [-0.3, -0.2], "ci95_corrected": [-0.3, -0.1]}
    found["methods"]["plug"]["vs_none"]["mae"] = {"difference": -0.2, "p_value": 0.001} | ends
    (row,) = [row for row in charts.draw_all(typed(found | {"groups": {}}))[0].rows if row[0] == "plug"]
    assert row == ["plug", "+0.200", "+0.100 to +0.300"]


@pytest.mark.parametrize(
    ("scores", "says"),
    [
        ({"plug": 0.39, "plug:other-user": 0.30}, "helps, and it is the user: plug gains 5.0 points of accuracy"),
        (
            {"plug": 0.39, "plug:other-user": 0.39},
            "helps, but another&#39;s history helps as much: plug gains 5.0 points",
        ),
        ({"bm25": 0.39}, "helps; whether it is the user is not known: bm25 gains 5.0 points"),
        ({"bm25": 0.35}, f"Personalisation: {NO_DIFFERENCE}; the gain of bm25 may be chance"),
        ({"bm25": 0.35, "dense": 0.34}, f"{NO_DIFFERENCE}; the gain of bm25, the best of 2 methods, may be chance"),
        ({"bm25": 0.29, "dense": 0.2}, "Personalisation harms: even bm25, the best of 2 methods, loses 5.0 points"),
    ],
)
def test_the_headline_is_the_verdicts(scores, says):
    found = claim(
        {"none": (0.34, 0.01), "oracle": (0.9, 0.01)} | {name: (score, 0.01) for name, score in scores.items()}
    )
    html = page.render(typed(made_up(verdict=found)), [])
    headline = re.search("<h1>(.*)</h1>", html)[1]
    assert says in headline and f"{found['best']} does not beat linear classifier" in headline
    assert [words in html for words in ("&lt;i&gt;crime&lt;/i&gt;, 2", "<i>crime")] == [True, False]


def test_references_have_a_table_of_their_own():
    html = page.render(typed(), [])
    methods, references = html.partition("<h2>References without an LLM</h2>")[::2]
    for name, (score, _) in REFERENCES.items():
        assert f">{name}<small>what {name} is<" in references and f"{100 * score:.1f}%" in references
        assert name not in methods.partition("<h2>All methods</h2>")[2]
    assert "References without" not in page.render(typed(made_up(references={})), [])
    assert all(name not in row for name in REFERENCES for chart in charts.draw_all(typed()) for row in chart.rows)


def test_replies_that_were_not_understood_are_counted_and_shown_with_their_users_for_an_erasure():
    html = page.render(typed(), [])
    assert html.count('<span data-user="user-7">The tag is') == 3 * len(UNCLEAR)
    assert 'data-label="not understood"><span>4.1%' in html and 'data-label="not understood"><span>0.0%' in html
    found = made_up(verdict=claim({"none": (0.3, 0.01), "plug": (0.5, 0.01)}, plug=0.35))
    found["methods"]["plug"]["not_understood"]["share"] = 0.35
    html = page.render(typed(found), [])
    assert "35.0% of the replies of plug are no label of the task</h1>" in html
    assert 'data-label="not understood"><span class="bad">35.0%' in html
    for row in found["methods"].values():  # a task that writes
        row["not_understood"] = None
    html = page.render(typed(found), [])
    assert "not understood</th>" not in html and "were not understood" not in html


def test_examples_stand_there_as_text_only_when_given():
    assert "Examples side by side" not in page.render(typed(), [])
    html = page.render(typed(made_up(examples=examples())), [])
    assert html.count('<article class="example">') == 10 and "&lt;b&gt;romance&lt;/b&gt;" in html
