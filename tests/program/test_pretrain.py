"""A base of one's own: trained once, kept, guarded, and how far it has come from its random start."""

from dataclasses import replace

import pytest
import torch

from svmini import GPT, GPTConfig
from svmini.errors import InputError
from svmini.training import pretrain
from toy import CPU, Toy, same, train_config, tiny_gpt, token_loss, walk

TRAIN_CONFIG = train_config(steps=6)


def test_a_base_is_kept_reused_and_guarded(tmp_path, capsys):
    metadata = {"data": "walk", "tokenizer": ["00"]}
    first, said = pretrain.pretrain(tiny_gpt(0.2), Toy(), TRAIN_CONFIG, CPU, tmp_path, metadata)
    assert said["tokenizer"] == ["00"] and said["published"] is False
    assert said["metric"] == token_loss(first.eval(), *walk(16, "test", 0)).item()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "model.pt"]
    assert "pretraining on walk" in capsys.readouterr().out
    no_task = Toy(batch=None)
    again, its = pretrain.pretrain(tiny_gpt(0.2, seed=9), no_task, TRAIN_CONFIG, CPU, tmp_path, metadata)   # without resume
    assert same(dict(again.state_dict()), dict(first.state_dict())) and its == said
    assert f"model.pt, kept from an earlier run: {said['result']}" in capsys.readouterr().out
    half = replace(CPU, dtype=torch.bfloat16)
    pretrain.pretrain(tiny_gpt(0.2), no_task, TRAIN_CONFIG, half, tmp_path, metadata)   # another card's dtype
    for s, model, task, word in ((replace(TRAIN_CONFIG, steps=13), tiny_gpt(0.2), Toy(), "steps was 6 and is 13"),
                                 (TRAIN_CONFIG, tiny_gpt(0.1), Toy(), "model.dropout was"),
                                 (TRAIN_CONFIG, tiny_gpt(0.2), Toy(data_config={"data": "x"}), "data was 'walk' and is 'x'")):
        with pytest.raises(InputError, match=f"another run config: {word}.*--out"):
            pretrain.pretrain(model, task, s, CPU, tmp_path, metadata)


def test_how_far_a_base_has_come_from_noise():
    torch.manual_seed(0)
    model = GPT(GPTConfig(7, 8, 1, 2, 64))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    noise = pretrain.weight_stats(model, start)
    assert noise["cosine"] == pytest.approx(1) and 0.25 < noise["energy"] < 0.6
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2:
                p.copy_(torch.outer(torch.randn(p.shape[0]), torch.randn(p.shape[1])))
    learned = pretrain.weight_stats(model, start)
    assert learned["energy"] == pytest.approx(1) and abs(learned["cosine"]) < 0.1
