"""Job `plan`: what a population costs, on the screen, with the formula of every number. Ray does not start.

What it does and its keys stand in `config.py`.
"""

from collections.abc import Iterable, Sequence

from pipelines.plan import rates
from pipelines.plan.config import PlanConfig as Config
from pipelines.plan.estimate import Line, Stored, least_gpus, lines_of, storage_of
from pipelines.plan.rates import GPUS, SHARES_SOURCE

_UNITS = ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B"))


def run(config: Config) -> int:
    """Runs the job; returns the exit code."""
    measured = rates.read(config.rates)
    lines, stored = lines_of(config, measured), storage_of(config, measured)
    print("\n".join([*_head(config), *_jobs(config, lines), *_tables(config, stored), *_formulas(lines, stored)]))
    return 0


def _price(config: Config) -> float:
    return GPUS[config.gpu].price if config.gpu_price is None else config.gpu_price


def _head(config: Config) -> list[str]:
    gpu = GPUS[config.gpu]
    price = (
        f"${_price(config):.2f} an hour, as given"
        if config.gpu_price is not None
        else f"${gpu.price:.2f} an hour (AWS {gpu.instance}, us-east-1, on demand, list price of 2025: set gpu_price)"
    )
    return [
        f"{config.users:,} users with {config.items:g} items of {config.item_tokens} tokens, {config.changed:.2%} of "
        f"them new in a night; an LLM of {config.llm} needs {least_gpus(config)} {config.gpu}",
        f"one {config.gpu}: {price}; each job within {config.hours:g} hours",
        "",
    ]


def _jobs(config: Config, lines: Iterable[Line]) -> list[str]:
    rows = [("job", "units", "", "GPU hours", "GPUs", "hours", "money")]
    for line in lines:
        gpus = line.gpus(config.hours)
        hours = line.seconds(gpus) / 3600 if gpus else line.start_s / 3600
        count = f"{gpus:,}" if gpus else "start-up alone is longer"
        money = gpus * hours * _price(config)
        rows.append(
            (line.job, f"{line.units:,.0f}", line.unit, f"{line.gpu_seconds / 3600:,.3f}", count, f"{hours:,.3f}",
             f"${money:,.2f}")
        )  # fmt: skip
    return [*_aligned(rows), ""]


def _tables(config: Config, stored: Iterable[Stored]) -> list[str]:
    rows = [("table", "bytes", "", "money a month")]
    total = sum(table.bytes for table in stored)
    for name, size in [*((table.table, table.bytes) for table in stored), ("together", total)]:
        rows.append((name, f"{size:,.0f}", _short(size), f"${size / 1e9 * config.storage_price:,.2f}"))
    return [*_aligned(rows), ""]


def _formulas(lines: Iterable[Line], stored: Iterable[Stored]) -> list[str]:
    said = ["GPU seconds of one unit:"]
    said += [f"  {line.job}: {line.formula} [{line.source or SHARES_SOURCE}]" for line in lines]
    said += ["bytes of one row:"]
    said += [f"  {table.table}: {table.formula}" + (f" [{table.source}]" if table.source else "") for table in stored]
    return [*said, "Not counted: nodes that start and wait, CPU nodes, traffic, older versions until `vacuum`."]


def _short(size: float) -> str:
    scale, unit = next(((scale, unit) for scale, unit in _UNITS if size >= scale), _UNITS[-1])
    return f"{size / scale:,.1f} {unit}"


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    said = []
    for row in rows:
        cells = enumerate(zip(row, widths, strict=True))
        said.append("  ".join(cell.ljust(w) if i in (0, 2) else cell.rjust(w) for i, (cell, w) in cells).rstrip())
    return said
