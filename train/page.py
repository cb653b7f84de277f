"""A comparison as one HTML file that needs nothing else: tables, picture, what they mean. No scripts."""

from __future__ import annotations

import html
from pathlib import Path

from pipeline.errors import RunError
from train.compare import Comparison
from train.compare_tables import Table, losses, notes, stability
from train.panels import picture

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1500px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
.wide { overflow-x: auto } svg { width: 100%; height: auto }
table { border-collapse: collapse; white-space: nowrap; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #ddd }
th { border-bottom: 2px solid #888 } th:first-child, td:first-child { text-align: left }
p { max-width: 60rem; color: #555 }
"""


def page(comparison: Comparison) -> str:
    """The HTML text."""
    title = f"{', '.join(arm.name for arm in comparison.arms[:3])}{', ...' if len(comparison.arms) > 3 else ''}"
    drawing = picture(comparison, "svg").decode()
    said = "\n".join(f"<p>{html.escape(note)}</p>" for note in notes(comparison))
    runs = "\n".join(
        f"<li>{html.escape(arm.name)}: {html.escape(', '.join(figure.run for figure in arm.figures))}</li>"
        for arm in comparison.arms
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{html.escape(title)}</h1>
<h2>Losses</h2>
{_table(losses(comparison))}
<h2>Stability</h2>
{_table(stability(comparison))}
<h2>Curves</h2>
<div class="wide">{drawing[drawing.index("<svg") :]}</div>
<h2>What this is</h2>
{said}
<ul>
{runs}
</ul>
</body>
</html>
"""


def write_page(comparison: Comparison, out: Path) -> None:
    """Write the page OUT. Raises RunError where it cannot be written."""
    try:
        out.write_text(page(comparison), encoding="utf-8")
    except OSError as error:
        raise RunError("cannot write the page", where=out, found=error) from error


def _table(table: Table) -> str:
    heads, rows = table
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in heads)
    body = "\n".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'
