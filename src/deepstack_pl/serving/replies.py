"""What is sent back, in the words of OpenAI's API."""

import time
from typing import Any
from uuid import uuid4

from deepstack_pl.serving.session import Answer

_FINISH = {"stop": "stop", "length": "length", "cancelled": "stop"}


class Refusal(Exception):
    """A request that is not answered: status, sentence, and the field that is at fault, if it is one."""

    def __init__(self, status: int, sentence: str, *, field: str | None = None, code: str | None = None) -> None:
        super().__init__(sentence)
        self.status, self.code = status, code
        # Both quote what was sent, where half a character may stand, which no answer can hold.
        self.sentence, self.field = _whole(sentence), None if field is None else _whole(field)

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.sentence, "type": kind, "param": self.field, "code": self.code}}

    def headers(self) -> dict[str, str]:
        return {"Retry-After": "1"} if self.status == 503 else {}


def _whole(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()


class Completion:
    """One answer's objects: they share id, time, model and the plan's digest."""

    def __init__(self, model: str, digest: str) -> None:
        self._about = {
            "id": f"chatcmpl-{uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": digest,
        }

    def whole(self, answer: Answer) -> dict[str, Any]:
        """A ``chat.completion``."""
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _FINISH[answer.finish]}
        return {**self._about, "object": "chat.completion", "choices": [choice], "usage": usage(answer)}

    def chunk(self, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        """A ``chat.completion.chunk`` of a stream."""
        reason = None if finish is None else _FINISH[finish]
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return {**self._about, "object": "chat.completion.chunk", "choices": [choice]}

    def counts(self, answer: Answer) -> dict[str, Any]:
        """The chunk that ``stream_options.include_usage`` asks for: the last, without a choice."""
        return {**self._about, "object": "chat.completion.chunk", "choices": [], "usage": usage(answer)}


def usage(answer: Answer) -> dict[str, int]:
    """Positions of the conversation, pictures included, and tokens of the answer, its end included."""
    total = answer.prompt_tokens + answer.tokens
    return {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.tokens, "total_tokens": total}
