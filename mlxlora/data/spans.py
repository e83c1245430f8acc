"""Which characters of a rendered conversation the assistant says.

A template may trim content, drop it from history, repeat or reorder it, so its output is not searched for the content.
The conversation is rendered twice: as it is, and with private-use characters around each piece of assistant text. When
the second text without these characters equals the first, they say exactly where every piece went; when it does not,
the template looks into the content, and the pieces are marked one at a time or the conversation is given up.

What the assistant says in a turn begins where the generation prompt ends (what a chat program writes before the model
goes on) and ends with the token that ends the turn.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mlxlora.data.records import Conversation, Message
from mlxlora.data.template import ChatTemplate, TemplateRefusal
from mlxlora.data.thinking import DELIMITERS, Style, after_closer

Kind = Literal["thinking", "answer", "call", "other"]

BLOCKS = (0xF0000, 0xF8000, 0x100000)  # private-use characters to mark pieces with: 0x7000 each
BLOCK = 0x7000
ESCAPE_OPEN, ESCAPE_CLOSE = "\U0010fffb", "\U0010fffa"  # around the number of a control token that content spells
ENDS = (
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<turn|>", "</s>",
    "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|END_OF_TURN_TOKEN|>", "<｜end▁of▁sentence｜>",
)  # fmt: skip
"""Tokens that are known to end a turn; the model's own end-of-text token always does."""


class Unusable(Exception):
    """A conversation that cannot be learned from; the message says why."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What the assistant says in one message, in characters of the rendered text.

    start, end: with the token that ends the turn, if there is one
    answer:     where the reasoning is over (equal to `start` without reasoning)
    ended:      whether a token ends the turn
    """

    message: int
    start: int
    answer: int
    end: int
    ended: bool


@dataclass(slots=True)
class Rendered:
    """A conversation as text, and the assistant's turns in it.

    dropped_thinking: turns whose reasoning the template leaves out
    """

    text: str
    turns: list[Turn]
    dropped_thinking: int = 0
    escaped: bool = False


@dataclass(slots=True)
class _Piece:
    message: int
    kind: Kind
    lead: str = ""  # what stands before it in the same content
    places: list[tuple[int, int]] = field(default_factory=list)


class TurnFinder:
    """Renders conversations with one template and finds the assistant's turns."""

    def __init__(self, template: ChatTemplate, control_tokens: Sequence[str], eos_token: str | None) -> None:
        """control_tokens: every special token of the vocabulary; eos_token: the one that ends a text."""
        self.template = template
        self.style = Style.of(template.source)
        known = sorted(control_tokens, key=len, reverse=True)
        self._control = re.compile("|".join(re.escape(token) for token in known)) if known else None
        self._suspicious = re.compile(f"{ESCAPE_OPEN}|{ESCAPE_CLOSE}" + "".join(f"|{re.escape(t)}" for t in known))
        self._numbers = {token: number for number, token in enumerate(known)}
        self._known = known
        self._exempt = {delimiter for pair in DELIMITERS for delimiter in pair} & set(known)
        self._ends = {token for token in (*ENDS, eos_token) if token}
        self._text_arguments = self._wants_text_arguments()
        self._developer = template.reads("developer")
        self._parts = self._wants_parts()
        self._headers = self._generation_prompts()

    # -- what the template is like ------------------------------------------------------------------------------------

    def _generation_prompts(self) -> list[str]:
        """What stands before the assistant's words: the generation prompt, and the same without an opened reasoning."""
        probe = [{"role": "user", "content": self._content("x")}]
        try:
            with_prompt = self.template.render(probe, add_generation_prompt=True)
            without = self.template.render(probe)
        except TemplateRefusal:
            return []
        # some templates end a text that has no generation prompt with another token: compare up to there
        pairs = enumerate(zip(with_prompt, without, strict=False))
        common = next((place for place, (a, b) in pairs if a != b), min(len(with_prompt), len(without)))
        for token in self._control.finditer(with_prompt) if self._control else ():
            if token.start() < common < token.end():
                common = token.start()
        prompt = with_prompt[common:]
        found = [prompt]
        for opener, _ in DELIMITERS:
            found.append(prompt.partition(opener)[0])
        return [text for text in dict.fromkeys(found) if text.strip()]

    def _wants_text_arguments(self) -> bool:
        """Whether the template wants a call's arguments as text (DeepSeek) and not as an object."""
        call: dict[str, Any] = {
            "id": "abcdefghi",
            "type": "function",
            "function": {"name": "f", "arguments": {"k": "v"}},
        }
        asked: dict[str, Any] = {"role": "user", "content": "x"}
        probe: list[dict[str, Any]] = [asked, {"role": "assistant", "content": "", "tool_calls": [call]}]
        try:
            return '"k"' not in self.template.render(probe) and self._renders_text(probe)
        except TemplateRefusal:
            return self._renders_text(probe)

    def _wants_parts(self) -> bool:
        """Whether the template wants content as a list of parts (templates of models that also see images)."""
        for content in ("QZQ", [{"type": "text", "text": "QZQ"}]):
            try:
                if "QZQ" in self.template.render([{"role": "user", "content": content}]):
                    return not isinstance(content, str)
            except TemplateRefusal:
                continue
        return False

    def _content(self, text: str) -> str | list[dict[str, str]]:
        """A message's content in the shape that the template wants."""
        return [{"type": "text", "text": text}] if self._parts else text

    def _renders_text(self, probe: list[dict[str, Any]]) -> bool:
        call = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": '{"k": "v"}'}}
        try:
            return '"k"' in self.template.render([probe[0], {"role": "assistant", "content": "", "tool_calls": [call]}])
        except TemplateRefusal:
            return False

    # -- rendering ----------------------------------------------------------------------------------------------------

    def find(self, conversation: Conversation) -> Rendered:
        """Render a conversation and find the assistant's turns. Raises Unusable."""
        conversation, escaped = self._escaped(conversation)
        try:
            text = self.template.render(self._messages(conversation, None), conversation.tools)
        except TemplateRefusal as error:
            raise Unusable(f"the chat template refuses it: {error}") from None
        pieces = self._pieces(conversation)
        if any(piece.kind != "other" for piece in pieces):
            self._locate(conversation, text, pieces)
        dropped = sum(piece.kind == "thinking" and not piece.places for piece in pieces)
        turns = list(self._turns(conversation, text, pieces))
        return Rendered(text, turns, dropped, escaped)

    def _messages(self, conversation: Conversation, marker: _Marker | None) -> list[dict[str, Any]]:
        """What the template is given; with a marker, the assistant's pieces are marked."""
        mark = marker.mark if marker else _unmarked
        result = []
        for index, message in enumerate(conversation.messages):
            role = "system" if message.role == "developer" and not self._developer else message.role
            item: dict[str, Any] = {"role": role}
            if message.role != "assistant":
                item["content"] = self._content(mark(message.content, index, "other"))
            else:
                reasoning, parts = self.style.arranged(message)
                if reasoning:
                    item["reasoning_content"] = item["thinking"] = mark(reasoning, index, "thinking")
                inline = mark(parts.thinking, index, "thinking", parts.before)
                content = parts.before + inline + parts.between + mark(parts.answer, index, "answer")
                item["content"] = self._content(content)
                if message.tool_calls:
                    item["tool_calls"] = [self._call(call, index, mark) for call in message.tool_calls]
            if message.name is not None:
                item["name"] = message.name
            if message.tool_call_id is not None:
                item["tool_call_id"] = message.tool_call_id
            result.append(item)
        return result

    def _call(self, call: dict[str, Any], index: int, mark: Any) -> dict[str, Any]:
        import json

        function = call["function"]
        arguments = function["arguments"]
        if self._text_arguments:
            arguments = json.dumps(arguments, ensure_ascii=False)
        return call | {"function": {"name": mark(function["name"], index, "call"), "arguments": arguments}}

    def _pieces(self, conversation: Conversation) -> list[_Piece]:
        """The assistant's pieces in the order in which `_messages` marks them."""
        collector = _Marker(0)
        self._messages(conversation, collector)
        return [_Piece(message, kind, lead) for message, kind, lead in collector.pieces]

    def _locate(self, conversation: Conversation, text: str, pieces: list[_Piece]) -> None:
        """Find where each piece went in `text`. Raises Unusable."""
        base = next((block for block in BLOCKS if not _block_pattern(block).search(text)), None)
        if base is None or 2 * len(pieces) > BLOCK:
            raise Unusable("it uses all of Unicode's supplementary private-use characters")
        if self._try_markers(conversation, text, pieces, _Marker(base)):
            return
        own = {number for number, piece in enumerate(pieces) if piece.kind != "other"}
        if self._try_markers(conversation, text, pieces, _Marker(base, own)):
            return
        for number in sorted(own):
            if not self._try_markers(conversation, text, pieces, _Marker(base, {number})):
                raise Unusable("the answer cannot be located: the template changes it depending on what it says")

    def _try_markers(self, conversation: Conversation, text: str, pieces: list[_Piece], marker: _Marker) -> bool:
        try:
            marked = self.template.render(self._messages(conversation, marker), conversation.tools)
        except TemplateRefusal:
            return False
        pattern = _block_pattern(marker.base)
        if pattern.sub("", marked) != text:
            return False
        begins: dict[int, int] = {}
        for count, found in enumerate(pattern.finditer(marked)):
            number = ord(found.group()) - marker.base
            place = found.start() - count
            if number % 2 == 0:
                begins[number // 2] = place
            elif number // 2 in begins:
                pieces[number // 2].places.append((begins.pop(number // 2), place))
        return True

    # -- from pieces to turns -----------------------------------------------------------------------------------------

    def _turns(self, conversation: Conversation, text: str, pieces: list[_Piece]) -> Iterator[Turn]:
        last_end = 0
        for index, message in enumerate(conversation.messages):
            if message.role != "assistant":
                continue
            own = [piece for piece in pieces if piece.message == index]
            lost = [piece for piece in own if piece.kind != "thinking" and not piece.places]
            if lost:
                raise Unusable(f"message {index + 1}: the template leaves the answer out")
            placed = [(piece, self._choose(piece, text, index, last_end)) for piece in own if piece.places]
            if not placed:
                continue  # an empty message
            over = max(place[1] for _, place in placed)
            following = [place[0] for p in pieces if p.message > index for place in p.places if place[0] >= over]
            turn = self._turn(index, placed, text, min(following, default=len(text)))
            last_end = max(last_end, turn.end)
            yield turn

    def _choose(self, piece: _Piece, text: str, index: int, last_end: int) -> tuple[int, int]:
        """The place of a piece; of several (a template that quotes it elsewhere), the one right after its header."""
        places = [place for place in piece.places if place[0] >= last_end] or piece.places
        if len(places) == 1:
            return places[0]
        near = []
        for place in places:
            header = self._header(text, place[0])
            if header is not None:
                near.append((place[0] - header, place))
        near.sort()
        if not near or (len(near) > 1 and near[0][0] == near[1][0]):
            raise Unusable(
                f"message {index + 1}: the template repeats the answer, and which is the turn cannot be told"
            )
        return near[0][1]

    def _header(self, text: str, place: int) -> int | None:
        """Where the generation prompt before `place` ends."""
        for header in self._headers:
            found = text.rfind(header, 0, place)
            if found >= 0:
                end = found + len(header)
                if end <= place and not any(token in text[end:place] for token in self._ends):
                    return end
        return None

    def _turn(self, index: int, placed: list[tuple[_Piece, tuple[int, int]]], text: str, limit: int) -> Turn:
        """The turn around its pieces; it ends before `limit`, where the next message's content begins."""
        first_piece, (first, _) = min(placed, key=lambda item: item[1][0])
        last_piece, last = max(placed, key=lambda item: item[1][1])
        header = self._header(text, first)
        start = header if header is not None else first - _leading(first_piece.lead, text, first)
        answer = start
        thinking = [place for piece, place in placed if piece.kind == "thinking"]
        others = [place[0] for piece, place in placed if piece.kind != "thinking"]
        if thinking:
            over = max(place[1] for place in thinking)
            answer = self._answer_start(text, over, min((p for p in others if p >= over), default=None))
        elif header is not None:
            closed = after_closer(text, start, first)  # an empty reasoning that the template writes by itself
            answer = closed if closed is not None else start
        end, ended = self._end(text, last[1], last_piece.kind == "call", limit)
        if last_piece.kind == "call" and not ended:
            raise Unusable(f"message {index + 1}: where the tool call ends cannot be told")
        return Turn(index, start, min(answer, end), end, ended)

    def _answer_start(self, text: str, over: int, following: int | None) -> int:
        """Where the answer begins after reasoning that ends at `over`."""
        if following is None:
            return over
        header = max((text.rfind(header, over, following) + len(header) for header in self._headers), default=-1)
        found = [header] if any(header in text[over:following] for header in self._headers) else []
        closed = after_closer(text, over, following)
        return max([*found, *([closed] if closed is not None else [])], default=following)

    def _end(self, text: str, place: int, call: bool, limit: int) -> tuple[int, bool]:
        """Where the turn whose last piece ends at `place` is over, and whether a token ends it."""
        position = place
        while self._control is not None and (found := self._control.search(text, position, limit)):
            between = text[place : found.start()]
            if call:
                if any(header in between for header in self._headers):
                    break
                if found.group() not in self._ends and not self._ends_call(between, found.group()):
                    position = found.end()
                    continue
            elif between.strip():
                break
            end = found.end()
            if found.group() not in self._ends:  # a closing token of the answer, before the one that ends the turn
                following = self._control.match(text, end, limit)
                if following and following.group() in self._ends:
                    end = following.end()
            return end, True
        return place, False

    @staticmethod
    def _ends_call(between: str, token: str) -> bool:
        """Whether a control token that is not known to end turns may end one with tool calls."""
        return between.rstrip().endswith(("}", "]", ">")) and not token.startswith(("</", "[/", "<｜tool", "<|tool"))

    # -- control tokens that content spells -----------------------------------------------------------------------

    def _escaped(self, conversation: Conversation) -> tuple[Conversation, bool]:
        """The conversation with control tokens in its content spelled by private-use characters, if it has any."""
        if self._control is None or not self._spells_control(conversation):
            return conversation, False
        count = 0

        def substitute(found: re.Match[str]) -> str:
            nonlocal count
            count += 1
            return f"{ESCAPE_OPEN}{self._numbers[found.group()]}{ESCAPE_CLOSE}"

        def keep_thinking(found: re.Match[str]) -> str:
            return found.group() if found.group() in self._exempt else substitute(found)

        def walk(value: Any, replace_with: Any = substitute) -> Any:
            if isinstance(value, str):
                if ESCAPE_OPEN in value or ESCAPE_CLOSE in value:
                    raise Unusable("it holds the private-use characters U+10FFFA or U+10FFFB")
                return self._control.sub(replace_with, value) if self._control else value
            if isinstance(value, list):
                return [walk(item) for item in value]
            if isinstance(value, dict):
                return {walk(key): walk(item) for key, item in value.items()}
            return value

        messages = [
            Message(
                message.role,
                walk(message.content, keep_thinking if message.role == "assistant" else substitute),
                walk(message.thinking),
                walk(message.tool_calls),
                walk(message.name),
                walk(message.tool_call_id),
                message.weight,
            )
            for message in conversation.messages
        ]
        tools = walk(conversation.tools)
        return (Conversation(messages, tools), True) if count else (conversation, False)

    def _spells_control(self, conversation: Conversation) -> bool:
        """Whether any string of the conversation may need escaping."""
        assert self._control is not None
        found = self._suspicious.search
        for message in conversation.messages:
            if found(message.content) or message.thinking or message.tool_calls or message.name:
                return True
        return conversation.tools is not None

    def without_end(self, text: str) -> str:
        """A text without the control tokens and white space at its end."""
        while self._control is not None:
            text = text.rstrip()
            last = next((token for token in self._known if text.endswith(token)), None)
            if last is None:
                break
            text = text[: -len(last)]
        return text

    def unescaped(self, text: str, alias: Any) -> tuple[str, list[tuple[int, int]]]:
        """The text with the template's control tokens under their aliases and the content's spelled as they were.

        Returns it with the places, in the old and in the new text, from which on they run in parallel.
        """
        assert self._control is not None
        both = re.compile(f"{ESCAPE_OPEN}(\\d+){ESCAPE_CLOSE}|{self._control.pattern}")
        parts, places = [], [(0, 0)]
        begin = size = 0
        for found in both.finditer(text):
            plain = text[begin : found.start()]
            new = self._known[int(found.group(1))] if found.group(1) else alias(found.group())
            parts += [plain, new]
            places.append((found.start(), size + len(plain)))
            size += len(plain) + len(new)
            begin = found.end()
            places.append((begin, size))
        parts.append(text[begin:])
        return "".join(parts), places


class _Marker:
    """Puts private-use characters around pieces of text and remembers what they are."""

    def __init__(self, base: int, only: set[int] | None = None) -> None:
        self.base = base
        self.only = only
        self.pieces: list[tuple[int, Kind, str]] = []

    def mark(self, text: str, message: int, kind: Kind, before: str = "") -> str:
        """`text` with its first and last visible character marked; white space outside can still be trimmed."""
        core = text.strip()
        if not core:
            return text
        number = len(self.pieces)
        begin = text.index(core)
        self.pieces.append((message, kind, before + text[:begin]))
        if not self.base or (self.only is not None and number not in self.only):
            return text
        opened, closed = chr(self.base + 2 * number), chr(self.base + 2 * number + 1)
        return f"{text[:begin]}{opened}{core}{closed}{text[begin + len(core) :]}"


def _unmarked(text: str, message: int, kind: Kind, before: str = "") -> str:
    return text


def _block_pattern(base: int) -> re.Pattern[str]:
    return _PATTERNS[base]


_PATTERNS = {base: re.compile(f"[{chr(base)}-{chr(base + BLOCK)}]") for base in BLOCKS}


def _leading(lead: str, text: str, first: int) -> int:
    """How much of what stands before the first piece in its own content (white space, `<think>`) the template kept."""
    kept = next((part for part in (lead, lead.lstrip()) if part and text[:first].endswith(part)), "")
    return len(kept)
