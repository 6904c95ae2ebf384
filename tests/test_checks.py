"""The checks at load, and the prices that are counted with them, where they are easily fooled."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, MptConfig
from zoo import tiny

from spade_eval import checks
from spade_eval.backbone import Backbone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [0.02, 0.3])
def test_biases_by_column_rule_packed_rows_out_in_every_precision(
    dtype: torch.dtype, spread: float
) -> None:
    """MPT takes a mask of four axes, but no positions."""
    torch.manual_seed(0)
    config = MptConfig(
        d_model=64, n_heads=4, n_layers=4, max_seq_len=256, vocab_size=1000,
        initializer_range=spread,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    assert not Backbone(model).packs


class Quantised(nn.Module):
    """Whole numbers for weights, multiplied by a kernel that no counter knows."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = nn.Parameter((linear.weight.data * 100).to(torch.int8), requires_grad=False)
        self.bias = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.unsqueeze(-2) * (self.weight.to(x.dtype) / 100)).sum(-1)


def test_an_adapter_on_quantised_layers_is_not_the_price_of_a_layer() -> None:
    plain = copy.deepcopy(tiny("llama"))
    ordinary = 24.0 * Backbone(plain).width ** 2
    adapted = get_peft_model(plain, LoraConfig(r=2, target_modules=["q_proj", "v_proj"])).eval()
    for layer in adapted.base_model.model.model.layers:
        for module in list(layer.modules()):
            for name, child in list(module.named_children()):
                if type(child) is nn.Linear and "lora" not in name and name != "default":
                    setattr(module, name, Quantised(child))
    backbone = Backbone(adapted)
    assert backbone.operations == ordinary
    assert checks.head_operations(backbone) / backbone.operations < 1
