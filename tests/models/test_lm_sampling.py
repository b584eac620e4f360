"""The sampling loop and its pieces, on made-up logits: no weights."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process

from models.lm.decoder import Lockstep, fixed_places
from models.lm.limits import check_sampling
from models.lm.sampling import DRAWS, Job, choose, job_rows, penalise, sample
from models.protocols import Sampling
from schemas.errors import ModelError
from schemas.fingerprint import derive_seed

VOCABULARY = 50
EOS = 0


class Scripted:
    """A decoder without a model: a row's logits are a function of the tokens it has seen."""

    def __init__(
        self, joins: bool = True, compact_below: float = 1.0, salt: int = 0, nan: bool = False
    ) -> None:
        self.joins, self.compact_below, self.salt, self.nan = joins, compact_below, salt, nan
        self.seen: list[tuple[int, ...]] = []
        self.reads: list[tuple[int, ...]] = []
        self.widths: list[int] = []

    def logits(self, tokens) -> torch.Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self.salt, *map(int, tokens)))
        logits = torch.randn(VOCABULARY, generator=generator) * 2
        return logits / 0 if self.nan else logits

    def start(self, prompts, copies, longest):
        assert self.joins or not self.seen
        self.reads += [tuple(prompt) for prompt in prompts]
        self.seen += [tuple(prompt) for prompt in prompts for _ in range(copies)]
        return (torch.stack([self.logits(prompt) for prompt in prompts]),)

    def step(self, tokens):
        assert len(tokens) == len(self.seen)
        self.widths.append(len(tokens))
        self.seen = [(*seen, int(token)) for seen, token in zip(self.seen, tokens, strict=True)]
        return (torch.stack([self.logits(seen) for seen in self.seen]),)

    def keep(self, rows):
        self.seen = [self.seen[row] for row in rows]

    def reset(self):
        self.seen = []


def run(
    decoder,
    prompts,
    sampling,
    seeds=None,
    *,
    eos=frozenset({EOS}),
    batch_rows=1000,
    hook=None,
    stopped=None,
    **more,
):
    seeds = seeds or range(len(prompts))
    jobs = [
        Job(prompt, job_rows(number, seed, sampling), stopped)
        for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
    ]
    drawn = dict(sample(decoder, jobs, sampling, eos=eos, batch_rows=batch_rows, hook=hook, **more))
    return [[(row.tokens, row.finish) for row in drawn[number]] for number in range(len(jobs))]


PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [1, 2], [3, 3, 3]]
SAMPLING = Sampling(temperatures=(0.0, 0.7, 1.5), per_temperature=2, max_new_tokens=12)


class TestSample:
    def test_neighbours_batch_size_and_joining_change_nothing(self):
        alone = [run(Scripted(), [p], SAMPLING, [i])[0] for i, p in enumerate(PROMPTS)]
        for joins in (True, False):
            for compact_below in (1.0, 0.5, 0.0):
                for batch_rows in (1, 6, 13, 1000):
                    decoder = Scripted(joins, compact_below)
                    assert run(decoder, PROMPTS, SAMPLING, batch_rows=batch_rows) == alone
                    assert len(decoder.reads) == len(PROMPTS)  # one prefill a prompt, for all its candidates

    def test_long_prompts_are_not_all_held_at_once_and_that_changes_nothing_either(self):
        alone = [run(Scripted(), [p], SAMPLING, [i])[0] for i, p in enumerate(PROMPTS)]
        for joins in (True, False):
            for tokens, rows in ((1, 6), (4, 12), (100, 30)):
                decoder = Scripted(joins)
                assert run(decoder, PROMPTS, SAMPLING, batch_tokens=tokens) == alone
                assert max(decoder.widths) <= rows

    def test_a_candidate_depends_on_its_own_temperature_and_index_only(self):
        few = Sampling(temperatures=(0.7,), per_temperature=3, max_new_tokens=12)
        many = Sampling(temperatures=(1.5, 0.7), per_temperature=3, max_new_tokens=12)
        assert run(Scripted(), [[1, 2]], few)[0] == run(Scripted(), [[1, 2]], many)[0][3:]

    def test_seeds_are_derived_from_request_temperature_and_index(self):
        rows = job_rows(3, 11, Sampling(temperatures=(0.6, 1), per_temperature=2))
        assert [(r.job, r.temperature, r.index) for r in rows] == [
            (3, 0.6, 0),
            (3, 0.6, 1),
            (3, 1.0, 0),
            (3, 1.0, 1),
        ]
        assert [r.seed for r in rows] == [derive_seed(11, str(r.temperature), r.index) for r in rows]

    def test_longer_runs_begin_as_shorter_ones_do(self):
        short = Sampling(temperatures=(1.2,), per_temperature=2, max_new_tokens=5)
        longer = Sampling(temperatures=(1.2,), per_temperature=2, max_new_tokens=DRAWS + 40)
        for (a, _), (b, _) in zip(
            run(Scripted(), [[9]], short, eos=frozenset())[0],
            run(Scripted(), [[9]], longer, eos=frozenset())[0],
            strict=True,
        ):
            assert b[:5] == a and len(b) == DRAWS + 40

    def test_finished_rows_leave_and_waiting_prompts_join(self):
        decoder = Scripted()
        drawn = run(decoder, PROMPTS, SAMPLING, batch_rows=12)
        steps = sum(len(tokens) - 1 for job in drawn for tokens, _ in job)
        assert sum(decoder.widths) == steps  # no row was stepped after its end
        assert max(decoder.widths) <= 12

    def test_finish_reasons(self):
        drawn = run(Scripted(), PROMPTS, SAMPLING, stopped=lambda tokens: tokens[-1] == 7)
        for tokens, finish in (row for job in drawn for row in job):
            assert finish == {EOS: "eos", 7: "stop"}.get(tokens[-1], "length")
            assert not {EOS, 7} & set(tokens[:-1])
            assert finish != "length" or len(tokens) == 12
        assert len({finish for job in drawn for _, finish in job}) == 3

    def test_logprob_is_of_the_untouched_base(self):
        sampling = Sampling(temperatures=(1.5,), per_temperature=1, max_new_tokens=6, repetition_penalty=1.3)
        decoder = Scripted()
        jobs = [Job([4], job_rows(0, 1, sampling))]
        ((_, (drawn,)),) = sample(decoder, jobs, sampling, eos=frozenset())
        seen, expected = [4], 0.0
        for token in drawn.tokens:
            expected += float(torch.log_softmax(decoder.logits(seen), -1)[token])
            seen.append(token)
        assert drawn.logprob == pytest.approx(expected, abs=1e-4)

    def test_the_hook_comes_after_the_penalty_and_before_the_temperature(self):
        calls = []

        def hook(scores, sides, step):
            for place, row in enumerate(step.rows):
                seen = [*PROMPTS[row.job], *drawn[row][: step.numbers[place]]]
                plain = decoder.logits(seen)
                torch.testing.assert_close(sides[0][place], plain)
                torch.testing.assert_close(scores[place], penalise(plain[None], torch.tensor([seen]), 1.3)[0])
            calls.append(step.numbers)
            only = torch.full_like(scores, -torch.inf)
            only[:, 17] = scores[:, 17]
            drawn.update({row: [*drawn[row], 17] for row in step.rows})
            return only

        sampling = Sampling(
            temperatures=(0.0, 1.0), per_temperature=1, max_new_tokens=4, repetition_penalty=1.3
        )
        decoder = Scripted()
        drawn = {row: [] for n in range(5) for row in job_rows(n, n, sampling)}
        out = run(decoder, PROMPTS, sampling, hook=hook, batch_rows=4)
        assert all(tokens == [17] * 4 for job in out for tokens, _ in job)
        assert calls

    def test_lockstep_gives_the_hook_both_sides(self):
        decoders = [Scripted(), Scripted(salt=1)]

        def hook(scores, sides, step):
            assert len(sides) == 2
            for place, seen in enumerate(decoders[1].seen or [tuple(PROMPTS[r.job]) for r in step.rows]):
                torch.testing.assert_close(sides[1][place], decoders[1].logits(seen))
            return scores - sides[1]

        together = run(Lockstep(decoders), PROMPTS[:2], SAMPLING, hook=hook, batch_rows=6)
        assert together != run(Scripted(), PROMPTS[:2], SAMPLING)
        assert decoders[0].reads == decoders[1].reads == [(1, 2, 3), (4,)]

    def test_a_hook_that_bans_everything_but_one_token_per_row(self):
        def hook(scores, sides, step):
            scores[:] = -torch.inf
            scores[torch.arange(len(step.rows)), [20 + row.index for row in step.rows]] = 0.0
            return scores

        for top_k, top_p in ((0, 1.0), (5, 1.0), (0, 0.9), (5, 0.9)):
            sampling = Sampling((1.0,), 2, top_k=top_k, top_p=top_p, max_new_tokens=3, repetition_penalty=1.0)
            out = run(Scripted(), [[1]], sampling, hook=hook)
            assert [tokens for tokens, _ in out[0]] == [[20] * 3, [21] * 3]

    def test_scores_that_are_not_numbers_are_said_to_be(self):
        with pytest.raises(ModelError, match="NaN"):
            run(Scripted(nan=True), [[1]], SAMPLING)
        with pytest.raises(ModelError, match="hook"):
            run(Scripted(), [[1]], SAMPLING, hook=lambda scores, sides, step: scores - torch.inf)

    def test_inference_mode_does_not_leak_to_the_caller(self):
        jobs = [Job([4], job_rows(0, 1, SAMPLING))]
        for _ in sample(Scripted(), jobs, SAMPLING, eos=frozenset()):
            assert not torch.is_inference_mode_enabled()


class TestChoose:
    @pytest.mark.parametrize(
        ("top_k", "top_p"), [(0, 1.0), (7, 1.0), (0, 0.8), (7, 0.8), (1, 1.0), (0, 1e-6), (50, 0.5)]
    )
    @pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
    def test_keeps_what_transformers_keeps_and_draws_in_proportion(self, top_k, top_p, temperature):
        scores = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(1)) * 2
        kept = scores / temperature
        if top_k:
            kept = logits_process.TopKLogitsWarper(top_k)(None, kept)
        if top_p < 1:
            kept = logits_process.TopPLogitsWarper(top_p)(None, kept)
        expected = torch.softmax(kept, -1)[0]
        count = 4000
        draws = (torch.arange(count, dtype=torch.float64) + 0.5) / count  # a stratified sample
        tokens = choose(scores.expand(count, -1), torch.full((count,), temperature), draws, top_k, top_p)
        shares = torch.bincount(tokens, minlength=VOCABULARY) / count
        assert set(tokens.tolist()) <= set(torch.nonzero(expected)[:, 0].tolist())
        torch.testing.assert_close(shares.float(), expected, atol=2 / count, rtol=0)

    def test_temperature_zero_takes_the_likeliest_whatever_is_drawn(self):
        scores = torch.randn(64, VOCABULARY)
        draws = torch.rand(64, dtype=torch.float64)
        for top_k, top_p in ((0, 1.0), (5, 1.0), (0, 0.5), (5, 0.5)):
            assert torch.equal(choose(scores, torch.zeros(64), draws, top_k, top_p), scores.argmax(-1))

    def test_temperatures_are_each_rows_own(self):
        scores = torch.randn(1, VOCABULARY).expand(2000, -1)
        draws = torch.rand(2000, dtype=torch.float64)
        temperatures = torch.tensor([0.1, 3.0]).repeat(1000)
        tokens = choose(scores, temperatures, draws, 0, 1.0)
        cold, hot = Counter(tokens[::2].tolist()), Counter(tokens[1::2].tolist())
        assert len(cold) < len(hot)

    @given(st.floats(0, 1, exclude_max=True), st.integers(0, 60), st.floats(1e-6, 1), st.integers(0, 1000))
    @settings(max_examples=60)
    def test_any_draw_gives_a_token_that_has_mass(self, draw, top_k, top_p, seed):
        scores = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 10
        scores[:, ::3] = -torch.inf
        token = choose(scores, torch.ones(1), torch.tensor([draw], dtype=torch.float64), top_k, top_p)
        assert scores[0, token] > -torch.inf
        last = choose(scores, torch.ones(1), torch.tensor([1 - 2**-53], dtype=torch.float64), top_k, top_p)
        assert scores[0, last] > -torch.inf

    def test_a_wide_nucleus_is_found_beyond_the_first_guess(self):
        scores = torch.zeros(1, 5000)  # uniform: 90 % of the mass is 4,500 tokens
        draws = torch.tensor([0.999], dtype=torch.float64)
        tokens = {int(choose(scores, torch.ones(1), draws * n / 100, 0, 0.9)) for n in range(100)}
        assert len(tokens) == 100

    @given(st.integers(0, 10_000), st.sampled_from([0.05, 0.5, 0.9, 0.999]), st.floats(0.1, 20))
    @settings(max_examples=40)
    def test_the_nucleus_is_that_of_a_full_sort_with_ties_by_id_whatever_stands_beside(
        self, seed, top_p, spread
    ):
        generator = torch.Generator().manual_seed(seed)
        # As a bfloat16 model gives them: full of equal scores.
        scores = (torch.randn(6, 3000, generator=generator) * spread).bfloat16().float()
        scores[1] = 0.0
        temperatures = torch.tensor([1.0, 1.0, 0.6, 1.5, 1.0, 0.8])
        draws = torch.rand(6, dtype=torch.float64, generator=generator)
        together = choose(scores, temperatures, draws, 0, top_p)
        ones, total = torch.ones(6), torch.logsumexp(scores, -1)
        assert torch.equal(
            choose(scores, ones, draws, 0, top_p, total), choose(scores, ones, draws, 0, top_p)
        )
        assert torch.equal(choose(scores, temperatures, draws, 0, top_p, total), together)
        for row in range(6):
            one = slice(row, row + 1)
            assert choose(scores[one], temperatures[one], draws[one], 0, top_p) == together[row]
            scaled = scores[one] / temperatures[one, None]
            values, ids = scaled[0].sort(descending=True, stable=True)
            mass = torch.exp((values - torch.logsumexp(scaled, -1)).double())
            mass[(mass.cumsum(0) - mass) >= top_p] = 0
            assert (
                together[row] == ids[torch.searchsorted(mass.cumsum(0), draws[row] * mass.sum(), right=True)]
            )


class TestPenalise:
    @given(
        st.floats(0.5, 3),
        st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=20),
        st.integers(0, 99),
    )
    @settings(max_examples=50)
    def test_is_what_transformers_does(self, penalty, history, seed):
        raw = torch.randn(2, VOCABULARY, generator=torch.Generator().manual_seed(seed))
        ids = torch.tensor([history, history[::-1]])
        before = raw.clone()
        expected = logits_process.RepetitionPenaltyLogitsProcessor(penalty)(ids, raw.clone())
        torch.testing.assert_close(penalise(raw, ids, penalty), expected)
        assert torch.equal(raw, before)


class TestFixedPlaces:
    def test_are_the_same_for_all_prompts_that_are_long_enough(self):
        assert fixed_places(300, 64) == [64, 128, 256, 300]
        assert fixed_places(64, 64) == [64]
        assert fixed_places(10, 64) == [10]

    @given(st.integers(1, 5000), st.integers(1, 100))
    def test_rise_and_end_at_the_length(self, length, first):
        places = fixed_places(length, first)
        assert places == sorted(set(places)) and places[-1] == length
        assert set(places[:-1]) <= set(fixed_places(10 * length, first))


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperatures": ()},
        {"temperatures": (-0.1,)},
        {"temperatures": (float("nan"),)},
        {"temperatures": (0.5, 0.5)},
        {"per_temperature": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"repetition_penalty": 0.0},
        {"max_new_tokens": 0},
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ModelError, match="Sampling"):
        check_sampling(Sampling(**wrong))
