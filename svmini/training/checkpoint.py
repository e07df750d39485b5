"""The folder of one run: its run config, its log, its checkpoint and its result."""

import hashlib
import json
import re
from pathlib import Path

import torch

from .. import files
from ..adapting import adapters_of, is_inside, tensors_of
from ..errors import InputError
from .loop import evaluate

RUN_FILES = ("last.pt", "metrics.jsonl", "row.json", "adapter.pt", "model.pt")   # a run writes only these
TEMPORARY = "*." + 8 * "[0-9a-f]" + ".tmp"   # names of the files that files.write_whole has not finished


class RunFolder:
    """One run in one folder, or in memory only (folder=None).

    run_config: a dict of plain values with everything that determines the result. Files in the folder are reused only
    if they were written with the same run_config.
    resume: continue what an earlier run left in the folder; otherwise it is deleted.
    save_every, eval_every: steps between checkpoints and between evaluations; 0 means after the last step only.
    log: a list of {"step", "split", "loss", "metric", "lr"}, one per evaluation.
    """

    def __init__(self, folder=None, run_config=None, resume=False, save_every=0, eval_every=0):
        self.folder = None if folder is None else Path(folder)
        self.run_config, self.resume = after_json(run_config or {}), resume
        self.save_every, self.eval_every, self.log = save_every, eval_every, []
        if self.folder is not None:
            delete_temporary(self.folder)
            if not resume:
                delete_run(self.folder)

    def finished_row(self, result_file):
        """Return the row of a finished run, or None if the run must be trained (its result file may have been deleted).
        Raises InputError if the run config differs or a file is damaged."""
        path = self.folder / "row.json"
        if not self.resume or not path.is_file():
            return None
        content = read_json(path, "run_config", "row")
        check_run_config(path, content["run_config"], self.run_config)
        if not (self.folder / result_file).is_file():
            return None
        files.load(self.folder / result_file, Path(result_file).stem)   # a damaged file is reported now
        (self.folder / "last.pt").unlink(missing_ok=True)               # left if the run was killed in `finish`
        return content["row"]

    def restore(self, model, optimizer, scaler):
        """Restore last.pt if resume is set and the file exists; returns the number of steps done (0 without a file)."""
        path = None if self.folder is None else self.folder / "last.pt"
        if not self.resume or path is None or not path.is_file():
            return 0
        content = files.load(path, "run")
        check_run_config(path, content["run_config"], self.run_config)
        load_trained_state(model, content["model"])
        optimizer.load_state_dict(content["optimizer"])
        scaler.load_state_dict(content["scaler"])
        torch.set_rng_state(content["random"][0])
        if torch.cuda.is_available() and len(content["random"]) > 1:
            torch.cuda.set_rng_state(content["random"][1])
        self.log = content["log"]
        self.write_log()   # drops the lines after the checkpoint: their steps are repeated
        return content["step"]

    def is_due(self, done, steps):
        """Whether an evaluation or a checkpoint follows this step."""
        return done == steps or any(every and done % every == 0 for every in (self.eval_every, self.save_every))

    def after_step(self, done, steps, stopping, model, task, device_config, optimizer, scaler, lr):
        """Evaluate and save if this step is due. stopping: the run ends after this step, so save in any case."""
        if done == steps or self.eval_every and done % self.eval_every == 0:
            scores = evaluate(model, task, "val", device_config)
            self.log.append({"step": done, "split": "val", **scores, "lr": lr})
            self.write_log()
        if self.folder is None or not (stopping or done == steps or self.save_every and done % self.save_every == 0):
            return
        cuda = [torch.cuda.get_rng_state()] if device_config.device.type == "cuda" else []
        files.save(self.folder / "last.pt", "run", {
            "step": done, "model": trained_state(model), "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(), "random": [torch.get_rng_state(), *cuda], "run_config": self.run_config,
            "log": self.log})

    def finish(self, row):
        """Write row.json, then delete the checkpoint, which is no longer needed."""
        files.write_text(self.folder / "row.json",
                         json.dumps({"run_config": self.run_config, "row": row}, ensure_ascii=False))
        (self.folder / "last.pt").unlink(missing_ok=True)

    def write_log(self):
        if self.folder is not None:
            lines = (json.dumps(line) + "\n" for line in self.log)
            files.write_text(self.folder / "metrics.jsonl", "".join(lines))


def check_run_config(path, earlier, now, otherwise="leave out --resume to start again"):
    """Raise InputError that names what differs if the file at this path was written with another run config."""
    different = differences(earlier, now)
    if different:
        raise InputError(f"{path} was made with another run config: {'; '.join(different)}. Give the same flags, "
                         f"choose another --out, or {otherwise}")


def delete_run(folder):
    """Delete the files of an earlier run in its folder."""
    for name in RUN_FILES:
        (Path(folder) / name).unlink(missing_ok=True)


def delete_temporary(folder):
    """Delete the unfinished files that a killed process left in a folder."""
    for path in Path(folder).glob(TEMPORARY):
        path.unlink(missing_ok=True)


def file_name(text, longest=100):
    """Turn a text into a file name that every system accepts. A long or non-ASCII text gets a hash, so that it keeps a
    name of its own."""
    name = re.sub(r"[^\w=.,+-]", "_", text, flags=re.ASCII)
    if len(name) <= longest and text.isascii():
        return name
    return f"{name[:longest]}-{hashlib.sha256(text.encode('utf-8')).hexdigest()[:12]}"


def differences(earlier, now):
    """Return ["steps was 100 and is 200", ...] for two dicts of plain values."""
    now = after_json(now)
    found = []
    for key in sorted(earlier.keys() | now.keys()):
        a, b = earlier.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += [f"{key}.{line}" for line in differences(a, b)]
        elif a != b:
            found.append(f"{key} was {a!r} and is {b!r}")
    return found


def after_json(values):
    """Return the values as a JSON file gives them back: tuples become lists."""
    return json.loads(json.dumps(values))


def read_json(path, *keys):
    """Return the dict in a JSON file, with a dict at each of these keys. Raises InputError if the file is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or not all(isinstance(content.get(key), dict) for key in keys):
        raise InputError(f"{path} is damaged: delete it, and the same command writes it again")
    return content


def trained_state(model):
    """Return {name: tensor} of what training changes, on the CPU. The frozen base is not stored."""
    return {name: tensor.detach().cpu().clone() for name, tensor in changing_tensors(model).items()}


def changing_tensors(model):
    """{name: tensor} of the parameters that require gradients, and of buffers such as running statistics."""
    adapters = adapters_of(model)
    return {name: tensor for name, tensor in tensors_of(model).items() if tensor.requires_grad
            or not isinstance(tensor, torch.nn.Parameter) and not is_inside(name, adapters)}


def load_trained_state(model, state):
    """Copy a trained_state into a model. Raises InputError if names or shapes differ."""
    ours = changing_tensors(model)
    if {k: v.shape for k, v in ours.items()} != {k: v.shape for k, v in state.items()}:
        raise InputError("the checkpoint belongs to another model or method: leave out --resume to start again")
    with torch.no_grad():
        for name, p in ours.items():
            p.copy_(state[name])
