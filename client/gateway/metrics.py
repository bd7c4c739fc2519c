"""What an operator may watch of a gateway. Nothing about one prompt; see wire/metrics.py for what that means.

`gen_ai_server_*` are OpenTelemetry's names, `*_tokens_total` and `num_requests_*` vLLM's with our prefix; the times
here include the way between gateway and trusted worker, which has metrics of its own.
"""

import time

from client.gateway.generation import End, Generations
from client.gateway.link import Link
from wire.metrics import Histogram, Metric, render, resident_bytes


class Metrics:
    """Written by the event loop."""

    def __init__(self) -> None:
        self.first_token, self.next_token, self.duration = Histogram(), Histogram(), Histogram()
        self.requests = self.errors = self.cancelled = 0
        self.prompt_tokens = self.generated_tokens = 0

    def ended(self, end: End, started: float) -> None:
        """An answer is complete; its request came at `started`, by the monotonic clock."""
        self.duration.observe(time.monotonic() - started)
        self.prompt_tokens += end.prompt_tokens
        self.generated_tokens += end.completion_tokens
        if end.completion_tokens:
            self.first_token.observe(end.time_to_first_token)
        if end.completion_tokens > 1:
            self.next_token.observe((end.seconds - end.time_to_first_token) / (end.completion_tokens - 1))

    def text(self, link: Link, generations: Generations, scheme: str) -> str:
        """The page that Prometheus reads."""
        return render([*self._answers(generations), *_link(link)], f'scheme="{scheme}"')

    def _answers(self, generations: Generations) -> list[Metric]:
        return [
            ("gen_ai_server_request_duration_seconds", "From a request to the end of its answer.", self.duration),
            ("gen_ai_server_time_to_first_token_seconds", "From a prompt to its first token.", self.first_token),
            ("gen_ai_server_time_per_output_token_seconds", "Mean of an answer's later tokens.", self.next_token),
            ("cleave_gateway_requests_total", "Requests for an answer.", self.requests),
            ("cleave_gateway_errors_total", "Of these, failed or refused.", self.errors),
            ("cleave_gateway_cancelled_total", "Of these, left by their clients.", self.cancelled),
            ("cleave_gateway_num_requests_running", "Answers under way.", generations.running),
            ("cleave_gateway_prompt_tokens_total", "Tokens of prompts.", self.prompt_tokens),
            ("cleave_gateway_generation_tokens_total", "Tokens of answers.", self.generated_tokens),
        ]


def _link(link: Link) -> list[Metric]:
    age, evidence = link.age(), list[Metric]()
    if age is not None:
        evidence = [("cleave_gateway_evidence_age_seconds", "Of the evidence accepted last.", round(age, 3))]
    return [
        ("cleave_gateway_ready", "1: the trusted worker is verified.", int(link.ready)),
        ("cleave_gateway_verifications_total", "Times that evidence was asked for.", link.attempts),
        ("cleave_gateway_verification_failures_total", "Of these, refused or without answer.", link.failures),
        *evidence,
        ("process_resident_memory_bytes", "Resident memory of the gateway.", resident_bytes()),
    ]
