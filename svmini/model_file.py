"""Model files: a whole model with its config and what it belongs to; and weights from elsewhere, as a base."""

from dataclasses import asdict
from pathlib import Path

from . import files
from .adapter_file import load_adapter
from .data.tokenizers import GPT2_VOCAB
from .errors import InputError
from .models.gpt import GPT
from .models.published import format_of, read_source
from .models.vit import ViT


def save_model(path, model, metadata):
    """Write a whole model, its config and plain values `about` it (its data, tokenizer, how it was trained)."""
    state = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    files.save(path, "model", {"class": type(model).__name__, "config": asdict(model.config), "state": state,
                               "metadata": metadata})


def derived_metadata(base_metadata, metadata):
    """`about` a model that was made of another one, whose tokenizer it has, and whose origin."""
    return {key: base_metadata[key] for key in ("tokenizer", "published") if key in base_metadata} | metadata


def load_model(path, model_class):
    """(model, metadata) of save_model's file. Raises MissingFile, or InputError for another kind of file or model."""
    content = files.load(path, "model")
    if content["class"] != model_class.__name__:
        raise InputError(f"{path} holds a {content['class']}, not a {model_class.__name__}")
    model = model_class(model_class.Config(**content["config"]))
    try:
        model.load_state_dict(content["state"])
    except RuntimeError as error:   # the class has changed since
        raise InputError(f"{path} does not fit this {model_class.__name__}: {files.one_line(error)}") from None
    return model, content["metadata"]


def load_base(source, model_class, n_head=None):
    """(model, metadata) of a model file of ours, or of published weights: a name that model_class.urls() knows, or a file
    in another naming, with n_head heads where these are not of width 64. metadata["published"] tells the two apart."""
    state = read_source(source, model_class.urls())
    if "kind" in state:   # a file of ours: a model, or an adapter or a run, which load_model refuses
        if n_head is not None:
            raise InputError(f"{source} says itself how many heads it has: leave out --n-head")
        model, metadata = load_model(source, model_class)
        return model, {"published": False} | metadata
    return model_class.from_state(state, n_head=n_head).float(), {"data": Path(source).stem, "published": True}


def load_adapted(source, adapter, model_class, n_head=None):
    """(model, metadata) of a base, as load_base gives it, with an adapter file on it where one is given: a ViT at the
    image size and with the head that the file was trained with."""
    model, metadata = load_base(source, model_class, n_head)
    if adapter is None:
        return model, metadata
    trained_on = files.load(adapter, "adapter")["metadata"]
    if model_class is ViT and "image_size" in trained_on:
        model.set_input_size(trained_on["image_size"])
        model.reset_classifier(len(trained_on["classes"]))
    return load_adapter(model, adapter), metadata | trained_on


def tokenizer_of_model(model, metadata, source):
    """What tokenizer_of takes for a GPT that load_base gave; published weights speak GPT-2's tokens. Raises InputError
    where it is not known, or does not fit."""
    word = metadata.get("tokenizer", "gpt2" if metadata["published"] else None)
    if word is None:
        raise InputError(f"{source} does not say which tokenizer it speaks: save it with a `metadata` dict that has one")
    if word == "gpt2" and model.config.vocab_size != GPT2_VOCAB:
        raise InputError(f"{source} knows {model.config.vocab_size:,} tokens, and GPT-2's tokenizer {GPT2_VOCAB:,}: "
                         "give weights that were trained with it")
    return word


def class_of(source):
    """GPT or ViT, by a name of published weights or by what a file holds."""
    if source in GPT.urls() or source in ViT.urls():
        return GPT if source in GPT.urls() else ViT
    state = read_source(source, GPT.urls() | ViT.urls())
    if "kind" in state:
        return GPT if isinstance(state.get("content"), dict) and state["content"].get("class") == "GPT" else ViT
    return GPT if format_of(state) == "gpt2" else ViT
