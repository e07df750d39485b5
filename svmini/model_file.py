"""Model files: a model with its config and metadata. Base models come from them or from published weights."""

from dataclasses import asdict
from pathlib import Path

import torch

from . import files
from .adapter_file import load_adapter
from .data.tokenizers import GPT2_VOCAB
from .errors import InputError
from .models.gpt import GPT
from .models.published import FORMATS, detect_format, read_source
from .models.vit import ViT

MODELS = {"GPT": GPT, "ViT": ViT}


def save_model(path, model, metadata):
    """Write a model with its config and metadata, a dict of plain values (its data, tokenizer, how it was trained)."""
    state = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    files.save(path, "model", {"class": type(model).__name__, "config": asdict(model.config), "state": state,
                               "metadata": metadata})


def derived_metadata(base_metadata, metadata):
    """Return metadata for a model that was made from a base model: it keeps the base's tokenizer and origin."""
    return {key: base_metadata[key] for key in ("tokenizer", "published") if key in base_metadata} | metadata


def load_model(path, model_class=None, file=None):
    """Return (model, metadata) from a file that save_model wrote, in the dtype that the file holds.

    model_class: GPT or ViT, if only one of them will do. file: what torch.load returned for the path, if it was read
    already. Raises MissingFile, or InputError for another kind of file or model.
    """
    content = files.load(path, "model") if file is None else files.check(file, "model", path)
    model_class = model_class or MODELS[content["class"]]
    if content["class"] != model_class.__name__:
        raise InputError(f"{path} holds a {content['class']}, not a {model_class.__name__}")
    model = model_class(model_class.Config(**content["config"])).to(next(iter(content["state"].values())).dtype)
    try:
        model.load_state_dict(content["state"])
    except RuntimeError as error:   # the class has changed since
        raise InputError(f"{path} does not fit this {model_class.__name__}: {files.one_line(error)}") from None
    return model, content["metadata"]


def load_base(source, model_class=None, n_head=None):
    """Return (model, metadata) of a base model in float32, in which the training scripts train (autocast is optional).

    source: a model file, a name in GPT.urls() or ViT.urls(), or a file of published weights. model_class: GPT or ViT,
    if only one of them will do. n_head: number of heads of published weights, see from_pretrained.
    metadata["published"] tells whether the weights are published ones.
    """
    model, metadata = load_any(source, model_class, n_head)
    return model.float(), metadata


def load_any(source, model_class=None, n_head=None):
    """Return what load_base returns, in the dtype of the model file (published weights: see from_pretrained)."""
    urls = model_class.urls() if model_class else GPT.urls() | ViT.urls()
    weights = source if str(source) in urls else read_source(source, urls)
    if isinstance(weights, dict) and "kind" in weights:   # a file of svmini's: load_model rejects all but models
        if n_head is not None:
            raise InputError(f"{source} contains its number of heads: leave out --n-head")
        model, metadata = load_model(source, model_class, weights)
        return model, {"published": False} | metadata
    if model_class is None:
        kind = FORMATS[detect_format(weights)[0]].model if isinstance(weights, dict) else None
        model_class = MODELS[kind] if kind else GPT if str(source) in GPT.urls() else ViT
    return model_class.from_pretrained(weights, n_head=n_head), {"data": Path(source).stem, "published": True}


def load_adapted(source, adapter, model_class=None, n_head=None):
    """Return (model, metadata) of a base model with the adapter from a file on it, or without one if adapter is None.

    The model has the dtype that it was trained in, or without an adapter that of its file. A ViT gets the image size
    and the classifier of the adapter's training.
    """
    model, metadata = load_any(source, model_class, n_head)
    return (model, metadata) if adapter is None else with_adapter(model, metadata, adapter)


def with_adapter(model, metadata, adapter):
    """Put the adapter from a file on a base model, in place, as in load_adapted. Returns (model, metadata)."""
    content = files.load(adapter, "adapter")
    trained_on = content["metadata"]
    model.to(getattr(torch, content["dtype"], None))   # several dtypes have no such name: the model keeps its own
    if isinstance(model, ViT) and "image_size" in trained_on:
        model.set_input_size(trained_on["image_size"])
        model.reset_classifier(len(trained_on["classes"]))
    return load_adapter(model, adapter), metadata | trained_on


def tokenizer_of_model(model, metadata, source):
    """Return what tokenizer_of needs for a GPT from load_base; published weights have GPT-2's tokenizer.

    Raises InputError if the tokenizer is unknown or does not fit the model.
    """
    tokenizer = metadata.get("tokenizer", "gpt2" if metadata["published"] else None)
    if tokenizer is None:
        raise InputError(f"{source} does not name its tokenizer: save it with metadata that contains one")
    if tokenizer == "gpt2" and model.config.vocab_size != GPT2_VOCAB:
        raise InputError(f"{source} has {model.config.vocab_size:,} tokens and GPT-2's tokenizer {GPT2_VOCAB:,}: "
                         "give weights that were trained with GPT-2's tokenizer")
    return tokenizer
