"""The lm-eval classes against HFLM, on tiny models: same answers at the last layer, different ones
below it."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from zoo import BYTES, byte_tokenizer, tiny

from spade_eval.lm.layer import LogitLensLM, SpadeLayerLM

ATOL = 1e-4
MAX_LENGTH = 60
WORDS = [
    "red",
    "blue",
    "old",
    "cat",
    "dog",
    "runs",
    "sleeps",
    "under",
    "over",
    "the",
    "moon",
    "7",
    "12",
]


def model(family: str = "llama") -> Any:
    return tiny(family, vocab_size=BYTES, max_position_embeddings=256)


def build(cls: type[HFLM], family: str = "llama", **kwargs: Any) -> Any:
    kwargs = {"batch_size": 4, "max_length": MAX_LENGTH, "tokenizer": byte_tokenizer()} | kwargs
    return cls(pretrained=model(family), **kwargs)


def instances(
    pairs: list[tuple[str, ...]], kind: str = "loglikelihood", task: str = "task"
) -> list[Instance]:
    """One document for each context."""
    docs = {pair[0]: i for i, pair in reversed([*enumerate(pairs)])}
    return [
        Instance(
            request_type=kind, doc={}, arguments=pair, idx=0, metadata=(task, docs[pair[0]], 1)
        )
        for pair in pairs
    ]


def dies_at(lm: Any, call: int) -> None:
    """Let a model be killed in its n-th call of `_score`, from 1 on."""
    score, calls = lm._score, []

    def die(batches: Any, account: Any) -> Any:
        calls.append(batches)
        if len(calls) == call:
            raise KeyboardInterrupt
        return score(batches, account)

    lm._score = die


def text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


def task_pairs(seed: int = 0) -> list[tuple[str, str]]:
    """Requests of every shape that tasks make: several answers, one-token answers, shared endings,
    no context."""
    rng = random.Random(seed)
    pairs = []
    for _ in range(6):
        question = f"Q: {text(rng, rng.randint(1, 5))}\nA:"
        pairs += [(question, " " + text(rng, rng.randint(1, 3))) for _ in range(4)]
        pairs += [(question, " A"), (question, " B")]
        pairs += [(question, letter) for letter in "ABCD"]  # one-token answers
        pairs += [(f"{text(rng, 2)} because {option}", " ends") for option in ("he", "she")]
    pairs += [("", " starts here"), ("spaces  ", "after"), ("same", " twice"), ("same", " twice")]
    rng.shuffle(pairs)
    return pairs


def close(ours: list, theirs: list) -> None:
    assert [g for _, g in ours] == [g for _, g in theirs]
    torch.testing.assert_close([x for x, _ in ours], [x for x, _ in theirs], atol=ATOL, rtol=0)


@pytest.mark.parametrize("layout", ["packed", "dense"])
@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "mistral_sliding",
        "gemma2",
        "gemma3",
        "gpt2",
        "gpt_neo",
        "bloom",
        "gpt_oss",
        "mamba",
        "lfm2",
        "qwen3_next",
    ],
)
@pytest.mark.parametrize("cls", [SpadeLayerLM, LogitLensLM])
def test_at_the_last_layer_answers_are_those_of_hflm(cls: type, family: str, layout: str) -> None:
    requests = instances(task_pairs())
    ours = build(cls, family, layer=-1, logits_cache=layout == "packed")
    close(ours.loglikelihood(requests), build(HFLM, family).loglikelihood(requests))
    # Windows of five tokens leave no context that could be packed.
    packs = layout == "packed" and family in ("llama", "gpt2")
    assert bool(ours.account.total.requests_packed) == packs


@pytest.mark.parametrize("family", ["mistral_sliding", "gemma2", "gemma3", "gpt_oss"])
def test_contexts_shorter_than_a_window_are_packed(family: str) -> None:
    """Beside longer ones, which are not."""
    requests = instances(task_pairs())
    network = tiny(family, vocab_size=BYTES, max_position_embeddings=256, sliding_window=30)
    common = {"pretrained": network, "batch_size": 4, "max_length": MAX_LENGTH}
    ours = SpadeLayerLM(layer=-1, tokenizer=byte_tokenizer(), **common)
    theirs = HFLM(tokenizer=byte_tokenizer(), **common)
    close(ours.loglikelihood(requests), theirs.loglikelihood(requests))
    unbounded = build(SpadeLayerLM, layer=-1)
    unbounded.loglikelihood(requests)
    assert 0 < ours.account.total.requests_packed < unbounded.account.total.requests_packed


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_rolling_is_that_of_hflm(family: str) -> None:
    rng = random.Random(1)
    pages = instances(
        [(text(rng, n),) for n in (40, 3, 25, 1, 60)] + [("",)], "loglikelihood_rolling"
    )
    ours = build(SpadeLayerLM, family, layer=-1).loglikelihood_rolling(pages)
    theirs = build(HFLM, family).loglikelihood_rolling(pages)
    torch.testing.assert_close(ours, [float(x) for x in theirs], atol=ATOL * 3, rtol=0)


def test_token_ids_from_elsewhere_are_not_booked_on_the_last_task() -> None:
    lm = build(SpadeLayerLM, layer=2)
    lm.loglikelihood(instances([("Q: the cat", " runs")]))
    lm._loglikelihood_tokens([(None, [3, 4], [5])])
    assert set(lm.account.tallies) == {"task", "unknown"}


@pytest.mark.parametrize("cls", [SpadeLayerLM, LogitLensLM])
def test_layer_changes_the_scores_of_multi_token_answers(cls: type) -> None:
    """LayerSkip's adapter scored multiple choice with the full model whatever the exit layer."""
    requests = instances([("Q: the cat", " sleeps under"), ("Q: the cat", " runs over")])
    scores = [[x for x, _ in build(cls, layer=i).loglikelihood(requests)] for i in (1, 2, 3, 4)]
    for i, a in enumerate(scores):
        for b in scores[:i]:
            assert abs(a[0] - b[0]) > 0.01
            assert abs(a[1] - b[1]) > 0.01


@pytest.mark.parametrize("arguments", [{}, {"positions": "keep"}, {"start": "none"}])
def test_scores_do_not_depend_on_batching_order_padding_or_layout(arguments: dict) -> None:
    pairs = task_pairs(2)
    reference = build(SpadeLayerLM, layer=2, batch_size=1, logits_cache=False, **arguments)
    expected = dict(zip(pairs, reference.loglikelihood(instances(pairs)), strict=True))
    for seed, batch_size, cache in [(1, 1, True), (2, 4, True), (3, 16, True), (4, 16, False)]:
        random.Random(seed).shuffle(pairs)
        lm = build(SpadeLayerLM, layer=2, batch_size=batch_size, logits_cache=cache, **arguments)
        close(lm.loglikelihood(instances(pairs)), [expected[p] for p in pairs])


def test_start_and_positions_reach_the_decoder() -> None:
    requests = instances(task_pairs(3))
    runs = [
        [x for x, _ in build(SpadeLayerLM, layer=2, **arguments).loglikelihood(requests)]
        for arguments in ({}, {"positions": "keep"}, {"start": "none"})
    ]
    for i, a in enumerate(runs):
        for b in runs[:i]:
            assert max(abs(x - y) for x, y in zip(a, b, strict=True)) > 0.1


def test_equal_tokens_split_at_different_points() -> None:
    """HFLM 0.4.13 reads the shorter continuation from the first positions of the longer one."""
    pairs = [("abcd", "ef"), ("abcde", "f")]
    ours = build(SpadeLayerLM, layer=-1).loglikelihood(instances(pairs))
    alone = [build(HFLM).loglikelihood(instances([pair]))[0] for pair in pairs]
    close(ours, alone)
    together = build(HFLM).loglikelihood(instances(pairs))
    assert abs(together[1][0] - alone[1][0]) > 0.01, "HFLM is mended: compare with it again"


# ---------------------------------------------------------------- the start token


def start_tokens(lm: Any, pairs: list[tuple[str, str]]) -> list[int]:
    """The first token of each sequence as fed, in the order of the requests."""
    seen: dict[int, int] = {}
    score = lm._score

    def look(batches: Any, account: Any) -> Any:
        for batch in batches:
            for request, at in zip(batch.requests, batch.read_at, strict=True):
                seen[int(request)] = int(batch.start_ids[at])
        return score(batches, account)

    lm._score = look
    lm.loglikelihood(instances(pairs))
    return [seen[i] for i in range(len(pairs))]


def test_the_start_token_is_the_first_token_or_the_bos_that_was_asked_for() -> None:
    pairs = [("abc", "d"), ("", "xy"), ("<bos>abc", "d")]
    tokenizer = byte_tokenizer()
    a, bos = tokenizer.encode("a")[0], tokenizer.bos_token_id
    assert start_tokens(build(SpadeLayerLM, layer=2), pairs) == [a, bos, bos]
    assert start_tokens(build(SpadeLayerLM, layer=2, add_bos_token=True), pairs) == [bos, bos, bos]


def test_bos_is_never_doubled_after_a_chat_template() -> None:
    lm = build(SpadeLayerLM, layer=2, add_bos_token=True)
    lm.tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    try:
        prompt = lm.apply_chat_template([{"role": "user", "content": "hello"}])
    finally:
        lm.tokenizer.chat_template = None
    assert prompt == "<bos>hello"
    context, _ = lm._encode_pair(prompt, " you")
    assert context.count(lm.tokenizer.bos_token_id) == 1
    assert lm._encode_pair("hello", " you")[0] == context


def test_truncation_keeps_a_special_start_warns_and_is_counted(caplog: Any) -> None:
    pairs = [("a" * 100, "b"), ("short", "b"), ("<bos>" + "c" * 100, "d")]
    lm = build(SpadeLayerLM, layer=2)
    bos = lm.tokenizer.bos_token_id
    assert start_tokens(lm, pairs)[2] == bos
    assert lm.account.truncated_requests == 2
    assert caplog.text.count("lose their left end") == 1
    # Without a special token in front the cut is that of HFLM.
    theirs = build(HFLM).loglikelihood(instances(pairs[:2]))
    close(build(SpadeLayerLM, layer=-1).loglikelihood(instances(pairs[:2])), theirs)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_eager_attention_is_known_to_the_layout(attention: str) -> None:
    network = copy.deepcopy(model("llama"))
    network.set_attn_implementation(attention)
    lm = SpadeLayerLM(network, layer=2, tokenizer=byte_tokenizer())
    assert lm.layout.quadratic == (attention == "eager")


def test_rows_are_no_wider_than_a_model_takes_that_scales_by_column() -> None:
    """Llama 4 scales queries by the column of a row, from `floor_scale` on."""
    config = transformers.Llama4TextConfig(
        vocab_size=BYTES, hidden_size=32, intermediate_size=48, intermediate_size_mlp=48,
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        max_position_embeddings=512, num_local_experts=2, num_experts_per_tok=1,
        initializer_range=0.3, no_rope_layers=[1, 0, 1, 0], attention_chunk_size=512,
        floor_scale=64, attn_scale=1.0, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    network = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    shared = text(random.Random(0), 5)
    asked = instances([(f"{shared} {w}?", f" {x}") for w in "klmnop" for x in ("yes", "no", "so")])
    arguments = {"tokenizer": byte_tokenizer(), "max_length": 500, "batch_size": 8}
    lm = SpadeLayerLM(network, layer=-1, **arguments)
    close(lm.loglikelihood(asked), HFLM(pretrained=network, **arguments).loglikelihood(asked))
    assert lm.account.total.requests_packed > 1


def test_prefix_token_id_stands_in_for_an_empty_context() -> None:
    kwargs = {"prefix_token_id": 77}
    ours = build(SpadeLayerLM, layer=-1, **kwargs).loglikelihood(instances([("", "xyz")]))
    theirs = build(HFLM, **kwargs).loglikelihood(instances([("", "xyz")]))
    close(ours, theirs)
    assert start_tokens(build(SpadeLayerLM, layer=1, **kwargs), [("", "xyz")]) == [77]


# ---------------------------------------------------------------- accounts and settings


def test_the_account_says_what_the_layers_saw() -> None:
    lm = build(SpadeLayerLM, layer=3, batch_size=8)
    starts = -lm.backbone.starts.computed
    seen = [0] * 4
    handles = [
        layer.register_forward_hook(
            lambda _m, _a, out, i=i: seen.__setitem__(i, seen[i] + out.shape[0] * out.shape[1])
        )
        for i, layer in enumerate(lm.backbone._layers)
    ]
    lm.loglikelihood(instances([*task_pairs(4), ("", "first position")]))
    for handle in handles:
        handle.remove()
    spade = lm.get_model_info()["spade"]
    account = spade["account"]
    assert (spade["decoder"], spade["layer"], spade["layers"]) == ("spade", 3, 4)
    assert account["requests"] == 77
    assert account["requests_packed"] + account["requests_dense"] == 77
    starts += lm.backbone.starts.computed  # each start token ran through all layers once
    padded = account["tokens"] + account["padding"] + starts
    tails = account["positions_scored"] - account["first_positions"]
    assert seen == [padded, padded, padded, tails + starts]
    assert account["first_positions"] == 2
    assert account["main_token_layers"] == 3 * account["tokens"]
    assert account["tail_token_layers"] == tails
    assert account["start_token_layers"] == 4 * starts
    heads = lm.prices.head * account["positions_scored"]
    assert account["head_token_layers"] == pytest.approx(heads, abs=0.1)
    assert account["full_depth_token_layers"] == pytest.approx(
        4 * account["tokens"] + heads, abs=0.1
    )
    assert account["tokens"] < account["tokens_hf"]
    assert account["seconds"] > 0


def test_logits_lens_runs_no_layer_above_its_own() -> None:
    lm = build(LogitLensLM, layer=2)

    def fail(*_: object) -> None:
        raise AssertionError("layer 3 ran")

    handle = lm.backbone._layers[2].register_forward_hook(fail)
    lm.loglikelihood(instances(task_pairs(5)))
    handle.remove()


@pytest.mark.parametrize("schedule", ["auto", "auto:3"])
def test_automatic_batch_size_gives_the_same_answers(schedule: str) -> None:
    requests = instances(task_pairs(6))
    lm = build(SpadeLayerLM, layer=2, batch_size=schedule, max_batch_size=8)
    close(lm.loglikelihood(requests), build(SpadeLayerLM, layer=2).loglikelihood(requests))
    assert set(lm.batch_sizes.values()) == {8}
    assert len(lm.batch_sizes) == (1 if schedule == "auto" else 3)


def test_automatic_batch_size_shrinks_until_the_largest_batch_fits() -> None:
    lm = build(SpadeLayerLM, layer=2, batch_size="auto", max_batch_size=16)
    requests = instances(task_pairs(8))
    expected = build(SpadeLayerLM, layer=2).loglikelihood(requests)
    lm._device = torch.device("meta")  # anything but the CPU, where memory does not run out in time
    score, sizes = lm._score, []

    def run_out_of_memory(batches: Any, account: Any) -> Any:
        sizes.append(sum(batch.ids.size for batch in batches))
        if sizes[-1] > 400:
            raise RuntimeError("CUDA out of memory.")
        return score(batches, account)

    lm._run = run_out_of_memory
    close(lm.loglikelihood(requests), expected)
    assert max(sizes) > 400 >= max(sizes[-3:])


def test_softmax_dtype_and_mixed_precision_are_honoured() -> None:
    requests = instances(task_pairs(7))
    exact = build(SpadeLayerLM, layer=2).loglikelihood(requests)
    for kwargs, least, most in [
        ({"softmax_dtype": "bfloat16"}, 1e-3, 2.0),
        ({"mixed_precision_dtype": "bfloat16"}, 1e-3, 5.0),
        ({"softmax_dtype": "float64"}, 0.0, 1e-4),
    ]:
        rough = build(SpadeLayerLM, layer=2, **kwargs).loglikelihood(requests)
        gap = max(abs(x - y) for (x, _), (y, _) in zip(rough, exact, strict=True))
        assert least <= gap <= most, kwargs


def test_both_names_of_version_2_reach_the_same_class() -> None:
    import lm_eval.models  # noqa: F401 - the registry fills on import
    from lm_eval.api.registry import get_model

    from spade_eval.plugin import register

    register()
    assert get_model("simlens") is get_model("spade_layer") is SpadeLayerLM
    assert get_model("logit_lens") is LogitLensLM
    assert get_model("hf") is HFLM


def _rank(rank: int, folder: str) -> None:
    """One of two processes that share the requests, as ranks of a data-parallel run do."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    lm = build(SpadeLayerLM, layer=2)
    lm._rank, lm._world_size = rank, 2
    lm.loglikelihood(instances(task_pairs())[rank::2])
    if rank == 0:
        Path(folder, "account.json").write_text(json.dumps(lm.account.report()))
    torch.distributed.destroy_process_group()


def test_two_ranks_keep_one_account(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    merged = json.loads((tmp_path / "account.json").read_text())
    alone = [build(SpadeLayerLM, layer=2) for _ in range(2)]
    for rank, lm in enumerate(alone):
        lm.loglikelihood(instances(task_pairs())[rank::2])
    for key in ("requests", "positions_scored", "tokens", "tail_token_layers"):
        assert merged[key] == sum(getattr(lm.account.total, key) for lm in alone)
