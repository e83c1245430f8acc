"""The program that runs llama.cpp in a process of its own, for `llamacpp.LlamaCpp`.

It is started as a script and needs nothing but the standard library and xllamacpp. One JSON object a line comes in on
standard input, one goes out on the standard output it was started with; what llama.cpp prints goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import urllib.request
from typing import Any

ERRORS = 1  # how much llama.cpp says
FORCED = 1000.0  # a bias that decides which token is drawn; the log-probabilities reported are those before it


class Reader:
    """A model loaded by llama.cpp, with the answers that a check needs."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = settings["model"]
        params.n_ctx = settings["context"]
        params.n_batch = params.n_ubatch = max(64, settings["context"])
        params.n_parallel = 1
        params.n_gpu_layers = 0
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.swa_full = True
        params.warmup = False
        params.use_jinja = True
        params.cpuparams.n_threads = settings["threads"]
        params.verbosity = ERRORS
        if settings.get("adapter"):
            adapter = xllamacpp.CommonAdapterLoraInfo(settings["adapter"], settings["scale"])
            params.lora_adapters = [adapter]
        self.server = xllamacpp.Server(params)
        self.forced = 0
        self.forced = self.tokenize("e", False)[-1]

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """One request to the server's own HTTP door (loopback only)."""
        url = str(self.server.listening_address).rstrip("/") + path
        data = json.dumps(body).encode()
        request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=300) as answer:
            return json.load(answer)

    def tokenize(self, text: str, special: bool) -> list[int]:
        body = {"content": text, "add_special": special, "parse_special": special}
        return list(self.post("/tokenize", body)["tokens"])

    def tokenize_all(self, texts: list[str], special: bool) -> list[list[int]]:
        return [self.tokenize(text, special) for text in texts]

    def detokenize(self, tokens: list[int]) -> str:
        return str(self.post("/detokenize", {"tokens": tokens})["content"])

    def render(self, conversation: dict[str, Any]) -> str:
        return str(self.post("/apply-template", conversation)["prompt"])

    def log_probs(self, tokens: list[int], top: int) -> list[list[list[float]]]:
        """For every prefix of `tokens`: [id, log-probability] of the `top` likeliest next tokens."""
        rows = []
        for end in range(1, len(tokens) + 1):
            body = {"prompt": tokens[:end], "n_predict": 1, "n_probs": top, "cache_prompt": True}
            answer = self.post("/completion", {**body, "logit_bias": [[self.forced, FORCED]]})
            entry = answer["completion_probabilities"][0]
            rows.append([[item["id"], item["logprob"]] for item in entry["top_logprobs"]])
        return rows

    def generate(self, tokens: list[int], count: int) -> list[int]:
        """`count` tokens drawn greedily after `tokens`."""
        body = {"prompt": tokens, "n_predict": count, "temperature": 0, "return_tokens": True, "ignore_eos": True}
        return list(self.post("/completion", body)["tokens"])


def main() -> None:
    """Answer requests, one JSON object a line, until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # llama.cpp prints to standard output too

    def reply(value: Any) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    try:
        reader = Reader(json.loads(sys.stdin.readline()))
    except Exception as error:
        reply({"error": f"refused the file ({error})"})
        return
    reply({"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            result: Any = getattr(reader, request["ask"])(*request["with"])
            reply({"result": result})
        except Exception as error:
            reply({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
