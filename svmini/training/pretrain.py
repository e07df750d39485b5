"""Pretrain a small base model once, and keep it."""

import time
from dataclasses import asdict
from pathlib import Path

import torch

from ..model_file import load_model, save_model
from .checkpoint import RunFolder, check_run_config, delete_temporary
from .loop import evaluate, train


def pretrain(model, task, train_config, device_config, folder, metadata, *, resume=False, save_every=0, eval_every=0):
    """Load the base model from folder/model.pt, or train this model and save it there.

    metadata: plain values that belong to the model (its data, its tokenizer); what is measured is added to them.
    Returns (model, metadata). Raises InputError if the saved model was pretrained with another run config.
    """
    path = Path(folder) / "model.pt"
    run_config = task.data_config | asdict(train_config) | {"model": asdict(model.config),
                                                            "dtype": str(device_config.dtype)}
    if path.is_file():
        delete_temporary(folder)
        model, metadata = load_model(path, type(model))
        # the dtype of another device is no reason to train again
        earlier = metadata.get("run_config", {}) | {"dtype": run_config["dtype"]}
        check_run_config(path, earlier, run_config, "load the file with --init")
        (Path(folder) / "last.pt").unlink(missing_ok=True)   # left if pretraining was killed in its last line
        print(f"base model: {path}, from an earlier run: {metadata['result']}")
        return model, metadata
    print(f"base model: pretraining on {task.name}, {sum(p.numel() for p in model.parameters()):,} parameters, "
          f"{train_config.steps} steps")
    start = {name: p.detach().cpu().clone() for name, p in model.named_parameters()}
    started = time.perf_counter()
    run_folder = RunFolder(folder, run_config, resume, save_every, eval_every)
    train(model, task, train_config, device_config, run_folder, "pretrain")
    metric = evaluate(model, task, "test", device_config)["metric"]
    stats = weight_stats(model.cpu(), start)
    result = (f"test {task.metric} {metric:.4g} on {task.name}; cosine to the random initialization "
              f"{stats['cosine']:.2f} (1 at the start), {100 * stats['energy']:.0f} % of the energy in the first "
              "quarter of the singular values")
    metadata = metadata | {"run_config": run_folder.run_config, "metric": metric, "weight_stats": stats,
                           "result": result, "published": False}
    save_model(path, model, metadata)
    (Path(folder) / "last.pt").unlink(missing_ok=True)
    print(f"base model: {path}, {result}, {time.perf_counter() - started:.0f} s")
    return model, metadata


def weight_stats(model, start):
    """Measure whether the singular vectors of the weights are those of noise.

    start: {name: initial value of every parameter}. Returns {"cosine", "energy"}, means over the adapted matrices.
    cosine: between a weight and its random initial value; near 1, the singular vectors are still those of noise.
    energy: Σ σ_i² over the first quarter of the singular values, divided by the sum over all; 0.4 to 0.6 for noise.
    """
    cosines, energies = [], []
    for name, p in model.named_parameters():
        if p.dim() == 2 and name.split(".")[-2] in type(model).targets:
            energy = torch.linalg.svdvals(p.detach().double()) ** 2
            energies.append((energy[:len(energy) // 4].sum() / energy.sum()).item())
            cosines.append(torch.cosine_similarity(p.detach().flatten(), start[name].flatten(), dim=0).item())
    return {"cosine": sum(cosines) / len(cosines), "energy": sum(energies) / len(energies)}
