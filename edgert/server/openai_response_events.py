"""A Response as it grows, and the events that tell of it, in OpenAI's order."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from edgert.server.openai_work import new_id
from edgert.structured import Delta

Event = dict[str, Any]


class ResponseEvents:
    """`response` is what came so far. One item is open at a time: reasoning, message or function call."""

    def __init__(self, response: dict[str, Any]) -> None:
        self.response = response
        self._output: list[dict[str, Any]] = response["output"]
        self._number = 0
        self._is_open = False

    def begin(self) -> list[Event]:
        return [self._whole("response.created"), self._whole("response.in_progress")]

    def push(self, deltas: Sequence[Delta], logprobs: Sequence[Mapping[str, Any]]) -> list[Event]:
        events: list[Event] = []
        rest = list(logprobs)
        for delta in deltas:
            if delta.kind == "tool_call":
                events += [*self._close(), *self._call(delta)]
            elif delta.kind == "reasoning":
                events += [*self._ready("reasoning"), self._reasoning(delta.text)]
            else:
                events += [*self._ready("message"), self._text(delta.text, rest)]
                rest = []
        if rest and self._is_open and self._output[-1]["type"] == "message":
            events.append(self._text("", rest))
        return events

    def end(self, finish_reason: str | None, usage: Mapping[str, Any]) -> list[Event]:
        cut = finish_reason == "length"
        events = self._close("incomplete" if cut else "completed")
        self.response["usage"] = usage
        self.response["completed_at"] = None if cut else int(time.time())
        if cut:
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        self.response["status"] = "incomplete" if cut else "completed"
        return [*events, self._whole(f"response.{self.response['status']}")]

    def fail(self, code: str, message: str) -> list[Event]:
        events = self._close("incomplete")
        self.response["status"] = "failed"
        self.response["error"] = {"code": code, "message": message}
        return [*events, self._whole("response.failed")]

    # --- items --------------------------------------------------------------------------------------

    def _ready(self, kind: str) -> list[Event]:
        """Open an item of this kind unless the last one is."""
        if self._is_open and self._output[-1]["type"] == kind:
            return []
        events = self._close()
        if kind == "reasoning":
            part: dict[str, Any] = {"type": "reasoning_text", "text": ""}
            item: dict[str, Any] = {"id": new_id("rs_"), "type": "reasoning", "summary": [], "content": []}
        else:
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            item = {"id": new_id("msg_"), "type": "message", "role": "assistant", "content": []}
        item["status"] = "in_progress"
        self._output.append(item)
        self._is_open = True
        events.append(self._event("response.output_item.added", item={**item, "content": []}))
        item["content"].append(part)
        events.append(self._part("response.content_part.added", part=dict(part)))
        return events

    def _text(self, text: str, logprobs: Sequence[Mapping[str, Any]]) -> Event:
        part = self._output[-1]["content"][0]
        part["text"] += text
        part["logprobs"] += logprobs
        return self._part("response.output_text.delta", delta=text, logprobs=list(logprobs))

    def _reasoning(self, text: str) -> Event:
        self._output[-1]["content"][0]["text"] += text
        return self._part("response.reasoning_text.delta", delta=text)

    def _call(self, delta: Delta) -> list[Event]:
        item: dict[str, Any] = {
            "id": new_id("fc_"),
            "type": "function_call",
            "call_id": delta.id or new_id("call_"),
            "name": delta.name or "",
            "arguments": "",
            "status": "in_progress",
        }
        self._output.append(item)
        added = self._event("response.output_item.added", item=dict(item))
        item |= {"arguments": delta.text, "status": "completed"}
        about = {"item_id": item["id"]}
        return [
            added,
            self._event("response.function_call_arguments.delta", delta=delta.text, **about),
            self._event(
                "response.function_call_arguments.done", arguments=delta.text, name=item["name"], **about
            ),
            self._event("response.output_item.done", item=item),
        ]

    def _close(self, status: str = "completed") -> list[Event]:
        if not self._is_open:
            return []
        self._is_open = False
        item = self._output[-1]
        item["status"] = status
        (part,) = item["content"]
        if item["type"] == "reasoning":
            done = self._part("response.reasoning_text.done", text=part["text"])
        else:
            done = self._part("response.output_text.done", text=part["text"], logprobs=part["logprobs"])
        return [
            done,
            self._part("response.content_part.done", part=part),
            self._event("response.output_item.done", item=item),
        ]

    # --- events -------------------------------------------------------------------------------------

    def _part(self, kind: str, **fields: Any) -> Event:
        return self._event(kind, item_id=self._output[-1]["id"], content_index=0, **fields)

    def _event(self, kind: str, **fields: Any) -> Event:
        return self._numbered(kind, output_index=len(self._output) - 1, **fields)

    def _whole(self, kind: str) -> Event:
        return self._numbered(kind, response={**self.response, "output": list(self._output)})

    def _numbered(self, kind: str, **fields: Any) -> Event:
        event = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return event
