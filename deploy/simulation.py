"""How many tokens 1 to 64 replicas compute under LMQL's traffic, by the way that calls are routed.

A simulation of events, without a model. What a replica holds is counted as the engine does it: a call reuses the
longest beginning that it shares with any text held, all but its last token; finished texts stay until there is no
room, and the least recently used go first.
"""

import heapq
import itertools
import random
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from deploy.routing import PrefixRouter

Text = tuple[tuple[int, int], ...]
"""A text as segments: a name and a number of tokens. Equal names mean equal tokens."""
OPTION = (1, 4)
"""Tokens of an option of a distribution."""


@dataclass(frozen=True)
class Traffic:
    """LMQL's programs: each call sends the whole text so far, and each program begins with its few-shot examples.

    Lengths are in tokens; a pair is the least and the most of a uniform draw.
    """

    programs: int = 50
    head: tuple[int, int] = (300, 1500)
    question: tuple[int, int] = (20, 200)
    answer: tuple[int, int] = (5, 100)
    variables: tuple[int, int] = (1, 4)
    options: tuple[int, int] = (2, 5)
    """Options of the distribution at the end, each a call."""


@dataclass(frozen=True)
class Speed:
    """What a replica's work takes, in seconds; the defaults are of a 7B model on a card of 1 TB/s."""

    prefill_token: float = 1 / 8000
    step: float = 0.015
    row: float = 0.0003


@dataclass(frozen=True)
class Call:
    """One request: the text that it sends, and the tokens that it generates, as the segment that follows."""

    text: Text
    answer: Text = ()

    @property
    def sent(self) -> int:
        """Tokens of the text."""
        return length(self.text)


class Replica:
    """What one replica holds and has computed."""

    def __init__(self, memory: int) -> None:
        self.computed = 0
        self._memory = memory
        self._texts: OrderedDict[Text, int] = OrderedDict()
        self._prefixes: Counter[Text] = Counter()
        self._held = 0

    def take(self, call: Call) -> int:
        """Compute the call and keep its text; how many tokens of its prompt were computed."""
        reused = next((length(prefix) for prefix in _prefixes(call.text) if prefix in self._prefixes), 0)
        prompt = call.sent - min(reused, call.sent - 1)
        self.computed += prompt + length(call.answer)
        self._keep(call.text + call.answer)
        return prompt

    def _keep(self, text: Text) -> None:
        # A text that continues a held one takes its place.
        for held in [prefix for prefix in _prefixes(text) if prefix in self._texts]:
            self._drop(held)
        self._texts[text] = length(text)
        self._held += length(text)
        self._prefixes.update(_prefixes(text))
        while self._held > self._memory and len(self._texts) > 1:
            self._drop(next(iter(self._texts)))

    def _drop(self, text: Text) -> None:
        self._held -= self._texts.pop(text)
        for prefix in _prefixes(text):
            self._prefixes[prefix] -= 1
            if not self._prefixes[prefix]:
                del self._prefixes[prefix]


@dataclass(frozen=True)
class Outcome:
    """What a run took."""

    sent: int
    """Tokens of all prompts."""
    computed: int
    """Tokens that the replicas computed, generated ones included."""
    busiest: float
    """Tokens that the busiest replica computed, in multiples of the mean."""
    seconds: float
    """Mean time of a query."""


Policy = Callable[[Call, Mapping[str, int]], str]
"""The replica for a call, given how many calls run on each."""


def at_random(seed: int) -> Policy:
    """Any replica."""
    draw = random.Random(seed)
    return lambda call, loads: draw.choice(list(loads))


def round_robin(seed: int) -> Policy:
    """One replica after the other."""
    turns = itertools.count()
    return lambda call, loads: list(loads)[next(turns) % len(loads)]


def by_prefix(seed: int) -> Policy:
    """The replica that holds the longest prefix, by the router that a deployment uses."""
    router = PrefixRouter()
    return lambda call, loads: router.choose(tokens(call.text), loads)


POLICIES: dict[str, Callable[[int], Policy]] = {"random": at_random, "round robin": round_robin, "prefix": by_prefix}
"""By name; each is made from a seed."""


def length(text: Text) -> int:
    """Tokens of a text."""
    return sum(count for _, count in text)


def tokens(text: Text) -> list[int]:
    """A text's tokens: numbers that are equal where the texts are."""
    return [(name << 16) + position for name, count in text for position in range(count)]


def queries(traffic: Traffic, seed: int, client: int) -> Iterator[list[list[Call]]]:
    """One client's queries, without end. A query is a list of turns; the calls of a turn run at once."""
    heads = random.Random(seed)
    programs = [(program, heads.randint(*traffic.head)) for program in range(traffic.programs)]
    popularity = [1 / rank for rank in range(1, traffic.programs + 1)]
    draw = random.Random(f"{seed} {client}")
    names = itertools.count((client + 1) << 24)

    def segment(lengths: tuple[int, int]) -> Text:
        return ((next(names), draw.randint(*lengths)),)

    while True:
        text: Text = (draw.choices(programs, popularity)[0],)
        text += segment(traffic.question)
        turns = []
        for _ in range(draw.randint(*traffic.variables)):
            answer = segment(traffic.answer)
            turns.append([Call(text, answer)])
            text += answer
        turns.append([Call(text + segment(OPTION)) for _ in range(draw.randint(*traffic.options))])
        yield turns


def simulate(
    policy: Policy,
    replicas: int,
    *,
    traffic: Traffic,
    clients: int,
    count: int,
    memory: int,
    speed: Speed,
    seed: int,
) -> Outcome:
    """Run ``count`` queries by ``clients`` clients, each of which waits for its answer before it goes on.

    Args:
        policy: Chooses the replica of a call.
        replicas: How many there are.
        traffic: What is asked.
        clients: How many ask at once.
        count: Queries of all clients together.
        memory: Tokens that each replica holds.
        speed: What the work takes.
        seed: Of the traffic; the same for every policy to compare.
    """
    held = {str(index): Replica(memory) for index in range(replicas)}
    loads = dict.fromkeys(held, 0)
    asked = [queries(traffic, seed, client) for client in range(clients)]
    turns: list[list[list[Call]]] = [[] for _ in range(clients)]
    waiting = [0] * clients
    begun = [0.0] * clients
    left, sent, total = count, 0, 0.0
    order = itertools.count()
    # When a call ends, or a client begins (no replica).
    events: list[tuple[float, int, int, str | None]] = [(0.0, next(order), client, None) for client in range(clients)]
    while events:
        now, _, client, replica = heapq.heappop(events)
        if replica is not None:
            loads[replica] -= 1
            waiting[client] -= 1
        if waiting[client]:
            continue
        if not turns[client]:
            if replica is not None:
                total += now - begun[client]
            if not left:
                continue
            left -= 1
            turns[client] = next(asked[client])
            begun[client] = now
        for call in turns[client].pop(0):
            chosen = policy(call, loads)
            loads[chosen] += 1
            waiting[client] += 1
            sent += call.sent
            prompt = held[chosen].take(call)
            steps = max(length(call.answer), 1)
            took = prompt * speed.prefill_token + steps * (speed.step + loads[chosen] * speed.row)
            heapq.heappush(events, (now + took, next(order), client, chosen))
    computed = [replica.computed for replica in held.values()]
    return Outcome(sent, sum(computed), max(computed) * replicas / sum(computed), total / count)


def _prefixes(text: Text) -> Iterator[Text]:
    """From the longest, the text itself, to the shortest."""
    return (text[:count] for count in range(len(text), 0, -1))
