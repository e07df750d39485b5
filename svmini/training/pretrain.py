"""A base of one's own: pretrain a small model once, and keep it."""

import time
from dataclasses import asdict
from pathlib import Path

import torch

from ..errors import InputError
from ..model_file import load_model, save_model
from .checkpoint import Run, differences
from .loop import evaluate, train


def pretrain(model, task, settings, machine, folder, about, *, resume=False, save_every=0, eval_every=0):
    """The base that folder/model.pt holds, or else this model, trained now and kept there. Returns (model, about).

    about: plain values that belong to the model (its data, its tokenizer); what is measured of it is added. Raises
    InputError where the model that is kept was made under other conditions.
    """
    path = Path(folder) / "model.pt"
    conditions = task.facts | asdict(settings) | {"model": asdict(model.config), "dtype": str(machine.dtype)}
    if path.is_file():
        model, about = load_model(path, type(model))
        # another device's dtype is no reason to train again
        different = [d for d in differences(about.get("conditions", {}), conditions) if not d.startswith("dtype ")]
        if different:
            raise InputError(f"{path} was pretrained under other conditions: {'; '.join(different)}. Give the same "
                             "flags, another --out, or that file as --init")
        print(f"base: {path}, kept from an earlier run: {about['result']}")
        return model, about
    print(f"base: pretraining on {task.name}, {sum(p.numel() for p in model.parameters()):,} numbers, "
          f"{settings.steps} steps")
    start = {name: p.detach().cpu().clone() for name, p in model.named_parameters()}
    began = time.perf_counter()
    run = Run(folder, conditions, resume, save_every, eval_every)
    train(model, task, settings, machine, run, "pretrain")
    metric = evaluate(model, task, "test", machine)["metric"]
    learned = how_learned(model.cpu(), start)
    result = (f"test {task.metric} {metric:.4g} on {task.name}; cosine to the random start {learned['cosine']:.2f} "
              f"(near 1: hardly learned), {100 * learned['energy']:.0f} % of the energy in the first quarter of the "
              "singular directions")
    about = about | {"conditions": run.conditions, "metric": metric, "learned": learned, "result": result,
                     "published": False}
    save_model(path, model, about)
    (Path(folder) / "last.pt").unlink(missing_ok=True)
    print(f"base: {path}, {result}, {time.perf_counter() - began:.0f} s")
    return model, about


def how_learned(model, start):
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
