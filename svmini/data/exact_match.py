"""The base class of tasks that are scored by exact match: Arithmetic and QuestionAnswering."""

from .text import cross_entropy


class ExactMatch:
    """A task of problems with answers. Another set of problems says:

    batch(size, seed, step) -> x, y    training problems, (size, T) int64 both, y = IGNORE_INDEX outside the answer
    eval_problems                            {"val": (prompts, answers), "test": ...}: what is marked, (T,) int64 tensors
    max_new, end                       how many tokens an answer may take, and which one ends it (None: all are taken)
    read(tokens) -> str                what is compared of an answer
    line(prompt, answer, prediction)   one problem for a reader, as a string
    """
    metric, higher_is_better = "exact match", True
    loss = staticmethod(cross_entropy)

    def evaluate(self, model, split):
        """{"loss": of the answers' tokens, where it is measured, "metric": percent of the problems that the model's
        greedy continuation solves}"""
        prompts, answers = self.eval_problems[split]
        right = map(self.right, answers, model.generate_greedy(prompts, self.max_new, self.end))
        return {"loss": self.loss_of(model, split), "metric": 100 * sum(right) / len(prompts)}

    def loss_of(self, model, split):
        return None

    def right(self, answer, prediction):
        """Whether a prediction (T,) is complete and says what the answer (A,) says: "12" may be half of "120"."""
        ended = self.end is None or self.end in prediction.tolist()
        return ended and self.read(prediction) == self.read(answer)

    def show(self, model):
        """The first eight test problems, as the model solves them, each with "right" or "wrong" before it."""
        prompts, answers = (part[:8] for part in self.eval_problems["test"])
        return [f"{'right' if self.right(a, q) else 'wrong'}: {self.line(p, a, q)}"
                for p, a, q in zip(prompts, answers, model.generate_greedy(prompts, self.max_new, self.end))]
