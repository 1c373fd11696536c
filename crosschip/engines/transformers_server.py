"""transformers behind the two end points that a replay asks: `python transformers_server.py MODEL PORT [DTYPE]`.

For comparison only, in any environment with torch and transformers; nothing of crosschip is needed. It scores prompts
of token ids with one forward pass and generates nothing but the greedy next token.
"""

from __future__ import annotations

import json
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import torch
from transformers import AutoModelForCausalLM

__all__ = ["main"]


def main(directory: str, port: int, dtype: str = "auto") -> None:
    """Load the directory and answer until the process is ended; `dtype` auto is the checkpoint's."""
    # Attention written out: torch's fused one sums in another order.
    model: Any = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation="eager", trust_remote_code=False
    )
    model.eval()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

        def do_GET(self) -> None:
            """List the model."""
            card = {"id": "dry", "owned_by": "transformers", "max_model_len": model.config.max_position_embeddings}
            known = self.path == "/v1/models"
            self._send(200 if known else 404, {"data": [card]} if known else {"error": {"message": "no such page"}})

        def do_POST(self) -> None:
            """Score a prompt."""
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            ids = body.get("prompt")
            if self.path != "/v1/completions" or not (isinstance(ids, list) and body.get("echo")):
                self._send(400, {"error": {"message": "only echoed prompts of token ids are answered here"}})
                return
            self._send(200, {"choices": [_score(model, ids, max(1, int(body.get("logprobs") or 1)))]})

        def _send(self, status: int, document: dict[str, Any]) -> None:
            data = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    HTTPServer(("127.0.0.1", port), Handler).serve_forever()


@torch.inference_mode()
def _score(model: Any, ids: list[int], num_top: int) -> dict[str, Any]:
    logits_TV = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    following = [*ids[1:], int(logits_TV[-1].argmax())]
    own = logits_TV.gather(-1, torch.tensor(following)[:, None])[:, 0].tolist()
    best = logits_TV.topk(min(num_top, logits_TV.shape[-1]), dim=-1)
    tops = [
        {f"token_id:{number}": value for number, value in zip(numbers, values, strict=True)}
        for numbers, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
    names = [f"token_id:{number}" for number in (ids[0], *following)]
    values = [None, *own]
    logprobs = {"tokens": names, "token_logprobs": values, "top_logprobs": [None, *tops]}
    logprobs["text_offset"] = [0] * len(names)
    return {"index": 0, "text": "", "logprobs": logprobs, "finish_reason": "length"}


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:4])
