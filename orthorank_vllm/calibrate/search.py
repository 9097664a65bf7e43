"""The search: one more selective layer at a time, whose set costs answers least for what it saves.

Every step measures sets, as single costs do not add up. What each layer costs alone only says
which few to try. In the spirit of SLEB (arXiv 2402.09025), by the loss that a served answer has.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from orthorank_vllm.calibrate.measured import Layers, Losses, Measured
from orthorank_vllm.config import ratio_of
from orthorank_vllm.options import LayerKeep
from orthorank_vllm.profiles import Entry

# The keeps that layers are tried with: 0 and 1/2, and where 1/2 is best less and less.
NONE, SIXTH, THIRD, HALF = 0.0, 1 / 6, 1 / 3, 1 / 2
KEEPS = (NONE, SIXTH, THIRD, HALF)
FINER = {HALF: THIRD, THIRD: SIXTH}
# Sets that a step tries, beside finer keeps of the best: at least so many, and more where they cost
# little time, which late layers do, up to so many and as many passes through the model.
LEAST_TRIED, MOST_TRIED, PASSES = 3, 6, 1.5
# Two layers are taken at once where together they cost no more than this many times their sum.
TOGETHER = 1.25
# Of the median layer's cost at keep 0: above it keep 1/2 is looked at, too.
DEAR = 0.5
# Alone, in nats per token of a kind in which something has to be found in the prompt: such a layer
# carries that, and comes after all others.
CARRIES = 0.1
FINDING_KINDS = ("look-up", "copy")
# Of the best set's cost: where noise is large, no worse a set than this is taken for it.
NOISE_SHARE = 0.1
# A layer that costs the held-back text so many times what it cost here, and nats more, was luck.
LUCK, LUCK_NATS = 2.0, 0.02
# Nats per token. Layers of a trained model differ by a hundred times as much.
SAME_LOSS = 1e-4


class NothingToTell(Exception):
    """The losses say nothing about the layers; why, in half a sentence."""


@dataclass
class Search:
    """What is looked for, and found so far.

    Attributes:
        scout: few samples, on which every layer is measured alone.
        here: the samples that sets are chosen on.
        held_back: samples of another text, which can only speak against a layer.
        entries: found so far, in order.
        added: what each layer added when it was last measured at a keep, in nats per token.
        put_off: layers that come after all others.
        stand_in_share: see `Profile.share`.
        tries_keeps: whether a layer may also compute some of its tokens.
        on_entry: called after each entry.
    """

    scout: Measured
    here: Measured
    held_back: Measured
    num_layers: int
    tries_keeps: bool = True
    stand_in_share: float = 0.0
    on_entry: Callable[[], None] = lambda: None
    entries: list[Entry] = field(default_factory=list)
    added: dict[LayerKeep, float] = field(default_factory=dict)
    put_off: set[int] = field(default_factory=set)

    @property
    def chosen(self) -> Layers:
        return tuple(entry.layer_keep for entry in self.entries)

    @property
    def ratio(self) -> float:
        """The ratio reached so far."""
        return ratio_of(self.chosen, self.num_layers, self.stand_in_share)

    @property
    def alone(self) -> tuple[Mapping[str, float], ...]:
        """What each layer costs by itself with keep 0, by kind of text."""
        layers = [LayerKeep(layer, NONE) for layer in range(self.num_layers)]
        measured = self.scout.of((), layers)
        return tuple(self.scout.cost(measured[layer]).loss for layer in layers)

    def run(self, max_ratio: float, chance: float = math.inf) -> None:
        """Search until a ratio is reached, or every layer is chosen.

        Args:
            chance: the loss of a guess, ln(vocabulary).

        Raises:
            NothingToTell: all layers cost the same, or the dense model is no better than chance.
        """
        loss, _ = self.here.dense
        if not loss < chance:
            raise NothingToTell(
                f"the dense model's loss, {loss:.4g} nats a token, is no better than chance, "
                f"{chance:.4g}"
            )
        self._look_at_each()

        def is_reached() -> bool:
            return self.ratio > max_ratio - 1e-9 or len(self.entries) == self.num_layers

        while not is_reached():
            self._step(is_reached)

    def _look_at_each(self) -> None:
        alone = self.scout.of((), [LayerKeep(layer, NONE) for layer in range(self.num_layers)])
        cost = {each: self.scout.mean(losses) for each, losses in alone.items()}
        if self.num_layers > 1 and max(cost.values()) - min(cost.values()) <= SAME_LOSS:
            raise NothingToTell(
                f"with any of its {self.num_layers} layers selective it answers as without"
            )
        self.added.update(cost)
        self.put_off |= {each.layer for each, losses in alone.items() if self._carries(losses)}
        if not self.tries_keeps:
            return
        # Where it costs something to leave all of a layer's tokens out, half may be nearly free.
        dear = statistics.median(cost.values()) * DEAR
        some = [e.layer for e in alone if e.layer not in self.put_off and cost[e] > dear]
        halves = self.scout.of((), [LayerKeep(layer, HALF) for layer in some])
        self.added.update({each: self.scout.mean(losses) for each, losses in halves.items()})

    def _carries(self, losses: Losses) -> bool:
        by_kind = self.scout.by_kind(losses)
        return any(by_kind.get(kind, 0.0) > CARRIES for kind in FINDING_KINDS)

    def _step(self, is_reached: Callable[[], bool]) -> None:
        found = self.here.of(self.chosen, self._to_try())
        best = self._best(found)
        while best.keep in FINER:
            less = LayerKeep(best.layer, FINER[best.keep])
            found |= self.here.of(self.chosen, [less])
            if self._best({each: found[each] for each in (best, less)}) == best:
                break
            best = less
        added = {each: self._added(losses) for each, losses in found.items()}
        self.added.update(added)
        others = {each: losses for each, losses in found.items() if each.layer != best.layer}
        second = self._best(others) if others else None
        if not self._take(best, found[best]) or second is None or is_reached():
            return
        if added[second] / _saved(second) > self._least_known(without=found):
            return
        beside = self.here.of(self.chosen, [second])[second]
        if self._added(beside) <= TOGETHER * added[second] + SAME_LOSS:
            self._take(second, beside)

    def _least_known(self, without: Collection[LayerKeep]) -> float:
        """What the best of the other layers added when it was last tried, for what it saves."""
        layers = {layer for layer, _ in (*self.chosen, *without)} | self.put_off
        return min(
            (
                added / _saved(each)
                for each, added in self.added.items()
                if each.layer not in layers
            ),
            default=math.inf,
        )

    def _to_try(self) -> list[LayerKeep]:
        taken = {layer for layer, _ in self.chosen}
        free = [each for each in self.added if each.layer not in taken]
        first = [each for each in free if each.layer not in self.put_off] or free
        first.sort(key=lambda each: (self.added[each] / _saved(each), -each.layer))
        passes = itertools.accumulate(1 - each.layer / self.num_layers for each in first)
        affordable = sum(total <= PASSES for total in passes)
        return first[: min(max(affordable, LEAST_TRIED), MOST_TRIED)]

    def _added(self, losses: Losses) -> float:
        return self.here.mean(losses) - self.here.mean(self.here.of_all(self.chosen))

    def _best(self, found: Mapping[LayerKeep, Losses]) -> LayerKeep:
        """What adds least for what it saves; of those within the noise the last layer."""
        base = self.here.of_all(self.chosen).kl
        added = {
            each: [(kl - before) / _saved(each) for kl, before in zip(losses.kl, base, strict=True)]
            for each, losses in found.items()
        }
        mean = {each: self.here.weighted(values) for each, values in added.items()}
        least = min(mean, key=lambda each: (mean[each], -each.layer))

        def is_as_good(each: LayerKeep) -> bool:
            differences = [a - b for a, b in zip(added[each], added[least], strict=True)]
            difference = mean[each] - mean[least]
            return difference <= min(
                self.here.standard_error(differences),
                NOISE_SHARE * max(mean[least], 0.0) + SAME_LOSS,
            )

        return min(filter(is_as_good, added), key=lambda each: (-each.layer, each.keep))

    def _take(self, chosen: LayerKeep, losses: Losses) -> bool:
        """Add an entry, unless the held-back text speaks against it."""
        before, with_it = self.chosen, (*self.chosen, chosen)
        there = self.held_back.of_all(with_it)
        added_there = self.held_back.mean(there) - self.held_back.mean(
            self.held_back.of_all(before)
        )
        is_luck = added_there > LUCK * max(self._added(losses), 0.0) + LUCK_NATS
        if is_luck and chosen.layer not in self.put_off:
            self.put_off.add(chosen.layer)
            return False
        self.entries.append(
            Entry(
                chosen.layer,
                chosen.keep,
                cost=self.here.cost(losses),
                held_back=self.held_back.cost(there),
            )
        )
        self.on_entry()
        return True


def _saved(each: LayerKeep) -> float:
    return 1 - each.keep
