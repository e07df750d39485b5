"""Model files: a whole model with its config and what it belongs to; and weights from elsewhere, as a base."""

from dataclasses import asdict
from pathlib import Path

from . import files
from .adapter_file import load_adapter
from .data.tokenizers import GPT2_VOCAB
from .errors import InputError
from .models.gpt import GPT
from .models.published import naming_of, read_source
from .models.vit import ViT


def save_model(path, model, about):
    """Write a whole model, its config and plain values `about` it (its data, tokenizer, how it was trained)."""
    state = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    files.save(path, "model", {"class": type(model).__name__, "config": asdict(model.config), "state": state,
                               "about": about})


def about_made_of(about_base, about):
    """`about` a model that was made of another one, whose tokenizer it has, and whose origin."""
    return {key: about_base[key] for key in ("tokenizer", "published") if key in about_base} | about


def load_model(path, model_class):
    """(model, about) of save_model's file. Raises MissingFile, or InputError for another kind of file or model."""
    content = files.load(path, "model")
    if content["class"] != model_class.__name__:
        raise InputError(f"{path} holds a {content['class']}, not a {model_class.__name__}")
    model = model_class(model_class.Config(**content["config"]))
    try:
        model.load_state_dict(content["state"])
    except RuntimeError as error:   # the class has changed since
        raise InputError(f"{path} does not fit this {model_class.__name__}: {files.one_line(error)}") from None
    return model, content["about"]


def load_base(source, model_class, n_head=None):
    """(model, about) of a model file of ours, or of published weights: a name that model_class.urls() knows, or a file
    in another naming, with n_head heads where these are not of width 64. about["published"] tells the two apart."""
    state = read_source(source, model_class.urls())
    if "kind" in state:   # a file of ours: a model, or an adapter or a run, which load_model refuses
        if n_head is not None:
            raise InputError(f"{source} says itself how many heads it has: leave out --n-head")
        model, about = load_model(source, model_class)
        return model, {"published": False} | about
    return model_class.from_state(state, n_head=n_head).float(), {"data": Path(source).stem, "published": True}


def load_adapted(source, adapter, model_class, n_head=None):
    """(model, about) of a base, as load_base gives it, with an adapter file on it where one is given: a ViT at the
    image size and with the head that the file was trained with."""
    model, about = load_base(source, model_class, n_head)
    if adapter is None:
        return model, about
    trained_on = files.load(adapter, "adapter")["about"]
    if model_class is ViT and "image_size" in trained_on:
        model.new_size(trained_on["image_size"])
        model.new_head(len(trained_on["classes"]))
    return load_adapter(model, adapter), about | trained_on


def tokenizer_word(model, about, source):
    """What tokenizer_of takes for a GPT that load_base gave; published weights speak GPT-2's tokens. Raises InputError
    where it is not known, or does not fit."""
    word = about.get("tokenizer", "gpt2" if about["published"] else None)
    if word is None:
        raise InputError(f"{source} does not say which tokenizer it speaks: save it with an `about` that has one")
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
    return GPT if naming_of(state) == "gpt2" else ViT
