"""Shared by the tests of models: small models whose parameters all matter, and the comparison of tensors."""

import torch

from svmini import GPT, GPTConfig, ViTConfig

SMALL_GPT = GPTConfig(vocab_size=31, block_size=10, n_layer=2, n_head=3, d_model=12)
SMALL_VIT = ViTConfig(image_size=12, patch_size=4, in_channels=3, num_classes=5, n_layer=2, n_head=3, d_model=12)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def perturb(model, seed=0):
    """Move every parameter away from its start, because zeros and ones hide mistakes; returns the model in eval mode."""
    g = seeded(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g))
    return model.eval()


def gpt(config=SMALL_GPT, seed=0):
    return perturb(GPT(config), seed)


def tokens(*shape, seed=0):
    return torch.randint(SMALL_GPT.vocab_size, shape, generator=seeded(seed))


def images(*shape, seed=2):
    return torch.randn(*shape, generator=seeded(seed))


def same_tensors(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)
