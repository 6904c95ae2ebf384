"""`generate_until` as lm-eval calls it: HFLM's texts at full depth, the policy's below it."""

from __future__ import annotations

import copy
import json
import random
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from test_lm import MAX_LENGTH, build, text
from test_lm_exit import lens
from tokenizers.processors import TemplateProcessing
from zoo import BYTES, byte_tokenizer

from spade_eval.decoders import Linear, LogitLens, Spade
from spade_eval.errors import UserError
from spade_eval.exits import ExitRule
from spade_eval.generation import generate
from spade_eval.lens import LinearLens
from spade_eval.lm.exit import LensExitLM, SpadeExitLM
from spade_eval.lm.layer import LogitLensLM, LSpadeLM, SpadeLayerLM
from spade_eval.policy import Policy

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("one_thread")

EVERY = {"lens": "identity", "interval": 1, "min_layer": 1}
GREEDY = {"until": ["\n"], "max_gen_toks": 10, "do_sample": False}


def requests(*settings: dict[str, Any], n: int = 4, seed: int = 0, task: str = "task") -> list[Instance]:  # fmt: skip
    """Questions of different lengths, each with every setting."""
    rng = random.Random(seed)
    contexts = [f"Q: {text(rng, 1 + i)}\nA:" for i in range(n)]
    return [
        Instance("generate_until", {}, (context, dict(given)), k, (task, i, 1))
        for i, context in enumerate(contexts)
        for k, given in enumerate(settings)
    ]


# ---------------------------------------------------------------- the model itself


@pytest.mark.parametrize(
    "arguments", [{}, {"prefix_token_id": 2}, {"add_bos_token": False}, {"truncation": True}]
)
def test_prompts_are_those_of_hflm(arguments: dict[str, Any]) -> None:
    tokenizer = copy.deepcopy(byte_tokenizer())
    tokenizer.model_max_length = 20  # of truncation=True
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    asked = [
        Instance("generate_until", {}, (context, GREEDY), 0, ("task", i, 1))
        for i, context in enumerate(["abc d", "<bos>abc d", "Q: " + "which of them " * 3])
    ]
    given = {"tokenizer": tokenizer, "batch_size": 1, "max_length": 99, **arguments}
    theirs = build(HFLM, **given).generate_until(asked)
    assert build(SpadeLayerLM, layer=-1, **given).generate_until(asked) == theirs


def test_texts_that_switch_to_other_frequencies_are_refused_before_the_first() -> None:
    """The keys that longrope gave a prompt of up to 40 tokens are of no use behind the 40th."""
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4,
        "long_factor": [4.0, 6.0, 8.0, 10.0], "original_max_position_embeddings": 40,
    }  # fmt: skip
    config = transformers.Phi3Config(
        vocab_size=BYTES, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=160,
        original_max_position_embeddings=40, initializer_range=0.3, rope_parameters=rope,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    network = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    given = {"tokenizer": byte_tokenizer(), "batch_size": 1, "max_length": 150}
    lm = SpadeLayerLM(network, layer=-1, **given)

    def asked(*lengths: int) -> list[Instance]:
        contexts = ["".join(random.Random(n).choices("abcdef ", k=n)) for n in lengths]
        return [
            Instance("generate_until", {}, (c, GREEDY), 0, ("t", i, 1))
            for i, c in enumerate(contexts)
        ]

    theirs = HFLM(pretrained=network, **given).generate_until(asked(12, 31, 41))
    assert lm.generate_until(asked(12, 31, 41)) == theirs
    for length in (32, 40):
        with pytest.raises(UserError, match=rf"task t: A prompt has {length} .*\(longrope\).* 40"):
            lm.generate_until(asked(12, length))
    assert lm.account.total.generated_tokens <= 3 * 10  # those of the first call
    # The longest text of a batch decides for all of them: they run apart.
    many = SpadeLayerLM(network, layer=-1, **{**given, "batch_size": 4})
    assert many.generate_until(asked(12, 60, 20, 45)) == lm.generate_until(asked(12, 60, 20, 45))
    ids = torch.full((2, 60), 5)
    mask = torch.ones_like(ids)
    mask[0, :40] = 0
    with pytest.raises(UserError, match=r"Prompts of 20 and 60 tokens.*Generate them apart"):
        generate(lm.backbone, lm.policy, input_ids=ids, attention_mask=mask, max_new_tokens=5)


@pytest.mark.parametrize(("family", "batch_size"), [("llama", 1), ("llama", 4), ("gpt2", 3)])
def test_at_full_depth_texts_are_those_of_hflm(family: str, batch_size: int) -> None:
    settings = [
        GREEDY,
        {"until": ["a", "\x07", "e "], "max_gen_toks": 24},
        {"until": "r", "max_new_tokens": 9, "temperature": 0.0},
        {"max_gen_toks": 5, "repetition_penalty": 1.3},
    ]
    theirs = build(HFLM, family, batch_size=batch_size).generate_until(requests(*settings, n=3))
    for cls, arguments in (
        (SpadeLayerLM, {"layer": -1}),
        (SpadeExitLM, {"threshold": "-inf", **EVERY}),
    ):
        lm = build(cls, family, batch_size=batch_size, **arguments)
        assert lm.generate_until(requests(*settings, n=3)) == theirs
    assert len({*theirs}) > 6


def test_processors_see_the_padding_of_hflm() -> None:
    """What may not be repeated is the padding too, whose id here is a letter's."""
    asked = requests({"max_gen_toks": 8, "no_repeat_ngram_size": 1})
    short = asked[0].args[0]  # is padded beside the others

    def texts(cls: Any, pad: int, **arguments: Any) -> list[str]:
        tokenizer = byte_tokenizer.__wrapped__()  # one of our own
        tokenizer.pad_token_id = pad
        return build(cls, tokenizer=tokenizer, **arguments).generate_until(asked)

    plain = texts(HFLM, 0)
    letters = [c for c in plain[0] if c.isascii() and c not in short]
    ids = [byte_tokenizer().encode(letter)[0] for letter in letters[:3]]
    expected = [texts(HFLM, pad) for pad in ids]
    assert any(found[0] != plain[0] for found in expected)
    assert [texts(SpadeLayerLM, pad, layer=-1) for pad in ids] == expected


def test_samples_are_those_of_hflm() -> None:
    settings = {"max_gen_toks": 12, "do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 0}
    texts = []
    for cls, arguments in ((HFLM, {}), (SpadeExitLM, {"threshold": -1, **EVERY})):
        lm = build(cls, **arguments)
        lm.generate_until(requests(GREEDY, n=1))  # what loading drew is behind us
        torch.manual_seed(5)
        texts.append(lm.generate_until(requests(settings)))
    assert texts[0] == texts[1]


@pytest.mark.parametrize("end", [byte_tokenizer().encode("r")[0], "r"])
def test_thoughts_are_left_out_as_in_hflm(end: Any) -> None:
    texts = [
        build(cls, think_end_token=end, **arguments).generate_until(requests(GREEDY))
        for cls, arguments in ((HFLM, {}), (SpadeLayerLM, {"layer": -1}))
    ]
    assert texts[0] == texts[1]
    assert texts[0] != build(HFLM).generate_until(requests(GREEDY))


# ---------------------------------------------------------------- below it


def direct(lm: Any, policy: Policy, asked: list[Instance]) -> list[str]:
    """The same, one request at a time and without lm-eval."""
    tokenizer, found = byte_tokenizer(), []
    for instance in asked:
        ids = torch.tensor([tokenizer.encode(instance.args[0])])
        _, run = generate(lm.backbone, policy, input_ids=ids, max_new_tokens=10, do_sample=False)
        found.append(tokenizer.decode(run.tokens[0], skip_special_tokens=True).split("\n")[0])
    return found


@pytest.mark.parametrize(
    ("cls", "arguments", "policy"),
    [
        (SpadeLayerLM, {"layer": 2}, Policy((2,), Spade())),
        (SpadeLayerLM, {"layer": 2, "positions": "keep"}, Policy((2,), Spade(positions="keep"))),
        (SpadeLayerLM, {"layer": 2, "start": "none"}, Policy((2,), Spade(start="none"))),
        (LogitLensLM, {"layer": 3}, Policy((3,), LogitLens())),
        (LSpadeLM, {"layer": 2, "lens": lens()}, Policy((2,), Linear(lens()))),
        (SpadeExitLM, {"threshold": 4.0, **EVERY}, Policy((1, 2, 3, 4), Spade(), ExitRule(4.0), LinearLens.identity(4, 32))),
        (LensExitLM, {"threshold": 4.0, **EVERY}, Policy((1, 2, 3, 4), Linear(LinearLens.identity(4, 32)), ExitRule(4.0), LinearLens.identity(4, 32))),
        (SpadeExitLM, {"threshold": 0.2, "confidence": "max_prob", "lens": lens(), "min_layer": 2}, Policy((2, 4), Spade(), ExitRule(0.2, "max_prob"), lens())),
    ],
    ids=["spade_layer", "keep", "none", "logit_lens", "l_spade", "spade_exit", "lens_exit", "max_prob"],
)  # fmt: skip
def test_each_model_reads_where_it_says(cls: Any, arguments: dict, policy: Policy) -> None:
    asked = requests(GREEDY)
    lm = build(cls, **arguments)
    found = lm.generate_until(asked)
    assert found == direct(lm, policy, asked)
    assert found != build(HFLM).generate_until(requests(GREEDY))
    if cls in (SpadeExitLM, LensExitLM):
        assert len(lm.account.total.exits) > 1


def test_texts_do_not_depend_on_the_batch() -> None:
    asked = requests({"until": ["e", "\x0f"], "max_gen_toks": 12})
    texts = [
        build(SpadeExitLM, threshold=4.0, batch_size=size, **EVERY).generate_until(asked)
        for size in (1, 3, "auto")
    ]
    assert texts[0] == texts[1] == texts[2]


# ---------------------------------------------------------------- contexts


class Fed:
    """The ids that the model's embedding was first given."""

    def __init__(self, lm: Any):
        self.ids: list[list[int]] = []
        embedding = lm.model.get_input_embeddings()
        self.handle = embedding.register_forward_hook(lambda _m, args, _o: self.ids.append(args[0][0].tolist()))  # fmt: skip

    def prompt(self) -> list[int]:
        self.handle.remove()
        return max(self.ids, key=len)


@pytest.mark.parametrize(
    ("context", "arguments", "expected"),
    [
        ("x" * 80, {}, "x" * 50),
        ("<bos>" + "y" + "x" * 80, {}, "<bos>" + "x" * 49),
        ("x" * 80, {"add_bos_token": True}, "<bos>" + "x" * 49),
        ("abc", {"add_bos_token": True}, "<bos>abc"),
        ("", {}, "<bos>"),
        ("abc", {}, "abc"),
    ],
)
def test_what_a_text_begins_with(context: str, arguments: dict, expected: str) -> None:
    lm = build(SpadeLayerLM, layer=2, **arguments)
    assert lm.policy.stops == (2,)  # the check feeds the model too
    fed = Fed(lm)
    lm.generate_until([Instance("generate_until", {}, (context, GREEDY), 0, ("task", 0, 1))])
    assert fed.prompt() == byte_tokenizer().encode(expected)
    assert lm.account.truncated_requests == (len(context) > MAX_LENGTH)


# ---------------------------------------------------------------- the account


def test_the_account_of_texts_by_task() -> None:
    lm = build(SpadeExitLM, threshold=4.0, **EVERY)
    lm.generate_until(requests(GREEDY, task="a") + requests(GREEDY, seed=1, n=2, task="b"))
    report = lm.account.report()
    parts: Any = report["tasks"]
    assert (parts["a"]["requests_generated"], parts["b"]["requests_generated"]) == (4, 2)
    for key in ("requests", "tokens", "generated_tokens", "positions_scored", "main_token_layers"):
        assert report[key] == parts["a"][key] + parts["b"][key]
    total = lm.account.total
    assert total.main_token_layers == (
        total.prompt_token_layers + total.decode_token_layers + total.backfilled_token_layers
    )
    assert total.backfilled_token_layers > 0
    assert total.tokens == total.generated_tokens - 6 + sum(
        len(instance.args[0]) for instance in requests(GREEDY) + requests(GREEDY, seed=1, n=2)
    )
    assert total.exits.total() == total.generated_tokens
    assert total.row_exits.total() == 6
    assert total.tail_token_layers == sum((4 - layer) * n for layer, n in total.exits.items())
    assert total.full_depth_token_layers == pytest.approx(
        total.tokens * 4 + total.generated_tokens * lm.prices.head
    )
    assert lm.account.start_token_layers == 4 * len({r.args[0][0] for r in requests(GREEDY)})
    assert report["tokens_per_second"] == pytest.approx(
        total.generated_tokens / lm.account.generation_seconds, abs=0.01
    )
    assert lm.account.generation_seconds <= lm.account.seconds
    alone = build(SpadeExitLM, threshold=4.0, batch_size=1, **EVERY)
    alone.generate_until(requests(GREEDY, task="a"))
    expected: Any = alone.account.report()["tasks"]["a"]  # type: ignore[index]
    # Rows that share calls compute a few tokens again, and are told so.
    assert parts["a"]["backfilled_token_layers"] > expected["backfilled_token_layers"]
    shared = {
        "main_token_layers",
        "backfilled_token_layers",
        "token_layer_ratio",
        "implied_speedup",
    }
    assert {k: v for k, v in parts["a"].items() if k not in shared} == {
        k: v for k, v in expected.items() if k not in shared
    }


def test_repeated_requests_of_another_rank_do_not_count() -> None:
    lm = build(SpadeExitLM, threshold=4.0, **EVERY)
    asked = requests(GREEDY, n=2)
    texts = lm.generate_until([*asked, asked[-1]])
    assert texts[1] == texts[2]
    assert lm.account.total.requests == 2


def test_the_log_has_a_line_for_every_token(tmp_path: Path) -> None:
    path = tmp_path / "exits.jsonl"
    lm = build(SpadeExitLM, threshold=4.0, exit_log=path, **EVERY)
    lm.generate_until(requests(GREEDY))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    total = lm.account.total
    assert len(lines) == total.generated_tokens
    for layer, n in total.exits.items():
        assert sum(line["exit_layer"] == layer for line in lines) == n
    assert all(line["confidence"] <= 4.0 for line in lines if line["exit_layer"] < 4)
    of_first = [line for line in lines if line["doc"] == 0]
    begin = len(requests(GREEDY)[0].args[0]) - 1
    assert [line["position"] for line in of_first] == [*range(begin, begin + len(of_first))]


def test_a_response_cache_holds_texts(tmp_path: Path) -> None:
    cached = CachingLM(build(SpadeExitLM, threshold=4.0, **EVERY), str(tmp_path / "cache.db"))
    first = cached.generate_until(requests(GREEDY))
    again = CachingLM(build(SpadeExitLM, threshold=4.0, **EVERY), str(tmp_path / "cache.db"))
    assert again.generate_until(requests(GREEDY)) == first
    assert again.lm.account.total.generated_tokens == 0


# ---------------------------------------------------------------- bad input


def test_a_tokenizer_without_an_eos_token() -> None:
    tokenizer = copy.deepcopy(byte_tokenizer())
    tokenizer.eos_token = None
    lm = build(SpadeLayerLM, layer=2, tokenizer=tokenizer)
    with pytest.raises(UserError, match="task task: the tokenizer has no EOS token"):
        lm.generate_until(requests(GREEDY))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 4, "max_gen_toks": 5}, "task task: num_beams=4"),
        ({"max_gen_toks": 0}, "task task: max_gen_toks=0.*from 1 to 59"),
        ({"max_gen_toks": 60}, "task task: max_gen_toks=60: the model takes 60 tokens"),
        ({"num_return_sequences": 2, "max_gen_toks": 5}, "task task: num_return_sequences"),
    ],
)
def test_settings_that_do_not_work_are_named_before_anything_runs(
    settings: dict, message: str
) -> None:
    lm = build(SpadeLayerLM, layer=2)
    with pytest.raises(UserError, match=message):
        lm.generate_until(requests(GREEDY) + requests(settings))
    assert lm.account.total.tokens == 0


def test_choice_entropy_does_not_generate() -> None:
    lm = build(SpadeExitLM, threshold=1.0, confidence="choice_entropy", **EVERY)
    with pytest.raises(UserError, match="choice_entropy needs answer choices"):
        lm.generate_until(requests(GREEDY))


# ---------------------------------------------------------------- a task

TASK = """\
task: mine
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 8}}
metric_list: [{{metric: exact_match}}]
"""


def test_a_task_through_lm_eval(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    questions = [instance.args[0] for instance in requests(GREEDY, n=3)]
    expected = build(HFLM).generate_until(
        [Instance("generate_until", {}, (q, {"until": ["\n"], "max_gen_toks": 8}), 0, ("t", 0, 1)) for q in questions]
    )  # fmt: skip
    data.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in zip(questions, expected, strict=True)))  # fmt: skip
    (tmp_path / "mine.yaml").write_text(TASK.format(data=data))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    lm = build(SpadeExitLM, threshold=-1, **EVERY)
    results = simple_evaluate(model=lm, tasks=["mine"], task_manager=manager, bootstrap_iters=0)
    assert results["results"]["mine"]["exact_match,none"] == 1.0
    assert results["config"]["spade"]["account"]["tasks"]["mine"]["requests_generated"] == 3
