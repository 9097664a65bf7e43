"""What the rule is measured against: each method says what it does otherwise."""

import torch

from orthorank_vllm.selection.method import LayerInput, Method
from orthorank_vllm.selection.topk import score


class Prune(Method):
    """Whole layers left out."""

    name = "prune"
    description = "the layer is left out"
    skips_layers = True


class Replace(Prune):
    """Whole layers left out, their maps in their place: in the prompt and in the answer."""

    name = "replace"
    description = "the layer is left out, and every token gets its stand-in"
    fills_in = True


class Random(Method):
    """The rule with as many tokens of each segment, drawn at random."""

    name = "random"
    description = "as many tokens in each window, drawn at random"

    def score(self, entering: LayerInput) -> torch.Tensor:
        """Numbers that know nothing of the tokens, [C]."""
        generator = entering.generator
        return torch.rand(
            len(entering.top_k.candidates), generator=generator, device=generator.device
        )


class Sink(Method):
    """The rule as it is without stand-ins."""

    name = "sink"
    description = "scored against the sink, whatever is known of stand-ins' errors"

    def score(self, entering: LayerInput) -> torch.Tensor:
        """`|cos|` to the sink, [C]."""
        return self.score_by_sink(entering)


class Normed(Method):
    """The rule with another score."""

    name = "normed"
    description = "scored on the layer's normalised input, learned weight included"

    def score(self, entering: LayerInput) -> torch.Tensor:
        """`|cos|` of the normalised input, [C]."""
        return score(entering.normed, entering.normed[entering.first_rows], entering.top_k)


class Aligned(Method):
    """The rule the other way round."""

    name = "aligned"
    description = "the tokens most aligned with the sink instead of the least"

    def score(self, entering: LayerInput) -> torch.Tensor:
        """What each score lacks of the largest, [C]."""
        scores = self.score_by_sink(entering)
        return scores.max() - scores


class Attended(Method):
    """The rule with a score that a server has too late: the prompt has to be there as a whole."""

    name = "attended"
    description = "the tokens that the prompt's end attends to most, in the layer itself"

    def score(self, entering: LayerInput) -> torch.Tensor:
        """What the attention to each lacks of all attention, [C]."""
        return 1 - entering.end_attention()[entering.top_k.candidates]


class Forget(Method):
    """The rule, and no K and V of what it leaves out."""

    name = "forget"
    description = "tokens that are not selected leave no K and V, the sink apart"
    hides_others = True


METHODS = {
    method.name: method
    for method in (Method, Prune, Replace, Random, Sink, Normed, Aligned, Attended, Forget)
}


def method_named(name: str, rule: Method) -> Method:
    """One of `METHODS`, with the rule's numbers."""
    return METHODS[name](window=rule.window, tail=rule.tail, seed=rule.seed)
