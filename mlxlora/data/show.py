"""Samples made visible: every token with the loss that it carries, on a terminal and as a page."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mlxlora.data.sample import Sample
from mlxlora.terminal import CONTROL, OFF, PARTLY, TRAINED, visible
from mlxlora.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Piece:
    """One token, or several that make one character together.

    text:    what it says
    ids:     its token ids
    weight:  its loss weight
    control: whether it is a control token
    """

    text: str
    ids: tuple[int, ...]
    weight: float
    control: bool = False


@dataclass(frozen=True, slots=True)
class Shown:
    """A sample as pieces; `left_out` tokens at its end are not shown."""

    origin: str
    tokens: int
    trained: int
    pieces: tuple[Piece, ...]
    left_out: int = 0


def shown(sample: Sample, tokenizer: Tokenizer, *, most: int = 2000) -> Shown:
    """A sample for people to look at."""
    ids = [int(number) for number in sample.tokens[:most]]
    control = set(tokenizer.control_tokens.values())
    pieces: list[Piece] = []
    index = 0
    while index < len(ids):
        if ids[index] in control:
            pieces.append(Piece(tokenizer.token(ids[index]), (ids[index],), float(sample.weights[index]), True))
            index += 1
            continue
        end = index + 1
        text = _said(tokenizer, ids, index, end)
        while "\ufffd" in text and end < len(ids) and end - index < 4 and ids[end] not in control:
            end += 1  # a character of several bytes may take several tokens
            text = _said(tokenizer, ids, index, end)
        weight = float(sample.weights[index:end].max())
        pieces.append(Piece(text, tuple(ids[index:end]), weight))
        index = end
    trained = int((sample.weights > 0).sum())
    return Shown(sample.origin, len(sample.tokens), trained, tuple(pieces), len(sample.tokens) - len(ids))


def _said(tokenizer: Tokenizer, ids: Sequence[int], begin: int, end: int) -> str:
    """What tokens say after the ones before them (a decoder may drop the space at the beginning of a text)."""
    before = ids[max(0, begin - 1) : begin]
    whole = tokenizer.decode([*before, *ids[begin:end]])
    known = tokenizer.decode(before) if before else ""
    return whole[len(known) :] if whole.startswith(known) else tokenizer.decode(ids[begin:end])


def for_terminal(sample: Shown, *, colour: bool) -> str:
    """Trained text on green (weights other than 1 on yellow), control tokens in purple; without colours in ⟦ ⟧."""
    parts = []
    on = False
    for piece in sample.pieces:
        learned, text = piece.weight > 0, visible(piece.text)
        if not colour:
            parts += ["⟦"] * (learned and not on) + ["⟧"] * (on and not learned) + [text]
        elif learned:
            paint = TRAINED if piece.weight == 1 else PARTLY
            # line breaks outside of the colour, or the terminal paints the rest of the line
            parts.append(f"{paint}{text.replace(chr(10), f'⏎{OFF}{chr(10)}{paint}')}{OFF}")
        else:
            parts.append(f"{CONTROL}{text}{OFF}" if piece.control else text)
        on = learned
    if on and not colour:
        parts.append("⟧")
    rest = f" … {sample.left_out:,} more tokens" if sample.left_out else ""
    return "".join(parts) + rest


def for_page(title: str, summary: Iterable[tuple[str, str]], bars: Sequence[tuple[str, int]], warnings: Sequence[str],
             samples: Sequence[Shown]) -> str:  # fmt: skip
    """One HTML page, without anything from outside."""
    facts = "".join(f"<tr><th>{_e(name)}</th><td>{_e(value)}</td></tr>" for name, value in summary)
    most = max((count for _, count in bars), default=1) or 1
    rows = "".join(
        f"<tr><th>{_e(name)}</th><td><div class=bar style='width:{100 * count / most:.1f}%'></div></td>"
        f"<td>{count:,}</td></tr>"
        for name, count in bars
    )
    found = "".join(f"<li>{_e(text)}</li>" for text in warnings) or "<li>nothing suspicious</li>"
    shown_samples = "".join(_section(sample) for sample in samples)
    return _PAGE.format(title=_e(title), facts=facts, bars=rows, warnings=found, samples=shown_samples)


def _section(sample: Shown) -> str:
    spans = "".join(_span(piece) for piece in sample.pieces)
    rest = f"<p>… {sample.left_out:,} more tokens</p>" if sample.left_out else ""
    head = f"{_e(sample.origin)}: {sample.tokens:,} tokens, {sample.trained:,} trained"
    return f"<section><h3>{head}</h3><pre>{spans}</pre>{rest}</section>"


def _span(piece: Piece) -> str:
    kind = " ".join(["c"] * piece.control + (["t"] if piece.weight == 1 else ["p"] if piece.weight > 0 else []))
    tip = f"token {', '.join(map(str, piece.ids))}; weight {piece.weight:g}"
    text = _e(piece.text).replace("\n", "<i>⏎</i>\n")
    return f'<span class="{kind}" title="{tip}">{text}</span>'


def _e(text: str) -> str:
    return html.escape(str(text), quote=True)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
:root {{ color-scheme: light dark; --ink: #1c1c1e; --paper: #fff; --soft: #f2f2f4; --learn: #b7ebc6; --part: #f4e3a1;
  --control: #8a2be2; --line: #d8d8dc; --bar: #4a90d9; }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #eee; --paper: #161618; --soft: #222226; --learn: #1f5c36;
  --part: #5f5118; --control: #c79bff; --line: #3a3a40; --bar: #5fa0e0; }} }}
body {{ font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; }} th {{ text-align: left; font-weight: 500; padding: .1rem 1rem .1rem 0; }}
table.bars {{ width: 100%; }} table.bars th, table.bars td:last-child {{ white-space: nowrap; width: 1%; }}
table.bars td:last-child {{ padding-left: .5rem; }}
.bar {{ background: var(--bar); height: .9rem; border-radius: 2px; min-width: 1px; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; background: var(--soft); padding: .8rem; border-radius: 8px; }}
.t {{ background: var(--learn); }} .p {{ background: var(--part); }} .c {{ color: var(--control); font-weight: 600; }}
pre span:hover {{ outline: 1px solid var(--ink); }} pre i {{ opacity: .5; }}
</style></head><body>
<h1>{title}</h1>
<table>{facts}</table>
<h2>Warnings</h2><ul>{warnings}</ul>
<h2>Lengths in tokens</h2><table class="bars">{bars}</table>
<h2>Samples</h2>
<p><span class="t">trained</span> <span class="p">trained with another weight</span>
<span class="c">control token</span> not trained. Point at a token to see its id.</p>
{samples}
</body></html>
"""
