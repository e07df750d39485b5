"""Weights from elsewhere: read them, and carry them over between another naming and ours.

A naming is a list of (their key, our keys, transposed): one of their tensors holds ours stacked along the first
axis (after a transpose, where they keep the matrix the other way round).
"""

from pathlib import Path

import torch


def read_source(source, urls):
    """A state dict from a state dict, a name in `urls` (downloaded once into torch's hub cache) or a file.

    Files: whatever torch.load opens with weights_only=True, and .safetensors where that package is installed.
    Raises FileNotFoundError or ValueError in one sentence.
    """
    if isinstance(source, dict):
        return source
    if str(source) in urls:
        url = urls[str(source)]
        name = url.rsplit("/", 1)[-1]   # as torchvision keeps it; all GPT-2s have one name, so theirs goes in front
        name = name if name.startswith(str(source)) else f"{source}-{name}"
        path = Path(torch.hub.get_dir()) / "checkpoints" / name
        try:
            return torch.hub.load_state_dict_from_url(
                url, map_location="cpu", weights_only=True, file_name=path.name)
        except OSError as error:
            raise FileNotFoundError(
                f"cannot download {url} ({one_line(error)}): fetch it elsewhere and give that file's path instead of "
                f"{str(source)!r}, or put it at {path}") from None
        except Exception as error:   # unpickling fails in many ways
            raise ValueError(f"{path} is damaged ({one_line(error)}): delete it to download it again") from None
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"{str(source)!r} is neither a file nor one of {', '.join(urls)}")
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise ValueError(f"reading {path} needs the package safetensors: pip install safetensors") from None
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:   # unpickling fails in many ways; each means that this is not such a file
        raise ValueError(f"{path} is no file of weights that torch can read: {one_line(error)}") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, not a state dict")
    return state


def one_line(error):
    return " ".join(str(error).split())[:200] or type(error).__name__


def check_kind(state, kind, dims):
    """Raise ValueError unless `state` has tensors of these names and numbers of dimensions."""
    wrong = [key for key, n in dims.items() if not isinstance(state.get(key), torch.Tensor) or state[key].dim() != n]
    if wrong:
        raise ValueError(f"this is no {kind} state dict: {', '.join(wrong)} missing or of another shape")


def from_theirs(state, names):
    """Their state dict in our naming, as float tensors of our own. Raises ValueError that lists what does not fit."""
    expected = {theirs for theirs, _, _ in names}
    missing, surplus = sorted(expected - state.keys()), sorted(state.keys() - expected)
    if missing or surplus:
        raise ValueError(f"the state dict does not fit: missing {missing or 'nothing'}, surplus {surplus or 'nothing'}")
    ours = {}
    for theirs, keys, transposed in names:
        value = state[theirs].t() if transposed else state[theirs]
        if value.dtype in (torch.float16, torch.bfloat16):
            value = value.float()
        if len(value) % len(keys):
            raise ValueError(f"{theirs} of shape {tuple(state[theirs].shape)} does not split into {len(keys)} parts")
        ours |= {key: part.clone(memory_format=torch.contiguous_format)
                 for key, part in zip(keys, value.chunk(len(keys)))}
    return ours


def to_theirs(state, names):
    """Our state dict in their naming: the inverse of from_theirs, to the last bit."""
    out = {}
    for theirs, keys, transposed in names:
        value = torch.cat([state[key] for key in keys]).detach()
        out[theirs] = value.t().contiguous() if transposed else value
    return out


def load_exactly(model, state):
    """Make the tensors in `state` the model's parameters. Raises ValueError that lists misshapen keys."""
    wrong = [f"{key} is {tuple(state[key].shape)} and should be {tuple(value.shape)}"
             for key, value in model.state_dict().items() if state[key].shape != value.shape]
    if wrong:
        raise ValueError("the state dict does not fit: " + "; ".join(wrong))
    model.load_state_dict(state, assign=True)
    model.requires_grad_(True)
