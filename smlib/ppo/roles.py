"""The roles of PPO, and three ways to hold them in memory behind one interface.

The *policy* learns, the frozen *reference* marks where it started, the *value* predicts the reward to come. (The
fourth, the reward, is a function of texts: `smlib.judging.answers.Reward`.) They are held in one of three ways:

    SeparateModels(policy, reference, value)   a model each, the value's with a scalar head
    SeparateModels(policy, reference)          the head sits on the policy's own last hidden states (shared trunk)
    Adapters(base, lora, ...)                  one frozen base with a LoRA adapter each for policy, value and reward;
                                               with its adapters off it is the reference

A pass reads completions that were laid out by `packing.pack`: several of one question share the tokens of their prompt.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from smlib.draws import own_draws
from smlib.errors import UsageError
from smlib.sampling.models import CHECKPOINTING
from smlib.sampling.packing import pack, packed_logprobs, packed_states


class Roles(nn.Module):
    """What PPO asks of policy, reference and value. What has requires_grad is what trains.

    As one module with one forward it can be wrapped for several processes (DDP, FSDP, DeepSpeed) as it is. There is no
    dropout, so that the first ratio of an update is 1. Train mode is on only where transformers needs it to checkpoint
    activations.
    """

    policy: PreTrainedModel  # the causal language model that samples
    head: nn.Linear  # the value's, [H] -> scalar; float32 whatever the models are
    gradient_checkpointing = False

    def forward(self, packed: dict[str, Tensor], reference: bool = False) -> tuple[Tensor, Tensor]:
        """(log-probabilities of the N tokens of the completions in `packed`, values of what is before each): [N], [N].

        reference: the log-probabilities are the reference's in place of the policy's.
        """
        self.train(self.gradient_checkpointing and torch.is_grad_enabled())
        return self._forward(packed, reference)

    def checkpoint_gradients(self) -> None:
        """Keep the layers' inputs alone and compute the rest again in the backward pass: less memory, more time.

        UsageError where attention has dropout, which would not be the same the second time.
        """
        for model in self._decoders():
            if dropout := getattr(model.config, "attention_dropout", 0):
                raise UsageError(f"attention_dropout = {dropout} of {type(model).__name__} must be 0 to train by PPO")
            getattr(model, f"{CHECKPOINTING}_enable")(self._checkpointing())
        self.gradient_checkpointing = True

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """{"policy": {name: weight}, "value": ...}: the weights that train, each in one of the two."""
        raise NotImplementedError

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the policy into `folder`, to be read by `models.load_policy`, and the value into folder/value."""
        raise NotImplementedError

    def _decoders(self) -> list[PreTrainedModel]:
        raise NotImplementedError

    def _checkpointing(self) -> dict:
        return {"use_reentrant": False}

    def _forward(self, packed: dict[str, Tensor], reference: bool) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _values(self, states: Tensor) -> Tensor:
        with torch.autocast(states.device.type, enabled=False):  # a value needs more than bfloat16's three digits
            return self.head(states.float()).squeeze(-1)


def value_head(policy: PreTrainedModel) -> nn.Linear:
    """A scalar linear head for hidden states of the policy's width.

    It starts at zero, so at first it predicts the mean of normalised rewards and does not disturb the trunk.
    """
    head = nn.utils.skip_init(nn.Linear, policy.config.hidden_size, 1, device=policy.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


class SeparateModels(Roles):
    """Policy and reference as two models of one class.

    value: the decoder of a third (such as `copy.deepcopy(policy).get_decoder()`), which learns values alone. None saves
    that model and its passes, and policy and value both train the trunk.
    """

    def __init__(self, policy: PreTrainedModel, reference: PreTrainedModel, value: PreTrainedModel | None = None):
        super().__init__()
        self.policy, self.reference, self.value, self.head = policy, reference, value, value_head(policy)
        reference.requires_grad_(False)
        self.eval()

    def weights(self):
        return {"policy": _trainable(self.policy), "value": _trainable(self.head) | _trainable(self.value)}

    def save_pretrained(self, folder):
        self.policy.save_pretrained(folder)
        (Path(folder) / "value").mkdir(exist_ok=True)
        save_file(self.weights()["value"], Path(folder) / "value" / "value.safetensors")

    def _decoders(self):
        return [self.policy] if self.value is None else [self.policy, self.value]

    def _forward(self, packed, reference):
        model, trunk = self.reference if reference else self.policy, self.value or self.policy
        states = packed_states(model, packed)
        logp = packed_logprobs(model, packed, states)
        return logp, self._values(states if trunk is model else packed_states(trunk, packed))


class Adapters(Roles):
    """LoRA adapters, "default" the policy's: the way to hold a 7B model's four roles on one card.

    model: the base with a fresh adapter, from `models.add_lora`; the value's is like it.
    reward: folder of a reward model that was trained as an adapter of this base; `using("reward")` scores with it.
    share_trunk: the value head reads the policy's hidden states, and there is no adapter for the value.
    seed: of the value's new adapter.
    """

    def __init__(self, model: PeftModel, reward: str | Path | None = None, share_trunk: bool = False, seed: int = 0):
        super().__init__()
        self.model = model
        self.trained = ["default"] if share_trunk else ["default", "value"]
        with own_draws(seed):
            if not share_trunk:
                self.model.add_adapter("value", copy.deepcopy(self.model.peft_config["default"]))
            if reward is not None:
                self.model.load_adapter(str(reward), "reward")
        self.head = value_head(self.policy)
        self.layers = [layer for layer in self.model.modules() if isinstance(layer, BaseTunerLayer)]
        for name, weight in self.model.named_parameters():  # peft frees the adapter that came last alone
            weight.requires_grad_(_adapter_name(name) in self.trained)
        self._select("default")
        self.eval()

    @property
    def policy(self) -> PreTrainedModel:
        return self.model.get_base_model()

    @contextmanager
    def using(self, adapter: str | None) -> Iterator[PreTrainedModel]:
        """Activate an adapter, or none, for a `with` block; yields the base, a causal language model."""
        before = self.adapter
        self._select(adapter)
        try:
            yield self.policy
        finally:
            self._select(before)

    def _select(self, adapter: str | None) -> None:
        # peft's own set_adapter and disable_adapter freeze what they switch off, and here a backward pass follows
        # that needs the policy's adapter and the value's
        self.adapter = adapter
        for layer in self.layers:
            layer._disable_adapters = adapter is None
            if adapter is not None:
                layer._active_adapter = [adapter]

    def weights(self):
        trained = _trainable(self.model)
        policy = {name: weight for name, weight in trained.items() if _adapter_name(name) == "default"}
        value = {name: weight for name, weight in trained.items() if _adapter_name(name) == "value"}
        return {"policy": policy, "value": value | _trainable(self.head)}

    def save_pretrained(self, folder):
        """In peft's own format: PeftModel.from_pretrained(base, folder) is the policy, folder/value the value."""
        self.model.save_pretrained(folder, selected_adapters=self.trained)
        (Path(folder) / "value").mkdir(exist_ok=True)
        save_file(_trainable(self.head), Path(folder) / "value" / "head.safetensors")

    def save_policy(self, folder: str | Path) -> None:
        """The policy's adapter alone, as above."""
        self.model.save_pretrained(folder, selected_adapters=["default"])

    def _decoders(self):
        return [self.policy]

    def _checkpointing(self):
        # what is computed again must be computed under the adapter that was on the first time
        return {"use_reentrant": False, "context_fn": lambda: (nullcontext(), self.using(self.adapter))}

    def _forward(self, packed, reference):
        adapter, value_adapter = None if reference else "default", self.trained[-1]
        with self.using(adapter) as model:
            states = packed_states(model, packed)
            logp = packed_logprobs(model, packed, states)
        if value_adapter != adapter:
            with self.using(value_adapter) as model:
                states = packed_states(model, packed)
        return logp, self._values(states)


@contextmanager
def unsharded(roles: Roles) -> Iterator[None]:
    """Where FSDP has sharded the weights: within, every process has all of them, since the processes draw different
    numbers of tokens and cannot meet at every step. Elsewhere: nothing."""
    shards = [module for module in roles.modules() if isinstance(module, FSDPModule)]
    if shards:
        with torch.no_grad():
            roles(pack([([0], [[0]])], 0, roles.head.weight.device))  # FSDP wants its root to be first
    for shard in shards:
        shard.set_reshard_after_forward(False, recurse=False)
        shard.unshard()
    try:
        yield
    finally:
        for shard in shards:
            shard.reshard()
            shard.set_reshard_after_forward(True, recurse=False)


def _adapter_name(name: str) -> str | None:
    """The adapter of a parameter of a PeftModel: "...q_proj.lora_A.value.weight" -> "value"; None of the base's."""
    parts = name.split(".")
    return next((after for part, after in pairwise(parts) if part.startswith("lora_")), None)


def _trainable(model: nn.Module | None) -> dict[str, Tensor]:
    parameters = model.named_parameters() if model is not None else ()
    return {name: weight for name, weight in parameters if weight.requires_grad}
