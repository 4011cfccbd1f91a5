"""The figures as lines for the terminal; * marks a difference that is no matter of chance."""

from collections.abc import Mapping, Sequence

from pipelines.evaluate.figures import (
    BASELINE,
    Comparison,
    Evaluation,
    PersonaDrift,
    ReferenceFigures,
)
from pipelines.evaluate.wording import best_possible, better_worse, cell, unclear_share


def evaluation_text(evaluation: Evaluation, users: str | None = None) -> str:
    """The headline, its reasons, and the figures as tables.

    Args:
        users: file of the users who were chosen to be scored; None: all of them are.
    """
    verdict, chosen = evaluation.verdict, f", those of {users} alone" if users else ""
    lines = [f"{evaluation.task}: {evaluation.n_requests} requests of {evaluation.n_users} users{chosen}"]
    lines += [verdict.headline, *verdict.because, *_methods(evaluation)]
    if evaluation.references:
        lines += ["references, which need no LLM:", *_references(evaluation.references, evaluation.metrics)]
    if evaluation.reference:
        lines.append(f"best possible: {best_possible(evaluation.reference)}")
    return "\n".join([*lines, *_notes(evaluation.warnings)])


def _methods(evaluation: Evaluation) -> list[str]:
    names, methods = evaluation.metrics, evaluation.methods
    compared = any(row.vs_none is not None for row in methods.values())
    unclear = any(row.not_understood for row in methods.values())
    head = ["method", "n", *["not understood"] * unclear, *(f"{name} [95%]" for name in names)]
    head += [*(f"{name} - {BASELINE} [95%]" for name in names), "users better / worse"] if compared else []
    lines = [head]
    for method, row in methods.items():
        cells = [method, str(row.n), *[unclear_share(row)] * unclear]
        cells += [cell(row.scores[name], row.ci95[name]) for name in names]
        if compared:
            gains = [row.vs_none[name] if row.vs_none else None for name in names]
            cells += [cell(gain.difference, gain.interval, evaluation.n_users) if gain else "" for gain in gains]
            cells.append(better_worse(row))
        lines.append(cells)
    return _aligned(lines)


def _references(references: Mapping[str, ReferenceFigures], names: Sequence[str]) -> list[str]:
    lines = [["reference", *(f"{name} [95%]" for name in names), "what it is"]]
    for reference, row in references.items():
        lines.append([reference, *(cell(row.scores[name], row.ci95[name]) for name in names), row.about])
    return _aligned(lines)


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def _notes(warnings: Sequence[str]) -> list[str]:
    return [f"note: {warning}" for warning in warnings]


def comparison_text(comparison: Comparison) -> str:
    """The differences between two runs."""
    lines = [
        f"{comparison.task}: {comparison.n_requests} requests of {comparison.n_users} users, "
        f"{' -> '.join(comparison.runs)}"
    ]
    for name, row in comparison.methods.items():
        for metric, change in row.items():
            difference = cell(change.difference, change.interval, comparison.n_users)
            lines.append(f"{name}  {metric}  {change.earlier:.3f} -> {change.later:.3f}  {difference}")
    return "\n".join([*lines, *_notes(comparison.warnings)])


def drift_text(drift: PersonaDrift) -> str:
    """The differences between two versions of the personas."""
    figures = {name: figure for name, figure in drift.dump().items() if name not in ("versions", "threshold")}
    shown = ", ".join(f"{name} {figure:.4g}" for name, figure in figures.items())
    return f"personas, version {drift.versions[0]} to {drift.versions[1]}: {shown}"
