"""python -m svmini.generate: continue a text with a GPT, with or without an adapter. Prints only the text."""

import sys

import torch

from .cli import Parser, add_device, add_model, number, run_command
from .data.arithmetic import ANSWER, decode, encode
from .data.tokenizers import end_token, tokenizer_of
from .errors import InputError
from .model_file import load_adapted, tokenizer_of_model
from .models.gpt import GPT
from .training.device import resolve_device


def command(argv):
    p = Parser("-m svmini.generate", "Continue a text with a GPT.")
    add_model(p, "gpt2, ...")
    p.flag("--prompt", "TEXT", str, "text to continue", required=True)
    p.flag("--max-new-tokens", "N", number(1), "number of tokens to add", 100)
    p.flag("--temperature", "X", number(0, float), "sampling temperature, 0 for greedy decoding", 0.8)
    p.flag("--top-k", "K", number(1), "sample from the K most likely tokens", shown="all")
    p.flag("--seed", "N", number(0), "seed for sampling", 0)
    add_device(p)
    flags = p.parse_args(argv)
    device_config = resolve_device(flags.device, flags.dtype)
    model, metadata = load_adapted(flags.init, flags.adapter, GPT, flags.n_head)
    tokenizer = tokenizer_of_model(model, metadata, flags.init)
    if not flags.prompt:
        raise InputError("--prompt is empty: give at least one character")
    length = flags.max_new_tokens
    if tokenizer == "arithmetic":
        prompt, end, length = encode(flags.prompt), None, min(length, ANSWER)
    else:
        tokenizer = tokenizer_of(tokenizer)
        prompt, end = torch.tensor(tokenizer.encode_ordinary(flags.prompt)), end_token(tokenizer)
    generator = torch.Generator(device_config.device).manual_seed(flags.seed)
    tokens = prompt[None].to(device_config.device)
    with device_config.autocast():
        new = model.to(device_config.device).generate(tokens, length, flags.temperature, flags.top_k, generator)
    new = new[0, len(prompt):].cpu()
    if end in new.tolist():   # the token that ends an answer
        new = new[:new.tolist().index(end)]
    text = torch.cat([prompt, new])
    print(decode(text) if tokenizer == "arithmetic" else tokenizer.decode(text.tolist()))


if __name__ == "__main__":
    sys.exit(run_command(command))
