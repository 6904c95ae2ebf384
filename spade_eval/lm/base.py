"""What all models of this package share: requests in, answers out.

    loglikelihood(requests) -> token ids -> plan -> batches -> `_score` -> answer per request
    loglikelihood_rolling(pages) -> windows -> the same -> one sum per page

A subclass says what happens to a batch.
"""

from __future__ import annotations

import logging
import sys
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from spade_eval import __version__, checks, scoring
from spade_eval.batching import Batch, collate, cut
from spade_eval.cost import Account
from spade_eval.errors import UserError
from spade_eval.generation import check
from spade_eval.lm import generation
from spade_eval.lm.cache import Partial, configuration, guard
from spade_eval.lm.loading import LoadedLM
from spade_eval.lm.memory import fitting, laid_out_again, largest_batch_size, parts
from spade_eval.lm.pages import token_windows
from spade_eval.lm.requests import place, source_of
from spade_eval.lm.windows import may_pack, widest, window
from spade_eval.tally import Prices, Source

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from spade_eval.answers import Answers
    from spade_eval.batching import Ints
    from spade_eval.generation import Generated
    from spade_eval.lm.memory import LayOut
    from spade_eval.lm.requests import TokenRequest
    from spade_eval.policy import Policy
    from spade_eval.scoring import Row

log = logging.getLogger(__name__)

_UNKNOWN = Source([], np.zeros(0, dtype=bool))  # where requests come from, outside lm-eval's calls


class SpadeLM(LoadedLM):
    """A decoder-only Hugging Face model, scored through a decoder; made as `LoadedLM` is."""

    def __init__(self, pretrained: Any = None, **kwargs: Any):
        super().__init__(pretrained, **kwargs)
        if not self.backbone.keeps_keys:
            log.warning(
                "%s keeps more than keys and values: two-token tails compute both of their tokens, "
                "no two sequences share a row, and tasks that generate text will be refused.",
                self.backbone.name,
            )
        self.account = Account()
        self.prices = self._prices(checks.head_operations(self.backbone) / self.backbone.operations)
        self._source = _UNKNOWN
        self._instances: Sequence[Any] = ()
        self._choices: dict[int, list[int]] = {}  # of each request's context, if they matter

    # ------------------------------------------------------------------ for subclasses

    _needs_whole_contexts = False
    """Whether an answer depends on which other continuations its context has."""
    most_tokens_at_once = 0
    """Batches of less than so many tokens are scored with the next ones."""
    most_tokens_in_batch = sys.maxsize
    """Batches are cut before they have more."""

    def _score(self, batches: Sequence[Batch], account: Account) -> Sequence[Answers]:
        """Score batches and add what they cost to `account`."""
        raise NotImplementedError

    decides = False
    """Whether tokens decide about the layers that they are read from."""

    def _policy(self) -> Policy:
        """Where generated tokens are read."""
        raise NotImplementedError

    def _prices(self, head: float) -> Prices:
        """What heads and checks cost, given a head's price in token-layers."""
        return Prices(self.backbone.n_layers, head)

    def _prepare(self, requests: Sequence[TokenRequest]) -> None:
        """Look at all requests of a call before the first batch."""

    def _settings(self) -> dict[str, object]:
        """The decoder's settings, for the results file and the response cache's fingerprint."""
        raise NotImplementedError

    # ------------------------------------------------------------------ requests

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        """Log-likelihood of each continuation, and whether it is the greedy one."""
        for request in requests:
            if not request.args[1]:
                raise UserError(f"{place(request)}: empty continuation, an answer without text.")
        try:
            with self._accounting(requests), self._encoding_ahead(r.args for r in requests):
                return super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        except scoring.BadRequestError as err:
            raise UserError(f"{place(requests[err.index])}: {err}") from err

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in disjoint windows of at most `max_length` tokens."""
        windows: list[TokenRequest] = []
        owners: list[int] = []
        with self._accounting(requests):
            for index, request in enumerate(requests):
                pairs = token_windows(self, request.args[0])
                windows.extend((None, *pair) for pair in pairs)
                owners.extend([index] * len(pairs))
            self._instances = [requests[index] for index in owners]
            source = self._source
            self._source = Source([source.tasks[i] for i in owners], source.counted[owners])
            totals = np.zeros(len(requests))
            for owner, (value, _) in zip(
                owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True
            ):
                totals[owner] += value
        for request, total in zip(requests, totals.tolist(), strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals.tolist()

    @torch.no_grad()
    def _loglikelihood_tokens(
        self,
        requests: Sequence[TokenRequest],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        self._ahead = None  # all texts are tokens now
        if len(self._source.tasks) != len(requests):  # called with token ids, not by lm-eval
            self._source = Source(["unknown"] * len(requests), np.ones(len(requests), dtype=bool))
        asked = [scoring.Request(tuple(context), tuple(cont)) for _, context, cont in requests]
        self._prepare(requests)
        # Where other choices follow a context, something else is decided about it.
        askers = [tuple(self._choices[i]) for i in range(len(asked))] if self._choices else None
        layout = self.layout
        plan = scoring.plan(asked, layout, askers=askers)
        if plan.truncated:
            self.account.truncated_requests += plan.truncated
            log.warning(
                "%d of %d requests are longer than max_length=%d and lose their left end; "
                "the results carry the count.",
                plan.truncated, len(requests), self.max_length,
            )  # fmt: skip
        sums, greedy = np.zeros(len(requests)), np.ones(len(requests), dtype=bool)
        bar = tqdm(
            total=len(requests),
            disable=disable_tqdm or self.rank != 0,
            desc="Running loglikelihood requests",
        )
        cached = Partial(self.cache_hook, requests, whole_contexts=self._needs_whole_contexts)

        def lay_out(which: Sequence[int], size: int) -> list[Row]:
            smaller = replace(layout, batch_size=size)
            return scoring.plan(asked, smaller, which=which, askers=askers).rows

        for batch, answers in self._answered(self._batches(plan.rows, lay_out, override_bs)):
            np.add.at(sums, batch.requests, answers.logprobs)
            np.logical_and.at(greedy, batch.requests, answers.greedy)
            # A request lies in one batch: what is done survives a kill in --use_cache.
            done = np.unique(batch.requests).tolist()
            for index in done:
                cached.add(index, (float(sums[index]), bool(greedy[index])))
            bar.update(len(done))
        bar.close()
        return list(zip(sums.tolist(), greedy.tolist(), strict=True))

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts, each read from the layers that scoring would read them from."""
        policy = self.policy  # its check is no part of the requests' time
        with self._accounting(requests):
            return generation.generate_until(self, requests, policy, disable_tqdm)

    def count_generated(self, run: Generated, requests: Ints, starts: int) -> None:
        """Add the texts of some requests, (B,), and new start tokens, to the account."""
        self.account.add_generated(run, requests, self._source, self.prices, self.decides, starts)

    @cached_property
    def policy(self) -> Policy:
        """Where this model may read a token that it generates; most models are only scored."""
        policy = self._policy()
        check(self.backbone)
        return policy

    # ------------------------------------------------------------------ batches

    @property
    def layout(self) -> scoring.Layout:
        """Which rows this model may be given; `logits_cache=False` asks for one per sequence."""
        config = self.backbone.model.config.get_text_config()
        auto = self.batch_size == "auto"
        return scoring.Layout(
            max_length=self.max_length,
            packed=self.logits_cache and self.backbone.packs and may_pack(config),
            window=window(config),
            widest=widest(config),
            crossover=self.backbone.crossover,
            quadratic=getattr(config, "_attn_implementation", "") == "eager",
            batch_size=int(self.max_batch_size if auto else self.batch_size),
            kept=frozenset(self.tokenizer.all_special_ids),
        )

    def _batches(self, rows: Sequence[Row], lay_out: LayOut, fixed: int | None) -> Iterator[Batch]:
        """Batches of the size that the user gave; "auto" finds it, "auto:N" does so N times."""
        most = min(self.backbone.most_tokens, self.most_tokens_in_batch)
        if fixed or self.batch_size != "auto":
            yield from map(collate, cut(rows, int(fixed or self.batch_size), most))
            return
        largest = int(self.max_batch_size)
        self.batch_sizes = {}
        for part, some in enumerate(parts(rows, int(self.batch_schedule))):
            sized = laid_out_again(some, largest, lay_out)
            size = largest
            if self.device.type != "cpu":  # no allocator there that fails before the machine does
                # Ranks need not agree: each runs its own batches.
                size = largest_batch_size(sized, largest, lambda b: self._run([b], Account()), most)
                log.info("batch_size=auto: %d", size)
            self.batch_sizes[part] = size
            yield from map(collate, cut(sized(size), size, most))

    def _answered(self, batches: Iterator[Batch]) -> Iterator[tuple[Batch, Answers]]:
        """Score batches, as many side by side as together have `most_tokens_at_once`."""
        held: list[Batch] = []
        for batch in batches:
            held.append(batch)
            if sum(b.ids.size for b in held) >= self.most_tokens_at_once:
                yield from zip(held, self._fitting(held), strict=True)
                held = []
        if held:
            yield from zip(held, self._fitting(held), strict=True)

    def _fitting(self, batches: Sequence[Batch]) -> Sequence[Answers]:
        with fitting(self.batch_size, self.device):
            return self._run(batches, self.account)

    def _run(self, batches: Sequence[Batch], account: Account) -> Sequence[Answers]:
        autocast = self.mixed_precision_dtype is not None
        with torch.autocast(self.device.type, dtype=self.mixed_precision_dtype, enabled=autocast):
            return self._score(batches, account)

    # ------------------------------------------------------------------ results and caches

    @contextmanager
    def _accounting(self, requests: Sequence[Any]) -> Iterator[None]:
        """Count what happens to the requests inside, on all ranks, into `account` of rank 0."""
        self._instances, self._source = requests, source_of(requests)
        total, self.account = self.account, Account()
        parts: list[Account] | None = [self.account]
        try:
            with self.account.clock():
                yield
            # With a response cache a rank may have nothing left to score and never get here.
            if self.world_size > 1 and self.cache_hook.dbdict is None:
                parts = self.gather_object(self.account)
        finally:
            self.account = total
            self.account.merge(parts or [])
            self._source, self._instances = _UNKNOWN, ()
            if self.rank == 0:
                # lm-eval shows no INFO of loggers other than its own.
                print(self._summary(), file=sys.stderr)

    def _summary(self) -> str:
        """One line about what has been computed so far."""
        total, starts = self.account.total, self.account.start_token_layers
        report = total.report(starts)
        exits = report["mean_exit_layer"]
        mean = "" if exits is None else f"mean exit layer {exits} of {self.prices.n_layers}, "
        ratio = report["token_layer_ratio"]
        share = "" if ratio is None else f"{ratio:.1%} of full depth computed, "
        who = f"{type(self).__name__}, {total.requests} requests"
        return f"{who}: {mean}{share}{self.account.seconds:.1f} s"

    def set_cache_hook(self, cache_hook: Any) -> None:
        """As in lm-eval, but refuse a cache of another configuration's answers."""
        super().set_cache_hook(cache_hook)
        if cache_hook.dbdict is not None:
            guard(cache_hook.dbdict, configuration(self, self._settings()))

    def get_model_info(self) -> dict[str, Any]:
        """HFLM's entries and one of ours, `spade`, for the `config` of the results."""
        spade: dict[str, object] = {
            **self._settings(),
            "layers": self.backbone.n_layers,
            "keeps_keys": self.backbone.keeps_keys,
            "start_token": "add_bos_token" if self.add_bos_token else "first token as fed",
            "model": self._model_source,
            "revision": str(self.revision),
            "package_version": __version__,
            "ranks_counted": self.world_size if self.cache_hook.dbdict is None else 1,
            "account": self.account.report(),
        }
        return {**super().get_model_info(), "spade": spade}
