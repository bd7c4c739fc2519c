"""A cache, a configuration and a session's far end, as small as the state machines that are tested with them."""

import queue
from dataclasses import dataclass

import numpy as np

from trusted_worker.arithmetic import F32
from trusted_worker.metrics import Latencies
from trusted_worker.sampling import Sampler
from trusted_worker.secure_memory import Scratch, SecureMemory
from trusted_worker.session import Event, Session
from wire.model_config import ModelConfig
from wire.scratch import sampling_bytes
from wire.v1 import trusted_worker_pb2 as pb

VOCABULARY = 50
EOS = 49
CONFIG = ModelConfig.from_dict(
    "tiny",
    {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 1,
        "hidden_size": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 8,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "eos_token_id": EOS,
    },
    {},
)


@dataclass
class FakeCache:
    """Counts."""

    capacity: int
    length: int = 0
    freed: int = 0
    rests: int = 0
    wakes: int = 0
    failed: bool = False

    def commit(self, tokens: int) -> None:
        """See cache.Cache."""
        assert not self.freed
        self.length += tokens
        assert self.length <= self.capacity

    def rest(self) -> None:
        """See cache.Cache."""
        assert not self.freed
        self.rests += 1

    def wake(self, tokens: int) -> int:
        """See cache.Cache."""
        assert not self.freed
        self.wakes += 1
        return tokens

    def free(self) -> None:
        """See cache.Cache."""
        self.freed += 1


def scratch_of(vocabulary: int) -> Scratch:
    """What a sampler works in."""
    size = sampling_bytes(vocabulary)
    return Scratch(SecureMemory(size + (1 << 13)), size)


def logits_for(token: int) -> F32:
    """Logits whose greedy choice is `token`."""
    logits = np.zeros(VOCABULARY, np.float32)
    logits[token] = 9.0
    return logits


class Client:
    """A greedy session and the events that reached its far end."""

    def __init__(self, capacity: int = 32) -> None:
        self.cache = FakeCache(capacity)
        self.session = Session(CONFIG, self.cache, Sampler(pb.Sampling()), scratch_of(VOCABULARY), Latencies())
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.emit = self.events.put  # one object: detach compares by identity
        self.session.attach(self.emit)

    def next(self) -> Event:
        """The next event; fails when none comes."""
        return self.events.get(timeout=5)

    def token(self) -> int:
        """The next event, which must be a token."""
        event = self.next()
        assert isinstance(event, pb.DecodeResponse)
        assert event.HasField("token")
        return event.token.token_id

    def final(self) -> pb.Final:
        """The next event, which must be a FINAL."""
        event = self.next()
        assert isinstance(event, pb.DecodeResponse)
        assert event.HasField("final")
        return event.final

    def step(self, token: int) -> bool:
        """What the engine does with one session: all rows that can go, and `token` as the answer. False if none."""
        rows = self.session.rows
        if not rows:
            return False
        _, _, wants = self.session.take(rows)
        self.cache.commit(rows)
        if wants:
            self.session.accept(logits_for(token))
        return True
