"""SPADE-EXIT, and classical early exits under the same roof."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from spade_eval import lenses
from spade_eval.calibration import NAME, WORD, Calibration
from spade_eval.confidence import CONFIDENCES
from spade_eval.decisions import decide
from spade_eval.decoders import Linear, LogitLens, Positions, Spade
from spade_eval.errors import UserError
from spade_eval.exits import DEFAULTS, ExitRule, Readout, Scope
from spade_eval.lm.base import SpadeLM, log
from spade_eval.lm.cache import claim_choices
from spade_eval.lm.exit_log import ExitLog, writable
from spade_eval.lm.requests import (
    first_tokens,
    warn_of_shared_beginnings,
    warn_of_single_choices,
)
from spade_eval.policy import Policy
from spade_eval.trace import Trace, score, score_with_exits

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from spade_eval.answers import Answers
    from spade_eval.batching import Batch, Ints
    from spade_eval.confidence import Name
    from spade_eval.cost import Account
    from spade_eval.decoders import Decoder
    from spade_eval.generation import Generated
    from spade_eval.lm.requests import TokenRequest
    from spade_eval.tally import Prices


RARE = 0.05  # of decisions: with fewer exits next to nothing is saved


class SpadeExitLM(SpadeLM):
    """`--model spade_exit`: SPADE-EXIT (arXiv 2507.17618, Algorithm 1; "SimExit" in its v2).

    Args:
        pretrained: As in HFLM; the default model if absent.
        threshold: T. An answer exits at the first candidate layer where its confidence reaches it:
            entropies from above, in nats, probabilities from below. "calibrated" takes it, and the
            other settings, from a file of `spade-eval calibrate`.
        lens: Folder or hub id of a lens, "identity" for the logit lens; the default model has its
            own.
        interval: Candidates are the layers that it divides and that have a map, 2 by default,
        min_layer: from this one on; half of the layers by default.
        confidence: "entropy" (default), "choice_entropy" (over the first tokens of the context's
            own continuations), "top2_margin" or "max_prob".
        readout: "spade" answers with the two-token tail, "lens" with the map itself.
        exit_scope: "context" (default) decides once at the last context token for all its
            continuations, "token" at every scored position, "request" by their mean. Whole texts
            (rolling requests) and generated ones always decide by token.
        positions: Of the tail's pairs, see `SpadeLayerLM`.
        calibration: The file of threshold=calibrated; calibration.json by default.
        exit_log: File for one JSON line per scored position or generated token.
        force_lens: Whether a lens of another model, of the same size, is a warning only.
        **kwargs: HFLM's arguments.
    """

    name = "spade_exit"
    default_readout: Readout = "spade"

    def __init__(
        self,
        pretrained: Any = None,
        threshold: float | str | None = None,
        lens: Any = None,
        interval: int | None = None,
        min_layer: int | None = None,
        confidence: Name | None = None,
        readout: Readout | None = None,
        exit_scope: Scope | None = None,
        positions: Positions | None = None,
        calibration: str | Path | None = None,
        exit_log: str | Path | None = None,
        force_lens: bool = False,
        **kwargs: Any,
    ):
        given = {
            "interval": interval, "min_layer": min_layer, "confidence": confidence,
            "readout": readout, "exit_scope": exit_scope, "positions": positions,
        }  # fmt: skip
        self._calibration = _calibration(threshold, calibration)
        if self._calibration is not None:
            chosen = self._calibration.arguments(given)
            if readout is None and chosen["readout"] != self.default_readout:
                raise UserError(
                    f"threshold={WORD} was calibrated with readout={chosen['readout']}, and "
                    f"{self.name} answers with readout={self.default_readout}. Add readout="
                    f"{chosen['readout']}, or calibrate again."
                )
            log.warning("threshold=%s holds for %s.", WORD, self._calibration.holds_for)
        else:
            defaults = {**DEFAULTS, "readout": self.default_readout}
            chosen = {**defaults, **{k: v for k, v in given.items() if v is not None}}
            chosen["threshold"] = threshold
        self._positions = chosen.pop("positions")
        spade = Spade(positions=self._positions)
        self.rule = ExitRule(**chosen)
        self._lens_name = lenses.called(lens)
        self._loaded = lenses.load(lens, pretrained is None, self.name)
        log_path = None if exit_log is None else writable(exit_log)
        super().__init__(pretrained, **kwargs)
        self.lens = lenses.fit_to(self._loaded, self.backbone, self._lens_name, force_lens)
        if self._calibration is not None:
            self._calibration.require_model(lenses.recognise(self.model, self.lens))
        self.candidates = self.rule.candidates(self.backbone.n_layers, self.lens.available)
        self.decoder: Decoder = spade
        if self.rule.readout == "lens":
            # The identity too: at position 0 it answers with the start token's own state.
            self.decoder = Linear(self.lens)
        if self.rule.never:
            log.warning(
                "threshold=%s can be met by no %s: nothing exits, no check is made.",
                self.rule.threshold, self.rule.confidence,
            )  # fmt: skip
        if self._positions == "keep" and self.backbone.positions_inert:
            log.warning("positions=keep has no effect on the tails of %s.", self.backbone.name)
        self._rule = self.rule
        self._log = None if log_path is None else ExitLog(log_path, self.rank)
        self._stayed: list[NDArray[np.float32]] = []  # confidences of what did not exit

    def _check_config(self, n_layers: int) -> None:
        lenses.require_depth(self._loaded, n_layers, self._lens_name, self._model_source)
        maps = range(n_layers + 1) if self._loaded is None else self._loaded.available
        self.rule.candidates(n_layers, maps)

    def _prices(self, head: float) -> Prices:
        return lenses.prices(self.backbone, head, self._loaded, self.rule)

    # ------------------------------------------------------------------ requests

    decides = True

    def _policy(self) -> Policy:
        return Policy.exits(self.backbone.n_layers, self.decoder, self.rule, self.lens)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """As in `SpadeLM`; every token decides for itself."""
        if self.rule.confidence == "choice_entropy":
            tasks = ", ".join(sorted({str(request.task_name) for request in requests}))
            raise UserError(
                f"{tasks}: confidence=choice_entropy needs answer choices, and whole texts have "
                "none. Use confidence=entropy."
            )
        self._rule = replace(self.rule, exit_scope="token")
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm)
        finally:
            self._rule = self.rule

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> str:
        """As in HFLM; a calibration without it says nothing of such prompts."""
        if self._calibration is not None and not self._calibration.apply_chat_template:
            raise UserError(
                f"threshold={WORD} holds for runs without --apply_chat_template. Calibrate with "
                f"it, or give threshold={self._calibration.threshold} without a guarantee."
            )
        return super().apply_chat_template(*args, **kwargs)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """As in `SpadeLM`."""
        if self._calibration is not None:
            tasks = {str(request.task_name) for request in requests}
            self._calibration.require_tasks(tasks, whole=False)
        return super().generate_until(requests, disable_tqdm)

    def _prepare(self, requests: Sequence[TokenRequest]) -> None:
        if self._calibration is not None:
            # Of several processes each has some documents, and a cache keeps known ones back.
            whole = self.world_size == 1 and self.cache_hook.dbdict is None
            self._calibration.require_tasks(set(self._source.tasks), whole)
        if self.rule.never:
            return
        if self.rule.confidence != "choice_entropy":
            if self._rule.exit_scope == "context":
                warn_of_shared_beginnings(requests)
            return
        self._choices = first_tokens(requests, self._instances)
        warn_of_single_choices(self._choices)
        if self.cache_hook.dbdict is not None:
            claim_choices(self.cache_hook.dbdict, requests, self._choices)

    @property
    def _needs_whole_contexts(self) -> bool:  # type: ignore[override]
        return self.rule.confidence == "choice_entropy"

    # States of 1,000 tokens take 2.3 MB for 135M in fp32, 8 MB for 7B in bf16.
    most_tokens_at_once = 8192

    def _score(self, batches: Sequence[Batch], account: Account) -> list[Answers]:
        dtype = self.softmax_dtype or torch.float32
        known = self.backbone.starts.computed
        if self._rule.never:
            traces = [self._full_depth(batch, dtype) for batch in batches]
        else:
            traces = score_with_exits(
                self.backbone, batches, self.decoder, self.lens, self._rule, self._choices, dtype
            )
        starts = self.backbone.starts.computed - known
        for batch, trace in zip(batches, traces, strict=True):
            self._count(batch, trace, starts, account)
            starts = 0  # once for all of them
        return [trace.answers for trace in traces]

    def _count(self, batch: Batch, trace: Trace, starts: int, account: Account) -> None:
        who = trace.decisions
        layers = trace.exit_layers[who.member_of][who.read_from]
        tails = self.decoder.tails(self.backbone, batch.scored_positions)
        account.add(batch, self._source, self.prices, trace.passed, layers, tails, starts)
        account.add_exits(batch, self._source, self.prices, who, trace.exit_layers, trace.checked)
        if account is not self.account:
            return
        self._stayed.append(trace.confidence[trace.exit_layers == self.backbone.n_layers])
        if self._log is not None:
            self._log.scored(batch, trace, layers, self._named)

    def _summary(self) -> str:
        """As in `SpadeLM`; where next to nothing exits, a threshold at which some would."""
        exits = self.account.total.exits
        n = exits.total()
        left = n - exits[self.backbone.n_layers]
        values = np.concatenate([*self._stayed, np.zeros(0, dtype=np.float32)])
        values = values[np.isfinite(values)]
        if left > n * RARE or not len(values):
            return super()._summary()
        tenth = np.quantile(values, 0.1 if CONFIDENCES[self.rule.confidence].low else 0.9)
        return (
            f"{super()._summary()}\n{left} of {n} decisions exited. At the last candidate, layer "
            f"{self.candidates[-1]}, the median of {self.rule.confidence} is "
            f"{np.median(values):.3g}: threshold={tenth:.3g} would let about a tenth exit there. "
            "`spade-eval sweep` tells what each threshold costs."
        )

    def _full_depth(self, batch: Batch, dtype: torch.dtype) -> Trace:
        """What a threshold that nothing can meet comes to."""
        n_layers = self.backbone.n_layers
        who = decide(batch, self._rule.exit_scope)
        return Trace(
            answers=score(self.backbone, batch, LogitLens(), n_layers, dtype),
            decisions=who,
            exit_layers=np.full(who.count, n_layers),
            confidence=np.full(who.count, np.nan, dtype=np.float32),
            passed=np.full(batch.ids.shape, n_layers),
            checked=np.zeros(who.count, dtype=np.int64),
        )

    def count_generated(self, run: Generated, requests: Ints, starts: int) -> None:
        """As in `SpadeLM`; the tokens go to the log too."""
        super().count_generated(run, requests, starts)
        if self._log is not None:
            self._log.generated(run, requests, self._named)

    def _named(self, request: int) -> dict[str, object] | None:
        """Whose a request is, for the log; None for one that is there twice."""
        if not self._source.counted[request]:
            return None
        instance = self._instances[request] if self._instances else None
        return {
            "task": getattr(instance, "task_name", None),
            "doc": getattr(instance, "doc_id", None),
            "request": getattr(instance, "idx", request),
        }

    def _settings(self) -> dict[str, object]:
        return {
            "decoder": self.name,
            **self.rule.describe(),
            "positions": "inert" if self.backbone.positions_inert else self._positions,
            "candidates": list(self.candidates),
            **lenses.describe(self.lens, self._lens_name),
        }


class LensExitLM(SpadeExitLM):
    """`--model lens_exit`: `spade_exit` with `readout=lens` by default.

    With `lens=identity` or a tuned lens these are the early exits of the literature.
    """

    name = "lens_exit"
    default_readout: Readout = "lens"


def _calibration(threshold: object, path: str | Path | None) -> Calibration | None:
    """The calibration that is asked for, if one is.

    Raises:
        UserError: It cannot be read, or is not asked for.
    """
    if threshold == WORD:
        return Calibration.load(path or NAME)
    if path is not None:
        raise UserError(f"calibration={path} goes with threshold={WORD}; {threshold!r} was given.")
    return None
