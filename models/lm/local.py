"""A causal language model in this process: any transformers folder, on a CPU or an accelerator."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from models.lm.chat import encode_chat, encode_plain
from models.lm.constrained import Constraint, Vocabulary, token_texts
from models.lm.decoder import CausalDecoder, Decoder, Lockstep, SharedPrefixDecoder
from models.lm.folder import describe_folder
from models.lm.limits import check_sampling
from models.lm.loading import load_model, load_tokenizer, pick_device, pick_dtype
from models.lm.next_token import answer_logprobs, chat_logprobs
from models.lm.prepare import Prepared, prepare
from models.lm.sampling import Drawn, Hook, Job, job_rows, sample
from models.lm.stops import StopWatch
from models.lm.teacher import continuation_logprobs, token_logprobs
from models.protocols import (
    Candidate,
    FloatArray,
    Generation,
    GenerationRequest,
    ModelInfo,
    Sampling,
    TokenScores,
)
from schemas.errors import ModelError

# A tokenizer without a limit says so with a huge number.
NO_LIMIT = 10**9
# Rows decoded together on a CPU where that changes no bit: past this a core gains little more, and each row's keys take
# memory (46 kB a token in the embedded model). Short continuations leave room for twice as many, worth a fifth.
EXACT_ROWS = 64
SHORT = 64  # tokens
# Tokens of prompts held at once beside that: lists of passages are thousands of tokens long, and 64 of them would take 9 GB
# of keys and values in the embedded model.
PROMPT_TOKENS = 16_384
# Where neither the model nor its tokenizer states a limit (ALiBi models): what most were trained with.
DEFAULT_CONTEXT = 2048


class LocalLanguageModel:
    """A `LanguageModel` on transformers, with its own sampling loop.

    On a CPU the model is prepared for decoding: LoRA weights are merged, linear layers packed
    (`models.lm.packed`), and attention reads a prompt's keys once for all candidates (`models.lm.prefix`). Requests
    are then decoded side by side, each joining as soon as there is room, and at loading it is checked that this
    changes no bit of any result; where it would, and for models that cannot be prepared, requests are decoded one by
    one. On an accelerator, `batch_rows` decodes several requests in one batch (left-padded, masked, with explicit
    positions), which is exact only up to floating point.

    Args:
        folder: A folder as `save_pretrained` writes it.
        name: What to call it in records; by default `hf:<folder>`.
        adapter: A LoRA adapter, by name (`detox`: one shipped with tamis) or folder.
        dtype: `auto` (bfloat16 where the hardware multiplies it, else float32), `float32` or `bfloat16`.
        device: `auto` (CUDA if there is one), or a torch device.
        threads: Torch threads while this model runs. More than one a worker process pays only on an idle machine.
        batch_rows: Most candidates decoded together, of one or more requests; by default 64 (128 where they are short)
            where that changes no result, else those of one request.
        context_limit: Fewer tokens of prompt and continuation together than the model allows.
        merge_adapter: Merge the adapter into the weights (faster), or keep it apart.
        fast: Prepare for decoding on a CPU as said above; False runs the plain forward pass.

    Attributes:
        info: What the manifest records.
        context_limit: Tokens of prompt and continuation together.
        tokenizer: The transformers tokenizer.
        model: The transformers model, in evaluation mode.
        vocabulary: Tokens that exist; rows of the output layer beyond are padding, and cut off.

    Raises:
        ModelError: The folder or the adapter cannot be used; one line says why.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        name: str = "",
        adapter: str | Path | None = None,
        dtype: str = "auto",
        device: str = "auto",
        threads: int = 1,
        batch_rows: int | None = None,
        context_limit: int | None = None,
        merge_adapter: bool = True,
        fast: bool = True,
    ) -> None:
        if threads < 1 or (batch_rows is not None and batch_rows < 1):
            raise ModelError("threads and batch_rows must be 1 or more")
        info = describe_folder(folder, name, adapter)
        self.threads = threads
        self._lock = threading.RLock()
        torch.set_num_threads(threads)
        on = pick_device(device)
        self.tokenizer = load_tokenizer(folder)
        self.model = load_model(folder, adapter, pick_dtype(dtype, on), on, merge_adapter)
        self.vocabulary = self._check_vocabulary(folder)
        self.context_limit = self._limit(context_limit)
        self._eos = self._end_tokens()
        can = fast and on.type == "cpu"
        self._prepared = prepare(self.model, self.vocabulary) if can else Prepared(shared=False, exact=False)
        self.batch_rows = batch_rows or (EXACT_ROWS if self._prepared.exact else 1)
        self._rows_by_length = batch_rows is None and self._prepared.exact
        self._most_rows: int | None = None
        self._own_decoder = self.decoder()
        self._constraints: Vocabulary | None = None  # made when a request first asks for a form
        extra = {"dtype": str(self.model.dtype).removeprefix("torch."), "device": on.type, "threads": threads}
        # Cosmetic where it changes nothing, and then not recorded.
        extra |= {} if self._prepared.exact or self.batch_rows == 1 else {"batch_rows": self.batch_rows}
        # Other rounding than merged: not the same answers.
        extra |= {"decoding": "unmerged"} if adapter is not None and not merge_adapter else {}
        self.info: ModelInfo = dataclasses.replace(info, extra={**info.extra, **extra})

    def limit_rows(self, most: int) -> None:
        """Decode at most so many candidates together, however short they are: more would change results."""
        self.batch_rows = min(self.batch_rows, most)
        self._most_rows = most if self._most_rows is None else min(self._most_rows, most)

    @property
    def most_rows(self) -> int:
        """Most candidates that are ever decoded together."""
        return min(
            2 * self.batch_rows if self._rows_by_length else self.batch_rows, self._most_rows or 1 << 30
        )

    @staticmethod
    def describe(folder: str | Path, name: str = "", adapter: str | Path | None = None) -> ModelInfo:
        """What this model would be, without loading its weights; see `models.lm.folder.describe_folder`."""
        return describe_folder(folder, name, adapter)

    def count_tokens(self, text: str) -> int:
        """Number of tokens of `text` as it stands in a prompt: a special token's name is ordinary characters there."""
        with self._lock:
            return len(self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))

    def encode(self, request: GenerationRequest) -> list[int]:
        """Token ids of a request's prompt: the chat by the model's template, then the prefill.

        A request without messages is plain text to be continued: its prefill as it stands, without a template.
        """
        with self._lock:
            if not request.messages:
                return encode_plain(self.tokenizer, request.prefill)
            return encode_chat(self.tokenizer, request.messages, request.prefill)

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        sampling: Sampling,
        on_done: Callable[[int, Generation], None] | None = None,
        *,
        hook: Hook | None = None,
        beside: Sequence[Decoder] = (),
        decoder: Decoder | None = None,
    ) -> list[Generation]:
        """Sample candidates for every request (see `LanguageModel.generate`).

        A prompt that leaves no room for `max_new_tokens` is an error of its request: nothing is cut.

        Args:
            requests: Any number of prompts.
            sampling: Shared by all of them.
            on_done: Called with (index, generation) as each is finished.
            hook: Edits the scores of every step, after the repetition penalty and before the temperature.
            beside: Decoders of other models with this tokenizer, run in lockstep; the hook sees their logits as
                further sides.
            decoder: Runs in place of the model's own (and of `beside`), with sides of its own making.

        Returns:
            One generation per request, in order.

        Raises:
            ModelError: Settings that mean nothing; scores that are not numbers.
        """
        check_sampling(sampling)
        results: list[Generation | None] = [None] * len(requests)

        def finish(index: int, generation: Generation) -> None:
            results[index] = generation
            if on_done is not None:
                on_done(index, generation)

        prompts: dict[int, list[int]] = {}
        for index, request in enumerate(requests):
            ids = self.encode(request)
            problem = self._problem(ids, sampling)
            if problem:
                finish(index, Generation((), len(ids), problem))
            else:
                prompts[index] = ids
        order = list(prompts)
        if decoder is None:
            decoder = Lockstep([self._own_decoder, *beside]) if beside else self._own_decoder
        if not decoder.joins:
            order.sort(
                key=lambda index: len(prompts[index])
            )  # neighbours of one length need the least padding
        jobs = [(index, requests[index], prompts[index]) for index in order]
        with self._lock:
            torch.set_num_threads(self.threads)  # per thread in some builds of torch
            self._decode(jobs, sampling, finish, hook, decoder)
        return [generation for generation in results if generation is not None]

    def decoder(self) -> Decoder:
        """A new decoder on this model, for the sampling loop (or to run beside another model)."""
        if self._prepared.shared:
            return SharedPrefixDecoder(self.model, self.vocabulary)
        pad = self.tokenizer.pad_token_id
        return CausalDecoder(self.model, self.vocabulary, 0 if pad is None else pad)

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Within the context, no other thread runs this model; for a caller that runs its forward pass itself."""
        with self._lock, torch.inference_mode():
            torch.set_num_threads(self.threads)
            yield

    def score_tokens(self, texts: Sequence[str]) -> list[tuple[list[tuple[int, int]], FloatArray]]:
        """Teacher forcing: each text's token offsets and log-probabilities (see `LanguageModel.score_tokens`).

        The first token is predicted from the tokenizer's beginning (or else end) token. A text longer than the
        context is scored in windows that overlap by half, so each token sees at least half a context before it.

        Args:
            texts: Any number of texts of any length.

        Returns:
            For each text: [(start, end)] character offsets of its tokens, and float32 log-probabilities (nats) of
            the same length. An empty text has no tokens.
        """
        scored = []
        for text in texts:
            with self._lock:
                torch.set_num_threads(self.threads)
                scored.append(
                    token_logprobs(self.model, self.tokenizer, text, self.context_limit, self.vocabulary)
                )
        return scored

    def score_continuations(self, prompt: str, continuations: Sequence[str]) -> list[FloatArray]:
        """Teacher forcing of several continuations of one prompt, which is read once for all of them.

        Args:
            prompt: What stands before; may be empty.
            continuations: Any number of texts.

        Returns:
            For each, float32 log-probabilities (nats) of the tokens that reach beyond the prompt, when prompt and
            continuation are tokenised as one text; none for an empty continuation. Where both exceed the context,
            the beginning of the prompt is not seen.
        """
        with self._lock:
            torch.set_num_threads(self.threads)
            return continuation_logprobs(
                self.model, self.tokenizer, prompt, continuations, self.context_limit, self.vocabulary
            )

    def next_token_logits(self, prompts: Sequence[str | Sequence[int]]) -> FloatArray:
        """Logits of the token after each prompt.

        Args:
            prompts: Texts (tokenised without special tokens) or token ids; none may be empty.

        Returns:
            float32 array of shape (len(prompts), vocabulary); each prompt is run alone.
        """
        rows = []
        with self._lock, torch.inference_mode():
            torch.set_num_threads(self.threads)
            decoder = CausalDecoder(self.model, self.vocabulary)
            for prompt in prompts:
                ids = (
                    self.tokenizer.encode(prompt, add_special_tokens=False)
                    if isinstance(prompt, str)
                    else prompt
                )
                if not ids:
                    raise ModelError("a prompt without tokens has no next token")
                rows.append(decoder.start([ids], 1, 1)[0][0].float().cpu().numpy())
        return np.stack(rows) if rows else np.zeros((0, self.vocabulary), np.float32)

    def answer_logprobs(
        self,
        requests: Sequence[GenerationRequest],
        answers: Sequence[str],
        on_done: Callable[[int, TokenScores], None] | None = None,
    ) -> list[TokenScores]:
        """Log-probabilities of a few answers as the next token; see `models.lm.next_token.answer_logprobs`."""
        return answer_logprobs(self, requests, answers, on_done)

    def chat_logprobs(
        self,
        requests: Sequence[GenerationRequest],
        continuations: Sequence[str],
        on_done: Callable[[int, TokenScores], None] | None = None,
    ) -> list[TokenScores]:
        """Log-probability of a given text as the model's turn; see `models.lm.next_token.chat_logprobs`."""
        return chat_logprobs(self, requests, continuations, on_done)

    def _decode(
        self,
        requests: list[tuple[int, GenerationRequest, list[int]]],
        sampling: Sampling,
        finish: Callable[[int, Generation], None],
        hook: Hook | None,
        decoder: Decoder,
    ) -> None:
        """Decode (index, request, prompt) triples; where an accelerator's memory does not suffice, in smaller batches."""
        batch_rows = self.batch_rows
        if self._rows_by_length and sampling.max_new_tokens <= SHORT:
            batch_rows = min(2 * batch_rows, self._most_rows or 2 * batch_rows)
        while requests:
            watches = [StopWatch(self.tokenizer, request.stop) for _, request, _ in requests]
            jobs = [
                Job(prompt, job_rows(number, request.seed, sampling), watch)
                for number, ((_, request, prompt), watch) in enumerate(zip(requests, watches, strict=True))
            ]
            left = dict(enumerate(requests))
            try:
                for number, drawn in sample(
                    decoder,
                    jobs,
                    sampling,
                    eos=self._eos,
                    batch_rows=batch_rows,
                    batch_tokens=PROMPT_TOKENS if self._rows_by_length else None,
                    hook=self._constrained([request for _, request, _ in requests], hook),
                ):
                    index, _, _ = left.pop(number)
                    finish(index, self._generation(jobs[number], drawn, watches[number]))
            except torch.OutOfMemoryError:
                if batch_rows <= sampling.n:
                    index, _, prompt = left.pop(min(left))
                    finish(index, Generation((), len(prompt), "out of accelerator memory for this request"))
                batch_rows = max(1, batch_rows // 2)
            finally:
                decoder.reset()
            requests = list(left.values())

    def _constrained(self, requests: Sequence[GenerationRequest], hook: Hook | None) -> Hook | None:
        """The hook, and behind it what keeps replies to their forms, where any request asks for one."""
        forms = {number: r.form for number, r in enumerate(requests) if r.form is not None}
        if not forms:
            return hook
        if self._constraints is None:
            self._constraints = Vocabulary(token_texts(self.tokenizer, self.vocabulary))
        return Constraint(self._constraints, self._eos, forms, hook)

    def _generation(self, job: Job, drawn: list[Drawn], watch: StopWatch) -> Generation:
        candidates = tuple(
            Candidate(
                text=watch.text(result.tokens, self._eos, job.prompt[-1]),
                temperature=row.temperature,
                index=row.index,
                seed=row.seed,
                tokens=len(result.tokens),
                finish=result.finish,
                logprob=result.logprob / len(result.tokens),
            )
            for row, result in zip(job.rows, drawn, strict=True)
        )
        return Generation(candidates, len(job.prompt))

    def _problem(self, ids: list[int], sampling: Sampling) -> str:
        if not ids:
            return "the prompt has no tokens"
        if len(ids) + sampling.max_new_tokens > self.context_limit:
            return (
                f"prompt of {len(ids)} tokens and {sampling.max_new_tokens} new ones exceed the context of "
                f"{self.context_limit} tokens"
            )
        return ""

    def _check_vocabulary(self, folder: str | Path) -> int:
        tokens = len(self.tokenizer)
        rows = self.model.get_input_embeddings().num_embeddings
        if tokens > rows:
            raise ModelError(
                f"The tokenizer of {folder} has {tokens} tokens but the model only {rows}: they do not belong together"
            )
        return tokens

    def _limit(self, wanted: int | None) -> int:
        config = self.model.config.get_text_config(decoder=True)
        limits = [
            getattr(config, key, None) for key in ("max_position_embeddings", "n_positions", "max_seq_len")
        ]
        stated = [limit for limit in [*limits, self.tokenizer.model_max_length] if limit and limit < NO_LIMIT]
        limit = min(stated, default=DEFAULT_CONTEXT)
        return limit if wanted is None else min(limit, wanted)

    def _end_tokens(self) -> frozenset[int]:
        ends = [self.tokenizer.eos_token_id]
        generation = getattr(self.model, "generation_config", None)
        stated = generation.eos_token_id if generation is not None else None
        ends += stated if isinstance(stated, list) else [stated]
        return frozenset(token for token in ends if token is not None)
