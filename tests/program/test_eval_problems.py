"""Validation and test are marked on problems of their own."""

import torch

from svmini.data.arithmetic import Arithmetic
from svmini.data.qa import QuestionAnswering
from test_qa import splits_of, story, tokenizer   # noqa: F401  tokenizer is a fixture


def test_each_split_is_marked_on_its_own_problems(tokenizer):
    class Silent(torch.nn.Module):
        def forward(self, x):
            return torch.zeros(*x.shape, 320)

        def generate_greedy(self, prompts, max_new, end):
            self.seen = list(prompts)
            return [torch.tensor([], dtype=torch.int64)] * len(prompts)

    pairs = splits_of([story(0)], map(story, range(1, 6)), map(story, range(6, 11)))
    for task in (Arithmetic("-"), QuestionAnswering("qa:x", pairs, tokenizer, 128)):
        for split in ("val", "test"):
            task.evaluate(model := Silent(), split)
            prompts, answers = task.problems(split, len(model.seen))
            assert all(map(torch.equal, model.seen, prompts)) and all(map(torch.equal, task.eval_problems[split][1], answers))
