"""What an OrthoRank model carries besides its stock modules."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from vllm.sequence import IntermediateTensors

from orthorank_vllm.attention.backend import choose_backend
from orthorank_vllm.config import OrthoRankConfig
from orthorank_vllm.engine.drafts import Drafts
from orthorank_vllm.engine.shadow_rows import ShadowRows
from orthorank_vllm.engine.step_stats import Seconds, StepCounter
from orthorank_vllm.engine.unsupported import check_supported
from orthorank_vllm.engine.weights import Renewal
from orthorank_vllm.model import qkv
from orthorank_vllm.model.adapters import RowAdapters
from orthorank_vllm.model.decoder import Decoder
from orthorank_vllm.model.fingerprint import Fingerprint
from orthorank_vllm.model.forward import Outcome, SelectiveLayer, sparse_forward
from orthorank_vllm.model.ops import add_and_norm
from orthorank_vllm.model.sinks import SinkTable
from orthorank_vllm.model.stand_in import FusedStandIn, stand_ins_to_add
from orthorank_vllm.model.tensor_parallel import is_first_rank
from orthorank_vllm.options import OptionError
from orthorank_vllm.selection.plan import Batch, Plan, make_plan, profile_run_batches
from orthorank_vllm.start_lines import start_up_line, warning

# vLLM shows the log lines of its own namespace only.
logger = logging.getLogger("vllm.orthorank")

# Beside one slot for every running request, first tokens seen lately.
SPARE_SINK_SLOTS = 64


class SparsePrefill:
    """The resolved configuration, the sink table and the counts of one worker.

    Attributes:
        attention: how the layers of a sparse forward attend; may be replaced between forwards.
        is_paused: whether every forward is to be stock vLLM's, for a comparison of the two in one
            engine; may be changed between forwards.
        needs_warm_up: the attention's kernels are not compiled yet.
        has_run: the model has, so that its first weights are complete.
        shadow_rows: what prompts that are computed once more, densely, are compared by; None where
            none are.
        needs_model_state: Model Runner V2 has not yet asked for the model's state, which brings
            it the plans.
    """

    def __init__(self, vllm_config: Any, model: Any) -> None:
        """Take a model's layers apart, with what its options make of them.

        Args:
            model: see `Decoder`.

        Raises:
            OptionError: the engine was configured without OrthoRank's checks,
                or for something that it cannot do.
        """
        settings = vllm_config.additional_config.get("orthorank")
        if not settings or "num_layers" not in settings:
            raise OptionError(
                "an OrthoRank architecture was asked for by name, without its options: give "
                '--orthorank-ratio, or additional_config["orthorank"], and leave the '
                "architecture to the plugin"
            )
        check_supported(vllm_config)
        self._decoder = Decoder(model)
        model_config = vllm_config.model_config
        self._max_num_seqs = vllm_config.scheduler_config.max_num_seqs
        self._sink_capacity = self._max_num_seqs + SPARE_SINK_SLOTS
        self._hidden_size = model_config.get_hidden_size()
        self._dtype = model_config.dtype
        self._has_lora = vllm_config.lora_config is not None
        self._drafts = Drafts(vllm_config)
        self._device = torch.get_default_device()
        # The ranks compute the same tokens: one of them counts.
        self._counter = StepCounter.of(vllm_config, self._decoder) if is_first_rank() else None
        self._outcome: Outcome | None = None
        self.shadow_rows: ShadowRows | None = None
        self.is_paused = self.needs_warm_up = self.has_run = False
        # There vLLM sizes its KV cache by the memory that its first forward takes.
        self._needs_profile_run = self._device.type == "cuda"
        self.needs_model_state = bool(vllm_config.use_v2_model_runner)
        # Weights of layers that may yet become selective.
        self._fused: dict[int, qkv.FusedWeight] = {}
        for index, layer in self._decoder.layers.items():
            qkv.tell_before_packing(layer.attn, partial(self._cut, index))
        self._renewal = Renewal()
        self.config = OrthoRankConfig.from_dict(settings)
        if not self.config.to_choose:
            self.use_layers(self.config)

    def use_layers(
        self, config: OrthoRankConfig, stand_ins: Mapping[int, FusedStandIn] | None = None
    ) -> None:
        """Take the layers that are final now, at once or after a calibration at start-up.

        Args:
            stand_ins: of any layers; None: those in the configuration's file.

        Raises:
            OptionError: that file cannot be used.
        """
        self.config = config
        keeps = {layer: keep for layer, keep in config.layers if layer in self._decoder.layers}
        if not config.stand_in:
            stand_ins = {}
        elif stand_ins is None:
            stand_ins = stand_ins_to_add(config.stand_in, keeps, self._hidden_size, self._dtype)
        by_error = {layer for layer, found in stand_ins.items() if found.knows_errors}
        by_sink = sorted(layer for layer, keep in keeps.items() if keep and layer not in by_error)
        self._selective = {
            layer: SelectiveLayer(
                place,
                by_sink.index(layer) if layer in by_sink else None,
                self._split_of(layer),
                stand_ins.get(layer),
            )
            for place, (layer, _) in enumerate(config.layers)
            if layer in keeps
        }
        self._fused = {}
        self.attend_by(config.attention)
        self._sinks = SinkTable(
            num_layers=len(by_sink),
            capacity=self._sink_capacity,
            hidden_size=self._hidden_size,
            dtype=self._dtype,
            device=self._device,
        )
        metrics = None if self._counter is None else self._counter.metrics
        if metrics is not None:
            metrics.tell(config)
        shadow_metrics = None if metrics is None else metrics.shadow
        self.shadow_rows = ShadowRows(shadow_metrics) if config.shadow else None
        if metrics is None:
            return
        logger.info("%s, attention: %s", start_up_line(config), self.attention.description)
        if self._device.type != "cpu":
            logger.warning(
                "OrthoRank's path for GPUs has never run on one: before you rely on it, compare "
                "its outputs and its speed with stock vLLM's (`orthorank doctor`, and in a clone "
                "`make gpu-check`)."
            )
        if self._has_lora and config.stand_in:
            logger.info(
                "OrthoRank's stand-ins were fitted on the base model; rows with a LoRA adapter get "
                "the same"
            )
        if much := warning(config):
            logger.warning("%s", much)
        if not config.measured:
            logger.warning(
                "OrthoRank serves less than was asked for, or guessed its layers (%s): %s.",
                config.source,
                config.remedy,
            )

    def attend_by(self, asked: str) -> None:
        """Attend in another way from now on.

        Args:
            asked: one of `options.ATTENTION_BACKENDS`.

        Raises:
            OptionError: it cannot serve this model here.
        """
        layers = [layer.attn.attn for layer in self._decoder.layers.values()]
        self.attention = choose_backend(asked, layers, self._device.type)
        self.needs_warm_up = self.attention.compile is not None

    def _split_of(self, layer: int) -> qkv.SplitWeight | None:
        fused = self._fused.get(layer)
        if fused is None:
            return qkv.SlicedWeight.of(self._decoder.layers[layer].attn)
        return qkv.PackedWeight(fused)

    def plan(self, batch: Batch) -> Plan | None:
        """The plan of one forward, None if it is a dense one."""
        if self.config.to_choose:
            raise RuntimeError("OrthoRank was to choose its layers at start-up and has not")
        if self._counter is not None:
            self._renewal.say(self.config)
        keeps = self.config.keeps
        if self.is_paused or not keeps:
            return None
        if any(keeps) and not (self._decoder.is_first and self._decoder.is_last):
            batch = self._with_known_sinks(batch, keeps)
        if self._drafts.reads_end(self._decoder.told_layers, self._decoder.last_layer + 1):
            batch = replace(batch, wants_all_rows=True)
        return make_plan(batch, keeps, self.config.window, self.config.tail)

    def _with_known_sinks(self, batch: Batch, keeps: Sequence[float]) -> Batch:
        """Requests whose sink's state a pipeline stage lacks do not compete: it cannot compute it.

        Every stage keeps its table in the same way, so all of them decide alike.
        """
        is_known = np.array([sink in self._sinks for sink in batch.sinks])
        is_served = is_known | (batch.num_computed == 0)
        if batch.num_selective is not None:
            never_scored = next(place for place, keep in enumerate(keeps) if keep)
            is_served |= batch.num_selective <= never_scored
        return replace(batch, prompt_len=np.where(is_served, batch.prompt_len, 0))

    def forward(
        self,
        plan: Plan,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        from_earlier_stage: IntermediateTensors | None,
        adapters: RowAdapters | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, list[torch.Tensor]] | IntermediateTensors:
        """This stage's part of a forward with a plan.

        Args:
            input_ids, positions: [tokens] or more, which pad them; the ids are read in the first
                stage.
            adapters: of the tokens; None: none has one.
            inputs_embeds: [tokens or more, hidden] what vLLM gives in place of all the ids, where
                some prompt may come as embeddings.

        Returns:
            [tokens, hidden] final normalised states, right in the rows `plan.sampled_rows`, and
            beside them what a draft model reads of earlier layers, where vLLM asked for that;
            or what the next stage takes.
        """
        num_rows, positions = len(positions), positions[: plan.num_tokens]
        for kept in self._selective.values():
            kept.place_stand_in(self._device)
        update: torch.Tensor | None = None
        if self._decoder.is_first and inputs_embeds is not None:
            # A copy: vLLM's own is used again, and the walk uses it up.
            residual = self._decoder.entering(inputs_embeds[: plan.num_tokens].clone())
        elif self._decoder.is_first:
            assert input_ids is not None
            residual = self._decoder.embed(input_ids[: plan.num_tokens], adapters)
        else:
            assert from_earlier_stage is not None
            residual, update = from_earlier_stage["residual"], from_earlier_stage["hidden_states"]
        residual, update, told, self._outcome = sparse_forward(
            self._decoder,
            self._selective,
            self._sinks,
            self.attention,
            plan,
            positions,
            residual,
            update,
            adapters,
        )
        if self._decoder.is_last:
            hidden, _ = add_and_norm(self._decoder.norm, residual, update)
            return self._drafts.shown(hidden, told, num_rows)
        if update is None:
            update = torch.zeros_like(residual)
        return IntermediateTensors({"hidden_states": update, "residual": residual})

    @property
    def needs_profile_run(self) -> bool:
        """Whether the next forward without requests is the one that vLLM measures memory with."""
        return self._needs_profile_run

    def profile_run(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        adapters: RowAdapters | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> None:
        """Run the sparse forward on dummy tokens, so that the most that it takes is measured too.

        Without requests there is no KV cache and no attention; nothing is counted or remembered.

        Args:
            input_ids, positions: [tokens], as many as a forward can have.
            adapters: of these tokens, where some may have one.
            inputs_embeds: see `forward`.

        Raises:
            RuntimeError: vLLM's runner would call the model without plans.
        """
        if self.needs_model_state:
            raise RuntimeError(
                "OrthoRank would be inactive: Model Runner V2 did not ask for the model's state"
            )
        self._needs_profile_run = False
        config = self.config
        for batch in profile_run_batches(
            len(positions), self._max_num_seqs, config.keeps, config.tail
        ):
            plan = self.plan(batch)
            if plan is not None:
                self.forward(plan, input_ids, positions, None, adapters, inputs_embeds)
                self._outcome = None
                self._sinks.clear()

    def warm_up(self) -> None:
        """Have the attention's kernels compiled, once there is a KV cache.

        Those of the selection are by then: the profile run selects. So no request waits for a
        compiler, whatever its length.
        """
        if self.attention.compile is not None:
            self.needs_warm_up = not self.attention.compile(self._dtype)

    def count(self, batch: Batch | None, plan: Plan | None, seconds: Seconds) -> None:
        """Count one step and this stage's part of its token updates, after its forward.

        Args:
            batch: None in a step without prompt tokens.
        """
        outcome, self._outcome = self._outcome, None
        if (plan is None) != (outcome is None):
            raise RuntimeError("OrthoRank made a plan and the model ran without it")
        if self._counter is not None:
            self._counter.count(batch, plan, outcome, seconds)
        if self.shadow_rows is not None:
            self.shadow_rows.count()

    def weights_changed(self, fingerprint: Fingerprint | None = None) -> None:
        """Forget what was made of the weights: to be called whenever there are others.

        Args:
            fingerprint: theirs, where they passed the model's own `load_weights`.
        """
        if not self.config.to_choose:
            self._sinks.clear()
        if self.shadow_rows is not None:
            self.shadow_rows.forget()
        if fingerprint is not None and self.has_run:
            self._renewal.note(fingerprint)

    def _cut(self, layer: int, fused: qkv.FusedWeight) -> None:
        """Cut a layer's weight before vLLM packs it, or keep it until that is decided."""
        if self.config.to_choose:
            self._fused[layer] = fused
        elif layer in self._selective:
            self._selective[layer].split = qkv.PackedWeight(fused)
