"""Writes the tables and the chart of docs/performance.md from the files in benchmarks/results/:

    .venv/bin/python benchmarks/report.py

Only what stands between `<!-- NAME -->` and `<!-- /NAME -->` on the page is replaced. The newest
machine's results are taken, and of these, for each number, the newest run that has it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sidebyside import chart, results
from sidebyside.results import Report, ratio, rows_of, spread
from sidebyside.rows import JOBS, unit
from sidebyside.targets import TARGETS, measured

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
CHARTED = ("prefill 512", "decode 1", "decode 16", "decode 32")


def of_one_machine(reports: list[Report]) -> list[Report]:
    """The reports from where the newest one was made, oldest first."""
    return [r for r in reports if r["cpu"] == reports[-1]["cpu"]]


def by_model(reports: list[Report]) -> dict[str, list[Report]]:
    """Of one machine's reports, each model's, oldest first."""
    found: dict[str, list[Report]] = {}
    for report in reports:
        found.setdefault(report["model"], []).append(report)
    return dict(sorted(found.items()))


def line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def targets_table(reports: list[Report]) -> str:
    lines = [
        line("model", "row", "against", "target", "measured, median [range]", "reached"),
        line(*["---"] * 6),
    ]
    for target in TARGETS:
        found = measured(target, reports)
        name = target.model.strip(".").upper() if target.model != "gemma" else "Gemma"
        if found is None:
            lines.append(line(name, target.row, target.against, str(target), "not measured", ""))
            continue
        value, mark = found.value, " s" if target.seconds else "x"
        peer = target.against if target.against == found.peer else f"{target.against}: {found.peer}"
        cell = f"{value.median:.2f}{mark} [{value.low:.2f} - {value.high:.2f}]"
        reached = "yes" if target.reached(value.median) else "**no**"
        lines.append(line(name, target.row, peer, str(target), cell, reached))
    return "\n".join(lines)


def model_table(reports: list[Report]) -> str:
    """One model: a line for each side, a column for each row; ratios beside the peers' medians."""
    newest = {row: report for report in reports for row in rows_of(report["rounds"])}
    sides = list(dict.fromkeys(side for report in reports for side in report["sides"]))
    order = [row for row in _row_order() if row in newest]
    lines = [
        line("", *(f"{row}, {unit(row)}" for row in order)),
        line(*["---"] * (len(order) + 1)),
    ]
    for side in sides:
        cells = []
        for row in order:
            # A later run may have left this side out.
            having = [r for r in reports if spread(r["rounds"], side, row)]
            value = spread(having[-1]["rounds"], side, row) if having else None
            against = ratio(having[-1]["rounds"], side, row) if having else None
            cell = f"{_number(value.median)}" if value else ""
            cells.append(
                cell + (f" ({against.median:.2f}x)" if against and side != "elinvar" else "")
            )
        lines.append(line(side, *cells))
    return "\n".join(lines)


def _row_order() -> list[str]:
    rows = [row for job in JOBS for row in job.rows]
    kinds = ("prefill", "decode", "64", "start", "memory")
    return sorted(rows, key=lambda row: kinds.index(row.split()[0]))


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def models_text(reports: list[Report]) -> str:
    parts = []
    for model, found in by_model(reports).items():
        newest = found[-1]
        about = f"{newest['date'][:10]}, {newest['cpu']}, {newest['threads']} threads"
        rounds = len(newest["rounds"]["elinvar"])
        failed = [f"{side} failed: {why}" for side, why in newest["failed"].items()]
        parts += [f"### {model}", f"{about}, {rounds} rounds.", model_table(found), *failed]
    return "\n\n".join(parts)


def sides_table(reports: list[Report]) -> str:
    """Version, settings and weights of each side, by the newest report that has it."""
    newest = {side: about for report in reports for side, about in report["sides"].items()}
    lines = [line("side", "version", "settings", "weights"), line(*["---"] * 4)]
    for side, about in newest.items():
        lines.append(line(side, about["version"], about["settings"], about["weights"]))
    return "\n".join(lines)


def chart_of(reports: list[Report]) -> str:
    """The model with the most sides, at its newest run that has them."""
    report = max(reports, key=lambda r: (len(r["sides"]), r["date"]))
    panels = {}
    for row in CHARTED:
        values = {
            side: s.median for side in report["sides"] if (s := spread(report["rounds"], side, row))
        }
        if values:
            panels[f"{row}, tokens/s"] = values
    where = f"{report['cpu']}, {report['threads']} threads, {report['date'][:10]}"
    return chart.bars(f"{report['model']} on {where}", panels)


def refreshed(page: str, sections: dict[str, str]) -> str:
    for name, text in sections.items():
        opening, closing = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, found, rest = page.partition(opening)
        _, ends, after = rest.partition(closing)
        if not (found and ends):
            raise SystemExit(f"The page has no {opening} ... {closing}.")
        page = f"{before}{opening}\n\n{text}\n\n{closing}{after}"
    return page


def sections_of(reports: list[Report]) -> dict[str, str]:
    return {
        "targets": targets_table(reports),
        "sides": sides_table(reports),
        "models": models_text(reports),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("--results", type=Path, default=results.FOLDER)
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args()
    reports = of_one_machine(results.load_all(args.results))
    args.page.write_text(refreshed(args.page.read_text(), sections_of(reports)))
    args.page.with_suffix(".svg").write_text(chart_of(reports))


if __name__ == "__main__":
    main()
