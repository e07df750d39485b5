"""A run's folder: what it was started with, its log, the checkpoint to resume from, and what came of it."""

import json
from pathlib import Path

import torch

from .. import files
from ..errors import InputError
from .loop import evaluate

LEFT_BY_A_RUN = ("last.pt", "metrics.jsonl", "row.json", "adapter.pt", "model.pt")


class RunFolder:
    """One run in one folder, or in none (folder=None), where nothing is kept.

    run_config: one dict of plain values, all that decides the result. What the folder holds is used under the very
    same run_config only. resume: go on from what an earlier run left there; without it that is deleted.
    save_every, eval_every: in steps; 0 means after the last one.
    log: a list of {"step", "split", "loss", "metric", "lr"}, one for each evaluation.
    """

    def __init__(self, folder=None, run_config=None, resume=False, save_every=0, eval_every=0):
        self.folder = None if folder is None else Path(folder)
        self.run_config, self.resume = after_json(run_config or {}), resume
        self.save_every, self.eval_every, self.log = save_every, eval_every, []
        if self.folder is not None and not resume:
            delete_run(self.folder)

    def finished(self):
        """The row that an earlier run finished under the same run_config, or None. Raises InputError where they were
        others, or the file is damaged."""
        path = self.folder / "row.json"
        if not self.resume or not path.is_file():
            return None
        content = read_json(path, "run_config", "row")
        self.compare(path, content["run_config"])
        return content["row"]

    def restore(self, model, optimizer, scaler):
        """Go back to last.pt, where resume asks for it and there is one; returns the step to go on from, or 0."""
        path = None if self.folder is None else self.folder / "last.pt"
        if not self.resume or path is None or not path.is_file():
            return 0
        content = files.load(path, "run")
        self.compare(path, content["run_config"])
        put_trained_state(model, content["model"])
        optimizer.load_state_dict(content["optimizer"])
        scaler.load_state_dict(content["scaler"])
        torch.set_rng_state(content["random"][0])
        if torch.cuda.is_available() and len(content["random"]) > 1:
            torch.cuda.set_rng_state_all(content["random"][1:])
        self.log = content["log"]
        self.write_log()   # without the lines behind the checkpoint: their steps are done again
        return content["step"]

    def is_due(self, done, steps):
        """Whether something is evaluated or saved after this step."""
        return done == steps or any(every and done % every == 0 for every in (self.eval_every, self.save_every))

    def after_step(self, done, steps, stopping, model, task, device_config, optimizer, scaler, lr):
        """Evaluate and save, where it is time for it. stopping: the run ends here, so it must be saved."""
        if done == steps or self.eval_every and done % self.eval_every == 0:
            scores = evaluate(model, task, "val", device_config)
            self.log.append({"step": done, "split": "val", **scores, "lr": lr})
            self.write_log()
        if self.folder is None or not (stopping or done == steps or self.save_every and done % self.save_every == 0):
            return
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        files.save(self.folder / "last.pt", "run", {
            "step": done, "model": trained_state(model), "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(), "random": [torch.get_rng_state(), *cuda], "run_config": self.run_config,
            "log": self.log})

    def finish(self, row):
        """Keep the row under the run's run_config. The checkpoint has done its work."""
        files.write_text(self.folder / "row.json",
                         json.dumps({"run_config": self.run_config, "row": row}, ensure_ascii=False))
        (self.folder / "last.pt").unlink(missing_ok=True)

    def write_log(self):
        if self.folder is not None:
            lines = (json.dumps(line) + "\n" for line in self.log)
            files.write_text(self.folder / "metrics.jsonl", "".join(lines))

    def compare(self, path, was):
        """Raise InputError that names what differs from the run_config that a file was made under."""
        different = differences(was, self.run_config)
        if different:
            raise InputError(f"{path} was made with another run config: {'; '.join(different)}. Give the same flags, "
                             "another --out, or leave out --resume to begin anew")


def delete_run(folder):
    """Delete what an earlier run left in its folder."""
    for name in LEFT_BY_A_RUN:
        (Path(folder) / name).unlink(missing_ok=True)


def differences(was, now):
    """["steps was 100 and is 200", ...] of two dicts of plain values."""
    now = after_json(now)
    found = []
    for key in sorted(was.keys() | now.keys()):
        a, b = was.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += [f"{key}.{line}" for line in differences(a, b)]
        elif a != b:
            found.append(f"{key} was {a!r} and is {b!r}")
    return found


def after_json(values):
    """As they come back from a JSON file: tuples are lists."""
    return json.loads(json.dumps(values))


def read_json(path, *keys):
    """The dict in a JSON file, which holds a dict at each of these keys. Raises InputError where it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict) or not all(isinstance(content.get(key), dict) for key in keys):
        raise InputError(f"{path} is damaged: delete it to have it made again")
    return content


def trained_state(model):
    """{name: tensor} of what training changes, on the CPU: a run's base can be made again and is not stored."""
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters() if p.requires_grad}


def put_trained_state(model, state):
    """The inverse of trained_state. Raises InputError where the names or shapes are not those of this model."""
    ours = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if {k: v.shape for k, v in ours.items()} != {k: v.shape for k, v in state.items()}:
        raise InputError("the checkpoint belongs to another model or method: its trained parameters differ")
    with torch.no_grad():
        for name, p in ours.items():
            p.copy_(state[name])
