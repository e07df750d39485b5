"""The base class of tasks that are scored by exact match: Arithmetic and QuestionAnswering."""

from .text import cross_entropy


class ExactMatch:
    """A task whose problems have one right answer. A subclass defines:

    batch(size, seed, step) -> x, y    training problems, both (size, T) int64; y is IGNORE_INDEX outside the answer
    eval_problems                      {"val": (prompts, answers), "test": ...}: the scored problems, (T,) int64 each
    max_new, end                       the most tokens of an answer, and the token that ends it (None: none does)
    read(tokens) -> str                the part of an answer that is compared
    line(prompt, answer, prediction)   one problem as a string, for a reader
    """
    metric, higher_is_better = "exact match", True
    loss = staticmethod(cross_entropy)

    def evaluate(self, model, split):
        """Return {"loss": of the answer tokens or None, "metric": percent solved by the model's greedy output}."""
        prompts, answers = self.eval_problems[split]
        right = map(self.is_right, answers, model.generate_greedy(prompts, self.max_new, self.end))
        return {"loss": self.answer_loss(model, split), "metric": 100 * sum(right) / len(prompts)}

    def answer_loss(self, model, split):
        return None

    def is_right(self, answer, prediction):
        """Return whether a prediction (T,) is complete and equals the answer (A,): "12" may be the start of "120"."""
        ended = self.end is None or self.end in prediction.tolist()
        return ended and self.read(prediction) == self.read(answer)

    def show(self, model):
        """Return the first eight test problems as strings, each with "right" or "wrong" and the model's answer."""
        prompts, answers = (part[:8] for part in self.eval_problems["test"])
        return [f"{'right' if self.is_right(a, q) else 'wrong'}: {self.line(p, a, q)}"
                for p, a, q in zip(prompts, answers, model.generate_greedy(prompts, self.max_new, self.end))]
