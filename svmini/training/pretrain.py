"""A base of one's own: pretrain a small model once, and keep it."""

import time
from dataclasses import asdict
from pathlib import Path

import torch

from ..errors import InputError
from ..model_file import load_model, save_model
from .checkpoint import RunFolder, differences
from .loop import evaluate, train


def pretrain(model, task, train_config, device_config, folder, metadata, *, resume=False, save_every=0, eval_every=0):
    """The base that folder/model.pt holds, or else this model, trained now and kept there. Returns (model, metadata).

    metadata: plain values that belong to the model (its data, its tokenizer); what is measured of it is added. Raises
    InputError where the model that is kept was made with another run config.
    """
    path = Path(folder) / "model.pt"
    run_config = task.data_config | asdict(train_config) | {"model": asdict(model.config), "dtype": str(device_config.dtype)}
    if path.is_file():
        model, metadata = load_model(path, type(model))
        # another device's dtype is no reason to train again
        different = [d for d in differences(metadata.get("run_config", {}), run_config) if not d.startswith("dtype ")]
        if different:
            raise InputError(f"{path} was pretrained with another run config: {'; '.join(different)}. Give the same "
                             "flags, another --out, or that file as --init")
        print(f"base: {path}, kept from an earlier run: {metadata['result']}")
        return model, metadata
    print(f"base: pretraining on {task.name}, {sum(p.numel() for p in model.parameters()):,} numbers, "
          f"{train_config.steps} steps")
    start = {name: p.detach().cpu().clone() for name, p in model.named_parameters()}
    began = time.perf_counter()
    run = RunFolder(folder, run_config, resume, save_every, eval_every)
    train(model, task, train_config, device_config, run, "pretrain")
    metric = evaluate(model, task, "test", device_config)["metric"]
    learned = weight_stats(model.cpu(), start)
    result = (f"test {task.metric} {metric:.4g} on {task.name}; cosine to the random start {learned['cosine']:.2f} "
              f"(near 1: hardly learned), {100 * learned['energy']:.0f} % of the energy in the first quarter of the "
              "singular directions")
    metadata = metadata | {"run_config": run.run_config, "metric": metric, "learned": learned, "result": result,
                     "published": False}
    save_model(path, model, metadata)
    (Path(folder) / "last.pt").unlink(missing_ok=True)
    print(f"base: {path}, {result}, {time.perf_counter() - began:.0f} s")
    return model, metadata


def weight_stats(model, start):
    """Whether singular vectors of the weights can mean anything: {"cosine", "energy"}, means over the adapted matrices.

    cosine: between a weight and its random initial value; near 1, its singular vectors are still those of noise.
    energy: Σ σ_i² of the first quarter of the singular values over that of all; 0.4 to 0.6 for noise.
    """
    cosines, energies = [], []
    for name, p in model.named_parameters():
        if p.dim() == 2 and name.split(".")[-2] in type(model).targets:
            energy = torch.linalg.svdvals(p.detach().double()) ** 2
            energies.append((energy[:len(energy) // 4].sum() / energy.sum()).item())
            cosines.append(torch.cosine_similarity(p.detach().flatten(), start[name].flatten(), dim=0).item())
    return {"cosine": sum(cosines) / len(cosines), "energy": sum(energies) / len(energies)}
