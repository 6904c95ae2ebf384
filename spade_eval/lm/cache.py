"""A guard for lm-eval's `--use_cache`, whose keys hold the request alone.

Without it, a run at another layer, threshold or model would be answered from the file of the first.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spade_eval import __version__
from spade_eval.errors import UserError
from spade_eval.fingerprint import adapter_fingerprint, adapter_scaling

if TYPE_CHECKING:
    from collections.abc import Mapping, MutableMapping, Sequence

    from torch import nn

    from spade_eval.lm.requests import TokenRequest

KEY = "spade_eval:fingerprint"


def guard(responses: MutableMapping[str, Any], fingerprint: dict[str, object]) -> None:
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
    if seen is not None and seen != fingerprint:
        raise UserError(
            "This --use_cache file holds answers of another configuration "
            f"({differences(seen, fingerprint)}). "
            "Give another --use_cache path, one per configuration."
        )
    responses[KEY] = fingerprint


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


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between two settings, for a message; empty if nothing does."""
    names = sorted(name for name in {*was, *now} if was.get(name) != now.get(name))
    return "; ".join(f"{n} was {was.get(n)!r}, is {now.get(n)!r}" for n in names)


def fingerprint(lm: Any, settings: dict[str, object]) -> dict[str, object]:
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


def weights_digest(model: nn.Module) -> str:
    """A hash of 64 numbers of every weight and buffer, evenly spaced: cheap to compute.

    With adapters, of their scaling too, which is in neither.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, Tensor) and tensor.device.type != "meta":  # not offloaded to disk
            digest.update(name.encode())
            flat = tensor.detach().flatten()
            some = flat[:: max(1, len(flat) // 64)]
            digest.update(some.double().cpu().numpy().tobytes())
    digest.update((adapter_scaling(model) or "").encode())
    return digest.hexdigest()[:16]


def config_digest(config: Any) -> str:
    """A hash of a model's config, without where it was loaded from."""
    entries = {k: v for k, v in config.to_dict().items() if not k.startswith("_")}
    return hashlib.sha256(json.dumps(entries, sort_keys=True, default=str).encode()).hexdigest()[
        :16
    ]
