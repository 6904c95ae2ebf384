"""`generate_until`: tasks whose answer is text.

    requests -> by settings, longest context first -> batches, left-padded -> `generate` -> texts

The settings mean what they mean to `--model hf`; texts end at the first stop sequence.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lm_eval.models.utils import (
    Collator,
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.models.utils_hf import MultiTokenEOSCriteria
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import StoppingCriteriaList

from spade_eval.errors import UserError
from spade_eval.generation import Generated, generate, refuse, require_one_range, switch
from spade_eval.lm.memory import fitting

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from spade_eval.lm.base import SpadeLM
    from spade_eval.policy import Policy

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What a task asks of its texts.

    Attributes:
        until: Stop sequences, the EOS token's text among them.
        new: How many tokens a text may have.
        arguments: Arguments of `generate`.
    """

    until: list[str]
    new: int
    arguments: dict[str, Any]

    @classmethod
    def parse(cls, lm: SpadeLM, given: Mapping[str, Any]) -> Settings:
        """Read a task's `generation_kwargs`.

        Raises:
            UserError: Nothing ends a text, or they ask for no token, for more than the model takes,
                or for what generation with exits does not do.
        """
        if lm.eot_token_id is None:
            raise UserError("the tokenizer has no EOS token, which ends a text. Give it one.")
        arguments = dict(normalize_gen_kwargs(dict(given), lm.max_gen_toks))
        eos = lm.tok_decode(lm.eot_token_id, skip_special_tokens=False)
        until = handle_stop_sequences(arguments.pop("until", None), eos=eos)
        new = arguments.pop("max_gen_toks")
        if not 1 <= new < lm.max_length:
            raise UserError(
                f"max_gen_toks={new}: the model takes {lm.max_length} tokens (max_length), of "
                f"which a context needs one; give a number from 1 to {lm.max_length - 1}."
            )
        if arguments.get("num_return_sequences", 1) != 1:
            raise UserError("num_return_sequences: a task takes one text for each request.")
        refuse(arguments)
        if not arguments.get("do_sample"):
            arguments.pop("temperature", None)  # 0, which transformers would warn about
        return cls(until, new, arguments)


class StopRow(MultiTokenEOSCriteria):
    """Lm-eval's criterion for a stop sequence, by row: one that is done costs nothing any more."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Which rows have met the sequence, (B,) bool."""
        super().__call__(input_ids, scores, **kwargs)
        return torch.tensor(self.done_tracker, device=input_ids.device)


def generate_until(
    lm: SpadeLM, requests: Sequence[Any], policy: Policy, disable_tqdm: bool = False
) -> list[str]:
    """Answer requests with generated text.

    Args:
        lm: The model.
        requests: Lm-eval's instances, with (context, generation_kwargs) as arguments.
        policy: Where tokens may be read.
        disable_tqdm: Whether to show no progress.

    Returns:
        The texts, in the requests' order.

    Raises:
        UserError: A task's settings are not valid; names the task.
    """
    begin = time.perf_counter()
    contexts = [lm.context_ids(request.args[0]) for request in requests]
    for request, context in zip(requests, contexts, strict=True):
        try:  # before the first text is generated
            new = Settings.parse(lm, request.args[1]).new
            left = min(len(context), lm.max_length - new)
            require_one_range(lm.backbone, np.array([left]), new)
        except UserError as err:
            raise UserError(f"task {request.task_name}: {err}") from err
    texts: list[str] = [""] * len(requests)
    bar = tqdm(
        total=len(requests),
        disable=disable_tqdm or lm.rank != 0,
        desc="Running generate_until requests",
    )
    for given, indices in _batches(lm, requests, contexts):
        settings = Settings.parse(lm, given)
        batch = [_cut(lm, contexts[index], settings.new) for index in indices]
        known = lm.backbone.starts.computed
        with fitting(lm.batch_size, lm.device):
            run = _run(lm, batch, settings, policy)
        lm.count_generated(run, np.array(indices), lm.backbone.starts.computed - known)
        for index, tokens in zip(indices, run.tokens, strict=True):
            texts[index] = _text(lm, tokens, settings.until)
            lm.cache_hook.add_partial("generate_until", requests[index].args, texts[index])
        bar.update(len(indices))
    bar.close()
    if truncated := lm.account.truncated_requests:
        log.warning(
            "%d of %d contexts left no room for an answer within max_length=%d and lost their left "
            "end; the results carry the count.",
            truncated, len(requests), lm.max_length,
        )  # fmt: skip
    lm.account.generation_seconds += time.perf_counter() - begin
    return texts


def _batches(
    lm: SpadeLM, requests: Sequence[Any], contexts: Sequence[list[int]]
) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """Indices of requests that run together, with the settings they share."""
    jobs = [(*request.args, index) for index, request in enumerate(requests)]
    limit = switch(lm.backbone)  # texts of different frequencies run apart
    collator = Collator(
        jobs,
        # The longest first, so that memory runs out at once or not at all.
        sort_fn=lambda job: (-len(contexts[job[2]]), job[0]),
        group_by="gen_kwargs",
        group_fn=lambda job: {**job[1], "longer": len(contexts[job[2]]) > limit},
    )
    for chunk in collator.get_batched(n=_batch_size(lm), batch_fn=None):
        yield chunk[0][1], [index for _, _, index in chunk]


def _batch_size(lm: SpadeLM) -> int:
    """Contexts that run at once; "auto" tries the model's longest input."""
    if lm.batch_size != "auto":
        return int(lm.batch_size)
    # A CPU has no allocator that fails before the machine does.
    return int(lm.max_batch_size if lm.device.type == "cpu" else lm._detect_batch_size())


def _cut(lm: SpadeLM, ids: list[int], new: int) -> list[int]:
    """Drop the left end of a context that leaves no room for `new` tokens.

    A special token stays at position 0, as in scoring.
    """
    room = lm.max_length - new
    if len(ids) <= room:
        return ids
    lm.account.truncated_requests += 1
    kept = ids[:1] if ids[0] in lm.tokenizer.all_special_ids else []
    return kept + ids[len(ids) - room + len(kept) :]


def _run(lm: SpadeLM, batch: Sequence[list[int]], settings: Settings, policy: Policy) -> Generated:
    """Generate for some contexts at once."""
    rows = [torch.tensor(context) for context in batch]
    # HFLM's padding: logits processors see it.
    pad = partial(pad_sequence, batch_first=True, padding_side="left")
    ids = pad(rows, padding_value=lm.tokenizer.pad_token_id)
    mask = pad([torch.ones_like(row) for row in rows])
    width = ids.shape[1]
    criteria = [StopRow(stop, lm.tokenizer, width, len(batch)) for stop in settings.until]
    autocast = lm.mixed_precision_dtype is not None
    with torch.autocast(lm.device.type, dtype=lm.mixed_precision_dtype, enabled=autocast):
        _, run = generate(
            lm.backbone,
            policy,
            input_ids=ids.to(lm.device),
            attention_mask=mask.to(lm.device),
            stopping_criteria=StoppingCriteriaList(criteria),
            pad_token_id=lm.tokenizer.pad_token_id,
            **({"max_length": width + settings.new} | settings.arguments),
        )
    return run


def _text(lm: SpadeLM, tokens: list[int], until: list[str]) -> str:
    """Decode, drop what a reasoning model thought, and cut at the first stop sequence."""
    end = lm.think_end_token
    if isinstance(end, int) and end in tokens:
        tokens = tokens[len(tokens) - tokens[::-1].index(end) :]
    text = lm.tok_decode(tokens)
    if isinstance(end, int):
        text = text.lstrip()
    by_text = end if isinstance(end, str) else None
    return postprocess_generated_text(text, stop=until, think_end_token=by_text)
