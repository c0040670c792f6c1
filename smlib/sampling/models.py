"""Loading: the tokenizer, the model, its LoRA adapter; and clear words where there is none."""

import hashlib
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

import httpx2
import torch
from huggingface_hub import errors
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.error import NoMatchingPeftModuleError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from smlib.draws import own_draws
from smlib.errors import MissingLibrary, ModelError, UsageError, UserError
from smlib.sampling import encoding, gguf_models, model_files
from smlib.sampling.devices import device

logging.disable_progress_bar()  # its bars about files of a few megabytes go to standard error

# What transformers calls it to keep a layer's input alone and compute the rest again in the backward pass. The version
# that vLLM 0.32 wants has the older name.
CHECKPOINTING = (
    "activation_checkpointing"
    if hasattr(PreTrainedModel, "activation_checkpointing_enable")
    else "gradient_checkpointing"
)

TINY_BASE = Path(__file__).parents[1] / "tiny_base"
TOKENIZER = ("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "config.json")
_OF_THE_MACHINE = (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError)  # no file's fault


def locate(name: str | Path) -> tuple[str, str | None]:
    """A model's folder or Hub id, and the revision after its "@", if any.

    "tiny" is the base in the package; "smollm2" and the path of a GGUF file are the folders that `gguf_models` makes of
    them. A folder whose path holds "@" is a folder.
    """
    name = str(name)
    if file := gguf_models.find(name):
        return str(gguf_models.converted(file)), None
    if name == "tiny":
        if not (TINY_BASE / "model.safetensors").is_file():
            raise ModelError(
                "the tiny base is missing from the package: install it again, or delete what is left of the folder and "
                f"make it with: smlib pretrain --out {TINY_BASE}"
            )
        return str(TINY_BASE), None
    place, _, revision = name.partition("@")
    if not place.strip():
        raise ModelError(
            f"{name!r} is not the name of a model: give a folder, a GGUF file, or a Hub id such as owner/name@revision"
        )
    return (name, None) if not revision or Path(name).exists() else (place, revision)


@cache
def weights_sha256(name: str) -> str | None:
    """SHA-256 over a local model's weight files, in the order of their names; None for a Hub id."""
    files = sorted(Path(locate(name)[0]).glob("*.safetensors"))
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(2**24):
                digest.update(block)
    return digest.hexdigest() if files else None


@contextmanager
def _explained(place: str, revision: str | None, *files: str) -> Iterator[None]:
    """Turn what transformers, peft and the hub raise where there is no model, pages long in a notebook, into a
    ModelError. files: the JSON objects of a folder that are read within."""
    try:
        if (folder := Path(place)).is_dir():
            model_files.check_settings(folder, *files)
        yield
    except UserError:
        raise
    except Exception as error:
        if reason := _reason(place, revision, _causes(error), files):
            raise ModelError(f"{reason}; or choose another model (--model)") from None
        raise


def _causes(error: BaseException | None) -> list[BaseException]:
    """The error and what it was raised from or amid: transformers raises OSErrors of its own from those of the hub."""
    found = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _reason(place: str, revision: str | None, causes: list[BaseException], files: Sequence[str] = ()) -> str | None:
    """Why there is no model, and what to do about it; None where the error's own words must do."""
    folder, page = Path(place), f"https://huggingface.co/{place}"
    if folder.is_file():
        return f"{place} is a file, but not a GGUF file: give the folder that holds the model"
    if folder.is_dir() and not any((folder / name).exists() for name in ("config.json", "adapter_config.json")):
        return f"{place} holds no model: it has no config.json. Give a folder that save_pretrained has written"
    if any("trust_remote_code" in str(cause) for cause in causes):
        return (
            f"{place} wants to run code of its own (auto_map in its {files[0]}), which is not allowed: give a model "
            "of a kind that transformers knows by itself"
        )
    if any("instantiate the backend tokenizer" in str(cause) for cause in causes):
        return f"{place} has no tokenizer that can be read: save one there with its save_pretrained"
    unknown = ("model_type", "model type", "Unrecognized configuration class")  # transformers raises ValueErrors for it
    if any(isinstance(cause, ValueError) and any(part in str(cause) for part in unknown) for cause in causes):
        return f"{place} is not a causal language model that transformers knows: see model_type in its config.json"
    if isinstance(causes[0], ImportError):
        return f"{place} needs a library that is not installed here ({model_files.words(causes[0])})"
    if folder.is_dir():
        if any(isinstance(cause, _OF_THE_MACHINE) for cause in causes):
            return None
        return (
            f"the files of {place} are damaged, or do not fit each other ({model_files.words(causes[0])}): copy or "
            "download them again"
        )
    for cause in causes:
        match cause:
            case errors.GatedRepoError() if cause.response.status_code == 401:
                return f"{place} is gated: accept its licence at {page}, then `hf auth login` or set HF_TOKEN"
            case errors.GatedRepoError():
                return (
                    f"{place} is gated, and your token may not read it: accept its licence at {page} with the token's "
                    "account, wait until access is granted, and let a fine-grained token read gated repositories"
                )
            case errors.RepositoryNotFoundError():
                return (
                    f"{place} is neither a folder here nor a model at https://huggingface.co: check its spelling; a "
                    "private one needs `hf auth login` or HF_TOKEN"
                )
            case errors.RevisionNotFoundError():
                return f"{place} has no revision {revision!r}: give a branch, tag or commit of {page}/commits"
            case errors.HFValidationError():
                return f"{place} is neither a folder here nor a Hub id such as owner/name: check its spelling"
            case errors.LocalEntryNotFoundError() | errors.OfflineModeIsEnabled() | httpx2.TransportError():
                return (
                    f"{place} is neither a folder here nor in the cache, and https://huggingface.co cannot be reached "
                    "(no network, or HF_HUB_OFFLINE is set): connect"
                )
            case SafetensorError():
                return f"the weights of {place} in the hub's cache are damaged ({cause}): delete them there"
            case OSError() if "named config.json" in str(cause):
                return f"{place} has no config.json: if it is a LoRA adapter, download it and give the folder"
            case OSError() if ".safetensors" in str(cause):
                return f"{place} has no weights as safetensors: name a revision that has them, as {place}@REVISION"
    return None


def whole_model(name: str) -> str:
    """The model that a name stands for: of an adapter its base."""
    adapter = adapter_config(name)
    return adapter.base_model_name_or_path if adapter else name


def load_config(name: str) -> PretrainedConfig:
    """The model's configuration, of an adapter that of its base. Raises ModelError where there is none to be had."""
    place, revision = locate(whole_model(name))
    with _explained(place, revision, "config.json"):
        return AutoConfig.from_pretrained(place, revision=revision, trust_remote_code=False)


def load_generation(name: str) -> GenerationConfig:
    """The model's generation config, whose end tokens end its completions; of a model without one, its own config's."""
    place, revision = locate(name)
    with _explained(place, revision, "generation_config.json"):
        try:
            return GenerationConfig.from_pretrained(place, revision=revision)
        except OSError as error:
            missing = any(isinstance(cause, errors.EntryNotFoundError) for cause in _causes(error))
            if not Path(place).is_dir() and not missing:
                raise  # the hub may have one
        return GenerationConfig.from_model_config(load_config(name))


def load_tokenizer(name: str = "tiny", prompt: str = "plain") -> PreTrainedTokenizerBase:
    """The tokenizer, with a pad token that is not its end token (training would mask the ends away).

    prompt: how it asks questions, "plain" or by the model's own "chat" template (`encoding.use_prompt`).

    Llama's, Mistral's, DeepSeek's and Qwen's have no such one: there the unknown token pads, where there is none the
    one that begins a text, and else the first other special token (<|im_start|>, say). No completion holds any of
    them, and the vocabulary stays as the model knows it. Raises ValueError where all special tokens end a text.
    """
    place, revision = locate(name)
    with _explained(place, revision, *TOKENIZER):
        tokenizer = AutoTokenizer.from_pretrained(place, revision=revision, trust_remote_code=False)
    for key in ("is_local", "local_files_only"):  # how it was loaded, which would be saved with it
        tokenizer.init_kwargs.pop(key, None)
    encoding.use_prompt(tokenizer, prompt)
    encoding.check_tokenizer(tokenizer, str(name))
    special = [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
    for token in (tokenizer.pad_token, tokenizer.unk_token, tokenizer.bos_token, *special):
        if token not in (None, tokenizer.eos_token):
            tokenizer.pad_token = token
            return tokenizer
    raise UsageError(
        f"tokenizer {name!r}: pad token {tokenizer.pad_token!r} must exist and differ from the end token "
        f"{tokenizer.eos_token!r}; add one with tokenizer.add_special_tokens({{'pad_token': '<pad>'}})"
    )


def load_policy(name: str | Path = "tiny", dtype: str = "float32") -> PreTrainedModel:
    """A causal language model in eval mode, on the GPU where torch finds one; an adapter is merged into its base.

    dtype: the precision to hold it in, "float32", "bfloat16" or "nf4" (see `_nf4`). An adapter stays beside a base in
    nf4: so it was trained, and merged weights would be rounded to 4 bits anew. Raises ModelError where there is no
    such model.
    """
    adapter = adapter_config(name)
    if not adapter:
        return _load(name, dtype, device())
    try:
        base = load_policy(adapter.base_model_name_or_path, dtype)
    except ModelError as error:
        raise ModelError(f"the base of the adapter {name}: {error}") from None
    adapted = _with_adapter(base, Path(name))
    return (adapted.get_base_model() if dtype == "nf4" else adapted.merge_and_unload()).eval()


def _with_adapter(base: PreTrainedModel, folder: Path) -> PeftModel:
    with warnings.catch_warnings(), _explained(str(folder), None):
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, about how peft asks it
        warnings.filterwarnings("ignore", "Found missing adapter keys")  # an error here
        with own_draws(0):  # peft draws what it then overwrites
            adapted = PeftModel.from_pretrained(base, folder)
    asked = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        differ = sorted(asked.keys() ^ set(file.keys()))
    model_files.refuse_differences(folder, differ)
    model_files.refuse_nonfinite(folder, asked)
    return adapted


def _load(name: str | Path, dtype: str, where: torch.device) -> PreTrainedModel:
    place, revision = locate(name)
    options = _nf4() if dtype == "nf4" else {"dtype": getattr(torch, dtype)}
    options |= {"use_safetensors": check_weights(name), "trust_remote_code": False}
    with _explained(place, revision, "config.json", "generation_config.json"), _unreported():
        model, found = AutoModelForCausalLM.from_pretrained(
            place, revision=revision, device_map={"": where}, output_loading_info=True, ignore_mismatched_sizes=True,
            **options,
        )  # fmt: skip
    model_files.refuse_misfits(place, model, found)
    for layer in model.modules():
        # bitsandbytes repacks weights to sample faster on some CPUs, and then lets no gradient through, silently
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    return model.eval()


def check_weights(name: str | Path) -> bool | None:
    """Look at a model's weights without loading them; returns from_pretrained's use_safetensors: True, but None for a
    commit of the hub's. What a commit holds never changes, and torch reads its older formats without running code
    (weights_only).

    Raises ModelError where the weights in a local folder are missing, damaged or pickled.
    """
    place, revision = locate(name)
    if getattr(load_config(str(name)), "transformers_weights", None):  # which may be pickled ones
        raise ModelError(
            f"{place} names its weights file in its config.json (transformers_weights), which is not supported: "
            f"remove that entry and rename the file to model.safetensors, {model_files.ANOTHER}"
        )
    if Path(place).is_dir():
        model_files.check_weights(Path(place))
        return True
    return None if re.fullmatch("[0-9a-f]{40}", revision or "") else True


@contextmanager
def _unreported() -> Iterator[None]:
    """Without transformers' table of weights that do not fit, which are refused here in a sentence."""
    logger = logging.get_logger("transformers.modeling_utils")

    def no_table(record) -> bool:
        return record.funcName != "log_state_dict_report"

    logger.addFilter(no_table)
    try:
        yield
    finally:
        logger.removeFilter(no_table)


def _nf4() -> dict:
    """Arguments of from_pretrained for QLoRA's base (2305.14314): all linear layers but the output head in 4-bit
    NormalFloat with double quantisation, about 0.516 bytes a weight; computations, and all else, in bfloat16."""
    if find_spec("bitsandbytes") is None:
        raise MissingLibrary(
            "weights in 'nf4' need bitsandbytes, which is not installed: pip install 'smlib[gpu]', or choose "
            "hardware.dtype = 'bfloat16'"
        )
    quantized = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"dtype": torch.bfloat16, "quantization_config": quantized}


def adapter_config(name: str | Path) -> PeftConfig | None:
    """What the folder of a LoRA adapter says of it; None for a whole model.

    Its base is sought beside the folder first, as stages name theirs by a relative path. Raises ModelError where it is
    no LoRA adapter of a whole model, or its weights are missing, damaged or pickled.
    """
    folder = Path(locate(name)[0])
    if not (folder / "adapter_config.json").is_file():
        return None
    with _explained(str(folder), None, "adapter_config.json"):
        config = PeftConfig.from_pretrained(folder)
    plain = isinstance(config, LoraConfig) and not config.alora_invocation_tokens  # aLoRA's begin within a text
    if not plain or not isinstance(config.base_model_name_or_path, str):
        raise ModelError(
            f"{folder / 'adapter_config.json'} is not the config of a LoRA adapter that names its base: give another "
            "adapter, or a whole model (--model)"
        )
    model_files.check_weights(folder, "adapter_model")
    if (base := folder / config.base_model_name_or_path).exists():
        config.base_model_name_or_path = str(base)
        if (base / "adapter_config.json").exists():
            raise ModelError(
                f"the base of the adapter {name} is an adapter too: merge that first, {model_files.ANOTHER}"
            )
    return config


def add_lora(model: PreTrainedModel, rank: int, alpha: int, targets: str, base: str, seed: int = 0) -> PeftModel:
    """Put a trainable LoRA adapter (2106.09685) of scale alpha / rank, without dropout, on a model that stays as it is.

    targets: a regular expression of whole module names, or "all-linear" for all but the output head. base: what the
    saved adapter names as its base. seed: all that the new weights depend on. Raises ValueError where targets match no
    layer, and for a model with an adapter.
    """
    if any(isinstance(layer, BaseTunerLayer) for layer in model.modules()):  # peft would begin that one anew
        raise UsageError(
            "the model already has an adapter, on a base in 4 bits: load it with load_policy(folder, 'bfloat16'), "
            "which merges them, save that, and start from there"
        )
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, about how peft asks it
        warnings.filterwarnings("ignore", "fan_in_fan_out")  # GPT-2's layers hold their weights the other way round
        try:
            with own_draws(seed):
                adapted = get_peft_model(model, config)
        except (NoMatchingPeftModuleError, ValueError, re.error):  # ValueError: layers that are not linear
            raise UsageError(_no_match(model, targets)) from None
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        if isinstance(layer, BaseTunerLayer):
            raise UsageError(_no_match(model, targets))
    config.base_model_name_or_path = base
    # What is saved is to be the same in every process and folder: not in a set's order, and without peft's README.md,
    # which names the folder that the model came from.
    config.target_modules = targets if isinstance(config.target_modules, str) else sorted(config.target_modules)
    adapted.create_or_update_model_card = lambda folder: None
    # peft would look into the base, where saving is, for a vocabulary that training does not change
    adapted.save_pretrained = partial(adapted.save_pretrained, save_embedding_layers=False)
    return adapted


def check_targets(config: PretrainedConfig, rank: int, targets: str) -> None:
    """Raise ValueError where `add_lora` would find no such layer in a model of this shape. Nothing of one is loaded."""
    if rank and targets != "all-linear":
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        add_lora(model, rank, 1, targets, base="")


def _no_match(model: PreTrainedModel, targets: str) -> str:
    head = model.get_output_embeddings()
    linear = [
        name for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, Conv1D)) and layer is not head
    ]
    last = sorted({name.rpartition(".")[2] for name in linear})
    return (
        f"lora.targets = {targets!r} matches no layer of {type(model).__name__}, or layers that are not linear. The "
        f"linear ones are {', '.join(last)}, in full such as {linear[0]}. Give a regular expression that matches full "
        "names, such as "
        rf"'.*\.({'|'.join(last[:2])})', or 'all-linear'"
    )


def merged(adapted: PeftModel, base: str | Path) -> PreTrainedModel:
    """The trained model without its adapter, which is added to its weights.

    base: where the model under the adapter was loaded from. One in nf4 is loaded from there again, in bfloat16 and to
    the CPU: its 4 bits would not take the adapter in. A stage that loads the result in nf4 rounds it anew.
    """
    if getattr(adapted, "is_loaded_in_4bit", False):
        trained = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        whole, config = _load(base, "bfloat16", torch.device("cpu")), adapted.peft_config["default"]
        adapted = add_lora(whole, config.r, config.lora_alpha, config.target_modules, base="")
        set_peft_model_state_dict(adapted, trained)
    return adapted.merge_and_unload()


def model_size(model: PreTrainedModel) -> int:
    """Parameters, counted once where weights are tied."""
    return sum(parameter.numel() for parameter in model.parameters())
