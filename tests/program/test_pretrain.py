"""A base model is pretrained once, kept and guarded; and how far its weights are from their random initialization."""

from dataclasses import replace

import pytest
import torch

from helpers import CPU, Toy, refused, same, tiny_gpt, token_loss, train_config, walk
from svmini import GPT, GPTConfig
from svmini.training import pretrain

CONFIG = train_config(steps=6)


def test_a_base_model_is_kept_and_reused_only_with_the_same_run_config(tmp_path, capsys):
    metadata = {"data": "walk", "tokenizer": ["00"]}
    first, measured = pretrain.pretrain(tiny_gpt(0.2), Toy(), CONFIG, CPU, tmp_path, metadata)
    assert measured["tokenizer"] == ["00"] and measured["published"] is False
    assert measured["metric"] == token_loss(first.eval(), *walk(16, "test", 0)).item()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "model.pt"]
    assert "pretraining on walk" in capsys.readouterr().out
    untrained = Toy(batch=None)
    again, kept = pretrain.pretrain(tiny_gpt(0.2, seed=9), untrained, CONFIG, CPU, tmp_path, metadata)
    assert same(dict(again.state_dict()), dict(first.state_dict())) and kept == measured
    assert f"model.pt, from an earlier run: {measured['result']}" in capsys.readouterr().out
    half = replace(CPU, dtype=torch.bfloat16)
    pretrain.pretrain(tiny_gpt(0.2), untrained, CONFIG, half, tmp_path, metadata)   # the dtype of another device
    for config, dropout, data, difference in (
            (replace(CONFIG, steps=13), 0.2, "walk", "steps was 6 and is 13"),
            (CONFIG, 0.1, "walk", "model.dropout was"), (CONFIG, 0.2, "x", "data was 'walk' and is 'x'")):
        with refused(f"another run config: {difference}", "--out"):
            pretrain.pretrain(tiny_gpt(dropout), Toy(data_config={"data": data}), config, CPU, tmp_path, metadata)


def test_weight_stats_tell_random_weights_from_trained_ones():
    torch.manual_seed(0)
    model = GPT(GPTConfig(7, 8, 1, 2, 64))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    noise = pretrain.weight_stats(model, start)
    assert noise["cosine"] == pytest.approx(1) and 0.25 < noise["energy"] < 0.6
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2:
                p.copy_(torch.outer(torch.randn(p.shape[0]), torch.randn(p.shape[1])))
    trained = pretrain.weight_stats(model, start)
    assert trained["energy"] == pytest.approx(1) and abs(trained["cosine"]) < 0.1
