"""Which characters of a rendered conversation the assistant says.

A template may trim content, drop it from history, repeat or reorder it, so its output is not searched for the content.
The conversation is rendered twice: as it is, and with private-use characters around each piece of assistant text. When
the second text without these characters equals the first, they say exactly where every piece went; when it does not,
the template looks into the content, and the pieces are marked one at a time or the conversation is given up.

What the assistant says in a turn begins where the generation prompt ends (what a chat program writes before the model
goes on) and ends with the token that ends the turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from mlxlora.data.control import ControlTokens, Reserved
from mlxlora.data.marker import BLOCK, BLOCKS, PATTERNS, Marker, Piece
from mlxlora.data.records import Conversation
from mlxlora.data.rendering import ChatRenderer
from mlxlora.data.template import ChatTemplate, TemplateRefusal
from mlxlora.data.thinking import after_closer

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


class TurnFinder:
    """Renders conversations with one template and finds the assistant's turns."""

    def __init__(self, template: ChatTemplate, control_tokens: Sequence[str], eos_token: str | None) -> None:
        """control_tokens: every special token of the vocabulary; eos_token: the one that ends a text."""
        self.control = ControlTokens(control_tokens)
        self.renderer = ChatRenderer(template, self.control)
        self._headers = self.renderer.traits.headers
        self._ends = {token for token in (*ENDS, eos_token) if token}

    # -- rendering ----------------------------------------------------------------------------------------------------

    def find(self, conversation: Conversation) -> Rendered:
        """Render a conversation and find the assistant's turns. Raises Unusable."""
        try:
            conversation, escaped = self.control.escaped(conversation)
        except Reserved as error:
            raise Unusable(str(error)) from None
        try:
            text = self.renderer.text(conversation)
        except TemplateRefusal as error:
            raise Unusable(f"the chat template refuses it: {error}") from None
        pieces = self._pieces(conversation)
        if any(piece.kind != "other" for piece in pieces):
            self._locate(conversation, text, pieces)
        dropped = sum(piece.kind == "thinking" and not piece.places for piece in pieces)
        turns = list(self._turns(conversation, text, pieces))
        return Rendered(text, turns, dropped, escaped)

    def _pieces(self, conversation: Conversation) -> list[Piece]:
        """The assistant's pieces in the order in which the renderer marks them."""
        collector = Marker(0)
        self.renderer.messages(conversation, collector.mark)
        return [Piece(message, kind, lead) for message, kind, lead in collector.pieces]

    def _locate(self, conversation: Conversation, text: str, pieces: list[Piece]) -> None:
        """Find where each piece went in `text`. Raises Unusable."""
        base = next((block for block in BLOCKS if not PATTERNS[block].search(text)), None)
        if base is None or 2 * len(pieces) > BLOCK:
            raise Unusable("it uses all of Unicode's supplementary private-use characters")
        if self._try_markers(conversation, text, pieces, Marker(base)):
            return
        own = {number for number, piece in enumerate(pieces) if piece.kind != "other"}
        if self._try_markers(conversation, text, pieces, Marker(base, own)):
            return
        for number in sorted(own):
            if not self._try_markers(conversation, text, pieces, Marker(base, {number})):
                raise Unusable("the answer cannot be located: the template changes it depending on what it says")

    def _try_markers(self, conversation: Conversation, text: str, pieces: list[Piece], marker: Marker) -> bool:
        try:
            marked = self.renderer.text(conversation, mark=marker.mark)
        except TemplateRefusal:
            return False
        pattern = PATTERNS[marker.base]
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

    def _turns(self, conversation: Conversation, text: str, pieces: list[Piece]) -> Iterator[Turn]:
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
            turn = self._turn(conversation, index, placed, text, min(following, default=len(text)))
            last_end = max(last_end, turn.end)
            yield turn

    def _choose(self, piece: Piece, text: str, index: int, last_end: int) -> tuple[int, int]:
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

    def _turn(
        self,
        conversation: Conversation,
        index: int,
        placed: list[tuple[Piece, tuple[int, int]]],
        text: str,
        limit: int,
    ) -> Turn:
        """The turn around its pieces; it ends before `limit`, where the next message's content begins."""
        first_piece, (first, _) = min(placed, key=lambda item: item[1][0])
        last_piece, last = max(placed, key=lambda item: item[1][1])
        header = self._header(text, first)
        start = first
        if header is not None:
            start = header
        elif first_piece.lead.strip() or not self._trims(conversation, index, text):
            start -= _leading(first_piece.lead, text, first)
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

    def _trims(self, conversation: Conversation, index: int, text: str) -> bool:
        """Whether the white space before a message's content leaves no trace: what stands there is the template's."""
        messages = list(conversation.messages)
        messages[index] = replace(messages[index], content=messages[index].content.lstrip())
        if messages[index].content == conversation.messages[index].content:
            return True
        try:
            return self.renderer.text(replace(conversation, messages=messages)) == text
        except TemplateRefusal:
            return False

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
        pattern = self.control.pattern
        while pattern is not None and (found := pattern.search(text, position, limit)):
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
                following = pattern.match(text, end, limit)
                if following and following.group() in self._ends:
                    end = following.end()
            return end, True
        return place, False

    @staticmethod
    def _ends_call(between: str, token: str) -> bool:
        """Whether a control token that is not known to end turns may end one with tool calls."""
        return between.rstrip().endswith(("}", "]", ">")) and not token.startswith(("</", "[/", "<｜tool", "<|tool"))


def _leading(lead: str, text: str, first: int) -> int:
    """How much of what stands before the first piece in its own content (white space, `<think>`) the template kept."""
    kept = next((part for part in (lead, lead.lstrip()) if part and text[:first].endswith(part)), "")
    return len(kept)
