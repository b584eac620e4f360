"""The sampling loop: many candidates of many prompts, each with its own temperature and seed.

At every step: repetition penalty, then the hook (contrastive decoding, banned words), then each row's temperature,
top-k, top-p, and one draw from the row's own random stream. A candidate's draws depend on its seed and its own step
number alone, so its neighbours, and when they finish, change nothing. Finished rows leave the batch, and where the
decoder allows it, waiting prompts take their place at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Protocol

import torch

from models.lm.choose import choose, penalise
from models.lm.decoder import Decoder, Sides
from models.protocols import Sampling
from schemas.errors import ModelError
from schemas.fingerprint import derive_seed

# Uniform draws are taken from a row's generator in blocks of this many, whatever is needed: the n-th draw of a seed
# is then always the same number.
DRAWS = 64


@dataclass(frozen=True)
class Row:
    """What one candidate is.

    Attributes:
        job: Index of the job it belongs to.
        temperature: 0 is greedy.
        index: Its number within its temperature.
        seed: Seed of its random stream.
    """

    job: int
    temperature: float
    index: int
    seed: int


@dataclass(frozen=True)
class Job:
    """One prompt and the rows that continue it.

    Attributes:
        prompt: Token ids, at least one.
        rows: Its candidates, in order.
        stopped: Told a row's tokens after each one drawn, says whether a stop string is complete.
    """

    prompt: Sequence[int]
    rows: tuple[Row, ...]
    stopped: Callable[[list[int]], bool] | None = None


@dataclass
class Drawn:
    """What was drawn for a row.

    Attributes:
        tokens: Token ids, the end-of-turn token included where one was drawn.
        logprob: Sum of the tokens' log-probabilities (nats) under the base side, before penalty, hook and temperature.
        finish: `stop` (a stop string), `eos` (the model ended its turn) or `length`.
    """

    tokens: list[int] = field(default_factory=list)
    logprob: float = 0.0
    finish: str = "length"


@dataclass(frozen=True)
class Step:
    """What a hook is told of the rows it processes.

    Attributes:
        rows: The candidate of each row of the scores.
        numbers: How many tokens each has drawn before this one.
        drawn: What each has drawn; it grows, so that who keeps it sees the whole candidate in the end.
    """

    rows: tuple[Row, ...]
    numbers: tuple[int, ...]
    drawn: tuple[Drawn, ...] = ()


class Hook(Protocol):
    """Edits the scores of a step."""

    def __call__(self, scores: torch.Tensor, sides: Sides, step: Step) -> torch.Tensor:
        """Edit scores; may work in place.

        Args:
            scores: float32 of shape (rows, vocabulary): the base side's logits after the repetition penalty.
            sides: Every side's raw logits (the base side first), same shape, in the model's dtype; read only.
            step: Which candidate each row is, and how far it has come.

        Returns:
            The scores to sample from, same shape; minus infinity bans a token. A row must not depend on others.
        """
        ...


def job_rows(job: int, seed: int, sampling: Sampling) -> tuple[Row, ...]:
    """The candidates of a request, in (temperature, index) order.

    Args:
        job: The request's number.
        seed: The request's seed; candidate i of temperature t has `derive_seed(seed, str(t), i)`.
        sampling: Temperatures and candidates for each.
    """
    return tuple(
        Row(job, float(t), i, derive_seed(seed, str(float(t)), i))
        for t in sampling.temperatures
        for i in range(sampling.per_temperature)
    )


def sample(
    decoder: Decoder,
    jobs: Sequence[Job],
    sampling: Sampling,
    *,
    eos: frozenset[int],
    batch_rows: int = 1,
    batch_tokens: int | None = None,
    hook: Hook | None = None,
) -> Iterator[tuple[int, list[Drawn]]]:
    """Draw the tokens of every job's rows.

    Args:
        decoder: Runs the model; reads each prompt once, then is stepped.
        jobs: Any number, begun in this order.
        sampling: Top-k, top-p, repetition penalty and the longest continuation.
        eos: Tokens that end a turn.
        batch_rows: Most rows in the batch; a job with more is decoded alone.
        batch_tokens: Most tokens of prompts in the batch, whose keys and values lie in memory; a longer one is decoded
            alone. None = no bound.
        hook: Edits the scores of every step.

    Yields:
        A job's index and what was drawn for its rows, as soon as all of them are finished.

    Raises:
        ModelError: The model gave scores that are not numbers.
    """
    waiting = deque(range(len(jobs)))
    batch = _Batch(jobs, sampling, eos, hook)
    tokens = torch.empty(0, dtype=torch.long)
    while waiting or batch.rows:
        with torch.inference_mode():
            if batch.rows:
                batch.sides = decoder.step(tokens)
            if waiting and (decoder.joins or not batch.rows):
                held = sum(len(jobs[job].prompt) for job in batch.results)
                room = None if batch_tokens is None else batch_tokens - held
                batch.add(decoder, _next_jobs(jobs, waiting, len(batch.rows), batch_rows, room))
            tokens = batch.draw()
            finished = [(job, batch.results.pop(job)) for job in batch.finished_jobs()]
            tokens = batch.compact(decoder, tokens)
        # Outside of inference mode, which would otherwise hold in the caller's code too.
        yield from finished


class _Batch:
    """The rows being decoded, and everything kept for each of them."""

    def __init__(
        self, jobs: Sequence[Job], sampling: Sampling, eos: frozenset[int], hook: Hook | None
    ) -> None:
        self.jobs, self.sampling, self.eos, self.hook = jobs, sampling, eos, hook
        self.rows: list[Row] = []
        self.live: list[bool] = []  # a finished row may linger until letting it go is worth its cost
        self.numbers: list[int] = []  # tokens drawn so far
        self.drawn: list[Drawn] = []
        self.generators: list[torch.Generator] = []
        self.results: dict[int, list[Drawn]] = {}
        self.sides: Sides = ()
        # Where the repetition penalty is on: every row's prompt and tokens, (rows, longest of all).
        longest = max((len(job.prompt) for job in jobs), default=0)
        self.width = longest + sampling.max_new_tokens if sampling.repetition_penalty != 1.0 else 0
        self.history = torch.empty(0, self.width, dtype=torch.long)
        self.draws = torch.empty(0, DRAWS, dtype=torch.float64)
        self.temperatures = torch.empty(0)

    def add(self, decoder: Decoder, added: list[int]) -> None:
        """Read some jobs' prompts and append their rows."""
        if not added:
            return
        copies = len(self.jobs[added[0]].rows)
        sides = decoder.start([self.jobs[job].prompt for job in added], copies, self.sampling.max_new_tokens)
        sides = tuple(side.repeat_interleave(copies, dim=0) for side in sides)
        device = sides[0].device
        both = zip(self.sides, sides, strict=True) if self.rows else ()
        self.sides = tuple(torch.cat(pair) for pair in both) if self.rows else sides
        rows = [row for job in added for row in self.jobs[job].rows]
        drawn = [Drawn() for _ in rows]
        self.results |= {job: drawn[n * copies : (n + 1) * copies] for n, job in enumerate(added)}
        self.rows += rows
        self.drawn += drawn
        self.live += [True] * len(rows)
        self.numbers += [0] * len(rows)
        self.generators += [torch.Generator().manual_seed(row.seed) for row in rows]
        self.draws = torch.cat(
            [self.draws.to(device), torch.empty(len(rows), DRAWS, dtype=torch.float64, device=device)]
        )
        temperatures = torch.tensor([row.temperature for row in rows], device=device)
        self.temperatures = torch.cat([self.temperatures.to(device), temperatures])
        if self.width:
            history = torch.empty(len(rows), self.width, dtype=torch.long)
            for number, row in enumerate(rows):
                prompt = torch.tensor(self.jobs[row.job].prompt)
                history[number] = prompt[0]  # gaps hold a token the row has anyway
                history[number, : len(prompt)] = prompt
            self.history = torch.cat([self.history.to(device), history.to(device)])

    def draw(self) -> torch.Tensor:
        """Draw each row's next token, note it, and see which rows are finished by it; returns the tokens."""
        raw = self.sides[0].float()
        total = torch.logsumexp(raw, dim=-1)
        if not bool(torch.isfinite(total).all()):  # overflow in the weights, or the wrong dtype
            raise ModelError("the model's scores are not numbers (NaN or infinite); try dtype=float32")
        scores = raw
        lengths = [len(self.jobs[row.job].prompt) + n for row, n in zip(self.rows, self.numbers, strict=True)]
        if self.width:
            scores = penalise(raw, self.history[:, : max(lengths)], self.sampling.repetition_penalty)
        if self.hook is not None:
            scores = scores.clone() if scores is raw else scores
            step = Step(tuple(self.rows), tuple(self.numbers), tuple(self.drawn))
            scores = self.hook(scores, self.sides, step)
            if not bool(torch.isfinite(scores.amax(dim=-1)).all()):
                raise ModelError(
                    "the decoding hook left a row without a token, or made scores that are not numbers"
                )
        known = total if scores is raw else None
        tokens = choose(
            scores, self.temperatures, self._uniform(), self.sampling.top_k, self.sampling.top_p, known
        )
        logprobs = raw.gather(1, tokens[:, None])[:, 0] - total
        if self.width:
            self.history.scatter_(1, torch.tensor(lengths, device=tokens.device)[:, None], tokens[:, None])
        for place, (token, logprob) in enumerate(zip(tokens.tolist(), logprobs.tolist(), strict=True)):
            if self.live[place]:
                self._note(place, token, logprob)
        return tokens

    def finished_jobs(self) -> list[int]:
        """Jobs still in `results` of which no row is live, in order."""
        live = {row.job for row, is_live in zip(self.rows, self.live, strict=True) if is_live}
        return [job for job in self.results if job not in live]

    def compact(self, decoder: Decoder, tokens: torch.Tensor) -> torch.Tensor:
        """Let finished rows go where it is worth it; returns the tokens of those that stay."""
        count = sum(self.live)
        if count == len(self.rows) or (count and count > decoder.compact_below * len(self.rows)):
            return tokens
        kept = []
        start = 0
        for _, rows in groupby(row.job for row in self.rows):  # a job's rows lie together, and stay so
            end = start + len(list(rows))
            kept += [
                start + place for place in _fill_gaps([n for n, x in enumerate(self.live[start:end]) if x])
            ]
            start = end
        decoder.keep(kept)
        index = torch.tensor(kept, dtype=torch.long, device=tokens.device)
        self.history = self.history[index] if self.width else self.history
        self.draws, self.temperatures = self.draws[index], self.temperatures[index]
        self.sides = ()
        self.rows, self.drawn = [self.rows[n] for n in kept], [self.drawn[n] for n in kept]
        self.numbers, self.generators = [self.numbers[n] for n in kept], [self.generators[n] for n in kept]
        self.live = [True] * len(kept)
        return tokens[index]

    def _uniform(self) -> torch.Tensor:
        """Each row's next uniform draw, float64."""
        for place, number in enumerate(self.numbers):
            if number % DRAWS == 0:
                self.draws[place] = torch.rand(DRAWS, generator=self.generators[place], dtype=torch.float64)
        columns = torch.tensor([number % DRAWS for number in self.numbers], device=self.draws.device)
        return self.draws.gather(1, columns[:, None])[:, 0]

    def _note(self, place: int, token: int, logprob: float) -> None:
        drawn, stopped = self.drawn[place], self.jobs[self.rows[place].job].stopped
        drawn.tokens.append(token)
        drawn.logprob += logprob
        self.numbers[place] += 1
        if token in self.eos:
            drawn.finish = "eos"
        elif stopped is not None and stopped(drawn.tokens):
            drawn.finish = "stop"
        elif self.numbers[place] < self.sampling.max_new_tokens:
            return
        self.live[place] = False


def _next_jobs(
    jobs: Sequence[Job], waiting: deque[int], rows: int, batch_rows: int, room: int | None
) -> list[int]:
    """Take the jobs that fit into the batch now (at least one where it is empty)."""
    taken: list[int] = []
    while waiting:
        job = jobs[waiting[0]]
        if rows and rows + len(job.rows) > batch_rows:
            break
        if rows and room is not None and len(job.prompt) > room:
            break
        taken.append(waiting.popleft())
        rows += len(job.rows)
        room = None if room is None else room - len(job.prompt)
    return taken


def _fill_gaps(wanted: list[int]) -> list[int]:
    """Order rows so that few move: those that can keep their place do, and the last ones fill the gaps."""
    count = len(wanted)
    late = [row for row in wanted if row >= count]
    kept = set(wanted)
    return [row if row in kept else late.pop() for row in range(count)]
