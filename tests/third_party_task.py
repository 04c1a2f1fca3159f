"""A task as a package of somebody else would bring it."""

from dataclasses import dataclass

from mllm_vision.eval import Example, Task


@dataclass(kw_only=True)
class Theirs(Task, name="theirs", paper="none"):
    max_new_tokens = 3

    def examples(self, row):
        yield Example(id=row["id"], question=row["question"], images=[row.picture()], target="", unit=row["id"])

    def tally(self, target, answer):
        return {"n": 1, "right": float(answer == target)}

    def scores(self, sums):
        return {"accuracy": sums["right"] / sums["n"]}
