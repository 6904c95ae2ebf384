"""report.html: tables and figures in one file that needs no network."""

from __future__ import annotations

import base64
import json
import re
from typing import TYPE_CHECKING, Any

from spade_eval import __version__
from spade_eval.atomic import replacing_file
from spade_eval.report.extra import needs_report_extra
from spade_eval.report.formats import number, numeric
from spade_eval.report.sweeps import slug

with needs_report_extra():
    import itables.options
    import jinja2
    import markupsafe
    from itables import to_html_datatable
    from itables.javascript import generate_init_offline_itables_html

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from spade_eval.report.formats import Table
    from spade_eval.report.styles import Plot
    from spade_eval.report.sweeps import Sweep

_PAGED = 12  # rows above which a table gets pages and a search field
_PIXELS = 120  # per inch of a figure, on a screen of the common density


def write_page(
    path: Path,
    sources: Sequence[Mapping[str, str]],
    remarks: Sequence[str],
    plots: Sequence[tuple[Plot, Path]],
    tables: Sequence[Table],
) -> None:
    """Write the page.

    Args:
        path: Its file.
        sources: What it was made from, one row of text each.
        remarks: What a reader should know about it.
        plots: Figures with their PNG files.
        tables: Tables.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("spade_eval.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template("report.html.j2").render(
        version=__version__,
        sources=sources,
        columns=list(dict.fromkeys(key for source in sources for key in source)),
        remarks=remarks,
        figures=[
            {
                "name": plot.name,
                "title": plot.title,
                "caption": plot.caption,
                "width": round(plot.figure.get_figwidth() * _PIXELS),
                "png": base64.b64encode(file.read_bytes()).decode("ascii"),
            }
            for plot, file in plots
        ],
        tables=[
            {"name": t.name, "title": t.title, "note": t.note, "html": _table(t)} for t in tables
        ],
        table_code=markupsafe.Markup(generate_init_offline_itables_html(itables.options.dt_bundle)),
    )
    with replacing_file(path) as new:
        new.write_text(text, encoding="utf-8")


def source_rows(sweeps: Sequence[Sweep]) -> list[dict[str, str]]:
    """What sweep.json tells, as text."""
    rows = []
    for sweep in sweeps:
        about = sweep.about
        row = {"folder": sweep.source, "model": sweep.model, "layers": str(sweep.n_layers)}
        for key in ("adapter", "tasks", "seed", "command", "spade_eval", "versions", "machine"):
            if about.get(key) is not None:
                value = about[key]
                row[key] = (
                    value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
                )
        rows.append(row)
    return rows


def _table(table: Table) -> markupsafe.Markup:
    """A sortable table; itables escapes what is in it."""
    # Numbers as text: the page sorts them as numbers all the same, and shows no "NaN".
    shown = table.frame.apply(lambda x: x.map(number) if numeric(table.frame, str(x.name)) else x)
    options: dict[str, Any] = {}
    if len(table.frame) > _PAGED:
        options = {"pageLength": _PAGED, "layout": {"topStart": "pageLength", "topEnd": "search"}}
    html = to_html_datatable(
        shown,
        connected=False,
        showIndex=False,
        allow_html=False,
        table_id=re.sub(r"\W", "_", f"t-{slug(table.name)}"),
        scrollX=True,
        maxBytes=0,
        display_logo_when_loading=False,
        classes="display compact",
        **options,
    )
    return markupsafe.Markup(html)
