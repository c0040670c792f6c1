"""How much memory the stages take, computed from a model's shape before anything is loaded.

    settings = preset("llama2-7b-24gb", "gsm8k")
    stages(LLAMA_2_7B, settings, prompt=256, shown=1400)          # {"02_sft": {"weights": 3.9e9, ...}, ...}: bytes
    print(fit(LLAMA_2_7B, settings, 24e9, prompt=256, shown=1400))  # whether all fit, and if not, what to change

A `Sampling` says how a stage draws, a `Training` how SFT, the reward model and DPO train, a `PPO` what stage 04 does.

All sizes are bytes of tensors. A card needs more: the CUDA context and workspaces (0.5 to 1 GB) and what the allocator
leaves between tensors. So cards count here as 24e9, 40e9 and 80e9 bytes, 7 % less than the 24, 40 and 80 GiB they have.

Every formula counts what the code of smlib.ppo and smlib.sampling, of transformers' Llama and of TRL 1.16
allocates on a CPU; on a GPU the output head of TRL's SFT and DPO takes less, as Triton makes no copies of logits. The
letters: H hidden, I intermediate, Q = heads x head size, K = key heads x head size, L layers, V vocabulary; s bytes of
an element of the residual stream, c of a matrix product's operands (autocast makes c = 2 where s = 4). Attention is
taken to be fused (SDPA), so that no matrix of heads x length x length is kept, but for the mask of packed rows.
Lengths are the longest: every completion is taken to reach its limit.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Literal

from transformers import LlamaConfig

from smlib.errors import UsageError
from smlib.learning.rationales import REANSWER_TOKENS
from smlib.runs.settings import Settings
from smlib.sampling.decoders import READ
from smlib.sampling.limits import MAX_BATCH, MAX_PROMPTS, most_prompts
from smlib.sampling.packing import CONTINUATIONS_PER_ROW, group_size
from smlib.sampling.sampler import LOGITS
from smlib.sampling.tree_attention import grown

Dtype = Literal["float32", "bfloat16", "nf4"]

NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes a weight: 4 bits, a byte per block of 64, a float32 per 256 blocks
TRAINED = ("sft", "reward", "dpo")
SCORED_TOKENS = 2_048  # in a batch of the reward model (reward_model.score)
HEAD_TOKENS, HEAD_WIDTH = 4_096, 32_768  # logits that TRL's SFT and DPO make at once: of tokens, of the vocabulary
MODEL_TYPES = ("llama", "mistral", "qwen2")  # that the formulas are for
PARTS = ("weights", "moments", "gradients", "activations", "logits", "copies", "cache", "scratch")
CARDS = {"24 GB": 24e9, "40 GB": 40e9, "80 GB": 80e9}
LLAMA_2_7B = LlamaConfig(  # its config.json: 6.74e9 parameters
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32,
    vocab_size=32000, tie_word_embeddings=False, max_position_embeddings=4096,
)  # fmt: skip


@dataclass(frozen=True)
class PPO:
    """How stage 04 keeps its roles (ppo.roles) and how much it computes at once.

    rank 0: a model for each role, all float32. Above: LoRA adapters of one frozen base for policy, value and reward.
    """

    value: Literal["head", "model"] = "head"  # "head": on the policy's trunk; "model": its own trunk, or adapter
    dtype: Dtype = "float32"  # of the frozen base; weights and adapters that train are float32
    rank: int = 0
    precision: Literal["float32", "bfloat16"] = "float32"  # of forward and backward passes; "bfloat16": autocast
    gradient_checkpointing: bool = False
    micro_batch: int = 16  # completions at once
    accumulated: bool = False  # an optimizer step takes several micro batches
    max_batch: int = 128  # completions drawn at a time, at most sampler.MAX_BATCH
    samples: int = 8  # of them, from the same prompt
    prompt: int = 128  # tokens
    completion: int = 128  # tokens

    joins: bool = False  # an update has more completions than that

    shared = prefix_tokens = cache_tokens = 0  # as of Sampling

    @property
    def lora(self) -> bool:
        return self.rank > 0

    @property
    def compute(self) -> int:
        """c."""
        return 2 if self.precision == "bfloat16" else 4

    adapter = compute  # bytes of an element that LoRA's own matrix products read: autocast covers them too

    @property
    def stream(self) -> int:
        """s of the models that train: that of their embeddings, which autocast does not touch."""
        return 4 if self.dtype == "float32" else 2

    @property
    def masks(self) -> tuple[int, int]:
        """Bytes of a row's mask of length x length, per entry: of the one for all layers, and of each layer's copy,
        which autocast makes of a float32 one."""
        return self.stream, 2 if self.compute < self.stream else 0

    @property
    def completions_per_row(self) -> int:
        """Completions of one question that share a row and in it their prompt (packing.pack, batches.Batch)."""
        return group_size(self.micro_batch, self.samples)

    @property
    def length(self) -> int:
        """Tokens in a row."""
        return self.prompt + self.completions_per_row * self.completion

    @property
    def tokens(self) -> int:
        """In a micro batch, prompts included."""
        return self.micro_batch // self.completions_per_row * self.length

    @property
    def logit_tokens(self) -> int:
        """Tokens of the micro batch that have logits."""
        return self.micro_batch * self.completion


@dataclass(frozen=True)
class Training:
    """How SFT, the reward model and DPO train: in the precision of the weights, with adapters in float32."""

    kind: Literal["sft", "reward", "dpo"]  # "sft": RFT too
    dtype: Dtype = "float32"  # of the weights; float32 where they train
    rank: int = 0  # of an adapter; 0: the weights train
    gradient_checkpointing: bool = False
    micro_batch: int = 16  # rationales, or pairs, at once
    accumulated: bool = False  # an optimizer step takes several micro batches
    prompt: int = 128  # tokens
    completion: int = 128  # tokens

    @property
    def lora(self) -> bool:
        return self.rank > 0

    @property
    def compute(self) -> int:
        """c, and as nothing is cast s."""
        return 4 if self.dtype == "float32" else 2

    stream = compute
    adapter = 4

    @property
    def masks(self) -> tuple[int, int]:
        """As of PPO. TRL's mask is boolean, and every layer's attention makes numbers of it; one row has none."""
        return (self.stream, 0) if self.kind == "reward" else (1, self.stream) if self.sequences > 1 else (0, 0)

    @property
    def sequences(self) -> int:
        """Rows of tokens: both sides of a pair are one in the reward model (packing.pack), and two in DPO."""
        return self.micro_batch * (2 if self.kind == "dpo" else 1)

    @property
    def length(self) -> int:
        """Tokens in each; the sides of a pair share no more than the prompt."""
        return self.prompt + self.completion * (2 if self.kind == "reward" else 1)

    @property
    def tokens(self) -> int:
        return self.sequences * self.length

    @property
    def logit_tokens(self) -> int:
        """Tokens that have logits: TRL's SFT and DPO make them of all but the last of a sequence."""
        if self.kind == "reward":
            return 2 * self.micro_batch * self.completion
        return self.tokens - self.sequences


@dataclass(frozen=True)
class Sampling:
    """How the sampler draws from one model, into which an adapter is merged. Names as of PPO."""

    dtype: Dtype = "float32"
    max_batch: int = 128
    samples: int = 1
    prompt: int = 128  # tokens after those that all share
    completion: int = 128
    shared: int = 0  # tokens that all prompts begin with, exemplars
    prefix_tokens: int = 0  # that the engine holds from one call to the next
    cache_tokens: int = 0  # whose keys and values are held at most; 0: any number
    joins: bool = True

    lora = False

    @property
    def compute(self) -> int:
        return 4 if self.dtype == "float32" else 2

    stream = adapter = compute


def ppo_plan(settings: Settings, prompt: int) -> PPO:
    """What stage 04 of these settings does; prompt: tokens of the longest."""
    ppo, hardware = settings.ppo, settings.hardware
    micro_batch = hardware.micro_batch or ppo.minibatch
    return PPO(
        value="model" if ppo.value == "model" else "head",
        dtype=_dtype(settings),
        rank=settings.lora.rank,
        precision="float32" if ppo.precision == "auto" else ppo.precision,  # which takes more
        gradient_checkpointing=hardware.gradient_checkpointing,
        micro_batch=micro_batch,
        accumulated=micro_batch < ppo.minibatch,
        max_batch=min(hardware.max_batch, ppo.episodes, MAX_BATCH),
        joins=ppo.episodes > hardware.max_batch,
        samples=ppo.samples_per_question,
        prompt=prompt,
        completion=ppo.max_new_tokens,
    )


def _ppo_phases(config: LlamaConfig, settings: Settings, prompt: int) -> dict[str, dict[str, float]]:
    """`phases`, and with values by rollouts that of drawing from prefixes, whose longest has a whole completion."""
    plan = ppo_plan(settings, prompt)
    found = phases(config, plan)
    if settings.ppo.value == "rollouts":
        rows, longest = min(settings.hardware.max_batch, MAX_BATCH), prompt + plan.completion
        longer = replace(plan, prompt=longest, samples=settings.ppo.value_samples, max_batch=rows, joins=True)
        found["prefixes"] = phases(config, longer)["rollout"]
    return found


def _dtype(settings: Settings, samples: bool = False) -> Dtype:
    """As `shared.held_dtype`, but "auto" counts as float32, which takes more."""
    dtype = settings.hardware.dtype if samples or settings.lora.rank else "float32"
    return "float32" if dtype == "auto" else dtype


# ---- weights and what goes with them -------------------------------------------------------------------------


def supports(config) -> bool:
    """Whether the formulas are for such a model: a Llama without biases, a Mistral or a Qwen2."""
    biases = getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False)
    return config.model_type in MODEL_TYPES and not biases


def widths(config: LlamaConfig) -> tuple[int, int, int, int, int]:
    """(H, I, Q, K, V). Raises UsageError for a model that the formulas are not for (`supports`)."""
    if not supports(config):
        raise UsageError(
            f"the memory of a {config.model_type!r} with these options cannot be computed; give the config of a Llama, "
            "Mistral or Qwen2 model"
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


def model_bytes(config: LlamaConfig, dtype: Dtype, head: bool = True) -> float:
    """One model's weights. "nf4": bitsandbytes' 4 bits with double quantisation (2305.14314) for the linear layers,
    bfloat16 for the rest, which it leaves alone. head: the output head too."""
    count = parameters(config)
    linear = count.pop("linear")
    rest = sum(count.values()) - (0 if head else count["head"])
    return linear * NF4 + rest * 2 if dtype == "nf4" else (linear + rest) * (4 if dtype == "float32" else 2)


def weights(config: LlamaConfig, plan: PPO) -> dict[str, float]:
    """By role. What trains is float32: in bfloat16, steps of AdamW below 1/256 of a weight would be lost."""
    value = 4 * (config.hidden_size + 1)
    if plan.lora:
        adapter = 4 * lora_parameters(config, plan.rank)
        value += adapter if plan.value == "model" else 0
        return {"base": model_bytes(config, plan.dtype), "policy": adapter, "value": value, "reward": adapter}
    model = model_bytes(config, "float32")
    value += model_bytes(config, "float32", head=False) if plan.value == "model" else 0
    return {"policy": model, "reference": model, "value": value, "reward": model}


def trained(config: LlamaConfig, plan: PPO) -> dict[str, int]:
    """Parameters that train, of policy and value: their gradients take 4 bytes each, AdamW's two moments 8."""
    sizes = weights(config, plan)
    return {role: int(sizes[role]) // 4 for role in ("policy", "value")}


def resident(config: LlamaConfig, plan: PPO) -> dict[str, float]:
    """What is there in every phase; gradients are not, as updates.optimize drops them after each step."""
    count = sum(trained(config, plan).values())
    return {"weights": sum(weights(config, plan).values()), "moments": 8 * count}


# ---- activations ---------------------------------------------------------------------------------------------


def layer_activations(config: LlamaConfig, plan: PPO | Training) -> float:
    """What autograd keeps of one decoder layer, per token.

    Two norms: the input in float32 (4 H each), its reciprocal root (4), and, if its weight trains, the normalised input
    (sH). Attention: q, k, v and the output, 4 cQ (keys and values are repeated for all heads, as there is a mask), and
    a float32 logsumexp per head. MLP: gate, silu(gate), up and their product, 4 cI. Inputs of linear layers, cH: one
    for q, k and v and one for gate and up in float32; in bfloat16 autocast and peft give each of the five a copy, and
    LoRA's o_proj (cQ). LoRA: seven inputs of its B, c rank. Without autocast LoRA's inputs are float32 (a in place of
    c), the product of the MLP among them.
    """
    h, i, q, _, _ = widths(config)
    c, a, lora = plan.compute, plan.adapter, plan.lora
    norms = 2 * (4 * h + 4) + (0 if lora else 2 * plan.stream * h)
    attention = 4 * c * q + 4 * config.num_attention_heads
    inputs = a * h * (5 if c == 2 else 2) + (a * q if lora and c == 2 else 0)
    return norms + attention + inputs + (3 * c + a) * i + 7 * a * plan.rank


def kept(config: LlamaConfig, plan: PPO | Training) -> float:
    """Activations of one pass over a micro batch, up to the last hidden states.

    With `gradient_checkpointing` the inputs of the layers alone (sH each). The last norm keeps as much as a layer's;
    under LoRA the first norm, whose input has no gradient, keeps nothing in its place.
    """
    layers, last = config.num_hidden_layers, (4 + (0 if plan.lora else plan.stream)) * config.hidden_size
    masks, layer_mask = plan.masks
    if plan.gradient_checkpointing:
        each = layers * plan.stream * config.hidden_size + last
    else:
        each = layers * layer_activations(config, plan) + (0 if plan.lora else last)
        masks += layers * layer_mask
    return plan.tokens * (each + plan.length * masks)


def states(config: LlamaConfig, plan: PPO) -> float:
    """The last hidden states of the tokens with logits (sH), and in float32 for the value (4 H), or bfloat16 for the
    head."""
    return plan.logit_tokens * config.hidden_size * (plan.stream + (0 if plan.compute == 4 else 4))


def copies(config: LlamaConfig, plan: PPO, passes: int) -> float:
    """bfloat16 copies of float32 weights under autocast that outlast their use: `passes` forward passes' and a head's.

    Of weights that train autocast caches them until it ends; of frozen ones autograd keeps them, once for every pass,
    and with `gradient_checkpointing` the output head's alone.
    """
    if plan.stream == plan.compute:
        return 0.0
    lasting = 0 if plan.lora and plan.gradient_checkpointing else passes * parameters(config)["linear"]
    return 2 * (lasting + config.vocab_size * config.hidden_size)


def forward_work(config: LlamaConfig, plan: PPO | Training | Sampling, tokens: int) -> float:
    """Of a forward pass that keeps nothing: the embeddings, the layer's input, its residual and its normed input (4
    sH), silu(gate), up and their product (3 cI), where LoRA adds its result (4 I), without autocast by way of float32
    (8 I); and the widest matrix in bfloat16, if it is stored otherwise."""
    h, i, _, _, _ = widths(config)
    wider = 8 if plan.adapter > plan.compute else 0
    each = 4 * plan.stream * h + 3 * plan.compute * i + ((4 + wider) * i if plan.lora else 0)
    return tokens * each + _widest(config, plan)


def backward_work(config: LlamaConfig, plan: PPO | Training) -> float:
    """Of a layer's backward pass: gradients of the residual stream (2 sH) and in the MLP two more than what is kept of
    it (2 cI), and LoRA's input in float32 where c is 2 (4 I), without autocast its gradient too (8 I); the widest
    matrix as in `forward_work`. With `gradient_checkpointing` also the layer's activations, whose float32 input
    is there already, and bfloat16 copies of its float32 weights."""
    h, i, _, _, _ = widths(config)
    s, c = plan.stream, plan.compute
    wider = (4 if plan.adapter == c else 8) if plan.lora and c == 2 else 0
    each, cast = 2 * s * h + (2 * c + wider) * i, 0.0
    if plan.gradient_checkpointing:
        each += layer_activations(config, plan) - (4 * h if s == 4 else 0)
        cast = 0.0 if s == c else 2 * parameters(config)["linear"] / config.num_hidden_layers
    return plan.tokens * each + cast + _widest(config, plan)


def _widest(config: LlamaConfig, plan: PPO | Training | Sampling) -> int:
    h, i, _, _, _ = widths(config)
    return 2 * h * i if plan.compute == 2 and plan.dtype != "bfloat16" else 0


# ---- drawing and scoring -------------------------------------------------------------------------------------


def cache(config: LlamaConfig, plan: PPO | Sampling, drawn: bool = True) -> float:
    """Keys and values [2 s] when all rows are at their end: of what all prompts share or earlier calls have read, of
    every prompt once, and of the drawn tokens for every row; `cache_tokens` at most. Where prompts join as rows leave,
    the rows are of `most_prompts`. A model with a sliding window (Mistral 7B v0.1) has those of the prompt
    for every row (s + c: the rotary embedding gives keys in s)."""
    rows = plan.max_batch if drawn else _prompts(plan)
    width = config.num_hidden_layers * widths(config)[3]
    if getattr(config, "sliding_window", None):
        read = rows * (plan.shared + plan.prompt) * (plan.stream + plan.compute)
        return width * (read + (rows * plan.completion * 2 * plan.stream if drawn else 0))
    prompts = min(most_prompts(rows, plan.samples), rows) if drawn and plan.joins else _prompts(plan)
    tokens = max(plan.prefix_tokens, plan.shared) + prompts * plan.prompt
    tokens += rows * grown(plan.completion) if drawn else 0
    return width * 2 * plan.stream * min(tokens, plan.cache_tokens or math.inf)


def _prompts(plan: PPO | Sampling) -> int:
    return min(-(-plan.max_batch // plan.samples), MAX_PROMPTS)


def _read(plan: PPO | Sampling) -> int:
    """Tokens that are read together: what all share, or of whole prompts no more than READ where there are several."""
    several = plan.prompt * min(_prompts(plan), max(READ // plan.prompt, 1))
    return max(several, plan.shared)


def drawing(config: LlamaConfig, plan: PPO | Sampling) -> dict[str, float]:
    """The fullest of four moments: prompts are read, with scores of length x length three times; they are laid out for
    rows to meet them, and so held twice; the last step, with one layer's drawn tokens again, as their memory grows, and
    the scores four times; the last draw, with 16 bytes for each of the LOGITS that are held at once: they, also in
    float32, their probabilities, and these padded. Top-k and top-p, which sort, are not counted."""
    rows, tokens, heads = plan.max_batch, _read(plan), config.num_attention_heads
    start, end = cache(config, plan, drawn=False), cache(config, plan)
    logits = min(rows * config.vocab_size, max(LOGITS["cuda"], config.vocab_size))
    token = widths(config)[3] * 2 * plan.stream
    scores = 3 * plan.compute * heads * tokens * max(plan.shared, plan.prompt)
    met = 4 * plan.compute * heads * rows * (plan.shared + plan.prompt + plan.completion)
    laid = config.num_hidden_layers * token * _prompts(plan) * plan.prompt
    if plan.cache_tokens:  # counts both
        laid = min(laid, max(config.num_hidden_layers * token * plan.cache_tokens - start, 0))
    moments = [
        (start, max(forward_work(config, plan, tokens), 4 * plan.stream * config.hidden_size * tokens + scores)),
        (start, laid),
        (end, token * rows * grown(plan.completion) + met + forward_work(config, plan, rows)),
        (end, 16 * logits),
    ]
    return dict(zip(("cache", "scratch"), max(moments, key=sum), strict=True))


def sampling(config: LlamaConfig, plan: Sampling) -> dict[str, float]:
    """Bytes by part at the fullest moment."""
    return {"weights": model_bytes(config, plan.dtype)} | drawing(config, plan)


def scoring_work(config: LlamaConfig, judge: Training | Sampling) -> float:
    """A reward model reads SCORED_TOKENS, or one row of CONTINUATIONS_PER_ROW texts, with a mask of length x length;
    then a layer, or the texts' logits. judge: the model, and the lengths of its texts."""
    length = judge.prompt + CONTINUATIONS_PER_ROW * judge.completion
    rows = max(SCORED_TOKENS // length, 1)
    tokens, scored = rows * length, rows * CONTINUATIONS_PER_ROW * judge.completion
    logits = scored * config.vocab_size * _logit(judge)
    return tokens * length * (2 + judge.compute) + max(logits, forward_work(config, judge, tokens))


def _logit(plan: PPO | Training | Sampling) -> int:
    """Bytes while a log-probability is made: a logit as it comes (c), in float32 if it is not, log-softmaxed."""
    return 8 if plan.compute == 4 else 10


# ---- PPO's phases --------------------------------------------------------------------------------------------


def phases(config: LlamaConfig, plan: PPO) -> dict[str, dict[str, float]]:
    """Bytes by part at the fullest moment of each phase. They do not overlap, so the peak is the largest sum."""
    judge = Training("reward", plan.dtype, plan.rank, prompt=plan.prompt, completion=plan.completion)
    there = resident(config, plan)
    return {
        "rollout": there | drawing(config, plan),
        "scoring": there | {"scratch": scoring_work(config, judge)},  # without autocast
        "reference": there | reference(config, plan),
        "update": there | update(config, plan),
    }


def reference(config: LlamaConfig, plan: PPO) -> dict[str, float]:
    """Log-probabilities and values of a micro batch without gradients: the mask, and a layer or the tokens' logits."""
    cast = 0.0 if plan.lora else copies(config, plan, 2 if plan.value == "model" else 1)
    mask = plan.tokens * plan.length * (2 + plan.stream)
    work = max(plan.logit_tokens * config.vocab_size * _logit(plan), forward_work(config, plan, plan.tokens))
    return {"copies": cast, "scratch": states(config, plan) + mask + work}


def update(config: LlamaConfig, plan: PPO) -> dict[str, float]:
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

    Where a step takes several micro batches, all gradients are there in all moments from the second one on.
    """
    nv, activations = plan.logit_tokens * config.vocab_size, kept(config, plan)
    policy = activations + states(config, plan)
    one, both = copies(config, plan, 1), copies(config, plan, 2)
    late = 0 if plan.gradient_checkpointing else 1  # recomputation casts a layer's weights anew
    backward = backward_work(config, plan)
    sizes = {role: 4 * count for role, count in trained(config, plan).items()}
    gradients, value = sum(sizes.values()), sizes["value"]
    embedding, layer = _late_gradients(config, plan)
    before = gradients if plan.accumulated else 0
    moments = [  # gradients, activations, logits, copies, scratch
        (before, policy, _logit(plan) * nv, one, 0),
        (before or value, policy, 12 * nv, late * one, 0),
        (before or value + embedding, policy, 0, late * one, backward),
        (before or gradients - layer - embedding, 0, 0, 0, backward),
        (gradients, 0, 0, 0, embedding * (2 if config.tie_word_embeddings else plan.accumulated)),
    ]
    if plan.value == "model":
        forward = forward_work(config, plan, plan.tokens) if plan.gradient_checkpointing else 0
        moments += [
            (before, activations + policy, 4 * nv, both, forward),
            (before, activations + policy, 4 * nv, late * both, backward),
        ]
    return dict(zip(("gradients", "activations", "logits", "copies", "scratch"), max(moments, key=sum), strict=True))


def _late_gradients(config: LlamaConfig, plan: PPO | Training) -> tuple[float, float]:
    """Bytes of the gradients of the embedding, or of the head, and of one layer; with adapters these do not train."""
    if plan.lora:
        return 0, 0
    return 4 * config.vocab_size * config.hidden_size, 4 * parameters(config)["linear"] / config.num_hidden_layers


def total(parts: dict[str, float]) -> float:
    return sum(parts.values())


# ---- SFT, reward model and DPO -------------------------------------------------------------------------------


def training(config: LlamaConfig, plan: Training) -> dict[str, float]:
    """The fullest of the moments of an optimizer step, as of `update`.

    TRL's SFT and DPO keep the states of all tokens, and make logits of HEAD_TOKENS x HEAD_WIDTH at a time, twice; ours
    of the reward model makes those of the completions once. DPO's reference, the adapter or else the model as it was,
    reads between the policy's two passes.
    """
    h, v, lora = config.hidden_size, config.vocab_size, plan.lora
    count = lora_parameters(config, plan.rank) if lora else sum(parameters(config).values())
    base, gradients = model_bytes(config, plan.dtype), 4 * count
    weights = base + gradients * lora + (gradients if plan.kind == "dpo" else 0)
    fused = plan.kind != "reward"
    states = plan.logit_tokens * h * plan.stream if fused or not lora else 0  # that the output head keeps
    activations, backward = kept(config, plan) + states, backward_work(config, plan)
    nv = plan.logit_tokens * v
    reading, writing = _fused_head(config, plan) if fused else (_logit(plan) * nv, plan.compute * nv)
    embedding, layer = _late_gradients(config, plan)
    before = gradients if plan.accumulated else 0
    moments = [  # gradients, activations, logits, scratch
        (before, activations, reading, 0),
        (before + embedding, activations, writing, 0),
        (before or embedding, activations, 0, backward),
        (before or gradients - layer - embedding, 0, 0, backward),
        (gradients, 0, 0, embedding * (2 if config.tie_word_embeddings else plan.accumulated)),
    ]
    if not fused:
        moments.append((before, activations, 12 * nv, 0))  # the gradients of the log-softmax and of the logits
    if plan.kind == "dpo":
        reference = forward_work(config, plan, plan.tokens)
        moments += [(before, activations, 0, reference), (before, activations + states, reading, 0)]
    parts = ("gradients", "activations", "logits", "scratch")
    return {"weights": weights, "moments": 2 * gradients} | dict(zip(parts, max(moments, key=sum), strict=True))


def _fused_head(config: LlamaConfig, plan: Training) -> tuple[float, float]:
    """What TRL's output head takes in the forward and in the backward pass (trl/kernels/chunked_logprob.py): a tile of
    logits, and what torch's operations make of it, 13 and 29 bytes a logit; then the gradient of the states, in
    float32, for which 16-bit logits and output head get such a copy."""
    h, tokens, width = config.hidden_size, min(plan.logit_tokens, HEAD_TOKENS), min(config.vocab_size, HEAD_WIDTH)
    tile, logits = plan.compute * tokens * HEAD_WIDTH, tokens * width
    cast = 4 * logits + 4 * width * h if plan.compute == 2 else 0
    return tile + 13 * logits, tile + max(29 * logits, cast) + 4 * plan.logit_tokens * h


# ---- stages --------------------------------------------------------------------------------------------------


def stages(config: LlamaConfig, settings: Settings, *, prompt: int, shown: int) -> dict[str, dict[str, float]]:
    """Bytes by part at the fullest moment of every stage that loads a model, by the stage's folder.

    prompt, shown: tokens of the longest question as a prompt, and of that with the exemplars before it (equal where
    sampling.shots is "none"). Completions are taken to reach their limit. The sampler is the native one.
    """
    hardware, sizes, limit = settings.hardware, settings.sampling, settings.sampling.max_new_tokens

    def draw(samples: int, tokens: int, drawn: int = limit, shared: int = 0, held: int = 0) -> dict[str, float]:
        rows = min(hardware.max_batch, MAX_PROMPTS * samples)
        plan = Sampling(
            _dtype(settings, samples=True), rows, samples, tokens, drawn, shared, held, hardware.cache_tokens
        )
        return sampling(config, plan)

    def train(kind: str, batch: int) -> Training:
        rows, rank = hardware.micro_batch or batch, settings.lora.rank
        return Training(
            kind, _dtype(settings), rank, hardware.gradient_checkpointing, rows, rows < batch, prompt, limit
        )

    def answers(**exemplars) -> list[dict]:  # greedy ones, and drawn ones
        return [draw(samples, prompt, **exemplars) for samples in {1, max(settings.evaluation.samples, 1)}]

    exemplars = {"shared": shown - prompt}
    first, reward = [draw(sizes.samples, prompt, **exemplars)], train("reward", settings.reward.batch)
    if sizes.conditioned_questions:  # answers are read off conditioned rationales
        first += [draw(1, prompt, **exemplars), draw(1, prompt + limit, REANSWER_TOKENS, **exemplars)]
    learned, judge = training(config, reward), Sampling(_dtype(settings), prompt=prompt, completion=limit)
    tested = {name: learned[name] for name in ("weights", "moments")} | {"scratch": scoring_work(config, reward)}
    judged = {"weights": model_bytes(config, judge.dtype), "scratch": scoring_work(config, judge)}
    tuned, paired = (training(config, train(kind, getattr(settings, kind).batch)) for kind in ("sft", "dpo"))
    # a prefix, which may be a complete rationale, and what the calls before have read
    continued = draw(1, prompt + limit, held=hardware.prefix_tokens)
    return {
        "01_sampling": _fullest(first),
        "02_sft": tuned,
        "03_second_sampling": draw(sizes.samples, prompt),
        "03_reward_model": _fullest([learned, tested]),
        "04_ppo": _fullest(_ppo_phases(config, settings, prompt).values()),
        "05_evaluation": _fullest([*answers(**exemplars), judged]),
        "06_solutions": draw(settings.explore.samples, prompt),
        "06_rft": tuned,
        "06_exploration": continued,
        "06_pit_report": continued,
        "06_step_dpo": paired,
        "06_outcome_dpo": paired,
        "06_evaluation": _fullest(answers()),
    }


def _fullest(moments: Iterable[dict[str, float]]) -> dict[str, float]:
    return max(moments, key=total)


# ---- what fits ------------------------------------------------------------------------------------------------


def savings(settings: Settings) -> dict[str, Settings]:
    """The settings with one of them changed towards less memory, by its name, those that cost least first.

    What trains must stay float32, so that weights are rounded below adapters.
    """
    hardware, ppo = settings.hardware, settings.ppo
    batch = math.gcd(settings.sft.batch, settings.reward.batch, settings.dpo.batch, ppo.minibatch)
    rows = hardware.micro_batch or 2 * batch
    fewer = max((n for n in range(1, rows // 2 + 1) if batch % n == 0), default=rows)
    less = "bfloat16" if hardware.dtype in ("float32", "auto") else "nf4"
    changed = {
        "hardware.gradient_checkpointing": _with(settings, gradient_checkpointing=True),
        "hardware.cache_tokens": _with(settings, cache_tokens=hardware.cache_tokens // 2 or 64_000),
        "hardware.max_batch": _with(settings, max_batch=max(hardware.max_batch // 2, 1)),
        "hardware.micro_batch": _with(settings, micro_batch=fewer),
        "lora.rank": replace(settings, lora=replace(settings.lora, rank=settings.lora.rank or 16)),
    }
    if settings.lora.rank and not (less == "nf4" and hardware.rollout_engine == "vllm"):  # which does not round
        changed["hardware.dtype"] = replace(_with(settings, dtype=less), ppo=replace(ppo, precision="bfloat16"))
    return {name: other for name, other in changed.items() if attrgetter(name)(other) != attrgetter(name)(settings)}


def _with(settings: Settings, **hardware) -> Settings:
    return replace(settings, hardware=replace(settings.hardware, **hardware))


@dataclass(frozen=True)
class Fit:
    """Whether the peak fits, and if not, what to do about it. Bytes."""

    capacity: float
    stage: str  # that needs most
    needed: float
    gains: dict[str, float]  # what each setting, changed alone, takes off the peak
    changes: list[tuple[str, object, float]]  # (setting, its new value, peak then): one after the other until it fits
    settings: Settings | None  # after the changes; None if no setting makes it fit

    @property
    def fits(self) -> bool:
        return self.needed <= self.capacity

    def __str__(self) -> str:
        head = f"{self.needed / 1e9:.1f} GB needed (in {self.stage}) of {self.capacity / 1e9:.1f} GB"
        if self.fits:
            return f"{head}: fits"
        gains = ", ".join(f"{name} {gain / 1e9:.1f} GB" for name, gain in self.gains.items())
        changes = ", then ".join(f"{name} = {value!r} ({after / 1e9:.1f} GB)" for name, value, after in self.changes)
        end = f"set {changes}" if self.settings else "no setting makes it fit; take a smaller model or a larger card"
        return f"{head}: does not fit. Each setting alone saves: {gains}. To make it fit: {end}."


def fit(
    config: LlamaConfig, settings: Settings, capacity: float, names: Iterable[str] = (), *, prompt: int, shown: int
) -> Fit:
    """Whether the stages with these names, or all of a run, fit into `capacity` bytes; lengths as of `stages`.

    Where they do not, the first setting that alone makes them fit is changed as far as that takes, or else the one that
    saves most, once, and so on.
    """
    wanted = set(names)

    def peak(some: Settings) -> tuple[str, float]:
        parts = stages(config, some, prompt=prompt, shown=shown)
        sizes = {name: total(of) for name, of in parts.items() if not wanted or name in wanted}
        return max(sizes.items(), key=lambda item: item[1], default=("none", 0.0))

    def repeat(name: str, now: Settings) -> tuple[Settings, float]:
        """The setting changed as long as it helps, or until it fits -> (settings, peak)."""
        left = peak(now)[1]
        while left > capacity and (further := savings(now).get(name)) and (after := peak(further)[1]) < left:
            now, left = further, after
        return now, left

    stage, needed = peak(settings)
    gains = {name: needed - peak(other)[1] for name, other in savings(settings).items()}
    changes, now, left = [], settings, needed
    while left > capacity:
        once = {name: (other, peak(other)[1]) for name, other in savings(now).items()}
        enough = next((name for name in once if repeat(name, now)[1] <= capacity), None)
        best = enough or min(once, key=lambda name: once[name][1], default=None)
        after = repeat(enough, now) if enough else once.get(best, (None, left))
        if after[1] >= left:
            break
        now, left = after
        changes.append((best, attrgetter(best)(now), left))
    return Fit(capacity, stage, needed, gains, changes, now if left <= capacity else None)
