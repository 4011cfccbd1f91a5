"""The figures of an evaluation, from tallies.

Replies that were not understood stand in report.json with their user's id, so that `erase` finds them; the screen shows
how many they are and never a text.
"""

from collections.abc import Iterable, Mapping, Sequence, Set

from pipelines.evaluate import breakdown, scoring, verdict
from pipelines.evaluate.cohorts import Census
from pipelines.evaluate.figures import (
    BASELINE,
    Evaluation,
    Example,
    ExampleReply,
    Gain,
    Interval,
    MethodFigures,
    NotUnderstood,
    ReferenceFigures,
    UnclearReply,
    Verdict,
)
from pipelines.evaluate.replies import IDENTITIES
from pipelines.evaluate.score import Scored, Tally, first
from pipelines.evaluate.verdict import MANY, Figure
from pipelines.methods import NO_ADAPTER, known_parts
from pplug import intervals, metrics
from pplug.tasks import TaskSpec

_SHARED = {"llm_id": "LLM", "decoding_id": "decoding"}
"""Identities that a method has to share with the baseline, or its gain is not that of personalisation alone."""


def summarise(
    scored: Scored,
    task: TaskSpec,
    census: Census,
    cuts: dict[str, tuple[int, int]],
    seconds: Mapping[str, float],
    repeats: int,
    about: Mapping[str, str],
) -> Evaluation:
    """Turns sums into figures: by method, by thirds of the users, for the references that need no LLM, and the verdict.

    Args:
        seconds: seconds per reply, for methods where they are known.
        repeats: as `scoring.repeats`.
        about: one sentence per reference.
    """
    n_users = scored.n_people
    own, references = (figures(tallies, task) for tallies in (scored.methods, scored.references))
    methods = {
        name: MethodFigures(
            n=int(tally.sums[0]),
            scores=_scores(own[name]),
            ci95=_intervals(own[name]),
            errors=tally.errors,
            not_understood=_not_understood(tally, task),
            cut_at_the_limit=tally.cut,
            cost=breakdown.cost(tally, task, census, seconds.get(name)),
        )
        for name, tally in scored.methods.items()
    }
    _add_gains(methods, scored, task, own, n_users)
    return Evaluation(
        task=task.name,
        n_users=n_users,
        n_requests=scored.answered,
        not_generated=scored.labelled - scored.answered,
        verdict=_verdict(task, methods, own, references, n_users, _made_by([scored], "llm_id")),
        methods=methods,
        references={
            name: ReferenceFigures(scores=_scores(figures), ci95=_intervals(figures), about=about[name])
            for name, figures in references.items()
        },
        groups=breakdown.by_thirds(scored, task, census, cuts, repeats),
        warnings=_warnings(scored, task, n_users),
    )


def figures(tallies: Mapping[str, Tally], task: TaskSpec) -> dict[str, dict[str, Figure]]:
    """Figures by name and metric."""
    k, scores = metrics.columns(task), scoring.scores(tallies, task)
    drawn = {name: metrics.from_sums(task, tally.resampled[:, :k]) for name, tally in tallies.items()}
    return {
        name: {metric: Figure(score, drawn[name][metric]) for metric, score in own.items()}
        for name, own in scores.items()
    }


def _scores(figures: Mapping[str, Figure]) -> dict[str, float]:
    return {metric: figure.score for metric, figure in figures.items()}


def _intervals(figures: Mapping[str, Figure]) -> dict[str, Interval]:
    return {metric: intervals.ci95(figure.drawn) for metric, figure in figures.items()}


def _add_gains(
    methods: Mapping[str, MethodFigures],
    scored: Scored,
    task: TaskSpec,
    figures: Mapping[str, Mapping[str, Figure]],
    people: int,
) -> None:
    """Adds paired differences to the baseline, each with its own interval and, for candidates, one that holds for all
    of them at once."""
    if BASELINE not in methods:
        return
    gains: dict[str, dict[str, Gain]] = {name: {} for name in methods if name != BASELINE}
    for metric in metrics.names(task):
        base = figures[BASELINE][metric]
        pairs = {name: (figures[name][metric], base) for name in verdict.candidates(methods)}
        corrected = verdict.differences(pairs, people)
        for name in gains:
            figure = figures[name][metric]
            gains[name][metric] = Gain(
                difference=figure.score - base.score,
                ci95=intervals.ci95(figure.drawn - base.drawn),
                p_value=intervals.p_value(figure.drawn - base.drawn, people),
                ci95_corrected=corrected[name].known_interval if name in corrected else None,
            )
    for name, own in gains.items():
        methods[name].vs_none = own
        methods[name].users_vs_none = breakdown.user_shares(scored.methods[name], task)


def _verdict(
    task: TaskSpec,
    methods: Mapping[str, MethodFigures],
    own: Mapping[str, Mapping[str, Figure]],
    references: Mapping[str, Mapping[str, Figure]],
    people: int,
    llms: Mapping[str, Set[str]],
) -> Verdict:
    """The verdict by the first metric of the task."""
    metric = metrics.names(task)[0]
    of_methods, of_references = ({name: row[metric] for name, row in rows.items()} for rows in (own, references))
    judgement = verdict.judge(metric, of_methods, of_references, people, llms)
    unclear = {name: row.not_understood.share for name, row in methods.items() if row.not_understood}
    return verdict.say(judgement, task.name, methods, unclear, _answer(task) or "")


def _answer(task: TaskSpec) -> str | None:
    """Words for what a reply must be to count as understood; None where any text is an answer."""
    return metrics.KINDS[task.metric].answer


def _not_understood(tally: Tally, task: TaskSpec) -> NotUnderstood | None:
    """None where any text is an answer, or where there is no reply without an error."""
    n_replies = int(tally.sums[0]) - tally.errors
    if _answer(task) is None or not n_replies:
        return None
    some = [UnclearReply(user_id=reply.user_id, text=reply.text) for reply in tally.unclear]
    return NotUnderstood(n=tally.n_unclear, share=tally.n_unclear / n_replies, replies=some)


def identities(parts: Sequence[Scored]) -> dict[str, str | None]:
    """Models and decoding that the replies are by; two plugs in two runs stand side by side."""
    made_by = {(kind, name) for part in parts for method, kind, name in part.made_by if method in part.methods}
    return {kind: ", ".join(sorted(name for of, name in made_by if of == kind)) or None for kind in IDENTITIES}


def unlike_baseline(parts: Sequence[Scored]) -> dict[str, list[str]]:
    """Methods that reply by another LLM or another decoding than the baseline, with the kinds of identity that
    differ."""
    unlike: dict[str, list[str]] = {}
    for kind in _SHARED:
        ids = _made_by(parts, kind)
        for method in dict.fromkeys(name for part in parts for name in part.methods):
            if BASELINE in ids and ids.get(method, set()) - ids[BASELINE]:
                unlike.setdefault(method, []).append(kind)
    return unlike


def _made_by(parts: Iterable[Scored], kind: str) -> dict[str, set[str]]:
    """Identities of one kind by which the methods that are scored reply."""
    ids: dict[str, set[str]] = {}
    for part in parts:
        for method, of, name in part.made_by:
            if of == kind and method in part.methods:
                ids.setdefault(method, set()).add(name)
    return ids


def unlike_warnings(unlike: Mapping[str, Sequence[str]], parts: Sequence[Scored]) -> list[str]:
    """Says for which methods the gain over the baseline is not that of personalisation alone, and what would tell it.

    Args:
        unlike: as `unlike_baseline` gives it for these parts.
    """
    llms, warnings = _made_by(parts, "llm_id"), list[str]()
    for kind, word in _SHARED.items():
        names = [name for name, kinds in unlike.items() if kind in kinds]
        if not names:
            continue
        remedy = f"score {BASELINE} by the same {word} beside them"
        if kind == "llm_id" and all(any(part.group == "adapter" for part in known_parts(name)) for name in names):
            remedy = _without_adapter(llms, names)
        warnings.append(
            f"{', '.join(names)}: by another {word} than {BASELINE}, so that their gain over {BASELINE} holds this "
            f"difference too; {remedy}"
        )
    return warnings


def _without_adapter(llms: Mapping[str, Set[str]], names: Iterable[str]) -> str:
    """Says what tells how much of the gain of methods with an adapter their LLM has alone."""
    if NO_ADAPTER not in llms:
        return f"generate {NO_ADAPTER}, which tells it"
    if llms[NO_ADAPTER] >= set[str]().union(*(llms[name] for name in names)):
        return f"{NO_ADAPTER} tells how great it is"
    return f"{NO_ADAPTER} is not by the LLM that they are by; generate it by that one, which tells it"


def examples(scored: Scored, task: TaskSpec, count: int) -> list[Example]:
    """Requests drawn at random among those that the methods answer differently, with the replies in one order."""
    told = task.labelled  # no reply is right or wrong where a free text is asked for
    rows = []
    for example in first(scored.examples, count):
        texts = {name: example.replies[name] for name in scored.methods if name in example.replies}
        replies = [
            ExampleReply(method=name, text=text, right=told and _is_right(task, text, example.target))
            for name, text in texts.items()
        ]
        rows.append(Example(input=example.input, target=example.target, replies=replies))
    return rows


def _is_right(task: TaskSpec, text: str, target: str) -> bool:
    """Tells whether a reply is the answer; ratings are compared as the numbers that they are."""
    if task.metric == "rating":
        return metrics.understood(task, text) and float(text) == float(target)
    return text.strip() == target.strip()


def reply_warnings(scored: Scored, task: TaskSpec) -> list[str]:
    """Names methods that have errors, or of which many replies are no answer or were cut: their scores tell little."""
    warnings = [
        f"{name}: {tally.errors} replies were errors and count as empty predictions"
        for name, tally in scored.methods.items()
        if tally.errors
    ]
    answer = _answer(task)
    for name, tally in scored.methods.items():
        n_replies = max(1, int(tally.sums[0]) - tally.errors)
        if answer and tally.n_unclear > MANY * n_replies:
            share = tally.n_unclear / n_replies
            warnings.append(f"{name}: {share:.0%} of the replies are no {answer} and count as wrong")
        if tally.cut > MANY * n_replies:
            warnings.append(f"{name}: {tally.cut / n_replies:.0%} of the replies were cut at the limit of tokens")
    return warnings


def few_users_warning(n_users: int) -> list[str]:
    """A warning where so few people were asked that the intervals are rough."""
    return [f"only {n_users} users: the intervals are rough, narrow ones too"] * (n_users < intervals.FEW_OWNERS)


def _warnings(scored: Scored, task: TaskSpec, n_users: int) -> list[str]:
    warnings = few_users_warning(n_users)
    left = scored.labelled - scored.answered
    if left:
        warnings.append(
            f"{left} of {scored.labelled} requests with a target were not generated by this run and are left out"
        )
    if scored.n_unread:
        warnings.append(
            f"{scored.n_unread} of {scored.answered} targets are mostly of letters that ROUGE does not read, since it "
            "knows a to z and 0 to 9 alone: even a reply that repeats them may score 0. To compare whole words, write "
            "`scores: [meteor]` into the task's file and evaluate again with --task FILE"
        )
    return warnings + reply_warnings(scored, task)
