"""`elinvar rerank`: documents, best first, by how well they answer a query."""

from __future__ import annotations

import json
from typing import Any

import click

from elinvar.cli import options as opt
from elinvar.cli.command import command, option
from elinvar.cli.terminal import note, read_text


@command
@opt.model
@click.argument("documents", nargs=-1, required=True, metavar="DOC...")
@option("--query", required=True, metavar="TEXT", help="What the documents should answer.")
@option("--top-n", type=opt.AT_LEAST_1, metavar="N", help="Show the best N alone.")
@option(
    "--instruction",
    metavar="TEXT",
    help="What Qwen3-Reranker shall look for; before the query for an embedding model.",
)
@option("--json", "as_json", is_flag=True, help="One JSON object instead of lines.")
@opt.embedding
@opt.verbose
def rerank(
    model: str,
    documents: tuple[str, ...],
    query: str,
    top_n: int | None,
    instruction: str | None,
    as_json: bool,
    no_truncate: bool,
    **flags: Any,
) -> None:
    """Order documents by how well they answer a query; a DOC - stands for the lines of stdin.

    Takes rerankers, and embedding models, whose vectors are compared."""
    lines: list[str] = []
    for document in documents:
        lines += read_text().splitlines() if document == "-" else [document]
    if not lines:
        raise click.BadParameter("there is no document on stdin")

    from elinvar.cli.load import load_embedder

    embedder = load_embedder(model, opt.engine_config(flags), ranking=True)
    ranked = embedder.rank(
        query, lines, top_n=top_n, instruction=instruction, truncate=not no_truncate
    )
    if as_json:
        results = [
            {
                "index": r.index,
                "score": r.score,
                "truncated": r.truncated,
                "document": lines[r.index],
            }
            for r in ranked
        ]
        print(json.dumps({"model": model, "query": query, "results": results}, ensure_ascii=False))
        return
    for r in ranked:
        print(f"{r.score:.4f}  {lines[r.index]}")
    if num_cut := sum(r.truncated for r in ranked):
        note(f"{num_cut} documents were cut to fit {embedder.model.max_tokens} tokens.")
