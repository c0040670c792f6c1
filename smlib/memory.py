"""How much memory the stages take, computed from a model's shape before anything is loaded.

    settings = preset("llama2-7b-24gb", "gsm8k")
    stages(LLAMA_2_7B, settings, prompt=256, shown=1400)             # {"02_sft": {"weights": 3.9e9, ...}, ...}: bytes
    print(fit_run(LLAMA_2_7B, settings, 24e9, prompt=256, shown=1400))  # whether all fit, and if not, what to change

    choices = Choices(layout="adapters", frozen="bfloat16", precision="bfloat16", recompute=True, minibatch=4)
    peak(LLAMA_2_7B, choices)                    # ("rollout", 2.39e10): PPO's phase that needs most, and its bytes
    print(fit(LLAMA_2_7B, choices, 24e9))        # whether that fits, and if not, what each knob gives

A `Sampling` says how a stage draws, a `Training` how SFT, the reward model and DPO train, `Choices` what PPO does.

All sizes are bytes of tensors. A card needs more: the CUDA context and workspaces (0.5 to 1 GB) and what the allocator
leaves between tensors. So cards count here as 24e9, 40e9 and 80e9 bytes, 7 % less than the 24, 40 and 80 GiB they have.

Every formula counts what the code of smlib.roles, smlib.ppo, smlib.sampling, of transformers' Llama and of TRL 1.16
allocates on a CPU; on a GPU the output head of TRL's SFT and DPO takes less, as Triton makes no copies of logits. The
letters: H hidden, I intermediate, Q = heads x head size, K = key heads x head size, L layers, V vocabulary; s bytes of
an element of the residual stream, c of a matrix product's operands (autocast makes c = 2 where s = 4). Attention is
taken to be fused (SDPA), so that no matrix of heads x length x length is kept, but for the mask of packed rows.
Lengths are the longest: every completion is taken to reach its limit.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter

from transformers import LlamaConfig

from smlib.errors import UsageError
from smlib.models import CONTINUATIONS_PER_ROW, group_size
from smlib.sampling import MAX_BATCH, MAX_PROMPTS, rows_at_once
from smlib.settings import Settings

NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes a weight: 4 bits, a byte per block of 64, a float32 per 256 blocks
ALLOWED = {
    "layout": ("separate", "adapters"),
    "value": ("model", "head"),
    "reward": ("none", "model", "adapter"),
    "frozen": ("float32", "bfloat16", "nf4"),
    "precision": ("float32", "bfloat16"),
}
TRAINED = ("sft", "reward", "dpo")
REANSWERED = 16  # tokens of an answer read off a rationale (rationales.reanswer)
SCORED_TOKENS = 2_048  # in a batch of the reward model (reward_model.score)
COLUMNS = (  # of `table`
    *ALLOWED, "rank", "recompute", "minibatch", "length", "completion", "rollout_rows",
)  # fmt: skip
HEAD_TOKENS, HEAD_WIDTH = 4_096, 32_768  # logits that TRL's SFT and DPO make at once: of tokens, of the vocabulary
COUNTED = ("llama", "mistral", "qwen2")  # kinds of models
PARTS = ("weights", "moments", "gradients", "activations", "logits", "copies", "cache", "scratch")
CARDS = {"24 GB": 24e9, "40 GB": 40e9, "80 GB": 80e9}
LLAMA_2_7B = LlamaConfig(  # its config.json: 6.74e9 parameters
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32,
    vocab_size=32000, tie_word_embeddings=False, max_position_embeddings=4096,
)  # fmt: skip


@dataclass(frozen=True)
class Choices:
    """How the roles are held (smlib.roles) and how much is computed at once; names and defaults as in the settings."""

    layout: str = "separate"  # "separate": a model per role; "adapters": LoRA adapters of one frozen base
    value: str = "head"  # "head": on the policy's trunk; "model": a trunk, or an adapter, of its own
    reward: str = "none"  # "model": a frozen model of its own; "adapter": of the same base; "none": no model
    rank: int = 16  # of the adapters
    frozen: str = "float32"  # weights that do not train; those that do, and adapters, are float32 for AdamW's sake
    precision: str = "float32"  # of forward and backward passes; "bfloat16": autocast
    recompute: bool = False
    minibatch: int = 16  # completions at once
    accumulated: bool = False  # an optimizer step is made of several of them
    rollout_rows: int = 128  # completions drawn at a time, at most sampling.MAX_BATCH
    samples: int = 8  # of them, from the same prompt
    prompt: int = 128  # tokens
    completion: int = 128  # tokens

    def __post_init__(self):
        for name, allowed in ALLOWED.items():
            if getattr(self, name) not in allowed:
                raise UsageError(f"{name} {getattr(self, name)!r} is unknown; choose one of: {', '.join(allowed)}.")
        for name in ("rank", "minibatch", "rollout_rows", "samples", "prompt", "completion"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} = {getattr(self, name)} is not allowed; give at least 1.")
        if self.rollout_rows > MAX_BATCH:
            raise UsageError(f"rollout_rows = {self.rollout_rows}, but the sampler draws {MAX_BATCH} at most at once.")
        if self.reward == "adapter" and self.layout != "adapters":
            raise UsageError("reward 'adapter' needs layout 'adapters': separate models have no base to adapt.")
        if self.frozen != "float32" and self.precision == "float32":
            raise UsageError(f"frozen {self.frozen!r} needs precision 'bfloat16': the base computes in that.")

    @property
    def lora(self) -> bool:
        return self.layout == "adapters"

    @property
    def compute(self) -> int:
        """c."""
        return 2 if self.precision == "bfloat16" else 4

    @property
    def adapter(self) -> int:
        """Bytes of an element that LoRA's own matrix products read: under autocast like any other's."""
        return self.compute

    @property
    def masks(self) -> tuple[int, int]:
        """Bytes of a row's mask of length x length, per entry: of the one for all layers, and of each layer's copy,
        which autocast makes of a float32 one."""
        return self.stream, 2 if self.compute < self.stream else 0

    @property
    def stream(self) -> int:
        """s of the models that train: that of their embeddings, which autocast does not touch."""
        return 2 if self.lora and self.frozen != "float32" else 4

    @property
    def together(self) -> int:
        """Completions of one question that share a row and in it their prompt (models.pack, ppo.Batch)."""
        return group_size(self.minibatch, self.samples)

    @property
    def length(self) -> int:
        """Tokens in a row."""
        return self.prompt + self.together * self.completion

    @property
    def tokens(self) -> int:
        """In a minibatch, prompts included."""
        return self.minibatch // self.together * self.length

    @property
    def drawn(self) -> int:
        """Tokens of the minibatch that have logits."""
        return self.minibatch * self.completion


@dataclass(frozen=True)
class Training:
    """How SFT, the reward model and DPO train: in the precision of the weights, with adapters in float32."""

    kind: str  # "sft" (of RFT too), "reward" or "dpo"
    frozen: str = "float32"  # the weights; where they train, float32
    rank: int = 0  # of an adapter; 0: the weights train
    recompute: bool = False
    rows: int = 16  # rationales, or pairs, at once
    accumulated: bool = False  # an optimizer step is made of several times `rows`
    prompt: int = 128  # tokens
    completion: int = 128  # tokens

    def __post_init__(self):
        if self.kind not in TRAINED:
            raise UsageError(f"kind {self.kind!r} is unknown; choose one of: {', '.join(TRAINED)}.")
        if self.frozen != "float32" and not self.rank:
            raise UsageError(f"frozen {self.frozen!r} needs a rank: weights that train are float32.")

    @property
    def lora(self) -> bool:
        return self.rank > 0

    @property
    def compute(self) -> int:
        """c, and as nothing is cast s."""
        return 4 if self.frozen == "float32" else 2

    stream = compute

    @property
    def adapter(self) -> int:
        return 4

    @property
    def masks(self) -> tuple[int, int]:
        """As of Choices. TRL's mask is boolean, and every layer's attention makes numbers of it; one row has none."""
        return (self.stream, 0) if self.kind == "reward" else (1, self.stream) if self.sequences > 1 else (0, 0)

    @property
    def sequences(self) -> int:
        """Rows of tokens: both sides of a pair are one in the reward model (models.pack), and two in DPO."""
        return self.rows * (2 if self.kind == "dpo" else 1)

    @property
    def length(self) -> int:
        """Tokens in each; the sides of a pair share no more than the prompt."""
        return self.prompt + self.completion * (2 if self.kind == "reward" else 1)

    @property
    def tokens(self) -> int:
        return self.sequences * self.length

    @property
    def drawn(self) -> int:
        """Tokens that have logits: TRL's SFT and DPO make them of all but the last of a sequence."""
        return self.rows * 2 * self.completion if self.kind == "reward" else self.tokens - self.sequences


@dataclass(frozen=True)
class Sampling:
    """How the sampler draws from one model whose adapter, if it had one, is merged. Names as of Choices."""

    frozen: str = "float32"  # its weights
    rollout_rows: int = 128
    samples: int = 1
    prompt: int = 128
    completion: int = 128

    lora = False

    @property
    def compute(self) -> int:
        return 4 if self.frozen == "float32" else 2

    stream = adapter = compute


def choices_of(settings: Settings, prompt: int) -> Choices:
    """How stage 04 of these settings holds the roles and computes; prompt: tokens of the longest."""
    ppo, hardware, lora = settings.ppo, settings.hardware, settings.lora.rank > 0
    minibatch = hardware.micro_batch or ppo.minibatch
    return Choices(
        layout="adapters" if lora else "separate",
        value=ppo.value,
        reward="adapter" if lora else "model",
        rank=max(settings.lora.rank, 1),
        frozen=hardware.weights,
        precision=ppo.precision,
        recompute=hardware.recompute,
        minibatch=minibatch,
        accumulated=minibatch < ppo.minibatch,
        rollout_rows=min(hardware.rollout_rows, ppo.episodes, MAX_BATCH),
        samples=ppo.samples_per_question,
        prompt=prompt,
        completion=ppo.max_new_tokens,
    )


# ---- weights and what goes with them -------------------------------------------------------------------------


def counts(config) -> bool:
    """Whether the formulas are for such a model: a Llama without biases, a Mistral or a Qwen2."""
    biases = getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False)
    return config.model_type in COUNTED and not biases


def widths(config: LlamaConfig) -> tuple[int, int, int, int, int]:
    """(H, I, Q, K, V); models that do not count (`counts`) are refused, as their layers hold something else."""
    if not counts(config):
        raise UsageError(
            f"a {config.model_type!r} with these options is not counted here; give a Llama's, Mistral's or Qwen2's "
            "config."
        )
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    return config.hidden_size, config.intermediate_size, heads * size, key_heads * size, config.vocab_size


def parameters(config: LlamaConfig) -> dict[str, int]:
    """Weights by kind: linear = L (2 HQ + 2 HK + 3 HI), biases = L (Q + 2 K) in Qwen2, norms = (2 L + 1) H,
    embedding = VH, and as much for the output head unless tied."""
    h, i, q, k, v = widths(config)
    layers = config.num_hidden_layers
    return {
        "linear": layers * (2 * h * q + 2 * h * k + 3 * h * i),
        "biases": layers * (q + 2 * k) if config.model_type == "qwen2" else 0,
        "norms": (2 * layers + 1) * h,
        "embedding": v * h,
        "head": 0 if config.tie_word_embeddings else v * h,
    }


def lora_parameters(config: LlamaConfig, rank: int) -> int:
    """Of one adapter on "all-linear": rank x (inputs + outputs) for each of a layer's seven matrices."""
    h, i, q, k, _ = widths(config)
    return config.num_hidden_layers * rank * (2 * (h + q) + 2 * (h + k) + 3 * (h + i))


def model_bytes(config: LlamaConfig, kind: str, head: bool = True) -> float:
    """One model's weights. "nf4": bitsandbytes' 4 bits with double quantisation (2305.14314) for the linear layers,
    bfloat16 for the rest, which it leaves alone. head: the output head too."""
    count = parameters(config)
    linear = count.pop("linear")
    rest = sum(count.values()) - (0 if head else count["head"])
    return linear * NF4 + rest * 2 if kind == "nf4" else (linear + rest) * (4 if kind == "float32" else 2)


def weights(config: LlamaConfig, choices: Choices) -> dict[str, float]:
    """By role. What trains is float32: in bfloat16, steps of AdamW below 1/256 of a weight would be lost."""
    adapter = 4 * lora_parameters(config, choices.rank)
    if choices.lora:
        found = {"base": model_bytes(config, choices.frozen), "policy": adapter}
        value = adapter
    else:
        found = {"policy": model_bytes(config, "float32"), "reference": model_bytes(config, choices.frozen)}
        value = model_bytes(config, "float32", head=False)
    found["value"] = 4 * (config.hidden_size + 1) + (value if choices.value == "model" else 0)
    if choices.reward != "none":
        found["reward"] = adapter if choices.reward == "adapter" else model_bytes(config, choices.frozen)
    return found


def trained(config: LlamaConfig, choices: Choices) -> dict[str, int]:
    """Parameters that train, of policy and value: their gradients take 4 bytes each, AdamW's two moments 8."""
    found = weights(config, choices)
    return {role: int(found[role]) // 4 for role in ("policy", "value")}


def resident(config: LlamaConfig, choices: Choices) -> dict[str, float]:
    """What is there in every phase; gradients are not, as ppo.optimize drops them after each step."""
    count = sum(trained(config, choices).values())
    return {"weights": sum(weights(config, choices).values()), "moments": 8 * count}


# ---- activations ---------------------------------------------------------------------------------------------


def layer_activations(config: LlamaConfig, choices: Choices | Training) -> float:
    """What autograd keeps of one decoder layer, per token.

    Two norms: the input in float32 (4 H each), its reciprocal root (4), and, if its weight trains, the normalised input
    (sH). Attention: q, k, v and the output, 4 cQ (keys and values are repeated for all heads, as there is a mask), and
    a float32 logsumexp per head. MLP: gate, silu(gate), up and their product, 4 cI. Inputs of linear layers, cH: one
    for q, k and v and one for gate and up in float32; in bfloat16 autocast and peft give each of the five a copy, and
    LoRA's o_proj (cQ). LoRA: seven inputs of its B, c rank. Without autocast LoRA's inputs are float32 (a in place of
    c), the product of the MLP among them.
    """
    h, i, q, _, _ = widths(config)
    c, a, lora = choices.compute, choices.adapter, choices.lora
    norms = 2 * (4 * h + 4) + (0 if lora else 2 * choices.stream * h)
    attention = 4 * c * q + 4 * config.num_attention_heads
    inputs = a * h * (5 if c == 2 else 2) + (a * q if lora and c == 2 else 0)
    return norms + attention + inputs + (3 * c + a) * i + (7 * a * choices.rank if lora else 0)


def kept(config: LlamaConfig, choices: Choices | Training) -> float:
    """Activations of one pass over a minibatch, up to the last hidden states.

    With `recompute` the inputs of the layers alone (sH each). The last norm keeps as much as a layer's; under LoRA the
    first norm, whose input has no gradient, keeps nothing in its place.
    """
    layers, last = config.num_hidden_layers, (4 + (0 if choices.lora else choices.stream)) * config.hidden_size
    masks, layer_mask = choices.masks
    if choices.recompute:
        each = layers * choices.stream * config.hidden_size + last
    else:
        each = layers * layer_activations(config, choices) + (0 if choices.lora else last)
        masks += layers * layer_mask
    return choices.tokens * (each + choices.length * masks)


def states(config: LlamaConfig, choices: Choices) -> float:
    """The last hidden states of the drawn tokens (sH), and in float32 for the value (4 H), or bfloat16 for the head."""
    return choices.drawn * config.hidden_size * (choices.stream + (0 if choices.compute == 4 else 4))


def copies(config: LlamaConfig, choices: Choices, passes: int) -> float:
    """bfloat16 copies of float32 weights under autocast that outlast their use: `passes` forward passes' and a head's.

    Of weights that train autocast caches them until it ends; of frozen ones autograd keeps them, once for every pass,
    and with `recompute` the output head's alone.
    """
    if choices.stream == choices.compute:
        return 0.0
    lasting = 0 if choices.lora and choices.recompute else passes * parameters(config)["linear"]
    return 2 * (lasting + config.vocab_size * config.hidden_size)


def forward_work(config: LlamaConfig, choices: Choices | Training | Sampling, tokens: int) -> float:
    """Of a forward pass that keeps nothing: the embeddings, the layer's input, its residual and its normed input (4
    sH), silu(gate), up and their product (3 cI), where LoRA adds its result (4 I), without autocast by way of float32
    (8 I); and the widest matrix in bfloat16, if it is stored otherwise."""
    h, i, _, _, _ = widths(config)
    wider = 8 if choices.adapter > choices.compute else 0
    each = 4 * choices.stream * h + 3 * choices.compute * i + ((4 + wider) * i if choices.lora else 0)
    return tokens * each + _widest(config, choices)


def backward_work(config: LlamaConfig, choices: Choices | Training) -> float:
    """Of a layer's backward pass: gradients of the residual stream (2 sH) and in the MLP two more than what is kept of
    it (2 cI), and LoRA's input in float32 where c is 2 (4 I), without autocast its gradient too (8 I); the widest
    matrix as in `forward_work`. With `recompute` also the layer's activations, whose float32 input is there already,
    and bfloat16 copies of its float32 weights."""
    h, i, _, _, _ = widths(config)
    s, c = choices.stream, choices.compute
    wider = (4 if choices.adapter == c else 8) if choices.lora and c == 2 else 0
    each, cast = 2 * s * h + (2 * c + wider) * i, 0.0
    if choices.recompute:
        each += layer_activations(config, choices) - (4 * h if s == 4 else 0)
        cast = 0.0 if s == c else 2 * parameters(config)["linear"] / config.num_hidden_layers
    return choices.tokens * each + cast + _widest(config, choices)


def _widest(config: LlamaConfig, choices: Choices | Training | Sampling) -> int:
    h, i, _, _, _ = widths(config)
    return 2 * h * i if choices.compute == 2 and choices.frozen != "bfloat16" else 0


# ---- drawing and scoring -------------------------------------------------------------------------------------


def cache(config: LlamaConfig, choices: Choices | Sampling, drawn: bool = True) -> float:
    """Keys and values, when all rows are at their end: of every prompt once (s + c, as the keys come from the rotary
    embedding in s), and those of the drawn tokens for every row, stacked (2 s), in steps of 16 tokens. With a sliding
    window (Mistral 7B v0.1) the sampler has those of the prompt for every row too."""
    room = choices.rollout_rows * -(-choices.completion // 16) * 16 if drawn else 0
    read = _prompts(choices) * choices.prompt
    if drawn and getattr(config, "sliding_window", None):
        read = choices.rollout_rows * choices.prompt
    each = read * (choices.stream + choices.compute) + room * 2 * choices.stream
    return config.num_hidden_layers * widths(config)[3] * each


def _prompts(choices: Choices | Sampling) -> int:
    return min(-(-choices.rollout_rows // choices.samples), MAX_PROMPTS)


def drawing(config: LlamaConfig, choices: Choices | Sampling) -> dict[str, float]:
    """The last step: all of the cache, and either one layer's part of it again, as it grows, with attention's weights,
    or 24 bytes per logit: logits and probabilities (float32), these in float64 and their cumulative sum. Or, before
    there is a drawn token, the reading of the prompts, with a mask of length x length for each."""
    rows, logits = choices.rollout_rows, choices.rollout_rows * config.vocab_size
    start, end = cache(config, choices, drawn=False), cache(config, choices)
    length, tokens = choices.prompt + choices.completion, _prompts(choices) * choices.prompt
    scores = rows * config.num_attention_heads * length * (3 * choices.compute + 4)
    step = (end - start) / config.num_hidden_layers + scores + forward_work(config, choices, rows) + 4 * logits
    masks = tokens * choices.prompt * (2 + choices.stream)
    moments = [(start, forward_work(config, choices, tokens) + masks), (end, max(step, 24 * logits))]
    return dict(zip(("cache", "scratch"), max(moments, key=sum), strict=True))


def sampling(config: LlamaConfig, plan: Sampling) -> dict[str, float]:
    return {"weights": model_bytes(config, plan.frozen)} | drawing(config, plan)


def scoring_work(config: LlamaConfig, judge: Training | Sampling) -> float:
    """A reward model reads SCORED_TOKENS, or one row of CONTINUATIONS_PER_ROW texts, with a mask of length x length;
    then a layer, or the texts' logits. judge: how it is held, and its texts' lengths."""
    length = judge.prompt + CONTINUATIONS_PER_ROW * judge.completion
    rows = max(SCORED_TOKENS // length, 1)
    tokens, drawn = rows * length, rows * CONTINUATIONS_PER_ROW * judge.completion
    logits = drawn * config.vocab_size * _logit(judge)
    return tokens * length * (2 + judge.compute) + max(logits, forward_work(config, judge, tokens))


def _logit(choices: Choices | Training | Sampling) -> int:
    """Bytes while a log-probability is made: a logit as it comes (c), in float32 if it is not, log-softmaxed."""
    return 8 if choices.compute == 4 else 10


# ---- PPO's phases --------------------------------------------------------------------------------------------


def rollout(config: LlamaConfig, choices: Choices) -> dict[str, float]:
    return resident(config, choices) | drawing(config, choices)


def scoring(config: LlamaConfig, choices: Choices) -> dict[str, float]:
    """Without autocast."""
    lengths = {"prompt": choices.prompt, "completion": choices.completion}
    judges = {
        "adapter": Training("reward", choices.frozen, choices.rank, **lengths),
        "model": Sampling(choices.frozen, **lengths),
    }
    work = scoring_work(config, judges[choices.reward]) if choices.reward in judges else 0.0
    return resident(config, choices) | {"scratch": work}


def reference(config: LlamaConfig, choices: Choices) -> dict[str, float]:
    """Log-probabilities and values of a minibatch without gradients: the mask, and a layer or the tokens' logits."""
    cast = 0.0 if choices.lora else copies(config, choices, 2 if choices.value == "model" else 1)
    mask = choices.tokens * choices.length * (2 + choices.stream)
    most = max(choices.drawn * config.vocab_size * _logit(choices), forward_work(config, choices, choices.tokens))
    return resident(config, choices) | {"copies": cast, "scratch": states(config, choices) + mask + most}


def update(config: LlamaConfig, choices: Choices) -> dict[str, float]:
    """The fullest of the moments of an optimizer step.

    What is kept: activations of the policy's pass and the value's; of the N drawn tokens the log-softmax (4 NV), which
    is what the gradient of the logits is made of, and the hidden states. The moments:

    1. the policy's logits are made: they (c NV) and their float32 copy if c is 2 (4 NV);
    2. a value model's forward pass ends: both passes' activations;
    3. the backward pass begins with its layers (made last): as 2, with one layer's work, and that layer's activations
       if they are computed again;
    4. the gradients of the log-softmax and of the logits (8 NV), the value model's pass being done with;
    5. the policy's last layer in the backward pass, its logits being done with and the output head's gradient made;
    6. its first: all gradients but that layer's and the embedding's;
    7. all gradients; a tied embedding's as two, from its two uses, and their sum.

    Where a step is made of several minibatches, all gradients are there in all moments from the second one on.
    """
    nv, each = choices.drawn * config.vocab_size, kept(config, choices)
    alone = each + states(config, choices)
    one, both = copies(config, choices, 1), copies(config, choices, 2)
    late = 0 if choices.recompute else 1  # recomputation casts a layer's weights anew
    backward = backward_work(config, choices)
    gradients = {role: 4 * count for role, count in trained(config, choices).items()}
    whole, value = sum(gradients.values()), gradients["value"]
    embedding = 0 if choices.lora else 4 * config.vocab_size * config.hidden_size  # its gradient, and the head's
    layer = 0 if choices.lora else 4 * parameters(config)["linear"] / config.num_hidden_layers
    before = whole if choices.accumulated else 0
    moments = [  # gradients, activations, logits, copies, scratch
        (before, alone, _logit(choices) * nv, one, 0),
        (before or value, alone, 12 * nv, late * one, 0),
        (before or value + embedding, alone, 0, late * one, backward),
        (before or whole - layer - embedding, 0, 0, 0, backward),
        (whole, 0, 0, 0, embedding * (2 if config.tie_word_embeddings else choices.accumulated)),
    ]
    if choices.value == "model":
        forward = forward_work(config, choices, choices.tokens) if choices.recompute else 0
        moments += [
            (before, each + alone, 4 * nv, both, forward),
            (before, each + alone, 4 * nv, late * both, backward),
        ]
    parts = ("gradients", "activations", "logits", "copies", "scratch")
    return resident(config, choices) | dict(zip(parts, max(moments, key=sum), strict=True))


def total(parts: dict[str, float]) -> float:
    return sum(parts.values())


def phases(config: LlamaConfig, choices: Choices) -> dict[str, dict[str, float]]:
    """Bytes by part at the fullest moment of each phase. They do not overlap, so the peak is the largest sum."""
    return {phase.__name__: phase(config, choices) for phase in (rollout, scoring, reference, update)}


def peak(config: LlamaConfig, choices: Choices) -> tuple[str, float]:
    """(the phase that needs most, its bytes)."""
    return _most(phases(config, choices))


def _most(parts: dict[str, dict[str, float]]) -> tuple[str, float]:
    return max(((name, total(found)) for name, found in parts.items()), key=lambda item: item[1], default=("none", 0.0))


# ---- SFT, reward model and DPO -------------------------------------------------------------------------------


def training(config: LlamaConfig, plan: Training) -> dict[str, float]:
    """The fullest of the moments of an optimizer step, as of `update`.

    TRL's SFT and DPO keep the states of all tokens, and make logits of HEAD_TOKENS x HEAD_WIDTH at a time, twice; ours
    of the reward model makes those of the completions once. DPO's reference, the adapter or else the model as it was,
    reads between the policy's two passes.
    """
    h, v, lora = config.hidden_size, config.vocab_size, plan.lora
    count = lora_parameters(config, plan.rank) if lora else sum(parameters(config).values())
    base, trained = model_bytes(config, plan.frozen), 4 * count
    held = base + trained * lora + (trained if plan.kind == "dpo" else 0)
    fused = plan.kind != "reward"
    states = plan.drawn * h * plan.stream if fused or not lora else 0  # that the output head keeps
    alone, backward = kept(config, plan) + states, backward_work(config, plan)
    nv = plan.drawn * v
    reading, writing = _fused_head(config, plan) if fused else (_logit(plan) * nv, plan.compute * nv)
    embedding = 0 if lora else 4 * v * h  # its gradient, and the head's
    layer = 0 if lora else 4 * parameters(config)["linear"] / config.num_hidden_layers
    before = trained if plan.accumulated else 0
    moments = [  # gradients, activations, logits, scratch
        (before, alone, reading, 0),
        (before + embedding, alone, writing, 0),
        (before or embedding, alone, 0, backward),
        (before or trained - layer - embedding, 0, 0, backward),
        (trained, 0, 0, embedding * (2 if config.tie_word_embeddings else plan.accumulated)),
    ]
    if not fused:
        moments.append((before, alone, 12 * nv, 0))  # the gradients of the log-softmax and of the logits
    if plan.kind == "dpo":
        moments += [(before, alone, 0, forward_work(config, plan, plan.tokens)), (before, alone + states, reading, 0)]
    parts = ("gradients", "activations", "logits", "scratch")
    return {"weights": held, "moments": 2 * trained} | dict(zip(parts, max(moments, key=sum), strict=True))


def _fused_head(config: LlamaConfig, plan: Training) -> tuple[float, float]:
    """What TRL's output head takes in the forward and in the backward pass (trl/kernels/chunked_logprob.py): a tile of
    logits, and what torch's operations make of it, 13 and 29 bytes a logit; then the gradient of the states, in
    float32, for which 16-bit logits and output head get such a copy."""
    h, tokens, width = config.hidden_size, min(plan.drawn, HEAD_TOKENS), min(config.vocab_size, HEAD_WIDTH)
    tile, logits = plan.compute * tokens * HEAD_WIDTH, tokens * width
    cast = 4 * logits + 4 * width * h if plan.compute == 2 else 0
    return tile + 13 * logits, tile + max(29 * logits, cast) + 4 * plan.drawn * h


# ---- stages --------------------------------------------------------------------------------------------------


def stages(config: LlamaConfig, settings: Settings, *, prompt: int, shown: int) -> dict[str, dict[str, float]]:
    """Bytes by part at the fullest moment of every stage that holds a model, by the stage's folder.

    prompt, shown: tokens of the longest question as a prompt, and of that with the exemplars before it (equal where
    sampling.shots is "none"). Completions are taken to reach their limit. The sampler is the native one.
    """
    hardware, sizes, limit = settings.hardware, settings.sampling, settings.sampling.max_new_tokens

    def draw(samples: int, tokens: int, drawn: int = limit) -> dict[str, float]:
        rows = rows_at_once(
            min(hardware.rollout_rows, MAX_PROMPTS * samples), samples, tokens, drawn, hardware.cache_tokens
        )
        return sampling(config, Sampling(hardware.weights, rows, samples, tokens, drawn))

    def train(kind: str, batch: int) -> Training:
        rows, rank = hardware.micro_batch or batch, settings.lora.rank
        return Training(kind, hardware.weights, rank, hardware.recompute, rows, rows < batch, prompt, limit)

    def answers(tokens: int) -> list[dict]:  # greedy ones, and drawn ones
        return [draw(samples, tokens) for samples in {1, max(settings.evaluation.samples, 1)}]

    first, rated = [draw(sizes.samples, shown)], train("reward", settings.reward.batch)
    if sizes.conditioned_questions:  # answers are read off conditioned rationales
        first += [draw(1, shown), draw(1, shown + limit, REANSWERED)]
    learned, judge = training(config, rated), Sampling(hardware.weights, prompt=prompt, completion=limit)
    held_out = {name: learned[name] for name in ("weights", "moments")} | {"scratch": scoring_work(config, rated)}
    judged = {"weights": model_bytes(config, hardware.weights), "scratch": scoring_work(config, judge)}
    tuned, paired = (training(config, train(kind, getattr(settings, kind).batch)) for kind in ("sft", "dpo"))
    continued = draw(1, prompt + limit)  # a prefix, which may be a whole rationale
    return {
        "01_sampling": _fullest(first),
        "02_sft": tuned,
        "03_second_sampling": draw(sizes.samples, prompt),
        "03_reward_model": _fullest([learned, held_out]),
        "04_ppo": _fullest(phases(config, choices_of(settings, prompt)).values()),
        "05_evaluation": _fullest([*answers(shown), judged]),
        "06_solutions": draw(settings.explore.samples, prompt),
        "06_rft": tuned,
        "06_exploration": continued,
        "06_pit_report": continued,
        "06_step_dpo": paired,
        "06_outcome_dpo": paired,
        "06_evaluation": _fullest(answers(prompt)),
    }


def _fullest(moments: Iterable[dict[str, float]]) -> dict[str, float]:
    return max(moments, key=total)


# ---- what fits ------------------------------------------------------------------------------------------------


def knobs(choices: Choices) -> dict[str, Choices]:
    """The choices with one knob turned towards less memory, by its name, those that cost least first."""
    less = "bfloat16" if choices.frozen == "float32" else "nf4"
    reward = "adapter" if choices.reward == "model" else choices.reward
    turned = {
        "recompute": replace(choices, recompute=True),  # a third more work in the update
        "rollout_rows": replace(choices, rollout_rows=max(choices.rollout_rows // 2, 1)),  # a slower rollout
        "minibatch": replace(choices, minibatch=max(choices.minibatch // 2, 1)),  # more and noisier optimizer steps
        "layout": replace(choices, layout="adapters", reward=reward),  # other weights train, at another learning rate
        "frozen": replace(choices, frozen=less, precision="bfloat16"),  # rounded weights
    }
    return {name: found for name, found in turned.items() if getattr(found, name) != getattr(choices, name)}


def setting_knobs(settings: Settings) -> dict[str, Settings]:
    """As `knobs`, of a run's settings. What trains must stay float32, so that weights are rounded below adapters."""
    hardware, ppo = settings.hardware, settings.ppo
    whole = math.gcd(settings.sft.batch, settings.reward.batch, settings.dpo.batch, ppo.minibatch)
    rows = hardware.micro_batch or 2 * whole
    fewer = max((n for n in range(1, rows // 2 + 1) if whole % n == 0), default=rows)
    less = "bfloat16" if hardware.weights == "float32" else "nf4"
    turned = {
        "hardware.recompute": replace(settings, hardware=replace(hardware, recompute=True)),
        "hardware.cache_tokens": _with(settings, cache_tokens=hardware.cache_tokens // 2 or 64_000),
        "hardware.rollout_rows": _with(settings, rollout_rows=max(hardware.rollout_rows // 2, 1)),
        "hardware.micro_batch": _with(settings, micro_batch=fewer),
        "lora.rank": replace(settings, lora=replace(settings.lora, rank=settings.lora.rank or 16)),
    }
    if settings.lora.rank and not (less == "nf4" and hardware.rollout_engine == "vllm"):  # which does not round
        turned["hardware.weights"] = replace(_with(settings, weights=less), ppo=replace(ppo, precision="bfloat16"))
    return {name: found for name, found in turned.items() if attrgetter(name)(found) != attrgetter(name)(settings)}


def _with(settings: Settings, **hardware) -> Settings:
    return replace(settings, hardware=replace(settings.hardware, **hardware))


@dataclass(frozen=True)
class Fit:
    """Whether the peak fits, and if not, what to do about it. Bytes."""

    capacity: float
    phase: str  # or stage, that needs most
    needed: float
    gains: dict[str, float]  # what each knob, turned alone, takes off the peak
    way: list[tuple[str, object, float]]  # (knob, its new value, peak then): turned one after the other until it fits
    found: Choices | Settings | None  # those at the end of the way; None if no knob helps any more

    @property
    def fits(self) -> bool:
        return self.needed <= self.capacity

    def __str__(self) -> str:
        head = f"{self.needed / 1e9:.1f} GB needed (in {self.phase}) of {self.capacity / 1e9:.1f} GB"
        if self.fits:
            return f"{head}: fits"
        gains = ", ".join(f"{knob} {gain / 1e9:.1f} GB" for knob, gain in self.gains.items())
        way = ", then ".join(f"{knob} = {value!r} ({after / 1e9:.1f} GB)" for knob, value, after in self.way)
        end = f"turn {way}" if self.found else "no knobs make it fit; take a smaller model or a larger card"
        return f"{head}: does not fit. Each knob alone gives: {gains}. To make it fit: {end}."


def fit(config: LlamaConfig, choices: Choices, capacity: float) -> Fit:
    """Whether PPO with these choices fits into `capacity` bytes."""
    return _fit(partial(peak, config), knobs, choices, capacity)


def fit_run(
    config: LlamaConfig, settings: Settings, capacity: float, names: Iterable[str] = (), *, prompt: int, shown: int
) -> Fit:
    """Whether the stages with these names, or all of a run, fit into `capacity` bytes; lengths as of `stages`."""
    wanted = set(names)

    def needs(some: Settings) -> tuple[str, float]:
        found = stages(config, some, prompt=prompt, shown=shown)
        return _most({name: parts for name, parts in found.items() if not wanted or name in wanted})

    return _fit(needs, setting_knobs, settings, capacity)


def _fit(needs: Callable, knobs: Callable, start, capacity: float) -> Fit:
    """needs: choices -> (phase, bytes); knobs: choices -> those with one knob turned.

    Where it does not fit, the first knob that alone makes it fit is turned as far as that takes, or else the one that
    gives most, once, and so on.
    """

    def turn(knob: str, now):
        """As long as it helps, or until it fits -> (choices, bytes)."""
        left = needs(now)[1]
        while left > capacity and (further := knobs(now).get(knob)) and (after := needs(further)[1]) < left:
            now, left = further, after
        return now, left

    phase, needed = needs(start)
    gains = {knob: needed - needs(turned)[1] for knob, turned in knobs(start).items()}
    way, now, left = [], start, needed
    while left > capacity:
        once = {knob: (turned, needs(turned)[1]) for knob, turned in knobs(now).items()}
        knob = next((name for name in once if turn(name, now)[1] <= capacity), None)
        most = min(once, key=lambda name: once[name][1], default=None)
        after = turn(knob, now) if knob else once.get(most, (None, left))
        if after[1] >= left:
            break
        now, left = after
        way.append((knob or most, attrgetter(knob or most)(now), left))
    return Fit(capacity, phase, needed, gains, way, now if left <= capacity else None)


def table(config: LlamaConfig, variants: Iterable[Choices]) -> list[dict]:
    """A row for each: the choices, GiB by part at the peak, the peak of each phase, and the cards it fits."""
    rows = []
    for choices in variants:
        every = phases(config, choices)
        phase, needed = peak(config, choices)
        parts = {part: every[phase].get(part, 0.0) for part in PARTS}
        sizes = parts | {f"{name} peak": total(found) for name, found in every.items()} | {"peak": needed}
        row = {name: getattr(choices, name) for name in COLUMNS}
        row |= {"rank": choices.rank if choices.lora else 0, "length": choices.prompt + choices.completion}
        row |= {f"{name} GiB": round(size / 2**30, 2) for name, size in sizes.items()} | {"phase": phase}
        rows.append(row | {f"fits {card}": needed <= size for card, size in CARDS.items()})
    return rows


def stage_table(config: LlamaConfig, runs: Iterable[Settings], *, prompt: int, shown: int) -> list[dict]:
    """A row for every stage of each run: GiB by part and in all, and the cards it fits; lengths as of `stages`."""
    rows = []
    for settings in runs:
        for stage, found in stages(config, settings, prompt=prompt, shown=shown).items():
            sizes = {part: found.get(part, 0.0) for part in PARTS} | {"peak": total(found)}
            row = {"preset": settings.preset, "stage": stage}
            row |= {f"{name} GiB": round(size / 2**30, 2) for name, size in sizes.items()}
            rows.append(row | {f"fits {card}": total(found) <= size for card, size in CARDS.items()})
    return rows
