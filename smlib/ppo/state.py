"""What a killed training goes on from: its state and its checkpoints.

A checkpoint is a folder out/checkpoint-UPDATE (`smlib.files.checkpoints`) of three files, none of them pickled:

    weights.safetensors    the weights that train
    optimizer.safetensors  Adam's moments of each, by names such as "head.weight/exp_avg"
    state.json             {"run": the settings, "state": `State`, "optimizer": Adam's numbers, and hashes of the rest}

A full state is the same for one process and for many, sharded or not, so that a training may go on with another number
of processes. Only DeepSpeed knows no whole optimizer: there each process writes its part, in files of DeepSpeed's own.
"""

import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint import state_dict
from torch.distributed.checkpoint.state_dict import StateDictOptions
from torch.optim import Optimizer

from smlib.errors import UsageError
from smlib.files import checkpoints
from smlib.files.artifacts import refuse_difference
from smlib.ppo.arithmetic import RunningMoments, adapt_kl_coef
from smlib.ppo.batches import Batch
from smlib.ppo.roles import Roles
from smlib.ppo.settings import PPOSettings
from smlib.ppo.updates import NonFiniteError
from smlib.sampling.devices import process_state
from smlib.signals import handling

STATE_FILE = "state.json"
_FULL_STATE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)


@dataclass
class State:
    """What an update changes besides weights and optimizer. Randomness is not in it: all that an update draws comes
    from `rollouts.seed_of_update`, so a resumed run needs no generator's state."""

    update: int = 0  # updates done
    kl_coef: float = 0.0
    moments: RunningMoments = field(default_factory=RunningMoments)  # of the scores, centred if they are
    rows: list[dict] = field(default_factory=list)  # the log so far

    @classmethod
    def from_json(cls, saved: dict) -> "State":
        """The state that `asdict` made a dict of."""
        return cls(**saved | {"moments": RunningMoments(**saved["moments"])})

    def advance(self, row: dict, moments: RunningMoments, settings: PPOSettings) -> None:
        """Count an update: its row of the log, the moments with its scores in them, the next KL coefficient."""
        if settings.kl_target:
            self.kl_coef = adapt_kl_coef(self.kl_coef, row["kl"], settings.kl_target)
        self.moments = moments
        self.rows.append(row)
        self.update += 1


def save_checkpoint(out: Path, roles: Roles, optimizer: Optimizer, state: State, run: dict) -> None:
    """Write out/checkpoint-UPDATE in one atomic step, then remove older ones; nothing where it is there.

    All processes call it, and the first one writes. run: the settings, to be compared when it is loaded.
    """
    folder, processes = out / f"checkpoint-{state.update:06d}", process_state()
    if folder.exists():
        return
    trained = {_plain(name) for name, weight in roles.named_parameters() if weight.requires_grad}
    weights = state_dict.get_model_state_dict(roles, options=_FULL_STATE)
    weights = {_plain(name): weight for name, weight in weights.items() if _plain(name) in trained}
    adam, deepspeed = {}, None
    if uses_deepspeed(roles):
        deepspeed = _save_deepspeed(roles, out / "deepspeed.tmp")
    else:
        adam = state_dict.get_optimizer_state_dict(roles, optimizer, options=_FULL_STATE)
    processes.wait_for_everyone()  # all have seen that there is no such folder
    if processes.is_main_process:
        saved = {"run": run, "state": asdict(state), "optimizer": adam.get("param_groups")}
        with checkpoints.new_checkpoint(folder, STATE_FILE, saved) as tmp:
            save_file(weights, tmp / "weights.safetensors")
            if deepspeed:
                shutil.copytree(deepspeed, tmp, dirs_exist_ok=True)
                shutil.rmtree(deepspeed)
            else:
                save_file(_flat(adam["state"]), tmp / "optimizer.safetensors")
    processes.wait_for_everyone()


def load_checkpoint(out: Path, roles: Roles, optimizer: Optimizer, run: dict) -> State | None:
    """Put the newest checkpoint of `out` into roles and optimizer; None if there is none.

    Raises StageError for a damaged one, StageMismatch for one of another `run`, UsageError where one of the two
    trainings has DeepSpeed and the other has not.
    """
    folder = checkpoints.newest(out)
    if folder is None:
        return None
    saved = checkpoints.read_state(folder, STATE_FILE)
    refuse_difference(folder, run, saved["run"], "folder")
    by_deepspeed = saved["optimizer"] is None
    if by_deepspeed != uses_deepspeed(roles):
        raise UsageError(f"{folder} was trained {'with' if by_deepspeed else 'without'} DeepSpeed: resume it that way")
    if by_deepspeed:
        roles.load_checkpoint(str(folder), tag="deepspeed", load_module_strict=False)
    else:
        state_dict.set_model_state_dict(roles, load_file(folder / "weights.safetensors"), options=_FULL_STATE)
        adam = {"state": _nested(load_file(folder / "optimizer.safetensors")), "param_groups": saved["optimizer"]}
        state_dict.set_optimizer_state_dict(roles, optimizer, adam, options=_FULL_STATE)
    return State.from_json(saved["state"])


def trained_roles(roles: Roles, out: Path) -> Roles:
    """Fresh roles with the weights of the newest checkpoint of `out`, whole, whatever parts trained them.

    Raises StageError for a damaged one.
    """
    folder = checkpoints.newest(out)
    checkpoints.read_state(folder, STATE_FILE)  # verifies the files
    roles.load_state_dict(load_file(folder / "weights.safetensors"), strict=False)
    return roles


def with_batch_saved(error: NonFiniteError, out: Path, batch: Batch, state: State) -> NonFiniteError:
    """The same error, after the batch was saved in out/nonfinite.safetensors: it says where and what next."""
    path = out / "nonfinite.safetensors"
    if process_state().is_main_process:
        tensors = {name: value.cpu() for name, value in vars(batch).items() if isinstance(value, Tensor)}
        save_file(tensors, path)
    return NonFiniteError(
        f"update {state.update}: {error}. Its batch is in {path}; the last checkpoint is intact. Try a lower "
        "learning_rate, a lower reward_clip, or float32 in place of bfloat16."
    )


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C and a request to end (SIGTERM) inside take effect at the end, as whoever handles them has it, so that a
    checkpoint never holds half an update."""
    arrived = []

    def note(number, frame):
        arrived.append(number)

    with handling(signal.SIGINT, note), handling(signal.SIGTERM, note):
        yield
    for number in dict.fromkeys(arrived):
        signal.raise_signal(number)


def uses_deepspeed(roles: Roles) -> bool:
    return hasattr(roles, "save_checkpoint")  # the engine that DeepSpeed wraps a module in


def _save_deepspeed(roles: Roles, folder: Path) -> Path:
    """Let every process write its part of the training into an empty folder."""
    processes = process_state()
    if processes.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
    processes.wait_for_everyone()
    roles.save_checkpoint(str(folder), tag="deepspeed", exclude_frozen_parameters=True)
    return folder


def _plain(name: str) -> str:
    """The name of a weight without what DDP puts before it."""
    return name.removeprefix("module.")


def _flat(adam: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """An optimizer's state of each weight, by names such as "head.weight/exp_avg"."""
    return {f"{weight}/{name}": tensor for weight, tensors in adam.items() for name, tensor in tensors.items()}


def _nested(flat: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """`_flat` taken back."""
    adam: dict[str, dict[str, Tensor]] = {}
    for key, tensor in flat.items():
        weight, _, name = key.rpartition("/")
        adam.setdefault(weight, {})[name] = tensor
    return adam
