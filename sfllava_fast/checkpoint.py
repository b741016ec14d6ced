"""Loading: a Hugging Face LLaVA checkpoint, checked key by key, as the stock transformers model."""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .attention import Attention, resolve_attention
from .errors import BackendError, CheckpointError, InputError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CLASSES = {"llava": "LlavaForConditionalGeneration", "llava_next": "LlavaNextForConditionalGeneration"}
DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}
# Files that any Hugging Face tokenizer needs one of.
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_HUB_FILES = ("*.json", "*.jinja", "*.safetensors", "tokenizer.model", "*.txt")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

# Buffers that old checkpoints store and the model computes itself.
_COMPUTED = re.compile(r"\.embeddings\.position_ids$|\.rotary_emb\.inv_freq$")
_VISION_LAYER = re.compile(r"vision_tower\..*encoder\.layers\.(\d+)\.")
_VISION_POST_NORM = re.compile(r"vision_tower\.(vision_model\.)?post_layernorm\.")

# SlowFast-LLaVA's published runs stretch the Llama models' 4096 positions by dynamic NTK scaling with
# factor 2, which changes nothing up to 4096 tokens.
_STRETCHED_POSITIONS = 4096
_STRETCH = {"rope_type": "dynamic", "factor": 2.0}


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: the stock model, cut after the vision layers it reads, and what belongs to it.

    name: what the caller asked for. depths: encoder layers to run for each feature that is read, as in
    `hidden_states[depth]`. drops_first: whether the first vision token (CLS) is left out. context: tokens
    the language model may see. options: the "sfllava_fast" entry of config.json, or None.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    chat_template: str | None
    preprocessor: dict[str, Any]
    attention: Attention
    depths: tuple[int, ...]
    drops_first: bool
    grid: tuple[int, int]
    context: int
    options: dict[str, Any] | None


def load_checkpoint(
    path_or_hub_id: str | Path,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    attention: str = "auto",
) -> Checkpoint:
    """Load a LLaVA-1.5 or LLaVA-NeXT checkpoint in Hugging Face format (key layouts of transformers 4 and 5).

    Raises CheckpointError for anything missing, corrupt, incomplete or of another architecture,
    BackendError for a device, dtype or attention that cannot serve, InputError for an unknown dtype.
    """
    require_transformers()
    path = locate(path_or_hub_id)
    raw = read_config(path)
    device = choose_device(device)
    dtype = choose_dtype(dtype, device, raw)
    from transformers import AutoConfig

    with _one_line(f"{path}: config.json is not usable"):
        config = AutoConfig.from_pretrained(path)
    depths = feature_depths(config.vision_feature_layer, config.vision_config.num_hidden_layers)
    text = config.text_config
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    chosen = resolve_attention(attention, device, dtype, head_dim)
    context = _stretch_context(text)
    tokenizer = load_tokenizer(path)
    preprocessor = read_preprocessor(path)
    model = load_model(path, raw, config, dtype, chosen.implementation, max(depths))
    tower = cut_tower(model.model.vision_tower, max(depths))
    drops_first = config.vision_feature_select_strategy == "default"
    return Checkpoint(
        str(path_or_hub_id),
        model.to(device).requires_grad_(False).eval(),
        tokenizer,
        read_chat_template(path, tokenizer),
        preprocessor,
        chosen,
        depths,
        drops_first,
        patch_grid(tower, config.vision_config, drops_first),
        context,
        raw.get("sfllava_fast"),
    )


def require_transformers() -> None:
    """Raise BackendError unless transformers 5 or newer can be imported."""
    try:
        from transformers import __version__
    except ImportError as error:
        raise BackendError(f"no usable transformers ({error}): pip install 'sfllava-fast[llava]'") from error
    if int(__version__.split(".")[0]) < 5:
        raise BackendError(f"transformers {__version__} is too old: pip install 'transformers>=5'")


def locate(path_or_hub_id: str | Path) -> Path:
    """The directory of a checkpoint; a hub id is downloaded, or taken from the local cache."""
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        return path
    name = str(path_or_hub_id)
    if path.exists():
        raise CheckpointError(f"{name} is a file: give the directory of a checkpoint")
    if isinstance(path_or_hub_id, Path) or not _HUB_ID.fullmatch(name) or name.startswith("."):
        raise CheckpointError(
            f"no checkpoint directory {name}: give a directory or a hub id such as owner/name"
        )
    from huggingface_hub import snapshot_download

    with _one_line(f"{name} is neither a directory here nor a checkpoint that the hub gives out"):
        return Path(snapshot_download(name, allow_patterns=list(_HUB_FILES)))


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a LLaVA-1.5 or LLaVA-NeXT checkpoint, as it stands."""
    config = _read_json(path / "config.json")
    if config is None:
        raise CheckpointError(f"{path} has no config.json: give the directory of a Hugging Face checkpoint")
    model_type = config.get("model_type")
    found = (config.get("architectures") or [CLASSES.get(model_type, model_type)])[0]
    if found is None or found != CLASSES.get(model_type):
        raise CheckpointError(f"{path} holds {found}: only {' and '.join(CLASSES.values())} can be read")
    return config


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device to run on: CUDA where there is one, else the CPU. BackendError for one that is not there."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise BackendError(f"unknown device {device!r}: use cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise BackendError(f"device {device.type} is not served: use cpu or cuda")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise BackendError(f"device {device} is not there ({count} CUDA devices are visible): use cpu")
    return device


def choose_dtype(
    dtype: str | torch.dtype | None, device: torch.device, config: dict[str, Any]
) -> torch.dtype:
    """The dtype to load: float32 on a CPU, the checkpoint's 16 bits on a GPU (bfloat16 where it has none)."""
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise InputError(f"unknown dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
        dtype = DTYPES[dtype]
    if dtype is None:
        stored = config.get("dtype") or config.get("torch_dtype")
        stored = DTYPES.get(str(stored).removeprefix("torch."), torch.float32)
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if stored is torch.float32 else stored
    if dtype not in DTYPES.values():
        raise InputError(f"dtype {dtype} is not served: use float32, bfloat16 or float16")
    if dtype is torch.float16 and device.type == "cpu":
        raise BackendError("float16 matrix products are unusably slow on a CPU: use bfloat16 or float32")
    return dtype


def feature_depths(layers: int | list[int], count: int) -> tuple[int, ...]:
    """Encoder layers to run for each entry of `vision_feature_layer` in a tower of `count` layers.

    Entry i names `hidden_states[i]` of the stock tower: count + 1 states, the first before any layer.
    """
    named = [layers] if isinstance(layers, int) else list(layers)
    if not named or not all(-count - 1 <= i <= count for i in named):
        raise CheckpointError(f"vision_feature_layer {layers} is outside of a vision tower of {count} layers")
    return tuple(i if i >= 0 else count + 1 + i for i in named)


def load_model(
    path: Path,
    raw: dict[str, Any],
    config: Any,
    dtype: torch.dtype,
    attention: str,
    depth: int,
) -> PreTrainedModel:
    """The stock model with every weight that is read loaded from the checkpoint; CheckpointError otherwise.

    Weights that may be absent: the vision layers after `depth` and the vision post-norm, which nothing reads.
    Stored tensors that may be left over: buffers that the model computes itself.
    """
    import transformers

    check_weight_files(path)
    # A subclass of our own would skip transformers' key conversion and leave lm_head random.
    stock = getattr(transformers, CLASSES[raw["model_type"]])
    with _one_line(f"{path}: the weights cannot be loaded"), _quiet_loading():
        model, info = stock.from_pretrained(
            path,
            config=config,
            key_mapping=_key_mapping(stock, config),
            dtype=dtype,
            attn_implementation=attention,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    missing = [key for key in info["missing_keys"] if not _never_read(key, depth)]
    left_over = [key for key in info["unexpected_keys"] if not _COMPUTED.search(key)]
    resized = [key for key, *_ in info["mismatched_keys"]]
    for what, keys in (("lacks", missing), ("holds unknown", left_over), ("holds misshapen", resized)):
        if keys:
            shown = ", ".join(sorted(keys)[:3]) + (", ..." if len(keys) > 3 else "")
            raise CheckpointError(
                f"{path} {what} weights ({len(keys)}: {shown}): it is damaged, or written by a "
                "newer transformers than the one installed"
            )
    return model


def _key_mapping(stock: type, config: Any) -> dict[str, str] | None:
    """Renaming for releases whose vision tower has the level .vision_model; later ones store keys without."""
    from transformers import AutoModel

    with torch.device("meta"):
        tower = AutoModel.from_config(config.vision_config)
    if not hasattr(tower, "vision_model"):
        return None
    # A mapping of the caller's replaces the class's own, where there is one.
    own = getattr(stock, "_checkpoint_conversion_mapping", None) or {}
    return {r"^((?:model\.)?vision_tower)\.(?!vision_model\.)": r"\1.vision_model.", **own}


def check_weight_files(path: Path) -> None:
    """Raise CheckpointError unless every weight file is there and whole (headers and sizes, not contents)."""
    from safetensors import safe_open

    index = _read_json(path / "model.safetensors.index.json")
    names = sorted(set(index.get("weight_map", {}).values())) if index else ["model.safetensors"]
    for name in names:
        if not (path / name).is_file():
            raise CheckpointError(f"{path} has no {name}: download the checkpoint again")
        with _one_line(f"{path / name} is corrupt or truncated: download it again"):
            safe_open(path / name, framework="pt")


def cut_tower(tower: torch.nn.Module, depth: int) -> torch.nn.Module:
    """Drop the layers after `depth` and the post-norm from a vision tower, in place, and return its core."""
    # transformers 5.0 keeps the level .vision_model that later releases drop.
    core = getattr(tower, "vision_model", tower)
    layers = getattr(getattr(core, "encoder", None), "layers", None)
    if layers is None or not hasattr(core, "post_layernorm"):
        raise CheckpointError(
            f"the vision tower {type(tower).__name__} is not of the CLIP kind: use a CLIP LLaVA"
        )
    core.encoder.layers = layers[:depth]
    core.post_layernorm = torch.nn.Identity()
    return core


def patch_grid(core: torch.nn.Module, config: Any, drops_first: bool) -> tuple[int, int]:
    """(rows, columns) of a frame's patches. CheckpointError where the features are not exactly those."""
    side = config.image_size // config.patch_size
    extra = int(hasattr(core.embeddings, "class_embedding")) - int(drops_first)
    if extra:
        chosen, other = ("default", "full") if drops_first else ("full", "default")
        raise CheckpointError(
            f"vision_feature_select_strategy {chosen!r} leaves {side * side + extra} vision tokens, "
            f"not the {side}x{side} grid that is pooled: set it to {other!r} in config.json"
        )
    return side, side


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint directory."""
    if not any((path / name).is_file() for name in _TOKENIZERS):
        raise CheckpointError(
            f"{path} has no tokenizer ({', '.join(_TOKENIZERS)}): download the checkpoint again"
        )
    from transformers import AutoTokenizer

    with _one_line(f"{path}: the tokenizer cannot be loaded"):
        return AutoTokenizer.from_pretrained(path)


def read_chat_template(path: Path, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template of a checkpoint: the processor's (chat_template.json) or the tokenizer's."""
    template = (_read_json(path / "chat_template.json") or {}).get("chat_template") or tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def read_preprocessor(path: Path) -> dict[str, Any]:
    """The image processor's settings: preprocessor_config.json, or their entry in processor_config.json."""
    settings = _read_json(path / "preprocessor_config.json")
    settings = settings or (_read_json(path / "processor_config.json") or {}).get("image_processor")
    if not settings:
        raise CheckpointError(f"{path} has no preprocessor_config.json: download the checkpoint again")
    return settings


def rope_type(text: Any) -> str:
    """The kind of rotary embedding that a language model's config names."""
    return (getattr(text, "rope_parameters", None) or {}).get("rope_type", "default")


def _stretch_context(text: Any) -> int:
    """Tokens that the language model may see; stretches its rotary embedding, in place, as published."""
    fits = text.model_type == "llama" and text.max_position_embeddings == _STRETCHED_POSITIONS
    if fits and rope_type(text) == "default":
        text.rope_parameters = {**text.rope_parameters, **_STRETCH}
    # Other kinds of scaling are configured with the positions that they reach.
    factor = text.rope_parameters.get("factor", 1.0) if rope_type(text) in ("linear", "dynamic") else 1.0
    return int(text.max_position_embeddings * factor)


def _never_read(key: str, depth: int) -> bool:
    layer = _VISION_LAYER.search(key)
    return bool(_VISION_POST_NORM.search(key)) or (layer is not None and int(layer.group(1)) >= depth)


def _read_json(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    with _one_line(f"{file} is not readable JSON"):
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not an object")
    return content


@contextlib.contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Turn whatever a loader raises into one line; a device out of memory is no fault of the checkpoint."""
    try:
        yield
    except (torch.OutOfMemoryError, CheckpointError):
        raise
    except Exception as error:
        raise CheckpointError(f"{what} ({first_line(error)})") from error


@contextlib.contextmanager
def _quiet_loading() -> Iterator[None]:
    """Keep transformers' table of missing keys and its bar off stderr: the keys become our one-line error."""
    from transformers.utils import logging as hf_logging

    logger = logging.getLogger("transformers.modeling_utils")
    bar = hf_logging.is_progress_bar_enabled()

    def no_report(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger.addFilter(no_report)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.removeFilter(no_report)
        if bar:
            hf_logging.enable_progress_bar()
