"""Every metric's name, and what it tells.

Without the `_total` that prometheus-client adds to a counter's name.
"""

UP = "orthorank_up"
ACTIVE = "orthorank_active"
CONFIG_INFO = "orthorank_config_info"
RATIO_ASKED = "orthorank_ratio_asked"
RATIO_CONFIGURED = "orthorank_ratio_configured"
RATIO_MAX = "orthorank_ratio_max"
EXPECTED_LOSS = "orthorank_expected_loss_nats"
EXPECTED_FOUND = "orthorank_expected_lookups_found_ratio"

PREFILL_TOKENS = "orthorank_prefill_tokens"
OTHER_RATIO_TOKENS = "orthorank_other_ratio_prefill_tokens"
UPDATES = "orthorank_token_updates"
UPDATES_SKIPPED = "orthorank_token_updates_skipped"
LAYER_UPDATES = "orthorank_layer_token_updates"
LAYER_UPDATES_SKIPPED = "orthorank_layer_token_updates_skipped"
FLOPS_SAVED = "orthorank_flops_saved"
SINK_HITS = "orthorank_sink_hits"
SINK_MISSES = "orthorank_sink_misses"

STEP_SECONDS = "orthorank_step_duration_seconds"
STEP_PREFILL_TOKENS = "orthorank_step_prefill_tokens"
STEP_PREFILL_SECONDS = "orthorank_step_prefill_seconds"
PLAN_SECONDS = "orthorank_plan_duration_seconds"

SHADOW_KL = "orthorank_shadow_kl"
SHADOW_COMPARISONS = "orthorank_shadow_comparisons"
SHADOW_AGREEMENTS = "orthorank_shadow_top1_agreements"
SHADOW_TOKENS = "orthorank_shadow_prefill_tokens"
SHADOW_DROPPED = "orthorank_shadow_dropped"

HELP = {
    UP: "1 if the counts of all workers could be read.",
    ACTIVE: "1 if the workers of this engine run OrthoRank.",
    CONFIG_INFO: "1; what is run stands in the labels.",
    RATIO_ASKED: "The ratio that was asked for; absent where layers were given without one, and "
    "where it was to be found.",
    RATIO_CONFIGURED: "The ratio that the selective layers make, on prompts so long that tails and "
    "the rounding up in windows are nothing.",
    RATIO_MAX: "The largest ratio that a request may ask for.",
    EXPECTED_LOSS: "What answers lose by the profile's measurement, in nats per token, by the kind "
    "of text; absent where it was not measured.",
    EXPECTED_FOUND: "Share of the numbers in a list in the prompt that is still found, by the "
    "profile's measurement.",
    PREFILL_TOKENS: "Prompt tokens that prefill computed.",
    OTHER_RATIO_TOKENS: "Prompt tokens that prefill computed for requests that asked for another "
    "ratio than the server's, by the ratio that their layers make.",
    UPDATES: "Token updates that prefill computed (prompt tokens x layers).",
    UPDATES_SKIPPED: "Token updates that prefill skipped (prompt tokens x layers).",
    LAYER_UPDATES: "Token updates that prefill computed in one layer.",
    LAYER_UPDATES_SKIPPED: "Token updates that prefill skipped in one layer.",
    FLOPS_SAVED: "Floating-point operations not made, estimated from the model's shapes.",
    SINK_HITS: "Requests in a step without their position 0 whose sink's state was there.",
    SINK_MISSES: "Requests in a step without their position 0 whose sink's state was recomputed.",
    STEP_SECONDS: "Time of the model's forward in a step, on the host, by the path that it took.",
    STEP_PREFILL_TOKENS: "Prompt tokens of steps that had some, by path.",
    STEP_PREFILL_SECONDS: "Time of the model's forward in steps with prompt tokens, by path.",
    PLAN_SECONDS: "Time on the host to plan a step with prompt tokens.",
    SHADOW_KL: "KL(dense || OrthoRank) of the distribution of an answer's first token, in nats, of "
    "prompts that were computed once more, densely.",
    SHADOW_COMPARISONS: "Prompts that were computed once more, densely, and compared.",
    SHADOW_AGREEMENTS: "Of these, prompts whose likeliest first token is the same in both.",
    SHADOW_TOKENS: "Prompt tokens that were computed once more, densely.",
    SHADOW_DROPPED: "Prompts that were to be compared and were not, by the reason.",
}

STEP_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 25.0, 60.0),
)
KL_BUCKETS = (1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
PLAN_BUCKETS = (1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 0.1)

# The paths of a step.
SPARSE = "sparse"
STOCK = "stock"

# Why a prompt was not compared: no step was idle enough in time, others needed the KV cache, or an
# error, after which no more are.
BUSY = "busy"
NO_ROOM = "no_room"
FAILED = "failed"
DROPPED = (BUSY, NO_ROOM, FAILED)
