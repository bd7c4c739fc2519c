"""One prompt, one answer: streamed as text, or reported as one JSON object in the last line of stdout."""

import json
from collections.abc import Sequence

from client import report
from client.answer import Answer
from client.session import Request, TrustedWorker
from client.terminal import harmless, note
from client.tokenizer import Tokenizer
from client.turn import Pacing


def answer_once(
    worker: TrustedWorker,
    request: Request,
    token_ids: list[int],
    tokenizer: Tokenizer | None,
    pacing: Pacing,
    *,
    stops: Sequence[str],
    as_json: bool,
) -> None:
    """Answer and print. Without a tokenizer the answer is its token ids."""
    session = worker.open(request)
    try:
        answer = Answer(worker, session, tokenizer.detokenizer() if tokenizer else None, stops)
        for piece in answer.stream(token_ids, pacing):
            if not as_json:
                print(harmless(piece), end="", flush=True)
    finally:
        session.close()
    if as_json:
        print(json.dumps(report.result(answer, request, worker.peer)), flush=True)
        return
    print("" if tokenizer else " ".join(str(token.token_id) for token in answer.tokens), flush=True)
    note(report.status_line(answer, request, worker.peer))
