"""A guard for lm-eval's `--use_cache`, whose keys hold the request alone.

Without it, a run at another layer, threshold or model would be answered from the file of the first.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch

from spade_eval import __version__
from spade_eval.errors import UserError, differences
from spade_eval.fingerprint import adapter_fingerprint, config_digest, weights_digest

if TYPE_CHECKING:
    from collections.abc import Mapping, MutableMapping, Sequence

    from spade_eval.lm.requests import TokenRequest

KEY = "spade_eval:fingerprint"


def guard(responses: MutableMapping[str, Any], configuration: dict[str, object]) -> None:
    """Claim an empty response cache, or make sure that it is ours.

    Raises:
        UserError: The cache belongs to another configuration; names what differs.
    """
    seen = responses.get(KEY)
    if seen is None and len(responses):
        raise UserError(
            "This --use_cache file holds answers of an unknown model: spade_eval did not begin it. "
            "Give another --use_cache path."
        )
    if seen is not None and seen != configuration:
        raise UserError(
            "This --use_cache file holds answers of another configuration "
            f"({differences(seen, configuration)}). "
            "Give another --use_cache path, one per configuration."
        )
    responses[KEY] = configuration


def claim_choices(
    responses: MutableMapping[str, Any],
    requests: Sequence[TokenRequest],
    choices: Mapping[int, Sequence[int]],
) -> None:
    """Note which choices each context has, and make sure that they are all it ever had.

    A key of the cache is a context and one answer, but under `choice_entropy` an answer depends on
    the others: those of another task with the same contexts would be taken for this one's.

    Args:
        responses: The cache.
        requests: Those that it has no answers to.
        choices: For each the first tokens of its context's continuations.

    Raises:
        UserError: A context has had other choices.
    """
    claims: dict[str, list[int]] = {}
    for index, (texts, context, _) in enumerate(requests):
        if texts is None or len(context) == 1:  # at position 0 nothing is decided
            continue
        own = list(choices[index])
        if claims.setdefault(texts[0], own) != own:
            raise _other_choices(texts[0])
    new: dict[str, list[int]] = {}
    for text, own in claims.items():
        key = f"{KEY}:choices:{hashlib.sha256(text.encode()).hexdigest()}"
        if (known := responses.get(key)) is None:
            new[key] = own
        elif known != own:
            raise _other_choices(text)
    # After all have been looked at: what is refused leaves nothing behind.
    for key, own in new.items():
        responses[key] = own


def _other_choices(context: str) -> UserError:
    return UserError(
        "confidence=choice_entropy with --use_cache: two tasks, or two documents, ask the same "
        f"with other choices ({context[-60:]!r}), and one file cannot tell their answers apart. "
        "Leave --use_cache out, or give each task a path of its own."
    )


class Partial:
    """Hands answers on to lm-eval's response cache as they come, so that they survive a kill.

    Args:
        hook: lm-eval's hook.
        requests: The requests; those without texts are not cached.
        whole_contexts: Whether to hold a context's answers back until it has them all: lm-eval
            asks again for the missing ones alone.
    """

    def __init__(self, hook: Any, requests: Sequence[TokenRequest], *, whole_contexts: bool):
        self.hook, self.requests, self.whole = hook, requests, whole_contexts
        self.missing = Counter(tuple(r[1]) for r in requests) if whole_contexts else Counter()
        self.held: dict[tuple[int, ...], list[tuple[int, tuple[float, bool]]]] = {}

    def add(self, index: int, answer: tuple[float, bool]) -> None:
        """A request's answer."""
        ready = [(index, answer)]
        if self.whole:
            context = tuple(self.requests[index][1])
            ready = self.held.setdefault(context, [])
            ready.append((index, answer))
            self.missing[context] -= 1
            if self.missing[context]:
                return
            del self.held[context]
        for at, value in ready:
            if (text := self.requests[at][0]) is not None:
                self.hook.add_partial("loglikelihood", text, value)


def configuration(lm: Any, settings: dict[str, object]) -> dict[str, object]:
    """Everything that an answer of an HFLM object depends on.

    Args:
        lm: The object.
        settings: Its decoder's settings.
    """
    return {
        **settings,
        "package_version": __version__,
        "config": config_digest(lm.model.config),
        "weights": weights_digest(lm.model),
        "adapter": adapter_fingerprint(lm.model),  # the active one; all are among the weights
        "revision": str(lm.revision),
        "peft": lm.peft,
        "delta": lm.delta,
        "dtype": str(lm.model.dtype),
        "softmax_dtype": str(lm.softmax_dtype or torch.float32),
        "mixed_precision_dtype": str(lm.mixed_precision_dtype),
        "tokenizer": lm.tokenizer.name_or_path,
        "max_length": lm.max_length,
        "add_bos_token": lm.add_bos_token,
        "prefix_token_id": lm.prefix_token_id,
        "think_end_token": lm.think_end_token,
        "generation_config": config_digest(lm.model.generation_config),
    }
